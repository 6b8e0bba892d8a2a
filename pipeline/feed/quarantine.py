"""Records the samples that a run has found damaged in runs/NAME/quarantine.jsonl: one line each, shared by all ranks.

A sample is identified by the data set's digest, its shard's number and its row. Lines are only ever appended. They
report damaged samples and count towards data.max_bad_fraction; what is fed never depends on them.
"""

import json
import logging
import threading
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import ExternalError
from pipeline.run_folder import read_lines
from pipeline.shards.index import SampleSource

log = logging.getLogger(__name__)

# The samples that an error lists.
_MAX_LISTED = 20


class TooManyBadSamplesError(ExternalError):
    """More of a data set is damaged than data.max_bad_fraction allows."""


class Quarantine:
    """Damaged samples of one data set. Without a path they are remembered by this process alone."""

    def __init__(
        self,
        shards: SampleSource,
        path: Path | None = None,
        max_fraction: float = 1.0,
    ) -> None:
        self._shards = shards
        self._path = path
        self._limit = int(max_fraction * len(shards))
        self._bad_samples = self._read_lines()
        # Several threads read samples.
        self._lock = threading.Lock()

    def holds(self, shard: int, row: int) -> bool:
        """Returns whether a sample has been found damaged before."""
        return (shard, row) in self._bad_samples

    def reason(self, shard: int, row: int) -> str | None:
        """Returns why a sample cannot be used; None for one that was not found damaged."""
        line = self._bad_samples.get((shard, row))
        return line["reason"] if line else None

    def add(self, shard: int, row: int, reason: str) -> None:
        """Records a damaged sample, once.

        Raises TooManyBadSamplesError, which lists all of them, above the allowed fraction.
        """
        with self._lock:
            if not self.holds(shard, row):
                self._record(shard, row, reason)
            if len(self._bad_samples) > self._limit:
                raise TooManyBadSamplesError(self._format_report())

    def _record(self, shard: int, row: int, reason: str) -> None:
        line = {
            "data": self._shards.digest,
            "shard": shard,
            "row": row,
            "tar": self._shards.url(shard),
            "key": self._shards.key(shard, row),
            "reason": reason,
        }
        self._bad_samples[shard, row] = line
        log.warning(f"skipped: {line['tar']}: sample {line['key']!r}: {reason}")
        try:
            self._append(line)
        except OSError as error:
            # A full disk ends no run: another process that reads the sample finds it damaged by itself.
            log.warning(f"{self._path}: {error}: known to this process alone")

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Other ranks write here too. What they have found counts towards the limit.
        with files.locked(self._path), self._path.open("a") as file:
            others = self._read_lines()
            if (line["shard"], line["row"]) not in others:
                file.write(json.dumps(line) + "\n")
            self._bad_samples |= others

    def _read_lines(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Returns the file's lines about this data set, by shard and row."""
        if self._path is None:
            return {}
        # A process may have ended while it was writing a line.
        of_this_set = [line for line in read_lines(self._path) if line.get("data") == self._shards.digest]
        return {(line["shard"], line["row"]): line for line in of_this_set}

    def _format_report(self) -> str:
        bad_samples = list(self._bad_samples.values())
        report = [
            f"{len(bad_samples)} of {len(self._shards)} samples are damaged, more than data.max_bad_fraction allows "
            f"({self._limit}): restore them from their source, or raise the limit to train without them"
        ]
        for line in bad_samples[:_MAX_LISTED]:
            report.append(f"  {line['tar']}: {line['key']}: {line['reason']}")
        if len(bad_samples) > _MAX_LISTED:
            report.append(f"  and {len(bad_samples) - _MAX_LISTED} more in {self._path}")
        return "\n".join(report)
