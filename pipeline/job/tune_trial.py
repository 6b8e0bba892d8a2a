"""One rank of a trial: the speed of training steps with some settings, and the memory that they take.

RANK=… WORLD_SIZE=… python -m pipeline.job.tune_trial --config FILE [--set KEY=VALUE …] [--seconds S] [--limit S]

    data ──TrainFeed──▶ the micro-batches of one step, once ──Engine.step, repeatedly──▶ images a second, memory

tune.py starts these ranks; they write nothing. Exit code 1 with "out of memory" where the settings do not fit.
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

# These take seconds to import, which --help and wrong usage do without.
if TYPE_CHECKING:
    from pipeline.world import World

WARM_UP = 2
"""The number of steps that are not measured: the first one compiles, allocates and connects ranks."""
MIN_STEPS = 3
MAX_ACCUMULATION = 2
"""The maximum number of micro-batches in a step. Two are enough to have one after which ranks need not wait for each
other, and one after which they do. A run may accumulate more: the update then takes a smaller share of its step."""
LR = 1e-8
"""A learning rate that leaves the weights nearly as they are, so that repeated steps stay finite."""


def main() -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.job.tune_trial", description="One rank of a trial.")
    parser.add_argument("--config", required=True, metavar="FILE")
    cli.add_overrides(parser)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="duration of the measurement, of at least three steps"
    )
    parser.add_argument("--limit", type=float, default=600.0, metavar="S", help="end after S seconds in any case")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    # The alarm ends a rank that waits for others even where the process that started it was killed.
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
    from pipeline.job.initial_weights import build_initial_task
    from pipeline.train.engine import Engine, make_deterministic

    start_checks.check_machine(config, here)
    if config.train.deterministic:
        make_deterministic()
    training = open_training(config.data)
    order = Order.of(config, training.part_samples)
    rank_slice = partition(order, here.rank, here.size, config)
    small = shorten_step(arguments.config, arguments.set, config, rank_slice, here.size)
    task = build_initial_task(small, training.classes)
    with contextlib.closing(TrainFeed(small, training, here, drop_path_rates=task.drop_path_rates)) as feed:
        engine = Engine(small, task, here, feed.blank)
        batches = feed.next()
        step_s = _measure_step_s(lambda step: engine.step(batches, step=step, lr=LR), here, arguments.seconds)
        useful = 1 - padding_waste(order, here.size, config)
        peak, memory = _measure_memory_gb(here)
    return {
        "images_per_second": round(useful * small.train.global_batch_size / step_s, 1),
        "step_s": round(step_s, 4),
        "peak_memory_gb": round(peak, 3),
        "memory_gb": round(memory, 3),
        "device": torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "CPU",
    }


def shorten_step(path: str, overrides: list[str], config: Config, rank_slice: RankSlice, ranks: int) -> Config:
    """Returns the configuration with the same micro-batches, but at most MAX_ACCUMULATION of them a step, so that few
    samples have to be read and kept. Of a resolution schedule it keeps the largest size, which has to fit."""
    accumulation = min(MAX_ACCUMULATION, rank_slice.accumulation)
    settings: dict[str, Any] = {
        "train.micro_batch_size": rank_slice.micro_batch_size,
        "train.global_batch_size": ranks * accumulation * rank_slice.micro_batch_size,
        "data.lanes": ranks,
        # Repeated augmentation would change neither speed nor memory.
        "data.copies": 1,
    }
    if sizes := config.augment.size_schedule.values():
        settings["augment.size_schedule"] = f"{{0 steps: {max(config.image.size, *sizes)}}}"
    added = [f"{key}={value}" for key, value in settings.items()]
    return load_config(path, [*overrides, *added])


def _measure_step_s(step: Callable[[int], object], here: "World", seconds: float) -> float:
    """Returns the median duration of as many steps as rank 0 has time for. Collective."""
    import torch

    durations: list[float] = []
    end = math.inf
    # All ranks have to take the same number of steps. Rank 0 decides between steps, where that costs no rank time.
    while here.from_first(len(durations) < WARM_UP + MIN_STEPS or time.perf_counter() < end):
        if len(durations) == WARM_UP:
            end = time.perf_counter() + seconds
        begin = time.perf_counter()
        step(len(durations))
        # Kernels are queued: without this only the time to queue them would be measured.
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - begin)
    return statistics.median(durations[WARM_UP:])


def _measure_memory_gb(here: "World") -> tuple[float, float]:
    """Returns the peak memory of the rank that used most, and the memory available to the rank that has least, in 10⁹
    bytes. Collective.

    On a GPU both are those of torch's allocator: the memory of DALI and NCCL cannot be queried.
    """
    import torch

    if here.device.type == "cuda":
        available = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    else:
        available = psutil.virtual_memory().available / here.local_size + psutil.Process().memory_info().rss
    own = torch.tensor([here.peak_memory_gb(), available / 1e9], device=here.device)
    of_ranks = here.gather(own)
    return of_ranks[:, 0].max().item(), of_ranks[:, 1].min().item()


if __name__ == "__main__":
    cli.run(main)
