"""Every setting of a run, typed; reading YAML, command-line overrides, and the fingerprint.

    configs/*.yaml ──yaml_text.read──▶ tree ──--set key=value──▶ tree ──pydantic──▶ Config (frozen)

A key that is not a field is an error that names the nearest field, so a typing mistake cannot become a default.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import typing
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from pipeline import files, json_text, yaml_text
from pipeline.errors import InputError

Positive = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


@dataclasses.dataclass(frozen=True)
class Length:
    """A stretch of training: "300 epochs", "20000 steps", "1e9 images" or "5 %" of the whole run."""

    amount: float
    unit: Literal["steps", "epochs", "images", "%"]

    @classmethod
    def parse(cls, text: Any) -> "Length":
        if isinstance(text, Length):
            return text
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*(step|epoch|image|%)s?\s*", str(text))
        if not match:
            raise ValueError('a length is a number and a unit: "300 epochs", "20000 steps", "1e9 images" or "5 %"')
        unit = match[2] if match[2] == "%" else f"{match[2]}s"
        return cls(float(match[1]), unit)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    def steps(self, *, steps_per_epoch: int, global_batch_size: int, total: int | None = None) -> int:
        """In optimiser steps, rounded to the nearest. `total` is the whole run in steps, needed for "%"."""
        if self.unit == "%":
            assert total is not None
            return round(self.amount / 100 * total)
        steps_per_unit = {"steps": 1, "epochs": steps_per_epoch, "images": 1 / global_batch_size}
        return round(self.amount * steps_per_unit[self.unit])


LengthField = Annotated[Length, PlainValidator(Length.parse), PlainSerializer(str)]


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment's settings. In text as timm writes them: "rand-m9-mstd0.5-inc1"."""

    magnitude: float = 10.0
    num_layers: int = 2
    prob: float = 0.5
    """Chance that a layer's operation is applied."""
    magnitude_std: float = 0.0
    """Standard deviation of the magnitude; infinite for a uniform draw from 0 to `magnitude`."""
    max_magnitude: float = 10.0
    increasing: bool = False
    """Operations whose effect grows with the magnitude."""

    @classmethod
    def parse(cls, text: Any) -> "RandAugment":
        if isinstance(text, RandAugment):
            return text
        kind, *parts = str(text).split("-")
        fields = {"m": "magnitude", "n": "num_layers", "p": "prob", "mstd": "magnitude_std", "mmax": "max_magnitude"}
        values: dict[str, Any] = {}
        for part in parts:
            match = re.fullmatch(r"(mstd|mmax|m|n|p|inc)(\d+(?:\.\d+)?|inf)", part)
            if kind != "rand" or not match:
                break
            number = float(match[2])
            if match[1] == "inc":
                values["increasing"] = number != 0
            elif match[1] == "n":
                values["num_layers"] = int(number)
            else:
                values[fields[match[1]]] = number
        else:
            if kind == "rand" and values.get("prob", 0) <= 1:
                # timm's notation calls for a uniform draw by any standard deviation above 100.
                if values.get("magnitude_std", 0) > 100:
                    values["magnitude_std"] = math.inf
                return cls(**values)
        raise ValueError(
            "RandAugment is written rand-m9-mstd0.5-inc1: after rand- any of m (magnitude), n (layers), p (chance of "
            "each, at most 1), mstd (deviation of the magnitude), mmax (its bound), inc1, separated by dashes"
        )

    def __str__(self) -> str:
        return (
            f"rand-m{self.magnitude:g}-n{self.num_layers}-p{self.prob:g}-mstd{self.magnitude_std:g}"
            f"-mmax{self.max_magnitude:g}-inc{self.increasing:d}"
        )


RandAugmentField = Annotated[RandAugment, PlainValidator(RandAugment.parse), PlainSerializer(str)]


NOT_SET = ("null", "none", "off")
MAX_EXTENDED = 20
"""Files that extend one another."""
MAX_YAML_BYTES = 1 << 20


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """None for the words that stand for it, which not every setting takes. Numbers are not booleans: pydantic would
        take false for 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = _kinds(annotation)
        word = "null" if value is None else str(value).lower()
        if word in NOT_SET and not (word == "off" and bool in kinds):
            if type(None) in typing.get_args(annotation):
                return None
            raise ValueError(f"{word} means not set, and this setting needs a value: give one, or remove the line")
        if (int in kinds or float in kinds or 0 in kinds) and any(isinstance(each, bool) for each in _scalars(value)):
            raise ValueError("true and false are not numbers; where a setting may be unset, null does that")
        return value


def _kinds(annotation: Any) -> list[Any]:
    """The types in an annotation: of tuple[int, float] | None int, float and NoneType."""
    parts = typing.get_args(annotation)
    return [kind for part in parts for kind in _kinds(part)] if parts else [annotation]


def _sections(annotation: Any) -> "list[type[Section]]":
    return [kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, Section)]


def _scalars(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if parts is None:
        yield value
    for part in parts or ():
        yield from _scalars(part)


def written(pattern: str, rule: str) -> AfterValidator:
    """Text that matches a regular expression from end to end, or an error that states the rule in words."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(rule)
        return value

    return AfterValidator(check)


SomeSection = TypeVar("SomeSection", bound=Section)
Value = TypeVar("Value")


_CONTROL = r"\x00-\x1f\x7f"
Folder = Annotated[
    str, written(rf"(?!\w+://)[^{_CONTROL}]+", "expected a folder's path: no URL, and without control characters")
]


class Run(Section):
    name: Annotated[
        str,
        written(
            "[A-Za-z0-9][A-Za-z0-9._-]*", "a name has letters, digits, . _ and -, and begins with a letter or digit"
        ),
    ]
    root: Folder = "runs"
    """Folder of all runs; this one lives in root/name."""
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name


class Model(Section):
    """The backbone, a timm model, to which the task adds its head."""

    name: str
    """pvt_pico, pvt_tiny, pvt_small, pvt_medium or pvt_large; or any other timm model."""
    image_size: int | None = Field(default=None, gt=0)
    """Pixels that the position embeddings of a dense task's backbone are for; they are resized to each image's. None:
    image.size."""
    drop_rate: Fraction = 0.0
    drop_path_rate: BelowOne = 0.0
    grad_checkpointing: bool = False
    frozen_stages: int = Field(default=0, ge=0)
    """So many of its stages, from the stem on, keep the weights that they start from. As many as there are, or more:
    the whole backbone does, and the task's head alone is trained."""
    frozen_statistics: bool = False
    """Batch norms of all stages keep the statistics that they start from: a dense task's few images make poor ones."""


class Classification(Section):
    """A class for each image."""

    name: Literal["classification"] = "classification"


class SemanticFpn(Section):
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

    def sides(self, image: "Image") -> tuple[int, int]:
        """To which short side whole images are resized, and the longest that the other one may get, in pixels."""
        short = self.short_side or image.size
        return short, self.long_side or 4 * short

    @field_validator("scale")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("scale is [low, high] with low <= high")
        return value


class Detection(Section):
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

    def sides(self, image: "Image") -> tuple[int, int]:
        """To which short side evaluated images are resized, and the longest that the other one may get, in pixels."""
        short = self.short_side or image.size
        return short, self.long_side or round(5 / 3 * short)

    @field_validator("crop_sides")
    @classmethod
    def _is_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError("crop_sides is [low, high] with low <= high")
        return value


class _AnchorBased(Detection):
    pyramid_channels: int = Field(default=256, gt=0)
    smallest_anchor: int = Field(default=32, gt=0)
    """Side in pixels of the anchors on the pyramid's finest map; on each coarser one they are twice as large."""
    min_score: Fraction = 0.05
    """Boxes below it are left out."""
    max_overlap: Fraction = 0.5
    """Of two boxes of a class whose intersection over union is larger, the one with the lower score is left out."""


class RetinaNet(_AnchorBased):
    """RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017)."""

    name: Literal["retinanet"] = "retinanet"


class MaskRcnn(_AnchorBased):
    """Mask R-CNN (He et al., 2017): a mask with each box."""

    name: Literal["mask_rcnn"] = "mask_rcnn"
    box_width: int = Field(default=1024, gt=0)
    """Channels of the layers that tell a box's class."""
    mask_width: int = Field(default=256, gt=0)
    """Channels of those that draw its mask."""
    sampled_boxes: int = Field(default=512, gt=0)
    """Proposals of an image that these learn from."""


class Detr(Detection):
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
    def _heads_share_width(self) -> "Detr":
        # The sine and cosine of both coordinates take a quarter of the width each.
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads} and of 4")
        return self


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


TASKS: dict[str, type[Section]] = {
    "classification": Classification,
    "semantic_fpn": SemanticFpn,
    "retinanet": RetinaNet,
    "mask_rcnn": MaskRcnn,
    "detr": Detr,
}

Task = Annotated[
    Annotated[Classification, Tag("classification")]
    | Annotated[SemanticFpn, Tag("semantic_fpn")]
    | Annotated[RetinaNet, Tag("retinanet")]
    | Annotated[MaskRcnn, Tag("mask_rcnn")]
    | Annotated[Detr, Tag("detr")],
    Discriminator(lambda task: task.get("name") if isinstance(task, dict) else getattr(task, "name", None)),
    BeforeValidator(_by_name),
]
"""What is learnt. A name alone stands for the task with its defaults."""


class Image(Section):
    """What the network sees of a picture, in training and wherever the model is used later."""

    size: int = Field(default=224, gt=0)
    """Height and width of the network's input in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Of the red, green and blue channels on a scale of 0 to 1."""
    crop_pct: float = Field(default=0.875, gt=0.0, le=1.0)
    """In evaluation the short side is resized to size / crop_pct before the central crop."""
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"


class Source(Section):
    """A data set of a mixture."""

    path: str
    weight: Positive = 1.0
    """Its part of the samples drawn, in proportion to the other weights."""


def _one_source(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


class Data(Section):
    train: Annotated[tuple[Source, ...], BeforeValidator(_one_source), Field(min_length=1)]
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


class Augment(Section):
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
    def _one_colour_policy(self) -> "Augment":
        if self.rand_augment and self.color_jitter:
            raise ValueError(
                f"color_jitter {self.color_jitter} has no effect beside rand_augment (as in timm, which leaves it out "
                "in silence): set it to 0 or leave rand_augment out"
            )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> "Augment":
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is [low, high] with 0 < low <= high")
        return self


class Mix(Section):
    mixup_alpha: float = Field(default=0.0, ge=0.0)
    cutmix_alpha: float = Field(default=0.0, ge=0.0)
    prob: Fraction = 1.0
    switch_prob: Fraction = 0.5
    """Chance of cutmix where both are on."""
    label_smoothing: Fraction = 0.0

    @property
    def active(self) -> bool:
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


class Optim(Section):
    lr: float = Field(gt=0.0)
    """Peak learning rate. The paper's rule: 5e-4 for each 512 samples of the global batch."""
    min_lr: float = Field(default=1e-5, ge=0.0)
    """Where cosine and poly end."""
    warmup_lr: float = Field(default=1e-6, ge=0.0)
    warmup: LengthField = Length(0, "steps")
    schedule: Literal["cosine", "poly", "steps"] = "cosine"
    """How the rate falls from lr to min_lr over t = 0 … 1 after the warm-up: (1 + cos πt) / 2, or (1 - t) ** power; or
    from lr by the factor `gamma` at each of `milestones`."""
    power: Positive = 0.9
    milestones: tuple[LengthField, ...] = ()
    gamma: Fraction = 0.1
    backbone_lr: Positive = 1.0
    """The backbone learns at the head's rate times this."""
    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    """Each layer of the backbone learns at the rate of the one above it times this; the head at the full rate."""
    weight_decay: float = Field(default=0.05, ge=0.0)
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)
    clip_grad: float | None = Field(default=None, gt=0.0)
    """Largest global gradient norm."""

    @property
    def tells_layers_apart(self) -> bool:
        """Whether parameters have rates of their own."""
        return self.layer_decay is not None or self.backbone_lr != 1.0

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> "Optim":
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError(
                f"schedule {self.schedule} with milestones {[str(length) for length in self.milestones]}: schedule "
                "steps needs at least one, and the others have none"
            )
        return self


class Train(Section):
    length: LengthField
    global_batch_size: int = Field(gt=0)
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Most samples in one forward pass of a rank; what a rank has beyond it is accumulated. None: all at once."""
    log_every: LengthField = Length(50, "steps")
    eval_every: LengthField | None = None
    """None: at the end alone."""
    save_every: LengthField | None = None
    """The regular grid of checkpoints, which rolling back goes to. None: at the end alone."""
    ema_decay: BelowOne | None = None
    """Keep an exponential moving average of the weights, which is then what is evaluated and registered."""
    deterministic: bool = False
    """Deterministic kernels, no hardware JPEG decoding: the same bits on every repetition, for some speed."""
    replay_check_every: LengthField | None = None
    """Look for silent corruption: compute one step's gradients twice and compare the ranks' parameters, bit by bit.
    Needs train.deterministic."""
    hang_timeout_s: float = Field(default=600.0, gt=0.0, le=1500.0)
    """Without progress for this long, every rank writes its stacks, the one that is behind is named, and the job
    ends. Longer than the slowest single thing a rank does; less than the collectives' own time-out of 1,800 s."""
    preempt_deadline_s: Positive = 100.0
    """From a signal to stop until the process ends, saved or not."""

    @model_validator(mode="after")
    def _replay_is_exact(self) -> "Train":
        if self.replay_check_every and not self.deterministic:
            raise ValueError(
                "replay_check_every needs deterministic: true: without it a repeated step differs on healthy hardware"
            )
        return self


class Checkpoint(Section):
    every_minutes: Positive | None = None
    """Save by the clock too, beside train.save_every."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints to keep."""
    keep_best: int = Field(default=1, ge=0)
    """Best ones to keep, by the task's main metric, of those that were evaluated."""
    keep_every: LengthField | None = None
    """Keep those whose step is a multiple of this, too."""


class Guard(Section):
    """What to do about steps that would harm the weights."""

    window: int = Field(default=128, ge=8)
    """Applied steps whose losses tell what is usual."""
    sigmas: Positive = 6.0
    """A loss this many standard deviations above the window's mean is left out."""
    rollback_after: int = Field(default=5, ge=1)
    """Steps left out in a row, after which the run goes back to a checkpoint from before them."""
    max_rollbacks: int = Field(default=3, ge=0)
    """One more than this many stops the run."""


class Evaluate(Section):
    batch_size: int = Field(default=256, gt=0)
    """Samples of one forward pass. Part of what makes an evaluation repeatable to the last bit. Of whole images the
    default is 1: in a batch, all are padded to the largest."""


_MOST_WHOLE = 250_000_000  # parameters; weights, gradients and Adam's moments of as many take 4 GB


class Engine(Section):
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What ranks share out: 1 optimiser state, 2 gradients, 3 weights. None: 0, which copies and sends the least, up to
    250 million trainable parameters; 1 beyond, or where engine.deepspeed.zero_optimization asks for something."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    fast: bool = True
    """PVT takes the quicker ways to compute what it computes. False: plain convolutions and PyTorch's attention."""
    compile: bool = False
    """The backbone's blocks are compiled by torch.compile for training: minutes at the first start, quicker steps.
    Evaluation never is, so that scores can be reproduced."""
    deepspeed: dict[str, Any] = {}
    """Further keys of the DeepSpeed configuration. They may not contradict the generated ones."""

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _switches(cls, value: Any) -> Any:
        """DeepSpeed is given booleans for on and off. Its `device: none` is a word of its own."""
        if isinstance(value, dict):
            return {name: cls._switches(part) for name, part in value.items()}
        return {"on": True, "yes": True, "off": False, "no": False}.get(str(value).lower(), value)

    def stage(self, num_parameters: int) -> int:
        """ZeRO's stage for a network with as many trainable parameters."""
        if self.zero_stage is not None:
            return self.zero_stage
        return int(num_parameters > _MOST_WHOLE or "zero_optimization" in self.deepspeed)

    @model_validator(mode="after")
    def _compiles_whole_weights(self) -> "Engine":
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile true with zero_stage 3, which gathers each weight just before its use, and so inside of what "
                "would be compiled: choose zero_stage 0, 1 or 2, or leave compile out"
            )
        return self


class Resume(Section):
    source: str = Field(default="auto", min_length=1)
    """"auto": the run's own newest whole checkpoint, if any. "never": refuse a run folder that has checkpoints, also
    when the same command is started again; a job of launch/submit.py goes on from its own. Otherwise the path of a
    checkpoint folder, where a run starts that has none of its own; once it has, they count."""
    allow: list[str] = []
    """Names of identity entries that may differ from the checkpoint's."""
    start_over: bool = False
    """Start at step 0 where the run has checkpoints and none that can be used: all are damaged or of an older format.
    They are put aside. Without this such a run is refused."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class Debug(Section):
    trace_samples: bool = False
    """Write trace/rank-R.jsonl: each step's samples with hashes of what the engine was given."""


class Profile(Section):
    """Where a step's time goes, on rank 0: profile/summary.md, its numbers, and a trace that Perfetto opens."""

    at: LengthField | None = None
    """Begin after this much training, with one step to warm up. None: do not."""
    steps: int = Field(default=3, gt=0, le=100)
    """To look at."""


class Tracking(Section):
    uri: str | None = None
    """MLflow tracking server. None: MLFLOW_TRACKING_URI or, without one, sqlite:///ROOT/mlflow.db with artifacts beside
    it."""
    experiment: str = "pretrain"
    model_name: (
        Annotated[str, written(rf"[^/:@{_CONTROL}]+", "a model's name is not empty and has none of / : @")] | None
    ) = None
    """Registered model that receives this run's versions. None: the run's name."""
    system_metrics: bool = True
    """Load of each node's cores, memory, disk, network and GPUs, every ten seconds."""
    keep_versions: int = Field(default=1, ge=0)
    """Best ones to keep registered, beside the run's last. Those with an alias or a child stay in any case."""
    patience_s: float = Field(default=120.0, gt=0.0)
    """How long the end of a run waits for the server. `launch/registry.py sync` sends what is left then."""
    report: bool = True
    """Write report.html at the end of the run. launch/report.py does at any time."""
    log_diff: bool = False
    """Log the uncommitted changes to the code. They can hold secrets."""
    log_samples: bool = False
    """Log sheets of augmented training images and of predictions, where their licence allows it."""

    @model_validator(mode="after")
    def _is_a_server(self) -> "Tracking":
        if self.uri and urllib.parse.urlsplit(self.uri).password:
            raise ValueError(
                "uri holds a password, which would be logged with the configuration: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        if self.uri and not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://", self.uri):
            raise ValueError(
                f"uri {self.uri!r} is no tracking server: give http://HOST:PORT, sqlite:///FILE or another database"
            )
        return self


class Bound(Section):
    """What a metric has to reach. One that was not measured, or is not finite, fails."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("a bound has a min, a max or both")
        return self

    def holds(self, value: float | None) -> bool:
        if value is None or not math.isfinite(value):
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        ends = (f"at least {self.min}", self.min), (f"at most {self.max}", self.max)
        return " and ".join(text for text, end in ends if end is not None)


class Gates(Section):
    """What a model version has to pass to become @champion. See launch/registry.py promote."""

    metrics: dict[str, Bound] = {}
    champion: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    """How much worse than the present champion's a metric may be, on the same data. Metrics whose name ends in loss are
    better when lower, all others when higher."""
    data: str | None = None
    """Packed data set to score both on. None: the metrics that were registered, which must be of equal data."""


class Init(Section):
    """What a fine-tuning run starts from."""

    model: str
    """models:/NAME/VERSION or models:/NAME@ALIAS. Its backbone is taken, and its head where the classes are the
    same."""

    @field_validator("model")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        if not re.fullmatch(r"models:/[^/@]+(/[0-9]+|@.+)", value):
            raise ValueError("a registered model is models:/NAME/VERSION or models:/NAME@ALIAS")
        return value


class Handoff(Section):
    """A fine-tuning job to start when this run has ended."""

    config: str
    """Its YAML file."""
    set: list[str] = []
    """Overrides, as on the command line."""
    gate: dict[str, Bound] = {}
    """What this run's model has to reach, or the job is not started."""


_Word = Annotated[str, written(r"[\w.,:&|*\[\]-]+", "expected letters, digits and . , : & | * [ ] - _ without spaces")]
"""What goes into a batch script as it is."""


class Environment(Section):
    """How the software gets to the nodes. By itself: the Python that submits, on a file system that they share."""

    activate: str | None = None
    """Shell lines that make `python` the right one: "module load cuda; source /shared/venv/bin/activate"."""
    copy_to_scratch: bool = False
    """Each node copies the environment to cluster.scratch, once, and runs from there: thousands of ranks that import
    from a shared file system bring it to its knees."""
    container: str | None = None
    """Image in which Apptainer runs the ranks."""

    @model_validator(mode="after")
    def _is_one_way(self) -> "Environment":
        if self.container and self.copy_to_scratch:
            raise ValueError("copy_to_scratch has no effect with a container, which has all it needs: leave it out")
        return self


class Cluster(Section):
    """What a run asks of SLURM. Has no effect outside launch/submit.py and the jobs that it submits."""

    partition: _Word | None = None
    account: _Word | None = None
    qos: _Word | None = None
    nodes: int = Field(default=1, gt=0)
    min_nodes: int | None = Field(default=None, gt=0)
    """Go on with as few as this when there are no more. The batches stay what they are. None: nodes."""
    spares: int = Field(default=0, ge=0)
    """Nodes on top, if they are free, to replace those that fail."""
    gpus_per_node: int = Field(default=8, ge=0)
    ranks_per_node: int | None = Field(default=None, gt=0)
    """None: one for each GPU. For nodes without any."""
    cpus_per_rank: int = Field(default=8, gt=0)
    memory_gb: int | None = Field(default=None, gt=0)
    """Of a node. None: what the partition gives."""
    time: Annotated[
        str, written("([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES")
    ] = "24:00:00"
    """Limit for one stretch, as SLURM writes it: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS. A run
    that needs longer saves and goes to the end of the queue."""
    constraint: _Word | None = None
    exclude: _Word | None = None
    """Nodes never to be used, such as node[07,12-14]."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    options: tuple[Annotated[str, written("--[a-z][^\n]*", "an option of sbatch begins with --")], ...] = ()
    """Further options of sbatch, such as --mail-type=END."""
    grace_s: int = Field(default=180, ge=10)
    """So long before the time limit a run is told to save. Longer than train.preempt_deadline_s."""
    max_restarts: int = Field(default=3, ge=0)
    """A run stays down that has crashed, or reached its time limit, more often than this without a newer checkpoint."""
    environment: Environment = Environment()
    scratch: str | None = None
    """Folder on each node's own disk, for the shard cache and the copy of the environment. Variables such as
    $SLURM_TMPDIR or $USER mean what they do on the node."""

    @property
    def ranks(self) -> int:
        """On a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def fewest_nodes(self) -> int:
        return self.min_nodes or self.nodes

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _is_possible(self) -> "Cluster":
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} on nodes of {self.gpus_per_node} GPUs: a rank has one GPU; "
                "leave it out"
            )
        if not self.ranks:
            raise ValueError("gpus_per_node 0 leaves open how many ranks a node has: set ranks_per_node")
        if self.min_nodes and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is more than nodes {self.nodes}")
        if self.environment.copy_to_scratch and not self.scratch:
            raise ValueError("environment.copy_to_scratch needs scratch: set it to a folder on the nodes' own disks")
        return self


_SHARED_BY_TASKS = {
    "augment": {"hflip", "color_jitter"},
    "mix": set(),
    "data": Data.model_fields.keys() - {"copies"},
}
"""Settings of these sections that mean something to other tasks than classification, too."""


class Config(Section):
    run: Run
    task: Task = Classification()
    model: Model
    image: Image = Image()
    data: Data
    augment: Augment = Augment()
    mix: Mix = Mix()
    optim: Optim
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    evaluate: Evaluate = Evaluate()
    engine: Engine = Engine()
    resume: Resume = Resume()
    tracking: Tracking = Tracking()
    handoff: tuple[Handoff, ...] = ()
    init: Init | None = None
    cluster: Cluster = Cluster()
    debug: Debug = Debug()
    profile: Profile = Profile()

    @model_validator(mode="before")
    @classmethod
    def _whole_images_one_by_one(cls, tree: Any) -> Any:
        task = _by_name(tree.get("task")) if isinstance(tree, dict) else None
        if not isinstance(task, dict) or task.get("name") == "classification" or "evaluate" in tree:
            return tree
        return {**tree, "evaluate": {"batch_size": 1}}

    @model_validator(mode="after")
    def _length_is_absolute(self) -> "Config":
        if self.train.length.unit == "%":
            raise ValueError("train.length is what percentages are of: give it in steps, epochs or images")
        return self

    @model_validator(mode="after")
    def _batches_fit_lanes(self) -> "Config":
        batch, lanes, micro = self.train.global_batch_size, self.data.lanes, self.train.micro_batch_size
        if batch % lanes:
            near = sorted(divisors(batch), key=lambda n: abs(n - lanes))[:3]
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of data.lanes {lanes}: "
                f"each lane gives an equal share of every batch; lanes that fit: {sorted(near)}"
            )
        if self.mix.active and (batch // lanes) % 2:
            raise ValueError(
                f"mix pairs samples inside a lane, but each of {lanes} lanes has {batch // lanes} samples of a batch "
                f"of {batch}: choose data.lanes so that global_batch_size / lanes is even"
            )
        if self.mix.active and self.data.copies > 1 and batch // lanes <= self.data.copies:
            raise ValueError(
                f"mix pairs samples inside a lane, but a lane's {batch // lanes} samples of a batch are "
                f"{self.data.copies} copies of one: lower data.lanes or data.copies"
            )
        if self.mix.active and micro is not None and micro % 2:
            raise ValueError(f"train.micro_batch_size {micro} is odd, but mix pairs samples: choose an even number")
        return self

    @model_validator(mode="after")
    def _frozen_is_trained(self) -> "Config":
        for field in ("frozen_stages", "frozen_statistics"):
            if getattr(self.model, field) and not self.init:
                raise ValueError(
                    f"model.{field} {getattr(self.model, field)} would keep what is random as it is: "
                    "name what to start from with init.model, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _fits_task(self) -> "Config":
        if isinstance(self.task, Classification):
            if self.model.image_size:
                raise ValueError(f"model.image_size {self.model.image_size}: a classifier has image.size; leave it out")
            if self.optim.backbone_lr != 1.0:
                raise ValueError(
                    f"optim.backbone_lr {self.optim.backbone_lr}: a classifier is all backbone; set optim.layer_decay"
                )
            return self
        for section, shared in _SHARED_BY_TASKS.items():
            given, fields = getattr(self, section), type(getattr(self, section)).model_fields
            for field in sorted(fields.keys() - shared):
                if getattr(given, field) != fields[field].get_default(call_default_factory=True):
                    raise ValueError(
                        f"{section}.{field} has no effect with task {self.task.name}, only with classification: leave "
                        f"it out; the task's own settings are {', '.join(type(self.task).model_fields)}"
                    )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides which samples make which batch, and the shapes of the weights.

        A checkpoint records it; resuming with another value is refused unless resume.allow names the key.
        """
        is_labelled = isinstance(self.task, Classification)
        return {
            "seed": self.run.seed,
            "global_batch_size": self.train.global_batch_size,
            "lanes": self.data.lanes,
            "shuffle_window": self.data.shuffle_window,
            "copies": self.data.copies,
            "mixture": [source.weight for source in self.data.train],
            "model": self.model.name,
            "image_size": self.image.size,
            **({} if is_labelled else {"task": self.task.name, "model_image_size": self.model.image_size}),
        }


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `key.path=value` overrides (values are YAML) and validate.

    Raises InputError that lists every wrong key with the value found, the rule and the nearest valid name.
    """
    return load_as(Config, path, overrides)


def load_as(kind: type[SomeSection], path: str | Path, overrides: list[str] | None = None) -> SomeSection:
    """`load` for a file that holds another section, such as Gates."""
    tree = read_yaml(path)
    for override in overrides or []:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise InputError(f"--set {override!r}: expected KEY=VALUE, such as --set optim.lr=1e-3")
        _put(tree, name.strip().split("."), yaml_text.read(text, f"--set {override!r}"), override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {_explain(kind, detail)}" for detail in error.errors()]
        raise InputError("\n".join([f"{path}: configuration refused", *lines])) from None


def read_yaml(path: str | Path, *, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file. `extends: OTHER`, a path from the file's folder, lays it over that other file:
    mappings key by key, everything else whole. Raises InputError."""
    try:
        text = files.read(path, MAX_YAML_BYTES).decode()
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except ValueError as error:  # bytes that are no text, or a path that cannot be one
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    here = Path(path).resolve()
    if here in extended_by:
        raise InputError(f"{extended_by[-1]}: extends {here.name}, which extends it in turn")
    if len(extended_by) > MAX_EXTENDED:
        raise InputError(f"{path}: the last of more than {MAX_EXTENDED} files that extend one another: join some")
    tree = yaml_text.read(text, path)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {_shown(tree)}")
    if (base := tree.pop("extends", None)) is None:
        return tree
    if not isinstance(base, str):
        raise InputError(f"{path}: extends {base!r}; expected the path of one other YAML file")
    return _overlaid(read_yaml(Path(path).parent / base, extended_by=(*extended_by, here)), tree)


def _overlaid(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _overlaid(below.get(key), value) for key, value in above.items()}}


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back to an equal Config."""
    return yaml_text.write(config.model_dump(mode="json"))


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def read_json(kind: type[Value], path: str | Path) -> Value:
    """Returns what a JSON file holds, as `kind`. Raises OSError where it cannot be read, and as `validated` does."""
    return validated(kind, json_text.read(files.read(path), path), path)


def validated(kind: type[Value], tree: Any, source: object) -> Value:
    """Returns a tree of JSON as a model, dataclass or other type. Raises InputError of one line for its first fault."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise InputError(f"{source}: {_told(detail, map(str, detail['loc']))}") from None


def _put(tree: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for name in path[:-1]:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise InputError(f"--set {override!r}: {name} holds {node!r}, not a section")
        tree = node
    tree[path[-1]] = value


_RULES = {
    "value_error": "{error}",
    "assertion_error": "{error}",
    "extra_forbidden": "no such setting",
    "unexpected_keyword_argument": "no such key",
    "greater_than_equal": "has to be at least {ge}",
    "greater_than": "has to be more than {gt}",
    "less_than_equal": "has to be at most {le}",
    "less_than": "has to be less than {lt}",
    "multiple_of": "has to be a multiple of {multiple_of}",
    "finite_number": "has to be a finite number",
    "float": "expected a number",
    "int": "expected a whole number",
    "bool": "expected true or false",
    "string_too_short": "expected text that is not empty",
    "string": "expected text; put a number into quotes to make it text",
    "literal_error": "expected {expected}",
    "union_tag_invalid": "expected one of {expected_tags}",
    "union_tag_not_found": "its name is missing",
    "too_short": "expected at least {min_length} values",
    "too_long": "expected at most {max_length} values",
    "missing": "a value is missing here",
    "tuple": "expected a list",
    "list": "expected a list",
    "dict": "expected a mapping",
    "dataclass": "expected a mapping",
    "model": "expected a mapping of settings",
}
"""In our words, by how the type of pydantic's error begins; the first one that fits."""

_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "epochs": "train.length",
    "max_steps": "train.length",
    "img_size": "image.size",
    "num_workers": "data.num_threads",
}
"""Settings by the names that other trainers have for them."""


def _explain(kind: type[Section], detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    names = _fields_at(kind, path[:-1])
    if path[:1] == ["task"] and path[1:2] and path[1] in TASKS:  # which of them it was, says pydantic
        del path[1]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        valid = f"; valid here: {', '.join(names)}" if names else ""
        near = " or ".join(_near(kind, path, names))
        return f"{key}: no such setting{f'; did you mean {near}?' if near else valid}"
    if detail["type"] == "missing" and not path[-1].isdigit():
        return f"{key}: this setting has no default; add it or pass --set {key}=VALUE"
    return _told(detail, path)


def _told(detail: ErrorDetails, path: Iterable[str]) -> str:
    """Returns the key, the rule and the value found, as one line."""
    # A whole section as "the value found" would bury the rule that compares several of its settings.
    found = "" if isinstance(detail["input"], dict | BaseModel) else f" (found {_shown(detail['input'])})"
    return ": ".join(filter(None, [".".join(path), f"{rule_of(detail)}{found}"]))


def rule_of(detail: ErrorDetails) -> str:
    """What an error of pydantic's says, in our words."""
    rules = (rule for beginning, rule in _RULES.items() if detail["type"].startswith(beginning))
    return next(rules, "this cannot be its value").format(**detail.get("ctx", {}))


def _near(kind: type[Section], path: list[str], names: list[str]) -> list[str]:
    """Settings that somebody may have meant by an unknown one."""
    *above, last = path
    known = dict.fromkeys(keys(kind))
    same = [key for key in known if key.rpartition(".")[2] == last or key == _ELSEWHERE.get(last)]
    return same[:3] or [".".join([*above, name]) for name in difflib.get_close_matches(last, names, n=1, cutoff=0.5)]


def keys(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """All settings of a section, and of those in it, but for those of lists."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        if typing.get_origin(field.annotation) not in (tuple, dict):
            for section in _sections(field.annotation):
                yield from keys(section, f"{prefix}{name}.")


def _fields_at(section: type[Section], path: list[str]) -> list[str]:
    for name in path:
        if name in section.model_fields or name in TASKS:  # otherwise a place in a list
            inside = [TASKS[name]] if name in TASKS else _sections(section.model_fields[name].annotation)
            if not inside:
                return []
            section = inside[0]
    return list(section.model_fields)


def _shown(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
