"""The training loop. Pretraining and every fine-tuning task run this one.

fetch ──▶ forward ──▶ agree ──▶ account for the step before ──▶ update ──▶ log, evaluate, save if due
          all but     one reduction, the only wait for the       the last backward pass,
          one         device: loss, votes, the last norm         or nothing moves: skipped
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.profiler import record_function

from pipeline.config import Config
from pipeline.errors import ExternalError
from pipeline.feed.loader import MicroBatch, TrainFeed
from pipeline.protocols import Listener
from pipeline.train import sdc_check
from pipeline.train.checkpoint import State
from pipeline.train.checkpoint_files import step_of
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine
from pipeline.train.goodput import Category, Goodput
from pipeline.train.guard import Anomaly, Guard
from pipeline.train.hang_watch import HangWatch, Stragglers
from pipeline.train.meters import Anomalies, Meters, Utilisation
from pipeline.train.outcome import Outcome
from pipeline.train.profile import Profiler
from pipeline.train.rollback import roll_back
from pipeline.train.saver import SaveError, Saver
from pipeline.train.schedule import Schedule
from pipeline.train.stop_signal import StopSignal
from pipeline.train.trace import Trace
from pipeline.world import World

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run, or this job's part of it, has ended."""

    scores: dict[str, float]
    """The scores of the last evaluation."""
    images_per_second: float | None
    """The throughput while training; None where no step was left to take."""
    checkpoint: Path
    """The checkpoint of the last step."""
    stopped: bool
    """Whether a signal has stopped the run before its end."""


Evaluation = Callable[[Callable[[], bool]], dict[str, float] | None]
"""Scores the network. It is given a function to call between batches: whether to give up, and return None."""


class Fetched(NamedTuple):
    """A step's micro-batches on this rank."""

    batch: list[MicroBatch]
    error: ExternalError | None
    """Why the batch could not be read; `batch` is a blank one then."""
    wait_s: float


class Agreed(NamedTuple):
    """What all ranks know alike once they have exchanged a step's losses."""

    loss: float
    """The mean over the global batch."""
    stop: bool
    """A rank was asked to stop."""
    save: bool
    """A checkpoint is due by the clock."""
    trouble: bool
    """A rank could not read its data."""
    save_progress: list[float]
    """The sums of Saver.progress."""
    previous_norm: float | None
    """The gradient norm of the step before, where that was not known yet."""


class Taken(NamedTuple):
    """A step that was taken or skipped."""

    step: int
    """What State.step was before it."""
    lr: float
    image_size: int
    outcome: Outcome
    data_wait_s: float


@dataclasses.dataclass
class Trainer:
    """One run, joined from its parts. Everything here is collective and goes the same way on all ranks."""

    config: Config
    world: World
    schedule: Schedule
    state: State
    feed: TrainFeed
    engine: Engine
    ema: Ema | None
    saver: Saver
    guard: Guard
    watch: HangWatch
    goodput: Goodput
    stop: StopSignal
    evaluation: Evaluation | None
    utilisation: Utilisation | None = None
    """What MFU is computed from; None where it is not known."""
    listeners: Sequence[Listener] = ()
    """Empty on all ranks but the first."""
    on_rollback: Callable[[int, int], None] = lambda since, step: None
    """Called on rank 0 with the step gone back to and the present one: the versions of the steps between are void."""
    anomalies: Anomalies | None = None
    trace: Trace | None = None
    profiler: Profiler | None = None

    def __post_init__(self) -> None:
        self._meters = Meters(self.config.train.global_batch_size)
        self._stragglers = Stragglers()
        self._saved_at = time.monotonic()

    def run(self) -> Summary:
        """Trains from state.step to the end, where the model is evaluated and saved, or until all ranks have agreed to
        stop.

        Raises ExternalError on all ranks where one cannot go on, after a save if the state is sound.
        """
        state, schedule = self.state, self.schedule
        if state.step == 0 and schedule.save_every:
            # So there is something to roll back to, and a disk that cannot be written is found out now.
            self._save()
        stopping = not self._complete_last_step()
        # The step whose gradient norm is still on the device.
        previous: Taken | None = None
        while state.step < schedule.total and not stopping:
            with self._profiled():
                fetched = self._fetch()
                self._check_hardware_if_due(fetched.batch)
                taken, agreed = self._step(fetched, previous)
                previous = taken
                if self.trace:
                    self.trace.write(state.step, fetched.batch)
                # The host learns what came of a step along with the next one's loss, unless it has to know now.
                logs = schedule.due(schedule.log_every, state.step)
                saves = schedule.due(schedule.save_every, state.step) or agreed.save or agreed.stop
                if taken.outcome.is_known or logs or saves or self._evaluation_is_due():
                    self._account(taken)
                    previous = None
                    if self.guard.must_roll_back:
                        self._roll_back()
                if logs:
                    self._log(taken)
            stopping = agreed.stop or not self._evaluate_if_due()
            self._save_if_due(agreed.save or stopping)
        return self._finish(stopping)

    def _complete_last_step(self) -> bool:
        """Does what the attempt before may have been stopped from: evaluates at this step, saves its checkpoint with
        the scores, reports it. Returns whether to go on.

        Where an undisturbed run saves nothing, the checkpoint that a signal asked for gets no scores.
        """
        step = self.state.step
        newest = self.saver.newest
        scored_step = self.state.scored_step
        goes_on = self._evaluate_if_due()
        if newest is None or newest != self.saver.checkpoints.path(step):
            return goes_on
        has_new_scores = self.state.scored_step != scored_step
        if has_new_scores and self.schedule.due(self.schedule.save_every, step):
            # Else the saver would not save this step again.
            self.saver.newest = None
            self._save()
        else:
            self._report_checkpoint(newest)
        return goes_on

    def _fetch(self) -> Fetched:
        self.watch.at(self.state.step, "data")
        began = time.perf_counter()
        error = None
        with self.goodput.spend("data_wait"), record_function("waiting for data"):
            try:
                batch = self.feed.next()
            except ExternalError as failure:
                # The others are about to need this rank for their collectives, so it takes part with a dummy step.
                error = failure
                batch = self.feed.blank(self.state.step)
        return Fetched(batch, error, time.perf_counter() - began)

    def _check_hardware_if_due(self, batch: list[MicroBatch]) -> None:
        step, period = self.state.step, self.schedule.replay_check_every
        if period and step % period == 0:
            self.watch.at(step, "replay check")
            with self.goodput.spend("checks"), record_function("replay check"):
                sdc_check.check_for_corruption(self.engine, batch[0], step, self.world)

    def _step(self, fetched: Fetched, previous: Taken | None) -> tuple[Taken, Agreed]:
        """Takes or skips one optimiser step, and accounts for the previous one if that has not been done yet."""
        step = self.state.step
        lr = self.schedule.lr_at(step, self.config.optim)
        image_size = self.feed.image_size(step)
        # Done once, or a second time after a rollback.
        while True:
            began = time.perf_counter()
            self.watch.at(step, "forward")
            pending = self.engine.forward(fetched.batch, step=step)
            # Before the last backward pass, during which ZeRO reduces gradients: a bad step must not move the weights.
            agreed = self._agree(pending.loss_sum, fetched.error, previous)
            # Before this step moves the weights, of which the average takes those that the previous step has left.
            if previous:
                self._account(previous, agreed.previous_norm)
                previous = None
            self._follow_save(agreed.save_progress)
            if not (agreed.trouble or self.guard.must_roll_back):
                break
            self.watch.at(step, "backward and update")
            self.engine.discard(pending)
            if agreed.trouble:
                self._give_up("could not read its data", fetched.error)
            # The previous step was one too many: this one is taken again, with the weights gone back to.
            self._roll_back()
        anomaly = self.guard.judge(step, agreed.loss, image_size)
        if anomaly:
            self._record(anomaly)
        self.watch.at(step, "backward and update")
        skip = anomaly is not None
        outcome = self.engine.update(pending, lr=lr, loss=agreed.loss, skip=skip)
        # Without backward passes and the update, in which every rank waits for the slowest one.
        self._stragglers.add(fetched.wait_s + outcome.own_s)
        self.state.step += 1
        self.goodput.step(self.state.step, time.perf_counter() - began)
        return Taken(step, lr, image_size, outcome, fetched.wait_s), agreed

    def _agree(self, loss_sum: Tensor, error: ExternalError | None, previous: Taken | None) -> Agreed:
        """Sums losses and votes over all ranks, in the step's one reduction.

        It is also the one time that this process waits for the device: the previous step's norm is read along.
        """
        self.watch.at(self.state.step, "exchange of losses")
        stops = self.stop.requested is not None
        saves = self._is_save_overdue()
        votes = [stops, saves, error is not None, *self.saver.progress()]
        with record_function("exchange of losses"):
            values = self.world.tensor(votes)
            message = torch.cat([loss_sum.double().view(1), values])
            message = self.world.sum(message)
            # All ranks have the same norm, so it is appended after the reduction.
            norm = previous.outcome.norm if previous else None
            if isinstance(norm, Tensor):
                message = torch.cat([message, norm.to(message).view(1)])
            total, stop, save, trouble, written, failed, committed, *norms = message.tolist()
        return Agreed(
            loss=total / self.config.train.global_batch_size,
            stop=stop > 0,
            save=save > 0,
            trouble=trouble > 0,
            save_progress=[written, failed, committed],
            previous_norm=norms[0] if norms else None,
        )

    def _is_save_overdue(self) -> bool:
        """Whether rank 0's clock says that a checkpoint is due."""
        minutes = self.config.checkpoint.every_minutes
        if not minutes or not self.world.is_first:
            return False
        return time.monotonic() - self._saved_at >= 60 * minutes

    def _account(self, taken: Taken, norm: float | None = None) -> None:
        """Counts what came of a step in the average, the meters and the guard.

        `norm` is its gradient norm, where that has been read from the device; else asking for it waits.
        """
        outcome = taken.outcome
        if norm is not None:
            outcome.norm = norm
        if self.ema and outcome.applied:
            with record_function("moving average"):
                self.ema.update()
        if not outcome.applied:
            self.state.skipped += 1
        self._meters.add(outcome, taken.data_wait_s)
        anomaly = self.guard.account(
            taken.step, outcome.loss, outcome.grad_norm, outcome.applied, excused=outcome.overflow
        )
        if anomaly:
            self._record(anomaly)

    def _record(self, anomaly: Anomaly) -> None:
        if self.anomalies is None:
            return
        try:
            keys = self.feed.keys(anomaly.step)
        except ExternalError as error:
            # The run goes on: fetching the next batch will raise it, where that cannot be read either.
            keys = [f"not known: {error}"]
        self.anomalies.write(anomaly, keys)

    def _roll_back(self) -> None:
        step = self.state.step
        with self.goodput.spend("rollback"):
            self.watch.at(step, "rollback")
            saved_step = roll_back(
                step,
                world=self.world,
                guard=self.guard,
                saver=self.saver,
                engine=self.engine,
                ema=self.ema,
                on_rollback=self.on_rollback,
            )
            self.goodput.take_back(saved_step)

    def _log(self, taken: Taken) -> None:
        """Gives the listeners the numbers of the steps since the last reading."""
        step = self.state.step
        reading = {"epoch": step / self.feed.order.steps_per_epoch, "lr": taken.lr}
        reading |= self._meters.read()
        reading["skipped"] = self.state.skipped
        reading["ettr"] = self.goodput.report()["ettr"]
        reading |= self._stragglers.read(self.world)
        if self.utilisation:
            reading["mfu"] = self.utilisation.mfu(reading["images_per_second"], taken.image_size)
        self.goodput.save(step)
        for listener in self.listeners:
            listener.on_step(step, reading)

    def _evaluation_is_due(self) -> bool:
        step = self.state.step
        if self.evaluation is None or step == 0 or self.state.scored_step == step:
            return False
        return self.schedule.due(self.schedule.eval_every, step)

    def _evaluate_if_due(self) -> bool:
        """Returns False where a rank was asked to stop meanwhile: the run evaluates when it goes on."""
        if self.evaluation is None or not self._evaluation_is_due():
            return True
        with self._pause("evaluation"):
            try:
                scores = self.evaluation(self._still_evaluating)
            except ExternalError as error:
                self._give_up("could not read its data", error)
        if scores is None:
            return False
        self.state.scores = scores
        self.state.scored_step = self.state.step
        for listener in self.listeners:
            listener.on_evaluation(self.state.step, scores)
        return True

    def _still_evaluating(self) -> bool:
        self.watch.at(self.state.step, "evaluation")
        return self.stop.requested is not None

    def _save_if_due(self, is_wanted: bool) -> None:
        if is_wanted or self.schedule.due(self.schedule.save_every, self.state.step):
            self._save()

    def _save(self) -> None:
        """Begins to save. All steps so far have been accounted for."""
        self.watch.at(self.state.step, "checkpoint")
        with self._pause("checkpoint_stall"):
            # With the guard as it is after the last step, so that a resumed run decides alike.
            self.state.guard = self.guard.state()
            saved = self.saver.finish()
            if saved:
                self._report_checkpoint(saved)
            self.saver.save(self.state, self.guard.safe_step)
        self._saved_at = time.monotonic()

    def _follow_save(self, progress: list[float]) -> None:
        """Takes the save under way a stage further, if all ranks have finished theirs."""
        saved = self.saver.advance(*progress)
        if saved:
            self._report_checkpoint(saved)

    def _report_checkpoint(self, folder: Path) -> None:
        self.goodput.save(self.state.step)
        for listener in self.listeners:
            listener.on_checkpoint(step_of(folder), folder)

    @contextlib.contextmanager
    def _profiled(self) -> Iterator[None]:
        """Profiles the step inside. What it takes to start and write the profile is not counted as training."""
        if self.profiler is None:
            yield
            return
        with self._pause("checks"):
            self.profiler.begin(self.state.step)
        yield
        with self._pause("checks"):
            self.profiler.end()

    @contextlib.contextmanager
    def _pause(self, category: Category) -> Iterator[None]:
        """Books the time inside as something other than training steps."""
        began = time.perf_counter()
        with self.goodput.spend(category):
            yield
        self._meters.pause(time.perf_counter() - began)

    def _give_up(self, what: str, error: ExternalError | None) -> NoReturn:
        """Saves, then raises what has gone wrong on this rank, or that something has on another."""
        if error:
            log.warning(f"this rank {what}; saving before the end")
        # The state is sound: the step that cannot be taken was discarded, so the run loses nothing.
        if self.guard.must_roll_back:
            self._roll_back()
        self._save()
        self._wait_for_save()
        raise error or ExternalError(f"another rank {what}: see that rank's log")

    def _wait_for_save(self) -> None:
        with self._pause("checkpoint_stall"):
            saved = self.saver.finish()
            if saved:
                self._report_checkpoint(saved)
        newest, step = self.saver.newest, self.state.step
        if newest != self.saver.checkpoints.path(step):
            raise SaveError(f"step {step} could not be saved: the newest checkpoint is {newest}")

    def _finish(self, stopped: bool) -> Summary:
        self._save()
        self._wait_for_save()
        self.goodput.save(self.state.step)
        return Summary(
            scores=self.state.scores or {},
            images_per_second=self._meters.images_per_second(),
            checkpoint=self.saver.checkpoints.path(self.state.step),
            stopped=stopped,
        )
