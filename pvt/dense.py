"""What networks with an output for every place of an image share: a backbone's four maps.

image [N, 3, H, W] ─ zeros below and right ─ backbone ─▶ maps at strides 4, 8, 16, 32 ─ the network's own ─▶ …
"""

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.models._features import FeatureInfo
from torch import Tensor, nn

from pvt.create import create_model
from pvt.model import STRIDES

__all__ = ["NUM_MAPS", "PREFIX", "DenseNetwork", "backbone", "checkpoint_filter_fn"]

NUM_MAPS = len(STRIDES)
PREFIX = "backbone."  # of its tensors' names


class DenseNetwork(nn.Module):
    """A backbone, and what a network makes of its maps.

    `backbone` is what this module's function of that name makes: its maps of strides 4, 8, 16, 32 and nothing beyond.
    A network's module has the name `checkpoint_filter_fn`, too, for those who look for it there, as timm does.
    """

    pretrained_cfg: ClassVar[dict[str, Any]]
    """Where timm's models tell which layers ("classifier") are about the classes."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone

    @property
    def widths(self) -> list[int]:
        """Channels of the maps, finest first."""
        return [info["num_chs"] for info in _maps(self.backbone, type(self.backbone).__name__)]

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Of the backbone's residual branches, where it takes its masks from outside; else empty."""
        return getattr(self.backbone, "drop_path_rates", ())

    @property
    def size_divisor(self) -> int:
        """Pixels that both sides of the backbone's input are a multiple of."""
        return getattr(self.backbone, "size_divisor", STRIDES[-1])

    def maps(self, images: Tensor, drop_path: Tensor | None = None) -> list[Tensor]:
        """Images [N, 3, H, W] of any size -> maps [N, widths[i], h / STRIDES[i], w / STRIDES[i]], finest first.

        (h, w) is (H, W) up to the next multiples of `size_divisor`, padded with zeros at the bottom and right.
        `drop_path`: multipliers [len(drop_path_rates), N], see PyramidVisionTransformer.
        """
        height, width = images.shape[-2:]
        below, right = -height % self.size_divisor, -width % self.size_divisor
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        masks = {} if drop_path is None else {"drop_path": drop_path}
        return self._timm.forward_intermediates(images, indices=NUM_MAPS, intermediates_only=True, **masks)

    def no_weight_decay(self) -> set[str]:
        """The backbone's choice."""
        return {f"{PREFIX}{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        self._timm.set_grad_checkpointing(enable)

    @property
    def _timm(self) -> Any:
        """The backbone, for timm's methods, which type checkers do not know of a module."""
        return self.backbone


def backbone(name: str, image_size: int, drop_path_rate: float = 0.0, **kwargs: Any) -> nn.Module:
    """A timm model for its maps of strides 4, 8, 16, 32 alone: without head, and without what comes after the maps.

    `image_size` (pixels) is for models that are built for one, as by position embeddings. Raises ValueError for a
    model without such maps and a size that it does not take.
    """
    # None is what timm leaves out: some models know no drop path.
    network = create_model(name, image_size, num_classes=0, drop_path_rate=drop_path_rate or None, **kwargs)
    _maps(network, name)
    network.prune_intermediate_layers(NUM_MAPS, prune_norm=True, prune_head=True)
    return network


def _maps(network: Any, name: str) -> list[dict[str, Any]]:
    """timm's description of the last four maps. Raises ValueError unless these are at strides 4, 8, 16, 32."""
    info = getattr(network, "feature_info", [])
    maps = list(info.info if isinstance(info, FeatureInfo) else info)
    strides = [entry["reduction"] for entry in maps]
    needed = list(STRIDES)
    if strides[-NUM_MAPS:] != needed or not hasattr(network, "forward_intermediates"):
        raise ValueError(
            f"{name} gives maps at strides {strides}, and this task needs {needed}: choose a pyramid such as "
            "pvt_small, resnet50 or convnext_tiny"
        )
    return maps[-NUM_MAPS:]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: DenseNetwork) -> dict[str, Any]:
    """A checkpoint of this network, with its backbone's part as the backbone's architecture filters its own."""
    part = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items() if name.startswith(PREFIX)}
    rest = {name: tensor for name, tensor in state_dict.items() if not name.startswith(PREFIX)}
    filter_fn = getattr(sys.modules[type(model.backbone).__module__], "checkpoint_filter_fn", None)
    if filter_fn:
        part = filter_fn(part, model.backbone)
    return {**{f"{PREFIX}{name}": tensor for name, tensor in part.items()}, **rest}
