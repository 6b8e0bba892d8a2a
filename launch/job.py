"""A training job from its configuration to its registered model: builds the rooms' parts and joins them."""

import contextlib
import fcntl
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from launch import command
from pipeline import files
from pipeline.config import Config, Data, dump
from pipeline.errors import InputError
from pipeline.feed.loader import EvalFeed, TrainFeed
from pipeline.feed.order import Order, deal, padding_waste
from pipeline.feed.quarantine import Quarantine
from pipeline.shards.index import ShardSet
from pipeline.shards.store import Cache
from pipeline.tasks.classify import Classification, build_model, check_image_sizes
from pipeline.track.card import Card
from pipeline.track.registry import register
from pipeline.track.runs import Tracker
from pipeline.train.checkpoint import MODEL, Checkpoint, Checkpoints, State
from pipeline.train.engine import Engine, deepspeed_config, make_deterministic
from pipeline.train.evaluate import evaluate
from pipeline.train.loop import Schedule, Summary, train
from pipeline.train.meters import MetricsFile, Progress, finite_or_none
from pipeline.train.trace import Trace
from pipeline.world import World

QUARANTINE = "quarantine.jsonl"


def run_job(settings: Config, world: World) -> dict[str, Any] | None:
    """Train, evaluate, register. Returns the result on rank 0; a finished job is not run again.

    Raises InputError for anything that can be known to be wrong before the first step.
    """
    folder = settings.run.folder
    training, validation = command.first_then_all(world, lambda: _check(settings, world))
    if settings.train.deterministic:
        make_deterministic()
    torch.manual_seed(settings.run.seed)
    num_classes = len(training.classes)
    task = command.first_then_all(
        world, lambda: Classification(build_model(settings.model, settings.image.size, num_classes))
    )
    identity = {**settings.identity(), "num_classes": num_classes, "data": training.digest}
    checkpoints = Checkpoints(folder / "checkpoints", world, identity)
    found = _find(checkpoints, settings, world)
    state = found.state if found else State()
    if found:
        task.model.load_state_dict(found.weights())

    quarantine = Quarantine(training, folder / QUARANTINE, settings.data.max_bad_fraction)
    feed = TrainFeed(
        settings,
        training,
        world,
        first_step=state.step,
        drop_path_rates=task.drop_path_rates,
        quarantine=quarantine,
    )
    schedule = Schedule.of(settings, feed.order.steps_per_epoch)
    if finished := world.from_first(_finished(folder, schedule, state) if world.is_first else None):
        feed.close()
        return finished if world.is_first else None
    engine = Engine(settings, task, world, feed.deal.accumulation)
    if found:
        found.restore(engine)

    evaluation = None
    if validation:
        batches = EvalFeed(
            validation,
            world,
            settings.image,
            batch_size=settings.evaluate.batch_size,
            num_threads=settings.data.num_threads,
            quarantine=Quarantine(validation, folder / QUARANTINE, settings.data.max_bad_fraction),
        )
        evaluation = lambda: evaluate(engine.evaluator(), batches, task.metric(), world)  # noqa: E731
    with contextlib.closing(feed), _tracking(settings, world, training) as tracker:
        listeners = []
        if tracker:
            state.run_id = tracker.run_id
            listeners = [MetricsFile(folder / "metrics.jsonl", state.step), Progress(schedule.total), tracker]
            _say_start(settings, world, feed, schedule, state)
        trace = Trace(folder / "trace", world.rank, state.step, training) if settings.debug.trace_samples else None
        summary = train(settings, schedule, state, feed, engine, checkpoints, evaluation, listeners, trace)
        if tracker is None:
            return None
        result = _register(settings, training, tracker, summary, state)
        files.write(folder / "result.json", json.dumps(result, allow_nan=False).encode() + b"\n")
        return result


def _register(settings: Config, training: ShardSet, tracker: Tracker, summary: Summary, state: State) -> dict[str, Any]:
    """Register the last checkpoint's weights as a model version; returns the job's result."""
    scores = finite_or_none(summary.scores)
    card = Card(
        task="classification",
        model=settings.model,
        image=settings.image,
        eval_batch_size=settings.evaluate.batch_size,
        classes=training.classes,
        metrics=scores,
        lineage={"data.digest": training.digest, "checkpoint": str(summary.checkpoint)},
    )
    name = settings.tracking.model_name or settings.run.name
    uri = register(name, summary.checkpoint / MODEL, card, run_id=tracker.run_id, step=state.step)
    return {
        "run": str(settings.run.folder),
        "run_id": tracker.run_id,
        "model": uri,
        **scores,
        "steps": state.step,
        "images_per_second": summary.images_per_second,
    }


def _check(settings: Config, world: World) -> tuple[ShardSet, ShardSet | None]:
    """The data sets, once everything that can be refused before the model is made has been looked at."""
    cache = _cache(settings.data)
    training = ShardSet(*settings.data.train_paths, cache=cache)
    validation = ShardSet(settings.data.val, cache=cache) if settings.data.val else None
    if validation and validation.classes != training.classes:
        raise InputError(
            f"{settings.data.val} and {settings.data.train_paths[0]} have different classes, so their labels mean "
            "different things: pack the validation split again with --classes-from"
        )
    if sizes := settings.augment.image_size.values():
        check_image_sizes(settings.model, settings.image.size, len(training.classes), sizes)
    if world.is_first:
        for shards in filter(None, (training, validation)):
            shards.check()
    order = Order.of(settings, training.part_samples)
    part = deal(order, world.rank, world.size, settings)
    Schedule.of(settings, order.steps_per_epoch)
    deepspeed_config(settings, world, part.accumulation, num_parameters=1)
    return training, validation


def _cache(data: Data) -> Cache | None:
    """None where the default will do, which is only made when a remote data set needs it."""
    if data.cache is None and data.cache_gb is None:
        return None
    return Cache.default(data.cache, None if data.cache_gb is None else int(data.cache_gb * 1e9))


def _find(checkpoints: Checkpoints, settings: Config, world: World) -> Checkpoint | None:
    def look() -> Path | None:
        return checkpoints.find(settings.resume.source, settings.resume.allow) if world.is_first else None

    folder = world.from_first(command.first_then_all(world, look))
    return checkpoints.open(folder) if folder else None


def _finished(folder: Path, schedule: Schedule, state: State) -> dict[str, Any] | None:
    result = folder / "result.json"
    if state.step < schedule.total or not result.exists():
        return None
    print(f"{folder}: finished before, at step {state.step}; nothing to do", file=sys.stderr)
    return json.loads(result.read_text())


@contextlib.contextmanager
def _tracking(settings: Config, world: World, training: ShardSet) -> Iterator[Tracker | None]:
    """The run's folder, locked, and its Tracker on rank 0; None on the others. A run that raises ends as FAILED."""
    if not world.is_first:
        yield None
        return
    folder = settings.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another job is at work in it; wait for it or give this one a run.name"
            ) from None
        (folder / "config.yaml").write_text(dump(settings))
        paths = ", ".join(settings.data.train_paths)
        tracker = Tracker(settings, facts={"data.digest": training.digest, "data.path": paths})
        try:
            yield tracker
        except BaseException:
            tracker.end(failed=True)
            raise
        tracker.end()


def _say_start(settings: Config, world: World, feed: TrainFeed, schedule: Schedule, state: State) -> None:
    part = feed.deal
    lines = [
        f"{settings.run.folder}: {settings.model.name}, steps {state.step} to {schedule.total} "
        f"({feed.order.steps_per_epoch} an epoch), {world.size} ranks × {part.accumulation} × {part.micro_batch_size} "
        f"samples on {world.device.type}, ZeRO-{settings.engine.zero_stage} {settings.engine.precision}"
    ]
    if waste := padding_waste(feed.order, world.size, settings):
        worlds = range(1, min(2 * world.size, feed.order.lanes) + 1)
        better = [str(size) for size in worlds if not padding_waste(feed.order, size, settings)]
        lines.append(
            f"{waste:.1%} of the work is padding; ranks without any: {', '.join(better) or 'none up to double'}"
        )
    print("\n".join(lines), file=sys.stderr, flush=True)
