"""Carries out plans: reads bytes ahead, decodes, finishes, and replaces what turns out to be damaged.

    Plan k ─▶ bytes (reader threads) ─▶ Decoder (DALI) ─▶ windows ─▶ resize, finish (threads) ─▶ images ───┐  on a CPU
                │                                      ─▶ resized ─▶ finish (a batch at a time) ─▶ images ─┤  on a GPU
                └─▶ annotations ─▶ views, targets ─────────────────────────────────────────────────────────┴─▶ batch

A thread of its own conducts all of it ahead of need. On a GPU it does so on a CUDA stream of its own, beside training.

A plan is a pure function of its number. Whether a sample can be used is a function of the file's bytes and of the view
that the plan takes of it: the bytes match their checksum, and the window decodes. A sample that cannot be used is
replaced by the first of the plan's substitutes that can. So what is fed depends neither on the world size nor on which
samples were found damaged before. The quarantine only says which files to decode by themselves before they enter a
batch, because a file that does not decode makes its whole batch fail.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import ImageConfig
from pipeline.feed import image_ops
from pipeline.feed.augment import Views
from pipeline.feed.dali import Decoder, EncodedBatch, Probe
from pipeline.feed.plan import Candidate, Plan
from pipeline.feed.quarantine import Quarantine, TooManyBadSamplesError
from pipeline.feed.task_transforms import Target
from pipeline.shards.index import CorruptSampleError, SampleSource
from pipeline.world import World

Array = npt.NDArray[Any]
Batch = TypeVar("Batch")

# Samples that a thread reads or finishes in one call: few calls, and no thread waits long for another.
_CHUNK = 8
_UNDECODABLE = "its bytes are as they were packed, but they do not decode"


class _ReadSample(NamedTuple):
    """A sample that can be used, as far as its bytes tell."""

    candidate: Candidate
    # [bytes] uint8.
    encoded: Array
    is_planned: bool = True


_ReadChunk = concurrent.futures.Future[list[_ReadSample]]


class ImageStream(Generic[Batch]):
    """Carries out plans `first`, `first + 1`, … in order and makes batches of them.

    It calls its feed for three things. `make_plan` returns the plan of a number. `make_batch` returns the batch of a
    plan and its images, [N, 3, H, W] float32 on the device, as large as the plan's canvas. `make_target`, which
    annotated data has, returns the target of one sample.
    """

    def __init__(
        self,
        first: int,
        shards: SampleSource,
        quarantine: Quarantine,
        world: World,
        image: ImageConfig,
        *,
        make_plan: Callable[[int], Plan],
        make_batch: Callable[[Plan, Tensor], Batch],
        make_target: Target | None,
        noise: Tensor | None = None,
        batch_size: int,
        num_threads: int,
        prefetch: int,
        deterministic: bool,
    ) -> None:
        self._make_plan = make_plan
        self._make_batch = make_batch
        self._make_target = make_target
        self._shards = shards
        self._quarantine = quarantine
        self._on_gpu = world.device.type == "cuda"
        self._finisher = image_ops.Finisher(image, world.device, noise)
        self._cuda_stream = None
        if self._on_gpu:
            self._cuda_stream = torch.cuda.Stream(world.device)
            # The finisher's tensors were made on the current stream.
            self._cuda_stream.wait_stream(torch.cuda.current_stream(world.device))
        threads = num_threads or world.num_cores
        self._readers = concurrent.futures.ThreadPoolExecutor(threads, "read")
        self._finishers = _start_single_threaded_pool(0 if self._on_gpu else threads)
        self._conductor = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._prefetch = prefetch
        self._buffers = _BufferPool()
        # Batches under way. Each gives a function that the thread which wants the batch calls to get it.
        self._ahead: collections.deque[concurrent.futures.Future[Callable[[], Batch]]] = collections.deque()
        # Plans whose samples are being read, by number, and then those that the decoder has taken.
        self._reading: dict[int, tuple[Plan, list[_ReadChunk]]] = {}
        self._decoding: collections.deque[tuple[Plan, list[Array]]] = collections.deque()
        self._source_error: BaseException | None = None
        # The number of the next batch to come out of the decoder.
        self._number = first
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

    def next(self) -> Batch:
        """Returns the batch of the next plan.

        Raises StoreError when samples cannot be read and TooManyBadSamplesError when too many are damaged.
        """
        while len(self._ahead) < self._prefetch:
            self._ahead.append(self._conductor.submit(self._produce))
        take_batch = self._ahead.popleft().result()
        return take_batch()

    def close(self) -> None:
        for pool in (self._conductor, self._readers, self._finishers):
            pool.shutdown(cancel_futures=True)
        self._decoder.close()
        self._probe.close()

    def _produce(self) -> Callable[[], Batch]:
        """Carries out the next plan, on a GPU on the feed's own stream."""
        if self._cuda_stream is None:
            return self._carry_out()
        with torch.cuda.stream(self._cuda_stream):
            take_batch = self._carry_out()
            # Only this thread waits here; training goes on, and finds the batch complete.
            self._cuda_stream.synchronize()
            return take_batch

    def _carry_out(self) -> Callable[[], Batch]:
        """Carries out the next plan as far as this thread can. Returns a function that does the rest."""
        decoded = self._decode()
        plan, _ = self._decoding.popleft()
        self._number += 1
        shape = len(plan.weights), 3, *plan.views.canvas
        if self._on_gpu:
            return self._finish_on_gpu(plan, decoded, shape)
        assert isinstance(decoded, list), "windows of any size"
        return self._finish_on_cpu(plan, decoded, shape)

    def _finish_on_gpu(
        self,
        plan: Plan,
        decoded: Tensor | list[Tensor],
        shape: tuple[int, ...],
    ) -> Callable[[], Batch]:
        views = plan.views
        images = torch.empty(shape, device=decoded[0].device)
        if isinstance(decoded, Tensor):
            self._finisher.finish(decoded, views, images)
        else:
            for i, image in enumerate(decoded):
                one = slice(i, i + 1)
                self._finisher.finish(image[None], views[one], images[one])
        batch = self._make_batch(plan, images)
        return lambda: _hand_over(batch)

    def _finish_on_cpu(
        self,
        plan: Plan,
        windows: list[Tensor],
        shape: tuple[int, ...],
    ) -> Callable[[], Batch]:
        images = self._buffers.take(shape)
        working = []
        for chunk in _cut(len(windows)):
            future = self._finishers.submit(
                self._finish_chunk,
                windows,
                plan.views,
                images,
                chunk,
            )
            working.append(future)

        def take_batch() -> Batch:
            for future in working:
                future.result()
            # In the thread that wants the batch, where all of torch's threads are at hand.
            return self._make_batch(plan, images)

        return take_batch

    def _finish_chunk(
        self,
        windows: list[Tensor],
        views: Views,
        images: Tensor,
        chunk: range,
    ) -> None:
        if len(views.ops) == 0 and (views.extent == views.extent[0]).all():
            # Few calls for many images, where no operation differs among them.
            whole = slice(chunk.start, chunk.stop)
            self._finisher.finish_windows(windows[whole], views[whole], images[whole])
            return
        for i in chunk:
            one = slice(i, i + 1)
            self._finisher.finish_window(windows[i], views[one], images[one])

    def _decode(self) -> Tensor | list[Tensor]:
        while True:
            try:
                return self._decoder.next()
            except RuntimeError:
                if self._source_error:
                    raise
                # DALI does not say which batch and which sample it failed on, and it has lost the batches in between:
                # find the samples and start again from the last batch that came out whole.
                if not self._find_undecodable():
                    raise
                self._decoder.close()
                self._decoding.clear()
                self._reading.clear()
                self._decoder = self._new_decoder()

    def _new_decoder(self) -> Decoder:
        first = self._number
        return Decoder(
            lambda iteration: self._feed_decoder(first + iteration),
            batch_size=self._batch_size,
            prefetch=self._prefetch,
            **self._decoder_settings,
        )

    def _feed_decoder(self, number: int) -> EncodedBatch:
        """Returns a batch's bytes and views. The decoder calls this ahead of need."""
        try:
            plan, encoded = self._read(number)
        except BaseException as error:
            # So that `_decode` does not take it for an image that does not decode.
            self._source_error = error
            raise
        self._decoding.append((plan, encoded))
        return encoded, plan.views

    def _read(self, number: int) -> tuple[Plan, list[Array]]:
        """Waits for the samples of a plan. Returns the plan as it was filled, and the encoded images."""
        self._start_reading(number)
        plan, chunks = self._reading.pop(number)
        # The next plan's samples are read while this one's are decoded.
        self._start_reading(number + 1)
        samples: list[_ReadSample] = []
        for chunk in chunks:
            samples += chunk.result()
        if self._make_target or not all(sample.is_planned for sample in samples):
            plan = plan.filled([sample.candidate for sample in samples])
        return plan, [sample.encoded for sample in samples]

    def _start_reading(self, number: int) -> None:
        if number in self._reading:
            return
        plan = self._make_plan(number)
        chunks = []
        for chunk in _cut(len(plan.weights)):
            chunks.append(
                self._readers.submit(
                    self._read_chunk,
                    plan,
                    chunk,
                )
            )
        self._reading[number] = plan, chunks

    def _read_chunk(self, plan: Plan, chunk: range) -> list[_ReadSample]:
        samples: list[_ReadSample] = []
        for index in chunk:
            partner = _find_partner(plan, index, samples)
            samples.append(self._read_index(plan, index, partner))
        return samples

    def _read_index(
        self,
        plan: Plan,
        index: int,
        partner: int | None,
    ) -> _ReadSample:
        """Reads the sample planned at an index, or the first substitute that can be used and whose id is not that of
        `partner`."""
        planned = plan.candidate(index)
        for candidate in itertools.chain([planned], plan.substitutes(index)):
            is_planned = candidate is planned
            if not is_planned and candidate.samples.id[0] == partner:
                continue
            try:
                sample = self._read_candidate(candidate)
                return sample._replace(is_planned=is_planned)
            except CorruptSampleError as error:
                self._quarantine.add(*candidate.shard_and_row, str(error))
        shard, row = planned.shard_and_row
        raise TooManyBadSamplesError(
            f"{self._shards.url(shard)}: sample {self._shards.key(shard, row)!r} is damaged, and so are all that could "
            "replace it: restore the data set from its source"
        )

    def _read_candidate(self, candidate: Candidate) -> _ReadSample:
        shard, row = candidate.shard_and_row
        encoded = np.frombuffer(self._shards.read(shard, row), np.uint8)
        if self._make_target:
            annotation = self._shards.read_annotation(shard, row)
            view, target = self._make_target(annotation, candidate.view)
            candidate = candidate._replace(view=view, target=target)
        if self._quarantine.holds(shard, row) and not self._probe.decodes(encoded, candidate.view):
            raise CorruptSampleError(_UNDECODABLE)
        return _ReadSample(candidate, encoded)

    def _find_undecodable(self) -> bool:
        """Decodes each sample under way by itself and reports those that fail. Returns whether there are any."""
        any_failed = False
        for plan, encoded in self._decoding:
            for index, data in enumerate(encoded):
                candidate = plan.candidate(index)
                if not self._probe.decodes(data, candidate.view):
                    self._quarantine.add(*candidate.shard_and_row, _UNDECODABLE)
                    any_failed = True
        return any_failed


def _cut(length: int) -> list[range]:
    """Returns the indices of a batch in chunks."""
    indices = range(length)
    return [indices[first : first + _CHUNK] for first in range(0, length, _CHUNK)]


def _find_partner(
    plan: Plan,
    index: int,
    samples: Sequence[_ReadSample],
) -> int | None:
    """Returns the id that must not be taken at an index: a sample is never mixed with itself. `samples` are those of
    the chunk that are read.

    Of a pair, the first sample avoids the second one as planned, and the second the first as it was read.
    """
    if plan.blends is None:
        return None
    if index % 2 == 0:
        return int(plan.samples.id[index + 1])
    return int(samples[-1].candidate.samples.id[0])


def _hand_over(batch: Batch) -> Batch:
    """Returns a batch for use on this thread's CUDA stream.

    PyTorch gives the memory of its tensors back to the stream that they were made on, which must not use it again
    before this stream is done with it.
    """
    for tensor in tensors_in(batch):
        if tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            tensor.record_stream(stream)
    return batch


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yields all tensors of a batch, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


class _BufferPool:
    """Memory for batches on a CPU, used again when nobody holds a tensor of it any more.

    Fresh memory of this size comes from the kernel page by page, which costs as much as resizing the images does.
    """

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.float32]] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor with values of any kind."""
        memory = self._take_free(shape)
        if memory is None:
            memory = np.empty(shape, np.float32)
        # A tensor made from an array, and every view of that tensor, hold the array. When the last one is gone, so is
        # the array, and its memory is free.
        lent = memory.view()
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)

    def _take_free(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
        while self._free:
            memory = self._free.pop()
            # Memory of another size is dropped: the size of images has changed.
            if memory.shape == shape:
                return memory
        return None


def _start_single_threaded_pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Returns a pool whose threads run torch on one core each. Without it each of them starts a team of OpenMP
    threads."""
    threads = max(threads, 1)
    pool = concurrent.futures.ThreadPoolExecutor(
        threads,
        "finish",
        _use_one_core,
    )
    # The setting is both a thread's and, for threads to come, the process's. So all threads are started now, and then
    # the process's setting is restored.
    before = torch.get_num_threads()
    all_started = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(before)
    return pool


def _use_one_core() -> None:
    # When first asked, torch gives a thread the process's setting in place of the thread's own, so ask before setting.
    torch.get_num_threads()
    torch.set_num_threads(1)
