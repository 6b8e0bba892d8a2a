"""What networks for whole images are shown of one, when they are served and when exports are compared.

encoded image ──fit──▶ the short side resized ──normalise, pad──▶ canvas [3, H, W], of which the image fills the extent

Images are prepared as in evaluation, one at a time.
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

Size = tuple[int, int]
"""Height and width."""


class View(NamedTuple):
    """What a network is shown of an image."""

    image: Image.Image
    """The resized image."""
    size: Size
    """The size that the image had."""

    @property
    def extent(self) -> Size:
        """The height and width that the image fills of the canvas, from the upper left."""
        return self.image.height, self.image.width


class ServedOnWholeImages(ABC):
    """A served network that sees whole images, see served_model.ServedNetwork. A subclass for each task answers."""

    # Images have different sizes. A common canvas would change what the network sees of each.
    batch_size: int = 1
    columns: Sequence[str]

    def __init__(self, card: ModelCard, weights: Path) -> None:
        self._card = card
        self._network = load_network.load_network(card, weights)

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException where a request's images have more than `max_pixels` together."""
        # Every pixel costs time, and answers can hold as many values as the images have pixels.
        num_pixels = sum(header.height * header.width for header in headers)
        if num_pixels > max_pixels:
            raise MlflowException.invalid_parameter_value(
                f"the images have {num_pixels:,} pixels; those of a request may have {max_pixels:,}"
            )

    def resized(self, height: int, width: int) -> Size:
        """Returns the height and width that an image is resized to."""
        return fit(self._card, height, width)

    def view(self, data: bytes) -> View:
        """Decodes and resizes an image. Raises BadImageError."""
        image = images.decode(data)
        return View(shown(self._card, image), (image.height, image.width))

    def answers(self, views: Sequence[View], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns a row for each image. Raises RuntimeError where the network's outputs are not finite."""
        return [self._answer(view, pixels(self._card, view.image), params) for view in views]

    @abstractmethod
    def _answer(self, view: View, canvas: Tensor, params: Mapping[str, Any]) -> dict[str, Any]: ...


def fit(card: ModelCard, height: int, width: int) -> Size:
    """Returns the height and width to which evaluation resizes an image.

    The short side becomes the task's short side, unless the long one would exceed the task's long side.
    """
    assert not isinstance(card.task, ClassificationConfig)
    short, long = card.task.sides(card.image)
    factor = min(
        short / min(height, width),
        long / max(height, width),
    )
    # A very long image could otherwise lose its short side to rounding.
    return max(1, round(height * factor)), max(1, round(width * factor))


def shown(card: ModelCard, image: Image.Image) -> Image.Image:
    """Resizes an RGB image as evaluation does."""
    height, width = fit(card, image.height, image.width)
    return image.resize((width, height), Image.Resampling[card.image.interpolation.upper()])


def pixels(card: ModelCard, image: Image.Image) -> Tensor:
    """Returns the network's input, [3, H, W], of a resized image: normalised, with zeros below it and at its right."""
    mean = torch.tensor(card.image.mean)[:, None, None]
    std = torch.tensor(card.image.std)[:, None, None]
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    # -side % divisor is what a side lacks to the next multiple.
    below = -image.height % CANVAS_DIVISOR
    right = -image.width % CANVAS_DIVISOR
    return functional.pad((values / 255 - mean) / std, (0, right, 0, below))
