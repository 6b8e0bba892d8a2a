"""RetinaNet: at each position of a feature pyramid, the class and the box of nine anchors.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, https://arxiv.org/abs/1708.02002, wired as in the PVT
paper (section 4.2), with torchvision's head.

    maps at strides 8, 16, 32 ─ pyramid ─┬─▶ strides 8, 16, 32 ─┬─ 4 convolutions ─▶ a logit for each anchor and class
    map at stride 32 ─ convolution /2 ───┼─▶ stride 64 ─────────┤
                 ReLU, convolution /2 ───┴─▶ stride 128 ────────┴─ 4 convolutions ─▶ 4 numbers for each anchor

An anchor is assigned the object that it overlaps by half or more; an object's best anchor is assigned to it in any
case. An anchor that overlaps every object by less than 0.4 is background. Both losses are sums over an image's anchors,
divided by the number of those with an object: the focal loss (alpha 0.25, gamma 2), and the L1 loss of the boxes.

Shapes: N images, A anchors on all maps, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from pvt.dense import backbone, checkpoint_filter_fn
from pvt.detector import Anchors, Detections, Detector, Extent, Objects
from pvt.model import STRIDES

__all__ = ["RetinaNet", "backbone", "checkpoint_filter_fn"]

PYRAMID_STRIDES = (8, 16, 32, 64, 128)

SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""Scales of the anchors at a position."""

CANDIDATES = 1000
"""Number of boxes of each map before non-maximum suppression."""

MIN_SIDE_PX = 0.01
"""Minimum side of a box. A box that lies beyond the image's extent is clipped to nothing."""


class RetinaNet(Detector):
    """Backbone, feature pyramid of `pyramid_channels` and head.

    Anchors on the finest map have sides of `smallest_anchor` pixels times SCALES. Detections are the `max_detections`
    best boxes with scores above `min_score`, after non-maximum suppression of each class with the threshold
    `max_overlap`.
    """

    pretrained_cfg = {"classifier": "head.classification_head.cls_logits"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        pyramid_channels: int = 256,
        smallest_anchor: int = 32,
        min_score: float = 0.05,
        max_overlap: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__(backbone, num_classes)
        widths = self.widths[1:]
        coarser = LastLevelP6P7(widths[-1], pyramid_channels)
        # From the backbone's last map; torchvision takes the pyramid's where both have the same width.
        coarser.use_P5 = False
        self.pyramid = FeaturePyramidNetwork(widths, pyramid_channels, coarser)
        self.anchors = Anchors(PYRAMID_STRIDES, smallest_anchor, SCALES)
        num_anchors = self.anchors.num_anchors_per_location()[0]
        self.head = RetinaNetHead(pyramid_channels, num_anchors, num_classes)
        self.matcher = Matcher(
            high_threshold=0.5,
            low_threshold=0.4,
            allow_low_quality_matches=True,
        )
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.min_score = min_score
        self.max_overlap = max_overlap
        self.max_detections = max_detections

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Returns the pyramid's maps [N, pyramid_channels, …] at PYRAMID_STRIDES from the backbone's maps."""
        # The pyramid starts at stride 8; the backbone's finest map is not used.
        named = {str(stride): level for stride, level in zip(STRIDES[1:], maps[1:], strict=True)}
        return list(self.pyramid(named).values())

    def losses(
        self,
        maps: list[Tensor],
        extents: Sequence[Extent],
        targets: Sequence[Objects],
    ) -> list[dict[str, Tensor]]:
        levels = self.levels(maps)
        outputs = {name: output.float() for name, output in self.head(levels).items()}  # [N, A, K] and [N, A, 4]
        anchors = torch.cat(self.anchors.on(levels))
        losses = []
        for i, objects in enumerate(targets):
            # One image at a time, because torchvision's losses are means over a batch's images.
            of_image = {name: output[i : i + 1] for name, output in outputs.items()}
            target = {"boxes": objects.boxes, "labels": objects.labels}
            matches = self._match(objects, anchors)
            losses.append(self.head.compute_loss([target], of_image, [anchors], [matches]))
        return losses

    def _match(self, objects: Objects, anchors: Tensor) -> Tensor:
        """Returns the index of each anchor's object, [A] int64, or one of Matcher's negative values."""
        # Matcher does not take an image without objects.
        if not len(objects):
            return anchors.new_full(
                (len(anchors),),
                Matcher.BELOW_LOW_THRESHOLD,
                dtype=torch.int64,
            )
        return self.matcher(box_iou(objects.boxes, anchors))

    def detect(self, maps: list[Tensor], extents: Sequence[Extent]) -> list[Detections]:
        levels = self.levels(maps)
        outputs = self.head(levels)
        scores = outputs["cls_logits"].float().sigmoid()  # [N, A, K]
        offsets = outputs["bbox_regression"].float()  # [N, A, 4]
        anchors = self.anchors.on(levels)
        sizes = [len(of_level) for of_level in anchors]
        return [
            self._select(scores[i].split(sizes), offsets[i].split(sizes), anchors, extent)
            for i, extent in enumerate(extents)
        ]

    def _select(
        self,
        scores: Sequence[Tensor],
        offsets: Sequence[Tensor],
        anchors: Sequence[Tensor],
        extent: Extent,
    ) -> Detections:
        """Returns an image's detections from its scores [A, K], offsets [A, 4] and anchors [A, 4] on each map."""
        boxes, best, labels = [], [], []
        for of_level, own_offsets, own_anchors in zip(scores, offsets, anchors, strict=True):
            top, indices = of_level.flatten().topk(min(CANDIDATES, of_level.numel()))
            is_good = top > self.min_score
            top, indices = top[is_good], indices[is_good]
            # An index counts anchors and classes: anchor * K + class.
            chosen = indices // self.num_classes
            boxes.append(self.box_coder.decode_single(own_offsets[chosen], own_anchors[chosen]))
            best.append(top)
            labels.append(indices % self.num_classes)
        detections = Detections(
            clip_boxes_to_image(torch.cat(boxes), extent),
            torch.cat(best),
            torch.cat(labels),
        )
        detections = detections[remove_small_boxes(detections.boxes, MIN_SIDE_PX)]
        kept = batched_nms(
            detections.boxes,
            detections.scores,
            detections.labels,
            self.max_overlap,
        )
        return detections[kept[: self.max_detections]]
