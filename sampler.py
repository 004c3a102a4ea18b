"""Region-aligned sampling, the operation ⊙ of Sec. 3.2 and Fig. 3 (O(·) in Eq. 2).

Two random crops of an image show partly different, possibly mirrored content. ⊙ cuts their overlap
into a grid of cells and reads both feature maps at the cells' centers, so that point n of either
result is the same place in the image.

Geometry is in fractions of the original image, x to the right, y down. The box of a view is a row
(x0, y0, x1, y1, flipped); its corners lie in [0, 1].

B batch, N = H * W tokens of a view, C channels, S points a side (the paper's H_s = W_s)
"""

import math

import torch
from torch import Tensor


def overlap(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersect two views of each image.

    boxes_a, boxes_b: (B, 5). Returns region (B, 4) as (x0, y0, x1, y1), and valid (B,) bool: False
    where the views share no area. An invalid region is finite, but means nothing.
    """
    low = torch.maximum(boxes_a[:, 0:2], boxes_b[:, 0:2])     # (B, 2)
    high = torch.minimum(boxes_a[:, 2:4], boxes_b[:, 2:4])    # (B, 2)
    return torch.cat([low, high], dim=1), (low < high).all(dim=1)


def bilinear_weights(position: Tensor, length: int) -> Tensor:
    """Return weights (B, S, length) that read a row of values at position (B, S).

    Value i lies at i. A position beyond the first or last value reads that value.
    """
    position = position.clamp(0, length - 1)[..., None]
    return (1 - (position - torch.arange(length, device=position.device)).abs()).clamp(min=0)


def region_align(
    tokens: Tensor, boxes: Tensor, region: Tensor, size: int, shape: tuple[int, int] | None = None
) -> Tensor:
    """Read feature maps at the centers of a region's size x size cells, bilinearly.

    tokens: (B, N, C), the patches of a view row by row; shape: (H, W) of a map that is not square.
    boxes: (B, 5), where the views lie. region: (B, 4), see `overlap`. Returns (B, size * size, C),
    row by row, left to right in the original image.

    Equal to torchvision.ops.roi_align(sampling_ratio=1, aligned=True) of the view flipped back.
    Bilinear weights on a grid are separable, so ⊙ is one product: deterministic on every device.
    """
    H, W = shape or (math.isqrt(tokens.shape[1]),) * 2
    cells = (torch.arange(size, device=boxes.device) + 0.5) / size                       # (S,)
    low, high = region[:, 0:2, None], region[:, 2:4, None]                               # (B, 2, 1)
    centers = low + (high - low) * cells                                                 # (B, 2, S)
    side = (boxes[:, 2:4] - boxes[:, 0:2])[..., None]                                    # (B, 2, 1)
    x, y = ((centers - boxes[:, 0:2, None]) / side).unbind(1)    # (B, S), fractions of the view
    x = torch.where(boxes[:, 4:5] > 0, 1 - x, x)
    rows = bilinear_weights(y * H - 0.5, H)                 # (B, S, H); patch i is [i, i + 1] / H
    columns = bilinear_weights(x * W - 0.5, W)              # (B, S, W)
    points = torch.einsum("bsh,bhwc,btw->bstc", rows, tokens.unflatten(1, (H, W)), columns)
    return points.flatten(1, 2)
