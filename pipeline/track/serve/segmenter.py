"""A served segmentation network: which class each pixel of an image is of.

view ──canvas [3, H, W]──network──▶ logits [K, H / 4, W / 4] ──answers.class_map──▶ [h, w] ──▶ PNG, labels, shares
"""

from collections.abc import Mapping
from typing import Any

from mlflow.types.schema import Array
from torch import Tensor

from pipeline.answers import class_map, segmentation_row
from pipeline.track.serve.whole_images import ServedOnWholeImages, View


class ServedSegmenter(ServedOnWholeImages):
    """Answers with the map of each image and the classes in it, see served_model.ServedNetwork."""

    columns: Mapping[str, Any] = {
        # Base64, because MLflow's server would write bytes as base64 in lines of 76 letters.
        "mask": "string",
        "labels": Array("string"),
        "values": Array("long"),
        "shares": Array("double"),
    }

    def describe(self, answer: Mapping[str, Any]) -> tuple[str, float]:
        """Returns the class of the most pixels with its share of them, in words and as a number."""
        share = answer["shares"][0]
        return f"{answer['labels'][0]} with a share of the pixels of {share:.4g}", share

    def _answer(self, view: View, canvas: Tensor, params: Mapping[str, Any]) -> dict[str, Any]:
        logits = self._network(canvas[None])[0]
        labels = class_map(logits, view.extent, view.size)
        return segmentation_row(labels.numpy(), self._card.classes)
