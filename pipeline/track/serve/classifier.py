"""What a classification network is shown of an image when it is served, and what it answers.

encoded image ──view──▶ [S, S, 3] uint8 ──network, many at once──▶ [n, K] probabilities ──▶ the best labels
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from torch import Tensor

from pipeline.shards import images
from pipeline.track.model_card import ModelCard
from pipeline.track.serve import load_network
from pipeline.track.serve.defaults import TOP_K

View = npt.NDArray[np.uint8]


class ServedClassifier:
    batch_size: int = 32
    columns: Sequence[str] = ("label", "score", "labels", "scores")

    def __init__(self, card: ModelCard, weights: Path) -> None:
        """Raises InputError for a backbone without a head."""
        card.require_head(card.model.name)
        self._classes, self._size = card.classes, card.image.size
        self._short_side = int(card.image.size / card.image.crop_pct)
        self._resampling = Image.Resampling[card.image.interpolation.upper()]
        self._mean = 255 * torch.tensor(card.image.mean)[:, None, None]
        self._scale = 1 / (255 * torch.tensor(card.image.std)[:, None, None])
        self._network = load_network.load_network(card, weights)

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException for a number of labels that is none."""
        top_k = params.get("top_k", TOP_K)
        if top_k is None or top_k < 1:
            raise MlflowException.invalid_parameter_value(f"top_k is {top_k}; a number of at least 1 was expected")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Of an image, before its centre is cut out."""
        short = min(height, width)
        return self._short_side * height // short, self._short_side * width // short

    def view(self, data: bytes) -> View:
        """What evaluation shows the network, [S, S, 3]: the centre of the image with its short side resized."""
        image = images.decode(data)
        height, width = self.resized(image.height, image.width)
        top, left = round((height - self._size) / 2), round((width - self._size) / 2)
        image = image.resize((width, height), self._resampling)
        return np.asarray(image.crop((left, top, left + self._size, top + self._size)))

    def answers(self, views: Sequence[View], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        best = self._probabilities(views).topk(min(params.get("top_k", TOP_K), len(self._classes)))
        labels = [[self._classes[label] for label in row] for row in best.indices.tolist()]
        return [
            {"label": names[0], "score": scores[0], "labels": names, "scores": scores}
            for names, scores in zip(labels, best.values.tolist(), strict=True)
        ]

    def _probabilities(self, views: Sequence[View]) -> Tensor:
        """[n, S, S, 3] to [n, K]."""
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous().float()
        return self._network((pixels - self._mean) * self._scale).softmax(dim=1)
