"""The memory of a training step, counted without a GPU: all tensors alive at once, under autocast, on tensors that hold nothing.

    python results/count_memory.py --recipe resnet50

With train.py's flags, of which --data_path, --compile and --grad_accum_steps change nothing here. A GPU needs its libraries' work space and
what is lost between blocks besides: leave a gigabyte or two.
"""

import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
import benchmark
import train


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still alive, and the most they ever were."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.change(storage.nbytes())
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def change(self, number):
        self.bytes += number
        self.most = max(self.most, self.bytes)

    def forget(self, key, number):
        self.alive.discard(key)
        self.change(-number)


def peak(args):
    """GiB of a step, to whose end all is held that its functions return."""
    with benchmark.without_memory(), Peak() as memory:
        student, gradients = benchmark.build_gradients(args)
        parameters = student.parameters()
        optimizer = torch.optim.AdamW(parameters) if args.optimizer == "adamw" else torch.optim.SGD(parameters, momentum=0.9)
        for _ in range(2):    # the first makes the optimizer's state
            held = gradients()
            optimizer.step()
            optimizer.zero_grad()
            del held
    return memory.most / 2**30


if __name__ == "__main__":
    args = train.parse_args(["--data_path", "none", *sys.argv[1:]], "count_memory.py")    # reads no images
    with benchmark.in_one_line("count_memory.py"):
        gib = peak(args)
    print(f"{args.recipe}: {args.baseline}, {args.arch}, {args.batch_size_per_gpu} images a process, {'float32' if args.precision == 'fp32' else 'half precision'}: {gib:.1f} GiB")
