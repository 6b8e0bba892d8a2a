"""The base of dense networks, which predict something at every position of an image: a backbone with four maps.

image [N, 3, H, W] ─ zeros below and right ─ backbone ─▶ maps at strides 4, 8, 16, 32 ─ the network's head ─▶ …
"""

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.models._features import FeatureInfo
from torch import Tensor, nn

from pvt.create import create_model
from pvt.model import STRIDES

__all__ = [
    "NUM_MAPS",
    "PREFIX",
    "DenseNetwork",
    "backbone",
    "checkpoint_filter_fn",
]

NUM_MAPS = len(STRIDES)

PREFIX = "backbone."
"""Beginning of the names of the backbone's tensors."""


class DenseNetwork(nn.Module):
    """A backbone; subclasses add the head.

    `backbone` comes from this module's function of that name: it has maps of strides 4, 8, 16, 32 and nothing beyond.
    The module of each subclass imports `checkpoint_filter_fn`, because timm looks for it there.
    """

    pretrained_cfg: ClassVar[dict[str, Any]]
    """timm's description of a model, of which "classifier" is needed: the layers that depend on the classes."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone

    @property
    def widths(self) -> list[int]:
        """The channels of the maps, finest first."""
        name = type(self.backbone).__name__
        return [info["num_chs"] for info in _describe_maps(self.backbone, name)]

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """The rates of the backbone's residual branches, where it takes drop-path masks as an input; else empty."""
        return getattr(self.backbone, "drop_path_rates", ())

    @property
    def size_divisor(self) -> int:
        """The number of pixels that both sides of the backbone's input must be a multiple of."""
        return getattr(self.backbone, "size_divisor", STRIDES[-1])

    def maps(self, images: Tensor, drop_path: Tensor | None = None) -> list[Tensor]:
        """Returns the maps [N, widths[i], h / STRIDES[i], w / STRIDES[i]], finest first, of images [N, 3, H, W].

        (h, w) is (H, W) up to the next multiples of `size_divisor`, padded with zeros at the bottom and right.
        `drop_path`: multipliers [len(drop_path_rates), N], see PyramidVisionTransformer.
        """
        height, width = images.shape[-2:]
        below = -height % self.size_divisor
        right = -width % self.size_divisor
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        # Most of timm's models have no such argument.
        masks = {} if drop_path is None else {"drop_path": drop_path}
        return self._timm.forward_intermediates(
            images,
            indices=NUM_MAPS,
            intermediates_only=True,
            **masks,
        )

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters that the backbone exempts from weight decay."""
        exempted = getattr(self.backbone, "no_weight_decay", set)()
        return {f"{PREFIX}{name}" for name in exempted}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the backbone's blocks in the backward pass instead of keeping their activations."""
        self._timm.set_grad_checkpointing(enable)

    @property
    def _timm(self) -> Any:
        """The backbone, typed so that timm's methods can be called."""
        return self.backbone


def backbone(
    name: str,
    image_size: int,
    drop_path_rate: float = 0.0,
    **kwargs: Any,
) -> nn.Module:
    """Returns a timm model with its maps of strides 4, 8, 16, 32 alone, without head and other layers after the maps.

    `image_size` (pixels) is for models that are built for one size, such as those with position embeddings. Raises
    ValueError for a model without such maps and for a size that it does not take.
    """
    network = create_model(
        name,
        image_size,
        num_classes=0,
        # timm passes on no None, and some models have no such argument.
        drop_path_rate=drop_path_rate or None,
        **kwargs,
    )
    # Before pruning, which fails in ways of its own for a model without these maps.
    _describe_maps(network, name)
    network.prune_intermediate_layers(NUM_MAPS, prune_norm=True, prune_head=True)
    return network


def _describe_maps(network: Any, name: str) -> list[dict[str, Any]]:
    """Returns timm's description of the last four maps. Raises ValueError unless their strides are 4, 8, 16, 32."""
    maps = getattr(network, "feature_info", [])
    if isinstance(maps, FeatureInfo):
        maps = maps.info
    # More maps may come before the last four, as those of a stem at stride 2.
    strides = [entry["reduction"] for entry in maps]
    needed = list(STRIDES)
    if strides[-NUM_MAPS:] != needed or not hasattr(network, "forward_intermediates"):
        raise ValueError(
            f"{name} gives maps at strides {strides}, and this task needs {needed}: choose a pyramid such as "
            "pvt_small, resnet50 or convnext_tiny"
        )
    return list(maps[-NUM_MAPS:])


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: DenseNetwork) -> dict[str, Any]:
    """Returns a checkpoint of this network whose backbone has gone through the filter of its own architecture."""
    of_backbone: dict[str, Any] = {}
    of_head: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        if name.startswith(PREFIX):
            of_backbone[name.removeprefix(PREFIX)] = tensor
        else:
            of_head[name] = tensor
    # timm's architectures define such a function in their module.
    filter_fn = getattr(sys.modules[type(model.backbone).__module__], "checkpoint_filter_fn", None)
    if filter_fn:
        of_backbone = filter_fn(of_backbone, model.backbone)
    filtered = {f"{PREFIX}{name}": tensor for name, tensor in of_backbone.items()}
    return {**filtered, **of_head}
