"""The tracking server and registry: how it is chosen, and its errors classified. Importing this imports MLflow."""

import contextlib
import logging
import os
import random
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

# MLflow reads these when it is imported or first used. It sends telemetry unless that is disabled, draws progress bars
# into log files, and retries inside of a call for minutes: we retry ourselves, and first check what has been done.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
# Standard output ends with our result, so MLflow must not print each run's page there.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# It would copy uv.lock and pyproject.toml of whatever folder the job was started in into each model.
os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")

import mlflow
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline import files
from pipeline.errors import ExternalError, InputError
from pipeline.log import shows_details
from pipeline.redact import redact
from pipeline.track.relocate import former_folders

# The clients of artifact stores are not installed everywhere, so their errors are recognised by their package's name.
_CLIENTS = {
    "mlflow",
    "sqlalchemy",
    "boto3",
    "botocore",
    "azure",
    "google",
}
# MLflow's progress messages are of no use in a job's log.
if not shows_details():
    logging.getLogger("mlflow").setLevel(logging.WARNING)

_SQLITE = "sqlite:///"
_VARIABLE = "MLFLOW_TRACKING_URI"
_ERROR_LENGTH = 500
"""Characters of a server's error that are reported."""
_ATTEMPTS = 6
# The seeded generators stay as they are: their draws must not depend on the server.
_jitter = random.SystemRandom()

T = TypeVar("T")


def tracking_uri(configured: str | None, root: str | Path = "runs") -> str:
    """Returns the server to use: the configured one, or MLFLOW_TRACKING_URI's, or a SQLite file among the runs."""
    return configured or os.environ.get(_VARIABLE) or f"{_SQLITE}{Path(root) / 'mlflow.db'}"


def connect(uri: str, *, create: bool = False) -> MlflowClient:
    """Returns a client, after MLflow's own functions have been pointed at the same server.

    Raises InputError for a URI that cannot be a server's, for an embedded database that does not exist unless `create`,
    and for one that was moved or copied and still holds the paths of its old folder.
    """
    database = embedded_database(uri)
    if database and not database.exists() and not create:
        raise InputError(f"{database}: no such database; start where runs/ is, or name the server with --tracking-uri")
    try:
        _use(uri)
        if database is None:
            return MlflowClient(uri)
        # MLflow does not create the tables in one transaction: of several processes one has to be first.
        database.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(database.with_name(f".{database.name}.lock")):
            if not database.exists():
                _create_database(database)
            client = MlflowClient(uri)
            # MLflow opens the database at its first query. Whatever is wrong with it shows here, under the lock.
            client.search_experiments(max_results=1)
            _require_own_paths(database)
            return client
    except MlflowException as error:
        raise InputError(f"tracking server {redact(uri)}: {redact(error.message)}") from error


def embedded_database(uri: str) -> Path | None:
    """Returns the path of an embedded database; None for the URI of a server."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE))


def _require_own_paths(database: Path) -> None:
    if former := sorted(former_folders(database)):
        raise InputError(
            f"{database}: was moved or copied from {', '.join(former)}, where MLflow's paths in it still lead; nothing "
            "was read or written. To have them lead to the artifacts beside the database: "
            f"python launch/registry.py relocate --tracking-uri {shlex.quote(f'{_SQLITE}{database}')}"
        )


def _create_database(database: Path) -> None:
    """Creates a database under a temporary name until its tables are complete.

    A process that ends in between would otherwise leave a database that nobody can open.
    """
    partial = files.partial_of(database)
    for leftover in database.parent.glob(f"{partial.name}*"):
        leftover.unlink()
    MlflowClient(f"{_SQLITE}{partial}").search_experiments(max_results=1)
    partial.rename(database)


def _use(uri: str) -> None:
    """Makes MLflow's own functions use this server, without the variable that they set: child processes inherit it."""
    before = os.environ.pop(_VARIABLE, None)
    mlflow.set_tracking_uri(uri)
    os.environ.pop(_VARIABLE, None)
    if before is not None:
        os.environ[_VARIABLE] = before


def find_experiment(client: MlflowClient, name: str) -> str:
    """Returns an experiment's id; it is created where there is none. Raises InputError for one that was deleted."""
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == LifecycleStage.DELETED:
            raise InputError(
                f"experiment {name}: was deleted in MLflow, which keeps its name: to restore it, with its runs: "
                f"MLFLOW_TRACKING_URI={redact(client.tracking_uri)} mlflow experiments restore --experiment-id "
                f"{found.experiment_id}; or set another tracking.experiment"
            )
        return found.experiment_id
    # A server picks its own artifact store; the artifacts of an embedded database lie beside it.
    location = None
    if database := embedded_database(client.tracking_uri):
        location = (database.parent / "artifacts" / name).resolve().as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        # Another process may have created it meanwhile.
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


@contextlib.contextmanager
def reaching(what: str) -> Iterator[None]:
    """Surrounds calls of the server and its stores; their errors become Unreachable or Denied, in one line."""
    try:
        yield
    except (InputError, ExternalError):
        raise
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in _CLIENTS:
            raise
        text = f"{type(error).__name__}: {error}"
        kind = Unreachable
        if isinstance(error, MlflowException):
            text = error.message
            if error.error_code == "PERMISSION_DENIED":
                kind = Denied
        line = redact(" ".join(text.split()))
        raise kind(f"{what}: {line[:_ERROR_LENGTH]}") from error


def with_retries(call: Callable[[], T]) -> T:
    """Calls a function again after errors of the server, six times at most, within some seconds."""
    # Concurrent writers make a database fail for a moment, and its errors do not differ from lasting ones.
    for attempt in range(1, _ATTEMPTS):
        try:
            return call()
        except (MlflowException, Unreachable):
            time.sleep(0.05 * 2**attempt * _jitter.uniform(0.5, 1.0))
    return call()


class Unreachable(ExternalError):
    """The tracking server or its store cannot do at present what it was asked."""


class Denied(Unreachable):
    """This user lacks the permission, so that retrying does not help."""
