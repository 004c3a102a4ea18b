"""extras/segment.py, masks.py, upernet.py, pyramid.py: data sets, heads, prediction, measures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import close, one_line, picture, tiny_vit
from PIL import ExifTags, Image
from torch import nn
from torchvision import datasets

import evaluate
from extras import masks, segment, upernet
from extras.masks import IGNORED, build_segmentation, count_classes
from extras.pyramid import FeaturePyramid, four_maps
from extras.segment import Segmenter
from model import ARCHITECTURES, build_encoder
from support.errors import UserError
from support.evaluate_options import parse_evaluate_args
from support.fit import Augmented, TrainingBatches, WholeEpochs, fit_adamw
from support.named_sets import Shapes
from support.optim import layer_groups

CPU = torch.device("cpu")


def write_pair(image_path, mask_path, mask, palette=False):
    """Write an image that is bright where the mask is not 0, and the mask (H, W) or (H, W, 3)."""
    for path in (image_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    bright = (mask > 0).reshape(*mask.shape[:2], -1).any(axis=2)
    Image.fromarray(np.repeat(200 * bright[..., None], 3, axis=2).astype(np.uint8)).save(image_path)
    mask = Image.fromarray(mask)
    if palette:    # as VOC's
        mask.putpalette(range(256))
    mask.save(mask_path)


def masked_folder(root, number=6):
    """Write train and val of images and masks: 1 where bright, 2 left where green, 9 right: void.

    Half of the masks have a palette.
    """
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for i in range(number):
            mask = np.zeros((40, 48 + i), dtype=np.uint8)
            mask[10 + i : 30, 15:35] = 1
            image = np.repeat(200 * mask[..., None] + 20, 3, axis=2)
            image[:, :4] = (0, 255, 0)
            mask[:, :4], mask[:, -4:] = 2, 9
            Image.fromarray(image).save(root / split / "images" / f"{i}.png")
            mask = Image.fromarray(mask)
            if i % 2:
                mask.putpalette(range(256))
            mask.save(root / split / "masks" / f"{i}.png")
            (root / split / "images/._0.png").write_text("a hidden twin")
    return root


# --- masks ----------------------------------------------------------------------------------------


def test_a_folder_gives_images_and_masks(tmp_path):
    images = build_segmentation(masked_folder(tmp_path), "train", ignore_index=9)
    assert len(images) == 6
    for i in range(6):
        image, mask = images[i]
        assert image.shape[1:] == mask.shape == (40, 48 + i) and mask.dtype == torch.int32
        assert mask.unique().tolist() == [IGNORED, 0, 1, 2]
        assert torch.equal(mask == 2, image[1] == 255) and (mask[image[0] == 220] == 1).all()
    assert count_classes(images) == count_classes(images, 3) == 3
    assert count_classes(images, 7) == 7    # others may be absent


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_stays_as_it_is_stored_as_its_mask_does(orientation, tmp_path):
    """Masks know no orientation. Turned by 180 degrees an image would have their size, too."""
    masked_folder(tmp_path, 1)
    path = tmp_path / "train/images/0.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.open(path).save(path, exif=exif)
    image, mask = build_segmentation(tmp_path, "train", 9)[0]
    assert image.shape[1:] == mask.shape
    assert torch.equal(image[0] > 100, mask == 1)


@pytest.mark.parametrize("name", ["shapes", "voc"])
def test_named_sets_name_their_splits(name):
    with pytest.raises(UserError, match=f"{name} has no split test: .*train.*val"):
        build_segmentation(name, "test")


def test_shapes_have_their_kind_as_mask():
    images = build_segmentation("shapes", "val")
    image, mask = Shapes("val").draw(7)
    assert torch.equal(images[7][0], image) and torch.equal(images[7][1], mask)
    assert len(images) == 1000 and count_classes(images) == 11
    assert not torch.equal(build_segmentation("shapes-tuning", "val")[7][0], image)


def rgb(numbers):
    return np.stack([numbers % 256, numbers // 256, 0 * numbers], axis=2).astype(np.uint8)


@pytest.mark.parametrize("layout, code, classes, numbers, expected", [
    ("folder", lambda x: x.astype(np.uint8), 4, [0, 3, 1, 255, 2], [0, 3, 1, IGNORED, 2]),
    ("folder", lambda x: x.astype(np.uint16), 300, [0, 255, 299, 7, 1], [0, 255, 299, IGNORED, 1]),
    ("ade20k", lambda x: x.astype(np.uint8), 150, [0, 1, 2, 150, 9], [IGNORED, 0, 1, 149, 8]),
    ("ImageNetS300", rgb, 301, [0, 1, 255, 300, 1000], [0, 1, 255, 300, IGNORED]),
])
def test_masks_are_read_as_coded_and_written_so(
        layout, code, classes, numbers, expected, tmp_path):
    """Predictions of what a mask says give the mask again, where it counts."""
    numbers = np.array([numbers] * 4)
    image, mask = {
        "folder": ("val/images/a/x.png", "val/masks/a/x.png"),
        "ade20k": ("images/validation/a/x.png", "annotations/validation/a/x.png"),
        "ImageNetS300": ("validation/a/x.JPEG", "validation-segmentation/a/x.png"),
    }[layout]
    root = tmp_path / layout
    write_pair(root / image, root / mask, code(numbers))
    known_by = {"ade20k": "annotations/training", "ImageNetS300": "train-semi-segmentation"}
    (root / known_by.get(layout, "")).mkdir(parents=True, exist_ok=True)
    images = build_segmentation(root, "val", ignore_index=7 if classes == 300 else None)
    found = images[0][1]
    assert found.tolist() == [expected] * 4 and (images.classes or classes) == classes
    images.write(0, found.clamp(min=0), tmp_path)
    again = np.array(Image.open(tmp_path / "a/x.png"))
    counted = np.array(expected) != IGNORED
    assert (again[:, counted] == code(numbers)[:, counted]).all()


def test_imagenet_s_is_known_by_the_name_of_a_link_too(tmp_path):
    write_pair(tmp_path / "there/train-semi/a/x.JPEG",
               tmp_path / "there/train-semi-segmentation/a/x.png", rgb(np.ones((4, 5), int)))
    (tmp_path / "ImageNetS919").symlink_to("there", target_is_directory=True)
    assert build_segmentation(tmp_path / "ImageNetS919", "train").classes == 920
    (tmp_path / "there").rename(tmp_path / "ImageNet-S-50")
    assert build_segmentation(tmp_path / "ImageNet-S-50", "train").classes == 51


def test_test_images_of_imagenet_s_have_no_masks(tmp_path):
    mask = rgb(np.arange(20).reshape(4, 5))
    write_pair(tmp_path / "train-semi/a/x.JPEG", tmp_path / "train-semi-segmentation/a/x.png", mask)
    write_pair(tmp_path / "test/a/x.JPEG", tmp_path / "withheld/x.png", mask)
    images = build_segmentation(tmp_path, "test")
    assert not images.has_masks and (images[0][1] == IGNORED).all() and len(images) == 1
    with pytest.raises(UserError, match="--classes"):    # the folder's name does not say
        count_classes(build_segmentation(tmp_path, "train"))


def test_voc_by_name_and_with_sbd(tmp_path, monkeypatch):
    """Its download is torchvision's to test. Here: when it is asked for, and what comes out."""
    io = pytest.importorskip("scipy.io")
    folder, asked = masked_folder(tmp_path / "images"), []

    class Fake:
        def __init__(self, root, image_set, download):
            if asked and download:    # the second time
                raise OSError("no route to host")
            asked.append((root, image_set, download))
            self.images, self.masks = ([str(folder / image_set / part / f"{i}.png") for i in (0, 1)]
                                       for part in ("images", "masks"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "VOCSegmentation", Fake)
    images = build_segmentation("voc", "val", ignore_index=9)
    assert asked == [("data", "val", True)] and count_classes(images) == 21
    assert images[0][1].max() == 9    # VOC's own 255 alone is ignored
    (tmp_path / "data/VOCdevkit/VOC2007").mkdir(parents=True)
    with pytest.raises(UserError, match="no route to host"):
        build_segmentation("voc", "val")
    (tmp_path / "data/VOCdevkit/VOC2012").mkdir()
    assert len(build_segmentation("voc", "train")) == 2 and asked[-1] == ("data", "train", False)
    sbd = tmp_path / "data/sbd"
    for name, names in (("train", "0 1 new"), ("val", "newer 1")):    # 0 and 1 are VOC's own
        (sbd / "cls").mkdir(parents=True, exist_ok=True)
        (sbd / f"{name}.txt").write_text(names.replace(" ", "\n"))
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    write_pair(sbd / "img/new.jpg", tmp_path / "unused.png", mask)
    cell = np.zeros(1, dtype=[("Segmentation", object)])
    cell["Segmentation"][0] = mask
    io.savemat(sbd / "cls/new.mat", {"GTcls": cell})
    images = build_segmentation("voc", "train")
    assert images.names == ["0", "1", "new", "newer"]
    assert images[2][1].tolist() == mask.tolist()


def saved(mode, size, color=0):
    return lambda val: Image.new(mode, size, color).save(val / "masks/0.png")


@pytest.mark.parametrize("spoil, word", [
    (lambda val: val.rename(val.parent / "test"), "val/images"),
    (lambda val: [path.unlink() for path in val.glob("images/*")], "no images"),
    (lambda val: (val / "masks/0.png").unlink(), "0.png has no mask"),
    (lambda val: (val / "masks/0.png").write_text("?"), "masks/0.png can't be read"),
    (lambda val: (val / "images/0.png").write_text("?"), "images/0.png can't be read"),
    (lambda val: Image.new("L", (8, 8)).save(val / "images/0.jpg"), "ending"),
    (saved("RGB", (48, 40)), "R \\+ 256 G"), (saved("I;16", (48, 40)), "--ignore_index"),
    (saved("L", (8, 8)), "size"), (saved("L", (48, 40), 7), "class 7"),
])
def test_images_without_proper_masks_are_named(spoil, word, tmp_path):
    spoil(masked_folder(tmp_path) / "val")
    with pytest.raises(UserError, match=word):
        images = build_segmentation(tmp_path, "val", None if "ignore" in word else 9)
        images.classes = 3
        images[0]


@pytest.mark.parametrize("numbers, ignore_index, classes, words", [
    ([0, 255], None, None, ("0, 255", "one class")),
    ([0, 255], 254, None, ("0, 255", "--classes 256")),
    ([255], None, None, ("255", "nothing")),
    ([0, 1, 5], None, None, ("0, 1, 5", "--ignore_index", "--classes 6")),
    ([0, 1, 5], None, 4, ("0, 1, 5", "0 to 3")),
    ([0, 255], None, 2, ("0, 255", "one class")),
    ([0, 1, -2], -1, 3, ("-2, 0, 1", "0 to 2")),
])
def test_masks_that_can_hardly_be_meant_are_shown(numbers, ignore_index, classes, words, tmp_path):
    kind, ending = (np.uint8, "png") if min(numbers) >= 0 else (np.int32, "tif")
    mask = np.array([numbers], dtype=kind)
    write_pair(tmp_path / "val/images/x.png", tmp_path / f"val/masks/x.{ending}", mask)
    with pytest.raises(UserError) as error:
        count_classes(build_segmentation(tmp_path, "val", ignore_index), classes)
    assert all(word in str(error.value) for word in words)


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_the_linear_head_is_a_1x1_convolution_on_newly_normed_patches(frozen):
    vit = tiny_vit(drop_path_rate=0.5 * frozen)
    segmenter, images = Segmenter(vit, "linear", 5, frozen).train(), torch.randn(2, 3, 32, 48)
    (logits,) = segmenter(images)
    patches = F.layer_norm(vit.eval()(images)[:, 1:], (12,), eps=1e-6).mT.unflatten(-1, (4, 6))
    linear = segmenter.head.linear
    expected = F.conv2d(patches, linear.weight[..., None, None], linear.bias)
    close(logits, F.interpolate(expected, scale_factor=2, mode="bilinear", align_corners=False))
    logits.sum().backward()
    trained = {name for name, p in segmenter.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in segmenter.named_parameters()
                       if name.startswith("head.") or not (frozen or "encoder.norm" in name)}


def test_four_maps_are_of_four_depths():
    """After blocks 4, 6, 8 and 12 of 12, as those blocks left them, normed if asked."""
    vit, images = tiny_vit(depth=12), torch.randn(2, 3, 32, 48)
    layers = [layer[:, 1:].mT.unflatten(-1, (4, 6))
              for layer in vit.get_intermediate_layers(images, 12)]
    for found, number in zip(four_maps(vit, images), (4, 6, 8, 12)):
        close(found, layers[number - 1])
    last = four_maps(vit, images, norm=False)[3]
    close(last, vit(images)[:, 1:].mT.unflatten(-1, (4, 6)))


@pytest.mark.parametrize("name, side, multiples", [
    ("vit_nano", (48, 80), (4, 2, 1, 1 / 2)), ("resnet50", (64, 96), (8, 4, 2, 1)),
])
def test_each_map_of_a_pyramid_has_its_size(name, side, multiples):
    """In patches a side. An odd number is halved upward, so nothing is left out."""
    encoder = build_encoder(name, 32, 16 if name == "vit_nano" else 32)
    pyramid = FeaturePyramid(encoder)
    maps = pyramid(four_maps(encoder, torch.randn(2, 3, *side)))
    shapes = [tuple(-int(-s * multiple // encoder.patch_size) for s in side)
              for multiple in multiples]
    assert [tuple(m.shape[-2:]) for m in maps] == shapes
    assert [m.shape[1] for m in maps] == pyramid.dims


@pytest.mark.parametrize("name", [
    "vit_nano", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_every_parameter_of_upernet_gets_a_gradient(name):
    model = Segmenter(build_encoder(name, 32, 8), "upernet", 5, frozen=False).train()
    size = (24, 40) if name == "vit_nano" else (64, 64)
    targets = torch.randint(0, 5, (2, *size), dtype=torch.int32)
    segment.segmentation_loss(model, torch.rand(2, 3, *size), targets).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [logits.shape for logits in model(torch.rand(2, 3, *size))] == [(2, 5, *size)] * 2


def test_upernet_equals_its_definition():
    """Pyramid pooling on the last map, a top-down sum, all maps at the first one's size."""
    vit, images = tiny_vit(depth=12), torch.randn(2, 3, 48, 64)
    head = upernet.UperNet(vit, 5).eval()
    a, b, c, d = head.pyramid(four_maps(vit, images))
    pools = [pool[1](F.adaptive_avg_pool2d(d, side))
             for pool, side in zip(head.pooling.pools, (1, 2, 3, 6))]
    wide = [upernet.upsample(pooled, d.shape[-2:]) for pooled in pools]
    d = head.pooling.merge(torch.cat([d, *wide], dim=1))
    c = head.laterals[2](c) + upernet.upsample(d, c.shape[-2:])
    b = head.laterals[1](b) + upernet.upsample(c, b.shape[-2:])
    a = head.laterals[0](a) + upernet.upsample(b, a.shape[-2:])
    first = a.shape[-2:]
    a, b, c = (convolve(x) for convolve, x in zip(head.outputs, (a, b, c)))
    x = head.fuse(torch.cat([upernet.upsample(x, first) for x in (a, b, c, d)], dim=1))
    close(head(four_maps(vit, images), (48, 64))[0], upernet.upsample(head.classify(x), (48, 64)))


def test_the_loss_is_over_pixels_that_count_with_auxiliary_logits_at_less():
    logits, images = torch.randn(2, 2, 3, 4, 4), torch.rand(2, 3, 8, 8)
    targets = torch.randint(0, 3, (2, 8, 8), dtype=torch.int32)
    targets[0, :4] = IGNORED
    middle = targets[:, 1::2, 1::2]    # the nearest to the middle of a cell of two by two
    terms = [[-of_head[b, :, y, x].log_softmax(dim=0)[middle[b, y, x].item()]
              for b, y, x in np.ndindex(2, 4, 4) if middle[b, y, x] != IGNORED]
             for of_head in logits]
    means = [torch.stack(of_head).mean() for of_head in terms]
    close(segment.segmentation_loss(lambda x: logits, images, targets), means[0] + 0.4 * means[1])
    targets[:] = IGNORED    # nothing at all: no nan
    assert segment.segmentation_loss(lambda x: logits, images, targets) == 0


# --- training samples and schedules ---------------------------------------------------------------


@pytest.mark.parametrize("crop", [
    segment.CropBoth(64, (0.25, 1.0), colors=False), upernet.ScaleAndCrop(64)])
def test_an_image_and_its_mask_are_cut_alike(crop, monkeypatch):
    """The mask is a threshold of the image, before and after, but for the border of one."""
    monkeypatch.setattr(upernet, "DISTORTION", nn.Identity())
    image = torch.arange(240, dtype=torch.uint8).expand(3, 200, 240)
    mirrored, padded = set(), set()
    for _ in range(20):
        cut, mask = crop(image, (image[0] > 120).to(torch.int32))
        assert cut.shape == (3, 64, 64) and mask.shape == (64, 64) and mask.dtype == torch.int32
        inside = mask != IGNORED
        differ = ((cut[0] > 120) != (mask > 0))[inside].float().mean()
        assert differ <= 2 / 64    # a pixel a row at each edge: nearest is not bilinear
        padded.add(bool(inside.all()))
        row = cut[0][inside.any(dim=1)][0][inside.any(dim=0)]
        mirrored.add(bool(row[0] > row[-1]))
    assert mirrored == {True, False}
    assert padded == ({True, False} if isinstance(crop, upernet.ScaleAndCrop) else {True})


@pytest.mark.parametrize("crop", [
    segment.CropBoth(64, (0.25, 1.0), colors=False), upernet.ScaleAndCrop(64)])
def test_a_mask_is_not_shifted_against_its_image(crop, monkeypatch):
    """Both hold the number of the column: on average they agree to a tenth of a pixel."""
    monkeypatch.setattr(upernet, "DISTORTION", nn.Identity())
    columns, shifts = torch.arange(240, dtype=torch.uint8).expand(3, 200, 240), []
    for _ in range(300):
        cut, mask = crop(columns, columns[0].to(torch.int32))
        mine = mask[0] != IGNORED    # padding is below and right
        cut, mask = cut[0, 0, mine].double()[2:-2], mask[0, mine].double()[2:-2]
        shifts.append((mask - cut).mean() / (cut[-1] - cut[0]).abs() * (len(cut) - 1))
    assert abs(np.mean(shifts)) < 0.1    # 0.5 for the nearest of the upper left


@pytest.mark.parametrize("change", [
    segment.CropBoth(32, (1.0, 1.0), colors=True).colors, upernet.DISTORTION])
def test_colors_change_and_are_left_alone_at_times(change):
    image = picture(32, 32)
    same = [torch.equal(change(image), image) for _ in range(200)]
    assert 0 < sum(same) < 50    # 0.2 * 0.8 * 0.5 and 1 / 16 of them


def test_crops_of_upernet_are_of_half_to_twice_the_size():
    """With a short side of 128 a crop of 64 pixels is of 256 to 64 columns."""
    columns, scales = torch.arange(256, dtype=torch.uint8).expand(3, 128, 256), []
    crop = upernet.ScaleAndCrop(64)
    for _ in range(200):
        mask = crop(columns, columns[0].to(torch.int32))[1]
        line = mask[(mask != IGNORED).any(dim=1)][0]
        line = line[line != IGNORED].double()
        scales.append(2 * 63 / (line[-1] - line[0]).abs().item())
    assert 0.48 < min(scales) < 0.6 and 1.8 < max(scales) < 2.1


@pytest.mark.parametrize("head, arch, layout, processes, expected", [
    ("upernet", "vit_nano", "voc", 4, (20_000, 4, 3e-5, 0.9, True, 512, 512)),
    ("upernet", "vit_nano", "ade20k", 32, (160_000, 1, 3e-5, 0.9, True, 512, 512)),
    ("upernet", "vit_base", "voc", 8, (20_000, 2, 8e-5, 0.65, True, 512, 512)),
    ("linear", "vit_nano", "imagenet-s", 8, (None, 32, 5e-4, 0.5, False, 224, 256)),
])
def test_defaults_are_the_paper_s(head, arch, layout, processes, expected):
    args = parse_evaluate_args(["segment", "--pretrained_weights", "x.pth", "--data_path", "voc",
                                "--head", head])
    encoder = SimpleNamespace(heads=3, dim=ARCHITECTURES[arch]["dim"], patch_size=16)
    sizes = segment.settle(args, encoder, 224, layout, SimpleNamespace(size=processes))
    assert (args.steps, args.batch_size_per_gpu, args.lr, args.layer_decay, args.sliding,
            *sizes) == expected


@pytest.mark.parametrize("flags, rate", [
    ([], 0.1), (["--drop_path_rate", "0"], 0), (["--frozen"], 0)])
def test_a_frozen_encoder_has_no_stochastic_depth(flags, rate):
    command = ["segment", "--pretrained_weights", "x.pth", "--data_path", "voc", *flags]
    assert parse_evaluate_args(command).drop_path_rate == rate


def test_no_class_fills_more_than_three_quarters_of_a_crop_where_that_can_be():
    mask = torch.zeros(64, 64, dtype=torch.int32)
    mask[:, 40:] = 1
    mask[:20] = IGNORED    # does not count
    crop, shares = upernet.ScaleAndCrop(32), []
    for _ in range(50):
        cut = mask[crop.choose(mask, 32)]
        shares.append((cut[cut != IGNORED] == 0).float().mean())
    assert all(0.25 <= share <= 0.75 for share in shares)
    assert mask[:32, :32][crop.choose(torch.zeros(32, 32, dtype=torch.int32), 20)].numel() == 400


def test_the_schedule_of_upernet_rises_and_falls_linearly():
    rates = upernet.linear_schedule(3e-5, 20_000, 1500)
    assert len(rates) == 20_000
    assert rates[0].item() == pytest.approx(3e-11) and rates[750] == pytest.approx(
        3e-5 * (1 - 750 / 20_000) * (1e-6 + 0.5 * (1 - 1e-6)))
    assert rates[1500].item() == pytest.approx(3e-5 * (1 - 1500 / 20_000))
    assert rates[-1].item() == pytest.approx(3e-5 / 20_000)
    assert upernet.linear_schedule(1.0, 4, 0).tolist() == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_has_every_image(processes):
    """Its last batch is smaller, and where it starts in mid-epoch makes no difference."""
    def epochs(start):
        for rank in range(processes):
            keys = iter(WholeEpochs(10, 2, rank, processes, seed=0, start=start))
            yield [next(keys) for _ in range(2 * steps - start)]

    steps = -(-10 // (2 * processes))
    whole = list(epochs(0))
    for epoch in (0, 1):
        batches = [batch for rank in whole for batch in rank[epoch * steps : (epoch + 1) * steps]]
        assert {index for batch in batches for _, index in batch} == set(range(10))
        assert {number for batch in batches for number, _ in batch} == {epoch}
    assert [rank[steps + 1 :] for rank in whole] == list(epochs(steps + 1))


def fit_upernet(images, path, loss, num_workers=0):
    """Train a small UperNet for 5 steps, saving after 2 and 4; return it."""
    torch.manual_seed(5)
    model = Segmenter(tiny_vit(drop_path_rate=0.2), "upernet", 3, frozen=False)
    samples = Augmented(images, range(6), upernet.ScaleAndCrop(32), seed=0)
    batches = TrainingBatches(samples, 2, num_workers, CPU)
    rates = upernet.linear_schedule(1e-3, 5, 2).tolist()
    groups = layer_groups(model.encoder, model.head, 0.9, 0.05)
    fit_adamw(model, loss, batches, groups, rates, 0, path, {"x": 1}, save_every=2)
    return model


def test_upernet_goes_on_in_mid_run_and_ends_the_same(tmp_path):
    """Bit for bit, batch norms' statistics too: killed in step 4, in the second epoch."""
    images = build_segmentation(masked_folder(tmp_path), "train", ignore_index=9)
    loss, calls = segment.segmentation_loss, []

    def killed(*batch):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return loss(*batch)

    whole = fit_upernet(images, tmp_path / "whole.pth", loss)
    with pytest.raises(KeyboardInterrupt):
        fit_upernet(images, tmp_path / "parts.pth", killed)
    assert torch.load(tmp_path / "parts.pth", weights_only=True)["step"] == 2
    parts = fit_upernet(images, tmp_path / "parts.pth", loss)
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values()):
        assert torch.equal(a, b)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """After a loss of 0 whose gradient is nan, in the step before a save."""
    images, losses = build_segmentation(masked_folder(tmp_path), "train", ignore_index=9), []

    def loss(model, *batch):
        losses.append(segment.segmentation_loss(model, *batch))
        return losses[-1] if len(losses) == 1 else (losses[-1] * 0.0).sqrt()

    with pytest.raises(UserError, match="not finite"):
        fit_upernet(images, tmp_path / "x.pth", loss)
    assert not (tmp_path / "x.pth").exists()


# --- prediction and measures ----------------------------------------------------------------------


def local_model():
    """An encoder whose patches know nothing of each other or their place, and a convolution."""
    vit = tiny_vit(depth=0)
    nn.init.zeros_(vit.pos_embed)
    nn.init.normal_(vit.patch_embed.proj.weight)    # or colors would hardly matter
    segmenter = Segmenter(vit, "linear", 4, frozen=True).eval()
    nn.init.normal_(segmenter.head.linear.weight)
    return segmenter


@pytest.mark.parametrize("H, W", [(40, 52), (70, 33)])
def test_sliding_windows_cover_an_image_of_any_size(H, W):
    """Each pixel gets the mean of the logits of the windows that it lies in."""
    model, window = local_model(), 24
    image = picture(H, W)
    sides = [round(side * 48 / min(H, W)) for side in (H, W)]
    x, total, times = segment.resized(image, sides), torch.zeros(4, *sides), torch.zeros(sides)
    tops, lefts = (segment.starts(side, window) for side in sides)
    assert tops[0] == 0 and tops[-1] == sides[0] - window
    assert all(b - a <= 16 for a, b in zip(tops, tops[1:]))    # 2/3 of it
    for y, x0 in ((top, left) for top in tops for left in lefts):
        logits = model(x[..., y : y + window, x0 : x0 + window])[0]
        large = F.interpolate(logits, size=(window, window), mode="bilinear", align_corners=False)
        total[:, y : y + window, x0 : x0 + window] += large[0].detach()
        times[y : y + window, x0 : x0 + window] += 1
    assert times.min() == 1
    mean = F.interpolate((total / times)[None], (H, W), mode="bilinear", align_corners=False)
    found = segment.predict(model, image, 48, window)
    assert torch.equal(found, mean[0].argmax(dim=0)) and len(found.unique()) > 1


def test_the_long_side_is_cut_to_whole_patches():
    model, seen = local_model(), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    assert segment.predict(model, picture(40, 59), 48).shape == (40, 59)
    assert seen == [(48, 64)]    # 70.8, down to patches of 8


def test_large_images_are_decided_small():
    logits = torch.randn(1, 3, 4, 6)
    large = segment.classes_of(logits, (200, 300), most=150)
    small = segment.classes_of(logits, (100, 150))
    assert large.shape == (200, 300) and torch.equal(large[::2, ::2], small)


def test_scores_equal_loops():
    prediction = torch.randint(0, 4, (20, 30))
    mask = torch.randint(0, 4, (20, 30), dtype=torch.int32)
    mask[:3] = IGNORED
    prediction[prediction == 2] = 1    # 2 is there and never found, 4 the reverse, 5 neither
    prediction[10, :5] = 4
    counts = segment.count_pixels(prediction, mask, 6)
    pixels = [(t, p) for t, p in zip(mask.flatten().tolist(), prediction.flatten().tolist())
              if t != IGNORED]
    iou, accuracy = [], []
    for k in range(5):
        both = sum(t == k and p == k for t, p in pixels)
        iou.append(100 * both / sum(t == k or p == k for t, p in pixels))
        accuracy += [100 * both / sum(t == k for t, _ in pixels)] if k < 4 else []
    foreground = sum(t > 0 and p > 0 for t, p in pixels)
    precision = foreground / sum(p > 0 for _, p in pixels)
    recall = foreground / sum(t > 0 for t, _ in pixels)
    for absent_count, mean in ((False, np.mean(iou)), (True, sum(iou) / 6)):
        values = segment.scores(counts, absent_count)
        assert values.pop("IoU") == [*map(pytest.approx, iou), None]
        assert values == pytest.approx({
            "mIoU": mean, "mAcc": np.mean(accuracy),
            "pixel_accuracy": 100 * np.mean([t == p for t, p in pixels])})
    f = 1.3 * precision * recall / (0.3 * precision + recall)
    assert segment.foreground_f(counts).item() == pytest.approx(f)


def test_f_is_the_mean_over_images_with_a_foreground(monkeypatch):
    """Of F = 1 on a small object, F = 0 on a large one, and an image that has none."""
    truth = [torch.zeros(6, 6, dtype=torch.int32) for _ in range(3)]
    truth[0][:1, :2], truth[1][:4] = 1, 2
    found = iter([truth[0].long(), torch.zeros(6, 6).long(), torch.ones(6, 6).long()])
    monkeypatch.setattr(segment, "predict", lambda *arguments: next(found))

    class Images(list):
        layout, has_masks = "folder", True

    class Model:
        classes = 3

    images = Images((torch.zeros(3, 6, 6, dtype=torch.uint8), mask) for mask in truth)
    values = segment.evaluate_segmentation(Model, images, 8, None, CPU)
    assert values["foreground_F"] == pytest.approx(50)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path):
    folder = masked_folder(tmp_path / "images")
    torch.save(build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "backbone.pth")
    return ["segment", "--pretrained_weights", str(tmp_path / "backbone.pth"),
            "--data_path", str(folder), "--ignore_index", "9", "--batch_size_per_gpu", "3",
            "--num_workers", "0", "--output_dir", str(tmp_path / "run")]


@pytest.mark.parametrize("flags", [
    ["--frozen", "--lr", "0.5", "--epochs", "6"],
    ["--head", "upernet", "--steps", "4", "--image_size", "32", "--checkpoint_steps", "2"],
])
def test_segment_from_the_command_line_and_again(flags, command, tmp_path, capsys):
    path = tmp_path / "result.json"
    result = evaluate.main([*command, *flags, "--json", str(path), "--pictures", "2"])
    assert json.loads(path.read_text()) == result
    size = 40 if "--frozen" in flags else 32
    assert (result["images"], result["classes"], result["test_size"]) == (6, 3, size)
    assert len(result["IoU"]) == 3
    assert result["mIoU"] > 40 or "--frozen" not in flags    # 54 with any seed; untrained 20
    assert (tmp_path / "run/segmentation.png").exists()
    capsys.readouterr()
    folder = tmp_path / "predictions"
    again = evaluate.main([*command, *flags, "--predictions", str(folder)])
    assert "measured again" in capsys.readouterr().out and again["mIoU"] == result["mIoU"]
    predicted = build_segmentation(tmp_path / "images", "val", 9)
    predicted.masks = [folder / f"{i}.png" for i in range(6)]    # they are masks
    truth = build_segmentation(tmp_path / "images", "val", 9)
    counts = sum(segment.count_pixels(predicted[i][1], truth[i][1], 3) for i in range(6))
    assert segment.scores(counts, False)["mIoU"] == pytest.approx(result["mIoU"])


@pytest.mark.parametrize("flags, word", [
    (["--val_split", "test"], "test/images"), (["--classes", "2"], "0 to 1"),
    (["--sliding", "--test_size", "16"], "--no-sliding"), (["--scale", "1", "0.5"], "--scale"),
    (["--data_path", "nowhere"], "nowhere"), (["--image_size", "30"], "patch size 8"),
    (["--data_path", "shapes"], "--ignore_index"), (["--steps", "9"], "--head upernet"),
    (["--head", "upernet", "--epochs", "9"], "--epochs"),
    (["--frozen", "--layer_decay", "0.5"], "--layer_decay"),
    (["--frozen", "--drop_path_rate", "0"], "--drop_path_rate"),
    (["--head", "upernet", "--steps", "9", "--warmup_steps", "9"], "--warmup_steps"),
    (["--head", "upernet", "--image_size", "32", "--batch_size_per_gpu", "1"], "1 image"),
])
def test_bad_flags_get_one_line(flags, word, command, capsys):
    assert word in one_line(capsys, evaluate.main, [*command, *flags], program="evaluate.py")


def test_colors_of_classes_differ():
    colors = [masks.color(k) for k in range(IGNORED, 151)]
    assert len(set(colors)) == len(colors)
