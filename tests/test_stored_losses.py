"""Losses and gradients of every recipe, against stored ones.

Those are from before the losses were written as in the paper. Parameters, views and boxes are
pseudo-random numbers that no generator of PyTorch draws, so they survive any change of the
order in which weights are initialized.
"""

import json
from pathlib import Path

import pytest
import torch

import train
from support.options import parse_train_args

STORED = json.loads((Path(__file__).parent / "stored_losses.json").read_text())

SMALL = """--data_path none --arch vit_nano --patch_size 8 --global_crops_size 32
--local_crops_size 16 --local_crops_number 2 --out_dim 32 --overlap_global 4 --overlap_local 2
--batch_size_per_gpu 4 --epochs 3 --warmup_epochs 1 --warmup_teacher_temp_epochs 1
--drop_path_rate 0 --li_weight 1 --relation_heads 6 --hidden_dim 64
--temperature_spatial 0.5""".split()

VARIANTS = {
    "dino": "",
    "ibot": "--recipe ibot",
    "ibot-b": "--recipe ibot-b",
    "mocov3": "--recipe mocov3 --local_crops_number 0",
    "resnet50": "--recipe resnet50 --arch resnet50 --patch_size 32 --global_crops_size 96"
    " --local_crops_size 64 --overlap_global 3 --local_crops_number 1 --batch_size_per_gpu 2"
    " --relation_heads 8",
    "demo": "--recipe demo --li_weight 0.1",
    "ibot, own head": "--recipe ibot --no-shared_head --patch_out_dim 24",
    "mocov3, local views": "--recipe mocov3",
    "dino+": "--baseline dino+ --patch_out_dim 24",
    "batch relations": "--channel_relation batch",
    "symmetric": "--symmetric",
    "student sharpened": "--sharpen student",
    "no L_I": "--li_weight 0",
    "no L_p": "--alpha 0",
    "no L_c": "--beta 0",
}


def noise(shape, seed):
    """Pseudo-random numbers in [-1, 1], the same on every machine."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    x = torch.sin(i * 12.9898 + seed * 78.233) * 43758.5453
    return (2 * (x - x.floor()) - 1).float().view(shape)


def keyed(network):
    """(key, name, parameter) of each; a key is the shape and how many of that shape there were."""
    count = {}
    for name, parameter in network.named_parameters():
        shape = "x".join(map(str, parameter.shape))
        count[shape] = count.get(shape, 0) + 1
        yield f"{shape}#{count[shape]}", name, parameter


@torch.no_grad()
def fill(network, seed):
    for key, name, parameter in keyed(network):
        values = noise(parameter.shape, seed + sum(map(ord, key)))
        if parameter.ndim == 1:
            parameter.copy_(name.endswith("weight") + 0.3 * values)
        elif parameter.ndim > 2 or parameter.shape[1] > 1:
            parameter.copy_(values * (3 / parameter[0].numel()) ** 0.5)
        elif parameter.requires_grad:    # lengths of the last layer's rows, where they are learned
            parameter.copy_(1 + 0.3 * values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_the_stored_ones(variant, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = parse_train_args(SMALL + VARIANTS[variant].split())
    student, teacher = train.build_networks(args)
    embedding_loss = train.build_embedding_loss(args)
    relation_loss = train.build_relation_loss(args)
    fill(student, 0)
    fill(teacher, 0.37)
    B, L = args.batch_size_per_gpu, args.local_crops_number
    sizes = [(2, args.global_crops_size), (L, args.local_crops_size)]
    views = [noise((number, B, 3, size, size), 5 + size) for number, size in sizes if number]
    corner, side = 0.25 + 0.25 * noise((2 + L, B, 2), 1), 0.35 + 0.15 * noise((2 + L, B, 2), 2)
    boxes = torch.cat([corner, corner + side, (noise((2 + L, B, 1), 3) > 0).float()], dim=-1)
    mask = noise((2, B, (args.global_crops_size // args.patch_size) ** 2), 4) > 0.6
    mask[0, 0] = False

    for _ in range(2):    # the second with a center that is not 0
        with torch.no_grad():
            t = teacher(views[:1], mask)
        s = student(views, mask)
        temp = train.teacher_temperatures(args)[0]
        L_I = embedding_loss(s.embedding, t.embedding, temp, boxes)
        L_p, L_c = relation_loss(t.p, t.c, s.p, s.c, boxes)
        loss = args.li_weight * L_I + args.alpha * L_p + args.beta * L_c
        embedding_loss.update_center()
    loss.backward()

    stored = STORED[variant]
    # float32 rounding of sums in another order, through a network and a peaked softmax
    terms = [x.item() for x in (loss, L_I, L_p, L_c)]
    torch.testing.assert_close(terms, stored["terms"], rtol=1e-5, atol=1e-6)
    gradients = {key: p.grad for key, _, p in keyed(student) if p.grad is not None}
    assert gradients.keys() == stored["gradients"].keys()
    largest = max(norm for norm, _ in stored["gradients"].values())
    for key, name, _ in keyed(student):
        if variant == "resnet50" and name.startswith("backbone"):
            continue    # 50 batch norms of a few images: rounding grows to 20 % in its first layers
        if key in gradients:
            gradient = gradients[key]
            norm, product = stored["gradients"][key]
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5 * largest), key
            seen = (gradient * noise(gradient.shape, 9)).sum().item()    # of terms that may cancel
            assert seen == pytest.approx(product, abs=1e-3 * norm + 1e-5 * largest), key
