"""The loop of an evaluation that trains something, and that can be resumed."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from data import Batches
from support.checkpoint import find_checkpoint, output_folder, restore, save
from support.distributed import check_alike, world
from support.errors import UserError
from support.inputs import autocast
from support.workers import ignore_signals

REMEDY = "use another --output_dir"


def seed_everything(*key):
    """Seed torch's generator by a tuple of non-negative integers."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class Augmented(Dataset):
    """Key (epoch, i) -> transform(*images[indices[i]]), random by (seed, epoch, i)."""

    def __init__(self, images, indices, transform, seed):
        self.images, self.indices, self.transform, self.seed = images, indices, transform, seed

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, i = key
        with torch.random.fork_rng(devices=[]):
            seed_everything(self.seed, epoch, i)
            return self.transform(*self.images[self.indices[i]])


class WholeEpochs(Sampler):
    """Like data.Batches, but the last batch of an epoch holds what is left.

    Where the processes do not divide the images, an epoch's first ones come once more.
    """

    def __init__(self, images, batch_size, rank, processes, seed, start=0):
        self.images, self.batch_size, self.seed, self.start = images, batch_size, seed, start
        self.rank, self.processes = rank, processes
        self.steps = math.ceil(images / (batch_size * processes))    # of an epoch

    def __iter__(self):
        epoch, skip = divmod(self.start, self.steps)
        share = math.ceil(self.images / self.processes)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
            order = np.resize(order, share * self.processes)    # repeats its beginning
            mine = order.reshape(share, self.processes)[:, self.rank].tolist()
            for first in range(skip * self.batch_size, share, self.batch_size):
                yield [(epoch, index) for index in mine[first : first + self.batch_size]]
            epoch, skip = epoch + 1, 0


class TrainingBatches:
    """Endless shuffled batches of an Augmented data set.

    `start(step)` iterates from a step on. batch_size: of a process; no more than there are images.
    keep_last: an epoch ends with a smaller batch of what is left, instead of leaving it out.
    collate: list of examples -> batch; if None tensors are stacked. steps: of an epoch. What it
    yields does not depend on num_workers.
    """

    def __init__(self, images, batch_size, num_workers, device, keep_last=False, collate=None):
        rank, processes = world()
        self.images, self.num_workers, self.device = images, num_workers, device
        self.collate = collate
        self.batch_size = max(1, min(batch_size, len(images) // processes))
        self.keep_last = keep_last
        per_step = self.batch_size * processes
        self.steps = math.ceil(len(images) / per_step) if keep_last else len(images) // per_step
        if len(images) < processes:
            raise UserError(f"{len(images)} training images are too few for {processes} processes")

    def start(self, step):
        rank, processes = world()
        number, size, seed = len(self.images), self.batch_size, self.images.seed
        keys = (WholeEpochs(number, size, rank, processes, seed, step) if self.keep_last
                else Batches(number, size, 1, rank, processes, seed, step))
        return iter(DataLoader(
            self.images, batch_sampler=keys, num_workers=self.num_workers,
            worker_init_fn=ignore_signals, pin_memory=self.device.type == "cuda",
            generator=torch.Generator(), collate_fn=self.collate,
        ))


def resumable(args, encoder, size, images):
    """Return the file that a task's state goes to, and what resuming must share.

    That is: the arguments, the weights, and which images are trained on, wherever the files lie.
    images: tells those apart by its repr. Without --output_dir each such combination has a folder
    of its own beside the weights. Raises UserError where the folder can't be used.
    """
    harmless = ("output_dir", "num_workers", "json", "test_size", "sliding", "val_split",
                "pictures", "predictions", "checkpoint_steps", "data_path", "pretrained_weights")
    content = hashlib.sha256(repr(images).encode())
    for value in encoder.state_dict().values():
        content.update(value.cpu().numpy().tobytes())
    arguments = {name: value for name, value in vars(args).items() if name not in harmless}
    arguments |= {"image_size": size, "heads": encoder.heads, "processes": world()[1],
                  "weights and images": content.hexdigest()[:16]}
    check_alike(arguments)
    weights = Path(args.pretrained_weights).absolute()
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(args.output_dir or weights.parent / f"{weights.stem}-{args.task}-{digest}")
    with output_folder(folder, world()[0] == 0):    # what can't be is refused before any work
        find_checkpoint(folder / "checkpoint.pth", arguments, REMEDY)
    return folder / "checkpoint.pth", arguments


def fit(step, parts, batches, epochs, path, arguments):
    """Call step(number, batch) -> loss for some epochs, saving after each.

    As fit_steps.
    """
    fit_steps(step, parts, batches, epochs * batches.steps, batches.steps, path, arguments,
              unit=("epoch", batches.steps))


def fit_steps(step, parts, batches, steps, save_every, path, arguments, unit=("step", 1)):
    """Call step(number, batch), which returns a loss, for some steps.

    batches: TrainingBatches. parts: {name: what has a state}, written to `path` after every
    save_every steps, from which a run with equal `arguments` resumes. unit: what progress is
    counted in, and how many steps it has. Raises UserError for a loss or weights that are not
    finite, before they are saved.
    """
    is_main, (name, size) = world()[0] == 0, unit
    with output_folder(path.parent, is_main):
        first = resume(parts, steps, path, arguments, unit)
        if first == steps:
            return
        bar = tqdm(total=steps, initial=first, unit="step", disable=None if is_main else True,
                   dynamic_ncols=True)
        iterator = batches.start(first)
        for number in range(first, steps):
            loss = step(number, next(iterator))
            bar.update()
            done = number + 1
            if done % save_every and done < steps:
                continue
            loss, state = loss.item(), {name: part.state_dict() for name, part in parts.items()}
            refuse_not_finite(loss, parts, f"{name} {done // size}", path)
            if is_main:
                save(state | {"step": done, "arguments": arguments}, path)
            bar.set_postfix({name: done // size, "loss": f"{loss:.3f}"})
            if bar.disable and is_main:    # no terminal
                print(f"{name} {done // size}/{steps // size}: loss {loss:.3f}", flush=True)
        bar.close()


def refuse_not_finite(loss, parts, when, path):
    """Raise UserError if a loss, or a weight of the parts, is nan or infinite."""
    remedy = "try a lower --lr" + (f". {path} is of before that" if path.exists() else "")
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} in {when}; {remedy}")
    for part in parts.values():
        if isinstance(part, nn.Module):
            faults = [name for name, x in part.state_dict().items() if not x.isfinite().all()]
            if faults:    # a finite loss can have gradients that are not
                raise UserError(f"{len(faults)} weights are not finite after {when}, {faults[0]} "
                                f"among them; {remedy}")


def resume(parts, steps, path, arguments, unit):
    """Load the state of parts from `path`, if it is there.

    Returns how many steps are done.
    """
    checkpoint = find_checkpoint(path, arguments, REMEDY)
    if not checkpoint:
        return 0
    done, (name, size) = restore(parts, checkpoint, path, "step", steps), unit
    if world()[0] == 0:
        print(f"{path}: resuming after {name} {done // size} of {steps // size}" if done < steps
              else f"{path}: trained before; measured again", flush=True)
    return done


def fit_adamw(model, loss, batches, groups, rates, seed, path, arguments, save_every=None):
    """Train a model by AdamW, a step for each learning rate in `rates`.

    loss: (model, images float (B, 3, S, S) in [0, 1], targets) -> scalar. groups: of
    support.optim.layer_groups, each with its share of the rate. save_every: steps between saves,
    counted as such; None: save and count epochs. What is random in a step depends on the seed, the
    step and the process alone.
    """
    optimizer = torch.optim.AdamW(groups, lr=max(rates))
    network = DistributedDataParallel(model) if world()[1] > 1 else model
    model.train()

    def step(number, batch):
        images, targets = (x.to(batches.device, non_blocking=True) for x in batch)
        seed_everything(seed, number, world()[0])    # mixing, dropout, stochastic depth
        for group in optimizer.param_groups:
            group["lr"] = rates[number] * group["scale"]
        with autocast(batches.device):
            value = loss(network, images.float() / 255, targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    parts = {"model": model, "optimizer": optimizer}
    if save_every:
        fit_steps(step, parts, batches, len(rates), save_every, path, arguments)
    else:
        fit(step, parts, batches, len(rates) // batches.steps, path, arguments)
    model.eval()
