"""Says in a row of a table what a network's outputs mean for an image, in the image's own pixels.

    probabilities [n, K] ──classification_rows──▶ label, score, labels, scores
    Detections           ──detection_row────────▶ boxes, labels, scores, segmentations
    logits [K, h, w]     ──class_map──▶ [height, width] ──segmentation_row──▶ mask, labels, values, shares

Served models, launch/predict.py and the pictures of launch/evaluate.py answer with these rows.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pipeline.coco_results import as_results
from pipeline.evaluation_view import Size, resize_to_image
from pipeline.pictures.palette import palette
from pvt.detector import Detections


class Seen(NamedTuple):
    """How a network has seen an image, in pixels."""

    extent: Size
    """The size that the image filled of the network's input, from the upper left."""
    size: Size
    """The size of the image as it is stored."""


class AnswerOptions(NamedTuple):
    """How much an answer has."""

    top_k: int
    """The number of labels, of classifiers."""
    min_score: float
    """The lowest score of a box, of detectors."""


def classification_rows(probabilities: Tensor, classes: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """Returns the best label and score of each image, and the best `top_k` of them, from probabilities [n, K]."""
    best = probabilities.topk(min(top_k, len(classes)))
    rows = []
    for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        labels = [classes[index] for index in indices]
        rows.append(
            {
                "label": labels[0],
                "score": scores[0],
                "labels": labels,
                "scores": scores,
            }
        )
    return rows


def detection_row(
    detections: Detections,
    size: Size,
    extent: Size,
    classes: Sequence[str],
    min_score: float,
) -> dict[str, Any]:
    """Returns the boxes, labels and scores of an image's objects, and for networks with masks their run lengths.

    `size` and `extent` are those of coco_results.as_results. Raises RuntimeError for outputs that are not finite.
    """
    if not (detections.scores.isfinite().all() and detections.boxes.isfinite().all()):
        raise RuntimeError("the network's scores or boxes are not finite")
    good = detections[detections.scores >= min_score]
    results = as_results(good, size, extent)
    row = {
        "boxes": [result["bbox"] for result in results],
        "labels": [classes[result["label"]] for result in results],
        "scores": [result["score"] for result in results],
    }
    if detections.masks is not None:
        row["segmentations"] = [result["segmentation"] for result in results]
    return row


def segmentation_row(labels: npt.NDArray[np.uint8], classes: Sequence[str]) -> dict[str, Any]:
    """Returns the map of an image's classes, [height, width], as a PNG in base64, and the classes in it.

    The PNG has the values of stored maps, ADE20K's: c + 1 is class c; 0, no class, is never answered.
    """
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    # The classes with the most pixels come first; a stable sort orders equal ones by their number.
    present = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    return {
        "mask": base64.b64encode(_encode_png(labels + np.uint8(1))).decode(),
        "labels": [classes[label] for label in present],
        "values": [label + 1 for label in present],
        "shares": [float(counts[label] / labels.size) for label in present],
    }


def decode_mask(mask: str) -> npt.NDArray[np.uint8]:
    """Returns the map, [height, width], of the "mask" of a segmentation's row."""
    return np.array(Image.open(io.BytesIO(base64.b64decode(mask)))) - np.uint8(1)


def class_map(logits: Tensor, extent: Size, size: Size) -> Tensor:
    """Returns the best class of each pixel of an image, [height, width] uint8, from logits [K, H / 4, W / 4].

    `extent` and `size` are those of evaluation_view.resize_to_image. Raises RuntimeError for logits that are not
    finite.
    """
    if not logits.isfinite().all():
        raise RuntimeError("the network's logits are not finite")
    labels = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    best = torch.full(size, -torch.inf, device=logits.device)
    # One class is resized at a time: at full size all of them at once could need gigabytes.
    for number, plane in enumerate(logits):
        (scores,) = resize_to_image(plane[None], extent, size)
        labels.masked_fill_(scores > best, number)
        torch.maximum(best, scores, out=best)
    return labels


def _encode_png(values: npt.NDArray[np.uint8]) -> bytes:
    """Returns a PNG with a palette, in which 0 is black, so that people can look at it."""
    image = Image.fromarray(values)
    image.putpalette(bytes(3) + palette(255).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
