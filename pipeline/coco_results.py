"""Detections in COCO's form: in pixels of the image as it is stored, masks as run lengths.

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
"""From this probability on a pixel is the object's."""


def as_results(detections: Detections, size: Extent, extent: Extent) -> list[dict[str, Any]]:
    """What COCO's servers take, with "label", from 0, in place of a category's id; best first.

    `size`: height and width of the image as it is stored; `extent`: those it had on the network's canvas.
    """
    (height, width), (seen_height, seen_width) = size, extent
    scale = detections.boxes.new_tensor([width / seen_width, height / seen_height] * 2)
    boxes = detections.boxes * scale
    bboxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    results: list[dict[str, Any]] = [
        {"label": label, "score": score, "bbox": bbox}
        for label, score, bbox in zip(
            detections.labels.tolist(), detections.scores.tolist(), bboxes.tolist(), strict=True
        )
    ]
    if detections.masks is not None:
        for result, segmentation in zip(results, _encoded(detections.masks, boxes, size), strict=True):
            result["segmentation"] = segmentation
    return results


def _encoded(masks: Tensor, boxes: Tensor, size: Extent) -> Iterator[dict[str, Any]]:
    """One at a time, because at an image's own size masks are large."""
    for mask, box in zip(masks, boxes, strict=True):
        pasted = paste_masks_in_image(mask[None, None], box[None], size)[0, 0] >= MASK_THRESHOLD
        encoded: Any = rle.encode(np.asfortranarray(pasted.cpu().numpy().astype(np.uint8)))
        yield {"size": list(size), "counts": encoded["counts"].decode()}
