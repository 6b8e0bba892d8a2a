"""Optimiser groups and the learning rate, both plain functions."""

import math
from collections.abc import Iterator
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: decayed weights, and those left alone: biases, norms and what the model names itself."""
    named = getattr(model, "no_weight_decay", set)()
    decayed, plain = [], []
    for name, parameter in trainable(model):
        (plain if parameter.ndim <= 1 or name in named else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def lr_at(step: int, *, peak: float, floor: float, start: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from `start` to `peak`, then half a cosine down to `floor` at the end (Loshchilov and Hutter,
    "SGDR", 2017). A pure function of the step, so there is no scheduler to save."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
