"""extras/segment.py: images with masks, the 1 x 1 convolution, and the measures."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import close, one_line, tiny_vit
from PIL import Image
from torch import nn
from torchvision import datasets

import evaluate
from extras import segment
from extras.segment import Segmenter, build_segmentation, count_classes
from model import build_encoder
from support.errors import UserError
from support.named_sets import Shapes


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
                mask.putpalette(range(256))    # as VOC's
            mask.save(root / split / "masks" / f"{i}.png")
    return root


def test_a_folder_gives_images_and_masks(tmp_path):
    images = build_segmentation(masked_folder(tmp_path), "train", ignore_index=9)
    for i in range(6):
        image, mask = images[i]
        assert image.shape[1:] == mask.shape == (40, 48 + i)
        assert mask.unique().tolist() == [0, 1, 2, 255]
        assert torch.equal(mask == 2, image[1] == 255) and (mask[image[0] == 220] == 1).all()
    assert count_classes(images) == 3
    assert count_classes(build_segmentation(tmp_path, "train")) == 10    # where 9 is a class


def test_shapes_have_their_kind_as_mask():
    images = build_segmentation("shapes", "val")
    image, mask = Shapes("val").draw(7)
    assert torch.equal(images[7][0], image) and torch.equal(images[7][1], mask.to(torch.uint8))
    assert len(images) == 1000 and count_classes(images) == 11


def test_voc_by_name(tmp_path, monkeypatch):
    """Its download is torchvision's to test. Here: when it is asked for, and what comes out."""
    folder, asked = masked_folder(tmp_path / "images"), []

    class Fake:
        def __init__(self, root, image_set, download):
            if asked:    # the second time
                raise OSError("no route to host")
            asked.append((root, image_set, download))
            self.images, self.masks = ([str(folder / image_set / part / "0.png")]
                                       for part in ("images", "masks"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "VOCSegmentation", Fake)
    images = build_segmentation("voc", "val", ignore_index=9)
    assert asked == [("data", "val", True)] and count_classes(images) == 21
    assert images[0][1].max() == 9    # VOC's own 255 alone is ignored
    with pytest.raises(UserError, match="no route to host"):
        build_segmentation("voc", "val")
    asked.clear()
    (tmp_path / "data/VOCdevkit").mkdir(parents=True)
    build_segmentation("voc", "train")
    assert asked == [("data", "train", False)]    # it is there


def picture(mode, size, color=0):
    return lambda val: Image.new(mode, size, color).save(val / "masks/0.png")


@pytest.mark.parametrize("spoil, word", [
    (lambda val: val.rename(val.parent / "test"), "val/images"),
    (lambda val: [path.unlink() for path in val.glob("images/*")], "no images"),
    (lambda val: (val / "masks/0.png").unlink(), "0.png has no mask"),
    (lambda val: (val / "masks/0.png").write_text("?"), "masks/0.png can't be read"),
    (lambda val: (val / "images/0.png").write_text("?"), "images/0.png can't be read"),
    (picture("RGB", (48, 40)), "RGB"), (picture("1", (48, 40)), "one channel"),
    (picture("L", (8, 8)), "size"), (picture("L", (48, 40), 7), "class 7"),
])
def test_images_without_proper_masks_are_named(spoil, word, tmp_path):
    spoil(masked_folder(tmp_path) / "val")
    with pytest.raises(UserError, match=word):
        images = build_segmentation(tmp_path, "val", ignore_index=9)
        images.classes = 3
        images[0]


@pytest.mark.parametrize("frozen", [True, False])
def test_segmenter_is_a_1x1_convolution_on_normed_patches(frozen):
    vit = tiny_vit(drop_path_rate=0.5 * frozen)
    segmenter, images = Segmenter(vit, 5, frozen).train(), torch.randn(2, 3, 32, 48)
    logits = segmenter(images)
    patches = vit.norm(vit.eval()(images))[:, 1:].mT.unflatten(-1, (4, 6))    # (B, C, h, w)
    head = segmenter.head
    close(logits, F.conv2d(patches, head.weight[..., None, None], head.bias))
    logits.sum().backward()
    trained = {name for name, p in segmenter.named_parameters() if p.grad is not None}
    assert trained == ({"head.weight", "head.bias"} if frozen
                       else {name for name, _ in segmenter.named_parameters()})


def test_an_image_and_its_mask_are_cut_alike():
    """The mask is a threshold of the image, before and after."""
    image = torch.arange(240, dtype=torch.uint8).expand(3, 200, 240)
    crop, mirrored = segment.CropBoth(64, (0.25, 1.0)), set()
    for _ in range(10):
        cut, mask = crop(image, (image[0] > 120).to(torch.uint8))
        assert cut.shape == (3, 64, 64) and mask.shape == (64, 64) and mask.dtype == torch.uint8
        differ = ((cut[0] > 120) != (mask > 0)).float().mean()
        assert differ <= 1 / 64    # a pixel a row, at the edge: nearest is not bicubic
        mirrored.add(bool(cut[0, 0, 0] > cut[0, 0, -1]))
    assert mirrored == {True, False}


def test_pixels_that_are_ignored_have_no_loss():
    logits, images = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 8, 8)
    masks = torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    masks[0, :4] = 255
    large = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
    terms = [-large[b, :, y, x].log_softmax(dim=0)[masks[b, y, x].item()]
             for b, y, x in np.ndindex(2, 8, 8) if masks[b, y, x] != 255]
    close(segment.segmentation_loss(lambda x: logits, images, masks), torch.stack(terms).mean())
    masks[:] = 255    # nothing at all: no nan
    assert segment.segmentation_loss(lambda x: logits, images, masks) == 0


@pytest.mark.parametrize("H, W", [(40, 52), (70, 33)])
def test_sliding_windows_cover_an_image_of_any_size(H, W):
    """Of an encoder whose patches know nothing of each other or their place, any windows do."""
    vit = tiny_vit(depth=0)
    nn.init.zeros_(vit.pos_embed)
    nn.init.normal_(vit.patch_embed.proj.weight)    # or colors would hardly matter
    segmenter, seen = Segmenter(vit, 4, frozen=True), []
    image = torch.randint(0, 256, (3, H, W), dtype=torch.uint8)
    whole = segment.predict(segmenter, image, 48)
    assert whole.shape == (4, H, W)
    vit.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2:]))
    for window in (16, 24, 48):
        seen.clear()
        close(segment.predict(segmenter, image, 48, window), whole)
        assert set(seen) == {(window, window)} and len(seen) > 1


def test_scores_equal_loops():
    prediction = torch.randint(0, 4, (20, 30))
    mask = torch.randint(0, 4, (20, 30)).to(torch.uint8)
    mask[:3] = 255
    prediction[prediction == 2] = 1    # 2 is there and never found, 4 the reverse, 5 neither
    prediction[10, :5] = 4
    values = segment.scores(segment.confusion(prediction, mask, 6))
    pixels = [(t, p) for t, p in zip(mask.flatten().tolist(), prediction.flatten().tolist())
              if t != 255]
    iou, accuracy = [], []
    for k in range(5):
        both = sum(t == k and p == k for t, p in pixels)
        iou.append(both / sum(t == k or p == k for t, p in pixels))
        accuracy += [both / sum(t == k for t, _ in pixels)] if k < 4 else []
    foreground = sum(t > 0 and p > 0 for t, p in pixels)
    precision = foreground / sum(p > 0 for _, p in pixels)
    recall = foreground / sum(t > 0 for t, _ in pixels)
    assert values == pytest.approx({
        "mIoU": 100 * np.mean(iou), "mAcc": 100 * np.mean(accuracy),
        "pixel_accuracy": 100 * np.mean([t == p for t, p in pixels]),
        "foreground_F": 100 * 1.3 * precision * recall / (0.3 * precision + recall),
    })


@pytest.fixture
def command(tmp_path):
    folder = masked_folder(tmp_path / "images")
    torch.save(build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "backbone.pth")
    return ["segment", "--pretrained_weights", str(tmp_path / "backbone.pth"),
            "--data_path", str(folder), "--ignore_index", "9", "--epochs", "6",
            "--batch_size_per_gpu", "3", "--num_workers", "0"]


@pytest.mark.parametrize("flags", [["--frozen", "--lr", "0.5"], ["--sliding"]])
def test_segment_from_the_command_line_and_again(flags, command, tmp_path, capsys):
    path = tmp_path / "result.json"
    result = evaluate.main([*command, *flags, "--json", str(path)])
    assert json.loads(path.read_text()) == result
    assert (result["images"], result["classes"], result["test_size"]) == (6, 3, 40)
    assert result["mIoU"] > 40 or "--frozen" not in flags    # 54 with any seed; untrained 20
    capsys.readouterr()
    again = evaluate.main([*command, *flags])    # finished: measured anew, not trained anew
    assert "measured again" in capsys.readouterr().out and again["mIoU"] == result["mIoU"]


@pytest.mark.parametrize("flags, word", [
    (["--val_split", "test"], "test/images"), (["--classes", "2"], "class 2"),
    (["--sliding", "--test_size", "16"], "--sliding"), (["--scale", "1", "0.5"], "--scale"),
    (["--data_path", "nowhere"], "nowhere"), (["--image_size", "30"], "patch size 8"),
])
def test_bad_flags_get_one_line(flags, word, command, capsys):
    assert word in one_line(capsys, evaluate.main, [*command, *flags], program="evaluate.py")
