"""Carries out plans: reads bytes ahead, decodes, finishes, and replaces what turns out to be damaged.

    Plan k ─▶ bytes (reader threads) ─▶ Decoder (DALI) ─▶ windows ─▶ resize, finish (threads) ─▶ images ───┐  on a CPU
                │                                      ─▶ resized ─▶ finish (a batch at a time) ─▶ images ─┤  on a GPU
                └─▶ annotations ─▶ views, targets ─────────────────────────────────────────────────────────┴─▶ batch

A thread of its own conducts all of it ahead of need. On a GPU it does so on a CUDA stream of its own, beside training.

A plan is a pure function of its number and of the quarantine. So a batch that holds a damaged sample is planned
again, with the sample known, and comes out the same on every replay.
"""

import collections
import concurrent.futures
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import Image
from pipeline.feed import pixels
from pipeline.feed.augment import Views
from pipeline.feed.dali import Batch, Decoder
from pipeline.feed.mix import Blends
from pipeline.feed.order import Samples
from pipeline.feed.quarantine import Quarantine
from pipeline.feed.recipe import Target
from pipeline.shards.index import CorruptSampleError, ShardSet
from pipeline.world import World

Array = npt.NDArray[Any]
Made = TypeVar("Made")

_TOGETHER = 8  # samples that a thread reads or finishes in one call: few calls, and no thread waits long for another


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a micro-batch of N samples but its pixels."""

    samples: Samples
    weights: Array  # [N] float32
    views: Views
    targets: Any  # [N] int64 class labels; or, once annotations are read, a list of what `target` made of them
    blends: Blends | None = None
    drop_path: Array | None = None  # [num_branches, N] float32


class _Sample(NamedTuple):
    """What was read of one."""

    encoded: Array  # [bytes] uint8
    view: Views
    target: Any


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A plan whose samples are being read."""

    plan: Plan
    parts: list[concurrent.futures.Future[list[_Sample | CorruptSampleError]]]
    num_bad: int  # known when it was planned


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
        image: Image,
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
        self._finisher = pixels.Finisher(image, world.device, noise)
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
        self._reading: dict[int, _Reading] = {}
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
        while True:
            self._start_reading(number)
            reading = self._reading.pop(number)
            self._start_reading(number + 1)
            if reading.num_bad == len(self._quarantine):
                samples = self._collect(reading)
                if reading.num_bad == len(self._quarantine):
                    return self._settled(reading.plan, samples), [sample.encoded for sample in samples]

    def _settled(self, plan: Plan, samples: list[_Sample]) -> Plan:
        """The plan with what the annotations say."""
        if self._target is None:
            return plan
        views, targets = Views.joined([sample.view for sample in samples]), [sample.target for sample in samples]
        return dataclasses.replace(plan, views=views, targets=targets)

    def _start_reading(self, number: int) -> None:
        if number not in self._reading:
            num_bad, plan = len(self._quarantine), self._plan(number)
            places = range(len(plan.weights))
            parts = [places[first : first + _TOGETHER] for first in range(0, len(places), _TOGETHER)]
            futures = [self._readers.submit(self._read_part, plan, part) for part in parts]
            self._reading[number] = _Reading(plan, futures, num_bad)

    def _read_part(self, plan: Plan, part: range) -> list[_Sample | CorruptSampleError]:
        found: list[_Sample | CorruptSampleError] = []
        for i in part:
            try:
                found.append(self._read_sample(plan, i))
            except CorruptSampleError as error:
                found.append(error)
        return found

    def _read_sample(self, plan: Plan, i: int) -> _Sample:
        shard, row = int(plan.samples.shard[i]), int(plan.samples.row[i])
        encoded, view, target = np.frombuffer(self._shards.read(shard, row), np.uint8), plan.views[i : i + 1], None
        if self._target:
            view, target = self._target(self._shards.read_annotation(shard, row), view)
        return _Sample(encoded, view, target)

    def _collect(self, reading: _Reading) -> list[_Sample]:
        """What was read; a short list where some samples were damaged, which the quarantine then holds."""
        samples = []
        for number, found in enumerate(found for part in reading.parts for found in part.result()):
            if isinstance(found, CorruptSampleError):
                self._put_away(reading.plan, number, str(found))
            else:
                samples.append(found)
        return samples

    def _put_away(self, plan: Plan, number: int, reason: str) -> None:
        shard, row = plan.samples.shard[number : number + 1], plan.samples.row[number : number + 1]
        if not self._quarantine.holds(shard, row)[0]:  # a filler may repeat a sample of its batch
            self._quarantine.add(int(shard[0]), int(row[0]), reason)

    def _find_undecodable(self) -> bool:
        """Decode each sample under way by itself and put away those that fail. Returns whether there are any."""
        found = False
        for plan, encoded in self._decoding:
            for number, data in enumerate(encoded):
                view = plan.views[number : number + 1]
                probe = Decoder(lambda _: ([data], view), batch_size=1, prefetch=1, **self._decoder_settings)  # noqa: B023
                try:
                    probe.next()
                except RuntimeError:
                    self._put_away(plan, number, "its bytes are as they were packed, but they do not decode")
                    found = True
                finally:
                    probe.close()
        return found


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
