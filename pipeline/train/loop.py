"""The training loop. Pretraining and every fine-tuning task run this one."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config import Config, Length
from pipeline.errors import InputError
from pipeline.feed.loader import TrainFeed
from pipeline.train.checkpoint import Checkpoints, State
from pipeline.train.engine import Engine
from pipeline.train.meters import Meters
from pipeline.train.optim import lr_at
from pipeline.train.seams import Listener
from pipeline.train.trace import Trace


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A run's lengths, in steps. A period of 0 means: at the end alone."""

    total: int
    warmup: int
    log_every: int
    eval_every: int
    save_every: int

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> "Schedule":
        """Raises InputError for a run without a step and for a warm-up that outlasts it."""
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
        return cls(total, warmup, steps(train.log_every), steps(train.eval_every), steps(train.save_every))

    def due(self, period: int, step: int) -> bool:
        return step == self.total or (period > 0 and step % period == 0)


@dataclasses.dataclass(frozen=True)
class Summary:
    scores: dict[str, float]  # of the last evaluation
    images_per_second: float | None  # while training; None where no step was left to take
    checkpoint: Path  # of the last step


def train(
    config: Config,
    schedule: Schedule,
    state: State,
    feed: TrainFeed,
    engine: Engine,
    checkpoints: Checkpoints,
    evaluation: Callable[[], dict[str, float]] | None,
    listeners: Sequence[Listener],
    trace: Trace | None = None,
) -> Summary:
    """Train from state.step to the end, where the model is evaluated and saved. Collective.

    `listeners` is empty on all ranks but the first.
    """
    meters, scores = Meters(config.train.global_batch_size), {}
    while state.step < schedule.total:
        began = time.perf_counter()
        batch = feed.next()
        data_wait_s = time.perf_counter() - began
        lr = lr_at(
            state.step,
            peak=config.optim.lr,
            floor=config.optim.min_lr,
            start=config.optim.warmup_lr,
            warmup_steps=schedule.warmup,
            total_steps=schedule.total,
        )
        outcome = engine.step(batch, step=state.step, lr=lr)
        state.advance(outcome.applied)
        if trace:
            trace.write(state.step, batch)
        meters.add(outcome, data_wait_s)

        if schedule.due(schedule.log_every, state.step):
            reading = {"epoch": state.step / feed.order.steps_per_epoch, "lr": lr, **meters.read()}
            for listener in listeners:
                listener.on_step(state.step, reading)
        paused = time.perf_counter()
        if evaluation and schedule.due(schedule.eval_every, state.step):
            scores = evaluation()
            for listener in listeners:
                listener.on_evaluation(state.step, scores)
        if schedule.due(schedule.save_every, state.step):
            folder = checkpoints.save(state, engine)
            for listener in listeners:
                listener.on_checkpoint(state.step, folder)
        meters.pause(time.perf_counter() - paused)
    # Both of these have been done already, unless the run resumed from a checkpoint of its last step.
    if evaluation and not scores:
        scores = evaluation()
    return Summary(scores, meters.images_per_second(), checkpoints.save(state, engine))
