"""Runs paths (paths.py) on the fake runtime, in processes that know no other."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.ranks import PATIENCE_S, ROOT, free_port


def run(variables: Mapping[str, str], paths: Sequence[str], *, ranks: int = 1) -> list[dict[str, Any]]:
    """What rank 0 printed for each path. `variables` are those that `build` gave.

    Raises RuntimeError with what a rank said that failed.
    """
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if ranks > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {**address, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "FAKE_GPUS": "8"}
    command = [sys.executable, "-m", "tests.fakecuda.paths", *paths]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment | place, stdout=out, stderr=err))
        try:
            for process, log in zip(processes, logs, strict=True):
                if process.wait(PATIENCE_S * len(paths)):
                    raise RuntimeError(f"{log.name}: {log.with_suffix('.err').read_text()[-6000:]}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        lines = logs[0].with_suffix(".out").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]
