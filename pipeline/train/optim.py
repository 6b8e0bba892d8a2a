"""Optimiser groups and the learning rate, both plain functions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from pipeline.config import Optim


def parameter_groups(
    model: nn.Module, settings: Optim, depths: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups. Weights are decayed; biases, norms and what the model names itself are not.

    With `optim.layer_decay` d, a group n layers below the top has an "lr_scale" of dⁿ (Clark et al., "ELECTRA", 2020).
    `optim.backbone_lr` multiplies the backbone's. `depths` are the layers of the backbone's parameters by name; all
    others are the head's, which is the top.
    """
    named = getattr(model, "no_weight_decay", set)()
    top = max((depths or {}).values(), default=0)
    if depths and any(name not in depths for name, _ in trainable(model)):
        top += 1
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainable(model):
        weight_decay = 0.0 if parameter.ndim <= 1 or name in named else settings.weight_decay
        below = top - (depths or {}).get(name, top)
        scale = 1.0 if settings.layer_decay is None else settings.layer_decay**below
        if name in (depths or {}):
            scale *= settings.backbone_lr
        group = {"params": [], "weight_decay": weight_decay, "lr_scale": scale}
        groups.setdefault((weight_decay, scale), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def lr_at(step: int, settings: Optim, *, warmup_steps: int, total_steps: int, milestones: Sequence[int] = ()) -> float:
    """Linear warm-up from `warmup_lr` to `lr`, then down to `min_lr` at the end: along half a cosine (Loshchilov and
    Hutter, "SGDR", 2017), or a power of what is left (Chen et al., "DeepLab", 2017); or by the factor `gamma` at each
    milestone, a step. A pure function of the step, so there is no scheduler to save."""
    if step < warmup_steps:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * step / warmup_steps
    if settings.schedule == "steps":
        return settings.lr * settings.gamma ** sum(step >= milestone for milestone in milestones)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    left = (1 - progress) ** settings.power if settings.schedule == "poly" else (1 + math.cos(math.pi * progress)) / 2
    return settings.min_lr + (settings.lr - settings.min_lr) * left
