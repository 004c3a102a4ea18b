"""Read and draw images with masks of class numbers, for segmentation.

In this program a mask is int32 (H, W): a class, from 0, or IGNORED, which counts neither in
training nor in a measure. In a file it is coded as its data set has it.

K classes, (H, W) pixels
"""

import colorsys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image

from support.distributed import world
from support.errors import UserError
from support.files import decode, opened, walk
from support.named_sets import DOWNLOADS, SHAPES, Shapes
from support.progress import progress

IGNORED = -1
IMAGENET_S = {"50": 51, "300": 301, "919": 920}    # classes, "other" among them
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
               "dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()

NAMED_SPLITS = {
    "shapes": list(Shapes.LENGTH), "shapes-tuning": list(Shapes.LENGTH),
    "voc": ["train", "trainval", "val"],
}

# --- data sets ------------------------------------------------------------------------------------


def build_segmentation(path, split, ignore_index=None):
    """Return the images and masks of a split at `path`.

    split: "train", "val", or another folder. path: "shapes", "voc" (Pascal VOC 2012, with SBD's
    images where they are there), a folder of ImageNet-S or ADE20K, known by its layout, or a folder
    with <split>/images/ and <split>/masks/, whose files have the same names but for the ending.
    ignore_index: what masks of the last kind call a pixel that does not count; if None 255 in 8
    bits. Raises UserError.
    """
    path = str(path)
    if path in NAMED_SPLITS:
        if split not in NAMED_SPLITS[path]:
            raise UserError(f"{path} has no split {split}: {', '.join(NAMED_SPLITS[path])}")
        return voc(split) if path == "voc" else ShapesWithMasks(split, path)
    root = Path(path)
    if (root / "train-semi-segmentation").is_dir():
        return imagenet_s(root, {"train": "train-semi", "val": "validation"}.get(split, split))
    for ade20k in (root, root / "ADEChallengeData2016"):
        if (ade20k / "annotations/training").is_dir():
            split = {"train": "training", "val": "validation"}.get(split, split)
            pairs = paired(ade20k / "images" / split, ade20k / "annotations" / split)
            return ImagesWithMasks(*pairs, "ade20k", ignored=0, first=1, classes=150)
    for folder in (root / split / part for part in ("images", "masks")):
        if not folder.is_dir():
            raise UserError(f"{path} is neither shapes nor voc, has not the layout of ImageNet-S "
                            f"or ADE20K, and has no folder {split}/{folder.name}")
    pairs = paired(root / split / "images", root / split / "masks")
    return ImagesWithMasks(*pairs, "folder", ignored=ignore_index)


def voc(split):
    """Return Pascal VOC 2012, with SBD's training images if they are there."""
    images, masks = voc_files(split)
    sbd = Path(DOWNLOADS) / "sbd"    # as torchvision's SBDataset leaves it
    if split == "train" and sbd.is_dir():
        published = {Path(image).stem for image in images + voc_files("val")[0]}
        try:
            listed = [name for part in ("train", "val")
                      for name in (sbd / f"{part}.txt").read_text().split()]
        except OSError as error:
            raise UserError(f"{sbd}/ needs img/, cls/, train.txt and val.txt: {error}") from error
        added = [name for name in listed if name not in published]    # 10 582 images in all
        images += [str(sbd / "img" / f"{name}.jpg") for name in added]
        masks += [str(sbd / "cls" / f"{name}.mat") for name in added]
    names = [Path(image).stem for image in images]
    return ImagesWithMasks(names, images, masks, "voc", ignored=255, classes=21)


def voc_files(split):
    """Return the images and masks of VOC 2012 itself, downloaded on first use."""
    try:
        downloaded = (Path(DOWNLOADS) / "VOCdevkit/VOC2012").is_dir()
        files = datasets.VOCSegmentation(DOWNLOADS, image_set=split, download=not downloaded)
    except (OSError, RuntimeError) as error:
        where = f"voc is not in {DOWNLOADS}/ and could not be downloaded"
        raise UserError(f"{where}: {error}") from error
    return list(files.images), list(files.masks)


def imagenet_s(root, split):
    """Return a split of ImageNet-S.

    The masks of the test images are withheld.
    """
    names = (root.absolute().name, root.resolve().name)    # of a link, and of its folder
    sizes = [name.lower().replace("-", "").rpartition("imagenets")[2] for name in names]
    if not (root / split).is_dir():
        raise UserError(f"{root} has no folder {split}")
    masks = root / f"{split}-segmentation"
    names, images, masks = paired(root / split, masks if masks.is_dir() else None)
    return ImagesWithMasks(names, images, masks, "imagenet-s", ignored=1000, rgb=True,
                           classes=IMAGENET_S.get(sizes[0]) or IMAGENET_S.get(sizes[1]))


def paired(images, masks):
    """Return names, images and masks of two folders, which have the same names.

    masks: None where there are none. Raises UserError for an image without a mask.
    """
    images = files_below(images)
    if masks is None:
        return list(images), list(images.values()), None
    found = files_below(masks)
    if missing := [str(file) for name, file in images.items() if name not in found]:
        others = f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} has no mask in {masks}{others}")
    return list(images), list(images.values()), [found[name] for name in images]


def files_below(root):
    """Return {path below root, without its ending: file} of all images there, sorted."""
    found = {}
    for folder in walk(root):
        for name in folder.images:
            file = Path(folder.path, name)
            key = "/".join((*folder.parts, file.stem))
            if key in found:
                raise UserError(f"{found[key]} and {file} differ in their ending alone")
            found[key] = file
    if not found:
        raise UserError(f"no images in {root}")
    return dict(sorted(found.items()))


class ImagesWithMasks(Dataset):
    """(uint8 image (3, H, W), mask), from files.

    masks: None where they are withheld: all is IGNORED then. layout: which kind of data set it is.
    In a mask's file `ignored` does not count (None: 255 in 8 bits; for 16 it has to be told), and
    class 0 is called `first`. rgb: the number is R + 256 G, as in ImageNet-S; else there is one
    channel of 8 or 16 bits, or a palette. classes: K, or None where the data set does not say.
    Raises UserError, naming the file, for a mask that is not so.
    """

    def __init__(self, names, images, masks, layout, ignored=None, first=0, rgb=False,
                 classes=None):
        self.names, self.images, self.masks, self.layout = names, images, masks, layout
        self.ignored, self.first, self.rgb, self.classes = ignored, first, rgb, classes
        self.class_names = VOC_CLASSES if layout == "voc" else None
        self.has_masks = masks is not None

    def __len__(self):
        return len(self.images)

    def numbers(self, index):
        """Read a mask as it is coded: int32 (H, W)."""
        path = str(self.masks[index])
        pixels, mode = read_pixels(path)
        if self.rgb:
            if mode != "RGB":
                raise UserError(f"{path} is {mode}, not RGB with class R + 256 G, as ImageNet-S's")
            pixels = pixels.astype(np.int32)
            pixels = pixels[..., 0] + 256 * pixels[..., 1]
        elif pixels.ndim != 2 or pixels.dtype.kind not in "uib":
            raise UserError(f"{path} is {mode}, not one class number a pixel: save masks as gray "
                            "or palette PNGs, of 16 bits for more than 256 classes. Numbers coded "
                            "R + 256 G are read in ImageNet-S's layout alone (train-semi/, "
                            "train-semi-segmentation/, ...)")
        elif self.ignored is None and pixels.dtype.itemsize > 1:
            raise UserError(f"{path} has 16 bits a pixel: say with --ignore_index which number "
                            "does not count, -1 for none")
        return torch.from_numpy(pixels.astype(np.int32))

    def mask(self, index):
        """Read a mask: int32 (H, W) of classes and IGNORED."""
        numbers = self.numbers(index)
        ignored = 255 if self.ignored is None else self.ignored
        mask = torch.where(numbers == ignored, IGNORED, numbers - self.first)
        largest = int(mask.max())
        if self.classes and largest >= self.classes:
            raise UserError(f"{self.masks[index]} has class {largest}, but there are "
                            f"{self.classes} classes, from 0: see --classes and --ignore_index")
        return mask

    def __getitem__(self, index):
        image = decode(self.images[index], upright=False)
        if not self.has_masks:
            return image, torch.full(image.shape[1:], IGNORED, dtype=torch.int32)
        mask = self.mask(index)
        if image.shape[1:] != mask.shape:
            raise UserError(f"{self.images[index]}, as it is stored, and its mask "
                            f"{self.masks[index]} differ in size")
        return image, mask

    def write(self, index, prediction, folder):
        """Write predicted classes (H, W) to <folder>/<name>.png, coded as the masks are."""
        numbers = prediction.cpu().numpy().astype(np.int32) + self.first
        if self.rgb:
            numbers = np.stack([numbers % 256, numbers // 256, 0 * numbers], axis=2)
        bits = np.uint8 if numbers.max() < 256 else np.uint16
        path = Path(folder, f"{self.names[index]}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.astype(bits)).save(path)


def read_pixels(path):
    """Read a file of class numbers: (an array, the file's mode).

    Raises UserError naming the file.
    """
    if not path.endswith(".mat"):
        with opened(path) as file:
            return np.array(file), file.mode
    try:    # SBD's
        from scipy.io import loadmat
        return loadmat(path)["GTcls"][0]["Segmentation"][0], "MATLAB"
    except ImportError as error:
        raise UserError(f"{path} is read by SciPy: pip install scipy") from error
    except Exception as error:    # SciPy raises all kinds
        raise UserError(f"{path} can't be read as a mask: {error}") from error


class ShapesWithMasks(Shapes):
    """Shapes with masks in place of labels: 0 is the ground, 1 + k is paper of kind k."""

    def __init__(self, split, name):
        super().__init__(split, name)
        self.layout, self.has_masks = "shapes", True
        self.classes, self.class_names = 1 + len(SHAPES), ["ground", *SHAPES]
        self.names = [str(i) for i in range(len(self))]

    def __getitem__(self, index):
        return self.draw(index)

    def write(self, index, prediction, folder):
        """Write predicted classes (H, W) to <folder>/<index>.png."""
        numbers = prediction.cpu().numpy().astype(np.uint8)
        Image.fromarray(numbers).save(Path(folder, f"{index}.png"))


def count_classes(images, classes=None):
    """Return the number of classes of a data set, or check the number given.

    Where the data set does not say it, all masks are read, and without `classes` they have to hold
    0 to K - 1. Raises UserError for one class alone, or none, showing the numbers found.
    """
    if images.layout != "folder":
        if not (classes or images.classes):
            raise UserError("how many classes are there? The folder's name ends in none of "
                            "ImageNetS50, ImageNetS300, ImageNetS919: give --classes, with other")
        return classes or images.classes
    found = set()
    for i in progress(range(len(images)), "reading masks", world()[0] == 0):
        found.update(images.numbers(i).unique().tolist())
    ignored = 255 if images.ignored is None else images.ignored
    counted = sorted(found - {ignored})
    where = Path(images.masks[0]).parent
    hold = f"the masks in {where} hold the numbers {shortened(sorted(found))}"
    if ignored in found:
        hold += f", of which {ignored} does not count (--ignore_index)"
    if len(counted) < 2:
        raise UserError(f"{hold}: {'one class' if counted else 'nothing'} to tell apart. Masks of "
                        "0 and 255 want 0 and 1 in their place")
    if classes and not 0 <= counted[0] <= counted[-1] < classes:
        raise UserError(f"{hold}; --classes {classes} wants 0 to {classes - 1}")
    if not classes and counted != list(range(len(counted))):
        raise UserError(f"{hold}, not 0 to K - 1. Renumber them; or name a number that does not "
                        f"count with --ignore_index; or, if the others are only absent, give "
                        f"--classes {counted[-1] + 1}")
    return classes or len(counted)


def shortened(numbers, most=12):
    """List numbers, the middle of many left out."""
    texts = [str(number) for number in numbers]
    half = most // 2
    return ", ".join(texts if len(texts) <= most else [*texts[:half], "...", *texts[-half:]])


# --- pictures -------------------------------------------------------------------------------------


def color(number):
    """Return the color of a class, (R, G, B): black for 0, then around the color wheel."""
    if number == IGNORED:
        return 160, 160, 160
    if number == 0:
        return 0, 0, 0
    hue = 0.618 * number % 1    # neighbors in number are far apart in hue
    value, saturation = ((1.0, 0.9), (0.6, 0.9), (1.0, 0.45))[number % 3]
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value))


def paint(mask):
    """Turn a mask (H, W) into an image of its classes' colors."""
    numbers, where = mask.cpu().unique(return_inverse=True)
    table = np.array([color(int(number)) for number in numbers], dtype=np.uint8)
    return Image.fromarray(table[where.numpy()])


def draw_masks(rows, class_names, path, height=160, most=30):
    """Draw images beside truth and prediction, with a legend of colors.

    rows: (uint8 image (3, H, W), mask, predicted classes (H, W)). class_names: None for numbers.
    most: classes that are named, those with most pixels.
    """
    margin, line, font = 8, 20, ImageFont.load_default(size=14)
    pictures = [[to_pil_image(image), paint(mask), paint(prediction)]
                for image, mask, prediction in rows]
    width = max(round(height * row[0].width / row[0].height) for row in pictures)
    pixels = torch.cat([mask.flatten() for _, *masks in rows for mask in masks])
    present, counts = pixels.unique(return_counts=True)
    shown = sorted(present[counts.argsort(descending=True)[:most]].tolist())
    entries = [(k, "ignored" if k == IGNORED else class_names[k] if class_names else f"class {k}")
               for k in shown]
    columns = max(1, 3 * (width + margin) // 120)
    legend = -(-len(entries) // columns) * line
    size = (3 * (width + margin) + margin, line + len(rows) * (height + margin) + legend + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(("image", "truth", "prediction")):
        x = margin + j * (width + margin)
        draw.text((x, 1), title, fill="black", font=font)
        for i, row in enumerate(pictures):
            shape = (round(height * row[j].width / row[j].height), height)
            how = Image.Resampling.NEAREST if j else Image.Resampling.BILINEAR
            sheet.paste(row[j].resize(shape, how), (x, line + i * (height + margin)))
    top = line + len(rows) * (height + margin)
    for i, (k, name) in enumerate(entries):
        x, y = margin + i % columns * 120, top + i // columns * line
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=color(k))
        draw.text((x + 20, y), name, fill="black", font=font)
    sheet.save(path)
