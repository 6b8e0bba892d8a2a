"""Does an export compute what the model computes? On real images, in batches of several sizes, and for the pixels, too.

images ──ours──▶ pixels ──┬─▶ our network ─▶ logits, of detectors also boxes ─┐
   │                      └─▶ the export  ─▶ logits, boxes ───────────────────┴─▶ largest differences
   └──────the export's own preprocessing──▶ pixels

Networks for whole images get them in their own sizes, alone and several on one canvas.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import ExternalError, InputError
from pipeline.shards.cache import DEFAULT_CACHE, CacheOptions
from pipeline.shards.images import BadImageError, decode
from pipeline.shards.index import CorruptSampleError
from pipeline.shards.open_data import open_data
from pipeline.track.export.graphs import BOXES, LOGITS
from pipeline.track.export.source import ExportSource

TOLERANCE = 1e-4
"""Of logits, absolute."""
BOX_TOLERANCE = 0.1
"""In pixels. A box is its anchor's side times the exponential of what the network gives."""
PIXEL_TOLERANCE = 3.0
"""In grey levels of 255. Implementations of a resize round differently, twice; on photographs up to 2 were seen."""
MOST_IMAGES, MOST_WHOLE_IMAGES = 256, 16
"""The latter, for networks that see whole images, are larger and cost more."""
_BATCH_SIZE = 16


class OpenedExport(NamedTuple):
    """An export as its users have it."""

    outputs: Callable[..., Tensor | tuple[Tensor, ...]]
    """What graphs.py says of the model's task."""
    pixels: Callable[[Image.Image], Tensor] | None = None
    """An RGB image to [3, size, size], where the format has preprocessing of its own."""


class Comparison(NamedTuple):
    images: int
    predictions: int
    """As many, or the places of their maps, or their boxes."""
    same_top1: int
    """For how many predictions the best class is the same."""
    logit_difference: float
    """The largest."""
    box_difference: float | None
    """The largest, in pixels; None where there are no boxes."""
    pixel_difference: float | None
    """The largest on images cut to a square, in grey levels; None where the format has no preprocessing of its own,
    and for interpolation "nearest"."""


def real_images(data: str | None, most: int = MOST_IMAGES, cache: CacheOptions = DEFAULT_CACHE) -> list[Image.Image]:
    """At most `most` from all over a packed data set; without one, two photographs and their halves.

    Raises InputError for what is no packed data set, and for damaged samples.
    """
    if data is None:
        return [part for photograph in _photographs() for part in (photograph, *_halves(photograph))]
    shards = open_data(data, cache=cache)
    ends = np.cumsum(shards.shard_samples)
    places = np.linspace(0, len(shards) - 1, min(len(shards), most)).astype(int)
    images = []
    for place, shard in zip(places, np.searchsorted(ends, places, side="right"), strict=True):
        row = int(place - ends[shard] + shards.shard_samples[shard])
        try:
            images.append(decode(shards.read(int(shard), row)))
        except (CorruptSampleError, BadImageError) as error:
            raise InputError(
                f"--data {data}: sample {shards.key(int(shard), row)} of {shards.url(int(shard))}: {error}; "
                "run launch/shards.py verify, or check with other data"
            ) from error
    shards.close()
    return images


def compare_outputs(
    source: ExportSource, opened: OpenedExport, varying: dict[str, str], images: list[Image.Image], to: str
) -> Comparison:
    """Raises ExternalError where logits or pixels differ by more than they may."""
    batches = _batches(source, images)
    compared = [_compare(source, opened, batch) for batch in batches]
    if "height" in varying:
        compared.append(_compare(source, opened, _larger(source, images[:2])))
    logits = max(each.logits for each in compared)
    boxes = max(each.boxes for each in compared) if BOXES in source.graph().outputs else None
    _refuse_above(TOLERANCE, logits, f"{source.uri}: its export to {to} gives other logits")
    _refuse_above(BOX_TOLERANCE, boxes or 0.0, f"{source.uri}: its export to {to} gives other boxes")
    levels = _largest_levels(source, opened.pixels, images)
    _refuse_above(PIXEL_TOLERANCE, levels or 0.0, f"{source.uri}: its export to {to} prepares images otherwise")
    counted = compared[: len(batches)]
    predictions, same = sum(each.predictions for each in counted), sum(each.same_top1 for each in counted)
    return Comparison(len(images), predictions, same, logits, boxes, levels)


class _Compared(NamedTuple):
    """A batch's."""

    logits: float
    boxes: float
    predictions: int
    same_top1: int


def _batches(source: ExportSource, images: list[Image.Image]) -> list[tuple[Tensor, ...]]:
    """One image, then many at a time; of whole images each one alone."""
    if source.sees_whole:
        return [source.inputs([image]) for image in images]
    (batches,) = source.inputs(images)
    return [(batch,) for batch in (batches[:1], *batches[1:].split(_BATCH_SIZE)) if len(batch)]


def _larger(source: ExportSource, images: list[Image.Image]) -> tuple[Tensor, ...]:
    """Images that are larger than those of training and not square; or whole ones on a canvas that holds both."""
    size, divisor = source.card.image.size, source.size_divisor
    assert divisor
    if source.sees_whole:
        return source.inputs(images)
    return (torch.stack([source.pixels(image, size + 2 * divisor)[..., : size + divisor] for image in images]),)


def _compare(source: ExportSource, opened: OpenedExport, batch: tuple[Tensor, ...]) -> _Compared:
    graph = source.graph()
    ours, theirs = _tuple(graph(*batch)), _tuple(opened.outputs(*batch))
    logits, boxes, *_ = *(_difference(*pair) for pair in zip(ours, theirs, strict=True)), 0.0
    axis = graph.outputs[LOGITS].index("C")
    best, also = ours[0].argmax(axis), theirs[0].argmax(axis)
    return _Compared(logits, boxes, best.numel(), int((best == also).sum()) if best.shape == also.shape else 0)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest; of nothing found 0."""
    if ours.shape != theirs.shape:
        return torch.inf
    return (ours - theirs).abs().nan_to_num(torch.inf).max().item() if ours.numel() else 0.0


def _largest_levels(
    source: ExportSource, pixels: Callable[[Image.Image], Tensor] | None, images: list[Image.Image]
) -> float | None:
    if pixels is None or source.card.image.interpolation == "nearest":  # whose ties everybody breaks differently
        return None
    return max(_levels(source, pixels, image) for image in images)


def _levels(source: ExportSource, pixels: Callable[[Image.Image], Tensor], image: Image.Image) -> float:
    """The largest difference of pixels in grey levels. Square images have the same central crop for everybody."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    std = torch.tensor(source.card.image.std)[:, None, None]
    return (255 * std * (source.pixels(square) - pixels(square)).abs()).max().item()


def _refuse_above(tolerance: float, found: float, what: str) -> None:
    if found > tolerance:
        raise ExternalError(f"{what}: they differ by up to {found:.2g}, {tolerance:g} is allowed; nothing was written")


def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(np.asarray(array)) for array in load_sample_images().images]


def _halves(image: Image.Image) -> list[Image.Image]:
    half = image.width // 2
    return [image.crop((left, 0, left + half, image.height)) for left in (0, half)]
