"""Training: optimiser, lengths, evaluation, engine, checkpoints, and the treatment of bad steps."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.fields import BelowOne, Fraction, Length, LengthField, Positive
from pipeline.config.section import Section

_SHARDED_FROM = 250_000_000
"""Trainable parameters. The weights, gradients and Adam's moments of as many take 4 GB in fp32."""


class OptimConfig(Section):
    """AdamW and the learning-rate schedule."""

    lr: float = Field(gt=0.0)
    """Peak learning rate. The paper's rule is 5e-4 for each 512 samples of the global batch."""
    min_lr: float = Field(default=1e-5, ge=0.0)
    """Final learning rate of the schedules cosine and poly."""
    warmup_lr: float = Field(default=1e-6, ge=0.0)
    """Learning rate of the first warm-up step."""
    warmup: LengthField = Length(0, "steps")
    """Length of the linear warm-up from warmup_lr to lr."""
    schedule: Literal["cosine", "poly", "steps"] = "cosine"
    """How the learning rate falls after the warm-up. cosine and poly: from lr to min_lr over t = 0 … 1, with the factor
    (1 + cos πt) / 2 or (1 - t) ** power. steps: by the factor gamma at each of milestones."""
    power: Positive = 0.9
    """Exponent of the schedule poly."""
    milestones: tuple[LengthField, ...] = ()
    """Lengths of training after which the schedule steps multiplies the learning rate by gamma."""
    gamma: Fraction = 0.1
    """Factor of the schedule steps."""
    backbone_lr: Positive = 1.0
    """Factor on the backbone's learning rate, relative to the head's."""
    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    """Layer-wise learning-rate decay: each layer of the backbone has the rate of the layer above it times this factor;
    the head has the full rate. None: one rate for the whole backbone."""
    weight_decay: float = Field(default=0.05, ge=0.0)
    """AdamW's weight decay. Biases, norms and the parameters that a model exempts have none."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW's term in the denominator for numerical stability."""
    clip_grad: float | None = Field(default=None, gt=0.0)
    """Maximum global gradient norm; larger gradients are scaled down to it. None: no clipping."""

    @property
    def has_layer_rates(self) -> bool:
        """Whether layers have learning rates of their own."""
        return self.layer_decay is not None or self.backbone_lr != 1.0

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> "OptimConfig":
        if (self.schedule == "steps") != bool(self.milestones):
            milestones = [str(length) for length in self.milestones]
            raise ValueError(
                f"schedule {self.schedule} with milestones {milestones}: schedule steps needs at least one, and the "
                "others have none"
            )
        return self


class TrainConfig(Section):
    """Lengths, batch sizes, and what a run does regularly. A length is in steps, epochs, images or % of the run."""

    length: LengthField
    """Length of the run, in steps, epochs or images."""
    # Omitted from dumps where it is not set, as data.val_fraction is.
    recipe_steps: int | None = Field(default=None, gt=0, exclude_if=lambda value: value is None)
    """Number of optimiser steps that the configuration's learning rate and augmentation were chosen for. A run of less
    than a tenth of it begins with a warning. None: no warning."""
    global_batch_size: int = Field(gt=0)
    """Number of samples in an optimiser step, over all ranks."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Maximum micro-batch size per rank; a rank that has more samples of a step accumulates gradients. None: all of a
    rank's samples in one micro-batch."""
    log_every: LengthField | None = None
    """Interval between log lines and metrics. None: 50 steps, or a tenth of a run of fewer than 500."""
    eval_every: LengthField | None = None
    """Interval between evaluations. None: only at the end of the run."""
    save_every: LengthField | None = None
    """Interval between the regular checkpoints, to which a rollback returns. None: only at the end of the run."""
    ema_decay: BelowOne | None = None
    """Decay of the exponential moving average of the weights, for each step. The averaged weights are evaluated and
    registered in place of the trained ones. None: no average."""
    deterministic: bool = False
    """Uses deterministic kernels and no hardware JPEG decoding: a repetition is equal bit for bit, but slower."""
    replay_check_every: LengthField | None = None
    """Interval between checks for silent data corruption, which compute one step's gradients twice and compare all
    ranks' parameters bit by bit. Needs train.deterministic. None: no checks."""
    hang_timeout_s: float = Field(default=600.0, gt=0.0, le=1500.0)
    """Seconds without progress after which every rank writes its stacks, the rank that is behind is reported, and the
    job ends. It must exceed the slowest single operation of a rank; the collectives' own time-out is 1,800 s."""
    preempt_deadline_s: Positive = 100.0
    """Seconds from a stop signal until the process ends, whether or not it has saved a checkpoint."""

    @model_validator(mode="after")
    def _replay_is_exact(self) -> "TrainConfig":
        if self.replay_check_every and not self.deterministic:
            raise ValueError(
                "replay_check_every needs deterministic: true: without it a repeated step differs on healthy hardware"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are saved besides train.save_every, and which of them are kept."""

    every_minutes: Positive | None = None
    """Interval in minutes between further checkpoints. None: train.save_every alone decides."""
    keep_last: int = Field(default=3, ge=1)
    """Number of newest checkpoints that are kept."""
    keep_best: int = Field(default=1, ge=0)
    """Number of best checkpoints that are kept, by the task's main metric, among those that were evaluated."""
    keep_every: LengthField | None = None
    """Checkpoints at multiples of this length are kept, too. None: no further ones."""


class GuardConfig(Section):
    """The treatment of steps that would harm the weights: they are skipped, and the run rolls back after several."""

    window: int = Field(default=128, ge=8)
    """Number of last applied steps whose losses and gradient norms new ones are compared with."""
    sigmas: Positive = 6.0
    """Standard deviations above the window's mean beyond which a step is skipped."""
    rollback_after: int = Field(default=5, ge=1)
    """Number of skipped steps in a row after which the run rolls back to a checkpoint from before them."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Maximum number of rollbacks; one more stops the run as diverged."""


class EvaluateConfig(Section):
    """How the validation data are evaluated."""

    batch_size: int = Field(default=256, gt=0)
    """Number of images in one forward pass of a rank. Scores are only reproducible bit for bit with the same value.
    The default of dense tasks is 1, because whole images in a batch are padded to the largest."""


class EngineConfig(Section):
    """DeepSpeed, precision and kernels."""

    renamed: ClassVar[dict[str, str]] = {"fast": "optimised_kernels"}

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage, that is, what is partitioned over the ranks: 1 the optimiser state, 2 also the gradients, 3 also the
    weights. None: 0, which copies and sends the least; 1 beyond 250 million trainable parameters, or where
    engine.deepspeed has a zero_optimization."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the forward and backward pass."""
    optimised_kernels: bool = True
    """Uses the optimised attention and patch embedding of a PVT. False: the reference kernels, which are PyTorch's
    attention and plain convolutions."""
    compile: bool = False
    """Compiles the backbone's blocks with torch.compile for training: minutes at the first start, faster steps.
    Evaluation is never compiled, so that scores are reproducible."""
    deepspeed: dict[str, Any] = {}
    """Further keys of the DeepSpeed configuration. They must not contradict the generated ones."""

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_switches(cls, value: Any) -> Any:
        """Returns the keys with booleans for on, off, yes and no. `device: none` stays: it is DeepSpeed's own word."""
        # Settings of ours know whether off means false or not set; of DeepSpeed's keys, nothing is known here.
        if isinstance(value, dict):
            return {name: cls._read_switches(inner) for name, inner in value.items()}
        return {"on": True, "yes": True, "off": False, "no": False}.get(str(value).lower(), value)

    def stage(self, num_parameters: int) -> int:
        """Returns the ZeRO stage for a network with this number of trainable parameters."""
        if self.zero_stage is not None:
            return self.zero_stage
        # Settings of zero_optimization, such as offloading, have no effect at stage 0.
        return int(num_parameters > _SHARDED_FROM or "zero_optimization" in self.deepspeed)

    @model_validator(mode="after")
    def _compiles_whole_weights(self) -> "EngineConfig":
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile true with zero_stage 3, which gathers each weight just before its use and so inside the "
                "compiled code: choose zero_stage 0, 1 or 2, or remove compile"
            )
        return self


class ResumeConfig(Section):
    """Where a run starts. A text alone stands for {source: TEXT}."""

    source: str = Field(default="auto", min_length=1)
    """auto: the run's own newest complete checkpoint, if any. never: a run folder that has checkpoints is refused, also
    when the same command is started again; a job of launch/submit.py resumes from its own. Otherwise the path of a
    checkpoint folder, from which a run starts that has no checkpoint of its own; one that has resumes from that."""
    allow: list[str] = []
    """Names of identity entries that may differ from the checkpoint's."""
    start_over: bool = False
    """Starts at step 0 where all checkpoints of the run are damaged or of an older format; they are moved aside.
    Without it such a run is refused."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class DebugConfig(Section):
    """Records for debugging."""

    trace_samples: bool = False
    """Writes trace/rank-R.jsonl: the samples of each step with hashes of the engine's inputs."""


class ProfileConfig(Section):
    """A profile of some steps on rank 0: profile/summary.md, its numbers, and a trace for Perfetto."""

    at: LengthField | None = None
    """Length of training after which profiling begins, with one step to warm up. None: no profile."""
    steps: int = Field(default=3, gt=0, le=100)
    """Number of steps to profile."""
