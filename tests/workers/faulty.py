"""One rank of jobs that meet faults; see test_survival.py.

python -m tests.workers.faulty CONFIG FAULTS OVERRIDES…

FAULTS is a JSON object of step, counted from 0, to what happens before it:
"nan" gives the last rank NaN pixels, "labels" the wrong labels, "lr" a learning rate 3,000 times too high;
"flip" flips a bit of the last rank's weights, "miscompute" one of a gradient that it computes for the replay check;
"store" keeps its feed from reading, "evaluation" every evaluation, from the first on;
"stop" sends it SIGTERM, "kill" ends all processes at once, "memory" makes its step one that a GPU has no room for.
Each of OVERRIDES is a comma-separated list of settings: one job. FAULTS may be a list with an object for each job.

Rank 0 prints each job's result. For a job that ends with an error {"error": …} is printed, and the next one begins; the
last one ends the process, as it would in launch/pretrain.py.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch

from pipeline import cli, world
from pipeline.config import load_config
from pipeline.errors import ExternalError
from pipeline.feed.loader import EvalFeed, MicroBatch, TrainFeed
from pipeline.job.training_job import run_job
from pipeline.shards.store import StoreError
from pipeline.train import sdc_check
from pipeline.train.engine import Engine, PendingStep
from pipeline.train.outcome import Outcome
from pipeline.world import World


def flip_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int32).view(-1)[7] ^= 1


def main() -> None:
    path, text, *jobs = sys.argv[1:]
    given = json.loads(text)
    faults_of_jobs = given if isinstance(given, list) else [given] * len(jobs)
    faults = dict[int, str]()
    here = world.start()
    is_last = here.rank == here.size - 1
    forward, update, fetch = Engine.forward, Engine.update, TrainFeed.next
    numbers, steps = dict[int, int](), dict[int, int]()

    def next_with_faults(self: TrainFeed) -> list[MicroBatch]:
        step = numbers[id(self)] = numbers.get(id(self), self._first_step - 1) + 1
        batches, fault = fetch(self), faults.get(step)
        if fault == "nan" and is_last:
            return [b._replace(images=torch.full_like(b.images, float("nan"))) for b in batches]
        if fault == "labels":
            return [b._replace(targets=b.targets.roll(1, dims=1)) for b in batches]
        if fault == "store" and is_last:
            raise StoreError("shard-000003.tar: 503 Service Unavailable")
        return batches

    def evaluate_with_faults(self: EvalFeed) -> Iterator[MicroBatch]:
        for number, batch in enumerate(batches_of(self)):
            if number == 1 and "evaluation" in faults.values() and is_last:
                raise StoreError("shard-000001.tar: 503 Service Unavailable")
            yield batch

    def forward_with_faults(self: Engine, batches: list[MicroBatch], *, step: int) -> PendingStep:
        steps[id(self)] = step
        fault = faults.get(step)
        if fault == "kill":
            os._exit(0)
        if fault == "stop" and is_last:
            os.kill(os.getpid(), signal.SIGTERM)
        if fault == "memory" and is_last:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, batches, step=step)

    def update_with_faults(self: Engine, pending: PendingStep, *, lr: float, **others: Any) -> Outcome:
        fault = faults.get(steps[id(self)])
        return update(self, pending, lr=lr * (3000 if fault == "lr" else 1), **others)

    def gradients_with_faults(self: Engine, batch: MicroBatch, *, step: int, micro: int) -> Any:
        result = gradients(self, batch, step=step, micro=micro)
        if faults.get(step) == "miscompute" and is_last:
            faults[step] = "never again"
            flip_bit(result["head.weight"])
        return result

    def check_with_faults(engine: Engine, batch: MicroBatch, step: int, world: World) -> None:
        if faults.get(step) == "flip" and is_last:
            flip_bit(next(iter(engine.local_weights().values())))
        check(engine, batch, step, world)

    gradients, check, batches_of = Engine.gradients, sdc_check.check_for_corruption, EvalFeed.__iter__
    EvalFeed.__iter__ = evaluate_with_faults
    Engine.forward, Engine.update, Engine.gradients = forward_with_faults, update_with_faults, gradients_with_faults
    TrainFeed.next = next_with_faults
    sdc_check.check_for_corruption = check_with_faults

    def run() -> None:
        for number, overrides in enumerate(jobs):
            numbers.clear()
            faults.clear()
            faults.update((int(step), fault) for step, fault in faults_of_jobs[number].items())
            try:
                result = run_job(load_config(path, overrides.split(",")), here)
            except ExternalError as error:
                if number == len(jobs) - 1:
                    raise
                print(f"error: {error}", file=sys.stderr, flush=True)
                result = {"error": str(error)} if here.is_first else None
            if result:
                print(json.dumps(result), flush=True)
        world.stop()

    cli.run(run)


if __name__ == "__main__":
    main()
