"""extras/resnet.py, extras/ablations.py and extras/benchmark.py."""

import json

import numpy as np
import pytest
import torch
from helpers import SMALL, close, image_folder, one_line
from torch import nn
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from extras import benchmark
from extras.ablations import BatchRelationLoss, DINOPlusLoss
from model import build_encoder
from sampler import overlap, region_align
from support.distributed import Processes
from support.named_sets import Shapes
from support.options import parse_train_args


def test_resnet50_is_torchvisions_without_its_classifier():
    ours, theirs = build_encoder("resnet50", 64).eval(), resnet50().eval()
    left_out = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert left_out == (["fc.weight", "fc.bias"], [])
    images, theirs.fc = torch.randn(2, 3, 64, 96), nn.Identity()
    tokens, scale = ours(images), theirs(images).abs().max().item()
    # 50 layers of float32 sums, in channels_last and not: rounding of the largest values
    close(tokens[:, 0], theirs(images), rtol=0, atol=1e-5 * scale)
    last = create_feature_extractor(theirs, ["layer4"])(images)["layer4"]    # (B, C, h, w)
    close(tokens[:, 1:].mT.unflatten(-1, (2, 3)), last, rtol=0,
          atol=1e-5 * last.abs().max().item())
    assert torch.equal(ours.get_intermediate_layers(images)[0], ours.norm(tokens))


def boxes_of(views, B):
    """Return boxes (views, B, 5), half of them flipped; of image 0 the last overlaps no other."""
    low, high = 0.4 * torch.rand(views, B, 2), 0.6 + 0.4 * torch.rand(views, B, 2)
    boxes = torch.cat([low, high, torch.randint(0, 2, (views, B, 1))], dim=-1)
    boxes[:-1, 0, :4] = torch.tensor([0.0, 0.0, 0.5, 0.7])
    boxes[-1, 0, :4] = torch.tensor([0.6, 0.1, 0.9, 0.5])
    return boxes


def pairs_of(teacher, student):
    """Return the pairs (q, v) of a teacher's and another student's view."""
    return [(q, v) for q in range(teacher) for v in range(student) if q != v]


@pytest.mark.parametrize("locals", [0, 2])
def test_dino_plus_equals_a_slow_loop(locals):
    """DINO's loss on class tokens, and on patches at ⊙'s points image by image; its gradients."""
    B, K, K_patch, V = 3, 6, 5, 2 + locals
    cls = torch.randn(V, B, K, requires_grad=True)
    views = [torch.randn(B, 16 if v < 2 else 4, K_patch, requires_grad=True) for v in range(V)]
    taught_cls = torch.randn(2, B, K, requires_grad=True)
    taught = torch.randn(2, B, 16, K_patch, requires_grad=True)
    boxes, loss = boxes_of(V, B), DINOPlusLoss(K, K_patch, overlap_global=4, overlap_local=2)
    loss.center.value.normal_(std=0.1), loss.patch_center.value.normal_(std=0.1)

    def predicted(student, teacher, center, temperature):    # (..., K) -> scalar
        assignment = ((teacher.detach() - center) / temperature).softmax(dim=-1)
        return -(assignment * (student / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()

    of_cls, of_patches = [], []
    for q, v in pairs_of(2, V):
        of_cls.append(predicted(cls[v], taught_cls[q], loss.center.value, 0.04))
        region, valid = overlap(boxes[q], boxes[v])
        for b in valid.nonzero().flatten():
            size = 4 if v < 2 else 2
            o1 = region_align(taught[q, b][None], boxes[q, b][None], region[b][None], size)
            o2 = region_align(views[v][b][None], boxes[v, b][None], region[b][None], size)
            of_patches.append(predicted(o2, o1, loss.patch_center.value, 0.07))
    expected = torch.stack(of_cls).mean() + torch.stack(of_patches).mean()
    assert len(of_patches) < B * len(of_cls)    # or no view was without an overlap

    patches = [torch.stack(views[:2])] + ([torch.stack(views[2:])] if locals else [])
    value = loss((cls, patches), (taught_cls, [taught]), torch.tensor([0.04, 0.07]), boxes)
    close(value, expected)
    for a, b in zip(*(torch.autograd.grad(x, [cls, *views], retain_graph=True)
                      for x in (value, expected))):
        close(a, b)
    of_teacher = torch.autograd.grad(value, [taught_cls, taught], allow_unused=True)
    assert of_teacher == (None, None)

    before = loss.patch_center.value.clone()
    loss.update_center()
    close(loss.patch_center.value, 0.9 * before + 0.1 * taught.mean(dim=(0, 1, 2)))


def test_dino_plus_of_identical_views_is_the_entropy_of_their_assignment():
    """Matched through ⊙, views agree place by place, though one is mirrored."""
    outputs, boxes = torch.randn(3, 4, 4, 5), boxes_of(2, 3)[:1].repeat(2, 1, 1)
    boxes[1, :, 4] = 1 - boxes[0, :, 4]
    views = torch.stack([outputs, outputs.flip(2)]).flatten(2, 3)    # (2, B, N, K)
    loss = DINOPlusLoss(5, 5, overlap_global=4)    # cells are the patches themselves
    entropy = torch.special.entr((outputs / 0.1).softmax(dim=-1)).sum(dim=-1).mean()
    # places are read with weights of 1 - 1e-6 or so, and logits are 10 times the outputs
    close(loss.patch_loss([views], views, 0.1, boxes), entropy, rtol=1e-4)


def test_relations_over_the_batch_equal_a_slow_loop():
    """One relation of channels for all images of a view; of no two views of one image alone."""
    c1 = [torch.rand(3, 16, 4) for _ in range(2)]                                     # (B, N, C)
    c2 = [torch.rand(3, 16 if v < 2 else 4, 4, requires_grad=True) for v in range(4)]
    boxes, losses = boxes_of(4, 3), []

    def relation(view, temperature):    # (B, N, C) -> (C, C)
        B, N, C = view.shape
        A = torch.stack([sum(view[b, n, i] * view[b, n, j] for b, n in np.ndindex(B, N)) / (B * N)
                         for i, j in np.ndindex(C, C)])
        return (A.view(C, C) / temperature).log_softmax(dim=-1)

    for q, v in pairs_of(2, 4):
        losses.append(-(relation(c1[q], 0.1).exp() * relation(c2[v], 1.0)).sum(dim=-1).mean())
    expected = torch.stack(losses).mean()
    L_p, L_c = BatchRelationLoss(2, temperature_channel=0.1)([], c1, [], c2, boxes)
    close(L_c, expected)
    assert L_p == 0
    for a, b in zip(torch.autograd.grad(L_c, c2), torch.autograd.grad(expected, c2)):
        close(a, b)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Take for granted what a product reaches; give back the threads that --loader takes."""
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e12)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def short(*flags):
    return [*SMALL, "--steps", "2", "--warmup_steps", "1", *flags]


@pytest.mark.parametrize("flags", [["--turns", "2"], ["--recipe", "ibot", "--alpha", "0"]])
def test_benchmark_of_a_step(flags, capsys):
    result = benchmark.main(short(*flags))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert set(result["parts_ms"]) == set(benchmark.PARTS)
    assert all(ms > 0 for ms in result["parts_ms"].values())
    seconds = result["step_ms"] / 1000
    assert result["images_per_s"] == pytest.approx(4 / seconds)
    assert result["mfu"] == pytest.approx(result["tflop"] / seconds)    # of 1 TFLOP/s
    assert ("sere_ms" in result) == ("--turns" in flags)
    if "--turns" in flags:
        assert result["turns"] == 2 and result["sere_error_ms"] >= 0 < result["sere_step_ms"]


def flops(*flags):
    """Return what is counted of a step."""
    args = parse_train_args([*SMALL, "--data_path", "shapes", "--precision", "fp32", *flags])
    return benchmark.count_flops(*benchmark.build(args, Processes("test"), Shapes("train")))


def test_operations_are_counted_as_by_hand():
    """2 global views of 16 patches in ViT-nano, dim 96 and 4 blocks, and DINO's head."""
    C, n, views = 96, 1 + 16, 2 * 4
    blur = 2 * 3 * 32**3                                        # multiply-adds of a view
    embed = 16 * 3 * 8 * 8 * C
    blocks = 4 * (n * 12 * C * C + 2 * n * n * C)               # linear layers, attention
    head = C * 64 + 64 * 64 + 64 * 256 + 256 * 32
    teacher = embed + blocks + head
    student = 2 * embed + 3 * (blocks + head)                   # pixels need no gradient
    counted = flops("--local_crops_number", "0", "--alpha", "0", "--beta", "0")
    assert counted == 2 * views * (blur + teacher + student)
    assert flops("--grad_accum_steps", "3") == 3 * flops()


def test_benchmark_of_the_loader(folder, capsys):
    result = benchmark.main([*SMALL, "--loader", "--data_path", str(folder)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["ratio"] == pytest.approx(result["loader_ms"] / result["pillow_ms"])
    assert result["pillow_ms"] > 0


@pytest.mark.parametrize("flags, word", [
    (["--loader"], "--data_path"), (["--data_path", "nowhere"], "nowhere"),
    (["--turns", "2", "--alpha", "0", "--beta", "0"], "--turns"), (["--steps", "0"], "--steps"),
    (["--stps", "3"], "--stps"),
    (["--loader", "--data_path", "{bad}"], "text.png"),
])
def test_bad_input_gets_one_line(flags, word, tmp_path, capsys):
    (image_folder(tmp_path, train=4, val=1) / "train/class0/text.png").write_text("no image")
    flags = [flag.format(bad=tmp_path) for flag in flags]
    assert word in one_line(capsys, benchmark.main, short(*flags), program="extras.benchmark")
