"""Views of an image (τ₁, τ₂ of Sec. 3.1), and where in the image they came from.

`MultiCrop` runs in the loader's workers: it draws every random number, cuts uint8 crops, and writes
down for each where it lies, whether it is flipped, and how its colors change (`params`).
`Photometric` runs on the training device: it applies params to a whole batch and draws nothing.
The distributions are DINO's. `BlockMask` draws which patches iBOT hides.

B batch, V views, G global views, S side of a view, N patches
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# The columns of `params`, a row a view. The first five are the box of sampler.py.
BOX = slice(0, 5)           # x0, y0, x1, y1 in fractions of the image; flipped, 0 or 1
FACTORS = slice(5, 8)       # brightness, contrast, saturation; 1 leaves as it is
HUE = 8                     # in turns, -0.5 to 0.5; 0 leaves as it is
ORDER = slice(9, 13)        # when brightness, contrast, saturation, hue are applied: 0 to 3
GRAY = 13                   # 0 or 1
SIGMA = 14                  # of the blur, in pixels; 0 for none
SOLARIZE = 15               # 0 or 1

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, as released ViTs expect

# How likely, for the first global, the second global and a local view, and how far.
BLUR, SOLARIZED = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)
JITTER, GRAYSCALE = 0.8, 0.2
BRIGHTNESS, CONTRAST, SATURATION, HUE_TURNS = 0.4, 0.4, 0.2, 0.1
SIGMAS = (0.1, 2.0)
ASPECT = math.log(4 / 3)    # log of width / height of a crop, at most


class Views(NamedTuple):
    """The views of an image; of a batch, with an axis B before all others."""

    crops: list           # by resolution, global first: uint8 (V, S, S, 3)
    params: torch.Tensor    # float32 (views, 16), global first
    mask: torch.Tensor    # bool (G, N): global views' patches to hide from the student; or (G, 0)


class MultiCrop:
    """Cut an image into two global views and any number of local ones.

    Scales are ranges of a crop's share of the image's area. mask: a BlockMask, or None.
    """

    def __init__(
        self, global_crops_size=224, global_crops_scale=(0.35, 1.0),
        local_crops_number=4, local_crops_size=96, local_crops_scale=(0.05, 0.35), mask=None,
    ):
        self.views = [(global_crops_size, global_crops_scale)] * 2
        self.views += [(local_crops_size, local_crops_scale)] * local_crops_number
        self.mask = mask

    def __call__(self, image, key):
        """Return the Views of an image, uint8 (3, H, W).

        They are a function of the key and a view's number alone. key: a tuple of non-negative
        integers, (seed, epoch, index).
        """
        crops, params, masks = [], [], []
        for view, (size, scale) in enumerate(self.views):
            rng = np.random.default_rng((*key, view))
            crop, box = random_crop(rng, image, size, scale)
            crops.append(crop)
            params.append([*box, *random_colors(rng, min(view, 2))])
            if view < 2:
                masks.append(self.mask(rng).flatten() if self.mask else torch.zeros(0).bool())
        crops = [torch.stack(part) for part in (crops[:2], crops[2:]) if part]
        return Views(crops, torch.tensor(params, dtype=torch.float32), torch.stack(masks))


def random_crop(rng, image, size, scale):
    """Cut a crop, flipped half of the time; return uint8 (S, S, 3) and its box."""
    H, W = image.shape[-2:]
    top, left, height, width = random_place(rng, H, W, scale)
    # With the colors of a pixel side by side, resizing takes two thirds of the time.
    crop = image[None, :, top : top + height, left : left + width]
    crop = crop.contiguous(memory_format=torch.channels_last)
    crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0].movedim(0, -1)
    flipped = rng.random() < 0.5
    box = (left / W, top / H, (left + width) / W, (top + height) / H, float(flipped))
    return (crop.flip(1) if flipped else crop), box


def random_place(rng, H, W, scale):
    """Draw (top, left, height, width) in pixels as torchvision's RandomResizedCrop."""
    for _ in range(10):
        area, aspect = H * W * rng.uniform(*scale), math.exp(rng.uniform(-ASPECT, ASPECT))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= H and 0 < width <= W:
            return rng.integers(H - height + 1), rng.integers(W - width + 1), height, width
    aspect = min(max(W / H, math.exp(-ASPECT)), math.exp(ASPECT))    # nothing fits: the center
    height, width = min(H, round(W / aspect)), min(W, round(H * aspect))
    return (H - height) // 2, (W - width) // 2, height, width


def random_colors(rng, view):
    """Draw the params of a view behind its box. view: 0, 1, or 2 for any local view."""
    factors, hue, order = np.ones(3), 0.0, np.arange(4)
    if rng.random() < JITTER:
        factors = 1 + rng.uniform(-1, 1, 3) * (BRIGHTNESS, CONTRAST, SATURATION)
        hue, order = rng.uniform(-HUE_TURNS, HUE_TURNS), rng.permutation(4)
    gray = rng.random() < GRAYSCALE
    sigma = rng.uniform(*SIGMAS) * (rng.random() < BLUR[view])
    return *factors, hue, *order, gray, sigma, rng.random() < SOLARIZED[view]


class BlockMask:
    """Draw iBOT's masks: rectangles, until a share of the patches is hidden.

    The share is one of `ratios` plus or minus up to its entry in `variances`, each as likely; it is
    not exceeded. A rectangle's sides are in a ratio of 0.3 to 1 / 0.3, its area is drawn between
    (grid // 3)² patches and what is left to hide.
    """

    def __init__(self, grid, ratios=(0.0, 0.3), variances=(0.0, 0.2)):
        self.grid, self.ratios, self.variances = grid, ratios, variances
        largest = max(ratio + variance for ratio, variance in zip(ratios, variances))
        self.most = max(1, int(grid**2 * largest))    # patches hidden in a view

    def __call__(self, rng):
        """Return bool (grid, grid), True where hidden."""
        mask, choice = np.zeros((self.grid, self.grid), dtype=bool), rng.integers(len(self.ratios))
        share = self.ratios[choice] + self.variances[choice] * rng.uniform(-1, 1)
        budget = share * self.grid**2    # patches that may still be hidden
        while budget > 0 and (covered := self.cover(rng, mask, budget)):
            budget -= covered
        return torch.from_numpy(mask)

    def cover(self, rng, mask, budget):
        """Hide one more rectangle; return the patches added, 0 if ten draws do not fit."""
        smallest = (self.grid // 3) ** 2
        for _ in range(10):
            area = smallest + (budget - smallest) * rng.random()
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.grid or width >= self.grid:
                continue
            top, left = rng.integers(self.grid - height + 1), rng.integers(self.grid - width + 1)
            block = mask[top : top + height, left : left + width]
            covered = block.size - int(block.sum())
            if 0 < covered <= budget:
                block[:] = True
                return covered
        return 0


# --- on the training device -----------------------------------------------------------------------


class Photometric(nn.Module):
    """Jitter, gray, blur, solarize and normalize images, each by its own params."""

    def forward(self, images, params):
        """Color uint8 (B, S, S, 3) by params (B, 16): float32 (B, 3, S, S), normalized."""
        x = images.movedim(-1, 1).float() / 255
        x = jitter(x, params)
        x = torch.where(per_image(params[:, GRAY]) > 0, gray(x), x)
        x = blur(x, params[:, SIGMA])
        x = torch.where((per_image(params[:, SOLARIZE]) > 0) & (x > 127.5 / 255), 1 - x, x)
        return normalize(x)


def normalize(images):
    """Turn colors in [0, 1], float (..., 3, H, W), into what encoders take."""
    return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]


def denormalize(images):
    """Invert `normalize`, for pictures."""
    images = images * images.new_tensor(STD)[:, None, None] + images.new_tensor(MEAN)[:, None, None]
    return images.clamp(0, 1)


def per_image(values):
    return values[:, None, None, None]    # (B,) -> (B, 1, 1, 1)


def gray(x):
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]    # (B, 1, H, W)


def jitter(x, params):
    """Apply torchvision's ColorJitter, each image with its own factors and order.

    The hue shift is the expensive step, so compute it once, between the steps before and after it.
    """
    hue_step = params[:, ORDER][:, 3]
    for step in range(3):
        x = blend(x, params, step, hue_step > step)
    x = shift_hue(x, per_image(params[:, HUE]))
    for step in range(1, 4):
        x = blend(x, params, step, hue_step < step)
    return x


def blend(x, params, step, active):
    """Apply brightness, contrast or saturation, whichever an image has at `step`.

    Each is a blend: with black, with the mean gray, with the gray image. active: (B,), False for
    images to leave alone.
    """
    now = (params[:, ORDER][:, :3] == step) & active[:, None]               # (B, 3), one or none
    brightness, contrast, _ = (per_image(column) for column in now.unbind(dim=1))
    factor = per_image(torch.where(now, params[:, FACTORS], 1.0).prod(dim=1))
    other = gray(x)
    other = torch.where(contrast, other.mean(dim=(2, 3), keepdim=True), other) * ~brightness
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def shift_hue(x, turns):
    """Turn the hue of RGB images by `turns` of the color wheel, through HSV."""
    value = x.amax(dim=1, keepdim=True)
    delta = value - x.amin(dim=1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    d = delta.clamp(min=1e-8)
    hue = torch.where(value == g, 2 + (b - r) / d, 4 + (r - g) / d)         # in sixths of a turn
    hue = torch.where(value == r, (g - b) / d, hue) + 6 * turns
    k = (hue + hue.new_tensor([5.0, 3.0, 1.0])[:, None, None]) % 6          # red, green, blue
    return value - delta * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(x, sigma):
    """Blur each image by a Gaussian of its own sigma (B,), in pixels; 0 for none.

    As two products with (S, S) matrices. At the border the weights inside are renormalized.
    """
    i = torch.arange(x.shape[-1], device=x.device)
    distance = (i[:, None] - i) / sigma.clamp(min=1e-2)[:, None, None]      # (B, S, S)
    matrix = (-0.5 * distance.square()).softmax(dim=-1)[:, None]
    return matrix @ x @ matrix.mT
