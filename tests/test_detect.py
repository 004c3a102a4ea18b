"""extras/detect.py and extras/coco.py: the cascade, COCO's images and results, the command."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import close, one_line, tiny_vit
from PIL import ExifTags, Image

import evaluate
from extras import detect
from extras.coco import CocoImages, average_precision
from extras.detect import as_lists, build_detector, learning_rate
from model import build_encoder
from support.errors import UserError


def detector(encoder=None, classes=3):
    return build_detector(encoder or tiny_vit(), classes, side=64, width=8, rois=16)


def examples():
    """Two images of different sizes and their objects."""
    images = [torch.rand(3, 64, 80), torch.rand(3, 90, 60)]
    targets = []
    for image, corners in zip(images, ([[8, 8, 40, 48], [30, 20, 70, 60]], [[5, 10, 50, 80]])):
        masks = torch.zeros(len(corners), *image.shape[1:], dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, corners):
            mask[y0:y1, x0:x1] = 1
        labels = torch.arange(len(corners)) + 1
        targets.append({"boxes": torch.tensor(corners).float(), "masks": masks, "labels": labels})
    return images, targets


@pytest.mark.parametrize("encoder", [
    tiny_vit, pytest.param(lambda: build_encoder("resnet50"), marks=pytest.mark.slow)])
def test_every_parameter_gets_a_gradient(encoder):
    model = detector(encoder()).train()
    sum(model(*examples()).values()).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not without and all(name.startswith("backbone.encoder.norm.") for name in frozen)


def test_stages_ask_for_ever_better_boxes():
    """IoU from 0.5, 0.6, 0.7 on; deltas in units of 1, 2, 3 times (10, 10, 5, 5)."""
    stages = detector().roi_heads.stages
    truth, label = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([2])
    boxes = torch.tensor([[0.0, 0, 100, h] for h in (45, 55, 65, 75)])    # of IoU h / 100
    for stage, objects, unit in zip(stages, (3, 2, 1), (1, 2, 3)):
        _, labels = stage.assign_targets_to_proposals([boxes], [truth], [label])
        assert labels[0].tolist() == [0] * (4 - objects) + [2] * objects
        deltas = unit * torch.tensor([[10.0, -10, 5 * math.log(2), 0]])
        close(stage.box_coder.decode(deltas, [truth])[0], torch.tensor([[50.0, -100, 250, 0]]))


def test_stages_weigh_one_a_half_and_a_quarter():
    model = detector().train()
    for stage in model.roi_heads.stages:
        torch.nn.init.zeros_(stage.box_predictor.cls_score.weight)    # all classes equally likely
    losses = model(*examples())
    for number, weight in enumerate((1, 0.5, 0.25), start=1):
        close(losses[f"class_{number}"].item(), weight * math.log(4))


def test_a_stage_starts_from_the_boxes_of_the_one_before():
    """Here the first two move every box of the likeliest class, 2, by a tenth to the right."""
    model, seen = detector().eval(), []
    for stage in model.roi_heads.stages:
        torch.nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        stage.box_predictor.cls_score.bias.data[2] = 9
        stage.box_predictor.bbox_pred.bias.data[4 * 2] = 0.1 * stage.box_coder.weights[0]
        stage.box_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1][0]))
    with torch.no_grad():
        model(examples()[0][:1])
    for before, after in zip(seen, seen[1:]):
        moved = before.clone()
        moved[:, [0, 2]] += 0.1 * (before[:, 2:3] - before[:, 0:1])
        moved[:, [0, 2]] = moved[:, [0, 2]].clamp(max=80)
        close(after, moved, atol=1e-4)    # of a pixel: centers and sizes there and back


def test_losses_of_boxes_and_masks_equal_loops(monkeypatch):
    """Boxes that stay as they are, masks of which no pixel is decided."""
    model, weights = detector().train(), (1, 0.5, 0.25)
    proposals = [torch.tensor([[8.0, 8, 40, 40], [0, 0, 9, 9], [20, 20, 60, 60]]),
                 torch.tensor([[0.0, 0, 30, 30], [5, 10, 50, 60]])]
    truth = [torch.tensor([[8.0, 8, 40, 48], [30, 20, 64, 60]]), torch.tensor([[10.0, 10, 50, 60]])]
    matched = [torch.tensor([0, 0, 1]), torch.tensor([0, 0])]
    labels = [torch.tensor([1, 0, 2]), torch.tensor([0, 1])]
    for stage in model.roi_heads.stages:
        for layer in (stage.box_predictor.bbox_pred, stage.mask_predictor.mask_fcn_logits):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        monkeypatch.setattr(stage, "select_training_samples",
                            lambda *_: (proposals, matched, labels, None))
    targets = [{"boxes": b, "labels": torch.arange(len(b)) + 1,
                "masks": torch.ones(len(b), 64, 64, dtype=torch.uint8)} for b in truth]
    features = model.backbone(torch.randn(2, 3, 64, 64))
    losses = model.roi_heads(features, proposals, [(64, 64)] * 2, targets)[1]
    total = 0
    for boxes, of, index, label in zip(proposals, truth, matched, labels):
        for (x0, y0, x1, y1), i, k in zip(boxes.tolist(), index, label):
            if k > 0:
                u0, v0, u1, v1 = of[i].tolist()
                both = max(0, min(x1, u1) - max(x0, u0)) * max(0, min(y1, v1) - max(y0, v0))
                union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - both
                hull = (max(x1, u1) - min(x0, u0)) * (max(y1, v1) - min(y0, v0))
                total += 1 - both / union + (hull - union) / hull
    for number, weight in enumerate(weights, start=1):
        close(losses[f"box_{number}"].item(), weight * 10 * total / 5)
        close(losses[f"mask_{number}"].item(), weight * math.log(2))


def test_detections_are_the_mean_of_three_stages():
    model, biases = detector().eval(), (0.0, 1.0, 3.0)
    for k, (stage, bias) in enumerate(zip(model.roi_heads.stages, biases), start=1):
        for layer in (stage.box_predictor.cls_score, stage.mask_predictor.mask_fcn_logits):
            torch.nn.init.zeros_(layer.weight)
        stage.box_predictor.cls_score.bias.data = 3.0 * torch.eye(4)[k]
        stage.mask_predictor.mask_fcn_logits.bias.data.fill_(bias)
    with torch.no_grad():
        features = model.backbone(torch.randn(1, 3, 64, 64))
        boxes = [torch.tensor([[8.0, 8, 40, 40]])]
        ((found,), _) = model.roi_heads(features, boxes, [(64, 64)])
    assert sorted(found["labels"].tolist()) == [1, 2, 3]    # each stage votes for its own
    close(found["scores"], torch.full((3,), math.e / (1 + 3 * math.e)))
    close(found["masks"], torch.full((3, 1, 28, 28), torch.tensor(biases).sigmoid().mean()))


def test_anchors_and_maps_fit_the_patches():
    """With 16 pixels as published: strides of 4 to 32, anchors of 32 to 512."""
    model = build_detector(tiny_vit(patch_size=16), 3, side=64, width=8, rois=16).eval()
    assert model.rpn.anchor_generator.sizes == [(32,), (64,), (128,), (256,), (512,)]
    with torch.no_grad():
        model([torch.rand(3, 64, 80)])
    assert model.roi_heads.stages[0].box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_learning_rates_decay_from_layer_to_layer(monkeypatch):
    found, (images, targets) = [], examples()
    images = [(255 * image).to(torch.uint8) for image in images]

    def one_step(step, states, *_):
        step(0, (images, targets))
        found.extend(group["lr"] for group in states["optimizer"].param_groups)

    monkeypatch.setattr(detect, "fit", one_step)
    args = SimpleNamespace(lr=0.256, layer_decay=0.5, weight_decay=0.05, warmup_steps=0, epochs=1,
                           seed=0)
    batches, vit = SimpleNamespace(batch_size=2, steps=10), tiny_vit(depth=2)
    detect.train_detector(detector(vit), batches, args, torch.device("cpu"), None, None)
    assert sorted(set(found)) == [0.002 * 0.5**k for k in (3, 2, 1, 0)]


def test_detections_are_in_pixels_of_the_image():
    model = detector().eval()
    model.roi_heads.stages[-1].score_thresh = 0.0
    images, _ = examples()
    with torch.no_grad():
        for image, found in zip(images, model(images)):
            (h, w), (x1, y1) = image.shape[1:], found["boxes"].amax(dim=0)[2:]
            assert 0.8 * w < x1 <= w and 0.8 * h < y1 <= h
            assert found["masks"].shape == (len(found["boxes"]), 1, h, w)
            assert 0 < len(found["boxes"]) <= 100


def test_learning_rate_warms_up_and_falls_twice():
    rates = [learning_rate(step, 1.0, 10, 1200) for step in range(1200)]
    close(torch.tensor(rates[:10]), torch.arange(1, 11) / 10)
    assert rates[799] == 1 and rates[800] == rates[1099] == pytest.approx(0.1)
    assert rates[1100] == rates[-1] == pytest.approx(0.01)


# --- COCO -----------------------------------------------------------------------------------------


def coco_folder(root, change=lambda content: None):
    """Write COCO's layout: an image with two objects and a crowd, one with a crowd, one empty."""
    (root / "annotations").mkdir(parents=True)
    images = [{"id": 7 + i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in range(3)]

    def entry(image, category, x, y, w, h, iscrowd=0):
        shape = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if iscrowd:    # run lengths, column by column
            shape = {"size": [48, 64], "counts": [48 * 10, 48 * 20, 48 * 34]}
        return {"id": int(100 * image + x), "image_id": image, "category_id": category,
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": iscrowd, "segmentation": shape}

    content = {
        "images": images, "annotations": [
            entry(7, 90, 5, 6, 20, 30), entry(7, 3, 30, 10, 24, 16), entry(7, 3, 10, 0, 20, 48, 1),
            entry(8, 90, 10, 0, 20, 48, 1), entry(8, 3, 63.5, 9, 8, 9)],    # the last is outside
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    change(content)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
        for image in images:
            pixels = rng.integers(256, size=(48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017" / image["file_name"])
    return root


def test_crowds_and_images_without_objects_are_not_trained_on(tmp_path):
    pytest.importorskip("pycocotools")
    images = CocoImages(coco_folder(tmp_path), "train")
    assert len(images) == 3 and images.with_objects == [0]
    image, target = images[0]
    assert image.shape == (3, 48, 64) and target["labels"].tolist() == [2, 1]    # dog, cat
    assert target["boxes"].tolist() == [[5, 6, 25, 36], [30, 10, 54, 26]]
    mask = torch.zeros(2, 48, 64, dtype=torch.uint8)
    mask[0, 6:36, 5:25], mask[1, 10:26, 30:54] = 1, 1
    assert torch.equal(target["masks"].as_subclass(torch.Tensor), mask)
    for i in (1, 2):    # they are evaluated all the same
        _, target = images[i]
        assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 48, 64)


def test_an_image_stays_as_it_is_stored_as_its_boxes_do(tmp_path):
    pytest.importorskip("pycocotools")
    images = CocoImages(coco_folder(tmp_path), "train")
    before, _ = images[0]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3    # 180 degrees
    Image.open(tmp_path / "train2017/0.png").save(tmp_path / "train2017/0.png", exif=exif)
    assert torch.equal(images[0][0], before)


def test_truth_as_detections_has_an_AP_of_100_and_none_0(tmp_path):
    pytest.importorskip("pycocotools")
    images = CocoImages(coco_folder(tmp_path, lambda c: c["annotations"].pop()), "val")
    _, target = images[0]
    found = target | {"scores": torch.tensor([0.9, 0.8]), "masks": target["masks"][:, None].float()}
    results = images.results(0, found)
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [
        (7, 90, [5, 6, 20, 30]), (7, 3, [30, 10, 24, 16])]
    results = json.loads(json.dumps(results))    # as a file would have them
    perfect = pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    assert average_precision(images.coco, results) == {"box": perfect, "mask": perfect}
    wrong = results[0] | {"bbox": [12, 5, 10, 20], "score": 0.95}
    for image, fault in ((8, False), (9, True)):    # 8 has a crowd there
        score = average_precision(images.coco, [*results, wrong | {"image_id": image}])["box"]
        assert (score != perfect) == fault
    nothing = images.results(2, {name: x[:0] for name, x in found.items()})
    assert nothing == [] and average_precision(images.coco, nothing)["mask"]["AP"] == 0


@pytest.mark.parametrize("spoil, word", [
    (lambda root: (root / "val2017").rename(root / "val"), "val2017"),
    (lambda root: (root / "annotations/instances_val2017.json").unlink(), "instances_val2017.json"),
    (lambda root: (root / "annotations/instances_val2017.json").write_text("{"), "JSON"),
    (lambda root: (root / "annotations/instances_val2017.json").write_text("{}"), "JSON"),
    (lambda root: (root / "val2017/0.png").unlink(), "0.png"),
    (lambda root: Image.new("RGB", (8, 8)).save(root / "val2017/0.png"), "size"),
])
def test_faults_of_a_folder_are_named(spoil, word, tmp_path):
    pytest.importorskip("pycocotools")
    spoil(coco_folder(tmp_path))
    with pytest.raises(UserError, match=word):
        CocoImages(tmp_path, "val")[0]


def test_unknown_categories_are_a_fault(tmp_path):
    pytest.importorskip("pycocotools")
    with pytest.raises(UserError, match="JSON"):
        CocoImages(coco_folder(tmp_path, lambda c: c["categories"].pop()), "train")


def command(root, patch_size=8):
    torch.save(build_encoder("vit_nano", 4 * patch_size, patch_size).state_dict(), root / "vit.pth")
    return ["detect", "--pretrained_weights", str(root / "vit.pth"), "--data_path", str(root),
            "--image_size", str(8 * patch_size), "--width", "8", "--rois", "16", "--epochs", "2",
            "--num_workers", "0"]


@pytest.mark.slow
def test_detect_from_the_command_line_and_again(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    arguments = [*command(coco_folder(tmp_path)), "--output_dir", str(tmp_path / "run")]
    result = evaluate.main([*arguments, "--pictures", "2", "--json", str(tmp_path / "json")])
    assert json.loads((tmp_path / "json").read_text()) == result
    assert (result["images"], result["classes"], result["short_side"]) == (1, 2, 64)
    assert set(result["box"]) == set(result["mask"]) == {"AP", "AP50", "AP75"}
    with Image.open(tmp_path / "run/detections.png") as picture:
        assert picture.width > 2 * 64 and picture.height > 2 * 48
    capsys.readouterr()
    again = evaluate.main(arguments)
    assert "measured again" in capsys.readouterr().out and again["box"] == result["box"]


def test_bad_flags_get_one_line(tmp_path, capsys):
    arguments = command(tmp_path, patch_size=14)
    assert "14" in one_line(capsys, evaluate.main, arguments, program="evaluate.py")


def test_examples_of_any_size_make_a_batch():
    images, targets = examples()
    assert as_lists(list(zip(images, targets))) == (images, targets)
