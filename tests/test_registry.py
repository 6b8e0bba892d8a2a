"""The model registry on an embedded database: versions in, verified copies out, champions, imports, lineage."""

import argparse
import ast
import contextlib
import errno
import fcntl
import functools
import importlib
import io
import json
import math
import os
import py_compile
import re
import resource
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import MAGIC_NUMBER
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import mlflow.environment_variables
import numpy as np
import pandas
import pytest
import safetensors.torch
import timm
import torch
from mlflow.store.artifact import models_artifact_repo
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.tracking import MlflowClient
from timm.models import load_state_dict
from transformers import PvtConfig, PvtForImageClassification

import pvt
from pipeline import cli, files
from pipeline.commands import evaluate
from pipeline.commands import registry as launch_registry
from pipeline.config import (
    ClassificationConfig,
    Gates,
    ImageConfig,
    ModelConfig,
    SemanticFpnConfig,
    fingerprint,
    load_section,
)
from pipeline.errors import ExternalError, InputError
from pipeline.shards.cache import DEFAULT_CACHE
from pipeline.tasks.build import build_task, start_from
from pipeline.track import relocate, tracking_server
from pipeline.track.export import export
from pipeline.track.model_card import RAW, WEIGHTS, ModelCard, ScoredData
from pipeline.track.registry import import_weights, lineage, model_cache, model_files, promote, registry
from pipeline.track.serve import load_network
from pipeline.track.serve.classifier import ServedClassifier
from pipeline.track.sync.outbox import Outbox
from pipeline.track.sync.record import Record
from pvt.convert import from_any
from pvt.create import create_model
from tests.ranks import PATIENCE_S, ROOT, Rank
from tests.workers.register import register_together

# MLflow's, about its use of pandas.
pytestmark = pytest.mark.filterwarnings("ignore:Operation with range is deprecated")

CLASSES = [str(digit) for digit in range(10)]


@functools.cache
def initial_weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model("pvt_pico", num_classes=10, img_size=32).state_dict()


def weights_of(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: tensor * scale for name, tensor in initial_weights(seed).items()}


@dataclass
class Registry:
    folder: Path
    client: MlflowClient
    experiment_id: str

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def entry(
        self, step: int = 1, *, run: str = "a" * 32, parent: str | None = None, data: str = "d" * 64, **metrics: Any
    ) -> Path:
        """A model as the outbox holds it."""
        entry = self.folder / f"entry-{run[:4]}-{step}"
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir()
        for seed, name in enumerate((WEIGHTS, RAW)):
            safetensors.torch.save_file(weights_of(step + 1000 * seed), entry / name)
        ModelCard(
            task=ClassificationConfig(),
            model=ModelConfig(name="pvt_pico"),
            image=ImageConfig(size=32),
            eval_batch_size=8,
            classes=CLASSES,
            averaged=True,
            metrics=metrics,
            scored=ScoredData(path="val", digest=metrics.pop("scored", "v" * 64), samples=10),
            sha256={name: files.sha256(entry / name) for name in (WEIGHTS, RAW)},
            lineage={"run": run, "step": str(step), "data": data, **({"parent": parent} if parent else {})},
        ).write(entry)
        return entry

    def register(self, entry: Path, name: str = "tiny", run_id: str | None = None) -> str:
        return registry.register(self.client, name, entry, experiment_id=self.experiment_id, run_id=run_id)

    def add(self, step: int = 1, name: str = "tiny", **entry: Any) -> str:
        return self.register(self.entry(step, **entry), name)

    def alias(self, name: str, model: str = "tiny") -> str | None:
        number = self.client.get_registered_model(model).aliases.get(name)
        return f"models:/{model}/{number}" if number else None

    def stored(self, uri: str) -> Path:
        version = registry.find_version(self.client, uri)
        location = self.client.get_model_version_download_uri(version.name, str(version.version))
        return Path(location.removeprefix("file://"))

    def run_of(self, name: str, uuid: str) -> str:
        run = self.client.create_run(self.experiment_id, run_name=name, tags={"run.uuid": uuid})
        self.client.set_terminated(run.info.run_id)
        return run.info.run_id


@pytest.fixture
def tiny(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv(model_cache.VARIABLE, str(tmp_path / "cache"))
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    client = tracking_server.connect(f"sqlite:///{tmp_path}/mlflow.db")
    experiment_id = client.create_experiment("shared", artifact_location=(tmp_path / "artifacts").as_uri())
    return Registry(tmp_path, client, experiment_id)


def edit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# Versions


def test_version_holds_files_card_tags_and_metrics_of_its_entry(tiny: Registry) -> None:
    entry = tiny.entry(7, top1=0.5, val_loss=1.5)
    run_id = tiny.run_of("pretrain", "a" * 32)
    uri = tiny.register(entry, run_id=run_id)
    version = registry.resolve(f"{uri.rpartition('/')[0]}@candidate")
    assert version.uri == uri == "models:/tiny/1"
    assert version.card == ModelCard.read(entry)
    assert {name: files.sha256(version.folder / name) for name in (WEIGHTS, RAW)} == version.card.sha256
    assert version.weights == version.folder / WEIGHTS
    expected = {
        "run": "a" * 32,
        "step": "7",
        "data": "d" * 64,
        "metric.top1": "0.5",
        "good": "true",
        "model": "pvt_pico",
    }
    assert expected.items() <= version.tags.items()
    digests = {key for key in version.tags if key.startswith("sha256.")}
    assert digests >= {"sha256.MLmodel", "sha256.served.py", f"sha256.artifacts/{WEIGHTS}", "sha256.requirements.txt"}
    stored = {path.relative_to(tiny.stored(uri)).as_posix() for path in tiny.stored(uri).rglob("*") if path.is_file()}
    assert stored == {key.removeprefix("sha256.") for key in digests}
    assert not [name for name in stored if name.endswith((".pkl", ".pickle", ".pth", ".pt", ".bin"))]
    assert registry.find_version(tiny.client, uri).run_id == run_id
    logged = tiny.client.get_logged_model(version.tags["logged_model"])
    assert {metric.key: metric.value for metric in logged.metrics or []} == {"top1": 0.5, "val_loss": 1.5}
    assert sorted(path.name for path in entry.iterdir()) == ["model.json", WEIGHTS, RAW]  # as it was


def test_version_loaded_by_mlflow_still_verifies(tiny: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    uri = tiny.add()
    model = mlflow.pyfunc.load_model(uri)
    answer = model.predict(pandas.DataFrame({"image": [model_files.example(32)]}))
    assert answer["label"][0] in CLASSES
    assert (tiny.stored(uri) / "registered_model_meta").exists()  # what MLflow adds
    assert registry.verify(uri)["ok"]
    assert not list(registry.resolve(uri).folder.parent.glob("registered_model_meta"))


def test_registering_an_entry_twice_gives_the_same_version(tiny: Registry) -> None:
    entry = tiny.entry(1)
    assert tiny.register(entry) == tiny.register(entry) == "models:/tiny/1"
    assert tiny.add(2) == "models:/tiny/2"
    assert len(tiny.client.search_logged_models([tiny.experiment_id])) == 2
    assert all(registry.verify(f"models:/tiny/{number}")["ok"] for number in (1, 2))


def test_leftovers_of_an_interrupted_registration_are_removed(tiny: Registry) -> None:
    entry = tiny.entry(1)
    key = fingerprint(["tiny", "a" * 32, "1", files.sha256(entry / WEIGHTS)])
    half = tiny.client.create_logged_model(tiny.experiment_id, name="model", tags={"entry": key})
    (tiny.folder / "half").mkdir()
    (tiny.folder / "half" / WEIGHTS).write_bytes(b"half")
    tiny.client.log_model_artifacts(half.model_id, str(tiny.folder / "half"))
    assert tiny.register(entry) == "models:/tiny/1"
    assert half.model_id not in [each.model_id for each in tiny.client.search_logged_models([tiny.experiment_id])]
    assert not Path(half.artifact_location.removeprefix("file://")).exists()


def test_candidate_alias_is_the_newest_version_with_finite_metrics(tiny: Registry) -> None:
    assert tiny.add(1, top1=0.5) == tiny.alias("candidate")
    tiny.add(2, top1=0.9, val_loss=None)
    assert tiny.alias("candidate") == "models:/tiny/1"
    assert tiny.add(3, top1=0.1) == tiny.alias("candidate")


def test_damaged_entry_is_rejected_on_registration(tiny: Registry) -> None:
    entry = tiny.entry()
    expected = files.sha256(entry / RAW)
    edit(entry / RAW)
    with pytest.raises(InputError, match=rf"{entry / RAW}: SHA-256 {files.sha256(entry / RAW)}, but .* {expected}"):
        tiny.register(entry)
    assert not registry.list_versions(tiny.client, "tiny")


def test_concurrent_registrations_all_succeed(tiny: Registry, tmp_path: Path) -> None:
    entries = [tiny.entry(step) for step in range(1, 5)]
    given = register_together(tiny.uri, "tiny", entries, tmp_path, {})
    assert sorted(given) == [f"models:/tiny/{number}" for number in range(1, 5)]
    assert tiny.alias("candidate") == "models:/tiny/4"
    versions = registry.list_versions(tiny.client, "tiny")
    assert sorted(version.tags["step"] for version in versions) == ["1", "2", "3", "4"]
    assert all(registry.verify(registry.uri_of(version))["ok"] for version in versions)


def test_prune_keeps_best_last_aliased_and_parent_versions(tiny: Registry) -> None:
    for step, loss in enumerate((5.0, 1.0, 3.0, 4.0, 2.0, 6.0, 7.0), 1):
        tiny.add(step, val_loss=loss)
    other = tiny.add(1, run="b" * 32, val_loss=9.0)
    tiny.client.set_registered_model_alias("tiny", "mine", "3")
    registry.link_child(tiny.client, "models:/tiny/4", "c" * 32, "e" * 32)
    files = {number: tiny.stored(f"models:/tiny/{number}") for number in range(1, 9)}
    removed = registry.prune(tiny.client, "tiny", "a" * 32, keep_best=1, metric="val_loss")
    assert removed == ["models:/tiny/1", "models:/tiny/5", "models:/tiny/6"]
    left = [registry.uri_of(version) for version in registry.list_versions(tiny.client, "tiny")]
    assert left == [*(f"models:/tiny/{number}" for number in (2, 3, 4, 7)), other]
    assert {number for number, folder in files.items() if not folder.exists()} == {1, 5, 6}
    assert len(tiny.client.search_logged_models([tiny.experiment_id])) == 5
    assert tiny.add(8, val_loss=8.0) == "models:/tiny/9"  # a number is never given twice


# Digests

FILES = ["MLmodel", "served.py", "requirements.txt", "artifacts/model.json", f"artifacts/{WEIGHTS}", f"artifacts/{RAW}"]


def test_changed_file_is_rejected_with_name_and_digests(tiny: Registry) -> None:
    uri = tiny.add()
    registry.resolve(uri)  # a good copy does not hide that the store is damaged
    for name in FILES:
        file = tiny.stored(uri) / name
        before = files.sha256(file)
        edit(file)
        told = f"{name} has SHA-256 {files.sha256(file)}, but {before} was registered"
        with pytest.raises(InputError, match=f"^{uri}: {told}"):
            registry.resolve(uri)
        result = registry.verify(uri)
        assert not result["ok"]
        assert [row["fault"] for row in result["files"] if row["fault"]] == [told]
        edit(file)
    assert registry.verify(uri)["ok"]


def test_missing_or_added_file_is_rejected(tiny: Registry) -> None:
    uri = tiny.add()
    added = tiny.stored(uri) / "artifacts" / "more.pkl"
    added.write_bytes(b"x")
    with pytest.raises(InputError, match=r"artifacts/more.pkl has SHA-256 2d71.*, but no such file was registered"):
        registry.resolve(uri)
    added.unlink()
    (tiny.stored(uri) / "artifacts" / RAW).unlink()
    with pytest.raises(InputError, match=rf"artifacts/{RAW} is missing, [0-9a-f]+ was registered"):
        registry.resolve(uri)
    assert not registry.verify(uri)["ok"]


def test_changed_or_missing_digest_tag_is_rejected(tiny: Registry) -> None:
    uri = tiny.add()
    tiny.client.set_model_version_tag("tiny", "1", f"sha256.artifacts/{WEIGHTS}", "0" * 64)
    with pytest.raises(InputError, match=f"{WEIGHTS} has SHA-256 .*, but {'0' * 64} was registered"):
        registry.resolve(uri)
    for tag in registry.find_version(tiny.client, uri).tags:
        tiny.client.delete_model_version_tag("tiny", "1", tag)
    with pytest.raises(InputError, match="has no digests, so it cannot be trusted"):
        registry.resolve(uri)


def test_unknown_model_uri_is_rejected_with_existing_names(tiny: Registry) -> None:
    tiny.add()
    for uri, message in {
        "models:/tiny/9": r"\(registered models: tiny; of tiny: 1, @candidate\)",
        "models:/tiny@champion": r"\(registered models: tiny; of tiny: 1, @candidate\)",
        "models:/tinny/1": r"registered models: tiny",
        "models:/tiny": "names no version",
        "tiny": "a registered model is models:/NAME/VERSION",
    }.items():
        with pytest.raises(InputError, match=message):
            registry.resolve(uri)


# Byte code


def planted(folder: Path, ran: Path) -> Path:
    """Byte code that Python takes for that of served.py in `folder`, as its size and time of change are noted in it."""
    source = folder / "served.py"
    (folder / "planted.py").write_text(f"import os; os.makedirs({str(ran)!r}, exist_ok=True)")
    made = folder / "planted.pyc"
    py_compile.compile(str(folder / "planted.py"), str(made), doraise=True)
    (folder / "planted.py").unlink()
    header = struct.pack("<4sIII", MAGIC_NUMBER, 0, int(source.stat().st_mtime), source.stat().st_size)
    path = folder / "__pycache__" / f"served.{sys.implementation.cache_tag}.pyc"
    (folder / "__pycache__").unlink(missing_ok=True)
    path.parent.mkdir()
    path.write_bytes(header + made.read_bytes()[16:])
    made.unlink()
    return path


def test_bytecode_planted_in_a_cached_copy_is_not_run(
    tiny: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, ran = tiny.add(), tmp_path / "ran"
    copy = registry.resolve(uri).folder.parent
    copy.chmod(0o755)
    planted(copy, ran)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "pycache_prefix", str(tmp_path / "private"))  # PYTHONPYCACHEPREFIX, see docs/serving.md
        mlflow.pyfunc.load_model(str(copy))
    assert not ran.exists()
    mlflow.pyfunc.load_model(str(copy))
    assert ran.exists()  # what it would have done
    shutil.rmtree(ran)
    assert registry.resolve(uri).folder.parent == copy  # before fine-tuning, evaluation, export and serving
    assert (copy / "__pycache__").is_file()
    mlflow.pyfunc.load_model(str(copy))
    assert not ran.exists()


def test_bytecode_planted_in_the_store_is_rejected_by_every_command(
    tiny: Registry, digits: Path, tmp_path: Path
) -> None:
    uri = tiny.add()
    registry.resolve(uri)
    planted(tiny.stored(uri), tmp_path / "ran")
    told = rf"^{uri}: __pycache__.* registered.*: the artifact was changed"
    with pytest.raises(InputError, match=told):
        registry.resolve(uri)
    with pytest.raises(InputError, match=told):
        evaluate._open_model(uri, str(digits / "val"), tiny.uri, DEFAULT_CACHE)
    with pytest.raises(InputError, match=told):
        export(uri, "timm", tmp_path / "out")
    assert not registry.verify(uri)["ok"]
    assert not promote.promote(uri, gates())["ok"]
    assert not (tmp_path / "ran").exists()


def test_bytecode_in_an_old_version_is_rejected_with_a_remedy(tiny: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "_BYTE_CODE", "unused")  # such versions have no file that keeps it away
    uri = tiny.add()
    monkeypatch.undo()
    monkeypatch.setenv(model_cache.VARIABLE, str(tiny.folder / "cache"))
    (tiny.stored(uri) / "__pycache__").mkdir()
    assert registry.verify(uri)["ok"]
    (tiny.stored(uri) / "__pycache__" / "served.pyc").touch()
    with pytest.raises(InputError, match=rf"^{uri}: __pycache__/served.pyc .*: nobody has checked .*: remove it"):
        registry.resolve(uri)


@pytest.mark.parametrize(
    "name",
    [
        "sitecustomize.py",
        "evil.pth",
        "environment.yml",
        "SERVED.py",
        "served.so",
        "torch/__init__.py",
        "code/mlflow.py",
    ],
)
def test_added_importable_or_environment_file_is_rejected(tiny: Registry, name: str) -> None:
    uri = tiny.add()
    extra = tiny.stored(uri) / name
    assert not extra.exists()
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("raise SystemExit")
    with pytest.raises(InputError, match=f"{name} has SHA-256 .*, but no such file was registered"):
        registry.resolve(uri)
    assert not registry.verify(uri)["ok"]


def test_symlinks_and_pipes_in_a_version_are_rejected(tiny: Registry, tmp_path: Path) -> None:
    uri = tiny.add()
    registered, stored = model_files.digests(tiny.stored(uri)), tiny.stored(uri)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(stored / "served.py", tmp_path / "elsewhere")
    for name, target in (("__pycache__", "elsewhere"), ("pipeline", "elsewhere"), ("served.py", "elsewhere/served.py")):
        aside = tmp_path / "aside"
        if name in registered:
            (stored / name).rename(aside)
        (stored / name).symlink_to(tmp_path / target)
        with pytest.raises(InputError, match=rf"{name} is a link, or something else that is no file, but"):
            registry.resolve(uri)
        assert not registry.verify(uri)["ok"]
        (stored / name).unlink()
        if name in registered:
            aside.rename(stored / name)
    os.mkfifo(stored / "registered_model_meta")
    with pytest.raises(InputError, match="registered_model_meta is a link, or something else"):
        registry.resolve(uri)


def test_oversized_sparse_file_is_rejected(tiny: Registry) -> None:
    uri = tiny.add()
    os.truncate(tiny.stored(uri) / "requirements.txt", 1 << 42)
    with pytest.raises(InputError, match=r"requirements.txt is larger than the whole version, but [0-9a-f]{64} was"):
        registry.resolve(uri)
    assert not registry.verify(uri)["ok"]


def test_cached_copies_are_read_only_replaceable_and_removable() -> None:
    """By somebody who is not root, whom a mode would not stop."""
    script = """
import hashlib, os, sys
from pathlib import Path
from pipeline.track.registry import model_cache as copies
if os.getuid() == 0:
    os.setuid(65534)
digest = {"sub/a": hashlib.sha256(b"a").hexdigest()}
def download(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_bytes(b"a")
cache = Path(sys.argv[1])
for _ in range(2):
    copy = copies.obtain(digest, 1, download, lambda faults: SystemExit(str(faults)), cache)
    assert (copy / "sub" / "a").read_bytes() == b"a"
    assert {oct(path.stat().st_mode & 0o777) for path in (copy, copy / "sub")} == {"0o555"}
    assert oct((copy / "sub" / "a").stat().st_mode & 0o777) == "0o444"
    for write in ((copy / "sub" / "more").touch, (copy / "sub" / "a").unlink, (copy / "more").mkdir):
        try:
            write()
        except PermissionError:
            continue
        raise SystemExit("was changed")
    (copy / "sub").chmod(0o755)
    (copy / "sub" / "more").touch()
copies._remove(copy)
assert sorted(path.suffix for path in cache.iterdir()) == [".lock"]
"""
    with tempfile.TemporaryDirectory() as cache:  # pytest's folders are closed to others
        Path(cache).chmod(0o777)
        process = subprocess.run(
            [sys.executable, "-c", script, cache], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
        )
    assert process.returncode == 0, process.stderr


def stored_anew(tiny: Registry, name: str, data: bytes) -> str:
    """A version whose file was replaced, and its digest with it, as who may edit the registry can."""
    uri = tiny.add()
    (tiny.stored(uri) / name).write_bytes(data)
    tiny.client.set_model_version_tag("tiny", "1", f"sha256.{name}", files.sha256(tiny.stored(uri) / name))
    tiny.client.set_model_version_tag("tiny", "1", "bytes", str(model_files.size(tiny.stored(uri))))
    return uri


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"classes": ' + b"9" * 10_000 + b"}",
        b'{"task": {"name": "\x1b[31m\\u001b"}, "model": 3, "' + b"k" * 10_000 + b'": null}',
        b" " * (65 << 20),
    ],
    ids=["empty", "bytes", "list", "nothing", "deep", "long", "odd", "huge"],
)
def test_invalid_model_card_is_rejected_in_one_line(tiny: Registry, data: bytes) -> None:
    uri = stored_anew(tiny, "artifacts/model.json", data)
    assert registry.verify(uri)["ok"]
    with pytest.raises(InputError) as refused:
        registry.resolve(uri)
    assert "model.json: " in one_line(refused.value)


def test_card_of_other_weights_is_rejected_and_bad_tags_ignored(tiny: Registry) -> None:
    uri = tiny.add(1, top1=0.5)
    tiny.client.set_model_version_tag("tiny", "1", "bytes", "many")
    tiny.client.set_model_version_tag("tiny", "1", "metric.top1", "most")
    assert registry.metric_of(registry.find_version(tiny.client, uri), "top1") is None
    card = ModelCard.read(registry.resolve(uri).folder)
    for digests in ({}, {WEIGHTS: "0" * 64}, {**card.sha256, "../../x": "0" * 64}):
        card.model_copy(update={"sha256": digests}).write(tiny.folder)
        uri = stored_anew(tiny, "artifacts/model.json", (tiny.folder / "model.json").read_bytes())
        with pytest.raises(InputError, match=rf"^{uri}: has no model.json that lists its {WEIGHTS}"):
            registry.resolve(uri)


@pytest.mark.parametrize("name", ["MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml"])
def test_files_only_mlflow_reads_are_not_parsed(tiny: Registry, name: str) -> None:
    bomb = "a: &a [x]\n" + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghij")
    )
    uri = stored_anew(tiny, name, bomb.encode())
    assert registry.verify(uri)["ok"]
    assert registry.resolve(uri).card.classes == CLASSES
    edit(tiny.stored(uri) / name)
    with pytest.raises(InputError, match=rf"^{uri}: {name} has SHA-256"):
        registry.resolve(uri)


def test_mlflow_internals_in_use_still_exist(empty_database: Path) -> None:
    """Also what its documentation does not promise: modules below its packages, variables, tables, files."""
    sources = {file: file.read_text() for file in (ROOT / "pipeline").rglob("*.py")}
    for file, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("mlflow."):
                module = importlib.import_module(str(node.module))
                moved = [each.name for each in node.names if not hasattr(module, each.name)]
                assert not moved, f"{file}: {node.module} has no {moved}"
    variables = {name for text in sources.values() for name in re.findall(r'"(MLFLOW_\w+)"', text)}
    assert {"MLFLOW_UV_AUTO_DETECT", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"} <= variables
    assert not [name for name in variables if not hasattr(mlflow.environment_variables, name)]
    assert models_artifact_repo.REGISTERED_MODEL_META_FILE_NAME == registry._NOTE
    assert isinstance(LocalArtifactRepository.artifact_dir, property)
    for method in ("collect_metrics", "aggregate_metrics", "clear_metrics"):
        assert callable(getattr(BaseMetricsMonitor, method))
    with contextlib.closing(sqlite3.connect(empty_database)) as connection:
        for table, column in relocate._PATHS:
            connection.execute(f"SELECT {column} FROM {table}")


# Copies


def test_concurrent_jobs_download_one_copy(tmp_path: Path) -> None:
    made: list[Path] = []

    def download(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        (folder / "a").write_bytes(b"a")

    digest = {"a": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
    with ThreadPoolExecutor() as jobs:
        tasks = [jobs.submit(model_cache.obtain, digest, 1, download, refusal, tmp_path) for _ in range(4)]
    (copy,) = {task.result() for task in tasks}
    assert (copy / "a").read_bytes() == b"a"
    assert len(made) == 1


def refusal(faults: list[model_files.FileMismatch]) -> InputError:
    return InputError(str(faults))


def test_damaged_cached_copy_is_replaced(tiny: Registry, capfd: pytest.CaptureFixture[str]) -> None:
    uri = tiny.add()
    version = registry.resolve(uri)
    changed = version.weights.stat().st_mtime_ns
    assert registry.resolve(uri).weights.stat().st_mtime_ns == changed
    edit(version.weights)
    (version.folder / "more").touch()
    (version.folder / RAW).unlink()
    assert files.sha256(registry.resolve(uri).weights) == version.card.sha256[WEIGHTS]
    assert sorted(path.name for path in version.folder.iterdir()) == ["model.json", WEIGHTS, RAW]
    assert "this copy was damaged on the disk; it is made anew" in capfd.readouterr().err


def test_cached_copies_are_group_readable_under_any_umask(tiny: Registry, tmp_path: Path) -> None:
    uri = tiny.add()
    for path in tiny.stored(uri).rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    umask = os.umask(0o077)
    try:
        registry.resolve(uri, tmp_path / "a" / "b")
    finally:
        os.umask(umask)
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.suffix != ".lock":
            assert mode & 0o077 == (0o050 if path.is_dir() else 0o040), (path, oct(mode))


def test_partial_copy_of_a_killed_process_is_discarded(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from pipeline.track.registry import model_cache as copies
def download(folder):
    (folder / "a").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
copies.obtain({{"a": {"0" * 64!r}}}, 1, download, None, Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [path.read_bytes() for path in tmp_path.glob("*.partial/a")] == [b"half"]
    seen: list[list[Path]] = []
    with pytest.raises(InputError, match="found=None"):
        model_cache.obtain({"a": "0" * 64}, 1, lambda folder: seen.append(list(folder.iterdir())), refusal, tmp_path)
    assert seen == [[]]
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_full_disk_while_copying_is_reported(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for num_bytes, download in ((10**18, Path.touch), (1, full)):
        with pytest.raises(ExternalError, match=rf"{tmp_path}: no room for a copy .*PVT_MODEL_CACHE"):
            model_cache.obtain({"a": "0" * 64}, num_bytes, download, refusal, tmp_path)
        assert not list(tmp_path.glob("*.partial"))


# Champions


def gates(**tree: Any) -> Gates:
    return Gates.model_validate(tree)


def test_promotion_accepts_a_better_model_and_rejects_a_worse_one(tiny: Registry) -> None:
    first, worse, better = (tiny.add(step, top1=top1) for step, top1 in ((1, 0.8), (2, 0.7), (3, 0.795)))
    judge = gates(metrics={"top1": {"min": 0.5}}, champion={"top1": 0.01})
    result = promote.promote(first, judge, why="the first")
    assert (result["ok"], result["champion"], result["previous"]) == (True, first, None)
    assert [row["gate"] for row in result["gates"]] == ["digests", "loads", "metrics.top1", "champion.top1"]
    result = promote.promote(worse, judge)
    assert (result["ok"], result["champion"]) == (False, first)
    (failed,) = [row for row in result["gates"] if not row["passed"]]
    assert (failed["gate"], failed["value"], failed["champion"]) == ("champion.top1", 0.7, 0.8)
    assert tiny.alias("champion") == first
    assert promote.promote(better, judge, why="near enough")["previous"] == first
    assert tiny.alias("champion") == better
    tags = registry.find_version(tiny.client, better).tags
    assert (tags["promoted.why"], tags["promoted.previous"]) == ("near enough", "1")
    assert json.loads(tags["promoted.gates"])[2]["value"] == 0.795
    assert "promoted.at" in tags
    again = promote.promote(better, gates(metrics={"top1": {"min": 2}}))
    assert (again["ok"], again["note"]) == (True, "is the champion already")


def test_rollback_undoes_every_promotion_in_turn(tiny: Registry) -> None:
    for step in (1, 2, 3):
        tiny.add(step)
    for number in (1, 2, 3, 1):
        assert promote.promote(f"models:/tiny/{number}", gates())["ok"]
    back = [promote.rollback("tiny", why="worse in use") for _ in range(2)]
    assert [(each["champion"], each["previous"]) for each in back] == [
        ("models:/tiny/3", "models:/tiny/1"),
        ("models:/tiny/2", "models:/tiny/3"),
    ]
    assert promote.promote("models:/tiny/3", gates())["ok"]
    champions = [promote.rollback("tiny")["champion"] for _ in range(3)]
    assert champions == ["models:/tiny/2", "models:/tiny/1", None]
    assert tiny.alias("champion") is None
    with pytest.raises(InputError, match="no promotion to undo"):
        promote.rollback("tiny")
    moves = promote.history(tiny.client, "tiny")
    assert [move["to"] for move in moves] == ["1", "2", "3", "1", "3", "2", "3", "2", "1", ""]
    assert [move["why"] for move in moves if "undoes" in move][:2] == ["worse in use"] * 2
    assert not registry.prune(tiny.client, "tiny", "a" * 32, keep_best=0, metric="top1")  # it has been champion


def test_rollback_ignores_a_recorded_but_unfinished_promotion(tiny: Registry) -> None:
    for step in (1, 2, 3):
        tiny.add(step)
    promote.promote("models:/tiny/1", gates())
    promote.promote("models:/tiny/2", gates())
    promote.promote("models:/tiny/3", gates())
    tiny.client.set_registered_model_alias("tiny", "champion", "2")  # as if the last had been killed before that
    assert promote.rollback("tiny")["champion"] == "models:/tiny/1"


@pytest.mark.parametrize(
    ("tree", "gate"),
    [
        ({"metrics": {"top1": {"min": 0.91}}}, "metrics.top1"),
        ({"metrics": {"val_loss": {"max": 0.4}}}, "metrics.val_loss"),
        ({"metrics": {"top5": {"min": 0.9}}}, "metrics.top5"),
        ({"metrics": {"top3": {"min": 0.0}}}, "metrics.top3"),
        ({"champion": {"val_loss": 0.09}}, "champion.val_loss"),
    ],
)
def test_each_gate_bound_rejects_promotion(tiny: Registry, tree: dict[str, Any], gate: str) -> None:
    promote.promote(tiny.add(1, top1=0.9, val_loss=0.4), gates())
    result = promote.promote(tiny.add(2, top1=0.9, val_loss=0.5, top5=0.8), gates(**tree))
    assert [row["gate"] for row in result["gates"] if not row["passed"]] == [gate]
    assert promote.promote("models:/tiny/2", gates(metrics={"top1": {"min": 0.9}}, champion={"val_loss": 0.11}))["ok"]


def test_non_finite_or_rolled_back_version_is_never_promoted_or_best(tiny: Registry) -> None:
    good = tiny.add(1, top1=0.5, val_loss=1.0)
    tiny.add(2, top1=0.9, val_loss=None)
    tiny.add(3, top1=0.8, val_loss=1.0)
    last = tiny.add(4, top1=0.4, val_loss=1.0)
    registry.give_up(tiny.client, "models:/tiny/3", "rolled back")
    for tree in ({}, {"metrics": {"top1": {"min": 0.1}}}, {"champion": {"top1": 1.0}}):
        for uri, why in (("models:/tiny/2", "has a metric that is not finite"), ("models:/tiny/3", "rolled back")):
            result = promote.promote(uri, gates(**tree))
            assert not result["ok"]
            assert [(row["gate"], row["value"]) for row in result["gates"] if not row["passed"]] == [("good", why)]
    scored = promote.promote(last, gates(data="x"), score=lambda model, data: {"top1": 0.9, "val_loss": math.nan})
    assert not scored["ok"]
    removed = registry.prune(tiny.client, "tiny", "a" * 32, keep_best=1, metric="top1")
    assert removed == ["models:/tiny/2", "models:/tiny/3"]
    registry.give_up(tiny.client, "models:/tiny/3", "rolled back")  # has been removed
    registry.give_up(tiny.client, last, "rolled back")
    assert tiny.alias("candidate") == good
    registry.give_up(tiny.client, good, "rolled back")
    assert tiny.alias("candidate") is None


def test_champion_gate_compares_only_on_the_same_data(tiny: Registry) -> None:
    promote.promote(tiny.add(1, top1=0.5), gates())
    uri = tiny.add(2, top1=0.9, scored="w" * 64)
    result = promote.promote(uri, gates(champion={"top1": 0.0}))
    assert "not of the same data" in result["gates"][-1]["value"]
    assert not result["ok"]
    scored: list[tuple[str, str]] = []

    def score(model: str, data: str) -> dict[str, Any]:
        """Of the weights' first number, which is another one for each version."""
        scored.append((model, data))
        first = next(iter(safetensors.torch.load_file(registry.resolve(model).weights).values())).flatten()[0]
        return {"top1": float(first)}

    result = promote.promote(uri, gates(champion={"top1": 10.0}, metrics={"top1": {"min": -9}}, data="x"), score=score)
    assert result["ok"]
    assert scored == [(uri, "x"), ("models:/tiny/1", "x")]
    row = result["gates"][-1]
    assert (row["value"], row["champion"]) == (score(uri, "x")["top1"], score("models:/tiny/1", "x")["top1"])


def test_damaged_or_unloadable_model_is_not_promoted(tiny: Registry) -> None:
    uri = tiny.add(1)
    edit(tiny.stored(uri) / "artifacts" / WEIGHTS)
    result = promote.promote(uri, gates(metrics={"top1": {"min": 0}}))
    assert [row["passed"] for row in result["gates"]] == [False] * 3
    assert "has SHA-256" in result["gates"][0]["value"]
    for step, state in (
        (2, weights_of(2) | {"head.weight": torch.full((10, 128), torch.nan)}),
        (3, {"head.bias": torch.zeros(10)}),
    ):
        entry = tiny.entry(step)
        safetensors.torch.save_file(state, entry / WEIGHTS)
        card = ModelCard.read(entry)
        card.model_copy(update={"sha256": {WEIGHTS: files.sha256(entry / WEIGHTS)}}).write(entry)
        result = promote.promote(tiny.register(entry), gates())
        assert [(row["gate"], row["passed"]) for row in result["gates"]] == [("digests", True), ("loads", False)]
    assert tiny.alias("champion") is None


# Imports


@pytest.fixture
def published(tmp_path: Path) -> dict[str, Path]:
    """One model in each layout."""
    state = weights_of(5)
    public = pvt.to_public(state)
    made = {
        name: tmp_path / file for name, file in (("public", "p.pth"), ("nested", "n.pth"), ("ours", "o.safetensors"))
    }
    torch.save(public, made["public"], _use_new_zipfile_serialization=False)
    torch.save({"model": public, "epoch": 3, "args": argparse.Namespace(lr=1)}, made["nested"])
    safetensors.torch.save_file(state, made["ours"])
    theirs = PvtForImageClassification(
        PvtConfig(
            image_size=32,
            hidden_sizes=[32, 64, 96, 128],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 3, 4],
            mlp_ratios=[4, 4, 4, 4],
            num_labels=10,
        )
    )
    theirs.load_state_dict(pvt.to_transformers(state))
    theirs.save_pretrained(tmp_path / "transformers")
    return {**made, "transformers": tmp_path / "transformers"}


def bring_in(tiny: Registry, source: Path, **options: Any) -> str:
    return import_weights.import_weights(
        tiny.client, source, "pub", **{"model": "pvt_pico", "image_size": 32, **options}
    )


def test_weights_of_every_layout_are_imported_as_a_version(tiny: Registry, published: dict[str, Path]) -> None:
    expected = weights_of(5)
    for number, source in enumerate(published.values(), 1):
        uri = bring_in(tiny, source)
        assert uri == f"models:/pub/{number}"
        version = registry.resolve(uri)
        found = safetensors.torch.load_file(version.weights)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert version.card.classes == CLASSES
        run = tiny.client.get_run(str(registry.find_version(tiny.client, uri).run_id))
        file = source / "model.safetensors" if source.is_dir() else source
        assert run.info.status == "FINISHED"
        assert run.data.tags["source.sha256"] == files.sha256(file)
        assert version.tags["source"] == f"{file.name} sha256:{files.sha256(file)}"
        assert run.data.tags["run.uuid"] == version.tags["run"]
    assert tiny.alias("candidate", "pub") == "models:/pub/4"
    assert promote.promote("models:/pub/4", gates())["ok"]
    assert bring_in(tiny, published["ours"]) == "models:/pub/3"  # again
    assert tiny.client.get_experiment_by_name("import").artifact_location == (tiny.folder / "artifacts/import").as_uri()  # pyright: ignore[reportOptionalMemberAccess]
    named = bring_in(tiny, published["ours"], classes=list("abcdefghij"))
    assert registry.resolve(named).card.classes == list("abcdefghij")


def test_imported_resnet_starts_a_semantic_fpn(tiny: Registry, tmp_path: Path) -> None:
    published = timm.create_model("resnet10t", num_classes=10).eval()
    torch.save(published.state_dict(), tmp_path / "r.pth")
    version = registry.resolve(bring_in(tiny, tmp_path / "r.pth", model="resnet10t", image_size=64))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(
        load_network.load_network(version.card, version.weights)(images), published(images), rtol=0, atol=0
    )
    task, card = SemanticFpnConfig(channels=32, pyramid_channels=32), version.card
    dense = build_task(task, card.model, card.image, ["a", "b"])
    weights = safetensors.torch.load_file(version.weights)
    start_from(dense, task, card.model, ["a", "b"], weights, "it", source_task=card.task, source_classes=card.classes)
    for name, tensor in dense.model.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, weights[name.removeprefix("backbone.")]), name


def test_import_takes_ema_weights_of_a_checkpoint_as_timm_does(tmp_path: Path) -> None:
    raw, average = (pvt.to_public(weights_of(seed)) for seed in (5, 6))
    averaged_model = {"n_averaged": torch.tensor(9), **{f"module.{key}": value for key, value in average.items()}}
    for entries in (
        {"state_dict": raw, "state_dict_ema": average, "epoch": 3},
        {"model": raw, "model_ema": average, "best": np.float64(0.5), "seen": np.arange(3), "ok": np.bool_(True)},
        {"model": raw, "model_ema": averaged_model},  # torchvision's references
        {"model": raw, "model_ema": None},
    ):
        torch.save(entries, tmp_path / "c.pth")
        found = import_weights.read(tmp_path / "c.pth")
        with torch.serialization.safe_globals(import_weights._numpy_types()):
            expected = from_any(
                {k: v for k, v in load_state_dict(str(tmp_path / "c.pth")).items() if k != "n_averaged"}
            )
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(found.tensors[key], expected[key]) for key in expected)
    torch.save(
        {"model": raw, "ema": {"decay": 0.9, "module": average}, "teacher": {"state_dict": raw}}, tmp_path / "c.pth"
    )
    assert import_weights.read(tmp_path / "c.pth").entry == "ema.module"
    for entry, where in (("model", "model"), ("teacher", "teacher.state_dict")):
        found = import_weights.read(tmp_path / "c.pth", entry)
        assert found.entry == where
        assert torch.equal(found.tensors["head.weight"], raw["head.weight"])
    with pytest.raises(InputError, match=r"--weights student: .* no such entry of weights; it has model, ema, teacher"):
        import_weights.read(tmp_path / "c.pth", "student")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.module.", "model.", "module.model.", "backbone.", "model.backbone."]
)
def test_import_strips_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    expected = weights_of(5)
    for state in (expected, pvt.to_public(expected)):
        torch.save({f"{prefix}{key}": value for key, value in state.items()}, tmp_path / "w.pth")
        found = import_weights.read(tmp_path / "w.pth")
        assert found.tensors.keys() == expected.keys()
        assert found.skipped == []
    head = {key: expected.pop(key) for key in ("head.weight", "head.bias")}
    backbone = {f"{prefix}backbone.{key}": value for key, value in expected.items()}
    decoder = {f"{prefix}neck.0.weight": torch.zeros(1)}
    torch.save({**backbone, **{f"{prefix}{key}": value for key, value in head.items()}, **decoder}, tmp_path / "w.pth")
    found = import_weights.read(tmp_path / "w.pth")
    assert found.tensors.keys() == {**expected, **head}.keys()
    assert [key.rpartition("neck")[2] for key in found.skipped] == [".0.weight"]


def test_checkpoint_with_numpy_values_is_imported_without_running_code(tmp_path: Path) -> None:
    scores = {kind.__name__: kind(1) for kind in (np.float64, np.float32, np.int64, np.uint8, np.bool_, np.str_)}
    old = {
        "model": weights_of(5),
        "scores": scores,
        "random": np.random.RandomState(0).get_state(),
        "f": np.ones((2, 2)),
    }
    torch.save(old, tmp_path / "n.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "n.pth").read_bytes()
    (tmp_path / "numpy-1.pth").write_bytes(
        data.replace(b"numpy._core", b"numpy.core")
    )  # as older versions of numpy wrote
    for name in ("n.pth", "numpy-1.pth"):
        assert import_weights.read(tmp_path / name).tensors.keys() == weights_of(5).keys()
    for evil in (np.array([Malicious(tmp_path / "ran")], dtype=object), np.load):
        torch.save({"model": weights_of(5), "scores": evil}, tmp_path / "evil.pth")
        with pytest.raises(InputError, match=r"is no file of tensors alone: .*nothing in it was run"):
            import_weights.read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("model", "size"), [("pvt_pico", 32), ("pvt_tiny", 384), ("vit_tiny_patch16_224", 96), ("resnet10t", 224)]
)
def test_image_size_is_inferred_from_position_embeddings(model: str, size: int) -> None:
    assert import_weights._image_size(create_model(model, size, num_classes=3).state_dict(), model) == size


@pytest.fixture
def headless(tiny: Registry, published: dict[str, Path], tmp_path: Path) -> str:
    """Transformers' PvtModel, which is PvtForImageClassification without its classifier."""
    PvtForImageClassification.from_pretrained(published["transformers"]).pvt.save_pretrained(tmp_path / "backbone")
    return bring_in(tiny, tmp_path / "backbone", image_size=None)


def test_headless_backbone_is_imported_and_fine_tuned(
    tiny: Registry, headless: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bring_in(tiny, tmp_path / "backbone", image_size=None) == headless  # again
    assert "tensors, no head, 32 px" in capfd.readouterr().err
    version, expected = registry.resolve(headless), weights_of(5)
    assert (version.card.classes, version.card.image.size, version.tags["num_classes"]) == ([], 32, "0")
    weights, card = safetensors.torch.load_file(version.weights), version.card
    for task in (ClassificationConfig(), SemanticFpnConfig(channels=32, pyramid_channels=32)):
        made = build_task(task, card.model, card.image, ["a", "b"])
        start_from(
            made, task, card.model, ["a", "b"], weights, "it", source_task=card.task, source_classes=card.classes
        )
        state = made.model.state_dict()
        name = "backbone.stages.3.pos_embed" if "backbone.stages.3.pos_embed" in state else "stages.3.pos_embed"
        assert torch.equal(state[name], expected["stages.3.pos_embed"])


def test_headless_backbone_is_rejected_where_a_head_is_needed(
    tiny: Registry, headless: str, digits: Path, tmp_path: Path
) -> None:
    told = r"is a backbone without a head, .* init\.model=.* --probe"
    with pytest.raises(InputError, match=f"^{headless}: {told}"):
        evaluate._open_model(headless, str(digits / "val"), tiny.uri, DEFAULT_CACHE)
    with pytest.raises(InputError, match=f"^{headless}: {told}"):
        export(headless, "timm", tmp_path / "out")
    with pytest.raises(InputError, match=told):
        ServedClassifier(registry.resolve(headless).card, registry.resolve(headless).weights)
    with pytest.raises(InputError, match="head of 0 classes, but 1 names"):
        bring_in(tiny, tmp_path / "backbone", classes=["a"])


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 1500, text
    return text


def flipped(data: bytes, places: Iterable[int]) -> bytes:
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 1 << place % 8
    return bytes(changed)


def test_damaged_torch_zip_checkpoint_is_rejected(tmp_path: Path) -> None:
    state, file = weights_of(5), tmp_path / "w.pth"
    torch.save(state, file)
    whole, draws = file.read_bytes(), np.random.default_rng(0)
    for place in draws.integers(0, len(whole), 40):
        file.write_bytes(flipped(whole, [int(place)]))
        found = None
        with contextlib.suppress(InputError):
            found = import_weights.read(file).tensors
        # What fills a part up to its alignment holds nothing.
        assert found is None or all(torch.equal(found[key], state[key]) for key in state)
    for length in (*draws.integers(0, len(whole), 10), len(whole) - 1):
        file.write_bytes(whole[: int(length)])
        with pytest.raises(InputError):
            import_weights.read(file)
    at = whole.index(state["head.weight"].numpy().tobytes())
    file.write_bytes(flipped(whole, [at + 1]))
    with pytest.raises(InputError, match=r"is damaged: w/data/\d+ differs from its checksum: get the file again"):
        import_weights.read(file)
    with (
        zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as packed,
        zipfile.ZipFile(io.BytesIO(whole)) as parts,
    ):
        for name in parts.namelist():
            packed.writestr(name, parts.read(name))
    with pytest.raises(InputError, match="its members are compressed, or overlap"):
        import_weights.read(tmp_path / "z.pth")


def test_damaged_or_huge_safetensors_header_is_rejected(tiny: Registry, tmp_path: Path) -> None:
    state, file = weights_of(5), tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, file)
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for place in np.random.default_rng(0).integers(0, header + 8, 60):
        file.write_bytes(flipped(whole, [int(place)]))
        with pytest.raises(InputError) as refused:
            bring_in(tiny, file)
        one_line(refused.value)
    giant = json.dumps({"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}).encode()
    many = json.dumps({"w": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}).encode()
    for data in (
        (1 << 62).to_bytes(8, "little") + b"{}",
        (99 << 20).to_bytes(8, "little") + b"{}",
        len(giant).to_bytes(8, "little") + giant,
        len(many).to_bytes(8, "little") + many + bytes(4),
        (20_000).to_bytes(8, "little") + b"[" * 20_000,
        b"",
    ):
        file.write_bytes(data)
        with pytest.raises(InputError) as refused:
            bring_in(tiny, file)
        one_line(refused.value)


def test_import_compares_the_given_sha256(
    tiny: Registry, published: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = published["ours"]
    digest = files.sha256(file)

    def bring(sha256: str) -> str:
        line = ["import", str(file), "--name", "pub", "--model", "pvt_pico", "--image-size", "32", "--sha256", sha256]
        monkeypatch.setattr(sys, "argv", ["registry.py", *line, "--tracking-uri", tiny.uri])
        return launch_registry.main()["model"]

    with pytest.raises(InputError, match=f"--sha256 {'0' * 64}: but {file} has {digest}"):
        bring("0" * 64)
    with pytest.raises(InputError, match="--sha256 abc: 64 hexadecimal digits"):
        bring("abc")
    assert bring(digest.upper()) == "models:/pub/1"


HOSTILE: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "sparse": lambda state: {**state, "head.weight": state["head.weight"].to_sparse()},
    "no values": lambda state: {**state, "head.weight": torch.empty(10**7, 10**7, device="meta")},
    "quantised": lambda state: {**state, "x": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)},
    "of another type: head.bias torch.complex64": lambda state: {
        **state,
        "head.bias": torch.zeros(10, dtype=torch.cfloat),
    },
    "of another type: head.bias torch.float8": lambda state: {
        **state,
        "head.bias": torch.zeros(10).to(torch.float8_e4m3fn),
    },
    "bytes, but its tensors would have 4,000,": lambda state: {**state, "y": torch.zeros(1).expand(10**6, 10**6)},
    "no names of tensors: a int": lambda state: {**state, 3: torch.zeros(1)},
    "no names of tensors: :": lambda state: {**state, "": torch.zeros(1)},
    r"no names of tensors: \\x1b": lambda state: {**state, "\x1b[31mred\n": torch.zeros(1)},
    "no names of tensors: hhhh": lambda state: {**state, "h" * 5000: torch.zeros(1)},
    "nested without an end": lambda state: endless(),
    "other types: head.bias torch.int32": lambda state: {**state, "head.bias": torch.zeros(10, dtype=torch.int32)},
    "other shapes": lambda state: {**state, "head.weight": torch.tensor(1.0), "stages.0.pos_embed": torch.tensor(1.0)},
    "TypeError": lambda state: {**state, "model": torch.tensor(1.0)},
    "cannot be read as weights|would have": lambda state: {**state, "head.bias": Sized(torch.zeros(10), 10**12)},
}


def endless() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["model"] = state
    return state


class Sized:
    """Pickled as a tensor of `num` numbers on a storage that has fewer."""

    def __init__(self, tensor: torch.Tensor, num: int):
        self.tensor, self.num = tensor, num

    def __reduce__(self) -> tuple[Any, ...]:
        storage = self.tensor.storage()
        return (sys.modules["torch._utils"]._rebuild_tensor_v2, (storage, 0, (self.num,), (1,), False, OrderedDict()))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("told", HOSTILE)
@pytest.mark.filterwarnings("ignore")  # torch's, of how it saves and loads such tensors
def test_hostile_tensors_are_rejected_in_one_line_without_using_memory(
    tiny: Registry, tmp_path: Path, told: str, zipped: bool
) -> None:
    torch.save(HOSTILE[told](weights_of(5)), tmp_path / "h.pth", _use_new_zipfile_serialization=zipped)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as refused:
        bring_in(tiny, tmp_path / "h.pth", image_size=None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # in KiB
    text = one_line(refused.value)
    if zipped or "float8" not in told:  # which the old format cannot hold
        assert re.search(told, text), text


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_pickled_checkpoint_is_not_run(tiny: Registry, tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(
            {"head.weight": Malicious(tmp_path / "ran")}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(InputError, match=r"evil.pth: is no file of tensors alone: .*mkdir.*nothing in it was run"):
            bring_in(tiny, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # what it would have done
    assert (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_the_model_are_rejected(
    tiny: Registry, published: dict[str, Path], tmp_path: Path
) -> None:
    def refused(source: Path, message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            bring_in(tiny, source, **options)

    def saved(state: dict[str, torch.Tensor]) -> Path:
        safetensors.torch.save_file(state, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    state = weights_of(5)
    refused(published["public"], "is not a pvt_tiny for 32 px: missing: .* more; ", model="pvt_tiny")
    refused(published["public"], r"other shapes: stages.0.pos_embed \[1, 64, 32\] instead of", image_size=64)
    refused(published["public"], "--model pvt_larg cannot be built", model="pvt_larg")
    refused(published["public"], "head of 10 classes, but 2 names", classes=["a", "b"])
    refused(saved({k: v for k, v in state.items() if k != "norm.bias"}), "missing: norm.bias")
    refused(saved({**state, "extra": torch.zeros(1)}), "unknown: extra")
    refused(saved({**state, "norm.bias": torch.full((128,), torch.inf)}), "not finite: norm.bias")
    refused(saved({k: v for k, v in state.items() if k != "head.weight"}), "unknown: head.bias")
    public = pvt.to_public(state)
    torch.save({k: v for k, v in public.items() if k != "cls_token"}, tmp_path / "short.pth")
    refused(tmp_path / "short.pth", r"short.pth: .* missing keys \['cls_token'\]")
    torch.save({"model": {"epoch": 3}}, tmp_path / "none.pth")
    refused(tmp_path / "none.pth", "entries that are no tensors: epoch")
    (tmp_path / "text.pth").write_text("hello")
    refused(tmp_path / "text.pth", "text.pth: ")
    (tmp_path / "text.safetensors").write_text("hello")
    refused(tmp_path / "text.safetensors", "text.safetensors: cannot be read as weights")
    refused(tmp_path / "missing.pth", "no such file or folder")
    refused(tmp_path, "has no config.json")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    refused(tmp_path / "vit", "model_type is 'vit', but only 'pvt'")
    assert not registry.list_versions(tiny.client, "pub")


# No pickles


NO_PICKLES = """
import importlib, importlib.util, pickle, sys

def refuse(*arguments, **options):
    raise AssertionError("a pickle is opened")

class Refuse:
    dispatch = {}
    def __init__(self, *arguments, **options):
        refuse()

for name in ("pickle", "_pickle", "cloudpickle", "dill"):
    if importlib.util.find_spec(name):
        module = importlib.import_module(name)
        for loader in ("load", "loads", "_load", "_loads"):
            if hasattr(module, loader):
                setattr(module, loader, refuse)
        for loader in ("Unpickler", "_Unpickler"):
            if hasattr(module, loader):
                setattr(module, loader, Refuse)
# What was imported before may hold the functions themselves.
sys.addaudithook(lambda event, _: refuse() if event == "pickle.find_class" else None)
try:
    pickle.loads(pickle.dumps(1))
except AssertionError:
    pass
else:
    raise SystemExit("a pickle could be opened")
import mlflow.pyfunc, pandas, torch
torch.load = refuse
from pipeline.track import tracking_server
from pipeline.track.registry import model_files, registry
tracking_server.connect(sys.argv[1])
version = registry.resolve("models:/tiny@candidate")
model = mlflow.pyfunc.load_model(str(version.folder.parent))
print(model.predict(pandas.DataFrame({"image": [model_files.example(32)]})).to_json(orient="records"))
"""


def test_registered_model_predicts_without_unpickling(tiny: Registry, tmp_path: Path) -> None:
    tiny.add(3)
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(NO_PICKLES)
    process = Rank(str(script), [tiny.uri], {model_cache.VARIABLE: tmp_path / "cache"}, log)
    assert process.wait(PATIENCE_S) == 0, log.with_suffix(".err").read_text()[-3000:]
    (answer,) = json.loads(log.with_suffix(".out").read_text().splitlines()[-1])
    network = timm.create_model("pvt_pico", num_classes=10, img_size=32).eval()
    network.load_state_dict(weights_of(3))
    grey = (torch.full((1, 3, 32, 32), 128 / 255) - torch.tensor(ImageConfig().mean)[:, None, None]) / torch.tensor(
        ImageConfig().std
    )[:, None, None]
    with torch.inference_mode():
        score, label = network(grey).softmax(dim=1).max(dim=1)
    assert answer["label"] == CLASSES[int(label)]
    assert answer["score"] == pytest.approx(float(score), rel=1e-5)


# Lineage


def family(tiny: Registry) -> list[str]:
    """A model, a child of its second version, and a grandchild; and a child that has made nothing yet."""
    uris: list[str] = []

    def add(name: str, uuid: str, steps: tuple[int, ...], parent: str | None = None) -> str:
        run_id = tiny.run_of(f"run-{name}", uuid)
        entries = [tiny.entry(step, run=uuid, parent=parent, data=uuid * 2, top1=0.5) for step in steps]
        made = [tiny.register(entry, name, run_id) for entry in entries]
        if parent:
            registry.link_child(tiny.client, parent, uuid, run_id)
        uris.extend(made)
        return made[-1]

    first = add("base", "a" * 32, (1, 2))
    child = add("child", "b" * 32, (3,), first)
    add("grandchild", "c" * 32, (4,), child)
    registry.link_child(tiny.client, first, "e" * 32, tiny.run_of("run-idle", "e" * 32))
    return uris


def names(node: dict[str, Any]) -> Any:
    return {f"{node['kind']} {node['name']}": [names(child) for child in node["children"]]}


def test_lineage_covers_ancestors_and_descendants(tiny: Registry) -> None:
    family(tiny)
    grandchild = {"run run-grandchild": [{"version models:/grandchild/1": []}]}
    child = {"run run-child": [{"version models:/child/1": [grandchild]}]}
    base = {"version models:/base/2": [child, {"run run-idle": []}]}
    (root,) = lineage.lineage("base")["roots"]
    assert names(root) == {"data data set": [{"run run-base": [{"version models:/base/1": []}, base]}]}
    assert root["details"] == ["sha256 aaaaaaaaaaaa"]
    (root,) = lineage.lineage("models:/base@candidate")["roots"]
    assert names(root) == {"data data set": [{"run run-base": [base]}]}
    (root,) = lineage.lineage("models:/grandchild/1")["roots"]
    assert names(root) == {"data data set": [{"run run-base": [{"version models:/base/2": [child]}]}]}
    assert lineage.text(lineage.lineage("models:/child/1")).splitlines() == [
        "data data set  (sha256 aaaaaaaaaaaa)",
        "└─ run run-base  (FINISHED, aaaaaaaaaaaa)",
        "   └─ version models:/base/2  (@candidate, step 2, top1 50.0 %)",
        "      └─ run run-child  (FINISHED, bbbbbbbbbbbb)",
        "         └─ version models:/child/1  (@candidate, step 3, top1 50.0 %)",
        "            └─ run run-grandchild  (FINISHED, cccccccccccc)",
        "               └─ version models:/grandchild/1  (@candidate, step 4, top1 50.0 %)",
    ]
    tiny.client.delete_model_version("base", "2")
    (root,) = lineage.lineage("models:/child/1")["roots"]
    assert (root["name"], root["details"]) == ("models:/base/2", ["removed from the registry"])
    with pytest.raises(InputError, match="no registered model has this name"):
        lineage.lineage("nobody")


def test_lineage_is_drawn_as_png_and_svg(tiny: Registry, tmp_path: Path) -> None:
    from PIL import Image

    family(tiny)
    tree = lineage.lineage("base")
    lineage.draw(tree, tmp_path / "tree.png")
    lineage.draw(tree, tmp_path / "tree.svg")
    with Image.open(tmp_path / "tree.png") as picture:
        assert picture.width > 2000
        boxes = {picture.convert("RGB").getpixel((60 + round(2.85 * 160 * column), 44)) for column in range(3)}
    assert len(boxes) == 3  # a colour for each kind
    assert "<svg" in (tmp_path / "tree.svg").read_text()
    with pytest.raises(InputError, match=r"a picture is a .png or an .svg"):
        lineage.draw(tree, tmp_path / "tree.pdf")
    with pytest.raises(InputError, match="cannot be written"):
        lineage.draw(tree, tmp_path / "nowhere" / "tree.png")


# The command


@pytest.fixture
def said(
    tiny: Registry, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Runs the command in this process: its result, and what it told people."""

    def call(*arguments: object) -> tuple[dict[str, Any], str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["registry.py", *map(str, arguments), "--tracking-uri", tiny.uri])
        with pytest.raises(SystemExit) as ending:
            cli.run(launch_registry.main)
        out, err = capfd.readouterr()
        result = json.loads(out.splitlines()[-1])
        assert ending.value.code == (0 if result.get("ok", True) else 1)
        return result, err

    return call


def test_registry_commands_print_text_and_json(
    tiny: Registry, said: Callable[..., tuple[dict[str, Any], str]], published: dict[str, Path], tmp_path: Path
) -> None:
    tiny.add(1, top1=0.8)
    tiny.add(2, top1=0.7)
    (tmp_path / "gates.yaml").write_text("metrics: {top1: {min: 0.75}}\n")
    result, table = said("list")
    assert [(row["uri"], row["aliases"]) for row in result["versions"]] == [
        ("models:/tiny/1", []),
        ("models:/tiny/2", ["candidate"]),
    ]
    assert "top1 70.0 %  @candidate" in table
    result, told = said("show", "models:/tiny@candidate")
    assert result["tags"]["step"] == "2"
    assert "run" in told
    result, told = said("promote", "models:/tiny/2", "--gates", tmp_path / "gates.yaml")
    assert not result["ok"]
    assert "FAILED  metrics.top1: 0.7 (at least 0.75)" in told
    result, _ = said("promote", "models:/tiny/1", "--gates", tmp_path / "gates.yaml", "--why", "good")
    assert result["champion"] == "models:/tiny/1"
    result, told = said("lineage", "tiny", "--out", tmp_path / "tree.png")
    assert result["picture"] == str(tmp_path / "tree.png")
    assert "@champion" in told
    result, _ = said("rollback", "tiny", "--why", "bad")
    assert (result["champion"], result["why"]) == (None, "bad")
    edit(tiny.stored("models:/tiny/1") / "served.py")
    result, told = said("verify", "models:/tiny/1")
    assert not result["ok"]
    assert "served.py has SHA-256" in told
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij") + "\n")
    options = ("--name", "pub", "--model", "pvt_pico", "--image-size", 32, "--classes", tmp_path / "classes.txt")
    result, _ = said("import", published["public"], *options)
    assert result["model"] == "models:/pub/1"
    assert registry.resolve(result["model"]).card.classes == list("abcdefghij")


def test_sync_uploads_what_a_killed_job_left(
    tiny: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"run: {{name: tiny, root: {tmp_path / 'runs'}}}\nmodel: {{name: pvt_pico}}\ndata: {{train: nowhere}}\n"
        f"optim: {{lr: 1}}\ntrain: {{length: 1 step, global_batch_size: 48}}\ntracking: {{uri: '{tiny.uri}'}}\n"
    )
    record = Record.begin(folder, "tiny", tags={"main_metric": "top1"}, inputs=[])
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 1.5, "loss": 0.25}\n')
    Outbox(folder).put({name: tiny.entry(1) / name for name in (WEIGHTS, RAW)}, ModelCard.read(tiny.entry(1)))
    monkeypatch.setattr(sys, "argv", ["registry.py", "sync", str(folder)])

    def sync() -> dict[str, Any]:
        with pytest.raises(SystemExit) as ending:
            cli.run(launch_registry.main)
        assert ending.value.code == 0
        return json.loads(capfd.readouterr().out.splitlines()[-1])

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="its job is at work"):
            launch_registry.main()
    result = sync()
    assert (result["ok"], result["status"], result["left"]) == (True, "KILLED", "")
    assert "1 versions" in result["sent"]
    run = tiny.client.get_run(result["run_id"])
    assert (run.info.status, run.data.metrics["train/loss"]) == ("KILLED", 0.25)
    assert run.data.tags["run.uuid"] == record.uuid
    assert registry.find_version(tiny.client, "models:/tiny/1").run_id == result["run_id"]
    assert sync()["sent"] == ""


def test_shipped_gates_are_valid() -> None:
    found = load_section(Gates, ROOT / "configs/gates/classification.yaml")
    assert found.metrics
    assert found.champion
