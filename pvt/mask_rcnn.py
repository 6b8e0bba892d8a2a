"""Mask R-CNN: proposals from a feature pyramid, and for each a class, a box and a mask.

He et al., "Mask R-CNN", ICCV 2017, https://arxiv.org/abs/1703.06870, with the feature pyramid and the sizes of the PVT
paper (section 4.2), on torchvision's region proposals and heads.

    maps at strides 4 … 32 ─ pyramid ─▶ strides 4, 8, 16, 32, and every second position of the last ─▶ stride 64
    strides 4 … 64 ─ convolution ─▶ objectness and boxes of 3 anchors a position ─ NMS ─▶ proposals
    strides 4 … 32, proposals ─┬─ 7 x 7 of each ─ 2 layers of 1,024 ─────────────────▶ a class or none, and a box
                               └─ 14 x 14 of each object ─ 4 convolutions, doubled ──▶ a 28 x 28 mask for each class

Shapes: N images, K classes. Class 0 of torchvision's heads is "none"; their other labels are ours plus 1.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from pvt.dense import NUM_MAPS, backbone, checkpoint_filter_fn
from pvt.detector import Anchors, Detections, Detector, Extent, Objects
from pvt.model import STRIDES

__all__ = ["MaskRcnn", "backbone", "checkpoint_filter_fn"]

PYRAMID_STRIDES = (4, 8, 16, 32, 64)

BOX_GRID = 7
"""Positions a side of a proposal's map in the box head."""

MASK_GRID = 14
"""Positions a side of a proposal's map in the mask head."""

MASK_LAYERS = 4


class MaskRcnn(Detector):
    """Backbone, feature pyramid of `pyramid_channels`, region proposals and heads.

    Anchors on the finest map have sides of `smallest_anchor` pixels. Detections are the `max_detections` best boxes
    with scores above `min_score`, after non-maximum suppression of each class with the threshold `max_overlap`.

    `box_width` and `mask_width` are the widths of the heads. They are trained on `sampled_boxes` of an image's
    proposals.
    """

    has_masks = True
    pretrained_cfg = {
        "classifier": (
            "roi_heads.box_predictor.cls_score",
            "roi_heads.box_predictor.bbox_pred",
            "roi_heads.mask_predictor.mask_fcn_logits",
        )
    }

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
        box_width: int = 1024,
        mask_width: int = 256,
        sampled_boxes: int = 512,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.pyramid = FeaturePyramidNetwork(self.widths, pyramid_channels, LastLevelMaxPool())
        anchors = Anchors(PYRAMID_STRIDES, smallest_anchor)
        num_anchors = anchors.num_anchors_per_location()[0]
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(pyramid_channels, num_anchors),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            # For each map.
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            _build_pool(BOX_GRID),
            TwoMLPHead(pyramid_channels * BOX_GRID**2, box_width),
            FastRCNNPredictor(box_width, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=sampled_boxes,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=min_score,
            nms_thresh=max_overlap,
            detections_per_img=max_detections,
            mask_roi_pool=_build_pool(MASK_GRID),
            mask_head=MaskRCNNHeads(pyramid_channels, (mask_width,) * MASK_LAYERS, 1),
            mask_predictor=MaskRCNNPredictor(mask_width, mask_width, num_classes + 1),
        )
        predictors: list[Any] = [
            self.rpn.head,
            self.roi_heads.box_predictor,
            self.roi_heads.mask_predictor,
        ]
        for predictor in predictors:
            predictor.register_forward_hook(_in_float32)

    def levels(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Returns the pyramid's maps [N, pyramid_channels, …] at PYRAMID_STRIDES, finest first."""
        named = {str(stride): level for stride, level in zip(STRIDES, maps, strict=True)}
        return self.pyramid(named)

    def losses(
        self,
        maps: list[Tensor],
        extents: Sequence[Extent],
        targets: Sequence[Objects],
    ) -> list[dict[str, Tensor]]:
        levels = self.levels(maps)
        losses: list[dict[str, Tensor]] = []
        for i, (extent, objects) in enumerate(zip(extents, targets, strict=True)):
            # One image at a time, because torchvision's losses are means over a batch's samples.
            of_image = {name: level[i : i + 1] for name, level in levels.items()}
            losses.append(self._losses(of_image, extent, objects))
        return losses

    def _losses(
        self,
        levels: dict[str, Tensor],
        extent: Extent,
        objects: Objects,
    ) -> dict[str, Tensor]:
        """Returns an image's losses from the pyramid's maps of this image."""
        assert objects.masks is not None
        target = {
            "boxes": objects.boxes,
            "labels": objects.labels + 1,
            "masks": objects.masks,
        }
        proposals, of_rpn = self.rpn(_as_image_list(levels, [extent]), levels, [target])
        # Without a proposal the heads' losses would be means of nothing, which are NaN.
        if not len(proposals[0]):
            height, width = extent
            proposals = [objects.boxes.new_tensor([[0, 0, width, height]])]
        _, of_heads = self.roi_heads(levels, proposals, [extent], [target])
        losses = of_rpn | of_heads
        return {name.removeprefix("loss_"): loss for name, loss in losses.items()}

    def detect(self, maps: list[Tensor], extents: Sequence[Extent]) -> list[Detections]:
        levels = self.levels(maps)
        proposals, _ = self.rpn(_as_image_list(levels, extents), levels)
        results, _ = self.roi_heads(levels, proposals, list(extents))
        return [
            Detections(
                of_image["boxes"],
                of_image["scores"],
                of_image["labels"] - 1,
                of_image["masks"][:, 0],
            )
            for of_image in results
        ]


def _as_image_list(levels: dict[str, Tensor], extents: Sequence[Extent]) -> ImageList:
    """Returns the images in the form of torchvision's region proposals, which read nothing but their sizes."""
    any_level = next(iter(levels.values()))
    return ImageList(any_level, list(extents))


def _build_pool(grid: int) -> MultiScaleRoIAlign:
    """Returns a layer for boxes -> [boxes, channels, grid, grid], of the map that a box belongs to by its size."""
    # torchvision would derive the strides from the first images' sizes, and keep them. Images are smaller than their
    # canvas here, so the strides are set.
    pool = MultiScaleRoIAlign([str(stride) for stride in STRIDES], grid, sampling_ratio=2)
    pool.scales = [1 / stride for stride in STRIDES]
    # Strides 2 ** 2 to 2 ** 5.
    pool.map_levels = initLevelMapper(2, 1 + NUM_MAPS)
    return pool


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Returns a predictor's outputs in fp32, whatever autocast made of them. It is a forward hook."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    # Tuples and lists of tensors, nested.
    return type(outputs)(_in_float32(module, inputs, output) for output in outputs)
