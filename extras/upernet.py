"""UperNet, the segmentation head of Tables 2 and 7 to 16, and how it is trained.

As iBOT does it on a plain ViT. B batch, K classes, (H, W) pixels
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from augment import MEAN
from extras.masks import IGNORED
from extras.pyramid import FeaturePyramid, four_maps
from extras.resnet import BatchNorm2d


def upsample(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def convolution(inputs, outputs, side):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False),
        BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )


def classifier(channels, classes):
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, kernel_size=1))


class PyramidPooling(nn.Module):
    """Add to a map (B, C, h, w) what it is like around: (B, channels, h, w).

    That is, its means over a grid of 1, 2, 3 and 6 cells a side.
    """

    def __init__(self, dim, channels, sides=(1, 2, 3, 6)):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), convolution(dim, channels, 1))
            for side in sides)
        self.merge = convolution(dim + len(sides) * channels, channels, 3)

    def forward(self, x):
        pooled = [upsample(pool(x), x.shape[-2:]) for pool in self.pools]
        return self.merge(torch.cat([x, *pooled], dim=1))


class UperNet(nn.Module):
    """Four maps of `four_maps` -> [logits, auxiliary logits], both (B, K, H, W) after size=(H, W).

    The auxiliary logits, from the third map alone, only help training.
    """

    def __init__(self, encoder, classes):
        super().__init__()
        channels = encoder.dim if encoder.heads else 512
        self.pyramid = FeaturePyramid(encoder)
        *lower, last = self.pyramid.dims
        self.pooling = PyramidPooling(last, channels)
        self.laterals = nn.ModuleList(convolution(dim, channels, 1) for dim in lower)
        self.outputs = nn.ModuleList(convolution(channels, channels, 3) for _ in lower)
        self.fuse = convolution(4 * channels, channels, 3)
        self.classify = classifier(channels, classes)
        self.auxiliary = nn.Sequential(convolution(lower[2], 256, 3), classifier(256, classes))

    def features(self, encoder, images):
        return four_maps(encoder, images)

    def forward(self, maps, size):
        maps = self.pyramid(maps)
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps)] + [self.pooling(maps[3])]
        for i in (2, 1, 0):    # top-down
            merged[i] = merged[i] + upsample(merged[i + 1], merged[i].shape[-2:])
        levels = [output(x) for output, x in zip(self.outputs, merged)] + [merged[3]]
        levels = [upsample(x, maps[0].shape[-2:]) for x in levels]
        logits = self.classify(self.fuse(torch.cat(levels, dim=1)))
        return [upsample(x.float(), size) for x in (logits, self.auxiliary(maps[2]))]


AMOUNTS = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
DISTORTION = v2.Compose([    # each with probability 1/2
    v2.RandomApply([v2.ColorJitter(**{name: amount})], p=0.5) for name, amount in AMOUNTS.items()
])


class ScaleAndCrop:
    """Cut a training sample, size x size, from a uint8 image and its mask.

    The image's short side is first scaled to 0.5 to 2 times `size`. No class fills more than
    `limit` of a crop, if one of ten crops allows it. What lies outside of the image has its mean
    color and is IGNORED. Then flip and distort colors.
    """

    def __init__(self, size, limit=0.75):
        self.size, self.limit = size, limit

    def __call__(self, image, mask):
        # A crop of the scaled image is the scaled crop of `side` pixels of the image.
        scale = 0.5 + 1.5 * torch.rand(1).item()
        side = max(1, round(min(mask.shape) / scale))
        bottom, right = (max(0, side - n) for n in mask.shape)
        image = v2.functional.pad(image, [0, 0, right, bottom], fill=[255 * m for m in MEAN])
        mask = F.pad(mask, (0, right, 0, bottom), value=IGNORED)
        rows, columns = self.choose(mask, side)
        shape = [self.size, self.size]
        image = v2.functional.resize(
            image[:, rows, columns], shape, InterpolationMode.BILINEAR, antialias=True)
        mask = F.interpolate(mask[None, None, rows, columns].float(), shape, mode="nearest-exact")
        mask = mask[0, 0].to(torch.int32)
        if torch.rand(1) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return DISTORTION(image), mask

    def choose(self, mask, side):
        """Draw where a crop lies: slices of rows and columns."""
        for _ in range(10):
            top, left = (int(torch.randint(n - side + 1, ())) for n in mask.shape)
            rows, columns = slice(top, top + side), slice(left, left + side)
            crop = mask[rows, columns]
            counts = crop[crop != IGNORED].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() <= self.limit * counts.sum():
                break
        return rows, columns


def linear_schedule(base, steps, warmup):
    """Return the learning rate of each step, falling linearly to 0: (steps,).

    The first `warmup` ones are multiplied by what rises from 1e-6 to 1.
    """
    t = torch.arange(steps, dtype=torch.float64)
    rise = 1e-6 + (1 - 1e-6) * (t / max(1, warmup)).clamp(max=1) if warmup else 1
    return base * (1 - t / steps) * rise
