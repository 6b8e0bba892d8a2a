"""What the host asks of the device in a training step: launches, copies and waits, counted by torch's profiler.

python -m benchmarks.launches [MODEL] [--batch N] [--precision bf16] [--compile] [--steps 5] [--out DIR]

    our engine, one batch again and again ──▶ steps under torch.profiler ──▶ counts a step ──▶ table, JSON line

Launches and copies are what the device did, kernel by kernel; synchronisations are the host's calls that wait for it.
On a CPU there are none of these, and operators that were called are counted. `host_ms` is the processor time of this
process in steps without the profiler, all threads.
"""

import argparse
import collections
import sys
import time
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks import report, synthetic
from benchmarks.step import DEPTHS, NUM_CLASSES, SIZE_PX
from pipeline import cli, world
from pipeline.config import Config
from pipeline.feed.loader import MicroBatch
from pipeline.tasks.build import build_task
from pipeline.train.engine import Engine
from pipeline.world import World

WARM_UP = 3
COUNTED = ("kernels", "copies", "memsets", "synchronisations", "operators")


def main() -> dict[str, Any]:
    arguments = _arguments()
    here = world.start()
    arguments.batch = arguments.batch or (128 if here.device.type == "cuda" else 2)
    batches = [synthetic.batch(arguments.batch, SIZE_PX, NUM_CLASSES, here.device)]
    engine = _engine(arguments, here, batches)
    for step in range(WARM_UP):
        engine.step(batches, step=step, lr=1e-4)
    numbers = range(WARM_UP, WARM_UP + arguments.steps)
    began_s = time.process_time()
    for step in numbers:
        engine.step(batches, step=step, lr=1e-4)
    host_ms = 1e3 * (time.process_time() - began_s) / arguments.steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if here.device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profile:
        for step in numbers:
            engine.step(batches, step=step, lr=1e-4)
    counts = count(profile.events() or [])
    per_step = {name: counts[name] / arguments.steps for name in COUNTED}
    print(f"| {' | '.join(per_step)} | host, ms |\n{'|---:' * (len(per_step) + 1)}|", file=sys.stderr)
    print(f"| {' | '.join(f'{value:,.1f}' for value in per_step.values())} | {host_ms:.1f} |", file=sys.stderr)
    world.stop()
    about = {"model": arguments.model, "batch": arguments.batch, "precision": arguments.precision}
    result = {**about, "compile": arguments.compile, "per_step": per_step, "host_ms": round(host_ms, 2)}
    return report.finish("launches", result, arguments.out, device=here.device.type)


def count(events: Any) -> collections.Counter[str]:
    """Counts torch.profiler's events by kind."""
    counts = collections.Counter[str]()
    for event in events:
        if event.device_type == DeviceType.CUDA:
            counts[_on_device(event.name)] += not event.is_user_annotation
        elif "Synchronize" in event.name:
            counts["synchronisations"] += 1
        elif event.name.startswith("aten::"):
            counts["operators"] += 1
    return counts


def _on_device(name: str) -> str:
    if name.startswith("Memcpy"):
        return "copies"
    return "memsets" if name.startswith("Memset") else "kernels"


def _engine(arguments: argparse.Namespace, here: World, batches: list[MicroBatch]) -> Engine:
    config = Config.model_validate(
        {
            "run": {"name": "launches"},
            "model": {"name": arguments.model, "drop_path_rate": 0.3},
            "image": {"size": SIZE_PX},
            "data": {"train": "unused", "lanes": 1},
            "optim": {"lr": 1e-4, "clip_grad": 1.0},
            "train": {"length": "100 steps", "global_batch_size": arguments.batch},
            "engine": {"precision": arguments.precision, "compile": arguments.compile},
        }
    )
    task = build_task(config.task, config.model, config.image, list(map(str, range(NUM_CLASSES))))
    return Engine(config, task, here, lambda step: batches)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="pvt_large", choices=DEPTHS, metavar="MODEL")
    parser.add_argument("--batch", type=report.count, help="images (default: 128 on a GPU, 2 on a CPU)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="the blocks")
    parser.add_argument("--steps", type=report.count, default=5)
    report.add_out(parser, "launches")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
