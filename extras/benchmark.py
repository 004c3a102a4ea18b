"""Measure a training step part by part, what SERE adds to it, and the loader.

    python -m extras.benchmark                                    a step of DINO + SERE, batch 64
    python -m extras.benchmark --turns 60 --recipe ibot           what SERE adds, to iBOT
    python -m extras.benchmark --loader --data_path /path/to/imagenet

Any flag of train.py is understood. Steps and loader are train.py's own; parts are the labels of its
`record_function`, read by torch.profiler. The last line printed is a JSON object.
"""

import argparse
import itertools
import json
import statistics
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import train
from data import build_dataset
from support.distributed import Processes, check_compiler, configure
from support.errors import UserError
from support.options import COUNT, SIZE, flag, parse_train_args, switch
from support.progress import progress
from support.run import device_name

PARTS = ("views", "teacher", "student", "losses", "backward", "update")


def build(args, processes, images, **changes):
    """Return train.py's Training, with some arguments changed, and a batch of views."""
    args = argparse.Namespace(**vars(args) | changes | {"freeze_last_layer": 0})
    training = train.Training(args, processes, len(images))
    return training, next(iter(train.build_loader(args, images, processes)))[0]


def seconds_of(training, batch, steps, what=None):
    """Return the mean seconds of a step; `what` is shown meanwhile."""
    cuda = training.processes.device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None    # wait for the GPU
    synchronize()
    start = time.perf_counter()
    for step in progress(range(steps), what, what and training.processes.rank == 0):
        losses = training.step(step % len(training.lr), itertools.repeat(batch)).losses
    synchronize()
    seconds = (time.perf_counter() - start) / steps
    if not losses.isfinite().all():
        raise UserError(f"the loss is {losses[0].item()}: no step to take the time of")
    return seconds


def time_parts(training, batch, steps):
    """Return {part: ms a step}: on a GPU of its kernels, with what it idles.

    Kernels of the backward pass are launched by autograd's own thread, which no label reaches: they
    are what the other labels leave.
    """
    cuda = training.processes.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        ms = 1e3 * seconds_of(training, batch, steps)
    events = profiler.key_averages()
    kind = "device_time_total" if cuda else "cpu_time_total"
    total = {event.key: getattr(event, kind) for event in events}
    parts = {name: total[name] / 1e3 / steps for name in PARTS}
    if cuda:
        kernels = sum(event.self_device_time_total for event in events) / 1e3 / steps
        parts["backward"] += kernels - sum(parts.values())
        parts["idle"] = max(0.0, ms - kernels)
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
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=2).median


def time_step(args, processes):
    """Measure a step; return what the JSON line says."""
    device, say = processes.device, processes.say
    configure(args, device)
    check_compiler(args, device)
    images = build_dataset(args.data_path, "train", args.label_depth, args.classes)
    training, batch = build(args, processes, images)
    flops, rate = count_flops(training, batch), matmul_rate(device, training.dtype)
    training.distribute()
    seconds_of(training, batch, args.warmup_steps, "compiling" if args.compile else "warming up")
    seconds = seconds_of(training, batch, args.steps, "steps")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    parts, batch_size = time_parts(training, batch, min(args.steps, 10)), training.effective_batch
    say(f"{args.recipe}: {args.arch}/{args.patch_size}, batch {batch_size}, {processes.size} "
        f"process(es) on {device_name(device)}, {args.precision}")
    for part, ms in parts.items():
        say(f"  {part:9s} {ms:9.2f} ms  {100 * ms / sum(parts.values()):5.1f} %")
    say(f"  a step    {1e3 * seconds:9.2f} ms         {batch_size / seconds:.1f} images/s")
    say(f"MFU {100 * flops / seconds / rate:.1f} %: {flops / 1e12:.3g} TFLOP a process and step, "
        f"where matrix products alone reach {rate / 1e12:.3g} TFLOP/s"
        f"{f'; peak memory {peak:.2f} GiB' if peak else ''}")
    facts = {"processes": processes.size, "threads": torch.get_num_threads(),
             "device": device_name(device), "torch": torch.__version__}
    result = {"step_ms": 1e3 * seconds, "parts_ms": parts, "images_per_s": batch_size / seconds,
              "mfu": flops / seconds / rate, "tflop": flops / 1e12, "matmul_tflops": rate / 1e12,
              "peak_memory_gib": peak}
    sere = time_sere(args, processes, images, training, batch) if args.turns else {}
    return facts | result | sere | {"arguments": vars(args)}


def time_sere(args, processes, images, training, batch):
    """Measure what SERE adds, by steps with and without it in turns."""
    if not (args.li_weight and (args.alpha or args.beta)):
        raise UserError("--turns leaves SERE out: --li_weight, and --alpha or --beta, can't be 0")
    plain, _ = build(args, processes, images, alpha=0.0, beta=0.0)
    plain.distribute()
    steps = 10 if processes.device.type == "cuda" else 1    # a GPU is waited for after each turn
    with_sere, added = [], []
    for turn in progress(range(-2, args.turns), "turns", processes.rank == 0):    # 2 warm up
        order = (training, plain) if turn % 2 else (plain, training)    # neither always first
        ms = {which: 1e3 * seconds_of(which, batch, steps) for which in order}
        if turn >= 0:
            with_sere.append(ms[training])
            added.append(ms[training] - ms[plain])
    step = statistics.median(with_sere)
    low, median, high = statistics.quantiles(added) if len(added) > 1 else added * 3
    error = 1.25 * (high - low) / 1.35 / len(added) ** 0.5    # of a median, by the quartiles
    processes.say(f"SERE adds {median:.1f} ± {error:.1f} ms to a step of {step:.1f} ms, "
                  f"{100 * median / step:.1f} ± {100 * error / step:.1f} % (median of {args.turns} "
                  "turns, standard error)")
    return {"sere_ms": median, "sere_error_ms": error, "sere_step_ms": step, "turns": args.turns}


def time_loader(args, processes, rounds=5, most=100):
    """Measure the loader's work on an image beside bare decoding."""
    images = build_dataset(args.data_path, "train", args.label_depth, args.classes)
    if not hasattr(images, "path") or processes.distributed:
        raise UserError("--loader needs image files (--data_path FOLDER), and one process")
    chosen = np.random.default_rng(0).permutation(len(images))[:most].tolist()
    loader = train.build_loader(args, images, processes)
    for index in chosen:
        images[index]    # one that can't be read is an error

    def bare(index):
        with Image.open(images.path(index)) as image:
            image.load() if image.mode == "RGB" else image.convert("RGB")

    work = {"pillow": bare, "loader": lambda index: loader.collate_fn([loader.dataset[0, index]])}
    ms = {name: [np.inf] * len(chosen) for name in work}
    torch.set_num_threads(1)    # as in a worker
    for _ in progress(range(rounds), "rounds"):
        for i, index in enumerate(chosen):
            for name, function in work.items():    # in turns: what disturbs one disturbs the other
                start = time.perf_counter()
                function(index)
                ms[name][i] = min(ms[name][i], 1e3 * (time.perf_counter() - start))
    pillow, loader = (statistics.mean(ms[name]) for name in work)
    print(f"{len(chosen)} images of {args.data_path}, ms an image, each the best of {rounds}: "
          f"decoding {pillow:.2f}, file to batch {loader:.2f}, {loader / pillow:.2f} times as long")
    return {"pillow_ms": pillow, "loader_ms": loader, "ratio": loader / pillow}


def add_flags(parser):
    g = parser.add_argument_group("benchmark")
    switch(g, "loader", False, "time the loader instead, on the image files of --data_path")
    flag(g, "steps", 30, SIZE, "steps to take the time of")
    flag(g, "warmup_steps", 5, SIZE, "steps before them")
    flag(g, "turns", 0, COUNT, "pairs of steps with SERE and without it; 0: none")


def parse_args(argv=None):
    """Parse the command line, train.py's with some flags more."""
    argv = ["--data_path", "shapes", *(sys.argv[1:] if argv is None else argv)]
    return parse_train_args(argv, "extras.benchmark", add_flags)


def main(argv=None):
    """Measure as the command line says (sys.argv if None); return what JSON has."""
    args = parse_args(argv)
    with Processes("extras.benchmark") as processes:
        result = time_loader(args, processes) if args.loader else time_step(args, processes)
    processes.say(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
