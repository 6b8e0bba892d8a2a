"""Which samples make global batch k: arithmetic on a few integers, the same on every world size.

    data set, epoch e:  shards, permuted, laid end to end, rotated   ·····|·······|···|·······|·····
    lanes:              equal contiguous lengths of that             [ lane 0 ][ lane 1 ][ lane 2 ]  tail
    windows:            inside a lane, permuted                      [w0][w1]…
    draws:              the lane's samples, epoch after epoch        0 1 2 3 …
    batch k:            the next draws of every lane

Lanes are about what MosaicML Streaming calls canonical nodes. A rank serves whole lanes, so it reads about 1/W of the
shards, nearly in sequence. The tail is shorter than a batch and is skipped. The rotation differs from epoch to epoch,
so that over epochs the tail falls on all samples alike.

Several source data sets are mixed lane by lane: a shuffled pattern of 4,096 draws, in which each source has as many as
its weight says, is repeated, and each lane begins at an index of its own. With repeated augmentation a lane's share of
a batch holds each of its draws `copies` times.

Shapes: B global batch, L lanes, S share = B / L, D distinct draws of a share = S / copies, rounded up.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline import keys
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.feed.permutation import permute
from pipeline.keys import Stream

Ints = npt.NDArray[np.int64]

# The draws in the pattern of a mixture.
_PATTERN = 4096


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some samples of a global batch, each array [n]."""

    # Positions in the global batch: 0 … B-1.
    position: Ints
    # Epochs of each sample's source data set.
    epoch: Ints
    # Numbers of a sample's copies in its batch: 0 … copies-1.
    copy: Ints
    shard: Ints
    # Rows in the shard's index.
    row: Ints
    # Numbers of the samples over all source data sets, with their shards laid end to end.
    id: Ints

    def take(self, indices: npt.ArrayLike | slice) -> "Samples":
        """Returns the samples at the given indices."""
        arrays = {name: getattr(self, name)[indices] for name in _ARRAYS}
        return Samples(**arrays)

    @classmethod
    def joined(cls, samples: "Sequence[Samples]") -> "Samples":
        """Returns all samples, one behind the other."""
        arrays = {}
        for name in _ARRAYS:
            arrays[name] = np.concatenate([getattr(each, name) for each in samples])
        return cls(**arrays)


_ARRAYS = [field.name for field in dataclasses.fields(Samples)]


class Lanes:
    """The endless sequence of draws in each lane of one source data set.

    An epoch of a lane is `length` draws. `number` keeps the sources of a mixture independent of each other.
    """

    def __init__(
        self,
        shard_samples: Ints,
        *,
        seed: int,
        number: int,
        lanes: int,
        length: int,
        window: int,
    ) -> None:
        self.num_samples = int(shard_samples.sum())
        self.length = length
        self.window = window
        self._windows_per_epoch = -(-length // window)
        self._num_lanes = lanes
        self._shard_samples = shard_samples
        self._shards_key = keys.key(seed, Stream.SHARDS, number)
        self._rotation_key = keys.key(seed, Stream.ROTATION, number)
        self._window_key = keys.key(seed, Stream.WINDOW, number)
        # More than one epoch, because reading ahead crosses into the next one while the last batches are still asked
        # for.
        self._layout = functools.lru_cache(maxsize=4)(self._lay_out_epoch)

    def locate(self, lane: Ints, draw: Ints) -> tuple[Ints, Ints, Ints]:
        """Returns epoch, shard and row, each [n], of the given draws [n] of lanes [n]."""
        epoch, in_lane = np.divmod(draw, self.length)
        window = in_lane // self.window
        first = window * self.window
        size = np.minimum(self.window, self.length - first)
        # A window's number over all lanes and epochs. A batch touches few windows, so that few keys are made.
        number = (epoch * self._num_lanes + lane) * self._windows_per_epoch + window
        numbers, of_draw = np.unique(number, return_inverse=True)
        key = keys.fold(self._window_key, numbers)[of_draw]
        index = lane * self.length + first + permute(in_lane - first, size, key)
        located = np.empty((2, len(index)), np.int64)
        for each in np.unique(epoch).tolist():
            chosen = epoch == each
            located[:, chosen] = self._locate_in_epoch(each, index[chosen])
        shard, row = located
        return epoch, shard, row

    def windows(self, first: int, last: int) -> Ints:
        """Returns one draw of each window that the draws from `first` to before `last` fall into."""
        epoch, in_lane = np.divmod(np.arange(first, last), self.length)
        number = epoch * self._windows_per_epoch + in_lane // self.window
        _, index = np.unique(number, return_index=True)
        return first + index

    def shards_of_window(self, lane: int, draw: int) -> Ints:
        """Returns the shards among which a draw's window shuffles, in the order in which they lie."""
        epoch, in_lane = divmod(draw, self.length)
        first = in_lane // self.window * self.window
        last = min(first + self.window, self.length) - 1
        shards, ends, rotation = self._layout(epoch)
        bounds = lane * self.length + rotation + np.array([first, last])
        low, high = bounds % self.num_samples
        start, stop = np.searchsorted(ends, [low, high], side="right")
        if low <= high:
            return shards[start : stop + 1]
        # The rotation has moved the window across the end of the epoch's samples.
        return np.concatenate([shards[start:], shards[: stop + 1]])

    def _locate_in_epoch(self, epoch: int, index: Ints) -> tuple[Ints, Ints]:
        """Returns shard and row of the samples at the given indices of an epoch before its rotation."""
        shards, ends, rotation = self._layout(epoch)
        index = (index + rotation) % self.num_samples
        slot = np.searchsorted(ends, index, side="right")
        shard = shards[slot]
        row = index - ends[slot] + self._shard_samples[shard]
        return shard, row

    def _lay_out_epoch(self, epoch: int) -> tuple[Ints, Ints, int]:
        """Returns the epoch's shards in order, where each one ends, and the rotation."""
        count = len(self._shard_samples)
        shards_key = keys.fold(self._shards_key, epoch)
        shards = permute(np.arange(count), count, shards_key)
        ends = np.cumsum(self._shard_samples[shards])
        rotation_key = keys.fold(self._rotation_key, epoch)
        # Where a permutation of all samples sends the first one is a uniform draw.
        (rotation,) = permute(
            np.zeros(1, np.int64),
            self.num_samples,
            rotation_key,
        )
        return shards, ends, int(rotation)


class Order:
    """The order of an endless training run over one source data set, or over several mixed by weight.

    `sources` holds the sample counts of each source's shards. An epoch is as many batches as all samples fill, in a
    mixture too. Raises InputError when an epoch has no whole batch, or a source too few samples or too little weight.
    """

    def __init__(
        self,
        sources: Sequence[Ints],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int,
        shuffle_window: int,
        weights: Sequence[float] = (1.0,),
        copies: int = 1,
    ) -> None:
        assert global_batch_size % lanes == 0
        assert len(sources) == len(weights)
        self.num_samples = sum(int(shard_samples.sum()) for shard_samples in sources)
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
        self._counts = _count_draws(weights)
        mixing_key = keys.key(seed, Stream.MIXTURE)
        source_numbers = np.arange(len(sources))
        pattern = source_numbers.repeat(self._counts)
        self._pattern = pattern[keys.permutation(mixing_key, _PATTERN)]
        # How many draws of each source come before an index of the pattern, [sources, 4096].
        is_drawn = self._pattern == source_numbers[:, None]
        self._before = np.cumsum(is_drawn, axis=1) - is_drawn
        first_bits = keys.bits(keys.fold(mixing_key, np.arange(lanes)), 1)
        self._first_index = first_bits[:, 0].astype(np.int64) % _PATTERN
        self._first_shard = np.cumsum([0, *map(len, sources)])
        all_shards = np.concatenate(sources)
        self._first_id = np.cumsum(all_shards) - all_shards
        self._sources = []
        for number, shard_samples in enumerate(sources):
            num_samples = int(shard_samples.sum())
            # The epochs of a single source end with a batch; those of a mixture's sources end anywhere.
            length = num_samples // lanes
            if len(sources) == 1:
                length = self.steps_per_epoch * self._draws
            if not length:
                raise InputError(
                    f"data.train: data set {number + 1} of the mixture has {num_samples} samples for {lanes} lanes: "
                    "each lane needs at least one; lower data.lanes"
                )
            source = Lanes(
                shard_samples,
                seed=seed,
                number=number,
                lanes=lanes,
                length=length,
                window=shuffle_window,
            )
            self._sources.append(source)

    @classmethod
    def of(cls, config: Config, sources: Sequence[Ints]) -> "Order":
        """Returns the order that a configuration describes."""
        return cls(
            sources,
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            lanes=config.data.lanes,
            shuffle_window=config.data.shuffle_window,
            weights=[source.weight for source in config.data.train],
            copies=config.data.copies,
        )

    def samples(self, step: int, lanes: slice = slice(None)) -> Samples:
        """Returns the samples of optimiser step `step` (counted from 0 over all epochs) in the given lanes, lane by
        lane."""
        chosen = np.arange(self.lanes)[lanes]
        lane = chosen.repeat(self.share)
        in_share = np.tile(np.arange(self.share), len(chosen))
        # A sample's copies lie `_draws` positions apart, so that neighbours, which are mixed, differ.
        copy, number = np.divmod(in_share, self._draws)
        epoch, shard, row = self._locate(lane, step * self._draws + number)
        position = lane * self.share + in_share
        return Samples(
            position,
            epoch,
            copy,
            shard,
            row,
            self._first_id[shard] + row,
        )

    @property
    def steps_per_window(self) -> int:
        """How often lanes come to a new shuffle window, in steps."""
        smallest = min(source.window for source in self._sources)
        return max(1, smallest // self._draws)

    def shards_ahead(self, step: int, lanes: slice = slice(None)) -> Ints:
        """Returns the shards that the lanes shuffle among at `step`, and then those of one window further on."""
        now: list[Ints] = []
        next_: list[Ints] = []
        for number, source in enumerate(self._sources):
            pace = self._draws * int(self._counts[number])
            first = step * pace // _PATTERN
            next_first = (step + 1) * pace // _PATTERN
            now += self._list_shards(
                number,
                source.windows(first, next_first + 1),
                lanes,
            )
            next_ += self._list_shards(
                number,
                source.windows(next_first, next_first + source.window),
                lanes,
            )
        shards = np.concatenate(now + next_).tolist()
        # A dict removes repetitions and keeps the order, in which the shards are fetched.
        distinct = list(dict.fromkeys(shards))
        return np.array(distinct, np.int64)

    def _list_shards(
        self,
        number: int,
        draws: Ints,
        lanes: slice,
    ) -> list[Ints]:
        """Returns the shards of the windows of some draws of source `number`, for each draw and lane."""
        shards = []
        for draw in draws.tolist():
            for lane in range(self.lanes)[lanes]:
                in_source = self._sources[number].shards_of_window(lane, draw)
                shards.append(self._first_shard[number] + in_source)
        return shards

    def _locate(self, lane: Ints, draw: Ints) -> tuple[Ints, Ints, Ints]:
        """Returns epoch, shard and row, each [n], with the shards of all sources counted end to end."""
        if len(self._sources) == 1:
            return self._sources[0].locate(lane, draw)
        first = self._first_index[lane]
        turn, index = np.divmod(first + draw, _PATTERN)
        source = self._pattern[index]
        # From a draw of the lane to a draw of its source.
        draw = turn * self._counts[source] + self._before[source, index] - self._before[source, first]
        located = np.empty((3, len(draw)), np.int64)
        for number, lanes in enumerate(self._sources):
            chosen = source == number
            located[:, chosen] = lanes.locate(lane[chosen], draw[chosen])
        epoch, shard, row = located
        return epoch, shard + self._first_shard[source], row


def _count_draws(weights: Sequence[float]) -> Ints:
    """Returns how many of the pattern's draws each source has: in proportion to the weights, by largest remainders."""
    exact = np.array(weights) / sum(weights) * _PATTERN
    counts = np.floor(exact).astype(np.int64)
    missing = _PATTERN - counts.sum()
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[:missing]] += 1
    if not counts.all():
        raise InputError(
            f"data.train: weights {list(weights)}: a mixture is exact to 1/{_PATTERN} of its draws, "
            "and one of these is smaller; raise it or remove that data set"
        )
    return counts


@dataclasses.dataclass(frozen=True)
class RankSlice:
    """A rank's slice of each global batch, and how it is cut into equal micro-batches.

    Ranks with fewer lanes than others, and the last micro-batch, are filled up with weightless samples, so that all
    ranks take the same number of equal steps.
    """

    lanes: slice
    # The number of samples of a global batch that count, fillers excepted.
    num_samples: int
    micro_batch_size: int
    # The number of micro-batches in a step.
    accumulation: int


def partition(
    order: Order,
    rank: int,
    world_size: int,
    config: Config,
) -> RankSlice:
    """Returns a rank's slice of each global batch. Raises InputError when there are more ranks than lanes."""
    if world_size > order.lanes:
        raise InputError(
            f"{world_size} ranks, but data.lanes is {order.lanes}: a rank needs at least one lane; "
            f"start at most {order.lanes} ranks or {config.describe_more_lanes(world_size)}"
        )
    first = rank * order.lanes // world_size
    last = (rank + 1) * order.lanes // world_size
    # All ranks take steps of one size, which the rank with the most lanes decides.
    most_lanes = -(-order.lanes // world_size)
    most_samples = most_lanes * order.share
    largest = config.train.micro_batch_size or most_samples
    accumulation = -(-most_samples // largest)
    micro_batch_size = -(-most_samples // accumulation)
    if config.mix.is_active:
        # Samples are mixed in pairs, which must not be cut.
        micro_batch_size += micro_batch_size % 2
    return RankSlice(
        slice(first, last),
        (last - first) * order.share,
        micro_batch_size,
        accumulation,
    )


def padding_waste(order: Order, world_size: int, config: Config) -> float:
    """Returns the fraction of computed samples that are weightless fillers with this world size."""
    rank_slice = partition(order, 0, world_size, config)
    num_computed = world_size * rank_slice.accumulation * rank_slice.micro_batch_size
    return 1 - order.global_batch_size / num_computed
