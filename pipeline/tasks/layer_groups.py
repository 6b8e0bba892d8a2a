"""Where in a network a parameter sits: its layer, for layer-wise learning rates, and its stage, for freezing.

Both come from the `group_matcher` of timm's models.
"""

from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import InputError


def layers(backbone: nn.Module, prefix: str = "") -> dict[str, int]:
    """Parameter name, after `prefix`, -> depth: 0 the stem, then one more for each block.

    In a whole classifier, norm and head are the deepest. The head on a pruned backbone is one deeper than all of it.
    Layer-wise decay (Bao et al., "BEiT", 2022) gives depth i of the deepest, n, the rate decay ** (n - i).
    """
    return {f"{prefix}{name}": depth for name, depth in _groups(backbone, coarse=False).items()}


def stages(backbone: nn.Module, prefix: str = "") -> dict[str, int]:
    """Parameter name, after `prefix`, -> stage: the stem in stage 0, what follows the last stage one beyond it.

    Without the classifier. What timm counts as part of the last stage, as it does the norm of some models, is in it.
    """
    pretrained_cfg: Any = getattr(backbone, "pretrained_cfg", {})
    heads = pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    groups = _groups(backbone, coarse=True)
    return {f"{prefix}{name}": max(group - 1, 0) for name, group in groups.items() if not name.startswith(heads)}


def freeze(backbone: nn.Module, n: int, *, statistics: bool = False) -> None:
    """Keep the first `n` stages as they are, or the whole backbone if it has no more. Its classifier is left free.

    Batch norms among them keep their statistics, too; with `statistics` all do. The names in the state dict stay the
    same.
    """
    norms = [name for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)]
    if statistics and not norms:
        raise InputError("model.frozen_statistics: this backbone has no batch norms; leave it out")
    everything = n >= num_stages(backbone)
    frozen = {name for name, stage in stages(backbone).items() if stage < n or everything}
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in backbone.named_modules():
        if isinstance(module, _BatchNorm) and (statistics or f"{name}.weight" in frozen):
            module.__class__ = type(type(module).__name__, (_InEvaluation, type(module)), {})
            module.eval()


class _InEvaluation(nn.Module):
    """Before a batch norm's own class: it stays in evaluation mode. (timm's FrozenBatchNorm2d has other tensors, so
    that a checkpoint of a frozen network would not fit an unfrozen one.)"""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def num_stages(backbone: nn.Module) -> int:
    """Stages of a backbone, without what follows the last one."""
    return _groups(backbone, coarse=True, more=[(_AFTER, None)])[_AFTER] - 1


_AFTER = "\N{WHITE SQUARE}"  # is no parameter's name, and so, as all that no pattern matches, in the last group


def _groups(backbone: Any, *, coarse: bool, more: Any = ()) -> dict[str, int]:
    """Parameter name -> timm's number of its group, in the order of execution."""
    named = [*backbone.named_parameters(), *more]
    return group_with_matcher(iter(named), backbone.group_matcher(coarse=coarse), reverse=True)  # pyright: ignore
