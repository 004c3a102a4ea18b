"""Training with labels, from a pre-trained encoder: the loop that classification and segmentation share, and classification.

The recipe is MAE's and iBOT's: AdamW with layer-wise decay, warm-up, a cosine; RandAugment, random erasing, mixup, cutmix,
label smoothing, stochastic depth.

B images of a process's batch, C channels of the encoder, K classes
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from augment import normalize
from checkpoint import find_checkpoint, save
from data import Transformed, evaluation_crop, ignore_signals, labelled
from distributed import world
from optim import cosine_schedule, layer_groups


def autocast(device):
    """bf16 where the GPU has it, and does not emulate it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def loader_of(images, batch_size, num_workers, device, shuffle=False):
    """This process's batches. Shuffled, the same number for each and none incomplete (unless there is but one); else its share."""
    rank, processes = world()
    if shuffle:
        sampler = DistributedSampler(images, processes, rank, shuffle=True, drop_last=len(images) >= processes * batch_size)
    else:
        sampler = range(rank, len(images), processes)
    return DataLoader(
        images, batch_size, sampler=sampler, num_workers=num_workers, drop_last=shuffle and len(images) >= processes * batch_size,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
    )


def sum_over_processes(x):
    """A tensor of each process, added up."""
    if world()[1] > 1:
        torch.distributed.all_reduce(x)
    return x


def say_resumed(path, epoch, epochs):
    """What a run says that found its own checkpoint."""
    if world()[0] == 0:
        print(f"{path}: going on after epoch {epoch} of {epochs}" if epoch < epochs else f"{path}: trained before; measured again", flush=True)


def say_progress(bar, epoch, epochs, loss):
    """The loss of an epoch's last batch, in the bar, or where there is no terminal in a line."""
    bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}")
    if bar.disable and world()[0] == 0:
        print(f"epoch {epoch}/{epochs}: loss {loss:.3f}", flush=True)


def fit(model, loss, loader, args, device, path, arguments):
    """Train `model`, which has an `encoder` and a `head`, and leave its state in the file `path` after every epoch; go on from there.

    loss: (model, images float (B, 3, S, S), targets) -> scalar. args: epochs, warmup_epochs, lr (per 256 images), min_lr, layer_decay,
    weight_decay, seed. arguments: what the run must have in common with the one that `path` is of. Raises OSError.
    """
    batch = loader.batch_size * world()[1]
    top_lr = args.lr * batch / 256
    rates = cosine_schedule(top_lr, min(args.min_lr, top_lr), args.epochs * len(loader), args.warmup_epochs * len(loader)).tolist()
    optimizer = torch.optim.AdamW(layer_groups(model.encoder, model.head, args.layer_decay, args.weight_decay), lr=top_lr)
    first = 0
    if checkpoint := find_checkpoint(path, arguments, "Use another --output_dir"):
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["epoch"]
        say_resumed(path, first, args.epochs)
    network = DistributedDataParallel(model) if world()[1] > 1 else model
    bar = tqdm(total=args.epochs * len(loader), initial=first * len(loader), unit="step", disable=None if world()[0] == 0 else True, dynamic_ncols=True)
    for epoch in range(first, args.epochs):
        torch.manual_seed(args.seed * 1_000_003 + epoch * world()[1] + world()[0])    # augmentations, mixing, stochastic depth
        loader.sampler.set_epoch(epoch)
        model.train()
        for step, (images, targets) in enumerate(loader, start=epoch * len(loader)):
            for group in optimizer.param_groups:
                group["lr"] = rates[step] * group["scale"]
            images, targets = images.to(device, non_blocking=True).float() / 255, targets.to(device, non_blocking=True)
            with autocast(device):
                value = loss(network, images, targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            bar.update()
        if not value.isfinite():
            raise FloatingPointError(f"the loss is {value.item()} in epoch {epoch + 1}; try a lower --lr. {path} is of the epoch before")
        if world()[0] == 0:
            save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1, "arguments": arguments}, path)
        say_progress(bar, epoch + 1, args.epochs, value.item())
    bar.close()
    model.eval()


# --- classification ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images (B, 3, H, W), normalised -> logits (B, K), linear in the class token after the final norm, or in the mean patch."""

    def __init__(self, encoder, classes, mean_patch=False):
        super().__init__()
        self.encoder, self.mean_patch = encoder, mean_patch
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)    # MAE's: the encoder is to change the head first, not the head the encoder
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        tokens = self.encoder.norm(self.encoder(images))
        return self.head(tokens[:, 1:].mean(dim=1) if self.mean_patch else tokens[:, 0])


def augmentation(size):
    """uint8 image -> uint8 (3, size, size): random resized crop, flip, RandAugment (two operations of magnitude 9), random erasing."""
    return v2.Compose([
        v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC, antialias=True), v2.RandomHorizontalFlip(),
        v2.RandAugment(num_ops=2, magnitude=9, interpolation=InterpolationMode.BILINEAR), v2.RandomErasing(p=0.25),
    ])


def classification_loss(classes, smoothing, mixup, cutmix):
    """(model, images (B, 3, H, W) in [0, 1], labels (B,)) -> cross-entropy with smoothed labels of mixed images: by mixup or by
    cutmix, each as likely, with Beta(alpha, alpha) shares. 0 leaves either out."""
    mixes = [mix(alpha=alpha, num_classes=classes) for mix, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    mix = v2.RandomChoice(mixes) if mixes else lambda images, labels: (images, labels)

    def loss(model, images, labels):
        images, targets = mix(normalize(images), labels)
        return F.cross_entropy(model(images).float(), targets, label_smoothing=smoothing)

    return loss


def training_share(images, fraction=1.0, names=None, seed=0):
    """Indices of the labelled images to train on: all, a fraction of each class (one at least) drawn with the seed, or those in
    `names`, a list of files as in the published 1 % and 10 % lists: `n01440764_10026.JPEG`, with a folder before it where that alone is not unique.

    Raises OSError where names has none, one twice, one that is not there, or one that could be several.
    """
    indices = labelled(images)
    if names is not None:
        if not hasattr(images, "path"):
            raise OSError("a list of files wants a folder of images")
        where = {}
        for i in indices.tolist():
            parts = Path(images.path(i)).parts
            for name in (parts[-1], "/".join(parts[-2:])):
                where.setdefault(name, []).append(i)
        found = [where.get("/".join(Path(name).parts[-2:]), where.get(name, [])) for name in names]
        if faults := [name for name, places in zip(names, found) if len(places) != 1]:
            raise OSError(f"{len(faults)} of {len(names)} files of the list are not among the training images, or not once, {faults[0]} the first")
        share = [places[0] for places in found]
        if not share or len(set(share)) < len(share):
            raise OSError(f"the list has {len(share)} files, {len(set(share))} different ones")
        return share
    order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
    share = []
    for label in range(images.classes):
        of_class = order[images.labels[order] == label]
        share += of_class[: max(1, round(fraction * len(of_class)))].tolist()
    return sorted(share)


@torch.no_grad()
def top_accuracies(model, images, size, device, batch_size, num_workers):
    """(top-1, top-5) in % on the labelled images."""
    right = torch.zeros(2, dtype=torch.long, device=device)
    chosen = labelled(images).tolist()
    loader = loader_of(Transformed(images, evaluation_crop(size), chosen), batch_size, num_workers, device)
    for x, y in tqdm(loader, desc="accuracy", disable=None if world()[0] == 0 else True, leave=False):
        with autocast(device):
            logits = model(normalize(x.to(device).float() / 255))
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == y.to(device)[:, None]    # (B, 5)
        right += torch.stack([hits[:, 0].sum(), hits.sum()])
    return (100 * sum_over_processes(right) / len(chosen)).tolist()
