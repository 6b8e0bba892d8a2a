"""Object detection: a box for each object, from some networks a mask, too.

images [N, 3, H, W] ──Detector──▶ losses by name, [N] each ──sum──▶ [N]
                        └───────▶ Detections ──as_results──▶ COCO's form ──pycocotools──▶ average precision
"""

import contextlib
import io
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from pipeline.answers import AnswerOptions, Seen, detection_row
from pipeline.coco_results import as_results
from pipeline.errors import ExternalError, InputError
from pipeline.feed.box_transforms import Truth
from pipeline.feed.loader import MicroBatch
from pipeline.tasks.dense import DenseTask
from pipeline.world import World
from pvt.detector import Detections, Extent

_SCORES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
)
"""Names of the scores in the order of COCO's summary."""


class DetectionTask(DenseTask):
    """The sum of the network's losses; COCO's average precision of boxes, and of masks, as metrics."""

    main_metric = "box_ap"

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Returns the loss of each image, [N] float32."""
        by_name: dict[str, Tensor] = model(
            batch.images,
            batch.extents,
            batch.targets,
            batch.drop_path,
        )
        return torch.stack(list(by_name.values())).sum(dim=0)

    def outputs(self, model: nn.Module, batch: MicroBatch) -> list[Detections]:
        """Returns the detections of each image."""
        return model(batch.images, batch.extents)

    def answers(
        self,
        outputs: list[Detections],
        seen: Sequence[Seen],
        classes: Sequence[str],
        options: AnswerOptions,
    ) -> list[dict[str, Any]]:
        """Returns what the detections say about each image, see answers.py."""
        rows = []
        for detections, image in zip(outputs, seen, strict=True):
            rows.append(detection_row(detections, image.size, image.extent, classes, options.min_score))
        return rows

    def metric(self) -> "DetectionMetric":
        """Returns a metric that has collected nothing yet."""
        return DetectionMetric(self.classes, masks=self.model.has_masks)


class _Image(NamedTuple):
    """The objects and the detections of an image in COCO's form, with labels in place of category ids."""

    image_id: int
    size: Extent
    truth: list[dict[str, Any]]
    found: list[dict[str, Any]]


class DetectionMetric:
    """Collects detections. When all ranks have sent theirs, pycocotools evaluates them on rank 0."""

    def __init__(self, classes: list[str], *, masks: bool) -> None:
        self.classes = classes
        self._kinds: dict[str, Literal["bbox", "segm"]] = {"box": "bbox"}
        if masks:
            self._kinds["mask"] = "segm"
        self.class_aps: dict[str, list[float]] = {}
        """After `result`, on rank 0: the average precision of each class for "box" and "mask", NaN without objects."""
        self._images: list[_Image] = []

    def update(
        self,
        outputs: list[Detections],
        targets: list[Truth],
        weights: Tensor,
    ) -> None:
        """Collects the detections of a batch, without those of rejected samples, which have no weight."""
        for detections, truth, weight in zip(outputs, targets, weights.tolist(), strict=True):
            if weight:
                results = as_results(detections, truth.size, truth.extent)
                self._images.append(_Image(truth.image_id, truth.size, truth.annotations, results))

    def result(self, world: World) -> dict[str, float]:
        """Returns box_ap, box_ap50, … and, for networks with masks, mask_ap, …. Collective.

        Undefined scores are missing, as the AP of small objects is where there are none. Raises InputError for a data
        set without any object.
        """
        images: list[_Image] = []
        for of_rank in world.gather_on_first(self._images):
            images += of_rank
        scores, trouble = {}, None
        if world.is_first:
            try:
                scores, self.class_aps = self._evaluate(images)
            # Whatever it is, the other ranks wait for the outcome.
            except Exception as error:
                trouble = error
        scores, reported = world.from_first((scores, trouble and repr(trouble)))
        if reported:
            raise trouble or ExternalError(f"rank 0 could not evaluate the detections: {reported}")
        if "box_ap" not in scores:
            raise InputError("data.val has no object to be found, without which there is no average precision")
        return scores

    def _evaluate(self, images: list[_Image]) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Returns the scores, and for "box" and "mask" the average precision of each class."""
        scores, class_aps = {}, {}
        # The order on ranks depends on their number, and equal scores are ranked in the order of images.
        images.sort(key=lambda image: image.image_id)
        for one, other in itertools.pairwise(images):
            if one.image_id == other.image_id:
                raise InputError(f"data.val has two images of id {one.image_id}: pack each data set by itself")
        for kind, iou_type in self._kinds.items():
            # pycocotools prints its progress and a table.
            with contextlib.redirect_stdout(io.StringIO()):
                evaluated = coco_eval(images, len(self.classes), iou_type)
            stats = evaluated.stats[: len(_SCORES)].tolist()
            for name, value in zip(_SCORES, stats, strict=True):
                # -1 marks an undefined score.
                if value > -1:
                    scores[f"{kind}_{name}"] = value
            class_aps[kind] = _class_aps(evaluated)
        return scores, class_aps


def coco_eval(
    images: list[_Image],
    num_classes: int,
    iou_type: Literal["bbox", "segm"],
) -> COCOeval:
    """Returns pycocotools' own evaluation of images in the order of their ids."""
    truth: Any = COCO()
    found: Any = COCO()
    truth.dataset = {
        "images": [
            {
                "id": image.image_id,
                "height": image.size[0],
                "width": image.size[1],
            }
            for image in images
        ],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": _number(images, "truth"),
    }
    results = _number(images, "found")
    for result in results:
        _, _, width, height = result["bbox"]
        result["area"] = rle.area(result["segmentation"]) if iou_type == "segm" else width * height
        result["iscrowd"] = 0
    found.dataset = {**truth.dataset, "annotations": results}
    truth.createIndex()
    found.createIndex()
    evaluated = COCOeval(truth, found, iou_type)
    evaluated.evaluate()
    evaluated.accumulate()
    evaluated.summarize()
    return evaluated


def _number(images: list[_Image], field: str) -> list[dict[str, Any]]:
    """Returns copies of a field's entries with ids, the ids of their images, and categories for labels."""
    numbered: list[dict[str, Any]] = []
    for image in images:
        for entry in getattr(image, field):
            copy = {
                **entry,
                # From 1: an object with the id 0 counts as not matched, even when it is.
                "id": len(numbered) + 1,
                "image_id": image.image_id,
                "category_id": entry["label"],
            }
            numbered.append(copy)
    return numbered


def _class_aps(evaluated: COCOeval) -> list[float]:
    """Returns the average precision of each class over all thresholds, NaN for a class without objects.

    It is computed as the summary's over all classes.
    """
    # [thresholds, recalls, classes] for objects of any area and 100 detections.
    precision = evaluated.eval["precision"][:, :, :, 0, -1]
    defined = np.where(precision > -1, precision, np.nan)
    return [float(np.mean(defined[:, :, label])) for label in range(defined.shape[2])]
