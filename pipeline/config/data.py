"""Images: where they lie, what the network sees of them, and how they are augmented and mixed."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.fields import Folder, Fraction, LengthField, Positive, RandAugmentField
from pipeline.config.section import Section


class ImageConfig(Section):
    """What the network sees of a picture, in training and wherever the model is used later."""

    size: int = Field(default=224, gt=0)
    """Height and width of the network's input in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Of the red, green and blue channels on a scale of 0 to 1."""
    crop_pct: float = Field(default=0.875, gt=0.0, le=1.0)
    """In evaluation the short side is resized to size / crop_pct before the central crop."""
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"


class SourceConfig(Section):
    """A data set of a mixture."""

    path: str
    weight: Positive = 1.0
    """Its part of the samples drawn, in proportion to the other weights."""


def _one_source(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


class DataConfig(Section):
    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(_one_source), Field(min_length=1)]
    """Folder or URL (s3://, https://, …) with a manifest.json, made by launch/shards.py; or a list of them, each
    {path: …, weight: …}, to be mixed. A URL that ends with ?$NAME takes its query from the variable NAME."""
    val: str | None = None
    copies: int = Field(default=1, gt=0)
    """Repeated augmentation: how many differently augmented copies of a sample a batch holds."""
    lanes: int = Field(default=48, gt=0)
    """Parallel read positions in an epoch, shared out to ranks: the most ranks a run can use."""
    shuffle_window: int = Field(default=4096, gt=0)
    """Samples shuffled together inside a lane."""
    num_threads: int = Field(default=0, ge=0)
    """Threads of each rank for reading and for CPU decoding; 0 takes the rank's share of the cores."""
    prefetch: int = Field(default=3, gt=0)
    """Micro-batches read ahead of training."""
    cache: Folder | None = None
    """Folder for shards fetched from URLs, shared by a node's ranks. None: one of this user's below the temporary
    folder."""
    cache_gb: float | None = Field(default=None, gt=0.0)
    """Most disk space of the cache. None: half of what is free where it lies."""
    max_bad_fraction: Fraction = 0.001
    """Training stops when more than this fraction of the data set's samples has proved damaged."""

    @property
    def train_paths(self) -> list[str]:
        return [source.path for source in self.train]


class AugmentConfig(Section):
    crop: Literal["resized", "plain", "center"] = "resized"
    """resized: a random part of the image (crop_scale, crop_ratio), resized. plain: the short side resized to the
    network's input, a random crop along the long one. center: evaluation's view."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a fraction of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    hflip: Fraction = 0.5
    rand_augment: RandAugmentField | None = None
    """RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1."""
    color_jitter: Fraction = 0.0
    """Brightness, contrast and saturation, in random order, each by a factor of 1 ± color_jitter at most."""
    erase_prob: Fraction = 0.0
    """Chance of random erasing: one box of 2 % to a third of the image."""
    erase_mode: Literal["pixel", "const"] = "pixel"
    """What fills the box: a standard normal draw for each pixel and channel of the normalised image, or zero."""
    image_size: dict[LengthField, Annotated[int, Field(gt=0)]] = {}
    """Resolution schedule of training: "0 epochs": 128, "60 %": 192. Before its first entry, and without any,
    image.size."""

    @model_validator(mode="after")
    def _one_colour_policy(self) -> "AugmentConfig":
        if self.rand_augment and self.color_jitter:
            raise ValueError(
                f"color_jitter {self.color_jitter} has no effect beside rand_augment (as in timm, which leaves it out "
                "in silence): set it to 0 or leave rand_augment out"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is [low, high] with 0 < low <= high")
        return self


class MixConfig(Section):
    mixup_alpha: float = Field(default=0.0, ge=0.0)
    cutmix_alpha: float = Field(default=0.0, ge=0.0)
    prob: Fraction = 1.0
    switch_prob: Fraction = 0.5
    """Chance of cutmix where both are on."""
    label_smoothing: Fraction = 0.0

    @property
    def active(self) -> bool:
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)
