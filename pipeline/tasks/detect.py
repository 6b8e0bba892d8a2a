"""Detection: a box for each object, with some networks a mask, too.

images [N, 3, H, W] ──Detector──▶ losses by name, [N] each ──sum──▶ [N]
                        └───────▶ Detections ──as_results──▶ COCO's form ──pycocotools──▶ average precision
"""

import contextlib
import io
import itertools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from pipeline.coco_results import as_results
from pipeline.errors import ExternalError, InputError
from pipeline.feed.box_transforms import Truth
from pipeline.feed.loader import MicroBatch
from pipeline.tasks.layer_groups import layers
from pipeline.world import World
from pvt.dense import PREFIX
from pvt.detector import Detections, Detector, Extent

_SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
"""As COCO's summary lists them."""


class DetectionTask:
    """The sum of the network's losses; COCO's average precision of boxes, and of masks, as metrics."""

    main_metric = "box_ap"
    chance_loss = None

    def __init__(self, model: Detector, classes: list[str]) -> None:
        assert model.num_classes == len(classes)
        self.model = model
        self.classes = classes
        self.drop_path_rates = model.drop_path_rates

    @property
    def depths(self) -> dict[str, int]:
        return layers(self.model.backbone, PREFIX)

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """[N] float32."""
        parts: dict[str, Tensor] = model(batch.images, batch.extents, batch.targets, batch.drop_path)
        return torch.stack(list(parts.values())).sum(dim=0)

    def outputs(self, model: nn.Module, batch: MicroBatch) -> list[Detections]:
        return model(batch.images, batch.extents)

    def metric(self) -> "DetectionMetric":
        return DetectionMetric(self.classes, masks=self.model.has_masks)


class _Image(NamedTuple):
    """What an image shows and what was found in it, as COCO notes it; labels in place of category ids."""

    image_id: int
    size: Extent
    truth: list[dict[str, Any]]
    found: list[dict[str, Any]]


class DetectionMetric:
    """Collects detections, and leaves judging them to pycocotools: on one rank, once all have sent theirs."""

    def __init__(self, classes: list[str], *, masks: bool) -> None:
        self.classes = classes
        self._kinds: dict[str, Literal["bbox", "segm"]] = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
        self.class_aps: dict[str, list[float]] = {}
        """After `result`, on rank 0: for "box" and "mask" the average precision of each class, NaN without objects."""
        self._images: list[_Image] = []

    def update(self, outputs: list[Detections], targets: list[Truth], weights: Tensor) -> None:
        for detections, truth, weight in zip(outputs, targets, weights.tolist(), strict=True):
            if weight:
                found = as_results(detections, truth.size, truth.extent)
                self._images.append(_Image(truth.image_id, truth.size, truth.annotations, found))

    def result(self, world: World) -> dict[str, float]:
        """box_ap, box_ap50, … and, where masks are to be found, mask_ap, …; without those that are undefined, as the AP
        of small objects is where there are none. Raises InputError for a data set without any object."""
        images = [image for part in world.gather_on_first(self._images) for image in part]
        scores, trouble = {}, None
        if world.is_first:
            try:
                scores, self.class_aps = self._judge(images)
            except Exception as error:  # the others wait to hear of it
                trouble = error
        scores, told = world.from_first((scores, trouble and repr(trouble)))
        if told:
            raise trouble or ExternalError(f"rank 0 could not judge the detections: {told}")
        if "box_ap" not in scores:
            raise InputError("data.val has no object to be found, without which there is no average precision")
        return scores

    def _judge(self, images: list[_Image]) -> tuple[dict[str, float], dict[str, list[float]]]:
        scores, class_aps = {}, {}
        images.sort(key=lambda image: image.image_id)
        for one, other in itertools.pairwise(images):
            if one.image_id == other.image_id:
                raise InputError(f"data.val has two images of id {one.image_id}: pack each data set by itself")
        for kind, iou_type in self._kinds.items():
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of its progress there
                judged = coco_eval(images, len(self.classes), iou_type)
            stats = judged.stats[: len(_SCORES)].tolist()
            scores |= {f"{kind}_{name}": value for name, value in zip(_SCORES, stats, strict=True) if value > -1}
            class_aps[kind] = _of_classes(judged)
        return scores, class_aps


def coco_eval(images: list[_Image], num_classes: int, iou_type: Literal["bbox", "segm"]) -> COCOeval:
    """pycocotools' own evaluation of images in the order of their ids."""
    truth: Any = COCO()
    found: Any = COCO()
    truth.dataset = {
        "images": [{"id": each.image_id, "height": each.size[0], "width": each.size[1]} for each in images],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": _numbered((image.image_id, entry) for image in images for entry in image.truth),
    }
    results = _numbered((image.image_id, entry) for image in images for entry in image.found)
    for result in results:
        box = result["bbox"]
        result["area"] = rle.area(result["segmentation"]) if iou_type == "segm" else box[2] * box[3]
        result["iscrowd"] = 0
    found.dataset = {**truth.dataset, "annotations": results}
    truth.createIndex()
    found.createIndex()
    judged = COCOeval(truth, found, iou_type)
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    return judged


def _numbered(entries: Iterable[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """With ids from 1: to pycocotools an object that is matched with number 0 is not matched."""
    return [
        {**entry, "id": number, "image_id": image_id, "category_id": entry["label"]}
        for number, (image_id, entry) in enumerate(entries, 1)
    ]


def _of_classes(judged: COCOeval) -> list[float]:
    """Average precision of each class over all thresholds, as the summary's over all classes. NaN without objects."""
    precision = judged.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, classes] of all areas, 100 detections
    known = np.where(precision > -1, precision, np.nan)
    return [float(np.mean(known[:, :, k])) for k in range(known.shape[2])]
