"""Average, sum and normalize over torchrun's processes.

In a single process every function here is the identity, or nn's own. The collectives are the
functional ones: they are differentiable, torch.compile traces them, and they run on gloo and NCCL.

B batch of a process, C channels
"""

import os
import signal
import sys
import traceback

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as collectives

from support.errors import UserError, explain
from support.workers import end_workers


class Processes:
    """The processes of this program: this one alone, or torchrun's.

    Has rank, size (their number), device, and distributed: whether torchrun started them. As a
    context it ends in one line what is no bug: UserError, too little memory, Ctrl-C. Every process
    that fails says so, with its rank. The exit status is 2, or 1 once `working` is set.
    """

    def __init__(self, program):
        self.program, self.working = program, False
        self.rank, self.size, self.distributed = 0, 1, False
        self.device = torch.device("cpu")
        try:
            self.join()
        except UserError as error:
            self.fail(error)

    def join(self):
        """Find this process's rank and device, and meet the other processes."""
        launch = read_launch()
        if launch:
            self.rank, self.size = launch
        if torch.cuda.is_available():
            local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local_rank >= gpus:
                raise UserError(f"this machine has {gpus} GPUs; lower --nproc_per_node to {gpus}")
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if launch:
            try:    # what is agreed on the CPU waits for no GPU
                dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available()
                                        else "gloo")
            except RuntimeError as error:
                where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
                raise UserError(f"no connection to the other processes at {where}: "
                                f"{str(error).splitlines()[0]}") from error
            self.distributed = True

    def sum(self, number):
        """Add up a number of each process, without waiting for the GPU."""
        if not self.distributed:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total)
        return total.item()

    def say(self, *words):
        """Print, in the first process."""
        if self.rank == 0:
            print(*words, flush=True)

    def fail(self, message):
        """Exit with one line."""
        who = f" (process {self.rank})" if self.size > 1 else ""
        sys.stderr.write(f"{self.program}: error{who}: {message}\n")
        self.leave(1 if self.working else 2)

    def leave(self, status):
        """Exit; at once where there are other processes, whose answer it could wait for."""
        if not self.distributed:
            sys.exit(status)
        end_workers()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, stack):
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)    # a second one ends it here and now
            sys.stderr.write("\nstopped\n" if self.rank == 0 else "")
            self.leave(130)
        if line := explain(error):
            self.fail(line)
        if error and self.distributed:
            sys.stderr.write(f"{self.program}: process {self.rank} failed:\n"
                             + "".join(traceback.format_exception(error)))
            self.leave(1)
        if self.distributed:
            dist.destroy_process_group()


def read_launch():
    """Return torchrun's (rank, number of processes), None without it.

    Raises UserError where only a part of what it says is there.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if "RANK" not in given and given.get("WORLD_SIZE", "1") == "1":
        return None
    if missing := [name for name in names if name not in given]:
        raise UserError(f"the environment has {' and '.join(given)}, but not {', '.join(missing)}: "
                        "start with torchrun, or unset them for a single process")
    try:
        rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
    except ValueError:
        rank, size = 0, 0
    if not 0 <= rank < size:
        raise UserError(f"RANK {given['RANK']} and WORLD_SIZE {given['WORLD_SIZE']} of the "
                        "environment do not fit together; start with torchrun")
    return rank, size


# Machines may differ in these.
PER_MACHINE = {"num_workers", "data_path"}


def check_alike(arguments, **data_sets):
    """Raise UserError where processes have other arguments or images.

    All processes call it together. arguments: by name. data_sets: likewise, each with a length and
    an `identity`, or None.
    """
    if world()[1] == 1:
        return
    values = {name: value for name, value in arguments.items() if name not in PER_MACHINE}
    for name, images in data_sets.items():
        values[name] = images and f"{len(images)} images ({images.identity})"
    found = [None] * world()[1]
    dist.all_gather_object(found, values)
    for rank, other in enumerate(found):
        if faults := [f"{name} is {other.get(name)}, not {value}"
                      for name, value in found[0].items() if other.get(name) != value]:
            raise UserError(f"process {rank} differs from process 0: {'; '.join(faults)}; all must "
                            "have the same command and the same files")


def configure(args, device):
    """Decide --precision auto and --compile, and set PyTorch's global switches."""
    cuda = device.type == "cuda"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # read with the first product
        torch.use_deterministic_algorithms(True)
    if args.precision == "auto":
        own_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if own_bf16 else "fp16" if cuda else "fp32"
    if args.compile is None:
        args.compile = cuda
    if cuda:    # TF32 where autocast leaves float32, but --precision fp32 means what it says
        torch.set_float32_matmul_precision("highest" if args.precision == "fp32" else "high")
        torch.backends.cudnn.benchmark = not args.deterministic


def check_compiler(args, device):
    """Raise UserError where --compile is on, and lacks something on this machine."""
    if not args.compile:
        return
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except Exception as error:    # of many kinds, by what is lacking
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.compile does not work here: {reason}. Install what it needs (a C++ "
                        "compiler, mostly), or give --no-compile") from error


def world():
    """Return (rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_processes(x):
    """Add up a tensor of each process, in place and without a gradient."""
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def average_over_processes(x):
    """Average a tensor over all processes, differentiably."""
    processes = world()[1]
    return collectives.all_reduce(x, "sum", dist.group.WORLD) / processes if processes > 1 else x


def gather_from_processes(x):
    """Concatenate a tensor (B, ...) of each process, by rank, without a gradient."""
    x = x.detach().contiguous()
    return collectives.all_gather_tensor(x, 0, dist.group.WORLD) if world()[1] > 1 else x


def moments(x, dims):
    """Return mean and variance over dims, which are kept, and over all processes.

    Every process holds equally many values. Centered first: features have large means.
    """
    mean = average_over_processes(x.mean(dims, keepdim=True))
    return mean, average_over_processes((x - mean).square().mean(dims, keepdim=True))


class BatchNorm(nn.Module):
    """Normalize each channel over all tokens of all processes: (..., C), float32.

    nn.SyncBatchNorm refuses CPU tensors and breaks the graph of torch.compile. No running
    statistics: the heads that this is for are dropped after training.
    """

    def __init__(self, dim, affine=True, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x):
        tokens = x.float().flatten(0, -2)
        if world()[1] == 1:    # one fused kernel
            affine = (self.weight, self.bias)
            y = F.batch_norm(tokens, None, None, *affine, training=True, eps=self.eps)
        else:
            mean, variance = moments(tokens, 0)
            y = (tokens - mean) * (variance + self.eps).rsqrt()
            y = y if self.weight is None else y * self.weight + self.bias
        return y.view(x.shape)
