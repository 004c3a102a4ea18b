"""The class tokens of a folder's images, in a file: `evaluate.py features`."""

import os
from pathlib import Path

from data import build_dataset
from evaluate import extract_features
from support.checkpoint import check_output, save


def run(args, encoder, size, processes):
    """Write {"features": (N, C), "names", "labels": (N,), ...} for torch.load.

    Features are class tokens after the final norm. A name is the file's, relative to --data_path,
    or the image's number where it has no file. A label is -1 where it is not known.
    """
    check_output("output", args.output)
    images = build_dataset(args.data_path, args.split, args.label_depth)
    processes.working = True
    features, labels = extract_features(
        encoder, images, range(len(images)), size, processes.device, args.batch_size_per_gpu,
        args.num_workers, progress="features",
    )
    names = list(range(len(images)))
    if hasattr(images, "path"):
        names = [os.path.relpath(images.path(i), args.data_path) for i in names]
    content = {"features": features.cpu(), "names": names, "labels": labels.cpu(),
               "image_size": size, "pretrained_weights": args.pretrained_weights}
    if processes.rank == 0:
        save(content, Path(args.output))
    processes.say(f"{args.output}: class tokens after the final norm, {tuple(features.shape)}, "
                  f"{size} px, and names, of {args.data_path}; "
                  f"{int((labels >= 0).sum())} have a label")
    return {"images": len(images), "dim": encoder.dim}
