"""Reads a run's folder. A file that is missing, cut short or malformed costs what it would have said, and is reported.

run.json config.yaml result.json goodput.json ─┐
metrics.jsonl ──▶ Curve by name                ├──▶ RunFiles
anomalies.jsonl quarantine.jsonl               │
checkpoints/ versions/ handoff/ ───────────────┘
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.track.sync.outbox import is_given_up

Array = npt.NDArray[np.float64]
Document = dict[str, Any]

_MARKERS = ("run.json", "config.yaml", "metrics.jsonl", "checkpoints")
"""A folder that has none of these holds no run."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A number over steps and times. Values are nan where they were not finite or missing."""

    steps: Array
    times: Array
    values: Array

    @property
    def last(self) -> float | None:
        """The last finite value."""
        values = self.values[np.isfinite(self.values)]
        return float(values[-1]) if len(values) else None

    def best(self, *, lowest: bool) -> tuple[float, float] | None:
        """Returns the best finite value and its step, the first of equals."""
        if self.last is None:
            return None
        index = int(np.nanargmin(self.values) if lowest else np.nanargmax(self.values))
        return float(self.values[index]), float(self.steps[index])


@dataclasses.dataclass(frozen=True)
class RunVersion:
    """A model version that the run has offered for registration."""

    step: int
    uri: str | None
    """None while the version waits."""
    metrics: dict[str, float]
    sha256: str
    """The digest of the weights; empty where it is not known."""


class RunFiles:
    """What one run's folder says, with secrets masked. `faults` lists what could not be read."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for a folder that holds no run."""
        self.folder = folder
        self.faults: list[str] = []
        if not any((folder / name).exists() for name in _MARKERS):
            found = f"holds none of {', '.join(_MARKERS)}" if folder.is_dir() else "no such folder"
            raise InputError(f"{folder}: {found}: give the folder of a run, such as runs/NAME")
        self.record = self._read_json("run.json")
        self.result = self._read_json("result.json")
        self.goodput = self._read_json("goodput.json")
        self.profile = self._read_json("profile/profile.json")
        self.config = self._read_mapping("config.yaml", yaml.safe_load, "is not a mapping in YAML")
        self.texts = {name: redact(self._read_text(name)) for name in ("deepspeed.json", "packages.txt")}
        self.training, self.validation = self._read_metrics()
        self.anomalies = [redact(_count_samples(line)) for line in self._read_lines("anomalies.jsonl")]
        self.quarantine = [redact(line) for line in self._read_lines("quarantine.jsonl")]
        self.checkpoints = self._find_checkpoints()
        self.versions = self._read_versions()
        self.children = [self._read_json(f"handoff/{path.name}") for path in self._glob("handoff/*.json")]
        self.read_at = time.time()

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.get("run", "name") or self.folder.absolute().name)

    @property
    def status(self) -> str:
        return str(self.record.get("status") or "UNKNOWN")

    @property
    def tags(self) -> Document:
        return as_mapping(self.record.get("tags"))

    @property
    def metrics(self) -> list[str]:
        """The names of what evaluations measure, but for the loss."""
        return [name for name in self.validation if name not in ("val_loss", "bad_samples")]

    @property
    def main_metric(self) -> str:
        """The recorded one; without a record top1 if it was measured, or the first metric."""
        guess = "top1" if "top1" in self.metrics else next(iter(self.metrics), "top1")
        return str(self.tags.get("main_metric") or guess)

    @property
    def inputs(self) -> list[Document]:
        inputs = self.record.get("inputs")
        return [each for each in inputs if isinstance(each, dict)] if isinstance(inputs, list) else []

    @functools.cached_property
    def rollbacks(self) -> list[int]:
        """The steps after which the run went back, as the newest readable checkpoint records them."""
        for folder in reversed(list(self.checkpoints.values())):
            try:
                steps = json.loads((folder / "state.json").read_bytes())["state"]["guard"]["rollback_steps"]
                return [int(step) for step in steps]
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return []

    def get(self, section: str, key: str) -> Any:
        """Returns a setting; None where there is none."""
        return as_mapping(self.config.get(section)).get(key)

    def curve(self, name: str) -> Curve | None:
        return self.training.get(name) or self.validation.get(name)

    def last(self, name: str) -> float | None:
        """Returns the last finite value of a curve; None where there is none."""
        curve = self.curve(name)
        return curve.last if curve else None

    @property
    def began(self) -> float | None:
        times = [as_number(self.goodput.get("began")), as_number(self.record.get("began_ms")) / 1000, *self._times]
        return min((each for each in times if math.isfinite(each)), default=None)

    @property
    def last_sign(self) -> float | None:
        """When the run last wrote something that has a time."""
        times = [as_number(self.goodput.get("last")), as_number(self.record.get("ended_ms")) / 1000, *self._times]
        return max((each for each in times if math.isfinite(each)), default=self.began)

    @property
    def steps_done(self) -> int | None:
        steps = [as_number(self.result.get("steps")), as_number(self.goodput.get("step")), *self.checkpoints]
        if "loss" in self.training:
            steps += self.training["loss"].steps[-1:].tolist()
        return max((int(step) for step in steps if math.isfinite(step)), default=None)

    @property
    def _times(self) -> list[float]:
        """When the first and the last reading were taken."""
        times = self.training["loss"].times if "loss" in self.training else np.empty(0)
        times = times[np.isfinite(times)]
        return [*times[:1], *times[-1:]]

    def _report(self, name: str, fault: str) -> None:
        self.faults.append(f"{name}: {fault}")

    def _read_text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self._report(name, f"cannot be read: {error.strerror}")
            return ""

    def _read_json(self, name: str) -> Document:
        return self._read_mapping(name, json.loads, "is not a JSON object")

    def _read_mapping(self, name: str, parse: Callable[[str], Any], fault: str) -> Document:
        text = self._read_text(name)
        try:
            tree = parse(text) if text else {}
        except (ValueError, yaml.YAMLError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            self._report(name, fault)
            return {}
        return redact(tree)

    def _read_lines(self, name: str) -> Iterator[Document]:
        """Yields the JSON objects of a file. A last line without its end is still being written and is no fault."""
        num_bad = 0
        *lines, last = self._read_text(name).split("\n")
        for line in [*lines, last]:
            try:
                document = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                document = None
            if isinstance(document, dict):
                yield document
            elif line.strip() and line is not last:
                num_bad += 1
        if num_bad:
            self._report(name, f"{num_bad} line{'s' if num_bad > 1 else ''} cannot be read")

    def _read_metrics(self) -> tuple[dict[str, Curve], dict[str, Curve]]:
        """Returns the curves of training and of evaluations."""
        readings, evaluations = [], []
        for line in self._read_lines("metrics.jsonl"):
            if 0 <= as_number(line.get("step")) < 1e15:
                (readings if "loss" in line else evaluations).append(line)
        return _curves(readings), _curves(evaluations)

    def _glob(self, pattern: str) -> list[Path]:
        try:
            return sorted(self.folder.glob(pattern))
        except OSError as error:
            self._report(pattern, f"cannot be read: {error.strerror}")
            return []

    def _find_checkpoints(self) -> dict[int, Path]:
        """Returns the committed checkpoints by their step, in order."""
        folders = [path.parent for path in self._glob("checkpoints/step-*/COMMIT.json")]
        steps = [as_number(folder.name.removeprefix("step-")) for folder in folders]
        return {int(step): folder for step, folder in zip(steps, folders, strict=True) if math.isfinite(step)}

    def _read_versions(self) -> list[RunVersion]:
        versions = []
        for path in self._glob("versions/step-*/model.json"):
            folder = path.parent.relative_to(self.folder)
            card, registered = self._read_json(f"{folder}/model.json"), self._read_json(f"{folder}/registered.json")
            step = as_number(path.parent.name.split("-")[1])
            if not math.isfinite(step) or is_given_up(path.parent):
                continue
            metrics = {key: as_number(value) for key, value in as_mapping(card.get("metrics")).items()}
            uri = registered.get("uri")
            digest = str(as_mapping(card.get("sha256")).get("model.safetensors") or "")
            versions.append(RunVersion(int(step), uri if isinstance(uri, str) else None, metrics, digest))
        return versions


def as_number(value: Any) -> float:
    """Returns a finite number, also one written as decimal digits; nan for anything else."""
    if isinstance(value, str):
        value = int(value) if value.isdecimal() and len(value) < 16 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def as_mapping(value: Any) -> Document:
    """Returns `value` if it is a mapping, and an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def _curves(lines: list[Document]) -> dict[str, Curve]:
    """Returns the curves by name, in the order in which the names first appear."""

    def column(name: str) -> Array:
        return np.array([as_number(line.get(name)) for line in lines], np.float64)

    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "time"))
    steps, times = column("step"), column("time")
    return {name: Curve(steps, times, column(name)) for name in names}


def _count_samples(anomaly: Document) -> Document:
    """Replaces the keys of the samples, of which a large batch has thousands, with their number."""
    samples = anomaly.get("samples")
    return {**anomaly, "samples": len(samples) if isinstance(samples, list) else 0}
