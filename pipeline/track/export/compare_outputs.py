"""Compares what an export computes with what the model computes, on real images, in batches of several sizes.

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
"""Largest difference of logits, absolute."""
BOX_TOLERANCE = 0.1
"""Largest difference in pixels. A box is its anchor's side times the exponential of what the network gives."""
PIXEL_TOLERANCE = 3.0
"""In grey levels of 255. Implementations of a resize round differently, twice; on photographs up to 2 were seen."""
MOST_IMAGES = 256
MOST_WHOLE_IMAGES = 16
"""Images for networks that see whole ones, which are larger and cost more."""
_BATCH_SIZE = 16


class OpenedExport(NamedTuple):
    """An export as its users open it."""

    outputs: Callable[..., Tensor | tuple[Tensor, ...]]
    """Computes what graphs.py lists for the model's task."""
    pixels: Callable[[Image.Image], Tensor] | None = None
    """Maps an RGB image to [3, size, size], where the format has preprocessing of its own."""


class Comparison(NamedTuple):
    """How much an export's outputs differ from the model's."""

    images: int
    predictions: int
    """Number of predictions: one for each image, or for each position of its map, or for each of its boxes."""
    same_top1: int
    """Number of predictions whose best class is the same."""
    logit_difference: float
    """The largest difference."""
    box_difference: float | None
    """The largest difference in pixels; None where there are no boxes."""
    pixel_difference: float | None
    """The largest difference on images cut to a square, in grey levels.

    None where the format has no preprocessing of its own, and for interpolation "nearest".
    """


def real_images(data: str | None, most: int = MOST_IMAGES, cache: CacheOptions = DEFAULT_CACHE) -> list[Image.Image]:
    """Returns at most `most` images from all over a packed data set; without one, two photographs and their halves.

    Raises InputError for what is no packed data set, and for damaged samples.
    """
    images = []
    if data is None:
        for photograph in _load_photographs():
            images += [photograph, *_cut_halves(photograph)]
        return images
    shards = open_data(data, cache=cache)
    # Samples are numbered through all shards. They are taken at equal distances, because neighbours are often alike.
    ends = np.cumsum(shards.shard_samples)
    samples = np.linspace(0, len(shards) - 1, min(len(shards), most)).astype(int)
    for sample, shard in zip(samples, np.searchsorted(ends, samples, side="right").tolist(), strict=True):
        row = int(sample - ends[shard] + shards.shard_samples[shard])
        try:
            images.append(decode(shards.read(shard, row)))
        except (CorruptSampleError, BadImageError) as error:
            raise InputError(
                f"--data {data}: sample {shards.key(shard, row)} of {shards.url(shard)}: {error}; "
                "run launch/shards.py verify, or check with other data"
            ) from error
    shards.close()
    return images


def compare_outputs(
    source: ExportSource, opened: OpenedExport, varying: dict[str, str], images: list[Image.Image], to: str
) -> Comparison:
    """Compares an export with its source. Raises ExternalError where outputs differ by more than the tolerances."""
    counted = [_compare_batch(source, opened, batch) for batch in _make_batches(source, images)]
    # Larger images count for the differences alone: predictions are reported for images as evaluation prepares them.
    compared = [*counted]
    if "height" in varying:
        compared.append(_compare_batch(source, opened, _make_larger_batch(source, images[:2])))
    logits = max(each.logits for each in compared)
    boxes = None
    if BOXES in source.graph().outputs:
        boxes = max(each.boxes for each in compared)
    export = f"{source.uri}: its export to {to}"
    _refuse_above(TOLERANCE, logits, f"{export} gives other logits")
    _refuse_above(BOX_TOLERANCE, boxes or 0.0, f"{export} gives other boxes")
    levels = _compare_pixels(source, opened.pixels, images)
    _refuse_above(PIXEL_TOLERANCE, levels or 0.0, f"{export} prepares images otherwise")
    return Comparison(
        len(images),
        sum(each.predictions for each in counted),
        sum(each.same_top1 for each in counted),
        logits,
        boxes,
        levels,
    )


class _BatchComparison(NamedTuple):
    """The differences of one batch, see Comparison."""

    logits: float
    boxes: float
    predictions: int
    same_top1: int


def _make_batches(source: ExportSource, images: list[Image.Image]) -> list[tuple[Tensor, ...]]:
    """Returns one image, then many at a time; of whole images each one alone."""
    if source.sees_whole:
        return [source.inputs([image]) for image in images]
    # A graph that takes its batch size for a constant fails on one of these.
    (pixels,) = source.inputs(images)
    batches = [pixels[:1]]
    if len(pixels) > 1:
        batches += pixels[1:].split(_BATCH_SIZE)
    return [(batch,) for batch in batches]


def _make_larger_batch(source: ExportSource, images: list[Image.Image]) -> tuple[Tensor, ...]:
    """Returns images larger than those of training and not square, or whole ones on a canvas that holds both."""
    if source.sees_whole:
        return source.inputs(images)
    size = source.card.image.size
    divisor = source.size_divisor
    assert divisor
    larger = [source.pixels(image, size + 2 * divisor)[..., : size + divisor] for image in images]
    return (torch.stack(larger),)


def _compare_batch(source: ExportSource, opened: OpenedExport, batch: tuple[Tensor, ...]) -> _BatchComparison:
    graph = source.graph()
    ours = _as_tuple(graph(*batch))
    theirs = _as_tuple(opened.outputs(*batch))
    # Classification and segmentation have logits only.
    differences = [_largest_difference(*pair) for pair in zip(ours, theirs, strict=True)]
    axis = graph.outputs[LOGITS].index("C")
    # Detectors may find other numbers of objects; then no prediction counts as the same.
    our_best = ours[0].argmax(axis)
    their_best = theirs[0].argmax(axis)
    same_top1 = 0
    if our_best.shape == their_best.shape:
        same_top1 = int((our_best == their_best).sum())
    return _BatchComparison(
        logits=differences[0],
        boxes=differences[1] if len(differences) > 1 else 0.0,
        predictions=our_best.numel(),
        same_top1=same_top1,
    )


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest absolute difference: infinite for other shapes or NaN, 0 where both are empty."""
    if ours.shape != theirs.shape:
        return torch.inf
    if not ours.numel():
        return 0.0
    return (ours - theirs).abs().nan_to_num(torch.inf).max().item()


def _compare_pixels(
    source: ExportSource, pixels: Callable[[Image.Image], Tensor] | None, images: list[Image.Image]
) -> float | None:
    # At "nearest" two pixels are often equally near, and libraries choose differently among them.
    if pixels is None or source.card.image.interpolation == "nearest":
        return None
    return max(_pixel_difference(source, pixels, image) for image in images)


def _pixel_difference(source: ExportSource, pixels: Callable[[Image.Image], Tensor], image: Image.Image) -> float:
    """Returns the largest difference of an image's pixels in grey levels."""
    # Libraries round the position of the central crop differently; in square images it is the same for all.
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    difference = (source.pixels(square) - pixels(square)).abs()
    std = torch.tensor(source.card.image.std)[:, None, None]
    return (255 * std * difference).max().item()


def _refuse_above(tolerance: float, found: float, what: str) -> None:
    if found > tolerance:
        raise ExternalError(f"{what}: they differ by up to {found:.2g}, {tolerance:g} is allowed; nothing was written")


def _load_photographs() -> list[Image.Image]:
    # An export that is compared on a data set does not need scikit-learn.
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(np.asarray(array)) for array in load_sample_images().images]


def _cut_halves(image: Image.Image) -> list[Image.Image]:
    half = image.width // 2
    return [image.crop((left, 0, left + half, image.height)) for left in (0, half)]
