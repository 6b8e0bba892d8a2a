"""The DALI graph: encoded bytes and view parameters in, normalised image tensors out. One graph for CPU and GPU.

bytes ─▶ decode [anchor, shape] ─▶ resize [roi] to S × S ─▶ flip, normalise ─▶ [N, 3, S, S] float32
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

from pipeline.config import Image


class Decoder:
    """Runs the graph over what `source(i)` returns for i = 0, 1, 2, …: a list of encoded images and the arrays of
    Views in their order. `source` is called ahead of `next`, at most `prefetch` times.

    An encoded image that cannot be decoded raises RuntimeError for its whole batch.
    """

    def __init__(
        self,
        source: Callable[[int], Sequence[Any]],
        *,
        batch_size: int,
        image: Image,
        device: torch.device,
        num_threads: int,
        prefetch: int,
        deterministic: bool,
    ) -> None:
        self._pipeline: Pipeline | None = _graph(  # pyright: ignore[reportCallIssue]
            source,
            image.size,
            [255 * mean for mean in image.mean],
            [255 * std for std in image.std],
            "mixed" if device.type == "cuda" else "cpu",
            # The hardware decoder rounds differently from the CUDA one, and which of them takes an image depends on
            # load.
            {"hw_decoder_load": 0.0} if device.type == "cuda" and deterministic else {},
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device.index if device.type == "cuda" else None,
            prefetch_queue_depth=prefetch,
        )
        self._pipeline.build()

    def next(self) -> torch.Tensor:
        """The next batch, [N, 3, S, S] float32 on the device, in memory of its own."""
        assert self._pipeline, "closed"
        (output,) = self._pipeline.run()
        # Copied, because DALI reuses its buffers for the batch after next.
        return to_torch_tensor(output.as_tensor(), copy=True)

    def close(self) -> None:
        """Free the pipeline's threads and memory now: it and its source refer to each other."""
        self._pipeline = None


@pipeline_def
def _graph(
    source: Callable[[int], Sequence[Any]],
    image_size: int,
    mean: list[float],
    std: list[float],
    decoder: str,
    decoder_options: dict[str, Any],
) -> Any:
    encoded, anchor, shape, roi_start, roi_end, flip = fn.external_source(source=source, num_outputs=6, batch=True)
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
    images = fn.resize(
        images,
        size=(image_size, image_size),
        roi_start=roi_start,
        roi_end=roi_end,
        interp_type=types.DALIInterpType.INTERP_CUBIC,
        antialias=True,
    )
    return fn.crop_mirror_normalize(
        images, mirror=flip, mean=mean, std=std, dtype=types.DALIDataType.FLOAT, output_layout="CHW"
    )
