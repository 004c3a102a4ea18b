"""Crops and colors against torchvision's, and DINO's distributions; the drawn `shapes`."""

import numpy as np
import torch
from helpers import picture
from torchvision.transforms import v2

import augment
from augment import MultiCrop
from data import build_dataset


def test_crops_are_placed_as_torchvision_places_them():
    scale, n, rng = (0.3, 0.8), 2000, np.random.default_rng(0)
    theirs = v2.RandomResizedCrop(8, scale)
    keys = ("top", "left", "height", "width")
    for H, W in ((60, 90), (90, 60)):
        ours = torch.tensor([augment.random_place(rng, H, W, scale) for _ in range(n)]).double()
        drawn = [theirs.make_params([torch.empty(3, H, W)]) for _ in range(n)]
        expected = torch.tensor([[p[key] for key in keys] for p in drawn]).double()
        a, b = (torch.cat([x, x[:, 2:3] * x[:, 3:], (x[:, 2:3] / x[:, 3:]).log()], dim=1)
                for x in (ours, expected))    # and area, aspect
        for power in (1, 2):    # moments, within four standard deviations of their difference
            error = (a**power).mean(dim=0) - (b**power).mean(dim=0)
            deviation = (((a**power).var(dim=0) + (b**power).var(dim=0)) / n).sqrt()
            assert (error.abs() < 4 * deviation).all()
    for H, W in ((10, 200), (200, 10)):    # nothing fits
        place = v2.RandomResizedCrop(8, (1.0, 1.0)).make_params([torch.empty(3, H, W)])
        assert augment.random_place(rng, H, W, (1.0, 1.0)) == tuple(place[key] for key in keys)


def test_crops_are_resized_and_flipped_as_torchvision_does():
    image, rng, flips = picture(60, 90), np.random.default_rng(0), set()
    for _ in range(8):
        crop, (x0, y0, x1, y1, flipped) = augment.random_crop(rng, image, 32, (0.3, 0.8))
        top, left, bottom, right = (round(x) for x in (y0 * 60, x0 * 90, y1 * 60, x1 * 90))
        place, bicubic = (top, left, bottom - top, right - left), v2.InterpolationMode.BICUBIC
        expected = v2.functional.resized_crop(image, *place, [32, 32], bicubic, antialias=True)
        expected = v2.functional.horizontal_flip(expected) if flipped else expected
        assert torch.equal(crop.movedim(-1, 0), expected)
        flips.add(flipped)
    assert flips == {0.0, 1.0}


def test_colors_follow_dinos_distributions():
    multicrop, image = MultiCrop(8, (0.5, 1.0), 2, 8, (0.2, 0.5)), picture(20, 20)
    params = torch.stack([multicrop(image, (0, 0, i)).params for i in range(500)])
    factors, hue = params[..., augment.FACTORS], params[..., augment.HUE]
    sigma = params[..., augment.SIGMA]
    jittered = (factors != 1).any(dim=-1)

    def share(x, expected):    # within four standard deviations
        deviation = (expected * (1 - expected) / x.numel()) ** 0.5
        assert abs(x.float().mean() - expected) <= 4 * deviation

    share(params[..., 4], 0.5)    # flipped
    share(jittered, 0.8)
    share(params[..., augment.GRAY], 0.2)
    share(params[..., augment.GRAY][jittered], 0.2)    # independent
    for view, blurred, solarized in ((0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0), (3, 0.5, 0.0)):
        share(sigma[:, view] > 0, blurred)
        share(params[:, view, augment.SOLARIZE], solarized)
    drawn = torch.cat([factors[jittered], hue[jittered][:, None]], dim=1)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    for values, (low, high) in zip([*drawn.T, sigma[sigma > 0]], ranges):    # each uniform
        assert values.min() >= low and values.max() <= high
        spread = (high - low) / 12**0.5
        assert abs(values.mean() - (low + high) / 2) < 4 * spread / values.numel() ** 0.5
        assert abs(values.std() / spread - 1) < 0.1
    assert (drawn.T.corrcoef() - torch.eye(4)).abs().max() < 4 / len(drawn) ** 0.5
    orders = params[..., augment.ORDER][jittered]
    assert len({tuple(order.tolist()) for order in orders}) == 24
    for position in range(4):
        share(orders[:, 3] == position, 0.25)    # hue comes anywhere


def test_shapes_are_deterministic_balanced_and_lie_on_paper():
    shapes, val = build_dataset("shapes", "train"), build_dataset("shapes", "val")
    image, label = shapes[13]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and label == 3
    assert torch.equal(image, build_dataset("shapes", "train")[13][0])
    assert not torch.equal(image, val[13][0]) and not torch.equal(image, shapes[23][0])
    assert shapes.labels.bincount().tolist() == [500] * 10
    tuning = [build_dataset("shapes-tuning", split) for split in ("train", "val")]
    assert torch.equal(tuning[0][13][0], image) and not torch.equal(tuning[1][13][0], val[13][0])
    for i in range(10):    # what is printed is on the paper, and the mask says which kind it is
        image, mask = shapes.draw(i)
        assert mask.unique().tolist() == [0, 1 + i]
        gray, paper = image.float().mean(dim=0), mask > 0
        corner, right = (slice(-1), slice(-1)), (slice(-1), slice(1, None))
        below = (slice(1, None), slice(-1))
        edges = (gray[corner] - gray[right]).abs() + (gray[corner] - gray[below]).abs()
        number = paper[corner].int() + paper[right] + paper[below]    # of the three on the paper
        assert 0.1 < paper.float().mean() < 0.95
        assert edges[number == 3].mean() > 1.5 * edges[number == 0].mean()    # noise alone
