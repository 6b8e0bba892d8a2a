"""Lists samples and images that cannot be used, and why: on standard error, in the JSON result and in skipped.jsonl."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import files
from pipeline.redact import printable

log = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
SHOWN = 10
"""The number of faults that a message lists; a file or the JSON result lists all."""


class SampleFault(NamedTuple):
    """Something wrong in a shard: with one sample, or with the whole file where `key` is None."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        if self.key is None:
            return printable(f"{self.shard}: {self.reason}")
        # repr, because a name in a foreign tar may hold anything.
        return printable(f"{self.shard}: {self.key!r}: {self.reason}")


class BadSource(NamedTuple):
    """An image that could not be packed."""

    path: str
    key: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


def first_few(faults: Sequence[SampleFault | BadSource]) -> str:
    """Returns the first faults, one a line, and the number of others."""
    lines = [f"  {fault}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  … and {len(faults) - SHOWN} more")
    return "\n".join(lines)


def write_faults(path: Path, faults: Iterable[SampleFault | BadSource]) -> None:
    """Lists the faults in a file, one JSON object a line."""
    lines = [json.dumps(fault._asdict()) + "\n" for fault in faults]
    files.write(path, "".join(lines).encode())


def write_skipped(folder: Path, faults: Sequence[SampleFault | BadSource]) -> None:
    """Lists in FOLDER/skipped.jsonl what was skipped. Without faults there is no such file afterwards."""
    path = folder / SKIPPED
    path.unlink(missing_ok=True)
    if faults:
        write_faults(path, faults)
        log.warning(f"skipped {len(faults)}, listed in {SKIPPED}")


def read_skipped(folder: Path) -> list[dict[str, str | None]]:
    """Returns the entries that `write_skipped` has listed; none where there is no such file."""
    path = folder / SKIPPED
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
