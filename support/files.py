"""Image files: which ones lie below a folder, and their pixels.

The environment's MAX_IMAGE_PIXELS raises Pillow's limit on the pixels of an image (about 180
million), which guards against files made to fill the memory.
"""

import contextlib
import hashlib
import os
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from support.errors import UserError

# Pillow warns, without the file's name, of metadata. Pixels that can't be read are an error.
warnings.filterwarnings("ignore", module=r"PIL\.")

READ_TOO = {".gif", ".avif", ".jp2"} & Image.registered_extensions().keys()    # by this Pillow
EXTENSIONS = (*IMG_EXTENSIONS, *sorted(READ_TOO))

# --- folders --------------------------------------------------------------------------------------


class Folder(NamedTuple):
    """A folder and what lies in it, sorted, without names that begin with a dot."""

    path: str
    parts: tuple     # names of the folders from the root of the walk down to this one
    folders: list    # names
    images: list     # names of files that end as EXTENSIONS do
    unread: set      # endings of all other files


def walk(root, levels=None):
    """Yield a Folder for root and for each folder below, at most `levels` below.

    A folder comes before those in it. Links are followed, but not back to a folder that the link is
    in. Pipes and devices are no files. Raises UserError for a folder that can't be read.
    """
    return walk_below(os.fspath(root), (), (), levels)


def walk_below(path, parts, above, levels):
    """Yield as `walk` does. above: the real paths of the folders that this one is in."""
    above = (*above, os.path.realpath(path))
    folder = Folder(path, parts, [], [], set())
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {path} can't be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if is_kind(entry.is_dir):
            if os.path.realpath(entry.path) not in above:
                folder.folders.append(entry.name)
        # A link to nothing stays, so that reading it names it.
        elif is_kind(entry.is_file) or not os.path.exists(entry.path):
            ending = os.path.splitext(entry.name)[1].lower()
            if ending in EXTENSIONS:
                folder.images.append(entry.name)
            else:
                folder.unread.add(ending)
    yield folder
    for name in folder.folders if levels is None or len(parts) < levels else ():
        yield from walk_below(os.path.join(path, name), (*parts, name), above, levels)


def is_kind(question):
    """Ask entry.is_dir or entry.is_file; a link that can't be followed is neither."""
    try:
        return question()
    except OSError:
        return False


def list_images(paths):
    """Return the files among paths, and the images below the folders among them.

    Raises UserError where that is none. Files with a dot in front are left out.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            found += [os.path.join(folder.path, name)
                      for folder in walk(path) for name in folder.images]
        elif not os.path.basename(path).startswith("."):
            found.append(path)
    if not found:
        raise UserError(f"no images in {' '.join(paths)}")
    return found


# --- pixels ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path):
    """Open an image file with Pillow.

    Errors inside become a UserError that names the file.
    """
    if not os.path.isfile(path):    # opening a pipe would wait for ever
        raise UserError(f"{path} is no file")
    allow_pixels(os.environ.get("MAX_IMAGE_PIXELS"))
    try:
        # Given the path, Pillow 13 maps a raw TIFF into memory, and garbles it in turning it.
        with open(path, "rb") as file, Image.open(file) as image:
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is very large: {error} If you trust the file, set "
                        "MAX_IMAGE_PIXELS=N in the environment to allow N pixels") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} can't be read as an image: no format of Pillow's") from error
    except Exception as error:    # Pillow's codecs raise OSError, SyntaxError, ValueError, and more
        raise UserError(f"{path} can't be read as an image: {error}") from error


def allow_pixels(number):
    """Set Pillow's limit to a number in a string; None leaves it."""
    if number is None:
        return
    if not number.isdecimal():
        raise UserError(f"MAX_IMAGE_PIXELS in the environment must be a number, not {number!r}")
    Image.MAX_IMAGE_PIXELS = int(number)


def decode(path, upright=True):
    """Read an image file as uint8 RGB (3, H, W).

    upright: turn it as its EXIF data say; not where masks or boxes lie on it as it is stored.

    Of an animation the first frame; what is transparent lies on white. Raises UserError, naming
    the file, where it can't be read or has no known range of values.
    """
    with opened(path) as image:
        if upright:
            with contextlib.suppress(Exception):    # damaged EXIF data; pixels are met below
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "RGB":
            return pil_to_tensor(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return torch.from_numpy(gray_levels(path, image)).expand(3, -1, -1).clone()
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return pil_to_tensor(image.convert("RGB"))


def gray_levels(path, image):
    """Scale a gray image of 16 bits, or of floats in [0, 1], to uint8 (H, W)."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 1:    # nan too
            raise UserError(f"{path} has floats from {low:g} to {high:g}: scale them to [0, 1]")
        return np.round(255 * values).astype(np.uint8)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):    # there it holds 16 bits
        raise UserError(f"{path} has whole numbers of 32 bits, from {values.min()} to "
                        f"{values.max()}, of no known range: save it with 8 or 16 bits")
    return np.round(values / 257).astype(np.uint8)


class ImageFiles(Dataset):
    """Image files with labels: (uint8 image (3, H, W), label or -1).

    names: of the files, relative to root; labels: a number in range(classes) for each, or -1;
    unlabeled: why there are no labels, or "". `identity` tells sets of names apart, wherever the
    folder lies.
    """

    def __init__(self, root, names, labels, classes, unlabeled=""):
        # One array of bytes: workers would come to copy a list of strings, by counting references.
        self.root, self.names = os.fspath(root), np.array([os.fsencode(name) for name in names])
        self.labels, self.classes = torch.tensor(labels, dtype=torch.long), classes
        self.unlabeled = unlabeled
        self.identity = hashlib.sha256(self.names.tobytes()).hexdigest()[:16]

    def __len__(self):
        return len(self.names)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def __getitem__(self, index):
        return decode(self.path(index)), int(self.labels[index])
