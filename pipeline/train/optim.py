"""Optimiser groups and the learning rate, both plain functions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from pipeline.config import OptimConfig


def parameter_groups(
    model: nn.Module, config: OptimConfig, depths: Mapping[str, int] | None = None
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
        weight_decay = 0.0 if parameter.ndim <= 1 or name in named else config.weight_decay
        below = top - (depths or {}).get(name, top)
        scale = 1.0 if config.layer_decay is None else config.layer_decay**below
        if name in (depths or {}):
            scale *= config.backbone_lr
        group = {"params": [], "weight_decay": weight_decay, "lr_scale": scale}
        groups.setdefault((weight_decay, scale), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def lr_at(
    step: int, config: OptimConfig, *, warmup_steps: int, total_steps: int, milestones: Sequence[int] = ()
) -> float:
    """Linear warm-up from `warmup_lr` to `lr`, then down to `min_lr` at the end: along half a cosine (Loshchilov and
    Hutter, "SGDR", 2017), or a power of what is left (Chen et al., "DeepLab", 2017); or by the factor `gamma` at each
    milestone, a step. A pure function of the step, so there is no scheduler to save."""
    if step < warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup_steps
    if config.schedule == "steps":
        return config.lr * config.gamma ** sum(step >= milestone for milestone in milestones)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    left = (1 - progress) ** config.power if config.schedule == "poly" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left
