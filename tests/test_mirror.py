"""MLflow's copy of a run's folder: complete whatever happens to the server or to who makes it, and without secrets."""

import collections
import fcntl
import hashlib
import json
import math
import random
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
import safetensors.torch
import timm
import yaml
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service import utils as tracking_utils

import pvt  # noqa: F401 - registers its models with timm
from pipeline.commands import registry as registry_command
from pipeline.config import ClassificationConfig, Config, dump_config, load_config
from pipeline.errors import InputError
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import registry
from pipeline.track.relocate import relocate
from pipeline.track.sync import mirror, system_load, tracker
from pipeline.track.sync.mirror import Mirror
from pipeline.track.sync.outbox import Outbox
from pipeline.track.sync.record import SWEEP, DataInput, Record, Status, Sweep
from pipeline.track.sync.system_load import SystemLoad
from pipeline.track.sync.tracker import Tracker, record_failure
from pipeline.track.tracking_server import Unreachable, connect
from tests.conftest import write_config
from tests.ranks import PATIENCE_S, ROOT, Rank, free_port
from tests.tracking_servers import MlflowServer

# What the server should have: {metric: [(step, time in ms, value or None)]}
Points = dict[str, list[tuple[int, int, float | None]]]
BEGAN_S = 1_700_000_000.0
SWEEP_UUID = "5eed" * 8
FACTS: Any = {"digest": hashlib.sha256(b"data").hexdigest(), "samples": 100, "classes": 10}


@pytest.fixture(autouse=True)
def _no_server_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow itself sets this to the server that it used last."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def root(tmp_path: Path, empty_database: Path) -> Path:
    """Where `begin` finds an embedded database."""
    (tmp_path / "runs").mkdir()
    shutil.copyfile(empty_database, tmp_path / "runs" / "mlflow.db")
    return tmp_path


@pytest.fixture
def folder(root: Path) -> Path:
    return begin(root)


def begin(root: Path, *overrides: str, tags: dict[str, str] | None = None) -> Path:
    """The folder of a run that has just begun."""
    root.mkdir(exist_ok=True)
    config = load_config(write_config(Path("/data/digits"), root), list(overrides))
    (config.run.folder / "data").mkdir(parents=True)
    for name in ("training-0", "validation-1"):
        (config.run.folder / "data" / f"{name}.json").write_text(json.dumps({"name": name}))
    return resume(config, tags or {})


def resume(config: Config, tags: dict[str, str]) -> Path:
    folder = config.run.folder
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, **config.engine.deepspeed}))
    (folder / "packages.txt").write_text(tracker.list_packages())
    training, validation = config.data.train_paths[0], str(config.data.val)
    inputs = [
        DataInput(context="training", path=training, manifest="data/training-0.json", **FACTS),
        DataInput(context="validation", path=validation, manifest="data/validation-1.json", **FACTS),
    ]
    Record.begin(folder, config.run.name, tags={"main_metric": "val_top1", **tags}, inputs=inputs)
    return folder


def log(folder: Path, steps: range, *, attempt: int = 0) -> None:
    """Lines as training writes them; every tenth step has an evaluation and every seventh a loss that is not finite."""
    with (folder / "metrics.jsonl").open("a") as lines:
        for step in steps:
            numbers = random.Random(step)
            at = {"step": step, "time": round(BEGAN_S + 1000 * attempt + step / 3, 3)}
            loss = None if step % 7 == 0 else numbers.gauss(2, 1)
            lines.write(json.dumps({**at, "loss": loss, "lr": numbers.random() * 1e-3, "epoch": step / 9}) + "\n")
            if step % 10 == 0:
                lines.write(json.dumps({**at, "val_loss": numbers.random(), "val_top1": numbers.random()}) + "\n")


def log_load(folder: Path, samples: int) -> None:
    (folder / "system").mkdir(exist_ok=True)
    for node in range(2):
        with (folder / "system" / f"node-{node}.jsonl").open("a") as lines:
            for sample in range(samples):
                load = {"cpu_utilization_percentage": 10.0 * node + sample, "network_receive_megabytes": sample / 7}
                lines.write(json.dumps({"time": BEGAN_S + 10 * sample + node / 8, "node": node, **load}) + "\n")


def written(folder: Path) -> Points:
    """The numbers of the folder's files under the names that MLflow is to know them by."""
    points: Points = collections.defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        document = json.loads(line)
        step, time_ms = document.pop("step"), round(document.pop("time") * 1000)
        for name, value in document.items():
            key = f"train/{name}" if "loss" in document else f"val/{name[len('val_') :]}"
            points[key].append((step, time_ms, value))
    for path in folder.glob("system/*.jsonl"):
        for number, line in enumerate(path.read_text().splitlines()):
            document = json.loads(line)
            time_ms, node = round(document.pop("time") * 1000), document.pop("node")
            for name, value in document.items():
                points[f"system/node-{node}/{name}"].append((number, time_ms, value))
    return {key: sorted(rows) for key, rows in points.items()}


def stored(client: MlflowClient, run_id: str) -> Points:
    points: Points = {}
    for key in client.get_run(run_id).data.metrics:
        history = client.get_metric_history(run_id, key)
        points[key] = sorted((m.step, m.timestamp, None if math.isnan(m.value) else m.value) for m in history)
    return points


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(Mirror(folder).uri)


def the_run(folder: Path, client: MlflowClient | None = None) -> Any:
    """MLflow's run, of which there must be exactly one."""
    client = client or client_of(folder)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments)
    assert found.data.tags["run.uuid"] == Record.read(folder).uuid
    return client.get_run(found.info.run_id)


def artifacts(folder: Path) -> dict[str, Path]:
    root = folder.parent / "artifacts" / "pretrain" / the_run(folder).info.run_id / "artifacts"
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}


def end(folder: Path, status: Status = "FINISHED") -> Record:
    record = Record.read(folder)
    record.end(folder, status)
    return record


def dump(folder: Path) -> list[str]:
    with sqlite3.connect(folder.parent / "mlflow.db") as database:
        return list(database.iterdump())


def wait_until(happened: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "has not happened"
        time.sleep(0.02)


def test_sync_mirrors_complete_run_to_mlflow(folder: Path) -> None:
    log(folder, range(1, 401))
    log_load(folder, samples=5)
    (folder / "diff.patch").write_text("- old\n+ new\n")
    (folder / "goodput.json").write_text('{"ettr": 0.9}')
    Mirror(folder).sync()
    record = end(folder)
    copy = Mirror(folder)
    assert copy.behind == "files, status"
    copy.sync()

    assert copy.behind == ""
    client, run = client_of(folder), the_run(folder)
    assert copy.run_id == run.info.run_id
    assert stored(client, run.info.run_id) == written(folder)
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (record.began_ms, record.ended_ms)
    assert run.data.tags["main_metric"] == "val_top1"
    assert run.data.tags["seed"] == "0"
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.params["mix.cutmix_alpha"] == "1.0"
    inputs = {data.tags[0].value: data.dataset for data in run.inputs.dataset_inputs}
    assert set(inputs) == {"training", "validation"}
    assert inputs["training"].name == "digits/train"
    assert inputs["training"].digest == record.inputs[0].digest[:36]
    assert json.loads(inputs["training"].profile)["sha256"] == record.inputs[0].digest
    assert json.loads(inputs["training"].source) == {"uri": "/data/digits/train"}
    files = artifacts(folder)
    sent = {"config.yaml", "deepspeed.json", "packages.txt", "diff.patch", "goodput.json", "metrics.jsonl"}
    assert set(files) == {*sent, "data/training-0.json", "data/validation-1.json"}
    for name in (*sent - {"deepspeed.json"}, "data/training-0.json"):
        assert files[name].read_bytes() == (folder / name).read_bytes()


def test_repeated_sync_changes_nothing(folder: Path) -> None:
    log(folder, range(1, 301))
    log_load(folder, samples=5)
    end(folder)
    Mirror(folder).sync()
    before = dump(folder)
    Mirror(folder).sync()
    assert dump(folder) == before
    (folder / "mlflow.json").unlink()  # as if killed after everything was sent and before anything was noted
    Mirror(folder).sync()
    assert dump(folder) == before


def test_partial_metric_line_is_sent_once_complete(folder: Path) -> None:
    log(folder, range(1, 6))
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    copy = Mirror(folder)
    copy.sync()
    assert copy.behind == ""
    points = stored(client_of(folder), the_run(folder).info.run_id)
    assert len(points["train/loss"]) == 4
    path.write_bytes(whole)
    copy.sync()
    assert stored(client_of(folder), the_run(folder).info.run_id) == written(folder)


@pytest.mark.parametrize("dropped_to", [0, 30, 60, 99])
@pytest.mark.parametrize("grown_to", [61, 150])
def test_metrics_rewritten_after_resume_are_sent(folder: Path, dropped_to: int, grown_to: int) -> None:
    log(folder, range(1, 101))
    Mirror(folder).sync()
    first = written(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= dropped_to))
    log(folder, range(dropped_to + 1, grown_to), attempt=1)
    Mirror(folder).sync()
    # MLflow cannot take back the points of steps that were repeated: both attempts' are there, nothing else.
    second = written(folder)
    assert stored(client_of(folder), the_run(folder).info.run_id) == {
        key: sorted({*first[key], *second.get(key, [])}, key=lambda row: row[:2]) for key in first
    }


def test_sync_killed_repeatedly_loses_nothing(folder: Path, tmp_path: Path) -> None:
    log(folder, range(1, 3001))
    log_load(folder, samples=1000)
    end(folder)
    note = folder / "mlflow.json"
    pause, where = random.Random(1), []
    for kill in range(6):
        worker = Rank("tests.workers.mirror", [folder], {}, tmp_path / f"worker-{kill}")
        before = note.read_bytes() if note.exists() else b""
        wait_until(lambda before=before: note.exists() and note.read_bytes() != before)
        time.sleep(pause.random() * 0.15)
        worker.kill()
        worker.wait()
        where.append(sum(place.offset for place in Mirror(folder)._sent.places.values()))
    assert len(set(where)) > 3, f"the kills came at {where}, too close together to show anything"
    assert Mirror(folder).behind, "the kills came too late to show anything"
    Mirror(folder).sync()
    assert Mirror(folder).behind == ""
    run = the_run(folder)
    assert stored(client_of(folder), run.info.run_id) == written(folder)
    assert run.info.status == "FINISHED"


def test_concurrent_syncs_create_one_run(folder: Path) -> None:
    log(folder, range(1, 301))
    copies = [Mirror(folder) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda copy: copy.sync(), copies))
    assert {copy.run_id for copy in copies} == {the_run(folder).info.run_id}
    assert stored(client_of(folder), copies[0].run_id or "") == written(folder)


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_run_status_is_mirrored(folder: Path, status: Status) -> None:
    Mirror(folder).sync()
    assert the_run(folder).info.status == "RUNNING"
    record = end(folder, status)
    Mirror(folder).sync()
    assert (the_run(folder).info.status, the_run(folder).info.end_time) == (status, record.ended_ms)


def test_resumed_run_continues_same_mlflow_run(folder: Path) -> None:
    log(folder, range(1, 11))
    end(folder, "KILLED")
    Mirror(folder).sync()
    first = the_run(folder).info.run_id
    # Other values than the first time, some of which MLflow would refuse as parameters.
    config = load_config(folder / "config.yaml", ["train.length=40 steps", "optim.lr=5e-3"])
    resume(config, {"code.dirty": "true"})
    Mirror(folder).sync()
    run = the_run(folder)
    assert (run.info.run_id, run.info.status) == (first, "RUNNING")
    assert run.data.params["train.length"] == "20 steps"
    assert run.data.tags["code.dirty"] == "true"
    assert "40 steps" in artifacts(folder)["config.yaml"].read_text()
    end(folder)
    Mirror(folder).sync()
    assert the_run(folder).info.status == "FINISHED"


def test_parameters_not_sent_by_killed_sync_are_sent(folder: Path) -> None:
    Mirror(folder).sync()
    (folder / "mlflow.json").unlink()
    with sqlite3.connect(folder.parent / "mlflow.db") as database:
        database.execute("DELETE FROM params WHERE key LIKE 'optim.%'")
    config = load_config(folder / "config.yaml", ["train.length=40 steps"])
    resume(config, {})
    Mirror(folder).sync()
    params = the_run(folder).data.params
    assert params["optim.lr"] == "0.001"
    assert params["train.length"] == "20 steps"


def test_changed_tracking_server_gets_full_copy(folder: Path, tmp_path: Path) -> None:
    log(folder, range(1, 21))
    end(folder)
    Mirror(folder).sync()
    resume(load_config(folder / "config.yaml", [f"tracking.uri=sqlite:///{tmp_path}/other/mlflow.db"]), {})
    assert Mirror(folder).run_id is None
    assert "bytes of metrics" in Mirror(folder).behind
    Mirror(folder).sync()
    assert stored(client_of(folder), the_run(folder).info.run_id) == written(folder)


def test_deleted_mlflow_run_is_recreated(folder: Path) -> None:
    log(folder, range(1, 21))
    copy = Mirror(folder)
    copy.sync()
    run_id = copy.run_id
    client_of(folder).delete_run(run_id or "")
    log(folder, range(21, 31))
    with pytest.raises(Unreachable, match=r"active"):
        copy.sync()
    copy.sync()
    assert copy.run_id != run_id
    assert stored(client_of(folder), copy.run_id or "") == written(folder)


def test_files_of_running_run_are_rechecked_once_a_minute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Mirror(folder)
    (folder / "goodput.json").write_text("1")
    log(folder, range(1, 11))
    copy.sync()
    (folder / "goodput.json").write_text("2")
    copy.sync()
    assert artifacts(folder)["goodput.json"].read_text() == "1"
    monkeypatch.setattr(mirror, "LOOK_AGAIN_S", 0.0)
    copy.sync()
    assert artifacts(folder)["goodput.json"].read_text() == "2"
    assert "metrics.jsonl" not in artifacts(folder)
    monkeypatch.setattr(mirror, "LOOK_AGAIN_S", 60.0)
    (folder / "goodput.json").write_text("3")
    end(folder)
    copy.sync()
    assert artifacts(folder)["goodput.json"].read_text() == "3"
    assert artifacts(folder)["metrics.jsonl"].read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_broken_metric_line_is_reported_and_skipped(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log(folder, range(1, 4))
    with (folder / "metrics.jsonl").open("ab") as lines:
        lines.write(b"\0\0\0\n")
    Mirror(folder).sync()
    assert "metrics.jsonl: line 4 is no JSON" in capfd.readouterr().err
    points = stored(client_of(folder), the_run(folder).info.run_id)
    assert [step for step, _, _ in points["train/loss"]] == [1, 2, 3]


def test_secrets_reach_neither_database_nor_artifacts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = (f"s3cr3t{number:02}" for number in range(100))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "trainer")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", next(secret))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", next(secret))
    presigned = f"https://store/val?X-Amz-Credential={next(secret)}&X-Amz-Signature={next(secret)}"
    deepspeed = {
        "comet": {"enabled": False, "api_key": next(secret)},
        "monitor": [{"wandb_token": next(secret)}, f"https://u:{next(secret)}@host/x"],
    }
    handoff = [
        {
            "config": "child.yaml",
            "set": [
                f"engine.deepspeed.comet.api_key={next(secret)}",
                f"engine.deepspeed={{comet: {{password: {next(secret)}}}}}",
                f"data.val=https://host/v?sig={next(secret)}",
            ],
        }
    ]
    train = f"https://me:{next(secret)}@host/packed/train"
    folder = begin(
        root,
        f"data.train={train}",
        f"data.val={presigned}",
        f"engine.deepspeed={json.dumps(deepspeed)}",
        f"handoff={json.dumps(handoff)}",
        tags={"data.path": f"{train}, {presigned}", "hub.token": next(secret)},
    )
    (folder / "quarantine.jsonl").write_text(
        json.dumps({"tar": f"{train}/000.tar?sig={next(secret)}", "row": 3}) + "\n"
    )
    (folder / "anomalies.jsonl").write_text(json.dumps({"step": 3, "samples": [f"{train}/0.tar#7"]}) + "\n")
    log(folder, range(1, 11))
    end(folder)
    Mirror(folder).sync()

    used = [f"s3cr3t{number:02}" for number in range(int(next(secret)[-2:]))]
    assert len(used) == 13
    kept = b"".join((folder / name).read_bytes() for name in ("config.yaml", "deepspeed.json", "quarantine.jsonl"))
    sent = {path: path.read_bytes() for path in [*folder.parent.glob("mlflow.db*"), *artifacts(folder).values()]}
    assert len(sent) > 8
    for path, content in {**sent, folder / "mlflow.json": (folder / "mlflow.json").read_bytes()}.items():
        assert not [word for word in used if word.encode() in content], path
        assert b"trainer" not in content
    assert b"api_key: s3cr3t" in kept  # the local files stay as they are
    # What is no secret is there.
    run = the_run(folder)
    assert run.data.params["engine.deepspeed.comet.api_key"] == "***"
    assert run.data.params["engine.deepspeed.comet.enabled"] == "False"
    assert run.data.params["data.val"] == "https://store/val?***"
    assert run.data.tags["data.path"] == "https://***@host/packed/train, https://store/val?***"
    assert yaml.safe_load(artifacts(folder)["config.yaml"].read_text())["optim"]["lr"] == 0.001
    assert json.loads(artifacts(folder)["quarantine.jsonl"].read_text())["row"] == 3


def test_connection_error_hides_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cr3t@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = begin(tmp_path)
    with pytest.raises(Unreachable, match=r"^tracking server http://\*\*\*@127") as error:
        Mirror(folder).sync()
    assert "s3cr3t" not in str(error.value)
    assert "\n" not in str(error.value)


def test_sync_recovers_after_artifact_store_failure(folder: Path) -> None:
    log(folder, range(1, 11))
    (folder.parent / "artifacts").touch()  # where a folder should be
    copy = Mirror(folder)
    with pytest.raises(Unreachable, match=r"artifacts"):
        copy.sync()
    assert copy.behind == "files, status"
    (folder.parent / "artifacts").unlink()
    copy.sync()
    assert copy.behind == ""
    assert set(artifacts(folder)) > {"config.yaml", "data/training-0.json"}


def test_long_parameters_and_tags_are_truncated(root: Path) -> None:
    folder = begin(root, f"engine.deepspeed={{note: {'x' * 7000}}}", tags={"long": "y" * 9000})
    Mirror(folder).sync()
    data = the_run(folder).data
    assert data.params["engine.deepspeed.note"] == "x" * 5999 + "…"
    assert data.tags["long"] == "y" * 7999 + "…"


def offer(folder: Path, tmp_path: Path, *steps: int) -> None:
    """Versions that wait to be registered, the earlier the better."""
    config = load_config(folder / "config.yaml")
    for step in steps:
        weights = tmp_path / f"{step}.safetensors"
        network = timm.create_model("pvt_pico", num_classes=10, img_size=32)
        safetensors.torch.save_file(network.state_dict(), weights)
        card = ModelCard(
            task=ClassificationConfig(),
            model=config.model,
            image=config.image,
            eval_batch_size=64,
            classes=[str(digit) for digit in range(10)],
            metrics={"val_top1": 1 / step},
            sha256={WEIGHTS: hashlib.sha256(weights.read_bytes()).hexdigest()},
            lineage={"run": Record.read(folder).uuid, "step": str(step), "config": "c", "data": "d"},
        )
        Outbox(folder).put({WEIGHTS: weights}, card)


@pytest.mark.filterwarnings("ignore:Operation with range is deprecated")  # MLflow's, about its use of pandas
def test_best_and_last_versions_are_registered(folder: Path, tmp_path: Path) -> None:
    offer(folder, tmp_path, 10, 20, 30)
    assert "3 versions" in Mirror(folder).behind
    Mirror(folder).sync()
    assert Mirror(folder).behind == ""
    # The best, the last, and none that was overtaken before it was registered.
    registered = Outbox(folder).registered()
    assert {int(entry.name.split("-")[1]): uri for entry, uri in registered.items()} == {
        10: "models:/tiny/1",
        30: "models:/tiny/2",
    }
    assert not list(folder.glob("versions/*/*.safetensors"))
    version = client_of(folder).get_model_version("tiny", "2")
    assert version.run_id == the_run(folder).info.run_id

    child = begin(tmp_path / "child", "tracking.uri=" + Mirror(folder).uri, tags={"parent.version": "models:/tiny/2"})
    Mirror(child).sync()
    client = client_of(folder)
    tags = client.get_run(Mirror(child).run_id or "").data.tags
    assert tags["parent.version"] == "models:/tiny/2"
    assert tags["mlflow.parentRunId"] == version.run_id
    assert f"child.{Record.read(child).uuid}" in client.get_model_version("tiny", "2").tags


# A runs folder that was moved or copied


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tracked(folder: Path, tmp_path: Path) -> Path:
    """A run whose server has everything, one version included."""
    log(folder, range(1, 11))
    offer(folder, tmp_path, 10)
    Mirror(folder).sync()
    return folder


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_relocate_repairs_moved_or_copied_runs_folder(
    tracked: Path, tmp_path: Path, how: Callable[[Path, Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_utils, "_artifact_repos_cache", OrderedDict())  # which a new process does not have
    old, new = tracked.parent, tmp_path / "new place" / "runs"
    new.parent.mkdir()
    how(old, new)
    before = contents(old)
    folder, uri = new / tracked.name, f"sqlite:///{new}/mlflow.db"
    log(folder, range(11, 21))
    end(folder)
    for _ in range(2):
        with pytest.raises(Unreachable, match=rf"moved or copied from .* relocate --tracking-uri '{uri}'"):
            Mirror(folder).sync()
    with pytest.raises(InputError, match="was moved or copied"):
        connect(uri)
    assert contents(old) == before

    relocating = registry_command.SUBCOMMANDS["relocate"].run
    assert relocating(Namespace(tracking_uri=uri))["paths"] == 5  # of experiment, run and logged model; the version's 2
    client = connect(uri)
    assert registry.verify("models:/tiny/1")["ok"]
    assert registry.resolve("models:/tiny/1").card.lineage["run"] == Record.read(folder).uuid
    Mirror(folder).sync()
    run = the_run(folder, client)
    assert written(folder).items() <= stored(client, run.info.run_id).items()
    assert run.info.artifact_uri.startswith(new.as_uri())
    assert {"config.yaml", "metrics.jsonl"} <= artifacts(folder).keys()
    assert contents(old) == before
    assert relocating(Namespace(tracking_uri=uri))["paths"] == 0


def test_relocate_without_artifacts_is_rejected(tracked: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    shutil.copytree(tracked.parent, new)
    (model,) = (new / "artifacts" / "pretrain" / "models").iterdir()
    shutil.rmtree(model)
    before = dump(new / tracked.name)
    told = rf"{model}/artifacts: was left in .* rsync -a --ignore-existing {tracked.parent}/artifacts/ {new}/artifacts/"
    with pytest.raises(InputError, match=told):
        relocate(new / "mlflow.db")
    assert dump(new / tracked.name) == before
    (tmp_path / "text.db").write_text("no database")
    with pytest.raises(InputError, match=r"text\.db: cannot be used as a database"):
        relocate(tmp_path / "text.db")


def test_database_moved_without_its_artifacts_works(tracked: Path, tmp_path: Path) -> None:
    """Its artifacts stay where they were, as they do for those who put them elsewhere on purpose."""
    (tmp_path / "alone").mkdir()
    shutil.move(tracked.parent / "mlflow.db", tmp_path / "alone" / "mlflow.db")
    connect(f"sqlite:///{tmp_path}/alone/mlflow.db")
    assert registry.verify("models:/tiny/1")["ok"]
    assert relocate(tmp_path / "alone" / "mlflow.db") == 0


def test_symlink_to_runs_folder_needs_no_relocate(tracked: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tracked.parent)
    connect(f"sqlite:///{tmp_path}/link/mlflow.db")
    assert registry.verify("models:/tiny/1")["ok"]


def test_deleted_experiment_is_reported(
    tracked: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(tracked)
    experiment = client.get_experiment_by_name("pretrain")
    assert experiment
    client.delete_experiment(experiment.experiment_id)
    log(tracked, range(11, 21))
    told = (
        rf"experiment pretrain: was deleted .* mlflow experiments restore --experiment-id {experiment.experiment_id};"
    )
    with pytest.raises(Unreachable, match=told):
        Mirror(tracked).sync()
    monkeypatch.setattr(tracker, "AWAITED_RETRY_S", 0.05)
    late = Tracker(tracked, patience_s=0.5)
    assert not late.end("FINISHED")
    assert re.search(told, capfd.readouterr().err)
    client.restore_experiment(experiment.experiment_id)
    Mirror(tracked).sync()
    assert written(tracked).items() <= stored(client, the_run(tracked).info.run_id).items()


# A database that was lost


@pytest.fixture
def lost(folder: Path, empty_database: Path, tmp_path: Path) -> Path:
    """A run with versions of steps 10 and 30, in another place since MLflow keeps a removed database open."""
    offer(folder, tmp_path, 10, 30)
    Mirror(folder).sync()
    place = tmp_path / "again"
    folder.parent.rename(place)
    shutil.copyfile(empty_database, place / "mlflow.db")
    note = place / folder.name / "mlflow.json"
    note.write_text(note.read_text().replace("/runs/", "/again/"))
    return place / folder.name


def sync(folder: Path) -> dict[str, Any]:
    return registry_command.SUBCOMMANDS["sync"].run(Namespace(run=folder))


def steps_of(folder: Path) -> dict[int, str]:
    return {int(entry.name.split("-")[1]): uri for entry, uri in Outbox(folder).registered().items()}


def test_lost_versions_are_registered_again_from_artifacts(lost: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sync(lost)["sent"] == "everything, as the server had lost the run"
    assert "models:/tiny/2 is not in the registry: it is registered again" in capfd.readouterr().err
    assert steps_of(lost) == {10: "models:/tiny/1", 30: "models:/tiny/2"}
    for version in registry.list_versions(client_of(lost), "tiny"):
        assert registry.verify(registry.uri_of(version))["ok"]
        assert version.run_id == the_run(lost).info.run_id
    assert not list(lost.glob("versions/*/*.safetensors"))
    again = sync(lost)
    assert (again["sent"], again["left"], again["missing"]) == ("", "", [])


def test_lost_versions_are_registered_from_checkpoints_or_reported(
    lost: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(lost.parent / "artifacts")
    for step in (10, 30):  # the checkpoint of step 30 does not hold the weights of its version
        checkpoint = lost / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        shutil.copyfile(tmp_path / "10.safetensors", checkpoint / "model.safetensors")
    for _ in range(2):
        result = sync(lost)
        assert (result["ok"], result["left"]) == (False, "1 versions whose weights are gone")
        assert [name.rpartition("-")[0] for name in result["missing"]] == ["step-00000030"]
        assert steps_of(lost) == {10: "models:/tiny/1"}
    assert "models:/tiny/2 is not in the registry: nothing holds its weights" in capfd.readouterr().err
    assert registry.verify("models:/tiny/1")["ok"]


def test_deleted_version_is_not_registered_again(tracked: Path) -> None:
    client = client_of(tracked)
    client.delete_model_version("tiny", "1")
    (tracked / "mlflow.json").unlink()
    Mirror(tracked).sync()
    assert registry.list_versions(client, "tiny") == []
    assert Outbox(tracked).missing() == []


def begin_sweep(root: Path, rates: list[float], **tags: str) -> list[Path]:
    """Runs that launch/submit.py has submitted together."""
    folders = []
    for number, rate in enumerate(rates):
        folder = root / f"runs/tiny-{number}"
        (folder / SWEEP).parent.mkdir(parents=True)
        sweep = {"uuid": SWEEP_UUID, "name": "tiny", "set": {"optim.lr": rate, "run.seed": number}}
        (folder / SWEEP).write_text(json.dumps(sweep))
        folders.append(begin(root, f"run.name={folder.name}", f"optim.lr={rate}", tags=tags))
    return folders


def test_concurrent_sweep_runs_share_one_parent_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = MlflowClient.search_runs

    def slow(*arguments: Any, **options: Any) -> Any:
        found = search(*arguments, **options)
        if SWEEP_UUID in str(arguments):
            time.sleep(0.5)  # in which another one may create what this one has not found
        return found

    def sync(copy: Mirror) -> None:
        try:
            copy.sync()
        except Unreachable:  # MLflow refuses a data set that two runs name at the same moment; Tracker does this
            copy.sync()

    monkeypatch.setattr(MlflowClient, "search_runs", slow)
    folders = begin_sweep(root, [1e-3, 5e-4, 2e-4, 1e-4])
    copies = [Mirror(folder) for folder in folders]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(sync, copies))
    client = client_of(folders[0])
    experiment = client.get_experiment_by_name("pretrain")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 5
    (parent,) = (run for run in runs if run.data.tags["run.uuid"] == SWEEP_UUID)
    assert (parent.info.run_name, parent.info.status, parent.data.metrics) == ("tiny", "FINISHED", {})
    assert "mlflow.parentRunId" not in parent.data.tags
    for number, copy in enumerate(copies):
        run = client.get_run(copy.run_id or "")
        assert run.info.status == "RUNNING"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        rate = ("0.001", "0.0005", "0.0002", "0.0001")[number]
        assert run.data.tags["sweep.optim.lr"] == run.data.params["optim.lr"] == rate
        assert run.data.tags["sweep.run.seed"] == str(number)
    before = dump(folders[0])
    (folders[0] / "mlflow.json").unlink()  # as if killed before anything was noted
    Mirror(folders[1]).sync()
    assert dump(folders[0]) == before
    Mirror(folders[0]).sync()
    assert len(client.search_runs([experiment.experiment_id])) == 5


def test_partially_created_sweep_parent_is_reused(root: Path) -> None:
    (folder,) = begin_sweep(root, [1e-3])
    client = client_of(folder)
    experiment = client.create_experiment("pretrain", artifact_location=(root / "runs/artifacts").as_uri())
    begun = client.create_run(experiment, run_name="tiny", tags={"run.uuid": SWEEP_UUID}).info.run_id
    copy = Mirror(folder)
    copy.sync()
    assert client.get_run(copy.run_id or "").data.tags["mlflow.parentRunId"] == begun
    assert client.get_run(begun).info.status == "FINISHED"


def test_sweep_takes_precedence_as_parent_run(folder: Path, tmp_path: Path) -> None:
    offer(folder, tmp_path, 10)
    Mirror(folder).sync()
    uri = f"tracking.uri={Mirror(folder).uri}"
    (child,) = begin_sweep(tmp_path / "other", [1e-3], **{"parent.version": "models:/tiny/1"})
    resume(load_config(child / "config.yaml", [uri]), {"parent.version": "models:/tiny/1"})
    Mirror(child).sync()
    client = client_of(folder)
    tags = client.get_run(Mirror(child).run_id or "").data.tags
    assert client.get_run(tags["mlflow.parentRunId"]).data.tags["run.uuid"] == SWEEP_UUID
    assert tags["parent.version"] == "models:/tiny/1"
    assert f"child.{Record.read(child).uuid}" in client.get_model_version("tiny", "1").tags


def test_invalid_sweep_file_is_rejected(folder: Path) -> None:
    assert Sweep.read(folder) is None
    (folder / "slurm").mkdir()
    (folder / SWEEP).write_text('{"uuid": 1}')
    with pytest.raises(InputError, match=r"sweep\.json: .*; it is not one that launch/submit\.py has written"):
        Sweep.read(folder)


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[MlflowServer]:
    """A real one on SQLite, which has not been started yet."""
    shutil.copyfile(empty_database, tmp_path / "server.db")
    server = MlflowServer(
        ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/store"],
        {},
        tmp_path,
    )
    yield server
    server.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PACE_S", "FIRST_RETRY_S", "LAST_RETRY_S", "AWAITED_RETRY_S"):
        monkeypatch.setattr(tracker, name, 0.1)


@pytest.mark.usefixtures("quick")
def test_server_outages_lose_no_data(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # A server that asks for no password ignores one.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("//", "//me:s3cr3t@"))
    folder = begin(tmp_path)

    def said() -> str:
        said_before.append(capfd.readouterr().err)
        return "".join(said_before)

    def train(steps: range) -> None:
        for step in steps:
            log(folder, range(step, step + 1))
            tracker.on_step(step, {})

    said_before: list[str] = []
    tracker = Tracker(folder, patience_s=0.5)
    train(range(1, 40))
    log_load(folder, samples=5)
    wait_until(lambda: "nothing is lost" in said())
    assert tracker.run_id is None
    server.start()  # it was down from the start
    wait_until(lambda: "connection restored" in said())
    wait_until(lambda: Mirror(folder).behind == "")
    assert stored(MlflowClient(server.url), tracker.run_id or "") == written(folder)

    train(range(40, 60))
    server.stop()  # in the middle
    train(range(60, 600))
    wait_until(lambda: said().count("nothing is lost") == 2)
    server.start()
    train(range(600, 620))
    assert tracker.flush(30)
    assert stored(MlflowClient(server.url), tracker.run_id or "") == written(folder)

    server.stop()  # at the end
    train(range(620, 650))
    assert not tracker.end("FINISHED")
    assert f"launch/registry.py sync {folder}" in said()
    assert "bytes of metrics, files, status" in Mirror(folder).behind
    server.start()
    Mirror(folder).sync()
    assert Mirror(folder).behind == ""
    client = MlflowClient(server.url)
    run = the_run(folder, client)
    assert stored(client, run.info.run_id) == written(folder)
    assert (run.info.status, run.info.end_time) == ("FINISHED", Record.read(folder).ended_ms)
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/metrics.jsonl")
    assert text == (folder / "metrics.jsonl").read_text()
    assert said().count("nothing is lost") <= 3  # once an outage
    written_down = [folder / "mlflow.json", tmp_path / "server.db", *tmp_path.glob("store/**/*.*")]
    assert "s3cr3t" not in said() + "".join(path.read_bytes().decode("latin-1") for path in written_down)


def test_hanging_server_does_not_block_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        folder = begin(tmp_path, f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = Tracker(folder, patience_s=0.5)
        connection, _ = silent.accept()
        began = time.monotonic()
        for step in range(1000):
            tracker.on_step(step, {})
        assert time.monotonic() - began < 0.2
        assert not tracker.end("FINISHED")
        assert 0.4 < time.monotonic() - began < 2
        connection.close()
    assert Record.read(folder).status == "FINISHED"
    assert f"launch/registry.py sync {folder}" in capfd.readouterr().err


@pytest.mark.usefixtures("quick")
def test_tracker_end_sends_everything(folder: Path) -> None:
    tracker = Tracker(folder, patience_s=30)
    log(folder, range(1, 101))
    tracker.on_step(100, {})
    assert tracker.end("FAILED")
    run = the_run(folder)
    assert (run.info.run_id, run.info.status) == (tracker.run_id, "FAILED")
    assert stored(client_of(folder), run.info.run_id) == written(folder)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", ["RUNNING", "KILLED"])
def test_killed_run_is_recorded_as_failed(folder: Path, status: Status) -> None:
    log(folder, range(1, 11))
    if status == "KILLED":
        end(folder, status)
    Mirror(folder).sync()
    log(folder, range(11, 21))
    record_failure(folder, patience_s=30)
    run, record = the_run(folder), Record.read(folder)
    assert (run.info.status, run.info.end_time) == ("FAILED", record.ended_ms)
    assert stored(client_of(folder), run.info.run_id) == written(folder)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_ended_run_keeps_its_status(folder: Path, status: Status) -> None:
    record = end(folder, status)
    record_failure(folder, patience_s=30)
    assert Record.read(folder) == record
    assert (the_run(folder).info.status, the_run(folder).info.end_time) == (status, record.ended_ms)


def test_failure_that_cannot_be_recorded_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record_failure(tmp_path / "never begun")
    assert capfd.readouterr().err == ""
    folder = begin(tmp_path, f"tracking.uri=http://127.0.0.1:{free_port()}")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record_failure(folder)
        assert "a job is at work in it" in capfd.readouterr().err
        assert Record.read(folder).status == "RUNNING"
    began = time.monotonic()
    record_failure(folder, patience_s=1)
    assert time.monotonic() - began < 5
    assert Record.read(folder).status == "FAILED"
    assert f"launch/registry.py sync {folder}" in capfd.readouterr().err
    (folder / "run.json").write_text("{")
    record_failure(folder)
    (said,) = capfd.readouterr().err.splitlines()
    assert "not noted as failed" in said


@pytest.mark.usefixtures("quick")
def test_tracker_internal_error_is_reported_once_and_recovered(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "deepspeed.json").read_text()
    (folder / "deepspeed.json").write_text("{")
    log(folder, range(1, 11))
    tracker = Tracker(folder, patience_s=PATIENCE_S)
    began = time.monotonic()
    assert not tracker.flush()
    assert time.monotonic() - began < PATIENCE_S / 2, "waiting does not mend it"
    time.sleep(0.5)
    assert capfd.readouterr().err.count("JSONDecodeError") == 1
    (folder / "deepspeed.json").write_text(whole)
    assert tracker.end("FINISHED", 30)
    assert stored(client_of(folder), tracker.run_id or "") == written(folder)


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    code = "import sys, pipeline.track.sync.tracker, pipeline.track.sync.system_load; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_package_list_is_sorted_with_versions() -> None:
    lines = tracker.list_packages().splitlines()
    assert f"mlflow=={mlflow.__version__}" in lines
    assert lines == sorted(set(lines), key=str.lower)


def test_node_load_is_recorded_and_mirrored(folder: Path) -> None:
    path = folder / "system/node-1.jsonl"
    with SystemLoad(folder, node=1, interval_s=0.2):
        wait_until(lambda: path.exists() and path.read_text().count("\n") > 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) >= 3
    assert all(line["node"] == 1 and abs(line["time"] - time.time()) < 30 for line in lines)
    assert {"cpu_utilization_percentage", "disk_usage_percentage", "network_receive_megabytes"} < set(lines[0])
    log(folder, range(1, 3))
    Mirror(folder).sync()
    assert stored(client_of(folder), the_run(folder).info.run_id) == written(folder)


def test_short_job_records_load_and_drops_truncated_line(folder: Path) -> None:
    path = folder / "system/node-0.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"time": 1.0, "node": 0, "a": 1}\n{"time": 2.0, "no')
    with SystemLoad(folder, node=0):
        pass
    assert [len(json.loads(line)) > 5 for line in path.read_text().splitlines()] == [False, True]


def test_full_disk_is_reported_once_by_system_load(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "system").mkdir()
    (folder / "system/node-0.jsonl").symlink_to("/dev/full")
    with SystemLoad(folder, node=0, interval_s=0.05):
        time.sleep(0.5)
    assert capfd.readouterr().err.count("No space left on device") == 1


def test_failing_load_monitor_is_skipped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken(BaseMetricsMonitor):
        def collect_metrics(self) -> None:
            raise RuntimeError("lost its GPU")

        def aggregate_metrics(self) -> None: ...

    monkeypatch.setattr(system_load, "_monitors", lambda: [Broken(), CPUMonitor()])
    path = folder / "system/node-0.jsonl"
    with SystemLoad(folder, node=0, interval_s=0.05):
        wait_until(lambda: path.exists() and path.read_text().count("\n") > 2)
    assert capfd.readouterr().err.count("lost its GPU") == 1
    lines = path.read_text().splitlines()
    assert len(lines) > 2
    assert all("cpu_utilization_percentage" in line for line in lines)


def test_interrupted_database_creation_is_redone(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"from pipeline.track.tracking_server import connect; connect('sqlite:///{tmp_path}/mlflow.db', create=True)"
    )
    process = Rank(str(script), [], {}, tmp_path / "log")
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / ".mlflow.db.partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() < 0
    assert not (tmp_path / "mlflow.db").exists()
    client = connect(f"sqlite:///{tmp_path}/mlflow.db", create=True)
    assert client.create_experiment("works")
    assert not (tmp_path / ".mlflow.db.partial").exists()
