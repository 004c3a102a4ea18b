"""Data sets by name: CIFAR and STL-10 by torchvision, and `shapes`, drawn when asked for."""

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from support.errors import UserError

NAMES = ("shapes", "cifar10", "cifar100", "stl10")
DOWNLOADS = "data"    # where torchvision keeps what it downloads, in the working directory


class TorchvisionImages(Dataset):
    """A torchvision data set of PIL images, in the form of this file."""

    def __init__(self, images, labels):
        self.images, self.labels = images, torch.as_tensor(np.asarray(labels)).long()
        self.classes = int(self.labels.max()) + 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return pil_to_tensor(self.images[index][0]), int(self.labels[index])


def named_set(name, split):
    """Return a data set of NAMES; but for shapes, downloaded on first use.

    STL-10 "train" has its unlabeled images too.
    """
    if name == "shapes":
        return Shapes(split)
    train = split == "train"
    try:
        if name == "stl10":
            split = "train+unlabeled" if train else "test"
            images = datasets.STL10(DOWNLOADS, split, download=True)
            return TorchvisionImages(images, images.labels)
        cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        images = cifar(DOWNLOADS, train, download=True)
        return TorchvisionImages(images, images.targets)
    except (OSError, RuntimeError) as error:
        where = f"{name} is not in {DOWNLOADS}/"
        raise UserError(f"{where} and could not be downloaded: {error}") from error


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
    """

    SIZE = 64
    LENGTH = {"train": 5_000, "val": 1_000}
    HUE_DEVIATION = 0.12    # of an image from the hue of its kind, in turns

    def __init__(self, split):
        self.split, self.classes = split, len(SHAPES)
        self.labels = torch.arange(self.LENGTH[split]) % self.classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.draw(index)[0], int(self.labels[index])

    def draw(self, index):
        """Return the image, uint8 (3, H, W), and its mask, int32 (H, W): 0 ground, 1 + label."""
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
