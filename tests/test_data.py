"""data.py: folders, files and torchvision's data sets. (Batches of them are in test_sere.py.)"""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import image_folder
from PIL import ExifTags, Image

from data import NoSplit, Readable, ViewsOfImages, build_dataset, labeled
from support import named_sets
from support.errors import UserError
from support.files import EXTENSIONS, decode, list_images

ROOT = Path(__file__).parent.parent


def broken_images(folder):
    """Write a text and half a JPEG, first in the folder."""
    (folder / "!0.jpg").write_text("not an image")
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    (folder / "!1.jpg").write_bytes(buffer.getvalue()[: buffer.tell() // 2])


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)    # every gray of 8 bits


def lay_out(root, tree):
    """Make what a line of words names: image, folder/, file.txt, pipe.jpg|, link->target."""
    for word in tree.split():
        path = root / word.rstrip("/|").split("->")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if "->" in word:
            path.symlink_to(os.path.relpath(root / word.split("->")[1], path.parent))
        elif word.endswith("/"):
            path.mkdir(parents=True)
        elif word.endswith("|"):
            os.mkfifo(path)
        elif path.suffix in EXTENSIONS:
            Image.fromarray(LEVELS).convert("RGB").save(path)
        else:
            path.write_text("a\nb\n")
    return root


AB = "train/a/x.png train/b/x.png "
TWO_LEVELS = "train/g/a/x.png train/h/b/y.png train/h/a/z.png "


@pytest.mark.parametrize("tree, split, options, expected", [
    (AB + "train/x.png train/a/deep/er/y.JPEG train/a/x.txt val/b/z.png", "train", {},
     "x.png:-1 a/x.png:0 a/deep/er/y.JPEG:0 b/x.png:1"),
    (AB + "train/x.png val/b/z.png val/w.png", "val", {}, "w.png:-1 b/z.png:1"),
    ("deep/x.png er/y/z.png", "train", {}, "deep/x.png:-1 er/y/z.png:-1"),
    (AB + "train/a/._x.png train/.cache/x.png train/b/.ipynb_checkpoints/y.png .x.png", "train", {},
     "a/x.png:0 b/x.png:1"),
    ("x.png ._x.png .cache/y.png", "train", {}, "x.png:-1"),
    (AB + "train/a/pipe.jpg|", "train", {}, "a/x.png:0 b/x.png:1"),
    (AB + "train/a/up->train train/loop->train", "train", {}, "a/x.png:0 b/x.png:1"),
    (AB + "other/y.png train/c->other train/a/d->other", "train", {},
     "a/x.png:0 a/d/y.png:0 b/x.png:1 c/y.png:2"),
    (AB + "train/a/gone.png->nowhere", "train", {}, "a/gone.png:0 a/x.png:0 b/x.png:1"),
    (AB + "train/c/x.gif", "train", {}, "a/x.png:0 b/x.png:1 c/x.gif:2"),
    (TWO_LEVELS, "train", {"label_depth": 1}, "g/a/x.png:0 h/a/z.png:1 h/b/y.png:1"),
    (TWO_LEVELS, "train", {"label_depth": 2}, "g/a/x.png:0 h/a/z.png:0 h/b/y.png:1"),
    (TWO_LEVELS + "val/g/b/x.png", "val", {"label_depth": 2}, "g/b/x.png:1"),
    (AB + "train/c/z.png train/d/ ab.txt", "train", {"classes": "ab.txt"}, "a/x.png:0 b/x.png:1"),
    (AB + "train/c/z.png val/b/z.png val/c/z.png ab.txt", "val", {"classes": "ab.txt"},
     "b/z.png:1"),
    (AB + "train-semi/a/y.png validation/b/y.png", "train", {}, "a/x.png:0 b/x.png:1"),
    (AB + "train-semi/a/y.png validation/b/y.png", "val", {}, "b/y.png:1"),
    (AB + "validation/b/y.png val/b/z.png", "val", {}, "b/z.png:1"),
    ("train/all/x.png val/all/y.png", "train", {}, "all/x.png:-1"),    # one class tells nothing
    ("train/x.png test/y.txt", "train", {}, "x.png:-1"),
])
def test_folders_become_images_with_labels(tree, split, options, expected, tmp_path):
    lay_out(tmp_path / "data", tree)
    options = {name: tmp_path / "data" / value if name == "classes" else value
               for name, value in options.items()}
    images = build_dataset(tmp_path / "data", split, **options)
    root = Path(images.root)
    found = {os.path.relpath(images.path(i), root): images.labels[i] for i in range(len(images))}
    words = [word.split(":") for word in expected.split()]
    assert found == {name: int(label) for name, label in words}
    assert list(found) == [name for name, _ in words]
    assert bool(len(labeled(images))) == (images.unlabeled == "") == (images.classes > 0)
    image, label = images[len(images) - 1]
    assert label == images.labels[-1] and torch.equal(image, decode(images.path(len(images) - 1)))
    moved = tmp_path / "elsewhere"    # the same images in another place
    shutil.copytree(tmp_path / "data", moved, symlinks=True, ignore=lambda *_: ["pipe.jpg"])
    assert build_dataset(moved, split, **options).identity == images.identity
    Image.fromarray(LEVELS).save(next(moved.glob("**/x.png")).with_name("new.png"))
    assert split == "val" or build_dataset(moved, split, **options).identity != images.identity


@pytest.mark.parametrize("tree, split, options, words", [
    ("other/", "train", {}, "neither"),
    ("data/x.txt data/y/z.txt", "train", {}, "no images .*data"),
    ("data/x.png", "val", {}, "train/ and val/"),
    ("data/train/a/x.png data/train/b/x.png", "val", {}, "train/ and val/"),
    ("data/train/a/ data/train/b/x.png", "train", {}, "no images .* a of .*data/train"),
    ("data/train/a/x.heic data/train/b/x.png", "train", {}, "no images .* a of .*[.]heic"),
    ("data/train/a/._x.png data/train/b/x.png", "train", {}, " a of .*"),
    ("data/train/a/x.png data/train/b/x.png data/val/a/", "val", {}, " a of .*data/val"),
    ("data/train/a/x.png data/train/b/x.png data/val/c/y.png", "val", {}, "val/c "),
    ("data/Train/a/x.png data/Val/a/x.png", "train", {}, "Train/ to train/, Val/ to val/"),
    ("data/train/a/x.png data/train/b/x.png data/VAL/a/x.png", "val", {}, "VAL/ to val/"),
    ("data/val/a/x.png data/x.png", "train", {}, "val/ but no train/"),
    ("data/validation/a/x.png data/train-semi/a/x.png", "train", {}, "validation/ but no train/"),
    ("data/train/x.png data/bus/x.png data/car/x.png", "train", {}, "beside bus/"),
    ("data/train/images/x.png data/train/masks/x.png", "train", {}, "segmentation"),
    ("data/train/g/a/x.png data/train/h/b/y.png", "train", {}, "g/a .--label_depth 2"),
    ("data/train/g/a/x.png data/train/g/b/y.png", "train", {}, "g/a .--label_depth 2"),
    ("data/train/g/x.png data/train/h/y.png", "train", {"label_depth": 2}, "no folders"),
    ("data/train/a/x.png data/train/c/x.png data/ab.txt", "train", {"classes": "ab.txt"},
     "no class folder b"),
    ("data/train/a/x.png data/train/b/x.png", "train", {"classes": "ab.txt"}, "ab.txt can't be"),
    ("data/x.png data/ab.txt", "train", {"classes": "ab.txt"}, "--classes"),
])
def test_folders_that_cant_be_meant_are_refused(tree, split, options, words, tmp_path):
    lay_out(tmp_path, tree)
    options = {name: tmp_path / "data" / value if name == "classes" else value
               for name, value in options.items()}
    error = NoSplit if words == "train/ and val/" else UserError
    with pytest.raises(error, match=words):
        build_dataset(tmp_path / "data", split, **options)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    lay_out(tmp_path, AB + "train/locked/")
    (tmp_path / "train/locked").chmod(0)
    with pytest.raises(UserError, match="train/locked can't be read"):
        build_dataset(tmp_path, "train")
    (tmp_path / "train/locked").chmod(0o700)


def test_listed_files_and_folders_leave_out_hidden_ones(tmp_path):
    lay_out(tmp_path, "a/x.png a/._x.png a/.b/y.png c.png ._c.png")
    names = list_images([str(tmp_path / name) for name in ("._c.png", "c.png", "a")])
    assert [Path(name).name for name in names] == ["c.png", "x.png"]


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, convert", [
    ("8.png", lambda levels: levels),
    ("16.png", lambda levels: levels.astype(np.uint16) * 257),
    ("16.tif", lambda levels: levels.astype(np.uint16) * 257),
    ("16.pgm", lambda levels: levels.astype(np.uint16) * 257),
    ("float.tif", lambda levels: levels.astype(np.float32) / 255),
    ("x.gif", lambda levels: levels), ("x.bmp", lambda levels: levels),
    ("rgb.png", lambda levels: np.stack([levels] * 3, axis=-1)),
    ("x.webp", lambda levels: np.stack([levels] * 3, axis=-1)),
    ("x.jp2", lambda levels: levels), ("x.avif", lambda levels: levels),
    ("alpha.png", lambda levels: np.stack([levels, 0 * levels + 255], axis=-1)),
    # black ink, of which the paper shows through the more, the brighter a pixel is
    ("ink.png", lambda levels: np.stack([0 * levels] * 3 + [255 - levels], axis=-1)),
])
def test_files_of_every_depth_give_the_same_pixels(name, convert, tmp_path):
    path, expected = tmp_path / name, torch.from_numpy(LEVELS).expand(3, 16, 16)
    if path.suffix not in EXTENSIONS:
        pytest.skip("this Pillow does not read it")
    Image.fromarray(convert(LEVELS)).save(path, lossless=True, quality=100)
    image = decode(path)
    assert image.dtype == torch.uint8 and image.shape == expected.shape
    assert (image.int() - expected.int()).abs().max() <= 1    # 8 bits, rounded


@pytest.mark.parametrize("orientation, turns", [(3, 2), (6, 1), (8, -1)])
@pytest.mark.parametrize("ending, scale", [("png", 1), ("tif", 1), ("webp", 1), ("png", 257)])
def test_images_are_turned_upright(orientation, turns, ending, scale, tmp_path):
    """turns: quarter turns, counterclockwise, that the camera was held by."""
    upright, exif = LEVELS[:12], Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.rot90(upright, turns).astype(np.uint8 if scale == 1 else np.uint16) * scale
    Image.fromarray(stored).save(tmp_path / f"x.{ending}", exif=exif, lossless=True)
    assert torch.equal(decode(tmp_path / f"x.{ending}")[0], torch.from_numpy(upright))


def test_damaged_exif_data_leave_an_image_as_it_is(tmp_path):
    Image.fromarray(LEVELS).save(tmp_path / "x.png", exif=b"Exif\0\0nonsense")
    assert (decode(tmp_path / "x.png") == torch.from_numpy(LEVELS)).all()


@pytest.mark.parametrize("mode, ending", [
    ("1", "png"), ("P", "png"), ("CMYK", "tif"), ("YCbCr", "jpg"),
])
def test_images_of_other_modes_become_rgb(mode, ending, tmp_path):
    picture = Image.new("RGB", (32, 16), "white")
    picture.paste("black", (0, 0, 16, 16))    # the left half
    picture.convert(mode).save(tmp_path / f"x.{ending}")
    image = decode(tmp_path / f"x.{ending}")
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 32)
    assert (image[..., :16] < 5).all() and (image[..., 16:] > 250).all()    # CMYK rounds


@pytest.mark.parametrize("array, word", [
    (LEVELS.astype(np.int32) * 1000, "32 bits, from 0 to 255000"),
    (LEVELS.astype(np.float32), "floats from 0 to 255"),
    (LEVELS / np.float32(255) - np.float32(0.5), "floats from -0.5"),
    (np.full((4, 4), np.nan, np.float32), "floats from nan"),
])
def test_pixels_without_a_known_range_are_refused(array, word, tmp_path):
    Image.fromarray(array).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=f"x.tif has .*{word}"):
        decode(tmp_path / "x.tif")


def test_pipes_and_folders_are_no_images(tmp_path):
    lay_out(tmp_path, "pipe.jpg| folder.jpg/")
    for name in ("pipe.jpg", "folder.jpg", "nothing.jpg"):
        with pytest.raises(UserError, match=name):
            decode(tmp_path / name)


def test_large_images_are_refused_until_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    lay_out(tmp_path, "x.png")
    with pytest.raises(UserError, match="x.png .*256 pixels.* MAX_IMAGE_PIXELS"):
        decode(tmp_path / "x.png")
    monkeypatch.setenv("MAX_IMAGE_PIXELS", "256")
    assert decode(tmp_path / "x.png").shape == (3, 16, 16)
    monkeypatch.setenv("MAX_IMAGE_PIXELS", "many")
    with pytest.raises(UserError, match="many"):
        decode(tmp_path / "x.png")


def test_pillow_does_not_warn_without_the_files_name(tmp_path):
    """Its own warning: an image of more pixels than the limit, but fewer than twice as many."""
    lay_out(tmp_path, "x.png")
    program = "import sys; from support.files import decode; decode(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x.png")],
                          env=os.environ | {"MAX_IMAGE_PIXELS": "200"}, cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- images that can't be read --------------------------------------------------------------------


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


def inaturalist(root):
    """Write four images in iNaturalist's layout and JSON, two of each split; return the folder."""
    folder = root / "data/inat2019"
    lay_out(folder / "train_val2019", "Plants/1/a.jpg Plants/2/b.jpg Birds/0/c.jpg Birds/0/d.jpg")
    for split, files in (("train", ("Plants/2/b", "Birds/0/c")), ("val", ("Plants/1/a",))):
        names = [f"train_val2019/{file}.jpg" for file in files]
        (folder / f"{split}2019.json").write_text(json.dumps({
            "categories": [{"id": i} for i in range(3)],
            "images": [{"id": 7 + i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": 7 + i, "category_id": int(name.split("/")[2])}
                            for i, name in reversed(list(enumerate(names)))],
        }))
    return folder


def test_inaturalists_labels_are_those_of_its_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = inaturalist(tmp_path)
    train, val = build_dataset("inat2019", "train"), build_dataset("inat2019", "val")
    assert train.labels.tolist() == [2, 0] and val.labels.tolist() == [1]
    assert train.classes == val.classes == 3 and train.identity != val.identity
    assert train[0][1] == 2 and train.path(0).endswith("Plants/2/b.jpg")
    for text in ("{}", "no JSON", (folder / "val2019.json").read_text().replace(": 1", ": 3")):
        (folder / "val2019.json").write_text(text)
        with pytest.raises(UserError, match="val2019.json"):
            build_dataset("inat2019", "val")
    (folder / "val2019.json").unlink()
    with pytest.raises(UserError, match="train_val2019/"):
        build_dataset("inat2019", "val")


@pytest.mark.parametrize("name", ["flowers102", "stanfordcars"])
def test_sets_with_labels_of_matlab_need_scipy(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("scipy") and name == "flowers102":
        pytest.skip("would download it")
    word = "stanford_cars/" if importlib.util.find_spec("scipy") else "pip install scipy"
    with pytest.raises(UserError, match=word):
        build_dataset(name, "train")


def test_stanford_cars_are_read_where_they_lie(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    monkeypatch.chdir(tmp_path)
    folder = lay_out(tmp_path / "data/stanford_cars", "cars_train/1.jpg cars_train/2.jpg devkit/")
    rows = np.array([("1.jpg", 3), ("2.jpg", 196)], dtype=[("fname", "O"), ("class", "O")])
    scipy_io.savemat(folder / "devkit/cars_train_annos.mat", {"annotations": rows})
    names = np.array(["a", "b"], dtype=object)
    scipy_io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    images = build_dataset("stanfordcars", "train")
    assert images.labels.tolist() == [2, 195] and images.classes == 196
    assert images[1][0].shape == (3, 16, 16) and images.path(1).endswith("cars_train/2.jpg")
