"""One rank that scores its share of some detections; see test_detect.py.

python -m tests.workers.detections masks|boxes

Rank 0 prints the metric's result and each class's average precision.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle

from pipeline import world
from pipeline.feed.box_transforms import Truth
from pipeline.tasks.detect import DetectionMetric
from pvt.detector import Detections

CLASSES = ["zero", "one", "two", "seven", "unseen"]
NUM_IMAGES, BATCH, MASK_PX = 11, 2, 28


def scored(masks: bool) -> tuple[list[Detections], list[Truth]]:
    """Images of many sizes with crowds, without objects, without detections; some detections are right."""
    draws = np.random.default_rng(0)
    found, truths = [], []
    for i in range(NUM_IMAGES):
        height, width = draws.integers(60, 300, 2).tolist()
        extent = (round(height * 0.8), round(width * 0.8))
        annotations = [] if i == 3 else [_annotation(draws, height, width) for _ in range(draws.integers(2, 9))]
        truths.append(Truth(100 - 7 * i, (height, width), extent, annotations))
        found.append(_detections(draws, annotations if i != 5 else [], extent, masks))
    return found, truths


def _annotation(draws: np.random.Generator, height: int, width: int) -> dict[str, Any]:
    x, y = draws.uniform(0, 0.7, 2) * (width, height)
    w, h = draws.uniform(0.05, 0.3, 2) * (width, height)
    rows, columns = np.mgrid[:height, :width]
    disc = ((columns + 0.5 - x - w / 2) / w * 2) ** 2 + ((rows + 0.5 - y - h / 2) / h * 2) ** 2 <= 1
    encoded: Any = rle.encode(np.asfortranarray(disc.astype(np.uint8)))
    return {
        "id": int(draws.integers(1, 2**30)),
        "label": int(draws.integers(0, 4)),
        "bbox": [x, y, w, h],
        "area": int(rle.area(encoded)),
        "iscrowd": int(draws.uniform() < 0.15),
        "segmentation": {"size": [height, width], "counts": encoded["counts"].decode()},
    }


def _detections(
    draws: np.random.Generator, annotations: list[dict[str, Any]], extent: tuple[int, int], masks: bool
) -> Detections:
    boxes, labels = [], []
    for annotation in annotations:
        for _ in range(2):
            x, y, w, h = np.array(annotation["bbox"]) * 0.8 * draws.uniform(0.9, 1.1, 4)
            boxes.append([x, y, min(x + w, extent[1]), min(y + h, extent[0])])
            labels.append(annotation["label"] if draws.uniform() < 0.8 else 3)
    n = len(boxes)
    rows, columns = np.mgrid[:MASK_PX, :MASK_PX] / (MASK_PX - 1) * 2 - 1
    probabilities = np.broadcast_to((rows**2 + columns**2 <= 1) * 0.9, (n, MASK_PX, MASK_PX)).copy()
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).view(n, 4),
        torch.from_numpy(np.sort(draws.uniform(0.1, 1, n))[::-1].astype(np.float32).copy()),
        torch.tensor(labels, dtype=torch.int64),
        torch.from_numpy(probabilities.astype(np.float32)) if masks else None,
    )


def main() -> None:
    here = world.start()
    found, truths = scored(sys.argv[1] == "masks")
    metric = DetectionMetric(CLASSES, masks=sys.argv[1] == "masks")
    share = list(range(here.rank, NUM_IMAGES, here.size))
    for first in range(0, len(share), BATCH):
        taken = share[first : first + BATCH]
        # The last batch is filled up with an image that does not count.
        batch = [*taken, *[0] * (BATCH - len(taken))]
        weights = torch.tensor([1.0] * len(taken) + [0.0] * (BATCH - len(taken)))
        metric.update([found[i] for i in batch], [truths[i] for i in batch], weights)
    result = metric.result(here)
    if here.is_first:
        print(json.dumps({"result": result, "class_aps": metric.class_aps}))
    world.stop()


if __name__ == "__main__":
    main()
