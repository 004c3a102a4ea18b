"""Pictures of what the geometry does and of what an encoder looks at."""

import colorsys

import torch
import torch.nn.functional as F
from torchvision.utils import draw_bounding_boxes, draw_keypoints, make_grid, save_image

from augment import denormalize
from sampler import overlap


def draw_views(path, views, boxes, sizes):
    """The views of a few images with the first global view's overlap with each, and ⊙'s sampling points, drawn in.

    views: by resolution, global first, as networks take them (V, B, 3, S, S); boxes: (views, B, 5); sizes: points a side
    for global and for local views. A row an image. Left, the first view with its overlap with the second; then each other view with its
    overlap with the first: points drawn in one colour in the first two pictures are one place in the image.
    """
    G, B, _, S, _ = views[0].shape
    S = S * max(1, 192 // S)    # small views are shown enlarged
    pictures = []
    for b in range(B):
        for number, view in enumerate(view[b] for resolution in views for view in resolution):
            picture = F.interpolate((255 * denormalize(view)).to(torch.uint8)[None], size=(S, S), mode="nearest")[0]
            region, valid = overlap(boxes[number, b][None], boxes[int(number == 0), b][None])
            size = sizes[0] if number < G else sizes[1]
            pictures.append(_overlay(picture, boxes[number, b], region[0], size) if valid else picture // 3)    # dark: no overlap
    save_image(make_grid(torch.stack(pictures) / 255, nrow=len(boxes), padding=4, pad_value=1), path)


def _overlay(picture, box, region, size):
    """A view with the region as a rectangle and the centres of its size x size cells as points, in the view's own pixels."""
    S = picture.shape[-1]
    x0, y0, x1, y1, flipped = box.tolist()
    low, high = region[:2], region[2:]
    cells = (torch.arange(size) + 0.5) / size
    centres = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), dim=-1).flatten(0, 1)             # (size², 2)
    places = torch.cat([low[None], high[None], low + (high - low) * centres])                            # image fractions
    xy = (places - torch.tensor([x0, y0])) / torch.tensor([x1 - x0, y1 - y0])                            # view fractions
    if flipped:
        xy[:, 0] = 1 - xy[:, 0]
    xy = xy * S
    corners = torch.cat([xy[:2].amin(dim=0), xy[:2].amax(dim=0)]).clamp(0, S - 1)
    picture = draw_bounding_boxes(picture, corners[None], colors="red", width=2)
    for i, point in enumerate(xy[2:]):    # colour tells where in the image: rows in hue, columns in lightness
        hue, light = i // size / size, 0.35 + 0.4 * (i % size) / size
        colour = tuple(int(255 * c) for c in colorsys.hls_to_rgb(hue, light, 1.0))
        picture = draw_keypoints(picture, point[None, None], colors=colour, radius=2)
    return picture


@torch.no_grad()
def draw_attention(path, encoder, images):
    """Fig. 4: what the class token attends to in the last block; a row an image, then a picture and colour a head.

    images: (B, 3, H, W), normalised. Brightness is attention, relative to the head's largest.
    """
    B, _, H, W = images.shape
    attention = encoder.get_last_selfattention(images)[:, :, 0, 1:]                                   # (B, M, N)
    maps = attention / attention.amax(dim=-1, keepdim=True)
    maps = maps.unflatten(-1, (H // encoder.patch_size, W // encoder.patch_size))
    maps = F.interpolate(maps, size=(H, W), mode="nearest").cpu()                       # (B, M, H, W)
    M = maps.shape[1]
    colours = torch.tensor([colorsys.hsv_to_rgb(m / M, 0.8, 1.0) for m in range(M)])                      # a colour a head
    images = denormalize(images.cpu())
    grey = images.mean(dim=1, keepdim=True)[:, None]                                                      # (B, 1, 1, H, W)
    heads = 0.35 * grey + 0.65 * maps[:, :, None] * colours[None, :, :, None, None]                       # (B, M, 3, H, W)
    tiles = torch.cat([images[:, None], heads], dim=1).flatten(0, 1)
    scale = max(1, 192 // H)
    tiles = F.interpolate(tiles, size=(scale * H, scale * W), mode="nearest")
    save_image(make_grid(tiles, nrow=1 + M, padding=4, pad_value=1), path)
