"""Runs a program that waits a tenth of the usual time for servers, so that a trial of the longest wait ends in time.

python -m tests.chaos.hostile.impatient PROGRAM ARGUMENTS
"""

import runpy
import sys

from pipeline.shards import filesystems
from pipeline.shards.retry import Retry
from pipeline.shards.store import Store
from tests.ranks import ROOT

SHARE = 0.1


def main() -> None:
    filesystems.MIN_BYTES_PER_S = round(filesystems.MIN_BYTES_PER_S / SHARE)
    defaults = Retry()
    Retry.__init__.__defaults__ = (defaults.attempts, defaults.first_wait_s, SHARE * defaults.last_start_s)
    assert Store.__init__.__kwdefaults__
    Store.__init__.__kwdefaults__["timeout_s"] *= SHARE
    sys.argv = sys.argv[1:]
    program = sys.argv[0]
    if program.endswith(".py"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")


if __name__ == "__main__":
    main()
