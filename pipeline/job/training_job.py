"""A training job from its configuration to its registered model: builds the components and connects them."""

import contextlib
import functools
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline import files, network
from pipeline.cluster import slurm
from pipeline.config import Config
from pipeline.errors import REQUEUE, ExternalError, InputError
from pipeline.feed.loader import EvalFeed, TrainFeed
from pipeline.feed.quarantine import Quarantine
from pipeline.flops import DTYPES, matrix_flop_s
from pipeline.job import handoff, start_checks
from pipeline.job.describe_run import describe_run
from pipeline.job.handoff import Claim
from pipeline.job.initial_weights import build_initial_task, load_initial_weights
from pipeline.job.publish import Publisher, read_parent
from pipeline.lease import Lease, hold
from pipeline.protocols import Task
from pipeline.redact import redact
from pipeline.run_folder import CHECKPOINTS, GOODPUT, METRICS, RECORD, finished_result
from pipeline.shards.index import ShardSet
from pipeline.shards.open_data import open_training, open_validation
from pipeline.tasks.class_weights import weigh_classes
from pipeline.track.sync.record import Record
from pipeline.track.sync.system_load import SystemLoad
from pipeline.train.checkpoint import Checkpoint, Checkpoints, Retention, State
from pipeline.train.ema import Ema
from pipeline.train.engine import Engine, make_deterministic
from pipeline.train.evaluate import evaluate
from pipeline.train.goodput import Goodput
from pipeline.train.guard import Guard
from pipeline.train.hang_watch import HangWatch
from pipeline.train.loop import Summary, Trainer
from pipeline.train.meters import Anomalies, MetricsFile, Progress, Utilisation
from pipeline.train.profile import Profiler
from pipeline.train.saver import Saver
from pipeline.train.schedule import Schedule
from pipeline.train.stop_signal import StopSignal
from pipeline.train.trace import Trace
from pipeline.world import World

log = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"


def run_job(config: Config, world: World, claim: Claim | None = None) -> dict[str, Any] | None:
    """Trains, evaluates and registers. Returns the result on rank 0. A finished job is not run again, nor is one that
    was handed off and is running already.

    The result of a job that a signal has stopped contains "requeue". Raises InputError for every mistake that can be
    known before the first step.
    """
    folder = config.run.folder
    with contextlib.ExitStack() as resources:
        # Signals first: one that arrives during the start must stop the job in an orderly way, too.
        stop = resources.enter_context(StopSignal(config.train.preempt_deadline_s, REQUEUE))

        # Checks, from the cheap ones to those that need the network. Rank 0 goes first, so that a mistake is reported
        # once and not by every rank.
        training, validation = world.first_then_all(lambda: _open_checked_data(config, world))
        if world.from_first(training.digest) != training.digest:
            raise InputError("data.train: its files changed while the ranks opened them: start the run again")
        if config.train.deterministic:
            make_deterministic()
        task = world.first_then_all(lambda: build_initial_task(config, training.classes))
        weigh_classes(config, training, task, world)
        # A run that has been started before continues from its checkpoints and needs no initial weights.
        was_started = world.from_first(any((folder / CHECKPOINTS).glob("step-*")))
        parent = None if was_started else load_initial_weights(config, world, task, training.classes)

        # The lease: nothing is written before this, and there is little left that can be refused after it.
        lease = world.first_then_all(lambda: resources.enter_context(_claim_folder(folder, world, claim)))
        if world.from_first(lease is None):
            return {"run": str(folder), "at_work": True} if world.is_first else None

        # The hang watch covers everything from here to the last step: a rank may wait for a lost one in any collective.
        attempt = world.from_first(uuid.uuid4().hex)
        watched = resources.enter_context(contextlib.ExitStack())
        watch = watched.enter_context(HangWatch(folder / "watch", world, config.train.hang_timeout_s, attempt))

        # The newest whole checkpoint, which must belong to the same training: its step decides where the feed begins.
        identity = {**config.identity(), "num_classes": len(training.classes), "data": training.digest}
        checkpoints = Checkpoints(folder / CHECKPOINTS, world, identity)
        checkpoint = _find_checkpoint(checkpoints, config, world)
        state = checkpoint.state if checkpoint else State()
        feed = resources.enter_context(contextlib.closing(_open_feed(config, world, training, task, state)))
        resources.enter_context(_explain_out_of_memory(feed.rank_slice.micro_batch_size, world))
        schedule = Schedule.of(config, feed.order.steps_per_epoch)

        # Only the schedule says whether that step was the last one.
        if finished := world.from_first(_finished_result(folder, schedule, checkpoint) if world.is_first else None):
            return finished if world.is_first else None

        # The weights have to be in the network before the engine, which copies and partitions them, is built.
        if checkpoint:
            task.model.load_state_dict(checkpoint.weights())
            parent = read_parent(folder)
        elif was_started:
            # No checkpoint was completed, or they have been set aside: the run begins again.
            parent = load_initial_weights(config, world, task, training.classes)
        engine = Engine(config, task, world, feed.blank)
        ema = None if config.train.ema_decay is None else Ema(engine, config.train.ema_decay)
        guard = Guard(config.guard, task.chance_loss)

        # The rest of a checkpoint needs them: moments, the loss scale, the moving average, the guard's window.
        if checkpoint:
            checkpoint.restore(engine, ema)
            assert state.guard, "every save notes the guard"
            guard.load(state.guard)
        saver = Saver(checkpoints, _retention(config, schedule, task), engine, ema, world, lease)
        saver.newest = checkpoint.folder if checkpoint else None
        resources.callback(saver.close)

        # Tracking comes last, when the job is known to be able to train. Operations are counted before it, because
        # its thread imports MLflow, which would compete for the CPU.
        if config.tracking.system_metrics and world.local_rank == 0:
            resources.enter_context(SystemLoad(folder, node=world.rank // world.local_size))
        utilisation = _count_utilisation(config, world, len(training.classes))
        publisher = resources.enter_context(_publish(config, world, training, validation, task, claim, parent))
        if publisher:
            state.run_id = publisher.record.uuid
            files.write(folder / "deepspeed.json", json.dumps(redact(engine.deepspeed_config), indent=1).encode())
            _log_start(config, world, feed, schedule, state, engine.stage)
            description = describe_run(config, training, validation, feed.order, world.size, engine.num_parameters)
            for subject, text in description.items():
                log.info(f"  {subject:9}{text}")

        # Training. Goodput is created last: it books the time since the process began as start-up.
        trainer = Trainer(
            config=config,
            world=world,
            schedule=schedule,
            state=state,
            feed=feed,
            engine=engine,
            ema=ema,
            saver=saver,
            guard=guard,
            watch=watch,
            goodput=_open_goodput(folder, world, state),
            stop=stop,
            evaluation=_make_evaluation(config, world, validation, task, engine, ema),
            utilisation=utilisation,
        )
        if publisher:
            trainer.listeners = [MetricsFile(folder / METRICS, state.step), Progress(schedule.total), publisher]
            trainer.on_rollback = publisher.outbox.give_up
            trainer.anomalies = Anomalies(folder / "anomalies.jsonl", state.step)
            if schedule.profile_at is not None:
                trainer.profiler = Profiler(folder / "profile", config, world, schedule.profile_at)
                resources.callback(trainer.profiler.close)
        if config.debug.trace_samples:
            trainer.trace = Trace(folder / "trace", world.rank, state.step, training)
        summary = trainer.run()

        # The end. Registering a model takes rank 0 an unknown time, in which the others wait: that is no hang.
        watched.close()
        return _conclude(publisher, trainer, summary) if publisher else None


def _conclude(publisher: Publisher, trainer: Trainer, summary: Summary) -> dict[str, Any]:
    """Registers the last model of a finished run; logs and writes the result of it or of one that was stopped."""
    log.info(trainer.goodput.summary())
    if summary.stopped:
        ending = {"requeue": True, "checkpoint": str(summary.checkpoint)}
    else:
        ending = publisher.finish(trainer.state.step, summary.checkpoint)
    result = {
        "run": str(publisher.folder),
        "run_id": publisher.tracker.run_id,
        **ending,
        "steps": trainer.state.step,
        "images_per_second": summary.images_per_second,
        "ettr": trainer.goodput.report()["ettr"],
    }
    publisher.end(result)
    return result


def _open_feed(config: Config, world: World, training: ShardSet, task: Task, state: State) -> TrainFeed:
    return TrainFeed(
        config,
        training,
        world,
        first_step=state.step,
        drop_path_rates=task.drop_path_rates,
        quarantine=Quarantine(training, config.run.folder / QUARANTINE, config.data.max_bad_fraction),
    )


@contextlib.contextmanager
def _explain_out_of_memory(micro_batch_size: int, world: World) -> Iterator[None]:
    """Raises ExternalError, with a setting that needs less, where the run does not fit the memory of a GPU."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # An even number, because mixup and CutMix pair the samples of a micro-batch.
        half = micro_batch_size // 4 * 2
        less = f"train.micro_batch_size={half}" if half else "model.grad_checkpointing=true"
        raise ExternalError(
            f"rank {world.rank} on {os.uname().nodename}: out of GPU memory, with micro-batches of {micro_batch_size}: "
            f"--set {less} takes about half of it; launch/doctor.py --tune finds the largest that fit"
        ) from error


def _retention(config: Config, schedule: Schedule, task: Task) -> Retention:
    return Retention(
        last=config.checkpoint.keep_last,
        best=config.checkpoint.keep_best,
        every=schedule.keep_every,
        grid=schedule.save_every,
        metric=task.main_metric,
    )


def _open_goodput(folder: Path, world: World, state: State) -> Goodput:
    return Goodput(
        folder / GOODPUT if world.is_first else None,
        resumed_step=state.step,
        process_start=psutil.Process().create_time(),
    )


def _make_evaluation(
    config: Config,
    world: World,
    validation: ShardSet | None,
    task: Task,
    engine: Engine,
    ema: Ema | None,
) -> Callable[[Callable[[], bool]], dict[str, float] | None] | None:
    """Returns the function that evaluates the current weights, or their moving average; None without validation
    data."""
    if validation is None:
        return None
    batches = EvalFeed(
        validation,
        world,
        config.image,
        task=config.task,
        batch_size=config.evaluate.batch_size,
        num_threads=config.data.num_threads,
        quarantine=Quarantine(validation, config.run.folder / QUARANTINE, config.data.max_bad_fraction),
    )

    def evaluation(give_up: Callable[[], bool]) -> dict[str, float] | None:
        outputs_of = engine.evaluator_of(ema.weights()) if ema else engine.evaluator()
        # Weights that are partitioned over the ranks have to be gathered for each forward pass, by all of them.
        collective = ema is None and not engine.keeps_copies
        return evaluate(outputs_of, batches, task.metric(), world, give_up=give_up, collective_outputs=collective)

    return evaluation


def _count_utilisation(config: Config, world: World, num_classes: int) -> Utilisation | None:
    """Returns the utilisation meter on rank 0, which logs it, and None on the others. Collective.

    It is also None for whole images, whose sizes vary, for frozen stages, which have no backward pass, and for a
    network whose operations cannot be counted.
    """
    rank_flop_s = matrix_flop_s(world.device, DTYPES[config.engine.precision])
    total = world.sum(torch.tensor(rank_flop_s, dtype=torch.float64, device=world.device)).item()
    if not (world.is_first and config.task.trains_on_one_size) or config.model.frozen_stages:
        return None

    @functools.cache
    def flops_of_image(size: int) -> int:
        return network.training_flops(config.task, config.model, size, num_classes)

    try:
        flops_of_image(config.image.size)
    except Exception as error:
        # Some networks of timm cannot be counted, and a run does not need its utilisation.
        log.warning(f"no MFU for {config.model.name}: {error}")
        return None
    return Utilisation(flops_of_image, total)


def _open_checked_data(config: Config, world: World) -> tuple[ShardSet, ShardSet | None]:
    """Returns the data sets, after every check that is possible before the model is built."""
    handoff.check_handoffs(config)
    training = open_training(config.data)
    validation = open_validation(config.data)
    order = start_checks.check_data(config, training, validation, world.size)
    start_checks.check_network(config, training, validation, order, world)
    start_checks.check_machine(config, world)
    # One rank compares the shards' sizes: on a shared disk the others would see the same.
    if world.is_first:
        training.check()
        if validation:
            validation.check()
    return training, validation


def _find_checkpoint(checkpoints: Checkpoints, config: Config, world: World) -> Checkpoint | None:
    def find_folder() -> Path | None:
        if not world.is_first:
            return None
        # What a killed save has left goes first, so that it can neither be found nor fill the disk.
        checkpoints.sweep()
        if config.resume.start_over:
            checkpoints.set_aside()
        return checkpoints.find(config.resume.source, config.resume.allow)

    folder = world.from_first(world.first_then_all(find_folder))
    return Checkpoint(folder) if folder else None


def _finished_result(folder: Path, schedule: Schedule, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """Returns the result of a run that has ended, also where its checkpoints have been deleted since. One whose last
    checkpoints are damaged continues from an older one, and writes them again."""
    result = finished_result(folder)
    if result is None:
        return None
    step = checkpoint.state.step if checkpoint else result.get("steps", 0)
    if step < schedule.total:
        return None
    log.info(f"{folder}: finished before, at step {step}; nothing to do")
    return result


@contextlib.contextmanager
def _claim_folder(folder: Path, world: World, claim: Claim | None) -> Iterator[Lease | None]:
    """Holds the run's folder on rank 0, so that no other job uses it; yields its lease there, None on other ranks.

    On rank 0 None means that this very hand-off uses it already. Raises InputError where another job does, and for a
    hand-off whose folder belongs to another run.
    """
    if not world.is_first:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    has_record = (folder / RECORD).exists()
    is_same_run = has_record and claim is not None and Record.read(folder).uuid == claim.uuid
    with contextlib.ExitStack() as held:
        try:
            lease = held.enter_context(hold(folder, slurm.has_ended))
        except BlockingIOError:
            if is_same_run:
                log.info(f"{folder}: this hand-off is at work already")
                yield None
                return
            raise InputError(
                f"{folder}: another job is at work in it; wait for it or choose another run.name"
            ) from None
        if claim and has_record and not is_same_run:
            raise InputError(f"{folder}: is another run's: choose another run.name for the hand-off")
        yield lease


@contextlib.contextmanager
def _publish(
    config: Config,
    world: World,
    training: ShardSet,
    validation: ShardSet | None,
    task: Task,
    claim: Claim | None,
    parent: str | None,
) -> Iterator[Publisher | None]:
    """Yields the run's Publisher on rank 0 and None on the others. A run that raises ends as FAILED."""
    if not world.is_first:
        yield None
        return
    publisher = Publisher(
        config,
        training,
        validation,
        main_metric=task.main_metric,
        uuid=claim.uuid if claim else None,
        parent=parent,
    )
    try:
        yield publisher
    except BaseException:
        publisher.fail()
        raise


def _log_start(
    config: Config, world: World, feed: TrainFeed, schedule: Schedule, state: State, zero_stage: int
) -> None:
    rank_slice = feed.rank_slice
    steps = f"steps {state.step} to {schedule.total} ({feed.order.steps_per_epoch} an epoch)"
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    batch = f"{ranks} × {rank_slice.accumulation} × {rank_slice.micro_batch_size} samples"
    engine = f"ZeRO-{zero_stage} {config.engine.precision}"
    log.info(f"{config.run.folder}: {config.model.name}, {steps}, {batch} on {world.device.type}, {engine}")
