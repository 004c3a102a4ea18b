"""Encoders from files: this repository's, and those that DINO, iBOT, SERE's release, MoCo v3, MAE, timm and torchvision publish.

What an encoder is like is read off its weights' shapes, but for one thing they don't tell: the attention heads. MoCo v3's ViT-S has
12, all others 6, with the same shapes; its file is known by the names of its keys, and what we save says them (model.py). Files are read with weights_only=True, always.
"""

import argparse

import numpy as np
import torch

from distributed import world
from model import ARCHITECTURES, build_encoder

# Old releases pickle their command line, and NumPy floats in the optimizer's state. These classes and no others are let in.
HARMLESS = [
    argparse.Namespace, np.dtype, np.float64, type(np.dtype(np.float64)),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"), (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
]

# What an encoder's state dict must have, and how the names of its parts begin.
VIT = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"}, ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
RESNET = {"conv1.weight", "layer4.0.conv1.weight"}, ("conv1.", "bn1.", "layer")

OTHERS = ("norm_pre", "reg_token", "register_tokens", "dist_token")    # parts of encoders that are not ours: dropped, they would be another network

MOCO_HEADS = {384: 12}    # by dim; its ViT-B has 12 like the others'


def read_encoder_weights(path, checkpoint_key=None):
    """The encoder's state dict in a file, on the CPU: (state dict under timm's or torchvision's names, dropped keys, heads or None).

    checkpoint_key: which network a training checkpoint is asked for, "teacher" or "student"; if not given, the one its authors
    evaluate: the teacher, and of MoCo v3 the base encoder. Raises ValueError where the file holds neither a ViT nor a ResNet,
    OSError where it can't be read.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:    # the unpickler has many ways of saying no; its advice, to load unsafely, is not passed on
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain values, and is not loaded") from error
    for key in (checkpoint_key or "teacher", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict")
    heads = next((module["heads"] for module in getattr(state, "_metadata", {}).values() if "heads" in module), None)    # of this repository's files
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if any(key.startswith("base_encoder.") for key in state):    # MoCo v3
        network = "momentum_encoder." if checkpoint_key == "teacher" else "base_encoder."
        state = {key.removeprefix(network): value for key, value in state.items()}
        heads = MOCO_HEADS.get(state["cls_token"].shape[-1]) if "cls_token" in state else None
    state = {key.removeprefix("backbone.").removeprefix("encoder."): value for key, value in state.items()}
    if "norm.weight" not in state:    # MAE, fine-tuned on the mean patch
        state = {"norm." + key.removeprefix("fc_norm.") if key.startswith("fc_norm.") else key: value for key, value in state.items()}
    for needed, parts in (VIT, RESNET):
        if needed <= state.keys():
            if other := [key for key in state if key.split(".")[0] in OTHERS]:
                raise ValueError(f"{path} holds a ViT with {other[0]}, which none of {', '.join(ARCHITECTURES)} has")
            encoder = {key: value for key, value in state.items() if key.startswith(parts)}
            return encoder, sorted(state.keys() - encoder.keys()), heads
    raise ValueError(f"{path} holds no ViT or ResNet; its first keys are {list(state)[:5]}")


def load_encoder(path, arch=None, checkpoint_key=None, heads=None, image_size=None, drop_path_rate=0.0):
    """An encoder, in eval mode, with a file's weights; prints what it is, and matched and dropped keys.

    arch: a name of ARCHITECTURES that it must be. heads: attention heads, if the file's origin doesn't tell. image_size: of the
    grid that position embeddings are interpolated to; the file's own if not given (a ResNet's doesn't tell: 224). Raises ValueError where the weights
    are of another architecture, naming keys and shapes, and as read_encoder_weights.
    """
    state, dropped, known_heads = read_encoder_weights(path, checkpoint_key)
    found, size, patch_size = _recognise(state)
    if not (arch or found):
        raise ValueError(f"{path} holds a ViT of dim {state['cls_token'].shape[-1]} whose depth fits none of {', '.join(ARCHITECTURES)}")
    if heads and known_heads and heads != known_heads:
        raise ValueError(f"{path} is an encoder with {known_heads} heads, not {heads}; it tells, so leave out --heads")
    arch, heads = arch or found, heads or known_heads
    if not heads and arch == "vit_small" and "pos_embed" in state and not state["pos_embed"][:, 0].any():
        raise ValueError(f"{path} has fixed position embeddings, as MoCo v3's ViT-S, whose 12 heads the shapes don't tell: give --heads 12, or 6")
    if heads and arch != "resnet50" and ARCHITECTURES[arch]["dim"] % heads:
        raise ValueError(f"{path}: {arch} can't have {heads} heads, which do not divide {ARCHITECTURES[arch]['dim']}")
    encoder = build_encoder(arch, size, patch_size, drop_path_rate, heads=heads)
    own = encoder.state_dict()
    shapes, own_shapes = ({key: tuple(value.shape) for key, value in s.items()} for s in (state, own))
    faults = [f"{key} is {shapes[key]}, not {own_shapes[key]}" for key in own if key in state and shapes[key] != own_shapes[key]]
    faults += [f"{key} is missing" for key in own if key not in state] + [f"{key} is unknown" for key in state if key not in own]
    if faults:
        other = f", but is a {found}" if found and found != arch else ""
        raise ValueError(f"{path} does not fit {arch}{other}: " + "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))
    encoder.load_state_dict(state)
    what = arch if arch == "resnet50" else f"{arch}, patch size {patch_size}, {encoder.heads} heads, {size} px"
    if world()[0] == 0:
        print(f"{path}: {what}; matched {len(state)} keys, dropped {len(dropped)}{': ' if dropped else ''}{_count(dropped)}")
    if image_size and arch != "resnet50" and image_size != size:
        encoder.resize(image_size)
    return encoder.eval()


def _recognise(state):
    """(name in ARCHITECTURES or None, image size, patch size) of an encoder's state dict, by its shapes."""
    if "cls_token" not in state:
        return "resnet50", 224, 32
    dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    grid = int((state["pos_embed"].shape[1] - 1) ** 0.5)
    return next((name for name, a in ARCHITECTURES.items() if (a["dim"], a.get("depth")) == (dim, depth)), None), grid * patch_size, patch_size


def _count(keys):
    """Top-level names and how many keys each: `head (8), predictor (2)`."""
    names = [key.split(".")[0] for key in keys]
    return ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names))
