"""Whole runs whose checkpoints lie on a disk that fills up, turns read-only, or loses and changes what was written."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.runs import COMMIT, Attempt, Job, checkpoint_differences, metrics_differences, write_config
from tests.ranks import PATIENCE_S

DISK_BYTES = 64 << 20  # several checkpoints of about 10 MB
STEPS = 64
SAVE_EVERY = 8
LIMIT_S = PATIENCE_S


@pytest.fixture
def job(digits: Path, tmp_path: Path) -> Iterator[Job]:
    """One whose checkpoints have a disk of their own."""
    config = write_config(digits, tmp_path, ranks=1, stage=1, steps=STEPS, save_every=SAVE_EVERY)
    job = Job(config, "disk", ranks=1, overrides=("checkpoint.keep_last=1", "checkpoint.keep_best=0"))
    job.checkpoints.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(job.checkpoints)]
    if subprocess.run(mount, capture_output=True).returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mounting a small disk is not permitted")
    yield job
    subprocess.run(["umount", job.checkpoints], check=True)


def break_disk(job: Job, how: str) -> None:
    if how == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", job.checkpoints], check=True)
        return
    with contextlib.suppress(OSError), (job.checkpoints / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1 << 16))


def mend_disk(job: Job, how: str) -> None:
    if how == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", job.checkpoints], check=True)
    else:
        (job.checkpoints / "filler").unlink()


MESSAGES = {"full": "No space left on device", "read-only": "Read-only file system"}


def saved_step(attempt: Attempt) -> int:
    """That of the newest checkpoint that the run has told of: old ones have been removed by then."""
    return max(map(int, re.findall(r"checkpoint \S*/step-(\d+)", attempt.errors())), default=0)


def num_warnings(attempt: Attempt, how: str) -> int:
    lines = attempt.errors().splitlines()
    return sum("could not be saved" in line and MESSAGES[how] in line and "training goes on" in line for line in lines)


@pytest.mark.parametrize("how", MESSAGES)
@pytest.mark.slow
def test_run_survives_transient_disk_failure_and_stops_on_lasting_one(job: Job, how: str) -> None:
    with job.start() as attempt:
        assert attempt.wait_until(lambda: saved_step(attempt) == SAVE_EVERY, LIMIT_S), attempt.errors()
        break_disk(job, how)
        assert attempt.wait_until(lambda: num_warnings(attempt, how) == 1, LIMIT_S), attempt.errors()
        failed_at = attempt.step
        assert attempt.wait_until(lambda: attempt.step > failed_at, LIMIT_S), attempt.errors()
        # Older checkpoints stay; of the half-written one nothing does.
        assert job.newest_step() == SAVE_EVERY
        assert all((folder / COMMIT).exists() for folder in job.checkpoints.iterdir() if folder.is_dir())
        mend_disk(job, how)
        assert attempt.wait_until(lambda: saved_step(attempt) > SAVE_EVERY, LIMIT_S), attempt.errors()
        newest = saved_step(attempt)
        break_disk(job, how)
        assert attempt.wait(LIMIT_S)
    assert attempt.codes == [1], attempt.errors()
    assert num_warnings(attempt, how) == 1 + 3  # a good one ended the row of the first
    assert MESSAGES[how] in attempt.errors().splitlines()[-1]
    assert "Traceback" not in attempt.errors()
    assert attempt.step < STEPS
    assert job.newest_step() == newest
    mend_disk(job, how)
    again = job.finish(LIMIT_S)
    assert again.resumed_at == newest
    assert again.result()["steps"] == job.newest_step() == STEPS


@pytest.mark.slow
def test_resume_skips_damaged_checkpoints_and_saves_them_again(digits: Path, tmp_path: Path) -> None:
    config = write_config(digits, tmp_path, ranks=2, stage=2, steps=12, save_every=3)
    job = Job(config, "damaged", ranks=2, overrides=("checkpoint.keep_last=9",))
    job.finish(LIMIT_S)
    whole = Path(shutil.copytree(job.folder, tmp_path / "whole"))
    at = {step: job.checkpoints / f"step-{step:08d}" for step in (3, 6, 9, 12)}

    weights = bytearray((at[12] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (at[12] / "model.safetensors").write_bytes(weights)
    moments = at[9] / "optimizer-0.safetensors"
    os.truncate(moments, moments.stat().st_size // 2)
    (at[6] / "optimizer-1.safetensors").unlink()

    again = job.finish(LIMIT_S)
    assert again.resumed_at == 3
    for step, fault in (
        (12, "model.safetensors has SHA-256"),
        (9, "optimizer-0.safetensors has SHA-256"),
        (6, "optimizer-1.safetensors cannot be read"),
    ):
        assert f"{at[step]} is skipped: {fault}" in again.errors()
        assert checkpoint_differences(at[step], whole / "checkpoints" / at[step].name) == []
        listed = [
            json.loads((folder / at[step].name / COMMIT).read_text())
            for folder in (at[step].parent, whole / "checkpoints")
        ]
        assert listed[0] == listed[1]
    assert metrics_differences(job.folder / "metrics.jsonl", whole / "metrics.jsonl", steps=12) == []
