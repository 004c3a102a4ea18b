"""Encoders from files: ours, and those of the field's repositories.

These are DINO, DINOv2 (without registers), iBOT, SERE's release, MoCo v3, MAE, timm, and
torchvision's ResNet-50. An encoder is found by the names of its tensors, however they are nested
and prefixed, and its shape is read off them, but for the attention heads of a ViT, which shapes
don't tell. MoCo v3's ViT-S has 12, all others 6: its files are known by the names of their keys,
our checkpoints say it, and what was saved from either elsewhere needs `heads`. Files are read with
weights_only=True, always.
"""

import argparse
import math
import re
from typing import NamedTuple

import numpy as np
import torch

from model import ARCHITECTURES, build_encoder
from support.distributed import world
from support.errors import UserError

# Old releases pickle their command line, and NumPy floats in the optimizer's state: let these in.
SCALAR = np.float64(0).__reduce__()[0]    # how NumPy rebuilds a scalar, in two modules by version
HARMLESS = [argparse.Namespace, np.dtype, np.float64, type(np.dtype(np.float64))]
HARMLESS += [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]

# Parts of PyTorch's errors, and what they mean. Its own advice, to load unsafely, is not passed on.
REASONS = (
    (r"GLOBAL (\S+)", "holds objects of {} beside tensors and plain values; they could run code, "
     "so it is not loaded: save its state dict alone"),
    (r"TorchScript()", "is a TorchScript program: save its state dict instead"),
    (r"allocate()", "does not fit into this machine's memory"),
    (r"()", "is damaged, or was written by neither torch.save nor safetensors"),
)

# The tensor by which an encoder is found, what else it must have, how its parts' names begin.
VIT = ("cls_token",
       ("pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight"),
       ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm."))
RESNET = "layer4.0.conv1.weight", ("conv1.weight",), ("conv1.", "bn1.", "layer")

# Words in the path of an encoder within its file that tell a moving average from what it follows.
TEACHER = {"teacher", "momentum_encoder", "ema", "model_ema", "state_dict_ema"}
STUDENT = {"student", "base_encoder"}

# Parts of encoders that are not ours: without them they would be another network.
FOREIGN = ("norm_pre", "reg_token", "register_tokens", "dist_token")

MOCO_HEADS = {384: 12}    # by dim; MoCo v3's ViT-B has 12 like all others


class Found(NamedTuple):
    """An encoder in a file."""

    path: tuple      # the words before its tensors' names: ("teacher", "backbone")
    state: dict      # its tensors, under timm's names
    dropped: list    # names of the other tensors beside it
    lacks: list      # names of tensors without which it is no encoder


def read_file(path):
    """Return the content of a file of PyTorch's or safetensors'; raise UserError."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    try:
        if start[8:] == b"{" or str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"{path} is a safetensors file; to read it, `pip install safetensors`"
                        ) from error
    except Exception as error:    # PyTorch and safetensors raise many kinds
        match, what = next((m, what) for pattern, what in REASONS
                           if (m := re.search(pattern, str(error))))
        raise UserError(f"{path} {what.format(match[1])}") from error


def state_dicts(content, path=(), depth=3):
    """Yield (path, {name: tensor}) for every nested dict that holds tensors."""
    if isinstance(content, dict) and depth:
        named = {name: value for name, value in content.items() if isinstance(name, str)}
        tensors = {name.replace("_orig_mod.", ""): value    # torch.compile's
                   for name, value in named.items() if isinstance(value, torch.Tensor)}
        if tensors:
            yield path, tensors
        for name, value in named.items():
            yield from state_dicts(value, (*path, name), depth - 1)


def find_encoders(content):
    """List what is, by a telling name, an encoder in the content of a file, as Found."""
    return [encoder_at(path, tensors, name.removesuffix(anchor), needed, parts)
            for path, tensors in state_dicts(content) for name in tensors
            for anchor, needed, parts in (VIT, RESNET) if f".{name}".endswith(f".{anchor}")]


def encoder_at(path, tensors, prefix, needed, parts):
    """Return the encoder among tensors whose names begin with `prefix`, as Found."""
    own = {key.removeprefix(prefix): value for key, value in tensors.items()
           if key.startswith(prefix)}
    if "norm.weight" not in own:    # MAE, fine-tuned on the mean patch
        own = {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in own.items()}
    state = {key: value for key, value in own.items() if key.startswith(parts)}
    beside = [key.removeprefix("module.") for key in tensors if not key.startswith(prefix)]
    dropped = sorted(beside + [key for key in own if key not in state])
    lacks = [key for key in needed if key not in state]
    return Found((*path, *prefix.split(".")[:-1]), state, dropped, lacks)


def choose(found, checkpoint_key):
    """Return the Found that is meant, and a line saying so; raise UserError."""
    names = [".".join(one.path) or "the only encoder" for one in found]
    if len(found) == 1:
        allowed = {"teacher": TEACHER, "student": STUDENT}.get(checkpoint_key)
        if allowed is not None and not allowed & set(found[0].path):
            named = f" ({names[0]})" if found[0].path else ""
            raise UserError(f"holds one encoder{named}, not a teacher and a student: leave out "
                            f"--checkpoint_key {checkpoint_key}")
        return found[0], f"the only encoder ({names[0]})" if found[0].path else names[0]
    is_moco = any("base_encoder" in one.path for one in found)
    wanted = checkpoint_key or ("student" if is_moco else "teacher")
    chosen = [i for i, one in enumerate(found) if bool(TEACHER & set(one.path)) ==
              (wanted == "teacher")]
    if len(chosen) != 1:
        raise UserError(f"holds several encoders, {', '.join(names)}, and {len(chosen)} of them "
                        f"could be the {wanted}: save the one you mean alone")
    i, = chosen
    return found[i], f"{names[i]} (not {', '.join(names[:i] + names[i + 1:])})"


def known_heads(content, chosen):
    """Return the attention heads that a file is known to have, else None."""
    if {"base_encoder", "momentum_encoder"} & set(chosen.path) and "cls_token" in chosen.state:
        return MOCO_HEADS.get(chosen.state["cls_token"].numel())
    arguments = content.get("arguments")    # of our own checkpoints
    heads = arguments.get("heads") if isinstance(arguments, dict) else None
    return heads if isinstance(heads, int) and heads > 0 else None


def fold_layer_scale(state):
    """Multiply LayerScale's gamma (C,) into the layer before it.

    Returns the state dict.
    The network stays the same: γ(Wx + b) = (γW)x + γb. Raises UserError for an unfit shape.
    """
    layers = {".ls1.gamma": ".attn.proj", ".ls2.gamma": ".mlp.fc2"}
    folded = {name: value for name, value in state.items() if name[-10:] not in layers}
    for name in state.keys() - folded.keys():
        for part in (".weight", ".bias"):
            key = name[:-10] + layers[name[-10:]] + part
            if key not in state or state[key].shape[:1] != state[name].shape:
                raise UserError(f"has {name} {tuple(state[name].shape)}, which fits no {key}")
            folded[key] = torch.einsum("c,c...->c...", state[name].float(), state[key].float())
    return folded


def read_encoder_weights(path, checkpoint_key=None):
    """Return the encoder in a file: (state dict, dropped keys, heads or None, which).

    The state dict is under timm's names. checkpoint_key: "teacher" or "student", which network of a
    training checkpoint; if None the one its authors evaluate: the teacher, of MoCo v3 the base
    encoder. `which` says in words which it is. Raises UserError.
    """
    content = read_file(path)
    found = find_encoders(content)
    whole = [one for one in found if not one.lacks]
    try:
        if not isinstance(content, dict):
            raise UserError(f"holds no state dict but a {type(content).__name__}")
        if not whole:
            raise UserError(describe(content, found))
        chosen, which = choose(whole, checkpoint_key)
        if foreign := [key for key in chosen.dropped if key.split(".")[0] in FOREIGN]:
            names = ", ".join(ARCHITECTURES)
            raise UserError(f"holds a ViT with {foreign[0]}, which none of {names} has")
        if bad := [key for key, value in chosen.state.items() if not value.isfinite().all()]:
            raise UserError(f"has NaN or inf in {len(bad)} of {len(chosen.state)} tensors, "
                            f"{bad[0]} the first: it is of a training that failed")
        state = fold_layer_scale(chosen.state)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    return state, chosen.dropped, known_heads(content, chosen), which


def describe(content, found):
    """Say what a file without a whole encoder holds."""
    if found:
        return f"holds a part of an encoder: {', '.join(found[0].lacks)} is missing"
    keys = [".".join((*path, name)) for path, tensors in state_dicts(content) for name in tensors]
    if keys:
        more = ", ..." if len(keys) > 5 else ""
        return f"holds no ViT or ResNet but {len(keys)} tensors: {', '.join(keys[:5])}{more}"
    keys = ", ".join(map(str, list(content)[:5]))
    return f"holds no ViT or ResNet, as it has no tensors: {keys or 'it is empty'}"


def load_encoder(path, arch=None, checkpoint_key=None, heads=None, image_size=None,
                 drop_path_rate=0.0):
    """Return an encoder with the weights of a file, in eval mode; print what it is.

    arch: a name of ARCHITECTURES that it must be. heads: attention heads, if other than the
    architecture's. image_size: of the grid that position embeddings are interpolated to; if None
    the file's own (a ResNet's doesn't tell: 224). Raises UserError for another architecture, naming
    keys and shapes, and as read_encoder_weights.
    """
    state, dropped, known, which = read_encoder_weights(path, checkpoint_key)
    found, size, patch_size = recognize(path, state)
    if not (arch or found):
        dim, names = state["cls_token"].shape[-1], ", ".join(ARCHITECTURES)
        raise UserError(f"{path} holds a ViT of dim {dim} whose depth fits none of {names}")
    if heads and known and heads != known:
        raise UserError(f"{path} is an encoder with {known} heads: leave out --heads {heads}")
    arch, heads = arch or found, heads or known
    fixed_positions = "pos_embed" in state and not state["pos_embed"][0, 0].any()
    if not heads and arch == "vit_small" and fixed_positions:
        raise UserError(f"{path} has fixed position embeddings, as MoCo v3's ViT-S with 12 heads, "
                        "which shapes don't tell: give --heads 12, or 6")
    encoder = build(arch, size, patch_size, drop_path_rate, heads)
    if faults := differences(state, encoder.state_dict()):
        other = f", but is a {found}" if found and found != arch else ""
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{path} does not fit {arch}{other}: {'; '.join(faults[:5])}{more}")
    encoder.load_state_dict(state)
    if world()[0] == 0:
        what = f"{arch}, patch size {patch_size}, {encoder.heads} heads, {size} px"
        print(f"{path}: {which}; {what if encoder.heads else arch}; matched {len(state)} keys, "
              f"dropped {len(dropped)}{': ' if dropped else ''}{count(dropped)}", flush=True)
    if image_size and encoder.heads and image_size != size:
        encoder.resize(image_size)
    return encoder.eval()


def build(arch, size, patch_size, drop_path_rate=0.0, heads=None):
    """Build an encoder; raise UserError where its channels can't be split into heads."""
    dim = ARCHITECTURES[arch]["dim"]
    if heads and dim % heads:
        raise UserError(f"{arch} can't have {heads} heads, which do not divide {dim}")
    return build_encoder(arch, size, patch_size, drop_path_rate, heads=heads)


def requested_encoder(args):
    """Return the encoder that the flags of evaluate.py ask for.

    An untrained one is what train.py starts from with the same seed.
    """
    if getattr(args, "untrained", None) is None:
        rate = getattr(args, "drop_path_rate", 0.0)
        return load_encoder(args.pretrained_weights, args.arch, args.checkpoint_key, args.heads,
                            drop_path_rate=rate)
    torch.manual_seed(args.untrained)
    return build(args.arch, args.image_size or 224, args.patch_size or 16, heads=args.heads).eval()


def differences(state, own):
    """List how a state dict differs from an encoder's own, in keys and shapes."""
    shapes = [(key, tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state]
    faults = [f"{key} is {shape}, not {wanted}" for key, shape, wanted in shapes if shape != wanted]
    faults += [f"{key} is missing" for key in own if key not in state]
    return faults + [f"{key} is unknown" for key in state if key not in own]


def recognize(path, state):
    """Return (name in ARCHITECTURES or None, image size, patch size), read off shapes."""
    if "cls_token" not in state:
        return "resnet50", 224, 32
    names = ("cls_token", "pos_embed", "patch_embed.proj.weight")
    cls, positions, patch = shapes = [tuple(state[name].shape) for name in names]
    plain = [len(shape) for shape in shapes] == [3, 3, 4] and 0 not in cls + positions + patch
    side = math.isqrt(positions[1] - 1) if plain else 0
    if not side or positions != (1, 1 + side**2, cls[2]):
        listed = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes))
        raise UserError(f"{path} holds a ViT without a position for the class token and for each "
                        f"patch of a square: {listed}")
    dim, depth = cls[2], len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    names = [name for name, a in ARCHITECTURES.items() if (a["dim"], a["depth"]) == (dim, depth)]
    return names[0] if names else None, side * patch[-1], patch[-1]


def count(keys):
    """Say top-level names and how many keys each has: `head (8), predictor (2)`."""
    names = [key.split(".")[0] for key in keys]
    return ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names))
