"""Draw what encoders see, one or several side by side: Fig. 1c, 4, 5 and 6.

    python -m extras.visualize idea --pretrained_weights FILE --data_path P --output PNG
    python -m extras.visualize attention --pretrained_weights FILE ... --data_path P --output PNG
    python -m extras.visualize relations --pretrained_weights FILE ... --data_path P --output PNG
    python -m extras.visualize invariance --pretrained_weights FILE ... --data_path P --output PNG

Weights are compared in the order given. `idea` takes one file.

B batch (images), N patches or sampled points, C channels, M heads, G global views, S side of a
picture
"""

import colorsys
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_keypoints

from augment import BOX, MultiCrop, Photometric, denormalize, normalize
from data import NoSplit, ViewsOfImages, build_dataset
from relations import channel_relation, spatial_relation
from sampler import overlap, region_align
from support.checkpoint import check_output
from support.distributed import Processes
from support.errors import UserError
from support.files import ImageFiles, list_images
from support.inputs import autocast, evaluation_crop
from support.options import COUNT, POSITIVE, SIZE, Parser, flag
from support.progress import progress
from support.weights import load_encoder


def project(r):
    """Apply h to features (B, N, C) as before training, after which it is dropped."""
    return F.relu(F.batch_norm(r.flatten(0, 1), None, None, training=True)).view(r.shape)


# --- pictures -------------------------------------------------------------------------------------


def enlarge(picture, size):
    """Enlarge a picture (3, H, W) to (3, size, size) pixels, without smoothing."""
    return F.interpolate(picture[None], size=(size, size), mode="nearest")[0]


def hues(number, saturation):
    """Return `number` colors around the color wheel: (number, 3) in [0, 1]."""
    return torch.tensor([colorsys.hsv_to_rgb(i / number, saturation, 1.0) for i in range(number)])


def heat(values, size):
    """Color (h, w) in [0, 1] black, red, yellow, white: (3, size, size)."""
    return enlarge(torch.stack([(3 * values - i).clamp(0, 1) for i in range(3)]), size)


def frame(picture, color, width=2):
    """Draw a frame of a color (3,) into a picture (3, H, W), in place, and return it."""
    picture[:, :width] = picture[:, -width:] = color[:, None, None]
    picture[..., :width] = picture[..., -width:] = color[:, None, None]
    return picture


def cell_of(picture, index, side):
    """Return the view of cell `index` of a picture of side x side cells, row by row."""
    width = picture.shape[-1] / side
    top, left, bottom, right = (
        round(i * width) for i in (index // side, index % side, index // side + 1, index % side + 1)
    )
    return picture[:, top:bottom, left:right]


def save_labeled(rows, path, margin=6, line=24):
    """Save rows of (label, picture (3, S, S) in [0, 1]), each under its label.

    A label may run on over the pictures to its right that have none.
    """
    S, columns = rows[0][0][1].shape[-1], max(map(len, rows))
    size = (columns * (S + margin) + margin, len(rows) * (S + line + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for i, row in enumerate(rows):
        for j, (label, picture) in enumerate(row):
            x, y = margin + j * (S + margin), margin + i * (S + line + margin)
            draw.text((x, y), label, fill="black", font=font)
            sheet.paste(to_pil_image(picture), (x, y + line))
    sheet.save(path)


# --- views and their overlaps ---------------------------------------------------------------------


def draw_views(path, views, boxes, points):
    """Draw the views of a few images, their overlaps and the sampling points of ⊙.

    A row is an image. views: by resolution, global first, (V, B, 3, S, S). boxes: (views, B, 5).
    points: a side, for global and for local views. First the first view with its overlap with the
    second, then each other view with its overlap with the first. One color in the first two
    pictures is one place.
    """
    G, B, _, S, _ = views[0].shape
    S, rows = S * max(1, 192 // S), []
    for b in range(B):
        row = []
        for v, view in enumerate(view[b] for resolution in views for view in resolution):
            picture = enlarge((255 * denormalize(view)).to(torch.uint8), S)
            region, valid = overlap(boxes[v, b][None], boxes[int(v == 0), b][None])
            label = f"global {v + 1}" if v < G else f"local {v + 1 - G}"
            if valid:
                picture = mark_region(picture, boxes[v, b], region[0], points[int(v >= G)])
            else:    # dark
                label, picture = f"{label}: no overlap", picture // 3
            row.append((label, picture / 255))
        rows.append(row)
    save_labeled(rows, path)


def mark_region(picture, box, region, size, only=None):
    """Mark a region of a view in its picture (3, S, S), and its cells' centers.

    only: the number of the one cell to mark. Colors tell places: rows by hue, columns by lightness.
    """
    S = picture.shape[-1]
    x0, y0, x1, y1, flipped = box.tolist()
    low, high = region[:2], region[2:]
    cells = (torch.arange(size) + 0.5) / size
    centers = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), dim=-1).flatten(0, 1)
    places = torch.cat([low[None], high[None], low + (high - low) * centers])    # of the image
    xy = (places - torch.tensor([x0, y0])) / torch.tensor([x1 - x0, y1 - y0])    # of the view
    if flipped:
        xy[:, 0] = 1 - xy[:, 0]
    xy = xy * S
    corners = torch.cat([xy[:2].amin(dim=0), xy[:2].amax(dim=0)]).clamp(0, S - 1)
    picture = draw_bounding_boxes(picture, corners[None], colors="red", width=2)
    for i in range(size**2) if only is None else [only]:
        hue, lightness = i // size / size, 0.35 + 0.4 * (i % size) / size
        color = tuple(int(255 * c) for c in colorsys.hls_to_rgb(hue, lightness, 1.0))
        radius = 2 if only is None else 4
        picture = draw_keypoints(picture, xy[2 + i][None, None], colors=color, radius=radius)
    return picture


# --- Fig. 1 (c): self-relations of one image ------------------------------------------------------


def spread_out(features, number):
    """Choose rows of features (N, C) that differ.

    The longest, then each time the one least like those chosen.
    """
    unit = F.normalize(features, dim=1)
    chosen = [int(features.norm(dim=1).argmax())]
    while len(chosen) < number:
        chosen.append(int((unit @ unit[chosen].T).amax(dim=1).argmin()))
    return chosen


@torch.no_grad()
def draw_idea(path, encoder, images, heads, temperatures=(0.5, 0.1)):
    """Draw six patches of an image with what each resembles, and four channels.

    images: (B, 3, S, S), normalized; the first is drawn, all give BatchNorm its statistics. Above,
    the image and its rows of A_p, below, the channels and their part of A_c. temperatures: t_p,
    t_c.
    """
    S, side = max(192, images.shape[-1]), images.shape[-1] // encoder.patch_size
    tokens = project(encoder(images)[:, 1:].float())
    A_p = spatial_relation(tokens[:1], heads, temperatures[0]).softmax(dim=-1)[0].mean(dim=0).cpu()
    A_c = channel_relation(tokens[:1], temperatures[1]).softmax(dim=-1)[0].cpu()
    tokens, colors = tokens[0].cpu(), hues(6, 0.9)
    picture, above = enlarge(denormalize(images[0].cpu()), S), []
    for i, (n, color) in enumerate(zip(spread_out(tokens, 6), colors), start=1):
        frame(cell_of(picture, n, side), color)
        resembling = heat(A_p[n].view(side, side) / A_p[n].max(), S)
        above.append((f"A_p, patch {i}", frame(resembling, color, 4)))
    # two channels that differ, each with the one that it resembles most
    alike = F.normalize(tokens, dim=0).mT @ F.normalize(tokens, dim=0)
    pairs = [(k, int(alike.fill_diagonal_(0)[k].argmax())) for k in spread_out(tokens.mT, 2)]
    chosen = [k for pair in pairs for k in pair]
    maps = [tokens[:, k].view(side, side) / tokens[:, k].max() for k in chosen]
    below = [(f"channel {k}", heat(values, S)) for k, values in zip(chosen, maps)]
    relation = A_c[chosen][:, chosen]
    below.append(("A_c of these", heat(relation / relation.max(), S)))
    save_labeled([[("image", picture), *above], [("", torch.ones_like(picture)), *below]], path)


# --- Fig. 4: attention ----------------------------------------------------------------------------


@torch.no_grad()
def class_attention(encoder, images):
    """Return what the class token attends to in the last block: (B, M, N)."""
    attention = encoder.get_last_selfattention(images)[:, :, 0, 1:].cpu()
    return attention / attention.sum(dim=-1, keepdim=True)


def kept_attention(attention, mass):
    """Mark the fewest patches that hold `mass` of a head's attention (..., N)."""
    values, order = attention.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values    # what better patches hold already
    return torch.zeros_like(attention, dtype=torch.bool).scatter(-1, order, before < mass)


def color_attention(encoder, images, mass):
    """Color images (B, 3, H, W), normalized, by the head that looks most.

    Returns pictures in [0, 1]. A patch has a color if it is among those that hold `mass` of a
    head's attention. Others are dark and gray, so that no color is the photograph's.
    """
    H, W = images.shape[-2:]
    attention = class_attention(encoder, images)
    kept = kept_attention(attention, mass)
    head = torch.where(kept, attention, -1).argmax(dim=1)                    # (B, N)
    colors = hues(attention.shape[1], 0.9)[head].mT                          # (B, 3, N)
    shown = kept.any(dim=1, keepdim=True).float()                            # (B, 1, N)
    grid = (H // encoder.patch_size, W // encoder.patch_size)
    colors, shown = (F.interpolate(x.unflatten(-1, grid), size=(H, W)) for x in (colors, shown))
    gray = denormalize(images.cpu()).mean(dim=1, keepdim=True)               # (B, 1, H, W)
    return torch.where(shown > 0, 0.4 * gray + 0.6 * colors, 0.4 * gray)


def draw_attention(path, encoders, names, images, mass=0.6):
    """Draw Fig. 4: a row of images, then a row for each encoder.

    images: (B, 3, S, S), normalized.
    """
    S = images.shape[-1] * max(1, 192 // images.shape[-1])
    rows = [("image", denormalize(images.cpu()))]
    for name, encoder in zip(names, encoders):
        label = f"{name}: a color for each head, where {mass:.0%} of its attention is"
        rows.append((label, color_attention(encoder, images, mass)))
    save_labeled([[(label if i == 0 else "", enlarge(picture, S))
                   for i, picture in enumerate(pictures)] for label, pictures in rows], path)


# --- Fig. 5 and 6: self-relations of two views ----------------------------------------------------


@torch.no_grad()
def self_relations(encoder, views, boxes, heads, size):
    """Relate two views (2, B, 3, S, S) with boxes (2, B, 5), at temperature 1.

    Returns A_p of the overlap (2, B, M, size², size²), valid (B,) bool: whether there is one, and
    A_c (2, B, C, C).
    """
    tokens = project(encoder(views.flatten(0, 1))[:, 1:].float())           # (2 * B, N, C)
    region, valid = overlap(*boxes)
    points = region_align(tokens, boxes.flatten(0, 1), region.repeat(2, 1), size)
    A_p = spatial_relation(points, heads).softmax(dim=-1).unflatten(0, (2, -1))
    A_c = channel_relation(tokens).softmax(dim=-1).unflatten(0, (2, -1))
    return A_p, valid, A_c


def difference(A):
    """Return the mean total variation of the rows of two relations: (B,).

    A: (2, B, ..., N, N). 0 if they are equal, 1 if they have nothing in common.
    """
    return 0.5 * (A[0] - A[1]).abs().sum(dim=-1).flatten(1).mean(dim=1)


def color_views(batch, device):
    """Return the global views (2, B, 3, S, S) of an augment.Views, and their boxes."""
    crops = batch.crops[0].to(device).transpose(0, 1)
    params = batch.params.to(device).transpose(0, 1)
    views = Photometric()(crops.flatten(0, 1), params.flatten(0, 1))
    return views.unflatten(0, crops.shape[:2]), params[..., BOX]


def check_complaints(complaints):
    """Raise UserError where an image could not be read: another would stand in."""
    if any(complaints):
        raise UserError("".join(complaints).splitlines()[0])


def invariance(encoder, loader, heads, size, device):
    """Return the mean difference of (spatial, channel) relations of two views.

    loader: of data.ViewsOfImages. Raises UserError for an image that can't be read.
    """
    sums, counts = torch.zeros(2), torch.zeros(2)
    for batch, complaints in progress(loader, "invariance"):
        check_complaints(complaints)
        views, boxes = color_views(batch, device)
        with autocast(device):
            A_p, valid, A_c = self_relations(encoder, views, boxes, heads, size)
        spatial, channel = difference(A_p)[valid], difference(A_c)
        sums += torch.stack([spatial.sum(), channel.sum()]).cpu()
        counts += torch.tensor([len(spatial), len(channel)])
    return (sums / counts).tolist()


@torch.no_grad()
def draw_relations(path, encoders, names, views, boxes, heads, size, images, cells):
    """Draw Fig. 5: a row for each image, encoder and chosen cell of the overlap.

    The two views with the overlap (red) and the cell, the cell's spatial self-relation in each
    (mean over M heads, the cell framed), and their difference, all three to one scale. Flipped
    views are turned back. views: (2, B, 3, S, S), boxes: (2, B, 5). images: which of the B are
    drawn, as statistics want more. cells: (row, column).
    """
    region, _ = overlap(*boxes)
    relations = [self_relations(encoder, views, boxes, heads, size)[0].mean(dim=2).cpu()
                 for encoder in encoders]                                    # (2, B, size², size²)
    S, rows = max(192, views.shape[-1]), []
    flipped = boxes[:, :, 4].cpu() > 0
    boxes = torch.cat([boxes[:, :, :4], torch.zeros_like(boxes[:, :, 4:])], dim=2).cpu()
    for b in images:
        turned = [view.flip(-1) if f else view for view, f in zip(views[:, b].cpu(), flipped[:, b])]
        pictures = [enlarge((255 * denormalize(view)).to(torch.uint8), S) for view in turned]
        for name, A in zip(names, relations):
            for y, x in cells:
                cell, row = y * size + x, []
                for v, label in enumerate((f"{name[-14:]}: view 1", "view 2")):
                    place = boxes[v, b], region[b].cpu(), size
                    row.append((label, mark_region(pictures[v], *place, only=cell) / 255))
                first, second = A[:, b, cell].unflatten(-1, (size, size))
                largest = torch.maximum(first, second).max()
                for label, values in (("A_p, view 1", first), ("A_p, view 2", second),
                                      ("difference", (first - second).abs())):
                    picture = heat(values / largest, S)
                    frame(cell_of(picture, cell, size), torch.tensor([0.0, 0.8, 1.0]))
                    row.append((f"{label}, 0 to {largest:.2g}", picture))
                rows.append(row)
    save_labeled(rows, path)


def draw_bars(path, names, values):
    """Draw bars from 0, a group a title. values: {title: a number for each name}."""
    width, line, left = 720, 22, 240
    height = (len(names) + 2) * line * len(values) + line
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    scale = "total variation, 0 equal, 1 disjoint: lower is more invariant"
    draw.text((left, height - line), scale, fill="black")
    for group, (title, numbers) in enumerate(values.items()):
        top = group * (len(names) + 2) * line + line // 2
        draw.text((left, top), title, fill="black")
        for i, (name, number) in enumerate(zip(names, numbers)):
            y = top + (i + 1) * line
            color = tuple(int(200 * c) for c in hues(len(names), 0.6)[i])
            right = left + 1 + (width - left - 80) * number / max(*numbers, 1e-12)
            draw.text((8, y), name[-36:], fill="black")
            draw.rectangle([left, y, right, y + line - 6], fill=color)
            draw.text((width - 70, y), f"{number:.4f}", fill="black")
    picture.save(path)


# --- command line ---------------------------------------------------------------------------------


def parse_args(argv=None):
    """Parse the command line; exit with one line where it makes no sense."""
    usage = "%(prog)s FIGURE --pretrained_weights FILE ... --data_path PATH --output FILE.png"
    parser = Parser("extras.visualize", usage, description="Draw Fig. 1c, 4, 5 or 6 for encoders.")
    figures = parser.add_subparsers(dest="figure", required=True, parser_class=Parser)
    for name, help, number in (
        ("idea", "Fig. 1c: patches and what each resembles, channels and their relation", 64),
        ("attention", "Fig. 4: class-token attention of the last block, a color a head", 8),
        ("relations", "Fig. 5: spatial self-relations of two views, and their difference", 2),
        ("invariance", "Fig. 6: mean difference of self-relations between two views", 1000),
    ):
        g = figures.add_parser(name, prog="extras.visualize", usage=usage.replace("FIGURE", name),
                               help=help, description=help)
        flag(g, "pretrained_weights", None, None, "files as for evaluate.py; one or, but for idea, "
             "several, compared", nargs=1 if name == "idea" else "+", required=True, metavar="FILE")
        flag(g, "data_path", None, None, "folder or name as for train.py; the images are of its "
             "val, if it has one")
        flag(g, "images", None, None, "these images, in place of --data_path's; all of a "
             "folder's", nargs="+", metavar="FILE")
        flag(g, "output", None, None, "picture to write", required=True, metavar="FILE.png")
        flag(g, "image_size", None, SIZE, "side in pixels; what the first encoder was trained at "
             "if not given", kind=int)
        flag(g, "heads", [0], COUNT, "attention heads where they are not the architecture's: one "
             "number, or one for each file, 0 for the architecture's", nargs="+")
        flag(g, "seed", 0, COUNT, "which images, and how views are cut")
        flag(g, "number", number, SIZE, "images of --data_path")
        if name == "attention":
            flag(g, "mass", 0.6, "(0, 1]", "share of a head's attention that is shown")
            continue
        flag(g, "relation_heads", 6, SIZE, "M")
        if name == "idea":
            flag(g, "temperature_spatial", 0.5, POSITIVE, "t_p")
            flag(g, "temperature_channel", 0.1, POSITIVE, "t_c")
            continue
        flag(g, "overlap", None, SIZE, "points a side in the overlap; if not given 13/14 of the "
             "side of the first encoder's feature map", kind=int)
        flag(g, "num_workers", min(4, os.cpu_count() or 1), COUNT, "loader processes")
        if name == "relations":
            flag(g, "points", 2, SIZE, "cells of the overlap, an image")
        else:
            flag(g, "json", None, None, "write the numbers there too", metavar="FILE")
    args = parser.parse_args(argv)
    if not (args.data_path or args.images):
        parser.error("where are the images? --data_path or --images")
    if Path(args.output).suffix.lower() != ".png":
        parser.error(f"--output must end in .png, not {args.output}")
    if len(args.heads) not in (1, len(args.pretrained_weights)):
        parser.error(f"--heads: one number, or {len(args.pretrained_weights)}")
    return args


class Chosen(Dataset):
    """images[i] for i in indices."""

    def __init__(self, images, indices):
        self.images, self.indices = images, indices
        self.labels, self.classes = images.labels[indices], images.classes

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.images[self.indices[index]]


def choose_images(args):
    """Return the images that the arguments name."""
    if args.images:
        paths = list_images(args.images)
        return ImageFiles("", paths, [-1] * len(paths), classes=0)
    try:
        images = build_dataset(args.data_path, "val", label_depth=1)    # labels play no part
    except NoSplit:
        images = build_dataset(args.data_path, "train", label_depth=1)
    number = 64 if args.figure == "relations" else args.number    # a batch, for its statistics
    order = np.random.default_rng(args.seed).permutation(len(images))
    return Chosen(images, order[:number].tolist())


def center_crops(images, size, device):
    """Return all of the images as an encoder takes them, (B, 3, size, size)."""
    crop = evaluation_crop(size)
    crops = torch.stack([crop(images[i][0]) for i in range(len(images))])
    return normalize(crops.to(device).float() / 255)


def attention_figure(args, encoders, names, images, size, device):
    for path, encoder in zip(args.pretrained_weights, encoders):
        if not encoder.heads:
            raise UserError(f"{path} holds a ResNet, which has no attention")
    draw_attention(args.output, encoders, names, center_crops(images, size, device), args.mass)


def relations_figure(args, encoders, names, loader, device):
    batch, complaints = next(iter(loader))
    check_complaints(complaints)
    views, boxes = color_views(batch, device)
    _, valid = overlap(*boxes)
    shown = valid.nonzero().flatten().tolist()[: None if args.images else args.number]
    if not shown:
        raise UserError("no two views of these images overlap; try another --seed")
    cells = np.random.default_rng(args.seed).integers(0, args.overlap, (args.points, 2)).tolist()
    M, size = args.relation_heads, args.overlap
    draw_relations(args.output, encoders, names, views, boxes, M, size, shown, cells)


def invariance_figure(args, encoders, names, loader, size, device):
    values = [invariance(encoder, loader, args.relation_heads, args.overlap, device)
              for encoder in encoders]
    print(f"mean difference of the self-relations of two views, {len(loader.dataset)} images, "
          f"{size} px (total variation: 0 equal, 1 disjoint; lower is more invariant)")
    for name, (spatial, channel) in zip(args.pretrained_weights, values):
        print(f"{name}: spatial {spatial:.4f}  channel {channel:.4f}")
    draw_bars(args.output, names, {"spatial self-relation": [v[0] for v in values],
                                   "channel self-relation": [v[1] for v in values]})
    result = {path: dict(zip(("spatial", "channel"), v))
              for path, v in zip(args.pretrained_weights, values)}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def load_encoders(args, device):
    """Return the encoders, and the side in pixels that they are to see."""
    heads = args.heads * (len(args.pretrained_weights) // len(args.heads))
    encoders = [load_encoder(path, heads=number).to(device)
                for path, number in zip(args.pretrained_weights, heads)]
    size = args.image_size or encoders[0].image_size
    for path, encoder in zip(args.pretrained_weights, encoders):
        if size % encoder.patch_size:
            patch = f"the patch size {encoder.patch_size}"
            raise UserError(f"--image_size {size} is not a multiple of {patch} of {path}")
        if args.figure != "attention" and encoder.dim % args.relation_heads:
            raise UserError(f"--relation_heads {args.relation_heads} does not divide the "
                            f"{encoder.dim} channels of {path}")
    return encoders, size


def draw(args, processes):
    """Draw the figure that the arguments name; return its numbers, if it has any."""
    if processes.distributed:
        raise UserError("figures are drawn by one process: leave out torchrun")
    for name in ("output", "json"):
        check_output(name, getattr(args, name, None))
    encoders, size = load_encoders(args, processes.device)
    paths = [Path(path).absolute() for path in args.pretrained_weights]
    folders = [path.parent.name for path in paths]
    names = folders if len(set(folders)) == len(folders) else [path.stem for path in paths]
    images, processes.working, result = choose_images(args), True, None
    if args.figure == "attention":
        attention_figure(args, encoders, names, images, size, processes.device)
    elif args.figure == "idea":
        batch = center_crops(images, size, processes.device)
        temperatures = args.temperature_spatial, args.temperature_channel
        draw_idea(args.output, encoders[0], batch, args.relation_heads, temperatures)
    else:
        args.overlap = args.overlap or max(1, round(size / encoders[0].patch_size * 13 / 14))
        views = ViewsOfImages(images, MultiCrop(size, local_crops_number=0), args.seed)
        keys = [(0, i) for i in range(len(images))]
        loader = DataLoader(views, min(64, len(images)), sampler=keys, num_workers=args.num_workers)
        if args.figure == "relations":
            relations_figure(args, encoders, names, loader, processes.device)
        else:
            result = invariance_figure(args, encoders, names, loader, size, processes.device)
    print(args.output)
    return result


def main(argv=None):
    """Draw as the command line says: a list of str, or sys.argv if None."""
    args = parse_args(argv)
    with Processes("extras.visualize") as processes:
        return draw(args, processes)


if __name__ == "__main__":
    main()
