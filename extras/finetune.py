"""Fine-tuning for classification (Tables 1, 4, 5): `evaluate.py finetune`.

The recipe is MAE's and iBOT's: AdamW with layer-wise decay, warm-up, a cosine; RandAugment, random
erasing, mixup, cutmix, label smoothing, stochastic depth. `load_classifier` reads what it writes.

B images of a process's batch, C channels of the encoder, K classes
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from augment import MEAN, normalize
from data import labeled
from evaluate import build_labeled
from support.distributed import sum_over_processes, world
from support.errors import UserError
from support.fit import Augmented, TrainingBatches, fit_adamw, resumable
from support.inputs import autocast, share_loader, to_input
from support.optim import cosine_schedule, layer_groups
from support.progress import progress
from support.weights import load_encoder


class Classifier(nn.Module):
    """Images (B, 3, H, W), normalized -> logits (B, K).

    Linear in the class token after the final norm. mean_patch: in the mean patch after a new norm,
    MAE's fc_norm, which replaces the encoder's.
    """

    def __init__(self, encoder, classes, mean_patch=False):
        super().__init__()
        self.encoder, self.mean_patch = encoder, mean_patch
        if mean_patch:
            encoder.norm = nn.LayerNorm(encoder.dim, eps=1e-6)
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)    # MAE's
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        tokens = self.encoder(images)    # (B, 1 + N, C)
        pooled = tokens[:, 1:].mean(dim=1) if self.mean_patch else tokens[:, 0]
        return self.head(self.encoder.norm(pooled))


def load_classifier(path):
    """Load the Classifier in a checkpoint.pth of `evaluate.py finetune`, in eval mode.

    Class k is the k-th of the sorted class folders. `image_size` is the side it was trained at.
    """
    encoder = load_encoder(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    arguments, state = checkpoint["arguments"], checkpoint["model"]
    model = Classifier(encoder, len(state["head.bias"]), arguments["avgpool_patchtokens"])
    model.load_state_dict(state)
    model.image_size = arguments["image_size"]
    return model.eval()


def fit_encoder(model, loss, batches, args, path, arguments):
    """Train a model by AdamW with layer-wise decay.

    Prints the batch and the learning rate in effect.
    model: has an `encoder` and a `head`. loss: (model, images float (B, 3, S, S) in [0, 1],
    targets) -> scalar. args: epochs, warmup_epochs, lr (per 256 images), min_lr, layer_decay,
    weight_decay, seed.
    """
    rank, processes = world()
    batch = batches.batch_size * processes
    top_lr = args.lr * batch / 256
    final_lr = min(args.min_lr, top_lr)
    if rank == 0:
        print(f"batch {batch} ({processes} x {batches.batch_size}), {batches.steps} steps an "
              f"epoch; learning rate {top_lr:g} ({args.lr:g} per 256), to {final_lr:g} by cosine, "
              f"times {args.layer_decay:g} a layer down", flush=True)
    steps, warmup = args.epochs * batches.steps, args.warmup_epochs * batches.steps
    rates = cosine_schedule(top_lr, final_lr, steps, warmup).tolist()
    groups = layer_groups(model.encoder, model.head, args.layer_decay, args.weight_decay)
    fit_adamw(model, loss, batches, groups, rates, args.seed, path, arguments)


def augmentation(size):
    """Return the transform uint8 image -> uint8 (3, size, size) of the recipe.

    It has timm's rand-m9-mstd0.5-inc1: two operations, each with probability 0.5, at 9 of 10 of
    their range. Magnitude 27 is that: torchvision has 31 bins, from 0 to 30.
    """
    operation = v2.RandAugment(1, magnitude=27, interpolation=InterpolationMode.BILINEAR,
                               fill=[round(255 * mean) for mean in MEAN])
    return v2.Compose([
        v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([operation], p=0.5),
        v2.RandomApply([operation], p=0.5),
    ])


def classification_loss(classes, smoothing, mixup, cutmix, erasing):
    """Return the loss of erased and mixed images with smoothed labels.

    erasing: probability that a rectangle of a normalized image becomes normal noise. mixup, cutmix:
    alpha of their Beta(alpha, alpha) shares; 0 leaves either out.
    """
    erase = v2.RandomErasing(p=erasing, value="random")
    mixes = [mix(alpha=alpha, num_classes=classes)
             for mix, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    mix = v2.RandomChoice(mixes) if mixes else lambda images, labels: (images, labels)

    def loss(model, images, labels):
        images = torch.stack([erase(image) for image in normalize(images)])
        images, targets = mix(images, labels)
        return F.cross_entropy(model(images).float(), targets, label_smoothing=smoothing)

    return loss


def training_share(images, fraction, seed):
    """Draw a fraction of each class's images, one at least: their indices."""
    generator = torch.Generator().manual_seed(seed)
    order = labeled(images)[torch.randperm(len(labeled(images)), generator=generator)]
    share = []
    for label in range(images.classes):
        of_class = order[images.labels[order] == label]
        share += of_class[: max(1, round(fraction * len(of_class)))].tolist()
    return sorted(share)


def read_list(path):
    """Return the names in a file, one a line."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--train_list {path} can't be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def listed_share(images, names):
    """Return the indices of the images in a list of names, as the published ones.

    A name is `n01440764_10026.JPEG`, with a folder before it where that alone is not unique. Raises
    UserError where the list has none, one twice, one that is not there, or that could be several.
    """
    if not hasattr(images, "path"):
        raise UserError("--train_list wants a folder of images")
    where = {}
    for i in labeled(images).tolist():
        parts = Path(images.path(i)).parts
        for name in (parts[-1], "/".join(parts[-2:])):
            where.setdefault(name, []).append(i)
    found = [where.get("/".join(Path(name).parts[-2:]), where.get(name, [])) for name in names]
    if faults := [name for name, places in zip(names, found) if len(places) != 1]:
        raise UserError(f"{len(faults)} of {len(names)} files of the list are not among the "
                        f"training images, or not once, {faults[0]} the first")
    share = [places[0] for places in found]
    if not share or len(set(share)) < len(share):
        raise UserError(f"the list has {len(share)} files, {len(set(share))} different ones")
    return share


@torch.no_grad()
def top_accuracies(model, images, size, device, batch_size, num_workers):
    """Return (top-1, top-5) in % on the labeled images."""
    right = torch.zeros(2, dtype=torch.long, device=device)
    chosen = labeled(images).tolist()
    loader = share_loader(images, chosen, size, device, batch_size, num_workers)
    for x, y in progress(loader, "accuracy", world()[0] == 0):
        with autocast(device):
            logits = model(to_input(x, device))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == y.to(device)[:, None]    # (B, 5)
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
    return (100 * sum_over_processes(right) / len(chosen)).tolist()


def run(args, encoder, size, processes):
    """Fine-tune and measure, for evaluate.py."""
    train, val = build_labeled(args)
    if args.train_list:
        share = listed_share(train, read_list(args.train_list))
    else:
        share = training_share(train, args.train_fraction, args.seed)
    device = processes.device
    torch.manual_seed(args.seed)
    model = Classifier(encoder, train.classes, args.avgpool_patchtokens).to(device)
    images = Augmented(train, share, augmentation(size), args.seed)
    batches = TrainingBatches(images, args.batch_size_per_gpu, args.num_workers, device)
    loss = classification_loss(
        train.classes, args.smoothing, args.mixup, args.cutmix, args.erasing)
    path, arguments = resumable(args, encoder, size, (train.identity, share))
    processes.working = True
    fit_encoder(model, loss, batches, args, path, arguments)
    top1, top5 = top_accuracies(
        model, val, size, device, args.batch_size_per_gpu, args.num_workers)
    batch = batches.batch_size * processes.size
    processes.say(
        f"finetune, {size} px, {len(share)} of {len(labeled(train))} training images of "
        f"{args.data_path}, {args.epochs} epochs, batch {batch}, lr {args.lr:g} per 256, layer "
        f"decay {args.layer_decay}, final epoch")
    more = f"  top-5 {top5:.1f} %" if train.classes > 5 else ""
    processes.say(f"top-1 {top1:.1f} %{more}  on {len(labeled(val))} validation images")
    processes.say(f"the fine-tuned model is {path}: load it by extras.finetune.load_classifier, "
                  "its encoder by --pretrained_weights")
    return {"images": len(share), "classes": train.classes, "top1": top1, "top5": top5,
            "checkpoint": str(path)}
