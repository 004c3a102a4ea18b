"""The class tokens of a folder's images, in a file: `evaluate.py features`."""

import os
import sys
from pathlib import Path

from data import build_dataset
from evaluate import extract_features
from support.checkpoint import check_output, save
from support.errors import UserError
from support.inputs import UNREADABLE
from support.progress import say


def leave_out(images, index):
    """Name an image that can't be read."""
    try:
        images[index]    # in this process, to have the error
    except UserError as error:
        say(f"{error}; it is left out", sys.stderr)


def run(args, encoder, size, processes):
    """Write {"features": (N, C), "names", "labels": (N,), ...} for torch.load.

    Features are class tokens after the final norm. A name is the file's, relative to --data_path,
    or the image's number where it has no file. A label is -1 where it is not known. Images that
    can't be read are left out.
    """
    check_output("output", args.output)
    images = build_dataset(args.data_path, args.split, args.label_depth, args.classes)
    processes.working = True
    features, labels = extract_features(
        encoder, images, range(len(images)), size, processes.device, args.batch_size_per_gpu,
        args.num_workers, leave_out=leave_out,
    )
    read = labels != UNREADABLE
    if not read.any():
        raise UserError(f"none of the images of {args.data_path} can be read")
    names = read.nonzero().flatten().tolist()
    if hasattr(images, "path"):
        names = [os.path.relpath(images.path(i), args.data_path) for i in names]
    features, labels = features[read].cpu(), labels[read].cpu()
    content = {"features": features, "names": names, "labels": labels, "image_size": size,
               "pretrained_weights": args.pretrained_weights}
    if processes.rank == 0:
        save(content, Path(args.output))
    known = int((labels >= 0).sum())
    processes.say(f"{args.output}: class tokens after the final norm {tuple(features.shape)}, "
                  f"{size} px, names, and {known} labels, of {args.data_path}")
    return {"images": len(names), "left_out": len(images) - len(names), "dim": encoder.dim}
