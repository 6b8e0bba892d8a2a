"""One exact evaluation: every sample once, over all ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.feed.loader import EvalFeed
from pipeline.train.seams import Metric
from pipeline.world import World


def evaluate(outputs_of: Callable[[Tensor], Any], batches: EvalFeed, metric: Metric, world: World) -> dict[str, float]:
    """Score a network, given as a function of images, on this rank's batches. Collective; equal on all ranks.

    The result counts the damaged samples that were left out as "bad_samples".
    """
    counted: Any = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        metric.update(outputs_of(batch.images), batch.targets, batch.weights)
        counted = counted + batch.weights.double().sum()
    return {**metric.result(world), "bad_samples": batches.num_samples - int(world.sum(counted))}
