"""The model registry: entries of the outbox become numbered versions, and versions become digest-checked folders.

    entry ──register──▶ files in the store,  a version with their digests, lineage and metrics as tags,  @candidate
                             │                    │
                             └──────resolve───────┴──▶ Version: a folder whose every byte the database vouches for

version_tags.py has the tags, find_versions.py the queries, create_version.py the upload.
"""

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking import MlflowClient

from pipeline.errors import InputError
from pipeline.track.model_card import CARD, WEIGHTS, ModelCard
from pipeline.track.registry import create_version, model_cache, model_files
from pipeline.track.registry.find_versions import find_version, list_versions, newest_good
from pipeline.track.registry.model_files import ARTIFACTS, FileMismatch
from pipeline.track.registry.version_tags import (
    CANDIDATE,
    CHILD,
    DIGEST,
    GIVEN_UP,
    GOOD,
    LOGGED,
    METRIC,
    PROMOTED,
    uri_of,
)
from pipeline.track.tracking_server import reaching, with_retries

_NOTE = "registered_model_meta"
"""A file that MLflow adds to a version which it opens in a local store. Nothing reads it."""
_REMOVE_BYTE_CODE = "remove it from the store, and see docs/serving.md on PYTHONPYCACHEPREFIX"


@dataclasses.dataclass(frozen=True)
class Version:
    """A registered version in a local folder whose files match their digests."""

    uri: str
    """models:/NAME/VERSION, never an alias."""
    folder: Path
    """The folder with model.json, model.safetensors and, where the latter is an average, raw.safetensors."""
    card: ModelCard
    tags: dict[str, str]

    @property
    def weights(self) -> Path:
        """The file with the weights."""
        return self.folder / WEIGHTS


def register(client: MlflowClient, name: str, entry: Path, *, experiment_id: str, run_id: str | None) -> str:
    """Makes an entry (a folder with model.json and the weights that it lists) the next version of `name`.

    Points @candidate at the newest good version and returns models:/NAME/VERSION: that of an earlier attempt, where one
    came this far. Uses no state of MLflow's beside the client, so it may run in any thread.
    Raises InputError for a damaged entry, and Unreachable; a version that is half made does not count.
    """
    try:
        card = ModelCard.read(entry)
    except OSError as error:
        raise InputError(f"{entry / CARD}: cannot be read: {error.strerror}") from error
    # Damage must be found before the upload: the version's digests are computed from what the files hold then.
    model_files.check(entry, card)
    with reaching(f"models:/{name}"):
        number = create_version.find_same(client, name, card)
        if number is None:
            number = create_version.create_version(client, name, entry, card, experiment_id, run_id)
        with_retries(lambda: _point_candidate(client, name))
    return f"models:/{name}/{number}"


def resolve(uri: str, cache: Path | None = None) -> Version:
    """Returns a local copy of models:/NAME/VERSION or models:/NAME@ALIAS whose files match their registered digests.

    The server is the one that tracking_server.connect() chose. Raises InputError for a URI that names no version, and
    for a version whose files differ from what was registered; ExternalError where the disk is full; Unreachable.
    """
    client = MlflowClient()
    version = find_version(client, uri)
    pinned = uri_of(version)
    registered = _digests(version)
    store = _open_store(client, version)

    def refuse(faults: list[FileMismatch]) -> InputError:
        remedy = "the artifact was changed or damaged; do not use it, register the model again"
        if all(fault.is_byte_code for fault in faults):
            remedy = (
                "nobody has checked this byte code, which Python leaves where MLflow opens a version: "
                f"{_REMOVE_BYTE_CODE}"
            )
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return InputError(f"{pinned}: {faults[0]}{more}: {remedy}")

    # A store on a local disk is compared as well: a good copy in the cache would hide that the store was damaged.
    if isinstance(store, LocalArtifactRepository) and (faults := _find_mismatches(store.artifact_dir, version)):
        raise refuse(faults)
    copy = model_cache.obtain(
        registered,
        _num_bytes(version),
        functools.partial(_download, store, pinned),
        refuse,
        cache,
    )
    return Version(
        pinned,
        copy / ARTIFACTS,
        _read_card(copy, registered, pinned),
        dict(version.tags),
    )


def verify(uri: str, cache: Path | None = None) -> dict[str, Any]:
    """Compares the stored files with their registered digests; returns "ok", and each file with what was found.

    Copies in the cache are not checked. Its folder takes a temporary copy where the store is not on a local disk.
    """
    client = MlflowClient()
    version = find_version(client, uri)
    registered = _digests(version)
    store = _open_store(client, version)
    with contextlib.ExitStack() as stack:
        if isinstance(store, LocalArtifactRepository):
            folder = store.artifact_dir
        else:
            caches = model_cache.folder_of(cache)
            caches.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=caches))
            _download(store, uri_of(version), Path(folder))
        faults = {fault.file: fault for fault in _find_mismatches(folder, version)}
    rows = []
    for name in sorted({*registered, *faults}):
        if name in faults:
            fault = faults[name]
            rows.append({**fault._asdict(), "fault": str(fault)})
        else:
            digest = registered[name]
            rows.append({"file": name, "registered": digest, "found": digest, "fault": None})
    return {
        "model": uri_of(version),
        "ok": not faults,
        "files": rows,
    }


def attach(uri: str, file: Path) -> None:
    """Adds a file to the run that made the version, under predictions/.

    Raises InputError for a version of no run; Unreachable.
    """
    client = MlflowClient()
    version = find_version(client, uri)
    if not version.run_id:
        raise InputError(f"{uri}: was not made by a run, so there is none to attach {file} to")
    with reaching(f"{uri}: its run"):
        client.log_artifact(version.run_id, str(file), "predictions")


def is_lost(client: MlflowClient, name: str, card: ModelCard, experiment_id: str) -> bool:
    """Whether a database lacks all trace of an entry that was registered; a version that a user removed leaves one."""
    with reaching(f"models:/{name}"):
        if create_version.find_same(client, name, card):
            return False
        return not create_version.find_logged_models(client, name, card, experiment_id)


def link_child(client: MlflowClient, parent_uri: str, child_uuid: str, child_run_id: str) -> None:
    """Notes, on the parent's version and on the run that made it, the run that was started from it."""
    version = find_version(client, parent_uri)
    tag = f"{CHILD}{child_uuid}"
    with reaching(parent_uri):
        client.set_model_version_tag(version.name, str(version.version), tag, child_run_id)
        if version.run_id:
            client.set_tag(version.run_id, tag, child_run_id)


def prune(client: MlflowClient, name: str, run_uuid: str, *, keep_best: int, metric: str) -> list[str]:
    """Removes a run's versions except its best `keep_best` and its last; returns the removed URIs.

    A version that was given up counts as neither, and one with a metric that is not finite is not best. Versions with
    an alias or a child, and former champions, always stay.
    """
    registered = list_versions(client, name, run=run_uuid)
    standing = [version for version in registered if GIVEN_UP not in version.tags]
    ranked = [version for version in standing if score_of(version, metric) is not None]
    ranked.sort(key=lambda version: worth(metric, score_of(version, metric)), reverse=True)
    kept = {str(version.version) for version in [*ranked[:keep_best], *standing[-1:]]}
    removed = []
    for version in registered:
        if str(version.version) not in kept and _remove(client, version):
            removed.append(uri_of(version))
    return removed


def give_up(client: MlflowClient, uri: str, why: str) -> None:
    """Marks a version whose weights its run has rolled back, unless it was removed, and takes @candidate from it."""
    with contextlib.suppress(InputError), reaching(uri):
        version = find_version(client, uri)
        name = version.name
        number = str(version.version)
        client.set_model_version_tag(name, number, GIVEN_UP, why)
        client.set_model_version_tag(name, number, GOOD, "false")
        with_retries(lambda: _point_candidate(client, name))
        # Where no other version is good, the alias has stayed here.
        if CANDIDATE in client.get_model_version(name, number).aliases:
            client.delete_registered_model_alias(name, CANDIDATE)


def worth(metric: str, value: float | None) -> float:
    """Returns a number that is higher for better values. Metrics whose name ends in loss are better when lower."""
    assert value is not None
    return -value if metric.endswith("loss") else value


def metric_of(version: ModelVersion, metric: str) -> float | None:
    """Returns a metric as it was registered; None where it was not measured or was not finite."""
    try:
        value = float(version.tags[f"{METRIC}{metric}"])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def is_good(version: ModelVersion) -> bool:
    """Whether all metrics that were registered are finite and the version was not given up."""
    return version.tags.get(GOOD) != "false"


def score_of(version: ModelVersion, metric: str) -> float | None:
    """Returns the metric that versions are ranked by; None for a version that cannot be the best."""
    return metric_of(version, metric) if is_good(version) else None


def _point_candidate(client: MlflowClient, name: str) -> None:
    newest = newest_good(client, name)
    while newest is not None:
        client.set_registered_model_alias(name, CANDIDATE, newest)
        # Several processes may do this. Each looks again after it has written, so the alias ends at the newest version
        # whatever their order.
        written = newest
        newest = newest_good(client, name)
        if written == newest:
            return


def _remove(client: MlflowClient, version: ModelVersion) -> bool:
    """Removes a version, unless there is a reason to keep it; returns whether it was removed."""
    name = version.name
    number = str(version.version)
    with reaching(uri_of(version)):
        # Aliases and tags may have been added since the versions were listed.
        current = client.get_model_version(name, number)
        if current.aliases or any(tag.startswith((CHILD, PROMOTED)) for tag in current.tags):
            return False
        location = client.get_model_version_download_uri(name, number)
        # The version goes first: one whose files are gone could still be found.
        client.delete_model_version(name, number)
        if LOGGED in current.tags:
            create_version.remove_files(client, current.tags[LOGGED], location)
    return True


def _digests(version: ModelVersion) -> Mapping[str, str]:
    digests = {key.removeprefix(DIGEST): value for key, value in version.tags.items() if key.startswith(DIGEST)}
    if not digests:
        raise InputError(
            f"{uri_of(version)}: has no digests, so it cannot be trusted: it was not registered by this project; "
            "give its weights to `launch/registry.py import`"
        )
    return digests


def _find_mismatches(folder: str, version: ModelVersion) -> list[FileMismatch]:
    """Returns the mismatches of a version's files in the store, or as they were downloaded from it."""
    with reaching(uri_of(version)):
        faults = model_files.mismatches(_digests(version), Path(folder), _num_bytes(version))
    # A link in the note's place is reported: it could lead anywhere.
    return [fault for fault in faults if fault.file != _NOTE or fault.is_no_file]


def _num_bytes(version: ModelVersion) -> int:
    """Returns the size of a version's files in bytes; 0 where that is not known."""
    size = version.tags.get("bytes", "")
    return int(size) if size.isdecimal() else 0


def _read_card(copy: Path, registered: Mapping[str, str], pinned: str) -> ModelCard:
    """Raises InputError for a version without a card, and for one whose card lists other weights."""
    beside = {name.removeprefix(f"{ARTIFACTS}/"): digest for name, digest in registered.items()}
    card = None
    if CARD in beside:
        try:
            card = ModelCard.read(copy / ARTIFACTS)
        except OSError as error:
            raise InputError(f"{pinned}: {CARD}: {error.strerror}") from error
    if card is None or WEIGHTS not in card.sha256 or not card.sha256.items() <= beside.items():
        raise InputError(f"{pinned}: has no {CARD} that lists its {WEIGHTS}: it was not registered by this project")
    return card


def _open_store(client: MlflowClient, version: ModelVersion) -> ArtifactRepository:
    with reaching(uri_of(version)):
        location = client.get_model_version_download_uri(version.name, str(version.version))
        return get_artifact_repository(location, tracking_uri=client.tracking_uri)


def _download(store: ArtifactRepository, pinned: str, folder: Path) -> None:
    with reaching(pinned):
        store.download_artifacts("", dst_path=str(folder))
        # MLflow may have written the note to the store after the digests were taken.
        (folder / _NOTE).unlink(missing_ok=True)
