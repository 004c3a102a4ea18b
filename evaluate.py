"""Measure what a trained encoder is worth: the one front door to every evaluation.

    python evaluate.py knn --pretrained_weights runs/demo/backbone.pth --data_path shapes
    python evaluate.py linear --pretrained_weights runs/demo/backbone.pth --data_path shapes
    python evaluate.py finetune --pretrained_weights FILE --data_path /path/to/imagenet
    python evaluate.py segment --pretrained_weights FILE --data_path shapes --frozen
    python evaluate.py export --pretrained_weights runs/dino/checkpoint.pth --output vit_small.pth
    python evaluate.py features --pretrained_weights FILE --data_path FOLDER --output features.pt

With torchrun before it each uses all GPUs. kNN and the linear probe, DINO's protocols, are in this
file, fine-tuning, segmentation and detection in extras/. Weights may be a backbone.pth or
checkpoint.pth of train.py, or a released file (support/weights.py).

N images, C feature channels, K classes, k neighbors
"""

import importlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from data import build_dataset, labeled
from model import ARCHITECTURES
from support.checkpoint import check_output
from support.distributed import Processes, check_alike, sum_over_processes, world
from support.errors import UserError
from support.evaluate_options import parse_evaluate_args
from support.fit import Augmented, TrainingBatches, fit, resumable
from support.inputs import UNREADABLE, autocast, share_loader, to_input
from support.progress import progress
from support.weights import requested_encoder

# --- k-nearest neighbors --------------------------------------------------------------------------


@torch.no_grad()
def extract_features(encoder, images, indices, size, device, batch_size=128, num_workers=0,
                     what="features", stop_asked=None, leave_out=None):
    """Return class tokens after the final norm (N, C), and labels (N,), on device.

    indices: of the N images. Each process computes its share and receives all. what: said of it
    while it runs. stop_asked is asked between batches, by all processes together; once it says
    True, the result is None. leave_out: called with (images, index) for an image that can't be
    read, whose label becomes UNREADABLE; if None that is a UserError, as are features that are not
    finite.
    """
    rank, processes = world()
    loader = share_loader(images, indices, size, device, batch_size, num_workers, bool(leave_out))
    features = torch.zeros(len(indices), encoder.dim, device=device)
    labels = torch.zeros(len(indices), dtype=torch.long, device=device)
    in_common = len(indices) // processes // batch_size    # batches that every process has
    for i, (x, y) in enumerate(progress(loader, what, rank == 0)):
        if stop_asked and i < in_common and stop_asked():
            return None
        first = rank + i * batch_size * processes
        rows = slice(first, first + len(x) * processes, processes)
        with autocast(device):
            features[rows] = encoder.norm(encoder(to_input(x, device)))[:, 0].float()
        labels[rows] = y.to(device)
        for j in (y == UNREADABLE).nonzero().flatten().tolist():
            leave_out(images, indices[first + j * processes])
    features, labels = (sum_over_processes(x) for x in (features, labels))    # others' are zero
    if not features.isfinite().all():
        raise UserError("the encoder's features are not finite: its weights are no good")
    return features, labels


@torch.no_grad()
def nearest_neighbors(train_features, test_features, k, most=2**26):
    """Return cosine and index of the k nearest training images, both (N, k).

    Nearest first. train_features (M, C), test_features (N, C), normalized here. Works in chunks, so
    that at most `most` similarities are in memory at a time.
    """
    train = F.normalize(train_features.float(), dim=1)
    chunks = F.normalize(test_features.float(), dim=1).split(max(1, most // len(train)))
    found = [(chunk @ train.T).topk(min(k, len(train)), dim=1) for chunk in chunks]
    return torch.cat([s for s, _ in found]), torch.cat([index for _, index in found])


def vote(similarity, labels, temperature, classes):
    """Add up the weights of neighbors (N, k), nearest first, by label: (N, K).

    DINO's exp(similarity / temperature), over that of the nearest neighbor, or a small temperature
    would make all of them infinite.
    """
    weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, labels, weight)


def knn_votes(train_features, train_labels, test_features, k, temperature, classes):
    """Return the votes of the k nearest training images, as in DINO's kNN: (N, K).

    train_features (M, C), train_labels (M,), test_features (N, C); similarity is the cosine.
    """
    similarity, index = nearest_neighbors(train_features, test_features, k)
    return vote(similarity, train_labels[index], temperature, classes)


def knn_accuracy(
    encoder, train, val, size, device, ks=(20,), temperature=0.07, most=None, **options
):
    """Return {k: top-1 accuracy in %} on the images of val, by those of train.

    most: of train, evenly thinned out. options: of extract_features; None if that was stopped.
    Images that it left out count nowhere; {} if no others are left.
    """
    chosen, test = labeled(train), labeled(val)
    if most and len(chosen) > most:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, most).long()]
    extracted = []
    for images, indices, name in ((train, chosen, "train"), (val, test, "val")):
        what = f"features of {len(indices)} images of {name}"
        extracted.append(extract_features(
            encoder, images, indices.tolist(), size, device, what=what, **options))
        if extracted[-1] is None:
            return None
        features, labels = extracted[-1]
        read = labels != UNREADABLE
        if not read.any():
            return {}
        extracted[-1] = features[read], labels[read]
    (features, labels), (test_features, test_labels) = extracted
    similarity, index = nearest_neighbors(features, test_features, max(ks))    # once for all k
    accuracy = {}
    for k in ks:
        votes = vote(similarity[:, :k], labels[index[:, :k]], temperature, train.classes)
        accuracy[k] = 100 * (votes.argmax(dim=1) == test_labels).float().mean().item()
    return accuracy


# --- linear probe ---------------------------------------------------------------------------------


def linear_features(encoder, images, blocks, mean_patch):
    """Concatenate the normed class tokens of the last blocks: (B, blocks * C).

    mean_patch adds the mean patch of the last block, C more.
    """
    layers = encoder.get_intermediate_layers(images, blocks)
    parts = [layer[:, 0] for layer in layers] + [layers[-1][:, 1:].mean(dim=1)] * mean_patch
    return torch.cat(parts, dim=-1).float()


class Probes(nn.Module):
    """Linear classifiers on frozen features, one for each learning rate.

    Images (B, 3, H, W), normalized -> logits (rates, B, K).
    """

    def __init__(self, encoder, blocks, mean_patch, classes, rates):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.blocks, self.mean_patch = blocks, mean_patch
        dim = (blocks + mean_patch) * encoder.dim
        self.probes = nn.ModuleList([nn.Linear(dim, classes) for _ in rates])
        for probe in self.probes:
            nn.init.normal_(probe.weight, std=0.01)
            nn.init.zeros_(probe.bias)

    def forward(self, images):
        with torch.no_grad(), autocast(images.device):
            features = linear_features(self.encoder, images, self.blocks, self.mean_patch)
        return torch.stack([probe(features) for probe in self.probes])


def train_probes(probes, batches, args, device, path, arguments):
    """Train Probes for args.lr (per 256 images): SGD 0.9, cosine to 0 by epoch."""
    scale = batches.batch_size * world()[1] / 256
    groups = [{"params": probe.parameters(), "lr": 0.0} for probe in probes.probes]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    network = DistributedDataParallel(probes) if world()[1] > 1 else probes

    def step(number, batch):
        x, y = batch
        cosine = 0.5 * (1 + math.cos(math.pi * (number // batches.steps) / args.epochs))
        for group, rate in zip(optimizer.param_groups, args.lr):
            group["lr"] = rate * scale * cosine
        logits = network(to_input(x, device)).flatten(0, 1)
        # Each probe has its own parameters, so the sum of their losses trains each as if alone.
        loss = F.cross_entropy(logits, y.to(device).repeat(len(args.lr)))
        optimizer.zero_grad()
        (loss * len(args.lr)).backward()
        optimizer.step()
        return loss.detach()

    parts = {"probes": probes.probes, "optimizer": optimizer}
    fit(step, parts, batches, args.epochs, path, arguments)


@torch.no_grad()
def probe_accuracies(probes, images, indices, size, device, args):
    """Return the accuracy of each probe on images[i], in %."""
    loader = share_loader(images, indices, size, device, args.batch_size_per_gpu, args.num_workers)
    right = torch.zeros(len(probes.probes), dtype=torch.long, device=device)
    for x, y in loader:
        right += (probes(to_input(x, device)).argmax(dim=-1) == y.to(device)).sum(dim=1)
    return (100 * sum_over_processes(right) / len(indices)).tolist()


# --- tasks ----------------------------------------------------------------------------------------
# Each prints its protocol with the number, and returns what --json writes.


def build_labeled(args):
    """Return the training and validation images of a classification task."""
    train = build_dataset(args.data_path, "train", args.label_depth, args.classes)
    if not len(labeled(train)):
        raise UserError(f"no labels: {train.unlabeled}; it takes a folder for each class in train/ "
                        "and val/")
    val = build_dataset(args.data_path, "val", args.label_depth, args.classes)
    if not len(labeled(val)):
        raise UserError(f"{args.data_path} has no labels in val/: it takes a folder for each class")
    check_alike(vars(args), train=train, val=val)
    return train, val


def knn(args, encoder, size, processes):
    """Evaluate by kNN, DINO's protocol."""
    train, val = build_labeled(args)
    n, say, processes.working = len(labeled(train)), processes.say, True
    accuracy = knn_accuracy(
        encoder, train, val, size, processes.device, args.nb_knn, args.temperature,
        batch_size=args.batch_size_per_gpu, num_workers=args.num_workers,
    )
    say(f"kNN, T = {args.temperature}, {size} px, {n} training and {len(labeled(val))} "
        f"validation images of {args.data_path}")
    say("    k   top-1")
    for k, value in accuracy.items():
        say(f"{k:5d}  {value:5.1f} %" + (f"  (there are {n})" if k > n else ""))
    return {"images": n, "top1": accuracy}


def linear(args, encoder, size, processes):
    """Evaluate by linear probes, DINO's protocol; held-out images choose the rate."""
    train, val = build_labeled(args)
    if (args.n_last_blocks or 0) > encoder.depth:
        raise UserError(f"--n_last_blocks {args.n_last_blocks}: there are {encoder.depth}")
    large = encoder.heads and encoder.dim >= ARCHITECTURES["vit_base"]["dim"]
    blocks = args.n_last_blocks or (1 if large else min(4, encoder.depth))
    mean_patch = bool(large if args.avgpool_patchtokens is None else args.avgpool_patchtokens)
    torch.manual_seed(args.seed)
    shuffled = labeled(train)[torch.randperm(len(labeled(train)))].tolist()
    number = min(max(round(args.holdout * len(shuffled)), 1), len(shuffled) - 1)
    held, rest = (shuffled[:number], shuffled[number:]) if args.holdout else ([], shuffled)

    device = processes.device
    crop = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    crops = Augmented(train, rest, crop, args.seed)
    batches = TrainingBatches(crops, args.batch_size_per_gpu, args.num_workers, device)
    path, arguments = resumable(args, encoder, size, (train.identity, rest))
    batch, say, processes.working = batches.batch_size * processes.size, processes.say, True
    say(f"batch {batch} in all: learning rates are {batch / 256:g} times those of --lr")
    probes = Probes(encoder, blocks, mean_patch, train.classes, args.lr).to(device)
    train_probes(probes, batches, args, device, path, arguments)
    on_val = probe_accuracies(probes, val, labeled(val).tolist(), size, device, args)
    on_held = probe_accuracies(probes, train, held, size, device, args) if held else on_val
    chosen = max(range(len(args.lr)), key=lambda i: on_held[i])

    tokens = f"class token of the last {blocks} block(s){' and mean patch' if mean_patch else ''}"
    say(f"linear, {tokens}, {size} px, {args.epochs} epochs, batch {batch}, {args.data_path}")
    say("  lr / 256   held out      val")
    rows = list(zip(args.lr, on_held, on_val))
    for rate, a, b in rows:
        say(f"{rate:10g}    {a:5.1f} %  {b:5.1f} %")
    where = f"{len(held)} held-out images" if held else "val"
    say(f"top-1 {on_val[chosen]:.1f} %, final epoch, lr {args.lr[chosen]:g}, chosen on {where}")
    return {
        "images": len(rest), "n_last_blocks": blocks, "avgpool_patchtokens": mean_patch,
        "rates": [dict(zip(("lr", "held_out", "val"), row)) for row in rows],
        "lr": args.lr[chosen], "top1": on_val[chosen],
    }


TASKS = {"knn": knn, "linear": linear}    # extras/ has the others


# --- the front door -------------------------------------------------------------------------------


def evaluate(args, processes):
    """Run the task that the arguments name; return its result, and write it to --json."""
    check_output("json", args.json)
    encoder = requested_encoder(args).to(processes.device)
    size = args.image_size or encoder.image_size
    if size % encoder.patch_size:
        patch = f"the patch size {encoder.patch_size}"
        raise UserError(f"--image_size {size} is not a multiple of {patch}")
    task = TASKS.get(args.task) or importlib.import_module(f"extras.{args.task}").run
    result = task(args, encoder, size, processes)
    facts = {"image_size": size, "heads": encoder.heads, "processes": processes.size}
    result = vars(args) | facts | result
    if args.json and processes.rank == 0:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def main(argv=None):
    """Evaluate as the command line says (sys.argv if None); return the result."""
    args = parse_evaluate_args(argv)
    with Processes("evaluate.py") as processes:
        return evaluate(args, processes)


if __name__ == "__main__":
    main()
