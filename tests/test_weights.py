"""support/weights.py: which files give which encoder, and evaluate.py export."""

import argparse
import os
import zipfile

import numpy as np
import pytest
import torch
from helpers import SMALL, close, one_line
from torch import nn
from torchvision.models import resnet50

import evaluate
import train
from extras.finetune import Classifier
from model import build_encoder
from support.errors import UserError
from support.options import parse_train_args
from support.weights import load_encoder


def old_numpy(path):
    """Rewrite a file as NumPy 1 would have: it named the module of its scalars otherwise."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content.replace(b"numpy._core", b"numpy.core"))


def released(kind, vit):
    """Return the content of a file as others publish them, around a ViT's state dict."""
    head = {"head.mlp.0.weight": torch.zeros(2, 2)}
    full = {f"module.backbone.{name}": value for name, value in vit.items()}
    full |= {f"module.{name}": value for name, value in head.items()}
    hidden = torch.zeros(1, 96)
    dino = {
        "student": full | {"module.backbone.cls_token": torch.zeros(1, 1, 96)},
        "teacher": {name.removeprefix("module."): value for name, value in full.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "args": argparse.Namespace(arch="vit_small", lr=np.float64(0.5)), "epoch": 100,
    }
    normed = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
              for name, value in vit.items()}
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.zeros(8)}
    sere = {"channel_sere.0.weight": torch.zeros(3), "pixel_sere.0.weight": torch.zeros(3)}
    return {
        "ours": vit, "dino": dino, "dino, NumPy 1": dino,
        "ibot": {"student": {}, "teacher": full | {"module.backbone.masked_embed": hidden}},
        "ibot, extracted": {"state_dict": vit | {"masked_embed": hidden}},
        "sere": {"state_dict": vit | sere},
        "timm": vit | {"head.weight": torch.zeros(10, 96), "head.bias": torch.zeros(10)},
        "mae": {"model": vit | decoder},
        "mae, fine-tuned": {"model": normed | {"head.weight": torch.zeros(10, 96)}},
    }[kind]


@pytest.mark.parametrize("kind", ["ours", "dino", "dino, NumPy 1", "ibot", "ibot, extracted",
                                  "sere", "timm", "mae", "mae, fine-tuned"])
def test_files_of_every_origin_give_the_features_of_their_encoder(kind, tmp_path):
    vit, images = build_encoder("vit_nano", 32, 8).eval(), torch.randn(2, 3, 32, 32)
    for parameter in vit.parameters():    # norms too: at first all of them are alike
        nn.init.normal_(parameter, std=0.1)
    torch.save(released(kind, vit.state_dict()), tmp_path / "x.pth")
    if kind == "dino, NumPy 1":
        old_numpy(tmp_path / "x.pth")
    loaded = load_encoder(tmp_path / "x.pth")
    assert torch.equal(loaded.norm(loaded(images)), vit.norm(vit(images)))
    assert (loaded.image_size, loaded.patch_size, loaded.heads) == (32, 8, 3)


def test_a_checkpoint_gives_the_teacher_unless_asked_for_the_student(tmp_path, capsys):
    student, teacher = train.build_networks(parse_train_args([*SMALL, "--data_path", "none"]))
    nn.init.normal_(student.backbone.cls_token)
    state = {"student": student.state_dict(), "teacher": teacher.state_dict(), "step": 3}
    torch.save(state, tmp_path / "checkpoint.pth")
    for key, network in ((None, teacher), ("teacher", teacher), ("student", student)):
        loaded = load_encoder(tmp_path / "checkpoint.pth", checkpoint_key=key)
        assert torch.equal(loaded.cls_token, network.backbone.cls_token)
    assert "head (8)" in capsys.readouterr().out    # what is left out is said


def test_positions_are_interpolated_to_the_size_asked_for(tmp_path):
    vit, images = build_encoder("vit_nano", 32, 8).eval(), torch.randn(1, 3, 48, 48)
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    loaded = load_encoder(tmp_path / "x.pth", image_size=48)
    assert loaded.pos_embed.shape == (1, 1 + 6 * 6, 96)
    close(loaded(images), vit(images))


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
    with pytest.raises(UserError, match="leave out --heads"):
        load_encoder(path, heads=6)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": Malicious()}, "evil.pth")
    with pytest.raises(UserError, match="not loaded"):
        load_encoder("evil.pth")
    assert not (tmp_path / "was_run").exists()


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


# What is in a file, made from the state dict of a ViT-nano, the options it is loaded with, a word.
REFUSED = {
    "another architecture": (lambda vit: vit, {"arch": "vit_tiny"},
                             r"is a vit_nano: cls_token is \(1, 1, 96\), not \(1, 1, 192\)"),
    "a missing key": (lambda vit: without(vit, "blocks.1.mlp.fc2.bias"), {},
                      "blocks.1.mlp.fc2.bias is missing"),
    "layer scale": (lambda vit: vit | {"blocks.0.ls1.gamma": torch.ones(96)}, {},
                    "blocks.0.ls1.gamma is unknown"),
    "registers": (lambda vit: vit | {"reg_token": torch.zeros(1, 4, 96)}, {}, "reg_token"),
    "another depth": (lambda vit: vit | {"blocks.9.norm1.bias": torch.zeros(96)}, {},
                      "depth"),
    "heads that do not divide": (lambda vit: vit, {"heads": 5}, "5 heads"),
    "part of a ResNet": (lambda vit: {"layer1.0.conv1.weight": torch.zeros(3)}, {},
                         "no ViT or ResNet.*layer1.0.conv1"),
    "odd keys": (lambda vit: {1: torch.zeros(1), "args": "text"}, {}, "no ViT"),
    "no dict": (lambda vit: [torch.zeros(1)], {}, "no state dict"),
    "text": (lambda vit: "hello", {}, "damaged"),
    "nothing": (lambda vit: "", {}, "damaged"),
    "no file": (lambda vit: None, {}, "No such file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_encoder_of_ours_says_why(kind, tmp_path):
    make, options, word = REFUSED[kind]
    content, path = make(dict(build_encoder("vit_nano", 32, 8).state_dict())), tmp_path / "x.pth"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"x.pth.*{word}|{word}.*x.pth"):
        load_encoder(path, **options)


@pytest.mark.parametrize("size", [32, 48])
def test_export_is_a_plain_state_dict_that_loads_strictly(size, tmp_path):
    vit = build_encoder("vit_nano", 32, 8).eval()
    teacher = {f"module.backbone.{name}": value for name, value in vit.state_dict().items()}
    torch.save({"teacher": teacher}, tmp_path / "checkpoint.pth")
    evaluate.main(["export", "--pretrained_weights", str(tmp_path / "checkpoint.pth"),
                   "--output", str(tmp_path / "x.pth"), "--image_size", str(size)])
    plain = torch.load(tmp_path / "x.pth", weights_only=True)
    assert all(type(value) is torch.Tensor for value in plain.values())
    other, images = build_encoder("vit_nano", size, 8).eval(), torch.randn(1, 3, size, size)
    other.load_state_dict(plain)
    close(other(images), vit(images))


def test_export_into_a_missing_folder_is_one_line(tmp_path, capsys):
    torch.save(build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "x.pth")
    command = ["export", "--pretrained_weights", str(tmp_path / "x.pth"),
               "--output", str(tmp_path / "missing/y.pth")]
    assert "missing" in one_line(capsys, evaluate.main, command, program="evaluate.py")


def test_a_resnet50_comes_from_torchvision_and_goes_back(tmp_path):
    theirs = resnet50()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    evaluate.main(["export", "--pretrained_weights", str(tmp_path / "x.pth"),
                   "--output", str(tmp_path / "y.pth")])
    loaded = load_encoder(tmp_path / "y.pth").state_dict()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in loaded.items())
    exported = torch.load(tmp_path / "y.pth", weights_only=True)
    assert theirs.load_state_dict(exported, strict=False) == (["fc.weight", "fc.bias"], [])
