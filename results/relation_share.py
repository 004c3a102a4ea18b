"""What SERE adds to a training step: steps with it and without it (--alpha 0 --beta 0), in turns in one process, always on the same batch.

    python results/relation_share.py --batch_size_per_gpu 8

With train.py's flags, of which --data_path changes nothing here: images are noise. One process. What disturbs a shared machine disturbs both, while two
runs of benchmark.py differ by more than what is looked for.
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

STEPS, WARMUP_STEPS = 20, 3


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
        trainings[name] = train.Training(its_args, processes, len(images))
        trainings[name].make_ready()
    loader = train.build_loader(args, images, trainings["with SERE"].mask, processes)
    batches = itertools.cycle([next(on_device((views for views, _ in loader), processes.device))])
    clock, ms = benchmark.Clock(processes.device), {name: [] for name in trainings}
    for step in tqdm(range(WARMUP_STEPS + STEPS), "pairs of steps, the first to warm up", disable=None):
        for name, training in trainings.items():
            clock.milliseconds()
            terms = training.step(step, batches).terms
            ms[name].append(sum(clock.milliseconds().values()))
            if not terms.isfinite().all():
                sys.exit(f"relation_share.py: error: the loss is {terms[0].item()}: no step to take the time of")
    print(f"{args.recipe}: {args.arch}, {args.batch_size_per_gpu} images, {train.device_name(processes.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    related, plain = (times[WARMUP_STEPS:] for times in ms.values())
    for name, times in {"with SERE": related, "without": plain, "difference": [a - b for a, b in zip(related, plain)]}.items():
        low, median, high = statistics.quantiles(times)
        print(f"{name:12s} {median:9.1f} ms, median of {STEPS} (quartiles {low:.1f} and {high:.1f}), {100 * median / statistics.median(related):5.1f} %")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)    # nothing to keep
    except OSError as error:
        sys.exit(f"relation_share.py: error: {error}")
