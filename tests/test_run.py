"""Training runs through train.main: what they write, how they stop, resume and refuse."""

import json
import math
import multiprocessing
import re
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch
from helpers import SMALL, assert_same_run, close, image_folder, log_of, one_line, run
from PIL import Image
from test_stored_losses import VARIANTS

import evaluate
import support.run
import train
from model import build_encoder
from support.checkpoint import output_folder
from support.optim import cosine_schedule
from support.options import parse_train_args
from support.progress import progress
from support.run import TERMS
from support.weights import load_encoder


# Remove it with its cause: train.build_loader needs generator=torch.Generator().
def load(path):
    return torch.load(path, weights_only=True)


def lines_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def built(*flags):
    """Return (student, teacher) as a run with these flags begins."""
    args = parse_train_args([*SMALL, "--data_path", "none", *map(str, flags)])
    torch.manual_seed(args.seed)
    return train.build_networks(args)


@pytest.fixture(scope="module")
def one_epoch(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("one_epoch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run(folder, output, "--max_steps", 4)
    return output


@pytest.fixture
def begun(one_epoch, tmp_path):
    """A run after the first of its three epochs, to go on from or to spoil."""
    return shutil.copytree(one_epoch, tmp_path / "begun")


# --- what is written ------------------------------------------------------------------------------


def test_a_run_writes_its_arguments_its_log_its_weights_and_pictures(uninterrupted):
    pictures = {"views.png", "attention.png"}
    files = pictures | {"args.json", "log.jsonl", "checkpoint.pth", "backbone.pth", ".lock"}
    assert {path.name for path in uninterrupted.iterdir()} == files
    assert all(np.asarray(Image.open(uninterrupted / name)).std() > 0 for name in pictures)
    written = json.loads((uninterrupted / "args.json").read_text())
    assert (written["recipe"], written["arch"], written["epochs"]) == ("dino", "vit_nano", 3)
    assert (written["effective_batch"], written["effective_lr"]) == (4, 0.0005 * 4 / 256)
    teacher = load(uninterrupted / "checkpoint.pth")["teacher"]
    for name, value in load(uninterrupted / "backbone.pth").items():
        assert torch.equal(value, teacher[f"backbone.{name}"])


def test_the_log_has_a_line_a_step_and_a_line_an_epoch(uninterrupted):
    losses, knn = log_of(uninterrupted)
    assert list(losses) == list(range(1, 13)) and list(knn) == [0, 8, 12]    # --knn_every 2
    lines = lines_of(uninterrupted)
    steps, (untrained, *epochs) = (
        [line for line in lines if line["kind"] == kind] for kind in ("step", "epoch"))
    most = {"teacher_entropy": 32, "spatial_entropy": 16, "channel_entropy": 96}    # K, N, C
    rates = cosine_schedule(0.0005 * 4 / 256, 1e-6, 12, warmup=4).tolist()
    for line, rate in zip(steps, rates, strict=True):
        assert line.keys() == {
            "kind", "step", "epoch", *TERMS, *most, "lr", "teacher_temp", "images_per_s",
            "data_wait", "unreadable", "peak_memory_gib", "feature_std", "overlap"}
        assert all(0 <= line[name] <= math.log(number) for name, number in most.items())
        assert line["lr"] == pytest.approx(rate) and line["epoch"] == line["step"] / 4
        assert line["loss"] == pytest.approx(line["L_I"] + line["L_p"] + line["L_c"])    # Eq. 6
    assert untrained.keys() == {"kind", "step", "epoch", "kNN"}
    for epoch, line in enumerate(epochs, start=1):
        mean = np.mean([losses[step] for step in range(4 * epoch - 3, 4 * epoch + 1)], axis=0)
        assert line["epoch"] == epoch and [line[name] for name in TERMS] == pytest.approx(mean)


def test_without_a_terminal_losses_are_lines(folder, tmp_path, capsys):
    run(folder, tmp_path, "--max_steps", 3, "--log_every", 2, "--knn_every", 0)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    logged = log_of(tmp_path)[0]
    assert [line.split(",")[0] for line in lines] == ["step 2/3", "step 3/3"]    # and the last
    for line, (_, _, L_p, L_c) in zip(lines, logged.values()):
        assert f"L_p {L_p:.3f}, L_c {L_c:.3f}" in line


def test_without_a_terminal_progress_is_lines(capsys):
    assert list(progress(range(4), "features", every=0)) == [0, 1, 2, 3]
    said = capsys.readouterr().out
    assert "features ..." in said and "features: 75 %" in said
    assert list(progress(range(4), "features", show=False)) == [0, 1, 2, 3]
    assert capsys.readouterr().out == ""


def test_unreadable_images_are_counted_in_the_log_and_named_once(tmp_path, capsys):
    folder = image_folder(tmp_path / "images")
    for split in ("train", "val"):
        (folder / split / "class0/!text.jpg").write_text("not an image")
    run(folder, tmp_path / "run", "--epochs", 2, "--batch_size_per_gpu", 17, "--knn_every", 1)
    unreadable = [line.get("unreadable") for line in lines_of(tmp_path / "run")]
    assert unreadable == [None, 1, None, 1, None]    # kNN, a step, kNN, ...
    said = capsys.readouterr().err
    assert [said.count(f"{split}/class0/!text.jpg can't") for split in ("train", "val")] == [1, 1]


def test_images_without_labels_train_without_knn(folder, tmp_path):
    run(folder / "train", tmp_path, "--max_steps", 4)
    assert log_of(tmp_path)[1] == {} and len(log_of(tmp_path)[0]) == 4


def test_tensorboard_gets_what_the_log_has(folder, tmp_path, monkeypatch):
    scalars, others = [], set()

    class SummaryWriter:    # a stand-in, as the package need not be here
        def __init__(self, folder, purge_step):
            others.add((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, step, value))

        def add_image(self, name, picture, step, dataformats):
            others.add((name, step, picture.shape[dataformats.index("C")]))

        def flush(self):
            pass

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for steps in (4, 8):
        run(folder, tmp_path, "--tensorboard", "--epochs", 2, "--max_steps", steps)
    assert scalars == [(f"{line['kind']}/{name}", line["step"], value)
                       for line in lines_of(tmp_path) for name, value in line.items()
                       if name not in ("kind", "step") and value is not None]
    assert others == {
        ("views", 1, 3), ("attention", 4, 3), ("attention", 8, 3),    # in color
        (tmp_path / "tensorboard", None), (tmp_path / "tensorboard", 5)}    # void from there on


# --- resuming -------------------------------------------------------------------------------------


def test_resuming_in_mid_epoch_changes_nothing(folder, uninterrupted, tmp_path, capsys):
    run(folder, tmp_path, "--max_steps", 3)
    with open(tmp_path / "log.jsonl", "a") as log:    # as if killed after the checkpoint, in a line
        log.write('123\n{}\n{"kind": "step", "step": 4, "loss": 99}\n{"kind": "step", "step": 5, "')
    run(folder, tmp_path, "--max_steps", 8)
    run(folder, tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    epochs, expected = ([line for line in lines_of(output) if line["kind"] == "epoch"]
                        for output in (tmp_path, uninterrupted))
    assert epochs == expected    # means over all steps
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    run(folder, tmp_path)
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def edit(change):
    """Return a function of a checkpoint's path that changes the dict in it."""
    def spoil(path):
        checkpoint = load(path)
        change(checkpoint)
        torch.save(checkpoint, path)
    return spoil


def edit_arguments(**values):
    return edit(lambda checkpoint: checkpoint["arguments"].update(values))


def refused(folder, begun, capsys, *flags):
    """Return the line of a run that goes on from nothing and changes no file."""
    files = [path for path in begun.iterdir() if path.is_file()]
    before = [path.read_bytes() for path in files]
    line = one_line(capsys, run, folder, begun, *flags)
    assert before == [path.read_bytes() for path in files]
    return line


@pytest.mark.parametrize("spoil, flags, words", [
    (None, "--recipe mocov3", "dino, not mocov3"),
    (None, "--alpha 0.5 --local_crops_number 1 --log_every 5",
     "arguments: alpha was 1.0, is 0.5; local_crops_number was 2, is 1;"),
    (None, "--epochs 4", "epochs was 3, is 4 (which changes the schedules)"),
    (edit_arguments(images=15), "", "images was 15, is 16"),
    (edit_arguments(processes=2), "", "processes was 2, is 1 (which changes"),
    (edit_arguments(**{"names of images": "others"}), "", "names of images was others, is"),
])
def test_a_run_with_other_arguments_is_refused(spoil, flags, words, folder, begun, capsys):
    if spoil:
        spoil(begun / "checkpoint.pth")
    line = refused(folder, begun, capsys, *flags.split())
    assert words in line and "another --output_dir, or --overwrite" in line


def cut_average(checkpoint):
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)


def cut_norm(checkpoint):
    checkpoint["student"]["backbone.norm.bias"] = torch.zeros(7)


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.write_bytes(b""), "damaged"),
    (lambda path: path.write_bytes(b"text"), "damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "damaged"),
    (lambda path: path.unlink() or path.mkdir(), "Is a directory"),
    (lambda path: torch.save({"model": torch.nn.Linear(2, 2)}, path), "not a checkpoint of this"),
    (lambda path: torch.save({"state_dict": {}, "epoch": 3}, path), "not a checkpoint of this"),
    (lambda path: torch.save([1], path), "not a checkpoint of this"),
    (edit(lambda checkpoint: checkpoint["arguments"].pop("baseline")), "baseline"),
    (edit(lambda checkpoint: checkpoint.pop("teacher")), "teacher is missing"),
    (edit(lambda checkpoint: checkpoint["student"].pop("backbone.cls_token")), "cls_token"),
    (edit(lambda checkpoint: checkpoint["student"].update(new=torch.zeros(1))), "new"),
    (edit(cut_norm), "(7,)"),
    (edit(lambda checkpoint: checkpoint.update(optimizer=[])), "optimizer"),
    (edit(lambda checkpoint: checkpoint["optimizer"].update(param_groups=[])), "groups"),
    (edit(cut_average), "(7,)"),
    (edit(lambda checkpoint: checkpoint["sums"].update(L_p=None)), "L_p is NoneType"),
    (edit(lambda checkpoint: checkpoint.update(step=10**9)), "step is 1000000000"),
    (edit(lambda checkpoint: checkpoint.update(step="4")), "step"),
])
def test_what_is_no_checkpoint_of_the_run_is_not_offered_for_deletion(
        spoil, words, folder, begun, capsys):
    spoil(begun / "checkpoint.pth")
    line = refused(folder, begun, capsys)
    assert words in line and "--output_dir" in line and "--overwrite" not in line


def test_a_run_goes_on_where_its_files_have_moved(folder, uninterrupted, begun, tmp_path, capsys):
    run(shutil.copytree(folder, tmp_path / "moved"), begun)
    assert_same_run(begun, uninterrupted)

    first, second, other = (tmp_path / name for name in ("1.pth", "2.pth", "3.pth"))
    for path in (first, other):
        torch.save(build_encoder("vit_nano", 32, 8).state_dict(), path)
    shutil.copy(first, second)
    options = ["--knn_every", 0, "--max_steps"]
    run(folder, tmp_path / "run", "--init_from", first, *options, 1)
    assert "init_from was" in one_line(
        capsys, run, folder, tmp_path / "run", "--init_from", other, *options, 2)
    run(folder, tmp_path / "run", "--init_from", second, *options, 2)
    assert list(log_of(tmp_path / "run")[0]) == [1, 2]


def test_overwrite_starts_anew_but_a_slip_of_the_pen_deletes_nothing(
        folder, begun, capsys, monkeypatch):
    refused("nowhere", begun, capsys, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)    # not installed
        assert "pip install" in refused(folder, begun, capsys, "--overwrite", "--tensorboard")
    run(folder, begun, "--overwrite", "--alpha", 0.5, "--max_steps", 1)
    assert load(begun / "checkpoint.pth")["step"] == 1 and list(log_of(begun)[0]) == [1]


@pytest.mark.parametrize("variant", [pytest.param(name, marks=(
    pytest.mark.slow if name == "resnet50" else ()
)) for name in VARIANTS])
def test_every_recipe_trains_and_resumes(variant, folder, tmp_path):
    """Two steps at once, after kNN, against one and one without it."""
    flags = VARIANTS[variant].split()
    if variant == "resnet50":
        flags += ["--beta", "0"]    # relations of 2048 x 2048 channels take a minute
    run(folder, tmp_path / "whole", *flags, "--max_steps", 2)
    for steps in (1, 2):
        run(folder, tmp_path / "parts", *flags, "--max_steps", steps, "--knn_every", 0)
    logged = log_of(tmp_path / "whole")[0]
    assert logged == log_of(tmp_path / "parts")[0]
    teacher = load(tmp_path / "whole/backbone.pth")
    for name, value in load(tmp_path / "parts/backbone.pth").items():
        assert torch.equal(value, teacher[name])

    args = parse_train_args([*SMALL, "--data_path", str(folder), *flags])
    for loss, L_I, L_p, L_c in logged.values():
        assert loss == pytest.approx(args.li_weight * L_I + args.alpha * L_p + args.beta * L_c)
    momentum = load(tmp_path / "whole/checkpoint.pth")["optimizer"]["param_groups"][0]
    assert momentum.get("momentum") == (0.9 if args.optimizer == "sgd" else None)
    assert (tmp_path / "whole/attention.png").exists() == (variant != "resnet50")
    encoder = load_encoder(tmp_path / "whole/checkpoint.pth")    # what is trained can be evaluated
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, teacher[name])


# --- interruptions --------------------------------------------------------------------------------


def interrupt(monkeypatch, step, *numbers):
    """Raise signals in this step of the runs that follow."""
    calls, update_teacher = [], train.update_teacher

    def update_and_signal(*args):
        calls.append(update_teacher(*args))
        for number in numbers if len(calls) == step else ():
            signal.raise_signal(number)

    monkeypatch.setattr(train, "update_teacher", update_and_signal)


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 6), (signal.SIGTERM, 8)])
def test_a_signal_saves_and_the_same_command_resumes(
        number, step, folder, uninterrupted, tmp_path, capsys, monkeypatch):
    """Step 8 ends an epoch, whose kNN is made up for."""
    handler = signal.getsignal(number)
    interrupt(monkeypatch, step, number)
    with pytest.raises(SystemExit) as stopped:
        run(folder, tmp_path)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is handler
    assert number.name in capsys.readouterr().out
    assert load(tmp_path / "checkpoint.pth")["step"] == step and list(log_of(tmp_path)[1]) == [0]
    run(folder, tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    # The table at the end is of both parts.
    table = re.findall(r"^ +(\d) +(\d+\.\d\d) ", capsys.readouterr().out, re.MULTILINE)
    knn = log_of(tmp_path)[1]
    assert table == [(str(end // 4), f"{accuracy:.2f}") for end, accuracy in knn.items()]


def in_another_process(*arguments):
    """Call `run` in a process of its own; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number, folder, begun, monkeypatch, capfd):
    before = (begun / "checkpoint.pth").read_bytes()
    interrupt(monkeypatch, 2, number, number)
    assert in_another_process(folder, begun) == -number
    said = capfd.readouterr().err
    assert "stopping" in said and "Traceback" not in said
    assert (begun / "checkpoint.pth").read_bytes() == before


def test_a_signal_during_knn_stops_it(folder, uninterrupted, tmp_path, monkeypatch):
    """Before training, and after an epoch, whose line in the log is made up for."""
    batches, to_input = [], evaluate.to_input

    def signal_in_a_batch(*args):
        batches.append(1)
        if len(batches) == stop:
            signal.raise_signal(signal.SIGTERM)
        return to_input(*args)

    monkeypatch.setattr(evaluate, "to_input", signal_in_a_batch)
    for stop, step in ((2, 0), (6 + 3, 8)):    # 4 batches of train and 2 of val
        batches.clear()
        with pytest.raises(SystemExit) as stopped:
            run(folder, tmp_path)
        assert stopped.value.code == 128 + signal.SIGTERM and len(batches) == stop
        assert step == 0 or load(tmp_path / "checkpoint.pth")["step"] == step
    stop = None
    run(folder, tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_kill_during_knn_loses_no_training(folder, uninterrupted, tmp_path, monkeypatch):
    calls = []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == 2:    # the first is of the untrained encoder
            raise RuntimeError("killed")
        return evaluate.knn_accuracy(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(support.run, "knn_accuracy", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(folder, tmp_path)
    assert load(tmp_path / "checkpoint.pth")["step"] == 8
    run(folder, tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(folder, uninterrupted, begun, capsys):
    resource = pytest.importorskip("resource")
    before = (begun / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))    # of any file
    try:
        line = one_line(capsys, run, folder, begun)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "whole" in line and "File too large" in line and "enforce" not in line
    assert (begun / "checkpoint.pth").read_bytes() == before and not list(begun.glob("*.part"))
    run(folder, begun)
    assert_same_run(begun, uninterrupted)


def test_what_can_not_be_written_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "views.png").symlink_to("/dev/full")
    assert "No space left" in one_line(capsys, run, folder, tmp_path, "--knn_every", 0)
    assert "--output_dir" in one_line(capsys, run, folder, tmp_path / "views.png")    # no folder


def spoil_losses(monkeypatch):
    step, factors = train.Training.step, torch.tensor([math.nan, 1, 1, math.nan])

    def nan_in_step_7(self, number, batches):
        output = step(self, number, batches)
        return output._replace(losses=output.losses * factors) if number == 6 else output

    monkeypatch.setattr(train.Training, "step", nan_in_step_7)


def spoil_weights(monkeypatch):    # under a finite loss, in the last step before a checkpoint
    calls = iter(range(1, 99))
    monkeypatch.setattr(train, "clip_gradients", lambda parameters, max_norm: (
        next(calls) == 4 and next(iter(parameters)).grad.fill_(math.inf)))


@pytest.mark.parametrize("spoil, words", [
    (spoil_losses, "loss is nan, L_c is nan in step 7"),
    (spoil_weights, "1 parameters .* after step 8, backbone.cls_token"),
])
def test_what_is_not_finite_is_named_and_not_saved(
        spoil, words, folder, begun, monkeypatch, capsys):
    saved = [begun / name for name in ("checkpoint.pth", "backbone.pth")]
    before = [path.read_bytes() for path in saved]
    spoil(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        run(folder, begun, "--log_every", 100)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and re.search(f"{words}.*whole", line)
    assert [path.read_bytes() for path in saved] == before


def test_a_gpu_without_memory_is_one_line(folder, begun, monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nDetails")

    monkeypatch.setattr(train.Training, "step", full)
    monkeypatch.setattr(evaluate, "extract_features", full)
    command = f"knn --pretrained_weights {begun}/backbone.pth --data_path {folder}".split()
    for line in (one_line(capsys, run, folder, begun),
                 one_line(capsys, evaluate.main, command, program="evaluate.py")):
        assert "20 GiB" in line and "--batch_size_per_gpu" in line


def test_the_second_of_two_processes_in_a_folder_is_refused(folder, tmp_path, capfd):
    """Until the first ends, however it does."""
    with output_folder(tmp_path, is_main=True):
        assert in_another_process(folder, tmp_path) == 2
    assert "another run is at work" in capfd.readouterr().err
    assert in_another_process(folder, tmp_path, "--max_steps", 1, "--knn_every", 0) == 0


# --- what learns ----------------------------------------------------------------------------------


def test_a_fixed_patch_projection_stays_as_it_was_drawn(folder, tmp_path):
    run(folder, tmp_path, "--recipe", "mocov3", "--max_steps", 3, "--knn_every", 0)
    drawn, checkpoint = built("--recipe", "mocov3")[0].backbone, load(tmp_path / "checkpoint.pth")
    name = "backbone.patch_embed.proj.weight"
    assert torch.equal(checkpoint["student"][name], drawn.patch_embed.proj.weight)
    close(checkpoint["teacher"][name], drawn.patch_embed.proj.weight.data)
    assert not torch.equal(checkpoint["student"]["backbone.cls_token"], drawn.cls_token)


@pytest.mark.parametrize("variant, layers", [
    ("dino", ["last_layer"]),
    ("ibot, own head", ["last_layer", "patch_last_layer"]),
])
def test_last_layers_are_frozen_in_the_first_epoch(variant, layers, folder, tmp_path, monkeypatch):
    update_teacher, seen = train.update_teacher, []

    def look(student, *args):
        seen.append([student.head.get_submodule(name).weight.clone() for name in layers])
        update_teacher(student, *args)

    monkeypatch.setattr(train, "update_teacher", look)
    flags = VARIANTS[variant].split()
    run(folder, tmp_path, *flags, "--max_steps", 5, "--knn_every", 0)    # 4 are an epoch
    drawn = built(*flags)[0].head
    for i, name in enumerate(layers):
        assert torch.equal(seen[3][i], drawn.get_submodule(name).weight)
        assert not torch.equal(seen[4][i], seen[3][i])


@pytest.mark.parametrize("recipe", ["dino", "ibot"])
def test_training_starts_from_a_file(recipe, tmp_path):
    """Both networks, with position embeddings interpolated to the crops' grid."""
    encoder = build_encoder("vit_nano", 64, 8)
    torch.save(encoder.state_dict(), tmp_path / "vit.pth")
    expected = encoder.state_dict() | {"pos_embed": encoder.position_embedding(4, 4).detach()}
    for network in built("--recipe", recipe, "--init_from", tmp_path / "vit.pth"):
        state = network.backbone.state_dict()
        for name, value in expected.items():
            close(state[name], value)


@pytest.mark.parametrize("own_bf16, flags, precision, products", [
    (True, "", "bf16", "high"),
    (False, "", "fp16", "high"),    # older GPUs emulate bf16
    (True, "--precision fp32", "fp32", "highest"),    # no TF32
])
def test_a_gpus_own_half_precision_is_taken(own_bf16, flags, precision, products, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: own_bf16 or including_emulation)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    args = parse_train_args(flags.split())
    train.configure(args, torch.device("cuda"))
    assert (args.precision, asked, args.compile) == (precision, [products], True)
