"""The check for silent data corruption: hardware that computes or stores wrong bits without an error.

One micro-batch's loss and gradients are computed twice, on each rank alone, and must have the same bits; and the
parameters, of which data-parallel ranks hold copies, must have the same bits on all of them. Both need deterministic
kernels.
"""

from collections import Counter

import torch
from torch import Tensor

from pipeline.errors import ExternalError
from pipeline.feed.loader import MicroBatch
from pipeline.train.engine import Engine
from pipeline.world import World


class CorruptionError(ExternalError):
    """A rank computed or holds wrong bits."""


def check_for_corruption(engine: Engine, batch: MicroBatch, step: int, world: World) -> None:
    """Compares all ranks' results. Collective. Raises CorruptionError on all ranks, which names the ranks at fault."""
    first = checksums(engine.gradients(batch, step=step, micro=0))
    second = checksums(engine.gradients(batch, step=step, micro=0))
    differs = (first != second).any().long()
    weights = engine.local_weights()
    # At stage 3 no rank holds what another holds.
    copies = checksums(weights) if engine.keeps_copies else first.new_zeros(len(weights))
    # All ranks get all results, so all raise alike.
    gathered = world.gather(torch.cat([differs[None], copies]))
    replays = gathered[:, 0].tolist()
    checksums_by_rank = gathered[:, 1:].tolist()
    faults = _find_replay_faults(replays)
    faults += _find_copy_faults(checksums_by_rank, list(weights))
    if faults:
        raise CorruptionError(
            f"silent corruption at step {step}: {'; '.join(faults)}. Nothing was saved: take that rank's hardware out "
            "of use and start the same command again, which goes on from the newest checkpoint"
        )


def checksums(tensors: dict[str, Tensor]) -> Tensor:
    """Returns the sum of each tensor's 32-bit words, [n] int64: a single flipped bit always changes it."""
    sums = []
    for tensor in tensors.values():
        words = tensor.detach().contiguous().view(torch.int32)
        sums.append(words.sum(dtype=torch.int64))
    return torch.stack(sums)


def _find_replay_faults(differs: list[int]) -> list[str]:
    faults = []
    for rank, other in enumerate(differs):
        if other:
            faults.append(f"rank {rank} computed other gradients from the same batch the second time")
    return faults


def _find_copy_faults(rows: list[list[int]], names: list[str]) -> list[str]:
    """Names the ranks whose copies differ from those of most ranks, or all ranks where there is no majority.

    `rows` has a list of checksums for each rank, in the order of `names`.
    """
    groups = Counter(tuple(row) for row in rows)
    if len(groups) == 1:
        return []
    (common, votes), (_, next_votes), *_ = groups.most_common(2)
    tied = votes == next_votes
    reference = rows[0] if tied else list(common)
    odd = [rank for rank, row in enumerate(rows) if tied or row != reference]
    where = _find_difference(rows, reference, names)
    listed = ", ".join(map(str, odd))
    if tied:
        return [f"ranks {listed} hold different values of {where}, and nothing shows which of them are right"]
    return [f"rank {listed} holds other values of {where} than most ranks"]


def _find_difference(rows: list[list[int]], reference: list[int], names: list[str]) -> str:
    """Returns the first name for which the first row that differs from the reference does so."""
    row = next(row for row in rows if row != reference)
    for name, ours, theirs in zip(names, row, reference, strict=True):
        if ours != theirs:
            return name
    raise AssertionError("the rows differ")
