"""Converts detections to COCO's format: in pixels of the image as it is stored, with masks as run lengths.

Detections ──as_results──▶ [{"label": 3, "score": 0.9, "bbox": [x, y, width, height], "segmentation": {…}}, …]
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pvt.detector import Detections, Extent

MASK_THRESHOLD = 0.5
"""The probability from which on a pixel belongs to the object."""


def as_results(detections: Detections, size: Extent, extent: Extent) -> list[dict[str, Any]]:
    """Returns COCO's results format, best first, with "label", counted from 0, in place of a category's id.

    `size`: height and width of the image as it is stored; `extent`: height and width that it had on the network's
    canvas.
    """
    height, width = size
    seen_height, seen_width = extent
    x_scale = width / seen_width
    y_scale = height / seen_height
    boxes = detections.boxes * detections.boxes.new_tensor([x_scale, y_scale, x_scale, y_scale])
    # Corners [n, 4] become COCO's x, y, width, height.
    corners = boxes[:, :2]
    bboxes = torch.cat([corners, boxes[:, 2:] - corners], dim=1)
    rows = zip(
        detections.labels.tolist(),
        detections.scores.tolist(),
        bboxes.tolist(),
        strict=True,
    )
    results: list[dict[str, Any]] = [{"label": label, "score": score, "bbox": bbox} for label, score, bbox in rows]
    if detections.masks is not None:
        segmentations = _encode_masks(detections.masks, boxes, size)
        for result, segmentation in zip(results, segmentations, strict=True):
            result["segmentation"] = segmentation
    return results


def _encode_masks(masks: Tensor, boxes: Tensor, size: Extent) -> Iterator[dict[str, Any]]:
    """Yields the run lengths of each mask, one at a time, because at an image's stored size masks are large."""
    for mask, box in zip(masks, boxes, strict=True):
        pasted = paste_masks_in_image(mask[None, None], box[None], size)[0, 0]
        is_object = pasted >= MASK_THRESHOLD
        # pycocotools reads columns: it takes Fortran's order alone.
        pixels = np.asfortranarray(is_object.cpu().numpy().astype(np.uint8))
        encoded: Any = rle.encode(pixels)
        yield {
            "size": list(size),
            "counts": encoded["counts"].decode(),
        }
