"""support/weights.py: which files give which encoder, and which say why not."""

import argparse
import importlib.util
import math
import os
import zipfile

import numpy as np
import pytest
import torch
from helpers import SMALL, close
from torch import nn

import evaluate
import train
from extras.finetune import Classifier
from model import build_encoder
from support.errors import UserError
from support.options import parse_train_args
from support.weights import load_encoder


def released(kind, vit):
    """Return the content of a file as others publish them, around a ViT's state dict."""
    full = {f"module.backbone.{name}": value for name, value in vit.items()}
    full |= {"module.head.mlp.0.weight": torch.zeros(2, 2)}
    hidden, head = torch.zeros(1, 96), {"head.weight": torch.zeros(10, 96)}
    dino = {
        "student": full | {"module.backbone.cls_token": torch.zeros(1, 1, 96)},
        "teacher": {name.removeprefix("module."): value for name, value in full.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "args": argparse.Namespace(arch="vit_small", lr=np.float64(0.5)), "epoch": 100,
    }
    tuned = {f"fc_{name}" if name.startswith("norm.") else name: vit[name] for name in vit}
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
    sere = {"channel_sere.0.weight": torch.zeros(3), "pixel_sere.0.weight": torch.zeros(3)}
    other = {name: value + 1 for name, value in vit.items()}    # an average is not what it follows
    prefixed = {prefix: {prefix + name: value for name, value in vit.items()} for prefix in (
        "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "teacher.vit.")}
    return {
        "ours": vit, "dino": dino, "dino, NumPy 1": dino,
        "ibot": {"student": {}, "teacher": full | {"module.backbone.masked_embed": hidden}},
        "ibot, extracted": {"state_dict": vit | {"masked_embed": hidden}},
        "sere": {"state_dict": vit | sere}, "timm": vit | head,
        "mae": {"model": vit | decoder}, "mae, fine-tuned": {"model": tuned | head},
        "ema": {"ema": vit}, "timm, ema": {"state_dict": other | head, "state_dict_ema": vit},
        "deit, ema": {"model": other, "model_ema": vit, "epoch": 1},
        "compiled": prefixed["_orig_mod."],
        "compiled, ddp": {"model": prefixed["module._orig_mod."]},
        "ddp, compiled": {"state_dict": prefixed["_orig_mod.module."]},
        "compiled block": {name.replace("blocks.1.", "blocks.1._orig_mod."): vit[name]
                           for name in vit},
        "lightning": {"state_dict": prefixed["teacher.vit."]
                      | {f"student.vit.{name}": other[name] for name in vit}},
    }[kind]


def as_by_old_numpy(path):
    """Rewrite a file as NumPy 1 would have: it named the module of its scalars otherwise."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content.replace(b"numpy._core", b"numpy.core"))


@pytest.mark.parametrize("kind", [
    "ours", "dino", "dino, NumPy 1", "ibot", "ibot, extracted", "sere", "timm", "mae",
    "mae, fine-tuned", "ema", "timm, ema", "deit, ema", "compiled", "compiled, ddp",
    "ddp, compiled", "compiled block", "lightning",
])
def test_files_of_every_origin_give_the_features_of_their_encoder(kind, tmp_path):
    vit, images = build_encoder("vit_nano", 32, 8).eval(), torch.randn(2, 3, 32, 32)
    for parameter in vit.parameters():    # norms too: at first all of them are alike
        nn.init.normal_(parameter, std=0.1)
    torch.save(released(kind, vit.state_dict()), tmp_path / "x.pth")
    if kind == "dino, NumPy 1":
        as_by_old_numpy(tmp_path / "x.pth")
    loaded = load_encoder(tmp_path / "x.pth")
    assert torch.equal(loaded.norm(loaded(images)), vit.norm(vit(images)))
    assert (loaded.image_size, loaded.patch_size, loaded.heads) == (32, 8, 3)


def test_a_checkpoint_gives_the_teacher_unless_asked_for_the_student(tmp_path, capsys):
    student, teacher = train.build_networks(parse_train_args([*SMALL, "--data_path", "none"]))
    nn.init.normal_(student.backbone.cls_token)
    state = {"student": student.state_dict(), "teacher": teacher.state_dict(), "step": 3}
    torch.save(state, tmp_path / "x.pth")
    for key, network in ((None, teacher), ("teacher", teacher), ("student", student)):
        loaded = load_encoder(tmp_path / "x.pth", checkpoint_key=key)
        assert torch.equal(loaded.cls_token, network.backbone.cls_token)
        line = capsys.readouterr().out    # which one it is, and what is left out, is said
        assert f"x.pth: {key or 'teacher'}" in line and "head (8)" in line


def test_a_file_with_one_encoder_has_no_teacher_and_student_to_choose_from(tmp_path):
    vit = build_encoder("vit_nano", 32, 8).state_dict()
    for content, given in ((vit, "student"), ({"model": vit}, "teacher"),
                           ({"teacher": vit}, "student"), ({"model_ema": vit}, "student")):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=f"leave out --checkpoint_key {given}"):
            load_encoder(tmp_path / "x.pth", checkpoint_key=given)
    load_encoder(tmp_path / "x.pth", checkpoint_key="teacher")    # for the average it is, by name


class LayerScale(nn.Module):
    def __init__(self, layer, dim):
        super().__init__()
        self.layer, self.gamma = layer, nn.Parameter(torch.empty(dim))

    def forward(self, x):
        return self.gamma * self.layer(x)


def test_layer_scale_is_folded_into_the_layer_before_it(tmp_path):
    """DINOv2's ViT, of patch size 14, loads as a plain one and gives the same tokens."""
    theirs = build_encoder("vit_nano", 518, 14).eval()
    for block in theirs.blocks:
        block.attn, block.mlp = LayerScale(block.attn, 96), LayerScale(block.mlp, 96)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    names = {"attn.layer.": "attn.", "attn.gamma": "ls1.gamma", "mlp.layer.": "mlp.",
             "mlp.gamma": "ls2.gamma"}
    state = {"mask_token": torch.zeros(1, 96)}
    for name, value in theirs.state_dict().items():
        part = next((part for part in names if part in name), "")
        state[name.replace(part, names.get(part, ""))] = value
    torch.save(state, tmp_path / "x.pth")
    ours, images = load_encoder(tmp_path / "x.pth"), torch.randn(2, 3, 56, 70)
    assert (ours.patch_size, ours.image_size) == (14, 518) and len(ours.state_dict()) == 54
    scale = theirs(images).abs().max().item()
    close(ours(images), theirs(images), atol=1e-5 * scale)    # γ(Wx) and (γW)x round differently


def test_heads_are_those_that_our_own_checkpoint_says(tmp_path):
    vit = build_encoder("vit_nano", 32, 8, heads=4)
    for heads, found in ((4, 4), (0, 3)):    # 0: the architecture's
        state = {"teacher": vit.state_dict(), "arguments": {"heads": heads}}
        torch.save(state, tmp_path / "x.pth")
        assert load_encoder(tmp_path / "x.pth").heads == found


@pytest.fixture
def moco(tmp_path):
    """A training checkpoint of MoCo v3: two encoders that differ, and fixed positions."""
    vit = build_encoder("vit_small", 32, 16)
    with torch.no_grad():
        vit.pos_embed[:, 0] = 0    # its position embeddings are sines, and 0 for the class token
    state = vit.state_dict() | {"head.0.weight": torch.zeros(2, 2)}
    networks = {f"module.base_encoder.{name}": value for name, value in state.items()}
    networks |= {f"module.momentum_encoder.{name}": value + 1 for name, value in state.items()}
    networks |= {"module.predictor.0.weight": torch.zeros(2, 2)}
    torch.save({"arch": "vit_small", "state_dict": networks, "optimizer": {}}, tmp_path / "x.pth")
    return tmp_path / "x.pth", vit


def test_moco_v3s_vit_small_has_12_heads(moco):
    """Shapes are those of 6, features are not. MoCo v3 evaluates its base encoder."""
    path, vit = moco
    images, loaded = torch.randn(1, 3, 32, 32), load_encoder(path)
    of_12 = build_encoder("vit_small", 32, 16, heads=12)
    of_12.load_state_dict(vit.state_dict())
    assert torch.equal(loaded(images), of_12(images))
    assert not torch.equal(loaded(images), vit(images))
    momentum = load_encoder(path, checkpoint_key="teacher")
    assert momentum.heads == 12 and torch.equal(momentum.cls_token, vit.cls_token + 1)
    with pytest.raises(UserError, match="leave out --heads"):
        load_encoder(path, heads=6)


def test_what_is_saved_anew_from_moco_v3_needs_heads(moco, tmp_path, capsys):
    path, _ = moco
    exported, tuned = tmp_path / "exported.pth", tmp_path / "tuned.pth"
    evaluate.main(["export", "--pretrained_weights", str(path), "--output", str(exported)])
    assert "12 heads" in capsys.readouterr().out    # all that is left to tell it
    torch.save({"model": Classifier(load_encoder(path), 5).state_dict()}, tuned)
    for file, heads in ((exported, 12), (tuned, 6)):
        with pytest.raises(UserError, match="--heads 12"):
            load_encoder(file)
        assert load_encoder(file, heads=heads).heads == heads    # as the user says


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": Malicious()}, "evil.pth")
    with pytest.raises(UserError, match="not loaded"):
        load_encoder("evil.pth")
    assert not (tmp_path / "was_run").exists()


def crafted(changes):
    """Return the state dict of a vit_nano with other values at some keys; None: without it."""
    changed = build_encoder("vit_nano", 32, 8).state_dict() | changes
    return {name: value for name, value in changed.items() if value is not None}


NAN, INF, EMPTY = torch.full((96,), math.nan), torch.full((96,), -math.inf), torch.zeros(0)


@pytest.mark.parametrize("content, word", [
    # an encoder, but not one of ours
    (crafted({"blocks.1.norm1.bias": None}), "blocks.1.norm1.bias is missing"),
    (crafted({"blocks.0.attn.q_norm.weight": EMPTY}), "q_norm.weight is unknown"),
    (crafted({"reg_token": torch.zeros(1, 4, 96)}), "reg_token"),
    (crafted({"blocks.9.norm1.bias": torch.zeros(96)}), "depth"),
    (crafted({"blocks.0.ls1.gamma": torch.ones(95)}), r"ls1.gamma \(95,\)"),
    # not finite
    (crafted({"norm.weight": NAN, "blocks.0.norm2.bias": INF}), "2 of 54.*norm2.bias"),
    ({"teacher": crafted({"cls_token": NAN.view(1, 1, 96)})}, "NaN"),
    # parts that lack
    (crafted({"norm.weight": None, 1: torch.zeros(1), "args": "text"}), "norm.weight is missing"),
    ({"model": crafted({"pos_embed": None})}, "pos_embed is missing"),
    (crafted({"cls_token": None}), "53 tensors: pos_embed"),
    # wrong shapes
    (crafted({"norm.weight": torch.zeros(95)}), r"norm.weight is \(95,\), not \(96,\)"),
    (crafted({"cls_token": torch.zeros(())}), r"cls_token \(\)"),
    ({"module.base_encoder.cls_token": torch.zeros(())}, "pos_embed, patch"),
    (crafted({"pos_embed": torch.zeros(17, 96)}), r"pos_embed \(17, 96\)"),
    (crafted({"pos_embed": torch.zeros(1, 16, 96)}), "position for the class token"),
    (crafted({"patch_embed.proj.weight": torch.zeros(96, 192)}), r"\(96, 192\)"),
    (crafted({"patch_embed.proj.weight": torch.zeros(96, 3, 0, 0)}), r"\(96, 3, 0, 0\)"),
    (crafted({"patch_embed.proj.weight": torch.zeros(96, 1, 8, 8)}), r"\(96, 1, 8, 8\), not"),
    # other things
    ({"model": crafted({}), "best": crafted({})}, "several encoders, model, best"),
    ({"model": {"embeddings.position": EMPTY}}, "1 tensors: model.embeddings.position"),
    ({"epoch": 3, "args": {}}, "no tensors: epoch, args"), ({}, "it is empty"),
    ([EMPTY], "no state dict but a list"), (EMPTY, "no state dict but a Tensor"),
    (b"text", "damaged"), (b"", "damaged"), (b"PK\3\4 and no more", "damaged"),
    (None, "No such file"),
])
def test_a_file_without_an_encoder_of_ours_says_what_it_holds(content, word, tmp_path):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"^{path}.*{word}") as raised:
        load_encoder(path)
    assert "\n" not in str(raised.value)


def test_another_architecture_is_refused_by_name(tmp_path):
    torch.save(crafted({}), tmp_path / "x.pth")
    different = r"a vit_nano: cls_token is \(1, 1, 96\), not \(1, 1, 192\)"
    with pytest.raises(UserError, match=different):
        load_encoder(tmp_path / "x.pth", arch="vit_tiny")


@pytest.mark.filterwarnings("ignore:.*(torch.jit|TorchScript)")
def test_a_fine_file_is_not_called_damaged(tmp_path):
    """No permission, a whole module, a program: each has a reason of its own."""
    path = tmp_path / "x.pth"
    cases = [(lambda: torch.save(nn.Linear(2, 2), path), "torch.nn.modules.linear.Linear"),
             (lambda: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "TorchScript"),
             (lambda: path.chmod(0), "Permission denied")]
    for change, word in cases[: 2 if os.geteuid() == 0 else 3]:    # root may read everything
        change()
        with pytest.raises(UserError, match=word) as raised:
            load_encoder(path)
        assert "damaged" not in str(raised.value)


def test_safetensors_are_read(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    saved = crafted({})
    for name in ("x.safetensors", "x.bin"):    # known by their content, too
        library.save_file(saved, tmp_path / name)
        loaded = load_encoder(tmp_path / name).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in saved.items())


@pytest.mark.skipif(importlib.util.find_spec("safetensors") is not None,
                    reason="safetensors is installed")
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_ask_for_their_library(name, tmp_path):
    (tmp_path / name).write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="pip install safetensors"):
        load_encoder(tmp_path / name)
