"""When things are due in a run: its lengths in optimiser steps, and the learning rate of each step."""

import dataclasses
import math
from collections.abc import Sequence

from pipeline.config import Config, Length, OptimConfig
from pipeline.errors import InputError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A run's lengths, in steps. A period of 0 means: at the end alone."""

    total: int
    warmup: int
    milestones: tuple[int, ...]
    log_every: int
    eval_every: int
    save_every: int
    keep_every: int
    replay_check_every: int
    profile_at: int | None = None
    """The number of steps after which profiling begins; None for a run without a profile."""

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> "Schedule":
        """Returns the schedule of a run.

        Raises InputError for a run without a step, and for a warm-up or a profile that outlasts it.
        """
        batch = config.train.global_batch_size
        total = config.train.length.steps(steps_per_epoch=steps_per_epoch, global_batch_size=batch)
        if total < 1:
            raise InputError(f"train.length {config.train.length} is less than one step of {batch} images")

        def steps(length: Length) -> int:
            return length.steps(steps_per_epoch=steps_per_epoch, global_batch_size=batch, total=total)

        # A period that is shorter than a step means every step.
        def period(length: Length | None) -> int:
            return 0 if length is None else max(1, steps(length))

        warmup = steps(config.optim.warmup)
        if warmup >= total:
            raise InputError(f"optim.warmup {config.optim.warmup} is {warmup} steps, but the run has {total}")
        profile_at = None
        if config.profile.at is not None:
            profile_at = steps(config.profile.at)
            _require_profile_ends(config, profile_at, total)
        return cls(
            total=total,
            warmup=warmup,
            milestones=tuple(period(milestone) for milestone in config.optim.milestones),
            log_every=period(config.train.log_every) or max(1, min(50, total // 10)),
            eval_every=period(config.train.eval_every),
            save_every=period(config.train.save_every),
            keep_every=period(config.checkpoint.keep_every),
            replay_check_every=period(config.train.replay_check_every),
            profile_at=profile_at,
        )

    def due(self, period: int, step: int) -> bool:
        """Whether something with this period is due after `step` steps."""
        if step == self.total:
            return True
        return period > 0 and step % period == 0

    def lr_at(self, step: int, config: OptimConfig) -> float:
        """Returns the run's learning rate at a step."""
        return lr_at(step, config, warmup_steps=self.warmup, total_steps=self.total, milestones=self.milestones)


def _require_profile_ends(config: Config, profile_at: int, total: int) -> None:
    profile = config.profile
    last = profile_at + 1 + profile.steps
    if last > total:
        raise InputError(
            f"profile.at {profile.at}: with one step to warm up and profile.steps {profile.steps} the profile ends at "
            f"step {last}, but the run has {total}: begin earlier"
        )


def lr_at(
    step: int, config: OptimConfig, *, warmup_steps: int, total_steps: int, milestones: Sequence[int] = ()
) -> float:
    """Returns the learning rate at a step: a linear warm-up from `warmup_lr` to `lr`, and then `optim.schedule`.

    "cosine" goes down to `min_lr` at the end along half a cosine (Loshchilov and Hutter, "SGDR", 2017), "poly" by a
    power of the remaining steps (Chen et al., "DeepLab", 2017), and "steps" multiplies by `gamma` at each milestone,
    which is a step. It is a pure function of the step, so there is no scheduler to save.
    """
    if step < warmup_steps:
        rise = config.lr - config.warmup_lr
        return config.warmup_lr + rise * step / warmup_steps
    if config.schedule == "steps":
        num_passed = sum(step >= milestone for milestone in milestones)
        return config.lr * config.gamma**num_passed
    num_steps = max(1, total_steps - warmup_steps)
    progress = (step - warmup_steps) / num_steps
    fall = config.lr - config.min_lr
    factor = (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "poly":
        factor = (1 - progress) ** config.power
    return config.min_lr + fall * factor
