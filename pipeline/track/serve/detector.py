"""What a served detector answers: where objects are in an image, in pixels of its own, and with some masks.

view ──canvas [3, H, W], extent──network──▶ Detections ──as_results──▶ those with a good score ──▶ boxes, labels, scores
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from torch import Tensor

from pipeline.coco_results import as_results
from pipeline.config import MaskRcnnConfig
from pipeline.shards import images
from pipeline.track.model_card import ModelCard
from pipeline.track.serve.defaults import MIN_SCORE
from pipeline.track.serve.whole_images import ServedOnWholeImages, View


class ServedDetector(ServedOnWholeImages):
    columns: Sequence[str] = ("boxes", "labels", "scores")

    def __init__(self, card: ModelCard, weights: Path) -> None:
        """Raises RuntimeError for weights that are not finite: what they give looks like an image without objects."""
        super().__init__(card, weights)
        if not all(tensor.isfinite().all() for tensor in self._network.state_dict().values()):
            raise RuntimeError("the network's weights are not finite")
        if isinstance(card.task, MaskRcnnConfig):
            self.columns = (*self.columns, "segmentations")

    def check(self, headers: Sequence[images.Header], params: Mapping[str, Any], max_pixels: int) -> None:
        """Raises MlflowException for a score that is none, too."""
        super().check(headers, params, max_pixels)
        min_score = _min_score(params)
        if not 0 <= min_score <= 1:
            raise MlflowException.invalid_parameter_value(f"min_score is {min_score}; 0 to 1 was expected")

    def _answer(self, view: View, canvas: Tensor, params: Mapping[str, Any]) -> dict[str, Any]:
        (found,) = self._network(canvas[None], [view.extent])
        if not (found.scores.isfinite().all() and found.boxes.isfinite().all()):
            raise RuntimeError("the network's scores or boxes are not finite")
        results = as_results(found[found.scores >= _min_score(params)], view.size, view.extent)
        answer = {
            "boxes": [result["bbox"] for result in results],
            "labels": [self._card.classes[result["label"]] for result in results],
            "scores": [result["score"] for result in results],
            "segmentations": [result.get("segmentation") for result in results],
        }
        return {name: answer[name] for name in self.columns}


def _min_score(params: Mapping[str, Any]) -> float:
    value = params.get("min_score", MIN_SCORE)
    return float("nan") if value is None else value
