"""The loop of an evaluation that trains something, and that can be resumed."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import Batches
from support.checkpoint import find_checkpoint, output_folder, save
from support.distributed import world
from support.errors import UserError
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


class TrainingBatches:
    """Endless shuffled batches of an Augmented data set.

    `start(step)` iterates from a step on. batch_size: of a process; no more than there are images.
    steps: of an epoch. What it yields does not depend on num_workers.
    """

    def __init__(self, images, batch_size, num_workers, device):
        rank, processes = world()
        self.images, self.num_workers, self.device = images, num_workers, device
        self.batch_size = max(1, min(batch_size, len(images) // processes))
        self.steps = len(images) // (self.batch_size * processes)
        if self.steps == 0:
            raise UserError(f"{len(images)} training images are too few for {processes} processes")

    def start(self, step):
        rank, processes = world()
        size, seed = self.batch_size, self.images.seed
        keys = Batches(len(self.images), size, 1, rank, processes, seed, step)
        return iter(DataLoader(
            self.images, batch_sampler=keys, num_workers=self.num_workers,
            worker_init_fn=ignore_signals, pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        ))


def resumable(args, encoder, size, indices):
    """Return the file that a task's state goes to, and what resuming must share.

    That is: the arguments, the weights, and which images are trained on. Without --output_dir each
    such combination has a folder of its own beside the weights. Raises UserError where the folder
    can't be used.
    """
    harmless = ("output_dir", "num_workers", "json", "test_size", "sliding", "val_split")
    content = hashlib.sha256(repr(indices).encode())
    for value in encoder.state_dict().values():
        content.update(value.cpu().numpy().tobytes())
    arguments = {name: value for name, value in vars(args).items() if name not in harmless}
    arguments |= {"image_size": size, "heads": encoder.heads, "processes": world()[1],
                  "weights and images": content.hexdigest()[:16]}
    weights = Path(args.pretrained_weights).absolute()
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(args.output_dir or weights.parent / f"{weights.stem}-{args.task}-{digest}")
    with output_folder(folder, world()[0] == 0):    # what can't be is refused before any work
        find_checkpoint(folder / "checkpoint.pth", arguments, REMEDY)
    return folder / "checkpoint.pth", arguments


def fit(step, parts, batches, epochs, path, arguments):
    """Call step(number, batch), which returns a loss, for some epochs.

    batches: TrainingBatches. parts: {name: what has a state}, written to `path` after every epoch,
    from which a run with equal `arguments` resumes. Raises UserError for a loss or weights that are
    not finite.
    """
    is_main = world()[0] == 0
    with output_folder(path.parent, is_main):
        first = resume(parts, epochs, path, arguments)
        bar = tqdm(total=epochs * batches.steps, initial=first * batches.steps, unit="step",
                   disable=None if is_main else True, dynamic_ncols=True)
        iterator = batches.start(first * batches.steps)
        for epoch in range(first, epochs):
            for number in range(epoch * batches.steps, (epoch + 1) * batches.steps):
                loss = step(number, next(iterator))
                bar.update()
            loss = loss.item()
            if not (math.isfinite(loss) and finite(parts)):
                weights = "" if finite(parts) else ", and there are weights that are not finite"
                raise UserError(f"the loss is {loss} in epoch {epoch + 1}{weights}; try a lower "
                                f"--lr. {path} is of the epoch before, if there is one")
            if is_main:
                state = {name: part.state_dict() for name, part in parts.items()}
                save(state | {"epoch": epoch + 1, "arguments": arguments}, path)
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}")
            if bar.disable and is_main:    # no terminal
                print(f"epoch {epoch + 1}/{epochs}: loss {loss:.3f}", flush=True)
        bar.close()


def finite(parts):
    """Return whether all weights of the networks among parts are finite."""
    return all(value.isfinite().all() for part in parts.values() if isinstance(part, nn.Module)
               for value in part.state_dict().values())


def resume(parts, epochs, path, arguments):
    """Load the state of parts from `path`, if it is there; return how many epochs are done."""
    checkpoint = find_checkpoint(path, arguments, REMEDY)
    if not checkpoint:
        return 0
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    done = checkpoint["epoch"]
    if world()[0] == 0:
        print(f"{path}: resuming after epoch {done} of {epochs}" if done < epochs
              else f"{path}: trained before; measured again", flush=True)
    return done
