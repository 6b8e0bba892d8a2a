"""The tracking server and registry: which one, and how its troubles are told apart. Importing this imports MLflow."""

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

# MLflow reads these when it is imported or first used. It phones home unless told not to, draws progress bars into log
# files, and retries for minutes inside of a call: we come back by ourselves, and look first what has been done.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# Standard output ends with our result; the server's pages are found without being told of each run.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# It would copy uv.lock and pyproject.toml of whatever folder the job was started in into each model.
os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")

import mlflow
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline import files
from pipeline.errors import ExternalError, InputError
from pipeline.redact import redact
from pipeline.track.relocate import former_folders

# Errors of artifact stores' clients, which are not installed everywhere, are told by name.
_CLIENTS = {"mlflow", "sqlalchemy", "boto3", "botocore", "azure", "google"}
# What it does step by step is of no interest in a job's log.
logging.getLogger("mlflow").setLevel(logging.WARNING)

_SQLITE, _VARIABLE = "sqlite:///", "MLFLOW_TRACKING_URI"


def tracking_uri(configured: str | None, root: str | Path = "runs") -> str:
    """The server to use: the configured one, or MLFLOW_TRACKING_URI's, or a SQLite file among the runs."""
    return configured or os.environ.get(_VARIABLE) or f"{_SQLITE}{Path(root) / 'mlflow.db'}"


def connect(uri: str, *, create: bool = False) -> MlflowClient:
    """A client, after MLflow's own functions have been pointed at the same server.

    Raises InputError for what cannot be a server, for an embedded database that does not exist unless `create`, and for
    one that was moved or copied and still has the paths of its old place.
    """
    database = embedded(uri)
    if database and not database.exists() and not create:
        raise InputError(f"{database}: no such database; start where runs/ is, or name the server with --tracking-uri")
    try:
        _use(uri)
        if database is None:
            return MlflowClient(uri)
        # Creating the tables is no transaction: of several processes one has to be first.
        database.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(database.with_name(f".{database.name}.lock")):
            if not database.exists():
                _create(database)
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
            _require_own_paths(database)
            return client
    except MlflowException as error:
        raise InputError(f"tracking server {redact(uri)}: {redact(error.message)}") from error


def embedded(uri: str) -> Path | None:
    """Returns the path of an embedded database; None for the URI of a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def _require_own_paths(database: Path) -> None:
    if former := sorted(former_folders(database)):
        raise InputError(
            f"{database}: was moved or copied from {', '.join(former)}, where MLflow's paths in it still lead; nothing "
            "was read or written. To have them lead to the artifacts beside the database: "
            f"python launch/registry.py relocate --tracking-uri {shlex.quote(f'{_SQLITE}{database}')}"
        )


def _create(database: Path) -> None:
    """Under another name until its tables are whole: a process that ends in between would leave a database that nobody
    can open."""
    partial = database.with_name(f".{database.name}.partial")
    for left in database.parent.glob(f"{partial.name}*"):
        left.unlink()
    MlflowClient(f"{_SQLITE}{partial}").search_experiments(max_results=1)
    partial.rename(database)


def _use(uri: str) -> None:
    """Have MLflow's own functions use this server. They would set a variable, too, which child processes inherit."""
    before = os.environ.pop(_VARIABLE, None)
    mlflow.set_tracking_uri(uri)
    os.environ.pop(_VARIABLE, None)
    if before is not None:
        os.environ[_VARIABLE] = before


def find_experiment(client: MlflowClient, name: str) -> str:
    """Its id; it is created where there is none. Raises InputError for one that was deleted."""
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == LifecycleStage.DELETED:
            raise InputError(
                f"experiment {name}: was deleted in MLflow, which keeps its name: to restore it, with its runs: "
                f"MLFLOW_TRACKING_URI={redact(client.tracking_uri)} mlflow experiments restore --experiment-id "
                f"{found.experiment_id}; or set another tracking.experiment"
            )
        return found.experiment_id
    # A server picks its own artifact store; for an embedded database the artifacts lie beside it.
    database = embedded(client.tracking_uri)
    beside = (database.parent / "artifacts" / name).resolve().as_uri() if database else None
    try:
        return client.create_experiment(name, artifact_location=beside)
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another process has created it meanwhile
            return found.experiment_id
        raise


@contextlib.contextmanager
def reaching(what: str) -> Iterator[None]:
    """Around calls of the server and its stores: Unreachable, or Denied, for what goes wrong there, in one line."""
    try:
        yield
    except (InputError, ExternalError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        text = error.message if isinstance(error, MlflowException) else f"{type(error).__name__}: {error}"
        denied = isinstance(error, MlflowException) and error.error_code == "PERMISSION_DENIED"
        raise (Denied if denied else Unreachable)(f"{what}: {redact(' '.join(text.split()))[:500]}") from error


class Unreachable(ExternalError):
    """The tracking server or its store does not do what it was asked, now."""


class Denied(Unreachable):
    """This user may not: asking again does not help."""
