"""A served detector: where objects are in an image, in the image's own pixels, for some networks with masks.

view ──canvas [3, H, W], extent──network──▶ Detections ──answers.detection_row──▶ boxes, labels, scores
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.types import ParamSpec
from mlflow.types.schema import Array, Object, Property
from torch import Tensor

from pipeline.answers import detection_row
from pipeline.shards import images
from pipeline.track.model_card import ModelCard
from pipeline.track.serve.defaults import MIN_SCORE
from pipeline.track.serve.whole_images import ServedOnWholeImages, View


class ServedDetector(ServedOnWholeImages):
    """Answers with the boxes, labels and scores of the objects in each image, see served_model.ServedNetwork."""

    columns: Mapping[str, Any] = {
        "boxes": Array(Array("double")),
        "labels": Array("string"),
        "scores": Array("double"),
    }
    params: Sequence[ParamSpec] = (ParamSpec("min_score", "double", MIN_SCORE),)

    def __init__(self, card: ModelCard, weights: Path) -> None:
        """Raises RuntimeError for weights that are not finite."""
        super().__init__(card, weights)
        # With such weights every score is NaN, and the answer looks like an image without objects.
        for tensor in self._network.state_dict().values():
            if not tensor.isfinite().all():
                raise RuntimeError("the network's weights are not finite")

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException for too many pixels, and where `min_score` is not within 0 and 1."""
        super().check(headers, params, max_pixels)
        min_score = _read_min_score(params)
        if not 0 <= min_score <= 1:
            raise MlflowException.invalid_parameter_value(f"min_score is {min_score}; 0 to 1 was expected")

    def describe(self, answer: Mapping[str, Any]) -> tuple[str, float]:
        """Returns the number of boxes in words, and the sum of their scores."""
        return f"{len(answer['boxes'])} boxes", sum(answer["scores"])

    def _answer(self, view: View, canvas: Tensor, params: Mapping[str, Any]) -> dict[str, Any]:
        (detections,) = self._network(canvas[None], [view.extent])
        return detection_row(
            detections,
            view.size,
            view.extent,
            self._card.classes,
            _read_min_score(params),
        )


class ServedMaskDetector(ServedDetector):
    """Answers with a mask for each object, too."""

    columns: Mapping[str, Any] = {
        **ServedDetector.columns,
        "segmentations": Array(Object([Property("size", Array("long")), Property("counts", "string")])),
    }


def _read_min_score(params: Mapping[str, Any]) -> float:
    """Returns a request's `min_score`; NaN, which `check` refuses, for a null."""
    value = params.get("min_score", MIN_SCORE)
    return float("nan") if value is None else value
