"""Groups of a network's parameters: layers, for layer-wise learning rates, and stages, for freezing.

Both come from the `group_matcher` of timm's models.
"""

import functools
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import InputError

_BEHIND_LAST_STAGE = "(behind the last stage)"
"""No parameter's name: no pattern of timm's matches it, so timm puts it into the group behind the last stage."""


def layers(backbone: nn.Module, prefix: str = "") -> dict[str, int]:
    """Returns the layer of each parameter, by its name after `prefix`: 0 the stem, then one more for each block.

    In a complete classifier, norm and head are the last layer. The head on a pruned backbone is one layer above it.
    Layer-wise decay (Bao et al., "BEiT", 2022) gives layer i of the last one, n, the rate decay ** (n - i).
    """
    groups = _groups(backbone, coarse=False)
    return {f"{prefix}{name}": depth for name, depth in groups.items()}


def stages(backbone: nn.Module, prefix: str = "") -> dict[str, int]:
    """Returns the stage of each parameter, by its name after `prefix`, without the classifier's.

    The stem is in stage 0, what follows the last stage is one beyond it. Some models have a norm that timm counts as
    part of the last stage; it is in that stage.
    """
    pretrained_cfg: Any = getattr(backbone, "pretrained_cfg", {})
    heads = pretrained_cfg.get("classifier") or ()
    if isinstance(heads, str):
        heads = (heads,)
    head_prefixes = tuple(f"{head}." for head in heads)
    # timm's group 0 is the stem, which belongs to the first stage here.
    return {
        f"{prefix}{name}": max(group - 1, 0)
        for name, group in _groups(backbone, coarse=True).items()
        if not name.startswith(head_prefixes)
    }


def freeze(backbone: nn.Module, n: int, *, statistics: bool = False) -> None:
    """Freezes the first `n` stages, or the whole backbone if it has no more. A classifier's head stays trainable.

    Batch norms in frozen stages keep their running statistics; with `statistics` all batch norms do. The names in the
    state dict stay the same.
    """
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)}
    if statistics and not norms:
        raise InputError("model.frozen_statistics: this backbone has no batch norms; remove it")
    freezes_all = n >= num_stages(backbone)
    frozen = {name for name, stage in stages(backbone).items() if stage < n or freezes_all}
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, norm in norms.items():
        if statistics or f"{name}.weight" in frozen:
            _keep_in_evaluation_mode(norm)


def _keep_in_evaluation_mode(module: nn.Module) -> None:
    # timm's FrozenBatchNorm2d has other tensors, so a frozen network's checkpoint would not fit an unfrozen one.
    module.eval()
    # The network's own train() calls this on each of its modules.
    module.train = functools.partial(_ignore_train, module)


def _ignore_train(module: nn.Module, mode: bool = True) -> nn.Module:
    """Takes the place of `module.train`, and changes nothing."""
    return module


def num_stages(backbone: nn.Module) -> int:
    """Returns the number of a backbone's stages. What follows the last one is none."""
    groups = _groups(backbone, _BEHIND_LAST_STAGE, coarse=True)
    return groups[_BEHIND_LAST_STAGE] - 1


def _groups(backbone: Any, *more: str, coarse: bool) -> dict[str, int]:
    """Returns timm's group of each parameter, by name, in the order of execution; also of the names `more`."""
    named = [*backbone.named_parameters(), *((name, None) for name in more)]
    matcher = backbone.group_matcher(coarse=coarse)
    return group_with_matcher(iter(named), matcher, reverse=True)  # pyright: ignore
