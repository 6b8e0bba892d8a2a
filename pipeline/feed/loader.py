"""Batches on the device: joins order, augmentation parameters, the stream of images, and mixing.

    Order ─▶ Plan (ids, views, blends, masks) ─▶ ImageStream (bytes ─▶ images, targets) ─▶ mix ─▶ MicroBatch
                            └──── Recipe: what a task makes of a sample ────┘

A Plan is a pure function of the micro-batch's number, so there is no state but that number.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline import keys
from pipeline.config import ClassificationConfig, Config, ImageConfig, TaskConfig
from pipeline.feed import image_ops, mixup
from pipeline.feed.augment import Views
from pipeline.feed.image_stream import Choice, ImageStream, Plan
from pipeline.feed.order import Order, Samples, partition
from pipeline.feed.quarantine import Quarantine
from pipeline.feed.task_transforms import require_kind, task_transform
from pipeline.feed.transfer import to_device
from pipeline.keys import Stream
from pipeline.shards.index import ShardSet
from pipeline.world import World

Array = npt.NDArray[Any]

_MOST_TRIES = 1_000


class MicroBatch(NamedTuple):
    """What one forward pass consumes; N samples."""

    images: Tensor  # [N, 3, H, W] float32
    extents: list[tuple[int, int]]  # height and width of each image in pixels; beside and below it is padding
    targets: Any  # of the task: for its losses in training, for its metric in evaluation; see recipe.py
    weights: Tensor  # [N] float32: 1, or 0 for a filler that must not count
    drop_path: Tensor | None  # [num_branches, N] float32 factors of the residual branches, or None
    samples: Samples  # where the N images came from


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
        quarantine: Quarantine | None = None,
    ) -> None:
        self._config, self._shards = config, shards
        self._quarantine = Quarantine(shards) if quarantine is None else quarantine
        self.order = Order.of(config, shards.part_samples)
        self.deal = partition(self.order, world.rank, world.size, config)
        self._first_step, self._device = first_step, world.device
        self._image_sizes = _image_sizes(config, self.order.steps_per_epoch)
        self._keep = 1 - np.array(drop_path_rates, np.float64)
        self._recipe = task_transform(
            config.task, config.image, len(shards.classes), config.augment, config.mix.label_smoothing
        )
        require_kind(config.task, shards)
        noisy = config.augment.erase_prob > 0 and config.augment.erase_mode == "pixel"
        self._stream = ImageStream(
            self.plan,
            self._finish,
            first_step * self.deal.accumulation,
            shards,
            self._quarantine,
            world,
            config.image,
            target=self._recipe.training_target,
            noise=image_ops.noise(config.run.seed, world.device) if noisy else None,
            batch_size=self.deal.micro_batch_size,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            deterministic=config.train.deterministic,
        )

    def next(self) -> list[MicroBatch]:
        """The micro-batches of the next step. Raises what ImageStream.next raises."""
        return [self._stream.next() for _ in range(self.deal.accumulation)]

    def blank(self, step: int) -> list[MicroBatch]:
        """Micro-batches of a step's shape in which nothing counts."""
        n, size, device = self.deal.micro_batch_size, self.image_size(step), self._device
        masks = torch.ones(len(self._keep), n, device=device) if self._keep.min(initial=1) < 1 else None
        batch = MicroBatch(
            torch.zeros(n, 3, size, size, device=device),
            [(size, size)] * n,
            self._recipe.blank_batch(n, size, device),
            torch.zeros(n, device=device),
            masks,
            self.order.samples(step, self.deal.lanes).take(np.zeros(n, np.int64)),
        )
        return [batch] * self.deal.accumulation

    def keys(self, step: int) -> list[str]:
        """TAR#KEY of the samples of a whole global batch, by position, damaged ones by their own. Raises StoreError."""
        samples = self.order.samples(step)
        where = zip(samples.shard.tolist(), samples.row.tolist(), strict=True)
        return [f"{self._shards.url(shard)}#{self._shards.key(shard, row)}" for shard, row in where]

    def plan(self, number: int) -> Plan:
        """The plan of micro-batch `number`, counted from the first step of the run."""
        config, part = self._config, self.deal
        step, micro = divmod(number, part.accumulation)
        self._fetch_ahead(step, micro)
        place = micro * part.micro_batch_size + np.arange(part.micro_batch_size)
        weights = (place < part.samples).astype(np.float32)
        # Fillers repeat the rank's first samples: something that decodes, and even in number for mixing.
        place = np.where(weights > 0, place, np.arange(part.micro_batch_size) % part.samples)
        samples = self.order.samples(step, part.lanes).take(place)
        return Plan(
            samples,
            weights,
            *self._seen(step, samples),
            functools.partial(self._substitutes, step, place, weights),
            self._blends(step, samples.position // self.order.share) if config.mix.active else None,
            self._drop_path(step, samples.position) if self._keep.min(initial=1) < 1 else None,
        )

    def _seen(self, step: int, samples: Samples) -> tuple[Views, Array]:
        """Returns the views that a step takes of samples, and their class labels."""
        records = self._shards.records(samples.shard, samples.row)
        key = keys.key(self._config.run.seed, Stream.AUGMENT, samples.epoch, samples.id, samples.copy)
        views = self._recipe.training_views(self.image_size(step), key, _height_width(records))
        return views, _labels(records)

    def _substitutes(self, step: int, place: Array, weights: Array, number: int) -> Iterator[Choice]:
        """Yields the samples of the later steps at the same place of the same lane.

        So nothing shifts, and the lane's own rank finds them on every world.
        """
        for later in range(step + 1, step + 1 + _MOST_TRIES):
            samples = self.order.samples(later, self.deal.lanes).take(place[number : number + 1])
            views, labels = self._seen(step, samples)
            yield Choice(samples, weights[number], views, labels[0])

    def image_size(self, step: int) -> int:
        """Height and width of the images of a step."""
        return [size for first, size in self._image_sizes if first <= step][-1]

    def _fetch_ahead(self, step: int, micro: int) -> None:
        if self._shards.is_remote and micro == 0 and (step - self._first_step) % self.order.steps_per_window == 0:
            self._shards.prefetch(self.order.shards_ahead(step, self.deal.lanes))

    def _blends(self, step: int, lane: Array) -> mixup.Blends:
        lanes, of_sample = np.unique(lane, return_inverse=True)
        key = keys.key(self._config.run.seed, Stream.MIX, step, lanes)
        size = self.image_size(step)
        return mixup.draw(self._config.mix, key, size, size)[of_sample]

    def _drop_path(self, step: int, position: Array) -> Array:
        key = keys.key(self._config.run.seed, Stream.DROP_PATH, step, position)
        kept = keys.uniform(key, len(self._keep)) < self._keep  # [N, num_branches]
        return (kept / self._keep).T.astype(np.float32)

    def _finish(self, plan: Plan, images: Tensor) -> MicroBatch:
        device = images.device
        targets = self._recipe.training_batch(plan.targets, device)
        if plan.blends is not None:
            images, targets = mixup.mix_images(images, plan.blends), mixup.mix_targets(targets, plan.blends)
        masks = [] if plan.drop_path is None else [plan.drop_path]
        weights, *drop_path = to_device([plan.weights, *masks], device)
        return MicroBatch(images, _extents(plan), targets, weights, next(iter(drop_path), None), plan.samples)

    def close(self) -> None:
        self._stream.close()


def _image_sizes(config: Config, steps_per_epoch: int) -> list[tuple[int, int]]:
    """The resolution schedule: (first step, size), in order, from step 0 on."""
    batch = config.train.global_batch_size
    total = config.train.length.steps(steps_per_epoch=steps_per_epoch, global_batch_size=batch)
    sizes = {0: config.image.size}
    for length, size in config.augment.image_size.items():
        sizes[length.steps(steps_per_epoch=steps_per_epoch, global_batch_size=batch, total=total)] = size
    return sorted(sizes.items())


def _height_width(records: Array) -> Array:
    return np.stack([records["height"], records["width"]], axis=-1).astype(np.int64)


def _extents(plan: Plan) -> list[tuple[int, int]]:
    return [(height, width) for height, width in plan.views.extent.tolist()]


def _labels(records: Array) -> Array:
    return records["label"].astype(np.int64)


class EvalFeed:
    """Every sample of a data set exactly once, over all ranks, as `task` (None: classification) sees it; a damaged one
    without weight.

    The data set is cut into batches in its stored order and rank r takes batches r, r + W, …; short and missing ones
    are filled up with weightless samples. A batch's make-up does not depend on the world, nor do its results.
    """

    def __init__(
        self,
        shards: ShardSet,
        world: World,
        image: ImageConfig,
        *,
        task: TaskConfig | None = None,
        batch_size: int,
        num_threads: int = 0,
        prefetch: int = 2,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._shards, self._world, self._image = shards, world, image
        require_kind(task or ClassificationConfig(), shards)
        self._recipe = task_transform(task or ClassificationConfig(), image, len(shards.classes))
        self._quarantine = Quarantine(shards) if quarantine is None else quarantine
        self.num_samples = len(shards)
        self._batch_size = min(batch_size, len(shards))
        self._num_threads, self._prefetch = num_threads, prefetch
        self.num_batches = -(-len(shards) // (self._batch_size * world.size))
        self._first_id = np.cumsum(shards.shard_samples) - shards.shard_samples

    def __iter__(self) -> Iterator[MicroBatch]:
        stream = ImageStream(
            self.plan,
            self._finish,
            0,
            self._shards,
            self._quarantine,
            self._world,
            self._image,
            target=self._recipe.evaluation_target,
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            prefetch=self._prefetch,
            deterministic=True,
        )
        try:
            for _ in range(self.num_batches):
                yield stream.next()
        finally:
            stream.close()

    def _finish(self, plan: Plan, images: Tensor) -> MicroBatch:
        targets = self._recipe.evaluation_batch(plan.targets, images.device)
        (weights,) = to_device([plan.weights], images.device)
        return MicroBatch(images, _extents(plan), targets, weights, None, plan.samples)

    def blank(self) -> MicroBatch:
        """A batch in which nothing counts and nothing is to be found."""
        size, device = self._image.size, self._world.device
        images, weights = torch.zeros(1, 3, size, size, device=device), torch.zeros(1, device=device)
        return MicroBatch(images, [(size, size)], None, weights, None, self._samples(*np.zeros((2, 1), np.int64)))

    def plan(self, number: int) -> Plan:
        """The plan of this rank's batch `number`. Reading ahead may ask beyond the last: those are all fillers."""
        place = (number * self._world.size + self._world.rank) * self._batch_size + np.arange(self._batch_size)
        weights = (place < len(self._shards)).astype(np.float32)
        samples = self._samples(np.minimum(place, len(self._shards) - 1), place)
        return Plan(samples, weights, *self._seen(samples), functools.partial(self._substitutes, samples))

    def _seen(self, samples: Samples) -> tuple[Views, Array]:
        records = self._shards.records(samples.shard, samples.row)
        return self._recipe.evaluation_views(_height_width(records)), _labels(records)

    def _substitutes(self, planned: Samples, number: int) -> Iterator[Choice]:
        """Yields the samples that follow, which only fill the place."""
        for distance in range(1, min(len(self._shards), _MOST_TRIES)):
            samples = planned.take(slice(number, number + 1))
            samples = self._samples((samples.id + distance) % len(self._shards), samples.position)
            views, labels = self._seen(samples)
            yield Choice(samples, np.float32(0), views, labels[0])

    def _samples(self, sample_id: Array, position: Array) -> Samples:
        shard = np.searchsorted(self._first_id, sample_id, side="right") - 1
        nought = np.zeros_like(sample_id)
        return Samples(position, nought, nought, shard, sample_id - self._first_id[shard], sample_id)
