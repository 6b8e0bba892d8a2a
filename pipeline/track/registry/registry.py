"""The model registry: entries of the outbox in as numbered versions, digest-checked folders out.

    entry ──register──▶ files in the store,  a version with their digests, lineage and metrics as tags,  @candidate
                             │                    │
                             └──────resolve───────┴──▶ Version: a folder whose every byte the database vouches for

Tags of a version: "sha256.PATH" of each file, "bytes" of all, the card's lineage, "metric.NAME", "good", what `show`
tells of the model, and "child.UUID" of each run that was started from it.
"""

import contextlib
import dataclasses
import functools
import math
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking import MlflowClient

from pipeline.config import fingerprint
from pipeline.errors import ExternalError, InputError
from pipeline.redact import redact
from pipeline.track.model_card import CARD, WEIGHTS, ModelCard
from pipeline.track.registry import model_cache, model_files
from pipeline.track.registry.model_files import ARTIFACTS, FileMismatch
from pipeline.track.tracking_server import Unreachable, reaching

CANDIDATE, CHAMPION = "candidate", "champion"
DIGEST, METRIC, CHILD, PROMOTED = "sha256.", "metric.", "child.", "promoted."
"""How names of tags begin."""
GIVEN_UP = "given_up"
"""A tag of a version whose weights its run has rolled back: why."""
SCORED = "scored"
"""A tag: digest of the data that the metrics were measured on."""

_ENTRY, _LOGGED, _GOOD = "entry", "logged_model", "good"
_NOTE = "registered_model_meta"
"""A file that MLflow adds to a version which it opens in a local store. Nobody reads it."""
_LEFT = "remove it from the store, and see docs/serving.md on PYTHONPYCACHEPREFIX"
_ATTEMPTS = 6
_jitter = random.SystemRandom()  # leaves the seeded generators as they were

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Version:
    """A registered version in a local folder whose files match their digests."""

    uri: str  # models:/NAME/VERSION, never an alias
    folder: Path
    """With model.json, model.safetensors and, where the former is an average, raw.safetensors."""
    card: ModelCard
    tags: dict[str, str]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS


def register(client: MlflowClient, name: str, entry: Path, *, experiment_id: str, run_id: str | None) -> str:
    """Make an entry (a folder with model.json and the weights that it lists) the next version of `name`.

    Points @candidate at the newest good version and returns models:/NAME/VERSION: that of an earlier attempt, where one
    came this far. Uses no state of MLflow's beside the client, so it may run in any thread.
    Raises InputError for a damaged entry, and Unreachable; what is half made then does not count.
    """
    try:
        card = ModelCard.read(entry)
    except OSError as error:
        raise InputError(f"{entry / CARD}: cannot be read: {error.strerror}") from error
    model_files.check(entry, card)
    with reaching(f"models:/{name}"):
        version = _find_same(client, name, card) or _create(client, name, entry, card, experiment_id, run_id)
        _again(lambda: _point_candidate(client, name))
    return f"models:/{name}/{version}"


def resolve(uri: str, cache: Path | None = None) -> Version:
    """A local copy of models:/NAME/VERSION or models:/NAME@ALIAS, each file compared with its registered digest.

    On the server that server.connect() chose. A store on a local disk is compared as well: a good copy would hide that
    it was damaged. Raises InputError for a URI that names no version, and for a version whose files differ from what
    was registered; ExternalError where there is no room; Unreachable.
    """
    client = MlflowClient()
    version = find(client, uri)
    pinned, registered = uri_of(version), _digests(version)
    store = _store(client, version)

    def refuse(faults: list[FileMismatch]) -> InputError:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        remedy = "the artifact was changed or damaged; do not use it, register the model again"
        if all(fault.is_byte_code for fault in faults):
            remedy = f"nobody has checked this byte code, which Python leaves where MLflow opens a version: {_LEFT}"
        return InputError(f"{pinned}: {faults[0]}{more}: {remedy}")

    if isinstance(store, LocalArtifactRepository) and (faults := _stored_mismatches(store.artifact_dir, version)):
        raise refuse(faults)
    download = functools.partial(_download, store, pinned)
    copy = model_cache.obtain(registered, _num_bytes(version), download, refuse, cache)
    return Version(pinned, copy / ARTIFACTS, _card(copy, registered, pinned), dict(version.tags))


def verify(uri: str, cache: Path | None = None) -> dict[str, Any]:
    """Compare the stored files with their registered digests: "ok", and each file with what was found.

    The cache's folder takes a temporary copy where the store is not on a local disk; its copies are not looked at.
    """
    client = MlflowClient()
    version = find(client, uri)
    registered, store = _digests(version), _store(client, version)
    with contextlib.ExitStack() as stack:
        if isinstance(store, LocalArtifactRepository):
            folder = Path(store.artifact_dir)
        else:
            model_cache.folder_of(cache).mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=model_cache.folder_of(cache))))
            _download(store, uri_of(version), folder)
        faults = {fault.file: fault for fault in _stored_mismatches(folder, version)}
    rows = [
        faults.get(name) or FileMismatch(name, registered[name], registered[name])
        for name in sorted({*registered, *faults})
    ]
    return {
        "model": uri_of(version),
        "ok": not faults,
        "files": [{**row._asdict(), "fault": str(row) if row.file in faults else None} for row in rows],
    }


def versions(client: MlflowClient, name: str | None = None, **tags: str) -> list[ModelVersion]:
    """Those of a registered model, or of all, that have these tags, with their aliases; by name and number. None for a
    model that does not exist."""
    terms = [f"tags.`{key}` = {quoted(value)}" for key, value in tags.items()]
    query = " and ".join([f"name = {quoted(name)}", *terms] if name else terms)
    found: list[ModelVersion] = []
    token: str | None = ""
    with reaching(f"models:/{name}" if name else "registered models"):
        while token is not None:
            page = client.search_model_versions(query or None, max_results=1000, page_token=token or None)
            found, token = [*found, *page], page.token or None
        aliases = {each: client.get_registered_model(each).aliases for each in {version.name for version in found}}
    for version in found:
        version.aliases = [alias for alias, at in aliases[version.name].items() if str(at) == str(version.version)]
    return sorted(found, key=lambda version: (version.name, int(version.version)))


def find(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that models:/NAME/VERSION or models:/NAME@ALIAS names. Raises InputError where there is none."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(.*)|@(.*))?", uri)
    if not match:
        raise InputError(f"{uri}: a registered model is models:/NAME/VERSION or models:/NAME@ALIAS")
    name, number, alias = match.groups()
    if not alias and not (number and number.isdigit()):
        raise InputError(f"{uri}: names no version: give models:/NAME/VERSION or models:/NAME@ALIAS")
    try:
        if alias:
            number = str(client.get_model_version_by_alias(name, alias).version)
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise Unreachable(f"{uri}: {redact(' '.join(error.message.split()))}") from error
        raise InputError(f"{uri}: {error.message}{_known(client, name)}") from error


def attach(uri: str, file: Path) -> None:
    """Put a file with the run that made the version, under predictions/. Raises InputError for a version of no run;
    Unreachable."""
    client = MlflowClient()
    version = find(client, uri)
    if not version.run_id:
        raise InputError(f"{uri}: was not made by a run, so there is none to attach {file} to")
    with reaching(f"{uri}: its run"):
        client.log_artifact(version.run_id, str(file), "predictions")


def is_lost(client: MlflowClient, name: str, card: ModelCard, experiment_id: str) -> bool:
    """Whether a database knows nothing of an entry that was registered. Not so of a version that somebody removed."""
    with reaching(f"models:/{name}"):
        return not _find_same(client, name, card) and not _logged_models(client, name, card, experiment_id)


def link_child(client: MlflowClient, parent_uri: str, child_uuid: str, child_run_id: str) -> None:
    """Note on the parent's version and on the run that made it which run was started from it."""
    version = find(client, parent_uri)
    with reaching(parent_uri):
        client.set_model_version_tag(version.name, str(version.version), f"{CHILD}{child_uuid}", child_run_id)
        if version.run_id:
            client.set_tag(version.run_id, f"{CHILD}{child_uuid}", child_run_id)


def prune(client: MlflowClient, name: str, run_uuid: str, *, keep_best: int, metric: str) -> list[str]:
    """Remove what a run has registered beyond its best `keep_best` versions and its last; returns their URIs.

    A version that was given up is neither, and one with a metric that is not finite is not best. Those with an alias,
    with a child, or that have been champion stay in any case.
    """
    ours = versions(client, name, run=run_uuid)
    standing = [version for version in ours if GIVEN_UP not in version.tags]
    scored = [version for version in standing if score_of(version, metric) is not None]
    best = sorted(scored, key=lambda version: worth(metric, score_of(version, metric)), reverse=True)[:keep_best]
    kept = {str(version.version) for version in [*best, *standing[-1:]]}
    removed = []
    for version in ours:
        if str(version.version) not in kept and _remove(client, version):
            removed.append(uri_of(version))
    return removed


def give_up(client: MlflowClient, uri: str, why: str) -> None:
    """Mark a version whose weights its run has rolled back, unless it was removed, and take @candidate from it."""
    with contextlib.suppress(InputError), reaching(uri):
        version = find(client, uri)
        name, number = version.name, str(version.version)
        client.set_model_version_tag(name, number, GIVEN_UP, why)
        client.set_model_version_tag(name, number, _GOOD, "false")
        _again(lambda: _point_candidate(client, name))
        if CANDIDATE in client.get_model_version(name, number).aliases:  # there is no other
            client.delete_registered_model_alias(name, CANDIDATE)


def worth(metric: str, value: float | None) -> float:
    """Higher is better. Metrics whose name ends in loss are better when lower."""
    assert value is not None
    return -value if metric.endswith("loss") else value


def metric_of(version: ModelVersion, metric: str) -> float | None:
    """As it was registered; None where it was not measured or was not finite."""
    with contextlib.suppress(KeyError, ValueError):
        value = float(version.tags[f"{METRIC}{metric}"])
        return value if math.isfinite(value) else None
    return None


def is_good(version: ModelVersion) -> bool:
    """Whether all metrics that were registered are finite and the version was not given up."""
    return version.tags.get(_GOOD) != "false"


def score_of(version: ModelVersion, metric: str) -> float | None:
    """What a version is compared by; None for one that can be no best."""
    return metric_of(version, metric) if is_good(version) else None


def uri_of(version: ModelVersion) -> str:
    return f"models:/{version.name}/{version.version}"


def quoted(text: str) -> str:
    """For a filter of MLflow's search, which knows no escapes."""
    mark = '"' if "'" in text else "'"
    if mark in text:
        raise InputError(f"{text}: a name with both kinds of quotation marks cannot be searched for; choose another")
    return f"{mark}{text}{mark}"


def _find_same(client: MlflowClient, name: str, card: ModelCard) -> str | None:
    """The version that these weights of this step of this run have become."""
    same = {"run": card.lineage["run"], "step": card.lineage["step"]}
    for version in versions(client, name, **same):
        if version.tags.get(f"{DIGEST}{ARTIFACTS}/{WEIGHTS}") == card.sha256[WEIGHTS]:
            return str(version.version)
    return None


def _create(
    client: MlflowClient, name: str, entry: Path, card: ModelCard, experiment_id: str, run_id: str | None
) -> str:
    """Upload the files, then have them counted, all at once, by creating the version."""
    for half_made in _logged_models(client, name, card, experiment_id):
        _remove_files(client, half_made.model_id, half_made.artifact_location)
    mark = {_ENTRY: _key(name, card)}
    logged = client.create_logged_model(experiment_id, name="model", source_run_id=run_id, tags=mark)
    model = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
    staged = entry / "staged"  # beside the weights, for hard links
    shutil.rmtree(staged, ignore_errors=True)
    try:
        model_files.build(entry, card, staged, model)
        tags = _tags(card, staged) | {_LOGGED: logged.model_id}
        client.log_model_artifacts(logged.model_id, str(staged))
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id:
        _log_to_run(client, run_id, logged.model_id, card)
    _again(lambda: _create_name(client, name))

    def create() -> str:
        # An attempt whose answer was lost may have succeeded.
        return _find_same(client, name, card) or str(
            client.create_model_version(
                name, logged.artifact_location, run_id=run_id, tags=tags, model_id=logged.model_id
            ).version
        )

    return _again(create)


def _logged_models(client: MlflowClient, name: str, card: ModelCard, experiment_id: str) -> list[LoggedModel]:
    """Those of attempts to register the entry: a version's files, which outlive a version that is removed in MLflow."""
    return client.search_logged_models([experiment_id], filter_string=f"tags.{_ENTRY} = '{_key(name, card)}'")


def _key(name: str, card: ModelCard) -> str:
    return fingerprint([name, card.lineage["run"], card.lineage["step"], card.sha256[WEIGHTS]])


def _tags(card: ModelCard, staged: Path) -> dict[str, str]:
    metrics = {name: math.nan if value is None else value for name, value in card.metrics.items()}
    good = all(map(math.isfinite, metrics.values()))
    return {
        **{f"{DIGEST}{name}": digest for name, digest in model_files.digests(staged).items()},
        "bytes": str(model_files.size(staged)),
        **card.lineage,
        **{f"{METRIC}{name}": repr(value) for name, value in metrics.items()},
        **({SCORED: card.scored.digest} if card.scored else {}),
        _GOOD: str(good).lower(),
        "task": card.task.name,
        "model": card.model.name,
        "image_size": str(card.image.size),
        "num_classes": str(len(card.classes)),
        "averaged": str(card.averaged).lower(),
    }


def _log_to_run(client: MlflowClient, run_id: str, model_id: str, card: ModelCard) -> None:
    step, now = int(card.lineage["step"]), int(time.time() * 1000)
    finite = {name: value for name, value in card.metrics.items() if value is not None and math.isfinite(value)}
    metrics = [Metric(name, value, now, step, model_id=model_id, run_id=run_id) for name, value in finite.items()]
    client.log_batch(run_id, metrics=metrics)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def _create_name(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _point_candidate(client: MlflowClient, name: str) -> None:
    """Whoever writes last looks again afterwards, so the alias ends at the newest whatever the order."""
    newest = _newest_good(client, name)
    while newest is not None:
        client.set_registered_model_alias(name, CANDIDATE, newest)
        written, newest = newest, _newest_good(client, name)
        if written == newest:
            return


def _newest_good(client: MlflowClient, name: str) -> str | None:
    query = f"name = {quoted(name)} and tags.{_GOOD} = 'true'"
    found = client.search_model_versions(query, max_results=1, order_by=["version_number DESC"])
    return str(found[0].version) if found else None


def _again(call: Callable[[], T]) -> T:
    """Writers of one database get into each other's way; its errors do not tell that from trouble."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return call()
        except (MlflowException, Unreachable):
            time.sleep(0.05 * 2**attempt * _jitter.uniform(0.5, 1.0))
    return call()


def _remove(client: MlflowClient, version: ModelVersion) -> bool:
    """False where there is a reason to keep it."""
    with reaching(uri_of(version)):
        now = client.get_model_version(version.name, str(version.version))
        if now.aliases or any(tag.startswith((CHILD, PROMOTED)) for tag in now.tags):
            return False
        store = client.get_model_version_download_uri(version.name, str(version.version))
        client.delete_model_version(version.name, str(version.version))
        if _LOGGED in now.tags:
            _remove_files(client, now.tags[_LOGGED], store)
    return True


def _remove_files(client: MlflowClient, model_id: str, location: str) -> None:
    try:
        get_artifact_repository(location, tracking_uri=client.tracking_uri).delete_artifacts()
    except Exception as error:  # a store that does not allow it, which `mlflow gc` is for
        print(f"warning: {location}: its files could not be removed: {error}", file=sys.stderr, flush=True)
    client.delete_logged_model(model_id)


def _digests(version: ModelVersion) -> Mapping[str, str]:
    found = {key.removeprefix(DIGEST): value for key, value in version.tags.items() if key.startswith(DIGEST)}
    if not found:
        raise InputError(
            f"{uri_of(version)}: has no digests, so it cannot be trusted: it was not registered by this project; "
            "give its weights to `launch/registry.py import`"
        )
    return found


def _stored_mismatches(folder: str | Path, version: ModelVersion) -> list[FileMismatch]:
    """Of a version's files where they are stored, or as they come from there."""
    with reaching(uri_of(version)):
        faults = model_files.mismatches(_digests(version), Path(folder), _num_bytes(version))
    return [fault for fault in faults if fault.file != _NOTE or fault.is_no_file]


def _num_bytes(version: ModelVersion) -> int:
    """Returns the size of a version's files in bytes; 0 where that is not known."""
    size = version.tags.get("bytes", "")
    return int(size) if size.isdecimal() else 0


def _card(copy: Path, registered: Mapping[str, str], pinned: str) -> ModelCard:
    """Raises InputError for a version without a card, and for one whose card tells of other weights."""
    beside = {name.removeprefix(f"{ARTIFACTS}/"): digest for name, digest in registered.items()}
    try:
        card = ModelCard.read(copy / ARTIFACTS) if CARD in beside else None
    except OSError as error:
        raise InputError(f"{pinned}: {CARD}: {error.strerror}") from error
    if card is None or WEIGHTS not in card.sha256 or not card.sha256.items() <= beside.items():
        raise InputError(f"{pinned}: has no {CARD} that tells of its {WEIGHTS}: it was not registered by this project")
    return card


def _store(client: MlflowClient, version: ModelVersion) -> ArtifactRepository:
    with reaching(uri_of(version)):
        location = client.get_model_version_download_uri(version.name, str(version.version))
        return get_artifact_repository(location, tracking_uri=client.tracking_uri)


def _download(store: ArtifactRepository, pinned: str, folder: Path) -> None:
    with reaching(pinned):
        store.download_artifacts("", dst_path=str(folder))
        (folder / _NOTE).unlink(missing_ok=True)


def _known(client: MlflowClient, name: str) -> str:
    """What there is instead; nothing where the server, rather than the name, is the trouble."""
    try:
        models = client.search_registered_models(max_results=20)
        told = f"registered models: {', '.join(model.name for model in models) or 'none'}"
        found = versions(client, name)
        numbers = [str(version.version) for version in found[-10:]]
        aliases = [f"@{alias}" for version in found for alias in version.aliases]
        return f" ({told}; of {name}: {', '.join(numbers + aliases)})" if found else f" ({told})"
    except (MlflowException, ExternalError):
        return ""
