"""Semantic segmentation: an encoder and one 1 x 1 convolution, frozen (a dense probe) or fine-tuned, as for ImageNet-S.

B batch, C channels of the encoder, K classes, (H, W) pixels, (h, w) patches
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from augment import normalize
from data import IGNORED
from distributed import world
from finetune import autocast, sum_over_processes


class Segmenter(nn.Module):
    """Images (B, 3, H, W), normalised -> logits (B, K, H / patch, W / patch). frozen: only the convolution is trained."""

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
            patches = self.encoder.norm(self.encoder(images))[:, 1:]                 # (B, h * w, C)
        return self.head(patches).mT.unflatten(-1, (h, w))


class Crops(Dataset):
    """images[i] and its mask, cut out, resized and mirrored alike: uint8 (3, size, size), (size, size)."""

    def __init__(self, images, size, scale):
        self.images = images
        self.transform = v2.Compose([v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, mask = self.images[i]
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))    # torchvision resizes masks by nearest neighbour
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def segmentation_loss(model, images, masks):
    """Cross-entropy per pixel, logits upsampled bilinearly. images: (B, 3, H, W) in [0, 1]; masks: (B, H, W), IGNORED counts nothing."""
    logits = F.interpolate(model(normalize(images)).float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum") / (masks != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def predict(model, image, size, window=None):
    """Logits (K, H, W) of a uint8 image (3, H, W) of any size, looked at with its short side resized to about `size`.

    Sides are rounded to whole patches. window: None, the image at once; else square windows of that side, a multiple of the patch size and
    at most `size`, slide over it, half overlapping, and their logits are averaged.
    """
    H, W = image.shape[-2:]
    patch, zoom = model.encoder.patch_size, size / min(H, W)
    sides = [max(window or patch, round(side * zoom / patch) * patch) for side in (H, W)]
    x = normalize(v2.functional.resize(image, sides, InterpolationMode.BICUBIC, antialias=True).float()[None] / 255)    # (1, 3, ., .)
    if window is None:
        logits = model(x).float()                                                                     # (1, K, h, w)
    else:
        n, (h, w) = window // patch, (side // patch for side in sides)
        total, times = x.new_zeros(1, model.head.out_features, h, w), x.new_zeros(1, 1, h, w)
        for top in _starts(h, n):
            for left in _starts(w, n):
                inside = (slice(None), slice(None), slice(top, top + n), slice(left, left + n))
                total[inside] += model(x[:, :, top * patch : (top + n) * patch, left * patch : (left + n) * patch]).float()
                times[inside] += 1
        logits = total / times
    return F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)[0]


def _starts(length, window):
    """Where windows begin that cover `length`, each overlapping half of the next or more."""
    return sorted({min(start, length - window) for start in range(0, length, max(1, window // 2))})


def confusion(prediction, mask, classes):
    """Pixels by (true, predicted) class, (K, K) int64. prediction, mask: (H, W); IGNORED in the mask is left out."""
    counted = mask != IGNORED
    return torch.bincount(mask[counted].long() * classes + prediction[counted], minlength=classes**2).view(classes, classes)


def scores(matrix):
    """{name: %} of a confusion matrix (K, K): mIoU and mAcc over the classes that are there, pixel accuracy, and, regardless of the class,
    F of what is not class 0 (background), with β² = 0.3 (Table 9)."""
    hits = matrix.diag().double()
    true, predicted = matrix.sum(dim=1).double(), matrix.sum(dim=0).double()
    iou = (hits / (true + predicted - hits))[true + predicted > 0]
    foreground = matrix[1:, 1:].sum().double()
    precision, recall = foreground / predicted[1:].sum().clamp(min=1), foreground / true[1:].sum().clamp(min=1)
    f = 1.3 * precision * recall / (0.3 * precision + recall).clamp(min=1e-12)
    values = {"mIoU": iou.mean(), "mAcc": (hits / true)[true > 0].mean(), "pixel_accuracy": hits.sum() / true.sum(), "foreground_F": f}
    return {name: 100 * value.item() for name, value in values.items()}


def evaluate_segmentation(model, images, size, window, device):
    """`scores` on a data set of (image, mask), each process its share."""
    rank, processes = world()
    classes = model.head.out_features
    total = torch.zeros(classes, classes, dtype=torch.long, device=device)
    for i in tqdm(range(rank, len(images), processes), desc="segmenting", disable=None if rank == 0 else True, leave=False):
        image, mask = images[i]
        with autocast(device):
            prediction = predict(model, image.to(device), size, window).argmax(dim=0)
        total += confusion(prediction, mask.to(device), classes)
    return scores(sum_over_processes(total))
