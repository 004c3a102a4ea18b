"""Encoders from files: ours, and those of the field's repositories.

These are DINO, iBOT, SERE's release, MoCo v3, MAE, timm, and torchvision's ResNet-50. An encoder's
shape is read off its weights, but for the attention heads of a ViT, which shapes don't
tell. MoCo v3's ViT-S has 12, all others 6: its files are known by the names of their keys, and what
was saved from them elsewhere needs `heads`. Files are read with weights_only=True, always.
"""

import argparse

import numpy as np
import torch

from model import ARCHITECTURES, build_encoder
from support.distributed import world
from support.errors import UserError

# Old releases pickle their command line, and NumPy floats in the optimizer's state: let these in.
SCALAR = np.float64(0).__reduce__()[0]    # how NumPy rebuilds a scalar, in two modules by version
HARMLESS = [argparse.Namespace, np.dtype, np.float64, type(np.dtype(np.float64))]
HARMLESS += [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]

# What the state dict of an encoder must have, and how the names of its parts begin.
VIT = (
    {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"},
    ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm."),
)
RESNET = {"conv1.weight", "layer4.0.conv1.weight"}, ("conv1.", "bn1.", "layer")

# Parts of encoders that are not ours: without them they would be another network.
FOREIGN = ("norm_pre", "reg_token", "register_tokens", "dist_token")

MOCO_HEADS = {384: 12}    # by dim; MoCo v3's ViT-B has 12 like all others


def read_encoder_weights(path, checkpoint_key=None):
    """Return the encoder in a file: (state dict, dropped keys, heads or None).

    The state dict is under timm's names. checkpoint_key: "teacher" or "student", which network of a
    training checkpoint; if None the one its authors evaluate: the teacher, of MoCo v3 the base
    encoder. Raises UserError.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(str(error)) from error
    except Exception as error:    # the unpickler's own advice, to load unsafely, is not passed on
        what = "is damaged, or holds more than tensors and plain values, and is not loaded"
        raise UserError(f"{path} {what}") from error
    for key in (checkpoint_key or "teacher", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict")
    state = {key.removeprefix("module."): value for key, value in state.items()
             if isinstance(key, str) and isinstance(value, torch.Tensor)}
    heads = None
    if any(key.startswith("base_encoder.") for key in state):    # MoCo v3
        network = "momentum_encoder." if checkpoint_key == "teacher" else "base_encoder."
        state = {key.removeprefix(network): value for key, value in state.items()}
        heads = MOCO_HEADS.get(state["cls_token"].shape[-1]) if "cls_token" in state else None
    state = {key.removeprefix("backbone.").removeprefix("encoder."): value
             for key, value in state.items()}
    if "norm.weight" not in state:    # MAE, fine-tuned on the mean patch
        state = {f"norm.{key[8:]}" if key.startswith("fc_norm.") else key: value
                 for key, value in state.items()}
    for needed, parts in (VIT, RESNET):
        if needed <= state.keys():
            if foreign := [key for key in state if key.split(".")[0] in FOREIGN]:
                names = ", ".join(ARCHITECTURES)
                raise UserError(f"{path} holds a ViT with {foreign[0]}, which none of {names} has")
            encoder = {key: value for key, value in state.items() if key.startswith(parts)}
            return encoder, sorted(state.keys() - encoder.keys()), heads
    raise UserError(f"{path} holds no ViT or ResNet; its first keys are {list(state)[:5]}")


def load_encoder(path, arch=None, checkpoint_key=None, heads=None, image_size=None,
                 drop_path_rate=0.0):
    """Return an encoder with the weights of a file, in eval mode; print what it is.

    arch: a name of ARCHITECTURES that it must be. heads: attention heads, if other than the
    architecture's. image_size: of the grid that position embeddings are interpolated to; if None
    the file's own (a ResNet's doesn't tell: 224). Raises UserError for another architecture, naming
    keys and shapes, and as read_encoder_weights.
    """
    state, dropped, known_heads = read_encoder_weights(path, checkpoint_key)
    found, size, patch_size = recognize(state)
    if not (arch or found):
        dim, names = state["cls_token"].shape[-1], ", ".join(ARCHITECTURES)
        raise UserError(f"{path} holds a ViT of dim {dim} whose depth fits none of {names}")
    if heads and known_heads and heads != known_heads:
        raise UserError(f"{path} is an encoder with {known_heads} heads: leave out --heads {heads}")
    arch, heads = arch or found, heads or known_heads
    dim = ARCHITECTURES[arch]["dim"]
    fixed_positions = "pos_embed" in state and not state["pos_embed"][0, 0].any()
    if not heads and arch == "vit_small" and fixed_positions:
        raise UserError(f"{path} has fixed position embeddings, as MoCo v3's ViT-S with 12 heads, "
                        "which shapes don't tell: give --heads 12, or 6")
    if heads and dim % heads:
        raise UserError(f"{path}: {arch} can't have {heads} heads, which do not divide {dim}")
    encoder = build_encoder(arch, size, patch_size, drop_path_rate, heads=heads)
    if faults := differences(state, encoder.state_dict()):
        other = f", but is a {found}" if found and found != arch else ""
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{path} does not fit {arch}{other}: {'; '.join(faults[:5])}{more}")
    encoder.load_state_dict(state)
    if world()[0] == 0:
        what = f"{arch}, patch size {patch_size}, {encoder.heads} heads, {size} px"
        print(f"{path}: {what if encoder.heads else arch}; matched {len(state)} keys, dropped "
              f"{len(dropped)}{': ' if dropped else ''}{count(dropped)}", flush=True)
    if image_size and encoder.heads and image_size != size:
        encoder.resize(image_size)
    return encoder.eval()


def differences(state, own):
    """List how a state dict differs from an encoder's own, in keys and shapes."""
    shapes = [(key, tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state]
    faults = [f"{key} is {shape}, not {wanted}" for key, shape, wanted in shapes if shape != wanted]
    faults += [f"{key} is missing" for key in own if key not in state]
    return faults + [f"{key} is unknown" for key in state if key not in own]


def recognize(state):
    """Return (name in ARCHITECTURES or None, image size, patch size), read off shapes."""
    if "cls_token" not in state:
        return "resnet50", 224, 32
    dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    grid = int((state["pos_embed"].shape[1] - 1) ** 0.5)
    shape = (dim, depth)
    names = [name for name, a in ARCHITECTURES.items() if (a["dim"], a["depth"]) == shape]
    return names[0] if names else None, grid * patch_size, patch_size


def count(keys):
    """Say top-level names and how many keys each has: `head (8), predictor (2)`."""
    names = [key.split(".")[0] for key in keys]
    return ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names))
