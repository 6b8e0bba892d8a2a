"""What cannot be used, and why: for standard error, the JSON result and skipped.jsonl."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import files
from pipeline.redact import printable

SKIPPED = "skipped.jsonl"
SHOWN = 10
"""Faults told in a message; a file or the JSON result lists all."""


class SampleFault(NamedTuple):
    """Something wrong in a shard: with one sample, or with the whole file where `key` is None."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        # repr, because a name in a foreign tar may hold anything.
        return printable(f"{self.shard}: {'' if self.key is None else f'{self.key!r}: '}{self.reason}")


class BadSource(NamedTuple):
    """An image that could not be packed."""

    path: str
    key: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}")


def first_few(faults: Sequence[SampleFault | BadSource]) -> str:
    """The first of them, a line each."""
    lines = [f"  {fault}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  … and {len(faults) - SHOWN} more")
    return "\n".join(lines)


def write_faults(path: Path, faults: Iterable[SampleFault | BadSource]) -> None:
    """List them in a file, one JSON object a line."""
    files.write(path, "".join(json.dumps(fault._asdict()) + "\n" for fault in faults).encode())


def write_skipped(folder: Path, faults: Sequence[SampleFault | BadSource]) -> None:
    """List in FOLDER/skipped.jsonl what was left out; without faults there is no such file."""
    (folder / SKIPPED).unlink(missing_ok=True)
    if faults:
        write_faults(folder / SKIPPED, faults)
        print(f"left out {len(faults)}, listed in {SKIPPED}", file=sys.stderr)


def read_skipped(folder: Path) -> list[dict[str, str | None]]:
    """What `write_skipped` has listed, a mapping each."""
    path = folder / SKIPPED
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
