"""Records the load of a node's cores, memory, disk, network and GPUs while a job runs.

    MLflow's monitors ──every interval──▶ runs/NAME/system/node-K.jsonl ──Mirror──▶ system/node-K/NAME

A line has 0.4 kB and, for each GPU, 0.2 kB more: 3 MB a day at ten seconds, 17 MB with eight GPUs.
"""

import contextlib
import importlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FIRST_AFTER_S = 1.0
"""Seconds to the first reading, so that short runs have one, too."""


class SystemLoad:
    """A context in which a thread writes a line soon after the start, one each interval, and one at the end.

    One process of each node uses it. A monitor that fails is dropped, and a line that does not fit on the disk is lost:
    each is reported once and does not end the job.
    """

    def __init__(self, folder: Path, node: int, interval_s: float = 10.0) -> None:
        """`folder`: the run's folder. `node`: the node's number."""
        self._path = folder / "system" / f"node-{node}.jsonl"
        self._node = node
        self._interval_s = interval_s
        self._over = threading.Event()
        self._reported: set[str] = set()
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
            self._report_once(f"not recorded: {error}")
            return
        # The use of cores is measured since the previous reading, so the first one only starts that measurement.
        self._sample(monitors)
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
                self._report_once(f"{type(monitor).__name__} has failed and is no longer read: {error}")
        # The first reading reports a sensor that a GPU lacks. MLflow would repeat that at every reading.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        return metrics

    def _write(self, metrics: dict[str, float]) -> None:
        line: dict[str, Any] = {"time": time.time(), "node": self._node, **metrics}
        try:
            with self._path.open("ab", buffering=0) as file:
                data = json.dumps(line).encode() + b"\n"
                size = file.tell()
                # On a full disk only the beginning of a line may be written.
                if file.write(data) < len(data):
                    file.truncate(size)
                    raise OSError("no room for the line")
        except OSError as error:
            self._report_once(f"{self._path}: {error}: lines are lost")

    def _report_once(self, message: str) -> None:
        if message not in self._reported:
            self._reported.add(message)
            log.warning(f"system load of node {self._node}: {message}")


def _monitors() -> list[Any]:
    # Importing this module sets the variables that MLflow reads when it is imported.
    importlib.import_module("pipeline.track.tracking_server")
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [
        CPUMonitor(),
        DiskMonitor(),
        NetworkMonitor(),
    ]
    # The monitor raises on a machine without GPUs.
    with contextlib.suppress(ImportError, RuntimeError):
        monitors.append(GPUMonitor())
    return monitors


def _drop_torn_line(path: Path, longest: int = 1 << 16) -> None:
    """Removes the incomplete last line that a process leaves which is killed while it writes."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        begin = file.seek(max(0, end - longest))
        tail = file.read(end - begin)
        complete = begin + tail.rfind(b"\n") + 1
        if complete < end:
            file.truncate(complete)
