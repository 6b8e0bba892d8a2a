"""A run's whole configuration, and the rules that compare settings of several sections."""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.cluster import ClusterConfig
from pipeline.config.data import AugmentConfig, DataConfig, ImageConfig, MixConfig
from pipeline.config.fields import Folder, text_matching
from pipeline.config.model import InitConfig, ModelConfig
from pipeline.config.section import Section
from pipeline.config.task import ClassificationConfig, TaskConfig, by_name
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
    name: Annotated[
        str,
        text_matching(
            "[A-Za-z0-9][A-Za-z0-9._-]*", "a name has letters, digits, . _ and -, and begins with a letter or digit"
        ),
    ]
    root: Folder = "runs"
    """Folder of all runs; this one lives in root/name."""
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.name


_SHARED_BY_TASKS = {
    "augment": {"hflip", "color_jitter"},
    "mix": set(),
    "data": DataConfig.model_fields.keys() - {"copies"},
}
"""Settings of these sections that mean something to other tasks than classification, too."""


class Config(Section):
    run: RunConfig
    task: TaskConfig = ClassificationConfig()
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
    init: InitConfig | None = None
    cluster: ClusterConfig = ClusterConfig()
    debug: DebugConfig = DebugConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="before")
    @classmethod
    def _whole_images_one_by_one(cls, tree: Any) -> Any:
        task = by_name(tree.get("task")) if isinstance(tree, dict) else None
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
        if isinstance(self.task, ClassificationConfig):
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
        is_labelled = isinstance(self.task, ClassificationConfig)
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


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
