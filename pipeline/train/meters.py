"""Numbers of a stretch of steps, and the two listeners that write them down: metrics.jsonl and the terminal."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files

if TYPE_CHECKING:
    from pipeline.train.engine import Outcome  # whose torch and DeepSpeed commands that only read lines do without
    from pipeline.train.guard import Anomaly


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """What MFU is computed from, see pipeline/flops.py."""

    training_flops: Callable[[int], int]  # of one image, by its size in pixels
    flop_s: float  # of all ranks' devices together

    def mfu(self, images_per_second: float, image_size: int) -> float:
        return self.training_flops(image_size) * images_per_second / self.flop_s


class Meters:
    """Averages over the steps since the last reading."""

    def __init__(self, global_batch_size: int) -> None:
        self._global_batch_size = global_batch_size
        self._all_steps, self._all_s = 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self._began, self._steps, self._data_wait_s = time.perf_counter(), 0, 0.0
        self._applied, self._loss_sum = 0, 0.0

    def add(self, outcome: "Outcome", data_wait_s: float) -> None:
        self._steps += 1
        self._data_wait_s += data_wait_s
        if outcome.applied:  # a loss that is not finite would hide all others
            self._applied += 1
            self._loss_sum += outcome.loss
        self._last = outcome

    def read(self) -> dict[str, float]:
        """Means since the last reading (loss: over the steps that were applied, if any; grad_norm: of the last step),
        and a fresh start."""
        elapsed_s = time.perf_counter() - self._began
        self._all_steps, self._all_s = self._all_steps + self._steps, self._all_s + elapsed_s
        step_s = elapsed_s / self._steps
        reading = {
            "loss": self._loss_sum / self._applied if self._applied else self._last.loss,
            "grad_norm": self._last.grad_norm,
            "images_per_second": self._global_batch_size / step_s,
            "data_wait_s": self._data_wait_s / self._steps,
            "step_s": step_s,
        }
        self._reset()
        return reading

    def images_per_second(self) -> float | None:
        """Over all readings; None before the first."""
        return self._global_batch_size * self._all_steps / self._all_s if self._all_steps else None

    def pause(self, seconds: float) -> None:
        """Take time that was spent on something other than training steps off the current stretch."""
        self._began += seconds


class JsonLines:
    """A file with one JSON document a line, each of which has a step. It outlives a full disk: lines that find no room
    are written later."""

    def __init__(self, path: Path, step: int) -> None:
        """Go on after `step`. Lines of later steps, which a killed run left and this one repeats, are removed."""
        self._path = path
        self._unwritten: list[str] = []
        keep_up_to(path, step)

    def append(self, document: dict[str, Any]) -> None:
        self._unwritten.append(json.dumps(document) + "\n")
        try:
            append_whole(self._path, "".join(self._unwritten).encode())
        except OSError as error:
            if len(self._unwritten) == 1:
                print(f"{self._path}: {error}; its lines are kept until they can be written", file=sys.stderr)
            return
        self._unwritten.clear()


def append_whole(path: Path, data: bytes) -> None:
    """All of the data or, if that raises OSError, nothing of it."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


class MetricsFile:
    """metrics.jsonl: a line for each reading and each evaluation."""

    def __init__(self, path: Path, step: int) -> None:
        self._lines = JsonLines(path, step)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._append(step, metrics)

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._append(step, metrics)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        pass

    def _append(self, step: int, metrics: dict[str, float]) -> None:
        self._lines.append({"step": step, "time": round(time.time(), 3), **finite_or_none(metrics)})


class Anomalies:
    """anomalies.jsonl: what the guard found, with the batch's samples; said on standard error, too."""

    def __init__(self, path: Path, step: int) -> None:
        self._lines = JsonLines(path, step)

    def write(self, anomaly: "Anomaly", keys: list[str]) -> None:
        print(f"step {anomaly.step + 1}: {anomaly.kind}: {anomaly.message}", file=sys.stderr, flush=True)
        self._lines.append({**dataclasses.asdict(anomaly), "step": anomaly.step + 1, "samples": keys})


def finite_or_none(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity and no NaN; null stands for them."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def keep_up_to(path: Path, step: int) -> None:
    """Drop the lines of later steps, which a run that resumes writes again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        files.write(path, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut short
        return math.inf


class Progress:
    """One line a reading on standard error: readable in a terminal and in a batch system's log file."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        left_s = round((self._total_steps - step) * metrics["step_s"])
        waiting = metrics["data_wait_s"] / metrics["step_s"]
        self._print(
            f"step {step}/{self._total_steps}  epoch {metrics['epoch']:.2f}  loss {metrics['loss']:.4f}  "
            f"lr {metrics['lr']:.3g}  grad {metrics['grad_norm']:.3g}  {metrics['images_per_second']:.0f} img/s  "
            f"data wait {waiting:.0%}  left {left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}"
        )

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._print(f"step {step}/{self._total_steps}  evaluation  {numbers}")

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._print(f"step {step}/{self._total_steps}  checkpoint {folder}")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
