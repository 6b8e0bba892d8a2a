"""MLflow's copy of a run's folder, made and kept up to date from the folder alone.

    runs/NAME/  run.json, config.yaml ─────────────────────────▶ run: tags, parameters, data sets
                metrics.jsonl, system/node-K.jsonl ──new lines──▶ metric points
                packages.txt, goodput.json, … ──changed files───▶ artifacts
                versions/ ─────────────────────────────────────▶ model versions
                slurm/sweep.json ──────────────────────────────▶ parent run
                run.json ────────────── last of all ───────────▶ status
                mlflow.json ◀── what has been sent, noted after each piece

A pass may end anywhere, and what was sent but not noted is sent again. That changes nothing on the server: the run is
found by its UUID, MLflow drops a point that equals a stored one in key, step, time and value, and a file replaces its
former copy.
"""

import contextlib
import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH

from pipeline import files
from pipeline.config import fingerprint, load_config
from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.run_folder import CONFIG, METRICS
from pipeline.track import tracking_server
from pipeline.track.model_card import ModelCard
from pipeline.track.sync.artifacts import FILES, read_redacted
from pipeline.track.sync.line_files import (
    count_unsent_bytes,
    digest_before,
    identity,
    list_line_files,
    parse_points,
    prefixes_of,
)
from pipeline.track.sync.outbox import Outbox
from pipeline.track.sync.record import MAIN_METRIC, PARENT, Record
from pipeline.track.sync.run_facts import make_input, make_params, make_tags
from pipeline.track.sync.server_state import NOTE, FilePosition, ServerState

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 60.0
"""Least time between two searches for changed files while the run goes on."""


class Mirror:
    """MLflow's copy of a run's folder. Several may exist, in several processes: a lock orders their passes."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for a folder that is not a run's. Uses no network."""
        self.folder = folder
        self._record = Record.read(folder)
        self._config = load_config(folder / CONFIG)
        self.uri = tracking_server.tracking_uri(self._config.tracking.uri, folder.parent)
        self._sent = self._read_state()
        self._outbox = Outbox(folder)
        self._client: MlflowClient | None = None
        self._looked: float | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once it has one."""
        return self._sent.run_id

    @property
    def behind(self) -> str:
        """What the server lacks by our notes, such as "5120 bytes of metrics, 2 versions, status"; may be empty."""
        self._record = Record.read(self.folder)
        self._sent = self._read_state()
        lacking = []
        num_bytes = 0
        for path in list_line_files(self.folder):
            num_bytes += count_unsent_bytes(path, self._find_position(path).offset)
        if num_bytes:
            lacking.append(f"{num_bytes} bytes of metrics")
        if waiting := self._outbox.waiting():
            lacking.append(f"{len(waiting)} versions")
        if missing := self._outbox.missing():
            lacking.append(f"{len(missing)} versions whose weights are gone")
        if next(self._read_changed_files(), None):
            lacking.append("files")
        if not self._status_sent:
            lacking.append("status")
        return ", ".join(lacking)

    def sync(self) -> None:
        """Makes one pass, after which the server has all that the folder held when the pass began.

        While the run goes on, changes of files may be up to a minute old, and metrics.jsonl is sent as points alone.
        Raises Unreachable for failures of the server or its stores; the next pass goes on where this one ended.
        """
        with files.locked(self.folder / f".{NOTE}.lock"):
            self._record = Record.read(self.folder)
            self._sent = self._read_state()
            # Before connecting: entries would pile up while the server is down.
            self._outbox.trim(self._config.tracking.keep_versions, self._main_metric)
            try:
                client = self._connect()
                self._send_facts(client)
                self._link_sweep(client)
                for path in list_line_files(self.folder):
                    self._send_points(client, path)
                self._send_files(client)
                self._send_versions(client)
                self._link_parent(client)
                # Last of all: a run that has finished on the server is complete there.
                self._send_status(client)
            except tracking_server.Unreachable:
                # The next pass connects anew.
                self._client = None
                raise

    def _read_state(self) -> ServerState:
        return ServerState.read(self.folder, redact(self.uri))

    def _note(self) -> None:
        self._sent.write(self.folder)

    def _reaching(self) -> contextlib.AbstractContextManager[None]:
        return tracking_server.reaching(f"tracking server {redact(self.uri)}")

    def _connect(self) -> MlflowClient:
        """Returns a client for which the run exists."""
        if self._client and self._sent.run_id:
            return self._client
        # After a failure the run is looked up again: the server may be another one.
        try:
            with self._reaching():
                client = tracking_server.connect(self.uri, create=True)
                self._experiment = tracking_server.find_experiment(client, self._config.tracking.experiment)
                run_id = self._find_run(client, self._record.uuid, self._record.name)
        except InputError as error:
            raise tracking_server.Unreachable(redact(str(error))) from error
        # With a new id this is the first pass, another server, or one that lost its database: nothing counts as sent.
        if self._sent.run_id != run_id:
            self._reopen_lost(client)
            self._sent = ServerState(uri=redact(self.uri), run_id=run_id)
            self._note()
        self._client = client
        return client

    def _reopen_lost(self, client: MlflowClient) -> None:
        """Makes versions wait again that the server should have of the run, but has lost or never had."""
        uris = self._outbox.registered()
        if not uris:
            return
        from pipeline.track.registry import registry

        best = self._outbox.rank(uris, self._main_metric)
        # The best versions and the last one are kept in the registry; the others were surplus.
        for entry in {*best[: self._config.tracking.keep_versions], max(uris)}:
            if registry.is_lost(client, self._model_name, ModelCard.read(entry), self._experiment):
                outcome = "nothing holds its weights any more"
                if self._outbox.reopen(entry):
                    outcome = "it is registered again, under the next number"
                self._report(f"{uris[entry]} is not in the registry: {outcome}")

    def _find_run(self, client: MlflowClient, uuid: str, name: str) -> str:
        """Returns MLflow's id of the run with this UUID; the run is created where there is none."""
        if found := client.search_runs([self._experiment], f"tags.`run.uuid` = '{uuid}'", max_results=1):
            return found[0].info.run_id
        run = client.create_run(
            self._experiment,
            start_time=self._record.began_ms,
            run_name=name,
            tags={"run.uuid": uuid},
        )
        return run.info.run_id

    def _send_facts(self, client: MlflowClient) -> None:
        """Sends tags and data sets if they have changed, and at first the parameters."""
        record = self._record
        tags = redact({"seed": str(self._config.run.seed), **record.tags})
        facts = fingerprint([tags, [data.model_dump() for data in record.inputs]])
        if facts == self._sent.facts:
            return
        with self._reaching():
            if self._sent.facts is None:
                # Only those that are missing: MLflow refuses a parameter whose value a restart has changed.
                known = client.get_run(self._run_id).data.params
                for batch in _batches(make_params(self._config, known), MAX_PARAMS_TAGS_PER_BATCH):
                    client.log_batch(self._run_id, params=batch)
            for batch in _batches(make_tags(tags), MAX_PARAMS_TAGS_PER_BATCH):
                client.log_batch(self._run_id, tags=batch)
            client.log_inputs(self._run_id, [make_input(data) for data in record.inputs])
        self._sent.facts = facts
        self._note()

    def _link_sweep(self, client: MlflowClient) -> None:
        """Puts the run below its sweep's, a run of MLflow's that holds nothing else."""
        sweep = self._record.sweep
        if sweep is None or self._sent.sweep == sweep.uuid:
            return
        # No server can create a run only if it is missing, so the first of the sweep's runs to come here makes the
        # others wait. They share the folder of all runs.
        with files.locked(self.folder.parent / f".sweep-{sweep.uuid}.lock"), self._reaching():
            parent = self._find_run(client, sweep.uuid, sweep.name)
            # The parent has no process of its own, and would look as if it ran for ever.
            client.set_terminated(parent, "FINISHED")
            client.set_tag(self._run_id, MLFLOW_PARENT_RUN_ID, parent)
        self._sent.sweep = sweep.uuid
        self._note()

    def _find_position(self, path: Path) -> FilePosition:
        """Returns the position to go on at in a file of lines."""
        position = self._sent.places.get(self._name(path), FilePosition())
        if position.before == digest_before(path, position.offset):
            return position
        # Earlier lines have changed, as after a restart from a checkpoint that is older than they are.
        return FilePosition()

    def _send_points(self, client: MlflowClient, path: Path) -> None:
        position = self._find_position(path)
        number = position.line
        offset = position.offset
        # From the beginning of a file points may have been sent already. What the server has is asked for only when
        # there is a line to send.
        known = set() if offset else None
        points = []
        with path.open("rb") as lines:
            lines.seek(offset)
            for line in lines:
                # The job is writing this line at the moment.
                if not line.endswith(b"\n"):
                    break
                if known is None:
                    known = self._fetch_known(client, path)
                new = [point for point in parse_points(path, number, line) if identity(point) not in known]
                if points and len(points) + len(new) > MAX_METRICS_PER_BATCH:
                    self._send_batch(client, path, points, offset, number)
                    points = []
                points += new
                number += 1
                offset += len(line)
        if offset > position.offset:
            self._send_batch(client, path, points, offset, number)

    def _fetch_known(self, client: MlflowClient, path: Path) -> set[tuple[str, int, int]]:
        """Returns the identities of a file's points that the server has."""
        # To send them again would do no harm, but MLflow takes a second to find that it has a thousand.
        known = set()
        prefixes = prefixes_of(path)
        with self._reaching():
            for key in client.get_run(self._run_id).data.metrics:
                if key.startswith(prefixes):
                    known.update(map(identity, client.get_metric_history(self._run_id, key)))
        return known

    def _send_batch(self, client: MlflowClient, path: Path, points: list[Metric], offset: int, line: int) -> None:
        with self._reaching():
            # One line may hold more points than a batch.
            for batch in _batches(points, MAX_METRICS_PER_BATCH):
                client.log_batch(self._run_id, metrics=batch)
        self._sent.places[self._name(path)] = FilePosition(
            offset=offset,
            line=line,
            before=digest_before(path, offset),
        )
        self._note()

    def _read_changed_files(self) -> Iterator[tuple[str, bytes, str]]:
        """Yields name, redacted content and its digest of each file that differs from the server's copy."""
        running = self._record.status == "RUNNING"
        for name in [*FILES, *(data.manifest for data in self._record.inputs)]:
            path = self.folder / name
            # This file grows large. Its numbers are sent as points, so the file itself can wait for the run's end.
            if name == METRICS and running:
                continue
            if path.exists():
                content = read_redacted(path)
                digest = hashlib.sha256(content).hexdigest()
                if self._sent.files.get(name) != digest:
                    yield name, content, digest

    def _send_files(self, client: MlflowClient) -> None:
        now = time.monotonic()
        running = self._record.status == "RUNNING"
        if running and self._looked is not None and now - self._looked < LOOK_AGAIN_S:
            return
        for name, content, digest in self._read_changed_files():
            path = Path(name)
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, path.name)
                copy.write_bytes(content)
                with self._reaching():
                    client.log_artifact(self._run_id, str(copy), path.parent.as_posix().removeprefix("."))
            self._sent.files[name] = digest
            self._note()
        self._looked = now

    def _send_versions(self, client: MlflowClient) -> None:
        waiting = self._outbox.waiting()
        if not waiting and self._count_changes() == self._sent.pruned:
            return
        # Importing this takes seconds.
        from pipeline.track.registry import registry

        name = self._model_name
        for entry in waiting:
            uri = registry.register(
                client,
                name,
                entry,
                experiment_id=self._experiment,
                run_id=self._run_id,
            )
            # Noted entry by entry: a pass that ends here does not upload again.
            self._outbox.note(entry, uri)
        with self._where_allowed("surplus versions stay"):
            for uri, why in self._outbox.given_up().items():
                registry.give_up(client, uri, why)
            registry.prune(
                client,
                name,
                self._record.uuid,
                keep_best=self._config.tracking.keep_versions,
                metric=self._main_metric,
            )
        self._sent.pruned = self._count_changes()
        self._note()

    def _count_changes(self) -> int:
        return len(self._outbox.registered()) + len(self._outbox.given_up())

    def _link_parent(self, client: MlflowClient) -> None:
        """Links the run with the version that training started from."""
        parent = self._record.tags.get(PARENT)
        if parent is None or self._sent.linked:
            return
        from pipeline.track.registry import registry

        with self._where_allowed("its parent does not know of it"), tracking_server.reaching(parent):
            parent_run = registry.find_version(client, parent).run_id
            # A run has one parent in MLflow, which is the sweep's where there is one.
            if parent_run and not self._record.sweep:
                client.set_tag(self._run_id, MLFLOW_PARENT_RUN_ID, parent_run)
            registry.link_child(client, parent, self._record.uuid, self._run_id)
        self._sent.linked = True
        self._note()

    @contextlib.contextmanager
    def _where_allowed(self, otherwise: str) -> Iterator[None]:
        """Surrounds changes of other users' models. Where a run may not make them, it reports that and goes on."""
        try:
            yield
        except (InputError, tracking_server.Denied) as error:
            self._report(f"{otherwise}: {error}")

    @property
    def _status_sent(self) -> bool:
        return self._sent.status == self._record.status and self._sent.ended_ms == self._record.ended_ms

    def _send_status(self, client: MlflowClient) -> None:
        if self._status_sent:
            return
        status = self._record.status
        ended_ms = self._record.ended_ms
        with self._reaching():
            if status == "RUNNING":
                client.update_run(self._run_id, status)
            else:
                client.set_terminated(self._run_id, status, ended_ms)
        self._sent.status = status
        self._sent.ended_ms = ended_ms
        self._note()

    @property
    def _main_metric(self) -> str:
        return self._record.tags[MAIN_METRIC]

    @property
    def _model_name(self) -> str:
        return self._config.tracking.model_name or self._config.run.name

    @property
    def _run_id(self) -> str:
        assert self._sent.run_id, "connected first"
        return self._sent.run_id

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _report(self, message: str) -> None:
        log.warning(f"{self.folder}: {message}")


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
