"""Mixup, cutmix and label smoothing with timm's semantics, keyed by (seed, step, lane).

Samples are mixed with their neighbour, (0, 1), (2, 3), …, inside a lane's share of a batch. A lane's share is even
and belongs to one rank, and micro-batches are even, so the same two images meet on every world size.

Shapes: L lanes, N samples of a micro-batch, K classes, H × W pixels.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline import keys
from pipeline.config import MixConfig
from pipeline.feed.transfer import to_device

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Blends:
    """How to mix each of n lanes or samples. Mixup has an empty box; cutmix has a pixel weight of 1."""

    # [n] float32: weights of a sample's own pixels outside the box.
    pixel_weight: Array
    # [n, 4] int64: top, bottom, left, right of the box in which all pixels are the partner's.
    box: Array
    # [n] float32: weights of a sample's own label.
    label_weight: Array

    def __getitem__(self, index: Any) -> "Blends":
        return Blends(
            self.pixel_weight[index],
            self.box[index],
            self.label_weight[index],
        )


class _Blend(NamedTuple):
    """How to mix one lane, as in Blends. By default nothing is mixed."""

    pixel_weight: float = 1.0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    label_weight: float = 1.0


def draw(
    config: MixConfig,
    key: keys.Key,
    height: int,
    width: int,
) -> Blends:
    """Returns one blend for each lane, `key` [L, 2], drawn as timm's Mixup draws for a batch."""
    blends = []
    for lane_key in key:
        rng = keys.generator(lane_key)
        blends.append(_draw_blend(config, rng, height, width))
    pixel_weights, boxes, label_weights = zip(*blends, strict=True)
    return Blends(
        np.array(pixel_weights, np.float32),
        np.array(boxes, np.int64),
        np.array(label_weights, np.float32),
    )


def _draw_blend(
    config: MixConfig,
    rng: np.random.Generator,
    height: int,
    width: int,
) -> _Blend:
    # The order of the draws is timm's.
    if rng.random() >= config.prob:
        return _Blend()
    is_cutmix = config.cutmix_alpha > 0
    if is_cutmix and config.mixup_alpha > 0:
        is_cutmix = rng.random() < config.switch_prob
    alpha = config.cutmix_alpha if is_cutmix else config.mixup_alpha
    weight = float(rng.beta(alpha, alpha))
    if not is_cutmix:
        return _Blend(pixel_weight=weight, label_weight=weight)
    side = np.sqrt(1 - weight)
    top, bottom = _draw_span(rng, height, int(height * side))
    left, right = _draw_span(rng, width, int(width * side))
    # The label follows the area that is left after clipping at the border.
    area = (bottom - top) * (right - left)
    return _Blend(
        box=(top, bottom, left, right),
        label_weight=1 - area / (height * width),
    )


def _draw_span(
    rng: np.random.Generator,
    size: int,
    length: int,
) -> tuple[int, int]:
    """Returns start and end of a span of `length` about a uniform centre, clipped to the image."""
    centre = int(rng.integers(size))
    start = max(centre - length // 2, 0)
    end = min(centre + (length + 1) // 2, size)
    return start, end


def mix_images(images: Tensor, blends: Blends) -> Tensor:
    """Mixes each pair of neighbours, [N, 3, H, W], with each sample's blend, [N]."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    box, pixel_weight = to_device([blends.box, blends.pixel_weight], images.device)
    top, bottom, left, right = box[:, :, None].unbind(1)  # each [N, 1]
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    is_inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    weight = torch.where(is_inside, 0.0, pixel_weight[:, None, None, None])
    return images * weight + _swap_neighbours(images) * (1 - weight)


def mix_targets(targets: Tensor, blends: Blends) -> Tensor:
    """Mixes the targets of neighbours, [N, K], with each sample's blend, [N]."""
    (weight,) = to_device([blends.label_weight[:, None]], targets.device)
    return targets * weight + _swap_neighbours(targets) * (1 - weight)


def _swap_neighbours(tensor: Tensor) -> Tensor:
    pairs = tensor.unflatten(0, (-1, 2))
    return pairs.flip(1).flatten(0, 1)


def soft_targets(
    labels: Tensor,
    num_classes: int,
    smoothing: float,
) -> Tensor:
    """Returns smoothed one-hot rows, [N] to [N, K] float32: smoothing / K everywhere and 1 - smoothing more on the
    label."""
    shape = len(labels), num_classes
    targets = torch.full(
        shape,
        smoothing / num_classes,
        device=labels.device,
    )
    rows = torch.arange(len(labels), device=labels.device)
    targets[rows, labels] += 1 - smoothing
    return targets
