"""Other ways to compute L_p and L_c, timed beside the one in relations.py; each is checked against it first (on the CPU, in float32).

    python results/relation_forms.py --batch_size_per_gpu 8

With train.py's flags, of which --data_path, --precision and --compile change nothing here: images are noise, a row says the rest. A figure
is the milliseconds of heads, losses and their backward pass, the mean of ten calls, the least of three rounds in turns.
"""

import contextlib
import math
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import benchmark
import relations
import train
from data import on_device
from distributed import Processes


def pair_by_pair(targets, students, loss=relations.cross_entropy):
    """mean_over_pairs with a loss a pair: no sum of targets."""
    terms = [loss(target, student).mean() for v, student in enumerate(students) for q, target in enumerate(targets) if q != v]
    return sum(terms) / len(terms)


class ByAutograd:
    """GramCrossEntropy in the plain form."""

    @staticmethod
    def apply(targets, x):
        return relations.cross_entropy(targets, x.mT @ x).flatten(1).mean(dim=1)


def attention(self, teacher, student, boxes):
    """L_p without the teacher's relation: CE_i = logsumexp_j S_ij - k_s s_i . attention(t, t, s)_i."""
    def eq3(p1, p2):
        t, s = (p.unflatten(1, (self.heads, -1)).mT for p in (p1.detach(), p2))    # (B, M, S * S, C / M)
        k_t, k_s = (1 / (math.sqrt(t.shape[-1]) * temperature) for temperature in (self.teacher_temperatures[0], self.student_temperatures[0]))
        read = F.scaled_dot_product_attention(t, t, s, scale=k_t)
        logits = relations.spatial_relation(p2, self.heads, self.student_temperatures[0])
        return (logits.float().logsumexp(dim=-1) - k_s * (s * read).sum(dim=-1)).flatten(1).mean(dim=1)

    return relations.mean_over_overlaps(eq3, teacher, student, boxes, self.overlap_global, self.overlap_local)


def pair_of_views_by_pair(loss, teacher, student, boxes, size_global, size_local):
    """mean_over_overlaps with a pair of views at a time."""
    total, pairs = 0.0, 0.0
    for v, r2 in enumerate(view for views in student for view in views):
        size = size_global if v < len(teacher) else size_local
        for q, r1 in enumerate(teacher):
            if q != v:
                region, valid = relations.overlap(boxes[q], boxes[v])
                o1, o2 = (relations.region_align(relations._as_map(r), boxes[i], region, size) for r, i in ((r1, q), (r2, v)))
                total, pairs = total + torch.where(valid, loss(o1, o2), 0).sum(), pairs + valid.sum()
    return total / pairs


FORMS = {    # what is patched, compiled?, half precision?
    "as in relations.py": ([], False, False),
    "by autograd": ([(relations, "GramCrossEntropy", ByAutograd)], False, False),
    "L_c pair by pair": ([(relations, "mean_over_pairs", pair_by_pair)], False, False),
    "⊙ pair by pair": ([(relations, "mean_over_overlaps", pair_of_views_by_pair)], False, False),
    "L_p as attention": ([(relations.SelfRelationLoss, "spatial", attention)], False, False),
    "compiled": ([], True, False),
    "compiled, by autograd": ([(relations, "GramCrossEntropy", ByAutograd)], True, False),
    "bfloat16, softmax in float32": ([], False, True),
    "the same, compiled": ([], True, True),
    "the same, compiled, L_p as attention": ([(relations.SelfRelationLoss, "spatial", attention)], True, True),
}


def check(args):
    """The other forms' losses and gradients are those of relations.py."""
    B, C = 4, train.ARCHITECTURES[args.arch]["dim"]
    low, features = 0.4 * torch.rand(6, B, 2), [torch.rand(2, B, C, 196), torch.rand(4, B, C, 36)]
    boxes, loss = torch.cat([low, low + 0.5, torch.randint(2, (6, B, 1)).float()], dim=-1), train.build_relation_loss(args)
    outcomes = {}
    for name, (patches, compiled, half) in FORMS.items():
        if patches or not outcomes:
            with contextlib.ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(mock.patch.object(*patch))
                student = [x.clone().requires_grad_() for x in features]
                total = loss.spatial(features[0].flip(0), student, boxes) + loss.channel(features[0].flip(0), student)
                outcomes[name] = total.detach(), *torch.autograd.grad(total, student)
        for a, b in zip(outcomes.get(name, ()), outcomes["as in relations.py"]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()), msg=f"{name} is another loss")


def main():
    args = train.parse_args(["--data_path", benchmark.NOISE, *sys.argv[1:]], "relation_forms.py")
    if not (args.alpha and args.beta):
        sys.exit("relation_forms.py: error: --alpha and --beta must not be 0: L_p and L_c are what is timed")
    if args.channel_relation == "batch":
        sys.exit("relation_forms.py: error: it has no other forms of --channel_relation batch")
    processes = Processes()
    if processes.distributed:
        processes.close()
        sys.exit("relation_forms.py: error: it is of one process: leave out torchrun")
    train.settle(args, processes.device)
    check(args)
    training = train.Training(args, processes, len(benchmark.Noise()))
    loader = train.build_loader(args, benchmark.Noise(), training.mask, processes)
    training.step(0, on_device((views for views, _ in loader), processes.device))    # a step: then memory is at hand as it is in training
    best = dict.fromkeys(FORMS, float("inf"))
    for _ in tqdm(range(3), "rounds", disable=None):
        for name, (patches, args.compile, half) in FORMS.items():
            training.dtype = torch.bfloat16 if half else torch.float32
            with contextlib.ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(mock.patch.object(*patch))
                torch._dynamo.reset()    # or a compiled form would be the one before it
                best[name] = min(best[name], 1e3 * benchmark.relations_alone(args, training, processes.device))
    print(f"{args.arch}, {args.batch_size_per_gpu} images, {train.device_name(processes.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, ms in best.items():
        print(f"{name:40s} {ms:9.2f} ms  {ms / best['as in relations.py']:5.2f}")


if __name__ == "__main__":
    with benchmark.in_one_line("relation_forms.py"):
        main()
