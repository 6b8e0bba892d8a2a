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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import run_folder
from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.run_folder import Document, RunFolder, as_mapping, as_mappings
from pipeline.track.sync.outbox import is_given_up

Array = npt.NDArray[np.float64]

_MARKERS = (run_folder.RECORD, run_folder.CONFIG, run_folder.METRICS, run_folder.CHECKPOINTS)
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
        self._files = RunFolder(folder)
        self.faults = self._files.faults
        if not any((folder / name).exists() for name in _MARKERS):
            found = f"holds none of {', '.join(_MARKERS)}" if folder.is_dir() else "no such folder"
            raise InputError(f"{folder}: {found}: give the folder of a run, such as runs/NAME")
        self.record = self._read(run_folder.RECORD)
        self.result = self._read(run_folder.RESULT)
        self.goodput = self._read(run_folder.GOODPUT)
        self.profile = self._read("profile/profile.json")
        self.config = self._read(run_folder.CONFIG)
        self.texts = {name: redact(self._files.text(name)) for name in ("deepspeed.json", "packages.txt")}
        self.training, self.validation = map(_curves, self._files.metrics())
        self.anomalies = [redact(_count_samples(line)) for line in self._files.lines("anomalies.jsonl")]
        self.quarantine = [redact(line) for line in self._files.lines("quarantine.jsonl")]
        self.checkpoints = self._files.checkpoints()
        self.versions = self._read_versions()
        self.children = [self._read(f"handoff/{path.name}") for path in sorted(folder.glob("handoff/*.json"))]
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
        return as_mappings(self.record.get("inputs"))

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

    def _read(self, name: str) -> Document:
        return redact(self._files.document(name))

    def _read_versions(self) -> list[RunVersion]:
        versions = []
        for path in sorted(self.folder.glob("versions/step-*/model.json")):
            folder = path.parent.relative_to(self.folder)
            card, registered = self._read(f"{folder}/model.json"), self._read(f"{folder}/registered.json")
            step = path.parent.name.split("-")[1]
            if not step.isdecimal() or is_given_up(path.parent):
                continue
            metrics = {key: as_number(value) for key, value in as_mapping(card.get("metrics")).items()}
            uri = registered.get("uri")
            digest = str(as_mapping(card.get("sha256")).get("model.safetensors") or "")
            versions.append(RunVersion(int(step), uri if isinstance(uri, str) else None, metrics, digest))
        return versions


def as_number(value: Any) -> float:
    """Returns a finite number; nan for anything else."""
    number = run_folder.as_number(value)
    return math.nan if number is None else float(number)


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
