"""The study: its rows are commands, it goes on where it stopped, its tables are of its lines."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import close, image_folder, picture
from torchvision.transforms.v2.functional import to_pil_image

import train
from augment import normalize
from extras.ablations import Colors
from extras.study import LISTS, MEASURES, SETTINGS, identify, main, measure, sign
from support.evaluate_options import parse_evaluate_args
from support.options import parse_train_args


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
def test_a_row_is_trained_and_measured_by_the_real_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, dense = image_folder(tmp_path / "images", train=32), tmp_path / "dense"
    for split in ("train", "val"):
        for part, pixels in (("images", picture(48, 48)), ("masks", picture(48, 48)[:1] // 128)):
            (dense / split / part).mkdir(parents=True)
            to_pil_image(pixels).save(dense / split / part / "0.png")
    args = SimpleNamespace(setting="shapes", data_path=str(images), dense_path=str(dense))
    found = measure(args, "--lr 0 --min_lr 0 --max_steps 1", 0, tmp_path / "run")
    assert set(MEASURES) <= set(found) and all(math.isfinite(x) for x in found.values())
    # A step at learning rate 0 leaves the encoder untrained.
    torch.manual_seed(0)
    _, untrained = train.build_networks(parse_train_args(["--recipe", "demo"]))
    saved = torch.load(tmp_path / "run" / "backbone.pth", weights_only=True)
    for name, value in untrained.backbone.state_dict().items():
        close(saved[name], value)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["colors", "--data_path", str(image_folder(tmp_path / "images", classes=3))]
    main([*command, "--seeds", "1"])
    main([*command, "--seeds", "0", "1"])
    lines = (tmp_path / "results" / "study-shapes.jsonl").read_text().splitlines()
    records = {(r["flags"], r["seed"]): r for r in map(json.loads, lines)}
    assert len(lines) == len(records) == 4

    # Invented numbers, to know the paired difference of.
    for key, kNN in zip(sorted(records), (10, 20, 40, 60)):
        lines.append(json.dumps(records[key] | {"kNN": kNN}))
    (tmp_path / "results" / "study-shapes.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    main([*command, "--table"])
    assert "| +35.0 ± 7.1 |" in capsys.readouterr().out    # 40 - 10 and 60 - 20
    main(["colors", "--table"])
    assert "±" not in capsys.readouterr().out    # of `shapes` nothing was measured


@pytest.mark.slow
def test_a_study_that_is_asked_to_end_leaves_no_process_behind(tmp_path):
    folder = image_folder(tmp_path / "images", train=32)
    process = subprocess.Popen(
        [sys.executable, "-m", "extras.study", "table8", "--data_path", folder, "--seeds", "0"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "runs").glob("study/*/log.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate()    # ends when no child holds the pipe any more
    assert process.returncode == 128 + signal.SIGTERM, output
    assert list((tmp_path / "runs").glob("study/*/checkpoint.pth"))    # it goes on from there
    assert not (tmp_path / "results" / "study-shapes.jsonl").exists()


def test_a_row_is_what_its_arguments_say_and_not_how():
    def row(flags, setting="shapes", data="shapes"):
        args = SimpleNamespace(setting=setting, data_path=data, data=[data, "shapes"])
        return identify(args, flags)

    assert row("") == row("--alpha 1") == row("--temperature_channel 0.1  --alpha 1.0")
    others = [row("--alpha 0"), row("colors 0"), row("", "photographs"), row("", data="cifar10")]
    assert len({row(""), *others}) == 5


@pytest.mark.parametrize("values, expected", [
    ([4, 5, 6], "+"), ([-4, -5, -6], "-"), ([-1, 0, 1], "0"), ([0.0, 1.0, 2.0], "0"), ([4, 5], ""),
])
def test_a_sign_is_beyond_two_standard_errors(values, expected):
    assert sign(values) == expected


PHOTOGRAPHS = " --data_path imagenette-112 --dense_path camvid-240 --setting "
TUNING = "tuning --setting tuning --data_path shapes-tuning --dense_path shapes-tuning"


@pytest.mark.parametrize("part, command", [
    ("study", "all"), ("tuning", TUNING),
    ("photographs", "photographs" + PHOTOGRAPHS + "photographs"),
    ("short", "photographs table7-ibot table7-mocov3" + PHOTOGRAPHS + "photographs-short"),
])
def test_readme_and_results_show_what_the_logs_hold(part, command, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    main([*command.split(), "--table"])
    printed = capsys.readouterr().out.strip()
    results = Path("results", "RESULTS.md").read_text()
    assert results.split(f"<!-- {part} -->")[1].split(f"<!-- /{part} -->")[0].strip() == printed
    if part == "study":
        found = Path("README.md").read_text().split("## What we found")[1].split("## Read it")[0]
        rows = [line for line in found.splitlines() if line.startswith("| ")]
        assert len(rows) > 2 and set(rows) <= set(printed.splitlines())
