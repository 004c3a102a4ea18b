"""Build data sets by name: torchvision's, iNaturalist 2019, and `shapes`.

They lie in data/ in the working directory. Downloaded there on first use: cifar10, cifar100, stl10,
flowers102. Put there by hand: stanfordcars, inat2019.
"""

import importlib.util
import json
import os

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from support.errors import UserError
from support.files import ImageFiles

NAMES = ("shapes", "shapes-tuning", "cifar10", "cifar100", "stl10", "flowers102", "stanfordcars",
         "inat2019")
DOWNLOADS = "data"    # where torchvision keeps what it downloads, in the working directory


class TorchvisionImages(Dataset):
    """A torchvision data set of PIL images, in the form of data.py."""

    def __init__(self, images, labels):
        self.images, self.labels = images, torch.as_tensor(np.asarray(labels)).long()
        self.classes = int(self.labels.max()) + 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return pil_to_tensor(self.images[index][0]), int(self.labels[index])


def named_set(name, split):
    """Return a data set of NAMES, split "train" or "val".

    Raises UserError if it is not to be had.
    "val" is the published test set where that has labels.
    """
    if name in ("shapes", "shapes-tuning"):
        images = Shapes(split, name)
    elif name == "inat2019":
        images = inaturalist(split)
    else:
        try:
            images = torchvision_set(name, split == "train")
        except (OSError, RuntimeError) as error:
            where = f"{name} is not in {DOWNLOADS}/"
            raise UserError(f"{where} and could not be downloaded: {error}") from error
    images.identity = f"{name} {split} {len(images)}"
    return images


def torchvision_set(name, train):
    """Return a data set of torchvision.

    STL-10's training images include the unlabeled ones.
    """
    if name == "stl10":
        split = "train+unlabeled" if train else "test"
        images = datasets.STL10(DOWNLOADS, split, download=True)
        return TorchvisionImages(images, images.labels)
    if name in ("cifar10", "cifar100"):
        cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        images = cifar(DOWNLOADS, train, download=True)
        return TorchvisionImages(images, images.targets)
    if not importlib.util.find_spec("scipy"):
        raise UserError(f"{name} needs SciPy to read its labels: pip install scipy")
    # With this loader an item is (path, label), and nothing is decoded.
    if name == "flowers102":
        splits = ("train", "val") if train else ("test",)
        parts = [datasets.Flowers102(DOWNLOADS, split, download=True, loader=os.fspath)
                 for split in splits]
        return files_of([part[i] for part in parts for i in range(len(part))], classes=102)
    split = "train" if train else "test"
    try:
        images = datasets.StanfordCars(DOWNLOADS, split, loader=os.fspath)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"stanfordcars can't be downloaded any more; put its devkit/, cars_{split}/ and "
            f"cars_test_annos_withlabels.mat into {DOWNLOADS}/stanford_cars/ ({error})") from error
    return files_of([images[i] for i in range(len(images))], classes=196)


def files_of(items, classes):
    """Return an ImageFiles of pairs (path below DOWNLOADS, label)."""
    names = [os.path.relpath(path, DOWNLOADS) for path, _ in items]
    return ImageFiles(DOWNLOADS, names, [int(label) for _, label in items], classes)


def inaturalist(split):
    """Return iNaturalist 2019; labels are from its JSON: folders are two levels deep."""
    root = os.path.join(DOWNLOADS, "inat2019")
    path = os.path.join(root, f"{split}2019.json")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        label_of = {row["image_id"]: row["category_id"] for row in content["annotations"]}
        names = [row["file_name"] for row in content["images"]]
        labels = [label_of[row["id"]] for row in content["images"]]
        classes = len(content["categories"])
    except OSError as error:
        raise UserError(f"inat2019 has to be put into {root}/, train_val2019/ beside "
                        f"train2019.json and val2019.json: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not iNaturalist's JSON: {error!r}") from error
    if not (labels and 0 <= min(labels) <= max(labels) < classes):
        raise UserError(f"{path} needs images with categories from 0 to {classes - 1}")
    return ImageFiles(root, names, labels, classes)


# --- shapes ---------------------------------------------------------------------------------------



def polygon(a, b, sides):
    """Return the distance to a regular polygon of in-radius 0, negative inside."""
    angles = 2 * np.pi * np.arange(sides) / sides
    return np.max([a * np.cos(t) + b * np.sin(t) for t in angles], axis=0)


def box(a, b, width, height):
    """Return the distance to a rectangle with these half sides, negative inside."""
    return np.maximum(np.abs(a) - width, np.abs(b) - height)


# Signed distance to the edge of a shape, negative inside, in a cell (a, b) of [-0.5, 0.5]².
SHAPES = {
    "disc": lambda a, b: np.hypot(a, b) - 0.33,
    "ring": lambda a, b: np.abs(np.hypot(a, b) - 0.32) - 0.08,
    "square": lambda a, b: box(a, b, 0.3, 0.3),
    "frame": lambda a, b: np.abs(box(a, b, 0.32, 0.32)) - 0.07,
    "triangle": lambda a, b: polygon(a, b, 3) - 0.2,
    "cross": lambda a, b: np.minimum(box(a, b, 0.42, 0.12), box(a, b, 0.12, 0.42)),
    "bar": lambda a, b: box(a, b, 0.42, 0.15),
    "stripe": lambda a, b: np.abs(b) - 0.22,
    "check": lambda a, b: np.where(a * b < 0, 1, -1) * np.minimum(np.abs(a), np.abs(b)),
    "wave": lambda a, b: np.abs(b - 0.22 * np.sin(2 * np.pi * a)) - 0.13,
}


class Shapes(Dataset):
    """Images of a blob of paper, printed with one kind of shape all over: the label.

    Each kind leans to a hue of its own, which varies from image to image and tints paper and ink,
    as the photographs of a class have colors in common. All else is drawn at random for each image,
    independent of the label: the ground's color, the paper's outline, place and lightness, the
    print's scale, angle and strength, the color of every single shape, and noise. Every image has
    the same mean brightness. Deterministic by split and index. Nothing is stored.
    "shapes-tuning" has another val, to choose settings on.
    """

    SIZE = 64
    LENGTH = {"train": 5_000, "val": 1_000, "tuning": 1_000}
    HUE_DEVIATION = 0.12    # of an image from the hue of its kind, in turns

    def __init__(self, split, name="shapes"):
        self.split = "tuning" if (name, split) == ("shapes-tuning", "val") else split
        self.classes = len(SHAPES)
        self.labels = torch.arange(self.LENGTH[self.split]) % self.classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.draw(index)[0], int(self.labels[index])

    def draw(self, index):
        """Return the image, uint8 (3, H, W), and its mask, int32 (H, W).

        The mask is 0 on the ground and 1 + label on the paper.
        """
        label = int(self.labels[index])
        rng = np.random.default_rng((list(self.LENGTH).index(self.split), index))
        y, x = np.mgrid[0 : self.SIZE, 0 : self.SIZE].astype(np.float32) / self.SIZE - 0.5

        # the paper's outline: a wobbly disc
        u, v = x - rng.uniform(-0.1, 0.1), y - rng.uniform(-0.1, 0.1)
        angle, radius = np.arctan2(v, u), np.hypot(u, v)
        wobble = 0
        for k in (2, 3, 5):
            wobble += rng.uniform(0, 0.12) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
        paper = radius < rng.uniform(0.38, 0.6) + wobble

        # the print: a lattice of cells, slightly turned, a shape in each
        turn, cells = rng.uniform(-0.15, 0.15), rng.uniform(3.5, 5)
        a = (np.cos(turn) * x + np.sin(turn) * y) * cells + rng.uniform()
        b = (np.cos(turn) * y - np.sin(turn) * x) * cells + rng.uniform()
        row, column = np.round(a).astype(int), np.round(b).astype(int)
        shape = list(SHAPES.values())[label]
        distance = shape(a - row, b - column) * self.SIZE / cells    # in pixels
        ink = rng.uniform(-0.7, -0.2, (3, 256)).astype(np.float32)    # a color a cell
        ink = ink.take(row % 16 * 16 + column % 16, axis=1) * np.clip(0.5 - distance, 0, 1)

        hue = label / len(SHAPES) + rng.normal(0, self.HUE_DEVIATION)
        tint = 0.15 * np.cos(2 * np.pi * (hue - np.arange(3) / 3))    # of red, green, blue
        printed = tint[:, None, None] + rng.uniform(-0.1, 0.1) + rng.uniform(0.5, 1) * ink
        ground = rng.uniform(-0.4, 0) + rng.uniform(-0.1, 0.1, (3, 1, 1))
        image = np.where(paper, printed, ground)
        image += 0.03 * rng.standard_normal(image.shape, np.float32)
        image += 0.5 - image.mean()
        image = torch.from_numpy((255 * image.clip(0, 1)).astype(np.uint8))
        return image, torch.from_numpy(np.where(paper, label + 1, 0).astype(np.int32))
