"""One exact evaluation: every sample counts once, over all ranks."""

from collections.abc import Callable
from typing import Any

import torch

from pipeline.errors import ExternalError
from pipeline.feed.loader import EvalFeed, MicroBatch
from pipeline.protocols import Metric
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
    """Scores a network, given as a function of batches, on this rank's batches. Collective; equal on all ranks.

    `collective_outputs` says that all ranks have to call `outputs_of` together, as at ZeRO stage 3.

    The result counts the damaged samples that were skipped as "bad_samples". It is None if `give_up`, called before
    each batch, was true on any rank. Raises ExternalError on all ranks if one could not read its samples.
    """
    counted: Any = torch.zeros((), dtype=torch.float64, device=world.device)
    done, gave_up, failure = 0, False, None
    try:
        for batch in batches:
            gave_up = give_up()
            if gave_up:
                break
            metric.update(outputs_of(batch), batch.targets, batch.weights)
            counted = counted + batch.weights.double().sum()
            done += 1
    except ExternalError as error:
        failure = error
    if collective_outputs:
        # The other ranks need this one for all of their batches.
        for _ in range(batches.num_batches - done):
            outputs_of(batches.blank())
    votes = torch.tensor([gave_up, failure is not None], dtype=torch.float64, device=world.device)
    num_gave_up, num_failed = world.sum(votes).tolist()
    if num_failed:
        raise failure or ExternalError("another rank could not read its samples: see that rank's log")
    if num_gave_up:
        return None
    scores = metric.result(world)
    return {**scores, "bad_samples": batches.num_samples - int(world.sum(counted))}
