"""Schedules, and what the optimizer is told of each parameter."""

import math
import re

import torch


def cosine_schedule(base, final, steps, warmup=0, start=0.0):
    """A value a step, (steps,): linear from `start` up to `base`, which step number `warmup` has, then by cosine to `final` in the last."""
    rise = torch.linspace(start, base, warmup + 1, dtype=torch.float64)[:-1]
    fall = torch.linspace(0, math.pi, steps - warmup, dtype=torch.float64)
    return torch.cat([rise, final + 0.5 * (base - final) * (1 + fall.cos())])


def parameter_groups(network):
    """Two groups for the optimizer: weights, and what gets no weight decay (biases, norms and all else with one dimension)."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def clip_gradients(parameters, largest):
    """Scale each parameter's own gradient to a norm of at most `largest`, as DINO does (not the norm of all together)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))    # (gradients,)
    factors = (largest / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(grads, list(factors.unbind()))


def layer_groups(encoder, head, decay, weight_decay):
    """Groups for fine-tuning with layer-wise decay: what lies d layers below the head learns with decay ** d times its rate.

    The head and the encoder's final norm are the top, d = 0, then come the last block, ..., the first (of a ResNet: stages), and
    below it the embeddings. No weight decay on biases, norms, and the class and position embeddings. Frozen parameters are left
    out. Each group has its share of the learning rate as "scale".
    """
    layers = 5 if hasattr(encoder, "layer4") else 1 + encoder.depth
    groups = {}
    for prefix, module in (("encoder.", encoder), ("head.", head)):
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            number = re.match(r"blocks\.(\d+)\.|layer(\d)\.", name)
            layer = layers if prefix == "head." or name.startswith("norm.") else 0
            if prefix == "encoder." and number:
                layer = int(number[1]) + 1 if number[1] else int(number[2])
            decayed = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
            group = groups.setdefault((layer, decayed), {"params": [], "scale": decay ** (layers - layer), "weight_decay": weight_decay * decayed})
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
