"""Log lines: one format for every command and rank, on standard error.

    2026-11-30 17:42:53 INFO rank 0: step 20/300  epoch 0.69  loss 2.3133 …

A module logs with `log = logging.getLogger(__name__)`. Every command has the options --quiet and --verbose. The rank is
shown where there are several.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

_ROOT = logging.getLogger("pipeline")


class _StderrHandler(logging.Handler):
    """Writes to what standard error is at that moment: commands and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _Formatter(logging.Formatter):
    """Puts the time, the level and the rank in front of a message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(rank)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        # Read for each line: a process may set its rank after the first line.
        rank, world_size = rank_and_world_size()
        record.rank = "" if world_size == "1" else f"rank {rank}: "
        return super().format(record)


class _SetLevel(argparse.Action):
    """An option without a value that sets the level of our loggers, DeepSpeed's and MLflow's."""

    def __init__(self, *, const: int, **others: Any) -> None:
        super().__init__(nargs=0, const=const, **others)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _ROOT.setLevel(self.const)


def rank_and_world_size() -> tuple[str, str]:
    """Returns what the launcher says of this process, which is known before the ranks are connected."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    world_size = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    return rank, world_size


def configure(formatter: logging.Formatter | None = None) -> None:
    """Sends our loggers' lines to standard error, and nowhere else."""
    handler = _StderrHandler()
    handler.setFormatter(formatter or _Formatter())
    _ROOT.handlers = [handler]
    _ROOT.setLevel(logging.INFO)
    _ROOT.propagate = False


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --quiet and --verbose."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quiet",
        action=_SetLevel,
        const=logging.WARNING,
        dest=argparse.SUPPRESS,
        help="log warnings and errors alone",
    )
    group.add_argument(
        "--verbose",
        action=_SetLevel,
        const=logging.DEBUG,
        dest=argparse.SUPPRESS,
        help="log details too, and what DeepSpeed and MLflow log",
    )


def shows_details() -> bool:
    """Whether --verbose was given."""
    return _ROOT.isEnabledFor(logging.DEBUG)


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return not _ROOT.isEnabledFor(logging.INFO)
