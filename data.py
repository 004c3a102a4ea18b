"""Where training images come from: folders, torchvision's data sets, `shapes`.

A data set here is map-style and gives (uint8 image (3, H, W), label or -1). It has `labels`, a
tensor of all of them that costs no decoding, `classes`, their number, and `identity`, a string that
is equal for the same images in another place.
"""

import os

import numpy as np
from torch.utils.data import Dataset, Sampler

from support.class_folders import check_classes, class_of, find_classes, find_split
from support.errors import UserError
from support.files import EXTENSIONS, ImageFiles, walk
from support.named_sets import NAMES, named_set


class NoSplit(UserError):
    """A data set lacks the split that was asked for."""


def build_dataset(path, split, label_depth=None, classes=None):
    """Return the images at `path`, a folder or one of NAMES.

    split: "train" or "val". A folder with train/ and val/ has the labels of the folders in train/;
    ImageNet-S's validation/ is a val/. Any other folder is one set of images, nested as it likes,
    without labels, and has no "val".
    label_depth: on which level below train/ the class folders are; if None the first, where that is
    certain. classes: a file of the class folders to use, a name a line; None for all.
    Raises UserError, NoSplit for a folder without that split.
    """
    path = str(path)
    if path in NAMES:
        if classes:
            raise UserError(f"--classes is for folders with train/, not for {path}")
        return named_set(path, split)
    if not os.path.isdir(path):
        raise UserError(f"{path} is neither a folder nor one of {', '.join(NAMES)}")
    train, folder = find_split(path, "train"), find_split(path, split)
    if not folder and split == "val":
        raise NoSplit(f"{path} needs both train/ and val/, with a folder for each class in each")
    if not train:
        if classes:
            raise UserError(f"--classes is for folders with train/, which {path} has not")
        return unlabeled_images(path, f"{path} has no train/")
    names = find_classes(train, label_depth, classes)
    if not names:
        return unlabeled_images(folder, f"{train} has no class folders")
    return labeled_images(folder, names, label_depth, only_these=classes is not None)


def unlabeled_images(root, reason):
    """Return all images below a folder, without labels; reason: why."""
    folders = list(walk(root))
    names = relative_names(root, folders)
    return ImageFiles(root, names, [-1] * len(names), classes=0, unlabeled=reason)


def labeled_images(root, classes, label_depth, only_these):
    """Return all images below train/ or val/.

    The label is the number in `classes` of the folder on level label_depth that an image is in; -1
    for images above that level. only_these: leave out all others; if not, they are an error.
    """
    depth = label_depth or 1
    number = {name: label for label, name in enumerate(classes)}
    folders = [folder for folder in walk(root)
               if not only_these or class_of(folder, depth) in number]
    check_classes(root, folders, label_depth)
    labels = []
    for folder in folders:
        name = class_of(folder, depth)
        if folder.images and name is not None and name not in number:
            raise UserError(f"{folder.path} holds images of a class that train/ does not have")
        labels += [number.get(name, -1)] * len(folder.images)
    if len(classes) == 1:    # nothing to tell it from
        return unlabeled_images(root, f"{root} has one class only, {classes[0]}")
    return ImageFiles(root, relative_names(root, folders), labels, len(classes))


def relative_names(root, folders):
    """Return the names of all images in folders of a walk of root, relative to it."""
    names = ["/".join((*folder.parts, name)) for folder in folders for name in folder.images]
    if not names:
        raise UserError(f"no images below {root} ({' '.join(EXTENSIONS)})")
    return names


def labeled(images):
    """Return the indices of the images of a data set that have a label, a tensor."""
    return (images.labels >= 0).nonzero().flatten()


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
