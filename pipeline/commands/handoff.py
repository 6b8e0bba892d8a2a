"""Start the fine-tuning jobs that a run's configuration lists under `handoff`, each once, and wait for them.

python launch/handoff.py RUN [--ranks N]
"""

import argparse
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.job.handoff import hand_off


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="launch/handoff.py", description="Start a run's fine-tuning jobs, each once.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, such as runs/NAME")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="of each job, on this machine (default: one for each GPU, or 2)"
    )
    arguments = parser.parse_args()
    ranks = _default_ranks() if arguments.ranks is None else arguments.ranks
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: at least one")
    return hand_off(arguments.run, ranks)


def _default_ranks() -> int:
    from pipeline import world  # whose torch takes seconds to import

    return world.default_ranks()
