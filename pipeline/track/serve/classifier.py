"""A served classification network: what it is shown of an image, and what it answers.

encoded image ──view──▶ [S, S, 3] uint8 ──network, many at once──▶ [n, K] probabilities ──▶ the best labels
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mlflow.exceptions import MlflowException
from mlflow.types import ParamSpec
from mlflow.types.schema import Array
from torch import Tensor

from pipeline.answers import classification_rows
from pipeline.evaluation_view import crop_centre, scaled_statistics, short_side_before_crop, short_side_sizes
from pipeline.shards import images
from pipeline.track.model_card import ModelCard
from pipeline.track.serve import load_network
from pipeline.track.serve.defaults import TOP_K

View = npt.NDArray[np.uint8]


class ServedClassifier:
    """Answers with the most probable labels of each image, see served_model.ServedNetwork."""

    batch_size: int = 32
    columns: Mapping[str, Any] = {
        "label": "string",
        "score": "double",
        "labels": Array("string"),
        "scores": Array("double"),
    }
    params: Sequence[ParamSpec] = (ParamSpec("top_k", "long", TOP_K),)

    def __init__(self, card: ModelCard, weights: Path) -> None:
        """Raises InputError for a backbone without a head."""
        card.require_head(card.model.name)
        self._classes = card.classes
        self._image = card.image
        self._mean, self._scale = scaled_statistics(card.image, torch.device("cpu"))
        self._network = load_network.load_network(card, weights)

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException where `top_k` is not a positive number of labels."""
        top_k = params.get("top_k", TOP_K)
        if top_k is None or top_k < 1:
            raise MlflowException.invalid_parameter_value(f"top_k is {top_k}; a number of at least 1 was expected")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that an image is resized to before its centre is cropped."""
        short = short_side_before_crop(self._image, self._image.size)
        height, width = short_side_sizes(short, np.array([[height, width]]))[0].tolist()
        return height, width

    def view(self, data: bytes) -> View:
        """Returns what evaluation shows the network, [S, S, 3]: the centre of the image with its short side resized."""
        return np.asarray(crop_centre(images.decode(data), self._image, self._image.size))

    def answers(self, views: Sequence[View], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns a row for each image: its best label and score, and the best `top_k` of them."""
        top_k = params.get("top_k", TOP_K)
        return classification_rows(self._logits(views).softmax(dim=1), self._classes, top_k)

    def describe(self, answer: Mapping[str, Any]) -> tuple[str, float]:
        """Returns the best label with its probability, in words and as a number."""
        return f"{answer['label']} with a probability of {answer['score']:.4g}", answer["score"]

    def _logits(self, views: Sequence[View]) -> Tensor:
        """Maps n images [S, S, 3] to logits [n, K]."""
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous().float()
        return self._network((pixels - self._mean) * self._scale)
