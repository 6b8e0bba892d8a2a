"""How annotations of objects become the targets that a detector learns from and is scored by.

KEY.json ──decode──┬──cut, resized and flipped as the view says──▶ Objects, on the canvas      in training
                   └──unchanged──▶ Truth, of the stored image                                  in evaluation
"""

import contextlib
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import keys
from pipeline.config import AugmentConfig, DetectionConfig, ImageConfig
from pipeline.errors import InputError
from pipeline.feed import augment
from pipeline.feed.augment import Views
from pipeline.feed.transfer import to_device
from pipeline.shards.index import CorruptSampleError, SampleSource
from pipeline.shards.object_annotations import Annotated, BadObjectsError, decode, mask
from pipeline.shards.store import StoreError
from pvt.detector import Objects

Array = npt.NDArray[Any]

# The samples that are checked for masks before training.
_NUM_CHECKED = 20


@dataclasses.dataclass(frozen=True)
class Truth:
    """The objects of an evaluated image, in pixels of the stored image."""

    image_id: int
    # Height and width as stored.
    size: tuple[int, int]
    # Height and width in pixels of the canvas that the image fills, from the upper left.
    extent: tuple[int, int]
    # The annotations in the form of shards/object_annotations.py, crowds included.
    annotations: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class BoxTransform:
    """Detection: images resized, and cropped where the task says so, with a box for each object, and a mask for Mask
    R-CNN. Crowds are not learnt."""

    task: DetectionConfig
    image: ImageConfig
    num_classes: int
    config: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    label_smoothing: float = 0.0
    """Always 0: the configuration refuses mix.label_smoothing with a dense task."""

    def training_views(self, size: int, key: keys.Key, hw: Array) -> Views:
        return augment.detection_views(
            self.config,
            self.task,
            self.image,
            key,
            hw,
        )

    def evaluation_views(self, hw: Array) -> Views:
        return augment.whole_views(self.task, self.image, hw)

    def training_target(self, annotation: bytes, view: Views) -> tuple[Views, Objects]:
        """Returns the objects of which the view shows a part: boxes with an area and, with masks, objects with a
        pixel."""
        annotated = self._decode(annotation, view)
        entries = [entry for entry in annotated.annotations if not entry["iscrowd"]]
        stored = np.array([entry["bbox"] for entry in entries], np.float64)
        boxes = _transform_boxes(stored.reshape(-1, 4), view)
        is_shown = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        masks = None
        if self.task.needs_masks:
            if reason := without_mask(annotated):
                raise CorruptSampleError(reason)
            shown = np.flatnonzero(is_shown)
            cut = _transform_masks(
                annotated,
                [entries[i] for i in shown],
                view,
            )
            has_pixels = cut.any(axis=(1, 2))
            masks = torch.from_numpy(cut[has_pixels])
            is_shown[shown] = has_pixels
        labels = np.array([entry["label"] for entry in entries], np.int64)
        objects = Objects(
            torch.from_numpy(boxes[is_shown]),
            torch.from_numpy(labels[is_shown]),
            masks,
        )
        return view, objects

    def evaluation_target(self, annotation: bytes, view: Views) -> tuple[Views, Truth]:
        """Returns all objects of the image. Raises CorruptSampleError for those of an image of another size."""
        annotated = self._decode(annotation, view)
        size = annotated.height, annotated.width
        if view.shape[0].tolist() != list(size):
            raise CorruptSampleError(f"its objects are of {size[1]} × {size[0]} pixels, but it is not")
        if self.task.needs_masks and (reason := without_mask(annotated, crowds=True)):
            raise CorruptSampleError(reason)
        height, width = view.extent[0].tolist()
        truth = Truth(
            annotated.image_id,
            size,
            (height, width),
            annotated.annotations,
        )
        return view, truth

    def training_batch(self, targets: list[Objects], device: torch.device) -> list[Objects]:
        # One copy to the device for all boxes, one for all labels, one for all masks.
        boxes = to_device([target.boxes.numpy() for target in targets], device)
        labels = to_device([target.labels.numpy() for target in targets], device)
        masks: list[Any] = [None] * len(targets)
        if self.task.needs_masks:
            arrays = [target.masks.numpy() for target in targets if target.masks is not None]
            masks = to_device(arrays, device)
        return [Objects(*columns) for columns in zip(boxes, labels, masks, strict=True)]

    def evaluation_batch(self, targets: list[Truth], device: torch.device) -> list[Truth]:
        return targets

    def blank_batch(
        self,
        n: int,
        size: int,
        device: torch.device,
    ) -> list[Objects]:
        masks = None
        if self.task.needs_masks:
            masks = torch.zeros(
                0,
                size,
                size,
                dtype=torch.uint8,
                device=device,
            )
        no_objects = Objects(
            torch.zeros(0, 4, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            masks,
        )
        return [no_objects] * n

    def _decode(self, annotation: bytes, view: Views) -> Annotated:
        """Decodes an annotation. Raises CorruptSampleError where the view reaches beyond the annotated image."""
        try:
            annotated = decode(annotation, self.num_classes)
        except BadObjectsError as error:
            raise CorruptSampleError(f"its objects: {error}") from error
        height, width = annotated.height, annotated.width
        bottom, right = (view.anchor + view.shape)[0].tolist()
        if bottom > height or right > width:
            raise CorruptSampleError(f"its objects are of {width} × {height} pixels, but it is larger")
        return annotated


def without_mask(annotated: Annotated, *, crowds: bool = False) -> str | None:
    """Returns which object of an image is the first without a mask, in words, or None if all have one.

    Mask R-CNN cannot learn from such an image or, with `crowds`, be scored by it.
    """
    for entry in annotated.annotations:
        is_used = crowds or not entry["iscrowd"]
        if is_used and "segmentation" not in entry:
            return f"annotation {entry['id']} has no segmentation, which task mask_rcnn learns from"
    return None


def require_masks(shards: SampleSource) -> None:
    """Raises InputError for a data set of boxes alone, as far as its first samples tell."""
    num_checked = min(int(shards.shard_samples[0]), _NUM_CHECKED)
    for row in range(num_checked):
        # A sample that cannot be read is met again in training, and replaced there.
        with contextlib.suppress(CorruptSampleError, BadObjectsError, StoreError):
            annotated = decode(shards.read_annotation(0, row), len(shards.classes))
            if reason := without_mask(annotated):
                raise InputError(
                    f"{shards.url(0)}: sample {shards.key(0, row)!r}: {reason}: "
                    "set task to retinanet or detr, or name data with masks"
                )


def _transform_boxes(boxes: Array, view: Views) -> npt.NDArray[np.float32]:
    """Returns what a view shows of boxes x, y, width, height of the stored image: x1, y1, x2, y2 on the canvas, [n, 4]
    each. A box beyond the view has no area."""
    start = boxes[:, :2]
    corners = np.stack([start, start + boxes[:, 2:]], axis=1)  # [n, 2, 2]: start and end, x and y
    # Views are (y, x) and boxes (x, y).
    anchor = view.anchor[0, ::-1]
    shape = view.shape[0, ::-1]
    extent = view.extent[0, ::-1]
    corners = np.clip((corners - anchor) * (extent / shape), 0, extent)
    if view.flip[0]:
        corners[:, :, 0] = extent[0] - corners[:, ::-1, 0]
    return corners.reshape(-1, 4).astype(np.float32)


def _transform_masks(
    annotated: Annotated,
    entries: list[dict[str, Any]],
    view: Views,
) -> npt.NDArray[np.uint8]:
    """Returns what a view shows of objects' masks, [n, h, w] of its extent, each pixel the mask's at its centre."""
    masks = np.zeros((len(entries), *view.extent[0]), np.uint8)
    rows, columns = view.nearest()
    for number, entry in enumerate(entries):
        # A decoded mask lies column by column, and is three times as fast to index in that order.
        stored = mask(entry, annotated.height, annotated.width).T
        masks[number] = stored[columns][:, rows].T
    return masks
