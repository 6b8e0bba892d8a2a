"""What is learned, and the settings of its network."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from pipeline.config.data import ImageConfig
from pipeline.config.fields import BelowOne, Fraction, Positive
from pipeline.config.section import Section


class ClassificationConfig(Section):
    """A class for each image."""

    name: Literal["classification"] = "classification"


class SemanticFpnConfig(Section):
    """A class for each pixel: Semantic FPN (Kirillov et al., "Panoptic Feature Pyramid Networks", 2019).

    Training sees crops of image.size, evaluation whole images.
    """

    name: Literal["semantic_fpn"] = "semantic_fpn"
    channels: int = Field(default=128, gt=0, multiple_of=32)
    """Of the head."""
    pyramid_channels: int = Field(default=256, gt=0)
    dropout: BelowOne = 0.1
    """Before the head's last layer."""
    short_side: int | None = Field(default=None, gt=0)
    """To which images are resized before they are scaled at random and cropped, or seen whole. None: image.size."""
    long_side: int | None = Field(default=None, gt=0)
    """An image whose other side would be longer is made smaller. None: four times the short side."""
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    """Training images are scaled by a factor drawn from this range."""
    max_class_fraction: float = Field(default=0.75, gt=0.0, le=1.0)
    """A crop in which one class has more of the labelled pixels is drawn again, up to ten times."""

    def sides(self, image: "ImageConfig") -> tuple[int, int]:
        """To which short side whole images are resized, and the longest that the other one may get, in pixels."""
        short = self.short_side or image.size
        return short, self.long_side or 4 * short

    @field_validator("scale")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("scale is [low, high] with low <= high")
        return value


class DetectionConfig(Section):
    """A box for each object: what all detectors share. They see whole images, resized."""

    short_side: int | None = Field(default=None, gt=0)
    """To which images are resized. None: image.size."""
    long_side: int | None = Field(default=None, gt=0)
    """An image whose other side would be longer is made smaller. None: five thirds of the short side."""
    train_short_sides: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Training draws each image's from these. Without any: short_side."""
    crop_prob: Fraction = 0.0
    """Chance that training sees a part of the image instead, resized as images are: a window with sides drawn from
    crop_sides, of the image with its short side at one of crop_short_sides."""
    crop_short_sides: tuple[Annotated[int, Field(gt=0)], ...] = Field(default=(400, 500, 600), min_length=1)
    crop_sides: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = (384, 600)
    max_detections: int = Field(default=100, gt=0)
    """Of an image, those with the best scores."""

    def sides(self, image: "ImageConfig") -> tuple[int, int]:
        """To which short side evaluated images are resized, and the longest that the other one may get, in pixels."""
        short = self.short_side or image.size
        return short, self.long_side or round(5 / 3 * short)

    @field_validator("crop_sides")
    @classmethod
    def _is_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError("crop_sides is [low, high] with low <= high")
        return value


class AnchorBasedConfig(DetectionConfig):
    pyramid_channels: int = Field(default=256, gt=0)
    smallest_anchor: int = Field(default=32, gt=0)
    """Side in pixels of the anchors on the pyramid's finest map; on each coarser one they are twice as large."""
    min_score: Fraction = 0.05
    """Boxes below it are left out."""
    max_overlap: Fraction = 0.5
    """Of two boxes of a class whose intersection over union is larger, the one with the lower score is left out."""


class RetinaNetConfig(AnchorBasedConfig):
    """RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017)."""

    name: Literal["retinanet"] = "retinanet"


class MaskRcnnConfig(AnchorBasedConfig):
    """Mask R-CNN (He et al., 2017): a mask with each box."""

    name: Literal["mask_rcnn"] = "mask_rcnn"
    box_width: int = Field(default=1024, gt=0)
    """Channels of the layers that tell a box's class."""
    mask_width: int = Field(default=256, gt=0)
    """Channels of those that draw its mask."""
    sampled_boxes: int = Field(default=512, gt=0)
    """Proposals of an image that these learn from."""


class DetrConfig(DetectionConfig):
    """DETR (Carion et al., "End-to-End Object Detection with Transformers", 2020)."""

    name: Literal["detr"] = "detr"
    queries: int = Field(default=100, gt=0)
    """Most objects that it finds in an image."""
    width: int = Field(default=256, gt=0)
    """Of the transformer, a multiple of heads."""
    heads: int = Field(default=8, gt=0)
    encoder_layers: int = Field(default=6, gt=0)
    decoder_layers: int = Field(default=6, gt=0)
    feedforward: int = Field(default=2048, gt=0)
    dropout: BelowOne = 0.1

    @model_validator(mode="after")
    def _heads_share_width(self) -> "DetrConfig":
        # The sine and cosine of both coordinates take a quarter of the width each.
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads} and of 4")
        return self


def by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


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
    Discriminator(lambda task: task.get("name") if isinstance(task, dict) else getattr(task, "name", None)),
    BeforeValidator(by_name),
]
"""What is learnt. A name alone stands for the task with its defaults."""
