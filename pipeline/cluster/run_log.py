"""Reads the log of a run's jobs, runs/NAME/slurm/log, also while it is being written."""

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import InputError

_POLL_S = 0.5


def tail(path: Path, lines: int, *, rank: int | None = None) -> list[str]:
    """Returns the last lines of a log, or of one rank's lines in it. Raises InputError where there is no log."""
    if not path.exists():
        raise InputError(f"{path}: no such log: the job has not started yet, or nothing was submitted")
    return list(follow(path, lambda: True, lines=lines, rank=rank))


def follow(path: Path, until: Callable[[], bool], *, lines: int = 0, rank: int | None = None) -> Iterator[str]:
    """Yields the last `lines` lines and then each as it is written, without its end, until `until` returns true and
    everything that was written by then has been yielded. Waits for a log that does not exist yet."""
    while not path.exists():
        if until():
            return
        time.sleep(_POLL_S)
    # srun --label puts "RANK: " in front, right-aligned in a column as wide as the largest rank.
    pattern = "" if rank is None else rf"\s*{rank}: "
    is_wanted = re.compile(pattern).match
    with path.open("rb") as log:
        log.seek(_find_last(log, lines, is_wanted))
        rest = b""
        while True:
            # Asked before reading, so that nothing is missed between the last read and the answer.
            is_over = until()
            *complete, rest = (rest + log.read()).split(b"\n")
            if is_over and rest:
                complete.append(rest)
            for line in map(_decode, complete):
                if is_wanted(line):
                    yield line
            if is_over:
                return
            time.sleep(_POLL_S)


def _find_last(log: IO[bytes], lines: int, is_wanted: Callable[[str], object]) -> int:
    """Returns the offset at which the last `lines` wanted lines begin; that of the end if there are none."""
    offsets: deque[int] = deque(maxlen=lines)
    end = 0
    for line in log:
        if is_wanted(_decode(line)):
            offsets.append(end)
        end += len(line)
    return offsets[0] if offsets else end


def _decode(line: bytes) -> str:
    return line.rstrip(b"\r\n").decode(errors="replace")
