"""Where training images come from: folders, torchvision's data sets, `shapes`.

A data set here is map-style and gives (uint8 image (3, H, W), label or -1). It has `labels`, a
tensor of all of them that costs no decoding, and `classes`, their number.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from support.errors import UserError
from support.named_sets import NAMES, named_set


class NoSplit(UserError):
    """A data set lacks the split that was asked for."""


def build_dataset(path, split):
    """Return the images at `path`, a folder or one of NAMES.

    split: "train" or "val". A folder with train/ and val/ has the labels of the folders in train/.
    Any other folder is one set of images, nested as it likes, without labels, and has no "val".
    Raises UserError, NoSplit for a folder without that split.
    """
    path = str(path)
    if path in NAMES:
        return named_set(path, split)
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{path} is neither a folder nor one of {', '.join(NAMES)}")
    if split == "train" and not (root / "train").is_dir():
        return ImageFiles(root, classes=[])
    if not ((root / "train").is_dir() and (root / split).is_dir()):
        raise NoSplit(f"{path} needs both train/ and {split}/, with a folder a class in each")
    classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    return ImageFiles(root / split, classes)


def labeled(images):
    """Return the indices of the images of a data set that have a label, a tensor."""
    return (images.labels >= 0).nonzero().flatten()


def decode(path):
    """Read an image file as uint8 RGB (3, H, W). Raises UserError naming a bad file."""
    try:
        with Image.open(path) as image:
            return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:    # Pillow's codecs raise OSError, SyntaxError, ValueError, and more
        raise UserError(f"{path} can't be read as an image: {error}") from error


class ImageFiles(Dataset):
    """All image files below a folder, sorted.

    The label is the number in `classes` of the first folder below root. Raises UserError for a
    folder without images and for a class that is not in `classes`.
    """

    def __init__(self, root, classes):
        paths, labels, seen = [], [], set()
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if os.path.realpath(folder) in seen:    # a link back to a folder above
                subfolders.clear()
                continue
            seen.add(os.path.realpath(folder))
            subfolders.sort()
            name = Path(folder).relative_to(root).parts[:1]
            files = [os.path.join(folder, f) for f in files if f.lower().endswith(IMG_EXTENSIONS)]
            if files and name and classes and name[0] not in classes:
                raise UserError(f"{folder} holds images of a class that train/ does not have")
            paths += sorted(files)
            labels += [classes.index(name[0]) if name and classes else -1] * len(files)
        if not paths:
            raise UserError(f"no images below {root} ({' '.join(IMG_EXTENSIONS)})")
        # One array of bytes: workers would come to copy a list of strings, by counting references.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels, self.classes = torch.tensor(labels), len(classes)

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.fsdecode(self.paths[index])

    def __getitem__(self, index):
        return decode(self.path(index)), int(self.labels[index])


# --- the training set -----------------------------------------------------------------------------


class Readable(Dataset):
    """A data set in which the next image stands in for one that can't be read."""

    def __init__(self, images):
        self.images, self.labels, self.classes = images, images.labels, images.classes

    def __len__(self):
        return len(self.images)

    def get(self, index):
        """Return ((image, label), complaint): a line for each image passed over, or "".

        Raises UserError after a hundred in a row.
        """
        complaints = []
        for i in range(index, index + min(100, len(self))):
            try:
                return self.images[i % len(self)], "\n".join(complaints)
            except UserError as error:
                complaints.append(f"{error}; the next image stands in")
        raise UserError(f"{len(complaints)} images in a row can't be read: {complaints[-1]}")

    def __getitem__(self, index):
        return self.get(index)[0]


class ViewsOfImages(Readable):
    """Key (epoch, index) -> (Views of image `index`, complaint)."""

    def __init__(self, images, multicrop, seed):
        super().__init__(images)
        self.multicrop, self.seed = multicrop, seed

    def __getitem__(self, key):
        epoch, index = key
        (image, _), complaint = self.get(index)
        return self.multicrop(image, (self.seed, epoch, index)), complaint


class Batches(Sampler):
    """Endless lists of keys (epoch, index) of a process, ordered by (seed, epoch).

    A step is `per_step` batches in each process. The batches of the processes lie side by side in
    the epoch's order, so two processes of B see what one of 2B sees. Images that fill no whole step
    are left out. start: steps to pass over.
    """

    def __init__(self, images, batch_size, per_step, rank, processes, seed, start=0):
        self.images, self.rank, self.seed, self.start = images, rank, seed, start
        steps = images // (per_step * processes * batch_size)    # of an epoch
        self.shape = (steps, per_step, processes, batch_size)

    def __iter__(self):
        epoch, skip = divmod(self.start, self.shape[0])
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
            order = order[: np.prod(self.shape)].reshape(self.shape)
            for batch in order[skip:, :, self.rank].reshape(-1, self.shape[-1]).tolist():
                yield [(epoch, index) for index in batch]
            epoch, skip = epoch + 1, 0
