"""The commands as a user runs them: a short job on two ranks, its records, its model, and wrong usage.

The job and a refusal go through the real launcher; what follows is run in forks, which start at once.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import mlflow.artifacts
import pandas
import pytest
import yaml
from mlflow.tracking import MlflowClient

from pipeline import files
from pipeline.lease import LEASE
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from pipeline.track import tracking_server
from tests.conftest import write_config
from tests.ranks import PATIENCE_S, ROOT, Rank, free_port, start
from tests.servers import FaultyServer

STEPS = 30

Process = subprocess.CompletedProcess[str]


def launched(cwd: Path, *overrides: str, launcher: str = "runner", options: Sequence[object] = ()) -> Process:
    """`deepspeed launch/pretrain.py …` on two ranks: the launcher's own process is a fork, what it starts is not."""
    # A short job ends before the first sample of system metrics at their usual interval of ten seconds.
    environment = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.5"}
    options = [*(options or ("--num_gpus", 2)), "--master_port", free_port()]
    log = cwd / "launcher"
    arguments = [*options, ROOT / "launch/pretrain.py", *arguments_of(overrides)]
    code = Rank(f"deepspeed.launcher.{launcher}", arguments, environment, log, cwd).wait(PATIENCE_S)
    return Process(arguments, code, *(log.with_suffix(end).read_text() for end in (".out", ".err")))


def forked(target: str, *arguments: object, cwd: Path, ranks: int = 1) -> Process:
    """A command in `cwd`: what all its ranks say, and the exit code of one that failed, if any has."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(ranks)]
        processes = start(ranks, target, arguments, logs, cwd)
        try:
            codes = [process.wait(PATIENCE_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        out, err = ("".join(log.with_suffix(suffix).read_text() for log in logs) for suffix in (".out", ".err"))
    return Process([target], max(codes, key=abs), out, err)


def pretrain(cwd: Path, *overrides: str, ranks: int = 1) -> Process:
    return forked("launch/pretrain.py", *arguments_of(overrides), cwd=cwd, ranks=ranks)


def arguments_of(overrides: tuple[str, ...]) -> list[str]:
    return ["--config", "tiny.yaml", *(part for override in overrides for part in ("--set", override))]


def result_of(process: Process) -> dict[str, Any]:
    """The JSON line; behind it the deepspeed launcher prints lines of its own."""
    assert process.returncode == 0, process.stderr[-3000:]
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.fixture(scope="module")
def job(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder in which a short job has run, and its result."""
    folder = tmp_path_factory.mktemp("job")
    tree = yaml.safe_load(write_config(digits, folder).read_text())
    tree["run"]["root"] = "runs"
    tree["augment"] = {"crop_scale": [0.8, 1.0], "hflip": 0.0}
    tree["mix"] = {"mixup_alpha": 0.2}
    tree["train"] |= {"length": f"{STEPS} steps", "global_batch_size": 96, "eval_every": "20 steps"}
    tree["tracking"]["system_metrics"] = True
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    result = result_of(launched(folder))
    tracking_server.connect(f"sqlite:///{folder}/runs/mlflow.db")
    return folder, result


Job = tuple[Path, dict[str, Any]]


def test_pretrain_result_reports_model_and_scores(job: Job) -> None:
    folder, result = job
    assert result["model"] == "models:/tiny/1"
    assert result["steps"] == STEPS
    assert result["top1"] > 0.8  # chance is 0.1
    assert result["images_per_second"] > 0
    assert json.loads((folder / "runs/tiny/result.json").read_text()) == result


def metrics_lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]


def test_metrics_are_written_for_every_logged_step(job: Job) -> None:
    steps = [line for line in metrics_lines(job[0]) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    names = {
        "step",
        "time",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "data_wait_s",
        "step_s",
        "skipped",
        "ettr",
        "peak_memory_gb",
        "mfu",
    }
    assert all(line.keys() == names | {"slowest_rank", "slowest_speed"} for line in steps)
    assert [line["step"] for line in metrics_lines(job[0]) if "top1" in line] == [20, STEPS]


def test_run_is_recorded_in_mlflow(job: Job) -> None:
    folder, result = job
    client = MlflowClient()
    found = client.get_run(result["run_id"])
    assert found.info.status == "FINISHED"
    training = ShardSet(yaml.safe_load((folder / "tiny.yaml").read_text())["data"]["train"])
    assert found.data.tags["data.digest"] == training.digest
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert found.data.tags.get("mlflow.source.git.commit", "") == commit
    assert found.data.params["train.global_batch_size"] == "96"
    config = mlflow.artifacts.load_text(f"{found.info.artifact_uri}/config.yaml")
    assert yaml.safe_load(config) == yaml.safe_load((folder / "runs/tiny/config.yaml").read_text())
    for name in ("loss", "lr", "grad_norm"):
        tracked = {point.step: point.value for point in client.get_metric_history(result["run_id"], f"train/{name}")}
        assert tracked == {line["step"]: line[name] for line in metrics_lines(folder) if name in line}
    assert any(name.startswith("system/") for name in found.data.metrics)


def test_model_is_registered_without_pickles(job: Job) -> None:
    folder, result = job
    version = MlflowClient().get_model_version_by_alias("tiny", "candidate")
    assert f"models:/tiny/{version.version}" == result["model"]
    assert version.run_id == result["run_id"]
    assert version.tags["step"] == str(STEPS)
    files = [path.name for path in (folder / "runs/artifacts").rglob("*") if path.is_file()]
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pth", ".pt", ".bin"))]


def test_evaluate_in_fresh_process_reproduces_score(job: Job, digits: Path) -> None:
    folder, result = job
    options = ["--model", "models:/tiny@candidate", "--data", digits / "val"]
    scored = result_of(forked("launch/evaluate.py", *options, cwd=folder))
    assert scored["model"] == result["model"]
    assert scored["top1"] == result["top1"]
    assert scored["val_loss"] == pytest.approx(result["val_loss"], rel=1e-6)


def test_registered_model_predicts_through_mlflow_pyfunc(job: Job, digit_images: Path) -> None:
    model = mlflow.pyfunc.load_model(job[1]["model"])
    paths = sorted((digit_images / "val").rglob("*.jpg"))[::6]
    answers = model.predict(pandas.DataFrame({"image": [path.read_bytes() for path in paths]}))
    right = [label == path.parent.name for label, path in zip(answers["label"], paths, strict=True)]
    assert abs(sum(right) / len(right) - job[1]["top1"]) < 0.1
    assert answers["score"].between(0.1, 1).all()


def test_finished_job_is_not_run_again(job: Job) -> None:
    folder, result = job
    before = (folder / "runs/tiny/metrics.jsonl").read_bytes()
    again = pretrain(folder)
    assert result_of(again) == result
    assert "nothing to do" in again.stderr
    assert (folder / "runs/tiny/metrics.jsonl").read_bytes() == before


def test_longer_job_resumes_same_run(job: Job) -> None:
    folder, result = job
    # On one rank and at another stage: neither is part of a run's identity.
    longer = result_of(pretrain(folder, f"train.length={STEPS + 3} steps", "engine.zero_stage=2"))
    assert longer["run_id"] == result["run_id"]
    assert (longer["steps"], longer["model"]) == (STEPS + 3, "models:/tiny/2")
    assert [line["step"] for line in metrics_lines(folder) if "loss" in line] == list(range(1, STEPS + 4))


def test_second_job_in_same_folder_is_rejected(job: Job) -> None:
    folder, _ = job
    with (folder / "runs/tiny/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pretrain(folder, "train.length=99 steps")
    assert second.returncode == 2
    assert "another job is at work in it" in second.stderr


def test_job_that_lost_its_lease_stops_at_next_save(job: Job, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_bytes((job[0] / "tiny.yaml").read_bytes())
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    overrides = ("train.length=100000 steps", "train.save_every=5 steps", "checkpoint.keep_last=1", "data.val=null")
    (rank,) = start(1, "launch/pretrain.py", arguments_of(overrides), [log], tmp_path)
    try:
        until = time.monotonic() + PATIENCE_S
        while rank.poll() is None and not any(folder.glob("checkpoints/*/COMMIT.json")) and time.monotonic() < until:
            time.sleep(0.05)
        theirs = {**json.loads((folder / LEASE).read_text()), "host": "node7", "uuid": "theirs"}
        files.write(folder / LEASE, json.dumps(theirs).encode())
        record = (folder / "run.json").read_bytes()
        assert rank.wait(PATIENCE_S) == 1
    finally:
        rank.kill()
    (error,) = [line for line in log.with_suffix(".err").read_text().splitlines() if " ERROR " in line]
    assert "on node7 has taken it over" in error
    assert "Traceback" not in log.with_suffix(".err").read_text()
    assert (folder / "run.json").read_bytes() == record
    assert json.loads((folder / LEASE).read_text()) == theirs


class Remote(NamedTuple):
    """What a run on data behind URLs with secrets, and commands on it, have left behind."""

    folder: Path
    shards: dict[str, set[str]]
    """The SHA-256 of the training and the validation shards, which no other test has cached."""
    said: list[str]


@pytest.fixture(scope="module")
def remote(digit_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Remote:
    """Training with its samples and report, the report made again, preview, evaluate, registry, submit, and refusals.

    Each has a folder of its own for shards, so that it fetches what it reads.
    """
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("remote")
    seed = int.from_bytes(os.urandom(4), "little")
    packed = {
        split: pack(digit_images / split, data / split, samples_per_shard=1500, seed=seed) for split in ("train", "val")
    }
    said: list[str] = []

    def said_by(target: str, *arguments: object) -> Process:
        done = forked(target, *arguments, cwd=folder)
        said.extend([done.stdout, done.stderr])
        return done

    with FaultyServer(data) as http:
        tree = yaml.safe_load(write_config(data, folder).read_text())
        train = f"{http.url}/train?X-Amz-Signature=S3CR3T-query".replace("://", "://S3CR3T-user:S3CR3T%2Fpassword@")
        val = f"{http.url}/val?sig=S3CR3T-signature"
        tree["data"] |= {"train": train, "val": val, "cache": str(folder / "by-run")}
        tree["train"] |= {"length": "6 steps"}
        tree["run"]["root"] = "runs"
        tree["tracking"] |= {"log_samples": True, "report": True}
        tree["cluster"] = {"environment": {"activate": "export HF_TOKEN=S3CR3T-token; true --password S3CR3T-option"}}
        tree["cluster"] |= {"gpus_per_node": 0, "ranks_per_node": 1}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
        (folder / "tiny.yaml").chmod(0o600)
        model = result_of(said_by("launch/pretrain.py", "--config", "tiny.yaml"))["model"]
        result_of(said_by("launch/report.py", "runs/tiny", "--cache", "by-report"))
        options = [*arguments_of((f"data.cache={folder}/by-preview",)), "--out", "preview.png"]
        result_of(said_by("launch/shards.py", "preview", *options))
        options = ["--model", model, "--data", val, "--cache", "by-evaluate"]
        assert result_of(said_by("launch/evaluate.py", *options))["data"] == f"{http.url}/val?***"
        result_of(said_by("launch/registry.py", "show", model))
        result_of(said_by("launch/registry.py", "export", model, "--to", "safetensors", "--out", "exported"))
        assert "export HF_TOKEN=***" in said_by("launch/submit.py", "--config", "tiny.yaml", "--dry-run").stdout
        assert said_by("launch/pretrain.py", *arguments_of((f"data.{train}=1",))).returncode == 2
        refused = said_by("launch/pretrain.py", *arguments_of((f"data.train={train.replace('%2F', '/')}",)))
        assert refused.returncode == 2
        assert "in a URL write %2F for a / of a password" in refused.stderr
    shards = {split: {shard.sha256 for shard in manifest.shards} for split, manifest in packed.items()}
    return Remote(folder, shards, said)


def test_remote_shards_are_cached_where_each_command_is_told(remote: Remote) -> None:
    def kept(cache: Path) -> set[str]:
        return {split for split, found in remote.shards.items() if all((cache / sha256).exists() for sha256 in found)}

    assert kept(remote.folder / "by-run") == {"train", "val"}
    assert kept(remote.folder / "by-report") == {"val"}
    assert kept(remote.folder / "by-preview") == {"train"}
    assert kept(remote.folder / "by-evaluate") == {"val"}
    assert kept(Path(tempfile.gettempdir()) / f"pvt-shards-{os.getuid()}") == set()
    assert "Not known" not in (remote.folder / "runs/tiny/report.html").read_text()


def test_planted_secrets_do_not_leak(remote: Remote) -> None:
    """In whatever a run, a version, a report and an export leave behind, but for files of mode 0600."""
    assert not [text for text in remote.said if "S3CR3T" in text]
    paths = [path for path in remote.folder.rglob("*") if path.is_file()]
    holding = {path.relative_to(remote.folder).as_posix(): path for path in paths if b"S3CR3T" in path.read_bytes()}
    assert set(holding) == {"tiny.yaml", "runs/tiny/config.yaml"}
    assert {path.stat().st_mode & 0o777 for path in holding.values()} == {0o600}
    assert len(paths) > 30


def test_resume_with_other_data_or_model_is_rejected(job: Job, digits: Path) -> None:
    folder, _ = job
    other = pretrain(folder, f"data.train={digits / 'val'}", ranks=2)
    assert other.returncode == 2
    assert other.stderr.count("error: ") == 1
    assert "data is '" in other.stderr
    assert "resume.allow: [data]" in other.stderr
    other = pretrain(folder, "model.name=pvt_tiny")
    assert other.returncode == 2
    assert "model is 'pvt_pico' in the checkpoint and 'pvt_tiny' in this run" in other.stderr


def test_changed_artifact_is_rejected(job: Job, digits: Path) -> None:
    folder, _ = job
    # Of the run's versions the worse one is gone once it has been trained for longer.
    uri = f"models:/tiny/{MlflowClient().get_model_version_by_alias('tiny', 'candidate').version}"
    root = mlflow.artifacts.download_artifacts(uri)
    weights = Path(root) / "artifacts" / "model.safetensors"
    assert str(weights).startswith(str(folder))  # the stored file itself, not a copy
    original = weights.read_bytes()
    try:
        weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        refused = forked("launch/evaluate.py", "--model", uri, "--data", digits / "val", cwd=folder)
    finally:
        weights.write_bytes(original)
    assert refused.returncode == 2
    assert f"{uri}: artifacts/model.safetensors has SHA-256" in refused.stderr


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("tiny", "a registered model is models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("models:/tiny/99", "registered models: tiny"),
        ("models:/tinny@candidate", "registered models: tiny"),
        ("models:/tiny", "names no version"),
    ],
)
def test_invalid_or_unknown_model_uri_is_rejected(job: Job, digits: Path, uri: str, message: str) -> None:
    process = forked("launch/evaluate.py", "--model", uri, "--data", digits / "val", cwd=job[0])
    assert process.returncode == 2
    assert message in process.stderr


@pytest.mark.parametrize(
    ("override", "ranks", "message"),
    [
        ("optim.lrr=1", 2, "optim.lrr: no such setting; did you mean optim.lr?"),
        ("data.lanes=1", 2, "2 ranks, but data.lanes is 1"),
        ("data.train=nowhere", 1, "nowhere/manifest.json: cannot read the manifest"),
        ("model.name=pvt_larg", 1, "model.name 'pvt_larg' is no timm model; near: pvt_large"),
        ("image.size=33", 1, "input of 33x33 px: both sides must be divisible by 32"),
        ("engine.deepspeed.bf16.enabled=true", 1, "engine.deepspeed.bf16: the precision is set by engine.precision"),
        ("engine.deepspeed.zero_optimisation.stage=3", 1, "zero_optimisation: not a key that is passed on"),
        ("engine.deepspeed.zero_optimization.overlap_com=true", 1, "zero_optimization.overlap_com: no such setting"),
        ("model.name=vgg11", 1, "model.name 'vgg11' cannot be built here"),
        ("train.length=0 steps", 1, "train.length 0 steps is less than one step"),
        (
            "engine.deepspeed.zero_optimization.offload_optimizer.device=nvme",
            1,
            "zero_optimization.offload_optimizer.device: nvme: checkpoints and the moving average need the state in",
        ),
        ("engine.deepspeed.gradient_clipping=3", 1, "engine.deepspeed.gradient_clipping: 3 contradicts"),
        ("train.global_batch_size=9600", 1, "exceeds the 1437 samples of the data set"),
    ],
)
def test_invalid_settings_are_reported_once_and_leave_no_files(
    digits: Path, tmp_path: Path, override: str, ranks: int, message: str
) -> None:
    write_config(digits, tmp_path)
    process = pretrain(tmp_path, override, f"run.root={tmp_path / 'runs'}", ranks=ranks)
    assert_told_once_and_nothing_left(process, message, tmp_path)


def test_launcher_reports_invalid_setting_once(digits: Path, tmp_path: Path) -> None:
    write_config(digits, tmp_path)
    # Without the part that finds out which nodes and devices there are.
    devices = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()
    options = ["--world_info", devices, "--node_rank", 0, "--master_addr", "127.0.0.1"]
    overrides = ("data.lanes=1", f"run.root={tmp_path / 'runs'}")
    process = launched(tmp_path, *overrides, launcher="launch", options=options)
    assert_told_once_and_nothing_left(process, "2 ranks, but data.lanes is 1", tmp_path)


def test_wrong_rank_count_is_rejected_before_rendezvous(tmp_path: Path) -> None:
    """As in a shell that `srun --pty` has opened with two tasks: the other one never comes."""
    first, second = start(2, "launch/pretrain.py", ["--config", "x", "--ranks", 1], [tmp_path / "0", tmp_path / "1"])
    second.kill()
    try:
        assert first.wait(PATIENCE_S) == 2
    finally:
        first.kill()
    (line,) = (tmp_path / "0.err").read_text().splitlines()
    assert line.startswith("error: --ranks 1: the launcher names 2: start as many as there should be")


def assert_told_once_and_nothing_left(process: Process, message: str, folder: Path) -> None:
    assert process.returncode == 2, process.stderr[-2000:]
    assert process.stderr.count("error: ") == 1
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["pack", "--images", "missing", "--out", "out"], "error: missing: no such file or folder"),
        (["pack", "--images", "x", "--out", "out", "--samples-per-shard", "0"], "0 is not a positive number"),
        (["verify", "missing"], "cannot read the manifest"),
    ],
)
def test_wrong_shards_usage_exits_with_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    process = forked("launch/shards.py", *arguments, cwd=tmp_path)
    assert process.returncode == 2
    assert message in process.stderr


def test_verify_exits_with_1_for_damaged_shards(digit_images: Path, tmp_path: Path) -> None:
    def shards(*arguments: object) -> Process:
        return forked("launch/shards.py", *arguments, cwd=tmp_path)

    assert result_of(shards("pack", "--images", digit_images / "val", "--out", "out"))["samples"] == 360
    assert result_of(shards("verify", "out"))["ok"]
    tar = tmp_path / "out" / "shard-000000.tar"
    os.truncate(tar, tar.stat().st_size - 1)
    with tar.open("ab") as file:
        file.write(b"\1")
    process = shards("verify", "out")
    assert process.returncode == 1
    assert "differs from the manifest" in json.loads(process.stdout)["faults"][0]["reason"]


def test_too_many_damaged_samples_stop_run_and_are_listed(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "train", tmp_path / "damaged")
    for tar in (tmp_path / "damaged").glob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[20_000:80_000] = bytes(60_000)
        tar.write_bytes(data)
    write_config(digits, tmp_path)
    process = pretrain(tmp_path, f"data.train={tmp_path / 'damaged'}")
    assert process.returncode == 1
    assert "samples are damaged, more than data.max_bad_fraction allows (1)" in process.stderr
    assert "Traceback" not in process.stderr
    lines = (tmp_path / "runs" / "tiny" / "quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in lines} == {"its bytes do not match their checksum"}


def test_resolution_schedule_trains_and_invalid_one_is_rejected(digits: Path, tmp_path: Path) -> None:
    write_config(digits, tmp_path)
    schedule = "augment.size_schedule={{2 steps: 64, 50 %: {}}}"
    process = pretrain(tmp_path, schedule.format(40))
    assert process.returncode == 2
    assert "error: augment.size_schedule: pvt_pico does not take 40:" in process.stderr
    assert not (tmp_path / "runs").exists()
    small = ("train.length=6 steps", "train.global_batch_size=24", "data.val=null")
    result = result_of(pretrain(tmp_path, schedule.format(96), *small))
    assert result["steps"] == 6
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    logged = client.get_run(result["run_id"]).data.params["augment.size_schedule"]
    assert logged == "{'2 steps': 64, '50 %': 96}"


@pytest.mark.parametrize(
    ("error", "why"),
    [("MemoryError()", "out of memory"), ('RuntimeError("can\'t start new thread")', "can't start new")],
)
def test_memory_or_thread_limit_is_reported_in_one_line(error: str, why: str) -> None:
    code = f"from pipeline import cli\ndef main():\n    raise {error}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {why}")
    assert "raise the limits" in line


def test_gpu_out_of_memory_is_reported_in_one_line(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("""import torch
from pipeline import cli

def main():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\\nSee the documentation")

cli.run(main)""")
    done = forked(str(script), cwd=tmp_path)
    assert done.returncode == 1
    told = (
        "error: CUDA out of memory. Tried to allocate 20.00 MiB: end other processes on the GPU, "
        "or run on the CPUs with CUDA_VISIBLE_DEVICES="
    )
    assert done.stderr.splitlines() == [told]
