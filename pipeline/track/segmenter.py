"""What a segmentation network is shown of an image, whole, and how its logits become a map of the image's own size.

    image ──fit──▶ the short side resized ──normalise, pad──▶ [3, H, W] ──network──▶ logits [K, H / 4, W / 4]
                                                                                              │
    PNG ◀── [h, w] of class + 1 ◀──the best class of each pixel◀──resize──◀──cut──◀──resize───┘

As evaluation does it, one image at a time. At rest, maps have the values of ADE20K's: c + 1 is class c; 0, no class, is
never answered.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline import config
from pipeline.palette import palette
from pipeline.shards import images
from pipeline.track import network
from pipeline.track.card import Card
from pvt.model import STRIDES

CANVAS_DIVISOR = STRIDES[-1]
"""Sides of the network's input are multiples of this, in pixels."""


class View(NamedTuple):
    image: Image.Image
    """Resized."""
    size: tuple[int, int]
    """Height and width that it had."""


class Segmenter:
    batch_size: int = 1
    columns: Sequence[str] = ("mask", "labels", "values", "shares")

    def __init__(self, card: Card, weights: Path) -> None:
        self._card, self._network = card, network.load(card, weights)

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException for more pixels in all: each costs time, and has its place in the answer."""
        num_pixels = sum(header.height * header.width for header in headers)
        if num_pixels > max_pixels:
            raise MlflowException.invalid_parameter_value(
                f"the images have {num_pixels:,} pixels; those of a request may have {max_pixels:,}"
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        return fit(self._card, height, width)

    def view(self, data: bytes) -> View:
        image = images.decode(data)
        return View(shown(self._card, image), (image.height, image.width))

    def answers(self, views: Sequence[View], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Raises RuntimeError for logits that are not finite."""
        return [self._answer(view) for view in views]

    def _answer(self, view: View) -> dict[str, Any]:
        canvas = pixels(self._card, view.image)
        logits = self._network(canvas[None])[0]
        if not logits.isfinite().all():
            raise RuntimeError("the network's logits are not finite")
        extent = (view.image.height, view.image.width)
        labels = class_map(logits, (canvas.shape[1], canvas.shape[2]), extent, view.size).numpy()
        counts = np.bincount(labels.ravel(), minlength=len(self._card.classes))
        found = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
        return {
            "mask": base64.b64encode(_png(labels + np.uint8(1))).decode(),
            "labels": [self._card.classes[label] for label in found],
            "values": [label + 1 for label in found],
            "shares": [float(counts[label] / labels.size) for label in found],
        }


def fit(card: Card, height: int, width: int) -> tuple[int, int]:
    """To which height and width evaluation resizes an image: its short side to the task's, unless the long one would
    get too long."""
    assert isinstance(card.task, config.SemanticFpn)
    short, long = card.task.sides(card.image)
    factor = min(short / min(height, width), long / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def shown(card: Card, image: Image.Image) -> Image.Image:
    """An RGB image as evaluation resizes it."""
    height, width = fit(card, image.height, image.width)
    return image.resize((width, height), Image.Resampling[card.image.interpolation.upper()])


def pixels(card: Card, image: Image.Image) -> Tensor:
    """The network's input, [3, H, W], of a resized image: normalised, with zeros below it and at its right."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (card.image.mean, card.image.std))
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    below, right = (-side % CANVAS_DIVISOR for side in (image.height, image.width))
    return functional.pad((values / 255 - mean) / std, (0, right, 0, below))


def class_map(logits: Tensor, canvas: tuple[int, int], extent: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The best class of each pixel of an image, [height, width] uint8, from logits [K, h, w].

    `canvas`: height and width of the network's input, of which the image filled the upper left `extent`; `size`: its
    own. One class is resized at a time: at full size all of them at once could need gigabytes.
    """
    labels = torch.zeros(size, dtype=torch.uint8)
    best = torch.full(size, -torch.inf)
    for number, plane in enumerate(logits):
        on_canvas = _resize(plane[None, None], canvas)[..., : extent[0], : extent[1]]
        at_full_size = _resize(on_canvas, size)[0, 0]
        labels.masked_fill_(at_full_size > best, number)
        torch.maximum(best, at_full_size, out=best)
    return labels


def _resize(planes: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(planes, size, mode="bilinear", align_corners=False)


def _png(values: npt.NDArray[np.uint8]) -> bytes:
    """With a palette, for people, in which 0 is black."""
    image = Image.fromarray(values)
    image.putpalette(bytes(3) + palette(255).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
