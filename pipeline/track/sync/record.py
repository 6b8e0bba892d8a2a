"""A run's record of itself, in its own folder and independent of any server.

    runs/NAME/run.json           the run's identity and status; only the run itself writes it
    runs/NAME/mlflow.json        what the tracking server has of the folder; only Mirror writes it
    runs/NAME/slurm/sweep.json   the sweep that the run belongs to, if any; only launch/submit.py writes it

The folder is complete without a server, and a server's copy can be made from it at any time. This module does not
import MLflow.
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
from pipeline.run_folder import RECORD

SWEEP = "slurm/sweep.json"
MAIN_METRIC = "main_metric"
PARENT = "parent.version"
"""These two are tags that the pipeline itself reads."""

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class DataInput(BaseModel):
    """A data set that the run reads. Its manifest is copied to the run's folder as data/CONTEXT-N.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context: Literal["training", "validation"]
    path: str
    digest: str
    """SHA-256 of the data set."""
    samples: int
    classes: int
    manifest: str
    """Path of the copied manifest, below the run's folder."""


class Sweep(BaseModel):
    """Runs that were submitted together and differ in some settings. MLflow shows them below one parent run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uuid: str
    name: str
    set: dict[str, Any] = {}
    """The settings in which this run differs from the others, by key, such as optim.lr."""

    @classmethod
    def read(cls, folder: Path) -> "Sweep | None":
        """Returns the sweep of the run in `folder`, None if it has none. Raises InputError for an invalid file."""
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
        """A tag sweep.KEY for each setting, written as in YAML."""
        return {
            f"sweep.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in self.set.items()
        }


class Record(BaseModel):
    """A run's identity and status. `uuid` exists before step 0; a server's copy of the run is found by it."""

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
        """Reads the record in `folder`. Raises InputError for a folder that is not a run's."""
        path = folder / RECORD
        try:
            return read_json(cls, path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: give the folder of a run, such as runs/NAME") from error

    @classmethod
    def begin(
        cls, folder: Path, name: str, *, uuid_: str | None = None, tags: dict[str, str], inputs: list[DataInput]
    ) -> "Record":
        """Returns the record of a new run, or that of the run which is resumed, after writing it to the disk.

        Raises InputError where the folder's record or sweep cannot be read.
        """
        if (folder / RECORD).exists():
            record = cls.read(folder)
            record.status = "RUNNING"
            record.ended_ms = None
        else:
            record = cls(uuid=uuid_ or new_uuid(), name=name, began_ms=_now_ms())
        # These are read anew, because a resumed run may have other data or settings than before.
        record.sweep = Sweep.read(folder)
        record.tags = {**tags}
        if record.sweep:
            record.tags |= record.sweep.tags
        record.inputs = inputs
        record.write(folder)
        return record

    def end(self, folder: Path, status: Status) -> None:
        """Notes how and when the run ended, and writes the record."""
        self.status = status
        self.ended_ms = _now_ms()
        self.write(folder)

    def write(self, folder: Path) -> None:
        """Writes the record to `folder`, without secrets."""
        text = json.dumps(redact(self.model_dump(mode="json")), indent=1)
        files.write(folder / RECORD, text.encode() + b"\n")


def new_uuid() -> str:
    """Returns a random UUID for a run, 32 hexadecimal digits."""
    return uuid.uuid4().hex


def _now_ms() -> int:
    return int(time.time() * 1000)
