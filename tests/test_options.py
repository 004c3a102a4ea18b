"""Command lines: intervals of numbers, recipes, and one line for what can't be."""

import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SMALL, image_folder

import evaluate
import train
from extras import benchmark, visualize
from model import build_encoder
from support.evaluate_options import EVALUATIONS, parse_evaluate_args
from support.options import number, parse_train_args

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind, interval, inside, outside", [
    (float, "[0, inf)", ["0", "-0", "1e300", ".5"], ["-1e-9", "inf", "1e400", "nan", "x", ""]),
    (float, "(0, 1]", ["1e-9", "1"], ["0", "1.0001", "-inf", "nan"]),
    (float, "(-inf, inf)", ["-1e300", "0"], ["-inf", "inf", "nan"]),
    (int, "[1, 9e18]", ["1", "9000000000000000000"], ["0", "-1", "1.5", "1e3", "nan", "9" * 19]),
])
def test_numbers_lie_in_their_interval(kind, interval, inside, outside):
    parse = number(kind, interval)
    for text in inside:
        assert parse(text) == kind(text) and type(parse(text)) is kind
    for text in outside:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


# --- recipes --------------------------------------------------------------------------------------

# The text and the authors' release; beside them iBOT's and MoCo v3's own releases, and DINO's
# README for a ResNet-50.
DINO = dict(
    baseline="dino", arch="vit_small", patch_size=16, epochs=100, warmup_epochs=10, lr=0.0005,
    min_lr=1e-6, alpha=1.0, beta=1.0, li_weight=1.0, temperature_spatial=0.5,
    temperature_channel=0.1, sharpen="teacher", relation_heads=6, overlap_global=13,
    overlap_local=6, global_crops_scale=[0.35, 1.0], local_crops_scale=[0.05, 0.35],
    local_crops_number=4, out_dim=65536, teacher_temp=0.04, clip_grad=3.0, momentum_teacher=0.996,
    weight_decay=0.04, weight_decay_end=0.4, batch_size_per_gpu=64, optimizer="adamw")
IBOT = DINO | dict(
    baseline="ibot", alpha=0.2, beta=0.5, out_dim=8192, shared_head=True, teacher_temp=0.07,
    teacher_patch_temp=0.07, warmup_teacher_temp_epochs=30, pred_ratio=[0.0, 0.3],
    pred_ratio_var=[0.0, 0.2], local_crops_number=10, global_crops_scale=[0.4, 1.0],
    local_crops_scale=[0.05, 0.4], clip_grad=0.3, batch_size_per_gpu=128, norm_last_layer=False,
    li_weight=1.65)
PAPER = {"dino": DINO, "ibot": IBOT, "ibot-b": IBOT | dict(
    arch="vit_base", relation_heads=12, norm_last_layer=True, warmup_teacher_temp_epochs=50,
    freeze_last_layer=3, lr=0.00075, min_lr=2e-6, global_crops_scale=[0.32, 1.0],
    local_crops_scale=[0.05, 0.32],
), "mocov3": DINO | dict(
    baseline="mocov3", moco_t=0.2, out_dim=256, momentum_teacher=0.99, local_crops_number=0,
    lr=0.00015, min_lr=0.0, weight_decay=0.1, weight_decay_end=0.1, warmup_epochs=13,
    stop_grad_conv1=True, clip_grad=0.0, global_crops_scale=[0.08, 1.0],
), "resnet50": DINO | dict(
    arch="resnet50", patch_size=32, optimizer="sgd", lr=0.03, weight_decay=1e-4,
    weight_decay_end=1e-4, global_crops_scale=[0.14, 1.0], local_crops_scale=[0.05, 0.14],
    relation_heads=8, overlap_global=7, overlap_local=3)}


@pytest.mark.parametrize("recipe", PAPER)
def test_recipes_have_their_papers_settings(recipe):
    args = parse_train_args(["--recipe", recipe, "--data_path", "x"])
    assert {name: getattr(args, name) for name in PAPER[recipe]} == PAPER[recipe]


@pytest.mark.parametrize("flags, expected", [
    ("", dict(recipe="demo", data_path="shapes", arch="vit_nano", output_dir="runs/demo")),
    ("--data_path x", dict(recipe="dino", arch="vit_small", output_dir="runs/dino")),
    ("--recipe demo --data_path x --epochs 50", dict(data_path="x", epochs=50, arch="vit_nano")),
    ("--recipe ibot --data_path x --alpha 0.3 --no-shared_head --output_dir y",
     dict(alpha=0.3, beta=0.5, shared_head=False, output_dir="y")),
    ("--baseline mocov3 --data_path x", dict(recipe="mocov3", local_crops_number=0)),
    ("--baseline dino+ --data_path x", dict(recipe="dino", baseline="dino+")),
])
def test_a_recipe_is_named_or_follows_and_flags_override_it(flags, expected):
    args = parse_train_args(flags.split())
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("flags, points", [
    ("", (13, 6)), ("--patch_size 8", (26, 12)), ("--local_crops_number 0", (13, 6)),
    ("--global_crops_size 32 --local_crops_size 16 --patch_size 4", (7, 4)),
    ("--global_crops_size 64 --patch_size 8 --overlap_local 3 --local_crops_size 32", (7, 3)),
])
def test_points_of_the_overlap_follow_the_feature_maps(flags, points):
    args = parse_train_args(["--data_path", "x", *flags.split()])
    assert (args.overlap_global, args.overlap_local) == points


def test_help_shows_the_recipes_values(capsys):
    with pytest.raises(SystemExit):
        parse_train_args(["--recipe", "ibot-b", "--help"])
    assert "(default: vit_base)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("function, command", [
    (parse_train_args, ""), (benchmark.parse_args, ""), (parse_evaluate_args, ""),
    *((parse_evaluate_args, task) for task in EVALUATIONS),
    *((visualize.parse_args, name) for name in ("idea", "attention", "relations", "invariance")),
])
def test_help_is_readable_on_any_terminal(function, command, capsys):
    with pytest.raises(SystemExit):
        function([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert "usage" in text and text.isascii()    # Windows' code page 1252 lacks Greek


# --- bad input ------------------------------------------------------------------------------------


def refusal(capsys, function, argv):
    """Return the one line that a program ends with before it begins to work."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.match(r"[\w.]+: error: ", line)
    return line


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Name weights, and files and folders that lack something."""
    root = tmp_path_factory.mktemp("places")
    places = {name: root / name for name in ("weights", "other_weights", "text", "empty", "flat")}
    torch.save(build_encoder("vit_nano", 32, 8).state_dict(), places["weights"])
    torch.save(build_encoder("vit_nano", 32, 16).state_dict(), places["other_weights"])
    places["text"].write_text("text")
    places["empty"].mkdir()
    shutil.rmtree(image_folder(root / "no_val") / "val")
    flat = image_folder(places["flat"], train=1, val=1)    # ImageNet's val as it is shipped
    for path in (flat / "val").glob("*/*"):
        path.rename(flat / "val" / f"{path.parent.name}.png")
    return places | {"root": root}


@pytest.mark.parametrize("flags, word", [
    # a flag alone
    ("--lr nan", "--lr"), ("--alpha -1", "--alpha"), ("--teacher_temp 0", "--teacher_temp"),
    ("--drop_path_rate 1", "--drop_path_rate"), ("--moco_t 0", "--moco_t"),
    ("--epochs 1.5", "--epochs"), ("--warmup_teacher_temp_epochs -1", "_temp_epochs"),
    ("--global_crops_scale 0.5", "--global_crops_scale"), ("--recipe nonsense", "nonsense"),
    ("--baseline nonsense", "nonsense"), ("--recipe ibot --pred_ratio_var 0 -0.2", "_ratio_var"),
    # flags together
    ("--global_crops_scale 0.9 0.2", "rise"), ("--local_crops_scale 0.9 0.2", "rise"),
    ("--global_crops_size 30", "--patch_size 8"), ("--local_crops_size 17", "--patch_size 8"),
    ("--relation_heads 7", "1, 2, 3, 4, 6, 8"), ("--heads 7", "96"),
    ("--alpha 0 --beta 0 --li_weight 0", "0: nothing"), ("--warmup_epochs 3", "--epochs 3"),
    ("--warmup_teacher_temp_epochs 4", "--epochs 3"),
    ("--recipe ibot --pred_ratio 0.3", "equally"),
    ("--recipe ibot --pred_ratio 0 0.3 --pred_ratio_var 0 0.4", "0.3 +- --pred_ratio_var 0.4"),
    ("--recipe mocov3 --batch_size_per_gpu 1", "--batch_size_per_gpu 1"),
    ("--recipe resnet50 --arch resnet50", "--patch_size 32"),
    ("--arch resnet50 --patch_size 32 --global_crops_size 64 --local_crops_number 0 "
     "--relation_heads 8", "--drop_path_rate 0"),
    ("--arch resnet50 --baseline ibot --relation_heads 8", "--baseline"),
    # files and images
    ("--data_path nowhere", "nowhere"), ("--data_path {text}", "{text}"),
    ("--data_path {empty}", "{empty}"), ("--data_path=", "needs --data_path"),
    ("--batch_size_per_gpu 999 --grad_accum_steps 3", "at most 5"),
    ("--grad_accum_steps 17", "a batch of 68"), ("--init_from {root}/nothing.pth", "nothing.pth"),
    ("--init_from {root}", "{root}"), ("--init_from {text}", "{text}"),
    ("--init_from {weights}", "--patch_size 16, not 8"),
    ("--init_from {weights} --arch vit_tiny --relation_heads 3", "vit_tiny"),
    ("--output_dir {text}", "{text}"),
])
def test_bad_input_to_train_gets_one_line(flags, word, folder, places, tmp_path, capsys):
    output, places = tmp_path / "run", places | {"weights": places["other_weights"]}
    command = [*SMALL, "--data_path", str(folder), "--output_dir", str(output)]
    line = refusal(capsys, train.main, [*command, *flags.format(**places).split()])
    assert word.format(**places) in line and not output.exists()


@pytest.mark.parametrize("command, word", [
    ("nonsense", "nonsense"), ("knn", "--pretrained_weights"),
    ("knn --pretrained_weights {weights}", "--data_path"),
    ("export --pretrained_weights {weights}", "--output"),
    ("export --pretrained_weights {weights} --output {root}/missing/x.pth", "missing/x.pth"),
    ("knn {given} --nb_knn 0", "--nb_knn"), ("knn {given} --temperature 0", "--temperature"),
    ("linear {given} --holdout 1", "--holdout"), ("linear {given} --lr 0.1 nan", "--lr"),
    ("linear {given} --n_last_blocks 9", "--n_last_blocks 9"),
    ("knn {given} --image_size 30", "patch size 8"), ("knn {given} --heads 5", "5 heads"),
    ("knn {given} --arch vit_tiny", "vit_tiny"), ("knn {given} --checkpoint_key x", "'x'"),
    ("knn {given} --pretrained_weights {root}/nothing.pth", "nothing.pth"),
    ("knn {given} --pretrained_weights {root}", "{root}"),
    ("knn {given} --pretrained_weights {text}", "{text}"),
    ("knn {given} --data_path nowhere", "nowhere"), ("knn {given} --data_path {flat}", "{flat}"),
    ("linear {given} --data_path {root}/no_val", "no_val"),
    ("knn {given} --json {root}/missing/x.json", "missing/x.json"),
    ("knn {given} --json {empty}", "{empty}"),
    ("linear {given} --output_dir {text}", "{text}"),
])
def test_bad_input_to_evaluate_gets_one_line(command, word, folder, places, capsys):
    given = f"--pretrained_weights {places['weights']} --data_path {folder} --num_workers 0"
    command, word = command.replace("{given}", given).format(**places), word.format(**places)
    assert word in refusal(capsys, evaluate.main, command.split())


WEIGHTS = "--pretrained_weights x --data_path x"


@pytest.mark.parametrize("function, command, nearest", [
    (parse_train_args, "--baselin mocov3", "--baseline"),
    (parse_train_args, "--no-compiled", "--no-compile"),
    (parse_train_args, "--batch_size=3", "--batch_size_per_gpu"),    # from DINO, iBOT, MAE, timm
    (parse_train_args, "--accum_iter 3", "--grad_accum_steps"),
    (parse_train_args, "--model vit_tiny", "--arch"),
    (parse_train_args, "--batch-size 3", "--batch_size_per_gpu"),
    (parse_train_args, "--workers 3", "--num_workers"),
    (parse_train_args, "--saveckp_freq 3", "--checkpoint_steps"),
    (parse_train_args, "--drop_path 0.1", "--drop_path_rate"),
    (parse_train_args, "--zzz 3", None),
    (benchmark.parse_args, "--stesp 3", "--steps"),
    (parse_evaluate_args, f"knn {WEIGHTS} --nb_kn 3", "--nb_knn"),
    (parse_evaluate_args, f"linear {WEIGHTS} --batch_size 3", "--batch_size_per_gpu"),
    (visualize.parse_args, f"attention {WEIGHTS} --output x.png --nmber 3", "--number"),
])
def test_an_unknown_flag_suggests_the_nearest(function, command, nearest, capsys):
    line = refusal(capsys, function, command.split())
    unknown = next(word for word in reversed(command.split()) if word.startswith("--"))
    assert unknown in line
    assert line.endswith(f"did you mean {nearest}?") if nearest else "mean" not in line


@pytest.mark.parametrize("flags", ["--norm_last_layer false", "--no-compile True", "--symmetric 1"])
def test_a_switch_takes_no_value(flags, capsys):
    switch = flags.split()[0].removeprefix("--no-").removeprefix("--")
    assert f"--no-{switch}" in refusal(capsys, parse_train_args, flags.split())


# --- the README -----------------------------------------------------------------------------------


def commands(text):
    """Yield (program, arguments) of each command in blocks of sh that runs Python."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            for before, word in zip(["", *words], words):
                if word.endswith(".py") or before == "-m":
                    yield word, words[words.index(word) + 1:]
                    break


def test_commands_of_the_readme_are_understood_and_do_not_collide():
    """Each understands its flags, and none writes where another one does."""
    programs = {
        "train.py": parse_train_args, "evaluate.py": parse_evaluate_args,
        "extras.visualize": visualize.parse_args, "extras.benchmark": benchmark.parse_args,
    }
    seen, places = set(), []
    for program, arguments in commands((ROOT / "README.md").read_text()):
        if program not in ("venv", "pytest"):
            args = programs[program](arguments)
            seen.add(program)
            if program == "train.py":
                places.append(args.output_dir)
            elif output := getattr(args, "output", None):
                places.append(output)
    assert seen == programs.keys()
    assert places and sorted(set(places)) == sorted(places)
