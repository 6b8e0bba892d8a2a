"""A job on one rank that counts how often a step reads a tensor, which on a GPU is waiting for it; see test_train.py.

python -m tests.workers.reads CONFIG OVERRIDES

Prints for each step the names of what read, up to the beginning of the next step.
"""

import functools
import json
import sys
import threading
from typing import Any

import torch

from pipeline import world
from pipeline.config import load_config
from pipeline.job.training_job import run_job
from pipeline.train.engine import Engine

WAYS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


def main() -> None:
    path, overrides = sys.argv[1:]
    reads: list[list[str]] = []
    begin_step, trainer = Engine.forward, threading.current_thread()

    def count(way: str) -> None:
        read = getattr(torch.Tensor, way)

        @functools.wraps(read)
        def counted(self: torch.Tensor, *others: Any) -> Any:
            if reads and threading.current_thread() is trainer:
                reads[-1].append(way)
            return read(self, *others)

        setattr(torch.Tensor, way, counted)

    def forward(self: Engine, *batches: Any, **others: Any) -> Any:
        reads.append([])
        return begin_step(self, *batches, **others)

    for way in WAYS:
        count(way)
    Engine.forward = forward
    here = world.start()
    run_job(load_config(path, overrides.split(",")), here)
    print(json.dumps({"reads": reads}), flush=True)
    world.stop()


if __name__ == "__main__":
    main()
