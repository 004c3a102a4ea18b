"""support/weights.py: which files give which encoder, and evaluate.py export."""

import argparse
import os
import zipfile

import numpy as np
import pytest
import torch
from helpers import SMALL, close
from torch import nn
from torchvision.models import resnet50

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
    return {
        "ours": vit, "dino": dino, "dino, NumPy 1": dino,
        "ibot": {"student": {}, "teacher": full | {"module.backbone.masked_embed": hidden}},
        "ibot, extracted": {"state_dict": vit | {"masked_embed": hidden}},
        "sere": {"state_dict": vit | sere}, "timm": vit | head,
        "mae": {"model": vit | decoder}, "mae, fine-tuned": {"model": tuned | head},
    }[kind]


def as_by_old_numpy(path):
    """Rewrite a file as NumPy 1 would have: it named the module of its scalars otherwise."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content.replace(b"numpy._core", b"numpy.core"))


@pytest.mark.parametrize("kind", ["ours", "dino", "dino, NumPy 1", "ibot", "ibot, extracted",
                                  "sere", "timm", "mae", "mae, fine-tuned"])
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
    assert "head (8)" in capsys.readouterr().out    # what is left out is said


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


@pytest.mark.parametrize("change, options, word", [
    ({}, {"arch": "vit_tiny"}, r"a vit_nano: cls_token is \(1, 1, 96\), not \(1, 1, 192\)"),
    ({"blocks.1.norm1.bias": None}, {}, "blocks.1.norm1.bias is missing"),
    ({"blocks.0.ls1.gamma": torch.ones(96)}, {}, "blocks.0.ls1.gamma is unknown"),
    ({"reg_token": torch.zeros(1, 4, 96)}, {}, "reg_token"),
    ({"blocks.9.norm1.bias": torch.zeros(96)}, {}, "depth"), ({}, {"heads": 5}, "5 heads"),
    ({"norm.weight": None, 1: torch.zeros(1), "args": "text"}, {}, "no ViT or ResNet"),
    ([torch.zeros(1)], {}, "no state dict"), ("text", {}, "damaged"), ("", {}, "damaged"),
    (None, {}, "No such file"),
])
def test_what_is_no_encoder_of_ours_says_why(change, options, word, tmp_path):
    path = tmp_path / "x.pth"
    if isinstance(change, str):
        path.write_text(change)
    elif change is not None:
        if isinstance(change, dict):
            changed = build_encoder("vit_nano", 32, 8).state_dict() | change
            change = {name: value for name, value in changed.items() if value is not None}
        torch.save(change, path)
    with pytest.raises(UserError, match=f"x.pth.*{word}|{word}.*x.pth"):
        load_encoder(path, **options)


@pytest.mark.parametrize("size", [32, 48])
def test_export_is_a_plain_state_dict_that_loads_strictly(size, tmp_path):
    vit = build_encoder("vit_nano", 32, 8).eval()
    teacher = {f"module.backbone.{name}": value for name, value in vit.state_dict().items()}
    torch.save({"teacher": teacher}, tmp_path / "x.pth")
    evaluate.main(["export", "--pretrained_weights", str(tmp_path / "x.pth"),
                   "--output", str(tmp_path / "y.pth"), "--image_size", str(size)])
    plain = torch.load(tmp_path / "y.pth", weights_only=True)
    assert all(type(value) is torch.Tensor for value in plain.values())
    other, images = build_encoder("vit_nano", size, 8).eval(), torch.randn(1, 3, size, size)
    other.load_state_dict(plain)
    close(other(images), vit(images))


def test_a_resnet50_comes_from_torchvision_and_goes_back(tmp_path):
    theirs = resnet50()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    evaluate.main(["export", "--pretrained_weights", str(tmp_path / "x.pth"),
                   "--output", str(tmp_path / "y.pth")])
    loaded = load_encoder(tmp_path / "y.pth").state_dict()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in loaded.items())
    exported = torch.load(tmp_path / "y.pth", weights_only=True)
    assert theirs.load_state_dict(exported, strict=False) == (["fc.weight", "fc.bias"], [])
