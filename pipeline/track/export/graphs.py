"""A network as a function of tensors alone: what is exported as a graph, and what every export is compared with.

    classification, semantic_fpn    image ─────────▶ logits
    retinanet                       image, extent ─▶ logits, boxes   of every anchor
    detr                            image, extent ─▶ logits, boxes   of every query
    mask_rcnn                       image, extent ─▶ logits, boxes   of what it found; a comparison's, not to be traced

Boxes are x1, y1, x2, y2 in pixels of the canvas, inside the extent: the height and width that an image fills of it.

Shapes: N images, K classes, A anchors or queries.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from pipeline.config import DetrConfig, MaskRcnnConfig, RetinaNetConfig, TaskConfig
from pvt import retinanet
from pvt.dense import DenseNetwork
from pvt.model import STRIDES

IMAGE, EXTENT, LOGITS, BOXES = "image", "extent", "logits", "boxes"


class Graph(nn.Module):
    """Inputs are called as its arguments."""

    inputs: tuple[str, ...] = (IMAGE,)
    outputs: dict[str, str] = {LOGITS: "NC"}
    """Their layouts, by name."""
    smallest_side = 1
    """Of the input, in pixels."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def postprocessing(self) -> dict[str, Any]:
        """What is left to be done with the outputs, for those who have nothing but the graph."""
        return {}


class ClassGraph(Graph):
    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)


class MapGraph(ClassGraph):
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
    """[N, 3, H, W] and [N, 2] int64 to [N, A, K], of some with one more for "none", and [N, A, 4]."""

    inputs = (IMAGE, EXTENT)
    outputs = {LOGITS: "NAC", BOXES: "NA4"}


class AnchorGraph(_BoxGraph):
    """RetinaNet until its boxes are chosen from, which takes as long as there are boxes."""

    # A graph that is made for maps of several places is not right for a single one, which the coarsest then has.
    smallest_side = retinanet.PYRAMID_STRIDES[-1] + STRIDES[-1]

    def forward(self, image: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.network.levels(self.network.maps(image))
        outputs = self.network.head(levels)
        anchors, offsets = torch.cat(self.network.anchors.on(levels)), outputs["bbox_regression"]
        boxes = self.network.box_coder.decode_single(offsets.flatten(0, 1), anchors.repeat(offsets.shape[0], 1))
        return outputs["cls_logits"], _clipped(boxes.unflatten(0, offsets.shape[:2]), extent)

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
                "leave out boxes of which a side is shorter than min_side_px",
                "of boxes of one class with an intersection over union above max_overlap leave out the worse one, "
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
    def forward(self, image: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = self.network.predict(self.network.maps(image), extent)
        corners = box_convert(boxes[-1], "cxcywh", "xyxy") * _width_height_twice(extent)
        return logits[-1], _clipped(corners, extent)

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
    """Mask R-CNN. Of all images together: each object's score in the column of its class, [n, K], and boxes [n, 4]."""

    outputs = {LOGITS: "NC", BOXES: "N4"}

    def forward(self, image: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network(image, [(height, width) for height, width in extent.tolist()])
        scores = torch.cat([each.scores for each in found])
        classes = nn.functional.one_hot(torch.cat([each.labels for each in found]), self.network.num_classes)
        return scores[:, None] * classes, torch.cat([each.boxes for each in found])


_TO_IMAGE = "multiply x by the image's own width / the extent's width, and y likewise, to have pixels of the image"


def graph(task: TaskConfig, network: Any) -> Graph:
    """A registered model's network as a graph."""
    if isinstance(task, RetinaNetConfig):
        return AnchorGraph(network)
    if isinstance(task, DetrConfig):
        return QueryGraph(network)
    if isinstance(task, MaskRcnnConfig):
        return FoundGraph(network)
    return (MapGraph if isinstance(network, DenseNetwork) else ClassGraph)(network)


def _width_height_twice(extent: Tensor) -> Tensor:
    """[N, 2] to [N, 1, 4]."""
    return extent[:, None, [1, 0, 1, 0]]


def _clipped(boxes: Tensor, extent: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), _width_height_twice(extent))
