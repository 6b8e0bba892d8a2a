"""The load of a node's cores, memory, disk, network and GPUs while a job runs.

    MLflow's monitors ──every interval──▶ runs/NAME/system/node-K.jsonl ──Mirror──▶ system/node-K/NAME

A line has 0.4 kB and, for each GPU, 0.2 kB more: 3 MB a day at ten seconds, 17 MB with eight GPUs.
"""

import contextlib
import importlib
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

FIRST_AFTER_S = 1.0


class SystemLoad:
    """While it is entered, a thread writes a line soon after the start, one each interval, and one at the end.

    For one process of each node. A monitor that fails is left out from there on and a line that finds no room is lost:
    each is said once and ends nothing.
    """

    def __init__(self, folder: Path, node: int, interval_s: float = 10.0) -> None:
        """`folder`: the run's. `node`: the node's number."""
        self._path = folder / "system" / f"node-{node}.jsonl"
        self._node, self._interval_s = node, interval_s
        self._over = threading.Event()
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="system load", daemon=True)

    def __enter__(self) -> "SystemLoad":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(timeout=10.0)

    def _work(self) -> None:
        try:
            monitors = _monitors()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self._path)
        except Exception as error:
            self._say_once(f"not recorded: {error}")
            return
        self._sample(monitors)  # the use of cores is counted from the reading before
        wait_s = min(FIRST_AFTER_S, self._interval_s)
        while True:
            over = self._over.wait(wait_s)
            self._write(self._sample(monitors))
            if over:
                return
            wait_s = self._interval_s

    def _sample(self, monitors: list[Any]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for monitor in list(monitors):
            try:
                monitor.collect_metrics()
                metrics |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            except Exception as error:
                monitors.remove(monitor)
                self._say_once(f"{type(monitor).__name__} has failed and is left out: {error}")
        # A sensor that a GPU lacks is named by the first reading; MLflow would name it in each.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        return metrics

    def _write(self, metrics: dict[str, float]) -> None:
        line: dict[str, Any] = {"time": time.time(), "node": self._node, **metrics}
        try:
            with self._path.open("ab", buffering=0) as file:
                data = json.dumps(line).encode() + b"\n"
                size = file.tell()
                if file.write(data) < len(data):
                    file.truncate(size)
                    raise OSError("no room for the line")
        except OSError as error:
            self._say_once(f"{self._path}: {error}: lines are lost")

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            print(f"system load of node {self._node}: {message}", file=sys.stderr, flush=True)


def _monitors() -> list[Any]:
    importlib.import_module("pipeline.track.tracking_server")  # sets what MLflow reads when it is imported
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # a machine without GPUs
        monitors.append(GPUMonitor())
    return monitors


def _drop_torn_line(path: Path, longest: int = 1 << 16) -> None:
    """Remove what a process that was killed in the middle of a line has left."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        begin = file.seek(max(0, end - longest))
        if (whole := begin + file.read(end - begin).rfind(b"\n") + 1) < end:
            file.truncate(whole)
