"""One MLflow run for each job, continued over restarts; rank 0 alone talks to it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# MLflow reads these when it is imported. It phones home unless told not to, and draws progress bars into log files.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.entities import Metric, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from pipeline import config, files
from pipeline.errors import InputError

QUIET_S = 300


def tracking_uri(settings: config.Tracking, root: str | Path) -> str:
    """The server to use: the configured one, or a SQLite file among the runs."""
    return settings.uri or f"sqlite:///{Path(root) / 'mlflow.db'}"


def use(uri: str) -> None:
    """Make `uri` the tracking server and registry of this process. Raises InputError for what cannot be one."""
    try:
        mlflow.set_tracking_uri(uri)
        MlflowClient()
    except MlflowException as error:
        raise InputError(f"tracking server {uri}: {error.message}") from error


class Tracker:
    """A listener that keeps an MLflow run. While training, trouble with the tracking server is reported and no
    reason to stop: metrics.jsonl holds every number."""

    def __init__(self, settings: config.Config, *, facts: dict[str, str]) -> None:
        """Start the run, or continue the one noted in run.json; `facts` become tags."""
        self._quiet_until = 0.0
        note = settings.run.folder / "run.json"
        uri = tracking_uri(settings.tracking, settings.run.root)
        use(uri)
        experiment = _experiment(settings)
        if note.exists():
            self.run_id: str = json.loads(note.read_text())["run_id"]
            mlflow.start_run(self.run_id, log_system_metrics=settings.tracking.system_metrics)
        else:
            run = mlflow.start_run(
                experiment_id=experiment,
                run_name=settings.run.name,
                tags={"seed": str(settings.run.seed), **facts, **code_revision()},
                log_system_metrics=settings.tracking.system_metrics,
            )
            self.run_id = run.info.run_id
            # Once: MLflow refuses a parameter that a restart would log with another value.
            mlflow.log_params(dict(_flatten(settings.model_dump(mode="json"))))
            mlflow.log_text(config.dump(settings), "config.yaml")
            files.write(note, json.dumps({"run_id": self.run_id}).encode() + b"\n")
        self._client = MlflowClient(uri)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self._log(step, {f"train/{name}": value for name, value in metrics.items()})

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._log(step, {f"val/{name.removeprefix('val_')}": value for name, value in metrics.items()})

    def on_checkpoint(self, step: int, folder: Path) -> None:
        pass

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if time.monotonic() < self._quiet_until:
            return
        now = get_current_time_millis()
        points = [Metric(name, value, now, step) for name, value in metrics.items()]
        try:
            self._client.log_batch(self.run_id, points)
        except (MlflowException, OSError) as error:
            # Every further try would hold training up for as long as the client's own retries take.
            self._quiet_until = time.monotonic() + QUIET_S
            print(f"MLflow: {error}; for {QUIET_S} s metrics go to metrics.jsonl alone", file=sys.stderr, flush=True)

    def end(self, *, failed: bool = False) -> None:
        try:
            mlflow.end_run(RunStatus.to_string(RunStatus.FAILED if failed else RunStatus.FINISHED))
        except (MlflowException, OSError) as error:
            print(f"MLflow: the run's end could not be noted: {error}", file=sys.stderr, flush=True)


def code_revision() -> dict[str, str]:
    """Tags that name the code: commit, and whether files differed from it. Empty outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = _git("rev-parse", "HEAD", at=here)
        dirty = _git("status", "--porcelain", "--untracked-files=no", at=here)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit, "code.dirty": str(bool(dirty)).lower()}


def _git(*arguments: str, at: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=at, check=True, capture_output=True, text=True).stdout.strip()


def _experiment(settings: config.Config) -> str:
    name = settings.tracking.experiment
    if found := mlflow.get_experiment_by_name(name):
        return found.experiment_id
    # A server picks its own artifact store; for the embedded database the artifacts lie beside it.
    beside = None if settings.tracking.uri else (Path(settings.run.root) / "artifacts" / name).resolve().as_uri()
    try:
        return mlflow.create_experiment(name, artifact_location=beside)
    except MlflowException:  # another run created it meanwhile
        return mlflow.get_experiment_by_name(name).experiment_id  # pyright: ignore[reportOptionalMemberAccess]


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in tree.items():
        # A mapping by something other than names, such as the resolution schedule, is one value.
        if isinstance(value, dict) and all(key.isidentifier() for key in value):
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat
