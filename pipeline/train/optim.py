"""AdamW's parameter groups."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pipeline.config import OptimConfig


def parameter_groups(
    model: nn.Module, config: OptimConfig, depths: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Returns AdamW's groups. Weights are decayed; biases, norms and what the model names itself are not.

    With `optim.layer_decay` d, a group n layers below the top has an "lr_scale" of dⁿ (Clark et al., "ELECTRA", 2020).
    `optim.backbone_lr` multiplies the backbone's. `depths` are the layers of the backbone's parameters by name; all
    others are the head's, which is the top.
    """
    depths = depths or {}
    parameters = dict(trainable(model))
    # timm's models name parameters that are not to be decayed.
    undecayed = getattr(model, "no_weight_decay", tuple)()
    top = max(depths.values(), default=0)
    if depths and not parameters.keys() <= depths.keys():
        top += 1
    groups = collections.defaultdict[tuple[float, float], list[nn.Parameter]](list)
    for name, parameter in parameters.items():
        weight_decay = config.weight_decay
        if parameter.ndim <= 1 or name in undecayed:
            weight_decay = 0.0
        scale = 1.0
        if config.layer_decay is not None:
            num_below = top - depths.get(name, top)
            scale = config.layer_decay**num_below
        if name in depths:
            scale *= config.backbone_lr
        groups[weight_decay, scale].append(parameter)
    result = []
    for weight_decay, scale in sorted(groups, reverse=True):
        parameters_of_group = groups[weight_decay, scale]
        result.append({"params": parameters_of_group, "weight_decay": weight_decay, "lr_scale": scale})
    return result


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Returns the parameters that are not frozen, with their names."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
