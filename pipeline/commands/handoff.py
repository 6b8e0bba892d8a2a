"""Starts the fine-tuning jobs that a run's configuration lists under `handoff`, each once, and waits for them.

python launch/handoff.py RUN [--ranks N]
"""

from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.errors import InputError
from pipeline.job.handoff import hand_off


def main() -> dict[str, Any]:
    parser = cli.make_parser("launch/handoff.py", "Start a run's fine-tuning jobs, each once.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, such as runs/NAME")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="number of ranks of each job on this machine (default: one for each GPU, or 2)",
    )
    arguments = parser.parse_args()
    ranks: int | None = arguments.ranks
    if ranks is None:
        # Imported late: its torch takes seconds to import.
        from pipeline import world

        ranks = world.default_ranks()
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: at least one")
    return hand_off(arguments.run, ranks)
