"""Tracking and registry against both kinds of backend: SQLite beside the runs, and a server as a team has it, on
PostgreSQL and S3 with basic auth, whose user is no admin."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import safetensors.torch
import timm
import torch
import yaml
from mlflow.tracking import MlflowClient

import pvt  # noqa: F401 - registers its models with timm
from pipeline.config import Bound, ClassificationConfig, Config, Gates, dump_config
from pipeline.errors import InputError
from pipeline.shards.index import ShardSet
from pipeline.track import tracking_server
from pipeline.track.model_card import WEIGHTS, ModelCard, ScoredData
from pipeline.track.registry import promote, registry
from pipeline.track.sync.mirror import Mirror
from pipeline.track.sync.outbox import Outbox
from pipeline.track.sync.record import DataInput, Record
from tests.conftest import write_config
from tests.ranks import PATIENCE_S, Rank
from tests.tracking_servers import (
    PASSWORD,
    USER,
    MlflowServer,
    ObjectStore,
    credentials,
    mlflow_server,
    object_store,
    postgres,
)
from tests.workers.register import register_together

pytestmark = pytest.mark.filterwarnings(
    "ignore:Operation with range is deprecated"
)  # MLflow's, about its use of pandas


@dataclass(frozen=True)
class Team:
    server: MlflowServer
    store: ObjectStore


@dataclass(frozen=True)
class Backend:
    uri: str
    configured: str | None
    """tracking.uri of a run's configuration."""
    root: Path
    """run.root of it."""
    store: ObjectStore | None

    @property
    def client(self) -> MlflowClient:
        return tracking_server.connect(self.uri, create=True)

    def flip_last_byte(self, location: str) -> None:
        """Of a stored artifact, behind MLflow's back."""
        path = urlsplit(location).path
        if self.store:
            data = self.store.read(path.lstrip("/"))
            self.store.write(path.lstrip("/"), _flipped(data))
        else:
            Path(path).write_bytes(_flipped(Path(path).read_bytes()))


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    with ExitStack() as stack:
        store = stack.enter_context(object_store())
        database = stack.enter_context(postgres())
        yield Team(stack.enter_context(mlflow_server(database, store)), store)


@pytest.fixture(params=["embedded", "server"])
def backend(
    request: pytest.FixtureRequest, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Backend]:
    root = tmp_path / "runs"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if request.param == "embedded":
        root.mkdir()
        shutil.copy(empty_database, root)
        yield Backend(tracking_server.tracking_uri(None, root), None, root, None)
        return
    team: Team = request.getfixturevalue("team")
    with credentials(USER, PASSWORD):
        yield Backend(team.server.url, team.server.url, root, team.store)


only_server = pytest.mark.parametrize("backend", ["server"], indirect=True)


@pytest.fixture
def run(backend: Backend, digits: Path, make_config: Callable[..., Config]) -> Path:
    """The folder of a run of eight steps that has ended, as a job leaves it."""
    made = make_config(f"run.root={backend.root}", f"tracking.uri={backend.configured or 'null'}")
    folder = made.run.folder
    (folder / "data").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(made))
    (folder / "packages.txt").write_text("torch==2\n")
    (folder / "deepspeed.json").write_text('{"zero_optimization": {"stage": 1}}\n')
    manifest = ShardSet(digits / "train").manifests[0]
    (folder / "data/training-0.json").write_text(manifest.model_dump_json())
    data = DataInput(
        context="training",
        path=str(digits / "train"),
        digest=manifest.digest,
        samples=manifest.samples,
        classes=len(manifest.classes),
        manifest="data/training-0.json",
    )
    record = Record.begin(folder, made.run.name, tags={"main_metric": "top1"}, inputs=[data])
    now = record.began_ms / 1000
    lines = [{"step": step, "time": now + step, "epoch": step / 8, "loss": 2.5 / step} for step in range(1, 9)]
    lines[4]["loss"] = None  # was not finite
    lines.append({"step": 8, "time": now + 9, "top1": 1 / 3, "val_loss": 0.1 + 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record.end(folder, "FINISHED")
    return folder


def assert_every_point_arrived(client: MlflowClient, folder: Path) -> None:
    """Number by number with the time of each, none twice and none else."""
    expected: dict[str, list[tuple[int, int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        step, time_ms = point.pop("step"), round(point.pop("time") * 1000)
        kind = "train" if "loss" in point else "val"
        for name, value in point.items():
            number = math.inf if value is None else value  # NaN equals nothing
            expected.setdefault(f"{kind}/{name.removeprefix('val_')}", []).append((step, time_ms, number))
    run_id = run_id_of(folder)
    arrived = {
        name: [
            (point.step, point.timestamp, math.inf if math.isnan(point.value) else point.value)
            for point in client.get_metric_history(run_id, name)
        ]
        for name in client.get_run(run_id).data.metrics
        if "/" in name  # others belong to a version
    }
    assert {name: sorted(points) for name, points in arrived.items()} == expected


def run_id_of(folder: Path) -> str:
    return json.loads((folder / "mlflow.json").read_text())["run_id"]


def test_run_is_mirrored_to_mlflow(backend: Backend, run: Path) -> None:
    Mirror(run).sync()
    client = backend.client
    assert_every_point_arrived(client, run)
    mirrored = client.get_run(run_id_of(run))
    record = Record.read(run)
    assert mirrored.info.status == "FINISHED"
    assert (mirrored.info.start_time, mirrored.info.end_time) == (record.began_ms, record.ended_ms)
    assert mirrored.data.params["train.global_batch_size"] == "48"
    assert mirrored.data.tags["run.uuid"] == record.uuid
    assert mirrored.inputs
    (used,) = mirrored.inputs.dataset_inputs
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}
    assert json.loads(used.dataset.profile or "")["sha256"] == record.inputs[0].digest
    read: dict[str, Callable[[str], Any]] = {"yaml": yaml.safe_load, "json": json.loads, "jsonl": str, "txt": str}
    for path in ("config.yaml", "metrics.jsonl", "data/training-0.json", "deepspeed.json", "packages.txt"):
        copy = Path(client.download_artifacts(mirrored.info.run_id, path, str(run.parent)))
        parse = read[path.rpartition(".")[2]]
        assert parse(copy.read_text()) == parse((run / path).read_text()), path


def test_deleted_mlflow_run_is_recreated(backend: Backend, run: Path) -> None:
    Mirror(run).sync()
    first = run_id_of(run)
    backend.client.delete_run(first)
    Mirror(run).sync()
    assert run_id_of(run) != first
    assert_every_point_arrived(backend.client, run)
    Mirror(run).sync()
    assert_every_point_arrived(backend.client, run)


@only_server
def test_wrong_password_is_reported_and_loses_no_data(backend: Backend, run: Path) -> None:
    with credentials(USER, "not-the-password"), pytest.raises(tracking_server.Unreachable) as refused:
        Mirror(run).sync()
    assert backend.uri in str(refused.value)
    assert "not authenticated" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "not-the-password" not in str(refused.value)
    Mirror(run).sync()
    assert_every_point_arrived(backend.client, run)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return timm.create_model("pvt_pico", num_classes=10, img_size=32).state_dict()


def write_entry(
    folder: Path, weights: dict[str, torch.Tensor], config: Config, *, step: int, top1: float = 0.9, seed: int = 0
) -> Path:
    """An outbox entry, as a job makes it of a checkpoint; `seed` decides its weights."""
    checkpoint = folder / f"weights-{step}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    head = torch.randn(weights["head.bias"].shape, generator=torch.Generator().manual_seed(seed))
    safetensors.torch.save_file({**weights, "head.bias": head}, checkpoint)
    card = ModelCard(
        task=ClassificationConfig(),
        model=config.model,
        image=config.image,
        eval_batch_size=32,
        classes=[str(digit) for digit in range(10)],
        metrics={"top1": top1, "val_loss": 0.5},
        scored=ScoredData(path="val", digest="v" * 64, samples=360),
        sha256={WEIGHTS: sha256(checkpoint)},
        lineage={"run": f"{step:032x}", "step": str(step), "config": "c", "code": "abc", "data": "d"},
    )
    return Outbox(folder).put({WEIGHTS: checkpoint}, card)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def experiment_of(client: MlflowClient, name: str, backend: Backend) -> str:
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    beside = None if backend.store else (backend.root / "artifacts" / name).resolve().as_uri()
    return client.create_experiment(name, artifact_location=beside)


@pytest.mark.slow
@only_server
def test_concurrent_jobs_register_distinct_versions(
    backend: Backend, tmp_path: Path, weights: dict[str, torch.Tensor], make_config: Callable[..., Config]
) -> None:
    """On an embedded database test_registry.py does this."""
    client = backend.client
    experiment_of(client, "shared", backend)
    entries = [write_entry(tmp_path / str(job), weights, make_config(), step=job + 1, seed=job) for job in range(8)]
    given = register_together(backend.uri, "many", entries, tmp_path, tracking_environment())
    assert sorted(given) == [f"models:/many/{version}" for version in range(1, 9)]
    newest = client.get_model_version_by_alias("many", "candidate")
    assert int(newest.version) == 8
    for entry, uri in zip(entries, given, strict=True):
        version = registry.resolve(uri, tmp_path / "cache")
        assert sha256(version.weights) == ModelCard.read(entry).sha256[WEIGHTS]
        assert version.tags["step"] == ModelCard.read(entry).lineage["step"]


@pytest.fixture
def registered(
    backend: Backend, tmp_path: Path, weights: dict[str, torch.Tensor], make_config: Callable[..., Config]
) -> Callable[..., str]:
    """Registers a version of a model."""

    def make(name: str, **entry: Any) -> str:
        client = backend.client
        experiment = experiment_of(client, "models", backend)
        folder = write_entry(tmp_path / "made", weights, make_config(), **entry)
        return registry.register(client, name, folder, experiment_id=experiment, run_id=None)

    return make


def test_champion_promotion_and_rollback(
    backend: Backend, registered: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PVT_MODEL_CACHE", str(tmp_path / "cache"))
    gates = Gates(metrics={"top1": Bound(min=0.5)}, champion={"top1": 0.01})
    first, worse, better = (
        registered("promoted", step=step, top1=top1) for step, top1 in ((1, 0.8), (2, 0.7), (3, 0.9))
    )

    def champion() -> str:
        return f"models:/promoted/{backend.client.get_model_version_by_alias('promoted', 'champion').version}"

    assert promote.promote(first, gates)["ok"]
    refused = promote.promote(worse, gates)
    assert not refused["ok"]
    assert [row["gate"] for row in refused["gates"] if not row["passed"]] == ["champion.top1"]
    assert champion() == first
    assert promote.promote(better, gates, why="better")["ok"]
    assert champion() == better
    assert promote.rollback("promoted")["champion"] == first
    assert champion() == first
    assert [(move["from"], move["to"]) for move in promote.history(backend.client, "promoted")] == [
        ("", "1"),
        ("1", "3"),
        ("3", "1"),
    ]
    assert promote.rollback("promoted")["champion"] is None
    assert "champion" not in backend.client.get_registered_model("promoted").aliases


@pytest.mark.parametrize("file", [WEIGHTS, "model.json"])
def test_tampered_artifact_is_rejected(
    backend: Backend, tmp_path: Path, registered: Callable[..., str], file: str
) -> None:
    name = f"tampered-{file.partition('.')[2]}"
    uri = registered(name, step=1)
    digest = sha256(registry.resolve(uri, tmp_path / "before").folder / file)
    source = backend.client.get_model_version_download_uri(name, "1")
    backend.flip_last_byte(f"{source}/artifacts/{file}")
    with pytest.raises(InputError, match=rf"^{uri}: artifacts/{file} has SHA-256 [0-9a-f]+, but {digest} was regis"):
        registry.resolve(uri, tmp_path / "after")
    assert not list((tmp_path / "after").rglob("*.safetensors"))


def start_job(backend: Backend, digits: Path, folder: Path, *overrides: str) -> tuple[Path, Rank]:
    """`python launch/pretrain.py …`, and the folder of its run."""
    folder.mkdir(exist_ok=True)
    config = [f"tracking.uri={backend.uri}", f"run.root={backend.root}", *overrides]
    arguments = ["--config", write_config(digits, folder), *(part for each in config for part in ("--set", each))]
    return backend.root / "tiny", Rank("launch/pretrain.py", arguments, tracking_environment(), folder / "job")


def tracking_environment() -> dict[str, str]:
    """Of this process, as ranks are forks of another one."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_TRACKING_")}


def result_of(job: Rank, log: Path) -> dict[str, Any]:
    """The JSON line at the end of its standard output."""
    assert job.wait(PATIENCE_S) == 0, log.with_suffix(".err").read_text()[-3000:]
    return json.loads(log.with_suffix(".out").read_text().splitlines()[-1])


def wait_for_step(folder: Path, step: int, job: Rank) -> None:
    deadline = time.monotonic() + PATIENCE_S
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_the_model_is_registered(client: MlflowClient, folder: Path, cache: Path) -> None:
    version = registry.resolve("models:/tiny@candidate", cache)
    assert version.tags["run"] == Record.read(folder).uuid
    name, number = version.uri.removeprefix("models:/").split("/")
    assert client.get_model_version(name, number).run_id == run_id_of(folder)


def assert_no_password(backend: Backend, folder: Path) -> None:
    """In what the job wrote, and in what the server keeps of it beside its users."""
    assert backend.store
    places = [*(path for path in folder.rglob("*") if path.is_file())]
    assert places
    for path in places:
        assert PASSWORD.encode() not in path.read_bytes(), path
    for key in backend.store.names():
        assert PASSWORD.encode() not in backend.store.read(key), key
    run = backend.client.get_run(run_id_of(backend.root / "tiny"))
    assert PASSWORD not in str(run.data.params) + str(run.data.tags)


@pytest.mark.slow
@only_server
def test_server_outage_during_run_loses_no_data(backend: Backend, team: Team, digits: Path, tmp_path: Path) -> None:
    steps = 240
    folder, job = start_job(backend, digits, tmp_path / "work", f"train.length={steps} steps")
    try:
        wait_for_step(folder, steps // 3, job)
        with team.server.away():
            wait_for_step(folder, 2 * steps // 3, job)
        result = result_of(job, tmp_path / "work/job")
    finally:
        job.kill()
    assert "nothing is lost" in (tmp_path / "work/job.err").read_text()
    client = backend.client
    assert_every_point_arrived(client, folder)
    assert client.get_run(run_id_of(folder)).info.status == "FINISHED"
    assert registry.resolve(result["model"], tmp_path / "cache").card.lineage["step"] == str(steps)
    assert_the_model_is_registered(client, folder, tmp_path / "cache")
    assert_no_password(backend, tmp_path)


@pytest.mark.slow
@only_server
def test_sync_uploads_run_whose_server_was_down_from_start(
    backend: Backend, team: Team, digits: Path, tmp_path: Path
) -> None:
    with team.server.away():
        folder, job = start_job(backend, digits, tmp_path / "work", "train.length=12 steps", "tracking.patience_s=1")
        try:
            result = result_of(job, tmp_path / "work/job")
        finally:
            job.kill()
        assert result["model"] is None
    log = tmp_path / "sync"
    synced = result_of(Rank("launch/registry.py", ["sync", folder], tracking_environment(), log), log)
    assert (synced["ok"], synced["left"], synced["run_id"]) == (True, "", run_id_of(folder))
    client = backend.client
    assert_every_point_arrived(client, folder)
    assert client.get_run(run_id_of(folder)).info.status == "FINISHED"
    assert_the_model_is_registered(client, folder, tmp_path / "cache")
    assert_no_password(backend, tmp_path)
