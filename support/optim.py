"""Schedules, clipping, and what the optimizer is told about each parameter."""

import math
import re

import torch


def cosine_schedule(base, final, steps, warmup=0, start=0.0):
    """Return a value a step, (steps,): linear from start to base, then by cosine.

    Step number `warmup` has base, the last one `final`.
    """
    rise = torch.linspace(start, base, warmup + 1, dtype=torch.float64)[:-1]
    fall = torch.linspace(0, math.pi, steps - warmup, dtype=torch.float64)
    return torch.cat([rise, final + 0.5 * (base - final) * (1 + fall.cos())])


def parameter_groups(network):
    """Return two groups for the optimizer: weights, and what gets no weight decay.

    The latter is all that has one dimension: biases and norms.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    weights = {"params": [p for p in parameters if p.ndim > 1]}
    return [weights, {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def clip_gradients(parameters, max_norm):
    """Scale each parameter's own gradient to at most max_norm, as DINO does."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))    # (gradients,)
    torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1).unbind()))


def layer_groups(encoder, head, decay, weight_decay):
    """Return groups for layer-wise decay of the learning rate.

    d layers below the head, decay ** d of its rate. The head and the encoder's final norm are
    the top, d = 0; then come the blocks (or a ResNet's stages) from the last to the first, and
    below them the embeddings. No weight decay on biases, norms, and the class and position
    embeddings. Each group has its share of the rate as "scale".
    """
    def layer_of(name):
        block = re.match(r"blocks\.(\d+)\.", name)
        stage = re.match(r"layer(\d+)\.", name)
        return int(block[1]) + 1 if block else int(stage[1]) if stage else 0

    top = 1 + max(layer_of(name) for name, _ in encoder.named_parameters())
    parameters = [(top if name.startswith("norm.") else layer_of(name), name, parameter)
                  for name, parameter in encoder.named_parameters()]
    parameters += [(top, name, parameter) for name, parameter in head.named_parameters()]
    groups = {}
    for layer, name, parameter in parameters:
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
            new = {"params": [], "scale": decay ** (top - layer)}
            group = groups.setdefault((layer, decayed), new)
            group["weight_decay"] = weight_decay * decayed
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
