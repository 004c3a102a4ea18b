"""Semantic segmentation by a 1 x 1 convolution: `evaluate.py segment`.

Frozen it is a dense probe; fine-tuned it is the paper's ImageNet-S protocol.

B batch, C channels of the encoder, K classes, (H, W) pixels, (h, w) patches
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from augment import normalize
from data import decode
from extras.finetune import fit_encoder
from support.distributed import sum_over_processes, world
from support.errors import UserError
from support.fit import Augmented, TrainingBatches, resumable
from support.inputs import autocast
from support.named_sets import DOWNLOADS, Shapes

# --- images with masks ----------------------------------------------------------------------------

IGNORED = 255    # in a mask: counts neither in training nor in a measure


def build_segmentation(path, split, ignore_index=IGNORED):
    """Return images and masks of class indices at `path`.

    path: "shapes" (which kind), "voc" (Pascal VOC 2012), or a folder with <split>/images/ and
    <split>/masks/, whose files have the same names but for the ending. ignore_index: what the masks
    call a pixel that does not count; here it becomes IGNORED. The data set has `classes`, their
    number, or None where it is not known without reading every mask. Raises UserError.
    """
    path = str(path)
    if path == "shapes":
        return ShapesWithMasks(split)
    if path == "voc":
        try:
            downloaded = (Path(DOWNLOADS) / "VOCdevkit").is_dir()
            voc = datasets.VOCSegmentation(DOWNLOADS, image_set=split, download=not downloaded)
        except (OSError, RuntimeError) as error:
            where = f"voc is not in {DOWNLOADS}/ and could not be downloaded"
            raise UserError(f"{where}: {error}") from error
        return ImagesWithMasks(voc.images, voc.masks, ignore_index=IGNORED, classes=21)
    folders = [Path(path) / split / part for part in ("images", "masks")]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{path} is neither shapes nor voc, nor has it a folder "
                            f"{split}/{folder.name}")
    images, masks = ({file.stem: file for file in sorted(folder.iterdir())
                      if file.name.lower().endswith(IMG_EXTENSIONS)} for folder in folders)
    if not images:
        raise UserError(f"no images in {folders[0]}")
    if missing := [str(file) for stem, file in images.items() if stem not in masks]:
        others = f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} has no mask in {folders[1]}{others}")
    masks = [masks[stem] for stem in images]
    return ImagesWithMasks(list(images.values()), masks, ignore_index, classes=None)


class ImagesWithMasks(Dataset):
    """Files of images and of their masks, one channel or a palette of class indices.

    Raises UserError, naming the file, for others.
    """

    def __init__(self, images, masks, ignore_index, classes):
        self.images, self.masks, self.ignore_index = images, masks, ignore_index
        self.classes = classes

    def __len__(self):
        return len(self.images)

    def mask(self, index):
        """Read a mask as uint8 (H, W)."""
        path = self.masks[index]
        try:
            with Image.open(path) as file:
                mask, mode = torch.from_numpy(np.array(file)), file.mode
        except Exception as error:    # as in data.decode
            raise UserError(f"{path} can't be read as a mask: {error}") from error
        if mask.ndim != 2 or mask.dtype != torch.uint8:
            raise UserError(f"{path} is no mask of class indices: it is {mode}, not one channel of "
                            "8 bits (L) or a palette (P)")
        mask[mask == self.ignore_index] = IGNORED
        largest = largest_class(mask)
        if self.classes and largest >= self.classes:
            raise UserError(f"{path} has class {largest}, but there are {self.classes} classes, "
                            "from 0; is it the --ignore_index?")
        return mask

    def __getitem__(self, index):
        image, mask = decode(self.images[index]), self.mask(index)
        if image.shape[1:] != mask.shape:
            raise UserError(f"{self.images[index]} and its mask {self.masks[index]} differ in size")
        return image, mask


class ShapesWithMasks(Shapes):
    """Shapes with masks in place of labels: 0 the ground, 1 to 10 a kind."""

    def __init__(self, split):
        super().__init__(split)
        self.classes += 1

    def mask(self, index):
        return self.draw(index)[1].to(torch.uint8)

    def __getitem__(self, index):
        image, mask = self.draw(index)
        return image, mask.to(torch.uint8)


def largest_class(mask):
    return int(torch.where(mask == IGNORED, 0, mask).max())


def count_classes(images):
    """Return 1 + the largest class in the masks of a data set of build_segmentation."""
    return images.classes or 1 + max(largest_class(images.mask(i)) for i in range(len(images)))


# --- network, loss, prediction --------------------------------------------------------------------


class Segmenter(nn.Module):
    """Images (B, 3, H, W), normalized -> logits (B, K, h, w).

    frozen: train the head only.
    """

    def __init__(self, encoder, classes, frozen):
        super().__init__()
        self.encoder, self.frozen = encoder.requires_grad_(not frozen), frozen
        self.head = nn.Linear(encoder.dim, classes)    # of each patch: a 1 x 1 convolution
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()    # no stochastic depth, no batch statistics
        return self

    def forward(self, images):
        h, w = (side // self.encoder.patch_size for side in images.shape[-2:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            patches = self.encoder.norm(self.encoder(images))[:, 1:]    # (B, h * w, C)
        return self.head(patches).mT.unflatten(-1, (h, w))


class CropBoth:
    """Cut, resize and flip an image and its mask alike, to size x size."""

    def __init__(self, size, scale):
        crop = v2.RandomResizedCrop(
            size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __call__(self, image, mask):
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def upsample(logits, size):
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def segmentation_loss(model, images, masks):
    """Compute cross-entropy per pixel: images (B, 3, H, W) in [0, 1], masks (B, H, W)."""
    logits = upsample(model(normalize(images)), masks.shape[-2:])
    losses = F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum")
    return losses / (masks != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def predict(model, image, size, window=None):
    """Return logits (K, H, W) of a uint8 image (3, H, W).

    Its short side is resized to about `size`. Sides are rounded to whole patches. window: None, the
    image at once; else square windows of that side, a multiple of the patch size and at most
    `size`, slide over it, half overlapping, and their logits are averaged.
    """
    H, W = image.shape[-2:]
    patch, zoom = model.encoder.patch_size, size / min(H, W)
    sides = [max(window or patch, round(side * zoom / patch) * patch) for side in (H, W)]
    x = v2.functional.resize(image, sides, InterpolationMode.BICUBIC, antialias=True)
    x = normalize(x.float()[None] / 255)                                 # (1, 3, ., .)
    if window is None:
        return upsample(model(x), (H, W))[0]
    n, (h, w) = window // patch, (side // patch for side in sides)
    total, times = x.new_zeros(1, model.head.out_features, h, w), x.new_zeros(1, 1, h, w)
    for top in starts(h, n):
        for left in starts(w, n):
            inside = (..., slice(top, top + n), slice(left, left + n))
            rows = slice(top * patch, (top + n) * patch)
            total[inside] += model(x[..., rows, left * patch : (left + n) * patch]).float()
            times[inside] += 1
    return upsample(total / times, (H, W))[0]


def starts(length, window):
    """Return where windows begin that cover `length`, overlapping by half or more."""
    return sorted({min(i, length - window) for i in range(0, length, max(1, window // 2))})


# --- measures -------------------------------------------------------------------------------------


def confusion(prediction, mask, classes):
    """Count pixels by (true, predicted) class, but IGNORED ones: (K, K) int64."""
    counted = mask != IGNORED
    pairs = mask[counted].long() * classes + prediction[counted]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores(matrix):
    """Return {name: %} of a confusion matrix (K, K).

    mIoU and mAcc are over the classes that are there. foreground_F: F of what is not class 0, the
    background, regardless of the class, with β² = 0.3 (Table 9).
    """
    hits = matrix.diag().double()
    true, predicted = matrix.sum(dim=1).double(), matrix.sum(dim=0).double()
    iou = (hits / (true + predicted - hits))[true + predicted > 0]
    foreground = matrix[1:, 1:].sum().double()
    precision = foreground / predicted[1:].sum().clamp(min=1)
    recall = foreground / true[1:].sum().clamp(min=1)
    f = 1.3 * precision * recall / (0.3 * precision + recall).clamp(min=1e-12)
    values = {"mIoU": iou.mean(), "mAcc": (hits / true)[true > 0].mean(),
              "pixel_accuracy": hits.sum() / true.sum(), "foreground_F": f}
    return {name: 100 * value.item() for name, value in values.items()}


def evaluate_segmentation(model, images, size, window, device):
    """Return the `scores` on a data set of (image, mask), each process its share."""
    rank, processes = world()
    classes = model.head.out_features
    total = torch.zeros(classes, classes, dtype=torch.long, device=device)
    mine = range(rank, len(images), processes)
    for i in tqdm(mine, desc="segmenting", disable=None if rank == 0 else True, leave=False):
        image, mask = images[i]
        with autocast(device):
            prediction = predict(model, image.to(device), size, window).argmax(dim=0)
        total += confusion(prediction, mask.to(device), classes)
    return scores(sum_over_processes(total))


def run(args, encoder, size, processes):
    """Train a segmentation and measure it, for evaluate.py."""
    train, val = (build_segmentation(args.data_path, split, args.ignore_index)
                  for split in ("train", args.val_split))
    classes = train.classes = val.classes = args.classes or count_classes(train)
    args.lr = args.lr or (0.01 if args.frozen else 5e-4)
    patch, device = encoder.patch_size, processes.device
    test_size = max(1, round((args.test_size or size * 256 / 224) / patch)) * patch
    if args.sliding and test_size < size:
        raise UserError(f"--sliding: windows of {size} do not fit into --test_size {test_size}")
    torch.manual_seed(args.seed)
    model = Segmenter(encoder, classes, args.frozen).to(device)
    indices = list(range(len(train)))
    images = Augmented(train, indices, CropBoth(size, args.scale), args.seed)
    batches = TrainingBatches(images, args.batch_size_per_gpu, args.num_workers, device)
    path, arguments = resumable(args, encoder, size, indices)
    processes.working = True
    fit_encoder(model, segmentation_loss, batches, args, device, path, arguments)
    window = size if args.sliding else None
    result = evaluate_segmentation(model, val, test_size, window, device)
    how = "frozen" if args.frozen else f"fine-tuned, layer decay {args.layer_decay}"
    batch = batches.batch_size * processes.size
    processes.say(f"segment, {how}, {len(train)} training images of {args.data_path} at {size} px, "
                  f"{args.epochs} epochs, batch {batch}, lr {args.lr:g} per 256, final epoch")
    windows = f", windows of {size}" if args.sliding else ""
    processes.say(f"{len(val)} images of {args.val_split}, short side {test_size}{windows}, "
                  f"{classes} classes")
    processes.say("  ".join(f"{name} {value:.1f} %" for name, value in result.items()))
    return {"images": len(train), "classes": classes, "test_size": test_size} | result
