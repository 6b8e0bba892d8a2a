"""Training: optimiser, lengths, engine, checkpoints, and what happens to bad steps."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.fields import BelowOne, Fraction, Length, LengthField, Positive
from pipeline.config.section import Section


class OptimConfig(Section):
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
    def _steps_have_milestones(self) -> "OptimConfig":
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError(
                f"schedule {self.schedule} with milestones {[str(length) for length in self.milestones]}: schedule "
                "steps needs at least one, and the others have none"
            )
        return self


class TrainConfig(Section):
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
    def _replay_is_exact(self) -> "TrainConfig":
        if self.replay_check_every and not self.deterministic:
            raise ValueError(
                "replay_check_every needs deterministic: true: without it a repeated step differs on healthy hardware"
            )
        return self


class CheckpointConfig(Section):
    every_minutes: Positive | None = None
    """Save by the clock too, beside train.save_every."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints to keep."""
    keep_best: int = Field(default=1, ge=0)
    """Best ones to keep, by the task's main metric, of those that were evaluated."""
    keep_every: LengthField | None = None
    """Keep those whose step is a multiple of this, too."""


class GuardConfig(Section):
    """What to do about steps that would harm the weights."""

    window: int = Field(default=128, ge=8)
    """Applied steps whose losses tell what is usual."""
    sigmas: Positive = 6.0
    """A loss this many standard deviations above the window's mean is left out."""
    rollback_after: int = Field(default=5, ge=1)
    """Steps left out in a row, after which the run goes back to a checkpoint from before them."""
    max_rollbacks: int = Field(default=3, ge=0)
    """One more than this many stops the run."""


class EvaluateConfig(Section):
    batch_size: int = Field(default=256, gt=0)
    """Samples of one forward pass. Part of what makes an evaluation repeatable to the last bit. Of whole images the
    default is 1: in a batch, all are padded to the largest."""


_MOST_WHOLE = 250_000_000  # parameters; weights, gradients and Adam's moments of as many take 4 GB


class EngineConfig(Section):
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
    def _compiles_whole_weights(self) -> "EngineConfig":
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile true with zero_stage 3, which gathers each weight just before its use, and so inside of what "
                "would be compiled: choose zero_stage 0, 1 or 2, or leave compile out"
            )
        return self


class ResumeConfig(Section):
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


class DebugConfig(Section):
    trace_samples: bool = False
    """Write trace/rank-R.jsonl: each step's samples with hashes of what the engine was given."""


class ProfileConfig(Section):
    """Where a step's time goes, on rank 0: profile/summary.md, its numbers, and a trace that Perfetto opens."""

    at: LengthField | None = None
    """Begin after this much training, with one step to warm up. None: do not."""
    steps: int = Field(default=3, gt=0, le=100)
    """To look at."""
