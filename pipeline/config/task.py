"""The tasks, and the settings of their heads, training views and predictions."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from pipeline.config.data import ImageConfig
from pipeline.config.fields import BelowOne, Fraction, Positive
from pipeline.config.section import Section


class ClassificationConfig(Section):
    """Image classification: one class for each image."""

    name: Literal["classification"] = "classification"


class SemanticFpnConfig(Section):
    """Semantic segmentation with Semantic FPN (Kirillov et al., "Panoptic Feature Pyramid Networks", 2019).

    Training takes crops of image.size, evaluation whole images.
    """

    name: Literal["semantic_fpn"] = "semantic_fpn"
    channels: int = Field(default=128, gt=0, multiple_of=32)
    """Width of the head, in channels."""
    pyramid_channels: int = Field(default=256, gt=0)
    """Width of the feature pyramid, in channels."""
    dropout: BelowOne = 0.1
    """Probability with which a channel is dropped before the head's last layer."""
    short_side: int | None = Field(default=None, gt=0)
    """Short side, in pixels, that images are resized to: for evaluation, and before the random scaling and the crop of
    training. None: image.size."""
    long_side: int | None = Field(default=None, gt=0)
    """Maximum long side, in pixels, of a resized image; an image that would exceed it gets a smaller short side. None:
    four times the short side."""
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    """Range of the random factor, [low, high], by which training images are scaled."""
    max_class_fraction: float = Field(default=0.75, gt=0.0, le=1.0)
    """Maximum fraction of a crop's labelled pixels that one class may have. Other crops are drawn again, up to ten
    times."""

    def sides(self, image: "ImageConfig") -> tuple[int, int]:
        """Returns the short side that whole images are resized to and the maximum long side, in pixels."""
        short = self.short_side or image.size
        return short, self.long_side or 4 * short

    @field_validator("scale")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("scale is [low, high] with low <= high")
        return value


class DetectionConfig(Section):
    """The settings that all detectors share. They take whole images, resized."""

    short_side: int | None = Field(default=None, gt=0)
    """Short side, in pixels, that images are resized to. None: image.size."""
    long_side: int | None = Field(default=None, gt=0)
    """Maximum long side, in pixels, of a resized image; an image that would exceed it gets a smaller short side. None:
    five thirds of the short side."""
    train_short_sides: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Short sides, in pixels, of which training draws one for each image. Empty: short_side."""
    crop_prob: Fraction = 0.0
    """Probability that training takes a random crop of the image and resizes it in place of the whole image. The image
    is first resized to one of crop_short_sides; the crop's sides are drawn from crop_sides."""
    crop_short_sides: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(400, 500, 600), min_length=1)
    """Short sides, in pixels, of which one is drawn for an image that is cropped."""
    crop_sides: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = (384, 600)
    """Range of a crop's height and width, [low, high], in pixels."""
    max_detections: int = Field(default=100, gt=0)
    """Maximum number of detections in an image: those with the highest scores."""

    # 800 x 1333 px, the sizes of COCO's papers, have this ratio.
    def sides(self, image: "ImageConfig") -> tuple[int, int]:
        """Returns the short side that evaluated images are resized to and the maximum long side, in pixels."""
        short = self.short_side or image.size
        return short, self.long_side or round(5 / 3 * short)

    @field_validator("crop_sides")
    @classmethod
    def _is_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError("crop_sides is [low, high] with low <= high")
        return value


class AnchorBasedConfig(DetectionConfig):
    """The settings that detectors with anchors share."""

    pyramid_channels: int = Field(default=256, gt=0)
    """Width of the feature pyramid, in channels."""
    smallest_anchor: int = Field(default=32, gt=0)
    """Side, in pixels, of the anchors on the pyramid's finest map; it doubles with each coarser map."""
    min_score: Fraction = 0.05
    """Score threshold: boxes with a lower score are discarded."""
    max_overlap: Fraction = 0.5
    """Non-maximum suppression: of two boxes of a class with a higher intersection over union, the one with the lower
    score is discarded."""


class RetinaNetConfig(AnchorBasedConfig):
    """RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017)."""

    name: Literal["retinanet"] = "retinanet"


class MaskRcnnConfig(AnchorBasedConfig):
    """Mask R-CNN (He et al., 2017): a box and a mask for each object."""

    name: Literal["mask_rcnn"] = "mask_rcnn"
    box_width: int = Field(default=1024, gt=0)
    """Width of the box head's hidden layers."""
    mask_width: int = Field(default=256, gt=0)
    """Width of the mask head, in channels."""
    sampled_boxes: int = Field(default=512, gt=0)
    """Number of proposals for each image that the heads are trained on."""


class DetrConfig(DetectionConfig):
    """DETR (Carion et al., "End-to-End Object Detection with Transformers", 2020)."""

    name: Literal["detr"] = "detr"
    queries: int = Field(default=100, gt=0)
    """Number of object queries, and so the maximum number of detections in an image."""
    width: int = Field(default=256, gt=0)
    """Width of the transformer, a multiple of `heads` and of 4."""
    heads: int = Field(default=8, gt=0)
    """Number of attention heads."""
    encoder_layers: int = Field(default=6, gt=0)
    """Number of encoder layers."""
    decoder_layers: int = Field(default=6, gt=0)
    """Number of decoder layers."""
    feedforward: int = Field(default=2048, gt=0)
    """Hidden width of the feed-forward networks."""
    dropout: BelowOne = 0.1
    """Dropout probability in the transformer."""

    @model_validator(mode="after")
    def _heads_share_width(self) -> "DetrConfig":
        # The sine and the cosine of x and of y get a quarter of the position embedding each.
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads} and of 4")
        return self


def by_name(value: Any) -> Any:
    """Returns {name: value} for a task's name alone, and anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


def _name_of(task: Any) -> Any:
    """Returns the name that decides which kind of task pydantic validates, of a mapping or of a task."""
    if isinstance(task, dict):
        return task.get("name")
    return getattr(task, "name", None)


TASKS: dict[str, type[Section]] = {
    "classification": ClassificationConfig,
    "semantic_fpn": SemanticFpnConfig,
    "retinanet": RetinaNetConfig,
    "mask_rcnn": MaskRcnnConfig,
    "detr": DetrConfig,
}

TaskConfig = Annotated[
    Annotated[ClassificationConfig, Tag("classification")]
    | Annotated[SemanticFpnConfig, Tag("semantic_fpn")]
    | Annotated[RetinaNetConfig, Tag("retinanet")]
    | Annotated[MaskRcnnConfig, Tag("mask_rcnn")]
    | Annotated[DetrConfig, Tag("detr")],
    Discriminator(_name_of),
    BeforeValidator(by_name),
]
"""A task with its settings. A name alone stands for the task with its defaults."""
