"""What the tracking server has of a run's folder, as noted in runs/NAME/mlflow.json.

The note lags behind the server at worst: it is written after each piece that was sent.
"""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline import files
from pipeline.config import read_json
from pipeline.errors import InputError
from pipeline.track.sync.record import Status

NOTE = "mlflow.json"


class FilePosition(BaseModel):
    """How far a file of lines has been sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offset: int = 0
    line: int = 0
    before: str = hashlib.sha256().hexdigest()
    """SHA-256 of the bytes just before `offset`, which differ when lines were dropped and others written since."""


class ServerState(BaseModel):
    """The content of mlflow.json."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    uri: str
    """The server's URI, without secrets."""
    run_id: str | None = None
    """MLflow's id of the run."""
    facts: str | None = None
    """Fingerprint of the tags and data sets that were sent."""
    places: dict[str, FilePosition] = {}
    """Positions in the files of lines, by path below the run's folder."""
    files: dict[str, str] = {}
    """SHA-256 of each artifact as it was sent."""
    pruned: int = 0
    """Number of registered versions, plus the given-up ones among them, when surplus versions were last removed."""
    linked: bool = False
    """Whether the run is linked with the version that training started from."""
    sweep: str | None = None
    """UUID of the sweep that the run was put below."""
    status: Status | None = None
    ended_ms: int | None = None

    @classmethod
    def read(cls, folder: Path, uri: str) -> "ServerState":
        """Returns what the server `uri` has of the run in `folder`: nothing, where the note is of another server."""
        try:
            state = read_json(cls, folder / NOTE)
            if state.uri == uri:
                return state
        except (FileNotFoundError, InputError):
            # Everything is then sent again, which changes nothing on the server.
            pass
        return cls(uri=uri)

    def write(self, folder: Path) -> None:
        """Writes the note to the run's `folder`."""
        files.write(folder / NOTE, self.model_dump_json(indent=1).encode() + b"\n")
