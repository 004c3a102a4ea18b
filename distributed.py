"""One process or many, the same training: what torchrun's processes average, gather and normalise together.

Every function here is the identity, or nn's own, in a single process. The collectives are the functional ones, which
are differentiable and which torch.compile traces; they run on gloo and NCCL alike, so that tests need no GPU.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as collectives


class Processes:
    """The training processes: this one alone, or torchrun's. Exits in one line where a process finds no GPU left."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.training = False    # past the preparations, in which all processes do the same
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                sys.exit(f"train.py: error: process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; lower --nproc_per_node")
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        self.distributed = "RANK" in os.environ
        if self.distributed:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.control = dist.new_group(backend="gloo")

    def sum(self, number):
        """A number of each process, added up. Asking costs no wait for the GPU."""
        if not self.distributed:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total, group=self.control)
        return total.item()

    def close(self):
        if self.distributed:
            dist.destroy_process_group()


def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def average_over_processes(x):
    """Mean of x over all processes, differentiable; x itself when there is one process."""
    _, processes = world()
    return collectives.all_reduce(x, "sum", dist.group.WORLD) / processes if processes > 1 else x


def gather_from_processes(x):
    """The x of all processes, (B, ...) -> (processes * B, ...), by rank; without a gradient."""
    _, processes = world()
    return collectives.all_gather_tensor(x.detach().contiguous(), 0, dist.group.WORLD) if processes > 1 else x.detach()


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm of (B, C, ...) whose statistics in training are those of all processes together.

    nn.SyncBatchNorm refuses CPU tensors and breaks the graph under torch.compile. Every process holds equally many
    images, so that the mean over processes is the mean over images.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        _, processes = world()
        if processes == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = average_over_processes(x.float().mean(axes))                     # (C,)
        centred = x.float() - mean.view(shape)
        variance = average_over_processes(centred.square().mean(axes))          # (C,) centred first: features have large means
        if self.running_mean is not None:
            number = processes * x.numel() / x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (number / (number - 1)), self.momentum)
                self.num_batches_tracked += 1
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)
