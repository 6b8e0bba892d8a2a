"""One rank of a trial: how quick training steps are with some settings, and what memory they take.

RANK=… WORLD_SIZE=… python -m pipeline.job.tune_trial --config FILE [--set KEY=VALUE …] [--seconds S] [--limit S]

    data ──TrainFeed──▶ the micro-batches of one step, once ──Engine.step, again and again──▶ images a second, memory

tune.py starts these; they write nothing. Exit code 1 with "out of memory" where the settings do not fit.
"""

import argparse
import contextlib
import math
import signal
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil

from pipeline import cli
from pipeline.config import Config, load_config
from pipeline.errors import ExternalError
from pipeline.feed.order import Order, RankSlice, padding_waste, partition
from pipeline.job import start_checks
from pipeline.shards.open_data import open_training

if TYPE_CHECKING:  # these take seconds to import, which --help and wrong usage do without
    from pipeline.tasks.build import AnyTask
    from pipeline.world import World

WARM_UP = 2
"""Steps that are not measured: the first one compiles, allocates and connects ranks."""
MIN_STEPS = 3
MAX_ACCUMULATION = 2
"""Micro-batches of a step, which is enough to have one after which ranks need not wait for each other, and one after
which they do. A run may accumulate more of them: its update then is a smaller part of a step than here."""
LR = 1e-8


def main() -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.job.tune_trial", description="One rank of a trial.")
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps that are measured, at least three")
    parser.add_argument("--limit", type=float, default=600.0, metavar="S", help="end after so long, come what may")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    # Also where whoever started this was killed, and nobody is left to end a rank that waits for others.
    signal.alarm(math.ceil(arguments.limit))
    import torch

    from pipeline import world

    here = world.start()
    try:
        measured = _measure(config, arguments, here)
    except torch.cuda.OutOfMemoryError as error:
        raise ExternalError("out of memory") from error
    world.stop()
    return measured if here.is_first else None


def _measure(config: Config, arguments: argparse.Namespace, here: "World") -> dict[str, Any]:
    import torch

    from pipeline.feed.loader import TrainFeed
    from pipeline.train.engine import Engine, make_deterministic

    start_checks.check_machine(config, here)
    if config.train.deterministic:
        make_deterministic()
    training = open_training(config.data)
    order = Order.of(config, training.part_samples)
    part = partition(order, here.rank, here.size, config)
    small = in_small(arguments.config, arguments.set, config, part, here.size)
    task = _task(small, training.classes)
    num_parameters = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    with contextlib.closing(TrainFeed(small, training, here, drop_path_rates=task.drop_path_rates)) as feed:
        engine = Engine(small, task, here, feed.blank)
        batches = feed.next()
        step_s = _step_s(lambda step: engine.step(batches, step=step, lr=LR), here, arguments.seconds)
        useful = 1 - padding_waste(order, here.size, config)
        peak, memory = _memory_gb(here)
    return {
        "images_per_second": round(useful * small.train.global_batch_size / step_s, 1),
        "step_s": round(step_s, 4),
        "peak_memory_gb": round(peak, 3),
        "memory_gb": round(memory, 3),
        "num_parameters": num_parameters,
        "device": torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "CPU",
    }


def in_small(path: str, overrides: list[str], config: Config, part: RankSlice, ranks: int) -> Config:
    """The run with the same micro-batches of the same data, but few to a step, so that few have to be read and kept.

    Of a resolution schedule the largest images: they have to fit. Copies of a sample would change nothing.
    """
    accumulation = min(MAX_ACCUMULATION, part.accumulation)
    small: dict[str, Any] = {
        "train.micro_batch_size": part.micro_batch_size,
        "train.global_batch_size": ranks * accumulation * part.micro_batch_size,
        "data.lanes": ranks,
        "data.copies": 1,
    }
    if sizes := config.augment.image_size.values():
        small["augment.image_size"] = f"{{0 steps: {max(config.image.size, *sizes)}}}"
    return load_config(path, [*overrides, *(f"{key}={value}" for key, value in small.items())])


def _task(config: Config, classes: list[str]) -> "AnyTask":
    import torch

    from pipeline.tasks.build import build_task
    from pvt.model import set_optimised_kernels

    torch.manual_seed(config.run.seed)
    task = build_task(config.task, config.model, config.image, classes)
    set_optimised_kernels(task.model, config.engine.fast)
    return task


def _step_s(step: Callable[[int], object], here: "World", seconds: float) -> float:
    """The median of as many steps as rank 0 has time for. Collective."""
    import torch

    took: list[float] = []
    end = math.inf
    # Rank 0 is asked between steps, where it costs none of them anything.
    while here.from_first(len(took) < WARM_UP + MIN_STEPS or time.perf_counter() < end):
        if len(took) == WARM_UP:
            end = time.perf_counter() + seconds
        begin = time.perf_counter()
        step(len(took))
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    return statistics.median(took[WARM_UP:])


def _memory_gb(here: "World") -> tuple[float, float]:
    """The most that a rank has taken, and how much the one with the least could have had, in 10⁹ bytes. Collective.

    On a GPU both are of torch's allocator: what DALI and NCCL take is not to be had.
    """
    import torch

    if here.device.type == "cuda":
        there_is = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    else:
        there_is = psutil.virtual_memory().available / here.local_size + psutil.Process().memory_info().rss
    found = here.gather(torch.tensor([here.peak_memory_gb(), there_is / 1e9], device=here.device))
    return found[:, 0].max().item(), found[:, 1].min().item()


if __name__ == "__main__":
    cli.run(main)
