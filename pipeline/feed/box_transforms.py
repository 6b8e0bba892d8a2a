"""How images with objects become what a detector learns from and is scored by.

KEY.json ──decode──┬──cut, resized and flipped as the view says──▶ Objects, on the canvas      in training
                   └──as they are──▶ Truth, of the stored image                                in evaluation
"""

import contextlib
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import keys
from pipeline.config import AugmentConfig, DetectionConfig, ImageConfig, MaskRcnnConfig
from pipeline.errors import InputError
from pipeline.feed import augment
from pipeline.feed.augment import Views
from pipeline.feed.transfer import to_device
from pipeline.shards.index import CorruptSampleError, ShardSet
from pipeline.shards.object_annotations import Annotated, BadObjectsError, decode, mask
from pipeline.shards.store import StoreError
from pvt.detector import Objects

Array = npt.NDArray[Any]

_FIRST = 20  # samples that are looked at before training


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is in an evaluated image, in pixels of the stored image."""

    image_id: int
    size: tuple[int, int]
    """Height and width as stored."""
    extent: tuple[int, int]
    """Height and width in pixels of the canvas that the image fills, from the upper left."""
    annotations: list[dict[str, Any]]
    """As shards/object_annotations.py has them, crowds too."""


class BoxTransform:
    """Detection: images resized, and cropped where the task says so, with a box for each object, and a mask for Mask
    R-CNN. Crowds are not learnt."""

    def __init__(
        self,
        task: DetectionConfig,
        image: ImageConfig,
        num_classes: int,
        config: AugmentConfig | None = None,
    ) -> None:
        self._task, self._image, self._num_classes = task, image, num_classes
        self._augment, self._with_masks = config or AugmentConfig(), isinstance(task, MaskRcnnConfig)

    def training_views(self, size: int, key: keys.Key, hw: Array) -> Views:
        return augment.detection_views(self._augment, self._task, self._image, key, hw)

    def evaluation_views(self, hw: Array) -> Views:
        return augment.whole_views(self._task, self._image, hw)

    def training_target(self, annotation: bytes, view: Views) -> tuple[Views, Objects]:
        """The objects of which the view shows a part: boxes with an area; with masks, those that have a pixel."""
        found = self._read(annotation, view)
        single = [entry for entry in found.annotations if not entry["iscrowd"]]
        boxes = _seen_boxes(np.array([entry["bbox"] for entry in single], np.float64).reshape(-1, 4), view)
        shown = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        masks = None
        if self._with_masks:
            if reason := without_mask(found):
                raise CorruptSampleError(reason)
            seen = _seen_masks(found, [single[i] for i in np.flatnonzero(shown)], view)
            has_pixels = seen.any(axis=(1, 2))
            masks = torch.from_numpy(seen[has_pixels])
            shown[np.flatnonzero(shown)] = has_pixels
        labels = np.array([entry["label"] for entry in single], np.int64)
        return view, Objects(torch.from_numpy(boxes[shown]), torch.from_numpy(labels[shown]), masks)

    def evaluation_target(self, annotation: bytes, view: Views) -> tuple[Views, Truth]:
        found = self._read(annotation, view)
        if view.shape[0].tolist() != [found.height, found.width]:
            raise CorruptSampleError(f"its objects are of {found.width} × {found.height} pixels, but it is not")
        if self._with_masks and (nameless := without_mask(found, crowds=True)):
            raise CorruptSampleError(nameless)
        height, width = view.extent[0].tolist()
        return view, Truth(found.image_id, (found.height, found.width), (height, width), found.annotations)

    def training_batch(self, targets: list[Objects], device: torch.device) -> list[Objects]:
        boxes = to_device([target.boxes.numpy() for target in targets], device)
        labels = to_device([target.labels.numpy() for target in targets], device)
        masks: list[Any] = [None] * len(targets)
        if self._with_masks:
            masks = to_device([target.masks.numpy() for target in targets if target.masks is not None], device)
        return [Objects(*each) for each in zip(boxes, labels, masks, strict=True)]

    def evaluation_batch(self, targets: list[Truth], device: torch.device) -> list[Truth]:
        return targets

    def blank_batch(self, n: int, size: int, device: torch.device) -> list[Objects]:
        masks = torch.zeros(0, size, size, dtype=torch.uint8, device=device) if self._with_masks else None
        nothing = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        return [Objects(*nothing, masks)] * n

    def _read(self, annotation: bytes, view: Views) -> Annotated:
        try:
            found = decode(annotation, self._num_classes)
        except BadObjectsError as error:
            raise CorruptSampleError(f"its objects: {error}") from error
        bottom, right = (view.anchor + view.shape)[0].tolist()
        if bottom > found.height or right > found.width:
            raise CorruptSampleError(f"its objects are of {found.width} × {found.height} pixels, but it is larger")
        return found


def without_mask(found: Annotated, *, crowds: bool = False) -> str | None:
    """What Mask R-CNN cannot learn from an image, or with `crowds` be scored by: the first object without a mask."""
    for entry in found.annotations:
        if (crowds or not entry["iscrowd"]) and "segmentation" not in entry:
            return f"annotation {entry['id']} has no segmentation, which task mask_rcnn learns from"
    return None


def require_masks(shards: ShardSet) -> None:
    """Raise InputError for a data set of boxes alone, as far as its first samples tell."""
    for row in range(min(int(shards.shard_samples[0]), _FIRST)):
        with contextlib.suppress(CorruptSampleError, BadObjectsError, StoreError):  # met again in training
            found = decode(shards.read_annotation(0, row), len(shards.classes))
            if reason := without_mask(found):
                raise InputError(
                    f"{shards.url(0)}: sample {shards.key(0, row)!r}: {reason}: "
                    "set task to retinanet or detr, or name data with masks"
                )


def _seen_boxes(boxes: Array, view: Views) -> npt.NDArray[np.float32]:
    """What a view shows of boxes x, y, width, height of the stored image: x1, y1, x2, y2 on the canvas, [n, 4] each.
    Of those beyond it nothing is left."""
    corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)  # [n, 2, 2]: start and end, x and y
    anchor, shape, extent = (value[0, ::-1] for value in (view.anchor, view.shape, view.extent))
    corners = np.clip((corners - anchor) * (extent / shape), 0, extent)
    if view.flip[0]:
        corners[:, :, 0] = extent[0] - corners[:, ::-1, 0]
    return corners.reshape(-1, 4).astype(np.float32)


def _seen_masks(found: Annotated, entries: list[dict[str, Any]], view: Views) -> npt.NDArray[np.uint8]:
    """What a view shows of objects, [n, h, w] of its extent, each pixel the mask's at its centre."""
    masks = np.zeros((len(entries), *view.extent[0]), np.uint8)
    rows, columns = view.nearest()
    for number, entry in enumerate(entries):
        # A decoded mask lies column by column, and is three times as fast to index in that order.
        masks[number] = mask(entry, found.height, found.width).T[columns][:, rows].T
    return masks
