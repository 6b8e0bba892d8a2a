"""One exact evaluation: every sample once, over all ranks."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from pipeline.feed.loader import MicroBatch
from pipeline.train.seams import Metric
from pipeline.world import World


def evaluate(
    outputs_of: Callable[[Tensor], Any], batches: Iterable[MicroBatch], metric: Metric, world: World
) -> dict[str, float]:
    """Score a network, given as a function of images, on this rank's batches. Collective; equal on all ranks."""
    for batch in batches:
        metric.update(outputs_of(batch.images), batch.targets, batch.weights)
    return metric.result(world)
