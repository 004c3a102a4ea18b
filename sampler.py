"""Region-aligned sampling, the operation ⊙ of Sec. 3.2 and Fig. 3 (O(·) in Eq. 2).

Two random crops of one image show partly different, possibly mirrored content. ⊙ cuts their overlap into a grid
of cells and reads both feature maps at the cells' centres, so that entry n of either result is the same place in
the image. Geometry is in fractions of the original image, x to the right, y down: a view's box is the row
(x0, y0, x1, y1, flipped).

B batch, C channels, H x W feature map, R regions, S points a side
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
    """Bilinear weights (..., S, length) that read a row of `length` values at `position` (..., S), in units of cells.

    Value i sits at i; a position beyond the first or last value reads that value (border, not zero, padding).
    """
    position = position.clamp(0, length - 1)
    i = torch.arange(length, device=position.device)
    return (1 - (position[..., None] - i).abs()).clamp(min=0)


def region_align(features, boxes, region, size):
    """Read feature maps at the centres of a region's size x size cells, by bilinear interpolation.

    features: (B, C, H, W) feature maps of views; boxes: (B, 5) where those views lie, and whether mirrored;
    region: (B, 4), see `overlap`, or (B, R, 4), R of them in each view. Returns (B, C, size * size) or (B, R, C, size * size),
    cells row by row, left to right in the original image.

    Bilinear weights on a grid are products of a row's and a column's, so that two products with small matrices, first of rows, then of
    columns, are exact, and deterministic on every device; also under autocast, which would round twice. Equals
    torchvision.ops.roi_align(sampling_ratio=1, aligned=True) of the region in the view, mirrored back.
    """
    if region.ndim == 2:
        return region_align(features, boxes, region[:, None], size).squeeze(1)
    H, W = features.shape[-2:]
    cells = (torch.arange(size, device=boxes.device) + 0.5) / size                  # (S,) centres, fractions of the region
    low, high = region[:, :, 0:2, None], region[:, :, 2:4, None]                    # (B, R, 2, 1)
    centres = low + (high - low) * cells                                            # (B, R, 2, S) fractions of the image
    corner, opposite = boxes[:, None, 0:2, None], boxes[:, None, 2:4, None]         # (B, 1, 2, 1)
    x, y = ((centres - corner) / (opposite - corner)).unbind(dim=2)                 # (B, R, S) fractions of the view
    x = torch.where(boxes[:, None, 4:5] > 0, 1 - x, x)
    rows = _interpolation_matrix(y * H - 0.5, H)                                    # (B, R, S, H); patch i covers [i, i + 1] / H
    columns = _interpolation_matrix(x * W - 0.5, W)                                 # (B, R, S, W)
    rows, columns = rows.to(features.dtype), columns.to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        lines = rows.flatten(1, 2) @ features.movedim(1, 3).flatten(2)              # (B, R * S, W * C); channels side by side, as encoders leave them
        points = columns[:, :, None] @ lines.view(*rows.shape[:3], W, -1)           # (B, R, 1, S, W) @ (B, R, S, W, C) -> (B, R, S, S, C)
    return points.flatten(2, 3).mT                                                  # (B, R, C, S * S)
