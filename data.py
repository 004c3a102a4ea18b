"""Where images come from: folders, torchvision's data sets, and `shapes`, which is drawn on the spot.

Every data set here is map-style, gives (uint8 image (3, H, W), label or -1), and has `labels`, a tensor of all of them
that costs no decoding, and `classes`, their number. Those of `build_segmentation` give (image, uint8 mask (H, W)).
"""

import atexit
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

NAMES = ("shapes", "cifar10", "cifar100", "stl10")
DOWNLOADS = "data"    # where torchvision keeps what it downloads, in the working directory


def build_dataset(path, split):
    """The images at `path`, a name of NAMES or a folder; split is "train" or "val".

    A folder with train/ and val/ has the labels of the folders in train/. Any other folder is one set of images, nested
    as it likes, without labels, and has no "val". Raises OSError, in one line.
    """
    path = str(path)
    if path == "shapes":
        return Shapes(split)
    if path in NAMES:
        return _torchvision_images(path, split)
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder nor one of {', '.join(NAMES)}")
    if not (root / "train").is_dir():
        if split != "train":
            raise FileNotFoundError(f"{path} has no train/ and {split}/, with a folder a class in each, so there is nothing to evaluate on")
        return ImageFiles(root, classes=[])
    classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    if not (root / split).is_dir():
        raise FileNotFoundError(f"{path} has train/ but no {split}/")
    return ImageFiles(root / split, classes)


def labelled(images):
    """Indices of the images of a data set that have a label, a tensor."""
    return (images.labels >= 0).nonzero().flatten()


def decode(path):
    """An image file as uint8 RGB (3, H, W). Raises OSError, naming the file, whatever is wrong with it."""
    try:
        with Image.open(path) as image:
            return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))    # convert copies in any case
    except Exception as error:    # Pillow's codecs raise OSError, SyntaxError, ValueError, struct.error, ...
        raise OSError(f"{path} can't be read as an image: {error}") from error


class ImageFiles(torch.utils.data.Dataset):
    """All image files below a folder, sorted. The label is the number of the first folder on the way to a file in `classes`.

    Raises OSError for a folder without images and for one with a class that is not in `classes`.
    """

    def __init__(self, root, classes):
        paths, labels = [], []
        number = {name: i for i, name in enumerate(classes)}
        seen = set()
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if os.path.realpath(folder) in seen:    # a link back to a folder above
                subfolders.clear()
                continue
            seen.add(os.path.realpath(folder))
            subfolders.sort()
            name = Path(folder).relative_to(root).parts[:1]
            label = number.get(name[0], -1) if name else -1
            files = [os.path.join(folder, file) for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS)]
            if files and name and classes and label < 0:
                raise OSError(f"{folder} holds images of a class that train/ does not have")
            paths += files
            labels += [label] * len(files)
        if not paths:
            raise FileNotFoundError(f"no images below {root} ({' '.join(IMG_EXTENSIONS)})")
        # One array of bytes: each worker would come to copy a list of a million strings, by counting references.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = torch.tensor(labels)
        self.classes = len(classes)

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.fsdecode(self.paths[index])

    def __getitem__(self, index):
        return decode(self.path(index)), int(self.labels[index])


class Torchvision(torch.utils.data.Dataset):
    """A torchvision data set of PIL images, in this file's form."""

    def __init__(self, images, labels):
        self.images, self.labels = images, torch.as_tensor(np.asarray(labels), dtype=torch.long)
        self.classes = int(self.labels.max()) + 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return pil_to_tensor(self.images[index][0]), int(self.labels[index])


def _torchvision_images(name, split):
    """CIFAR and STL-10, downloaded on first use. STL-10's "train" is its labelled and unlabelled images (-1) together."""
    try:
        if name == "stl10":
            images = datasets.STL10(DOWNLOADS, "train+unlabeled" if split == "train" else "test", download=True)
            return Torchvision(images, images.labels)
        images = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](DOWNLOADS, split == "train", download=True)
        return Torchvision(images, images.targets)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{name} is not in {DOWNLOADS}/ and could not be downloaded: {error}") from error


# --- images with masks ------------------------------------------------------------------------------------------------

IGNORED = 255    # in a mask: counts neither in training nor in a measure


def build_segmentation(path, split, ignore_index=IGNORED):
    """Images and masks of class indices at `path`: "shapes" (paper, or not), "voc" (Pascal VOC 2012), or a folder with
    <split>/images/ and <split>/masks/, whose files have the same names but for the ending. Raises OSError, in one line.

    ignore_index: what the masks call a pixel that does not count; here it becomes IGNORED. Has `classes`, their number, or None where it is
    not known without reading every mask.
    """
    path = str(path)
    if path == "shapes":
        return ShapesWithMasks(split)
    if path == "voc":
        try:
            return ImagesWithMasks(*_pairs_of_voc(split), ignore_index=IGNORED, classes=21)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"voc is not in {DOWNLOADS}/ and could not be downloaded: {error}") from error
    folders = [Path(path) / split / part for part in ("images", "masks")]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} is neither shapes nor voc, nor has it a folder {split}/{folder.name}")
    images, masks = ({file.stem: file for file in sorted(folder.iterdir()) if file.name.lower().endswith(IMG_EXTENSIONS)} for folder in folders)
    if not images:
        raise FileNotFoundError(f"no images in {folders[0]}")
    if missing := [str(file) for stem, file in images.items() if stem not in masks]:
        raise FileNotFoundError(f"{missing[0]} has no mask in {folders[1]}" + (f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""))
    return ImagesWithMasks(list(images.values()), [masks[stem] for stem in images], ignore_index, classes=None)


def _pairs_of_voc(split):
    voc = datasets.VOCSegmentation(DOWNLOADS, image_set=split, download=not (Path(DOWNLOADS) / "VOCdevkit").is_dir())
    return voc.images, voc.masks


class ImagesWithMasks(torch.utils.data.Dataset):
    """Files of images and of their masks, one channel or a palette of class indices. Raises OSError, naming the file, for others."""

    def __init__(self, images, masks, ignore_index, classes):
        self.images, self.masks, self.ignore_index = images, masks, ignore_index
        self.classes = classes

    def __len__(self):
        return len(self.images)

    def mask(self, index):
        path = self.masks[index]
        try:
            with Image.open(path) as file:
                mask = torch.from_numpy(np.array(file))
        except Exception as error:
            raise OSError(f"{path} can't be read as a mask: {error}") from error
        if mask.ndim != 2 or mask.dtype != torch.uint8:
            raise OSError(f"{path} is no mask of class indices: it is {file.mode}, not one channel of 8 bits (L) or a palette (P)")
        mask = torch.where(mask == self.ignore_index, IGNORED, mask).to(torch.uint8)
        largest = int(torch.where(mask == IGNORED, 0, mask).max())
        if self.classes and largest >= self.classes:
            raise OSError(f"{path} has class {largest}, but there are {self.classes} classes, from 0; is it the --ignore_index?")
        return mask

    def __getitem__(self, index):
        image, mask = decode(self.images[index]), self.mask(index)
        if image.shape[1:] != mask.shape:
            raise OSError(f"{self.images[index]} and its mask {self.masks[index]} differ in size")
        return image, mask


def count_classes(images):
    """1 + the largest class in the masks of a data set of build_segmentation."""
    return images.classes or 1 + max(int(torch.where(mask == IGNORED, 0, mask).max()) for mask in map(images.mask, range(len(images))))


# --- for evaluation ---------------------------------------------------------------------------------------------------


class Transformed(torch.utils.data.Dataset):
    """images[i] for i in indices, through `transform`: (uint8 image, label)."""

    def __init__(self, images, transform, indices):
        self.images, self.transform, self.indices = images, transform, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        image, label = self.images[self.indices[i]]
        return self.transform(image), label


def evaluation_crop(size):
    """uint8 image -> uint8 (3, size, size): short side to size * 256 / 224, bicubic, then the centre."""
    return v2.Compose([v2.Resize(round(size * 256 / 224), InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])


# --- shapes -----------------------------------------------------------------------------------------------------------


def _polygon(a, b, sides):
    """Distance to a regular polygon of in-radius 0, negative inside."""
    angles = 2 * np.pi * np.arange(sides) / sides
    return np.max([a * np.cos(t) + b * np.sin(t) for t in angles], axis=0)


# Signed distance to the shape's edge, negative inside, in a cell (a, b) of [-0.5, 0.5]².
SHAPES = {
    "disc": lambda a, b: np.hypot(a, b) - 0.33,
    "ring": lambda a, b: np.abs(np.hypot(a, b) - 0.32) - 0.08,
    "square": lambda a, b: np.maximum(np.abs(a), np.abs(b)) - 0.3,
    "frame": lambda a, b: np.abs(np.maximum(np.abs(a), np.abs(b)) - 0.32) - 0.07,
    "triangle": lambda a, b: _polygon(a, b, 3) - 0.2,
    "cross": lambda a, b: np.minimum(np.maximum(np.abs(a) - 0.42, np.abs(b) - 0.12), np.maximum(np.abs(b) - 0.42, np.abs(a) - 0.12)),
    "bar": lambda a, b: np.maximum(np.abs(a) - 0.42, np.abs(b) - 0.15),
    "stripe": lambda a, b: np.abs(b) - 0.22,
    "check": lambda a, b: np.where(a * b < 0, 1, -1) * np.minimum(np.abs(a), np.abs(b)),
    "wave": lambda a, b: np.abs(b - 0.22 * np.sin(2 * np.pi * a)) - 0.13,
}


class Shapes(torch.utils.data.Dataset):
    """Images of a blob of paper, printed with one kind of shape over and over. The kind is the label.

    All else is drawn at random for each image, independent of the label: the paper's outline and place, the print's scale
    and angle, the colour of every single shape, light and noise; and every image has the same mean colour. So what all
    crops of an image share is the kind of shape. Deterministic by split and index; nothing is stored.
    """

    SIZE = 64
    LENGTH = {"train": 10_000, "val": 1_000}

    def __init__(self, split):
        self.split, self.classes = split, len(SHAPES)
        self.labels = torch.arange(self.LENGTH[split]) % self.classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image, _ = self._draw(index)
        return torch.from_numpy(image), int(self.labels[index])

    def mask(self, index):
        """Where the paper is: bool (H, W)."""
        return torch.from_numpy(self._draw(index)[1])

    def _draw(self, index):
        kind = list(SHAPES)[int(self.labels[index])]
        rng = np.random.default_rng((list(self.LENGTH).index(self.split), index))
        y, x = np.mgrid[0 : self.SIZE, 0 : self.SIZE].astype(np.float32) / self.SIZE - 0.5    # (H, W) in [-0.5, 0.5)

        # the paper's outline: a wobbly disc
        u, v = x - rng.uniform(-0.1, 0.1), y - rng.uniform(-0.1, 0.1)
        angle, radius = np.arctan2(v, u), np.hypot(u, v)
        wobble = sum(rng.uniform(0, 0.12) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
        mask = radius < rng.uniform(0.38, 0.6) + wobble

        # the print: a lattice of cells, slightly turned, a shape in each
        turn, cells = rng.uniform(-0.15, 0.15), rng.uniform(4.5, 6.5)
        a = (np.cos(turn) * x + np.sin(turn) * y) * cells + rng.uniform()
        b = (np.cos(turn) * y - np.sin(turn) * x) * cells + rng.uniform()
        row, column = np.round(a).astype(int), np.round(b).astype(int)
        cover = np.clip(0.5 - SHAPES[kind](a - row, b - column) * self.SIZE / cells, 0, 1)    # an edge is a pixel wide
        ink = rng.uniform(-0.7, -0.2, (3, 16, 16))[:, row % 16, column % 16]                  # (3, H, W) darker than paper, a colour a cell

        image = np.where(mask, ink * cover, rng.uniform(-0.4, 0)) + rng.normal(0, 0.03, ink.shape)
        image += (0.5 - image.mean(axis=(1, 2)))[:, None, None]    # or shapes with much ink would be dark images
        return (255 * image.clip(0, 1)).astype(np.uint8), mask


class ShapesWithMasks(Shapes):
    """Shapes with masks in place of labels: 1 where the paper is."""

    def __init__(self, split):
        super().__init__(split)
        self.classes = 2

    def __getitem__(self, index):
        image, mask = self._draw(index)
        return torch.from_numpy(image), torch.from_numpy(mask.astype(np.uint8))


def ignore_signals(worker):
    """For loader workers: Ctrl-C reaches every process of a terminal, but it is the trainer that stops, in its own time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """A run that failed may leave workers behind, which would not hear the SIGTERM that Python sends them at its end and then waits for."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # PyTorch takes a worker's death for an error
    for process in workers:
        process.kill()


# --- the training set -------------------------------------------------------------------------------------------------


class Readable(torch.utils.data.Dataset):
    """A data set in which the next image that can be read stands in for one that can't.

    `get` also says which could not. Raises OSError after a hundred in a row.
    """

    def __init__(self, images):
        self.images, self.labels, self.classes = images, images.labels, images.classes

    def __len__(self):
        return len(self.images)

    def get(self, index):
        """((image, label), complaints): those of the images passed over, a list of str."""
        complaints = []
        for i in range(index, index + min(100, len(self.images))):
            try:
                return self.images[i % len(self.images)], complaints
            except OSError as error:
                complaints.append(str(error))
        raise OSError(f"{len(complaints)} images in a row can't be read; the last: {complaints[-1]}")

    def __getitem__(self, index):
        return self.get(index)[0]


class ViewsOfImages(Readable):
    """Key (epoch, index) -> (views of image `index`, complaints). multicrop: (image, (seed, epoch, index)) -> views."""

    def __init__(self, images, multicrop, seed):
        super().__init__(images)
        self.multicrop, self.seed = multicrop, seed

    def __getitem__(self, key):
        epoch, index = key
        (image, _), complaints = self.get(index)
        return self.multicrop(image, (self.seed, epoch, index)), complaints


class Batches(torch.utils.data.Sampler):
    """Endless lists of keys (epoch, index), `batch_size` each, for one process; every epoch in an order that is a function of (seed, epoch).

    A step is `per_step` batches in each process. The processes' batches lie side by side in the epoch's order, so that
    two processes of B see what one of 2B sees; images that fill no whole step are left out. start: steps to pass over.
    """

    def __init__(self, length, batch_size, per_step, rank, processes, seed, start=0):
        self.length, self.rank, self.seed, self.start = length, rank, seed, start
        self.shape = (per_step, processes, batch_size)
        self.steps = length // (per_step * processes * batch_size)    # an epoch

    def __iter__(self):
        epoch, skip = divmod(self.start, self.steps)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            order = order[: self.steps * np.prod(self.shape)].reshape(self.steps, *self.shape)
            for batch in order[skip:, :, self.rank].reshape(-1, self.shape[-1]).tolist():
                yield [(epoch, index) for index in batch]
            epoch, skip = epoch + 1, 0


def on_device(batches, device):
    """Views of a batch, one after the other, with their tensors on the device. To a GPU they are copied, from pinned memory, while it
    still computes what it was given before."""
    def copy(views):
        mask = None if views.mask is None else views.mask.to(device, non_blocking=True)
        return views._replace(crops=[x.to(device, non_blocking=True) for x in views.crops], rows=views.rows.to(device, non_blocking=True), mask=mask)

    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for views in batches:
        if copies is None:
            yield copy(views)
            continue
        with torch.cuda.stream(copies):
            views = copy(views)
        torch.cuda.current_stream().wait_stream(copies)
        for tensor in (*views.crops, views.rows, views.mask):
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream())    # its memory is not reused before that stream is done with it
        yield views
