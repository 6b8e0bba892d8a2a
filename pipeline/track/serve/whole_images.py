"""What networks for whole images are shown of one, when they are served and where exports are compared.

encoded image ──fit──▶ the short side resized ──normalise, pad──▶ canvas [3, H, W], of which the image fills the extent

As evaluation does it, one image at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline.config import ClassificationConfig
from pipeline.shards import images
from pipeline.track.model_card import ModelCard
from pipeline.track.serve import load_network
from pvt.model import STRIDES

CANVAS_DIVISOR = STRIDES[-1]
"""Sides of the network's input are multiples of this, in pixels."""

Size = tuple[int, int]  # height, width


class View(NamedTuple):
    image: Image.Image
    """Resized."""
    size: Size
    """That it had."""

    @property
    def extent(self) -> Size:
        """What it fills of the canvas, from the upper left."""
        return self.image.height, self.image.width


class ServedOnWholeImages(ABC):
    """A network that is served and sees whole images, see served.Answering. What it answers is its task's."""

    batch_size: int = 1
    columns: Sequence[str]

    def __init__(self, card: ModelCard, weights: Path) -> None:
        self._card, self._network = card, load_network.load_network(card, weights)

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException for more pixels in all: each costs time, and may have its place in the answer."""
        num_pixels = sum(header.height * header.width for header in headers)
        if num_pixels > max_pixels:
            raise MlflowException.invalid_parameter_value(
                f"the images have {num_pixels:,} pixels; those of a request may have {max_pixels:,}"
            )

    def resized(self, height: int, width: int) -> Size:
        return fit(self._card, height, width)

    def view(self, data: bytes) -> View:
        image = images.decode(data)
        return View(shown(self._card, image), (image.height, image.width))

    def answers(self, views: Sequence[View], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Raises RuntimeError where what the network gives is not finite."""
        return [self._answer(view, pixels(self._card, view.image), params) for view in views]

    @abstractmethod
    def _answer(self, view: View, canvas: Tensor, params: Mapping[str, Any]) -> dict[str, Any]: ...


def fit(card: ModelCard, height: int, width: int) -> Size:
    """To which height and width evaluation resizes an image: its short side to the task's, unless the long one would
    get too long."""
    assert not isinstance(card.task, ClassificationConfig)
    short, long = card.task.sides(card.image)
    factor = min(short / min(height, width), long / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def shown(card: ModelCard, image: Image.Image) -> Image.Image:
    """An RGB image as evaluation resizes it."""
    height, width = fit(card, image.height, image.width)
    return image.resize((width, height), Image.Resampling[card.image.interpolation.upper()])


def pixels(card: ModelCard, image: Image.Image) -> Tensor:
    """The network's input, [3, H, W], of a resized image: normalised, with zeros below it and at its right."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (card.image.mean, card.image.std))
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    below, right = (-side % CANVAS_DIVISOR for side in (image.height, image.width))
    return functional.pad((values / 255 - mean) / std, (0, right, 0, below))
