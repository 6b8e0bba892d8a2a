"""Images: the data sets, the network's input, augmentation, and mixing."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.fields import Folder, Fraction, LengthField, Positive, RandAugmentField
from pipeline.config.section import Section


class ImageConfig(Section):
    """The network's input: in training, in evaluation, and wherever the model is used later."""

    size: int = Field(default=224, gt=0)
    """Height and width of the network's input, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channels, on a scale of 0 to 1, that normalisation subtracts."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the red, green and blue channels, on a scale of 0 to 1, that normalisation divides by."""
    crop_pct: float = Field(default=0.875, gt=0.0, le=1.0)
    """Fraction of the image's short side that evaluation sees: it resizes the short side to size / crop_pct and crops
    the centre."""
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    """Filter that images are resized with."""


class SourceConfig(Section):
    """One data set of a mixture."""

    path: str
    """Folder or URL of the packed data set."""
    weight: Positive = 1.0
    """Share of the samples drawn from this data set, in proportion to the other weights."""


def _one_source(value: Any) -> Any:
    """Returns a list of one source for a path alone, and anything else as it is."""
    return [{"path": value}] if isinstance(value, str) else value


class DataConfig(Section):
    """The data sets, and how they are read."""

    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(_one_source), Field(min_length=1)]
    """Training data: a folder or URL (s3://, https://, …) with a manifest.json, made by launch/shards.py; or a list of
    them, each {path: …, weight: …}, that are mixed. A URL that ends with ?$NAME takes its query from the environment
    variable NAME. Class folders (also with train/ and val/ around them), a CSV or JSONL list and Parquet files are
    packed into data.cache first."""
    val: str | None = None
    """Validation data, as data.train. None: the folder val/ inside data.train, or else what val_fraction says."""
    # Omitted from dumps where it is not set, so that older configurations keep their fingerprints.
    val_fraction: float | None = Field(default=None, gt=0.0, lt=1.0, exclude_if=lambda value: value is None)
    """Fraction of each class's images, at least one, that become the validation data where there are none otherwise.
    data.train then names images that the run packs. None: without data.val the run is not evaluated."""
    copies: int = Field(default=1, gt=0)
    """Repeated augmentation: number of differently augmented copies of a sample in a batch."""
    lanes: int = Field(default=48, gt=0)
    """Number of parallel read positions in an epoch, which are partitioned over the ranks: the maximum number of ranks
    that a run can use. Where the default does not fit the batch, the largest number up to 64 that does takes its
    place."""
    shuffle_window: int = Field(default=4096, gt=0)
    """Number of samples that are shuffled together inside a lane."""
    num_threads: int = Field(default=0, ge=0)
    """Threads of each rank for reading and for decoding on the CPU. 0: one for each of the rank's cores."""
    prefetch: int = Field(default=3, gt=0)
    """Number of micro-batches that are read ahead of training."""
    cache: Folder | None = None
    """Folder for shards fetched from URLs, shared by the ranks of a node. None: a folder of this user's below the
    temporary folder."""
    cache_gb: float | None = Field(default=None, gt=0.0)
    """Maximum size of the cache, in GB. None: half of the free space of its file system."""
    max_bad_fraction: Fraction = 0.001
    """Maximum fraction of the data set's samples that may prove damaged; training stops beyond it."""

    @property
    def train_paths(self) -> list[str]:
        return [source.path for source in self.train]


class AugmentConfig(Section):
    """Augmentation of training images."""

    renamed: ClassVar[dict[str, str]] = {"image_size": "size_schedule"}

    crop: Literal["resized", "plain", "center"] = "resized"
    """How a training image is cropped. resized: a random crop (crop_scale, crop_ratio) is resized to the network's
    input. plain: the short side is resized to it, and the crop's position along the long side is random. center: the
    view of evaluation."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of a resized crop's area, [low, high], as a fraction of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a resized crop's aspect ratio, [low, high], width over height."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    rand_augment: RandAugmentField | None = None
    """RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1. None: no RandAugment."""
    color_jitter: Fraction = 0.0
    """Maximum change of brightness, contrast and saturation: each is multiplied by a random factor within
    1 ± color_jitter, in random order."""
    erase_prob: Fraction = 0.0
    """Probability of random erasing: one box of 2 % to a third of the image is filled."""
    erase_mode: Literal["pixel", "const"] = "pixel"
    """Values in an erased box of the normalised image. pixel: a standard normal draw for each pixel and channel. const:
    zero."""
    # Its former name, image_size, reads like a single size, as model.image_size is one.
    size_schedule: dict[LengthField, Annotated[int, Field(gt=0)]] = {}
    """Resolution schedule of training: image sizes in pixels by the length of training after which they begin, such as
    {"0 epochs": 128, "60 %": 192}. Before the first entry, and without any, image.size."""

    # timm would ignore color_jitter here without a word, and the run would be another than it says.
    @model_validator(mode="after")
    def _one_colour_policy(self) -> "AugmentConfig":
        if self.rand_augment and self.color_jitter:
            raise ValueError(
                f"color_jitter {self.color_jitter} has no effect beside rand_augment (as in timm, which ignores it "
                "silently): set it to 0 or remove rand_augment"
            )
        return self

    @model_validator(mode="after")
    def _are_ranges(self) -> "AugmentConfig":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is [low, high] with 0 < low <= high")
        return self


class MixConfig(Section):
    """Mixup, CutMix and label smoothing, with timm's semantics."""

    mixup_alpha: float = Field(default=0.0, ge=0.0)
    """Parameter α of the distribution Beta(α, α) of Mixup's weight. 0: no Mixup."""
    cutmix_alpha: float = Field(default=0.0, ge=0.0)
    """Parameter α of the distribution Beta(α, α) of the area that CutMix keeps. 0: no CutMix."""
    prob: Fraction = 1.0
    """Probability that a lane's samples of a batch are mixed."""
    switch_prob: Fraction = 0.5
    """Probability of CutMix instead of Mixup where both are enabled."""
    label_smoothing: Fraction = 0.0
    """Probability mass that is spread evenly over all classes."""

    @property
    def is_active(self) -> bool:
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)
