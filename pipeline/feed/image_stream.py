"""Carries out plans: reads bytes ahead, decodes, finishes, and replaces what turns out to be damaged.

    Plan k ─▶ bytes (reader threads) ─▶ Decoder (DALI) ─▶ windows ─▶ resize, finish (threads) ─▶ images ───┐  on a CPU
                │                                      ─▶ resized ─▶ finish (a batch at a time) ─▶ images ─┤  on a GPU
                └─▶ annotations ─▶ views, targets ─────────────────────────────────────────────────────────┴─▶ batch

A thread of its own conducts all of it ahead of need. On a GPU it does so on a CUDA stream of its own, beside training.

A plan is a pure function of its number. Whether a sample can be used is a function of the file's bytes and of the view
that the plan takes of it: the bytes match their checksum, and the window decodes. Where it cannot be used, the first of
the plan's substitutes for its place that can is taken. So what is fed depends neither on the world nor on what was
found before. The quarantine only says which files to decode by themselves before they enter a batch, because a file
that fails in one costs all others their decoding.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import ImageConfig
from pipeline.feed import image_ops
from pipeline.feed.augment import Views
from pipeline.feed.dali import Batch, Decoder, Probe
from pipeline.feed.mixup import Blends
from pipeline.feed.order import Samples
from pipeline.feed.quarantine import Quarantine, TooManyBadSamplesError
from pipeline.feed.task_transforms import Target
from pipeline.shards.index import CorruptSampleError, ShardSet
from pipeline.world import World

Array = npt.NDArray[Any]
Made = TypeVar("Made")

_TOGETHER = 8  # samples that a thread reads or finishes in one call: few calls, and no thread waits long for another
_UNDECODABLE = "its bytes are as they were packed, but they do not decode"


class Choice(NamedTuple):
    """A sample that may fill a place in a micro-batch, and how it is seen there."""

    samples: Samples  # one
    weight: np.float32
    view: Views  # one
    target: Any

    @property
    def shard_and_row(self) -> tuple[int, int]:
        return int(self.samples.shard[0]), int(self.samples.row[0])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a micro-batch of N samples but its pixels."""

    samples: Samples
    weights: Array  # [N] float32
    views: Views
    targets: Any  # [N] int64 class labels; or, once annotations are read, a list of what `target` made of them
    substitutes: Callable[[int], Iterator[Choice]]  # for a place whose sample cannot be used, in order of preference
    blends: Blends | None = None
    drop_path: Array | None = None  # [num_branches, N] float32

    def planned(self, place: int) -> Choice:
        """Returns the sample that is planned for a place."""
        here = slice(place, place + 1)
        return Choice(self.samples.take(here), self.weights[place], self.views[here], self.targets[place])

    def filled(self, choices: Sequence[Choice]) -> "Plan":
        """Returns this plan with N choices in place of those planned."""
        samples, weights, views, targets = zip(*choices, strict=True)
        return dataclasses.replace(
            self,
            samples=Samples.joined(samples),
            weights=np.array(weights),
            views=Views.joined(views),
            targets=np.array(targets) if isinstance(targets[0], np.integer) else list(targets),
        )


class _Read(NamedTuple):
    """A sample that can be used, as far as its bytes tell."""

    choice: Choice
    encoded: Array  # [bytes] uint8
    is_planned: bool


class ImageStream(Generic[Made]):
    """Carries out plans `first`, `first + 1`, … in order. `target` is called for each sample of annotated data, and
    `make` for each plan and its images, [N, 3, H, W] float32 on the device, as large as the plan's canvas."""

    def __init__(
        self,
        plan: Callable[[int], Plan],
        make: Callable[[Plan, Tensor], Made],
        first: int,
        shards: ShardSet,
        quarantine: Quarantine,
        world: World,
        image: ImageConfig,
        *,
        target: Target | None = None,
        noise: Tensor | None = None,
        batch_size: int,
        num_threads: int,
        prefetch: int,
        deterministic: bool,
    ) -> None:
        self._plan, self._make, self._shards, self._quarantine, self._target = plan, make, shards, quarantine, target
        self._on_gpu = world.device.type == "cuda"
        self._finisher = image_ops.Finisher(image, world.device, noise)
        self._cuda_stream = None
        if self._on_gpu:
            self._cuda_stream = torch.cuda.Stream(world.device)
            self._cuda_stream.wait_stream(torch.cuda.current_stream(world.device))  # for what the finisher holds
        threads = num_threads or world.num_cores
        self._readers = concurrent.futures.ThreadPoolExecutor(threads, "read")
        self._finishers = _single_threaded_pool(0 if self._on_gpu else threads)
        self._conductor = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._prefetch = prefetch
        self._buffers = _Buffers()
        self._ahead: collections.deque[concurrent.futures.Future[Callable[[], Made]]] = collections.deque()
        self._reading: dict[int, tuple[Plan, list[concurrent.futures.Future[list[_Read]]]]] = {}
        self._decoding: collections.deque[tuple[Plan, list[Array]]] = collections.deque()
        self._source_error: BaseException | None = None
        self._number = first  # of the next batch to come out of the decoder
        self._decoder_settings: dict[str, Any] = {
            "interpolation": image.interpolation,
            "device": world.device,
            "num_threads": threads,
            "deterministic": deterministic,
            "resizes": self._on_gpu,
        }
        self._batch_size = batch_size
        self._decoder = self._new_decoder()
        self._probe = Probe()

    def next(self) -> Made:
        """What `make` makes of the next plan.

        Raises StoreError when samples cannot be read and TooManyBadSamplesError when too many are damaged.
        """
        while len(self._ahead) < self._prefetch:
            self._ahead.append(self._conductor.submit(self._produce))
        return self._ahead.popleft().result()()

    def close(self) -> None:
        for pool in (self._conductor, self._readers, self._finishers):
            pool.shutdown(cancel_futures=True)
        self._decoder.close()
        self._probe.close()

    def _produce(self) -> Callable[[], Made]:
        """Carries out the next plan, on a GPU on the feed's own stream."""
        if self._cuda_stream is None:
            return self._carry_out()
        with torch.cuda.stream(self._cuda_stream):
            take = self._carry_out()
            self._cuda_stream.synchronize()  # which nobody but this thread waits for
            return take

    def _carry_out(self) -> Callable[[], Made]:
        """Returns what is left to be done by the thread that wants the batch."""
        decoded = self._decode()
        plan, _ = self._decoding.popleft()
        self._number += 1
        views = plan.views
        shape = len(plan.weights), 3, *views.canvas
        if self._on_gpu:
            images = torch.empty(shape, device=decoded[0].device)
            if isinstance(decoded, Tensor):
                self._finisher.finish(decoded, views, images)
            else:
                for i, image in enumerate(decoded):
                    self._finisher.finish(image[None], views[i : i + 1], images[i : i + 1])
            made = self._make(plan, images)
            return lambda: _handed_over(made)
        assert isinstance(decoded, list), "windows of any size"
        images = self._buffers.take(shape)
        parts = [range(first, first + _TOGETHER) for first in range(0, len(decoded), _TOGETHER)]
        working = [self._finishers.submit(self._finish, decoded, views, images, part) for part in parts]

        def take() -> Made:
            for part in working:
                part.result()
            return self._make(plan, images)  # here, where all of torch's threads are at hand

        return take

    def _finish(self, windows: list[Tensor], views: Views, images: Tensor, part: range) -> None:
        for i in part[: len(windows) - part.start]:
            self._finisher.finish_window(windows[i], views[i : i + 1], images[i : i + 1])

    def _decode(self) -> Tensor | list[Tensor]:
        while True:
            try:
                return self._decoder.next()
            except RuntimeError:
                if self._source_error:
                    raise
                # Which batch and which sample it was DALI does not say, and it has lost the batches in between:
                # find the culprits and start again from the last batch that came out whole.
                if not self._find_undecodable():
                    raise
                self._decoder.close()
                self._decoding.clear()
                self._reading.clear()
                self._decoder = self._new_decoder()

    def _new_decoder(self) -> Decoder:
        first = self._number
        return Decoder(
            lambda iteration: self._source(first + iteration),
            batch_size=self._batch_size,
            prefetch=self._prefetch,
            **self._decoder_settings,
        )

    def _source(self, number: int) -> Batch:
        """A batch's bytes and views. Called by the decoder, ahead of need."""
        try:
            plan, encoded = self._read(number)
        except BaseException as error:
            self._source_error = error
            raise
        self._decoding.append((plan, encoded))
        return encoded, plan.views

    def _read(self, number: int) -> tuple[Plan, list[Array]]:
        self._start_reading(number)
        plan, parts = self._reading.pop(number)
        self._start_reading(number + 1)
        read = [each for part in parts for each in part.result()]
        if self._target or not all(each.is_planned for each in read):
            plan = plan.filled([each.choice for each in read])
        return plan, [each.encoded for each in read]

    def _start_reading(self, number: int) -> None:
        if number not in self._reading:
            plan = self._plan(number)
            places = range(len(plan.weights))
            parts = [places[first : first + _TOGETHER] for first in range(0, len(places), _TOGETHER)]
            self._reading[number] = plan, [self._readers.submit(self._read_part, plan, part) for part in parts]

    def _read_part(self, plan: Plan, part: range) -> list[_Read]:
        read: list[_Read] = []
        for place in part:
            read.append(self._read_place(plan, place, _partner(plan, place, read)))
        return read

    def _read_place(self, plan: Plan, place: int, partner: int | None) -> _Read:
        """Reads the sample of a place, or the first substitute that can be used and is not `partner`, an id."""
        planned = plan.planned(place)
        substitutes = (choice for choice in plan.substitutes(place) if choice.samples.id[0] != partner)
        for choice in itertools.chain([planned], substitutes):
            try:
                return self._read_sample(choice)._replace(is_planned=choice is planned)
            except CorruptSampleError as error:
                self._quarantine.add(*choice.shard_and_row, str(error))
        shard, row = planned.shard_and_row
        raise TooManyBadSamplesError(
            f"{self._shards.url(shard)}: sample {self._shards.key(shard, row)!r} is damaged, and so are all that could "
            "replace it: restore the data set from its source"
        )

    def _read_sample(self, choice: Choice) -> _Read:
        shard, row = choice.shard_and_row
        encoded = np.frombuffer(self._shards.read(shard, row), np.uint8)
        if self._target:
            view, target = self._target(self._shards.read_annotation(shard, row), choice.view)
            choice = choice._replace(view=view, target=target)
        if self._quarantine.holds(shard, row) and not self._probe.decodes(encoded, choice.view):
            raise CorruptSampleError(_UNDECODABLE)
        return _Read(choice, encoded, is_planned=True)

    def _find_undecodable(self) -> bool:
        """Decodes each sample under way by itself and reports those that fail. Returns whether there are any."""
        found = False
        for plan, encoded in self._decoding:
            for place, data in enumerate(encoded):
                choice = plan.planned(place)
                if not self._probe.decodes(data, choice.view):
                    self._quarantine.add(*choice.shard_and_row, _UNDECODABLE)
                    found = True
        return found


def _partner(plan: Plan, place: int, read: Sequence[_Read]) -> int | None:
    """Returns the id that must not take the place: a sample is never mixed with itself.

    Of a pair, the first sample avoids the second one as planned, and the second the first as it was read.
    """
    if plan.blends is None:
        return None
    return int(plan.samples.id[place + 1]) if place % 2 == 0 else int(read[-1].choice.samples.id[0])


def _handed_over(made: Made) -> Made:
    """For this thread's CUDA stream: PyTorch gives the memory back to the one that it was made on, which must not use
    it again before this one is done with it."""
    for tensor in tensors_in(made):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return made


def tensors_in(value: object) -> Iterator[Tensor]:
    """All of them in a batch, wherever they are."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


class _Buffers:
    """Memory for batches on a CPU, used again when nobody holds a tensor of it any more.

    Fresh memory of this size comes from the kernel page by page, which costs as much as resizing the images does.
    """

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.float32]] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        self._arrays = [array for array in self._arrays if array.shape == shape]
        # A tensor made from an array, and every view of it, holds a reference to the array. These three do as well:
        # the list, the loop's variable, the argument.
        free = next((array for array in self._arrays if sys.getrefcount(array) == 3), None)
        if free is None:
            free = np.empty(shape, np.float32)
            self._arrays.append(free)
        return torch.from_numpy(free)


def _single_threaded_pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """A pool whose threads run torch on one core each: without it each of them brings a team of OpenMP threads."""
    pool = concurrent.futures.ThreadPoolExecutor(max(threads, 1), "finish", _use_one_core)
    # The setting is both a thread's and, for threads to come, the process's. So all threads are started now and the
    # process's is put back.
    before, together = torch.get_num_threads(), threading.Barrier(max(threads, 1) + 1)
    for _ in range(max(threads, 1)):
        pool.submit(together.wait)
    together.wait()
    torch.set_num_threads(before)
    return pool


def _use_one_core() -> None:
    torch.get_num_threads()  # at its first question torch gives a thread the process's setting, in place of its own
    torch.set_num_threads(1)
