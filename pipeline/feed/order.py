"""Which samples make global batch k of epoch e: arithmetic on a few integers, the same on every world.

    epoch e:   shards, permuted, laid end to end, rotated   ·····|·······|···|·······|·····
    lanes:     equal contiguous lengths of that             [ lane 0 ][ lane 1 ][ lane 2 ]  tail
    windows:   inside a lane, permuted                      [w0][w1]…
    batch k:   the next `share` positions of every lane     share = global batch / lanes

A rank serves whole lanes, so it reads about 1/W of the shards, nearly in sequence. The tail, shorter than a batch,
is left out; the rotation differs from epoch to epoch, so that over epochs it falls on all samples alike.

Shapes: B global batch, L lanes, S share.
"""

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from pipeline import keys
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.feed.permute import permute
from pipeline.keys import Stream

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some samples of a global batch, each array [n]."""

    epoch: int
    position: Ints  # in the global batch: 0 … B-1
    shard: Ints
    row: Ints  # in the shard's index
    id: Ints  # in the data set: shards end to end in the manifest's order

    def take(self, places: Ints) -> "Samples":
        return Samples(self.epoch, self.position[places], self.shard[places], self.row[places], self.id[places])


class Order:
    """The order of an endless training run over one data set.

    Raises InputError when an epoch has no whole batch.
    """

    def __init__(
        self, shard_samples: Ints, *, seed: int, global_batch_size: int, lanes: int, shuffle_window: int
    ) -> None:
        self.num_samples = int(shard_samples.sum())
        if self.num_samples < global_batch_size:
            raise InputError(
                f"train.global_batch_size {global_batch_size} exceeds the {self.num_samples} samples of the data set: "
                "an epoch has to hold at least one batch"
            )
        assert global_batch_size % lanes == 0
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.lanes = lanes
        self.share = global_batch_size // lanes
        self.steps_per_epoch = self.num_samples // global_batch_size
        self._window = shuffle_window
        self._lane_length = self.steps_per_epoch * self.share
        self._shard_samples = shard_samples
        self._first_id = np.cumsum(shard_samples) - shard_samples
        # Two epochs: reading ahead crosses into the next one while the last batches are still asked for.
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)

    @classmethod
    def of(cls, config: Config, shard_samples: Ints) -> "Order":
        return cls(
            shard_samples,
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            lanes=config.data.lanes,
            shuffle_window=config.data.shuffle_window,
        )

    def samples(self, step: int, lanes: slice = slice(None)) -> Samples:
        """The samples of optimiser step `step` (counted from 0 over all epochs) in the given lanes, lane by lane."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        lane = np.arange(self.lanes)[lanes, None]  # [L, 1]
        in_lane = batch * self.share + np.arange(self.share)[None, :]  # [1, S]
        window = in_lane // self._window
        first = window * self._window
        length = np.minimum(self._window, self._lane_length - first)
        key = keys.key(self.seed, Stream.WINDOW, epoch, lane, window)
        shuffled = first + permute(in_lane - first, length, key)  # [L, S]

        shards, ends, rotation = self._epoch(epoch)
        place = ((lane * self._lane_length + shuffled + rotation) % self.num_samples).ravel()
        slot = np.searchsorted(ends, place, side="right")
        shard = shards[slot]
        row = place - ends[slot] + self._shard_samples[shard]
        position = (lane * self.share + np.arange(self.share)).ravel()
        return Samples(epoch, position, shard, row, self._first_id[shard] + row)

    def _lay_out(self, epoch: int) -> tuple[Ints, Ints, int]:
        """The epoch's shards in order, where each one ends, and the rotation."""
        count = len(self._shard_samples)
        shards = permute(np.arange(count), count, keys.key(self.seed, Stream.SHARDS, epoch))
        rotation = permute(np.zeros(1, np.int64), self.num_samples, keys.key(self.seed, Stream.ROTATION, epoch))
        return shards, np.cumsum(self._shard_samples[shards]), int(rotation[0])


@dataclasses.dataclass(frozen=True)
class Deal:
    """How one rank's part of every global batch is cut into equal micro-batches.

    Ranks with fewer lanes than others, and the last micro-batch, are filled up with weightless samples, so that all
    ranks take the same number of equal steps.
    """

    lanes: slice
    samples: int  # that weigh, in a global batch
    micro_batch_size: int
    accumulation: int


def deal(order: Order, rank: int, world_size: int, config: Config) -> Deal:
    """Rank's Deal. Raises InputError when there are more ranks than lanes."""
    if world_size > order.lanes:
        raise InputError(
            f"{world_size} ranks but data.lanes is {order.lanes}: a rank needs at least one lane; "
            f"start at most {order.lanes} ranks or raise data.lanes to a divisor of {order.global_batch_size}"
        )
    first, last = (r * order.lanes // world_size for r in (rank, rank + 1))
    most = -(-order.lanes // world_size) * order.share  # samples of any rank
    accumulation = -(-most // (config.train.micro_batch_size or most))
    size = -(-most // accumulation)
    if config.mix.active:
        size += size % 2  # pairs are not cut
    return Deal(slice(first, last), (last - first) * order.share, size, accumulation)


def padding_waste(order: Order, world_size: int, config: Config) -> float:
    """The fraction of computed samples that are weightless on this world."""
    part = deal(order, 0, world_size, config)
    return 1 - order.global_batch_size / (world_size * part.accumulation * part.micro_batch_size)
