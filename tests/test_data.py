"""data.py: folders, files and torchvision's data sets. (Batches of them are in test_sere.py.)"""

import io

import numpy as np
import pytest
import torch
from helpers import image_folder
from PIL import Image

from data import NoSplit, Readable, ViewsOfImages, build_dataset, labeled
from support import named_sets
from support.errors import UserError
from support.files import decode


def broken_images(folder):
    """Write a text and half a JPEG, first in the folder."""
    (folder / "!0.jpg").write_text("not an image")
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    (folder / "!1.jpg").write_bytes(buffer.getvalue()[: buffer.tell() // 2])


def image_at(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def test_folders_give_labels_from_train_whatever_else_is_in_them(tmp_path):
    image_folder(tmp_path, train=3, val=2)
    image_at(tmp_path / "train/class1/deep/er/x.JPEG")
    image_at(tmp_path / "train/loose.png")
    (tmp_path / "train/class2").mkdir()    # of which val/ has an image
    image_at(tmp_path / "val/class2/x.png")
    (tmp_path / "train/class0/notes.txt").write_text("not an image")
    train, val = build_dataset(tmp_path, "train"), build_dataset(str(tmp_path), "val")
    assert train.classes == val.classes == 3 and len(train) == 8
    assert sorted(train.labels.tolist()) == [-1, 0, 0, 0, 1, 1, 1, 1]
    assert train.labels[labeled(train)].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert val.labels.tolist() == [0, 0, 1, 1, 2]
    for images in (train, val):
        for i in range(len(images)):
            image, label = images[i]
            assert torch.equal(image, decode(images.path(i))) and label == images.labels[i]
            name = images.path(i).split(str(tmp_path))[1].split("/")[2]
            assert name == (f"class{label}" if label >= 0 else "loose.png")


def test_a_folder_without_train_is_one_set_without_labels(tmp_path):
    image_folder(tmp_path / "deep/er", train=3, val=2)
    images = build_dataset(tmp_path, "train")
    assert images.classes == 0 and images.labels.tolist() == [-1] * 10 and images[9][1] == -1


def test_links_are_followed_and_loops_are_not(tmp_path):
    elsewhere = image_folder(tmp_path / "elsewhere", train=3, val=2)
    images = tmp_path / "images"
    (images / "train").mkdir(parents=True)
    for name in ("class0", "class1"):
        (images / "train" / name).symlink_to(elsewhere / "train" / name)
    (elsewhere / "train/class0/loop").symlink_to(images / "train")
    assert build_dataset(images, "train").labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("mode, ending", [
    ("RGB", "bmp"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png"),
    ("CMYK", "tif"), ("RGB", "webp"),
])
def test_images_of_every_mode_become_rgb(mode, ending, tmp_path):
    picture = Image.new("RGB", (6, 4), "white")
    picture.paste("black", (0, 0, 3, 4))    # the left half
    picture.convert(mode).save(tmp_path / f"x.{ending}", lossless=True)
    image = decode(tmp_path / f"x.{ending}")
    assert image.dtype == torch.uint8 and image.shape == (3, 4, 6)
    assert (image[..., :3] < 5).all() and (image[..., 3:] > 250).all()    # CMYK rounds


@pytest.mark.parametrize("path, split, error, words", [
    ("nowhere", "train", UserError, "nowhere is neither"),
    ("text", "train", UserError, "text is neither"),
    ("empty", "train", UserError, "no images .*empty"),
    ("empty", "val", NoSplit, "train/ and val/"),
    ("no_val", "val", NoSplit, "train/ and val/"),
    ("hollow", "train", UserError, "no images .*hollow/train"),
    ("stranger", "val", UserError, "class9"),
])
def test_unusable_folders_are_refused(path, split, error, words, tmp_path):
    (tmp_path / "text").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow/train/class0").mkdir(parents=True)
    image_at(tmp_path / "no_val/train/class0/x.png")
    image_at(tmp_path / "stranger/train/class0/x.png")
    image_at(tmp_path / "stranger/val/class9/x.png")
    with pytest.raises(error, match=words):
        build_dataset(tmp_path / path, split)


def test_unreadable_images_are_named_and_the_next_stands_in(tmp_path):
    image_folder(tmp_path, train=3, val=1)
    broken_images(tmp_path / "train/class0")
    images = build_dataset(tmp_path, "train")
    views = ViewsOfImages(images, lambda image, key: (image, key), seed=7)
    for i in (0, 1):
        with pytest.raises(UserError, match=f"!{i}.jpg"):
            images[i]
        (image, key), complaints = views[3, i]
        assert torch.equal(image, images[2][0]) and key == (7, 3, i)
        assert [f"!{j}.jpg" in line for j, line in enumerate(complaints.splitlines(), start=i)] == [
            True] * (2 - i)
    assert views[3, 2][1] == ""
    last = len(images) - 1    # after the last image comes the first
    (tmp_path / "train/class1/2.png").write_text("not an image")
    assert torch.equal(Readable(images)[last][0], images[2][0])
    assert Readable(images)[last][1] == 0    # with its own label


def test_images_of_which_none_can_be_read_are_an_error(tmp_path):
    broken_images(tmp_path)
    with pytest.raises(UserError, match="!1.jpg"):
        Readable(build_dataset(tmp_path, "train"))[0]


@pytest.mark.parametrize("name, kind, train_split, val_split", [
    ("cifar10", "CIFAR10", True, False), ("cifar100", "CIFAR100", True, False),
    ("stl10", "STL10", "train+unlabeled", "test"),
])
def test_torchvisions_sets_go_by_name(name, kind, train_split, val_split, monkeypatch):
    asked = []

    class StandIn:
        targets, labels = [0, 2, -1], np.array([0, 2, -1])    # CIFAR's, STL-10's

        def __init__(self, root, split, download):
            asked.append((root, split, download))
            if len(asked) > 2:
                raise RuntimeError("no route to host")

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return Image.new("RGB", (32, 32), (10 * i, 0, 0)), self.targets[i]

    monkeypatch.setattr(named_sets.datasets, kind, StandIn)
    images, _ = build_dataset(name, "train"), build_dataset(name, "val")
    assert asked == [("data", train_split, True), ("data", val_split, True)]
    assert len(images) == 3 and images.classes == 3 and images.labels.tolist() == [0, 2, -1]
    image, label = images[1]
    assert image.shape == (3, 32, 32) and image[0, 0, 0] == 10 and label == 2
    with pytest.raises(UserError, match=f"{name} .*no route to host"):
        build_dataset(name, "train")
