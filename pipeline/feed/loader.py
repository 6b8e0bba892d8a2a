"""Batches on the device: joins order, bytes, augmentation, decoding and mixing.

    Order ─▶ Plan (ids, views, blends, masks) ─▶ bytes, read ahead by threads ─▶ Decoder ─▶ mix ─▶ MicroBatch

A Plan is a pure function of the micro-batch's number, so there is no state but that number.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline import keys
from pipeline.config import Config, Image
from pipeline.feed import augment, dali, mix
from pipeline.feed.order import Order, Samples, deal
from pipeline.keys import Stream
from pipeline.shards.index import ShardSet
from pipeline.shards.store import ShardStore
from pipeline.world import World

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one forward pass consumes; N samples."""

    images: Tensor  # [N, 3, S, S] float32
    targets: Tensor  # [N, K] float32 soft labels in training, [N] int64 labels in evaluation
    weights: Tensor  # [N] float32: 1, or 0 for a filler that must not count
    drop_path: Tensor | None  # [num_branches, N] float32 factors of the residual branches, or None
    samples: Samples  # where the N images came from


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a micro-batch but its pixels."""

    samples: Samples
    labels: Array  # [N] int64
    weights: Array  # [N] float32
    views: augment.Views
    blends: mix.Blends | None = None
    drop_path: Array | None = None  # [num_branches, N] float32


class _Stream:
    """Carries out plans 'first', 'first + 1', … in order: reads, decodes, and hands out (plan, images)."""

    def __init__(
        self,
        plan: Callable[[int], Plan],
        first: int,
        shards: ShardSet,
        world: World,
        image: Image,
        *,
        batch_size: int,
        num_threads: int,
        prefetch: int,
        deterministic: bool,
    ) -> None:
        self._plan, self._first = plan, first
        self._store = ShardStore(shards)
        threads = num_threads or max(1, len(os.sched_getaffinity(0)) // world.local_size)
        # Reading waits for disks, so twice the threads; one batch more than DALI asks for is always under way.
        self._readers = concurrent.futures.ThreadPoolExecutor(2 * threads, "read")
        self._under_way: dict[int, tuple[Plan, list[concurrent.futures.Future[Array]]]] = {}
        self._decoded: collections.deque[Plan] = collections.deque()
        self._decoder = dali.Decoder(
            self._source,
            batch_size=batch_size,
            image=image,
            device=world.device,
            num_threads=threads,
            prefetch=prefetch,
            deterministic=deterministic,
        )

    def next(self) -> tuple[Plan, Tensor]:
        images = self._decoder.next()
        return self._decoded.popleft(), images

    def _source(self, iteration: int) -> Sequence[Any]:
        self._start(iteration)
        plan, reads = self._under_way.pop(iteration)
        self._start(iteration + 1)
        encoded = [read.result() for read in reads]
        self._decoded.append(plan)
        views = plan.views
        return encoded, views.anchor, views.shape, views.roi_start, views.roi_end, views.flip

    def _start(self, iteration: int) -> None:
        if iteration not in self._under_way:
            plan = self._plan(self._first + iteration)
            pairs = zip(plan.samples.shard.tolist(), plan.samples.row.tolist(), strict=True)
            self._under_way[iteration] = plan, [self._readers.submit(self._read, *pair) for pair in pairs]

    def _read(self, shard: int, row: int) -> Array:
        return np.frombuffer(self._store.read(shard, row), np.uint8)

    def close(self) -> None:
        self._decoder.close()
        self._readers.shutdown(cancel_futures=True)
        self._store.close()


class TrainFeed:
    """This rank's part of every global batch, from `first_step` on, without end.

    Raises InputError at construction for a world or a data set that the configuration does not fit.
    """

    def __init__(
        self,
        config: Config,
        shards: ShardSet,
        world: World,
        *,
        first_step: int = 0,
        drop_path_rates: Sequence[float] = (),
    ) -> None:
        self._config, self._shards, self._world = config, shards, world
        self.order = Order.of(config, shards.shard_samples)
        self.deal = deal(self.order, world.rank, world.size, config)
        self._keep = 1 - np.array(drop_path_rates, np.float64)
        self._num_classes = len(shards.manifest.classes)
        self._stream = _Stream(
            self.plan,
            first_step * self.deal.accumulation,
            shards,
            world,
            config.image,
            batch_size=self.deal.micro_batch_size,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            deterministic=config.train.deterministic,
        )

    def next(self) -> list[MicroBatch]:
        """The micro-batches of the next step."""
        return [self._finish(*self._stream.next()) for _ in range(self.deal.accumulation)]

    def plan(self, number: int) -> Plan:
        """The plan of micro-batch `number`, counted from the first step of the run."""
        config, part = self._config, self.deal
        step, micro = divmod(number, part.accumulation)
        place = micro * part.micro_batch_size + np.arange(part.micro_batch_size)
        weights = (place < part.samples).astype(np.float32)
        # Fillers repeat the rank's first samples: something that decodes, and even in number for mixing.
        place = np.where(weights > 0, place, np.arange(part.micro_batch_size) % part.samples)
        samples = self.order.samples(step, part.lanes).take(place)
        records = self._shards.records(samples.shard, samples.row)
        seed = config.run.seed
        views = augment.training_views(
            config.augment,
            keys.key(seed, Stream.AUGMENT, samples.epoch, samples.id),
            records["height"],
            records["width"],
        )
        return Plan(
            samples,
            records["label"].astype(np.int64),
            weights,
            views,
            self._blends(step, samples.position // self.order.share) if config.mix.active else None,
            self._drop_path(step, samples.position) if self._keep.min(initial=1) < 1 else None,
        )

    def _blends(self, step: int, lane: Array) -> mix.Blends:
        size = self._config.image.size
        lanes, of_sample = np.unique(lane, return_inverse=True)
        return mix.draw(self._config.mix, keys.key(self._config.run.seed, Stream.MIX, step, lanes), size, size)[
            of_sample
        ]

    def _drop_path(self, step: int, position: Array) -> Array:
        key = keys.key(self._config.run.seed, Stream.DROP_PATH, step, position)
        kept = keys.uniform(key, len(self._keep)) < self._keep  # [N, num_branches]
        return (kept / self._keep).T.astype(np.float32)

    def _finish(self, plan: Plan, images: Tensor) -> MicroBatch:
        device = images.device
        labels = torch.from_numpy(plan.labels).to(device)
        targets = mix.soft_targets(labels, self._num_classes, self._config.mix.label_smoothing)
        if plan.blends is not None:
            images, targets = mix.mix_images(images, plan.blends), mix.mix_targets(targets, plan.blends)
        drop_path = None if plan.drop_path is None else torch.from_numpy(plan.drop_path).to(device)
        return MicroBatch(images, targets, torch.from_numpy(plan.weights).to(device), drop_path, plan.samples)

    def close(self) -> None:
        self._stream.close()


class EvalFeed:
    """Every sample of a data set exactly once, over all ranks.

    The data set is cut into batches in its stored order and rank r takes batches r, r + W, …; short and missing ones
    are filled up with weightless samples. A batch's make-up does not depend on the world, nor do its results.
    """

    def __init__(
        self,
        shards: ShardSet,
        world: World,
        image: Image,
        *,
        batch_size: int,
        num_threads: int = 0,
        prefetch: int = 2,
    ) -> None:
        self._shards, self._world, self._image = shards, world, image
        self._batch_size = min(batch_size, len(shards))
        self._num_threads, self._prefetch = num_threads, prefetch
        self.num_batches = -(-len(shards) // (self._batch_size * world.size))
        self._first_id = np.cumsum(shards.shard_samples) - shards.shard_samples

    def __iter__(self) -> Iterator[MicroBatch]:
        stream = _Stream(
            self.plan,
            0,
            self._shards,
            self._world,
            self._image,
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            prefetch=self._prefetch,
            deterministic=True,
        )
        try:
            for _ in range(self.num_batches):
                plan, images = stream.next()
                labels, weights = torch.from_numpy(plan.labels), torch.from_numpy(plan.weights)
                yield MicroBatch(images, labels.to(images.device), weights.to(images.device), None, plan.samples)
        finally:
            stream.close()

    def plan(self, number: int) -> Plan:
        """The plan of this rank's batch `number`. Reading ahead may ask beyond the last: those are all fillers."""
        place = (number * self._world.size + self._world.rank) * self._batch_size + np.arange(self._batch_size)
        weights = (place < len(self._shards)).astype(np.float32)
        sample_id = np.minimum(place, len(self._shards) - 1)
        shard = np.searchsorted(self._first_id, sample_id, side="right") - 1
        samples = Samples(0, place, shard, sample_id - self._first_id[shard], sample_id)
        records = self._shards.records(samples.shard, samples.row)
        views = augment.evaluation_views(self._image.size, self._image.crop_pct, records["height"], records["width"])
        return Plan(samples, records["label"].astype(np.int64), weights, views)
