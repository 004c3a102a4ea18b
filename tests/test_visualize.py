"""extras/visualize.py: pictures of the geometry, of attention and of self-relations."""

import json

import numpy as np
import pytest
import torch
from helpers import close, one_line, tiny_vit
from PIL import Image
from torch import nn

from augment import Views, denormalize
from extras import visualize
from model import build_encoder
from relations import spatial_relation
from sampler import region_align

CPU = torch.device("cpu")


def patchwork(number):
    """Return images (number, 3, 32, 32) whose 4 x 4 patches have one color each."""
    return torch.randn(number, 3, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def read(path):
    """Return a picture as float (H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(Image.open(path)).copy()) / 255


def shape(rows, columns, side=192):
    """Return (height, width) of a labeled sheet: a line of 24, and a margin of 6 around each."""
    return 6 + rows * (side + 30), 6 + columns * (side + 6)


def tile(picture, row, column, side=192):
    """Cut a picture out of a labeled sheet."""
    y, x = shape(row, column, side)
    return picture[y + 24 : y + 24 + side, x : x + side]


def middles(picture, number):
    """Return the colors in the middle of number x number cells of a square picture."""
    cell = len(picture) // number
    return picture[cell // 2 :: cell, cell // 2 :: cell]


def test_sampling_points_are_drawn_where_region_align_reads():
    """What a map of its own coordinates has at a point is the place of the point."""
    S, size = 64, 3
    box, region = torch.tensor([0.1, 0.2, 0.9, 0.8, 1.0]), torch.tensor([0.3, 0.3, 0.8, 0.7])
    y, x = (i.flatten() for i in torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij"))
    places = torch.stack([x, y], dim=1).float()[None]    # (1, S * S, 2)
    places = region_align(places, box[None], region[None], size)[0]
    black = torch.zeros(3, S, S, dtype=torch.uint8)
    pictures = torch.stack([visualize.mark_region(black, box, region, size, only=i)
                            for i in range(size**2)])
    drawn = (pictures != pictures.amin(dim=0)).any(dim=1)    # but the rectangle
    for place, points in zip(places, drawn):
        center = points.nonzero().float().mean(dim=0).flip(0)
        close(center, place, rtol=0, atol=1)    # points are drawn on whole pixels
    together = visualize.mark_region(black, box, region, size)
    xs, ys = places.round().long().unbind(dim=1)
    colors = together[:, ys, xs].T
    assert len(colors.unique(dim=0)) == size**2 and (colors.amax(dim=1) > 0).all()


def test_views_have_a_row_an_image_and_are_dark_without_an_overlap(tmp_path):
    views = [torch.zeros(2, 2, 3, 32, 32), torch.zeros(1, 2, 3, 16, 16)]    # of a mean gray
    boxes = torch.tensor([0.0, 0.0, 0.5, 0.5, 0.0]).repeat(3, 2, 1)
    boxes[2, 1, :4] = torch.tensor([0.6, 0.6, 0.9, 0.9])    # the local view of image 1
    visualize.draw_views(tmp_path / "x.png", views, boxes, (3, 2))
    picture = read(tmp_path / "x.png")
    assert picture.shape == (*shape(2, 3), 3)
    gray = denormalize(torch.zeros(3, 1, 1)).flatten()
    for row, column in np.ndindex(2, 3):
        shade = gray / 3 if (row, column) == (1, 2) else gray
        pixel = tile(picture, row, column)[8, 8]    # off the marks
        close(pixel, shade, rtol=0, atol=1.01 / 255)    # uint8, rounded down


def class_attention(vit, images):
    """Return what the class token looks at among the patches: (B, M, N)."""
    attention = vit.get_last_selfattention(images)[:, :, 0, 1:]
    return attention / attention.sum(dim=-1, keepdim=True)


def three_colors(saturation):
    """Return red, green and blue: (3, 3)."""
    return 1 - saturation + saturation * torch.eye(3)


def test_kept_attention_is_the_smallest_set_with_that_mass():
    attention = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]])
    kept = visualize.kept_attention(attention, 0.6)
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert visualize.kept_attention(attention, 0.05).sum(dim=-1).tolist() == [1, 1]


def test_attention_has_the_color_of_the_head_that_looks_most_and_is_gray_elsewhere(tmp_path):
    vit, images = tiny_vit(), patchwork(8)
    nn.init.normal_(vit.cls_token), nn.init.normal_(vit.blocks[1].attn.qkv.weight, std=0.5)
    vit.blocks[1].attn.qkv.weight.data[:4] *= 0.1    # the first head looks about
    attention = class_attention(vit, images)
    kept = visualize.kept_attention(attention, 0.6)
    visualize.draw_attention(tmp_path / "x.png", [vit, vit], ["a", "b"], images)
    picture, originals = read(tmp_path / "x.png"), denormalize(images)[:, :, 4::8, 4::8]
    assert picture.shape == (*shape(3, 8), 3)    # a row of images, then one an encoder
    colors, seen, unkept = three_colors(0.9), set(), 0
    for b in range(8):
        close(middles(tile(picture, 0, b), 4), originals[b].movedim(0, -1), rtol=0, atol=1 / 255)
        for n in range(16):
            y, x = n // 4, n % 4
            gray = originals[b, :, y, x].mean()
            heads = [m for m in range(3) if kept[b, m, n]]
            most = max(heads, key=lambda m: attention[b, m, n]) if heads else None
            expected = 0.4 * gray + (0.6 * colors[most] if heads else torch.zeros(3))
            for row in (1, 2):
                color = middles(tile(picture, row, b), 4)[y, x]
                close(color, expected, rtol=0, atol=1 / 255)    # of uint8
            seen.add(most)
            unkept += bool(heads) and most != attention[b, :, n].argmax()
    assert None in seen and len(seen) > 2 and unkept    # or little was compared


def random_boxes(number):
    """Return boxes (number, 5) that overlap in the middle, some of them flipped."""
    low, high = 0.3 * torch.rand(number, 2), 0.7 + 0.3 * torch.rand(number, 2)
    return torch.cat([low, high, torch.randint(0, 2, (number, 1))], dim=1)


def test_self_relations_of_a_view_with_itself_do_not_differ():
    vit, view, boxes = tiny_vit(), torch.randn(1, 4, 3, 32, 32), random_boxes(4)[None]
    boxes = boxes.repeat(2, 1, 1)
    A_p, valid, A_c = visualize.self_relations(vit, view.repeat(2, 1, 1, 1, 1), boxes, 3, 4)
    assert A_p.shape == (2, 4, 3, 16, 16) and A_c.shape == (2, 4, 12, 12) and valid.all()
    for A in (A_p, A_c):
        close(A.sum(dim=-1), torch.ones(A.shape[:-1]))
        close(visualize.difference(A), torch.zeros(4))
    other = visualize.self_relations(vit, torch.randn(2, 4, 3, 32, 32), boxes, 3, 4)
    assert visualize.difference(other[0]).min() > 0.01


def test_self_relations_are_aligned_in_the_image():
    """To patches that know nothing of each other, their place or left and right, a mirror is none.

    Patches of one color are the same mirrored.
    """
    vit = tiny_vit(depth=0)
    nn.init.zeros_(vit.pos_embed), nn.init.normal_(vit.patch_embed.proj.weight)
    view, boxes = patchwork(4), random_boxes(4).repeat(2, 1, 1)
    boxes[1, :, 4] = 1 - boxes[0, :, 4]
    views = torch.stack([view, view.flip(-1)])
    A_p, _, A_c = visualize.self_relations(vit, views, boxes, 3, 4)
    close(visualize.difference(A_p), torch.zeros(4))
    close(visualize.difference(A_c), torch.zeros(4))
    turned = boxes[:1].repeat(2, 1, 1)    # as if the second were not
    A_p, _, _ = visualize.self_relations(vit, views, turned, 3, 4)
    assert visualize.difference(A_p).min() > 0.01


def test_invariance_is_the_mean_over_overlapping_views(monkeypatch):
    A_c = torch.eye(4).repeat(2, 3, 1, 1)
    A_c[1, 0] = A_c[1, 0].roll(1, dims=-1)    # of image 0, as different as can be
    A_p = A_c[:, :, None].clone()
    A_p[1, 2] = A_p[1, 2].roll(1, dims=-1)    # of image 2 too, whose views do not overlap
    relations = (A_p, torch.tensor([True, True, False]), A_c)
    monkeypatch.setattr(visualize, "self_relations", lambda *_: relations)
    crops = torch.zeros(3, 2, 8, 8, 3, dtype=torch.uint8)
    batch = Views([crops], torch.zeros(3, 2, 16), None)
    values = visualize.invariance(None, [(batch, [""] * 3)], 6, 4, CPU)
    assert values == pytest.approx([1 / 2, 1 / 3])


def test_figure_5_ends_with_the_difference_and_turns_views_back(tmp_path, monkeypatch):
    A = torch.rand(2, 1, 1, 16, 16)
    monkeypatch.setattr(visualize, "self_relations", lambda *_: (A, None, None))
    views = torch.zeros(2, 1, 3, 32, 32)
    views[0, ..., :16], views[1, ..., 16:] = -2, -2    # the second is the first, mirrored
    boxes = torch.tensor([0.1, 0.2, 0.8, 0.9, 0.0]).repeat(2, 1, 1)
    boxes[1, 0, 4] = 1
    visualize.draw_relations(tmp_path / "x.png", [None], ["a"], views, boxes, 1, 4, [0], [(2, 1)])
    picture = read(tmp_path / "x.png")
    first, second = A[:, 0, 0, 2 * 4 + 1].unflatten(-1, (4, 4))    # of row 2, column 1
    largest = max(first.max(), second.max())
    for column, values in ((2, first), (3, second), (4, (first - second).abs())):
        heat = middles(tile(picture, 0, column), 4).sum(dim=-1)    # black, red, yellow, white
        close(heat, 3 * values / largest, rtol=0, atol=2 / 255)    # one channel of uint8 varies
    assert torch.equal(tile(picture, 0, 0), tile(picture, 0, 1))
    assert tile(picture, 0, 0)[30, 30].max() < 0.1 < tile(picture, 0, 0)[30, 160].min()


@pytest.fixture
def weights(tmp_path):
    """Two files of encoders."""
    for name in ("a", "b"):
        torch.save(build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / f"{name}.pth")
    return [str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]


def figure(name, weights, folder, output, *flags):
    """Return the command of a figure."""
    flags = [*flags, "--num_workers", "0"] if name in ("relations", "invariance") else [*flags]
    return [name, "--pretrained_weights", *weights, "--data_path", str(folder),
            "--output", str(output), *flags]


@pytest.mark.parametrize("name, flags, rows, columns", [
    ("idea", "", 2, 7),
    ("attention", "--number 3", 1 + 2, 3),        # a row of images, then one an encoder
    ("attention", "--images {image} {image}", 1 + 2, 2),
    ("relations", "--number 1", 1 * 2 * 2, 5),    # images, encoders, cells
    ("relations", "--images {image} {image} {image} --points 1", 3 * 2 * 1, 5),    # all of them
])
def test_pictures_from_the_command_line(name, flags, rows, columns, weights, folder, tmp_path):
    output, image = tmp_path / "x.png", folder / "train/class0/0.png"
    weights = weights[:1] if name == "idea" else weights
    visualize.main(figure(name, weights, folder, output, *flags.format(image=image).split()))
    assert Image.open(output).size == shape(rows, columns)[::-1]


def test_the_idea_frames_each_patch_and_draws_its_row_of_a_p(tmp_path):
    vit, images, colors = tiny_vit(depth=0), patchwork(6), visualize.hues(6, 0.9)
    nn.init.zeros_(vit.pos_embed), nn.init.normal_(vit.patch_embed.proj.weight)
    visualize.draw_idea(tmp_path / "x.png", vit, images, heads=3)
    picture = read(tmp_path / "x.png")
    tokens = visualize.project(vit(images)[:, 1:])[0]
    A_p = spatial_relation(tokens[None], 3, 0.5).softmax(dim=-1)[0].mean(dim=0)
    corners = tile(picture, 0, 0)[1::48, 1::48]    # of the 4 x 4 patches
    for i, color in enumerate(colors):
        (patch,) = ((corners - color).abs().amax(dim=-1) < 1 / 255).flatten().nonzero().flatten()
        shown = middles(tile(picture, 0, 1 + i), 4).sum(dim=-1)    # of heat, 0 to 3
        expected = 3 * A_p[patch].view(4, 4) / A_p[patch].max()
        close(shown, expected, rtol=0, atol=2 / 255)


def test_invariance_from_the_command_line(weights, folder, tmp_path):
    output, path = tmp_path / "x.png", tmp_path / "x.json"
    result = visualize.main(figure("invariance", weights, folder, output, "--json", str(path)))
    assert json.loads(path.read_text()) == result and list(result) == weights
    assert all(0 < value < 1 for values in result.values() for value in values.values())
    assert result[weights[0]] != result[weights[1]] and output.exists()
    alone = visualize.main(figure("invariance", weights[1:], folder, output))
    assert alone[weights[1]] == result[weights[1]]    # all encoders see the same views


@pytest.mark.parametrize("name, flags, word", [
    ("attention", ["--data_path", "nowhere"], "nowhere"),
    ("attention", ["--images", "nothing.jpg"], "nothing.jpg"),
    ("invariance", ["--images", "{text}", "{image}"], "text.png can't be read"),
    ("attention", ["--image_size", "30"], "patch size 8"),
    ("attention", ["--pretrained_weights", "{resnet}"], "ResNet"),
    ("relations", ["--relation_heads", "5"], "--relation_heads 5"),
    ("attention", ["--heads", "1", "2", "3"], "--heads"),
    ("attention", ["--output", "x.jpg"], ".png"),
    ("attention", ["--output", "missing/x.png"], "missing"),
    ("invariance", ["--json", "missing/x.json"], "missing"),
])
def test_bad_input_gets_one_line(name, flags, word, weights, folder, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    files = {"text": tmp_path / "text.png", "image": folder / "train/class0/0.png",
             "resnet": tmp_path / "resnet.pth"}
    if "{resnet}" in flags:
        torch.save(build_encoder("resnet50").state_dict(), files["resnet"])
    flags = [flag.format(**files) for flag in flags]
    command = figure(name, weights, folder, tmp_path / "x.png", *flags)
    assert word in one_line(capsys, visualize.main, command, program="extras.visualize")
