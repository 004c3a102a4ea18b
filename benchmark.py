"""What a training step costs, part by part, and how far that is from what the machine can do.

    python benchmark.py                                            the paper's Sec. 4.1, on images of noise
    python benchmark.py --recipe ibot --alpha 0 --beta 0           with any flags of train.py; here iBOT alone
    python benchmark.py --loader --data_path /path/to/imagenet     the loader alone, beside bare decoding

The step and the loader are train.py's own, timed from outside. L_p and L_c are here with most of their backward pass (see
relations.GramCrossEntropy), h and g in the student's forward pass. SERE is measured alone too, with all memory at hand; what it adds to
a step, results/relation_share.py says. Writes no file; the last line printed is a JSON object.
"""

import argparse
import contextlib
import functools
import itertools
import json
import platform
import sys
import time
from collections import Counter
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from data import build_dataset, on_device
from distributed import Processes
from model import Network

# --- images -----------------------------------------------------------------------------------------------------------

NOISE = "noise"    # --data_path where none is given


class Noise(Dataset):
    """Images of the size of ImageNet's, drawn when asked for; all of a loader's work but for reading and decoding files."""

    labels, classes = torch.full((100_000,), -1), 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(256, size=(400, 470, 3), dtype=np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1), -1


# --- time -------------------------------------------------------------------------------------------------------------

PARTS = ("loader", "transfer", "photometric", "teacher", "student", "L_I", "L_p", "L_c", "backward", "optimizer", "EMA", "other")


class Clock:
    """Whose the time is: at any moment one part's, that of the innermost entered. On a GPU by events in its stream, for which nothing waits."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.entered, self.marks = ["other"], []

    def mark(self):
        """From now on time belongs to the part entered last."""
        now = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.marks.append((self.entered[-1], now))

    @contextlib.contextmanager
    def part(self, name):
        self.entered.append(name)
        self.mark()
        try:
            yield
        finally:
            self.entered.pop()
            self.mark()

    def timed(self, name, function):
        """The function, its calls counted as part `name`."""
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def milliseconds(self):
        """{part: milliseconds} since the last call; what is computed by then counts whole."""
        self.mark()
        if self.cuda:
            torch.cuda.synchronize()
        totals = Counter()
        for (name, start), (_, end) in itertools.pairwise(self.marks):
            totals[name] += start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
        self.marks = []
        self.mark()
        return totals


@contextlib.contextmanager
def timed_step(clock, training):
    """A time in which the clock knows the parts of training.step. L_p and L_c are computed one after the other, which compiled would be one graph."""
    kinds = {}

    def replace_call(module, wrap):    # compiled or not: what is compiled lies below nn.Module's __call__
        kind = kinds[module] = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"__call__": wrap(kind.__call__)})

    def one_by_one(call):    # without its heads a loss is 0
        def both(loss, taught, learned, boxes):
            l_p, _ = clock.timed("L_p", call)(loss, taught._replace(channel=[]), learned._replace(channel=[]), boxes)
            _, l_c = clock.timed("L_c", call)(loss, taught._replace(spatial=[]), learned._replace(spatial=[]), boxes)
            return l_p, l_c

        return both

    for name, module in {"photometric": training.photometric, "teacher": training.teacher, "student": training.student, "L_I": training.embedding_loss}.items():
        replace_call(module, functools.partial(clock.timed, name))
    replace_call(training.relation_loss, one_by_one)
    with contextlib.ExitStack() as patches:
        for owner, function, name in (
            (torch.Tensor, "backward", "backward"), (train, "clip_gradients", "optimizer"), (training.optimizer, "step", "optimizer"), (train, "update_teacher", "EMA"),
        ):
            patches.enter_context(mock.patch.object(owner, function, clock.timed(name, getattr(owner, function))))
        try:
            yield
        finally:
            for module, kind in kinds.items():
                module.__class__ = kind


def each(items, next_item):
    """items, each got by a call of next_item."""
    items = iter(items)
    while True:
        yield next_item(items)


def check_schedule(training, steps):
    """Raises OSError where a training's schedules do not last so many steps."""
    if len(training.lr) < steps:
        raise OSError(f"--epochs {training.args.epochs} are {len(training.lr)} steps, fewer than the {steps} to take the time of, the first to warm up")


@contextlib.contextmanager
def in_one_line(program):
    """What goes wrong ends the program with one line, Ctrl-C with none: nothing would be lost."""
    try:
        yield
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        sys.exit(f"{program}: error: {str(error).strip().splitlines()[-1]}")    # a loader's worker puts its stack before the message
    except KeyboardInterrupt:
        sys.exit(130)


# --- what could be ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_memory():
    """A time in which tensors have shapes and no numbers, so that nothing is computed."""
    unfilled = mock.patch.object(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)    # asks for values
    with unfilled, FakeTensorMode(allow_non_fake_inputs=True):
        yield


def build_gradients(args):
    """(student, a function that gives it the gradients of a step and returns what a step holds meanwhile), for `without_memory`."""
    args = argparse.Namespace(**vars(args) | {"init_from": None})    # there are no weights to read a file into
    B, numbers = args.batch_size_per_gpu, [(2, args.global_crops_size), (args.local_crops_number, args.local_crops_size)]
    baseline, relation_loss = train.build_baseline(args), train.build_relation_loss(args)
    student, teacher = train.build_networks(args, baseline)
    views = [torch.empty(number, B, 3, size, size) for number, size in numbers if number]
    boxes = torch.empty(2 + args.local_crops_number, B, 5)
    mask = torch.empty(2, B, baseline.mask.grid**2, dtype=torch.bool) if baseline.mask else None

    def gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision != "fp32"):
            with torch.no_grad():
                taught = teacher(views[:1], mask)
            learned = student(views, mask)
            relations = sum(relation_loss(taught, learned, boxes))
        (relations + baseline.loss(learned.embedding, taught.embedding, baseline.teacher_temp[0], boxes)).backward()
        return taught, learned

    return student, gradients


def count_flops(args):
    """Floating-point operations of one process's step, 2 a multiply-add: matrix products, convolutions and attention of the teacher
    (forward), the student and the losses (forward and backward)."""
    plain = sdpa_kernel(SDPBackend.MATH)    # not one that computes some things twice
    with without_memory(), plain, FlopCounterMode(display=False) as counter:
        _, gradients = build_gradients(args)
        gradients()
    return counter.get_total_flops() * args.grad_accum_steps


def matmul_rate(device, dtype):
    """Floating-point operations a second of a large matrix product, the best of a few: what MFU is a share of."""
    n, products = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 * products / min(seconds_of(lambda: [a @ b for _ in range(products)], device))


def copy_rate(device):
    """Bytes a second of a large copy, read and written ones."""
    a = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).fill_(1)
    b = a.clone()
    return 2 * a.numel() / min(seconds_of(lambda: b.copy_(a), device))


def roofline(dim, tokens, width, rate, bandwidth):
    """The share of `rate` that the blocks of a ViT can reach, where each operation takes its arithmetic or the values that it reads and
    writes at `bandwidth`, whichever lasts longer. tokens: of a view; width: bytes a value."""
    C = dim
    operations = [    # (multiply-adds, values) a token, forward; the backward pass has twice of both
        (0, 2 * C), (3 * C * C, 4 * C), (2 * tokens * C, 4 * C), (C * C, 2 * C), (0, 3 * C),    # norm, qkv, attention, proj, sum
        (0, 2 * C), (4 * C * C, 5 * C), (0, 8 * C), (4 * C * C, 5 * C), (0, 3 * C),             # norm, fc1, GELU, fc2, sum
    ]
    seconds = sum(max(2 * products / rate, width * values / bandwidth) for products, values in operations)
    return sum(2 * products for products, _ in operations) / rate / seconds


def seconds_of(function, device, calls=10):
    """Of each of several calls, after two that don't count."""
    seconds = []
    for _ in range(2 + calls):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


class Tokens(nn.Module):
    """Stands where an encoder does, but is given the tokens."""

    norm = nn.Identity()

    def forward(self, tokens, mask=None):
        return tokens


def relations_alone(args, training, device):
    """Seconds that SERE adds to a step: heads, L_p, L_c, and their backward pass down to the encoder's tokens."""
    encoder, B = training.student.backbone, args.batch_size_per_gpu
    grids = [(2, args.global_crops_size // encoder.patch_size), (args.local_crops_number, args.local_crops_size // encoder.patch_size)]
    tokens = [torch.randn(number, B, 1 + grid**2, encoder.dim, device=device, requires_grad=True) for number, grid in grids if number]
    low = 0.4 * torch.rand(2 + args.local_crops_number, B, 2, device=device)
    boxes = torch.cat([low, low + 0.5, torch.zeros_like(low[..., :1])], dim=-1)
    student, teacher = (Network(Tokens(), None, n.spatial, n.channel) for n in (training.student, training.teacher))
    loss = train.build_relation_loss(args)
    if args.compile:
        for module in (student, teacher, loss):
            module.compile(dynamic=False)

    def forward_and_backward():
        with torch.autocast(device.type, training.dtype, enabled=training.dtype != torch.float32):
            with torch.no_grad():
                taught = teacher(tokens[:1])
            learned = student(tokens)
            l_p, l_c = loss(taught, learned, boxes)
        (args.alpha * l_p + args.beta * l_c).backward()

    seconds = seconds_of(forward_and_backward, device)
    return args.grad_accum_steps * sum(seconds) / len(seconds)


# --- the two measurements ---------------------------------------------------------------------------------------------


def time_step(args, processes, steps, warmup_steps):
    """A table of a step's parts. Returns what the JSON line says."""
    flops, device = count_flops(args), processes.device
    args.freeze_last_layer = 0    # a step of later epochs, in which the optimizer has the head's last layer too
    say = print if processes.rank == 0 else lambda *_: None
    train.settle(args, device)
    images = Noise() if args.data_path == NOISE else build_dataset(args.data_path, "train")
    training, clock = train.Training(args, processes, len(images)), Clock(device)
    check_schedule(training, warmup_steps + steps)
    rate, bandwidth = matmul_rate(device, training.dtype), copy_rate(device)
    training.make_ready()
    loader = train.build_loader(args, images, training.mask, processes)
    views = (views for views, _ in each(loader, clock.timed("loader", next)))
    batches = each(on_device(views, device), clock.timed("transfer", next))
    with timed_step(clock, training):
        for step in tqdm(range(warmup_steps + steps), "steps, the first to warm up", disable=None if processes.rank == 0 else True):
            if step == warmup_steps:
                clock.milliseconds()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            outcome = None    # room for the next, as in train.py
            outcome = training.step(step, batches)
        spent = clock.milliseconds()
    if not outcome.terms.isfinite().all():
        raise FloatingPointError(f"the loss is {outcome.terms[0].item()}: no step to take the time of")
    outcome = None    # room for relations_alone
    parts = {name: spent[name] / steps for name in PARTS}
    step_ms = sum(parts.values())
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else peak_resident()
    tokens = 1 + (args.global_crops_size // args.patch_size) ** 2
    bound = roofline(training.student.backbone.dim, tokens, training.dtype.itemsize, rate, bandwidth) if training.student.backbone.heads else None
    relations_ms = 1e3 * relations_alone(args, training, device) if args.alpha or args.beta else 0.0
    result = {
        "recipe": args.recipe, "arch": args.arch, "batch": training.effective_batch, "views": [2, args.global_crops_size, args.local_crops_number, args.local_crops_size],
        "alpha": args.alpha, "beta": args.beta, "precision": args.precision, "compile": args.compile, "processes": processes.size, "threads": torch.get_num_threads(),
        "device": train.device_name(device), "torch": torch.__version__, "images_per_s": 1e3 * training.effective_batch / step_ms, "step_ms": step_ms, "parts_ms": parts,
        "relations_ms": relations_ms, "peak_memory_gib": peak, "tflop": flops / 1e12, "matmul_tflops": rate / 1e12, "mfu": flops / (1e-3 * step_ms * rate),
        "copy_gb_per_s": bandwidth / 1e9, "roofline_mfu": bound,
    }
    say(f"{args.recipe}: {args.arch}/{args.patch_size}, batch {training.effective_batch}, 2 x {args.global_crops_size} + {args.local_crops_number} x {args.local_crops_size} pixels")
    say(f"{processes.size} process(es) on {result['device']}, {args.precision}{', compiled' if args.compile else ''}; mean of {steps} steps")
    for name, ms in parts.items():
        say(f"  {name:12s} {ms:9.2f} ms  {100 * ms / step_ms:5.1f} %")
    say(f"  {'a step':12s} {step_ms:9.2f} ms         {result['images_per_s']:.1f} images/s")
    say(f"SERE alone, its heads and backward pass too, which are in student and backward above: {relations_ms:.2f} ms, {100 * relations_ms / step_ms:.1f} %")
    say(f"MFU {100 * result['mfu']:.1f} %: {flops / 1e12:.3g} TFLOP a process and step, {flops / step_ms / 1e9:.3g} TFLOP/s; matrix products alone reach {rate / 1e12:.3g} here")
    if bound:
        say(f"roofline: with {bandwidth / 1e9:.0f} GB/s of memory the blocks reach at most {100 * bound:.0f} %, if every operation reads and writes once")
    say(f"peak memory {peak:.2f} GiB{'' if device.type == 'cuda' else ' (the process)'}" if peak else "peak memory: not known here")
    return result if processes.rank == 0 else None


def peak_resident():
    """The most memory this process has held, in GiB; None where the system does not say."""
    try:
        import resource    # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if platform.system() == "Darwin" else 2**20)


def readable(images, index):
    """Whether an image can be decoded; training would pass over it, and its time would be another's."""
    try:
        images[index]
    except OSError as error:
        print(f"{error}; left out", file=sys.stderr)
        return False
    return True


def time_loader(args, processes, rounds=5, most=100):
    """Milliseconds an image of the loader's work in one process, and of the loader's processes together. Returns what the JSON line says."""
    if args.data_path == NOISE:
        raise OSError("--loader needs images to decode: give --data_path")
    if processes.distributed:
        raise OSError("--loader is of one process: leave out torchrun")
    images = build_dataset(args.data_path, "train")
    if not hasattr(images, "path"):
        raise OSError(f"--loader needs image files, and {args.data_path} has none")
    args.batch_size_per_gpu, args.grad_accum_steps = min(args.batch_size_per_gpu, len(images)), 1
    loader = train.build_loader(args, images, train.build_baseline(args).mask, processes)
    chosen = [index for index in np.random.default_rng(0).permutation(len(images))[:most].tolist() if readable(images, index)]
    if not chosen:
        raise OSError(f"none of {most} images of {args.data_path} can be read")

    def bare(index):
        with Image.open(images.path(index)) as image:
            image.load() if image.mode == "RGB" else image.convert("RGB")

    work = {"Pillow": bare, "decode": images.__getitem__, "all": lambda index: loader.collate_fn([loader.dataset[0, index]])}
    best, threads = {name: np.full(len(chosen), np.inf) for name in work}, torch.get_num_threads()
    torch.set_num_threads(1)    # as in a worker
    for _ in tqdm(range(rounds), "rounds", disable=None):
        for i, index in enumerate(chosen):
            for name, function in work.items():    # in turns: what disturbs one disturbs the other
                start = time.perf_counter()
                function(index)
                best[name][i] = min(best[name][i], time.perf_counter() - start)
    torch.set_num_threads(threads)
    ms = {name: 1e3 * times.mean() for name, times in best.items()}

    batches, number = iter(loader), max(4, 2 * args.num_workers)
    for _ in range(1 + args.num_workers):
        next(batches)
    start = time.perf_counter()
    for _ in range(2 * number):
        next(batches)
    images_per_s = 2 * number * args.batch_size_per_gpu / (time.perf_counter() - start)

    print(f"{len(chosen)} images of {args.data_path}, 2 x {args.global_crops_size} + {args.local_crops_number} x {args.local_crops_size} pixels; milliseconds an image, each the best of {rounds}")
    print(f"  bare decoding (Pillow)      {ms['Pillow']:6.2f}")
    print(f"  decoding to a tensor        {ms['decode']:6.2f}")
    print(f"  all, from file to batch     {ms['all']:6.2f}     {ms['all'] / ms['Pillow']:.2f} times bare decoding")
    print(f"{args.num_workers} loader process(es): {images_per_s:.0f} images/s")
    return {"pillow_ms": ms["Pillow"], "decode_ms": ms["decode"], "all_ms": ms["all"], "ratio": ms["all"] / ms["Pillow"], "num_workers": args.num_workers, "images_per_s": images_per_s}


def parse_args(argv=None):
    """(this file's arguments, train.py's), of one command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="benchmark.py", usage="benchmark.py [--loader] [--steps N] [--warmup_steps N] [--flag value ...], the flags of train.py", description=__doc__.split("\n")[0],
        add_help=False, allow_abbrev=False,
    )
    parser.add_argument("--loader", action="store_true", help="time the loader alone, on the image files of --data_path")
    parser.add_argument("--steps", type=int, default=30, help="steps to take the time of (default: %(default)s)")
    parser.add_argument("--warmup_steps", type=int, default=5, help="steps before them (default: %(default)s)")
    own, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(f"{parser.format_help()}\nFlags of train.py; --data_path is {NOISE} if not given:\n")
    args = train.parse_args(rest if any(flag.split("=")[0] == "--data_path" for flag in rest) else ["--data_path", NOISE, *rest], "benchmark.py")
    if own.steps < 1 or own.warmup_steps < 1:
        parser.error("--steps and --warmup_steps must be at least 1")
    return own, args


def main(argv=None):
    """Measure what the command line (a list of str; sys.argv if None) says; returns what the JSON line has."""
    own, args = parse_args(argv)
    processes = Processes()
    try:
        with in_one_line("benchmark.py"):
            result = time_loader(args, processes) if own.loader else time_step(args, processes, own.steps, own.warmup_steps)
    finally:
        processes.close()
    if result:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
