"""The account of wall time over restarts, on a clock set by hand, and the simulation against arithmetic."""

import contextlib
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.goodput import Job, simulate
from pipeline.train.goodput import Category, Goodput
from tests.ranks import ROOT


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Process:
    """Starts `start_up_s` before the clock's now."""

    def __init__(self, path: Path | None, clock: Clock, resumed_step: int = 0, start_up_s: float = 20.0) -> None:
        began = clock.now
        clock.now += start_up_s
        self.clock, self.step = clock, resumed_step
        self.goodput = Goodput(path, resumed_step=resumed_step, process_start=began, clock=clock)

    def train(self, steps: int, seconds: float = 1.0) -> None:
        for _ in range(steps):
            self.spend("data_wait", 0.25)
            self.clock.now += seconds
            self.step += 1
            self.goodput.step(self.step, seconds)

    def spend(self, category: Category, seconds: float) -> None:
        with self.goodput.spend(category):
            self.clock.now += seconds

    def save(self) -> None:
        self.goodput.save(self.step)

    def parts(self) -> dict[str, float]:
        """Seconds by category, those with any; checked to add up to the wall time since 1000."""
        report = self.goodput.report()
        ettr = report.pop("ettr")
        assert sum(report.values()) == pytest.approx(self.clock.now - 1000)
        assert ettr == pytest.approx(report["compute_s"] / (self.clock.now - 1000))
        return {name: value for name, value in report.items() if value}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "goodput.json"


def test_wall_time_is_fully_accounted_across_kill(path: Path) -> None:
    clock = Clock()
    first = Process(path, clock)
    first.train(100)
    first.spend("checkpoint_stall", 2.0)
    first.save()
    first.train(10)
    first.save()
    first.train(5)  # and is killed: nobody hears of these
    clock.now += 30
    second = Process(path, clock, resumed_step=100)
    second.train(15)  # 10 of them again, and those that nobody heard of
    second.spend("evaluation", 7.0)
    clock.now += 3
    assert second.parts() == pytest.approx(
        {
            "compute_s": 115.0,
            "start_up_s": 40.0,
            "data_wait_s": 125 * 0.25,
            "checkpoint_stall_s": 2.0,
            "evaluation_s": 7.0,
            "replayed_s": 10.0,
            "down_s": 5 * 1.25 + 30,
            "other_s": 3.0,
        }
    )
    assert second.goodput.restarts == 1
    assert second.goodput.summary() == (
        "effective training time 47.0%: start up 16.4%, down 14.8%, data wait 12.8%, replayed 4.1%, evaluation 2.9%, "
        "other 1.2%, checkpoint stall 0.8%, over 1 restart"
    )


def test_first_process_without_losses_has_full_ettr(path: Path) -> None:
    process = Process(path, Clock(), start_up_s=0.0)
    assert process.goodput.report()["ettr"] == 0.0
    process.clock.now += 1
    process.goodput.step(1, 1.0)
    assert process.goodput.summary() == "effective training time 100.0%: nothing lost, over 0 restarts"


def test_nested_times_are_subtracted_from_outer_time() -> None:
    clock = Clock()
    process = Process(None, clock)
    with contextlib.suppress(OSError), process.goodput.spend("rollback"):
        clock.now += 1
        process.spend("checkpoint_stall", 2.0)
        with process.goodput.spend("data_wait"):
            clock.now += 4
            process.spend("start_up", 8.0)
        process.train(1)
        raise OSError("what is inside may fail")
    parts = {"start_up_s": 28.0, "rollback_s": 1.0, "checkpoint_stall_s": 2.0, "data_wait_s": 4.25, "compute_s": 1.0}
    assert process.parts() == pytest.approx(parts)
    process.spend("checks", 5.0)
    assert process.parts() == pytest.approx({**parts, "checks_s": 5.0})


@pytest.mark.parametrize("repeats", [False, True], ids=["passes over", "goes back"])
def test_rolled_back_steps_do_not_count_as_compute(path: Path, repeats: bool) -> None:
    clock = Clock()
    process = Process(path, clock)
    process.train(55)
    process.goodput.take_back(45)
    process.step = 45 if repeats else 55
    process.train(5, seconds=4.0)
    process.goodput.take_back(process.step)  # none
    process.step += 1
    process.goodput.step(process.step, 0.0)
    process.goodput.take_back(process.step - 1)  # one, at the mean of 65 seconds over 51 steps
    parts = process.parts()
    assert (parts["compute_s"], parts["rollback_s"]) == pytest.approx((65 * 50 / 51, 10 + 65 / 51))


@pytest.mark.parametrize("repeats", [False, True], ids=["passes over", "goes back"])
def test_rollback_repeated_after_restart_is_subtracted_once(path: Path, repeats: bool) -> None:
    clock = Clock()
    process = Process(path, clock)
    process.train(55)
    process.goodput.take_back(40)
    process.step = 40 if repeats else 55
    process.train(20)
    process.save()
    after = Process(path, clock, resumed_step=40)
    after.train(15)
    after.goodput.take_back(40)
    parts = after.parts()
    assert (parts["compute_s"], parts["rollback_s"], parts["replayed_s"]) == pytest.approx((60.0, 15.0, 15.0))


def test_clock_set_back_is_tolerated(path: Path) -> None:
    clock = Clock()
    first = Process(path, clock)
    first.train(10)
    first.save()
    clock.now -= 100
    second = Process(path, clock, resumed_step=10)
    second.train(10)
    report = second.goodput.report()
    assert report["compute_s"] == pytest.approx(20)
    assert report["down_s"] == report["other_s"] == 0.0
    assert 0 < report["ettr"] < 1


@pytest.mark.parametrize(
    "content",
    [b"", b'{"format": 1, "beg', b"\xff\xfe", b'{"format": 2, "began": 1, "last": 1, "reached": 50}', b"[]", b"null"],
    ids=range(6),
)
def test_unreadable_goodput_file_is_reported_and_replaced(
    path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(content)
    process = Process(path, Clock(), resumed_step=50)
    warning = capsys.readouterr().err
    assert warning.startswith(f"{path}: ")
    assert warning.endswith("; the account of time starts here\n")
    process.train(10)
    process.save()
    assert process.parts() == pytest.approx({"start_up_s": 20.0, "compute_s": 10.0, "data_wait_s": 2.5})
    assert json.loads(path.read_text())["reached"] == 60
    assert list(path.parent.iterdir()) == [path]


def test_missing_goodput_file_is_reported_unless_run_is_new(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Process(path, Clock())
    assert capsys.readouterr().err == ""
    Process(path, Clock(), resumed_step=5)
    assert "no such file" in capsys.readouterr().err


def test_goodput_write_failure_is_reported_once_without_error(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    process = Process(path, clock)
    process.train(3)
    process.save()
    path.unlink()
    path.mkdir()  # no file can be renamed to it
    for _ in range(3):
        process.save()
    assert capsys.readouterr().err == f"{path} cannot be written: Is a directory\n"
    path.rmdir()
    process.save()
    assert Process(path, clock, resumed_step=3).parts()["compute_s"] == pytest.approx(3.0)


JOB = Job(
    length_s=14 * 86400,
    step_s=0.7,
    save_every_s=60.0,
    stall_s=0.5,
    commit_s=30.0,
    restart_s=60.0,
    detect_s=10.0,
    mtbf_s=7.9 * 3600,
)


def mean_ettr(job: Job, runs: int) -> float:
    rng = np.random.default_rng(0)
    return statistics.fmean(simulate(job, rng).ettr for _ in range(runs))


def test_simulated_ettr_with_rare_failures_matches_first_order() -> None:
    assert mean_ettr(JOB, 100) == pytest.approx(JOB.expectation(), abs=3e-4)


@pytest.mark.parametrize(("save_every_s", "mtbf_s"), [(60.0, 1800.0), (1800.0, 1800.0), (300.0, 400.0)])
def test_simulated_ettr_with_frequent_failures_matches_renewal_theory(save_every_s: float, mtbf_s: float) -> None:
    # The k-th save of a process counts if it lives until then, which has probability exp(-time / MTBF): the sum over
    # all k is a geometric series. From failure to failure pass MTBF + detection.
    job = Job(**{**vars(JOB), "length_s": 400 * 86400, "save_every_s": save_every_s, "mtbf_s": mtbf_s})
    committed_s = job.interval_s * math.exp(-(job.restart_s + job.commit_s) / mtbf_s) / math.expm1(job.cycle_s / mtbf_s)
    assert mean_ettr(job, 3) == pytest.approx(committed_s / (mtbf_s + job.detect_s), rel=0.02)


def test_simulation_without_failures_loses_only_start_up_and_stalls() -> None:
    job = Job(**{**vars(JOB), "length_s": 60.0 + 10 * JOB.cycle_s + 30.0, "mtbf_s": 1e15})
    assert job.interval_s == pytest.approx(86 * 0.7)  # a whole number of steps
    assert mean_ettr(job, 1) == pytest.approx((10 * job.interval_s + 30.0) / job.length_s)
    job = Job(**{**vars(job), "length_s": 60.0 + 10 * JOB.cycle_s + JOB.interval_s + 0.3})  # ends in a stall
    assert mean_ettr(job, 1) == pytest.approx(11 * job.interval_s / job.length_s)


def test_best_save_interval_maximises_expected_ettr() -> None:
    job = Job(**{**vars(JOB), "step_s": 1e-3})
    best = job.best_interval_s()
    around = {factor: Job(**{**vars(job), "save_every_s": factor * best}).expectation() for factor in (0.8, 1.0, 1.25)}
    assert max(around, key=lambda factor: around[factor]) == 1.0


def test_goodput_benchmark_prints_json_last() -> None:
    command = [sys.executable, "-m", "benchmarks.goodput", "--runs", "5", "--restart-s", "600"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    ettr = result["ettr"]
    assert list(ettr) == ["8", "64", "256", "1024", "4096", "16384"]
    assert list(ettr.values()) == sorted(ettr.values(), reverse=True)
    assert result["restart_s"] == 600
    assert result["goal_met_at_1024"] is False
