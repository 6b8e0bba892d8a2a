"""The DALI graph: encoded bytes and windows in, uint8 images out. One graph for CPU and GPU.

bytes ─▶ decode [anchor, shape] ─▶ resize, crop ─▶ n images [h, w, 3] uint8, h and w as in Views.extent

With `resizes=False` it ends after decoding, with images of any size. The CPU path resizes in image_ops.py
instead, because DALI's resize is 9 times slower there than torch's.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor
from torch import Tensor

from pipeline.feed.augment import Views

EncodedBatch = tuple[Sequence[Any], Views]
"""n encoded images, [bytes] uint8 each, and their views."""

_INTERPOLATION = {
    "bicubic": types.DALIInterpType.INTERP_CUBIC,
    "bilinear": types.DALIInterpType.INTERP_LINEAR,
    "nearest": types.DALIInterpType.INTERP_NN,
}


class Decoder:
    """Runs the graph over what `source(i)` returns for i = 0, 1, 2, …, which is called ahead of `next`, at most
    `prefetch` times.

    An image that cannot be decoded raises RuntimeError for its whole batch, and perhaps before the batches that
    were decoded ahead of it are handed out.
    """

    def __init__(
        self,
        source: Callable[[int], EncodedBatch],
        *,
        batch_size: int,
        interpolation: str,
        device: torch.device,
        num_threads: int,
        prefetch: int,
        deterministic: bool,
        resizes: bool,
    ) -> None:
        self._resizes = resizes
        on_gpu = device.type == "cuda"
        decoder_options = {}
        if on_gpu and deterministic:
            # The hardware decoder rounds differently from the CUDA one, and which of them takes an image depends on
            # load.
            decoder_options["hw_decoder_load"] = 0.0
        self._pipeline: Pipeline | None = _define_graph(  # pyright: ignore[reportCallIssue]
            lambda iteration: _list_inputs(*source(iteration), resizes),
            "mixed" if on_gpu else "cpu",
            _INTERPOLATION[interpolation] if resizes else None,
            decoder_options,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=prefetch,
            # The dynamic executor does not touch the memory of images for as long as anybody holds them.
            exec_dynamic=True,
        )
        self._pipeline.build()

    @classmethod
    def on_cpu(cls, source: Callable[[int], EncodedBatch], batch_size: int) -> "Decoder":
        """Returns a decoder of a few images on the CPU, which does not resize them."""
        return cls(
            source,
            batch_size=batch_size,
            interpolation="nearest",
            device=torch.device("cpu"),
            num_threads=1,
            prefetch=1,
            deterministic=True,
            resizes=False,
        )

    def next(self) -> Tensor | list[Tensor]:
        """Returns the next batch, uint8: n images [h, w, 3], on the device if they are resized there and else on the
        host; or, resized and equal in size, all in one tensor [n, h, w, 3]."""
        assert self._pipeline, "closed"
        (output,) = self._pipeline.run()
        if not self._resizes:
            return [torch.from_numpy(np.asarray(output[i])) for i in range(len(output))]
        if output.is_dense_tensor():
            return to_torch_tensor(output.as_tensor(), copy=True)
        return [to_torch_tensor(output[i], copy=True) for i in range(len(output))]

    def close(self) -> None:
        """Frees the pipeline's threads and memory now. It and its source refer to each other, so that otherwise the
        garbage collector would do so later."""
        self._pipeline = None


class Probe:
    """Decodes samples one at a time, because DALI does not say which sample of a batch it failed on. Thread-safe.

    It does so on the CPU, whatever the feed's device: a pipeline costs 20 ms there, and one that failed is replaced.
    DALI's decoder on a GPU falls back to that of the CPU, so a sample that fails on a GPU fails here, too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batch: EncodedBatch | None = None
        self._decoder: Decoder | None = None

    def decodes(self, encoded: Any, view: Views) -> bool:
        """Returns whether DALI can decode the window of a view [1] of an image [bytes] uint8."""
        with self._lock:
            self._batch = [encoded], view
            self._decoder = self._decoder or Decoder.on_cpu(self._source, batch_size=1)
            try:
                self._decoder.next()
            except RuntimeError:
                # DALI does not promise that a pipeline which failed can go on.
                self._close()
                return False
            return True

    def close(self) -> None:
        with self._lock:
            self._close()

    def _source(self, iteration: int) -> EncodedBatch:
        assert self._batch
        return self._batch

    def _close(self) -> None:
        if self._decoder:
            self._decoder.close()
        self._decoder = None


def _list_inputs(
    encoded: Sequence[Any],
    views: Views,
    resizes: bool,
) -> list[Any]:
    """Returns the inputs of the graph for one batch."""
    inputs = [encoded, views.anchor, views.shape]
    if resizes:
        # The region of the window that the crop shows; resizing it alone gives the crop's pixels.
        scale = views.shape / views.resized
        start = views.corner * scale
        end = (views.corner + views.extent) * scale
        for value in (start, end, views.extent):
            inputs.append(value.astype(np.float32))
    return inputs


@pipeline_def
def _define_graph(
    source: Callable[[int], list[Any]],
    decoder: str,
    interpolation: types.DALIInterpType | None,
    decoder_options: dict[str, Any],
) -> Any:
    num_inputs = 3 if interpolation is None else 6
    inputs: Any = fn.external_source(
        source=source,
        num_outputs=num_inputs,
        batch=True,
    )
    encoded, anchor, shape, *region = inputs
    images: Any = fn.decoders.image_slice(
        encoded,
        anchor,
        shape,
        axes=(0, 1),
        device=decoder,
        output_type=types.DALIImageType.RGB,
        # torchvision and timm ignore EXIF orientation as well, and the index holds the stored size.
        adjust_orientation=False,
        # The host's libjpeg-turbo interpolates chroma; without this the GPU replicates it.
        jpeg_fancy_upsampling=True,
        **decoder_options,
    )
    if interpolation is None:
        return images
    roi_start, roi_end, size = region
    return fn.resize(
        images,
        size=size,
        roi_start=roi_start,
        roi_end=roi_end,
        interp_type=interpolation,
        antialias=True,
    )
