"""What is trained on an encoder: support/fit.py, extras/finetune.py, linear probes end to end."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import close, image_folder, one_line, tiny_vit
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import evaluate
from augment import normalize
from data import build_dataset
from extras import finetune
from extras.finetune import Classifier, classification_loss
from model import build_encoder
from support.errors import UserError
from support.evaluate_options import parse_evaluate_args
from support.fit import Augmented, TrainingBatches, fit
from support.inputs import evaluation_crop
from support.optim import cosine_schedule, layer_groups
from support.weights import load_encoder

CPU = torch.device("cpu")


def by_name(encoder, head, key):
    """Return {parameter: its group's value of a key}; each parameter is in one group."""
    parameters = [*encoder.named_parameters(), *head.named_parameters("head")]
    names = {id(parameter): name for name, parameter in parameters}
    groups = layer_groups(encoder, head, 0.5, 0.05)
    values = {names[id(p)]: group[key] for group in groups for p in group["params"]}
    assert len(values) == sum(len(group["params"]) for group in groups)
    return values


def test_rates_halve_a_layer_down():
    """MAE's and BEiT's: embeddings are 0, block i is i + 1, the final norm and the head the top."""
    vit, layers = tiny_vit(), {"blocks.0.": 1 / 4, "blocks.1.": 1 / 2, "norm.": 1, "head.": 1}
    names = [*dict(vit.named_parameters()), "head.weight", "head.bias"]
    assert by_name(vit, nn.Linear(12, 5), "scale") == {
        name: next((rate for start, rate in layers.items() if name.startswith(start)), 1 / 8)
        for name in names
    }
    frozen = by_name(vit.requires_grad_(False), nn.Linear(12, 5), "scale")
    assert frozen == {"head.weight": 1, "head.bias": 1}
    with torch.device("meta"):
        scales = by_name(build_encoder("resnet50"), nn.Linear(2048, 5), "scale")
    names = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.2.bn3.bias")
    assert [scales[name] for name in names] == [1 / 32, 1 / 32, 1 / 16, 1 / 2]


def test_biases_norms_and_embeddings_do_not_decay():
    decays = by_name(tiny_vit(), nn.Linear(12, 5), "weight_decay")
    kept = ("bias", "cls_token", "pos_embed")
    assert decays == {name: 0 if name.endswith(kept) or "norm" in name else 0.05
                      for name in decays}


def test_a_share_of_each_class_is_drawn(tmp_path):
    images = build_dataset(image_folder(tmp_path, train=10, val=1), "train")
    share = finetune.training_share(images, 0.3, seed=1)
    assert images.labels[share].bincount().tolist() == [3, 3]
    assert share == finetune.training_share(images, 0.3, seed=1)
    assert share != finetune.training_share(images, 0.3, seed=2)
    assert images.labels[finetune.training_share(images, 0.001, 0)].tolist() == [0, 1]
    assert finetune.training_share(images, 1.0, 0) == list(range(20))


@pytest.mark.parametrize("names, expected", [
    (["only1.png", "class0/0.png", "any/class1/0.png"], "class1/only1 class0/0 class1/0"),
    (["only0.png", "x.png"], UserError("1 of 2.*x.png")), ([], UserError("0 files")),
    (["0.png"], UserError("0.png")), (["only0.png", "class0/only0.png"], UserError("1 different")),
])
def test_listed_images_are_found_by_name_or_by_folder_and_name(names, expected, tmp_path):
    """0.png is in either class; each class has a name of its own."""
    folder = image_folder(tmp_path, train=2, val=1)
    for label in range(2):
        path = folder / f"train/class{label}"
        (path / "1.png").rename(path / f"only{label}.png")
    images = build_dataset(folder, "train")
    if isinstance(expected, UserError):
        with pytest.raises(UserError, match=str(expected)):
            finetune.listed_share(images, names)
    else:
        paths = [Path(images.path(i)) for i in finetune.listed_share(images, names)]
        assert [f"{path.parent.name}/{path.stem}" for path in paths] == expected.split()


def test_labels_are_smoothed():
    images, labels, logits = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]), torch.randn(4, 3)
    seen = []
    loss = classification_loss(3, 0.1, mixup=0.0, cutmix=0.0, erasing=0.0)
    value = loss(lambda x: seen.append(x) or logits, images, labels)
    targets = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    close(value, -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean())
    assert torch.equal(seen[0], normalize(images))


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0)])
def test_labels_are_mixed_as_images_are(mixup, cutmix):
    """White and black in turns, mixed with the image before: the mean tells the share of white."""
    labels, logits, seen, shares = torch.tensor([1, 0, 1, 0]), torch.randn(4, 2), [], []
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 8, 8)
    white, _, black = normalize(images[[0, 0, 1]])
    loss = classification_loss(2, 0.0, mixup, cutmix, erasing=0.0)
    for _ in range(8):
        value = loss(lambda x: seen.append(x) or logits, images, labels)
        pixels = (seen[-1] - black) / (white - black)    # (4, 3, 8, 8)
        share = pixels.mean(dim=(1, 2, 3))
        targets = torch.stack([1 - share, share], dim=1)
        close(value, -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean())
        gray = (pixels - pixels.round()).abs().max() > 1e-4    # float32 of 0 and 1
        assert mixup or not gray
        shares.append(share[0].item())
    assert 0.01 < np.mean(shares) < 0.99


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_rectangles_become_noise_after_normalizing(share):
    """Normal noise for each pixel, and another rectangle in each image."""
    images, seen = torch.full((64, 3, 32, 32), 0.9), []
    loss = classification_loss(2, 0.0, mixup=0.0, cutmix=0.0, erasing=share)
    loss(lambda x: seen.append(x) or x[:, :2, 0, 0], images, torch.zeros(64, dtype=torch.long))
    changed = seen[0] != normalize(images)
    noise = seen[0][changed]
    deviation = 4 / len(noise) ** 0.5    # of the mean of normal numbers; of their std a bit less
    assert abs(noise.mean()) < deviation and abs(noise.std() - 1) < deviation
    erased = [image.any(dim=0).nonzero() for image in changed if image.any()]
    assert len(erased) == 64 if share == 1 else 6 <= len(erased) <= 28    # 16 and 3.5 deviations
    places = set()
    for pixels in erased:
        (top, left), (bottom, right) = pixels.amin(dim=0).tolist(), pixels.amax(dim=0).tolist()
        assert len(pixels) == (bottom - top + 1) * (right - left + 1)
        places.add((top, left, bottom, right))
    assert len(places) > len(erased) / 2


def test_a_classifier_is_linear_in_the_class_token_after_the_norm():
    classifier, images = Classifier(norm_of_its_own(), 5), torch.randn(2, 3, 32, 32)
    nn.init.normal_(classifier.head.weight)    # at first next to nothing
    token = classifier.encoder.norm(classifier.encoder(images))[:, 0]
    close(classifier(images), token @ classifier.head.weight.T + classifier.head.bias)


def test_a_classifier_is_linear_in_the_mean_patch_through_a_new_norm():
    encoder, images = norm_of_its_own(), torch.randn(2, 3, 32, 32)
    mean = torch.stack([encoder(images)[:, i] for i in range(1, 17)]).mean(dim=0)
    classifier = Classifier(encoder, 5, mean_patch=True)
    nn.init.normal_(classifier.head.weight)
    variance, center = torch.var_mean(mean, dim=1, correction=0, keepdim=True)
    normed = (mean - center) / (variance + 1e-6).sqrt()
    close(classifier(images), normed @ classifier.head.weight.T, atol=1e-5)    # sums of 12 near 5


def norm_of_its_own():
    """Return an encoder whose final norm is not as a new one."""
    encoder = tiny_vit()
    nn.init.normal_(encoder.norm.weight)
    nn.init.normal_(encoder.norm.bias)
    return encoder


def test_augmentation_is_maes():
    """Two operations, each half of the time and at 90 % of its range."""
    crop, flip, *colors = finetune.augmentation(32).transforms
    assert isinstance(crop, v2.RandomResizedCrop) and isinstance(flip, v2.RandomHorizontalFlip)
    assert [(maybe.p, operation.num_ops, operation.magnitude / (operation.num_magnitude_bins - 1))
            for maybe in colors for operation in maybe.transforms] == [(0.5, 1, 0.9)] * 2
    image = finetune.augmentation(32)(torch.zeros(3, 20, 50, dtype=torch.uint8))
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8


def test_top_accuracies_by_hand(tmp_path):
    """Image i is of class i, which the model puts in place places[i], from 0."""
    images = build_dataset(image_folder(tmp_path, classes=7, train=1, val=1), "val")
    places = [0, 4, 5, 0, 6, 2, 3]
    logits = torch.stack([-torch.arange(7.0).roll(i - place) for i, place in enumerate(places)])
    batches = iter(logits.split(4))
    top1, top5 = finetune.top_accuracies(lambda x: next(batches), images, 32, CPU, 4, 0)
    assert (top1, top5) == pytest.approx((100 * 2 / 7, 100 * 5 / 7))


def batches_of(folder, batch_size=4, seed=0, num_workers=0):
    images = build_dataset(folder, "train")
    images = Augmented(images, list(range(16)), finetune.augmentation(32), seed)
    return TrainingBatches(images, batch_size, num_workers, CPU)


def test_batches_are_a_function_of_seed_epoch_and_index(folder):
    """Whatever num_workers, the step that they start from, and what was drawn before."""
    def take(number, start=0, **options):
        iterator = batches_of(folder, **options).start(start)
        return [next(iterator) for _ in range(number)]

    whole = take(8)
    for others in (take(8, num_workers=2), whole[:5] + take(3, start=5)):
        for (x, y), (other_x, other_y) in zip(whole, others):
            assert torch.equal(x, other_x) and torch.equal(y, other_y)
    images, others = batches_of(folder).images, batches_of(folder, seed=1).images
    x, y = images[0, 3]
    for other_x, other_y in (images[1, 3], others[0, 3]):    # one image, augmented otherwise
        assert y == other_y and not torch.equal(x, other_x)


def fit_classifier(batches, path, loss=None, arguments=None):
    """Train a small classifier for 3 epochs; return its state."""
    loss = loss or classification_loss(2, 0.1, 0.8, 1.0, 0.25)
    args = argparse.Namespace(epochs=3, warmup_epochs=1, lr=0.05, min_lr=1e-6, layer_decay=0.5,
                              weight_decay=0.05, seed=0)
    torch.manual_seed(5)
    model = Classifier(tiny_vit(drop_path_rate=0.2), 2)
    finetune.fit_encoder(model, loss, batches, args, path, arguments or {"x": 1})
    return model.state_dict()


def fit_probes(batches, path):
    """Train linear probes for 3 epochs; return their state."""
    torch.manual_seed(5)
    probes = evaluate.Probes(tiny_vit(), 2, True, 2, [0.1, 1.0])
    args = argparse.Namespace(lr=[0.1, 1.0], epochs=3)
    evaluate.train_probes(probes, batches, args, CPU, path, {"x": 1})
    return probes.state_dict()


class Killed(TrainingBatches):
    """Batches that end with Ctrl-C in the second epoch of 4 steps."""

    def start(self, step):
        yield from itertools.islice(super().start(step), 6)
        raise KeyboardInterrupt


@pytest.mark.parametrize("train", [fit_classifier, fit_probes])
def test_fit_goes_on_after_a_kill_and_ends_the_same(train, folder, tmp_path):
    """Bit for bit, with erasing, mixing, stochastic depth and another number of workers."""
    whole, images = train(batches_of(folder), tmp_path / "whole.pth"), batches_of(folder).images
    with pytest.raises(KeyboardInterrupt):
        train(Killed(images, 4, 0, CPU), tmp_path / "parts.pth")
    parts = train(batches_of(folder, num_workers=1), tmp_path / "parts.pth")
    for name, value in whole.items():
        assert torch.equal(value, parts[name])


def test_other_arguments_do_not_go_on(folder, tmp_path):
    fit_classifier(batches_of(folder), tmp_path / "x.pth")
    with pytest.raises(UserError, match="x was 1, is 2"):
        fit_classifier(batches_of(folder), tmp_path / "x.pth", arguments={"x": 2})


@pytest.mark.parametrize("loss, weight", [("nan", 1.0), ("inf", 1.0), (1.0, "nan"), (1.0, "inf")])
def test_what_is_not_finite_ends_it_and_leaves_the_epoch_before(loss, weight, folder, tmp_path):
    path, batches, model, seen = tmp_path / "x.pth", batches_of(folder), nn.Linear(2, 2), []

    def step(number, batch):    # bad in the last step of the second epoch
        nn.init.constant_(model.bias, float(weight if number == 7 else 1.0))
        return torch.tensor(float(loss if number == 7 else 1.0))

    with pytest.raises(UserError, match="epoch 2.*lower --lr"):
        fit(step, {"model": model}, batches, 3, path, {})
    fit(lambda number, batch: seen.append(number) or torch.tensor(1.0), {"model": model}, batches,
        3, path, {})
    assert seen == [4, 5, 6, 7, 8, 9, 10, 11] and model.bias.tolist() == [1, 1]


def test_each_layer_is_trained_at_its_rate(folder, tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: rates.append(
        sorted({group["lr"] for group in optimizer.param_groups})))
    fit_classifier(batches_of(folder, batch_size=8), tmp_path / "x.pth")
    top = cosine_schedule(0.05 * 8 / 256, 1e-6, 6, 2).tolist()
    expected = [sorted({rate * 0.5**depth for depth in range(4)}) for rate in top]
    assert rates == [pytest.approx(of_a_step) for of_a_step in expected]


@pytest.fixture
def command(folder, tmp_path):
    """Return the command of a second's fine-tuning."""
    torch.save(build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "backbone.pth")
    return ["finetune", "--pretrained_weights", str(tmp_path / "backbone.pth"),
            "--data_path", str(folder), "--epochs", "3", "--warmup_epochs", "1",
            "--batch_size_per_gpu", "3", "--num_workers", "0", "--train_fraction", "0.5"]


def test_finetune_from_the_command_line_and_again(command, tmp_path, capsys):
    path = tmp_path / "result.json"
    result = evaluate.main([*command, "--json", str(path)])
    written = json.loads(path.read_text())    # with the whole protocol
    assert written == json.loads(json.dumps(result))
    assert (written["epochs"], written["image_size"], written["heads"]) == (3, 32, 3)
    assert (written["images"], written["classes"], written["top5"]) == (8, 2, 100)

    out = capsys.readouterr().out
    assert f"batch 3 (1 x 3), 2 steps an epoch; learning rate {5e-4 * 3 / 256:g} " in out
    assert "measured again" not in out
    again = evaluate.main(command)    # finished: not trained anew
    assert again["top1"] == result["top1"] and "measured again" in capsys.readouterr().out
    (checkpoint,) = tmp_path.glob("backbone-finetune-*/checkpoint.pth")
    assert result["checkpoint"] == str(checkpoint)
    tuned = load_encoder(checkpoint)    # can be evaluated too

    torch.save(tuned.state_dict(), tmp_path / "backbone.pth")    # other weights, the same place
    evaluate.main(command)
    assert "measured again" not in capsys.readouterr().out
    other = [*command, "--output_dir", str(checkpoint.parent), "--seed", "1"]
    line = one_line(capsys, evaluate.main, other, program="evaluate.py")
    assert "seed was 0, is 1; weights and images was" in line


@pytest.mark.parametrize("flags", [["--avgpool_patchtokens"], ["--no-avgpool_patchtokens"]])
def test_a_fine_tuned_model_can_be_loaded(flags, command):
    """Its logits are those of the weights in the file, by hand; shapes don't tell its heads."""
    flags = [*flags, "--lr", "1", "--image_size", "48", "--heads", "6"]
    path = evaluate.main([*command, *flags])["checkpoint"]
    classifier, images = finetune.load_classifier(path), torch.randn(2, 3, 48, 48)
    encoder, state = load_encoder(path), torch.load(path, weights_only=True)["model"]
    tokens = encoder(images)
    pooled = tokens[:, 1:].mean(dim=1) if "--avgpool_patchtokens" in flags else tokens[:, 0]
    close(classifier(images), encoder.norm(pooled) @ state["head.weight"].T + state["head.bias"])
    assert classifier.image_size == 48 and not classifier.training and encoder.heads == 6


@pytest.mark.parametrize("flags, word", [
    (["--train_fraction", "1", "--train_list", "nothing.txt"], "nothing.txt"),
    (["--train_list", "x.txt"], "--train_fraction"), (["--warmup_epochs", "3"], "--warmup_epochs"),
    (["--data_path", "nowhere"], "nowhere"), (["--train_fraction", "1.5"], "--train_fraction"),
    (["--train_fraction", "1", "--data_path", "shapes", "--train_list", __file__],
     "folder of images"),
    (["--train_fraction", "1", "--train_list", torch.__file__.replace("__init__.py", "lib")],
     "--train_list"),
])
def test_bad_flags_get_one_line(flags, word, command, capsys):
    assert word in one_line(capsys, evaluate.main, [*command, *flags], program="evaluate.py")


@pytest.mark.slow
def test_a_bad_image_gets_one_line_from_a_worker_too(command, tmp_path):
    """In a program of its own, with which its workers end."""
    bad = image_folder(tmp_path / "bad", train=2, val=1) / "train/class0/0.png"
    bad.write_text("no image")
    flags = ["--data_path", str(tmp_path / "bad"), "--num_workers", "1", "--train_fraction", "1"]
    done = subprocess.run([sys.executable, evaluate.__file__, *command, *flags], text=True,
                          capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert str(bad) in done.stderr and "Traceback" not in done.stderr


def test_the_status_is_1_once_work_has_begun(command):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*command, "--lr", "1e30"])    # a loss that is not finite
    assert stopped.value.code == 1


RANGES = {    # a flag of both tasks or of one: what it refuses beside nan, inf, -1 and words
    "epochs": "0 1.5", "batch_size_per_gpu": "0 2.5", "num_workers": "0.5", "seed": "1.5 1e3",
    "lr": "0", "image_size": "0", "heads": "0",
    "finetune": {
        "smoothing": "2 1", "erasing": "1.1 2", "mixup": "-0.1", "cutmix": "-0.1",
        "layer_decay": "0 1.1", "train_fraction": "0 1.1", "drop_path_rate": "1 2 -0.5",
        "warmup_epochs": "0.5", "min_lr": "-1e-9", "weight_decay": "-0.1",
    },
    "linear": {"holdout": "1 -0.1", "n_last_blocks": "0 1.5"},
}


@pytest.mark.parametrize("task", ["finetune", "linear"])
def test_each_number_has_a_range(task, capsys):
    ranges = {flag: bad for flag, bad in (RANGES | RANGES[task]).items() if isinstance(bad, str)}
    for flag, bad in ranges.items():
        for value in [*bad.split(), "nan", "inf", "-inf", "-1", "x"]:
            command = f"{task} --pretrained_weights x --data_path x --{flag}={value}".split()
            line = one_line(capsys, parse_evaluate_args, command, program="evaluate.py")
            assert f"--{flag}" in line and value in line


# --- linear probes --------------------------------------------------------------------------------


@pytest.fixture
def linear(tmp_path):
    """Return a function of a folder and flags that trains linear probes: (result, probes)."""
    torch.save(build_encoder("vit_nano", 32, 8).state_dict(), tmp_path / "backbone.pth")

    def run(folder, *flags):
        result = evaluate.main([
            "linear", "--pretrained_weights", str(tmp_path / "backbone.pth"), "--data_path",
            str(folder), "--output_dir", str(tmp_path / "run"), "--num_workers", "0", *flags])
        return result, torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["probes"]

    return run


@pytest.mark.parametrize("holdout, best", [("0.25", min), ("0", max)])
def test_held_out_images_choose_the_rate(holdout, best, linear, tmp_path):
    """Dark and bright images whose labels are exchanged in val: the best rate is the worst there.

    At a rate of next to nothing a probe says what it said at first, right or wrong. With --holdout
    0 the images of val choose.
    """
    for split, brightness in (("train", (20, 230)), ("val", (230, 20))):
        for label, value in enumerate(brightness):
            (tmp_path / f"images/{split}/{label}").mkdir(parents=True)
            for i in range(8):
                image = Image.new("L", (32, 32), value + i)
                image.save(tmp_path / f"images/{split}/{label}/{i}.png")
    rates = [*(f"{i}e-9" for i in range(1, 9)), "1"]
    result, _ = linear(tmp_path / "images", "--lr", *rates, "--holdout", holdout, "--epochs", "2")
    on_val = {row["lr"]: row["val"] for row in result["rates"]}
    assert result["top1"] == on_val[result["lr"]] == best(on_val.values())
    assert min(on_val.values()) < max(on_val.values())
    assert result["images"] == (16 if holdout == "0" else 12)


@pytest.mark.parametrize("flags, blocks, mean_patch", [
    ([], 4, False), (["--n_last_blocks", "2", "--avgpool_patchtokens"], 2, True),
    (["--n_last_blocks", "1"], 1, False),
])
def test_probes_see_the_features_that_the_flags_name(
        flags, blocks, mean_patch, linear, folder, tmp_path):
    """Their accuracies on val are those of the file's probes on features by a plain loop."""
    result, probes = linear(folder, *flags, "--lr", "0.1", "3", "10", "--epochs", "2")
    encoder, images = load_encoder(tmp_path / "backbone.pth"), build_dataset(folder, "val")
    crops = torch.stack([evaluation_crop(32)(image) for image, _ in images])
    tokens, features = encoder.embed(normalize(crops / 255)), []
    for depth, block in enumerate(encoder.blocks):
        tokens = block(tokens)
        if depth >= 4 - blocks:
            features.append(encoder.norm(tokens)[:, 0])
    if mean_patch:
        features.append(encoder.norm(tokens)[:, 1:].mean(dim=1))
    features = torch.cat(features, dim=1)
    for i, row in enumerate(result["rates"]):
        logits = features @ probes[f"{i}.weight"].T + probes[f"{i}.bias"]
        right = (logits.argmax(dim=1) == images.labels).float().mean().item()
        assert row["val"] == pytest.approx(100 * right)
    assert (result["n_last_blocks"], result["avgpool_patchtokens"]) == (blocks, mean_patch)
