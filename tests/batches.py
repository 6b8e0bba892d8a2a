"""Batches that come from no feed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.feed.loader import MicroBatch
from pipeline.feed.order import Samples


def batch_of(
    images: Tensor, targets: Any = None, drop_path: Tensor | None = None, weights: Tensor | None = None
) -> MicroBatch:
    """Of images [N, 3, H, W] without padding, each of which counts."""
    n, (height, width) = len(images), images.shape[-2:]
    number = np.arange(n)
    samples = Samples(number, number, number, number, number, number)
    weights = torch.ones(n) if weights is None else weights
    return MicroBatch(images, [(height, width)] * n, targets, weights, drop_path, samples)
