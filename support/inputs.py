"""What an encoder is given in an evaluation: center crops, a share a process."""

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from augment import normalize
from support.distributed import world
from support.errors import UserError
from support.workers import check_shared_memory, ignore_signals

UNREADABLE = -2    # the label of an image that can't be read, where one goes on without it


def evaluation_crop(size):
    """Return the transform of uint8 images to uint8 (3, size, size).

    It resizes the short side to size * 256 / 224, bicubic, and takes the center.
    """
    resize = v2.Resize(round(size * 256 / 224), InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])


class Transformed(Dataset):
    """images[i] for i in indices, through evaluation_crop(size): (uint8 image, label).

    tolerant: an image that can't be read is black, its label UNREADABLE; else UserError is raised.
    """

    def __init__(self, images, indices, size, tolerant=False):
        self.images, self.indices, self.size, self.tolerant = images, indices, size, tolerant
        self.transform = evaluation_crop(size)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        try:
            image, label = self.images[self.indices[i]]
        except UserError:
            if not self.tolerant:
                raise
            image, label = torch.zeros(3, self.size, self.size, dtype=torch.uint8), UNREADABLE
        # Tensors come to lie in shared memory right here, where its lack is an error. For numbers
        # that is tried in a thread, whose error is lost, and the batch is waited for in vain.
        return self.transform(image), torch.tensor(label)


def share_loader(images, indices, size, device, batch_size, num_workers, tolerant=False):
    """Return a loader of this process's share of the center crops of images.

    tolerant: see Transformed.
    """
    crops = Transformed(images, indices, size, tolerant)
    rank, processes = world()
    check_shared_memory(3 * size**2 * min(batch_size, len(crops)), num_workers)
    return DataLoader(
        crops, batch_size, sampler=range(rank, len(crops), processes), num_workers=num_workers,
        worker_init_fn=ignore_signals, pin_memory=device.type == "cuda",
    )


def autocast(device):
    """Compute in bf16 where the GPU has it and does not emulate it."""
    own_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=own_bf16)


def to_input(x, device):
    """Turn uint8 images of a loader into what encoders take."""
    return normalize(x.to(device, non_blocking=True).float() / 255)
