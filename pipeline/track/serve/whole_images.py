"""A served network that sees whole images: each is resized, and put on a canvas of its own.

encoded image ──view──▶ resized image ──normalise, pad──▶ canvas [3, H, W], of which the image fills the extent
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.types import ParamSpec
from PIL import Image
from torch import Tensor

from pipeline.evaluation_view import Size, normalise, pad_to_canvas, resize_whole, whole_size
from pipeline.shards import images
from pipeline.track.model_card import ModelCard
from pipeline.track.serve import load_network


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
    columns: Mapping[str, Any]
    params: Sequence[ParamSpec] = ()

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
        return whole_size(self._card.task, self._card.image, height, width)

    def view(self, data: bytes) -> View:
        """Decodes and resizes an image. Raises BadImageError."""
        image = images.decode(data)
        resized = resize_whole(image, self._card.task, self._card.image)
        return View(resized, (image.height, image.width))

    def answers(self, views: Sequence[View], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns a row for each image. Raises RuntimeError where the network's outputs are not finite."""
        canvases = (pad_to_canvas(normalise(view.image, self._card.image)) for view in views)
        return [self._answer(view, canvas, params) for view, canvas in zip(views, canvases, strict=True)]

    @abstractmethod
    def _answer(self, view: View, canvas: Tensor, params: Mapping[str, Any]) -> dict[str, Any]: ...
