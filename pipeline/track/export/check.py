"""Does an export compute what the model computes? On real images, in batches of several sizes, and for the pixels, too.

images ──ours──▶ pixels ──┬─▶ our network ─▶ logits ─┐
   │                      └─▶ the export  ─▶ logits ─┴─▶ largest difference
   └──────the export's own preprocessing──▶ pixels

Networks for whole images get them in their own sizes, alone and several on one canvas.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from pipeline.errors import ExternalError, InputError
from pipeline.shards.images import BadImageError, decode
from pipeline.shards.index import CorruptSampleError, ShardSet
from pipeline.track.export.source import Source

TOLERANCE = 1e-4
"""Of logits, absolute."""
PIXEL_TOLERANCE = 3.0
"""In grey levels of 255. Implementations of a resize round differently, twice; on photographs up to 2 were seen."""
MOST_IMAGES, MOST_WHOLE_IMAGES = 256, 16
"""The latter, for networks that give each pixel a class, are larger and cost more."""
_BATCH_SIZE = 16


class Opened(NamedTuple):
    """An export as its users have it."""

    logits: Callable[[Tensor], Tensor]
    """[B, 3, height, width] to [B, classes], or to [B, classes, height / 4, width / 4]."""
    pixels: Callable[[Image.Image], Tensor] | None = None
    """An RGB image to [3, size, size], where the format has preprocessing of its own."""


class Found(NamedTuple):
    images: int
    predictions: int
    """As many, or the places of their maps."""
    same_top1: int
    """For how many predictions the best class is the same."""
    logit_difference: float
    """The largest."""
    pixel_difference: float | None
    """The largest on images cut to a square, in grey levels; None where the format has no preprocessing of its own,
    and for interpolation "nearest"."""


def real_images(data: str | None, most: int = MOST_IMAGES) -> list[Image.Image]:
    """At most `most` from all over a packed data set; without one, two photographs and their halves.

    Raises InputError for what is no packed data set, and for damaged samples.
    """
    if data is None:
        return [part for photograph in _photographs() for part in (photograph, *_halves(photograph))]
    shards = ShardSet(data)
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


def check(source: Source, opened: Opened, varying: dict[str, str], images: list[Image.Image], to: str) -> Found:
    """Raises ExternalError where logits or pixels differ by more than they may."""
    predictions, same, difference = 0, 0, 0.0
    with torch.inference_mode():
        for batch in _batches(source, images):
            worst, equal, compared = _compare(source, opened, batch)
            difference, same, predictions = max(difference, worst), same + equal, predictions + compared
        if "height" in varying:
            worst, *_ = _compare(source, opened, _larger(source, images[:2]))
            difference = max(difference, worst)
    _refuse_above(TOLERANCE, difference, f"{source.uri}: its export to {to} gives other logits")
    levels = _largest_levels(source, opened.pixels, images)
    _refuse_above(PIXEL_TOLERANCE, levels or 0.0, f"{source.uri}: its export to {to} prepares images otherwise")
    return Found(len(images), predictions, same, difference, levels)


def _batches(source: Source, images: list[Image.Image]) -> list[Tensor]:
    """One image, then many at a time; of whole images each one alone."""
    pixels = [source.pixels(image) for image in images]
    if source.is_dense:
        return [whole[None] for whole in pixels]
    batches = torch.stack(pixels)
    return [batch for batch in (batches[:1], *batches[1:].split(_BATCH_SIZE)) if len(batch)]


def _larger(source: Source, images: list[Image.Image]) -> Tensor:
    """Images that are larger than those of training and not square; or whole ones on a canvas that holds both."""
    size, divisor = source.card.image.size, source.size_divisor
    assert divisor
    if source.is_dense:
        return _on_one_canvas([source.pixels(image) for image in images])
    return torch.stack([source.pixels(image, size + 2 * divisor)[..., : size + divisor] for image in images])


def _on_one_canvas(pixels: list[Tensor]) -> Tensor:
    height, width = (max(each.shape[axis] for each in pixels) for axis in (1, 2))
    return torch.stack([pad(each, (0, width - each.shape[2], 0, height - each.shape[1])) for each in pixels])


def _compare(source: Source, opened: Opened, batch: Tensor) -> tuple[float, int, int]:
    """The largest difference of logits, for how many predictions the best class is the same, and their number."""
    ours, theirs = source.network(batch), opened.logits(batch)
    difference = (ours - theirs).abs().max().nan_to_num(torch.inf)
    equal = ours.argmax(1) == theirs.argmax(1)
    return difference.item(), int(equal.sum()), equal.numel()


def _largest_levels(
    source: Source, pixels: Callable[[Image.Image], Tensor] | None, images: list[Image.Image]
) -> float | None:
    if pixels is None or source.card.image.interpolation == "nearest":  # whose ties everybody breaks differently
        return None
    return max(_levels(source, pixels, image) for image in images)


def _levels(source: Source, pixels: Callable[[Image.Image], Tensor], image: Image.Image) -> float:
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
