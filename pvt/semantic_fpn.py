"""Semantic FPN: a class for each pixel, from the four maps of a backbone.

Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, https://arxiv.org/abs/1901.02446, section 3.2, with
the channels that the PVT paper takes: 256 in the pyramid, 128 in the head.

    image ─ backbone ─▶ maps at strides 4, 8, 16, 32 ─ pyramid ─▶ 256 channels each
      stride  4   convolution             ─┐
      stride  8   convolution, x2         ─┤
      stride 16  (convolution, x2) twice  ─┼─ sum ─ dropout ─ 1x1 convolution ─▶ logits at stride 4
      stride 32  (convolution, x2) thrice ─┘

A convolution of the head is 3x3 to 128 channels with GroupNorm and ReLU; x2 is bilinear. GroupNorm as in the paper of
Semantic FPN, and not the BatchNorm of some later code: what it does to an image does not depend on the others in the
batch, nor on how a batch is shared out to ranks. Both have the same parameters.

Shapes: N images of H x W pixels, K classes.
"""

import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import FeatureInfo
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from pvt.create import create_model
from pvt.model import STRIDES

__all__ = ["SemanticFpn", "backbone", "checkpoint_filter_fn"]

PYRAMID_CHANNELS = 256
NUM_GROUPS = 32  # of the head's GroupNorm
NUM_MAPS = len(STRIDES)
PREFIX = "backbone."  # of its tensors' names


class SemanticFpn(nn.Module):
    """Backbone, feature pyramid and head: images [N, 3, H, W] -> logits [N, K, ceil(H / 4), ceil(W / 4)].

    `backbone` is what this module's function of that name makes: its maps of strides 4, 8, 16, 32 and nothing beyond.
    `channels` of the head, a multiple of 32; `dropout` drops whole channels before its last layer.

    Images of any size: up to the next multiple of `size_divisor` they are padded with zeros at the bottom and right.
    """

    pretrained_cfg = {"classifier": "classifier"}  # where timm's models tell which layer is about the classes

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 128,
        dropout: float = 0.1,
        pyramid_channels: int = PYRAMID_CHANNELS,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        widths = [info["num_chs"] for info in _maps(backbone, type(backbone).__name__)]
        self.pyramid = FeaturePyramidNetwork(widths, pyramid_channels)
        # At least one convolution a level, and one before each doubling.
        self.branches = nn.ModuleList(_branch(pyramid_channels, channels, doublings) for doublings in range(NUM_MAPS))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # pyright: ignore[reportArgumentType] - it has one

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Of the backbone's residual branches, where it takes its masks from outside; else empty."""
        return getattr(self.backbone, "drop_path_rates", ())

    @property
    def size_divisor(self) -> int:
        """Pixels that both sides of the backbone's input are a multiple of."""
        return getattr(self.backbone, "size_divisor", STRIDES[-1])

    def forward(self, images: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """`drop_path`: multipliers [len(drop_path_rates), N], see PyramidVisionTransformer."""
        height, width = images.shape[-2:]
        below, right = -height % self.size_divisor, -width % self.size_divisor
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        masks = {} if drop_path is None else {"drop_path": drop_path}
        maps: list[Tensor] = self._timm.forward_intermediates(
            images, indices=NUM_MAPS, intermediates_only=True, **masks
        )
        logits = self.decode(maps)
        if below or right:
            logits = logits[..., : -(-height // STRIDES[0]), : -(-width // STRIDES[0])]
        return logits

    def decode(self, maps: list[Tensor]) -> Tensor:
        """The backbone's maps, finest first -> logits [N, K, h, w], with h, w of the finest map."""
        levels = self.pyramid({str(stride): level for stride, level in zip(STRIDES, maps, strict=True)}).values()
        merged = [branch(level) for branch, level in zip(self.branches, levels, strict=True)]
        return self.classifier(self.dropout(functools.reduce(torch.add, merged)))

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


def _branch(in_channels: int, channels: int, num_doublings: int) -> nn.Sequential:
    """A level's way in the head: [N, in_channels, h, w] -> [N, channels, h * 2 ** num_doublings, …]."""
    layers: list[nn.Module] = []
    for _ in range(max(1, num_doublings)):
        convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.GroupNorm(NUM_GROUPS, channels), nn.ReLU(inplace=True)]
        if num_doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        in_channels = channels
    return nn.Sequential(*layers)


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
            f"{name} gives maps at strides {strides}, and Semantic FPN needs {needed}: choose a pyramid such as "
            "pvt_small, resnet50 or convnext_tiny"
        )
    return maps[-NUM_MAPS:]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: SemanticFpn) -> dict[str, Any]:
    """A checkpoint of this network, with its backbone's part as the backbone's architecture filters its own."""
    part = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items() if name.startswith(PREFIX)}
    rest = {name: tensor for name, tensor in state_dict.items() if not name.startswith(PREFIX)}
    filter_fn = getattr(sys.modules[type(model.backbone).__module__], "checkpoint_filter_fn", None)
    if filter_fn:
        part = filter_fn(part, model.backbone)
    return {**{f"{PREFIX}{name}": tensor for name, tensor in part.items()}, **rest}
