"""One check per claim, in the files' order: sampler, distributed, relations, augment, baselines, ablations, model, weights,
data, optim, evaluate, finetune, segment, visualize, train, benchmark.

    python -m pytest

Tolerances: float32 arithmetic in another order differs in the last of about 7 digits, so 1e-5 relative and 1e-6 absolute unless
a line says why it is more. What needs CUDA is skipped without it.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import roi_align
from torchvision.transforms import v2

import ablations
import augment
import baselines
import benchmark
import data
import distributed
import evaluate
import finetune
import model
import optim
import relations
import sampler
import segment
import train
import visualize
import weights

HERE = Path(__file__).parent
torch.set_num_threads(2)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # for --deterministic: cuBLAS reads it with its first product, which may be another test's

# The heads' MLPs are many times the small encoders here; in training runs of the tests they are 64 wide.
for name in ("DINOHead", "IBOTHead", "MoCoHead"):
    setattr(train, name, functools.partial(getattr(baselines, name), hidden_dim=64))


@pytest.fixture(autouse=True)
def repeatable(request, monkeypatch):
    """Everything but the test_cuda_... runs on the CPU, where results repeat bit for bit."""
    torch.manual_seed(0)
    if not request.node.name.startswith("test_cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def close(a, b, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# A few seconds of training: 3 epochs, of 4 steps on 16 images.
SMALL = """--recipe dino --arch vit_nano --patch_size 8 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --out_dim 32 --overlap_global 4
--overlap_local 2 --batch_size_per_gpu 4 --epochs 3 --warmup_epochs 1 --warmup_teacher_temp_epochs 1 --knn_every 2 --num_workers 0 --log_every 1""".split()

# Added to SMALL: each recipe, and the ablations that are no recipe.
VARIANTS = {
    "dino": "",
    "ibot": "--recipe ibot",
    "ibot-b": "--recipe ibot-b",
    "mocov3": "--recipe mocov3 --local_crops_number 0",
    "resnet50": "--recipe resnet50 --arch resnet50 --patch_size 32 --global_crops_size 96 --local_crops_size 64 --overlap_global 3 --overlap_local 2"
        " --local_crops_number 1 --batch_size_per_gpu 2",    # an A_c of 2048 x 2048 a view and image
    "ibot, own head": "--recipe ibot --no-shared_head --patch_out_dim 24",
    "mocov3, local views": "--recipe mocov3",
    "dino+": "--baseline dino+ --patch_out_dim 24",
    "batch relations": "--channel_relation batch",
    "symmetric": "--symmetric",
}
VARIANTS = {name: flags.split() for name, flags in VARIANTS.items()}


def random_boxes(B, low=0.3, high=1.0):
    """(B, 5) boxes of sides in [low, high] anywhere in the image, half of them mirrored."""
    size = low + (high - low) * torch.rand(B, 2)
    corner = torch.rand(B, 2) * (1 - size)
    return torch.cat([corner, corner + size, (torch.rand(B, 1) < 0.5).float()], dim=1)


# --- sampler ----------------------------------------------------------------------------------------------------------


def test_overlap_is_the_intersection():
    a = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0], [0.0, 0.0, 0.5, 0.5, 1], [0.0, 0.0, 0.4, 1.0, 0]])
    b = torch.tensor([[0.25, 0.1, 1.0, 0.4, 1], [0.5, 0.0, 1.0, 0.5, 0], [0.6, 0.0, 1.0, 1.0, 0]])
    region, valid = sampler.overlap(a, b)
    close(region[0], torch.tensor([0.25, 0.1, 0.5, 0.4]))
    assert valid.tolist() == [True, False, False]    # views that only touch share no area
    assert region.isfinite().all()


@pytest.mark.parametrize("size", [1, 6, 13])
def test_region_align_is_torchvisions_roi_align_of_the_unflipped_view(size):
    B, H, W = 16, 9, 12
    features, boxes, others = torch.randn(B, 5, H, W), random_boxes(B), random_boxes(B)
    region, valid = sampler.overlap(boxes, others)
    unflipped = torch.where(boxes[:, 4, None, None, None] > 0, features.flip(-1), features)
    low, size_of_view = boxes[:, [0, 1, 0, 1]], (boxes[:, 2:4] - boxes[:, :2]).repeat(1, 2)
    rois = (region - low) / size_of_view * torch.tensor([W, H, W, H])
    expected = roi_align(unflipped, list(rois.split(1)), output_size=size, sampling_ratio=1, aligned=True).flatten(2)
    assert valid.sum() > 8
    close(sampler.region_align(features, boxes, region, size)[valid], expected[valid], atol=1e-5)


def test_region_align_follows_crop_resize_and_flip():
    """A ramp image, whose pixels are their own coordinates, sent through MultiCrop: both views read the same coordinates at
    the same place, and those are the centres of the region's cells."""
    S = 256
    ramp = torch.arange(S, dtype=torch.uint8)
    image = torch.stack([ramp.expand(S, S), ramp[:, None].expand(S, S), torch.zeros(S, S, dtype=torch.uint8)])    # red is x, green is y
    multicrop = augment.MultiCrop(96, (0.5, 1.0), 1, 48, (0.3, 0.5))
    flips, checked = set(), 0
    for index in range(12):
        views = multicrop(image, (0, 0, index))
        boxes = views.rows[:, augment.BOX]
        flips.add(tuple(boxes[:, 4].tolist()))
        for a, b in ((0, 1), (0, 2), (1, 2)):
            region, valid = sampler.overlap(boxes[a][None], boxes[b][None])
            if not valid:
                continue
            maps = [(views.crops[0][i] if i < 2 else views.crops[1][0])[None, :2].float() for i in (a, b)]
            seen = [sampler.region_align(m, boxes[i][None], region, 6) for m, i in zip(maps, (a, b))]
            x, y = (region[0, i] + (region[0, i + 2] - region[0, i]) * (torch.arange(6) + 0.5) / 6 for i in (0, 1))
            expected = torch.stack([x.expand(6, 6), y[:, None].expand(6, 6)]).flatten(1)[None] * S - 0.5    # pixel i is centred on i + 0.5
            for s in seen:    # a value is rounded to 0.5; at the image's border bicubic crops are up to a pixel off
                close(s, expected, rtol=0, atol=1.5)
                assert (s - expected).abs().mean() < 0.4
            checked += 1
    assert checked > 20 and len(flips) > 3


def test_region_align_keeps_a_constant_map_constant():
    """No border bleeds in: a relation of a constant map is uniform (the release's zero padding breaks this)."""
    boxes, region = torch.tensor([[0.2, 0.2, 0.6, 0.6, 1.0]]), torch.tensor([[0.2, 0.2, 0.6, 0.6]])
    close(sampler.region_align(torch.ones(1, 3, 4, 4), boxes, region, 13), torch.ones(1, 3, 169))


# --- distributed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 7), (2, 6, 5, 4)])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_batch_norm_over_processes_is_torchs(shape, options, monkeypatch):
    """The arithmetic for several processes, of which there is one here; two are compared with one further down."""
    norm, torchs = distributed.BatchNorm(6, **options), nn.BatchNorm1d(6, **options)
    if norm.affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    torchs.load_state_dict(norm.state_dict())
    monkeypatch.setattr(distributed, "world", lambda: (0, 2))
    monkeypatch.setattr(distributed, "average_over_processes", lambda x: x)
    x = (5 + 0.1 * torch.randn(shape)).requires_grad_()    # a mean far above the spread, as ViT features have
    y, expected = norm(x), torchs(x.flatten(2) if x.ndim > 3 else x).view(shape)
    close(y, expected, rtol=1e-4, atol=1e-4)    # both divide a difference of large numbers by a small spread
    weights = torch.randn_like(expected)
    close(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, expected)), rtol=1e-3, atol=1e-3)
    if norm.running_mean is not None:
        close(norm.running_mean, torchs.running_mean)
        n = 2 * x.numel() // 6    # two processes' values: their variance is unbiased by another factor
        biased = (torchs.running_var - 0.9) * (n // 2 - 1) / (n // 2)
        close(norm.running_var, 0.9 + biased * n / (n - 1))
        assert norm.num_batches_tracked == 1
        torchs.load_state_dict(norm.state_dict())
        close(norm.eval()(x), torchs.eval()(x.flatten(2) if x.ndim > 3 else x).view(shape))


# --- relations --------------------------------------------------------------------------------------------------------


def softmax(row):
    e = np.exp(np.array(row, dtype=np.float64) - max(row))
    return e / e.sum()


def test_spatial_relation_is_equation_2_in_each_of_M_groups():
    B, C, N, M, t = 2, 12, 5, 3, 0.5
    p = torch.randn(B, C, N)
    A = relations.spatial_relation(p, M, t).softmax(dim=-1)
    assert A.shape == (B, M, N, N)
    for b in range(B):
        for m in range(M):
            group = p[b, m * C // M : (m + 1) * C // M]    # neighbouring channels form a group
            for i in range(N):
                row = [float(sum(group[k, i] * group[k, j] for k in range(C // M))) / math.sqrt(C // M) / t for j in range(N)]
                close(A[b, m, i].double(), torch.from_numpy(softmax(row)))


def test_channel_relation_is_equation_4():
    B, C, N, t = 2, 4, 9, 0.1
    c = torch.randn(B, C, N)
    A = relations.channel_relation(c, t).softmax(dim=-1)
    for b in range(B):
        for i in range(C):
            row = [float(sum(c[b, i, n] * c[b, j, n] for n in range(N))) / N / t for j in range(C)]
            close(A[b, i].double(), torch.from_numpy(softmax(row)), rtol=1e-4)    # logits of a few tens: their rounding shows in the exponential


def test_relation_cross_entropy_is_torchs_and_teaches_the_student_only():
    teacher, student = torch.randn(3, 2, 5, 5, requires_grad=True), torch.randn(3, 2, 5, 5, requires_grad=True)
    re = relations.relation_cross_entropy(teacher, student)
    expected = F.cross_entropy(student.reshape(-1, 5), teacher.reshape(-1, 5).softmax(dim=-1), reduction="none").reshape(3, -1).mean(dim=1)
    close(re, expected)
    re.sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (3, 5, 7)])
def test_gram_cross_entropy_is_the_plain_form_and_keeps_no_relation(shape):
    """Values, gradients of images that weigh differently, and memory: nothing of N x N numbers an image waits for the backward pass."""
    x, teacher, weight, kept = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True), torch.rand(shape[0]), []
    targets = (teacher.mT @ teacher).softmax(dim=-1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = relations.GramCrossEntropy.apply(targets, x)
    expected = relations.relation_cross_entropy(teacher.mT @ teacher, x.mT @ x)
    close(loss, expected)
    assert kept == [x.shape]
    (loss @ weight).backward()
    close(x.grad, torch.autograd.grad(expected @ weight, x)[0])
    assert teacher.grad is None
    first, = torch.autograd.grad(relations.GramCrossEntropy.apply(targets, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):    # and not a second derivative that is wrong
        first.sum().backward()


@pytest.mark.parametrize("kind", ["spatial", "channel"])
def test_half_precision_relations_are_noise_beside_half_precision_heads(kind):
    """At the shapes of a ViT-S/16, 2 x 224 + 4 x 96 pixels, with Gram matrices in bfloat16, ⊙, softmax and cross-entropy in float32. Measured, four
    seeds, gradients: L_p 0.7 to 1.1 % from relations, 1.2 to 2.0 % from heads, 1.5 to 2.3 % from both; L_c 0.6 to 0.7 %, 3.7 to 8.1 %, 3.7 to 8.1 %."""
    C, loss = 384, relations.SelfRelationLoss()
    tokens = [torch.randn(number, 2, grid**2, C).cumsum(dim=2) / grid for number, grid in ((2, 14), (4, 6))]    # neighbours are alike
    boxes = torch.stack([random_boxes(2) for _ in range(6)])
    teacher, student = ([relations.RelationHead(C, predictor) for _ in tokens] for predictor in (False, True))

    def outcome(half_heads, half_relations):
        leaves = [t.clone().requires_grad_() for t in tokens]
        with torch.autocast("cpu", torch.bfloat16, enabled=half_heads):
            taught, learned = ([h(t.flatten(0, 1).mT).unflatten(0, (-1, 2)) for h, t in zip(heads, leaves)] for heads in (teacher, student))
        with torch.autocast("cpu", torch.bfloat16, enabled=half_relations):
            value = loss.spatial(taught[0], learned, boxes) if kind == "spatial" else loss.channel(taught[0], learned)
        assert value.dtype == torch.float32
        return value.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)])

    exact, errors = outcome(False, False), {}
    for precision in ((False, True), (True, False), (True, True)):
        value, gradient = outcome(*precision)
        close(value, exact[0], rtol=5e-4)
        errors[precision] = (gradient - exact[1]).norm() / exact[1].norm()
    assert errors[False, True] < min(0.01, errors[True, False]) and errors[True, True] < 1.3 * errors[True, False], errors


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.005), (torch.float16, 0.001)])    # measured: 0.2 %, 0.02 %
@pytest.mark.parametrize("scale", [1.5, 1e-3])    # logits of about 200 on the diagonal; and small gradients
def test_relations_keep_their_gradient_in_half_precision(scale, dtype, tolerance):
    """Softmax, cross-entropy and the mean over rows are not in half precision: there a peaked softmax's differences would round away, and
    small means underflow."""
    x, targets = scale * torch.randn(4, 96, 384), torch.randn(4, 384, 384).mul(4).softmax(dim=-1)

    def outcome(x):
        loss = relations.GramCrossEntropy.apply(targets, x.requires_grad_()).mean()
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    exact = outcome(x.clone())
    with torch.autocast("cpu", dtype):
        value, gradient = outcome(x.clone())
    close(value, exact[0], rtol=tolerance)
    assert (gradient - exact[1]).norm() < tolerance * exact[1].norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_relation_losses_take_features_of_any_precision(dtype, tolerance):
    teacher, student, boxes = views_of_relations()
    loss = relations.SelfRelationLoss(3, overlap_global=5, overlap_local=2)
    for kind in (lambda t, s: loss.spatial(t, s, boxes), loss.channel):
        other = [x.detach().to(dtype).requires_grad_() for x in student]
        close(kind(teacher[0].detach().to(dtype), other).float(), kind(teacher[0], student).float(), rtol=tolerance)
        assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(kind(teacher[0].detach().to(dtype), other), other))


def test_relations_of_identical_views_agree():
    """Then the cross-entropy is the entropy, its minimum, and its gradient is zero."""
    x, boxes = torch.randn(4, 12, 16), random_boxes(4)
    region, _ = sampler.overlap(boxes, boxes)
    a, b = (sampler.region_align(x.unflatten(-1, (4, 4)), boxes, region, 4).requires_grad_() for _ in range(2))
    logits = relations.spatial_relation(a, 3)
    re = relations.relation_cross_entropy(logits, relations.spatial_relation(b, 3))
    close(re, torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean(dim=(1, 2)))
    re.sum().backward()
    close(b.grad, torch.zeros_like(b))


def test_sampling_then_relating_equals_relating_then_sampling():
    """Identity 1: ⊙ is linear, so the relation of sampled features is the sampled relation of all features."""
    x, boxes = torch.randn(3, 8, 5, 5), random_boxes(3)
    region = torch.stack([boxes[:, 0] + 0.1, boxes[:, 1] + 0.05, boxes[:, 2] - 0.1, boxes[:, 3] - 0.05], dim=1)
    first = relations.spatial_relation(sampler.region_align(x, boxes, region, 3), 2)                         # (B, M, 9, 9)
    full = relations.spatial_relation(x.flatten(2), 2).flatten(1, 2)                                          # (B, M * 25, 25)
    columns = sampler.region_align(full.unflatten(-1, (5, 5)), boxes, region, 3)                              # (B, M * 25, 9)
    rows = columns.unflatten(1, (2, 25)).transpose(1, 2).flatten(2).mT                                        # (B, M * 9, 25)
    rows = sampler.region_align(rows.unflatten(-1, (5, 5)), boxes, region, 3).unflatten(1, (2, 9)).mT         # (B, M, 9, 9)
    close(first, rows, atol=1e-5)


def test_relation_head_is_h_and_for_the_student_g():
    x, student, teacher = torch.randn(3, 6, 7), relations.RelationHead(6), relations.RelationHead(6, predictor=False)
    h = F.relu(F.batch_norm(x, None, None, training=True))
    close(student.project(x), h, atol=1e-5)
    g = torch.einsum("dc,bcn->bdn", student.predictor["linear"].weight, h)
    close(student(x), F.relu(F.batch_norm(g, None, None, training=True)), atol=1e-5)
    close(teacher(x), h, atol=1e-5)
    assert set(dict(teacher.named_parameters())) == {"norm.weight", "norm.bias"}    # no g, and h has no linear layer
    assert set(dict(student.predictor.named_parameters())) == {"linear.weight", "norm.weight", "norm.bias"}    # no bias in the linear layer


def views_of_relations(B=5, C=12, locals=3):
    """Random teacher and student features as networks give them, and boxes; image 0's last local view overlaps nothing."""
    teacher = [torch.rand(2, B, C, 49, requires_grad=True)]
    student = [torch.rand(2, B, C, 49, requires_grad=True)] + ([torch.rand(locals, B, C, 9, requires_grad=True)] if locals else [])
    boxes = torch.stack([random_boxes(B, *((0.6, 1.0) if v < 2 else (0.2, 0.6))) for v in range(2 + locals)])
    boxes[:-1, 0, :4], boxes[-1, 0, :4] = torch.tensor([0.0, 0.0, 0.5, 0.7]), torch.tensor([0.6, 0.1, 0.9, 0.5])
    return teacher, student, boxes


def plain_loss(loss, teacher, student, boxes, over_batch=False):
    """Eq. 3 and 5 pair by pair, each from the plain functions; and how many pairs went into each. over_batch: L_c as in Table 11."""
    student = [view for resolution in student for view in resolution]
    l_p, l_c = [], []
    for q in range(2):
        for v in range(len(student)):
            if v == q:
                continue
            c1, c2 = (torch.cat(list(c), dim=-1)[None] if over_batch else c for c in (teacher[0][q], student[v]))
            l_c.append(relations.relation_cross_entropy(
                relations.channel_relation(c1, loss.teacher_temperatures[1]), relations.channel_relation(c2, loss.student_temperatures[1])))
            region, valid = sampler.overlap(boxes[q], boxes[v])
            size = loss.overlap_global if v < 2 else loss.overlap_local
            for b in valid.nonzero().flatten().tolist():
                one = slice(b, b + 1)
                maps = [x[one].unflatten(-1, (math.isqrt(x.shape[-1]), -1)) for x in (teacher[0][q], student[v])]
                points = [sampler.region_align(m, boxes[i][one], region[one], size) for m, i in zip(maps, (q, v))]
                l_p.append(relations.relation_cross_entropy(
                    relations.spatial_relation(points[0], loss.heads, loss.teacher_temperatures[0]), relations.spatial_relation(points[1], loss.heads, loss.student_temperatures[0])))
    return torch.cat(l_p).mean(), torch.cat(l_c).mean(), len(l_p), len(l_c)


@pytest.mark.parametrize("sharpen", ["teacher", "student"])
@pytest.mark.parametrize("locals", [0, 1, 3])
def test_self_relation_loss_equals_the_plain_form_values_and_gradients(sharpen, locals):
    """Which pairs are used: 2 (1 + locals) for L_c, those of them that overlap for L_p; identity 2 (summed targets) changes nothing."""
    teacher, student, boxes = views_of_relations(locals=locals)
    loss = relations.SelfRelationLoss(3, 0.5, 0.1, sharpen, overlap_global=5, overlap_local=2)
    expected_p, expected_c, pairs_p, pairs_c = plain_loss(loss, teacher, student, boxes)
    assert pairs_c == 2 * (1 + locals) and pairs_p < 2 * (1 + locals) * 5 + (locals == 0)
    for value, expected in ((loss.spatial(teacher[0], student, boxes), expected_p), (loss.channel(teacher[0], student), expected_c)):
        close(value, expected)
        assert torch.autograd.grad(value, teacher, allow_unused=True, retain_graph=True) == (None,)    # G
        for a, b in zip(torch.autograd.grad(value, student, allow_unused=True), torch.autograd.grad(expected, student, allow_unused=True)):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b, atol=1e-7)


def test_sharpening_divides_the_named_networks_logits():
    """Both readings of who gets t_p and t_c exist, and differ."""
    teacher, student, boxes = views_of_relations()
    values = {who: relations.SelfRelationLoss(3, 0.5, 0.1, who, 5, 2).channel(teacher[0], student) for who in ("teacher", "student")}
    plain = relations.SelfRelationLoss(3, 1.0, 1.0, "teacher", 5, 2)
    plain.teacher_temperatures = (1.0, 0.1)
    close(values["teacher"], plain.channel(teacher[0], student))
    assert abs(values["teacher"] - values["student"]) > 0.01
    with pytest.raises(ValueError, match="sharpen"):
        relations.SelfRelationLoss(sharpen="both")


def test_views_without_overlap_contribute_neither_value_nor_gradient():
    teacher, student, boxes = views_of_relations(locals=1)
    loss = relations.SelfRelationLoss(3, overlap_global=5, overlap_local=2)
    value = loss.spatial(teacher[0], student, boxes)
    value.backward()
    assert student[1].grad[0, 0].abs().sum() == 0 and student[1].grad[0, 1].abs().sum() > 0    # image 0's local view overlaps nothing
    with torch.no_grad():
        student[1][0, 0] += 100
    close(loss.spatial(teacher[0], student, boxes), value)

    boxes[0], boxes[1:] = torch.tensor([0.0, 0.0, 0.3, 1.0, 0.0]), torch.tensor([0.5, 0.0, 1.0, 1.0, 0.0])
    boxes[1], boxes[2] = torch.tensor([0.4, 0.0, 0.6, 1.0, 0.0]), torch.tensor([0.7, 0.0, 1.0, 1.0, 0.0])
    nothing = loss.spatial(teacher[0], student, boxes)
    assert nothing == 0 and nothing.requires_grad    # still in the graph


def test_impossible_relation_heads_name_the_possible_ones():
    with pytest.raises(ValueError, match=r"10 channels .* 3 relation heads; possible: \[1, 2, 5, 10\]"):
        relations.spatial_relation(torch.zeros(1, 10, 4), 3)


# --- augment ----------------------------------------------------------------------------------------------------------


def picture(H=90, W=120):
    """A smooth uint8 image with some of everything in it."""
    y, x = torch.meshgrid(torch.linspace(0, 1, H), torch.linspace(0, 1, W), indexing="ij")
    return (255 * torch.stack([x, (x + y) / 2, 1 - y * x]) * (0.6 + 0.4 * torch.sin(20 * x * y))).to(torch.uint8)


def test_views_are_a_function_of_seed_epoch_index_and_view():
    multicrop, image = augment.MultiCrop(32, (0.4, 1.0), 3, 16, (0.1, 0.4)), picture()
    views = multicrop(image, (0, 1, 2))
    assert [tuple(c.shape) for c in views.crops] == [(2, 3, 32, 32), (3, 3, 16, 16)] and views.rows.shape == (5, augment.ROW)
    torch.manual_seed(123)    # whatever state a worker is in
    state = torch.get_rng_state()
    again = multicrop(image, (0, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)    # and it is left alone
    assert torch.equal(views.rows, again.rows) and all(torch.equal(a, b) for a, b in zip(views.crops, again.crops))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(views.rows, multicrop(image, other).rows)
    assert len({tuple(row.tolist()) for row in views.rows}) == 5    # views differ from each other
    fewer = augment.MultiCrop(32, (0.4, 1.0), 1, 16, (0.1, 0.4))(image, (0, 1, 2))
    assert torch.equal(fewer.rows, views.rows[:3])    # a view does not depend on how many follow


def test_crops_have_the_area_asked_for_and_a_box_inside_the_image():
    multicrop, image = augment.MultiCrop(32, (0.4, 0.9), 2, 16, (0.1, 0.3)), picture()
    rows = torch.stack([multicrop(image, (0, 0, i)).rows for i in range(100)])
    x0, y0, x1, y1, flipped = rows[:, :, augment.BOX].unbind(dim=-1)
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 1).all() and (y1 <= 1).all()
    area = (x1 - x0) * (y1 - y0)
    assert area[:, :2].min() > 0.38 and area[:, :2].max() < 0.92 and area[:, 2:].min() > 0.09 and area[:, 2:].max() < 0.32    # sides are whole pixels
    assert 0.4 < flipped.mean() < 0.6    # 400 coins: 0.025 standard deviation


def test_crops_are_placed_as_torchvision_places_them():
    multicrop, scale, n = augment.MultiCrop(), (0.3, 0.8), 2000
    theirs = v2.RandomResizedCrop(8, scale)
    for H, W in ((60, 90), (90, 60)):
        ours = torch.tensor([multicrop._place(H, W, scale) for _ in range(n)]).double()
        expected = [theirs.make_params([torch.empty(3, H, W)]) for _ in range(n)]
        expected = torch.tensor([[p[key] for key in ("top", "left", "height", "width")] for p in expected]).double()
        numbers, expected = (torch.cat([x, x[:, 2:3] * x[:, 3:], (x[:, 2:3] / x[:, 3:]).log()], dim=1) for x in (ours, expected))    # and area, aspect
        for power in (1, 2):    # first and second moments, within four standard deviations of their difference
            a, b = numbers**power, expected**power
            assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * ((a.var(dim=0) + b.var(dim=0)) / n).sqrt()).all()
    for H, W in ((10, 200), (200, 10)):    # nothing fits
        place = v2.RandomResizedCrop(8, (1.0, 1.0)).make_params([torch.empty(3, H, W)])
        assert multicrop._place(H, W, (1.0, 1.0)) == tuple(place[key] for key in ("top", "left", "height", "width"))


def test_crops_are_resized_as_torchvision_resizes_them():
    multicrop, image = augment.MultiCrop(32), picture(60, 90)
    flips = set()
    for seed in range(8):
        torch.manual_seed(seed)
        crop, (x0, y0, x1, y1, flipped) = multicrop._crop(image, 32, (0.3, 0.8))
        top, left, bottom, right = (round(x) for x in (y0 * 60, x0 * 90, y1 * 60, x1 * 90))
        expected = v2.functional.resized_crop(image, top, left, bottom - top, right - left, [32, 32], v2.InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(crop, v2.functional.horizontal_flip(expected) if flipped else expected)
        flips.add(flipped)
    assert flips == {0.0, 1.0}


def test_parameters_follow_dinos_distributions():
    multicrop, image = augment.MultiCrop(8, (0.5, 1.0), 2, 8, (0.2, 0.5)), picture(20, 20)
    rows = torch.stack([multicrop(image, (0, 0, i)).rows for i in range(500)])    # (images, views, ROW)
    factors, hue = rows[:, :, augment.FACTORS], rows[:, :, augment.HUE]
    jittered = (factors != 1).any(dim=-1)

    def share(x, expected):    # within four standard deviations
        n = x.numel()
        assert abs(x.float().mean() - expected) <= 4 * (expected * (1 - expected) / n) ** 0.5, (x.float().mean(), expected)

    share(jittered, 0.8)
    share(rows[:, :, augment.GREY], 0.2)
    for view, probability in ((0, 1.0), (1, 0.1), (2, 0.5), (3, 0.5)):
        share(rows[:, view, augment.SIGMA] > 0, probability)
        share(rows[:, view, augment.SOLARIZE], 0.2 if view == 1 else 0.0)
    for values, low, high in ((factors[..., 0][jittered], 0.6, 1.4), (factors[..., 1][jittered], 0.6, 1.4), (factors[..., 2][jittered], 0.8, 1.2),
                              (hue[jittered], -0.1, 0.1), (rows[:, 0, augment.SIGMA], 0.1, 2.0)):
        assert values.min() >= low and values.max() <= high
        spread = (high - low) / 12**0.5    # uniform
        assert abs(values.mean() - (low + high) / 2) < 4 * spread / values.numel() ** 0.5 and abs(values.std() / spread - 1) < 0.1
    sigmas = rows[:, 2:, augment.SIGMA]
    assert abs(sigmas[sigmas > 0].mean() - 1.05) < 4 * 1.9 / 12**0.5 / (sigmas > 0).sum() ** 0.5    # whichever are blurred
    share(rows[:, :, augment.GREY][jittered], 0.2)
    drawn = torch.cat([factors[jittered], hue[jittered][:, None]], dim=1)
    assert (drawn.T.corrcoef() - torch.eye(4)).abs().max() < 4 / len(drawn) ** 0.5    # one of the other independent
    orders = rows[:, :, augment.ORDER][jittered]
    assert (orders.sort(dim=-1).values == torch.arange(4.0)).all() and len({tuple(o.tolist()) for o in orders}) == 24
    for position in range(4):
        share(orders[:, 3] == position, 0.25)    # hue comes anywhere


def test_block_masks_cover_the_share_asked_for_and_no_more():
    mask = augment.BlockMask(14, (0.0, 0.3), (0.0, 0.2))
    shares = torch.tensor([mask().float().mean() for _ in range(600)])
    none = (shares == 0).float().mean()
    assert abs(none - 0.5) < 0.09    # four standard deviations of a fair coin
    some = shares[shares > 0]
    assert some.max() <= 0.5 and some.min() > 0.02
    # uniform in [0.1, 0.5], less what is left when no further rectangle fits
    assert abs(some.mean() - 0.3) < 0.04 and 0.09 < some.std() < 0.14
    assert not augment.BlockMask(14, [0.0], [0.0])().any()
    for share in (0.1, 0.3, 0.7):
        exact = torch.tensor([augment.BlockMask(14, [share], [0.0])().float().mean() for _ in range(50)])
        assert exact.max() <= share and exact.mean() > share - 0.05
    assert augment.BlockMask(4, [0.5], [0.0])().sum() <= 8


def test_block_masks_are_made_of_rectangles():
    block = augment.BlockMask(14)
    for budget in (98.0, 30.0, 17.0):
        aspects = []
        for _ in range(100):
            mask = np.zeros((14, 14), dtype=bool)
            covered = block._cover(mask, budget)
            if not covered:
                continue
            rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert covered == mask.sum() == height * width <= budget and height * width >= 0.7 * 16    # an area of 16 and more, rounded to whole patches
            aspects.append(math.log(height / width))
        assert len(aspects) > 80 and max(map(abs, aspects)) < math.log(1 / 0.3) + 0.4 and min(aspects) < -0.5 and max(aspects) > 0.5
        if budget == 98.0:
            assert max(aspects) > math.log(1 / 0.4) and min(aspects) < math.log(0.4)
    cells = torch.stack([augment.BlockMask(14, [0.3], [0.0])() for _ in range(600)]).float().mean(dim=0)    # how often each patch is hidden
    # a patch is hidden 0.3 of the time, the middle more often than the border; 0.02 is the standard deviation of one, less of sums
    for mirrored in (cells.flip(0), cells.flip(1), cells.T):
        assert (cells - mirrored).abs().max() < 0.13 and abs(cells[:7].mean() - cells.flip(0)[:7].mean()) < 0.04 and abs(cells[:, :7].mean() - cells[:, 7:].mean()) < 0.04
    full = np.ones((14, 14), dtype=bool)
    assert block._cover(full, 50.0) == 0    # nothing left to cover


def test_masks_are_a_function_of_the_seed_and_change_nothing_else():
    image = picture()
    plain, masked = (augment.MultiCrop(32, (0.4, 1.0), 2, 16, (0.1, 0.4), mask) for mask in (None, augment.BlockMask(4, [0.4], [0.1])))
    a, b, c = plain(image, (0, 1, 2)), masked(image, (0, 1, 2)), masked(image, (0, 1, 2))
    assert a.mask is None and b.mask.shape == (2, 16) and b.mask.dtype == torch.bool
    assert torch.equal(a.rows, b.rows) and all(torch.equal(x, y) for x, y in zip(a.crops, b.crops)) and torch.equal(b.mask, c.mask)
    many = torch.stack([masked(image, (0, 1, i)).mask for i in range(20)])
    assert len({tuple(m.flatten().tolist()) for m in many}) > 15 and not torch.equal(many[:, 0], many[:, 1])    # its own for each image and view
    batch, _ = augment.collate([(b, []), (masked(image, (0, 1, 3)), [])])
    assert batch.mask.shape == (2, 2, 16) and torch.equal(batch.mask[:, 0], b.mask)


def row(**values):
    """A row that changes nothing but what is named."""
    r = torch.zeros(augment.ROW)
    r[augment.BOX], r[augment.FACTORS], r[augment.ORDER] = torch.tensor([0, 0, 1, 1, 0.0]), 1.0, torch.arange(4.0)
    for name, value in values.items():
        r[getattr(augment, name)] = torch.as_tensor(value, dtype=torch.float32)
    return r


def photometric(image, *rows):
    """Photometric of one image under several rows at once, back in [0, 1]."""
    return augment.denormalize(augment.Photometric()(image.expand(len(rows), -1, -1, -1), torch.stack(rows)))


def test_photometric_applies_each_samples_own_parameters_as_torchvision_does():
    image = picture()
    x = image.float() / 255
    f = v2.functional
    cases = [
        (row(), x),
        (row(FACTORS=[1.3, 1, 1]), f.adjust_brightness(x, 1.3)),
        (row(FACTORS=[1, 0.7, 1]), f.adjust_contrast(x, 0.7)),
        (row(FACTORS=[1, 1, 1.2]), f.adjust_saturation(x, 1.2)),
        (row(HUE=0.1), f.adjust_hue(x, 0.1)),
        (row(HUE=-0.07), f.adjust_hue(x, -0.07)),
        (row(GREY=1), f.rgb_to_grayscale(x, 3)),
        (row(SOLARIZE=1), torch.where(x >= 128 / 255, 1 - x, x)),
    ]
    done = photometric(image, *(r for r, _ in cases))    # one batch
    for (_, expected), ours in zip(cases, done):
        close(ours, expected, rtol=0, atol=2e-3)    # torchvision's grey has weights of four digits (0.2989, ...)


def test_photometric_keeps_each_samples_own_order():
    image, factors, hue = picture(), [1.4, 0.6, 1.2], 0.1
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]]
    done = photometric(image, *(row(FACTORS=factors, HUE=hue, ORDER=order) for order in orders))
    steps = [v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation, v2.functional.adjust_hue]
    for order, ours in zip(orders, done):
        x = image.float() / 255
        for operation in sorted(range(4), key=lambda i: order[i]):
            x = steps[operation](x, ([*factors, hue])[operation])
        close(ours, x, rtol=0, atol=5e-3)    # the grey weights again, through four steps
    assert (done[0] - done[1]).abs().max() > 0.05    # the order matters


def test_photometric_goes_through_its_steps_in_dinos_order():
    """Jitter, grey, blur, solarize: none of them commutes with the next."""
    image = picture()
    x = v2.functional.adjust_hue(v2.functional.adjust_saturation(image.float() / 255, 1.2), 0.1)
    x = v2.functional.gaussian_blur(v2.functional.rgb_to_grayscale(x, 3), [15, 15], [1.5, 1.5])
    x = torch.where(x > 127.5 / 255, 1 - x, x)
    ours = photometric(image, row(FACTORS=[1, 1, 1.2], HUE=0.1, GREY=1, SIGMA=1.5, SOLARIZE=1))[0]
    inside = (slice(None), slice(8, -8), slice(8, -8))    # torchvision's blur mirrors at the border
    assert ((ours - x)[inside].abs() > 5e-3).float().mean() < 0.01    # but where a value lies at the threshold itself


def test_blur_is_a_gaussian():
    image = torch.zeros(3, 41, 41, dtype=torch.uint8)
    image[:, 20, 20] = 255
    for sigma, ours in zip((0.5, 2.0), photometric(image, row(SIGMA=0.5), row(SIGMA=2.0))):
        close(ours, v2.functional.gaussian_blur(image.float() / 255, [39, 39], [sigma, sigma]), rtol=0, atol=1e-5)
    flat = torch.full((3, 9, 9), 100, dtype=torch.uint8)
    close(photometric(flat, row(SIGMA=2.0))[0], flat / 255, atol=1e-5)    # brightness is kept, at the border too


# --- baselines --------------------------------------------------------------------------------------------------------


def assigned(outputs, center, temp):
    return ((outputs.detach() - center) / temp).softmax(dim=-1)


def plain_dino(student, teacher, center, temp):
    """DINO's loss, pair by pair: student (V, B, K), teacher (G, B, K)."""
    pairs = [(q, v) for q in range(len(teacher)) for v in range(len(student)) if q != v]
    return sum(F.cross_entropy(student[v] / 0.1, assigned(teacher[q], center, temp)) for q, v in pairs) / len(pairs)


def plain_ibot(student, teacher, centers, temps, mask):
    """iBOT's: the above on class tokens, and the mean over the masked patches of each view, patch by patch; they come first in a view's outputs."""
    total = 0.0
    for g, b in np.ndindex(*mask.shape[:2]):
        terms = [F.cross_entropy(student.patches[0][g, b, n] / 0.1, assigned(teacher.patches[0][g, b, n], centers[1], temps[1])) for n in range(mask[g, b].sum())]
        total = total + sum(terms) / max(len(terms), 1)
    return plain_dino(student.summary, teacher.summary, centers[0], temps[0]) + total / (mask.shape[0] * mask.shape[1])


def plain_moco(student, teacher, temperature):
    """MoCo v3's: for each of the two directions, each query among all keys of the other view."""
    total, pairs = 0.0, 0
    for q in range(len(teacher)):
        for v in range(len(student)):
            if v != q:
                losses = []
                for i in range(student.shape[1]):
                    similar = torch.stack([F.cosine_similarity(student[v, i], key.detach(), dim=0) for key in teacher[q]]) / temperature
                    losses.append(similar.logsumexp(dim=0) - similar[i])
                total, pairs = total + 2 * temperature * sum(losses) / len(losses), pairs + 1
    return total * 2 / pairs    # two directions


def plain_dino_plus(student, teacher, centers, temps, boxes, sizes):
    """DINO's on class tokens, and on patch tokens at the centres of the overlap's cells, image by image."""
    views = [view for resolution in student.patches for view in resolution]    # (B, N, K)
    assert len(views) == len(boxes)    # local ones too
    losses = []
    for q in range(2):
        for v in range(len(views)):
            region, valid = sampler.overlap(boxes[q], boxes[v])
            for b in valid.nonzero().flatten().tolist() if q != v else []:
                one, size = slice(b, b + 1), sizes[0] if v < 2 else sizes[1]
                maps = [x[one].mT.unflatten(-1, (math.isqrt(x.shape[1]), -1)) for x in (teacher.patches[0][q], views[v])]
                o1, o2 = (sampler.region_align(m, boxes[i][one], region[one], size)[0].T for m, i in zip(maps, (q, v)))    # (S * S, K)
                losses.append(F.cross_entropy(o2 / 0.1, assigned(o1, centers[1], temps[1])))
    return plain_dino(student.summary, teacher.summary, centers[0], temps[0]) + torch.stack(losses).mean()


def plain_terms(args, taught, learned, boxes, mask, centers=(0.0, 0.0), moco_temperature=0.2):
    """L_I, L_p and L_c of a command line's first epoch, from slow loops alone."""
    temps = args.warmup_teacher_temp, args.warmup_teacher_patch_temp
    l_i = {
        "dino": lambda: plain_dino(learned.embedding, taught.embedding, centers[0], temps[0]),
        "ibot": lambda: plain_ibot(learned.embedding, taught.embedding, centers, temps, mask),
        "mocov3": lambda: plain_moco(learned.embedding, taught.embedding, moco_temperature),
        "dino+": lambda: plain_dino_plus(learned.embedding, taught.embedding, centers, temps, boxes, (args.overlap_global, args.overlap_local)),
    }[args.baseline]()
    both = (args.temperature_spatial, args.temperature_channel)
    settings = argparse.Namespace(
        heads=args.relation_heads, overlap_global=args.overlap_global, overlap_local=args.overlap_local,
        teacher_temperatures=both if args.sharpen == "teacher" else (1.0, 1.0), student_temperatures=both if args.sharpen == "student" else (1.0, 1.0))
    l_p = plain_loss(settings, taught.spatial, learned.spatial, boxes)[0]
    l_c = plain_loss(settings, taught.channel, learned.channel, boxes, over_batch=args.channel_relation == "batch")[1]
    return torch.stack([l_i, l_p, l_c])


@pytest.mark.parametrize("flags", [flags for name, flags in VARIANTS.items() if name != "resnet50"], ids=" ".join)    # its losses are DINO's
def test_losses_of_every_recipe_equal_slow_loops(flags):
    """Values, and gradients to the student's outputs; none reaches the teacher's."""
    args, baseline, student, teacher = networks(flags)
    views, boxes, mask = random_views(args, baseline)
    if mask is not None:
        mask[0, 0] = False    # a view without masks
    centers = [torch.zeros(())] * 2
    for i, assignment in enumerate(m for m in baseline.loss.modules() if isinstance(m, baselines.Assignment)):
        centers[i] = assignment.center.normal_(std=0.1)
    with torch.no_grad():
        taught = teacher(views[:1], mask)
    learned = student(views, mask)
    outputs = [x.requires_grad_() for x in tensors(learned[1:])]    # but the summary, on which embedding depends
    l_i = baseline.loss(learned.embedding, taught.embedding, baseline.teacher_temp[0], boxes)
    ours, plain = torch.stack([l_i, *train.build_relation_loss(args)(taught, learned, boxes)]), plain_terms(args, taught, learned, boxes, mask, centers)
    close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(terms.sum(), outputs, retain_graph=True) for terms in (ours, plain))):
        close(a, b, rtol=1e-3, atol=1e-6 * float(b.abs().max()) + 1e-8)
    leaves = tensors(taught)
    for x in leaves:
        x.requires_grad_()
    again = [baseline.loss(learned.embedding, taught.embedding, baseline.teacher_temp[0], boxes), *train.build_relation_loss(args)(taught, learned, boxes)]
    assert torch.autograd.grad(sum(again), leaves, allow_unused=True) == (None,) * len(leaves)


@pytest.mark.parametrize("flags", [flags for name, flags in VARIANTS.items() if name != "resnet50"], ids=" ".join)
def test_losses_are_float32_under_bfloat16_autocast(flags):
    args, baseline, student, teacher = networks(flags)
    batch = random_views(args, baseline)
    expected = loss_terms(args, baseline, student, teacher, *batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss_terms(args, baseline, student, teacher, *batch)
    assert terms.dtype == torch.float32
    close(terms[1:], expected[1:], rtol=5e-4)    # measured 2e-4; with softmaxes in bfloat16 it was 3e-3
    close(terms[0], expected[0], rtol=0.1 if args.baseline == "mocov3" else 2e-3)    # measured 6e-4; MoCo v3's batch norms of 3 images magnify the networks' rounding


def tensors(x):
    """All tensors of floating-point numbers in nested tuples and lists."""
    if isinstance(x, (tuple, list)):
        return [t for part in x for t in tensors(part)]
    return [x] if isinstance(x, torch.Tensor) and x.is_floating_point() else []


def test_dino_centre_by_hand_once_a_step():
    loss, (a, b) = baselines.DINOLoss(4, center_momentum=0.9), torch.randn(2, 2, 3, 4)
    loss.center.fill_(1.0)
    loss(torch.randn(3, 3, 4), a, 0.04), loss(torch.randn(3, 3, 4), b, 0.04)    # two batches of one optimizer step
    close(loss.center, torch.ones(4))    # a forward pass leaves it
    loss.update_center()
    close(loss.center, 0.9 + 0.1 * torch.cat([a, b]).mean(dim=(0, 1)))
    loss(torch.randn(3, 3, 4), a, 0.04)
    loss.update_center()
    close(loss.center, 0.9 * (0.9 + 0.1 * torch.cat([a, b]).mean(dim=(0, 1))) + 0.1 * a.mean(dim=(0, 1)))
    assert set(loss.state_dict()) == {"center"}


def test_dino_head_gives_cosines_and_is_the_paper_s_shape():
    head, x = baselines.DINOHead(12, 9, norm_last_layer=True), torch.randn(5, 12)
    bottleneck = head.mlp(x)
    close(head(x), F.cosine_similarity(bottleneck[:, None], head.last_layer.weight[None], dim=-1))
    assert [tuple(p.shape) for p in head.parameters()] == [(2048, 12), (2048,), (2048, 2048), (2048,), (256, 2048), (256,), (9, 256), (9, 1)]
    assert not head.last_layer.scale.requires_grad and baselines.DINOHead(12, 9, norm_last_layer=False).last_layer.scale.requires_grad


def test_ibot_centres_class_and_patch_tokens_apart_over_all_teacher_patches():
    loss, (summary, patches), mean = baselines.IBOTLoss(4, 5), (torch.randn(2, 3, 4), torch.randn(2, 3, 7, 5)), torch.randn(5)
    taught = baselines.IBOTOutput(summary, [patches], mean=mean)    # patches: of some; mean: of all
    student = baselines.IBOTOutput(torch.randn(3, 3, 4), [torch.randn(2, 3, 7, 5)], torch.zeros(2, 3, 7, dtype=torch.bool))
    value = loss(student, taught, torch.tensor([0.04, 0.07]))
    close(value, plain_dino(student.summary, summary, torch.zeros(4), 0.04))    # nothing masked
    logged = loss.diagnostics(taught, torch.tensor([0.04, 0.07]))

    def entropy(outputs, temp):
        p = (outputs / temp).softmax(dim=-1)
        return float(-(p * p.clamp(min=1e-30).log()).sum(dim=-1).mean())

    assert logged == pytest.approx({"teacher_temp": 0.04, "teacher_patch_temp": 0.07, "teacher_entropy": entropy(summary, 0.04),
                                    "teacher_patch_entropy": entropy(patches, 0.07), "L_I_summary": float(value), "L_I_patch": 0.0}, rel=1e-4)
    loss.update_center()
    close(loss.center, 0.1 * summary.mean(dim=(0, 1)))
    close(loss.patches.center, 0.1 * mean)
    assert set(loss.state_dict()) == {"center", "patches.center"}


def test_ibot_centre_is_of_all_the_teachers_patches_whatever_is_masked():
    args, baseline, student, teacher = networks(VARIANTS["ibot"])
    views, boxes, mask = random_views(args, baseline)
    with torch.no_grad():
        taught, everything = teacher(views[:1], mask), teacher(views[:1])
        baseline.loss(student(views, mask).embedding, taught.embedding, baseline.teacher_temp[0], boxes)
    baseline.loss.update_center()
    close(baseline.loss.patches.center, 0.1 * everything.embedding.patches[0].mean(dim=(0, 1, 2)))
    close(baseline.loss.center, 0.1 * everything.embedding.summary.mean(dim=(0, 1)))


def test_ibot_head_gives_what_is_masked_and_of_the_teacher_the_mean_of_all():
    summary, patches, mask = torch.randn(2, 3, 12), torch.randn(2, 3, 7, 12), torch.rand(2, 3, 7) < 0.4
    mask[0, 0], mask[1, 1] = False, torch.tensor([1, 0, 0, 1, 0, 1, 1])
    mask &= mask.cumsum(dim=-1) <= 4
    for mean in (False, True):
        head = baselines.IBOTHead(12, 9, patch_out_dim=5, most=4, mean=mean)
        full = head(summary, [patches])
        given = head(summary, [patches], mask)
        assert given.patches[0].shape == (2, 3, 4, 5) and torch.equal(given.masked.sum(dim=-1), mask.sum(dim=-1))
        assert (given.masked[..., 1:] <= given.masked[..., :-1]).all()    # first those that are masked
        close(given.patches[0][given.masked], full.patches[0][mask])      # in the order of the patches
        close(given.summary, full.summary)
        if mean:
            close(given.mean, full.patches[0].mean(dim=(0, 1, 2)))
        else:
            assert given.mean is None


def test_ibot_head_is_shared_but_for_the_last_layer_if_asked():
    summary, patches = torch.randn(3, 2, 12), [torch.randn(2, 2, 5, 12)]
    for patch_out_dim in (None, 7):
        head = baselines.IBOTHead(12, 9, patch_out_dim=patch_out_dim)
        out, layer = head(summary, patches), head.patch_last_layer if patch_out_dim else head.last_layer
        close(out.summary, F.cosine_similarity(head.mlp(summary)[..., None, :], head.last_layer.weight, dim=-1))
        close(out.patches[0], F.cosine_similarity(head.mlp(patches[0])[..., None, :], layer.weight, dim=-1))


def test_moco_head_is_moco_v3s():
    """Projector of 3 and predictor of 2 layers without biases, batch norm after each, without scale and shift after the last; statistics of one view."""
    head, x = baselines.MoCoHead(12, 8, hidden_dim=16), torch.randn(2, 6, 12)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "projector.0.weight": (16, 12), "projector.1.weight": (16,), "projector.1.bias": (16,), "projector.3.weight": (16, 16), "projector.4.weight": (16,),
        "projector.4.bias": (16,), "projector.6.weight": (8, 16), "predictor.0.weight": (16, 8), "predictor.1.weight": (16,), "predictor.1.bias": (16,),
        "predictor.3.weight": (8, 16)}
    assert not list(head.buffers()) and not list(baselines.MoCoHead(12, 8, predictor=False).predictor.parameters())
    w = dict(head.named_parameters())
    for view, out in zip(x, head(x)):
        y = F.relu(F.batch_norm(view @ w["projector.0.weight"].T, None, None, training=True))
        y = F.relu(F.batch_norm(y @ w["projector.3.weight"].T, None, None, training=True))
        y = F.batch_norm(y @ w["projector.6.weight"].T, None, None, training=True)
        y = F.relu(F.batch_norm(y @ w["predictor.0.weight"].T, None, None, training=True))
        close(out, F.batch_norm(y @ w["predictor.3.weight"].T, None, None, training=True), atol=1e-5)
    assert [tuple(p.shape) for p in baselines.MoCoHead(12).parameters() if p.ndim > 1] == [(4096, 12), (4096, 4096), (256, 4096), (4096, 256), (256, 4096)]


# --- ablations --------------------------------------------------------------------------------------------------------


def test_a_batch_of_one_image_has_its_own_relation():
    """Then Table 11's relation over the batch is Eq. 4; of several images it is the mean of theirs, before the softmax."""
    c = torch.rand(4, 6, 9)
    close(ablations.BatchRelationLoss.channel_relation(c[:1], 0.1), relations.channel_relation(c[:1], 0.1))
    close(ablations.BatchRelationLoss.channel_relation(c, 0.1), relations.channel_relation(c, 0.1).mean(dim=0, keepdim=True))


def test_dino_plus_of_identical_views_is_the_entropy_of_their_assignment():
    """Matched through ⊙ the views agree place by place, whatever is mirrored."""
    outputs, boxes = torch.randn(1, 3, 16, 5), random_boxes(3)[None].repeat(2, 1, 1)
    boxes[1, :, 4] = 1 - boxes[0, :, 4]
    mirrored = torch.stack([outputs[0], outputs[0].unflatten(1, (4, 4)).flip(2).flatten(1, 2)])    # (2, B, N, K)
    loss = ablations.DINOPlusLoss(5, 5, overlap_global=4, student_temp=0.1)
    mirrored = baselines.IBOTOutput(None, [mirrored])
    value = loss.patch_loss(mirrored, mirrored, 0.1, boxes)
    close(value, torch.special.entr((outputs / 0.1).softmax(dim=-1)).sum(dim=-1).mean(), rtol=1e-4)    # cells are the patches themselves


# --- model ------------------------------------------------------------------------------------------------------------


def tiny_vit(**rest):
    return model.VisionTransformer(**(dict(image_size=32, patch_size=8, dim=12, depth=2, heads=3) | rest))


def test_vit_equals_explicit_softmax_attention():
    vit, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    p = dict(vit.named_parameters())
    patches = F.unfold(images, 8, stride=8).mT @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]    # (B, N, C)
    x = torch.cat([p["cls_token"].expand(2, 1, 12), patches], dim=1) + p["pos_embed"]
    for i in range(2):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (12,), w["norm1.weight"], w["norm1.bias"], eps=1e-6) @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
        q, k, v = y.split(12, dim=-1)
        heads = []
        for m in range(3):    # 4 channels a head
            one = slice(4 * m, 4 * m + 4)
            attention = (q[..., one] @ k[..., one].mT / math.sqrt(4)).softmax(dim=-1)
            heads.append(attention @ v[..., one])
        x = x + torch.cat(heads, dim=-1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        y = F.layer_norm(x, (12,), w["norm2.weight"], w["norm2.bias"], eps=1e-6)
        x = x + F.gelu(y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    close(vit(images), x)    # before the final norm
    layers = vit.get_intermediate_layers(images, 2)
    close(layers[-1], vit.norm(x))
    assert len(layers) == 2


def test_attention_map_is_what_the_last_block_computes():
    vit, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    attention = vit.get_last_selfattention(images)
    assert attention.shape == (2, 3, 17, 17)
    close(attention.sum(dim=-1), torch.ones(2, 3, 17))
    attn, x = vit.blocks[0].attn, torch.randn(2, 17, 12)
    v = attn._qkv(x)[2]
    close(attn(x), attn.proj((attn.attention_map(x) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("height, width", [(16, 16), (32, 48), (64, 24)])
def test_vit_takes_any_size_its_patches_divide(height, width):
    vit = tiny_vit()
    assert vit(torch.randn(1, 3, height, width)).shape == (1, 1 + height * width // 64, 12)
    grid = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(height // 8, width // 8), mode="bicubic", align_corners=False).flatten(2).mT
    close(vit._position_embedding(height // 8, width // 8)[:, 1:], expected)
    with pytest.raises(ValueError, match="30x32 .* patches of 8"):
        vit(torch.randn(1, 3, 30, 32))


def test_parameter_names_and_shapes_are_timms():
    state = model.build_encoder("vit_small").state_dict()
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
             "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    assert set(state) == {*names, *(f"blocks.{i}.{name}" for i in range(12) for name in block)}
    assert sum(v.numel() for v in state.values()) == 21_665_664    # as DINO counts ViT-S/16
    assert state["patch_embed.proj.weight"].shape == (384, 3, 16, 16) and state["pos_embed"].shape == (1, 197, 384)


def test_a_masked_patch_is_not_seen():
    vit, images, mask = tiny_vit(masked=True), torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    nn.init.normal_(vit.masked_embed)
    mask[0, 5], mask[1, 2] = True, True
    tokens, other = vit(images, mask), images.clone()
    other[0, :, 8:16, 8:16] += 1    # patch 5: second row, second column
    assert torch.equal(vit(other, mask), tokens) and not torch.equal(vit(other), vit(images))
    assert torch.equal(vit(images, torch.zeros_like(mask)), vit(images)) and not torch.equal(tokens, vit(images))
    assert torch.autograd.grad(tokens.sum(), vit.masked_embed)[0].abs().sum() > 0
    embedded = vit._embed(images, mask)
    close(embedded[0, 1 + 5], vit.masked_embed[0] + vit.pos_embed[0, 1 + 5])    # its place is known
    assert not hasattr(tiny_vit(), "masked_embed") and set(vit.state_dict()) - set(tiny_vit().state_dict()) == {"masked_embed"}


def test_the_students_global_views_alone_are_masked():
    args, baseline, student, teacher = networks(VARIANTS["ibot"])
    views, _, mask = random_views(args, baseline)
    out, unmasked = student(views, mask), student(views)
    nn.init.normal_(student.backbone.masked_embed)
    changed = student(views, mask)
    assert torch.equal(student(views).embedding.summary, unmasked.embedding.summary)
    assert torch.equal(changed.embedding.summary[2:], unmasked.embedding.summary[2:]) and not torch.equal(changed.embedding.summary[:2], out.embedding.summary[:2])
    tokens = student.backbone(views[0].flatten(0, 1), mask.flatten(0, 1))    # and relations are those of the masked views, as in the release
    close(changed.spatial[0].flatten(0, 1), student.spatial[0](tokens[:, 1:].mT), atol=1e-5)
    outputs = student.head.last_layer(student.head.bottleneck(student.backbone.norm(tokens[:, 1:])))
    close(changed.embedding.patches[0][changed.embedding.masked], outputs[mask.flatten(0, 1)], atol=1e-5)
    close(teacher(views[:1], mask).summary, teacher(views[:1]).summary)    # the teacher sees all


def test_resnet50_is_torchvisions_without_its_classifier():
    ours, theirs = model.build_encoder("resnet50", 64).eval(), resnet50().eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)    # the kernels that ours takes for any images
    tokens = ours(images)
    assert tokens.shape == (2, 1 + 2 * 3, 2048) and torch.equal(tokens, ours(images.contiguous()))
    close(tokens[:, 0], theirs(images), atol=1e-5)    # average pool
    close(tokens[:, 1:].mT.unflatten(-1, (2, 3)), create_feature_extractor(theirs, ["layer4"])(images)["layer4"], atol=1e-5)
    assert torch.equal(ours.norm(tokens), tokens) and torch.equal(ours.get_intermediate_layers(images, 1)[0], tokens)
    with pytest.raises(ValueError, match="no mask"):
        ours(images, torch.zeros(2, 6, dtype=torch.bool))


def test_stochastic_depth_skips_branches_of_single_samples():
    block, x = model.Block(12, 3, drop_path=0.5), torch.randn(1, 5, 12).expand(4000, -1, -1)
    with torch.no_grad():
        branch = block.attn(block.norm1(x[:1]))
        dropped = block._drop(block.attn(block.norm1(x)))
    skipped = (dropped == 0).flatten(1).all(dim=1)
    assert abs(skipped.float().mean() - 0.5) < 0.04    # five standard deviations
    close(dropped[~skipped], 2 * branch.expand_as(dropped[~skipped]))    # the mean stays
    assert torch.equal(block.eval()._drop(x), x)
    assert [b.drop_path for b in tiny_vit(depth=3, drop_path_rate=0.2).blocks] == pytest.approx([0, 0.1, 0.2])


def networks(flags=()):
    """Arguments, baseline, student and teacher of a command line, small."""
    args = train.parse_args([*SMALL, "--data_path", "none", "--drop_path_rate", "0", *flags])
    baseline = train.build_baseline(args)
    return args, baseline, *train.build_networks(args, baseline)


def random_views(args, baseline, B=3):
    """Views by resolution, boxes and mask."""
    sizes = [(2, args.global_crops_size)] + ([(args.local_crops_number, args.local_crops_size)] if args.local_crops_number else [])
    views = [torch.randn(number, B, 3, size, size) for number, size in sizes]
    boxes = torch.stack([random_boxes(B) for _ in range(sum(number for number, _ in sizes))])
    if not baseline.mask:
        return views, boxes, None
    N = (args.global_crops_size // args.patch_size) ** 2
    return views, boxes, torch.rand(2, B, N).argsort(dim=-1) < torch.randint(1, 1 + baseline.mask.most, (2, B, 1))


def loss_terms(args, baseline, student, teacher, views, boxes, mask):
    """L_I, L_p, L_c of networks, or of compiled ones."""
    with torch.no_grad():
        taught = teacher(views[:1], mask)
    learned = student(views, mask)
    l_i = baseline.loss(learned.embedding, taught.embedding, baseline.teacher_temp[0], boxes)
    return torch.stack([l_i, *train.build_relation_loss(args)(taught, learned, boxes)])


LEFT_OUT = ["--alpha 0", "--beta 0", "--li_weight 0", "--li_weight 0 --beta 0", "--alpha 0 --beta 0", "--local_crops_number 0", "--no-norm_last_layer",
            "--recipe ibot --li_weight 0", "--recipe mocov3 --alpha 0 --beta 0", "--baseline dino+ --alpha 0 --local_crops_number 0"]


@pytest.mark.parametrize("flags", [*VARIANTS.values(), *map(str.split, LEFT_OUT)], ids=" ".join)
def test_every_trainable_parameter_gets_a_gradient_and_nothing_else_is_built(flags):
    args, baseline, student, teacher = networks(flags)
    loss_terms(args, baseline, student, teacher, *random_views(args, baseline)).sum().backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert all(name.endswith("layer.scale") or "patch_embed" in name or "backbone.norm" in name for name in frozen)
    assert {name for name in frozen if "patch_embed" in name} == ({f"backbone.patch_embed.proj.{part}" for part in ("weight", "bias")} if args.stop_grad_conv1 else set())
    assert {name.endswith("scale") for name in frozen if "layer" in name} == ({True} if args.norm_last_layer and hasattr(student.head, "last_layer") else set())
    assert not any(".predictor" in name for name, _ in teacher.named_parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    resolutions = 2 if args.local_crops_number else 1
    assert (student.head is None) == (args.li_weight == 0) == ("backbone.norm.weight" in frozen)
    assert len(student.spatial) == (resolutions if args.alpha else 0) and len(teacher.spatial) == bool(args.alpha)
    assert len(student.channel) == (resolutions if args.beta else 0) and len(teacher.channel) == bool(args.beta)
    assert all((h.predictor is None) == args.symmetric for h in [*student.spatial, *student.channel])
    masked = args.baseline == "ibot" and args.li_weight > 0
    assert hasattr(student.backbone, "masked_embed") == masked == (baseline.mask is not None) and not hasattr(teacher.backbone, "masked_embed")
    own = {name for name, _ in student.named_parameters()} - {name for name, _ in teacher.named_parameters()}    # what only the student has
    assert all(".predictor." in name or name == "backbone.masked_embed" or re.match(r"(spatial|channel)\.1\.", name) for name in own)


def test_network_batches_each_resolution_and_teacher_has_only_h():
    args, baseline, student, teacher = networks()
    views, _, _ = random_views(args, baseline)
    out = student(views)
    assert out.summary.shape == (4, 3, 96) and out.embedding.shape == (4, 3, 32)
    assert [tuple(p.shape) for p in out.spatial] == [(2, 3, 96, 16), (2, 3, 96, 4)] == [tuple(c.shape) for c in out.channel]
    tokens = student.backbone(views[1].flatten(0, 1))    # before the final norm
    close(out.spatial[1].flatten(0, 1), student.spatial[1](tokens[:, 1:].mT), atol=1e-5)
    close(out.embedding[2:].flatten(0, 1), student.head(student.backbone.norm(tokens[:, 0])), atol=1e-5)
    assert teacher.spatial[0].predictor is None and student.spatial[0].predictor is not None
    close(teacher(views[:1]).embedding, student(views[:1]).embedding)    # they start alike


def test_teacher_is_the_moving_average_of_every_parameter():
    _, _, student, teacher = networks()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    mine = dict(student.named_parameters())
    teacher.register_buffer("statistics", torch.ones(3))
    model.update_teacher(student, teacher, 0.9)
    for name, p in teacher.named_parameters():
        close(p, 0.9 * before[name] + 0.1 * mine[name])
    assert torch.equal(teacher.statistics, torch.ones(3))    # a buffer is each network's own
    teacher.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match="extra"):
        model.update_teacher(student, teacher, 0.9)


@pytest.mark.parametrize("flags", [VARIANTS[name] for name in ("dino", "ibot", "mocov3", "dino+", "batch relations")], ids=" ".join)
def test_networks_and_losses_compile_without_a_graph_break_or_a_graph_an_epoch(flags):
    torch._dynamo.reset()    # graphs are counted by function, over all tests
    args, baseline, student, teacher = networks(flags)
    views, boxes, mask = random_views(args, baseline)
    relation_loss, graphs = train.build_relation_loss(args), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def outcome(student, teacher, embedding_loss, relation_loss, epoch):
        taught, learned = teacher(views[:1], mask), student(views, mask)
        loss = embedding_loss(learned.embedding, taught.embedding, baseline.teacher_temp[epoch], boxes) + sum(relation_loss(taught, learned, boxes))
        return loss, torch.autograd.grad(loss, [p for p in student_parameters if p.requires_grad])

    student_parameters = list(student.parameters())
    eager = outcome(student, teacher, baseline.loss, relation_loss, 2)
    compiled = [torch.compile(m, fullgraph=True, backend=backend, dynamic=False) for m in (student, teacher, baseline.loss, relation_loss)]
    whole = [outcome(*compiled, epoch) for epoch in (0, 2)][-1]
    close(whole[0], eager[0])
    for a, b in zip(whole[1], eager[1]):
        close(a, b, atol=1e-5)    # gradients of sums over all patches, in another order
    assert len(graphs) == 4


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="torch.compile needs a C++ compiler")
def test_compiled_relation_losses_equal_eager_ones():
    """By torch.compile's own compiler and under autocast, as on a GPU: to what rounding in another order makes of half precision. Measured, four seeds: gradients 0.3 to 0.4 %."""
    torch._dynamo.reset()
    teacher, student, boxes = views_of_relations(B=2, locals=1)
    loss = relations.SelfRelationLoss(3, overlap_global=5, overlap_local=2)

    def outcome(function):
        with torch.autocast("cpu", torch.bfloat16):
            l_p, l_c = function(*(model.Output(None, None, x, x) for x in (teacher, student)), boxes)
        return torch.stack([l_p, l_c]).detach(), torch.cat([g.flatten() for g in torch.autograd.grad(l_p + l_c, student)])

    for a, b in zip(outcome(torch.compile(loss, fullgraph=True, dynamic=False)), outcome(loss)):
        assert (a - b).norm() < 0.01 * b.norm()


def test_photometric_compiles_without_a_graph_break():
    rows, images = torch.stack([row(SIGMA=1.0, HUE=0.1), row(GREY=1)]), picture(32, 32).expand(2, -1, -1, -1)
    colours = augment.Photometric()
    close(torch.compile(colours, fullgraph=True, backend="eager", dynamic=False)(images, rows), colours(images, rows))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_saved_encoder_gives_the_same_features(tmp_path, capsys):
    _, _, student, teacher = networks()
    images = torch.randn(2, 3, 32, 32)
    torch.save(teacher.backbone.state_dict(), tmp_path / "backbone.pth")
    loaded = weights.load_encoder(tmp_path / "backbone.pth")
    assert torch.equal(loaded(images), teacher.backbone(images)) and loaded.patch_size == 8
    assert "vit_nano, patch size 8, 3 heads, 32 px; matched 54 keys, dropped 0" in capsys.readouterr().out

    with torch.no_grad():
        student.backbone.cls_token.add_(1)
    torch.save({"student": student.state_dict(), "teacher": teacher.state_dict(), "step": 3}, tmp_path / "checkpoint.pth")
    assert torch.equal(weights.load_encoder(tmp_path / "checkpoint.pth")(images), teacher.backbone(images))
    assert torch.equal(weights.load_encoder(tmp_path / "checkpoint.pth", checkpoint_key="student")(images), student.backbone(images))
    assert "dropped 28: channel (10), head (8), spatial (10)" in capsys.readouterr().out


def released(kind, backbone):
    """A file as others publish them, around a ViT's state dict."""
    heads = {"head.mlp.0.weight": torch.zeros(2, 2)}
    namespace = argparse.Namespace(arch="vit_small", lr=np.float64(0.5))
    full = {f"module.backbone.{k}": v for k, v in backbone.items()} | {f"module.{k}": v for k, v in heads.items()}
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(1e-3), "weight_decay": np.array(0.4)[()]}]}
    return {
        "dino": {"student": full, "teacher": {k.removeprefix("module."): v for k, v in full.items()}, "optimizer": optimizer, "epoch": 100, "args": namespace, "dino_loss": {"center": torch.zeros(1, 4)}},
        "ibot": {"student": {}, "teacher": full | {"module.backbone.masked_embed": torch.zeros(1, 12)}, "args": namespace, "ibot_loss": {}},
        "ibot extracted": {"state_dict": backbone | {"masked_embed": torch.zeros(1, 12)}},
        "sere": {"state_dict": backbone | {"channel_sere.0.weight": torch.zeros(3), "pixel_sere.0.weight": torch.zeros(3)}},
        "timm": backbone | {"head.weight": torch.zeros(10, 12), "head.bias": torch.zeros(10)},
    }[kind]


@pytest.mark.parametrize("kind", ["dino", "ibot", "ibot extracted", "sere", "timm"])
def test_released_files_are_read(kind, tmp_path, capsys):
    vit = model.build_encoder("vit_nano", 32, 8)
    torch.save(released(kind, vit.state_dict()), tmp_path / "released.pth")
    loaded = weights.load_encoder(tmp_path / "released.pth")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), vit.state_dict().values()))
    assert re.search(r"dropped [12]: ", capsys.readouterr().out)


def moco_file(vit, path):
    """A training checkpoint of MoCo v3: its two encoders differ."""
    heads = {"head.0.weight": torch.zeros(2, 2)}
    with torch.no_grad():
        vit.pos_embed[:, 0] = 0    # its position embeddings are fixed sines and cosines, and 0 for the class token
    state = {f"module.base_encoder.{k}": v for k, v in (vit.state_dict() | heads).items()}
    state |= {f"module.momentum_encoder.{k}": v + 1 for k, v in (vit.state_dict() | heads).items()} | {"module.predictor.0.weight": torch.zeros(2, 2)}
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}}, path)


def test_moco_v3s_vit_small_has_12_heads_and_others_6(tmp_path, capsys):
    """Shapes are the same, results are not."""
    vit, images = model.build_encoder("vit_small", 32, 16), torch.randn(1, 3, 32, 32)
    moco_file(vit, tmp_path / "moco.pth")
    loaded = weights.load_encoder(tmp_path / "moco.pth")
    assert loaded.heads == 12 and "12 heads" in capsys.readouterr().out
    of_12 = model.build_encoder("vit_small", 32, 16, heads=12)
    of_12.load_state_dict(vit.state_dict())
    assert torch.equal(loaded(images), of_12(images)) and not torch.allclose(loaded(images), vit(images), atol=1e-3)    # the base encoder, which MoCo v3 evaluates
    momentum = weights.load_encoder(tmp_path / "moco.pth", checkpoint_key="teacher")
    assert momentum.heads == 12 and torch.equal(momentum.cls_token, vit.cls_token + 1)
    evaluate.main(["export", "--pretrained_weights", str(tmp_path / "moco.pth"), "--output", str(tmp_path / "out.pth")])
    assert "build it with 12 heads" in capsys.readouterr().out and weights.load_encoder(tmp_path / "out.pth").heads == 12
    torch.save(dict(loaded.state_dict()), tmp_path / "anew.pth")    # by somebody else: its origin is gone
    with pytest.raises(ValueError, match="as MoCo v3's ViT-S, whose 12 heads the shapes don't tell: give --heads 12"):
        weights.load_encoder(tmp_path / "anew.pth")
    assert weights.load_encoder(tmp_path / "anew.pth", heads=12).heads == 12
    torch.save({"model": finetune.Classifier(loaded, 5).state_dict()}, tmp_path / "tuned.pth")
    assert weights.load_encoder(tmp_path / "tuned.pth").heads == 12
    torch.save(vit.state_dict() | {"reg_token": torch.zeros(1, 4, 384)}, tmp_path / "registers.pth")
    with pytest.raises(ValueError, match="holds a ViT with reg_token"):
        weights.load_encoder(tmp_path / "registers.pth")
    with pytest.raises(ValueError, match="out.pth is an encoder with 12 heads, not 6; it tells, so leave out --heads"):
        weights.load_encoder(tmp_path / "out.pth", heads=6)
    with pytest.raises(ValueError, match="vit_small can't have 7 heads"):
        weights.load_encoder(tmp_path / "anew.pth", heads=7)


def test_mae_files_are_read(tmp_path):
    vit = model.build_encoder("vit_nano", 32, 8)
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
    torch.save({"model": vit.state_dict() | extra}, tmp_path / "mae.pth")
    assert torch.equal(weights.load_encoder(tmp_path / "mae.pth").pos_embed, vit.pos_embed)
    tuned = {("fc_norm." + name[5:] if name.startswith("norm.") else name): value for name, value in vit.state_dict().items()}
    torch.save({"model": tuned | {"head.weight": torch.zeros(10, 96)}}, tmp_path / "tuned.pth")
    assert torch.equal(weights.load_encoder(tmp_path / "tuned.pth").norm.weight, vit.norm.weight)


def test_export_is_a_plain_state_dict(tmp_path, capsys):
    vit = model.build_encoder("vit_nano", 32, 8)
    torch.save({"teacher": {f"module.backbone.{name}": value for name, value in vit.state_dict().items()}}, tmp_path / "checkpoint.pth")
    evaluate.main(["export", "--pretrained_weights", str(tmp_path / "checkpoint.pth"), "--output", str(tmp_path / "out.pth")])
    plain = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(plain) == list(vit.state_dict()) and all(torch.equal(plain[name], value) for name, value in vit.state_dict().items())
    assert "54 keys" in capsys.readouterr().out


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("was_run",))


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": Malicious()}, "evil.pth")
    with pytest.raises(ValueError, match="evil.pth .* not loaded"):
        weights.load_encoder("evil.pth")
    assert not Path("was_run").exists()


def test_weights_of_another_architecture_name_keys_and_shapes(tmp_path):
    torch.save(model.build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "nano.pth")
    with pytest.raises(ValueError, match=r"nano.pth does not fit vit_tiny, but is a vit_nano: cls_token is \(1, 1, 96\), not \(1, 1, 192\)"):
        weights.load_encoder(tmp_path / "nano.pth", arch="vit_tiny")
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="no ViT.*layer1.0.conv1.weight"):
        weights.load_encoder(tmp_path / "resnet.pth")
    for content in ("hello", ""):
        (tmp_path / "text.pth").write_text(content)
        with pytest.raises(ValueError, match="text.pth is damaged"):
            weights.load_encoder(tmp_path / "text.pth")
    torch.save({1: torch.zeros(1), "args": "text", "blocks.x.y": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth holds no ViT"):
        weights.load_encoder(tmp_path / "odd.pth")


# --- data -------------------------------------------------------------------------------------------------------------


def image_folder(root, train_images=16, val_images=8, classes=2):
    """A folder with train/ and val/, images of different sizes and kinds, classes told apart by brightness."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train_images), ("val", val_images)):
        for i in range(number):
            folder = root / split / f"class{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 100, (40 + i, 52 - i, 3)) + 100 * (i % classes)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_folders_give_labels_from_train_and_take_any_nesting(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "train/class1/deeper").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train/class1/deeper/x.JPEG")
    (tmp_path / "train/notes.txt").write_text("not an image")
    train_set, val_set = data.build_dataset(tmp_path, "train"), data.build_dataset(tmp_path, "val")
    assert len(train_set) == 17 and train_set.labels.tolist() == [0] * 8 + [1] * 9 and train_set.classes == 2
    image, label = val_set[5]
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.ndim == 3 and label == 1

    (tmp_path / "train/class1/loop").symlink_to(tmp_path / "train/class1")
    assert len(data.build_dataset(tmp_path, "train")) == 17    # each image once
    unlabelled = data.build_dataset(tmp_path / "val", "train")    # a folder without train/: nested, no labels
    assert len(unlabelled) == 8 and set(unlabelled.labels.tolist()) == {-1} and unlabelled.classes == 0
    (tmp_path / "val/class9").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val/class9/x.png")
    with pytest.raises(OSError, match="class9 .* train/ does not have"):
        data.build_dataset(tmp_path, "val")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    image = Image.new("RGB", (6, 4), (250, 250, 250)).convert("L" if mode == "I;16" else mode)
    name = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    (image.convert("I;16") if mode == "I;16" else image).save(name)
    assert data.decode(name).shape == (3, 4, 6) and data.decode(name).dtype == torch.uint8


def test_unusable_folders_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor one of shapes, cifar10"):
        data.build_dataset("nowhere", "train")
    with pytest.raises(FileNotFoundError, match="no images below"):
        data.build_dataset(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no train/ and val/"):
        data.build_dataset(tmp_path, "val")


def broken_images(folder):
    """A text file named .jpg and a truncated JPEG."""
    (folder / "!text.jpg").write_text("not an image")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    (folder / "!truncated.jpg").write_bytes(buffer.getvalue()[:1000])


def test_unreadable_images_are_named_and_the_next_stands_in(tmp_path):
    image_folder(tmp_path)
    broken_images(tmp_path / "train/class0")
    images = data.build_dataset(tmp_path, "train")
    for i, name in ((0, "!text.jpg"), (1, "!truncated.jpg")):
        with pytest.raises(OSError, match=f"{name} can't be read"):
            images[i]
        views, complaints = data.ViewsOfImages(images, lambda image, key: (image, key), seed=7)[(3, i)]
        assert torch.equal(views[0], images[2][0]) and views[1] == (7, 3, i)
        assert len(complaints) == 2 - i and name in complaints[0]
    alone = tmp_path / "alone"
    alone.mkdir()
    broken_images(alone)
    with pytest.raises(OSError, match="2 images in a row can't be read; the last: .*truncated"):
        data.Readable(data.build_dataset(alone, "train"))[0]


@pytest.mark.parametrize("name, train_split, val_split", [("cifar10", True, False), ("cifar100", True, False), ("stl10", "train+unlabeled", "test")])
def test_torchvision_sets_by_name(name, train_split, val_split, monkeypatch):
    """Their downloads are theirs to test; here: what they are asked for, and what comes out."""
    asked = []

    class Fake:
        def __init__(self, root, which, download):
            asked.append((root, which, download))
            self.targets = self.labels = [0, 2, 1]

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return Image.new("RGB", (32, 32), (10 * i, 0, 0)), self.targets[i]

    monkeypatch.setattr(data.datasets, {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}[name], Fake)
    images = data.build_dataset(name, "train")
    data.build_dataset(name, "val")
    assert asked == [("data", train_split, True), ("data", val_split, True)] and images.labels.tolist() == [0, 2, 1] and images.classes == 3
    assert images[1][0].shape == (3, 32, 32) and images[1][0][0, 0, 0] == 10 and images[1][1] == 2

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(data.datasets, {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}[name], offline)
    with pytest.raises(FileNotFoundError, match=f"{name} .* no route to host"):
        data.build_dataset(name, "val")


def masked_folder(root, number=6):
    """train/ and val/ with images/ and masks/: class 1 where an image is bright, 2 at its left edge, 9 (void) at its right one."""
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for i in range(number):
            mask = np.zeros((40, 48 + i), dtype=np.uint8)
            mask[10 + i : 30, 15:35] = 1
            image = np.repeat((mask[..., None] * 200 + 20).astype(np.uint8), 3, axis=2)
            mask[:, :4], mask[:, -4:] = 2, 9
            image[:, :4] = (0, 255, 0)
            Image.fromarray(image).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    return root


def test_images_with_masks(tmp_path):
    folder = masked_folder(tmp_path / "images")
    pairs = data.build_segmentation(folder, "train", ignore_index=9)
    image, mask = pairs[3]
    assert image.shape[1:] == mask.shape == (40, 51) and image.dtype == mask.dtype == torch.uint8
    assert mask.unique().tolist() == [0, 1, 2, 255] and data.count_classes(pairs) == 3
    assert data.count_classes(data.build_segmentation(folder, "train")) == 10    # if 9 is a class
    paper, paper_mask = data.build_segmentation("shapes", "val")[0]
    assert paper.shape == (3, 64, 64) and torch.equal(paper_mask.bool(), data.Shapes("val").mask(0))

    pairs.classes = 2
    with pytest.raises(OSError, match="0.png has class 2, but there are 2 classes"):
        pairs[0]
    with pytest.raises(OSError, match="neither shapes nor voc, nor has it a folder test/images"):
        data.build_segmentation(folder, "test")
    Image.new("RGB", (48, 40)).save(folder / "val/masks/0.png")
    with pytest.raises(OSError, match=r"0.png is no mask of class indices: it is RGB"):
        data.build_segmentation(folder, "val")[0]
    Image.new("L", (8, 8)).save(folder / "val/masks/1.png")
    with pytest.raises(OSError, match="differ in size"):
        data.build_segmentation(folder, "val")[1]
    (folder / "val/masks/2.png").unlink()
    with pytest.raises(OSError, match=r"2.png has no mask in"):
        data.build_segmentation(folder, "val")


def test_voc_by_name(tmp_path, monkeypatch):
    """Its download is torchvision's to test; here: what it is asked for, and what comes out."""
    folder, asked = masked_folder(tmp_path / "images"), []

    class Fake:
        def __init__(self, root, image_set, download):
            asked.append((root, image_set, download))
            self.images, self.masks = ([str(folder / image_set / part / "0.png")] for part in ("images", "masks"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.datasets, "VOCSegmentation", Fake)
    pairs = data.build_segmentation("voc", "val", ignore_index=9)
    assert asked == [("data", "val", True)] and pairs.classes == data.count_classes(pairs) == 21 and pairs[0][1].max() == 9    # VOC's own 255 alone is ignored
    monkeypatch.setattr(data.datasets, "VOCSegmentation", lambda *_, **__: exec("raise OSError('no route to host')"))
    with pytest.raises(OSError, match="voc is not in data/ and could not be downloaded: no route to host"):
        data.build_segmentation("voc", "val")


def test_shapes_are_deterministic_balanced_and_have_masks():
    shapes = data.build_dataset("shapes", "train")
    image, label = shapes[13]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and label == 3
    assert torch.equal(image, data.Shapes("train")[13][0])
    assert not torch.equal(image, data.Shapes("val")[13][0]) and not torch.equal(image, shapes[23][0])
    assert shapes.labels.bincount().tolist() == [1000] * 10
    masks = torch.stack([shapes.mask(i) for i in range(50)]).float().mean(dim=(1, 2))
    assert masks.min() > 0.1 and 0.4 < masks.mean() < 0.9
    for i in range(10):    # what is printed is on the paper
        grey = shapes[i][0].float().mean(dim=0)
        edges = (grey - grey.roll(1, dims=0)).abs() + (grey - grey.roll(1, dims=1)).abs()
        assert edges[shapes.mask(i)].mean() > 1.5 * edges[~shapes.mask(i)].mean()


def test_the_mean_colour_of_shapes_does_not_tell_their_label():
    """A linear probe on it stays at chance, 10 %: four standard deviations of 500 guesses are 5 %."""
    train_set, val_set = data.Shapes("train"), data.Shapes("val")
    x, y = (torch.stack([s[i][0].float().mean(dim=(1, 2)) / 255 for i in range(n)]) for s, n in ((train_set, 1500), (val_set, 500)))
    probe = nn.Linear(3, 10)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200)
    center, spread = x.mean(dim=0), x.std(dim=0)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe((x - center) / spread), train_set.labels[:1500])
        loss.backward()
        return loss

    optimizer.step(closure)
    accuracy = (probe((y - center) / spread).argmax(dim=1) == val_set.labels[:500]).float().mean()
    assert 0.05 < accuracy < 0.15


def take(batches, n):
    stream = iter(batches)
    return [next(stream) for _ in range(n)]


def test_batches_are_the_same_for_one_and_two_processes_and_start_anywhere():
    one = take(data.Batches(37, 8, 1, 0, 1, seed=5), 8)    # 4 steps an epoch, 5 images left out
    assert [sorted({epoch for epoch, _ in batch}) for batch in one] == [[0]] * 4 + [[1]] * 4
    epochs = [[index for batch in part for _, index in batch] for part in (one[:4], one[4:])]
    assert all(len(set(indices)) == 32 for indices in epochs) and epochs[0] != epochs[1]
    two = [take(data.Batches(37, 4, 1, rank, 2, seed=5), 8) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two)] == one
    accumulated = take(data.Batches(37, 4, 2, 0, 1, seed=5), 16)
    assert [a + b for a, b in zip(accumulated[::2], accumulated[1::2])] == one
    assert take(data.Batches(37, 8, 1, 0, 1, seed=5, start=6), 2) == one[6:]
    assert take(data.Batches(37, 8, 1, 0, 1, seed=6), 8) != one


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 50])
def test_knn_votes_equal_a_loop(k, monkeypatch):
    train_features, test_features, labels, T = torch.randn(20, 6), torch.randn(7, 6), torch.arange(20) % 4, 0.07
    votes = evaluate.knn_votes(train_features, labels, test_features, k, T, 4)
    for i, f in enumerate(test_features):
        similarities = [(float(F.cosine_similarity(f, t, dim=0)), int(label)) for t, label in zip(train_features, labels)]
        expected = torch.zeros(4)
        for similarity, label in sorted(similarities, reverse=True)[:k]:
            expected[label] += math.exp(similarity / T)
        close(votes[i], expected, rtol=1e-4)    # exp(x / 0.07) makes 14 of a rounding
    held, topk = [], torch.Tensor.topk
    monkeypatch.setattr(evaluate, "SIMILARITIES", 40)    # two test images at a time
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *args, **rest: held.append(x.numel()) or topk(x, *args, **rest))
    close(evaluate.knn_votes(train_features, labels, test_features, k, T, 4), votes)
    assert held == [40, 40, 40, 20]


def test_features_are_the_normed_class_token_of_the_centre_crop(tmp_path):
    images, encoder = data.build_dataset(image_folder(tmp_path), "train"), tiny_vit().eval()
    features, labels = evaluate.extract_features(encoder, images, [3, 12], 32, torch.device("cpu"), batch_size=1)
    assert labels.tolist() == [images[3][1], images[12][1]] == [0, 1]
    image = images[12][0]
    small = v2.functional.resize(image, [round(32 * 256 / 224)], v2.InterpolationMode.BICUBIC, antialias=True)
    crop = v2.functional.center_crop(small, [32, 32]).float() / 255
    normalized = v2.functional.normalize(crop, augment.MEAN, augment.STD)
    close(features[1], encoder.norm(encoder(normalized[None]))[0, 0], atol=1e-5)


def test_knn_accuracy_passes_on_what_it_is_given(tmp_path, monkeypatch):
    folder = image_folder(tmp_path, 20, 6)
    for i in range(3):
        Image.new("RGB", (40, 40)).save(folder / f"val/unlabelled{i}.png")    # not counted
    train_set, val_set, asked = data.build_dataset(folder, "train"), data.build_dataset(folder, "val"), []

    def extracted(encoder, images, indices, size, device, **rest):
        asked.append((indices, images.labels[indices].bincount().tolist(), size))
        return torch.randn(len(indices), 5), images.labels[indices]

    torch.manual_seed(1)
    monkeypatch.setattr(evaluate, "extract_features", extracted)
    accuracy = evaluate.knn_accuracy(None, train_set, val_set, 32, None, ks=(3, 7, 50), temperature=2.0, most=8)
    assert [(len(indices), *rest) for indices, *rest in asked] == [(8, [4, 4], 32), (6, [3, 3], 32)]    # thinned out evenly over the classes
    torch.manual_seed(1)
    (features, labels), (test_features, test_labels) = (extracted(None, images, asked[i][0], 32, None) for i, images in enumerate((train_set, val_set)))
    for k in (3, 7, 50):
        right = evaluate.knn_votes(features, labels, test_features, k, 2.0, 2).argmax(dim=1) == test_labels
        assert accuracy[k] == pytest.approx(100 * right.float().mean().item())
    assert len(set(accuracy.values())) > 1    # k matters


def test_linear_features_are_dinos():
    encoder, images = tiny_vit(depth=3), torch.randn(2, 3, 32, 32)
    x, layers = encoder._embed(images), []
    for block in encoder.blocks:
        x = block(x)
        layers.append(encoder.norm(x))
    close(evaluate.linear_features(encoder, images, 2, False), torch.cat([layers[1][:, 0], layers[2][:, 0]], dim=1))
    close(evaluate.linear_features(encoder, images, 1, True), torch.cat([layers[2][:, 0], layers[2][:, 1:].mean(dim=1)], dim=1))


def test_linear_probes_train_side_by_side_as_if_alone(tmp_path, monkeypatch):
    """With a zeroed start and no randomness in the crops, each rate's probe is that of a run of its own, by hand: SGD with momentum
    and a cosine by epoch, on the images that are not held out; and the rate is chosen on those that are."""
    folder = image_folder(tmp_path, 24, 8)
    train_set, val_set, encoder = data.build_dataset(folder, "train"), data.build_dataset(folder, "val"), tiny_vit().eval().requires_grad_(False)
    monkeypatch.setattr(nn.init, "normal_", lambda weight, std: nn.init.zeros_(weight))
    monkeypatch.setattr(evaluate.v2, "RandomResizedCrop", lambda size, antialias: evaluate.evaluation_crop(size))
    monkeypatch.setattr(evaluate.v2, "RandomHorizontalFlip", lambda: nn.Identity())
    probes, original = [], evaluate.Probes
    monkeypatch.setattr(evaluate, "Probes", lambda *args: probes.append(original(*args)) or probes[-1])
    torch.manual_seed(0)
    held, rest = torch.randperm(24).split([6, 18])
    rates = [0.5, 1e-9]
    torch.manual_seed(0)
    rows, chosen = evaluate.linear_accuracy(encoder, train_set, val_set, 32, torch.device("cpu"), epochs=3, rates=rates, holdout=0.25, blocks=1, batch_size=32)

    x, y = evaluate.extract_features(encoder, train_set, range(24), 32, torch.device("cpu"))
    probe = nn.Linear(12, 2)
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    speed = [torch.zeros(2, 12), torch.zeros(2)]
    for epoch in range(3):
        gradients = torch.autograd.grad(F.cross_entropy(probe(x[rest]), y[rest]), [probe.weight, probe.bias])
        with torch.no_grad():
            for v, g, p in zip(speed, gradients, probe.parameters()):
                v.mul_(0.9).add_(g)
                p.sub_(0.5 * 32 / 256 * 0.5 * (1 + math.cos(math.pi * epoch / 3)) * v)
    close(probes[0].probes[0].weight, probe.weight, rtol=1e-4)
    assert probes[0].probes[1].weight.abs().max() < 1e-7 < 1e-3 < probe.weight.abs().max()
    on_held = 100 * (probe(x[held]).argmax(dim=1) == y[held]).float().mean()
    assert [row[0] for row in rows] == rates and rows[0][1] == pytest.approx(float(on_held)) and rows[chosen][1] == max(row[1] for row in rows)


# --- optim ------------------------------------------------------------------------------------------------------------


def test_layer_wise_rates():
    """MAE's and BEiT's: embeddings 0, block i is layer i + 1, final norm and head the top."""
    vit = tiny_vit()

    def by_name(encoder, head, key):
        names = {id(p): f"{prefix}.{name}" for prefix, module in (("encoder", encoder), ("head", head)) for name, p in module.named_parameters()}
        groups = optim.layer_groups(encoder, head, 0.5, 0.05)
        values = {names[id(p)]: group[key] for group in groups for p in group["params"]}
        assert len(values) == sum(len(group["params"]) for group in groups)    # each once
        return values

    scales = by_name(vit, nn.Linear(12, 5), "scale")
    assert {name for name in scales} == {f"encoder.{n}" for n, _ in vit.named_parameters()} | {"head.weight", "head.bias"}
    expected = {"encoder.cls_token": 0.125, "encoder.pos_embed": 0.125, "encoder.patch_embed.proj.weight": 0.125, "encoder.blocks.0.attn.qkv.weight": 0.25,
                "encoder.blocks.0.norm1.bias": 0.25, "encoder.blocks.1.mlp.fc2.weight": 0.5, "encoder.norm.weight": 1.0, "head.weight": 1.0, "head.bias": 1.0}
    assert {name: scales[name] for name in expected} == expected
    decays = by_name(vit, nn.Linear(12, 5), "weight_decay")
    assert {name for name, decay in decays.items() if decay == 0} == {n for n in decays if n.endswith("bias") or "norm" in n or n in ("encoder.cls_token", "encoder.pos_embed")}
    assert set(decays.values()) == {0, 0.05}
    assert set(by_name(vit.requires_grad_(False), nn.Linear(12, 5), "scale")) == {"head.bias", "head.weight"}

    scales = by_name(model.build_encoder("resnet50"), nn.Linear(2048, 5), "scale")
    assert [scales[f"encoder.{name}"] for name in ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.2.bn3.bias")] == [1 / 32, 1 / 32, 1 / 16, 1 / 2]


# --- finetune ---------------------------------------------------------------------------------------------------------


def test_training_shares_are_drawn_from_each_class_or_listed(tmp_path):
    images = data.build_dataset(image_folder(tmp_path, 20, 2), "train")
    share = finetune.training_share(images, 0.3, seed=1)
    assert images.labels[share].bincount().tolist() == [3, 3] and share == finetune.training_share(images, 0.3, seed=1) != finetune.training_share(images, 0.3, seed=2)
    assert images.labels[finetune.training_share(images, 0.001)].tolist() == [0, 1]    # one of each at least
    assert finetune.training_share(images) == list(range(20))
    listed = finetune.training_share(images, names=["class1/3.png", "0.png"])
    assert [Path(images.path(i)).name for i in listed] == ["3.png", "0.png"]
    for names, message in ((["0.png", "x.png"], "1 of 2 files of the list are not among the training images, or not once, x.png"), (["0.png", "0.png"], "2 files, 1 diff"), ([], "0 files")):
        with pytest.raises(OSError, match=message):
            finetune.training_share(images, names=names)
    for label in (0, 1):    # names that are unique with their folder only
        (tmp_path / f"same/train/class{label}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"same/train/class{label}/a.png")
    same = data.build_dataset(tmp_path / "same", "train")
    assert same.labels[finetune.training_share(same, names=["train/class1/a.png"])].tolist() == [1]
    with pytest.raises(OSError, match="or not once, a.png"):
        finetune.training_share(same, names=["a.png"])
    with pytest.raises(OSError, match="wants a folder"):
        finetune.training_share(data.Shapes("train"), names=["a.png"])


def test_classification_loss_smooths_and_mixes():
    images, labels, seen = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]), []
    logits = torch.randn(4, 3)
    plain = finetune.classification_loss(3, 0.1, 0.0, 0.0)(lambda x: seen.append(x) or logits, images, labels)
    targets = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    close(plain, -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean())
    close(seen[0], v2.functional.normalize(images, augment.MEAN, augment.STD))
    mixed = finetune.classification_loss(3, 0.0, 0.8, 0.0)
    mixed(lambda x: seen.append(x) or logits, images, labels)
    share = ((seen[1] - seen[0].roll(1, 0)) / (seen[0] - seen[0].roll(1, 0))).mean(dim=(1, 2, 3))    # x' = share x + (1 - share) of its neighbour
    assert 0 < share[0] < 1
    close(share, share[0].expand(4), rtol=1e-3)
    changed = []
    finetune.classification_loss(3, 0.0, 0.0, 1.0)(lambda x: changed.append(x != seen[0]) or logits, images, labels)
    assert changed[0].any() and all(torch.equal(c[0], c[1]) for c in changed[0])    # cutmix: a rectangle, the same in all channels


def test_classifier_and_its_augmentation():
    vit, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    tokens = vit.norm(vit(images))
    for mean_patch, features in ((False, tokens[:, 0]), (True, tokens[:, 1:].mean(dim=1))):
        classifier = finetune.Classifier(vit, 5, mean_patch)
        close(classifier(images), features @ classifier.head.weight.T + classifier.head.bias)
    transforms = finetune.augmentation(32).transforms
    assert [type(t) for t in transforms] == [v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.RandAugment, v2.RandomErasing]
    assert transforms[2].magnitude == 9 and transforms[3].p == 0.25 and transforms[0].size == (32, 32)


def fit_arguments(**rest):
    return argparse.Namespace(**(dict(epochs=3, warmup_epochs=1, lr=0.05, min_lr=1e-6, layer_decay=0.5, weight_decay=0.05, seed=0) | rest))


def test_fit_goes_on_after_a_kill_and_ends_the_same(tmp_path):
    images = data.Transformed(data.build_dataset(image_folder(tmp_path / "images"), "train"), finetune.augmentation(32), list(range(16)))

    def fitted(path, stop_after=None):
        torch.manual_seed(5)
        classifier = finetune.Classifier(tiny_vit(drop_path_rate=0.2), 2)
        loss, calls = finetune.classification_loss(2, 0.1, 0.8, 1.0), []

        def counted(*args):
            calls.append(1)
            if stop_after and len(calls) > stop_after:
                raise KeyboardInterrupt
            return loss(*args)

        finetune.fit(classifier, counted, finetune.loader_of(images, 4, 0, torch.device("cpu"), shuffle=True), fit_arguments(), torch.device("cpu"), path, {"x": 1})
        return classifier

    whole = fitted(tmp_path / "whole.pth")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "parts.pth", stop_after=6)    # in the second of three epochs of 4 steps
    parts = fitted(tmp_path / "parts.pth")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
    with pytest.raises(OSError, match="other arguments: x was 1, is 2"):
        finetune.fit(whole, None, finetune.loader_of(images, 4, 0, torch.device("cpu"), shuffle=True), fit_arguments(), torch.device("cpu"), tmp_path / "whole.pth", {"x": 2})


def test_fit_gives_each_layer_its_rate(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(sorted({group["lr"] for group in self.param_groups})))
    images = data.Transformed(data.build_dataset(image_folder(tmp_path / "images"), "train"), finetune.augmentation(32), list(range(16)))
    finetune.fit(finetune.Classifier(tiny_vit(), 2), finetune.classification_loss(2, 0.1, 0, 0), finetune.loader_of(images, 8, 0, torch.device("cpu"), shuffle=True),
                 fit_arguments(), torch.device("cpu"), tmp_path / "x.pth", {})
    top = optim.cosine_schedule(0.05 * 8 / 256, 1e-6, 6, 2)
    assert len(rates) == 6
    for expected, actual in zip(top.tolist(), rates):
        assert actual == pytest.approx(sorted({expected * 0.5**d for d in range(4)}))


def test_top_accuracies_by_hand(tmp_path):
    images = data.build_dataset(image_folder(tmp_path, 14, 7, classes=7), "val")
    ranking = torch.stack([torch.arange(7.0).roll(i) for i in range(7)])    # image i of class i: its class comes in place 7 - ...
    calls = iter(ranking.split(4))
    top1, top5 = finetune.top_accuracies(lambda x: next(calls), images, 32, torch.device("cpu"), 4, 0)
    places = [(row > row[i]).sum().item() for i, row in enumerate(ranking[:, :])]
    assert top1 == pytest.approx(100 * np.mean([p < 1 for p in places])) and top5 == pytest.approx(100 * np.mean([p < 5 for p in places]))


# --- segment ----------------------------------------------------------------------------------------------------------


def test_segmenter_is_a_1x1_convolution_on_normed_patches():
    segmenter, images = segment.Segmenter(tiny_vit(drop_path_rate=0.5), 5, frozen=True), torch.randn(2, 3, 32, 48)
    logits = segmenter.train()(images)
    patches = segmenter.encoder.norm(segmenter.encoder.eval()(images))[:, 1:]    # no stochastic depth in a frozen encoder
    expected = patches @ segmenter.head.weight.T + segmenter.head.bias
    close(logits, expected.mT.unflatten(-1, (4, 6)), atol=1e-5)
    logits.sum().backward()
    assert [name for name, p in segmenter.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]
    tuned = segment.Segmenter(tiny_vit(), 5, frozen=False)
    tuned(images).sum().backward()
    assert all(p.grad is not None for p in tuned.parameters())


def test_an_image_and_its_mask_are_cut_alike():
    """The mask is a threshold of the image, before and after."""
    ramp = torch.arange(240, dtype=torch.uint8).expand(3, 200, 240).contiguous()
    class Ramp(torch.utils.data.Dataset):
        def __len__(self):
            return 1
        def __getitem__(self, i):
            return ramp, (ramp[0] > 120).to(torch.uint8)

    crops, mirrored = segment.Crops(Ramp(), 64, (0.25, 1.0)), set()
    for _ in range(10):
        image, mask = crops[0]
        assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and mask.dtype == torch.uint8
        assert ((image[0] > 120) != (mask > 0)).float().mean() < 0.04    # two pixels a row at the edge: nearest against bicubic
        mirrored.add(bool(image[0, 0, 0] > image[0, 0, -1]))
    assert mirrored == {True, False}


def test_segmentation_loss_ignores_what_is_ignored():
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    masks[0, :4] = 255
    value = segment.segmentation_loss(lambda x: logits, torch.rand(2, 3, 8, 8), masks)
    large = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
    terms = [F.cross_entropy(large[b, :, y, x], masks[b, y, x].long()) for b, y, x in np.ndindex(2, 8, 8) if masks[b, y, x] != 255]
    close(value, torch.stack(terms).mean())
    assert segment.segmentation_loss(lambda x: logits, torch.rand(2, 3, 8, 8), torch.full_like(masks, 255)) == 0


def test_scores_equal_loops():
    prediction, mask = torch.randint(0, 4, (20, 30)), torch.randint(0, 4, (20, 30)).to(torch.uint8)
    mask[:3] = 255
    prediction[prediction == 2] = 1    # a class that is there and never found; class 4 of 5 is neither
    values = segment.scores(segment.confusion(prediction, mask, 5))
    pixels = [(int(t), int(p)) for t, p in zip(mask.flatten(), prediction.flatten()) if t != 255]
    iou, acc = [], []
    for k in range(5):
        union = sum(t == k or p == k for t, p in pixels)
        if union:
            iou.append(sum(t == k and p == k for t, p in pixels) / union)
        if any(t == k for t, _ in pixels):
            acc.append(sum(t == k and p == k for t, p in pixels) / sum(t == k for t, _ in pixels))
    precision = sum(t > 0 and p > 0 for t, p in pixels) / sum(p > 0 for _, p in pixels)
    recall = sum(t > 0 and p > 0 for t, p in pixels) / sum(t > 0 for t, _ in pixels)
    expected = {"mIoU": np.mean(iou), "mAcc": np.mean(acc), "pixel_accuracy": np.mean([t == p for t, p in pixels]),
                "foreground_F": 1.3 * precision * recall / (0.3 * precision + recall)}
    assert values == pytest.approx({name: 100 * value for name, value in expected.items()}) and len(iou) == 4


class PatchMeans(nn.Module):
    """An encoder whose patches know nothing of each other: their mean colour."""

    patch_size, dim, norm = 8, 3, nn.Identity()

    def forward(self, images):
        patches = F.avg_pool2d(images, 8).flatten(2).mT
        return torch.cat([patches[:, :1], patches], dim=1)


@pytest.mark.parametrize("H, W", [(40, 52), (70, 33)])
def test_sliding_windows_cover_an_image_of_any_size(H, W):
    segmenter, image = segment.Segmenter(PatchMeans(), 4, frozen=True), torch.randint(0, 256, (3, H, W), dtype=torch.uint8)
    whole = segment.predict(segmenter, image, 48)
    assert whole.shape == (4, H, W)
    for window in (16, 24, 48):
        close(segment.predict(segmenter, image, 48, window), whole)
    assert segment._starts(10, 4) == [0, 2, 4, 6] and segment._starts(4, 4) == [0]
    seen = []
    segmenter.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    segment.predict(segmenter, image, 48, 16)
    assert set(seen) == {(1, 3, 16, 16)} and len(seen) > 9    # windows, and many


@pytest.mark.parametrize("task, flags", [
    ("segment", ["--frozen", "--ignore_index", "9"]), ("segment", ["--ignore_index", "9", "--sliding", "--test_size", "48"]), ("finetune", ["--train_fraction", "0.5"]), ("linear", [])])
def test_evaluation_tasks_from_the_command_line_and_again(task, flags, tmp_path, capsys):
    folder = masked_folder(tmp_path / "images") if task == "segment" else image_folder(tmp_path / "images")
    torch.save(model.build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "backbone.pth")
    command = [task, "--pretrained_weights", str(tmp_path / "backbone.pth"), "--data_path", str(folder), "--epochs", "6", "--batch_size_per_gpu", "3", "--num_workers", "0",
               "--json", str(tmp_path / "result.json"), *flags, *(["--lr", "0.5"] if "--frozen" in flags else [])]
    result = evaluate.main(command)
    said = capsys.readouterr().out
    assert "6 epochs" in said and re.search("^epoch 6/6: loss ", said, re.MULTILINE)
    written = json.loads((tmp_path / "result.json").read_text())    # the whole protocol
    assert (written["epochs"], written["batch_size_per_gpu"], written["image_size"], written["heads"]) == (6, 3, 32, 3)
    again = evaluate.main(command)    # finished: measured anew, not trained anew
    assert again == result
    if "--frozen" in flags:
        assert result["classes"] == 3 and result["mIoU"] > 40    # bright, or green, or neither
    said = capsys.readouterr().out
    assert "trained before; measured again" in said and "epoch 6/6" not in said
    folders = {path.parent for path in tmp_path.glob(f"backbone-{task}-*/checkpoint.pth")}
    torch.manual_seed(9)
    torch.save(model.build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "backbone.pth")    # other weights in the same place
    evaluate.main(command)
    assert "trained before" not in capsys.readouterr().out and len(folders) == 1 < len(set(tmp_path.glob(f"backbone-{task}-*")))
    (kept,) = folders
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*command, "--output_dir", str(kept), "--seed", "1"])
    assert re.search("seed was 0, is 1; weights and images was .*, is .*. Use another --output_dir$", stopped.value.code)


# --- visualize --------------------------------------------------------------------------------------------------------


def test_sampling_points_are_drawn_where_region_align_reads():
    """A picture that is dark but where ⊙ reads: every point's centre must fall on a lit pixel."""
    S, size = 64, 3
    box, region = torch.tensor([0.1, 0.2, 0.9, 0.8, 1.0]), torch.tensor([0.3, 0.3, 0.8, 0.7])
    overlay = visualize._overlay(torch.zeros(3, S, S, dtype=torch.uint8), box, region, size).float().sum(dim=0)
    rectangle = visualize._overlay(torch.zeros(3, S, S, dtype=torch.uint8), box, region, 1).float().sum(dim=0)
    index = torch.arange(S * S).float().view(1, 1, S, S)
    places = sampler.region_align(torch.cat([index % S, index // S], dim=1), box[None], region[None], size)[0].round().long()
    for x, y in places.T.tolist():
        assert overlay[y, x] > 0
    assert (overlay > 0).sum() > (rectangle > 0).sum()


def test_attention_picture_has_a_row_an_image_and_a_tile_a_head(tmp_path):
    visualize.draw_attention(tmp_path / "attention.png", tiny_vit(), torch.randn(2, 3, 32, 32))
    width, height = Image.open(tmp_path / "attention.png").size
    assert (width, height) == (4 * 192 + 5 * 4, 2 * 192 + 3 * 4)


def test_kept_attention_is_the_smallest_set_with_that_mass():
    attention = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]])
    assert visualize.kept_attention(attention, 0.6).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert visualize.kept_attention(attention, 0.05).sum().item() == 2


def test_overlaid_attention_has_the_colours_of_the_heads_that_look():
    vit, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    attention = vit.get_last_selfattention(images)[:, :, 0, 1:]
    attention = attention / attention.sum(dim=-1, keepdim=True)
    kept = visualize.kept_attention(attention, 0.6)
    pictures, originals = visualize.overlay_attention(vit, images), augment.denormalize(images)
    colours = [torch.tensor(c) for c in ((1.0, 0.1, 0.1), (0.1, 1.0, 0.1), (0.1, 0.1, 1.0))]
    for b, n in np.ndindex(2, 16):
        patch = (slice(None), slice(n // 4 * 8, n // 4 * 8 + 8), slice(n % 4 * 8, n % 4 * 8 + 8))
        heads = [m for m in range(3) if kept[b, m, n]]
        expected = 0.4 * originals[b][patch]
        if heads:
            expected = 0.5 * originals[b][patch] + 0.5 * colours[max(heads, key=lambda m: attention[b, m, n])][:, None, None]
        close(pictures[b][patch], expected)


def test_self_relations_of_a_view_with_itself_do_not_differ():
    vit, view, boxes = tiny_vit(), torch.randn(1, 4, 3, 32, 32), random_boxes(4)[None]
    A_p, valid, A_c = visualize.self_relations(vit, view.repeat(2, 1, 1, 1, 1), boxes.repeat(2, 1, 1), 3, 4)
    assert A_p.shape == (2, 4, 3, 16, 16) and A_c.shape == (2, 4, 12, 12) and valid.all()
    close(A_p.sum(dim=-1), torch.ones(2, 4, 3, 16)), close(A_c.sum(dim=-1), torch.ones(2, 4, 12))
    close(visualize.difference(A_p), torch.zeros(4)), close(visualize.difference(A_c), torch.zeros(4))
    # aligned in the image, not in the view: of an encoder without a sense of place, a mirrored view's relations are the same
    mirrored = torch.cat([view, view.flip(-1)])
    boxes = torch.cat([boxes, boxes])
    boxes[1, :, 4] = 1 - boxes[0, :, 4]
    A_p, _, A_c = visualize.self_relations(PatchMeans(), mirrored, boxes, 3, 4)
    close(visualize.difference(A_p), torch.zeros(4), atol=1e-5), close(visualize.difference(A_c), torch.zeros(4), atol=1e-5)
    other = visualize.self_relations(vit, torch.randn(2, 4, 3, 32, 32), boxes, 3, 4)
    assert visualize.difference(other[0]).min() > 0.01
    close(visualize.difference(torch.eye(4)[None, None].repeat(2, 1, 1, 1) * torch.tensor([1.0, 0.0])[:, None, None, None]), torch.tensor([0.5]))


def test_invariance_is_the_mean_over_views_that_overlap(monkeypatch):
    A_c = torch.eye(4).expand(2, 3, 4, 4).clone()
    A_c[1, 0] = A_c[1, 0].roll(1, dims=-1)    # as different as can be
    A_p = A_c[:, :, None].clone()
    A_p[1, 2] = A_p[1, 2].roll(1, dims=-1)
    monkeypatch.setattr(visualize, "self_relations", lambda *_: (A_p, torch.tensor([True, True, False]), A_c))
    batch = augment.Views([torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)], torch.stack([row()] * 6).unflatten(0, (2, 3)), None)
    assert visualize.invariance(None, [(batch, [])], 6, 4, torch.device("cpu")) == pytest.approx([1 / 2, 1 / 3])


def test_figure_5_has_the_difference_in_its_last_column(tmp_path, monkeypatch):
    A = torch.rand(2, 1, 1, 16, 16)
    monkeypatch.setattr(visualize, "self_relations", lambda *_: (A, None, None))
    views = torch.zeros(2, 1, 3, 32, 32)
    views[0, 0, :, :, :16], views[1, 0, :, :, 16:] = -2, -2    # the second is the first, mirrored
    boxes = torch.tensor([0.1, 0.2, 0.8, 0.9, 0.0]).repeat(2, 1, 1)
    boxes[1, 0, 4] = 1
    visualize.draw_relations(tmp_path / "x.png", [None], views, boxes, 1, 4, [0], [(2, 1)])
    first, second = A[:, 0, 0, 2 * 4 + 1].unflatten(-1, (4, 4))
    largest = max(first.max(), second.max())
    picture = np.asarray(Image.open(tmp_path / "x.png")).astype(float) / 255
    for column, values in ((2, first), (3, second), (4, (first - second).abs())):
        tile = torch.from_numpy(picture[4 + 24 : 4 + 192 : 48, 4 + 196 * column + 24 : 4 + 196 * column + 192 : 48])    # the middle of each cell
        close(tile.sum(dim=-1), 3 * (values / largest).double(), rtol=0, atol=0.02)    # black, red, yellow, white: brightness is the value
    assert np.array_equal(picture[4:196, 4:196], picture[4:196, 200:392]) and picture[30, 30].max() < 0.1 < picture[30, 170].min()    # turned back, as the heat is


def test_pictures_from_the_command_line(folder, tmp_path, capsys):
    for name in ("a", "b"):
        torch.save(model.build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / f"{name}.pth")
    both = ["--pretrained_weights", str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]
    visualize.main(["attention", *both, "--data_path", str(folder), "--output", str(tmp_path / "attention.png"), "--number", "3"])
    assert Image.open(tmp_path / "attention.png").size == (3 * 196 + 4, 3 * 196 + 4)    # images, and a row a model
    visualize.main(["relations", *both, "--data_path", str(folder), "--output", str(tmp_path / "relations.png"), "--number", "2", "--overlap", "4", "--num_workers", "0"])
    assert Image.open(tmp_path / "relations.png").size == (5 * 196 + 4, 2 * 2 * 2 * 196 + 4)    # images, models, cells
    result = visualize.main(["invariance", *both, "--data_path", str(folder), "--output", str(tmp_path / "invariance.png"), "--overlap", "4", "--num_workers", "0",
                             "--json", str(tmp_path / "invariance.json")])
    assert json.loads((tmp_path / "invariance.json").read_text())[both[1]]["spatial"] == result[both[1]][0] and 0 < result[both[2]][1] < 1
    assert f"{both[1]}: spatial" in capsys.readouterr().out and (tmp_path / "invariance.png").exists()
    alone = visualize.main(["invariance", "--pretrained_weights", both[2], "--data_path", str(folder), "--output", str(tmp_path / "i.png"), "--overlap", "4", "--num_workers", "0"])
    assert alone[both[2]] == result[both[2]]    # all models see the same views


@pytest.mark.parametrize("flags, message", [
    (["--data_path", "nowhere"], "neither a folder"), (["--images", "nothing.jpg"], "nothing.jpg can't be read"), (["--image_size", "30"], "not a multiple of the patch size 8"),
    (["--pretrained_weights", "{resnet}"], "holds a ResNet, which has no attention")])
def test_bad_input_to_visualize_gets_one_clear_line(flags, message, folder, tmp_path):
    torch.save(model.build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "a.pth")
    torch.save(model.build_encoder("resnet50").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(SystemExit) as stopped:
        visualize.main(["attention", "--pretrained_weights", str(tmp_path / "a.pth"), "--output", str(tmp_path / "x.png"), "--data_path", str(folder), *(f.format(resnet=tmp_path / "resnet.pth") for f in flags)])
    assert stopped.value.code.startswith("visualize.py: error:") and message in stopped.value.code and "\n" not in stopped.value.code


# --- train ------------------------------------------------------------------------------------------------------------


def test_schedules_begin_peak_and_end_where_they_say():
    s = train.cosine_schedule(1.0, 0.1, 101, warmup=20, start=0.2)
    assert s.shape == (101,) and s[0] == 0.2 and s[20] == 1.0 and s[-1] == pytest.approx(0.1)
    close(s[:21], torch.linspace(0.2, 1.0, 21, dtype=torch.float64))
    assert s[60] == pytest.approx(0.55) and (s[20:].diff() < 0).all()    # half way down
    close(train.cosine_schedule(0.996, 1.0, 3), torch.tensor([0.996, 0.998, 1.0], dtype=torch.float64))
    assert train.cosine_schedule(0.5, 0.1, 1).tolist() == [0.5]


def test_each_gradient_is_clipped_by_its_own_norm():
    a, b, c = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    a.grad, b.grad = torch.full((4,), 3.0), torch.full((4,), 0.1)
    train.clip_gradients([a, b, c], 2.0)
    close(a.grad.norm(), torch.tensor(2.0))
    assert torch.equal(b.grad, torch.full((4,), 0.1)) and c.grad is None


def test_no_weight_decay_on_biases_and_norms():
    _, _, student, _ = networks()
    decayed, free = train.parameter_groups(student)
    names = {id(p): name for name, p in student.named_parameters()}
    assert free["weight_decay"] == 0 and "weight_decay" not in decayed
    assert {names[id(p)].rsplit(".", 1)[-1] for p in free["params"]} == {"bias", "weight"}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in free["params"])
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.blocks.0.mlp.fc1.weight"} <= {names[id(p)] for p in decayed["params"]}
    assert len(decayed["params"]) + len(free["params"]) == sum(p.requires_grad for p in student.parameters())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def run(folder, output, *flags):
    train.main([*SMALL, "--data_path", str(folder), "--output_dir", str(output), *map(str, flags)])


def fails(capsys, folder, output, *flags):
    """The one line that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(folder, output, *flags)
    assert stopped.value.code in (1, 2)
    *usage, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: error: ") and len(usage) <= 1
    return line


@pytest.fixture(scope="session")
def uninterrupted(folder, tmp_path_factory):
    """A run from beginning to end, which interrupted ones must equal."""
    output = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run(folder, output)
    return output


def losses(output):
    """{step: (loss, L_I, L_p, L_c)} and {step: kNN} of a log."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == sorted({line["step"] for line in steps})
    return {line["step"]: tuple(line[name] for name in train.TERMS) for line in steps}, {line["step"]: line["kNN"] for line in lines if "kNN" in line}


def same_run(a, b):
    assert (a / "backbone.pth").read_bytes() == (b / "backbone.pth").read_bytes()
    assert losses(a) == losses(b)


def test_a_run_writes_what_the_design_lists(uninterrupted, folder):
    assert {p.name for p in uninterrupted.iterdir()} == {"args.json", "log.jsonl", "checkpoint.pth", "backbone.pth", "views.png", "attention.png"}
    steps, knn = losses(uninterrupted)
    assert list(steps) == list(range(1, 13)) and list(knn) == [0, 8, 12]    # before, every second epoch, at the end
    for loss, l_i, l_p, l_c in steps.values():
        assert loss == pytest.approx(l_i + l_p + l_c)    # Eq. 6
    lines = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    logged = {"kind", "step", "epoch", "loss", "L_I", "L_p", "L_c", "lr", "teacher_temp", "images_per_s", "data_wait", "unreadable", "peak_memory_gib",
              "feature_std", "overlap", "teacher_entropy", "spatial_entropy", "channel_entropy"}
    assert set(lines[1]) == logged
    assert 0 <= lines[1]["teacher_entropy"] <= math.log(32) and 0 <= lines[1]["spatial_entropy"] <= math.log(16) and 0 <= lines[1]["channel_entropy"] <= math.log(96)
    for epoch, line in enumerate((line for line in lines[1:] if line["kind"] == "epoch"), start=1):
        assert line["epoch"] == epoch and line["loss"] == pytest.approx(np.mean([steps[s][0] for s in range(4 * epoch - 3, 4 * epoch + 1)]))
    assert [line["lr"] for line in lines if line["kind"] == "step"] == pytest.approx(train.cosine_schedule(0.0005 * 4 / 256, 1e-6, 12, warmup=4).tolist())
    described = json.loads((uninterrupted / "args.json").read_text())
    assert described["effective_batch"] == 4 and described["effective_lr"] == 0.0005 * 4 / 256 and described["versions"]["torch"] == torch.__version__
    assert Image.open(uninterrupted / "views.png").size == (4 * (192 + 4) + 4, 4 * (192 + 4) + 4)
    teacher = torch.load(uninterrupted / "checkpoint.pth", weights_only=True)["teacher"]
    backbone = torch.load(uninterrupted / "backbone.pth", weights_only=True)
    assert all(torch.equal(value, teacher[f"backbone.{name}"]) for name, value in backbone.items())


def test_resuming_in_mid_epoch_changes_nothing(folder, uninterrupted, tmp_path, capsys):
    run(folder, tmp_path, "--max_steps", 3)
    assert "stopped at step 3 of 12, as --max_steps 3 says" in capsys.readouterr().out
    with open(tmp_path / "log.jsonl", "a") as log:    # as if killed after the checkpoint, in mid-line
        log.write('123\n{}\n{"kind": "step", "step": 4, "loss": 99, "L_I": 1, "L_p": 1, "L_c": 1}\n{"kind": "step", "step": 5, "lo')
    run(folder, tmp_path, "--max_steps", 8)
    assert "going on after step 3" in capsys.readouterr().out
    run(folder, tmp_path)
    same_run(tmp_path, uninterrupted)
    before = (tmp_path / "log.jsonl").read_bytes()
    run(folder, tmp_path)    # a finished run says so and stays as it is
    assert "holds a finished run" in capsys.readouterr().out and (tmp_path / "log.jsonl").read_bytes() == before
    same_run(tmp_path, uninterrupted)


def test_a_run_of_another_version_is_not_resumed(folder, tmp_path, capsys):
    run(folder, tmp_path, "--max_steps", 1)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    del checkpoint["arguments"]["baseline"]
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert "was written by another version of this program" in fails(capsys, folder, tmp_path)


def test_other_training_arguments_for_the_same_folder_are_an_error(folder, tmp_path, capsys):
    output, images = tmp_path / "run", image_folder(tmp_path / "images", 8, 2)
    run(images, output, "--max_steps", 1)
    assert "is of a run with --recipe dino, not mocov3. Use another" in fails(capsys, images, output, "--recipe", "mocov3")
    line = fails(capsys, images, output, "--alpha", 0.5, "--local_crops_number", 1, "--log_every", 5)
    assert "alpha was 1.0, is 0.5; local_crops_number was 2, is 1. Use another --output_dir, or --overwrite" in line
    image_folder(images, 10, 2)    # the folder has grown
    assert "images was 8, is 10" in fails(capsys, images, output)

    before = (output / "checkpoint.pth").read_bytes()
    fails(capsys, "nowhere", output, "--overwrite")
    assert (output / "checkpoint.pth").read_bytes() == before    # a slip of the pen deletes nothing
    run(images, output, "--alpha", 0.5, "--max_steps", 1, "--overwrite")
    assert "going on" not in capsys.readouterr().out and (output / "checkpoint.pth").read_bytes() != before

    for garbage in (b"", b"text", before[:1000]):
        (output / "checkpoint.pth").write_bytes(garbage)
        assert "checkpoint.pth is damaged, or no checkpoint" in fails(capsys, images, output)


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 6), (signal.SIGTERM, 8)])    # 8 ends an epoch: its kNN is made up for
def test_a_signal_saves_says_so_and_the_same_command_goes_on(number, step, folder, uninterrupted, tmp_path, capsys, monkeypatch):
    calls, original = [], model.update_teacher

    def update_and_signal(*args):
        calls.append(original(*args))
        if len(calls) == step:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    monkeypatch.setattr(train, "update_teacher", update_and_signal)
    with pytest.raises(SystemExit) as stopped:
        run(folder, tmp_path)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is handler
    said = capsys.readouterr()
    assert f"stopped by {signal.Signals(number).name} after step {step} of 12; the same command goes on" in said.out
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == step and list(losses(tmp_path)[1]) == [0]
    assert "stopping after this step" in said.err
    run(folder, tmp_path)
    same_run(tmp_path, uninterrupted)


def test_a_signal_during_knn_stops_it(folder, uninterrupted, tmp_path, capsys, monkeypatch):
    """Not only when it is done, which can take minutes: before training, and after an epoch, whose line is then made up for."""
    original, batches = evaluate.normalize, []

    def signal_in_the_second_batch(images):
        batches.append(1)
        if len(batches) in stops:
            signal.raise_signal(signal.SIGTERM)
        return original(images)

    monkeypatch.setattr(evaluate, "normalize", signal_in_the_second_batch)
    for stops, step, looked_at in (({2}, 0, 2), ({6 + 3}, 8, 9)):    # 4 batches of train and 2 of val
        batches.clear()
        with pytest.raises(SystemExit) as stopped:
            run(folder, tmp_path)
        assert stopped.value.code == 128 + signal.SIGTERM and len(batches) == looked_at
        assert f"stopped by SIGTERM after step {step} of 12" in capsys.readouterr().out
    stops = set()
    run(folder, tmp_path)
    same_run(tmp_path, uninterrupted)


def test_without_a_terminal_losses_are_lines(folder, tmp_path, capsys):
    run(folder, tmp_path, "--max_steps", 3, "--log_every", 2, "--knn_every", 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    logged = losses(tmp_path)[0]
    assert [line.split(":")[0] for line in lines] == ["step 2/12", "step 3/12"] and list(logged) == [2, 3]    # the last one too
    assert f"L_p {logged[2][2]:.3f}, L_c {logged[2][3]:.3f}" in lines[0]


def test_a_kill_during_knn_loses_no_training(folder, uninterrupted, tmp_path, monkeypatch):
    class Kill(BaseException):
        pass

    def killed(*args, calls=[], **rest):
        calls.append(1)
        if len(calls) == 2:    # the first is of the untrained encoder
            raise Kill
        return evaluate.knn_accuracy(*args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "knn_accuracy", killed)
        with pytest.raises(Kill):
            run(folder, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 8
    run(folder, tmp_path)
    same_run(tmp_path, uninterrupted)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(folder, uninterrupted, tmp_path, monkeypatch, capsys):
    run(folder, tmp_path, "--max_steps", 4)
    before = (tmp_path / "checkpoint.pth").read_bytes()

    def half_a_file(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")    # PyTorch's words for a full disk

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_a_file)
        assert re.search("could not be written .* the file from before, if there is one, is whole", fails(capsys, folder, tmp_path))
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and not list(tmp_path.glob("*.part"))
    run(folder, tmp_path)
    same_run(tmp_path, uninterrupted)


def test_what_is_not_finite_is_named_and_saves_nothing(folder, tmp_path, monkeypatch, capsys):
    run(folder, tmp_path, "--max_steps", 4)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    original, calls = relations.SelfRelationLoss.channel, []

    def third_is_nan(self, *args):
        calls.append(1)
        return original(self, *args) * (float("nan") if len(calls) == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(relations.SelfRelationLoss, "channel", third_is_nan)
        assert "loss is nan, L_c is nan in step 7. Nothing was saved" in fails(capsys, folder, tmp_path, "--log_every", 100)

    def infinite_gradient(parameters, largest):    # under a finite loss, in the last step before a checkpoint
        calls.append(1)
        if len(calls) == 4:
            parameters[0].grad.fill_(float("inf"))

    calls.clear()
    monkeypatch.setattr(train, "clip_gradients", lambda parameters, largest: infinite_gradient(list(parameters), largest))
    assert "1 parameters are not finite after step 8, backbone.cls_token among them" in fails(capsys, folder, tmp_path)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("native, precision, products", [(True, "auto", "high"), (False, "auto", "high"), (True, "fp32", "highest")])
def test_a_gpus_own_precision_is_taken(native, precision, products, monkeypatch):
    """Not the bfloat16 that older cards emulate; and TF32 only beside half precision."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    args = train.parse_args(["--precision", precision])
    train.settle(args, torch.device("cuda"))
    assert asked == [products] and args.compile
    assert args.precision == ("fp32" if precision == "fp32" else "bf16" if native else "fp16")


def test_a_gpu_without_memory_says_what_to_lower(folder, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "step", full)
        assert "process 0: CUDA out of memory. Tried to allocate 20.00 GiB. Lower --batch_size_per_gpu 4; --grad_accum_steps" in fails(capsys, folder, tmp_path)
    run(folder, tmp_path, "--max_steps", 1)
    monkeypatch.setattr(evaluate, "extract_features", full)
    with pytest.raises(SystemExit, match="Lower --batch_size_per_gpu"):
        evaluate.main(["knn", "--pretrained_weights", f"{tmp_path}/backbone.pth", "--data_path", str(folder)])


def test_three_epochs_step_by_step_by_hand(folder, tmp_path, monkeypatch):
    """All that main puts together, with no two settings alike, against plain code: which flag goes where, Eq. 6, accumulation,
    clipping, AdamW and its schedules, the moving average, the centre, the teacher's temperature, and whose features kNN looks at."""
    evaluated = []
    monkeypatch.setattr(train, "knn_accuracy", lambda encoder, *_, **__: evaluated.append({k: v.clone() for k, v in encoder.state_dict().items()}) or {20: 0.0})
    flags = """--alpha 0.3 --beta 0.7 --li_weight 0.2 --temperature_spatial 0.4 --temperature_channel 0.2 --sharpen student --relation_heads 3
    --overlap_global 5 --overlap_local 3 --grad_accum_steps 2 --clip_grad 0.02 --warmup_teacher_temp 0.03 --teacher_temp 0.06 --warmup_teacher_temp_epochs 2
    --drop_path_rate 0 --weight_decay 20 --weight_decay_end 40 --momentum_teacher 0.8 --lr 0.02 --min_lr 0.001 --warmup_epochs 1 --freeze_last_layer 0
    --seed 3 --global_crops_scale 0.5 0.9 --local_crops_scale 0.1 0.4""".split()
    run(folder, tmp_path, *flags)    # 3 epochs of 2 steps of 2 batches of 4
    checkpoint, logged = torch.load(tmp_path / "checkpoint.pth", weights_only=True), losses(tmp_path)[0]

    args = train.parse_args([*SMALL, "--data_path", str(folder), *flags])
    torch.manual_seed(3)
    student, teacher = train.build_networks(args, train.build_baseline(args))
    images, multicrop = data.build_dataset(folder, "train"), augment.MultiCrop(32, (0.5, 0.9), 2, 16, (0.1, 0.4))
    batches = iter(data.Batches(16, 4, 2, 0, 1, seed=3))
    settings = argparse.Namespace(heads=3, overlap_global=5, overlap_local=3, teacher_temperatures=(1.0, 1.0), student_temperatures=(0.4, 0.2))
    lr, weight_decay, momentum = (train.cosine_schedule(*s) for s in ((0.02 * 8 / 256, 0.001, 6, 2), (20, 40, 6), (0.8, 1.0, 6)))
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    start = {name: value.clone() for name, value in student.state_dict().items()}
    center = torch.zeros(32)
    for step in range(6):
        teacher_temp = (0.03, 0.06, 0.06)[step // 2]
        gradients, outputs, terms = {name: 0.0 for name in parameters}, [], []
        for _ in range(2):
            views = augment.collate([(multicrop(images[index][0], (3, epoch, index)), []) for epoch, index in next(batches)])[0]
            colours = [augment.Photometric()(c.flatten(0, 1), r.flatten(0, 1)).unflatten(0, c.shape[:2]) for c, r in zip(views.crops, views.rows.split(2))]
            taught, learned = teacher(colours[:1]), student(colours)
            boxes = views.rows[..., augment.BOX]
            l_p = plain_loss(settings, taught.spatial, learned.spatial, boxes)[0]
            l_c = plain_loss(settings, taught.channel, learned.channel, boxes)[1]
            l_i = sum(F.cross_entropy(learned.embedding[v] / 0.1, ((taught.embedding[q] - center) / teacher_temp).softmax(dim=-1))
                      for q in range(2) for v in range(4) if q != v) / 6
            loss = 0.2 * l_i + 0.3 * l_p + 0.7 * l_c
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
                gradients[name] = gradients[name] + gradient / 2
            outputs.append(taught.embedding.mean(dim=(0, 1)))
            terms.append(torch.stack([loss, l_i, l_p, l_c]).detach())
        assert logged[step + 1] == pytest.approx(sum(terms).div(2).tolist(), rel=1e-3)
        with torch.no_grad():
            for name, p in parameters.items():
                g = gradients[name] * min(1, 0.02 / (gradients[name].norm() + 1e-6))
                first[name], second[name] = 0.9 * first[name] + 0.1 * g, 0.999 * second[name] + 0.001 * g.square()
                p.mul_(1 - lr[step] * (weight_decay[step] if p.ndim > 1 else 0))
                p.sub_(lr[step] * (first[name] / (1 - 0.9 ** (step + 1))) / ((second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
            for name, p in teacher.named_parameters():
                p.copy_(momentum[step] * p + (1 - momentum[step]) * student.get_parameter(name))
            center = 0.9 * center + 0.1 * sum(outputs) / 2

    close(checkpoint["baseline"]["center"], center, rtol=1e-3, atol=1e-5)
    clipped = 0
    for network, expected in (("student", student), ("teacher", teacher)):
        for name, value in expected.state_dict().items():
            # Where a gradient is all rounding AdamW makes a step of it all the same, so that single entries may differ: their mean must not.
            moved = (value - start[name]).abs().mean()
            assert (checkpoint[network][name] - value).abs().mean() <= 0.01 * moved + 1e-9, (network, name)
    state = checkpoint["optimizer"]["state"]
    for i, p in enumerate(p for group in train.parameter_groups(student) for p in group["params"]):
        name = next(n for n, q in parameters.items() if q is p)
        close(state[i]["exp_avg"], first[name], rtol=0.02, atol=2e-2 * float(first[name].abs().max()))
        clipped += 0.019 < gradients[name].norm() * min(1, 0.02 / gradients[name].norm()) <= 0.0201
    assert 5 < clipped < len(parameters)    # some were clipped, some not
    assert len(evaluated) == 3 and all(torch.equal(value, checkpoint["teacher"][f"backbone.{name}"]) for name, value in evaluated[-1].items())


def recipe_settings(flags):
    """Flags with no two settings alike, so that one in another's place shows."""
    flags = [*flags, *"""--temperature_spatial 0.4 --temperature_channel 0.2 --alpha 0.3 --beta 0.7 --li_weight 0.2 --warmup_teacher_temp 0.03
        --warmup_teacher_patch_temp 0.05 --drop_path_rate 0 --pred_ratio 0.5 --pred_ratio_var 0.1 --moco_t 0.3 --sharpen student""".split()]
    return flags + ([] if "resnet50" in flags else "--relation_heads 3 --overlap_global 5 --overlap_local 3".split())


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=" ".join)
def test_every_recipe_trains_as_its_flags_say_and_resumes(flags, folder, tmp_path):
    """The first step's terms against slow loops on the same images; then three steps at once against two and one, with and without kNN."""
    flags = recipe_settings(flags)
    run(folder, tmp_path / "whole", *flags, "--max_steps", 3)
    run(folder, tmp_path / "parts", *flags, "--max_steps", 2, "--knn_every", 0)
    run(folder, tmp_path / "parts", *flags, "--max_steps", 3, "--knn_every", 0)
    assert (tmp_path / "whole/backbone.pth").read_bytes() == (tmp_path / "parts/backbone.pth").read_bytes()
    logged = losses(tmp_path / "whole")[0]
    assert logged == losses(tmp_path / "parts")[0] and set(losses(tmp_path / "whole")[1]) == {0}
    for loss, l_i, l_p, l_c in logged.values():
        assert loss == pytest.approx(0.2 * l_i + 0.3 * l_p + 0.7 * l_c)
    assert (tmp_path / "whole/attention.png").exists() == ("resnet50" not in flags)
    optimizer = torch.load(tmp_path / "whole/checkpoint.pth", weights_only=True)["optimizer"]
    sgd = {"momentum_buffer"} if "resnet50" in flags else {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer["state"][0].keys() == sgd and optimizer["param_groups"][0].get("momentum") == (0.9 if "resnet50" in flags else None)
    encoder = weights.load_encoder(tmp_path / "whole/checkpoint.pth")    # what was trained can be evaluated
    teacher = torch.load(tmp_path / "whole/backbone.pth", weights_only=True)
    assert all(torch.equal(value, teacher[name]) for name, value in encoder.state_dict().items())

    args = train.parse_args([*SMALL, "--data_path", str(folder), *flags])
    torch.manual_seed(0)
    student, teacher = train.build_networks(args, train.build_baseline(args))
    mask = augment.BlockMask(4, [0.5], [0.1]) if args.baseline == "ibot" else None
    multicrop = augment.MultiCrop(args.global_crops_size, args.global_crops_scale, args.local_crops_number, args.local_crops_size, args.local_crops_scale, mask)
    images, keys = data.build_dataset(folder, "train"), take(data.Batches(16, args.batch_size_per_gpu, 1, 0, 1, seed=0), 1)[0]
    batch = augment.collate([(multicrop(images[index][0], (0, epoch, index)), []) for epoch, index in keys])[0]
    views = train.colour(batch, augment.Photometric())
    terms = plain_terms(args, teacher(views[:1], batch.mask), student(views, batch.mask), batch.rows[..., augment.BOX], batch.mask, moco_temperature=0.3)
    assert logged[1][1:] == pytest.approx(terms.tolist(), rel=1e-3)


def test_recipes_have_their_papers_settings():
    """Beside the text: iBOT's and MoCo v3's own releases, the authors' release, DINO's README for ResNet-50."""
    def settings(recipe, **expected):
        args = train.parse_args(["--recipe", recipe, "--data_path", "x"])
        assert {name: getattr(args, name) for name in expected} == expected
        assert train.build_baseline(args).teacher_temp[-1].tolist() == pytest.approx([0.07, 0.07] if "ibot" in recipe else 0.04)

    ibot = dict(
        baseline="ibot", alpha=0.2, beta=0.5, li_weight=1.0, out_dim=8192, shared_head=True, teacher_temp=0.07, teacher_patch_temp=0.07, warmup_teacher_temp=0.04,
        warmup_teacher_patch_temp=0.04, pred_ratio=[0.0, 0.3], pred_ratio_var=[0.0, 0.2], local_crops_number=10, clip_grad=0.3, epochs=100, warmup_epochs=10,
        batch_size_per_gpu=128, optimizer="adamw", drop_path_rate=0.1)
    settings("ibot", **ibot, arch="vit_small", norm_last_layer=False, warmup_teacher_temp_epochs=30, freeze_last_layer=1, lr=0.0005, min_lr=1e-6,
             global_crops_scale=[0.4, 1.0], local_crops_scale=[0.05, 0.4])
    settings("ibot-b", **ibot, arch="vit_base", norm_last_layer=True, warmup_teacher_temp_epochs=50, freeze_last_layer=3, lr=0.00075, min_lr=2e-6,
             global_crops_scale=[0.32, 1.0], local_crops_scale=[0.05, 0.32])
    settings("mocov3", baseline="mocov3", moco_t=0.2, out_dim=256, momentum_teacher=0.99, local_crops_number=0, lr=0.00015, weight_decay=0.1, weight_decay_end=0.1,
             warmup_epochs=40, stop_grad_conv1=True, clip_grad=0.0, global_crops_scale=[0.08, 1.0], alpha=1.0, beta=1.0)
    settings("resnet50", baseline="dino", arch="resnet50", optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4, global_crops_scale=[0.14, 1.0],
             local_crops_scale=[0.05, 0.14], relation_heads=8, alpha=1.0, beta=1.0)


def test_teacher_temperatures_warm_up_by_epoch():
    temps = train.build_baseline(train.parse_args([*SMALL, "--data_path", "x", "--recipe", "ibot", "--epochs", "6", "--warmup_teacher_temp_epochs", "4",
                                                   "--teacher_temp", "0.07", "--warmup_teacher_patch_temp", "0.02", "--teacher_patch_temp", "0.05"])).teacher_temp
    close(temps, torch.tensor([[0.04, 0.02], [0.05, 0.03], [0.06, 0.04], [0.07, 0.05], [0.07, 0.05], [0.07, 0.05]]))


def test_training_starts_from_a_file(tmp_path, capsys):
    """Both networks, with position embeddings interpolated to the crops' grid; and MoCo v3's heads stay with the weights."""
    vit = model.build_encoder("vit_nano", 64, 8)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    for recipe in ("dino", "ibot"):
        _, _, student, teacher = networks(["--recipe", recipe, "--init_from", str(tmp_path / "vit.pth")])
        for network in (student, teacher):
            for name, value in vit.state_dict().items():
                close(network.backbone.state_dict()[name], vit._position_embedding(4, 4) if name == "pos_embed" else value)
    moco_file(model.build_encoder("vit_small", 32, 16), tmp_path / "moco.pth")
    _, _, student, _ = networks(["--arch", "vit_small", "--patch_size", "16", "--init_from", str(tmp_path / "moco.pth")])
    assert student.backbone.heads == student.backbone.blocks[0].attn.heads == 12


def test_bad_weights_to_start_from_get_one_clear_line(folder, tmp_path, capsys):
    torch.save(model.build_encoder("vit_nano", 64, 16).state_dict(), tmp_path / "vit.pth")
    assert "vit.pth has a patch size of 16, not --patch_size 8" in fails(capsys, folder, tmp_path / "run", "--init_from", tmp_path / "vit.pth")
    assert "does not fit vit_tiny" in fails(capsys, folder, tmp_path / "run", "--init_from", tmp_path / "vit.pth", "--arch", "vit_tiny", "--relation_heads", 3)
    assert "No such file" in fails(capsys, folder, tmp_path / "run", "--init_from", tmp_path / "nothing.pth")


def test_files_of_a_run_carry_its_heads(folder, tmp_path):
    run(folder, tmp_path, "--heads", 6, "--max_steps", 1, "--knn_every", 0)
    for name in ("backbone.pth", "checkpoint.pth"):
        assert weights.load_encoder(tmp_path / name).heads == 6    # vit_nano has 3
    assert isinstance(torch.load(tmp_path / "backbone.pth", weights_only=True), dict)


def test_tensorboard_gets_what_the_log_has(folder, tmp_path, capsys, monkeypatch):
    written, pictures = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "run/tensorboard"

        def add_scalar(self, name, value, step):
            written.append((name, step, value))

        def add_image(self, name, picture, step, dataformats):
            pictures.append((name, step, picture.shape[2]))

        def flush(self):
            pass

    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run(folder, tmp_path / "run", "--tensorboard", "--epochs", 2)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    expected = [(f"{line['kind']}/{name}", line["step"], value) for line in lines for name, value in line.items() if name not in ("kind", "step") and value is not None]
    assert written == expected and ("epoch/kNN", 0) in {(name, step) for name, step, _ in written}
    assert pictures == [("views", 0, 3), ("attention", 8, 3)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)    # not installed
    assert "--tensorboard needs it installed: pip install tensorboard" in fails(capsys, folder, tmp_path / "other", "--tensorboard")


def test_a_fixed_patch_projection_stays_as_drawn(folder, tmp_path):
    _, _, student, _ = networks(["--recipe", "mocov3"])
    drawn = student.backbone.patch_embed.proj.weight
    bound = math.sqrt(6 / (3 * 8 * 8 + 96))    # xavier: its scale matters as it stays
    assert 0.95 * bound < drawn.abs().max() <= bound
    run(folder, tmp_path, "--recipe", "mocov3", "--max_steps", 1)
    first = torch.load(tmp_path / "backbone.pth", weights_only=True)
    run(folder, tmp_path, "--recipe", "mocov3", "--max_steps", 6)
    later = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert torch.equal(first["patch_embed.proj.weight"], later["patch_embed.proj.weight"]) and not torch.equal(first["cls_token"], later["cls_token"])


@pytest.mark.parametrize("flags, layers", [([], ["last_layer"]), (VARIANTS["ibot, own head"], ["last_layer", "patch_last_layer"])])
def test_last_layers_are_frozen_in_the_first_epoch(flags, layers, folder, tmp_path):
    weights = []
    for steps in (1, 4, 5):
        run(folder, tmp_path, *flags, "--max_steps", steps)
        student = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["student"]
        weights.append([student[f"head.{layer}.weight"] for layer in layers])
    for first, fourth, fifth in zip(*weights):
        assert torch.equal(first, fourth) and not torch.equal(fourth, fifth)


def test_unreadable_images_are_counted_in_the_log(tmp_path, capsys):
    folder = image_folder(tmp_path / "images")
    broken_images(folder / "train/class0")
    run(folder, tmp_path / "run", "--max_steps", 3, "--batch_size_per_gpu", 6)    # all of the 18 images
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert sum(line.get("unreadable", 0) for line in lines) == 3    # the text, and before the truncated one, which is next, itself
    assert "!truncated.jpg can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    ("--data_path nowhere", "nowhere is neither a folder nor one of"),
    ("--data_path {empty}", "no images below"),
    ("--batch_size_per_gpu 999 --grad_accum_steps 3", "16 images, fewer than a batch of 2997; lower --batch_size_per_gpu to at most 5"),
    ("--grad_accum_steps 17", "16 images, fewer than a batch of 68; take fewer processes or --grad_accum_steps"),
    ("--global_crops_scale 0.9 0.2", "--global_crops_scale must be two rising numbers"),
    ("--global_crops_size 30", "--global_crops_size 30 is not a multiple of --patch_size 8"),
    ("--relation_heads 7", "--arch vit_nano: 96 channels can't be split into 7 relation heads; possible: [1, 2, 3, 4, 6, 8"),
    ("--warmup_epochs 3", "--warmup_epochs 3 leaves nothing of --epochs 3"),
    ("--alpha 0 --beta 0 --li_weight 0", "all 0: nothing to learn from"),
    ("--alpha -1", "--alpha can't be negative"),
    ("--teacher_temp 0", "--teacher_temp must be above 0"),
    ("--drop_path_rate 1", "--drop_path_rate must lie in [0, 1)"),
    ("--lr nan", "--lr can't be negative"),
    ("--recipe ibot --pred_ratio 0.3", "--pred_ratio and --pred_ratio_var must be equally many, not 1 and 2"),
    ("--recipe ibot --pred_ratio 0 0.3 --pred_ratio_var 0 0.4", "--pred_ratio 0.3 plus or minus --pred_ratio_var 0.4 must lie in [0, 1)"),
    ("--recipe ibot --pred_ratio_var 0 -0.2", "--pred_ratio_var can't be negative"),
    ("--recipe resnet50 --arch resnet50", "--arch resnet50 needs --patch_size 32, its stride; --recipe resnet50 has what it needs"),
    ("--arch resnet50 --patch_size 32 --local_crops_size 32 --global_crops_size 64", "--arch resnet50 needs --drop_path_rate 0"),
    ("--recipe ibot --arch resnet50", "--arch resnet50 needs another --baseline: it has no patches to mask"),
    ("--recipe mocov3 --batch_size_per_gpu 1", "--baseline mocov3 tells the images of a batch apart"),
    ("--recipe ibot --warmup_teacher_temp_epochs 9 --warmup_epochs 7", "--warmup_epochs 7 leaves nothing of --epochs 3: give 0 to 2; --warmup_teacher_temp_epochs 9 is more"),
    ("--baselin mocov3", "unrecognized arguments: --baselin"),
    ("--teacher_patch_temp nan", "--teacher_patch_temp must be above 0"),
    ("--recipe resnet50 --arch resnet50 --patch_size 32 --global_crops_size 64 --local_crops_size 32 --relation_heads 6", "2048 channels can't be split into 6 relation heads; possible: [1, 2, 4, 8, 16"),
    ("--moco_t 0", "--moco_t must be above 0"),
    ("--heads 7", "--heads 7 does not divide the 96 channels of --arch vit_nano"),
    ("--warmup_teacher_temp_epochs -1", "--warmup_teacher_temp_epochs can't be negative"),
    ("--recipe nonsense", "invalid choice: 'nonsense'"),
    ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
])
def test_bad_input_gets_one_clear_line(flags, message, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert message in fails(capsys, folder, tmp_path / "run", *flags.format(empty=tmp_path / "empty").split())
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_is_a_file_is_an_error(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "File exists" in fails(capsys, folder, tmp_path / "file")


def test_recipes_and_what_overrides_them(capsys):
    demo, dino = train.parse_args([]), train.parse_args(["--data_path", "x"])
    assert (demo.recipe, demo.data_path, demo.arch, demo.output_dir) == ("demo", "shapes", "vit_nano", "runs/demo")
    paper = dict(recipe="dino", arch="vit_small", patch_size=16, epochs=100, lr=0.0005, alpha=1.0, beta=1.0, temperature_spatial=0.5, temperature_channel=0.1,
                 relation_heads=6, overlap_global=13, overlap_local=6, global_crops_scale=[0.35, 1.0], local_crops_scale=[0.05, 0.35], local_crops_number=4,
                 out_dim=65536, teacher_temp=0.04, clip_grad=3.0, warmup_epochs=10, min_lr=1e-6, momentum_teacher=0.996, weight_decay=0.04, weight_decay_end=0.4)
    assert {name: getattr(dino, name) for name in paper} == paper
    assert train.parse_args(["--recipe", "demo", "--epochs", "50", "--data_path", "y"]).data_path == "y"
    assert train.parse_args(["--baseline", "mocov3", "--data_path", "x"]).recipe == "mocov3" and train.parse_args(["--baseline", "dino+", "--data_path", "x"]).recipe == "dino"
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    assert "(default: vit_nano)" in capsys.readouterr().out    # the help shows the recipe's values
    with pytest.raises(SystemExit):
        train.parse_args(["--recipe", "dino"])
    assert "--recipe dino needs --data_path" in capsys.readouterr().err


def test_commands_of_the_readme_are_understood():
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for block in re.findall(r"```(?:sh)?\n(.*?)```", text, re.S) for line in block.splitlines()]
    checked = 0
    for command in commands:
        for program, parse in (("train.py", train.parse_args), ("evaluate.py", evaluate.parse_args), ("visualize.py", visualize.parse_args), ("benchmark.py", benchmark.parse_args)):
            if program in command:
                parse(command[command.index(program) + 1 :])
                checked += 1
    assert checked >= 15


# --- benchmark --------------------------------------------------------------------------------------------------------


def test_clock_gives_time_to_the_innermost_part(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(now))    # a second between any two looks
    clock = benchmark.Clock(torch.device("cpu"))
    clock.milliseconds()                                                      # at 0, and again at 1
    inner = clock.timed("inner", lambda x: x + 1)
    with clock.part("outer"):                                                 # 2
        assert inner(1) == 2                                                  # 3 to 4
        inner(1)                                                              # 5 to 6; 7 ends it, 8 looks
    assert clock.milliseconds() == {"other": 2000, "outer": 3000, "inner": 2000}
    assert clock.milliseconds() == {"other": 1000}


def test_timing_a_step_changes_nothing_of_it(folder):
    results = []
    for timed in (False, True):
        args = train.parse_args([*SMALL, "--data_path", str(folder), "--recipe", "ibot"])
        processes = distributed.Processes()
        train.settle(args, processes.device)
        training = train.Training(args, processes, 16)
        batches = iter(data.on_device((views for views, _ in train.build_loader(args, data.build_dataset(folder, "train"), training.mask, processes)), processes.device))
        clock = benchmark.Clock(processes.device)
        with benchmark.timed_step(clock, training) if timed else contextlib.nullcontext():
            terms = [training.step(step, batches).terms for step in range(2)]
        results.append([*terms, *training.student.state_dict().values(), *training.teacher.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert set(clock.milliseconds()) == set(benchmark.PARTS) - {"loader", "transfer"}
    assert torch.Tensor.backward.__name__ == "backward" and train.update_teacher is model.update_teacher    # as before
    assert type(training.student) is model.Network and type(training.embedding_loss) is baselines.IBOTLoss


def test_operations_are_counted_as_by_hand():
    """A ViT-nano, dim 96 and 4 blocks, with 2 global views of 16 patches and DINO's head: multiply-adds of each linear layer and of attention."""
    args = train.parse_args([*SMALL, "--data_path", "x", "--local_crops_number", "0", "--alpha", "0", "--beta", "0"])
    C, n, views = 96, 17, 2 * 4
    embed, blocks, head = 16 * 3 * 8 * 8 * C, 4 * (n * 12 * C * C + 2 * n * n * C), C * 64 + 64 * 64 + 64 * 256 + 256 * 32
    teacher, student = embed + blocks + head, 2 * embed + 3 * (blocks + head)    # pixels need no gradient
    assert benchmark.count_flops(args) == 2 * views * (teacher + student)
    assert benchmark.count_flops(train.parse_args([*SMALL, "--data_path", "x", "--grad_accum_steps", "3"])) == 3 * benchmark.count_flops(train.parse_args([*SMALL, "--data_path", "x"]))


def test_roofline_is_between_memory_and_arithmetic():
    assert benchmark.roofline(384, 197, 2, 1e15, 1e20) == pytest.approx(1, abs=1e-3)      # memory costs nothing
    slow = benchmark.roofline(384, 197, 2, 1e20, 1e12)                                    # arithmetic costs nothing: 38 values a channel and token
    assert slow == pytest.approx(2 * (12 * 384**2 + 2 * 197 * 384) / 1e20 / (38 * 384 * 2 / 1e12))


@pytest.mark.parametrize("flags", ["--recipe dino", "--recipe ibot --alpha 0 --beta 0", "--recipe mocov3 --local_crops_number 0 --data_path"])
def test_benchmark_from_the_command_line(flags, folder, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(benchmark, "copy_rate", lambda *_: 1e9)
    flags = flags.split() + ([str(folder)] if "--data_path" in flags else [])
    result = benchmark.main([*SMALL, *flags, "--steps", "2", "--warmup_steps", "1"])
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1]) == result and any(line.startswith("  a step ") for line in said)
    assert result["step_ms"] == pytest.approx(sum(result["parts_ms"].values())) and result["images_per_s"] == pytest.approx(4000 / result["step_ms"])
    assert result["mfu"] == pytest.approx(result["tflop"] * 1000 / result["step_ms"]) and result["peak_memory_gib"] > 0
    without_relations = "--alpha" in flags
    assert (result["relations_ms"] == 0) == without_relations


def test_ctrl_c_ends_a_benchmark_without_a_stack(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Training, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*SMALL, "--steps", "1", "--warmup_steps", "1"])
    assert stopped.value.code == 130


def test_benchmark_of_the_loader(folder, capsys):
    result = benchmark.main([*SMALL, "--loader", "--data_path", str(folder)])
    assert result["pillow_ms"] < result["all_ms"] and result["ratio"] == pytest.approx(result["all_ms"] / result["pillow_ms"]) and result["images_per_s"] > 0
    assert "times bare decoding" in capsys.readouterr().out and torch.get_num_threads() == 2    # as before


def test_the_loader_is_timed_on_images_that_can_be_read(tmp_path, capsys):
    broken_images(tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "whole.png")
    result = benchmark.main([*SMALL, "--loader", "--data_path", str(tmp_path), "--grad_accum_steps", "4"])
    said = capsys.readouterr()
    assert said.out.startswith("1 images of") and "text.jpg can't be read" in said.err and "truncated.jpg can't be read" in said.err and result["ratio"] > 0
    (tmp_path / "whole.png").unlink()
    with pytest.raises(SystemExit, match="none of"):
        benchmark.main([*SMALL, "--loader", "--data_path", str(tmp_path)])


def test_the_last_layer_learns_in_the_steps_that_are_timed(folder, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(benchmark, "copy_rate", lambda *_: 1e9)
    learned, step = set(), train.Training.step
    monkeypatch.setattr(train.Training, "step", lambda self, *rest: (step(self, *rest), learned.add(len(self.optimizer.state)))[0])
    benchmark.main([*SMALL, "--freeze_last_layer", "1", "--data_path", str(folder), "--steps", "1", "--warmup_steps", "1"])
    args = train.parse_args([*SMALL, "--data_path", str(folder)])
    assert learned == {sum(p.requires_grad for p in train.build_networks(args, train.build_baseline(args))[0].parameters())}


@pytest.mark.parametrize("flags, message", [
    ("--loader", "--loader needs images to decode: give --data_path"), ("--loader --data_path shapes", "--loader needs image files, and shapes has none"),
    ("--data_path nowhere", "nowhere is neither a folder nor one of"), ("--steps 0", "--steps and --warmup_steps must be at least 1"),
    ("--data_path shapes --batch_size_per_gpu 5000", "--epochs 3 are 6 steps, fewer than the 35 to take the time of"),
    ("--stps 3", "benchmark.py: error: unrecognized arguments: --stps 3"),
])
def test_bad_input_to_benchmark_gets_one_clear_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*SMALL, *flags.split()])
    assert message in str(stopped.value.code) + capsys.readouterr().err


def load_result(name):
    """A program of results/, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "results" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_memory_is_counted_as_tensors_come_and_go():
    count_memory = load_result("count_memory")
    with count_memory.Peak() as memory:
        a = torch.zeros(256)       # 1 KiB
        b = a + 1                  # 2
        view = b[:10]
        del a, b                   # 1: the view keeps b's
        c = view.new_zeros(512)    # 3
        del view, c
    assert (memory.most, memory.bytes) == (3 << 10, 0)
    batches = [count_memory.peak(train.parse_args(f"--recipe demo --batch_size_per_gpu {number}".split())) for number in (8, 16, 24)]
    close(batches[2] - batches[1], batches[1] - batches[0], rtol=0.05)    # so much an image, and networks and optimizer once


@pytest.mark.parametrize("name, flags, message", [
    ("relation_forms", "--beta 0", "must not be 0"), ("relation_forms", "--channel_relation batch", "no other forms"),
    ("relation_forms", "--init_from nowhere.pth", "error: .*No such file.*nowhere.pth"), ("relation_share", "--init_from nowhere.pth", "error: .*No such file.*nowhere.pth"),
    ("relation_share", "--epochs 1 --warmup_epochs 0 --warmup_teacher_temp_epochs 0 --batch_size_per_gpu 2000", "--epochs 1 are 50 steps, fewer than the 63"),
])
def test_bad_input_to_the_programs_of_results_gets_one_clear_line(name, flags, message, monkeypatch):
    program = load_result(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL, *flags.split()])
    with pytest.raises(SystemExit, match=message), benchmark.in_one_line(f"{name}.py"):
        program.main()


def test_other_forms_of_the_relation_losses_are_the_same_losses():
    """Before they are timed; which raises where one is another loss."""
    forms = load_result("relation_forms")
    args = train.parse_args("--recipe demo --overlap_global 5 --overlap_local 3".split())
    forms.check(args)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="another loss"):
        patch.setitem(forms.FORMS, "wrong", ([(relations, "cross_entropy", lambda targets, logits: -(targets * logits).sum(dim=-1)),
                                              (relations, "GramCrossEntropy", forms.ByAutograd)], False, False))
        forms.check(args)


def test_what_sere_adds_is_the_difference_of_steps_in_turns(monkeypatch, capsys):
    share, now, turns, loss = load_result("relation_share"), [0.0], [], torch.zeros(4)

    def step(training, number, batches):    # 4 s with relation heads, 3 s without, and one of them disturbed
        next(batches)
        related = len(training.student.spatial) + len(training.student.channel) > 0
        turns.append((number, related))
        now[0] += 3 + related + 100 * (number == 1 and not related)    # s
        return argparse.Namespace(terms=loss)

    monkeypatch.setattr(train.Training, "step", step)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(share, "TURNS", 3)
    monkeypatch.setattr(share, "WARMUP_TURNS", 1)
    monkeypatch.setattr(sys, "argv", ["relation_share.py", *SMALL])
    share.main()
    assert turns == [(number, related) for number in range(4) for related in ((True, False), (False, True))[number % 2]]
    assert re.search(r"^difference +1000.0 ± .* ms, +25.0 % ", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["relation_share.py", *SMALL, "--alpha", "0", "--beta", "0"])
    with pytest.raises(SystemExit, match="must not be 0"):
        share.main()
    loss += math.nan
    monkeypatch.setattr(sys, "argv", ["relation_share.py", *SMALL])
    with pytest.raises(SystemExit, match="the loss is nan"):
        share.main()


# --- processes --------------------------------------------------------------------------------------------------------


def environment():
    return os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}


def test_killed_at_any_moment_and_run_again_it_ends_the_same(folder, uninterrupted, tmp_path):
    """SIGKILL, with 3 workers; on with 1 worker; against 0 workers uninterrupted: bit for bit."""
    flags = [*SMALL, "--data_path", str(folder), "--output_dir", str(tmp_path), "--num_workers", "3", "--checkpoint_steps", "2"]
    command = [sys.executable, "-c", f"import test_sere, train; train.main({flags!r})"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "log.jsonl", time.time() + 120
    while not (log.exists() and '"step": 7' in log.read_text()):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] in (6, 8)
    run(folder, tmp_path, "--num_workers", 1)
    same_run(tmp_path, uninterrupted)


def gradients_of_a_step(flags, rank=0, processes=1):
    """Losses, gradients, and what the loss and the batch norms keep, of one step on a fixed batch of 4 images, of which a process takes its share."""
    torch.manual_seed(1)
    args, baseline, student, teacher = networks(flags)
    views, boxes, mask = random_views(args, baseline, B=4)
    boxes[2:, :2, :4], boxes[:2, :2, :4] = torch.tensor([0.0, 0.0, 0.2, 0.2]), torch.tensor([0.3, 0.3, 1.0, 1.0])    # processes with unequally many pairs that overlap
    share = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    views, boxes, mask = [v[:, share] for v in views], boxes[:, share], None if mask is None else mask[:, share]
    network = student
    if processes > 1:
        if args.arch != "resnet50":    # it would, but takes long to trace
            student.compile(fullgraph=True, backend="eager")    # collectives included, no graph break
        network = torch.nn.parallel.DistributedDataParallel(student)
    terms = loss_terms(args, baseline, network, teacher, views, boxes, mask)
    terms.sum().backward()
    baseline.loss.update_center()
    kept = dict(baseline.loss.state_dict()) | {name: value.float() for name, value in [*student.named_buffers(), *teacher.named_buffers(prefix="teacher")]}
    return terms.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, kept


TORCHRUN = """
import torch, torch.distributed as dist
import distributed, test_sere, train

def gradients_first(args, processes, requests, rest=train.train):
    for name, flags in test_sere.VARIANTS.items():
        terms, gradients, kept = test_sere.gradients_of_a_step(flags, processes.rank, processes.size)
        terms = distributed.average_over_processes(terms)
        if processes.rank == 0:
            torch.save((terms, gradients, kept), {output!r} + "/" + name + ".pth")
    rest(args, processes, requests)

train.train = gradients_first
train.main({flags!r})
"""


def test_two_processes_of_B_equal_one_of_2B(folder, tmp_path):
    """Losses, gradients, batch norms and centres of a step of every recipe, and then a whole short training under torchrun."""
    flags = [*SMALL, "--data_path", str(folder), "--max_steps", "3", "--drop_path_rate", "0", "--lr", "0.001", "--warmup_epochs", "0"]
    script = tmp_path / "two.py"
    script.write_text(TORCHRUN.format(output=str(tmp_path), flags=[*flags, "--output_dir", str(tmp_path / "two"), "--batch_size_per_gpu", "4"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run(command, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]

    for name, variant in VARIANTS.items():
        terms, gradients, kept = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        expected_terms, expected, expected_kept = gradients_of_a_step(variant)
        close(terms, expected_terms, rtol=1e-4)
        assert gradients.keys() == expected.keys() and kept.keys() == expected_kept.keys()
        for part in expected_kept:
            close(kept[part], expected_kept[part], rtol=1e-4, atol=1e-4 if name == "resnet50" else 1e-5)    # values around 1 after fifty batch norms
        # Sums over all patches in another order. In a ResNet's last stages a batch norm sees but 16 values, and 1 % of its gradients
        # is rounding: as much as between this batch norm and torch's in one process.
        # And what comes before a batch norm has biases whose gradient is rounding alone.
        tolerance, rounding = 0.05 if name == "resnet50" else 1e-3, 1e-5 * max(g.norm() for g in expected.values())
        for part in expected:
            assert (gradients[part] - expected[part]).norm() <= tolerance * expected[part].norm() + rounding, (name, part)
    assert expected_kept.keys() == {"center"}

    train.main([*flags, "--output_dir", str(tmp_path / "one"), "--batch_size_per_gpu", "8"])
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    for step in one[0]:
        assert two[0][step] == pytest.approx(one[0][step], rel=1e-4)
    assert two[1] == one[1]    # kNN, computed in shares


def test_the_command_line_from_training_to_a_knn_number(folder, tmp_path):
    command = [sys.executable, HERE / "train.py", *SMALL, "--data_path", folder, "--max_steps", "2"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "dino: vit_nano/8, L = 1 L_I(dino) + 1 L_p + 1 L_c" in done.stdout and "Traceback" not in done.stderr
    weights = tmp_path / "runs/dino/backbone.pth"
    flags = ["--pretrained_weights", str(weights), "--data_path", str(folder), "--num_workers", "0", "--json", str(tmp_path / "result.json")]
    result = evaluate.main(["knn", *flags, "--nb_knn", "5"])
    assert json.loads((tmp_path / "result.json").read_text())["top1"] == {"5": result["top1"][5]} and result["image_size"] == 32
    result = evaluate.main(["linear", *flags, "--epochs", "2", "--batch_size_per_gpu", "4", "--lr", "0.1", "0.01"])
    assert {row["lr"] for row in result["rates"]} == {0.1, 0.01} and 0 <= result["top1"] <= 100


@pytest.mark.parametrize("flags, message", [
    (["--pretrained_weights", "nothing.pth"], "No such file"),
    (["--data_path", "nowhere"], "neither a folder"),
    (["--image_size", "30"], "--image_size 30 is not a multiple of the patch size 8"),
    (["--arch", "vit_tiny"], "does not fit vit_tiny"),
    (["--data_path", "{flat}"], "flat lacks labels"),
    (["--json", "missing/result.json"], "--json missing/result.json: its folder does not exist"),
])
def test_bad_input_to_evaluate_gets_one_clear_line(flags, message, folder, tmp_path):
    torch.save(model.build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "backbone.pth")
    flat = image_folder(tmp_path / "flat")
    for path in (flat / "val").glob("*/*"):
        path.rename(flat / "val" / path.name)    # ImageNet's val as it is shipped
    flags = [flag.format(flat=flat) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["knn", "--pretrained_weights", str(tmp_path / "backbone.pth"), "--data_path", str(folder), "--num_workers", "0", *flags])
    assert stopped.value.code.startswith("evaluate.py: error:") and message in stopped.value.code and "\n" not in stopped.value.code


def test_an_unreadable_image_is_an_error_in_evaluation(tmp_path):
    folder = image_folder(tmp_path / "images")
    broken_images(folder / "val/class0")
    torch.save(model.build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(SystemExit, match="!text.jpg can't be read"):
        evaluate.main(["knn", "--pretrained_weights", str(tmp_path / "backbone.pth"), "--data_path", str(folder), "--num_workers", "0"])
    # As a process of its own, too, and in one of two: its loader's workers end with it. The second process meets the file alone.
    command = [HERE / "evaluate.py", "knn", "--pretrained_weights", tmp_path / "backbone.pth", "--data_path", folder, "--num_workers", "3", "--batch_size_per_gpu", "1"]
    (folder / "val/class0/!text.jpg").rename(folder / "val/class0/00.jpg")
    (folder / "val/class0/!truncated.jpg").unlink()
    for launcher, who in (([], ""), (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], r" \(process 1\)")):
        done = subprocess.run([sys.executable, *launcher, *command], env=environment(), capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and re.search(f"evaluate.py: error{who}: .*00.jpg can't be read", done.stderr), done.stderr[-2000:]
        assert launcher or ("Traceback" not in done.stderr and "error" in done.stderr.splitlines()[-1]), done.stderr


# --- CUDA -------------------------------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")    # asked when the file is read, before any test


@cuda
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=" ".join)
def test_cuda_gives_the_losses_of_the_cpu(flags):
    args, baseline, student, teacher = networks(flags)
    views, boxes, mask = random_views(args, baseline)
    expected = loss_terms(args, baseline, student, teacher, views, boxes, mask)
    student, teacher, baseline = student.to("cuda"), teacher.to("cuda"), baseline._replace(loss=baseline.loss.to("cuda"), teacher_temp=baseline.teacher_temp.to("cuda"))
    views, boxes, mask = [v.to("cuda") for v in views], boxes.to("cuda"), None if mask is None else mask.to("cuda")
    # the card's float32 sums in another order, and its matrix products and convolutions may be TF32: 10 bits of mantissa
    close(loss_terms(args, baseline, student, teacher, views, boxes, mask).cpu(), expected, rtol=1e-2 if args.arch == "resnet50" else 1e-3)


@cuda
@pytest.mark.parametrize("flags", [["--no-compile"], ["--compile"], ["--no-compile", "--precision", "fp16"]])
def test_cuda_trains_and_resumes_bit_for_bit_when_deterministic(flags, folder, tmp_path):
    flags = [*flags, "--deterministic", "--max_steps"]
    try:
        run(folder, tmp_path / "whole", *flags, 8)
        run(folder, tmp_path / "parts", *flags, 3)
        run(folder, tmp_path / "parts", *flags, 8)
    finally:
        torch.use_deterministic_algorithms(False)
    same_run(tmp_path / "whole", tmp_path / "parts")
