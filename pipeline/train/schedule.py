"""When things are due in a run: its lengths, in optimiser steps."""

import dataclasses

from pipeline.config import Config, Length
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
    profile_at: int | None = None  # taken steps after which profiling begins

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> "Schedule":
        """Raises InputError for a run without a step, and for a warm-up or a profile that outlasts it."""
        batch = config.train.global_batch_size
        total = config.train.length.steps(steps_per_epoch=steps_per_epoch, global_batch_size=batch)
        if total < 1:
            raise InputError(f"train.length {config.train.length} is less than one step of {batch} images")

        def steps(length: Length | None) -> int:
            if length is None:
                return 0
            return max(1, length.steps(steps_per_epoch=steps_per_epoch, global_batch_size=batch, total=total))

        warmup = config.optim.warmup.steps(steps_per_epoch=steps_per_epoch, global_batch_size=batch, total=total)
        if warmup >= total:
            raise InputError(f"optim.warmup {config.optim.warmup} is {warmup} steps, but the run has {total}")
        train = config.train
        return cls(
            total=total,
            warmup=warmup,
            milestones=tuple(map(steps, config.optim.milestones)),
            log_every=steps(train.log_every),
            eval_every=steps(train.eval_every),
            save_every=steps(train.save_every),
            keep_every=steps(config.checkpoint.keep_every),
            replay_check_every=steps(train.replay_check_every),
            profile_at=_profile_at(config, steps_per_epoch, total),
        )

    def due(self, period: int, step: int) -> bool:
        return step == self.total or (period > 0 and step % period == 0)


def _profile_at(config: Config, steps_per_epoch: int, total: int) -> int | None:
    profile, batch = config.profile, config.train.global_batch_size
    if profile.at is None:
        return None
    at = profile.at.steps(steps_per_epoch=steps_per_epoch, global_batch_size=batch, total=total)
    if (last := at + 1 + profile.steps) > total:
        raise InputError(
            f"profile.at {profile.at}: with one step to warm up and profile.steps {profile.steps} the profile ends at "
            f"step {last}, but the run has {total}: begin earlier"
        )
    return at
