"""The pre-flight of nodes: each check passes on what is sound and names what is not; the doctor's answers and codes."""

import contextlib
import http.server
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import lease
from pipeline.cluster import preflight
from pipeline.cluster.preflight import Check, DriverState
from pipeline.commands import doctor
from pipeline.config import Config
from pipeline.errors import ExternalError
from pipeline.shards.pack import pack
from pipeline.world import World
from tests.conftest import write_config
from tests.ranks import PATIENCE_S, ROOT, Rank, free_port, start
from tests.servers import FaultyServer

Settings = Callable[..., Config]

BARE = ("cluster.gpus_per_node=0", "cluster.ranks_per_node=1")
"""A cluster of nodes without GPUs."""


def test_check_message_is_joined_into_one_line() -> None:
    assert preflight.make_check("pulse")(lambda: "60\n a minute")() == Check("pulse", True, "60 a minute")


def test_check_that_raises_is_failed() -> None:
    @preflight.make_check("pulse")
    def pulse(beats: int, minutes: int) -> str:
        return f"{beats // minutes} a minute"

    assert pulse(60, 0) == Check("pulse", False, "ZeroDivisionError: integer division or modulo by zero")


# Disk


def test_disk_check_creates_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    found = preflight.disk(tmp_path / "new" / "scratch")
    assert found.ok
    assert "scratch: " in found.told
    assert list((tmp_path / "new" / "scratch").iterdir()) == []


def test_disk_check_fails_where_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("not a folder")
    found = preflight.disk(tmp_path / "scratch")
    assert not found.ok
    assert found.told == f"{tmp_path}/scratch: cannot be written: File exists"


def test_scratch_with_an_unset_variable_fails(
    monkeypatch: pytest.MonkeyPatch, make_config: Settings, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_DISK", raising=False)
    checks = list(preflight.check_node(make_config(*BARE, "cluster.scratch=$NODE_DISK/me")))
    assert [found.told.partition(":")[0] for found in checks if not found.ok] == ["$NODE_DISK/me"]
    assert not (tmp_path / "$NODE_DISK").exists()


def test_disk_check_fails_when_writing_fails(tmp_path: Path, digits: Path) -> None:
    limit = 1 << 16  # of a file's size, which is what a process may set for itself
    done = node(
        write_config(digits, tmp_path),
        limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    failed = {each["told"] for each in result_of(done)["checks"] if not each["ok"]}
    told = "cannot be written: File too large"
    assert failed == {f"{tmp_path}/runs: {told}", f"{tempfile.gettempdir()}: {told}"}
    assert not list((tmp_path / "runs").iterdir())


def test_run_disk_needs_space_for_five_checkpoints(make_config: Settings) -> None:
    run = make_config().run
    assert preflight.run_disk(run).ok
    checkpoint = run.folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    with (checkpoint / "model.safetensors").open("wb") as file:
        file.truncate(10**13)  # takes no room itself
    found = preflight.run_disk(run)
    assert not found.ok
    assert "50,000.0 GB are needed" in found.told


def test_run_disk_fails_while_another_job_holds_the_lease(make_config: Settings) -> None:
    run = make_config().run
    run.folder.mkdir(parents=True)
    with lease.hold(run.folder):
        found = preflight.run_disk(run)
    assert not found.ok
    assert found.told.endswith("is at work in it: wait for it, or choose another run.name")
    assert preflight.run_disk(run).ok


# Clock


@pytest.mark.parametrize(
    ("off_s", "told"), [(0, None), (-100, "behind the sender's"), (100, "ahead of the sender's"), (-40, None)]
)
def test_clock_check_fails_beyond_a_minute(off_s: int, told: str | None) -> None:
    # The clock is read as of this process's start.
    started = preflight.psutil.Process().create_time()
    found = preflight.clock(started - off_s)
    assert found.ok == (told is None)
    assert told is None or told in found.told


# Shards


@pytest.fixture
def packed(digit_images: Path, tmp_path: Path) -> Path:
    pack(digit_images / "val", tmp_path / "packed", samples_per_shard=200)
    return tmp_path / "packed"


def test_shards_check_reads_a_sample(packed: Path, make_config: Settings) -> None:
    found = preflight.shards(str(packed), make_config().data)
    assert found.ok
    assert f"{packed}: 360 samples" in found.told


def test_shards_check_fails_for_a_missing_data_set(make_config: Settings, tmp_path: Path) -> None:
    found = preflight.shards(str(tmp_path / "nowhere"), make_config().data)
    assert not found.ok
    assert f"{tmp_path}/nowhere/manifest.json: cannot read the manifest" in found.told


def test_shards_check_reports_a_damaged_sample(packed: Path, make_config: Settings) -> None:
    record = np.load(packed / "shard-000000.index.npy")[0]
    tar = packed / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(record["offset"]) + int(record["size"]) // 2] ^= 1
    tar.write_bytes(data)
    found = preflight.shards(str(packed), make_config().data)
    assert not found.ok
    assert f"{tar}: sample " in found.told
    assert "do not match their checksum" in found.told


def test_shards_check_fails_for_a_missing_shard(packed: Path, make_config: Settings) -> None:
    (packed / "shard-000000.tar").unlink()
    found = preflight.shards(str(packed), make_config().data)
    assert not found.ok
    assert str(packed / "shard-000000.tar") in found.told


def test_shards_check_fetches_one_sample_of_remote_shards(packed: Path, make_config: Settings, tmp_path: Path) -> None:
    with FaultyServer(packed) as remote:
        found = preflight.shards(remote.url, make_config(f"data.cache={tmp_path}/cache").data)
        parts = [request.headers["Range"] for request in remote.gets(".tar")]
    assert found.ok, found.told
    record = np.load(packed / "shard-000000.index.npy")[0]
    first = int(record["offset"])
    assert parts == [f"bytes={first}-{first + int(record['size']) - 1}"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ledger"]


def test_shards_check_accepts_a_coco_annotation_file_unpacked(make_config: Settings, tmp_path: Path) -> None:
    annotations = tmp_path / "coco" / "annotations" / "instances_val.json"
    assert not preflight.shards(str(annotations), make_config().data).ok
    annotations.parent.mkdir(parents=True)
    annotations.write_text("{}")
    assert preflight.shards(str(annotations), make_config().data).ok


# GPUs

Driver = Callable[[str], None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts an nvidia-smi of a few lines of shell in front of any other."""

    def install(script: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


def test_gpu_check_passes_when_none_are_requested() -> None:
    assert preflight.gpus(0) == Check("gpu", True, "none requested")


def test_gpu_check_passes_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.gpus(None) == Check("gpu", True, "none")


def test_gpu_check_fails_with_fewer_gpus_than_requested(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    driver("echo 'GPU-01, 580.95.05, 0'")
    found = preflight.gpus(2)
    assert not found.ok
    assert "0 visible instead of 2, driver 580.95.05" in found.told
    assert "0 visible instead of 1" in preflight.gpus(None).told


def test_nvidia_smi_output_is_parsed_per_gpu(driver: Driver) -> None:
    driver(
        """case "$*" in *uuid,driver_version,ecc.errors.uncorrected.volatile.total*noheader*) ;; *) exit 2;; esac
        echo 'GPU-01, 580.95.05, 0'
        echo 'GPU-02, 580.95.05, 3'"""
    )
    states = preflight.driver_states()
    assert states == {"GPU-01": DriverState("580.95.05", "0"), "GPU-02": DriverState("580.95.05", "3")}
    assert states["GPU-01"].fault is None
    assert states["GPU-02"].fault == "3 uncorrected ECC errors: reset it (nvidia-smi --gpu-reset)"


@pytest.mark.parametrize(
    ("ecc_errors", "sound"),
    [("[N/A]", True), ("[Not Supported]", True), ("[GPU requires reset]", False), ("[Unknown Error]", False)],
)
def test_non_numeric_ecc_counts_are_interpreted(ecc_errors: str, sound: bool) -> None:
    assert (DriverState("580.95.05", ecc_errors).fault is None) == sound


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", "has failed: no driver (exit code 9)"),
        ("echo 'Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.'", "GPU is lost"),
        ("exit 15", "(exit code 15)"),
        ("exec sleep 60", "no answer for"),
    ],
)
def test_gpu_check_fails_when_nvidia_smi_fails_or_hangs(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    monkeypatch.setattr(preflight, "NVIDIA_SMI_S", 2.0)
    driver(script)
    found = preflight.gpus(1)
    assert not found.ok
    assert told in found.told


def test_gpu_check_passes_when_the_driver_has_no_devices(driver: Driver) -> None:
    driver("echo 'No devices were found'; exit 6")
    assert preflight.gpus(None) == Check("gpu", True, "none")


def test_computes_correctly_passes_on_cpu() -> None:
    assert preflight.computes_correctly(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_check_passes_on_this_machine() -> None:
    found = preflight.gpus(torch.cuda.device_count())
    assert found.ok, found.told
    assert "driver" in found.told


# The tracking server


@contextlib.contextmanager
def server(code: int) -> Iterator[str]:
    """One that answers /health with `code`, and all else with 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if self.path == "/mlflow/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/mlflow/"
        serving.shutdown()
        thread.join()


@pytest.mark.parametrize(("code", "ok"), [(200, True), (401, True), (404, False), (503, False)])
def test_tracking_check_judges_the_health_status_code(make_config: Settings, code: int, ok: bool) -> None:
    with server(code) as uri:
        found = doctor.tracking(make_config(f"tracking.uri={uri}"))
    assert found.ok == ok
    assert f"answers {code}" in found.told


def test_unreachable_tracking_server_is_reported_without_credentials(
    make_config: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}?token=hidden")
    found = doctor.tracking(make_config())
    assert not found.ok
    assert "cannot be reached" in found.told
    assert not [word for word in ("me:", "secret", "hidden") if word in found.told]
    assert found.as_warning().ok
    assert found.as_warning().warning


def test_tracking_check_needs_a_writable_folder_for_sqlite(make_config: Settings, tmp_path: Path) -> None:
    assert doctor.tracking(make_config()).ok  # the default, among the runs
    (tmp_path / "file").touch()
    found = doctor.tracking(make_config(f"tracking.uri=sqlite:///{tmp_path}/file/mlflow.db"))
    assert not found.ok
    assert "cannot be written" in found.told


def test_tracking_check_skips_other_databases(make_config: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db/mlflow")
    assert doctor.tracking(make_config()) == Check("mlflow", True, "postgresql://***@db/mlflow: not checked")


# The command

Process = subprocess.CompletedProcess[str]


def run(
    *arguments: object, environ: Mapping[str, str] | None = None, limit: Callable[[], None] | None = None
) -> Process:
    """In a new interpreter, which says what it imports."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "launch/doctor.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(environ or {})},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        preexec_fn=limit,
    )


def fork(*arguments: object, folder: Path, environ: Mapping[str, str] | None = None) -> Process:
    log = folder / "doctor"
    process = Rank("launch/doctor.py", arguments, environ or {}, log)
    code = process.wait(PATIENCE_S)
    return Process([], code, *(log.with_suffix(end).read_text() for end in (".out", ".err")))


def node(
    path: Path, *overrides: str, starts: Callable[..., Process] = run, late_s: float = 0.0, **options: Any
) -> Process:
    """The pre-flight of a node that SLURM calls n7, `late_s` seconds after it was asked for."""
    changes = [word for override in (*BARE, *overrides) for word in ("--set", override)]
    arguments = ["--node", "--config", path, *changes, "--sent", time.time() - late_s]
    return starts(*arguments, environ={"SLURMD_NODENAME": "n7", "NODE_DISK": str(path.parent)}, **options)


def result_of(done: Process) -> dict[str, Any]:
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def imported(done: Process) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_healthy_node_passes_without_importing_torch_or_mlflow(digits: Path, tmp_path: Path) -> None:
    path = write_config(digits, tmp_path)
    done = node(path, "cluster.scratch=$NODE_DISK/scratch", f"data.cache={tmp_path}/cache")
    found = result_of(done)
    assert done.returncode == 0, found
    assert found["node"] == "n7"
    assert found["ok"]
    assert [each["name"] for each in found["checks"]] == [
        "clock", "gpu", "disk", "disk", "disk", "shards", "shards", "mlflow"
    ]  # fmt: skip
    assert all(each["ok"] and each["told"] for each in found["checks"])
    assert (tmp_path / "scratch").is_dir()
    assert "pipeline.shards.index" in imported(done)
    assert not {"torch", "mlflow"} & imported(done)


def test_faulty_node_fails_and_reports_the_failed_checks(digits: Path, tmp_path: Path) -> None:
    done = node(write_config(digits, tmp_path), f"data.val={tmp_path}/gone", starts=fork, folder=tmp_path, late_s=100)
    found = result_of(done)
    assert done.returncode == 1
    assert not found["ok"]
    assert [each["name"] for each in found["checks"] if not each["ok"]] == ["clock", "shards"]


def test_unreachable_tracking_server_is_only_a_warning_on_a_node(digits: Path, tmp_path: Path) -> None:
    uri = f"tracking.uri=http://127.0.0.1:{free_port()}"
    done = node(write_config(digits, tmp_path), uri, starts=fork, folder=tmp_path)
    assert done.returncode == 0
    assert [each["name"] for each in result_of(done)["checks"] if each["warning"]] == ["mlflow"]


def test_doctor_prints_a_table_of_all_checks(digits: Path, tmp_path: Path) -> None:
    done = fork("--config", write_config(digits, tmp_path), folder=tmp_path)
    found = result_of(done)
    assert done.returncode == (0 if found["ok"] else 1)
    names = [each["name"] for each in found["checks"]]
    assert names[:8] == ["python", "torch", "deepspeed", "dali", "mlflow", "gpu", "cores", "memory"]
    assert names[8:] == ["disk", "disk", "shards", "shards", "mlflow", "run"]
    table = done.stderr.splitlines()
    assert [line.split()[1] for line in table] == names
    assert all(each["told"] in line for each, line in zip(found["checks"], table, strict=True))
    assert {each["told"] for each in found["checks"]} >= {torch.__version__.partition("+")[0]}


def test_doctor_fails_when_the_data_is_missing(digits: Path, tmp_path: Path) -> None:
    gone = f"data.train={tmp_path}/gone"
    done = fork("--config", write_config(digits, tmp_path), "--set", gone, folder=tmp_path)
    assert done.returncode == 1
    assert not result_of(done)["ok"]
    assert f"FAILED   shards     {tmp_path}/gone/manifest.json" in done.stderr


def test_package_check_fails_for_a_missing_package() -> None:
    found = doctor.package("dali", ["no-such-dali-13", "no-such-dali-12"])
    assert not found.ok
    assert "no-such-dali-13 or no-such-dali-12" in found.told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node"], "--node needs --config"),
        (["--node", "--all-reduce"], "not allowed with"),
        (["--node", "--config", "missing.yaml"], "missing.yaml: cannot read the configuration"),
    ],
)
def test_doctor_rejects_wrong_usage(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = fork(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert not done.stdout
    assert message in done.stderr


# All-reduce


def all_reduce(ranks: int, folder: Path, *arguments: object, missing: int = 0) -> list[tuple[int, list[Any], str]]:
    """Exit code, JSON lines and standard error of each rank, of which the last `missing` are never started."""
    logs = [folder / str(rank) for rank in range(ranks)]
    processes = start(ranks, "launch/doctor.py", ["--all-reduce", *arguments], logs)
    for process in processes[ranks - missing :]:
        process.kill()
    codes = [process.wait(PATIENCE_S) for process in processes]
    lines = [[json.loads(line) for line in log.with_suffix(".out").read_text().splitlines()] for log in logs]
    return list(zip(codes, lines, [log.with_suffix(".err").read_text() for log in logs], strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_reduce_bandwidth_is_measured(ranks: int, tmp_path: Path) -> None:
    found = all_reduce(ranks, tmp_path, "--mib", 1)
    assert [code for code, _, _ in found] == [0] * ranks, found
    assert [lines[0]["rank"] for _, lines, _ in found] == list(range(ranks))
    assert all(lines[0]["arrived"] and lines[0]["node"] for _, lines, _ in found)
    ((measured,), *others) = [lines[1:] for _, lines, _ in found]
    assert others == [[]] * (ranks - 1)
    assert measured["ranks"] == ranks
    assert measured["all_reduce_gb_s"] > 0 if ranks > 1 else measured["all_reduce_gb_s"] == 0


def test_all_reduce_times_out_when_a_rank_is_missing(tmp_path: Path) -> None:
    (code, lines, error), _ = all_reduce(2, tmp_path, "--timeout", 2, missing=1)
    assert code == 1
    assert [line["rank"] for line in lines] == [0]  # it has arrived, and measured nothing
    waits, error = error.splitlines()
    assert "rank 0: waiting for 1 other rank at " in waits
    assert error.startswith("error: rank 0 of 2 on ")
    assert "no all-reduce with the others within 2 s" in error


def test_all_reduce_with_wrong_sums_is_reported() -> None:
    with pytest.raises(ExternalError, match=r"ranks \[0\] of 1 were given wrong sums"):
        preflight.all_reduce(World(rank=1, size=1), mib=1)  # adds up to what rank 0 alone would have sent
