"""The events of a run on the cluster, over all its jobs: runs/NAME/slurm/events.jsonl, and a line each in the log."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from pipeline.run_folder import SLURM, read_lines

log = logging.getLogger(__name__)

EVENTS = f"{SLURM}/events.jsonl"
"""The journal's path, relative to the run's folder."""
FAILURES = ("crash", "no progress")
"""The events that count towards cluster.max_restarts."""

Event = dict[str, Any]


class Journal:
    def __init__(self, folder: Path, job: str) -> None:
        """`folder`: the run's folder. `job`: the id of the SLURM job that writes."""
        self._path = folder / EVENTS
        self._job = job
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        line = {"time": time.time(), "job": self._job, "event": event, **fields}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        details = [f"{name} {_format_value(value)}" for name, value in fields.items()]
        log.info(f"{event}: {', '.join(details)}" if details else event)

    def of_this_job(self) -> list[Event]:
        """Returns the events that this job has written, also before SLURM restarted it."""
        # A full disk may have cut lines short.
        return [event for event in read_lines(self._path) if event["job"] == self._job]


def _format_value(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
