"""The samples that a run has found damaged, in runs/NAME/quarantine.jsonl: one line each, shared by all ranks.

A sample is identified by the data set's digest, its shard's number and its row. Lines are only ever appended. They
report, and count towards data.max_bad_fraction; what is fed never depends on them.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import ExternalError
from pipeline.shards.index import ShardSet


class TooManyBadSamplesError(ExternalError):
    """More of a data set is damaged than data.max_bad_fraction allows."""


class Quarantine:
    """Damaged samples of one data set. Without a path they are remembered by this process alone."""

    def __init__(self, shards: ShardSet, path: Path | None = None, max_fraction: float = 1.0) -> None:
        self._shards, self._path = shards, path
        self._limit = int(max_fraction * len(shards))
        self._found = {(line["shard"], line["row"]): line for line in self._lines()}
        self._lock = threading.Lock()  # several threads read samples

    def holds(self, shard: int, row: int) -> bool:
        """Returns whether a sample has been found damaged before."""
        return (shard, row) in self._found

    def add(self, shard: int, row: int, reason: str) -> None:
        """Records a damaged sample, once.

        Raises TooManyBadSamplesError, which lists them, above the allowed fraction.
        """
        with self._lock:
            if not self.holds(shard, row):
                self._record(shard, row, reason)
            if len(self._found) > self._limit:
                raise TooManyBadSamplesError(self._report())

    def _record(self, shard: int, row: int, reason: str) -> None:
        line = {
            "data": self._shards.digest,
            "shard": shard,
            "row": row,
            "tar": self._shards.url(shard),
            "key": self._shards.key(shard, row),
            "reason": reason,
        }
        self._found[shard, row] = line
        print(f"skipped: {line['tar']}: sample {line['key']!r}: {reason}", file=sys.stderr, flush=True)
        try:
            self._append(line)
        except OSError as error:  # a full disk ends no run; whoever meets the sample finds it damaged again
            print(f"{self._path}: {error}: known to this process alone", file=sys.stderr, flush=True)

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Other ranks write here too. What they have found counts towards the limit.
        with files.locked(self._path), self._path.open("a") as file:
            others = {(found["shard"], found["row"]): found for found in self._lines()}
            if (line["shard"], line["row"]) not in others:
                file.write(json.dumps(line) + "\n")
            self._found |= others

    def _lines(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        lines = []
        for text in self._path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # a process ended in the middle of writing it
                continue
        return [line for line in lines if isinstance(line, dict) and line.get("data") == self._shards.digest]

    def _report(self) -> str:
        found = list(self._found.values())
        shown = [f"  {line['tar']}: {line['key']}: {line['reason']}" for line in found[:20]]
        more = [f"  and {len(found) - 20} more in {self._path}"] if len(found) > 20 else []
        return "\n".join(
            [
                f"{len(found)} of {len(self._shards)} samples are damaged, more than data.max_bad_fraction allows "
                f"({self._limit}): restore them from their source, or raise the limit to train without them",
                *shown,
                *more,
            ]
        )
