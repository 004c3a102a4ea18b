"""Region-aligned sampling, the operation ⊙ of Sec. 3.2 and Fig. 3 (O(·) in Eq. 2).

Two random crops of one image show partly different, possibly mirrored content. ⊙ cuts their overlap into a grid
of cells and reads both feature maps at the cells' centres, so that entry n of either result is the same place in
the image. Geometry is in fractions of the original image, x to the right, y down: a view's box is the row
(x0, y0, x1, y1, flipped).

B batch, C channels, H x W feature map, S points a side
"""

import torch


def overlap(boxes_a, boxes_b):
    """Intersection of two views of the same image.

    boxes_a, boxes_b: (B, 5) in [0, 1].
    Returns region (B, 4) as (x0, y0, x1, y1), and valid (B,) bool, False where the views share no area;
    region means nothing there, but is finite.
    """
    low = torch.maximum(boxes_a[:, 0:2], boxes_b[:, 0:2])    # (B, 2)
    high = torch.minimum(boxes_a[:, 2:4], boxes_b[:, 2:4])   # (B, 2)
    return torch.cat([low, high], dim=1), (low < high).all(dim=1)


def _interpolation_matrix(position, length):
    """Bilinear weights (B, S, length) that read a row of `length` values at `position` (B, S), in units of cells.

    Value i sits at i; a position beyond the first or last value reads that value (border, not zero, padding).
    """
    position = position.clamp(0, length - 1)
    i = torch.arange(length, device=position.device)
    return (1 - (position[..., None] - i).abs()).clamp(min=0)


def region_align(features, boxes, region, size):
    """Read feature maps at the centres of a region's size x size cells, by bilinear interpolation.

    features: (B, C, H, W) feature maps of views; boxes: (B, 5) where those views lie, and whether mirrored;
    region: (B, 4), see `overlap`. Returns (B, C, size * size), cells row by row, left to right in the original image.

    Bilinear interpolation on a grid is separable: with one small matrix an axis the sample is R F Qᵀ, exact,
    and deterministic on every device. Equals torchvision.ops.roi_align(sampling_ratio=1, aligned=True) of the region.
    """
    H, W = features.shape[-2:]
    cells = (torch.arange(size, device=boxes.device) + 0.5) / size                  # (S,) centres, fractions of the region
    low, high = region[:, 0:2, None], region[:, 2:4, None]                          # (B, 2, 1)
    centres = low + (high - low) * cells                                            # (B, 2, S) fractions of the image
    in_view = (centres - boxes[:, 0:2, None]) / (boxes[:, 2:4] - boxes[:, 0:2])[..., None]   # fractions of the view
    x, y = in_view.unbind(dim=1)                                                    # (B, S)
    x = torch.where(boxes[:, 4:5] > 0, 1 - x, x)
    rows = _interpolation_matrix(y * H - 0.5, H).to(features.dtype)                 # (B, S, H); patch i covers [i, i + 1] / H
    columns = _interpolation_matrix(x * W - 0.5, W).to(features.dtype)              # (B, S, W)
    return (rows[:, None] @ features @ columns[:, None].mT).flatten(2)              # (B, C, S, S) -> (B, C, S * S)
