"""One rank of a job on painted images; see test_trace.py.

python -m tests.workers.painted CONFIG JOB…

A JOB is a JSON list of overrides. Writes the numbers that it reads from the pixels that the engine is given to
RUN/painted-R.jsonl. "END" among the overrides: after step ENDS_AT the process ends as if it had been killed.
"""

import json
import os
import sys

from pipeline import world
from pipeline.config import Config, load_config
from pipeline.feed.loader import MicroBatch
from pipeline.job.training_job import run_job
from pipeline.train.engine import Engine, PendingStep
from tests.painting import read_number

ENDS_AT = 5


def main() -> None:
    path, *jobs = sys.argv[1:]
    here = world.start()
    forward_of_engine = Engine.forward
    for overrides in map(json.loads, jobs):
        ends = "END" in overrides
        config = load_config(path, [each for each in overrides if each != "END"])

        def forward(
            self: Engine, batches: list[MicroBatch], *, step: int, config: Config = config, ends: bool = ends
        ) -> PendingStep:
            if ends and step == ENDS_AT:
                os._exit(0)
            with (config.run.folder / f"painted-{here.rank}.jsonl").open("a") as file:
                file.write(json.dumps({"step": step + 1, "numbers": numbers_in(batches)}) + "\n")
            return forward_of_engine(self, batches, step=step)

        Engine.forward = forward
        run_job(config, here)
    world.stop()


def numbers_in(batches: list[MicroBatch]) -> list[tuple[int, int]]:
    """Positions, and what is painted there."""
    return [
        (int(position), read_number(image))
        for micro in batches
        for position, weight, image in zip(micro.samples.position, micro.weights, micro.images, strict=True)
        if weight > 0
    ]


if __name__ == "__main__":
    main()
