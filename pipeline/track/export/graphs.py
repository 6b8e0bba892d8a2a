"""Networks as functions of tensors alone. They are exported as graphs, and every export is compared with one.

    classification, semantic_fpn    image ─────────▶ logits
    retinanet                       image, extent ─▶ logits, boxes   of every anchor
    detr                            image, extent ─▶ logits, boxes   of every query
    mask_rcnn                       image, extent ─▶ logits, boxes   of each object; for comparisons, not to be traced

Boxes are x1, y1, x2, y2 in pixels of the canvas and lie inside the extent: the height and width of the canvas that an
image fills.

Shapes: N images, K classes, A anchors or queries.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from pvt import retinanet
from pvt.model import STRIDES

IMAGE = "image"
EXTENT = "extent"
LOGITS = "logits"
BOXES = "boxes"


class Graph(nn.Module):
    """A network with named inputs and outputs. The inputs have the names of the arguments of `forward`."""

    inputs: tuple[str, ...] = (IMAGE,)
    outputs: dict[str, str] = {LOGITS: "NC"}
    """Layouts of the outputs, by name."""
    smallest_side = 1
    """Smallest height and width of the input, in pixels."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def postprocessing(self) -> dict[str, Any]:
        """Describes what remains to be done with the outputs, for users who have nothing but the graph."""
        return {}


class ClassGraph(Graph):
    """Classification: [N, 3, H, W] to logits [N, K]."""

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)


class MapGraph(ClassGraph):
    """Semantic segmentation: [N, 3, H, W] to logits [N, K, H / 4, W / 4]."""

    outputs = {LOGITS: "NCHW"}

    def postprocessing(self) -> dict[str, Any]:
        return {
            "postprocessing": [
                "resize the logits to the padded size",
                "cut them to the resized image, upper left",
                "resize them to the size that the image had",
                "take the class with the greatest logit at each pixel",
            ],
            "postprocessing_resize": {"mode": "bilinear", "align_corners": False, "antialias": False},
        }


class _BoxGraph(Graph):
    """[N, 3, H, W] and [N, 2] int64 to logits [N, A, K], of DETR with one more for "no object", and boxes [N, A, 4]."""

    inputs = (IMAGE, EXTENT)
    outputs = {LOGITS: "NAC", BOXES: "NA4"}


class AnchorGraph(_BoxGraph):
    """RetinaNet without the choice among its boxes, whose steps depend on the number of boxes."""

    # Below this the coarsest map has a single position, and a graph traced with larger maps is wrong for it.
    smallest_side = retinanet.PYRAMID_STRIDES[-1] + STRIDES[-1]

    def forward(self, image: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.network.levels(self.network.maps(image))
        outputs = self.network.head(levels)
        offsets = outputs["bbox_regression"]
        anchors = torch.cat(self.network.anchors.on(levels))
        # The coder takes one list of boxes, so the images' are joined and separated again.
        boxes = self.network.box_coder.decode_single(
            offsets.flatten(0, 1),
            anchors.repeat(offsets.shape[0], 1),
        )
        boxes = boxes.unflatten(0, offsets.shape[:2])
        return outputs["cls_logits"], _clip_boxes(boxes, extent)

    def postprocessing(self) -> dict[str, Any]:
        network = self.network
        return {
            "anchors": {
                "strides_px": retinanet.PYRAMID_STRIDES,
                "of_a_place": network.anchors.num_anchors_per_location()[0],
                "order": "map by map, of which each has ceil(H / stride) rows of ceil(W / stride) places",
            },
            "postprocessing": [
                "scores are 1 / (1 + exp(-logits))",
                "take scores above min_score, of each map and all its anchors and classes at most the best "
                "candidates_of_a_map, each with its anchor's box",
                "remove boxes of which a side is shorter than min_side_px",
                "of boxes of one class with an intersection over union above max_overlap remove the worse one, "
                "beginning with the best score of all",
                "take the best max_detections",
                _TO_IMAGE,
            ],
            "min_score": network.min_score,
            "candidates_of_a_map": retinanet.CANDIDATES,
            "min_side_px": retinanet.MIN_SIDE_PX,
            "max_overlap": network.max_overlap,
            "max_detections": network.max_detections,
        }


class QueryGraph(_BoxGraph):
    """DETR: the outputs of its last decoder layer."""

    def forward(self, image: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = self.network.predict(self.network.maps(image), extent)
        corners = box_convert(boxes[-1], "cxcywh", "xyxy") * _width_height_twice(extent)
        return logits[-1], _clip_boxes(corners, extent)

    def postprocessing(self) -> dict[str, Any]:
        return {
            "postprocessing": [
                "scores are the softmax of a query's logits, the last of which stands for no object",
                "take each query's best score of a class, with that class and the query's box",
                "take the best max_detections",
                _TO_IMAGE,
            ],
            "max_detections": self.network.max_detections,
        }


class FoundGraph(_BoxGraph):
    """Mask R-CNN, all images' objects together: the score of each in its class's column, [n, K], and boxes [n, 4]."""

    outputs = {LOGITS: "NC", BOXES: "N4"}

    def forward(self, image: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        detections = self.network(image, [(height, width) for height, width in extent.tolist()])
        scores = torch.cat([each.scores for each in detections])
        labels = torch.cat([each.labels for each in detections])
        classes = nn.functional.one_hot(labels, self.network.num_classes)
        return scores[:, None] * classes, torch.cat([each.boxes for each in detections])


_TO_IMAGE = "multiply x by the image's own width / the extent's width, and y likewise, to have pixels of the image"


GRAPHS: dict[str, type[Graph]] = {
    "classification": ClassGraph,
    "semantic_fpn": MapGraph,
    "retinanet": AnchorGraph,
    "mask_rcnn": FoundGraph,
    "detr": QueryGraph,
}
"""The graph of each task's networks."""


def _width_height_twice(extent: Tensor) -> Tensor:
    """Maps heights and widths, [N, 2], to width, height, width, height, [N, 1, 4]."""
    return extent[:, None, [1, 0, 1, 0]]


def _clip_boxes(boxes: Tensor, extent: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), _width_height_twice(extent))
