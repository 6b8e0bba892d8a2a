"""A run's complete configuration, and the rules that compare settings of several sections."""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.cluster import ClusterConfig
from pipeline.config.data import AugmentConfig, DataConfig, ImageConfig, MixConfig
from pipeline.config.fields import Folder, text_matching
from pipeline.config.model import InitConfig, ModelConfig
from pipeline.config.section import Section
from pipeline.config.task import TASKS, AnyTaskConfig, ClassificationConfig, by_name
from pipeline.config.tracking import HandoffConfig, TrackingConfig
from pipeline.config.train import (
    CheckpointConfig,
    DebugConfig,
    EngineConfig,
    EvaluateConfig,
    GuardConfig,
    OptimConfig,
    ProfileConfig,
    ResumeConfig,
    TrainConfig,
)


class RunConfig(Section):
    """The run's name, folder and seed."""

    name: Annotated[
        str,
        text_matching(
            "[A-Za-z0-9][A-Za-z0-9._-]*", "a name has letters, digits, . _ and -, and begins with a letter or digit"
        ),
    ]
    """Name of the run: letters, digits, `.`, `_` and `-`."""
    root: Folder = "runs"
    """Folder of all runs; this run's own is root/name."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of all random draws: weights, order of samples, augmentation, dropout."""

    @property
    def folder(self) -> Path:
        """The run's folder, root/name."""
        return Path(self.root) / self.name


MAX_CHOSEN_LANES = 64
"""The most lanes that a run has whose configuration does not set them."""

_SHARED_BY_TASKS = {
    "augment": {"hflip", "color_jitter"},
    "mix": set(),
    "data": DataConfig.model_fields.keys() - {"copies"},
}
"""Settings of these sections that dense tasks use, too."""


class Config(Section):
    """All settings of a run."""

    run: RunConfig
    task: AnyTaskConfig = ClassificationConfig()
    model: ModelConfig
    image: ImageConfig = ImageConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    mix: MixConfig = MixConfig()
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    engine: EngineConfig = EngineConfig()
    resume: ResumeConfig = ResumeConfig()
    tracking: TrackingConfig = TrackingConfig()
    handoff: tuple[HandoffConfig, ...] = ()
    """Fine-tuning jobs that start when the run has finished."""
    init: InitConfig | None = None
    """The registered model that the run starts from. None: random weights."""
    cluster: ClusterConfig = ClusterConfig()
    debug: DebugConfig = DebugConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="before")
    @classmethod
    def _evaluate_whole_images_singly(cls, tree: Any) -> Any:
        """Sets evaluate.batch_size to 1 for whole images, unless the section `evaluate` is there."""
        if not isinstance(tree, dict) or "evaluate" in tree:
            return tree
        task = by_name(tree.get("task"))
        section = TASKS.get(str(task.get("name"))) if isinstance(task, dict) else None
        if section is None or not section.sees_whole_images:
            return tree
        # A section that is there may be a run's dumped one, whose batch size must not change.
        return {**tree, "evaluate": {"batch_size": 1}}

    @model_validator(mode="after")
    def _length_is_absolute(self) -> "Config":
        if self.train.length.unit == "%":
            raise ValueError("train.length is what percentages are of: give it in steps, epochs or images")
        return self

    @model_validator(mode="after")
    def _choose_lanes(self) -> "Config":
        """Replaces the default of data.lanes where it does not fit, by a function of the configuration alone."""
        batch = self.train.global_batch_size
        possible = self.possible_lanes()
        # Copies restrict the lanes where samples are mixed; elsewhere the default stays if it divides the batch.
        default_fits = self.data.lanes in possible or not (batch % self.data.lanes or self.mix.is_active)
        if "lanes" in self.data.model_fields_set or default_fits:
            return self
        if not possible:
            rule = f"more than data.copies {self.data.copies}, and even where mix pairs samples"
            raise ValueError(f"train.global_batch_size {batch} fits no data.lanes: it has to be {rule}")
        chosen = max(lanes for lanes in possible if lanes <= MAX_CHOSEN_LANES)
        return self.model_copy(update={"data": self.data.model_copy(update={"lanes": chosen})})

    @model_validator(mode="after")
    def _batches_fit_lanes(self) -> "Config":
        batch = self.train.global_batch_size
        lanes = self.data.lanes
        if batch % lanes:
            # The three lanes that are closest to the ones asked for.
            near = sorted(divisors(batch), key=lambda divisor: abs(divisor - lanes))[:3]
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of data.lanes {lanes}: "
                f"each lane gives an equal share of every batch; lanes that fit: {sorted(near)}"
            )
        return self

    @model_validator(mode="after")
    def _pairs_can_be_mixed(self) -> "Config":
        if not self.mix.is_active:
            return self
        batch = self.train.global_batch_size
        lanes = self.data.lanes
        per_lane = batch // lanes
        micro = self.train.micro_batch_size
        # Pairs stay inside a lane, so the same two images meet on every number of ranks.
        if per_lane % 2:
            raise ValueError(
                f"mix pairs samples inside a lane, but each of {lanes} lanes has {per_lane} samples of a batch "
                f"of {batch}: choose data.lanes so that global_batch_size / lanes is even"
            )
        # Two copies of one image would be mixed with each other.
        if self.data.copies > 1 and per_lane <= self.data.copies:
            raise ValueError(
                f"mix pairs samples inside a lane, but a lane's {per_lane} samples of a batch are "
                f"{self.data.copies} copies of one: lower data.lanes or data.copies"
            )
        if micro is not None and micro % 2:
            raise ValueError(f"train.micro_batch_size {micro} is odd, but mix pairs samples: choose an even number")
        return self

    @model_validator(mode="after")
    def _frozen_weights_are_trained(self) -> "Config":
        for field in ("frozen_stages", "frozen_statistics"):
            if getattr(self.model, field) and not self.init:
                raise ValueError(
                    f"model.{field} {getattr(self.model, field)} would freeze randomly initialised weights: "
                    f"set init.model to the registered model to start from, or remove model.{field}"
                )
        return self

    @model_validator(mode="after")
    def _fits_task(self) -> "Config":
        if self.task.is_dense:
            self._require_dense_settings()
        else:
            self._require_classifier_settings()
        return self

    def _require_classifier_settings(self) -> None:
        if self.model.image_size:
            raise ValueError(
                f"model.image_size {self.model.image_size}: a classifier has image.size; remove model.image_size"
            )
        if self.optim.backbone_lr != 1.0:
            raise ValueError(
                f"optim.backbone_lr {self.optim.backbone_lr}: a classifier is all backbone; set optim.layer_decay"
            )

    def _require_dense_settings(self) -> None:
        for section, shared in _SHARED_BY_TASKS.items():
            given = getattr(self, section)
            fields = type(given).model_fields
            for field in sorted(fields.keys() - shared):
                # A setting that is given its default does no harm: dumped configurations give all of them.
                if getattr(given, field) != fields[field].get_default(call_default_factory=True):
                    raise ValueError(
                        f"{section}.{field} has no effect with task {self.task.name}, only with classification: remove "
                        f"it; the task's own settings are {', '.join(type(self.task).model_fields)}"
                    )

    def possible_lanes(self) -> list[int]:
        """Returns the values of data.lanes, ascending, that mixing and repeated augmentation allow with this batch."""
        possible = []
        for lanes in divisors(self.train.global_batch_size):
            share = self.train.global_batch_size // lanes
            has_pairs = not self.mix.is_active or share % 2 == 0
            if has_pairs and (self.data.copies == 1 or share > self.data.copies):
                possible.append(lanes)
        return possible

    def describe_more_lanes(self, ranks: int) -> str:
        """Returns what to set so that a run can use as many ranks."""
        enough = [lanes for lanes in self.possible_lanes() if lanes >= ranks]
        return f"set data.lanes={enough[0]}" if enough else "raise train.global_batch_size and data.lanes"

    def identity(self) -> dict[str, Any]:
        """Returns what decides which samples make up which batch, and the shapes of the weights.

        A checkpoint records it; resuming with another value is refused unless resume.allow names the key.
        """
        # The keys are those in checkpoints, and stay when a setting is renamed.
        identity: dict[str, Any] = {
            "seed": self.run.seed,
            "global_batch_size": self.train.global_batch_size,
            "lanes": self.data.lanes,
            "shuffle_window": self.data.shuffle_window,
            "copies": self.data.copies,
            "mixture": [source.weight for source in self.data.train],
            "model": self.model.name,
            "image_size": self.image.size,
        }
        # Checkpoints of classification have neither: there were no other tasks at first.
        if self.task.name != "classification":
            identity["task"] = self.task.name
            identity["model_image_size"] = self.model.image_size
        return identity


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number in ascending order."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    large = [number // divisor for divisor in small]
    return sorted({*small, *large})
