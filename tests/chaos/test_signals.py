"""Signals to single ranks of a whole run: stopping early with a checkpoint, and a rank that stands still."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.runs import Job, checkpoint_differences, metrics_differences, trace_differences, write_config
from tests.chaos.signals import sweep
from tests.ranks import PATIENCE_S

STEPS = 40
LIMIT_S = PATIENCE_S


@pytest.mark.slow
def test_signal_to_any_rank_saves_checkpoint_and_resume_is_exact(digits: Path, tmp_path: Path) -> None:
    config = write_config(digits, tmp_path, ranks=2, stage=2, steps=STEPS)
    straight, stopped = Job(config, "straight", ranks=2), Job(config, "stopped", ranks=2)
    straight.finish()
    for rank, number, step in ((1, signal.SIGUSR1, 12), (0, signal.SIGTERM, 27)):
        with stopped.start() as attempt:
            assert attempt.wait_until(lambda: attempt.step >= step, LIMIT_S)  # noqa: B023 - called at once
            attempt.kill([rank], number)
            at = attempt.step
            assert attempt.wait(LIMIT_S)
            assert attempt.codes == [85, 85], attempt.errors(rank)
            saved = stopped.newest_step()
            # The file that tells the step here is a moment behind.
            print(f"{number.name} to rank {rank} at step {at}: checkpoint of step {saved}")
            assert at <= saved <= at + 3
            result = json.loads((stopped.folder / "result.json").read_text())
            assert result["requeue"] is True
            assert result["steps"] == saved
            assert attempt.result() == result
    stopped.finish()
    folder = f"step-{STEPS:08d}"
    assert checkpoint_differences(stopped.checkpoints / folder, straight.checkpoints / folder) == []
    assert trace_differences(stopped.folder / "trace", straight.folder / "trace") == []
    assert metrics_differences(stopped.folder / "metrics.jsonl", straight.folder / "metrics.jsonl", STEPS) == []
    assert "requeue" not in json.loads((stopped.folder / "result.json").read_text())


def test_hung_rank_is_reported(digits: Path, tmp_path: Path) -> None:
    """The first rank. tests/test_watch.py has the others, and the other ways to hang."""
    config = write_config(digits, tmp_path, ranks=2, stage=1, steps=1000)
    job = Job(config, "hung", ranks=2, overrides=("train.hang_timeout_s=15", "data.val=null"))
    with job.start() as attempt:
        assert attempt.wait_until(lambda: attempt.step >= 5, LIMIT_S)
        attempt.kill([0], signal.SIGSTOP)
        began = time.monotonic()
        assert attempt.processes[1].wait(LIMIT_S) == 1
        print(f"rank 0 was named after {time.monotonic() - began:.1f} s")
        line = next(line for line in attempt.errors(1).splitlines() if line.startswith("hang: "))
        print(line)
        assert "rank 0 (" in line.partition(";")[2]
        assert "is behind: it no longer runs" in line
        assert "exchange" in (job.folder / "stacks" / "rank-1.txt").read_text()


@pytest.mark.slow
def test_signals_during_evaluation_and_at_end_do_not_change_results(digits: Path, tmp_path: Path) -> None:
    """A small sample of `python -m tests.chaos.signals`."""
    blows = [
        ("evaluation at a step with a save", "SIGUSR1"),
        ("last evaluation", "SIGTERM"),
        ("registration", "SIGINT,SIGTERM"),
    ]
    (row,) = sweep(tmp_path, digits, ranks=1, blows=[blows])
    assert row["codes"] == [85, 85, 0]
    assert row["differences"] == []
