"""A served segmentation network: how its logits become a map of the image's own size.

    view ──canvas [3, H, W]──network──▶ logits [K, H / 4, W / 4]
                                                  │
    PNG ◀── [h, w] of class + 1 ◀──the best class of each pixel◀──resize──◀──cut──◀──resize

Stored maps have the values of ADE20K's: c + 1 is class c; 0, no class, is never answered.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mlflow.types.schema import Array
from PIL import Image
from torch import Tensor

from pipeline.evaluation_view import Size, resize_to_image
from pipeline.pictures.palette import palette
from pipeline.track.serve.whole_images import ServedOnWholeImages, View


class ServedSegmenter(ServedOnWholeImages):
    """Answers with the map of each image and the classes in it, see served_model.ServedNetwork."""

    columns: Mapping[str, Any] = {
        # Base64, because MLflow's server would write bytes as base64 in lines of 76 letters.
        "mask": "string",
        "labels": Array("string"),
        "values": Array("long"),
        "shares": Array("double"),
    }

    def describe(self, answer: Mapping[str, Any]) -> tuple[str, float]:
        """Returns the class of the most pixels with its share of them, in words and as a number."""
        share = answer["shares"][0]
        return f"{answer['labels'][0]} with a share of the pixels of {share:.4g}", share

    def _answer(self, view: View, canvas: Tensor, params: Mapping[str, Any]) -> dict[str, Any]:
        logits = self._network(canvas[None])[0]
        if not logits.isfinite().all():
            raise RuntimeError("the network's logits are not finite")
        labels = class_map(logits, view.extent, view.size).numpy()
        classes = self._card.classes
        counts = np.bincount(labels.ravel(), minlength=len(classes))
        # The classes with the most pixels come first; a stable sort orders equal ones by their number.
        present = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
        # In stored maps 0 stands for no class.
        return {
            "mask": base64.b64encode(_encode_png(labels + np.uint8(1))).decode(),
            "labels": [classes[label] for label in present],
            "values": [label + 1 for label in present],
            "shares": [float(counts[label] / labels.size) for label in present],
        }


def class_map(logits: Tensor, extent: Size, size: Size) -> Tensor:
    """Returns the best class of each pixel of an image, [height, width] uint8, from logits [K, H / 4, W / 4].

    `extent` and `size` are those of evaluation_view.resize_to_image.
    """
    labels = torch.zeros(size, dtype=torch.uint8)
    best = torch.full(size, -torch.inf)
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
