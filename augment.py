"""Views of an image, and where they came from.

Two halves. `MultiCrop` runs in the loader's workers: it draws every random number, cuts uint8 crops, and notes each
view's box, mirroring and colour parameters in one row of numbers. `Photometric` runs on the training device: it applies
those rows to a whole batch and draws nothing. The distributions are DINO's. `BlockMask` draws which patches iBOT hides.

B batch, V views, R numbers a row
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# A view's row. Its first five numbers are the box of sampler.py.
BOX = slice(0, 5)           # x0, y0, x1, y1 in fractions of the image; flipped, 0 or 1
FACTORS = slice(5, 8)       # brightness, contrast, saturation; 1 leaves as it is
HUE = 8                     # in turns, -0.5 to 0.5; 0 leaves as it is
ORDER = slice(9, 13)        # when each of brightness, contrast, saturation, hue is applied: 0 to 3
GREY = 13                   # 0 or 1
SIGMA = 14                  # of the blur, in pixels; 0 for none
SOLARIZE = 15               # 0 or 1
ROW = 16

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, as every released ViT expects

BLUR_GLOBAL_1, BLUR_GLOBAL_2, BLUR_LOCAL, SOLARIZE_GLOBAL_2 = 1.0, 0.1, 0.5, 0.2    # probabilities
JITTER, GREYSCALE = 0.8, 0.2
FACTOR_RANGES = ((1, 0.4), (1, 0.4), (1, 0.2), (0, 0.1))    # brightness, contrast, saturation, hue: the mean, and how far off at most
SIGMA_RANGE = (0.1, 2.0)
ASPECT = math.log(4 / 3)    # of crops: the logarithm of width / height lies within this


class Views(NamedTuple):
    """The views of an image, or, with a leading axis more, of a batch."""

    crops: list           # by resolution, global first: uint8 (V, 3, S, S)
    rows: torch.Tensor    # float32 (views, ROW), global views first
    mask: torch.Tensor    # bool (G, N), patches of the global views to hide from the student; or None


class BlockMask:
    """iBOT's masks: () -> bool (grid, grid), True where hidden. Rectangles, as in BEiT, until a share of the patches is covered.

    The share is one of `ratios` plus or minus up to its entry in `variances`, each as likely; it is not exceeded, and no
    further rectangle may fit below it. A rectangle's sides are in a ratio of 0.3 to 1 / 0.3, its area at least about a ninth of the grid
    as long as so much is left to cover. Draws from torch's global generator.
    """

    ASPECT = (math.log(0.3), math.log(1 / 0.3))

    def __init__(self, grid, ratios=(0.0, 0.3), variances=(0.0, 0.2)):
        self.grid, self.ratios, self.variances = grid, ratios, variances
        self.most = max(1, int(grid**2 * max(ratio + variance for ratio, variance in zip(ratios, variances))))    # patches, of a view

    def __call__(self):
        mask = np.zeros((self.grid, self.grid), dtype=bool)
        choice = int(torch.randint(len(self.ratios), ()))
        share = self.ratios[choice] + self.variances[choice] * (2 * float(torch.rand(())) - 1)
        budget = share * self.grid**2    # patches that may still be covered
        while budget > 0 and (covered := self._cover(mask, budget)):
            budget -= covered
        return torch.from_numpy(mask)

    def _cover(self, mask, budget):
        """Add one rectangle with at most `budget` patches that were not covered; their number, 0 if ten draws give none."""
        for area, aspect, y, x in torch.rand(10, 4).tolist():
            smallest = (self.grid // 3) ** 2
            area = smallest + (budget - smallest) * area
            aspect = math.exp(self.ASPECT[0] + (self.ASPECT[1] - self.ASPECT[0]) * aspect)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.grid or width >= self.grid:
                continue
            top, left = int(y * (self.grid - height + 1)), int(x * (self.grid - width + 1))
            block = mask[top : top + height, left : left + width]
            covered = block.size - int(block.sum())
            if 0 < covered <= budget:
                block[:] = True
                return covered
        return 0


class MultiCrop:
    """image uint8 (3, H, W) -> Views: two global ones, and local_crops_number local ones.

    Scales are ranges of the crop's share of the image's area. The views are a function of the seed given with each call
    and the view's number alone. mask: a BlockMask for the global views, or None.
    """

    def __init__(
        self, global_crops_size=224, global_crops_scale=(0.35, 1.0), local_crops_number=4, local_crops_size=96, local_crops_scale=(0.05, 0.35), mask=None
    ):
        self.mask = mask
        self.resolutions = [(2, global_crops_size, global_crops_scale)]
        if local_crops_number:
            self.resolutions.append((local_crops_number, local_crops_size, local_crops_scale))

    def __call__(self, image, seed):
        """seed: a tuple of non-negative integers, (seed, epoch, index)."""
        seeds = iter(np.random.SeedSequence(seed).generate_state(sum(number for number, *_ in self.resolutions), np.uint64).tolist())
        crops, rows, masks = [], [], []
        with torch.random.fork_rng(devices=[]):    # the global generator, which masks draw from too, is left as it was
            for number, size, scale in self.resolutions:
                batch = []
                for _ in range(number):
                    torch.default_generator.manual_seed(next(seeds))
                    crop, box = self._crop(image, size, scale)
                    batch.append(crop)
                    rows.append([*box, *self._photometric_row(len(rows))])
                    if self.mask and not crops:    # a global view
                        masks.append(self.mask().flatten())
                crops.append(stack_images(batch, dim=0))
        return Views(crops, torch.tensor(rows), torch.stack(masks) if masks else None)

    def _crop(self, image, size, scale):
        """A resized crop (3, size, size), mirrored half of the time, and its box, 5 numbers."""
        H, W = image.shape[-2:]
        top, left, height, width = self._place(H, W, scale)
        # As v2.functional.resized_crop; with the colours of a pixel side by side resizing takes a fifth less.
        crop = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
        crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
        flipped = float(torch.rand(())) < 0.5
        return crop.flip(-1) if flipped else crop, (left / W, top / H, (left + width) / W, (top + height) / H, float(flipped))

    def _place(self, H, W, scale):
        """Where a crop lies: (top, left, height, width) in pixels, as v2.RandomResizedCrop draws it, in a sixth of the time."""
        for area, aspect, y, x in torch.rand(10, 4).tolist():
            area = H * W * (scale[0] + (scale[1] - scale[0]) * area)
            aspect = math.exp(ASPECT * (2 * aspect - 1))
            height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < height <= H and 0 < width <= W:
                return int(y * (H - height + 1)), int(x * (W - width + 1)), height, width
        aspect = min(max(W / H, math.exp(-ASPECT)), math.exp(ASPECT))    # nothing fits: the most of the middle
        height, width = min(H, round(W / aspect)), min(W, round(H * aspect))
        return (H - height) // 2, (W - width) // 2, height, width

    def _photometric_row(self, view):
        """The numbers of a row behind its box."""
        jitter, grey, blur, sigma, solarize, *offsets = torch.rand(9).tolist()    # at once: nine draws would take nine times as long
        factors, order = (1.0, 1.0, 1.0, 0.0), (0, 1, 2, 3)
        if jitter < JITTER:
            factors = (mean + most * (2 * offset - 1) for (mean, most), offset in zip(FACTOR_RANGES, offsets))
            order = torch.randperm(4).tolist()
        blurred = blur < {0: BLUR_GLOBAL_1, 1: BLUR_GLOBAL_2}.get(view, BLUR_LOCAL)
        low, high = SIGMA_RANGE
        return *factors, *order, float(grey < GREYSCALE), (low + (high - low) * sigma) * blurred, float(view == 1 and solarize < SOLARIZE_GLOBAL_2)


def stack_images(images, dim):
    """torch.stack of (..., 3, H, W), whose colours stay side by side in memory, as decoders and resizing have them: ten times as fast."""
    return torch.stack([image.movedim(-3, -1) for image in images], dim).movedim(-1, -3)


def collate(batch):
    """Items of data.ViewsOfImages, B of them -> Views with crops (V, B, 3, S, S), rows (views, B, ROW) and mask (G, B, N) or None, view
    first as networks and losses take them; and all their complaints in one list."""
    views, complaints = zip(*batch)
    crops = [stack_images(same_resolution, dim=1) for same_resolution in zip(*(v.crops for v in views))]
    mask = torch.stack([v.mask for v in views], dim=1) if views[0].mask is not None else None
    return Views(crops, torch.stack([v.rows for v in views], dim=1), mask), sum(complaints, [])


class Photometric(nn.Module):
    """Colour jitter, grey, blur, solarize and normalisation of a batch, each image with the parameters of its own row."""

    def forward(self, images, rows):
        """images: uint8 (B, 3, H, W), rows: (B, ROW). Returns float32 (B, 3, H, W), normalised with MEAN and STD."""
        x = _jitter(images.float() / 255, rows)
        x = torch.where(_column(rows, GREY) > 0, _grey(x), x)
        x = _blur(x, rows[:, SIGMA])
        x = torch.where((_column(rows, SOLARIZE) > 0) & (x > 127.5 / 255), 1 - x, x)    # 128 of 255 and above
        return normalize(x)


def normalize(images):
    """Colours in [0, 1], float (..., 3, H, W) -> what encoders take."""
    return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]


def denormalize(images):
    """The inverse of `normalize`, for pictures."""
    return (images * images.new_tensor(STD)[:, None, None] + images.new_tensor(MEAN)[:, None, None]).clamp(0, 1)


def _column(rows, i):
    return rows[:, i, None, None, None]    # (B, 1, 1, 1)


def _grey(x):
    """Luma, (B, 1, H, W)."""
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def _jitter(x, rows):
    """torchvision's ColorJitter with factors and an order of its own for each image.

    Brightness, contrast and saturation are one operation, a blend with black, with the mean grey or with the grey image,
    so a step is a choice of what to blend with. Hue, the dear one, is computed once, between the steps before and after it.
    """
    hue_step = rows[:, ORDER][:, 3]
    before = x
    for step in range(3):
        before = _blend(before, rows, step, hue_step > step)
    x = _shift_hue(before, _column(rows, HUE))
    for step in range(1, 4):
        x = _blend(x, rows, step, hue_step < step)
    return x


def _blend(x, rows, step, active):
    """The operation whose turn is `step`, where `active` (B,); others are left as they are."""
    mine = (rows[:, ORDER][:, :3] == step) & active[:, None]                                     # (B, 3) one of the three, or none
    brightness, contrast, saturation = (m[:, None, None, None] for m in mine.unbind(dim=1))      # (B, 1, 1, 1)
    factor = torch.where(mine, rows[:, FACTORS], 1.0).prod(dim=1)[:, None, None, None]
    grey = _grey(x)
    other = torch.where(contrast, grey.mean(dim=(2, 3), keepdim=True), grey) * ~brightness
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _shift_hue(x, turns):
    """Turn the hue of RGB images by `turns` of the colour wheel, through HSV."""
    value, delta = x.amax(dim=1, keepdim=True), x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    d = delta.clamp(min=1e-8)
    hue = torch.where(value == r, (g - b) / d, torch.where(value == g, 2 + (b - r) / d, 4 + (r - g) / d)) + 6 * turns    # in sixths
    k = (hue + hue.new_tensor([5.0, 3.0, 1.0])[:, None, None]) % 6    # (B, 3, H, W) for red, green, blue
    return value - delta * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x, sigma):
    """Gaussian blur, an image its own sigma (B,) in pixels, as two products with (size x size) matrices; 0 leaves an image as it is.

    At the border the weights inside the image are renormalised.
    """
    def matrix(size):
        i = torch.arange(size, device=x.device)
        d = (i[:, None] - i) / sigma.clamp(min=1e-2)[:, None, None]    # at 0.01 pixels all weight is on the pixel itself
        weights = (-0.5 * d.square()).exp()                            # (B, size, size)
        return (weights / weights.sum(dim=-1, keepdim=True))[:, None]

    return matrix(x.shape[-2]) @ x @ matrix(x.shape[-1]).mT
