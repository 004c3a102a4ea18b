"""Pictures of what the geometry does and of what encoders see, one or several side by side: Fig. 4, 5 and 6.

    python visualize.py attention --pretrained_weights a.pth b.pth --data_path DATA --output attention.png
    python visualize.py relations --pretrained_weights a.pth b.pth --data_path DATA --output relations.png
    python visualize.py invariance --pretrained_weights a.pth b.pth --data_path DATA --output invariance.png

The weights' order is that of the rows and bars.

B batch (images), C channels, N patches or sampled points, M relation heads or attention heads, S side of a picture
"""

import argparse
import colorsys
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision.utils import draw_bounding_boxes, draw_keypoints, make_grid, save_image
from tqdm import tqdm

from augment import BOX, MultiCrop, Photometric, collate, denormalize, normalize
from data import ViewsOfImages, build_dataset, decode, evaluation_crop
from finetune import autocast
from relations import channel_relation, spatial_relation
from sampler import overlap, region_align
from weights import load_encoder


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


def _overlay(picture, box, region, size, only=None):
    """A view with the region as a rectangle and the centres of its size x size cells as points, in the view's own pixels; of one cell, if told."""
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
    for i, point in [(i, point) for i, point in enumerate(xy[2:]) if only in (None, i)]:    # colour tells where in the image: rows in hue, columns in lightness
        hue, light = i // size / size, 0.35 + 0.4 * (i % size) / size
        colour = tuple(int(255 * c) for c in colorsys.hls_to_rgb(hue, light, 1.0))
        picture = draw_keypoints(picture, point[None, None], colors=colour, radius=2 if only is None else 4)
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


# --- Fig. 4: attention ------------------------------------------------------------------------------------------------


def kept_attention(attention, mass=0.6):
    """The fewest patches that hold `mass` of a head's attention: (..., N), rows that sum to 1 -> bool (..., N)."""
    values, order = attention.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values    # what better patches hold already
    return torch.zeros_like(attention, dtype=torch.bool).scatter(-1, order, before < mass)


@torch.no_grad()
def overlay_attention(encoder, images, mass=0.6):
    """Images (B, 3, H, W), normalised -> pictures in [0, 1], alike: a patch has the colour of the head that looks at it most, if it is
    among those that hold `mass` of a head's class-token attention in the last block; others are darkened."""
    H, W = images.shape[-2:]
    attention = encoder.get_last_selfattention(images)[:, :, 0, 1:].cpu()                                 # (B, M, N)
    attention = attention / attention.sum(dim=-1, keepdim=True)
    kept = kept_attention(attention, mass)
    head = torch.where(kept, attention, -1).argmax(dim=1)                                                 # (B, N)
    M = attention.shape[1]
    colours = torch.tensor([colorsys.hsv_to_rgb(m / M, 0.9, 1.0) for m in range(M)])[head].mT             # (B, 3, N)
    grid = (H // encoder.patch_size, W // encoder.patch_size)
    colours, shown = (F.interpolate(x.unflatten(-1, grid), size=(H, W), mode="nearest") for x in (colours, kept.any(dim=1, keepdim=True).float()))
    images = denormalize(images.cpu())
    return torch.where(shown > 0, 0.5 * images + 0.5 * colours, 0.4 * images)


# --- Fig. 5 and 6: self-relations of two views -----------------------------------------------------------------------


@torch.no_grad()
def self_relations(encoder, views, boxes, heads, size):
    """A_p of the overlap of two views, and A_c, with t = 1 and, as h is dropped after training, an h as it is before it: batch norm, ReLU.

    views: (2, B, 3, S, S), boxes: (2, B, 5). Returns A_p (2, B, M, size², size²), valid (B,) bool, False where there is no
    overlap, and A_c (2, B, C, C). Rows sum to 1.
    """
    B = views.shape[1]
    r = encoder(views.flatten(0, 1))[:, 1:].mT.float()                                                    # (2 * B, C, N)
    r = F.relu(F.batch_norm(r, None, None, training=True))
    region, valid = overlap(*boxes)
    side = views.shape[-1] // encoder.patch_size
    points = region_align(r.unflatten(-1, (side, side)), boxes.flatten(0, 1), region.repeat(2, 1), size)   # (2 * B, C, size²)
    A_p = spatial_relation(points, heads).softmax(dim=-1)
    A_c = channel_relation(r).softmax(dim=-1)
    return A_p.unflatten(0, (2, B)), valid, A_c.unflatten(0, (2, B))


def difference(A):
    """Total variation between the rows of two relations (2, B, ..., N, N), mean over rows: (B,), 0 if they are equal, at most 1."""
    return 0.5 * (A[0] - A[1]).abs().sum(dim=-1).flatten(1).mean(dim=1)


def invariance(encoder, loader, heads, size, device):
    """(spatial, channel): mean difference of the self-relations of two views, over a loader of data.ViewsOfImages. Raises OSError for an
    image that can't be read."""
    sums, counts, photometric = torch.zeros(2), torch.zeros(2), Photometric()
    for batch, complaints in tqdm(loader, desc="invariance", disable=None, leave=False):
        if complaints:    # another image would stand in
            raise OSError(complaints[0])
        views = photometric(batch.crops[0].flatten(0, 1).to(device), batch.rows.flatten(0, 1).to(device)).unflatten(0, batch.crops[0].shape[:2])
        with autocast(device):
            A_p, valid, A_c = self_relations(encoder, views, batch.rows[..., BOX].to(device), heads, size)
        spatial, channel = difference(A_p)[valid], difference(A_c)
        sums += torch.stack([spatial.sum(), channel.sum()]).cpu()
        counts += torch.tensor([len(spatial), len(channel)])
    return (sums / counts).tolist()


@torch.no_grad()
def draw_relations(path, encoders, views, boxes, heads, size, images, points):
    """Fig. 5: for each image, encoder and chosen cell of the overlap a row: the two views with the overlap (red) and the cell, the cell's
    spatial self-relation in each of them, mean over M heads, and their difference. All as in the image: mirrored views are turned back.

    views: (2, B, 3, S, S), boxes: (2, B, 5); images: which of the B are drawn, as batch statistics want more. points: cells (row, column).
    """
    region, _ = overlap(*boxes)
    relations = [self_relations(encoder, views, boxes, heads, size)[0].mean(dim=2).cpu() for encoder in encoders]    # (2, B, size², size²)
    S, pictures = max(192, views.shape[-1]), []
    mirrored = boxes[:, :, 4].cpu() > 0
    boxes = torch.cat([boxes[:, :, :4], torch.zeros_like(boxes[:, :, 4:])], dim=2).cpu()
    for b in images:
        for A in relations:
            for y, x in points:
                for v in range(2):
                    view = views[v, b].flip(-1) if mirrored[v, b] else views[v, b]
                    picture = F.interpolate((255 * denormalize(view.cpu())).to(torch.uint8)[None], size=(S, S), mode="nearest")[0]
                    pictures.append(_overlay(picture, boxes[v, b], region[b].cpu(), size, only=y * size + x) / 255)
                first, second = A[:, b, y * size + x].unflatten(-1, (size, size))
                for values in (first, second, (first - second).abs()):
                    heat = _heat(values / torch.maximum(first, second).max())
                    pictures.append(F.interpolate(heat[None], size=(S, S), mode="nearest")[0])
    save_image(make_grid(torch.stack(pictures), nrow=5, padding=4, pad_value=1), path)


def _heat(values):
    """(h, w) in [0, 1] -> (3, h, w): black, red, yellow, white."""
    return torch.stack([(3 * values - i).clamp(0, 1) for i in range(3)])


def draw_bars(path, names, values):
    """values: {title: a number for each name}. A group of horizontal bars for each title, from 0."""
    width, line, left = 720, 22, 240
    picture = Image.new("RGB", (width, (len(names) + 2) * line * len(values)), "white")
    draw = ImageDraw.Draw(picture)
    for group, (title, numbers) in enumerate(values.items()):
        top = group * (len(names) + 2) * line + line // 2
        draw.text((left, top), title, fill="black")
        for i, (name, number) in enumerate(zip(names, numbers)):
            y = top + (i + 1) * line
            colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / len(names), 0.6, 0.85))
            draw.text((8, y), name[-36:], fill="black")
            draw.rectangle([left, y, left + 1 + (width - left - 80) * number / max(*numbers, 1e-12), y + line - 6], fill=colour)
            draw.text((width - 70, y), f"{number:.4f}", fill="black")
    picture.save(path)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line; ends with one line and status 2 where it makes no sense."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--pretrained_weights", nargs="+", required=True, metavar="FILE", help="files as for evaluate.py; one or several, compared")
    common.add_argument("--data_path", help="folder or name as for train.py; the images are of its val, if it has one", default=None)
    common.add_argument("--images", nargs="+", metavar="FILE", help="these images, in place of --data_path's")
    common.add_argument("--output", required=True, metavar="FILE.png", help="picture to write")
    common.add_argument("--image_size", type=int, help="side in pixels; the size the first encoder was trained at if not given")
    common.add_argument("--heads", type=int, default=[0], nargs="+", help="attention heads where files don't tell: one number, or one for each file, 0 for those that tell")
    common.add_argument("--seed", type=int, default=0, help="which images, and how views are cut (default: %(default)s)")
    parser = argparse.ArgumentParser(prog="visualize.py", description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    attention = tasks.add_parser("attention", parents=[common], help="Fig. 4: class-token attention of the last block, a colour a head")
    attention.add_argument("--number", type=int, default=8, help="images of --data_path (default: %(default)s)")
    attention.add_argument("--mass", type=float, default=0.6, help="share of a head's attention that is shown (default: %(default)s)")
    relations = tasks.add_parser("relations", parents=[common], help="Fig. 5: spatial self-relations of two views, and their difference")
    relations.add_argument("--number", type=int, default=2, help="images of --data_path (default: %(default)s)")
    relations.add_argument("--points", type=int, default=2, help="cells of the overlap, an image (default: %(default)s)")
    invariance = tasks.add_parser("invariance", parents=[common], help="Fig. 6: mean difference of self-relations between two views")
    invariance.add_argument("--number", type=int, default=1000, help="images of --data_path (default: %(default)s)")
    invariance.add_argument("--json", metavar="FILE", help="write the numbers there too")
    for task in (relations, invariance):
        task.add_argument("--relation_heads", type=int, default=6, help="M (default: %(default)s)")
        task.add_argument("--overlap", type=int, default=13, help="points a side in the overlap (default: %(default)s)")
        task.add_argument("--num_workers", type=int, default=min(4, os.cpu_count() or 1), help="loader processes (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.data_path or args.images):
        parser.error("where are the images? --data_path or --images")
    for name in {"number", "points", "overlap", "relation_heads", "image_size"} & vars(args).keys():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 < getattr(args, "mass", 1) <= 1:
        parser.error("--mass must lie in (0, 1]")
    if Path(args.output).suffix.lower() != ".png":
        parser.error(f"--output must end in .png, not {args.output}")
    args.number = len(args.images) if args.images else args.number
    if len(args.heads) not in (1, len(args.pretrained_weights)):
        parser.error(f"--heads: one number, or {len(args.pretrained_weights)}, not {len(args.heads)}")
    return args


class Files(torch.utils.data.Dataset):
    """Image files, in the form of data.py."""

    def __init__(self, paths):
        self.paths, self.labels, self.classes = paths, torch.full((len(paths),), -1), 0

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return decode(self.paths[index]), -1


def chosen_images(args):
    """The images that the arguments name."""
    if args.images:
        return Files(args.images)
    try:
        images = build_dataset(args.data_path, "val")
    except FileNotFoundError:
        images = build_dataset(args.data_path, "train")
    number = args.number if args.task != "relations" else 64    # a batch, for its statistics
    chosen = np.random.default_rng(args.seed).permutation(len(images))[:number].tolist()
    subset = torch.utils.data.Subset(images, chosen)
    subset.labels, subset.classes = images.labels[chosen], images.classes
    return subset


def main(argv=None):
    """Draw as the command line (a list of str; sys.argv if None) says."""
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        encoders = [
            load_encoder(path, heads=heads).to(device)
            for path, heads in zip(args.pretrained_weights, args.heads * (len(args.pretrained_weights) // len(args.heads)))
        ]
        images = chosen_images(args)
        size = args.image_size or encoders[0].grid * encoders[0].patch_size
        for path, encoder in zip(args.pretrained_weights, encoders):
            if size % encoder.patch_size:
                raise ValueError(f"--image_size {size} is not a multiple of the patch size {encoder.patch_size} of {path}")
            if args.task == "attention" and not encoder.heads:
                raise ValueError(f"{path} holds a ResNet, which has no attention")
        if args.task == "attention":
            batch = torch.stack([evaluation_crop(size)(images[i][0]) for i in range(len(images))]).to(device)
            batch = normalize(batch.float() / 255)
            rows = [denormalize(batch.cpu())] + [overlay_attention(encoder, batch, args.mass) for encoder in encoders]
            tiles = F.interpolate(torch.cat(rows), scale_factor=max(1, 192 // size), mode="nearest")
            save_image(make_grid(tiles, nrow=len(batch), padding=4, pad_value=1), args.output)
            print(f"{args.output}: rows are the images, then {', '.join(args.pretrained_weights)}")
            return None
        views = ViewsOfImages(images, MultiCrop(size, local_crops_number=0), args.seed)
        loader = DataLoader(views, sampler=[(0, i) for i in range(len(images))], batch_size=min(64, len(images)), collate_fn=collate, num_workers=args.num_workers)
        if args.task == "relations":
            batch, complaints = next(iter(loader))
            if complaints:
                raise OSError(complaints[0])
            views = Photometric()(batch.crops[0].flatten(0, 1), batch.rows.flatten(0, 1)).unflatten(0, batch.crops[0].shape[:2]).to(device)
            cells = np.random.default_rng(args.seed).integers(0, args.overlap, (args.points, 2)).tolist()
            _, valid = overlap(batch.rows[0, :, BOX], batch.rows[1, :, BOX])
            shown = valid.nonzero().flatten().tolist()[: args.number]
            if not shown:
                raise ValueError("no two views of these images overlap; try another --seed")
            draw_relations(args.output, encoders, views, batch.rows[..., BOX].to(device), args.relation_heads, args.overlap, shown, cells)
            print(f"{args.output}: {len(shown)} image(s), of each {args.points} cell(s) for {', then '.join(args.pretrained_weights)}")
            return None
        names = [str(path) for path in args.pretrained_weights]
        values = [invariance(encoder, loader, args.relation_heads, args.overlap, device) for encoder in encoders]
        print(f"mean difference of the self-relations of two views, {len(images)} images, {size} px (total variation: 0 equal, 1 disjoint)")
        for name, (spatial, channel) in zip(names, values):
            print(f"{name}: spatial {spatial:.4f}  channel {channel:.4f}")
        draw_bars(args.output, names, {"spatial self-relation": [v[0] for v in values], "channel self-relation": [v[1] for v in values]})
        if args.json:
            Path(args.json).write_text(json.dumps({name: dict(zip(("spatial", "channel"), v)) for name, v in zip(names, values)}, indent=2) + "\n")
        print(args.output)
        return dict(zip(names, values))
    except (OSError, ValueError) as error:
        sys.exit(f"visualize.py: error: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
