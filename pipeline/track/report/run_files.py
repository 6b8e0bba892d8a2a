"""What a run's folder holds, read so that nothing in it can be in the way: a file that is missing, cut short or strange
costs what it would have told, and is named.

    run.json config.yaml result.json goodput.json ─┐
    metrics.jsonl ──▶ Curve by name                ├──▶ RunFiles
    anomalies.jsonl quarantine.jsonl system/       │
    checkpoints/ versions/ handoff/ data/ ─────────┘
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterable, Iterator
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

_SILENT_S = 120.0
"""A run that says it is running and has written nothing for this long, and ten times what is usual, may be dead."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A number over steps, times or both. Values are nan where they were not finite or not there."""

    steps: Array
    times: Array
    values: Array

    @property
    def finite(self) -> "Curve":
        keep = np.isfinite(self.values) & np.isfinite(self.steps)
        return Curve(self.steps[keep], self.times[keep], self.values[keep])

    @property
    def last(self) -> float | None:
        values = self.finite.values
        return float(values[-1]) if len(values) else None

    def best(self, *, lowest: bool) -> tuple[float, float] | None:
        """Value and its step; the first of equals."""
        curve = self.finite
        if not len(curve.values):
            return None
        place = int(curve.values.argmin() if lowest else curve.values.argmax())
        return float(curve.values[place]), float(curve.steps[place])


@dataclasses.dataclass(frozen=True)
class RunVersion:
    """One that the run has offered for registration."""

    step: int
    uri: str | None  # None while it waits
    metrics: dict[str, float | None]
    sha256: str
    """Of the weights; empty where it is not known."""


@dataclasses.dataclass(frozen=True)
class HandedOffRun:
    """A job that the run hands off to."""

    claim: Document
    status: str
    result: Document


class RunFiles:
    """One run's. `faults` names what could not be read. What must not be logged is masked in all of it."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for a folder that holds no run."""
        self.folder = folder
        self.faults: list[str] = []
        known = ("run.json", "config.yaml", "metrics.jsonl", "checkpoints")
        if not any((folder / name).exists() for name in known):
            found = "no such folder" if not folder.is_dir() else f"holds none of {', '.join(known)}"
            raise InputError(f"{folder}: {found}: give the folder of a run, such as runs/NAME")
        self.record = self._document("run.json")
        self.result = self._document("result.json")
        self.goodput = self._document("goodput.json")
        self.deepspeed = self._document("deepspeed.json")
        self.profile = self._document("profile/profile.json")
        self.config = self._config()
        self.packages = [redact(line) for line in self._text("packages.txt").splitlines()]
        readings, evaluations = self._metrics()
        self.training, self.validation = _curves(readings), _curves(evaluations)
        self.anomalies = [redact(_counted(line)) for line in self._lines("anomalies.jsonl") if "step" in line]
        self.quarantine = [redact(line) for line in self._lines("quarantine.jsonl")]
        self.system = {
            path.stem: list(self._lines(f"system/{path.name}")) for path in self._glob("system/node-*.jsonl")
        }
        self.checkpoints = self._checkpoints()
        self.versions = self._versions()
        self.children = self._children()
        self.read_at = time.time()

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.get("run", "name") or self.folder.absolute().name)

    @property
    def tags(self) -> Document:
        return mapping(self.record.get("tags"))

    @property
    def main_metric(self) -> str:
        """Without a record: top1 if it was measured, or whatever was first."""
        metrics = [name for name in self.validation if name not in ("val_loss", "bad_samples")]
        return str(self.tags.get("main_metric") or ("top1" if "top1" in metrics else next(iter(metrics), "top1")))

    @property
    def inputs(self) -> list[Document]:
        inputs = self.record.get("inputs")
        return [each for each in inputs if isinstance(each, dict)] if isinstance(inputs, list) else []

    @functools.cached_property
    def rollbacks(self) -> list[int]:
        """Steps after which the run went back, as the newest checkpoint knows them."""
        for folder in reversed(list(self.checkpoints.values())):
            try:
                steps = json.loads((folder / "state.json").read_bytes())["state"]["guard"]["rollback_steps"]
                return [int(step) for step in steps]
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return []

    def get(self, section: str, key: str) -> Any:
        """A setting; None where there is none."""
        return mapping(self.config.get(section)).get(key)

    @functools.cached_property
    def began(self) -> float | None:
        began_ms = as_number(self.record.get("began_ms"))
        times = [as_number(self.goodput.get("began")), began_ms / 1000, *self._times[:1]]
        return min((each for each in times if math.isfinite(each)), default=None)

    @functools.cached_property
    def last_sign(self) -> float | None:
        """When the run last wrote something that says when."""
        ended_ms = as_number(self.record.get("ended_ms"))
        system = [as_number(lines[-1].get("time")) for lines in self.system.values() if lines]
        times = [as_number(self.goodput.get("last")), ended_ms / 1000, *self._times[-1:], *system]
        return max((each for each in times if math.isfinite(each)), default=self.began)

    @property
    def steps_done(self) -> int | None:
        told = [as_number(self.result.get("steps")), as_number(self.goodput.get("step"))]
        steps = [*self.training_steps[-1:], *self.checkpoints, *told]
        return max((int(step) for step in steps if math.isfinite(step)), default=None)

    @property
    def training_steps(self) -> Array:
        return self.training["loss"].steps if "loss" in self.training else np.empty(0)

    @property
    def status(self) -> str:
        """As recorded; SILENT for one that is recorded as running and has not been heard of for long."""
        status = str(self.record.get("status") or "UNKNOWN")
        if status == "RUNNING" and (sign := self.last_sign) is not None:
            usual_s = float(np.median(np.diff(self._times))) if len(self._times) > 2 else 0.0
            if self.read_at - sign > max(_SILENT_S, 10 * usual_s):
                return "SILENT"
        return status

    @property
    def starts(self) -> list[float]:
        """When processes began, the first one first.

        goodput.json counts the restarts. Where it does not say when they were, they are taken to be at the longest
        pauses between two readings that the steps in between do not explain.
        """
        told = self.goodput.get("starts")
        if isinstance(told, list) and told:
            return [start for start in map(as_number, told) if math.isfinite(start)]
        count = as_number(self.goodput.get("restarts"))
        first = [] if self.began is None else [self.began]
        if not count >= 1 or "step_s" not in self.training:
            return first
        curve = self.training["step_s"]
        busy_s = np.nan_to_num(curve.values[1:] * np.diff(curve.steps))
        pauses = np.nan_to_num(np.diff(curve.times) - busy_s)
        longest = np.sort(np.argsort(-pauses, kind="stable")[: int(min(count, 1000))])
        # Such a pause ends with a start-up, of which the mean is known.
        start_up_s = as_number(mapping(self.goodput.get("seconds")).get("start_up")) / (count + 1)
        begun = np.maximum(curve.times[1:] - busy_s - np.nan_to_num(start_up_s), curve.times[:-1])[longest]
        return [*first, *begun.tolist()]

    def time_of(self, step: float) -> float | None:
        """About when a step was taken: between the readings around it."""
        steps, times = self._clock
        return float(np.interp(step, steps, times)) if len(steps) else None

    @functools.cached_property
    def _clock(self) -> tuple[Array, Array]:
        """Steps and when they were taken, the start among them; empty where that is not known."""
        curve = self.training.get("loss")
        if curve is None or self.began is None:
            return np.empty(0), np.empty(0)
        known = np.isfinite(curve.times)
        return np.array([0.0, *curve.steps[known]]), np.array([self.began, *curve.times[known]])

    @functools.cached_property
    def _times(self) -> Array:
        times = self.training["loss"].times if "loss" in self.training else np.empty(0)
        return times[np.isfinite(times)]

    def _fault(self, name: str, what: str) -> None:
        self.faults.append(f"{name}: {what}")

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self._fault(name, f"cannot be read: {error.strerror}")
            return ""

    def _document(self, name: str) -> Document:
        text = self._text(name)
        try:
            document = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            self._fault(name, "is not a JSON object")
            return {}
        return redact(document)

    def _config(self) -> Document:
        try:
            tree = yaml.safe_load(self._text("config.yaml")) or {}
        except (yaml.YAMLError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            self._fault("config.yaml", "is not a mapping in YAML")
            return {}
        return redact(tree)

    def _lines(self, name: str) -> Iterator[Document]:
        """The JSON objects of a file. A last line without its end is being written and is no fault."""
        bad = 0
        lines = self._text(name).split("\n")
        for place, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except (ValueError, RecursionError):
                bad += place < len(lines) - 1
                continue
            if isinstance(document, dict):
                yield document
            else:
                bad += 1
        if bad:
            self._fault(name, f"{bad} line{'s' if bad > 1 else ''} cannot be read")

    def _metrics(self) -> tuple[list[Document], list[Document]]:
        readings, evaluations = [], []
        for line in self._lines("metrics.jsonl"):
            if math.isfinite(as_number(line.get("step"))):
                (readings if "loss" in line else evaluations).append(line)
        return readings, evaluations

    def _glob(self, pattern: str) -> list[Path]:
        try:
            return sorted(self.folder.glob(pattern))
        except OSError as error:
            self._fault(pattern, f"cannot be read: {error.strerror}")
            return []

    def _checkpoints(self) -> dict[int, Path]:
        """Committed ones, by step."""
        whole = [path.parent for path in self._glob("checkpoints/step-*/COMMIT.json")]
        names = [(path.name.removeprefix("step-"), path) for path in whole]
        return dict(sorted((int(step), path) for step, path in names if step.isdecimal()))

    def _versions(self) -> list[RunVersion]:
        versions = []
        for path in self._glob("versions/step-*/model.json"):
            name = path.parent.relative_to(self.folder)
            card, registered = self._document(f"{name}/model.json"), self._document(f"{name}/registered.json")
            step = as_number(path.parent.name.split("-")[1])
            metrics = {key: as_number(value) for key, value in mapping(card.get("metrics")).items()}
            if math.isfinite(step) and not is_given_up(path.parent):
                uri = registered.get("uri")
                digest = str(mapping(card.get("sha256")).get("model.safetensors") or "")
                versions.append(RunVersion(int(step), uri if isinstance(uri, str) else None, {**metrics}, digest))
        return sorted(versions, key=lambda version: version.step)

    def _children(self) -> list[HandedOffRun]:
        children = []
        for path in self._glob("handoff/*.json"):
            claim = self._document(f"handoff/{path.name}")
            name = str(claim.get("name") or "")
            # Runs may have been moved together: beside this one first.
            for folder in (self.folder.absolute().parent / name, Path(str(claim.get("root") or "")) / name):
                record = _quiet(folder / "run.json") if name else {}
                if record.get("uuid") == claim.get("uuid") and record:
                    children.append(HandedOffRun(claim, str(record.get("status")), _quiet(folder / "result.json")))
                    break
            else:
                children.append(HandedOffRun(claim, "not found here", {}))
        return children


def as_number(value: Any) -> float:
    """nan for what is none."""
    if isinstance(value, str):
        value = int(value) if value.isdecimal() and len(value) < 16 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _curves(lines: list[Document]) -> dict[str, Curve]:
    """By name, in the order in which they first appear."""
    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "time"))
    steps, times = _column(lines, "step"), _column(lines, "time")
    return {name: Curve(steps, times, _column(lines, name)) for name in names}


def _column(lines: Iterable[Document], name: str) -> Array:
    values = [line.get(name) for line in lines]
    try:
        column = np.array(values, np.float64)  # None becomes nan
    except (ValueError, TypeError, OverflowError):
        column = np.array([as_number(value) for value in values], np.float64)
    return np.where(np.isfinite(column), column, np.nan)


def _counted(anomaly: Document) -> Document:
    """With the number of its samples in place of their keys, of which a large batch has thousands."""
    samples = anomaly.get("samples")
    return {**anomaly, "samples": len(samples) if isinstance(samples, list) else None}


def mapping(value: Any) -> Document:
    """Empty for what is none."""
    return value if isinstance(value, dict) else {}


def _quiet(path: Path) -> Document:
    """Of another run, whose faults are not this one's to tell."""
    try:
        return mapping(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}
