"""Measure what a training step costs, part by part, what SERE adds to it, and the loader.

    python -m extras.benchmark                                    the paper's Sec. 4.1, on noise
    python -m extras.benchmark --recipe ibot                      with any flags of train.py
    python -m extras.benchmark --loader --data_path /path/to/imagenet

Steps and loader are train.py's own. Parts are its `record_function` labels, read by torch.profiler.
Writes no file; the last line printed is a JSON object.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from data import build_dataset
from support.distributed import Processes
from support.errors import UserError, one_line_errors
from support.options import COUNT, SIZE, flag, parse_train_args
from support.run import device_name

PARTS = ("views", "teacher", "student", "losses", "backward", "update")
NOISE = "noise"    # --data_path if none is given


class Noise(Dataset):
    """Images of the size of ImageNet's, drawn when asked for."""

    labels, classes = torch.full((100_000,), -1), 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(256, size=(400, 470, 3), dtype=np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1), -1


def build(args, processes, images, **changes):
    """Return train.py's Training, with some arguments changed, and a batch of views."""
    args = argparse.Namespace(**vars(args) | changes | {"freeze_last_layer": 0})
    training = train.Training(args, processes, len(images))
    return training, next(iter(train.build_loader(args, images, processes)))[0]


def seconds_of(training, batch, steps, first=0):
    """Return the seconds a step takes, over so many steps on one batch; a GPU is waited for."""
    cuda = training.processes.device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for step in range(first, first + steps):
        losses = training.step(step, itertools.repeat(batch)).losses
    synchronize()
    seconds = (time.perf_counter() - start) / steps
    if not losses.isfinite().all():
        raise UserError(f"the loss is {losses[0].item()}: no step to take the time of")
    return seconds


def time_parts(training, batch, steps, first):
    """Return {part: ms a step}. On a GPU the time of its kernels, and what it idles.

    Kernels of the backward pass are launched by a thread of autograd's, which no label reaches:
    they are what the other labels leave.
    """
    cuda = training.processes.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        seconds = seconds_of(training, batch, steps, first)
    events = profiler.key_averages()
    kind = "device_time_total" if cuda else "cpu_time_total"
    total = {event.key: getattr(event, kind) for event in events}
    parts = {name: total[name] / 1e3 / steps for name in PARTS}
    if cuda:
        kernels = sum(event.self_device_time_total for event in events) / 1e3 / steps
        parts["backward"] = kernels - sum(parts.values()) + parts["backward"]
        parts["idle"] = max(0.0, 1e3 * seconds - kernels)
    return parts


def count_flops(training, batch):
    """Count the floating-point operations of a step, 2 a multiply-add."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training.step(0, itertools.repeat(batch))
    return counter.get_total_flops()


def matmul_rate(device, dtype):
    """Return operations per second of a large matrix product: what MFU is a share of."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    threads = torch.get_num_threads()
    timer = Timer("a @ a", globals={"a": a}, num_threads=threads)
    return 2 * n**3 / timer.blocked_autorange(min_run_time=2).median


def peak_memory(device):
    """Return GiB: of a GPU the most that was allocated, else of the process; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 2**30 if platform.system() == "Darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def time_step(args, own, processes):
    """Measure a step; return what the JSON line says."""
    device, say = processes.device, processes.say
    train.configure(args, device)
    images = Noise() if args.data_path == NOISE else build_dataset(args.data_path, "train")
    training, batch = build(args, processes, images)
    flops = count_flops(training, batch)
    rate = matmul_rate(device, training.dtype)
    training.distribute()
    seconds_of(training, batch, own.warmup_steps)
    seconds = seconds_of(training, batch, own.steps, own.warmup_steps)
    peak = peak_memory(device)
    parts = time_parts(training, batch, min(own.steps, 10), own.warmup_steps)
    result = {
        "recipe": args.recipe, "arch": args.arch, "batch": training.effective_batch,
        "views": [2, args.global_crops_size, args.local_crops_number, args.local_crops_size],
        "alpha": args.alpha, "beta": args.beta, "precision": args.precision,
        "compile": args.compile,
        "processes": processes.size, "threads": torch.get_num_threads(),
        "device": device_name(device), "torch": torch.__version__, "step_ms": 1e3 * seconds,
        "images_per_s": training.effective_batch / seconds, "parts_ms": parts,
        "peak_memory_gib": peak, "tflop": flops / 1e12, "matmul_tflops": rate / 1e12,
        "mfu": flops / seconds / rate,
    }
    say(f"{args.recipe}: {args.arch}/{args.patch_size}, batch {training.effective_batch}, views "
        f"{' '.join(map(str, result['views']))}, {processes.size} process(es) on "
        f"{result['device']}, {args.precision}{', compiled' if args.compile else ''}")
    for name, ms in parts.items():
        say(f"  {name:9s} {ms:9.2f} ms  {100 * ms / sum(parts.values()):5.1f} %")
    say(f"  a step    {1e3 * seconds:9.2f} ms         {result['images_per_s']:.1f} images/s")
    say(f"MFU {100 * result['mfu']:.1f} %: {flops / 1e12:.3g} TFLOP a process and step; matrix "
        f"products alone reach {rate / 1e12:.3g} TFLOP/s here")
    say(f"peak memory {peak:.2f} GiB" if peak else "peak memory: not known here")
    if own.turns:
        result["sere"] = time_sere(args, own, processes, images, training, batch)
    return result


def time_sere(args, own, processes, images, training, batch):
    """Measure what SERE adds, by steps with and without it in turns: two runs differ by more."""
    if not (args.alpha or args.beta) or not args.li_weight:
        raise UserError("--turns leaves SERE out of a method: --li_weight, and --alpha or --beta, "
                        "must not be 0")
    plain, _ = build(args, processes, images, alpha=0.0, beta=0.0)
    plain.distribute()
    cuda, pairs = processes.device.type == "cuda", []
    steps = 10 if cuda else 1    # a GPU is waited for after each turn
    for turn in tqdm(range(-2, own.turns), "turns", disable=None):    # the first two warm up
        order = (training, plain) if turn % 2 else (plain, training)    # neither always first
        seconds = {which: seconds_of(which, batch, steps) for which in order}
        if turn >= 0:
            pairs.append((1e3 * seconds[training], 1e3 * seconds[plain]))
    step = statistics.median(a for a, _ in pairs)
    low, added, high = statistics.quantiles([a - b for a, b in pairs])
    error = 1.25 * (high - low) / 1.35 / len(pairs) ** 0.5    # of a median, by the quartiles
    processes.say(f"SERE adds {added:.1f} ± {error:.1f} ms to a step of {step:.1f} ms: "
                  f"{100 * added / step:.1f} ± {100 * error / step:.1f} % (median of {len(pairs)} "
                  "turns with and without it, standard error)")
    return {"added_ms": added, "error_ms": error, "step_ms": step, "turns": len(pairs)}


def time_loader(args, processes, rounds=5, most=100):
    """Measure the loader's work on an image beside bare decoding."""
    if args.data_path == NOISE or processes.distributed:
        raise UserError("--loader needs image files (--data_path), and one process")
    images = build_dataset(args.data_path, "train")
    if not hasattr(images, "path"):
        raise UserError(f"--loader needs image files, and {args.data_path} has none")
    chosen = np.random.default_rng(0).permutation(len(images))[:most].tolist()
    args.batch_size_per_gpu, args.grad_accum_steps = min(args.batch_size_per_gpu, len(images)), 1
    loader = train.build_loader(args, images, processes)

    def bare(index):
        with Image.open(images.path(index)) as image:
            image.load() if image.mode == "RGB" else image.convert("RGB")

    work = {"pillow": bare, "loader": lambda index: loader.collate_fn([loader.dataset[0, index]])}
    best = {name: np.full(len(chosen), np.inf) for name in work}
    torch.set_num_threads(1)    # as in a worker
    for _ in tqdm(range(rounds), "rounds", disable=None):
        for i, index in enumerate(chosen):
            for name, function in work.items():    # in turns: what disturbs one disturbs the other
                start = time.perf_counter()
                function(index)
                best[name][i] = min(best[name][i], time.perf_counter() - start)
    ms = {name: 1e3 * times.mean() for name, times in best.items()}
    batches, number = iter(loader), 4 + 2 * args.num_workers
    for _ in range(1 + args.num_workers):
        next(batches)
    start = time.perf_counter()
    for _ in range(number):
        next(batches)
    images_per_s = number * args.batch_size_per_gpu / (time.perf_counter() - start)
    ratio = ms["loader"] / ms["pillow"]
    print(f"{len(chosen)} images of {args.data_path}, ms an image, each the best of {rounds}")
    print(f"  decoding (Pillow) {ms['pillow']:6.2f}\n  file to batch     {ms['loader']:6.2f}    "
          f"{ratio:.2f} times as long")
    print(f"{args.num_workers} loader process(es): {images_per_s:.0f} images/s")
    return ms | {"ratio": ratio, "num_workers": args.num_workers, "images_per_s": images_per_s}


def main(argv=None):
    """Measure as the command line says: a list of str, or sys.argv if None. Returns the result."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("extras.benchmark", add_help=False, allow_abbrev=False)
    parser.add_argument("--loader", action="store_true", help="time the loader, on --data_path")
    flag(parser, "steps", 30, SIZE, "steps to take the time of")
    flag(parser, "warmup_steps", 5, SIZE, "steps before them")
    flag(parser, "turns", 0, COUNT, "pairs of steps with SERE and without it; 0: none")
    own, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(f"{parser.format_help()}\nand the flags of train.py:\n")
    given = any(word.split("=")[0] == "--data_path" for word in rest)
    args = parse_train_args(rest if given else ["--data_path", NOISE, *rest], "extras.benchmark")
    with one_line_errors("extras.benchmark"):
        processes = Processes()
        try:
            result = time_loader(args, processes) if own.loader else time_step(args, own, processes)
        finally:
            processes.close()
    processes.say(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
