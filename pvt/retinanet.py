"""RetinaNet: at each place of a feature pyramid, the class and the outline of nine anchors.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, https://arxiv.org/abs/1708.02002, wired as in the PVT
paper (section 4.2), with torchvision's head.

    maps at strides 8, 16, 32 ─ pyramid ─┬─▶ strides 8, 16, 32 ─┬─ 4 convolutions ─▶ a logit for each anchor and class
    map at stride 32 ─ convolution /2 ───┼─▶ stride 64 ─────────┤
                 ReLU, convolution /2 ───┴─▶ stride 128 ────────┴─ 4 convolutions ─▶ 4 numbers for each anchor

An anchor learns the object that it overlaps by half or more, the best one for an object by whatever it is; it learns
that there is none if it overlaps all by less than 0.4. Both losses are sums over an image's anchors by the number that
have an object: focal loss (alpha 0.25, gamma 2) and, of the boxes, the L1 loss.

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
SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # of the anchors of a place
CANDIDATES = 1000  # of each map, before those that overlap are left out
MIN_SIDE_PX = 0.01  # of a box; what is left of one that lies beyond the image's extent has none


class RetinaNet(Detector):
    """Backbone, feature pyramid of `pyramid_channels` and head.

    Anchors on the finest map have sides of `smallest_anchor` pixels times SCALES. Found are the `max_detections` best
    boxes with scores above `min_score`, of boxes of a class that overlap by more than `max_overlap` the better one.
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
        coarser.use_P5 = False  # which torchvision takes to be meant where both widths are the same
        self.pyramid = FeaturePyramidNetwork(widths, pyramid_channels, coarser)
        self.anchors = Anchors(PYRAMID_STRIDES, smallest_anchor, SCALES)
        self.head = RetinaNetHead(pyramid_channels, self.anchors.num_anchors_per_location()[0], num_classes)
        self.matcher = Matcher(high_threshold=0.5, low_threshold=0.4, allow_low_quality_matches=True)
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.min_score, self.max_overlap, self.max_detections = min_score, max_overlap, max_detections

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """The backbone's maps -> the pyramid's, [N, pyramid_channels, …] at PYRAMID_STRIDES."""
        named = {str(stride): level for stride, level in zip(STRIDES[1:], maps[1:], strict=True)}
        return list(self.pyramid(named).values())

    def losses(
        self, maps: list[Tensor], extents: Sequence[Extent], targets: Sequence[Objects]
    ) -> list[dict[str, Tensor]]:
        levels = self.levels(maps)
        outputs = {name: output.float() for name, output in self.head(levels).items()}  # [N, A, K] and [N, A, 4]
        anchors = torch.cat(self.anchors.on(levels))
        losses = []
        for i, objects in enumerate(targets):
            of_image = {name: output[i : i + 1] for name, output in outputs.items()}
            target = {"boxes": objects.boxes, "labels": objects.labels}
            losses.append(self.head.compute_loss([target], of_image, [anchors], [self._match(objects, anchors)]))
        return losses

    def _match(self, objects: Objects, anchors: Tensor) -> Tensor:
        """Which object an anchor learns, [A] int64, or one of Matcher's negative values."""
        if not len(objects):  # which Matcher does not take
            return anchors.new_full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
        return self.matcher(box_iou(objects.boxes, anchors))

    def detect(self, maps: list[Tensor], extents: Sequence[Extent]) -> list[Detections]:
        levels = self.levels(maps)
        outputs = self.head(levels)
        scores, offsets = outputs["cls_logits"].float().sigmoid(), outputs["bbox_regression"].float()
        anchors = self.anchors.on(levels)
        sizes = [len(of_level) for of_level in anchors]
        return [
            self._best(scores[i].split(sizes), offsets[i].split(sizes), anchors, extent)
            for i, extent in enumerate(extents)
        ]

    def _best(
        self, scores: Sequence[Tensor], offsets: Sequence[Tensor], anchors: Sequence[Tensor], extent: Extent
    ) -> Detections:
        """What an image's anchors on each map, their scores [A of the map, K] and offsets [A of the map, 4] say."""
        boxes, best, labels = [], [], []
        for of_level, own_offsets, own_anchors in zip(scores, offsets, anchors, strict=True):
            top, places = of_level.flatten().topk(min(CANDIDATES, of_level.numel()))
            top, places = top[top > self.min_score], places[top > self.min_score]
            chosen = places // self.num_classes
            boxes.append(self.box_coder.decode_single(own_offsets[chosen], own_anchors[chosen]))
            best.append(top)
            labels.append(places % self.num_classes)
        found = Detections(clip_boxes_to_image(torch.cat(boxes), extent), torch.cat(best), torch.cat(labels))
        found = found[remove_small_boxes(found.boxes, MIN_SIDE_PX)]
        kept = batched_nms(found.boxes, found.scores, found.labels, self.max_overlap)
        return found[kept[: self.max_detections]]
