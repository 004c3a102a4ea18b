"""The encoder alone, as a plain state dict: `evaluate.py export`."""

import os
from pathlib import Path

from model import ARCHITECTURES
from support.checkpoint import check_output, save
from support.errors import UserError

# What timm calls a ViT's shape, and which of its names stands for which dim.
IN_TIMM = {"image_size": "img_size", "patch_size": "patch_size", "dim": "embed_dim",
           "depth": "depth", "heads": "num_heads"}
BY_DIM = {shape["dim"]: arch for arch, shape in ARCHITECTURES.items() if arch != "vit_nano"}


def in_timm(encoder, path):
    """Return the Python expression that loads an exported file in timm."""
    name, options = "resnet50", ""
    if encoder.heads:
        arch = BY_DIM.get(encoder.dim, "vit_tiny")    # timm has no nano, but can build it
        theirs = {"image_size": 224, "patch_size": 16} | ARCHITECTURES[arch]
        name = f"{arch}_patch16_224"
        options = "".join(f"{IN_TIMM[key]}={getattr(encoder, key)}, " for key, value
                          in theirs.items() if getattr(encoder, key) != value)
    return f"timm.create_model({name!r}, num_classes=0, {options}checkpoint_path={path!r})"


def import_safetensors(path):
    """Return the module that writes a .safetensors file; raise UserError without it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(f"--output {path} needs `pip install safetensors`; a name that ends in "
                        ".pth does not") from error
    return safetensors.torch


def save_safetensors(state, path):
    """Write a state dict, whole or not at all; raise UserError where that fails."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(import_safetensors(path).save(state, {"format": "pt"}))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written: {error.strerror}") from error


def run(args, encoder, size, processes):
    """Write the encoder alone, as a plain state dict, and say how to load it."""
    check_output("output", args.output)
    write = save_safetensors if args.output.endswith(".safetensors") else save
    if encoder.heads and size != encoder.image_size:
        encoder.resize(size)
    state = encoder.cpu().state_dict()
    if processes.rank == 0:
        write(state, Path(args.output))
    heads = f", {encoder.heads} heads" if encoder.heads else ""
    processes.say(f"{args.output}: {len(state)} tensors{heads}, under the names of timm, DINO and "
                  "torchvision. In timm:")
    processes.say(in_timm(encoder, args.output))
    return {}
