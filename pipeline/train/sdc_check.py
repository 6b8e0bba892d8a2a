"""Looking for silent corruption: hardware that computes or keeps wrong bits without an error.

One micro-batch's loss and gradients are computed twice, on each rank alone, and must have the same bits; and the
parameters, of which data-parallel ranks hold copies, must have the same bits on all of them. Both presuppose
deterministic kernels.
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
    """Compare, collectively. Raises CorruptionError on all ranks, which names the ranks at fault."""
    first, second = (checksums(engine.gradients(batch, step=step, micro=0)) for _ in range(2))
    differs = (first != second).any().long()
    # At stage 3 no rank holds what another holds.
    copies = checksums(engine.local_weights()) if engine.keeps_copies else first.new_zeros(len(engine.local_weights()))
    gathered = world.gather(torch.cat([differs[None], copies]))
    faults = _replay_faults(gathered[:, 0].tolist()) + _copy_faults(
        gathered[:, 1:].tolist(), list(engine.local_weights())
    )
    if faults:
        raise CorruptionError(
            f"silent corruption at step {step}: {'; '.join(faults)}. Nothing was saved: take that rank's hardware out "
            "of use and start the same command again, which goes on from the newest checkpoint"
        )


def checksums(tensors: dict[str, Tensor]) -> Tensor:
    """Of each tensor the sum of its 32-bit words, [n] int64: no single flipped bit leaves it as it was."""
    return torch.stack([t.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for t in tensors.values()])


def _replay_faults(differs: list[int]) -> list[str]:
    return [
        f"rank {rank} computed other gradients from the same batch the second time"
        for rank, other in enumerate(differs)
        if other
    ]


def _copy_faults(rows: list[list[int]], names: list[str]) -> list[str]:
    """Which ranks' copies are not what most ranks hold; with two opinions of equal weight, all of them."""
    groups = Counter(tuple(row) for row in rows)
    if len(groups) == 1:
        return []
    (common, votes), (_, next_votes), *_ = groups.most_common(2)
    tied = votes == next_votes
    odd = [rank for rank, row in enumerate(rows) if tied or tuple(row) != common]
    reference = rows[0] if tied else list(common)
    where = next(
        name for row in rows if row != reference for name, a, b in zip(names, row, reference, strict=True) if a != b
    )
    listed = ", ".join(map(str, odd))
    if tied:
        return [f"ranks {listed} hold different values of {where}, and nothing tells which of them are right"]
    return [f"rank {listed} holds other values of {where} than most ranks"]
