"""Register a version as one of several jobs does that end at the same time; see test_backends.py.

python -m tests.workers.register URI MODEL ENTRY START

Waits for the file START, so that all begin together.
"""

import json
import sys
import time
from pathlib import Path

from pipeline.track import tracking_server
from pipeline.track.registry import registry


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
