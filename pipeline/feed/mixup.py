"""Mixup, cutmix and label smoothing with timm's semantics, keyed by (seed, step, lane).

Samples are mixed with their neighbour, (0, 1), (2, 3), …, inside a lane's share of a batch. A lane's share is even
and belongs to one rank, and micro-batches are even, so the same two images meet on every world.

Shapes: L lanes, N samples of a micro-batch, K classes, H × W pixels.
"""

import dataclasses
from typing import Any

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
    """How to mix, for each of n lanes or samples. Mixup has an empty box; cutmix has a pixel weight of 1."""

    pixel_weight: Array  # [n] float32, of a sample's own pixels outside the box
    box: Array  # [n, 4] int64: top, bottom, left, right of what is the partner's alone
    label_weight: Array  # [n] float32, of a sample's own label

    def __getitem__(self, index: Any) -> "Blends":
        return Blends(self.pixel_weight[index], self.box[index], self.label_weight[index])


def draw(config: MixConfig, key: keys.Key, height: int, width: int) -> Blends:
    """One blend for each lane, `key` [L, 2], drawn as timm's Mixup draws for a batch."""
    lanes = [_draw(config, keys.generator(lane_key), height, width) for lane_key in key]
    pixel_weight, box, label_weight = zip(*lanes, strict=True)
    return Blends(np.array(pixel_weight, np.float32), np.array(box, np.int64), np.array(label_weight, np.float32))


def _draw(
    config: MixConfig, rng: np.random.Generator, height: int, width: int
) -> tuple[float, tuple[int, int, int, int], float]:
    nowhere = 0, 0, 0, 0
    if rng.random() >= config.prob:
        return 1.0, nowhere, 1.0
    both = config.mixup_alpha > 0 and config.cutmix_alpha > 0
    cutmix = rng.random() < config.switch_prob if both else config.cutmix_alpha > 0
    alpha = config.cutmix_alpha if cutmix else config.mixup_alpha
    weight = float(rng.beta(alpha, alpha))
    if not cutmix:
        return weight, nowhere, weight
    side = np.sqrt(1 - weight)
    top, bottom = _span(rng, height, int(height * side))
    left, right = _span(rng, width, int(width * side))
    # The label follows the area that is left after clipping at the border.
    return 1.0, (top, bottom, left, right), 1 - (bottom - top) * (right - left) / (height * width)


def _span(rng: np.random.Generator, size: int, length: int) -> tuple[int, int]:
    """A stretch of `length` about a uniform centre, clipped to the image."""
    centre = int(rng.integers(size))
    return max(centre - length // 2, 0), min(centre + (length + 1) // 2, size)


def mix_images(images: Tensor, blends: Blends) -> Tensor:
    """Mix each pair of neighbours, [N, 3, H, W], with each sample's blend, [N]."""
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    box, pixel_weight = to_device([blends.box, blends.pixel_weight], images.device)
    top, bottom, left, right = box.unbind(1)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    weight = torch.where(inside, 0.0, pixel_weight[:, None, None, None])
    return images * weight + _partner(images) * (1 - weight)


def mix_targets(targets: Tensor, blends: Blends) -> Tensor:
    """Mix the targets of neighbours, [N, K], with each sample's blend, [N]."""
    (weight,) = to_device([blends.label_weight[:, None]], targets.device)
    return targets * weight + _partner(targets) * (1 - weight)


def _partner(tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Smoothed one-hot rows, [N] to [N, K] float32: smoothing / K everywhere and 1 - smoothing more on the label."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    rows = torch.arange(len(labels), device=labels.device)
    targets[rows, labels] += 1 - smoothing
    return targets
