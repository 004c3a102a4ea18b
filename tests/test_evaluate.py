"""kNN, linear probes, and the features that they are given."""

import argparse
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import close, image_folder, one_line, tiny_vit
from PIL import Image
from torchvision.transforms import v2

import augment
import evaluate
from data import build_dataset
from model import build_encoder
from support.errors import UserError


@pytest.mark.parametrize("k", [1, 3, 50])
def test_knn_votes_equal_a_loop(k):
    train_features, test_features = torch.randn(20, 6), torch.randn(7, 6)
    labels = torch.arange(20) % 4
    votes = evaluate.knn_votes(train_features, labels, test_features, k, 0.07, 4)
    for i, f in enumerate(test_features):
        similar = [(float(F.cosine_similarity(f, t, dim=0)), int(label))
                   for t, label in zip(train_features, labels)]
        expected = torch.zeros(4)
        for similarity, label in sorted(similar, reverse=True)[:k]:
            expected[label] += math.exp(similarity / 0.07)
        expected /= math.exp(max(similar)[0] / 0.07)    # the nearest has one vote
        close(votes[i].float(), expected, rtol=1e-4)    # exp(x / 0.07) makes 14 of a rounding
    whole, parts = (evaluate.nearest_neighbors(train_features, test_features, k, most)
                    for most in (2**26, 40))    # two test images at a time
    close(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("temperature", [1e-3, 1e-300])
def test_at_a_tiny_temperature_the_nearest_image_decides(temperature):
    train_features, test_features, labels = torch.randn(20, 6), torch.randn(7, 6), torch.arange(20)
    votes = evaluate.knn_votes(train_features, labels, test_features, 9, temperature, 20)
    nearest = F.cosine_similarity(test_features[:, None], train_features, dim=2).argmax(dim=1)
    assert torch.equal(votes.argmax(dim=1), nearest)
    assert votes.isfinite().all() and (votes.amax(dim=1) == 1).all()


def test_features_are_the_normed_class_token_of_the_center_crop(tmp_path):
    images, encoder = build_dataset(image_folder(tmp_path), "train"), tiny_vit()
    cpu = torch.device("cpu")
    features, labels = evaluate.extract_features(encoder, images, [3, 12], 32, cpu, batch_size=1)
    assert labels.tolist() == [0, 1]
    f, bicubic = v2.functional, v2.InterpolationMode.BICUBIC
    small = f.resize(images[12][0], [round(32 * 256 / 224)], bicubic, antialias=True)
    crop = f.normalize(f.center_crop(small, [32, 32]).float() / 255, augment.MEAN, augment.STD)
    close(features[1], encoder.norm(encoder(crop[None]))[0, 0], atol=1e-5)    # two batches of one


def test_knn_accuracy_is_that_of_the_votes_on_labeled_images(tmp_path):
    folder, encoder = image_folder(tmp_path, train=10, val=3), tiny_vit()
    cpu = torch.device("cpu")
    for i in range(3):
        Image.new("RGB", (40, 40)).save(folder / f"val/unlabeled{i}.png")    # not counted
    sets = [build_dataset(folder, split) for split in ("train", "val")]
    options = dict(ks=(1, 7), temperature=2.0, most=8)
    accuracy = evaluate.knn_accuracy(encoder, *sets, 32, cpu, **options)
    chosen = [0, 2, 5, 8, 10, 13, 16, 19]    # of 20, evenly
    features, labels = evaluate.extract_features(encoder, sets[0], chosen, 32, cpu)
    labeled = (sets[1].labels >= 0).nonzero().flatten().tolist()
    test_features, test_labels = evaluate.extract_features(encoder, sets[1], labeled, 32, cpu)
    assert len(test_labels) == 6
    for k in (1, 7):
        votes = evaluate.knn_votes(features, labels, test_features, k, 2.0, 2)
        right = (votes.argmax(dim=1) == test_labels).float().mean()
        assert accuracy[k] == pytest.approx(100 * right.item())


def test_linear_features_are_dinos():
    encoder, images = tiny_vit(depth=3), torch.randn(2, 3, 32, 32)
    _, a, b = encoder.get_intermediate_layers(images, 3)
    two = evaluate.linear_features(encoder, images, 2, False)
    close(two, torch.cat([a[:, 0], b[:, 0]], dim=1))
    patches = evaluate.linear_features(encoder, images, 1, True)
    close(patches, torch.cat([b[:, 0], b[:, 1:].mean(dim=1)], dim=1))


def test_linear_probes_train_side_by_side_as_if_alone(tmp_path):
    """Each rate's probe is that of a run of its own, by hand: SGD, momentum, a cosine by epoch."""
    encoder, rates, x, y = tiny_vit(), [0.5, 1e-9], torch.rand(6, 3, 32, 32), torch.arange(6) % 2
    probes = evaluate.Probes(encoder, 1, False, 2, rates)
    probe = copy.deepcopy(probes.probes[0])
    args = argparse.Namespace(lr=rates, epochs=3)
    batches = argparse.Namespace(batch_size=6, steps=1, start=lambda step: iter([(255 * x, y)] * 3))
    path, cpu = tmp_path / "checkpoint.pth", torch.device("cpu")
    evaluate.train_probes(probes, batches, args, cpu, path, {})

    features = encoder.norm(encoder(augment.normalize(x)))[:, 0]
    start, speed = probe.weight.clone(), [torch.zeros(2, 12), torch.zeros(2)]
    for epoch in range(3):
        loss = F.cross_entropy(probe(features), y)
        gradients = torch.autograd.grad(loss, [probe.weight, probe.bias])
        rate = 0.5 * 6 / 256 * 0.5 * (1 + math.cos(math.pi * epoch / 3))
        for v, g, p in zip(speed, gradients, probe.parameters()):
            v.mul_(0.9).add_(g)
            p.data -= rate * v
    close(probes.probes[0].weight, probe.weight)
    assert (probe.weight - start).abs().max() > 1e-4


def test_unreadable_images_end_an_evaluation_or_are_left_out(tmp_path):
    """Left out of neighbors and of what is counted: as if they were not there."""
    cpu, encoder, left_out = torch.device("cpu"), tiny_vit(), []
    folder, whole = image_folder(tmp_path / "bad", val=5), image_folder(tmp_path / "whole", val=5)
    for name in ("train/class0/3.png", "val/class1/0.png", "val/class1/4.png"):
        (folder / name).write_text("no image")
        (whole / name).unlink()
    (train, val), expected = ([build_dataset(root, split) for split in ("train", "val")]
                              for root in (folder, whole))
    with pytest.raises(UserError, match="3.png"):
        evaluate.extract_features(encoder, train, range(len(train)), 32, cpu)
    options = dict(ks=(1, 3, 15), size=32, device=cpu)
    accuracy = evaluate.knn_accuracy(
        encoder, train, val, leave_out=lambda *image: left_out.append(image), **options)
    assert accuracy == evaluate.knn_accuracy(encoder, *expected, **options)
    assert left_out == [(train, 3), (val, 5), (val, 9)]


@pytest.mark.parametrize("name, value, word", [
    ("norm.bias", math.nan, "norm.bias"),
    ("norm.weight", 3e38, "features"),    # finite weights whose features are not
])
def test_what_is_not_finite_ends_an_evaluation(name, value, word, folder, tmp_path, capsys):
    state = build_encoder("vit_nano", 32, 8).state_dict()
    state[name] += value
    torch.save(state, tmp_path / "vit.pth")
    flags = ["--pretrained_weights", tmp_path / "vit.pth", "--data_path", folder]
    line = one_line(capsys, evaluate.main, ["knn", *map(str, flags), "--num_workers", "0"],
                    program="evaluate.py")
    assert word in line
