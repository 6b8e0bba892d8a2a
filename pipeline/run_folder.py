"""Reads the files of a run's folder, which a job may be writing and a crash may have cut short.

    run.json config.yaml result.json … ──document──▶ mapping
    metrics.jsonl … ──lines──▶ mappings ──▶ readings and evaluations
    checkpoints/step-N/COMMIT.json ──▶ committed checkpoints

A file that is missing is empty. One that cannot be read costs what it would have said, and is named among the faults.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Length, read_json

Document = dict[str, Any]

RECORD = "run.json"
CONFIG = "config.yaml"
REPORT = "report.html"
RESULT = "result.json"
GOODPUT = "goodput.json"
METRICS = "metrics.jsonl"
SLURM = "slurm"
CHECKPOINTS = "checkpoints"
COMMIT = "COMMIT.json"
"""The file of a checkpoint that is written last: a checkpoint with it counts."""


class RunFolder:
    """One run's folder. `faults` lists what could not be read, each with the file's name below the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[str] = []

    def text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.faults.append(f"{name}: cannot be read: {error.strerror}")
            return ""

    def document(self, name: str) -> Document:
        """Returns the mapping in a JSON or YAML file."""
        is_json = name.endswith(".json")
        text = self.text(name)
        tree = _parse(text, json.loads if is_json else yaml.safe_load) if text else {}
        if not isinstance(tree, dict):
            self.faults.append(f"{name}: is not a {'JSON object' if is_json else 'mapping in YAML'}")
        return as_mapping(tree)

    def lines(self, name: str) -> list[Document]:
        """Returns the JSON objects in a file, one a line."""
        documents, bad = parse_lines(self.text(name))
        if bad:
            count = "1 line" if len(bad) == 1 else f"{len(bad)} lines"
            self.faults.append(f"{name}: {count} cannot be read, the first is line {bad[0]}")
        return documents

    def metrics(self) -> tuple[list[Document], list[Document]]:
        """Returns the readings of training and the evaluations, those of them that have a step."""
        readings = []
        evaluations = []
        for line in self.lines(METRICS):
            step = as_number(line.get("step"))
            if step is not None and 0 <= step < 1e15:
                (readings if is_reading(line) else evaluations).append(line)
        return readings, evaluations

    def checkpoints(self) -> dict[int, Path]:
        """Returns the committed checkpoints by step, in order. Their bytes are not compared."""
        return committed_checkpoints(self.path / CHECKPOINTS)

    def total_steps(self) -> int | None:
        """Returns train.length in steps. A length in epochs is known once the run has recorded the size of its data."""
        config = self.document(CONFIG) or self.document(f"{SLURM}/{CONFIG}")
        train = as_mapping(config.get("train"))
        batch_size = as_number(train.get("global_batch_size"))
        samples = 0.0
        for data in as_mappings(self.document(RECORD).get("inputs")):
            if data.get("context") == "training":
                samples += as_number(data.get("samples")) or 0
        try:
            length = Length.parse(train.get("length"))
        except ValueError:
            return None
        if not batch_size or (length.unit == "epochs" and not samples):
            return None
        return length.steps(steps_per_epoch=int(samples // batch_size), global_batch_size=int(batch_size))


def finished_result(folder: Path) -> Document | None:
    """Returns the result of the run in `folder`; None for one that has not ended, or was stopped and goes on later.

    Raises InputError for a file that cannot be read.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    result = read_json(Document, path)
    return None if result.get("requeue") else result


def committed_checkpoints(folder: Path) -> dict[int, Path]:
    """Returns the committed checkpoints in a run's folder of checkpoints by step, in order."""
    found = {}
    for commit in folder.glob(f"step-*/{COMMIT}"):
        digits = commit.parent.name.removeprefix("step-")
        if digits.isdecimal():
            found[int(digits)] = commit.parent
    return dict(sorted(found.items()))


def is_reading(line: Document) -> bool:
    """Whether a line of metrics.jsonl is a reading of training, and not an evaluation."""
    return "loss" in line


def parse_lines(text: str) -> tuple[list[Document], list[int]]:
    """Returns the JSON objects in a text, one a line, and the numbers of the lines from 1 that are none.

    A last line without its end is still being written, or was when its process was killed: it is not counted.
    """
    documents = []
    bad = []
    *complete, last = text.split("\n")
    for number, line in enumerate([*complete, last], 1):
        document = _parse(line, json.loads)
        if isinstance(document, dict):
            documents.append(document)
        elif line.strip() and number <= len(complete):
            bad.append(number)
    return documents, bad


def read_lines(path: Path) -> list[Document]:
    """Returns the JSON objects in a file, one a line, without lines that were cut short. Raises OSError."""
    return parse_lines(path.read_text(errors="replace"))[0] if path.exists() else []


def as_number(value: Any) -> float | None:
    """Returns a finite number as it is, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def as_mapping(value: Any) -> Document:
    """Returns a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_mappings(value: Any) -> list[Document]:
    """Returns the mappings in a list; none for anything else."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _parse(text: str, parse: Callable[[str], Any]) -> Any:
    """Returns a text's tree; None where it has none."""
    try:
        return parse(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return None
