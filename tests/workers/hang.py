"""One rank of a job that hangs; see test_watch.py.

python -m tests.workers.hang FOLDER HANG_TIMEOUT_S HOW

HOW: runs (until something stops it), sleeps (the last rank in Python, at step 3) or holds (the last rank in native
code, with the interpreter's lock). Prints a line for each step.
"""

import ctypes
import itertools
import sys
import time
from pathlib import Path

import torch

from pipeline import world
from pipeline.train.hang_watch import HangWatch


def exchange(here: world.World) -> None:
    here.sum(torch.ones(1))


def wait_for_data() -> None:
    time.sleep(1000)


def main() -> None:
    folder, timeout_s, how = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    here = world.start()
    with HangWatch(folder / "watch", here, timeout_s, here.from_first(str(time.time()))) as watch:
        for step in itertools.count(1):
            watch.at(step, "data")
            time.sleep(0.5 if step == 3 and here.is_first else 0.02)
            if step == 3 and here.rank == here.size - 1:
                if how == "sleeps":
                    wait_for_data()
                if how == "holds":
                    ctypes.PyDLL(None).sleep(1000)
            watch.at(step, "exchange")
            exchange(here)
            print(step, flush=True)


if __name__ == "__main__":
    main()
