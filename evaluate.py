"""What a trained encoder is worth: k-nearest neighbours, linear classification, fine-tuning, segmentation.

    python evaluate.py knn --pretrained_weights runs/demo/backbone.pth --data_path shapes
    python evaluate.py linear --pretrained_weights runs/demo/backbone.pth --data_path shapes
    python evaluate.py finetune --pretrained_weights runs/dino/backbone.pth --data_path /path/to/imagenet
    python evaluate.py segment --pretrained_weights runs/demo/backbone.pth --data_path shapes --frozen
    python evaluate.py export --pretrained_weights runs/dino/checkpoint.pth --output vit_small.pth

With torchrun before it each uses all GPUs. kNN and linear probe are DINO's protocols, fine-tuning is MAE's (finetune.py), segmentation
ImageNet-S's (segment.py). Weights may be a backbone.pth or checkpoint.pth of train.py, or a released file (weights.py).

N images, C feature channels, K classes
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

from augment import normalize
from checkpoint import find_checkpoint, save
from data import IGNORED, Transformed, build_dataset, build_segmentation, count_classes, evaluation_crop, labelled
from distributed import Processes, world
from finetune import Classifier, augmentation, autocast, classification_loss, fit, loader_of, say_progress, say_resumed, sum_over_processes, top_accuracies, training_share
from model import ARCHITECTURES
from segment import Crops, Segmenter, evaluate_segmentation, segmentation_loss
from weights import load_encoder


@torch.no_grad()
def extract_features(encoder, images, indices, size, device, batch_size=128, num_workers=0, progress=None, stop_asked=None):
    """The class token after the final norm, and the label, of images[i] for i in indices: (N, C), (N,) on `device`.

    Each process computes its share and receives all. An unreadable image raises OSError. stop_asked: is asked between batches, by all
    processes together; once it says True, the result is None.
    """
    rank, world_size = world()
    loader = loader_of(Transformed(images, evaluation_crop(size), indices), batch_size, num_workers, device)
    features = torch.zeros(len(indices), encoder.dim, device=device)
    labels = torch.zeros(len(indices), dtype=torch.long, device=device)
    start = rank
    common = len(indices) // world_size // batch_size    # batches that every process has
    for i, (x, y) in enumerate(tqdm(loader, desc=progress, disable=None if rank == 0 else True, leave=False)):
        if stop_asked and i < common and stop_asked():
            return None
        rows = slice(start, start + len(x) * world_size, world_size)
        with autocast(device):
            features[rows] = encoder.norm(encoder(normalize(x.to(device).float() / 255)))[:, 0].float()
        labels[rows] = y.to(device)
        start += len(x) * world_size
    return sum_over_processes(features), sum_over_processes(labels)    # the others' rows are zero


SIMILARITIES = 2**26    # held at a time, 256 MiB


@torch.no_grad()
def nearest_neighbours(train_features, test_features, k):
    """Cosine similarity and index of the k most similar training images, the most similar first: (N, k), (N, k); of all where there are fewer.

    train_features (M, C), test_features (N, C), L2-normalised here. Works through the test images in chunks: memory stays bounded by
    SIMILARITIES at a time.
    """
    train = F.normalize(train_features.float(), dim=1)
    chunks = F.normalize(test_features.float(), dim=1).split(max(1, SIMILARITIES // len(train)))
    found = [(chunk @ train.T).topk(min(k, len(train)), dim=1) for chunk in chunks]
    return torch.cat([similarity for similarity, _ in found]), torch.cat([index for _, index in found])


def votes_of(similarity, labels, temperature, classes):
    """Votes of neighbours with these similarities and labels, (N, k) both: (N, classes)."""
    weight = (similarity / temperature).exp()
    return weight.new_zeros(len(weight), classes).scatter_add_(1, labels, weight)


def knn_votes(train_features, train_labels, test_features, k, temperature, classes):
    """Votes of the k most similar training images, weighted with exp(similarity / temperature): (N, classes).

    train_features (M, C), train_labels (M,), test_features (N, C); L2-normalised here, so that similarity is the cosine.
    """
    similarity, index = nearest_neighbours(train_features, test_features, k)
    return votes_of(similarity, train_labels[index], temperature, classes)


def knn_accuracy(encoder, train, val, size, device, ks=(20,), temperature=0.07, most=None, **extraction):
    """{k: top-1 accuracy in % on the labelled images of `val`}, by those of `train`, evenly thinned out to at most `most`.

    extraction: see extract_features; None where it was stopped.
    """
    chosen, test = labelled(train), labelled(val)
    if most and len(chosen) > most:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, most).long()]
    extracted = []
    for images, indices, name in ((train, chosen, "train"), (val, test, "val")):
        extracted.append(extract_features(encoder, images, indices.tolist(), size, device, progress=f"features of {name}", **extraction))
        if extracted[-1] is None:
            return None
    (features, labels), (test_features, test_labels) = extracted
    similarity, index = nearest_neighbours(features, test_features, max(ks))    # once for all k
    accuracy = {}
    for k in ks:
        votes = votes_of(similarity[:, :k], labels[index[:, :k]], temperature, train.classes)
        accuracy[k] = 100 * (votes.argmax(dim=1) == test_labels).float().mean().item()
    return accuracy


# --- linear classification --------------------------------------------------------------------------------------------

LEARNING_RATES = [m * 10.0**e for e in (-4, -3, -2, -1) for m in (1, 2, 5)] + [1.0]    # per 256 images


def linear_features(encoder, images, blocks, mean_patch):
    """Class tokens of the last `blocks` blocks, `norm` applied, side by side; mean_patch adds the last block's mean patch.

    images (B, 3, H, W), normalised -> (B, blocks * C), or (B, (blocks + 1) * C).
    """
    layers = encoder.get_intermediate_layers(images, blocks)
    parts = [layer[:, 0] for layer in layers] + ([layers[-1][:, 1:].mean(dim=1)] if mean_patch else [])
    return torch.cat(parts, dim=-1).float()


class Probes(nn.Module):
    """Linear classifiers of the same features, one for each learning rate: (B, dim) -> (rates, B, classes)."""

    def __init__(self, dim, classes, rates):
        super().__init__()
        self.probes = nn.ModuleList([nn.Linear(dim, classes) for _ in rates])
        for probe in self.probes:
            nn.init.normal_(probe.weight, std=0.01)
            nn.init.zeros_(probe.bias)

    def forward(self, features):
        return torch.stack([probe(features) for probe in self.probes])


def linear_accuracy(
    encoder, train, val, size, device, epochs=100, rates=LEARNING_RATES, holdout=0.1, blocks=4, mean_patch=False, batch_size=128, num_workers=0, seed=0,
    path=None, arguments=None,
):
    """DINO's linear evaluation: SGD with momentum, no weight decay, cosine to 0, random resized crops and flips.

    All rates are trained side by side on the same batches. The one to report is chosen on the share `holdout` of the
    training images, which are not trained on; with 0, on `val`, as iBOT does. Returns a list of (rate, accuracy on what
    was held out, accuracy on val), in %, and the index of the chosen one. path: a file, written after every epoch, from which a run with
    equal `arguments` goes on; None: no file.
    """
    torch.manual_seed(seed)
    rank, processes = world()
    shuffled = labelled(train)[torch.randperm(len(labelled(train)))].tolist()
    number = min(max(round(holdout * len(shuffled)), 1), len(shuffled) - 1) if holdout else 0
    held, rest = shuffled[:number], shuffled[number:]
    crop = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    loader = loader_of(Transformed(train, crop, rest), batch_size, num_workers, device, shuffle=True)
    held_loader, val_loader = (
        loader_of(Transformed(images, evaluation_crop(size), indices), batch_size, num_workers, device)
        for images, indices in ((train, held), (val, labelled(val).tolist()))
    )

    probes = Probes((blocks + mean_patch) * encoder.dim, train.classes, rates).to(device)
    groups = [{"params": probe.parameters(), "lr": rate * batch_size * processes / 256} for probe, rate in zip(probes.probes, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    first = 0
    if checkpoint := path and find_checkpoint(path, arguments, "Use another --output_dir"):
        for name, part in (("probes", probes), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(checkpoint[name])
        first = checkpoint["epoch"]
        say_resumed(path, first, epochs)
    network = DistributedDataParallel(probes) if processes > 1 else probes

    @torch.no_grad()
    def features(x):
        with autocast(device):
            return linear_features(encoder, normalize(x.to(device).float() / 255), blocks, mean_patch)

    @torch.no_grad()
    def accuracy(loader, number):
        right = sum(((probes(features(x)).argmax(dim=-1) == y.to(device)).sum(dim=1) for x, y in loader), torch.zeros(len(rates), dtype=torch.long, device=device))
        return (100 * sum_over_processes(right) / number).tolist()

    bar = tqdm(total=epochs * len(loader), initial=first * len(loader), desc="linear probes", unit="step", disable=None if rank == 0 else True)
    for epoch in range(first, epochs):
        torch.manual_seed(seed * 1_000_003 + epoch * processes + rank)    # crops
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            logits, y = network(features(x)), y.to(device)
            # every probe has its own parameters, so the sum trains each as if alone
            loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(rates))) * len(rates)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
        schedule.step()
        if path and rank == 0:
            save({"probes": probes.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "epoch": epoch + 1, "arguments": arguments}, path)
        say_progress(bar, epoch + 1, epochs, loss.item() / len(rates))
    bar.close()

    on_val = accuracy(val_loader, len(labelled(val)))
    on_held = accuracy(held_loader, len(held)) if held else on_val
    chosen = max(range(len(rates)), key=lambda i: on_held[i])
    return list(zip(rates, on_held, on_val)), chosen


# --- tasks: each prints its protocol with the number, and returns what --json writes of it ------------------------------


def classified(args):
    """The training and validation images of a classification task."""
    train, val = build_dataset(args.data_path, "train"), build_dataset(args.data_path, "val")
    if not (len(labelled(train)) and len(labelled(val))):
        raise ValueError(f"{args.data_path} lacks labels: it needs a folder a class in train/ and val/")
    return train, val


def knn_task(args, encoder, size, device, say):
    train, val = classified(args)
    accuracy = knn_accuracy(
        encoder, train, val, size, device, args.nb_knn, args.temperature, batch_size=args.batch_size_per_gpu, num_workers=args.num_workers
    )
    n = len(labelled(train))
    say(f"kNN, T = {args.temperature}, {size} px, {n} training and {len(labelled(val))} validation images of {args.data_path}")
    say("    k   top-1")
    for k, value in accuracy.items():
        say(f"{k:5d}  {value:5.1f} %" + (f"  (there are {n})" if k > n else ""))
    return {"images": n, "top1": accuracy}


def linear_task(args, encoder, size, device, say):
    train, val = classified(args)
    if (args.n_last_blocks or 0) > encoder.depth:
        raise ValueError(f"--n_last_blocks {args.n_last_blocks}: the encoder has {encoder.depth}")
    large = encoder.dim >= 768 and encoder.depth > 1
    blocks = args.n_last_blocks or (1 if large else min(4, encoder.depth))
    mean_patch = large if args.avgpool_patchtokens is None else args.avgpool_patchtokens
    rows, chosen = linear_accuracy(
        encoder.requires_grad_(False), train, val, size, device, args.epochs, args.lr, args.holdout, blocks, mean_patch, args.batch_size_per_gpu,
        args.num_workers, args.seed, *resumable(args, encoder, size, labelled(train).tolist()),
    )
    features = f"class token of the last {blocks} block(s){' and mean patch' if mean_patch else ''}"
    say(f"linear, {features}, {size} px, {args.epochs} epochs, batch {args.batch_size_per_gpu * world()[1]}, final epoch, {args.data_path}")
    say("  lr / 256   held out      val")
    for i, (rate, on_held, on_val) in enumerate(rows):
        say(f"{rate:10g}    {on_held:5.1f} %  {on_val:5.1f} %" + (f"  <- chosen on {'what was held out' if args.holdout else 'val'}" if i == chosen else ""))
    return {
        "n_last_blocks": blocks, "avgpool_patchtokens": mean_patch,
        "rates": [dict(zip(("lr", "held_out", "val"), row)) for row in rows], "lr": rows[chosen][0], "top1": rows[chosen][2],
    }


def finetune_task(args, encoder, size, device, say):
    train, val = classified(args)
    names = [line.strip() for line in Path(args.train_list).read_text().splitlines() if line.strip()] if args.train_list else None
    share = training_share(train, args.train_fraction, names, args.seed)
    model = Classifier(encoder, train.classes, bool(args.avgpool_patchtokens)).to(device)
    loader = loader_of(Transformed(train, augmentation(size), share), args.batch_size_per_gpu, args.num_workers, device, shuffle=True)
    fit(model, classification_loss(train.classes, args.smoothing, args.mixup, args.cutmix), loader, args, device, *resumable(args, encoder, size, share))
    top1, top5 = top_accuracies(model, val, size, device, args.batch_size_per_gpu, args.num_workers)
    say(f"finetune, {size} px, {len(share)} of {len(labelled(train))} training images of {args.data_path}, {args.epochs} epochs, batch "
        f"{args.batch_size_per_gpu * world()[1]}, lr {args.lr:g} per 256, layer decay {args.layer_decay}, final epoch")
    say(f"top-1 {top1:.1f} %" + (f"  top-5 {top5:.1f} %" if train.classes > 5 else "") + f"  on {len(labelled(val))} validation images")
    return {"images": len(share), "classes": train.classes, "top1": top1, "top5": top5}


def segment_task(args, encoder, size, device, say):
    train, val = (build_segmentation(args.data_path, split, args.ignore_index) for split in ("train", args.val_split))
    classes = train.classes = val.classes = args.classes or count_classes(train)
    args.lr = args.lr or (0.01 if args.frozen else 5e-4)
    model = Segmenter(encoder, classes, args.frozen).to(device)
    loader = loader_of(Crops(train, size, tuple(args.scale)), args.batch_size_per_gpu, args.num_workers, device, shuffle=True)
    patch = encoder.patch_size
    test_size = max(1, round((args.test_size or size * 256 / 224) / patch)) * patch
    if args.sliding and test_size < size:
        raise ValueError(f"--sliding: windows of {size} do not fit into --test_size {test_size}")
    fit(model, segmentation_loss, loader, args, device, *resumable(args, encoder, size, list(range(len(train)))))
    result = evaluate_segmentation(model, val, test_size, size if args.sliding else None, device)
    say(f"segment, {'frozen' if args.frozen else f'fine-tuned, layer decay {args.layer_decay}'}, {len(train)} training images of {args.data_path} at {size} px, "
        f"{args.epochs} epochs, batch {args.batch_size_per_gpu * world()[1]}, lr {args.lr:g} per 256, final epoch")
    say(f"{len(val)} images of {args.val_split}, short side {test_size}{f', windows of {size}' if args.sliding else ''}, {classes} classes")
    say("  ".join(f"{name} {value:.1f} %" for name, value in result.items()))
    return {"images": len(train), "classes": classes, "test_size": test_size} | ({"layer_decay": None} if args.frozen else {}) | result


def export_task(args, encoder, size, device, say):
    if args.image_size and encoder.depth > 1:
        encoder.resize(args.image_size)
    if world()[0] == 0:
        save(encoder.cpu().state_dict(), Path(args.output))
    names = "torchvision's resnet50 (but fc)" if encoder.depth == 1 else "timm's vit_*_patch* (num_classes=0) and DINO's"
    say(f"{args.output}: {len(encoder.state_dict())} keys, as in {names}; for both a strict load")
    if encoder.heads:
        say(f"elsewhere, build it with {encoder.heads} heads: its shapes don't tell")
    return {}


TASKS = {"knn": knn_task, "linear": linear_task, "finetune": finetune_task, "segment": segment_task, "export": export_task}


def resumable(args, encoder, size, indices):
    """(file that a task's state goes to after every epoch, what a run that goes on from it must have in common): the arguments, the
    weights and which images are trained on. If not told where, a folder of its own for each such combination, beside the weights."""
    different = ("output_dir", "num_workers", "json", "test_size", "sliding", "val_split")    # of no consequence for what is trained
    content = hashlib.sha256(repr(indices).encode())
    for value in encoder.state_dict().values():
        content.update(value.cpu().numpy().tobytes())
    arguments = {name: value for name, value in vars(args).items() if name not in different}
    arguments |= {"image_size": size, "heads": encoder.heads, "weights and images": content.hexdigest()[:16], "processes": world()[1]}
    weights = Path(args.pretrained_weights).absolute()
    default = f"{weights.stem}-{args.task}-{hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]}"
    folder = Path(args.output_dir or weights.parent / default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "checkpoint.pth", arguments


# --- command line -----------------------------------------------------------------------------------------------------


USAGE = "evaluate.py {} --pretrained_weights FILE {} [--flag value ...]; evaluate.py TASK --help lists the flags"


def parse_args(argv=None):
    """The command line, checked; ends with one line and status 2 where it makes no sense."""
    def flag(parser, name, help, default=None, **rest):
        parser.add_argument(f"--{name}", default=default, help=help + ("" if default in (None, False) else " (default: %(default)s)"), **rest)

    weights = argparse.ArgumentParser(add_help=False)
    flag(weights, "pretrained_weights", "backbone.pth or checkpoint.pth of train.py, or a released file of DINO, iBOT, SERE, MoCo v3, MAE, timm or torchvision", required=True)
    flag(weights, "arch", "what the weights must be; read off them if not given", choices=list(ARCHITECTURES))
    flag(weights, "checkpoint_key", "network of a training checkpoint: teacher or student; if not given the one its authors evaluate", choices=["teacher", "student"])
    flag(weights, "heads", "attention heads, where the file does not tell: 12 for a ViT-S of MoCo v3 that was saved anew", type=int)
    flag(weights, "image_size", "side in pixels, after resizing the short side to 256 / 224 of it; if not given the size trained at, which a ResNet's weights don't tell: 224", type=int)
    flag(weights, "json", "write the result there too", metavar="FILE")
    data = argparse.ArgumentParser(add_help=False, parents=[weights])
    flag(data, "data_path", "folder with train/ and val/, or a name as for train.py; segment: see its help", required=True)
    flag(data, "batch_size_per_gpu", "images a process and forward pass", 128, type=int)
    flag(data, "num_workers", "loader processes", min(10, os.cpu_count() or 1), type=int)
    flag(data, "seed", "of what is random", 0, type=int)
    trained = argparse.ArgumentParser(add_help=False)
    flag(trained, "epochs", "passes over the training images", 100, type=int)
    flag(trained, "output_dir", "where checkpoint.pth is written every epoch, from which the same command goes on; if not given a folder beside the weights, of its own for each set of arguments")
    fitted = argparse.ArgumentParser(add_help=False, parents=[trained])
    flag(fitted, "warmup_epochs", "epochs of linear warm-up", 5, type=int)
    flag(fitted, "min_lr", "learning rate at the end, by cosine; not scaled", 1e-6, type=float)
    flag(fitted, "weight_decay", "none on biases and norms", 0.05, type=float)
    flag(fitted, "drop_path_rate", "stochastic depth", 0.1, type=float)
    pooling = "the last block's mean patch {}; linear: for vit_base and vit_large if not given"

    parser = argparse.ArgumentParser(prog="evaluate.py", allow_abbrev=False, usage=USAGE.format("|".join(TASKS), "--data_path PATH"), description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)

    def task(name, help, *parents):
        return tasks.add_parser(name, help=help, description=help, prog="evaluate.py", usage=USAGE.format(name, "--output FILE" if name == "export" else "--data_path PATH"), parents=parents, allow_abbrev=False)

    knn = task("knn", "weighted k-nearest neighbours", data)
    flag(knn, "nb_knn", "k", [10, 20, 100, 200], type=int, nargs="+")
    flag(knn, "temperature", "votes weigh exp(similarity / temperature)", 0.07, type=float)
    linear = task("linear", "linear classification of frozen features", data, trained)
    flag(linear, "lr", "learning rates per 256 images, trained side by side", LEARNING_RATES, type=float, nargs="+")
    flag(linear, "holdout", "share of the training images kept to choose the rate on; 0: choose on val, as iBOT does", 0.1, type=float)
    flag(linear, "n_last_blocks", "blocks whose class tokens are taken; 4, for vit_base, vit_large and resnet50 1, if not given", type=int)
    flag(linear, "avgpool_patchtokens", pooling.format("too"), action=argparse.BooleanOptionalAction)
    finetune = task("finetune", "fine-tuning for classification; with few labels: the semi-supervised table", data, fitted)
    flag(finetune, "lr", "learning rate per 256 images, of the head (1e-3 at batch 512)", 0.0005, type=float)
    flag(finetune, "layer_decay", "of the learning rate, a layer down", 0.65, type=float)
    flag(finetune, "avgpool_patchtokens", pooling.format("in place of the class token"), action=argparse.BooleanOptionalAction)
    flag(finetune, "smoothing", "of labels", 0.1, type=float)
    flag(finetune, "mixup", "alpha; 0: without", 0.8, type=float)
    flag(finetune, "cutmix", "alpha; 0: without", 1.0, type=float)
    flag(finetune, "train_fraction", "of each class's training images, drawn with the seed", 1.0, type=float)
    flag(finetune, "train_list", "file of training images, a name a line, as the published 1 %% and 10 %% lists", metavar="FILE")
    segment = task("segment", "segmentation by a 1 x 1 convolution on the patches. --data_path: shapes, voc, or a folder with train/ and val/, images/ and masks/ in each", data, fitted)
    flag(segment, "frozen", "train the convolution only: a dense probe", False, action="store_true")
    flag(segment, "lr", "learning rate per 256 images; 5e-4, frozen 0.01, if not given", type=float)
    flag(segment, "layer_decay", "of the learning rate, a layer down", 0.5, type=float)
    flag(segment, "classes", "their number; 1 + the largest in the training masks if not given", type=int)
    flag(segment, "ignore_index", "what masks call a pixel that does not count", IGNORED, type=int)
    flag(segment, "scale", "range of a training crop's share of the image", [0.25, 1.0], type=float, nargs=2)
    flag(segment, "val_split", "folder of the images to measure on", "val")
    flag(segment, "test_size", "short side of an image when it is segmented, in whole patches; 256 / 224 of the training size if not given", type=int)
    flag(segment, "sliding", "slide windows of the training size over it instead of taking it at once", False, action="store_true")
    export = task("export", "the encoder alone, as a plain state dict", weights)
    flag(export, "output", "file to write", required=True, metavar="FILE")
    args = parser.parse_args(argv)

    positive = {"image_size", "batch_size_per_gpu", "epochs", "temperature", "n_last_blocks", "nb_knn", "lr", "layer_decay", "train_fraction", "classes", "test_size", "heads", "scale"}
    for name in positive & vars(args).keys():
        value = getattr(args, name)
        if value is not None and not min(value if isinstance(value, list) else [value]) > 0:
            parser.error(f"--{name} must be above 0")
    if args.task == "linear" and not 0 <= args.holdout < 1:
        parser.error("--holdout must lie in [0, 1)")
    if args.task == "finetune" and args.train_fraction > 1:
        parser.error("--train_fraction must be at most 1")
    if getattr(args, "warmup_epochs", 0) >= getattr(args, "epochs", 1):
        parser.error(f"--warmup_epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}: give 0 to {args.epochs - 1}")
    return args


def main(argv=None):
    """Evaluate as the command line (a list of str; sys.argv if None) says; prints a table and returns the result as a dict."""
    args = parse_args(argv)
    processes = Processes()
    device = processes.device
    torch.manual_seed(args.seed if "seed" in args else 0)
    try:
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ValueError(f"--json {args.json}: its folder does not exist")
        encoder = load_encoder(args.pretrained_weights, args.arch, args.checkpoint_key, args.heads, drop_path_rate=getattr(args, "drop_path_rate", 0.0))
        encoder.to(device)
        size = args.image_size or encoder.grid * encoder.patch_size
        if size % encoder.patch_size:
            raise ValueError(f"--image_size {size} is not a multiple of the patch size {encoder.patch_size}")
        result = TASKS[args.task](args, encoder, size, device, print if processes.rank == 0 else lambda *_: None)
        result = vars(args) | {"image_size": size, "heads": encoder.heads, "processes": processes.size} | result
        if args.json and processes.rank == 0:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    except (OSError, ValueError, FloatingPointError) as error:
        who = f" (process {processes.rank})" if processes.size > 1 else ""    # an image may be unreadable for one of them
        sys.exit(f"evaluate.py: error{who}: {str(error).strip().splitlines()[-1]}")    # a loader's worker puts its stack before the message
    except torch.OutOfMemoryError as error:
        sys.exit(f"evaluate.py: error: {str(error).splitlines()[0]} Lower --batch_size_per_gpu")
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; what is trained goes on from its last whole epoch with the same command\n" if processes.rank == 0 else "")
        sys.exit(130)
    finally:
        processes.close()
    return result


if __name__ == "__main__":
    main()
