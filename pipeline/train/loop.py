"""The training loop. Pretraining and every fine-tuning task run this one."""

import contextlib
import dataclasses
import sys
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
from pipeline.train import sdc_check
from pipeline.train.checkpoint import Checkpoint, State
from pipeline.train.checkpoint_files import step_of
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine, Outcome
from pipeline.train.goodput import Category, Goodput
from pipeline.train.guard import Anomaly, Diverged, Guard
from pipeline.train.hang_watch import HangWatch, Stragglers
from pipeline.train.meters import Anomalies, Meters, Utilisation
from pipeline.train.optim import lr_at
from pipeline.train.profile import Profiler
from pipeline.train.protocols import Listener
from pipeline.train.saver import SaveError, Saver
from pipeline.train.schedule import Schedule
from pipeline.train.stop_signal import StopSignal
from pipeline.train.trace import Trace
from pipeline.world import World


@dataclasses.dataclass(frozen=True)
class Summary:
    scores: dict[str, float]  # of the last evaluation
    images_per_second: float | None  # while training; None where no step was left to take
    checkpoint: Path  # of the last step
    stopped: bool  # by a signal, before the end


class _Taken(NamedTuple):
    """A step that was taken."""

    step: int  # what State.step was before
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
    evaluation: Callable[[Callable[[], bool]], dict[str, float] | None] | None
    """Scores the network. Is given a function to call now and then: whether to give up, and return None."""
    utilisation: Utilisation | None = None  # None where it cannot be told
    listeners: Sequence[Listener] = ()  # empty on all ranks but the first
    on_rollback: Callable[[int, int], None] = lambda since, step: None
    """Called on rank 0 with the step gone back to and the present one: versions of the steps between are no good."""
    anomalies: Anomalies | None = None
    trace: Trace | None = None
    profiler: Profiler | None = None

    def __post_init__(self) -> None:
        self._meters = Meters(self.config.train.global_batch_size)
        self._last: _Taken | None = None  # the last step, until it is known what came of it
        self._stragglers = Stragglers()
        self._own_s = 0.0  # since the last reading: what this rank waited for data and worked before others mattered
        self._trouble: ExternalError | None = None  # this rank's feed has failed
        self._in_trouble = self._stopping = self._save_now = False  # agreed on by all ranks
        self._saved_at = time.monotonic()

    def run(self) -> Summary:
        """Train from state.step to the end, where the model is evaluated and saved, or until all ranks have agreed to
        stop.

        Raises ExternalError on all ranks where one cannot go on, after a save if the state is sound.
        """
        if self.state.step == 0 and self.schedule.save_every:
            self._save()  # something to roll back to, and a disk that fails does so now
        self._make_up()
        while self.state.step < self.schedule.total and not self._stopping:
            with self._profiled():
                batch = self._fetch()
                self._step(batch)
                self._meter(batch)
            self._evaluate_if_due()
            self._save_if_due()
        return self._finish()

    def _make_up(self) -> None:
        """Do what the attempt before may have been stopped from: evaluate at this step, save its checkpoint with the
        scores, report it. Where an undisturbed run saves nothing, the one that a signal asked for gets no scores."""
        newest, scored_step, step = self.saver.newest, self.state.scored_step, self.state.step
        self._evaluate_if_due()
        if newest is None or newest != self.saver.checkpoints.path(step):
            return
        if self.state.scored_step != scored_step and self.schedule.due(self.schedule.save_every, step):
            self.saver.newest = None
            self._save()
        else:
            self._tell_saved(newest)

    def _fetch(self) -> list[MicroBatch]:
        self.watch.at(self.state.step, "data")
        began = time.perf_counter()
        with self.goodput.spend("data_wait"), record_function("waiting for data"):
            try:
                batch = self.feed.next()
            except ExternalError as error:
                # The others are about to need this rank for their collectives, so it goes through the motions.
                self._trouble = error
                batch = self.feed.blank(self.state.step)
        self._data_wait_s = time.perf_counter() - began
        return batch

    def _step(self, batch: list[MicroBatch]) -> None:
        began = time.perf_counter()
        step = self.state.step
        if self.schedule.replay_check_every and step % self.schedule.replay_check_every == 0:
            self.watch.at(step, "replay check")
            with self.goodput.spend("checks"), record_function("replay check"):
                sdc_check.check_for_corruption(self.engine, batch[0], step, self.world)
            began = time.perf_counter()
        self.watch.at(step, "forward")
        self._regime = self.feed.image_size(step)
        self._lr = lr_at(
            step,
            self.config.optim,
            warmup_steps=self.schedule.warmup,
            total_steps=self.schedule.total,
            milestones=self.schedule.milestones,
        )
        outcome = self.engine.step(batch, step=step, lr=self._lr, exchange=self._exchange)
        if self._in_trouble:
            self._give_up("could not read its data", self._trouble)
        if self.guard.must_roll_back:  # for the step before: this one was left out and is taken again
            self._roll_back()
            began = time.perf_counter()
            outcome = self.engine.step(batch, step=step, lr=self._lr, exchange=self._exchange)
        self._last = _Taken(step, outcome, self._data_wait_s)
        self._own_s += self._data_wait_s + outcome.own_s
        self.state.step += 1
        self.goodput.step(self.state.step, time.perf_counter() - began)
        if outcome.is_known:
            self._settle()

    def _exchange(self, loss: Tensor) -> tuple[float, bool]:
        """The step's one reduction: the loss, and all that ranks have to tell each other. See Engine.step.

        It is also the one time that this process waits for the device: what came of the step before is read along.
        """
        self.watch.at(self.state.step, "exchange of losses")
        clock = self.config.checkpoint.every_minutes
        overdue = self.world.is_first and clock and time.monotonic() - self._saved_at >= 60 * clock
        words = [bool(self.stop.requested), bool(overdue), self._trouble is not None, *self.saver.progress()]
        with record_function("exchange of losses"):
            message = self.world.sum(torch.cat([loss.double().view(1), self.world.tensor(words)]))
            total, stop, save, trouble, *saving = self._read(message)
        self._stopping, self._save_now, self._in_trouble = stop > 0, save > 0, trouble > 0
        self._account()
        if whole := self.saver.settle(*saving):
            self._tell_saved(whole)
        mean = total / self.config.train.global_batch_size
        go_on = not (self._in_trouble or self.guard.must_roll_back)
        if go_on and (anomaly := self.guard.judge(self.state.step, mean, self._regime)):
            self._record(anomaly)
            go_on = False
        self.watch.at(self.state.step, "backward and update")
        return mean, go_on

    def _read(self, message: Tensor) -> list[float]:
        """The message's values; with them comes what is not known yet of the last step."""
        outcome = self._last.outcome if self._last else None
        if outcome is None or not isinstance(outcome.norm, Tensor):
            return message.tolist()
        *values, outcome.norm = torch.cat([message, outcome.norm.to(message).view(1)]).tolist()
        return values

    def _settle(self) -> None:
        """See to it that everything is known of the steps so far, and done."""
        self._account()
        if self.guard.must_roll_back:
            self._roll_back()

    def _account(self) -> None:
        """What came of the last step and what it means for the run's health."""
        if self._last is None:
            return
        (step, outcome, data_wait_s), self._last = self._last, None
        if self.ema and outcome.applied:
            with record_function("moving average"):
                self.ema.update()
        self.state.skipped += not outcome.applied
        self._meters.add(outcome, data_wait_s)
        anomaly = self.guard.settle(step, outcome.loss, outcome.grad_norm, outcome.applied, excused=outcome.overflow)
        if anomaly:
            self._record(anomaly)

    def _record(self, anomaly: Anomaly) -> None:
        if self.anomalies:
            try:
                keys = self.feed.keys(anomaly.step)
            except ExternalError as error:  # the feed will have more to say about it
                keys = [f"not known: {error}"]
            self.anomalies.write(anomaly, keys)

    def _roll_back(self) -> None:
        """Go back to the weights from before trouble began, and on from the same place in the data: what lies between
        is passed over. Raises Diverged where that has been done too often or there is nothing to go back to."""
        with self.goodput.spend("rollback"):
            self._go_back()

    def _go_back(self) -> None:
        self.watch.at(self.state.step, "rollback")
        self.saver.finish()
        safe, found = self.guard.safe_step, None
        if self.world.is_first:
            found = self.saver.checkpoints.find_regular(self.saver.retention, safe)
        folder = self.world.from_first(found)
        saved = Checkpoint(folder) if folder else None
        # Before anything else, so that no version is missed should the run end here.
        self.on_rollback(saved.state.step if saved else safe, self.state.step)
        if saved is None:
            raise Diverged(
                f"step {self.state.step}: nothing to go back to, no checkpoint on the grid of train.save_every is as "
                f"old as step {safe}: set train.save_every, or lower optim.lr"
            )
        assert saved.state.guard, "every save notes the guard"
        self.guard.roll_back(saved.state.guard)
        self.engine.load_weights(saved.weights())
        saved.restore(self.engine, self.ema)
        self.goodput.take_back(saved.state.step)
        if self.world.is_first:
            print(
                f"step {self.state.step}: back to the weights of {folder}; the data since then is passed over",
                file=sys.stderr,
                flush=True,
            )
            for step in self.saver.checkpoints.steps():
                if saved.state.step < step <= self.state.step:  # they hold what has just been given up
                    self.saver.checkpoints.remove(step)
        self.world.barrier()

    def _meter(self, batch: list[MicroBatch]) -> None:
        step = self.state.step
        if self.trace:
            self.trace.write(step, batch)
        if not self.schedule.due(self.schedule.log_every, step):
            return
        self._settle()
        reading = {"epoch": step / self.feed.order.steps_per_epoch, "lr": self._lr, **self._meters.read()}
        reading |= {"skipped": self.state.skipped, "ettr": self.goodput.report()["ettr"], **self._compare_ranks()}
        if self.utilisation:
            reading["mfu"] = self.utilisation.mfu(reading["images_per_second"], self._regime)
        self.goodput.save(step)
        for listener in self.listeners:
            listener.on_step(step, reading)

    def _compare_ranks(self) -> dict[str, float]:
        """The slowest rank by its own work and the most memory that any has needed, as part of a reading."""
        own = torch.tensor([self._own_s, self.world.peak_memory_gb()], dtype=torch.float64, device=self.world.device)
        self._own_s = 0.0
        times, peaks = self.world.gather(own).T.tolist()
        reading = {"peak_memory_gb": max(peaks)}
        if self.world.size == 1:
            return reading
        for rank, speed in self._stragglers.compare(times):
            if self.world.is_first:
                print(f"rank {rank} is slow: {speed:.2f} of the median rank's speed", file=sys.stderr, flush=True)
        slowest = max(range(len(times)), key=lambda rank: times[rank])
        return reading | {
            "slowest_rank": slowest,
            "slowest_speed": sorted(times)[(len(times) - 1) // 2] / times[slowest],
        }

    def _evaluate_if_due(self) -> None:
        state = self.state
        due = state.step > 0 and self.schedule.due(self.schedule.eval_every, state.step)
        if self.evaluation is None or not due or state.scored_step == state.step or self._stopping:
            return
        self._settle()
        with self._pause("evaluation"):
            try:
                scores = self.evaluation(self._still_evaluating)
            except ExternalError as error:
                self._give_up("could not read its data", error)
        if scores is None:
            self._stopping = True  # the evaluation is made up for when the run goes on
            return
        state.scores, state.scored_step = scores, state.step
        for listener in self.listeners:
            listener.on_evaluation(state.step, scores)

    def _still_evaluating(self) -> bool:
        self.watch.at(self.state.step, "evaluation")
        return self.stop.requested is not None

    def _save_if_due(self) -> None:
        due = self.schedule.due(self.schedule.save_every, self.state.step)
        if due or self._stopping or self._save_now:
            self._save()

    def _save(self) -> None:
        self._settle()
        self.watch.at(self.state.step, "checkpoint")
        with self._pause("checkpoint_stall"):
            self.state.guard = self.guard.state()
            if whole := self.saver.finish():
                self._tell_saved(whole)
            self.saver.save(self.state, self.guard.safe_step)
        self._saved_at, self._save_now = time.monotonic(), False

    def _tell_saved(self, folder: Path) -> None:
        self.goodput.save(self.state.step)
        for listener in self.listeners:
            listener.on_checkpoint(step_of(folder), folder)

    @contextlib.contextmanager
    def _profiled(self) -> Iterator[None]:
        """A training step, for the profile. What starting and writing that takes is no part of training."""
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
        """Time that is no training step."""
        began = time.perf_counter()
        with self.goodput.spend(category):
            yield
        self._meters.pause(time.perf_counter() - began)

    def _give_up(self, what: str, error: ExternalError | None) -> NoReturn:
        """Save, then raise what has gone wrong on this rank, or that something has on another."""
        if error:
            print(f"rank {self.world.rank} {what}; saving before the end", file=sys.stderr, flush=True)
        self._save()
        self._wait_for_save()
        raise error or ExternalError(f"another rank {what}: it says more above")

    def _wait_for_save(self) -> None:
        with self._pause("checkpoint_stall"):
            if whole := self.saver.finish():
                self._tell_saved(whole)
        if self.saver.newest != self.saver.checkpoints.path(self.state.step):
            raise SaveError(f"step {self.state.step} could not be saved: the newest checkpoint is {self.saver.newest}")

    def _finish(self) -> Summary:
        self._save()
        self._wait_for_save()
        self.goodput.save(self.state.step)
        stopped = self._stopping
        return Summary(
            self.state.scores or {},
            self._meters.images_per_second(),
            self.saver.checkpoints.path(self.state.step),
            stopped,
        )
