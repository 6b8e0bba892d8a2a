"""One exact evaluation: every sample once, over all ranks."""

from collections.abc import Callable
from typing import Any

import torch

from pipeline.errors import ExternalError
from pipeline.feed.loader import EvalFeed, MicroBatch
from pipeline.train.protocols import Metric
from pipeline.world import World


def evaluate(
    outputs_of: Callable[[MicroBatch], Any],
    batches: EvalFeed,
    metric: Metric,
    world: World,
    *,
    give_up: Callable[[], bool] = lambda: False,
    collective_outputs: bool = False,
) -> dict[str, float] | None:
    """Score a network, given as a function of batches, on this rank's batches. Collective; equal on all ranks.

    `collective_outputs`: calling `outputs_of` takes all ranks, as at ZeRO stage 3.

    The result counts the damaged samples that were left out as "bad_samples". It is None if `give_up`, asked before
    each batch, was true on any rank. Raises ExternalError on all ranks if one could not read its samples.
    """
    counted: Any = torch.zeros((), dtype=torch.float64, device=world.device)
    done, gave_up, trouble = 0, False, None
    try:
        for batch in batches:
            if gave_up := give_up():
                break
            metric.update(outputs_of(batch), batch.targets, batch.weights)
            counted = counted + batch.weights.double().sum()
            done += 1
    except ExternalError as error:
        trouble = error
    for _ in range(batches.num_batches - done if collective_outputs else 0):
        outputs_of(batches.blank())
    ended = torch.tensor([gave_up, trouble is not None], dtype=torch.float64, device=world.device)
    anybody_gave_up, anybody_in_trouble = world.sum(ended).tolist()
    if anybody_in_trouble:
        raise trouble or ExternalError("another rank could not read its samples: it says more above")
    if anybody_gave_up:
        return None
    return {**metric.result(world), "bad_samples": batches.num_samples - int(world.sum(counted))}
