"""Batches on the device: joins order, augmentation parameters, the stream of images, and mixing.

    Order ─▶ Plan (ids, views, blends, masks) ─▶ ImageStream (bytes ─▶ images, targets) ─▶ mix ─▶ MicroBatch
                            └──── TaskTransform: what a task makes of a sample ────┘

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
from pipeline.config import ClassificationConfig, Config, ImageConfig, Length, TaskConfig
from pipeline.feed import image_ops, mixup
from pipeline.feed.augment import Views
from pipeline.feed.image_stream import ImageStream
from pipeline.feed.order import Order, Samples, partition
from pipeline.feed.plan import Candidate, Plan
from pipeline.feed.quarantine import Quarantine
from pipeline.feed.task_transforms import EvaluationTransform, require_annotations, task_transform
from pipeline.feed.transfer import to_device
from pipeline.keys import Stream
from pipeline.shards.index import SampleSource, ShardSet
from pipeline.world import World

Array = npt.NDArray[Any]

# The substitutes that are tried for a damaged sample.
_MAX_SUBSTITUTES = 1_000


class MicroBatch(NamedTuple):
    """What one forward pass consumes; N samples."""

    # [N, 3, H, W] float32.
    images: Tensor
    # Height and width of each image in pixels, from the upper left; the rest is padding.
    extents: list[tuple[int, int]]
    # What the task's losses take in training, and its metric in evaluation; see task_transforms.py.
    targets: Any
    # [N] float32: 1, or 0 for a filler that must not count.
    weights: Tensor
    # [num_branches, N] float32 factors of the residual branches, or None.
    drop_path: Tensor | None
    # Where the N images came from.
    samples: Samples


class TrainFeed:
    """This rank's slice of every global batch, from `first_step` on, without end.

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
        self._config = config
        self._shards = shards
        self._quarantine = Quarantine(shards) if quarantine is None else quarantine
        self.order = Order.of(config, shards.part_samples)
        self.rank_slice = partition(self.order, world.rank, world.size, config)
        self._first_step = first_step
        self._device = world.device
        self._image_sizes = _list_image_sizes(config, self.order.steps_per_epoch)
        self._keep_rates = 1 - np.array(drop_path_rates, np.float64)
        self._drops_paths = bool((self._keep_rates < 1).any())
        self._transform = task_transform(
            config.task,
            config.image,
            len(shards.classes),
            config.augment,
            config.mix.label_smoothing,
        )
        require_annotations(config.task, shards)
        noise = None
        if config.augment.erase_prob > 0 and config.augment.erase_mode == "pixel":
            noise = image_ops.noise(config.run.seed, world.device)
        self._stream = ImageStream(
            first_step * self.rank_slice.accumulation,
            shards,
            self._quarantine,
            world,
            config.image,
            make_plan=self.plan,
            make_batch=self._make_batch,
            make_target=self._transform.training_target,
            noise=noise,
            batch_size=self.rank_slice.micro_batch_size,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            deterministic=config.train.deterministic,
        )

    def next(self) -> list[MicroBatch]:
        """Returns the micro-batches of the next step. Raises what ImageStream.next raises."""
        return [self._stream.next() for _ in range(self.rank_slice.accumulation)]

    def blank(self, step: int) -> list[MicroBatch]:
        """Returns micro-batches of a step's shape in which all samples have weight 0."""
        n = self.rank_slice.micro_batch_size
        size = self.image_size(step)
        device = self._device
        drop_path = None
        if self._drops_paths:
            drop_path = torch.ones(len(self._keep_rates), n, device=device)
        samples = self.order.samples(step, self.rank_slice.lanes)
        batch = MicroBatch(
            torch.zeros(n, 3, size, size, device=device),
            [(size, size)] * n,
            self._transform.blank_batch(n, size, device),
            torch.zeros(n, device=device),
            drop_path,
            samples.take(np.zeros(n, np.int64)),
        )
        return [batch] * self.rank_slice.accumulation

    def keys(self, step: int) -> list[str]:
        """Returns TAR#KEY of each sample of a global batch, by position. A damaged sample has its own name here, not
        that of its substitute. Raises StoreError."""
        samples = self.order.samples(step)
        names = []
        for shard, row in zip(samples.shard.tolist(), samples.row.tolist(), strict=True):
            key = self._shards.key(shard, row)
            names.append(f"{self._shards.url(shard)}#{key}")
        return names

    def plan(self, number: int) -> Plan:
        """Returns the plan of micro-batch `number`, counted from the first step of the run."""
        rank_slice = self.rank_slice
        size = rank_slice.micro_batch_size
        step, micro = divmod(number, rank_slice.accumulation)
        if micro == 0:
            self._prefetch_shards(step)
        in_batch = np.arange(size)
        indices = micro * size + in_batch
        is_sample = indices < rank_slice.num_samples
        # Fillers repeat the rank's first samples: something that decodes, and even in number for mixing.
        indices = np.where(
            is_sample,
            indices,
            in_batch % rank_slice.num_samples,
        )
        weights = is_sample.astype(np.float32)
        samples = self.order.samples(step, rank_slice.lanes).take(indices)
        views, labels = self._draw_views(step, samples)
        return Plan(
            samples,
            weights,
            views,
            labels,
            functools.partial(
                self._find_substitutes,
                step,
                indices,
                weights,
            ),
            self._draw_blends(step, samples),
            self._draw_drop_path(step, samples),
        )

    def _draw_views(self, step: int, samples: Samples) -> tuple[Views, Array]:
        """Returns the views that a step takes of samples, and their class labels."""
        records = self._shards.records(samples.shard, samples.row)
        key = keys.key(
            self._config.run.seed,
            Stream.AUGMENT,
            samples.epoch,
            samples.id,
            samples.copy,
        )
        views = self._transform.training_views(
            self.image_size(step),
            key,
            _read_sizes(records),
        )
        return views, _read_labels(records)

    def _find_substitutes(
        self,
        step: int,
        indices: Array,
        weights: Array,
        number: int,
    ) -> Iterator[Candidate]:
        """Yields the samples of the later steps at the same index of the same lane.

        So no other sample moves, and the lane's own rank finds the substitutes on every world size.
        """
        index = indices[number : number + 1]
        for later in range(step + 1, step + 1 + _MAX_SUBSTITUTES):
            samples = self.order.samples(later, self.rank_slice.lanes).take(index)
            views, labels = self._draw_views(step, samples)
            yield Candidate(samples, weights[number], views, labels[0])

    def image_size(self, step: int) -> int:
        """Returns height and width of the images of a step."""
        return [size for first, size in self._image_sizes if first <= step][-1]

    def _prefetch_shards(self, step: int) -> None:
        """Fetches the shards of the windows to come, whenever lanes come to a new shuffle window."""
        steps_taken = step - self._first_step
        if self._shards.is_remote and steps_taken % self.order.steps_per_window == 0:
            self._shards.prefetch(self.order.shards_ahead(step, self.rank_slice.lanes))

    def _draw_blends(self, step: int, samples: Samples) -> mixup.Blends | None:
        if not self._config.mix.is_active:
            return None
        lane = samples.position // self.order.share
        lanes, of_sample = np.unique(lane, return_inverse=True)
        key = keys.key(self._config.run.seed, Stream.MIX, step, lanes)
        size = self.image_size(step)
        blends = mixup.draw(self._config.mix, key, size, size)
        return blends[of_sample]

    def _draw_drop_path(self, step: int, samples: Samples) -> Array | None:
        if not self._drops_paths:
            return None
        key = keys.key(
            self._config.run.seed,
            Stream.DROP_PATH,
            step,
            samples.position,
        )
        is_kept = keys.uniform(key, len(self._keep_rates)) < self._keep_rates  # [N, num_branches]
        factors = is_kept / self._keep_rates
        return factors.T.astype(np.float32)

    def _make_batch(self, plan: Plan, images: Tensor) -> MicroBatch:
        device = images.device
        targets = self._transform.training_batch(plan.targets, device)
        if plan.blends is not None:
            images = mixup.mix_images(images, plan.blends)
            targets = mixup.mix_targets(targets, plan.blends)
        arrays = [plan.weights]
        if plan.drop_path is not None:
            arrays.append(plan.drop_path)
        # Both in one copy.
        weights, *drop_path = to_device(arrays, device)
        return MicroBatch(
            images,
            _list_extents(plan),
            targets,
            weights,
            drop_path[0] if drop_path else None,
            plan.samples,
        )

    def close(self) -> None:
        self._stream.close()


def _list_image_sizes(config: Config, steps_per_epoch: int) -> list[tuple[int, int]]:
    """Returns the resolution schedule: (first step, size), in order, from step 0 on."""
    in_steps = functools.partial(
        Length.steps,
        steps_per_epoch=steps_per_epoch,
        global_batch_size=config.train.global_batch_size,
    )
    total = in_steps(config.train.length)
    sizes = {0: config.image.size}
    for length, size in config.augment.size_schedule.items():
        sizes[in_steps(length, total=total)] = size
    return sorted(sizes.items())


def _read_sizes(records: Array) -> Array:
    """Returns heights and widths, [n, 2]."""
    sizes = np.stack([records["height"], records["width"]], axis=-1)
    return sizes.astype(np.int64)


def _read_labels(records: Array) -> Array:
    return records["label"].astype(np.int64)


def _list_extents(plan: Plan) -> list[tuple[int, int]]:
    return [(height, width) for height, width in plan.views.extent.tolist()]


class EvalFeed:
    """Every sample of a data set exactly once, over all ranks, as `task` (None: classification) sees it. Damaged
    samples have no weight.

    The data set is cut into batches in its stored order and rank r takes batches r, r + W, …, or those of `batches`;
    short and missing ones are filled up with weightless samples. With `transform`, the data set needs no annotations
    but those that it takes. The samples of a batch do not depend on the world size, nor do its results.
    """

    def __init__(
        self,
        shards: SampleSource,
        world: World,
        image: ImageConfig,
        *,
        task: TaskConfig | None = None,
        transform: EvaluationTransform | None = None,
        batches: Sequence[int] | None = None,
        batch_size: int,
        num_threads: int = 0,
        prefetch: int = 2,
        quarantine: Quarantine | None = None,
    ) -> None:
        if transform is None:
            task = task or ClassificationConfig()
            require_annotations(task, shards)
            transform = task_transform(task, image, len(shards.classes))
        self._shards = shards
        self._world = world
        self._image = image
        self._transform = transform
        self.num_samples = len(shards)
        self._batch_size = min(batch_size, self.num_samples)
        if batches is None:
            num_rounds = -(-self.num_samples // (self._batch_size * world.size))
            batches = range(world.rank, num_rounds * world.size, world.size)
        self._batches = batches
        self.num_batches = len(batches)
        self._first_id = np.cumsum(shards.shard_samples) - shards.shard_samples
        # Each evaluation starts a stream of its own.
        self._start_stream = functools.partial(
            ImageStream,
            0,
            shards,
            Quarantine(shards) if quarantine is None else quarantine,
            world,
            image,
            make_plan=self.plan,
            make_batch=self._make_batch,
            make_target=self._transform.evaluation_target,
            batch_size=self._batch_size,
            num_threads=num_threads,
            prefetch=prefetch,
            deterministic=True,
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        stream = self._start_stream()
        try:
            for _ in range(self.num_batches):
                yield stream.next()
        finally:
            stream.close()

    def _make_batch(self, plan: Plan, images: Tensor) -> MicroBatch:
        targets = self._transform.evaluation_batch(plan.targets, images.device)
        (weights,) = to_device([plan.weights], images.device)
        return MicroBatch(
            images,
            _list_extents(plan),
            targets,
            weights,
            None,
            plan.samples,
        )

    def blank(self) -> MicroBatch:
        """Returns a batch of one sample with weight 0 and without a target."""
        size = self._image.size
        device = self._world.device
        first = np.zeros(1, np.int64)
        return MicroBatch(
            torch.zeros(1, 3, size, size, device=device),
            [(size, size)],
            None,
            torch.zeros(1, device=device),
            None,
            self._make_samples(first, first),
        )

    def plan(self, number: int) -> Plan:
        """Returns the plan of this rank's batch `number`. Reading ahead asks for batches beyond the last, which nobody
        takes: they hold a single filler."""
        if number < self.num_batches:
            position = self._batches[number] * self._batch_size + np.arange(self._batch_size)
        else:
            position = np.array([self.num_samples])
        weights = (position < self.num_samples).astype(np.float32)
        sample_id = np.minimum(position, self.num_samples - 1)
        samples = self._make_samples(sample_id, position)
        views, labels = self._make_views(samples)
        return Plan(
            samples,
            weights,
            views,
            labels,
            functools.partial(self._find_substitutes, samples),
        )

    def _make_views(self, samples: Samples) -> tuple[Views, Array]:
        """Returns the views of samples, and their class labels."""
        records = self._shards.records(samples.shard, samples.row)
        views = self._transform.evaluation_views(_read_sizes(records))
        return views, _read_labels(records)

    def _find_substitutes(self, planned: Samples, index: int) -> Iterator[Candidate]:
        """Yields the samples that follow in the data set, without weight: they only fill the batch."""
        first = planned.take(slice(index, index + 1))
        for distance in range(1, min(self.num_samples, _MAX_SUBSTITUTES)):
            sample_id = (first.id + distance) % self.num_samples
            samples = self._make_samples(sample_id, first.position)
            views, labels = self._make_views(samples)
            yield Candidate(samples, np.float32(0), views, labels[0])

    def _make_samples(self, sample_id: Array, position: Array) -> Samples:
        shard = np.searchsorted(self._first_id, sample_id, side="right") - 1
        zeros = np.zeros_like(sample_id)
        return Samples(
            position,
            epoch=zeros,
            copy=zeros,
            shard=shard,
            row=sample_id - self._first_id[shard],
            id=sample_id,
        )
