"""Averages over the steps since the last reading, and the listeners that log them: metrics.jsonl and terminal."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files

# Commands that only read metrics.jsonl do without torch, which takes seconds to import.
if TYPE_CHECKING:
    from pipeline.train.guard import Anomaly
    from pipeline.train.outcome import Outcome

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """What the model FLOPs utilisation (MFU) is computed from, see pipeline/flops.py."""

    training_flops: Callable[[int], int]
    """Returns the floating-point operations of one image, given its size in pixels."""
    flop_s: float
    """The peak rate of all ranks' devices together."""

    def mfu(self, images_per_second: float, image_size: int) -> float:
        return self.training_flops(image_size) * images_per_second / self.flop_s


class Meters:
    """Averages over the steps since the last reading."""

    def __init__(self, global_batch_size: int) -> None:
        self._global_batch_size = global_batch_size
        self._all_steps, self._all_s = 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._steps = self._applied = 0
        self._data_wait_s = self._loss_sum = 0.0

    def add(self, outcome: "Outcome", data_wait_s: float) -> None:
        self._steps += 1
        self._data_wait_s += data_wait_s
        # Without skipped steps, whose loss need not be finite: one such would make the mean not finite.
        if outcome.applied:
            self._applied += 1
            self._loss_sum += outcome.loss
        self._last = outcome

    def read(self) -> dict[str, float]:
        """Returns the means since the last reading, and starts afresh.

        "loss" is the mean over the steps that were applied, if any, and "grad_norm" that of the last step.
        """
        elapsed_s = time.perf_counter() - self._began
        self._all_steps += self._steps
        self._all_s += elapsed_s
        step_s = elapsed_s / self._steps
        loss = self._loss_sum / self._applied if self._applied else self._last.loss
        reading = {
            "loss": loss,
            "grad_norm": self._last.grad_norm,
            "images_per_second": self._global_batch_size / step_s,
            "data_wait_s": self._data_wait_s / self._steps,
            "step_s": step_s,
        }
        self._reset()
        return reading

    def images_per_second(self) -> float | None:
        """Returns the mean over all readings; None before the first."""
        if not self._all_steps:
            return None
        return self._global_batch_size * self._all_steps / self._all_s

    def pause(self, seconds: float) -> None:
        """Does not count time that was spent on something other than training steps."""
        self._began += seconds


class JsonLines:
    """A file with one JSON document a line, each of which has a step. Lines for which a disk has no room are written
    later."""

    def __init__(self, path: Path, step: int) -> None:
        """Goes on after `step`. Lines of later steps, which a killed run left and this one repeats, are removed."""
        self._path = path
        self._unwritten: list[str] = []
        keep_up_to(path, step)

    def append(self, document: dict[str, Any]) -> None:
        self._unwritten.append(json.dumps(document) + "\n")
        try:
            append_whole(self._path, "".join(self._unwritten).encode())
        except OSError as error:
            if len(self._unwritten) == 1:
                log.warning(f"{self._path}: {error}; its lines are kept until they can be written")
            return
        self._unwritten.clear()


def append_whole(path: Path, data: bytes) -> None:
    """Appends all of the data or, if that raises OSError, nothing of it."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                # A disk that is nearly full takes a part of the data.
                num_written = file.write(data)
                data = data[num_written:]
        except OSError:
            file.truncate(size)
            raise


class MetricsFile:
    """Writes metrics.jsonl: a line for each reading and each evaluation."""

    def __init__(self, path: Path, step: int) -> None:
        self._lines = JsonLines(path, step)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._append(step, metrics)

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._append(step, metrics)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        pass

    def _append(self, step: int, metrics: dict[str, float]) -> None:
        now = round(time.time(), 3)
        self._lines.append({"step": step, "time": now, **finite_or_none(metrics)})


class Anomalies:
    """Writes anomalies.jsonl: what the guard has found, with the batch's samples. Reports it on standard error, too."""

    def __init__(self, path: Path, step: int) -> None:
        self._lines = JsonLines(path, step)

    def write(self, anomaly: "Anomaly", keys: list[str]) -> None:
        step = anomaly.step + 1
        log.warning(f"step {step}: {anomaly.kind}: {anomaly.message}")
        self._lines.append({**dataclasses.asdict(anomaly), "step": step, "samples": keys})


def finite_or_none(metrics: dict[str, float]) -> dict[str, float | None]:
    """Returns the numbers with None for infinity and NaN, which JSON does not have."""
    document = {}
    for name, value in metrics.items():
        document[name] = value if math.isfinite(value) else None
    return document


def keep_up_to(path: Path, step: int) -> None:
    """Removes the lines of later steps, which a run that resumes writes again."""
    if not path.exists():
        return
    kept = [f"{line}\n" for line in path.read_text().splitlines() if _read_step(line) <= step]
    files.write(path, "".join(kept).encode())


def _read_step(line: str) -> float:
    """Returns a line's step; infinity for a line that was cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class Progress:
    """Prints one line for each reading to standard error, for a terminal and for a batch system's log file."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        left_s = round((self._total_steps - step) * metrics["step_s"])
        minutes, seconds = divmod(left_s, 60)
        hours, minutes = divmod(minutes, 60)
        waiting = metrics["data_wait_s"] / metrics["step_s"]
        texts = [
            f"epoch {metrics['epoch']:.2f}",
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['lr']:.3g}",
            f"grad {metrics['grad_norm']:.3g}",
            f"{metrics['images_per_second']:.0f} img/s",
            f"data wait {waiting:.0%}",
            f"left {hours}:{minutes:02d}:{seconds:02d}",
        ]
        self._print(step, "  ".join(texts))

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        texts = ["evaluation"]
        for name, value in metrics.items():
            texts.append(f"{name} {value:.4f}")
        self._print(step, "  ".join(texts))

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._print(step, f"checkpoint {folder}")

    def _print(self, step: int, text: str) -> None:
        log.info(f"step {step}/{self._total_steps}  {text}")
