"""What SERE adds to a training step: steps with it and without it (--alpha 0 --beta 0), in turns in one process, always on the same batch.

    python results/relation_share.py --batch_size_per_gpu 8

With train.py's flags, of which --data_path changes nothing here: images are noise. One process, and memory for both trainings. What disturbs a shared
machine disturbs both, while two runs of benchmark.py differ by more than what is looked for; even so a CPU needs many turns, a quarter of an hour.
"""

import itertools
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import benchmark
import train
from data import on_device
from distributed import Processes

TURNS, WARMUP_TURNS = 60, 3    # of both


def main():
    flags = ["--data_path", benchmark.NOISE, *sys.argv[1:]]
    args = train.parse_args(flags, "relation_share.py")
    if not (args.alpha or args.beta) or not args.li_weight:
        sys.exit("relation_share.py: error: it leaves SERE out of a method: --li_weight, and --alpha or --beta, must not be 0")
    processes, images, trainings = Processes(), benchmark.Noise(), {}
    if processes.distributed:
        processes.close()
        sys.exit("relation_share.py: error: it is of one process: leave out torchrun")
    for name, rest in {"with SERE": [], "without": ["--alpha", "0", "--beta", "0"]}.items():
        its_args = train.parse_args(flags + rest, "relation_share.py")
        train.settle(its_args, processes.device)
        its_args.freeze_last_layer = 0    # as in benchmark.py
        trainings[name] = train.Training(its_args, processes, len(images))
        trainings[name].make_ready()
    loader = train.build_loader(args, images, trainings["with SERE"].mask, processes)
    batches = itertools.cycle([next(on_device((views for views, _ in loader), processes.device))])
    clock, ms = benchmark.Clock(processes.device), {name: [] for name in trainings}
    length = 10 if clock.cuda else 1    # steps a turn: at its end a GPU is waited for; on a CPU the shorter, the more alike what disturbs both
    benchmark.check_schedule(trainings["without"], length * (WARMUP_TURNS + TURNS))
    for turn in tqdm(range(WARMUP_TURNS + TURNS), "turns, the first to warm up", disable=None):
        for name in list(trainings)[:: (1, -1)[turn % 2]]:    # neither is always the first
            clock.milliseconds()
            for step in range(length * turn, length * (turn + 1)):
                terms = trainings[name].step(step, batches).terms
            ms[name].append(sum(clock.milliseconds().values()) / length)
            if not terms.isfinite().all():
                sys.exit(f"relation_share.py: error: the loss is {terms[0].item()}: no step to take the time of")
    print(f"{args.recipe}: {args.arch}, {args.batch_size_per_gpu} images, alpha {args.alpha:g}, beta {args.beta:g}, {train.device_name(processes.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    related, plain = (times[WARMUP_TURNS:] for times in ms.values())
    for name, times in {"with SERE": related, "without": plain, "difference": [a - b for a, b in zip(related, plain)]}.items():
        low, median, high = statistics.quantiles(times)
        error = 1.25 * (high - low) / 1.35 / TURNS**0.5    # of a median, with the quartiles' distance as 1.35 standard deviations
        print(f"{name:12s} {median:9.1f} ± {error:.1f} ms, {100 * median / statistics.median(related):5.1f} %    (median of {TURNS}, its standard error; quartiles {low:.1f} and {high:.1f})")


if __name__ == "__main__":
    with benchmark.in_one_line("relation_share.py"):
        main()
