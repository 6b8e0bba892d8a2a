"""A training job from its configuration to its registered model: builds the rooms' parts and joins them."""

import contextlib
import functools
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from pipeline import files, network
from pipeline.cluster import slurm
from pipeline.config import Config, DetectionConfig, read_json
from pipeline.errors import REQUEUE, ExternalError, InputError
from pipeline.feed.loader import EvalFeed, TrainFeed
from pipeline.feed.quarantine import Quarantine
from pipeline.flops import DTYPES, matrix_flop_s
from pipeline.job import handoff, start_checks
from pipeline.job.handoff import Claim
from pipeline.job.publish import RESULT, Publisher, parent_of
from pipeline.lease import Lease, hold
from pipeline.redact import redact
from pipeline.shards.index import ShardSet
from pipeline.shards.open_data import open_training, open_validation
from pipeline.tasks.build import AnyTask, build_task, start_from
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.sync.record import RECORD, Record
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
from pvt.model import set_optimised_kernels

if TYPE_CHECKING:
    # MLflow takes more than a second to import: where a model comes from the registry, on ranks that fetch it.
    from pipeline.track.registry.registry import Version

QUARANTINE = "quarantine.jsonl"


def run_job(config: Config, world: World, claim: Claim | None = None) -> dict[str, Any] | None:
    """Train, evaluate, register. Returns the result on rank 0; a finished job is not run again, nor is one that has
    been handed off and is at work already.

    The result of a job that a signal has stopped says "requeue". Raises InputError for anything that can be known to
    be wrong before the first step.
    """
    folder = config.run.folder
    with contextlib.ExitStack() as parts:
        stop = parts.enter_context(StopSignal(config.train.preempt_deadline_s, REQUEUE))
        training, validation = world.first_then_all(lambda: _check(config, world))
        if config.train.deterministic:
            make_deterministic()
        task = world.first_then_all(lambda: _task(config, training.classes))
        begun = world.from_first(any((folder / "checkpoints").glob("step-*")))
        parent = None if begun else _start_from(config, world, task, training.classes)
        # Nothing is written before this, and there is little left that can be refused after it.
        lease = world.first_then_all(lambda: parts.enter_context(_claimed(folder, world, claim)))
        if world.from_first(lease is None):
            return {"run": str(folder), "at_work": True} if world.is_first else None
        attempt = world.from_first(uuid.uuid4().hex)
        watched = parts.enter_context(contextlib.ExitStack())
        watch = watched.enter_context(HangWatch(folder / "watch", world, config.train.hang_timeout_s, attempt))
        identity = {**config.identity(), "num_classes": len(training.classes), "data": training.digest}
        checkpoints = Checkpoints(folder / "checkpoints", world, identity)
        found = _find(checkpoints, config, world)
        state = found.state if found else State()
        feed = parts.enter_context(contextlib.closing(_feed(config, world, training, task, state)))
        parts.enter_context(_memory_reported(feed.deal.micro_batch_size, world))
        schedule = Schedule.of(config, feed.order.steps_per_epoch)
        if finished := world.from_first(_finished(folder, schedule, found) if world.is_first else None):
            return finished if world.is_first else None
        if found:
            task.model.load_state_dict(found.weights())
            parent = parent_of(folder)
        elif begun:  # and no checkpoint was finished, or they have been put aside
            parent = _start_from(config, world, task, training.classes)
        engine = Engine(config, task, world, feed.blank)
        ema = None if config.train.ema_decay is None else Ema(engine, config.train.ema_decay)
        guard = Guard(config.guard, task.chance_loss)
        if found:
            found.restore(engine, ema)
            assert state.guard, "every save notes the guard"
            guard.load(state.guard)
        saver = Saver(checkpoints, _retention(config, schedule, task), engine, ema, world, lease)
        saver.newest = found.folder if found else None
        parts.callback(saver.close)
        if config.tracking.system_metrics and world.local_rank == 0:
            parts.enter_context(SystemLoad(folder, node=world.rank // world.local_size))
        utilisation = _utilisation(config, world, len(training.classes))  # before MLflow is imported beside it
        publisher = parts.enter_context(_published(config, world, training, validation, task, claim, parent))
        if publisher:
            state.run_id = publisher.record.uuid
            files.write(folder / "deepspeed.json", json.dumps(redact(engine.deepspeed_config), indent=1).encode())
            _say_start(config, world, feed, schedule, state, engine.stage)
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
            goodput=_goodput(folder, world, state),
            stop=stop,
            evaluation=_evaluation(config, world, validation, task, engine, ema),
            utilisation=utilisation,
        )
        if publisher:
            trainer.listeners = [MetricsFile(folder / "metrics.jsonl", state.step), Progress(schedule.total), publisher]
            trainer.on_rollback = publisher.outbox.give_up
            trainer.anomalies = Anomalies(folder / "anomalies.jsonl", state.step)
            if schedule.profile_at is not None:
                trainer.profiler = Profiler(folder / "profile", config, world, schedule.profile_at)
                parts.callback(trainer.profiler.close)
        if config.debug.trace_samples:
            trainer.trace = Trace(folder / "trace", world.rank, state.step, training)
        summary = trainer.run()
        watched.close()  # registering a model takes one rank as long as it takes
        return _conclude(publisher, trainer, summary) if publisher else None


def _conclude(publisher: Publisher, trainer: Trainer, summary: Summary) -> dict[str, Any]:
    """Have what a finished run has made registered; say and write down how it or a stopped one ended."""
    print(trainer.goodput.summary(), file=sys.stderr, flush=True)
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


def _task(config: Config, classes: list[str]) -> AnyTask:
    torch.manual_seed(config.run.seed)
    task = build_task(config.task, config.model, config.image, classes)
    set_optimised_kernels(task.model, config.engine.fast)
    return task


def _feed(config: Config, world: World, training: ShardSet, task: AnyTask, state: State) -> TrainFeed:
    return TrainFeed(
        config,
        training,
        world,
        first_step=state.step,
        drop_path_rates=task.drop_path_rates,
        quarantine=Quarantine(training, config.run.folder / QUARANTINE, config.data.max_bad_fraction),
    )


@contextlib.contextmanager
def _memory_reported(micro_batch_size: int, world: World) -> Iterator[None]:
    """Raises ExternalError, with a setting that takes less, where a GPU's memory does not hold the run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        half = micro_batch_size // 4 * 2  # micro-batches are even
        less = f"train.micro_batch_size={half}" if half else "model.grad_checkpointing=true"
        raise ExternalError(
            f"rank {world.rank} on {os.uname().nodename}: out of GPU memory, with micro-batches of {micro_batch_size}: "
            f"--set {less} takes about half of it; launch/doctor.py --tune finds the largest that fit"
        ) from error


def _retention(config: Config, schedule: Schedule, task: AnyTask) -> Retention:
    return Retention(
        last=config.checkpoint.keep_last,
        best=config.checkpoint.keep_best,
        every=schedule.keep_every,
        grid=schedule.save_every,
        metric=task.main_metric,
    )


def _goodput(folder: Path, world: World, state: State) -> Goodput:
    """To be made when training begins: what has passed since the process began is booked as start-up."""
    return Goodput(
        folder / "goodput.json" if world.is_first else None,
        resumed_step=state.step,
        process_start=psutil.Process().create_time(),
    )


def _evaluation(
    config: Config,
    world: World,
    validation: ShardSet | None,
    task: AnyTask,
    engine: Engine,
    ema: Ema | None,
) -> Callable[[Callable[[], bool]], dict[str, float] | None] | None:
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
        together = ema is None and not engine.keeps_copies
        return evaluate(outputs_of, batches, task.metric(), world, give_up=give_up, collective_outputs=together)

    return evaluation


def _utilisation(config: Config, world: World, num_classes: int) -> Utilisation | None:
    """Collective. For rank 0, which tells it; None for whole images, whose sizes vary, where a frozen part goes without
    a backward pass, and for a network whose operations cannot be counted."""
    own = matrix_flop_s(world.device, DTYPES[config.engine.precision])
    together = world.sum(torch.tensor(own, dtype=torch.float64, device=world.device)).item()
    if not world.is_first or isinstance(config.task, DetectionConfig) or config.model.frozen_stages:
        return None

    @functools.cache
    def of_image(size: int) -> int:
        return network.training_flops(config.task, config.model, size, num_classes)

    try:
        of_image(config.image.size)
    except Exception as error:  # some network of timm's; training can do without
        print(f"no MFU for {config.model.name}: {error}", file=sys.stderr, flush=True)
        return None
    return Utilisation(of_image, together)


def _start_from(config: Config, world: World, task: AnyTask, classes: list[str]) -> str | None:
    """Load the weights that init.model names, if it names any; returns the exact version.

    Rank 0 has them fetched and checked; the others read its copy, or their node's own where disks are not shared.
    """
    if config.init is None:
        return None
    uri = config.init.model
    name, alias, _ = uri.partition("@")
    begun_with = parent_of(config.run.folder)
    if alias and begun_with and begun_with.startswith(f"{name}/"):
        uri = begun_with  # what the alias meant then

    def fetch(uri: str) -> "Version":
        from pipeline.track import tracking_server
        from pipeline.track.registry import registry

        tracking_server.connect(tracking_server.tracking_uri(config.tracking.uri, config.run.root))
        return registry.resolve(uri)

    def load() -> None:
        here = folder if (folder / WEIGHTS).exists() else fetch(pinned).folder
        card = ModelCard.read(here)
        if card.model.name != config.model.name:
            raise InputError(
                f"init.model {pinned} is a {card.model.name}, but model.name is {config.model.name}: "
                f"set model.name={card.model.name} or start from another model"
            )
        start_from(
            task,
            config.task,
            config.model,
            classes,
            network.read_weights(here / WEIGHTS),
            pinned,
            source_task=card.task,
            source_classes=card.classes,
        )

    version = world.first_then_all(lambda: fetch(uri) if world.is_first else None)
    folder, pinned = world.from_first((version.folder, version.uri) if version else (Path(), uri))
    world.first_then_all(load)
    return pinned


def _check(config: Config, world: World) -> tuple[ShardSet, ShardSet | None]:
    """The data sets, once everything that can be refused before the model is made has been looked at."""
    handoff.check_handoffs(config)
    training, validation = open_training(config.data), open_validation(config.data)
    order = start_checks.check_data(config, training, validation, world.size)
    start_checks.check_network(config, training, validation, order, world)
    start_checks.check_machine(config, world)
    if world.is_first:
        for shards in filter(None, (training, validation)):
            shards.check()
    return training, validation


def _find(checkpoints: Checkpoints, config: Config, world: World) -> Checkpoint | None:
    def look() -> Path | None:
        if not world.is_first:
            return None
        checkpoints.sweep()
        if config.resume.start_over:
            checkpoints.set_aside()
        return checkpoints.find(config.resume.source, config.resume.allow)

    folder = world.from_first(world.first_then_all(look))
    return Checkpoint(folder) if folder else None


def _finished(folder: Path, schedule: Schedule, found: Checkpoint | None) -> dict[str, Any] | None:
    """Returns the result of a run that has ended, also where its checkpoints have been deleted since. One whose last
    checkpoints are damaged goes on from an older one, and writes them again."""
    result = folder / RESULT
    document = read_json(dict[str, Any], result) if result.exists() else {"requeue": True}
    step = found.state.step if found else document.get("steps", 0)
    if document.get("requeue") or step < schedule.total:
        return None
    print(f"{folder}: finished before, at step {step}; nothing to do", file=sys.stderr)
    return document


@contextlib.contextmanager
def _claimed(folder: Path, world: World, claim: Claim | None) -> Iterator[Lease | None]:
    """Holds the run's folder on rank 0, so that no other job works in it; yields its lease there, None on other ranks.

    On rank 0 None says that this very hand-off is at work in it already. Raises InputError where another job is, and
    for a hand-off whose folder is another run's.
    """
    if not world.is_first:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    begun = (folder / RECORD).exists()
    same = begun and claim is not None and Record.read(folder).uuid == claim.uuid
    with contextlib.ExitStack() as held:
        try:
            lease = held.enter_context(hold(folder, slurm.has_ended))
        except BlockingIOError:
            if same:
                print(f"{folder}: this hand-off is at work already", file=sys.stderr, flush=True)
                yield None
                return
            raise InputError(
                f"{folder}: another job is at work in it; wait for it or give this one a run.name"
            ) from None
        if claim and begun and not same:
            raise InputError(f"{folder}: is another run's: give the hand-off a run.name of its own")
        yield lease


@contextlib.contextmanager
def _published(
    config: Config,
    world: World,
    training: ShardSet,
    validation: ShardSet | None,
    task: AnyTask,
    claim: Claim | None,
    parent: str | None,
) -> Iterator[Publisher | None]:
    """The run's Publisher on rank 0; None on the others. A run that raises ends as FAILED."""
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


def _say_start(
    config: Config, world: World, feed: TrainFeed, schedule: Schedule, state: State, zero_stage: int
) -> None:
    part = feed.deal
    lines = [
        f"{config.run.folder}: {config.model.name}, steps {state.step} to {schedule.total} "
        f"({feed.order.steps_per_epoch} an epoch), {world.size} ranks × {part.accumulation} × {part.micro_batch_size} "
        f"samples on {world.device.type}, ZeRO-{zero_stage} {config.engine.precision}"
    ]
    if padding := start_checks.padding(feed.order, world.size, config):
        lines.append(padding)
    print("\n".join(lines), file=sys.stderr, flush=True)
