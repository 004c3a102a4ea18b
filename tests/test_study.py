"""The study: its rows are commands, it goes on where it stopped, its tables are of its lines."""

import json
import statistics

import pytest
import torch
from helpers import image_folder, picture
from PIL import Image

from augment import normalize
from extras.study import LISTS, SETTINGS, Colors, main
from support.options import parse_evaluate_args, parse_train_args


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_row_is_a_command(setting):
    flags = SETTINGS[setting]
    for _, more, *_ in sum(LISTS.values(), []):
        if not more.startswith("colors"):
            parse_train_args([*flags["train"].split(), *more.split(), "--data_path", "shapes"])
    for task in ("knn", "linear", "segment"):
        argv = [task, "--pretrained_weights", "x.pth", "--data_path", "shapes"]
        parse_evaluate_args([*argv, *flags[task].split()])


@pytest.mark.parametrize("bins, dim", [(0, 3), (4, 64)])
def test_color_encoders_see_nothing_but_colors(bins, dim):
    images = torch.stack([picture(40, 40), picture(40, 40)]).float() / 255
    images[1] = images[1].flatten(1)[:, torch.randperm(1600)].unflatten(1, (40, 40))
    first, shuffled = Colors(bins)(normalize(images))
    assert first.shape == (1, dim)
    torch.testing.assert_close(first, shuffled)
    other = Colors(bins)(normalize(images.roll(1, dims=1)))[0]
    assert not torch.allclose(first, other, rtol=0.1)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = image_folder(tmp_path / "images", train=32)
    for split in ("train", "val"):
        for part in ("images", "masks"):
            (tmp_path / "dense" / split / part).mkdir(parents=True)
        for i in range(4):
            image = picture(48, 48 + i)
            mask = (image[0] > 128).to(torch.uint8)
            Image.fromarray(image.movedim(0, 2).numpy()).save(
                tmp_path / "dense" / split / "images" / f"{i}.png")
            Image.fromarray(mask.numpy()).save(tmp_path / "dense" / split / "masks" / f"{i}.png")
    paths = ["--data_path", str(images), "--dense_path", str(tmp_path / "dense")]
    file = tmp_path / "results" / "study-shapes.jsonl"

    main(["table7-dino", "--seeds", "0", *paths])
    main(["table7-dino", "--seeds", "0", "1", "--jobs", "2", *paths])
    before = file.read_text()
    main(["table7-dino", "--seeds", "0", "1", *paths])    # nothing is left to do
    assert file.read_text() == before
    records = [json.loads(line) for line in before.splitlines()]
    assert sorted((r["flags"], r["seed"]) for r in records) == sorted(
        (flags, seed) for _, flags, *_ in LISTS["table7-dino"] for seed in (0, 1))

    capsys.readouterr()
    main(["table7-dino", "--table"])
    spatial = {(r["flags"], r["seed"]): r["spatial"] for r in records}
    paired = [spatial["", seed] - spatial["--alpha 0 --beta 0", seed] for seed in (0, 1)]
    shown = f"{statistics.mean(paired):+.3f} ± {statistics.stdev(paired):.3f}"
    assert shown in capsys.readouterr().out.splitlines()[-1]
