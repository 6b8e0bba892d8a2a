"""Register a version as one of several jobs does that end at the same time.

python -m tests.workers.register URI MODEL ENTRY START

Waits for the file START, so that all begin together.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.track import tracking_server
from pipeline.track.registry import registry
from tests.ranks import PATIENCE_S, Rank


def register_together(
    uri: str, model: str, entries: Sequence[Path], folder: Path, environment: Mapping[str, str]
) -> list[str]:
    """Registers each entry in a process of its own, all at the same moment; returns the versions of the entries."""
    begin = folder / "begin"
    logs = [folder / f"log-{number}" for number in range(len(entries))]
    jobs = [
        Rank("tests.workers.register", [uri, model, entry.absolute(), begin], environment, log)
        for entry, log in zip(entries, logs, strict=True)
    ]
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not all((entry / "ready").exists() for entry in entries):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        begin.touch()
        for job, log in zip(jobs, logs, strict=True):
            assert job.wait(PATIENCE_S) == 0, log.with_suffix(".err").read_text()[-3000:]
    finally:
        for job in jobs:
            job.kill()
    return [json.loads(log.with_suffix(".out").read_text())["uri"] for log in logs]


def main() -> None:
    uri, model, entry, start = sys.argv[1:]
    client = tracking_server.connect(uri)
    experiment = client.get_experiment_by_name("shared")
    assert experiment
    Path(entry, "ready").touch()
    while not Path(start).exists():
        time.sleep(0.01)
    version = registry.register(client, model, Path(entry), experiment_id=experiment.experiment_id, run_id=None)
    print(json.dumps({"uri": version}), flush=True)


if __name__ == "__main__":
    main()
