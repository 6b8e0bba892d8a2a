"""What a job notes about itself in its own folder, before anybody else hears of it.

    runs/NAME/run.json           who this run is, how it stands: written by the job alone
    runs/NAME/mlflow.json        what of the folder the tracking server has by now: written by Mirror alone
    runs/NAME/slurm/sweep.json   the sweep that it is one of, if any: written by launch/submit.py alone

The folder is complete without a server, and a server's copy can be made from it at any time. Knows no MLflow.
"""

import json
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline import files
from pipeline.config import read_json
from pipeline.errors import InputError
from pipeline.redact import redact

RECORD, SWEEP = "run.json", "slurm/sweep.json"
MAIN_METRIC, PARENT = "main_metric", "parent.version"
"""Tags that others than MLflow's users read."""

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class DataInput(BaseModel):
    """A data set that the run reads. Its manifest is copied to the run's folder as data/CONTEXT-N.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context: Literal["training", "validation"]
    path: str
    digest: str  # SHA-256
    samples: int
    classes: int
    manifest: str
    """Path of the copy, below the run's folder."""


class Sweep(BaseModel):
    """Runs that were submitted together and differ in some settings. MLflow shows them below one parent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uuid: str
    name: str
    set: dict[str, Any] = {}
    """The settings that this run differs from the others in, by key, such as optim.lr."""

    @classmethod
    def read(cls, folder: Path) -> "Sweep | None":
        """That of the run in `folder`; None if it is part of none. Raises InputError for a file that is none."""
        path = folder / SWEEP
        try:
            return read_json(cls, path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
        except InputError as error:
            raise InputError(f"{error}; it is not one that launch/submit.py has written") from None

    @property
    def tags(self) -> dict[str, str]:
        """sweep.KEY of each setting, written as in YAML."""
        written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.set.items()}
        return {f"sweep.{key}": value for key, value in written.items()}


class Record(BaseModel):
    """A run's identity and state. `uuid` exists before step 0 and is how a late server's copy is found again."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    uuid: str
    name: str
    status: Status = "RUNNING"
    began_ms: int
    ended_ms: int | None = None
    tags: dict[str, str] = {}
    inputs: list[DataInput] = []
    sweep: Sweep | None = None

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises InputError for a folder that no job has written."""
        path = folder / RECORD
        try:
            return read_json(cls, path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: give the folder of a run, such as runs/NAME") from error

    @classmethod
    def begin(
        cls, folder: Path, name: str, *, uuid_: str | None = None, tags: dict[str, str], inputs: list[DataInput]
    ) -> "Record":
        """The record of a new job, or that of the job which is taken up again; on disk when this returns.

        Raises InputError where the folder's record or sweep cannot be read.
        """
        if (folder / RECORD).exists():
            record = cls.read(folder)
            record.status, record.ended_ms = "RUNNING", None
        else:
            record = cls(uuid=uuid_ or new_uuid(), name=name, began_ms=_now_ms())
        record.sweep = Sweep.read(folder)
        record.tags, record.inputs = {**tags, **(record.sweep.tags if record.sweep else {})}, inputs
        record.write(folder)
        return record

    def end(self, folder: Path, status: Status) -> None:
        self.status, self.ended_ms = status, _now_ms()
        self.write(folder)

    def write(self, folder: Path) -> None:
        text = json.dumps(redact(self.model_dump(mode="json")), indent=1)
        files.write(folder / RECORD, text.encode() + b"\n")


def new_uuid() -> str:
    return uuid.uuid4().hex


def _now_ms() -> int:
    return int(time.time() * 1000)
