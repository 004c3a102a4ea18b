"""Repeat the paper's comparisons at a scale that a laptop does in an afternoon.

    python -m extras.study all --jobs 2                   the paper's tables, on `shapes`
    python -m extras.study all --table                    the tables of what was measured so far
    python -m extras.study table8 --setting S --data_path tiny-imagenet-40 --dense_path camvid-240

A list holds rows of train.py's flags, which follow those of the setting. Each is trained with every
seed and measured: kNN, linear probe, dense probe (1 x 1 convolution on frozen patches), and how far
the self-relations of two views differ (Fig. 6; M = 6, t = 1 for all). A finished row is a line of
results/study-SETTING.jsonl. The same command goes on from there.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

import evaluate
import train
from data import build_dataset
from extras import visualize
from extras.ablations import Colors
from extras.masks import build_segmentation
from support.errors import UserError
from support.options import COUNT, SIZE, Parser, flag, parse_train_args, switch
from support.run import TERMS

# A setting: flags of train.py and of each evaluation. A list: rows of name, flags of train.py, and
# the paper's mIoU on VOC and on ImageNet-S-300. The others are compared with the first row.
SETTINGS, LISTS = json.loads(Path(__file__).with_suffix(".json").read_text()).values()
PAPER = [title for title in LISTS if title not in ("tuning", "photographs")]
ENTROPIES = ("spatial_entropy", "channel_entropy")    # of the teacher's relations, at the end
MEASURES = {"kNN": "kNN", "linear": "linear", "dense": "dense mIoU", "spatial": "A_p differs",
            "channel": "A_c differs", "spatial_entropy": "A_p entropy",
            "channel_entropy": "A_c entropy", "L_I": "L_I"}
DIGITS = {"spatial": 3, "channel": 3} | dict.fromkeys((*ENTROPIES, "L_I"), 2)    # or else 1


def measure(args, flags, seed, folder):
    """Train and evaluate a row: {measure: number}. folder/study.log has what is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "study.log", "a", 1) as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        if flags.startswith("colors"):
            images = [build_dataset(args.data_path, split) for split in ("train", "val")]
            found = evaluate.knn_accuracy(Colors(int(flags[-1])), *images, 64, torch.device("cpu"))
            return {"kNN": found[20]}
        try:
            return train_and_evaluate(args, flags, seed, folder)
        except SystemExit as stopped:
            if stopped.code > 2:    # by a signal: not to take up the next row
                os._exit(stopped.code)
            raise


def train_and_evaluate(args, flags, seed, folder):
    setting, data = SETTINGS[args.setting], ["--data_path", args.data_path]
    weights, common = str(folder / "backbone.pth"), ["--seed", str(seed), "--num_workers", "0"]
    train.main([*setting["train"].split(), *flags.split(), *data, *common,
                "--output_dir", str(folder)])
    log, result = (folder / "log.jsonl").read_text().splitlines(), {}
    for line in map(json.loads, log):    # the last stays: losses are means of the last epoch
        result |= {name: line[name] for name in (*TERMS, *ENTROPIES) if name in line}
    common += ["--pretrained_weights", weights]
    for task, key, path in (("knn", "kNN", data), ("linear", "linear", data),
                            ("segment", "dense", ["--data_path", args.dense_path])):
        found = evaluate.main([task, *common, *path, *setting[task].split()])
        result[key] = found["mIoU"] if task == "segment" else found["top1"]
    result["kNN"] = result["kNN"][20]
    found = visualize.main(["invariance", *common, *data, *setting["invariance"].split(),
                            "--output", str(folder / "invariance.png")])
    return result | found[weights]


def identify(args, flags):
    """Return a digest of all that makes a row but its seed: flags as parsed, and images."""
    setting = SETTINGS[args.setting]
    if not flags.startswith("colors"):
        argv = [*setting["train"].split(), *flags.split(), "--data_path", args.data_path]
        flags = vars(parse_train_args(argv)) | dict.fromkeys(("data_path", "output_dir"))
    text = json.dumps([flags, setting, args.data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def load_results(args):
    """Return {(row, seed): record} of the lines in the file."""
    lines = args.file.read_text().splitlines() if args.file.exists() else []
    return {(r["row"], r["seed"]): r for r in map(json.loads, lines)}


def run(args):
    """Train and measure the rows that the file lacks, seed by seed."""
    done, runs = load_results(args), {}
    rows = {identify(args, flags): (f"{title}, {name}", flags)
            for title in args.lists for name, flags, *_ in LISTS[title]}
    threads, spawn = (os.cpu_count() or 1) // args.jobs, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (max(1, threads),)) as pool:
        for seed, (row, (name, flags)) in itertools.product(args.seeds, rows.items()):
            if (row, seed) not in done:
                folder = Path("runs", "study", f"{row}-{seed}")
                head = {"row": row, "seed": seed, "flags": flags, "data": args.data}
                runs[pool.submit(measure, args, flags, seed, folder)] = head, name, folder
        try:
            for number, future in enumerate(as_completed(runs), start=1):
                head, name, folder = runs[future]
                if isinstance(future.exception(), SystemExit):    # it said why
                    sys.exit(f"extras.study: error: {name} failed, see {folder}/study.log")
                record = head | {"setting": SETTINGS[args.setting]} | future.result()
                with open(args.file, "a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{number}/{len(runs)} {name}: kNN {record['kNN']:.1f} %", flush=True)
        except BaseException:
            for child in multiprocessing.active_children():    # what they train is saved
                child.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def spread(values, measure, plus=""):
    """Write a mean ± its standard deviation over seeds; one value alone; or nothing."""
    form = f".{DIGITS.get(measure, 1)}f"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{plus}{form}}{deviation}" if values else ""


def sign(values):
    """Return + or -, or 0 within two standard errors of 0; nothing for less than three seeds."""
    if len(values) < 3:
        return ""
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    return "0" if abs(mean) <= 2 * error else "+" if mean > 0 else "-"


def print_table(title, columns, rows):
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    print(f"\n### {title}\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n")


def print_tables(args):
    """Print lists in Markdown, then how rows differ from their list's first, paired by seed."""
    results, differences = load_results(args), []
    columns = [*MEASURES.values(), "paper: VOC", "paper: val"]
    for title in args.lists:
        lines, (first, _, *paper), theirs = [], LISTS[title][0], None
        for name, flags, *numbers in LISTS[title]:
            row = identify(args, flags)
            ours = {m: {seed: record[m] for (r, seed), record in results.items()
                        if r == row and record.get(m)} for m in MEASURES}    # no loss of weight 0
            cells = [spread(list(ours[m].values()), m) for m in MEASURES]
            lines.append([name, *cells, *(str(n) for n in numbers or ("", ""))])
            if theirs:
                paired = {m: [ours[m][seed] - theirs[m][seed] for seed in ours[m]
                              if seed in theirs[m]] for m in ("kNN", "linear", "dense")}
                cells = [spread(paired[m], m, "+") for m in paired]
                cells += [f"{a - b:+.1f}" for a, b in zip(numbers, paper)] or ["", ""]
                differences.append([f"{title}: {name} − {first}", *cells,
                                    " ".join(map(sign, paired.values()))])
            theirs = theirs or ours
        print_table(title, columns, lines)
    print_table("Differences", [*columns[:3], *columns[-2:], "signs"], differences)


def main(argv=None):
    """Run a study, or print its tables, as the command line says (sys.argv if None)."""
    parser = Parser("extras.study", "%(prog)s LIST ... [--flag value ...]")
    parser.add_argument("lists", nargs="+", choices=["all", *LISTS], metavar="LIST",
                        help=f"all of the paper, or some of {', '.join(LISTS)}")
    flag(parser, "setting", "shapes", None, "what is trained, and how long", choices=list(SETTINGS))
    flag(parser, "data_path", "shapes", None, "images with labels, as for train.py")
    flag(parser, "dense_path", "shapes", None, "images with masks, as for evaluate.py segment")
    flag(parser, "seeds", [0, 1, 2], COUNT, "of training and evaluation", nargs="+")
    flag(parser, "jobs", 1, SIZE, "rows at a time, which share the cores")
    switch(parser, "table", False, "print the tables of what was measured so far")
    args = parser.parse_args(argv)
    args.lists = PAPER if "all" in args.lists else args.lists
    args.data = [Path(path).resolve().name for path in (args.data_path, args.dense_path)]
    args.file = Path("results") / f"study-{args.setting}.jsonl"
    args.file.parent.mkdir(exist_ok=True)
    if args.table:
        return print_tables(args)
    try:
        build_dataset(args.data_path, "val")
        build_segmentation(args.dense_path, "val")
    except UserError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run(args)


if __name__ == "__main__":
    main()
