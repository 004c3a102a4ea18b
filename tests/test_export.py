"""evaluate.py export and features: files for use elsewhere."""

import pytest
import torch
from helpers import SMALL, close, image_folder
from torchvision.models import resnet50

import evaluate
import train
from data import build_dataset
from model import build_encoder
from support.options import parse_train_args
from support.weights import load_encoder


def export(*flags):
    evaluate.main(["export", *map(str, flags)])


@pytest.mark.parametrize("size", [32, 48])
def test_export_is_a_plain_state_dict_that_loads_strictly(size, tmp_path):
    vit = build_encoder("vit_nano", 32, 8).eval()
    teacher = {f"module.backbone.{name}": value for name, value in vit.state_dict().items()}
    torch.save({"teacher": teacher}, tmp_path / "x.pth")
    export("--pretrained_weights", tmp_path / "x.pth", "--output", tmp_path / "y.pth",
           "--image_size", size)
    plain = torch.load(tmp_path / "y.pth", weights_only=True)
    assert all(type(value) is torch.Tensor for value in plain.values())
    other, images = build_encoder("vit_nano", size, 8).eval(), torch.randn(1, 3, size, size)
    other.load_state_dict(plain)
    close(other(images), vit(images))


def test_a_resnet50_comes_from_torchvision_and_goes_back(tmp_path):
    theirs = resnet50()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    export("--pretrained_weights", tmp_path / "x.pth", "--output", tmp_path / "y.pth")
    loaded = load_encoder(tmp_path / "y.pth").state_dict()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in loaded.items())
    exported = torch.load(tmp_path / "y.pth", weights_only=True)
    assert theirs.load_state_dict(exported, strict=False) == (["fc.weight", "fc.bias"], [])


def test_an_untrained_encoder_is_the_one_that_training_starts_from(tmp_path):
    """Table 8's first row: a function of the seed."""
    for seed in (0, 3):
        export("--untrained", seed, "--arch", "vit_nano", "--patch_size", 8, "--image_size", 32,
               "--output", tmp_path / f"{seed}.pth")
    torch.manual_seed(3)
    student, _ = train.build_networks(parse_train_args([*SMALL, "--data_path", "none"]))
    first, drawn = (load_encoder(tmp_path / f"{seed}.pth").state_dict() for seed in (0, 3))
    assert not torch.equal(first["cls_token"], drawn["cls_token"])
    assert all(torch.equal(drawn[name], value) for name, value
               in student.backbone.state_dict().items())


@pytest.mark.parametrize("arch, size, patch_size, heads", [
    ("vit_nano", 48, 8, 4), ("vit_tiny", 224, 16, 3), ("resnet50", 224, 32, 0)])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_printed_line_loads_the_file_in_timm(
    arch, size, patch_size, heads, ending, tmp_path, capsys
):
    """A strict load, whatever the shape; timm has no vit_nano, but builds it."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / f"x.{ending}"
    given = ["--heads", heads, "--patch_size", patch_size] if heads else []
    export("--untrained", "--arch", arch, "--image_size", size, *given, "--output", path)
    theirs = eval(capsys.readouterr().out.splitlines()[-1], {"timm": timm}).eval()
    ours, images = load_encoder(path, heads=heads), torch.randn(2, 3, size, size)
    scale = theirs(images).abs().max().item()
    close(ours.norm(ours(images))[:, 0], theirs(images), atol=1e-5 * scale)    # fused otherwise


@pytest.mark.parametrize("labeled", [True, False])
def test_features_are_the_class_tokens_of_every_image_by_name(labeled, tmp_path, capsys):
    folder = image_folder(tmp_path / "images", train=2, val=1)
    (folder / "train/class0/broken.png").write_text("no image")    # left out
    folder = folder if labeled else folder / "train"    # has no train/ below it, so no labels
    torch.save(build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "x.pth")
    evaluate.main(["features", "--pretrained_weights", str(tmp_path / "x.pth"), "--data_path",
                   str(folder), "--output", str(tmp_path / "y.pt"), "--num_workers", "0"])
    content = torch.load(tmp_path / "y.pt", weights_only=True)
    images, encoder = build_dataset(folder, "train"), load_encoder(tmp_path / "x.pth")
    indices = [i for i in range(len(images)) if "broken" not in images.path(i)]
    features, _ = evaluate.extract_features(encoder, images, indices, 32, torch.device("cpu"))
    close(content["features"], features)    # batches of four and five
    assert content["labels"].tolist() == ([0, 0, 1, 1] if labeled else [-1] * 4)
    for i, name in zip(indices, content["names"], strict=True):
        assert (folder / name).samefile(images.path(i))
    assert "broken.png" in capsys.readouterr().err


@pytest.mark.parametrize("flags, word", [
    ("--untrained", "--arch"), ("--untrained --pretrained_weights x", "not allowed"),
    ("--pretrained_weights x --patch_size 8", "--patch_size"),
    ("--untrained 0 --arch resnet50 --patch_size 8", "a ResNet"),
    ("--untrained --arch vit_nano --heads 5", "5 heads"),
    ("--untrained --arch vit_nano --image_size 50", "patch size 16"),
])
def test_untrained_takes_the_place_of_weights(flags, word, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(*flags.split(), "--output", tmp_path / "x.pth")
    line, = capsys.readouterr().err.splitlines()
    assert word in line and not (tmp_path / "x.pth").exists()
