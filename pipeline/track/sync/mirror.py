"""MLflow's copy of a run's folder, made and kept up from the folder alone.

    runs/NAME/  run.json, config.yaml ─────────────────────────▶ run: tags, parameters, data sets
                metrics.jsonl, system/node-K.jsonl ──new lines──▶ metric points
                packages.txt, goodput.json, … ──changed files───▶ artifacts
                versions/ ─────────────────────────────────────▶ model versions
                slurm/sweep.json ──────────────────────────────▶ parent run
                run.json ────────────── last of all ───────────▶ status
                mlflow.json ◀── what has been sent, noted after each piece

A pass may end anywhere, and what was sent but not noted is sent again. That changes nothing: the run is found by its
UUID, a point that equals a stored one in key, step, time and value is dropped by MLflow, a file takes its own place.
"""

import contextlib
import hashlib
import json
import math
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import (
    MAX_DATASET_DIGEST_SIZE,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)
from pydantic import BaseModel, ConfigDict

from pipeline import files
from pipeline.config import fingerprint, load_config, read_json
from pipeline.errors import InputError
from pipeline.redact import redact, redact_urls
from pipeline.track import tracking_server
from pipeline.track.model_card import ModelCard
from pipeline.track.sync.outbox import Outbox
from pipeline.track.sync.record import MAIN_METRIC, PARENT, DataInput, Record, Status

NOTE, METRICS, CONFIG = "mlflow.json", "metrics.jsonl", "config.yaml"
TREES = (CONFIG, "deepspeed.json")
"""Files that are redacted by their keys; in others, URLs are."""
FILES = (
    *TREES,
    "packages.txt",
    "diff.patch",
    "samples.png",
    "predictions.png",
    "report.html",
    "anomalies.jsonl",
    "quarantine.jsonl",
    "goodput.json",
    METRICS,
)
LOOK_AGAIN_S = 60.0
"""Least time between two looks for changed files while the run goes on."""


class Place(BaseModel):
    """How far a file of lines has been sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offset: int = 0
    line: int = 0
    before: str = hashlib.sha256().hexdigest()
    """SHA-256 of the bytes just before `offset`, which differ when lines were dropped and others written since."""


class Sent(BaseModel):
    """What the server has by now."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    uri: str
    run_id: str | None = None
    facts: str | None = None
    """Fingerprint of tags and data sets."""
    places: dict[str, Place] = {}
    files: dict[str, str] = {}
    """SHA-256 of each artifact as it was sent."""
    pruned: int = 0
    """Registered versions, and those of them given up, that there were when surplus ones were last removed."""
    linked: bool = False
    """With the version that training started from."""
    sweep: str | None = None
    """UUID of the sweep that the run was put below."""
    status: Status | None = None
    ended_ms: int | None = None


class Mirror:
    """MLflow's copy of a run's folder. Several may exist, in several processes: their passes take turns."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for a folder that no job has written. Uses no network."""
        self.folder = folder
        self._record = Record.read(folder)
        self._config = load_config(folder / CONFIG)
        self.uri = tracking_server.tracking_uri(self._config.tracking.uri, folder.parent)
        self._sent = self._noted()
        self._outbox = Outbox(folder)
        self._client: MlflowClient | None = None
        self._looked: float | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's name for the run, once it has one."""
        return self._sent.run_id

    @property
    def behind(self) -> str:
        """What the server lacks, such as "5120 bytes of metrics, 2 versions, status", going by the notes alone;
        empty when nothing is missing."""
        self._record, self._sent = Record.read(self.folder), self._noted()
        left_bytes = sum(_whole_lines(path, self._place(path).offset) for path in self._line_files())
        left = {
            f"{left_bytes} bytes of metrics": left_bytes,
            f"{len(self._outbox.waiting())} versions": self._outbox.waiting(),
            f"{len(self._outbox.missing())} versions whose weights are gone": self._outbox.missing(),
            "files": any(True for _ in self._changed_files()),
            "status": not self._status_sent,
        }
        return ", ".join(text for text, lacking in left.items() if lacking)

    def sync(self) -> None:
        """One pass: when it returns, the server has all that the folder held when it began. While the run goes on,
        changes of files may be up to a minute old, and metrics.jsonl is sent as points alone.

        Raises Unreachable for trouble with the server or its stores; every pass goes on where the last one ended.
        """
        with files.locked(self.folder / f".{NOTE}.lock"):
            self._record, self._sent = Record.read(self.folder), self._noted()
            # Before connecting: they would pile up while the server is away.
            self._outbox.trim(self._config.tracking.keep_versions, self._record.tags[MAIN_METRIC])
            try:
                client = self._connected()
                self._send_facts(client)
                self._link_sweep(client)
                for path in self._line_files():
                    self._send_points(client, path)
                self._send_files(client)
                self._send_versions(client)
                self._link_parent(client)
                self._send_status(client)
            except tracking_server.Unreachable:
                self._client = None
                raise

    def _noted(self) -> Sent:
        uri = redact(self.uri)
        try:
            sent = read_json(Sent, self.folder / NOTE)
        except (FileNotFoundError, InputError):
            return Sent(uri=uri)
        return sent if sent.uri == uri else Sent(uri=uri)

    def _note(self) -> None:
        files.write(self.folder / NOTE, self._sent.model_dump_json(indent=1).encode() + b"\n")

    def _reaching(self) -> contextlib.AbstractContextManager[None]:
        return tracking_server.reaching(f"tracking server {redact(self.uri)}")

    def _connected(self) -> MlflowClient:
        """A client for which the run exists. Looks the run up again after trouble: the server may be another one."""
        if self._client and self._sent.run_id:
            return self._client
        try:
            with self._reaching():
                client = tracking_server.connect(self.uri, create=True)
                self._experiment = tracking_server.find_experiment(client, self._config.tracking.experiment)
                run_id = self._find_run(client, self._record.uuid, self._record.name)
        except InputError as error:
            raise tracking_server.Unreachable(redact(str(error))) from error
        if self._sent.run_id != run_id:
            self._reopen_lost(client)
            self._sent = Sent(uri=redact(self.uri), run_id=run_id)
            self._note()
        self._client = client
        return client

    def _reopen_lost(self, client: MlflowClient) -> None:
        """Have the versions that a server should have of the run, but has lost or never had, registered again."""
        if not (uris := self._outbox.registered()):
            return
        from pipeline.track.registry import registry

        scores, tracking = self._outbox.scores(self._record.tags[MAIN_METRIC]), self._config.tracking
        best = sorted(uris, key=lambda entry: scores.get(entry, -math.inf), reverse=True)[: tracking.keep_versions]
        for entry in {*best, max(uris)}:  # the others were surplus
            if registry.is_lost(client, self._model_name, ModelCard.read(entry), self._experiment):
                found = self._outbox.reopen(entry)
                what = (
                    "it is registered again, under the next number" if found else "nothing holds its weights any more"
                )
                print(f"{self.folder}: {uris[entry]} is not in the registry: {what}", file=sys.stderr, flush=True)

    def _find_run(self, client: MlflowClient, uuid: str, name: str) -> str:
        """MLflow's name for the run with this UUID; it is created where there is none."""
        ours = f"tags.`run.uuid` = '{uuid}'"
        if found := client.search_runs([self._experiment], ours, max_results=1):
            return found[0].info.run_id
        began_ms, tags = self._record.began_ms, {"run.uuid": uuid}
        run = client.create_run(self._experiment, start_time=began_ms, run_name=name, tags=tags)
        return run.info.run_id

    def _send_facts(self, client: MlflowClient) -> None:
        record, run_id = self._record, self._run_id
        tags = redact({"seed": str(self._config.run.seed), **record.tags})
        inputs = [_dataset_input(data) for data in record.inputs]
        facts = fingerprint([tags, [source.model_dump() for source in record.inputs]])
        if facts == self._sent.facts:
            return
        with self._reaching():
            if self._sent.facts is None:
                # Only those that are missing: MLflow refuses a parameter whose value a restart has changed.
                known = client.get_run(run_id).data.params
                flat = _flatten(redact(self._config.model_dump(mode="json")))
                params = [Param(key, _cut(value, MAX_PARAM_VAL_LENGTH)) for key, value in flat if key not in known]
                for batch in _batches(params, MAX_PARAMS_TAGS_PER_BATCH):
                    client.log_batch(run_id, params=batch)
            run_tags = [RunTag(key, _cut(value, MAX_TAG_VAL_LENGTH)) for key, value in tags.items()]
            for batch in _batches(run_tags, MAX_PARAMS_TAGS_PER_BATCH):
                client.log_batch(run_id, tags=batch)
            client.log_inputs(run_id, inputs)
        self._sent.facts = facts
        self._note()

    def _link_sweep(self, client: MlflowClient) -> None:
        """Put the run below its sweep's, a run of MLflow's that holds nothing else."""
        sweep = self._record.sweep
        if sweep is None or self._sent.sweep == sweep.uuid:
            return
        # No server can be asked to create a run unless there is one, so whichever of the runs comes first holds the
        # others up. They share the folder of all runs.
        with files.locked(self.folder.parent / f".sweep-{sweep.uuid}.lock"), self._reaching():
            parent = self._find_run(client, sweep.uuid, sweep.name)
            client.set_terminated(parent, "FINISHED")
            client.set_tag(self._run_id, MLFLOW_PARENT_RUN_ID, parent)
        self._sent.sweep = sweep.uuid
        self._note()

    def _line_files(self) -> list[Path]:
        metrics = self.folder / METRICS
        return [*([metrics] if metrics.exists() else []), *sorted(self.folder.glob("system/node-*.jsonl"))]

    def _place(self, path: Path) -> Place:
        """Where to go on in a file: at its beginning if the lines up to the noted place are no longer the same, as
        after a restart from a checkpoint that is older than they are."""
        place = self._sent.places.get(self._name(path), Place())
        return place if place.before == _digest_before(path, place.offset) else Place()

    def _send_points(self, client: MlflowClient, path: Path) -> None:
        place = self._place(path)
        known = None if place.offset == 0 else set()
        points: list[Metric] = []
        with path.open("rb") as lines:
            lines.seek(place.offset)
            number, offset = place.line, place.offset
            for line in lines:
                if not line.endswith(b"\n"):  # is being written
                    break
                if known is None:
                    known = self._stored(client, path)
                new = [point for point in self._points_of(path, number, line) if _identity(point) not in known]
                if points and len(points) + len(new) > MAX_METRICS_PER_BATCH:
                    self._send_batch(client, path, points, offset, number)
                    points = []
                points += new
                number, offset = number + 1, offset + len(line)
        if offset > place.offset:
            self._send_batch(client, path, points, offset, number)

    def _stored(self, client: MlflowClient, path: Path) -> set[tuple[str, int, int]]:
        """Which points of a file the server has. To send them again would do no harm, but MLflow takes a second to find
        that it knows a thousand."""
        prefixes = ("train/", "val/") if path.name == METRICS else (f"system/{path.stem}/",)
        with self._reaching():
            keys = [key for key in client.get_run(self._run_id).data.metrics if key.startswith(prefixes)]
            return {_identity(point) for key in keys for point in client.get_metric_history(self._run_id, key)}

    def _send_batch(self, client: MlflowClient, path: Path, points: list[Metric], offset: int, line: int) -> None:
        with self._reaching():
            for batch in _batches(points, MAX_METRICS_PER_BATCH):
                client.log_batch(self._run_id, metrics=batch)
        self._sent.places[self._name(path)] = Place(offset=offset, line=line, before=_digest_before(path, offset))
        self._note()

    def _points_of(self, path: Path, number: int, line: bytes) -> list[Metric]:
        try:
            document = json.loads(line)
        except ValueError:  # what a power cut can leave
            print(f"{path}: line {number + 1} is no JSON and is left out", file=sys.stderr, flush=True)
            return []
        time_ms = round(document.pop("time") * 1000)
        if path.name == METRICS:
            step = document.pop("step")
            prefix = "train/" if "loss" in document else "val/"
        else:
            step = number  # as MLflow's own monitor counts its samples
            document.pop("node")
            prefix = f"system/{path.stem}/"
        # null stands for what is not finite.
        return [
            Metric(f"{prefix}{name.removeprefix('val_')}", math.nan if value is None else value, time_ms, step)
            for name, value in document.items()
        ]

    def _changed_files(self) -> Iterator[tuple[str, bytes, str]]:
        """Name, redacted content and its digest of each file that the server does not have as it is now."""
        for name in [*FILES, *(data.manifest for data in self._record.inputs)]:
            path = self.folder / name
            # Its numbers are sent as points, so the file itself, the one that grows large, can wait for the end.
            if not path.exists() or (name == METRICS and self._record.status == "RUNNING"):
                continue
            content = _redacted_file(path)
            digest = hashlib.sha256(content).hexdigest()
            if self._sent.files.get(name) != digest:
                yield name, content, digest

    def _send_files(self, client: MlflowClient) -> None:
        now = time.monotonic()
        running = self._record.status == "RUNNING"
        if running and self._looked is not None and now - self._looked < LOOK_AGAIN_S:
            return
        for name, content, digest in self._changed_files():
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, Path(name).name)
                copy.write_bytes(content)
                with self._reaching():
                    client.log_artifact(self._run_id, str(copy), Path(name).parent.as_posix().removeprefix("."))
            self._sent.files[name] = digest
            self._note()
        self._looked = now

    def _send_versions(self, client: MlflowClient) -> None:
        waiting = self._outbox.waiting()
        if not waiting and self._num_changes() == self._sent.pruned:
            return
        from pipeline.track.registry import registry  # which takes seconds to import

        name = self._model_name
        for entry in waiting:
            uri = registry.register(client, name, entry, experiment_id=self._experiment, run_id=self._run_id)
            self._outbox.note(entry, uri)
        metric = self._record.tags[MAIN_METRIC]
        with self._where_allowed("surplus versions stay"):
            for uri, why in self._outbox.given_up().items():
                registry.give_up(client, uri, why)
            keep_best = self._config.tracking.keep_versions
            registry.prune(client, name, self._record.uuid, keep_best=keep_best, metric=metric)
        self._sent.pruned = self._num_changes()
        self._note()

    def _num_changes(self) -> int:
        return len(self._outbox.registered()) + len(self._outbox.given_up())

    def _link_parent(self, client: MlflowClient) -> None:
        parent = self._record.tags.get(PARENT)
        if parent is None or self._sent.linked:
            return
        from pipeline.track.registry import registry

        with self._where_allowed("its parent does not know of it"), tracking_server.reaching(parent):
            parent_run = registry.find(client, parent).run_id
            if parent_run and not self._record.sweep:  # a run is below one alone
                client.set_tag(self._run_id, MLFLOW_PARENT_RUN_ID, parent_run)
            registry.link_child(client, parent, self._record.uuid, self._run_id)
        self._sent.linked = True
        self._note()

    @contextlib.contextmanager
    def _where_allowed(self, otherwise: str) -> Iterator[None]:
        """Around what only others lose by: a user who may read their models is not held up by what is not theirs."""
        try:
            yield
        except (InputError, tracking_server.Denied) as error:
            print(f"{self.folder}: {otherwise}: {error}", file=sys.stderr, flush=True)

    @property
    def _status_sent(self) -> bool:
        return (self._sent.status, self._sent.ended_ms) == (self._record.status, self._record.ended_ms)

    def _send_status(self, client: MlflowClient) -> None:
        if self._status_sent:
            return
        status, ended_ms = self._record.status, self._record.ended_ms
        with self._reaching():
            if status == "RUNNING":
                client.update_run(self._run_id, status)
            else:
                client.set_terminated(self._run_id, status, ended_ms)
        self._sent.status, self._sent.ended_ms = status, ended_ms
        self._note()

    @property
    def _model_name(self) -> str:
        return self._config.tracking.model_name or self._config.run.name

    @property
    def _run_id(self) -> str:
        assert self._sent.run_id, "connected first"
        return self._sent.run_id

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _redacted_file(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name == CONFIG:
        return yaml.safe_dump(redact(yaml.safe_load(content)), sort_keys=False).encode()
    if path.name in TREES:
        return json.dumps(redact(json.loads(content)), indent=2).encode() + b"\n"
    if path.suffix == ".png":
        return content
    return redact_urls(content.decode("latin-1")).encode("latin-1")  # which keeps any bytes as they are


def _dataset_input(data: DataInput) -> DatasetInput:
    path = redact(data.path)
    scheme = urllib.parse.urlsplit(path).scheme
    kind = "http" if scheme == "https" else scheme or "local"
    dataset = Dataset(
        name="/".join(Path(urllib.parse.urlsplit(path).path).parts[-2:]).strip("/") or path,
        digest=data.digest[:MAX_DATASET_DIGEST_SIZE],
        source_type=kind,
        source=json.dumps({"url" if kind == "http" else "uri": path}),
        profile=json.dumps({"samples": data.samples, "classes": data.classes, "sha256": data.digest}),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, data.context)])


def _identity(point: Metric) -> tuple[str, int, int]:
    """Of one line and one name: no two lines of a file have the same step and time."""
    return point.key, point.step, point.timestamp


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in tree.items():
        # A mapping by something other than names, such as the resolution schedule, is one value.
        if isinstance(value, dict) and all(key.isidentifier() for key in value):
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _cut(value: Any, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _whole_lines(path: Path, offset: int) -> int:
    """Bytes of the complete lines after `offset`."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().rfind(b"\n") + 1


def _digest_before(path: Path, offset: int, window: int = 4096) -> str:
    """SHA-256 of up to `window` bytes before `offset`; empty beyond the file's end."""
    if offset > path.stat().st_size:
        return ""
    with path.open("rb") as file:
        file.seek(max(0, offset - window))
        return hashlib.sha256(file.read(min(offset, window))).hexdigest()
