"""What a trained encoder is worth: weighted k-nearest neighbours and linear classification on frozen features.

    python evaluate.py knn --pretrained_weights runs/demo/backbone.pth --data_path shapes
    python evaluate.py linear --pretrained_weights runs/demo/backbone.pth --data_path shapes

The protocols are DINO's. Weights may be a backbone.pth or checkpoint.pth of train.py, or a released file of DINO, iBOT,
SERE, timm or torchvision (ResNet-50); data a folder with train/ and val/, or a name as for train.py.

N images, C feature channels, K classes
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from augment import normalize
from data import build_dataset, ignore_signals, labelled
from distributed import world
from model import ARCHITECTURES, load_encoder


class Transformed(Dataset):
    """images[i] for i in indices, through `transform`: (uint8 image, label)."""

    def __init__(self, images, transform, indices):
        self.images, self.transform, self.indices = images, transform, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        image, label = self.images[self.indices[i]]
        return self.transform(image), label


def evaluation_crop(size):
    """uint8 image -> uint8 (3, size, size): short side to size * 256 / 224, bicubic, then the centre."""
    return v2.Compose([v2.Resize(round(size * 256 / 224), InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])


@torch.no_grad()
def extract_features(encoder, images, indices, size, device, batch_size=128, num_workers=0, progress=None, stop_asked=None):
    """The class token after the final norm, and the label, of images[i] for i in indices: (N, C), (N,) on `device`.

    Each process computes its share and receives all. An unreadable image raises OSError. stop_asked: is asked between batches, by all
    processes together; once it says True, the result is None.
    """
    rank, world_size = world()
    share = Transformed(images, evaluation_crop(size), indices[rank::world_size])
    loader = DataLoader(share, batch_size, num_workers=num_workers, pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
    features = torch.zeros(len(indices), encoder.dim, device=device)
    labels = torch.zeros(len(indices), dtype=torch.long, device=device)
    start = rank
    common = len(indices) // world_size // batch_size    # batches that every process has
    for i, (x, y) in enumerate(tqdm(loader, desc=progress, disable=None if rank == 0 else True, leave=False)):
        if stop_asked and i < common and stop_asked():
            return None
        rows = slice(start, start + len(x) * world_size, world_size)
        features[rows] = encoder.norm(encoder(normalize(x.to(device).float() / 255)))[:, 0].float()
        labels[rows] = y.to(device)
        start += len(x) * world_size
    if world_size > 1:
        dist.all_reduce(features), dist.all_reduce(labels)    # the others' rows are zero
    return features, labels


SIMILARITIES = 2**26    # held at a time, 256 MiB


@torch.no_grad()
def knn_votes(train_features, train_labels, test_features, k, temperature, classes):
    """Votes of the k most similar training images, weighted with exp(similarity / temperature): (N, classes).

    train_features (M, C), train_labels (M,), test_features (N, C); L2-normalised here, so that similarity is the cosine.
    Works through the test images in chunks: memory stays bounded by SIMILARITIES at a time.
    """
    train = F.normalize(train_features.float(), dim=1)
    votes = []
    for chunk in F.normalize(test_features.float(), dim=1).split(max(1, SIMILARITIES // len(train))):
        similarity, nearest = (chunk @ train.T).topk(min(k, len(train)), dim=1)    # (n, k)
        weight = (similarity / temperature).exp()
        votes.append(weight.new_zeros(len(chunk), classes).scatter_add_(1, train_labels[nearest], weight))
    return torch.cat(votes)


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
    votes = {k: knn_votes(features, labels, test_features, k, temperature, train.classes) for k in ks}
    return {k: 100 * (v.argmax(dim=1) == test_labels).float().mean().item() for k, v in votes.items()}


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
    encoder, train, val, size, device, epochs=100, rates=LEARNING_RATES, holdout=0.1, blocks=4, mean_patch=False, batch_size=128, num_workers=0
):
    """DINO's linear evaluation: SGD with momentum, no weight decay, cosine to 0, random resized crops and flips.

    All rates are trained side by side on the same batches. The one to report is chosen on the share `holdout` of the
    training images, which are not trained on; with 0, on `val`, as iBOT does. Returns a list of (rate, accuracy on what
    was held out, accuracy on val), in %, and the index of the chosen one.
    """
    shuffled = labelled(train)[torch.randperm(len(labelled(train)))].tolist()
    number = min(max(round(holdout * len(shuffled)), 1), len(shuffled) - 1) if holdout else 0
    held, rest = shuffled[:number], shuffled[number:]
    augmentation = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    loading = dict(batch_size=batch_size, num_workers=num_workers, pin_memory=device.type == "cuda")
    loader = DataLoader(
        Transformed(train, augmentation, rest), shuffle=True, drop_last=len(rest) > batch_size, persistent_workers=num_workers > 0, **loading
    )
    crop = evaluation_crop(size)
    held_loader = DataLoader(Transformed(train, crop, held), **loading)
    val_loader = DataLoader(Transformed(val, crop, labelled(val).tolist()), **loading)

    probes = Probes((blocks + mean_patch) * encoder.dim, train.classes, rates).to(device)
    groups = [{"params": probe.parameters(), "lr": rate * batch_size / 256} for probe, rate in zip(probes.probes, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()

    @torch.no_grad()
    def features(x):
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16):
            return linear_features(encoder, normalize(x.to(device).float() / 255), blocks, mean_patch)

    @torch.no_grad()
    def accuracy(loader):
        right = sum((probes(features(x)).argmax(dim=-1) == y.to(device)).sum(dim=1) for x, y in loader)
        return (100 * right / len(loader.dataset)).tolist()

    bar = tqdm(total=epochs * len(loader), desc="linear probes", unit="step", disable=None)
    for _ in range(epochs):
        for x, y in loader:
            logits, y = probes(features(x)), y.to(device)
            # every probe has its own parameters, so the sum trains each as if alone
            loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(rates))) * len(rates)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
        schedule.step()
    bar.close()

    on_val = accuracy(val_loader)
    on_held = accuracy(held_loader) if held else on_val
    chosen = max(range(len(rates)), key=lambda i: on_held[i])
    return list(zip(rates, on_held, on_val)), chosen


# --- tasks: each prints a table, and returns what --json writes of it ---------------------------------------------------


def knn_task(args, encoder, train, val, size, device):
    accuracy = knn_accuracy(
        encoder, train, val, size, device, args.nb_knn, args.temperature, batch_size=args.batch_size_per_gpu, num_workers=args.num_workers
    )
    n = len(labelled(train))
    print(f"kNN, T = {args.temperature}, {size} px, {n} training and {len(labelled(val))} validation images of {args.data_path}")
    print("    k   top-1")
    for k, value in accuracy.items():
        print(f"{k:5d}  {value:5.1f} %" + (f"  (there are {n})" if k > n else ""))
    return {"temperature": args.temperature, "top1": accuracy}


def linear_task(args, encoder, train, val, size, device):
    large = encoder.dim >= 768 and encoder.depth > 1
    blocks = args.n_last_blocks or (1 if large else min(4, encoder.depth))
    mean_patch = large if args.avgpool_patchtokens is None else args.avgpool_patchtokens
    rows, chosen = linear_accuracy(
        encoder, train, val, size, device, args.epochs, args.lr, args.holdout, blocks, mean_patch, args.batch_size_per_gpu, args.num_workers
    )
    features = f"class token of the last {blocks} block(s){' and mean patch' if mean_patch else ''}"
    print(f"linear, {features}, {size} px, {args.epochs} epochs, batch {args.batch_size_per_gpu}, final epoch, {args.data_path}")
    print("  lr / 256   held out      val")
    for i, (rate, on_held, on_val) in enumerate(rows):
        print(f"{rate:10g}    {on_held:5.1f} %  {on_val:5.1f} %" + (f"  <- chosen on {'what was held out' if args.holdout else 'val'}" if i == chosen else ""))
    return {
        "epochs": args.epochs, "batch_size": args.batch_size_per_gpu, "blocks": blocks, "mean_patch": mean_patch, "holdout": args.holdout,
        "rates": [dict(zip(("lr", "held_out", "val"), row)) for row in rows], "lr": rows[chosen][0], "top1": rows[chosen][2],
    }


TASKS = {"knn": knn_task, "linear": linear_task}


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line, checked; ends with one line and status 2 where it makes no sense."""
    def flag(parser, name, help, default=None, **rest):
        parser.add_argument(f"--{name}", default=default, help=help + ("" if default is None else " (default: %(default)s)"), **rest)

    common = argparse.ArgumentParser(add_help=False)
    flag(common, "pretrained_weights", "backbone.pth or checkpoint.pth of train.py, or a released file of DINO, iBOT, SERE, timm or torchvision (ResNet-50)", required=True)
    flag(common, "data_path", "folder with train/ and val/, or a name as for train.py", required=True)
    flag(common, "arch", "what the weights must be; read off them if not given", choices=list(ARCHITECTURES))
    flag(common, "checkpoint_key", "network of a training checkpoint: teacher or student", "teacher")
    flag(common, "image_size", "side in pixels, after resizing the short side to 256 / 224 of it; if not given the size trained at, which a ResNet's weights don't tell: 224", type=int)
    flag(common, "batch_size_per_gpu", "images a forward pass", 128, type=int)
    flag(common, "num_workers", "loader processes", min(10, os.cpu_count() or 1), type=int)
    flag(common, "seed", "of what is random: the linear probes, their crops and which images they hold out", 0, type=int)
    flag(common, "json", "write the result there too", metavar="FILE")

    usage = "evaluate.py {} --pretrained_weights FILE --data_path PATH [--flag value ...]"
    parser = argparse.ArgumentParser(prog="evaluate.py", allow_abbrev=False, usage=usage.format("knn|linear"), description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    knn = tasks.add_parser("knn", help="weighted k-nearest neighbours", prog="evaluate.py", allow_abbrev=False, usage=usage.format("knn"), parents=[common])
    flag(knn, "nb_knn", "k", [10, 20, 100, 200], type=int, nargs="+")
    flag(knn, "temperature", "votes weigh exp(similarity / temperature)", 0.07, type=float)
    linear = tasks.add_parser("linear", help="linear classification", prog="evaluate.py", allow_abbrev=False, usage=usage.format("linear"), parents=[common])
    flag(linear, "epochs", "passes over the training images", 100, type=int)
    flag(linear, "lr", "learning rates per 256 images, trained side by side", LEARNING_RATES, type=float, nargs="+")
    flag(linear, "holdout", "share of the training images kept to choose the rate on; 0: choose on val, as iBOT does", 0.1, type=float)
    flag(linear, "n_last_blocks", "blocks whose class tokens are taken; 4, for vit_base, vit_large and resnet50 1, if not given", type=int)
    pooling = "the last block's mean patch too; for vit_base and vit_large if not given"
    flag(linear, "avgpool_patchtokens", pooling, action=argparse.BooleanOptionalAction)
    args = parser.parse_args(argv)

    for name in {"image_size", "batch_size_per_gpu", "epochs", "temperature", "n_last_blocks", "nb_knn", "lr"} & vars(args).keys():
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            parser.error(f"--{name} must be above 0")
    if args.task == "linear" and not 0 <= args.holdout < 1:
        parser.error("--holdout must lie in [0, 1)")
    return args


def main(argv=None):
    """Evaluate as the command line (a list of str; sys.argv if None) says; prints a table and returns the result as a dict."""
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    try:
        encoder = load_encoder(args.pretrained_weights, args.arch, args.checkpoint_key).to(device).requires_grad_(False)
        train, val = build_dataset(args.data_path, "train"), build_dataset(args.data_path, "val")
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    size = args.image_size or encoder.grid * encoder.patch_size
    if args.json and not Path(args.json).absolute().parent.is_dir():
        sys.exit(f"evaluate.py: error: --json {args.json}: its folder does not exist")
    if not (len(labelled(train)) and len(labelled(val))):
        sys.exit(f"evaluate.py: error: {args.data_path} lacks labels: it needs a folder a class in train/ and val/")
    if args.task == "linear" and (args.n_last_blocks or 0) > encoder.depth:
        sys.exit(f"evaluate.py: error: --n_last_blocks {args.n_last_blocks}: the encoder has {encoder.depth}")
    if size % encoder.patch_size:
        sys.exit(f"evaluate.py: error: --image_size {size} is not a multiple of the patch size {encoder.patch_size}")
    try:
        result = TASKS[args.task](args, encoder, train, val, size, device)
        result = {name: getattr(args, name) for name in ("task", "pretrained_weights", "data_path", "seed")} | {"image_size": size} | result
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        sys.exit(f"evaluate.py: error: {str(error).strip().splitlines()[-1]}")    # a loader's worker puts its stack before the message
    return result


if __name__ == "__main__":
    main()
