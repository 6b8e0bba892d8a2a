"""Semantic FPN: a class for each pixel, from the four maps of a backbone.

Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, https://arxiv.org/abs/1901.02446, section 3.2, with
the widths of the PVT paper: 256 channels in the pyramid, 128 in the head.

    image ─ backbone ─▶ maps at strides 4, 8, 16, 32 ─ pyramid ─▶ 256 channels each
      stride  4   convolution             ─┐
      stride  8   convolution, x2         ─┤
      stride 16  (convolution, x2) twice  ─┼─ sum ─ dropout ─ 1x1 convolution ─▶ logits at stride 4
      stride 32  (convolution, x2) thrice ─┘

A convolution of the head is 3x3 to 128 channels with GroupNorm and ReLU; x2 is bilinear. GroupNorm is that of the
paper; some later code has BatchNorm, with the same parameters. GroupNorm's result for an image depends neither on the
other images in the batch nor on how a batch is partitioned over ranks.

Shapes: N images of H x W pixels, K classes.
"""

import functools

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from pvt.dense import NUM_MAPS, PREFIX, DenseNetwork, backbone, checkpoint_filter_fn
from pvt.model import STRIDES

__all__ = ["PREFIX", "SemanticFpn", "backbone", "checkpoint_filter_fn"]

PYRAMID_CHANNELS = 256

NUM_GROUPS = 32
"""Groups of the head's GroupNorm."""


class SemanticFpn(DenseNetwork):
    """Backbone, feature pyramid and head: images [N, 3, H, W] -> logits [N, K, ceil(H / 4), ceil(W / 4)].

    `channels` is the head's width, a multiple of 32; `dropout` drops whole channels before its last layer.

    Images have any size. They are padded with zeros at the bottom and right, to the next multiple of `size_divisor`.
    """

    pretrained_cfg = {"classifier": "classifier"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 128,
        dropout: float = 0.1,
        pyramid_channels: int = PYRAMID_CHANNELS,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.pyramid = FeaturePyramidNetwork(self.widths, pyramid_channels)
        # At least one convolution a level, and one before each doubling.
        self.branches = nn.ModuleList(
            _build_branch(pyramid_channels, channels, num_doublings) for num_doublings in range(NUM_MAPS)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        # Small weights, so that training starts from nearly equal probabilities.
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # pyright: ignore[reportArgumentType] - it has one

    def forward(self, images: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Returns logits [N, K, ceil(H / 4), ceil(W / 4)]. `drop_path`: see DenseNetwork.maps."""
        logits = self.decode(self.maps(images, drop_path))
        height, width = (-(-side // STRIDES[0]) for side in images.shape[-2:])
        # Without padding there is nothing to cut, and no slice in an exported graph.
        if logits.shape[-2:] == (height, width):
            return logits
        return logits[..., :height, :width]

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Returns logits [N, K, h, w], with h, w of the finest map, from the backbone's maps, finest first."""
        named = {str(stride): level for stride, level in zip(STRIDES, maps, strict=True)}
        levels = self.pyramid(named).values()
        outputs = [branch(level) for branch, level in zip(self.branches, levels, strict=True)]
        merged = functools.reduce(torch.add, outputs)
        return self.classifier(self.dropout(merged))


def _build_branch(in_channels: int, channels: int, num_doublings: int) -> nn.Sequential:
    """Builds the head's layers for one map: [N, in_channels, h, w] -> [N, channels, h * 2 ** num_doublings, …]."""
    layers: list[nn.Module] = []
    for _ in range(max(1, num_doublings)):
        convolution = nn.Conv2d(
            in_channels,
            channels,
            kernel_size=3,
            padding=1,
            bias=False,
        )
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [
            convolution,
            nn.GroupNorm(NUM_GROUPS, channels),
            nn.ReLU(inplace=True),
        ]
        if num_doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        in_channels = channels
    return nn.Sequential(*layers)
