"""The tasks: the settings of their heads, training views and predictions, and the facts that other packages read.

docs/extending.md says how to add one.
"""

import functools
import operator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    PlainValidator,
    SerializeAsAny,
    Tag,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.config.data import ImageConfig
from pipeline.config.fields import BelowOne, ClassWeights, Fraction, Positive
from pipeline.config.section import Section


class TaskConfig(Section):
    """What the sections of all tasks have: a name, and facts, which are no settings."""

    name: str

    annotations: ClassVar[Literal["semantic", "objects"] | None] = None
    """What a data set holds of each image: a label map, its objects or, None, one class."""
    needs_masks: ClassVar[bool] = False
    """Whether every object of an image needs a mask beside its box."""
    is_dense: ClassVar[bool] = False
    """Whether the network is a head on the maps of a backbone, a pvt.dense.DenseNetwork. Otherwise it is a timm model
    with a head of its own."""
    sees_whole_images: ClassVar[bool] = False
    """Whether evaluation shows the network whole images, of sizes of their own. Otherwise it shows the centres, of
    image.size."""
    trains_on_one_size: ClassVar[bool] = True
    """Whether all images of a training batch have one size that is known in advance, so that a step's operations can be
    counted."""
    has_fixed_graph: ClassVar[bool] = True
    """Whether the network's operations are the same for all images of a size, so that a graph can hold them."""
    uses_roi_align: ClassVar[bool] = False
    """Whether the network uses torchvision's RoIAlign."""
    extra_packages: ClassVar[tuple[str, ...]] = ()
    """Packages that a registered version needs beside those that all versions need."""

    @classmethod
    def choices(cls) -> list[type[Section]]:
        return [*TASKS.values()] if cls is TaskConfig else [cls]

    def sides(self, image: ImageConfig) -> tuple[int, int]:
        """Returns the short side that whole images are resized to and the maximum long side, in pixels.

        Only tasks that see whole images have it.
        """
        raise NotImplementedError(f"task {self.name} does not see whole images")


class ClassificationConfig(TaskConfig):
    """Image classification: one class for each image."""

    name: str = "classification"
    # Omitted from dumps where it is not set, so that older configurations and cards keep their fingerprints.
    class_weights: ClassWeights | None = Field(default=None, exclude_if=lambda value: value is None)
    """Weights of the classes in the loss: balanced, the inverse of the classes' shares; a list in the order of the
    classes; or a mapping of their names. They are scaled to a mean of 1 over the training samples. None: all are 1."""


class DenseConfig(TaskConfig):
    """What tasks share that predict something at every position of an image. They see whole images, resized."""

    is_dense = True
    sees_whole_images = True
    default_elongation: ClassVar[float]
    """The maximum long side over the short side where `long_side` is None."""

    short_side: int | None = Field(default=None, gt=0)
    """Short side, in pixels, that images are resized to: for evaluation, and in training before a random scaling and
    crop. None: image.size."""
    long_side: int | None = Field(default=None, gt=0)
    """Maximum long side, in pixels, of a resized image; an image that would exceed it gets a smaller short side. None:
    four times the short side with semantic_fpn, five thirds of it with detectors."""

    def sides(self, image: ImageConfig) -> tuple[int, int]:
        """Returns the short side that whole images are resized to and the maximum long side, in pixels."""
        short = self.short_side or image.size
        return short, self.long_side or round(self.default_elongation * short)

    @field_validator("scale", "crop_sides", check_fields=False)
    @classmethod
    def _is_range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"{info.field_name} is [low, high] with low <= high")
        return value


class SemanticFpnConfig(DenseConfig):
    """Semantic segmentation with Semantic FPN (Kirillov et al., "Panoptic Feature Pyramid Networks", 2019).

    Training takes crops of image.size, evaluation whole images.
    """

    annotations = "semantic"
    default_elongation = 4.0

    name: str = "semantic_fpn"
    channels: int = Field(default=128, gt=0, multiple_of=32)
    """Width of the head, in channels."""
    pyramid_channels: int = Field(default=256, gt=0)
    """Width of the feature pyramid, in channels."""
    dropout: BelowOne = 0.1
    """Probability with which a channel is dropped before the head's last layer."""
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    """Range of the random factor, [low, high], by which training images are scaled."""
    max_class_fraction: float = Field(default=0.75, gt=0.0, le=1.0)
    """Maximum fraction of a crop's labelled pixels that one class may have. Other crops are drawn again, up to ten
    times."""


class DetectionConfig(DenseConfig):
    """The settings that all detectors share."""

    annotations = "objects"
    trains_on_one_size = False
    # 800 x 1333 px, the sizes of COCO's papers, have this ratio.
    default_elongation = 5 / 3

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

    name: str = "retinanet"


class MaskRcnnConfig(AnchorBasedConfig):
    """Mask R-CNN (He et al., 2017): a box and a mask for each object."""

    needs_masks = True
    # The second stage looks at as many regions as the first one has found.
    has_fixed_graph = False
    uses_roi_align = True

    name: str = "mask_rcnn"
    box_width: int = Field(default=1024, gt=0)
    """Width of the box head's hidden layers."""
    mask_width: int = Field(default=256, gt=0)
    """Width of the mask head, in channels."""
    sampled_boxes: int = Field(default=512, gt=0)
    """Number of proposals for each image that the heads are trained on."""


class DetrConfig(DetectionConfig):
    """DETR (Carion et al., "End-to-End Object Detection with Transformers", 2020)."""

    extra_packages = ("scipy", "transformers")

    name: str = "detr"
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
    """Returns {name: value} for a task's name alone, and anything else as it is; class weights are classification's."""
    if isinstance(value, dict) and "class_weights" in value:
        return {"name": "classification", **value}
    return {"name": value} if isinstance(value, str) else value


TASKS: dict[str, type[TaskConfig]] = {
    "classification": ClassificationConfig,
    "semantic_fpn": SemanticFpnConfig,
    "retinanet": RetinaNetConfig,
    "mask_rcnn": MaskRcnnConfig,
    "detr": DetrConfig,
}
"""The section of each task, by its name."""


def _read_task(value: Any) -> TaskConfig:
    """Returns the section for a mapping with a task's name and settings, or for a name alone, with the defaults."""
    return _task_reader(tuple(TASKS.items())).validate_python(by_name(value))


@functools.cache
def _task_reader(tasks: tuple[tuple[str, type[TaskConfig]], ...]) -> TypeAdapter[Any]:
    tagged: list[Any] = [Annotated[section, Tag(name)] for name, section in tasks]
    union: Any = functools.reduce(operator.or_, tagged)
    by_tag: Any = Annotated[union, Discriminator(_name_of)]
    return TypeAdapter(by_tag)


def _name_of(task: Any) -> Any:
    """Returns the name that decides which section pydantic validates, of a mapping or of a section."""
    if isinstance(task, dict):
        return task.get("name")
    return getattr(task, "name", None)


AnyTaskConfig = Annotated[SerializeAsAny[TaskConfig], PlainValidator(_read_task)]
"""One of TASKS with its settings. A name alone stands for the task with its defaults."""
