"""Real processes: two under torchrun, one that is killed, whole command lines; and CUDA.

Two processes run this file, with torchrun; what they save is compared with one process here. How
processes fail, and what they must have in common, is tried in forks of one that has PyTorch loaded.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, assert_same_run, close, image_folder, log_of, one_line, run
from test_stored_losses import VARIANTS
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import evaluate
import train
from data import build_dataset
from extras.resnet import BatchNorm2d
from support.distributed import BatchNorm, Processes, average_over_processes
from support.errors import UserError
from support.options import parse_train_args
from support.weights import load_encoder
from support.workers import check_shared_memory

ROOT = Path(__file__).parents[1]

# Every way in which a loss or a head depends on the other processes' images.
SHARED = ["dino", "ibot", "ibot, own head", "mocov3", "dino+", "batch relations", "resnet50"]
TASKS = {
    "linear": ["--epochs", "2", "--lr", "0.1", "1"],
    "finetune": """--epochs 2 --warmup_epochs 0 --lr 0.01 --erasing 0 --mixup 0 --cutmix 0
    --drop_path_rate 0""".split(),
}


def flags_of(variant):
    """Return its flags, without what is random, or slow for no reason, in two processes."""
    slow = ["--beta", "0"] if variant == "resnet50" else []    # 2048 x 2048 channels
    return [*SMALL, "--data_path", "none", "--drop_path_rate", "0", *VARIANTS[variant].split(),
            *slow]


def step_of(variant, rank=0, processes=1, device="cpu"):
    """Return losses, gradients, and the state that a step leaves in losses and batch norms.

    The step is on a process's share of a batch of 4 images.
    """
    args = parse_train_args(flags_of(variant))
    torch.manual_seed(1)
    student, teacher = (network.to(device) for network in train.build_networks(args))
    embedding_loss = train.build_embedding_loss(args).to(device)
    relation_loss = train.build_relation_loss(args)
    L, block_mask = args.local_crops_number, train.build_mask(args)
    sizes = [(2, args.global_crops_size), (L, args.local_crops_size)]
    views = [torch.randn(number, 4, 3, size, size) for number, size in sizes if number]
    boxes = torch.rand(2 + L, 4, 5)
    boxes[..., 2:4] = boxes[..., :2] + 0.5
    boxes[..., 4].round_()
    boxes[2:, :2, :4] = torch.tensor([2.0, 2.0, 2.5, 2.5])    # the second process's overlap more
    mask = torch.zeros(2, 4, 0, dtype=torch.bool)
    if block_mask:
        patches = (args.global_crops_size // args.patch_size) ** 2
        mask = torch.rand(2, 4, patches).argsort(dim=-1) < torch.randint(block_mask.most, (2, 4, 1))
    share = slice(4 * rank // processes, 4 * (rank + 1) // processes)
    views = [x[:, share].to(device) for x in views]
    boxes, mask = boxes[:, share].to(device), mask[:, share].to(device)

    if processes > 1 and variant == "mocov3":    # which has all collectives
        for module in (student, teacher, embedding_loss, relation_loss):
            module.compile(fullgraph=True, backend="eager")
    network = DistributedDataParallel(student) if processes > 1 else student
    temperature = train.teacher_temperatures(args)[0].to(device)
    with torch.no_grad():
        t = teacher(views[:1], mask)
    s = network(views, mask)
    L_I = embedding_loss(s.embedding, t.embedding, temperature, boxes)
    L_p, L_c = relation_loss(t.p, t.c, s.p, s.c, boxes)
    (L_I + L_p + L_c).backward()
    embedding_loss.update_center()
    terms = average_over_processes(torch.stack([L_I, L_p, L_c]).detach())
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    state = dict(embedding_loss.state_dict())
    for prefix, network in (("student", student), ("teacher", teacher)):
        state |= dict(network.named_buffers(prefix))
    return terms, gradients, state


def normalized(kind, share=slice(None)):
    """Return what a norm makes of a share of a batch, its gradient, and its state afterwards."""
    torch.manual_seed(2)
    norm = {"tokens": lambda: BatchNorm(6), "plain": lambda: BatchNorm(6, affine=False),
            "maps": lambda: BatchNorm2d(6)}[kind]()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    shape, spread = ((8, 6, 5, 4), 1) if kind == "maps" else ((8, 5, 6), 0.1)    # as features have
    x = (5 + spread * torch.randn(shape))[share].requires_grad_()
    weights = torch.randn(shape)[share]
    y = norm(x)
    (y * weights).sum().backward()
    return {"x": x.detach(), "weights": weights, "y": y.detach(), "gradient": x.grad,
            "state": norm.state_dict()}


def features_of(weights, images):
    """Return features and labels of 15 images, which two processes can't share equally."""
    encoder, images = load_encoder(weights), build_dataset(images, "train")
    cpu = torch.device("cpu")
    return evaluate.extract_features(encoder, images, list(range(15)), 32, cpu, batch_size=4)


def train_flags(batch_size):
    return ["--batch_size_per_gpu", batch_size, "--grad_accum_steps", 2, "--max_steps", 3,
            "--drop_path_rate", 0, "--lr", 0.001, "--warmup_epochs", 0]


def task_command(task, weights, images, batch_size, *rest):
    flags = ["--pretrained_weights", weights, "--data_path", images, "--num_workers", 0,
             "--batch_size_per_gpu", batch_size, *rest, *TASKS.get(task, [])]
    return [task, *map(str, flags)]


def one_of_two(images, weights, output):
    """Do and save what is compared, as one of two processes."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))    # then nobody is waited for
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:    # programs share a group: it can't be made anew
        for name in ("init_process_group", "destroy_process_group"):
            patch.setattr(dist, name, lambda *_, **__: None)
        run(images, output / "two", *train_flags(2))
        results = {task: evaluate.main(task_command(
            task, weights, images, 4, "--output_dir", output / task)) for task in TASKS}
    torch.save({
        "steps": {variant: step_of(variant, rank, 2) for variant in SHARED},
        "norms": {kind: normalized(kind, slice(4 * rank, 4 * rank + 4))
                  for kind in ("tokens", "plain", "maps")},
        "features": features_of(weights, images),
        "top1": {task: result["top1"] for task, result in results.items()},
    }, output / f"{rank}.pth")
    dist.destroy_process_group()


def environment():
    """Return the environment of a process that computes as this one does."""
    threads = str(torch.get_num_threads())
    return os.environ | {
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}


def execute(*command, **options):
    """Run a Python program from beginning to end; return it."""
    return subprocess.run([sys.executable, *map(str, command)], env=environment(), text=True,
                          capture_output=True, timeout=600, **options)


@pytest.fixture(scope="module")
def two(folder, uninterrupted, tmp_path_factory):
    """Run one_of_two twice; return the folder and what each process saved."""
    output = tmp_path_factory.mktemp("two")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = execute(*torchrun, __file__, folder, uninterrupted / "backbone.pth", output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output, [torch.load(output / f"{rank}.pth", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", SHARED)
def test_a_step_of_two_processes_of_B_equals_one_of_2B(variant, two):
    terms, gradients, state = two[1][0]["steps"][variant]
    expected_terms, expected_gradients, expected_state = step_of(variant)
    close(terms, expected_terms, rtol=1e-4)    # through a network, and a peaked softmax
    assert gradients.keys() == expected_gradients.keys() and state.keys() == expected_state.keys()
    # A ResNet's last batch norms see but 16 values, and 5 % of its gradients is rounding. What
    # comes before a batch norm has biases whose gradient is rounding alone: 1e-5 of the largest.
    relative = 0.05 if variant == "resnet50" else 1e-3
    rounding = 1e-5 * max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        difference = (gradients[name] - gradient).norm()
        assert difference <= relative * gradient.norm() + rounding, name
    for name, value in expected_state.items():    # around 1, after up to fifty batch norms
        close(state[name], value, rtol=1e-4, atol=1e-4 if variant == "resnet50" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "plain", "maps"])
def test_batch_norm_over_processes_is_torchs(kind, two):
    parts = [saved["norms"][kind] for saved in two[1]]
    x, weights, y, gradient = (
        torch.cat([part[name] for part in parts]) for name in ("x", "weights", "y", "gradient"))
    torch.manual_seed(2)
    norm = nn.BatchNorm2d(6) if kind == "maps" else nn.BatchNorm1d(6, affine=kind == "tokens")
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x.requires_grad_()
    expected = norm(x) if kind == "maps" else norm(x.mT).mT
    (expected * weights).sum().backward()
    # Both divide a difference of numbers around 5 by a spread of 0.1, which magnifies rounding.
    close(y, expected.detach(), rtol=1e-4, atol=1e-4)
    close(gradient, x.grad, rtol=1e-3, atol=1e-3)
    if kind == "maps":
        for part in parts:
            for name, value in norm.state_dict().items():
                close(part["state"][name], value)


@pytest.mark.slow
def test_training_in_two_processes_of_B_equals_one_of_2B(folder, two, tmp_path):
    run(folder, tmp_path, *train_flags(4))
    (losses, knn), (expected, expected_knn) = log_of(two[0] / "two"), log_of(tmp_path)
    assert losses.keys() == expected.keys() == {1, 2, 3} and knn == expected_knn
    for step, row in expected.items():    # weights part by rounding, which AdamW magnifies
        assert losses[step] == pytest.approx(row, rel=1e-4)


@pytest.mark.slow
def test_processes_compute_features_in_shares_and_all_get_them(folder, uninterrupted, two):
    features, labels = features_of(uninterrupted / "backbone.pth", folder)
    for saved in two[1]:
        close(saved["features"][0], features)
        assert torch.equal(saved["features"][1], labels)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_evaluation_in_two_processes_of_B_equals_one_of_2B(
        task, folder, uninterrupted, two, tmp_path):
    output, saved = two
    weights = uninterrupted / "backbone.pth"
    command = task_command(task, weights, folder, 8, "--output_dir", tmp_path / task)
    expected = evaluate.main(command)
    assert saved[0]["top1"][task] == saved[1]["top1"][task] == expected["top1"]
    name, heads = {"linear": ("probes", "probes."), "finetune": ("model", "head.")}[task]
    a, b = (torch.load(root / task / "checkpoint.pth", weights_only=True)[name]
            for root in (output, tmp_path))
    for key in b:
        if key.startswith(heads):    # what else AdamW moves can have gradients of rounding alone
            close(a[key], b[key], rtol=1e-3, atol=1e-3 * b[key].abs().max().item())


# --- processes that differ or fail ----------------------------------------------------------------


def start(folder, function, *arguments, environment=None):
    """Start function(*arguments) in a process, in a folder; what it prints goes to "output"."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo", "torchvision.transforms.v2"])
    process = context.Process(target=be, args=(folder, environment or {}, function, arguments))
    process.start()
    return process


def be(folder, environment, function, arguments):
    """Be such a process."""
    os.chdir(folder)
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    function(*arguments)


def together(root, function, *arguments):
    """Run function(*arguments) in two processes that meet, in root/0 and root/1.

    Return the exit status and the output of each.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folders = [root / "0", root / "1"]
    processes = [start(folder, function, *arguments, environment=meeting | {"RANK": folder.name})
                 for folder in folders]
    for process in processes:
        process.join(600)
    for process in processes:
        process.kill()    # if it was waited for in vain
        process.join()
    return [(process.exitcode, (folder / "output").read_text())
            for process, folder in zip(processes, folders)]


def fail_in_one(error):
    """Raise an error in process 1, while process 0 waits for it."""
    with Processes("program") as processes:
        processes.working = True
        if processes.rank == 1:
            raise error
        processes.sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("error, status, said", [
    (UserError("a mistake"), 1, r"program: error \(process 1\): a mistake\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nDetails"), 1,
     r"program: error \(process 1\): .*20 GiB.*--batch_size_per_gpu\n"),
    (ValueError("a bug"), 1, r"program: process 1 failed:\nTraceback(.|\n)*ValueError: a bug\n"),
    (KeyboardInterrupt(), 130, ""),
])
def test_a_process_that_fails_says_so_and_no_other_waits_for_it(error, status, said, tmp_path):
    (other_status, other), (own_status, own) = together(tmp_path, fail_in_one, error)
    assert own_status == status and re.fullmatch(said, own)
    assert other_status == 1 and re.fullmatch(r"program: error \(process 0\): another .*\n", other)


def train_alone(flags, own=((), ())):
    """Train with flags, and those of this process's own, on images/ of the working directory."""
    own = own[int(os.environ["RANK"])]
    train.main([*SMALL, "--data_path", "images", "--output_dir", "run", *flags, *own])


@pytest.mark.slow
@pytest.mark.parametrize("change, own, words", [
    (lambda images: (images / "0.png").unlink(), ((), ()), ("15 images", "16 images")),
    (lambda images: (images / "0.png").rename(images / "8.png"), ((), ()), ("16 images",)),
    (lambda images: None, ((), ("--alpha", "2")), ("alpha is 2.0, not 1.0",)),
])
def test_processes_with_other_images_or_arguments_are_told(change, own, words, tmp_path):
    for rank in "01":
        images = image_folder(tmp_path / rank / "images")
    change(images / "train/class0")
    for rank, (status, output) in enumerate(together(tmp_path, train_alone, (), own)):
        (line,) = output.splitlines()
        assert status == 2 and f"(process {rank}): process 1 differs" in line
        assert all(word in line for word in words)


@pytest.mark.slow
def test_knn_while_training_goes_on_without_unreadable_images(tmp_path):
    """In one of two folders only: each process names what it can't read, once."""
    for rank in "01":
        images = image_folder(tmp_path / rank / "images")
    for name in ("train/class0/3", "val/class1/1"):    # of process 1's share
        (images / f"{name}.png").write_text("not an image")
    flags = ("--epochs", "2", "--knn_every", "1")
    (status, output), (other_status, other) = together(tmp_path, train_alone, flags)
    assert status == other_status == 0 and "can't" not in output
    assert all(other.count(f"{name}.png can't") >= 1 for name in ("class0/3", "class1/1"))
    assert len({*other.splitlines()}) == len(other.splitlines())
    assert list(log_of(tmp_path / "0/run")[1]) == [0, 2, 4]

    # The same command goes on where its folder is one for all.
    for status, output in together(tmp_path, train_alone, flags):
        assert status == 2 and "different checkpoints" in output


def accumulate(images, drop_path_rate):
    """Train a step of two micro-batches, the same in all processes; save what is compared."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    flags = ["--grad_accum_steps", 2, "--drop_path_rate", drop_path_rate, "--optimizer", "sgd",
             "--lr", 2 / processes, "--warmup_epochs", 0, "--data_path", images]
    args, data = parse_train_args([*SMALL, *map(str, flags)]), build_dataset(images, "train")
    alone = argparse.Namespace(rank=0, size=1, device=torch.device("cpu"))
    batch, synchronized = next(iter(train.build_loader(args, data, alone)))[0], []
    with Processes("program") as processes:
        train.configure(args, processes.device)
        training = train.Training(args, processes, len(data))
        training.distribute()
        training.network.register_forward_pre_hook(lambda network, _: synchronized.append(
            processes.distributed and network.require_backward_grad_sync))
        losses = training.step(0, itertools.repeat(batch)).losses
    torch.save({"losses": losses, "synchronized": synchronized,
                "student": training.student.state_dict(),
                "teacher": training.teacher.state_dict()}, "saved.pth")


@pytest.mark.slow
@pytest.mark.parametrize("drop_path_rate", [0, 0.5])
def test_accumulated_gradients_are_averaged_once_and_weights_stay_equal(
        drop_path_rate, folder, tmp_path, monkeypatch):
    """With stochastic depth each process draws its own; without it all do as one alone."""
    ended = together(tmp_path, accumulate, folder, drop_path_rate)
    assert [status for status, _ in ended] == [0, 0], ended
    a, b = (torch.load(tmp_path / rank / "saved.pth", weights_only=True) for rank in "01")
    assert a["synchronized"] == b["synchronized"] == [False, True]
    for network in ("student", "teacher"):
        assert all(torch.equal(a[network][name], value) for name, value in b[network].items())
    assert torch.equal(a["losses"], b["losses"]) == (drop_path_rate == 0)
    if drop_path_rate == 0:
        monkeypatch.chdir(tmp_path)
        accumulate(folder, 0)
        expected = torch.load("saved.pth", weights_only=True)
        close(a["losses"], expected["losses"])
        for name, value in expected["student"].items():
            close(a["student"][name], value, rtol=1e-4, atol=1e-5)    # of 16 images, or twice 8


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_ends_the_same(folder, uninterrupted, tmp_path):
    """SIGKILL with 2 workers; on with 1; against an uninterrupted run with none."""
    flags = [*SMALL, "--data_path", folder, "--output_dir", tmp_path, "--num_workers", 2,
             "--checkpoint_steps", 2]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags)], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "log.jsonl", time.monotonic() + 600
    while not (log.exists() and '"step": 7' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 6 <= torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] < 12
    run(folder, tmp_path, "--num_workers", 1)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_the_command_line_from_training_to_a_knn_number(folder, tmp_path):
    """The command that train.py ends with is run as it stands."""
    flags = ["--epochs", 1, "--warmup_epochs", 0, "--knn_every", 0, "--heads", 6]
    trained = execute(ROOT / "train.py", *SMALL, "--data_path", folder, *flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    (tmp_path / "evaluate.py").symlink_to(ROOT / "evaluate.py")
    command = shlex.split(re.search(r"python (evaluate\.py .*)", trained.stdout)[1])
    measured = execute(*command, "--num_workers", 2, "--json", "result.json", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["heads"], result["image_size"]) == (6, 32)
    for k, value in result["top1"].items():
        assert re.search(rf"^ *{k} +{value:.1f} %", measured.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_failing_program_leaves_no_worker_behind(tmp_path, uninterrupted):
    """Workers ignore signals: the program has to end them, or never ends itself."""
    folder = image_folder(tmp_path)
    (folder / "train/class0/0.png").write_text("not an image")
    weights = uninterrupted / "backbone.pth"
    done = execute(ROOT / "evaluate.py", "knn", "--pretrained_weights", weights, "--data_path",
                   folder, "--num_workers", 2, "--batch_size_per_gpu", 1)
    assert done.returncode == 1 and "0.png" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def interrupt_twice(folder):
    """Train, with two Ctrl-C in the first step."""
    train.update_teacher = lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    run(folder, "run", "--knn_every", 0)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_without_a_stack(folder, tmp_path):
    process = start(tmp_path, interrupt_twice, folder)
    process.join(600)
    assert process.exitcode == -signal.SIGINT
    assert "Traceback" not in (tmp_path / "output").read_text()
    assert not (tmp_path / "run/checkpoint.pth").exists()


@pytest.mark.parametrize("given, word", [
    ({"RANK": "0"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "RANK, MASTER_PORT"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK 2"),
])
def test_half_an_environment_of_torchrun_is_an_error(given, word, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert word in one_line(capsys, Processes, "train.py")


class Deadly(Dataset):
    """One image, whose reader the system kills."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("function, word", [
    (lambda: torch.empty(2**50), "--batch_size_per_gpu"),
    (lambda: np.ones(2**50), "--batch_size_per_gpu"),
    (lambda: next(iter(DataLoader(Deadly(), num_workers=1))), "--num_workers"),
    (lambda: check_shared_memory(10**15, 1), "--shm-size"),
])
def test_too_little_memory_is_one_line(function, word, capsys):
    def program():
        with Processes("train.py"):
            function()

    assert word in one_line(capsys, program)
    check_shared_memory(10**15, 0)    # no workers share nothing


# --- CUDA -----------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@cuda
@pytest.mark.parametrize("variant", SHARED)
def test_cuda_gives_the_losses_and_gradients_of_the_cpu(variant):
    (expected, expected_gradients, _), (terms, gradients, _) = (
        step_of(variant, device=device) for device in ("cpu", "cuda"))
    # Sums in another order; in matrix products and convolutions TF32 has 10 bits of mantissa.
    resnet = variant == "resnet50"
    close(terms.cpu(), expected, rtol=1e-2 if resnet else 1e-3)
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items() if not resnet else ():
        difference = (gradients[name].cpu() - gradient).norm()
        assert difference <= 0.02 * gradient.norm() + 1e-3 * largest, name


@cuda
@pytest.mark.parametrize("flags", ["--no-compile", "--compile", "--no-compile --precision fp16"])
def test_cuda_trains_and_resumes_bit_for_bit_when_deterministic(flags, folder, tmp_path):
    flags = [*flags.split(), "--deterministic", "--max_steps"]
    try:
        run(folder, tmp_path / "whole", *flags, 8)
        run(folder, tmp_path / "parts", *flags, 3)
        run(folder, tmp_path / "parts", *flags, 8)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


if __name__ == "__main__":
    one_of_two(*map(Path, sys.argv[1:]))
