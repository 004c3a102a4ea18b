"""The memory of a training step, counted without a GPU: all tensors alive at once, under autocast, on tensors that hold nothing.

    python results/count_memory.py --recipe resnet50

With train.py's flags, of which --data_path, --compile and --grad_accum_steps change nothing here. A GPU needs its libraries' work space and
what is lost between blocks besides: leave a gigabyte or two.
"""

import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
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
    """GiB of a step."""
    baseline, B = train.build_baseline(args), args.batch_size_per_gpu
    without_values = mock.patch.object(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    with without_values, FakeTensorMode(allow_non_fake_inputs=True), Peak() as memory:
        student, teacher = train.build_networks(args, baseline)
        relation_loss, adamw = train.build_relation_loss(args), args.optimizer == "adamw"
        optimizer = torch.optim.AdamW(student.parameters()) if adamw else torch.optim.SGD(student.parameters(), momentum=0.9)
        numbers = ((2, args.global_crops_size), (args.local_crops_number, args.local_crops_size))
        views = [torch.empty(number, B, 3, size, size) for number, size in numbers if number]
        boxes = torch.empty(2 + args.local_crops_number, B, 5)
        mask = torch.empty(2, B, baseline.mask.grid**2, dtype=torch.bool) if baseline.mask else None
        for _ in range(2):    # the first makes the optimizer's state
            step(student, teacher, baseline, relation_loss, optimizer, views, boxes, mask, args.precision != "fp32")
    return memory.most / 2**30


def step(student, teacher, baseline, relation_loss, optimizer, views, boxes, mask, half):
    """What Training.step holds: all it has made, to its end."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        with torch.no_grad():
            taught = teacher(views[:1], mask)
        learned = student(views, mask)
        relations = sum(relation_loss(taught, learned, boxes))
    loss = relations + baseline.loss(learned.embedding, taught.embedding, baseline.teacher_temp[0], boxes)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    args = train.parse_args(["--data_path", "none", *sys.argv[1:]])    # reads no images
    print(f"{args.recipe}: {args.baseline}, {args.arch}, {args.batch_size_per_gpu} images a process, {'float32' if args.precision == 'fp32' else 'half precision'}: {peak(args):.1f} GiB")
