"""Mask R-CNN: proposals from a feature pyramid, and for each a class, a box and a mask.

He et al., "Mask R-CNN", ICCV 2017, https://arxiv.org/abs/1703.06870, with the feature pyramid and the sizes that the
PVT paper takes (section 4.2), on torchvision's region proposals and heads.

    maps at strides 4 … 32 ─ pyramid ─▶ strides 4, 8, 16, 32, and every second place of the last ─▶ stride 64
    strides 4 … 64 ─ convolution ─▶ how likely 3 anchors a place hold an object, and its outline ─ NMS ─▶ proposals
    strides 4 … 32, proposals ─┬─ 7 x 7 of each ─ 2 layers of 1,024 ─────────────────▶ a class or none, and a box
                               └─ 14 x 14 of each object ─ 4 convolutions, doubled ──▶ a 28 x 28 mask for each class

Shapes: N images, K classes. Class 0 of torchvision's heads is "none"; theirs are ours plus 1.
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
BOX_GRID, MASK_GRID = 7, 14  # places a side that heads see of a proposal
MASK_LAYERS = 4


class MaskRcnn(Detector):
    """Backbone, feature pyramid of `pyramid_channels`, region proposals and heads.

    Anchors on the finest map have sides of `smallest_anchor` pixels. Found are the `max_detections` best boxes with
    scores above `min_score`, of boxes of a class that overlap by more than `max_overlap` the better one.

    `box_width` and `mask_width` are the channels of the heads' layers; of an image's proposals they learn from
    `sampled_boxes`.
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
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(pyramid_channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},  # of each map
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            _pool(BOX_GRID),
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
            mask_roi_pool=_pool(MASK_GRID),
            mask_head=MaskRCNNHeads(pyramid_channels, (mask_width,) * MASK_LAYERS, 1),
            mask_predictor=MaskRCNNPredictor(mask_width, mask_width, num_classes + 1),
        )
        predictors: list[Any] = [self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor]
        for predictor in predictors:
            predictor.register_forward_hook(_in_float32)

    def levels(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """The backbone's maps -> the pyramid's, [N, pyramid_channels, …] at PYRAMID_STRIDES, finest first."""
        return self.pyramid({str(stride): level for stride, level in zip(STRIDES, maps, strict=True)})

    def losses(
        self, maps: list[Tensor], extents: Sequence[Extent], targets: Sequence[Objects]
    ) -> list[dict[str, Tensor]]:
        levels = self.levels(maps)
        return [
            self._losses({name: level[i : i + 1] for name, level in levels.items()}, extent, objects)
            for i, (extent, objects) in enumerate(zip(extents, targets, strict=True))
        ]

    def _losses(self, levels: dict[str, Tensor], extent: Extent, objects: Objects) -> dict[str, Tensor]:
        """An image's losses, from the pyramid's maps of this image. torchvision's are means over a batch's samples."""
        assert objects.masks is not None
        target = [{"boxes": objects.boxes, "labels": objects.labels + 1, "masks": objects.masks}]
        proposals, of_rpn = self.rpn(_sized(levels, [extent]), levels, target)
        if not len(proposals[0]):  # else an image without objects would leave the heads nothing, a mean of which is nan
            height, width = extent
            proposals = [objects.boxes.new_tensor([[0, 0, width, height]])]
        _, of_heads = self.roi_heads(levels, proposals, [extent], target)
        return {name.removeprefix("loss_"): loss for name, loss in (of_rpn | of_heads).items()}

    def detect(self, maps: list[Tensor], extents: Sequence[Extent]) -> list[Detections]:
        levels = self.levels(maps)
        proposals, _ = self.rpn(_sized(levels, extents), levels)
        found, _ = self.roi_heads(levels, proposals, list(extents))
        return [
            Detections(image["boxes"], image["scores"], image["labels"] - 1, image["masks"][:, 0]) for image in found
        ]


def _sized(levels: dict[str, Tensor], extents: Sequence[Extent]) -> ImageList:
    """The images as region proposals want them, which ask for nothing but their sizes."""
    return ImageList(next(iter(levels.values())), list(extents))


def _pool(grid: int) -> MultiScaleRoIAlign:
    """[boxes, channels, grid, grid] of the maps that boxes belong to by their size.

    torchvision's would derive the strides from the first images' sizes, for good; ours are less than their canvas.
    """
    pool = MultiScaleRoIAlign([str(stride) for stride in STRIDES], grid, sampling_ratio=2)
    pool.scales = [1 / stride for stride in STRIDES]
    pool.map_levels = initLevelMapper(2, 1 + NUM_MAPS)  # stride 2 ** 2 to 2 ** 5
    return pool


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A hook: what predictors give under autocast, as boxes and losses are to be computed with."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_in_float32(module, inputs, output) for output in outputs)
