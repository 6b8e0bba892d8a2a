"""One rank of a job on painted images; see test_trace.py.

python -m tests.workers.painted CONFIG LAST_STEP [OVERRIDE…]

Writes the numbers that it reads from the pixels that the engine is given to RUN/painted-R.jsonl. After LAST_STEP the
process ends as if it had been killed.
"""

import json
import os
import sys

from pipeline import world
from pipeline.config import load_config
from pipeline.feed.loader import MicroBatch
from pipeline.job.training_job import run_job
from pipeline.train.engine import Engine, PendingStep
from tests.painting import read_number


def main() -> None:
    path, last_step, *overrides = sys.argv[1:]
    here = world.start()
    config = load_config(path, overrides)
    numbers = config.run.folder / f"painted-{here.rank}.jsonl"
    forward_of_engine = Engine.forward

    def forward(self: Engine, batches: list[MicroBatch], *, step: int) -> PendingStep:
        if step == int(last_step):
            os._exit(0)
        read = [
            [int(position), read_number(image)]
            for micro in batches
            for position, weight, image in zip(micro.samples.position, micro.weights, micro.images, strict=True)
            if weight > 0
        ]
        with numbers.open("a") as file:
            file.write(json.dumps({"step": step + 1, "numbers": read}) + "\n")
        return forward_of_engine(self, batches, step=step)

    Engine.forward = forward
    run_job(config, here)
    world.stop()


if __name__ == "__main__":
    main()
