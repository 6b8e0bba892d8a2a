"""Makes an entry of the outbox a registered version: its files are uploaded, and count once the version is created.

entry ──build──▶ staged/ ──upload──▶ logged model ──finalise──▶ version with its tags
                              └─ what an attempt leaves that ends before: removed by the next one
"""

import logging
import math
import shutil
import time
from pathlib import Path

from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from pipeline.config import fingerprint
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import model_files
from pipeline.track.registry.find_versions import list_versions
from pipeline.track.registry.model_files import ARTIFACTS
from pipeline.track.registry.version_tags import DIGEST, GOOD, LOGGED, METRIC, SCORED
from pipeline.track.tracking_server import with_retries

log = logging.getLogger(__name__)

_ENTRY = "entry"
"""Tag of a logged model: which entry it was made from."""


def create_version(
    client: MlflowClient, name: str, entry: Path, card: ModelCard, experiment_id: str, run_id: str | None
) -> str:
    """Uploads the entry's files and creates the version; returns its number."""
    # Earlier attempts that ended before they created the version.
    for half_made in find_logged_models(client, name, card, experiment_id):
        remove_files(client, half_made.model_id, half_made.artifact_location)
    logged = client.create_logged_model(
        experiment_id,
        name="model",
        source_run_id=run_id,
        tags={_ENTRY: _fingerprint_of(name, card)},
    )
    model = Model(
        artifact_path=logged.artifact_location,
        run_id=run_id,
        model_id=logged.model_id,
    )
    # Beside the weights, so that hard links are possible.
    staged = entry / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        model_files.build(entry, card, staged, model)
        tags = _make_tags(card, staged)
        tags[LOGGED] = logged.model_id
        client.log_model_artifacts(logged.model_id, str(staged))
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    # The files count once the version exists, which is created with all of its tags at once.
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id:
        _log_to_run(client, run_id, logged.model_id, card)
    with_retries(lambda: _create_name(client, name))

    def create() -> str:
        # An attempt whose answer was lost may have succeeded.
        if existing := find_same(client, name, card):
            return existing
        version = client.create_model_version(
            name,
            logged.artifact_location,
            run_id=run_id,
            tags=tags,
            model_id=logged.model_id,
        )
        return str(version.version)

    return with_retries(create)


def find_same(client: MlflowClient, name: str, card: ModelCard) -> str | None:
    """Returns the number of the version that has these weights of this step of this run."""
    for version in list_versions(client, name, run=card.lineage["run"], step=card.lineage["step"]):
        if version.tags.get(f"{DIGEST}{ARTIFACTS}/{WEIGHTS}") == card.sha256[WEIGHTS]:
            return str(version.version)
    return None


def find_logged_models(client: MlflowClient, name: str, card: ModelCard, experiment_id: str) -> list[LoggedModel]:
    """Returns MLflow's logged models of all attempts to register the entry.

    They hold a version's files, and outlive a version that is removed in MLflow.
    """
    query = f"tags.{_ENTRY} = '{_fingerprint_of(name, card)}'"
    return client.search_logged_models([experiment_id], filter_string=query)


def remove_files(client: MlflowClient, model_id: str, location: str) -> None:
    """Removes a logged model with its files."""
    try:
        get_artifact_repository(location, tracking_uri=client.tracking_uri).delete_artifacts()
    except Exception as error:
        # Some stores do not allow it; `mlflow gc` removes such files.
        log.warning(f"{location}: its files could not be removed: {error}")
    client.delete_logged_model(model_id)


def _fingerprint_of(name: str, card: ModelCard) -> str:
    return fingerprint([name, card.lineage["run"], card.lineage["step"], card.sha256[WEIGHTS]])


def _make_tags(card: ModelCard, staged: Path) -> dict[str, str]:
    tags = {f"{DIGEST}{name}": digest for name, digest in model_files.digests(staged).items()}
    tags["bytes"] = str(model_files.size(staged))
    tags |= card.lineage
    good = True
    for name, value in card.metrics.items():
        metric = math.nan if value is None else value
        good = good and math.isfinite(metric)
        tags[f"{METRIC}{name}"] = repr(metric)
    if card.scored:
        tags[SCORED] = card.scored.digest
    return tags | {
        # MLflow's search compares texts, so truth values are written as such.
        GOOD: str(good).lower(),
        "task": card.task.name,
        "model": card.model.name,
        "image_size": str(card.image.size),
        "num_classes": str(len(card.classes)),
        "averaged": str(card.averaged).lower(),
    }


def _log_to_run(client: MlflowClient, run_id: str, model_id: str, card: ModelCard) -> None:
    step = int(card.lineage["step"])
    now_ms = int(time.time() * 1000)
    metrics = [
        Metric(name, value, now_ms, step, model_id=model_id, run_id=run_id)
        for name, value in card.metrics.items()
        if value is not None and math.isfinite(value)
    ]
    client.log_batch(run_id, metrics=metrics)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def _create_name(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
