"""Which samples make global batch k: arithmetic on a few integers, the same on every world.

    data set, epoch e:  shards, permuted, laid end to end, rotated   ·····|·······|···|·······|·····
    lanes:              equal contiguous lengths of that             [ lane 0 ][ lane 1 ][ lane 2 ]  tail
    windows:            inside a lane, permuted                      [w0][w1]…
    draws:              the lane's samples, epoch after epoch        0 1 2 3 …
    batch k:            the next draws of every lane

A rank serves whole lanes, so it reads about 1/W of the shards, nearly in sequence. The tail, shorter than a batch,
is left out; the rotation differs from epoch to epoch, so that over epochs it falls on all samples alike.

Several data sets are mixed lane by lane: a shuffled pattern of 4,096 draws, in which each data set has as many as
its weight says, is repeated from a place of the lane's own. With repeated augmentation a lane's share of a batch
holds each of its draws `copies` times.

Shapes: B global batch, L lanes, S share = B / L, D distinct draws of a share = S / copies, rounded up.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline import keys
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.feed.permutation import permute
from pipeline.keys import Stream

Ints = npt.NDArray[np.int64]

_PATTERN = 4096


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some samples of a global batch, each array [n]."""

    position: Ints  # in the global batch: 0 … B-1
    epoch: Ints  # of the sample's data set
    copy: Ints  # of the sample in its batch: 0 … copies-1
    shard: Ints
    row: Ints  # in the shard's index
    id: Ints  # over all data sets: shards end to end

    def take(self, places: npt.ArrayLike | slice) -> "Samples":
        return Samples(**{field.name: getattr(self, field.name)[places] for field in dataclasses.fields(self)})

    @classmethod
    def joined(cls, samples: "Sequence[Samples]") -> "Samples":
        """Returns all of them, one behind the other."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(each, name) for each in samples]) for name in names})


class Lanes:
    """One data set's endless sequence of draws in each lane.

    An epoch of a lane is `length` draws. `number` keeps the data sets of a mixture independent of each other.
    """

    def __init__(self, shard_samples: Ints, *, seed: int, number: int, lanes: int, length: int, window: int) -> None:
        self.num_samples = int(shard_samples.sum())
        self.length = length
        self.window = window
        self._windows = -(-length // window)  # of a lane's epoch
        self._num_lanes = lanes
        self._shard_samples = shard_samples
        self._shards_key, self._rotation_key, self._window_key = (
            keys.key(seed, stream, number) for stream in (Stream.SHARDS, Stream.ROTATION, Stream.WINDOW)
        )
        # Reading ahead crosses into the next epoch while the last batches are still asked for.
        self._epoch = functools.lru_cache(maxsize=4)(self._lay_out)

    def locate(self, lane: Ints, draw: Ints) -> tuple[Ints, Ints, Ints]:
        """Epoch, shard and row, each [n], of the given draws [n] of lanes [n]."""
        epoch, in_lane = np.divmod(draw, self.length)
        window = in_lane // self.window
        first = window * self.window
        size = np.minimum(self.window, self.length - first)
        # A window's number over all lanes and epochs. A batch touches few, so that few keys are made.
        number = (epoch * self._num_lanes + lane) * self._windows + window
        numbers, of_draw = np.unique(number, return_inverse=True)
        key = keys.fold(self._window_key, numbers)[of_draw]
        place = lane * self.length + first + permute(in_lane - first, size, key)
        shard, row = np.empty_like(place), np.empty_like(place)
        for number in np.unique(epoch):
            chosen = epoch == number
            shard[chosen], row[chosen] = self._locate_in_epoch(int(number), place[chosen])
        return epoch, shard, row

    def windows(self, first: int, last: int) -> Ints:
        """One draw of each window that the draws from `first` to before `last` fall into."""
        epoch, in_lane = np.divmod(np.arange(first, last), self.length)
        _, at = np.unique(epoch * self._windows + in_lane // self.window, return_index=True)
        return first + at

    def shards_of_window(self, lane: int, draw: int) -> Ints:
        """The shards among which a draw's window shuffles, in the order in which they lie."""
        epoch, in_lane = divmod(draw, self.length)
        first = in_lane // self.window * self.window
        last = min(first + self.window, self.length) - 1
        shards, ends, rotation = self._epoch(epoch)
        low, high = (lane * self.length + rotation + np.array([first, last])) % self.num_samples
        start, stop = np.searchsorted(ends, [low, high], side="right")
        return shards[start : stop + 1] if low <= high else np.concatenate([shards[start:], shards[: stop + 1]])

    def _locate_in_epoch(self, epoch: int, place: Ints) -> tuple[Ints, Ints]:
        shards, ends, rotation = self._epoch(epoch)
        place = (place + rotation) % self.num_samples
        slot = np.searchsorted(ends, place, side="right")
        shard = shards[slot]
        return shard, place - ends[slot] + self._shard_samples[shard]

    def _lay_out(self, epoch: int) -> tuple[Ints, Ints, int]:
        """The epoch's shards in order, where each one ends, and the rotation."""
        count = len(self._shard_samples)
        shards = permute(np.arange(count), count, keys.fold(self._shards_key, epoch))
        rotation = permute(np.zeros(1, np.int64), self.num_samples, keys.fold(self._rotation_key, epoch))
        return shards, np.cumsum(self._shard_samples[shards]), int(rotation[0])


class Order:
    """The order of an endless training run over one data set, or over several mixed by weight.

    `parts` holds the sample counts of each data set's shards. An epoch is as many batches as all samples fill, of a
    mixture too. Raises InputError when an epoch has no whole batch, or a data set too few samples or too little
    weight.
    """

    def __init__(
        self,
        parts: Sequence[Ints],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int,
        shuffle_window: int,
        weights: Sequence[float] = (1.0,),
        copies: int = 1,
    ) -> None:
        assert global_batch_size % lanes == 0
        assert len(parts) == len(weights)
        self.num_samples = sum(int(part.sum()) for part in parts)
        if self.num_samples < global_batch_size:
            raise InputError(
                f"train.global_batch_size {global_batch_size} exceeds the {self.num_samples} samples of the data set: "
                "an epoch has to hold at least one batch"
            )
        self.global_batch_size = global_batch_size
        self.lanes = lanes
        self.share = global_batch_size // lanes
        self.steps_per_epoch = self.num_samples // global_batch_size
        self._draws = -(-self.share // copies)
        self._counts = _counts(weights)
        mixing = keys.key(seed, Stream.MIXTURE)
        self._pattern = np.repeat(np.arange(len(parts)), self._counts)[keys.permutation(mixing, _PATTERN)]
        # How many draws of each data set come before a place in the pattern, [parts, 4096].
        self._before = np.cumsum(self._pattern == np.arange(len(parts))[:, None], axis=1)
        self._before -= self._pattern == np.arange(len(parts))[:, None]
        self._first_place = keys.bits(keys.fold(mixing, np.arange(lanes)), 1)[:, 0].astype(np.int64) % _PATTERN
        self._first_shard = np.cumsum([0, *map(len, parts)])
        shard_samples = np.concatenate(parts)
        self._first_id = np.cumsum(shard_samples) - shard_samples
        self._parts = []
        for number, part in enumerate(parts):
            # One data set's epochs end with a batch; those of a mixture go round at paces of their own.
            length = self.steps_per_epoch * self._draws if len(parts) == 1 else int(part.sum()) // lanes
            if not length:
                raise InputError(
                    f"data.train: data set {number + 1} of the mixture has {part.sum()} samples for {lanes} lanes: "
                    "each lane needs at least one; lower data.lanes"
                )
            self._parts.append(Lanes(part, seed=seed, number=number, lanes=lanes, length=length, window=shuffle_window))

    @classmethod
    def of(cls, config: Config, parts: Sequence[Ints]) -> "Order":
        return cls(
            parts,
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            lanes=config.data.lanes,
            shuffle_window=config.data.shuffle_window,
            weights=[source.weight for source in config.data.train],
            copies=config.data.copies,
        )

    def samples(self, step: int, lanes: slice = slice(None)) -> Samples:
        """The samples of optimiser step `step` (counted from 0 over all epochs) in the given lanes, lane by lane."""
        lane = np.arange(self.lanes)[lanes].repeat(self.share)
        place = np.tile(np.arange(self.share), len(lane) // self.share)
        # A sample's copies lie `_draws` places apart, so that neighbours, which are mixed, differ.
        copy, in_share = np.divmod(place, self._draws)
        epoch, shard, row = self._locate(lane, step * self._draws + in_share)
        position = lane * self.share + place
        return Samples(position, epoch, copy, shard, row, self._first_id[shard] + row)

    @property
    def steps_per_window(self) -> int:
        """How often lanes come to a new shuffle window, in steps."""
        return max(1, min(part.window for part in self._parts) // self._draws)

    def shards_ahead(self, step: int, lanes: slice = slice(None)) -> Ints:
        """The shards that the lanes shuffle among at `step`, and then those of one window further on."""
        shards = []
        for now in (True, False):
            for part, (source, count) in enumerate(zip(self._parts, self._counts, strict=True)):
                first, next_first = (number * self._draws * int(count) // _PATTERN for number in (step, step + 1))
                draws = (first, next_first + 1) if now else (next_first, next_first + source.window)
                for draw, lane in itertools.product(source.windows(*draws).tolist(), range(self.lanes)[lanes]):
                    shards.append(self._first_shard[part] + source.shards_of_window(lane, draw))
        return np.array(list(dict.fromkeys(np.concatenate(shards).tolist())), np.int64)

    def _locate(self, lane: Ints, draw: Ints) -> tuple[Ints, Ints, Ints]:
        if len(self._parts) == 1:
            return self._parts[0].locate(lane, draw)
        first = self._first_place[lane]
        turn, place = np.divmod(first + draw, _PATTERN)
        part = self._pattern[place]
        draw = turn * self._counts[part] + self._before[part, place] - self._before[part, first]
        epoch, shard, row = (np.empty_like(draw) for _ in range(3))
        for number, source in enumerate(self._parts):
            chosen = part == number
            epoch[chosen], shard[chosen], row[chosen] = source.locate(lane[chosen], draw[chosen])
        return epoch, shard + self._first_shard[part], row


def _counts(weights: Sequence[float]) -> Ints:
    """How many of the pattern's draws each data set has: in proportion to the weights, by largest remainders."""
    exact = np.array(weights) / sum(weights) * _PATTERN
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: _PATTERN - counts.sum()]] += 1
    if not counts.all():
        raise InputError(
            f"data.train: weights {list(weights)}: a mixture is exact to 1/{_PATTERN} of its draws, "
            "and one of these is smaller; raise it or leave that data set out"
        )
    return counts


@dataclasses.dataclass(frozen=True)
class RankSlice:
    """How one rank's part of every global batch is cut into equal micro-batches.

    Ranks with fewer lanes than others, and the last micro-batch, are filled up with weightless samples, so that all
    ranks take the same number of equal steps.
    """

    lanes: slice
    samples: int  # that weigh, in a global batch
    micro_batch_size: int
    accumulation: int


def partition(order: Order, rank: int, world_size: int, config: Config) -> RankSlice:
    """Rank's Deal. Raises InputError when there are more ranks than lanes."""
    if world_size > order.lanes:
        raise InputError(
            f"{world_size} ranks, but data.lanes is {order.lanes}: a rank needs at least one lane; "
            f"start at most {order.lanes} ranks or raise data.lanes to a divisor of {order.global_batch_size}"
        )
    first, last = (r * order.lanes // world_size for r in (rank, rank + 1))
    most = -(-order.lanes // world_size) * order.share  # samples of any rank
    accumulation = -(-most // (config.train.micro_batch_size or most))
    size = -(-most // accumulation)
    if config.mix.active:
        size += size % 2  # pairs are not cut
    return RankSlice(slice(first, last), (last - first) * order.share, size, accumulation)


def padding_waste(order: Order, world_size: int, config: Config) -> float:
    """The fraction of computed samples that are weightless on this world."""
    part = partition(order, 0, world_size, config)
    return 1 - order.global_batch_size / (world_size * part.accumulation * part.micro_batch_size)
