"""A batch of noise, for benchmarks of the engine that need no data."""

import dataclasses

import numpy as np
import torch

from pipeline.feed.loader import MicroBatch
from pipeline.feed.order import Samples


def batch(num_images: int, size_px: int, num_classes: int, device: torch.device) -> MicroBatch:
    """Returns images [N, 3, size, size] with soft labels [N, K], each of weight 1, without drop-path masks."""
    return MicroBatch(
        images=torch.randn(num_images, 3, size_px, size_px, device=device),
        extents=[(size_px, size_px)] * num_images,
        targets=torch.softmax(torch.randn(num_images, num_classes, device=device), dim=-1),
        weights=torch.ones(num_images, device=device),
        drop_path=None,
        samples=Samples(*[np.arange(num_images)] * len(dataclasses.fields(Samples))),
    )
