"""The files of a run to which lines are appended, and the metric points that their lines stand for.

metrics.jsonl         {"step", "time", "loss", …}      ──▶ train/NAME at the step
                      {"step", "time", "val_loss", …}  ──▶ val/NAME at the step
system/node-K.jsonl   {"time", "node", …}              ──▶ system/node-K/NAME at the line's number
"""

import hashlib
import json
import logging
import math
from pathlib import Path

from mlflow.entities import Metric

from pipeline.run_folder import METRICS, is_reading

log = logging.getLogger(__name__)


def list_line_files(folder: Path) -> list[Path]:
    """Returns the files of lines in a run's folder."""
    system = sorted(folder.glob("system/node-*.jsonl"))
    metrics = folder / METRICS
    return [metrics, *system] if metrics.exists() else system


def prefixes_of(path: Path) -> tuple[str, ...]:
    """Returns how the names of a file's points begin."""
    if path.name == METRICS:
        return "train/", "val/"
    return (f"system/{path.stem}/",)


def parse_points(path: Path, number: int, line: bytes) -> list[Metric]:
    """Returns the points of a file's line. `number` counts the lines from 0."""
    try:
        document = json.loads(line)
    except ValueError:
        # A power cut can leave such a line.
        log.warning(f"{path}: line {number + 1} is no JSON and is skipped")
        return []
    time_ms = round(document.pop("time") * 1000)
    if path.name == METRICS:
        step = document.pop("step")
        prefix = "train/" if is_reading(document) else "val/"
    else:
        # MLflow's own monitor counts its samples in the same way.
        step = number
        document.pop("node")
        (prefix,) = prefixes_of(path)
    points = []
    for name, value in document.items():
        key = prefix + name.removeprefix("val_")
        # JSON has no NaN and no infinity: the files hold null instead.
        points.append(Metric(key, math.nan if value is None else value, time_ms, step))
    return points


def identity(point: Metric) -> tuple[str, int, int]:
    """Returns a key that is unique among a file's points: no two of its lines have the same step and time."""
    return point.key, point.step, point.timestamp


def count_unsent_bytes(path: Path, offset: int) -> int:
    """Returns the number of bytes of the complete lines after `offset`."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().rfind(b"\n") + 1


def digest_before(path: Path, offset: int, window: int = 4096) -> str:
    """Returns the SHA-256 of up to `window` bytes before `offset`; empty beyond the file's end."""
    if offset > path.stat().st_size:
        return ""
    with path.open("rb") as file:
        file.seek(max(0, offset - window))
        data = file.read(min(offset, window))
    return hashlib.sha256(data).hexdigest()
