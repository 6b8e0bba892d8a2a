"""When a batch job goes back into the queue and when it gives up, without a cluster; tests/slurm has the rest."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.job_step import copy_environment
from pipeline.cluster.journal import Journal
from pipeline.cluster.slurm import Allocation
from pipeline.cluster.status import read_status
from pipeline.cluster.supervise import STOP, Ending, Program, Supervisor, _NotReadyError
from pipeline.config import load_config
from pipeline.errors import DONE, FAILED, REQUEUE, STOPPING
from tests.conftest import write_config

MAX_RESTARTS = 2
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

Ranks = Callable[[Path], Ending]
"""What they do in a run's folder, and how they end."""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A supervisor keeps its handlers for the rest of its process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Job(Allocation):
    """Of one node. SLURM ends a job that is queued again with SIGTERM."""

    preempted = False

    def nodes(self) -> list[str]:
        return ["n1"]

    def is_ending(self) -> bool:
        return False

    def is_preempted(self) -> bool:
        return self.preempted

    def requeue(self, exclude: set[str]) -> None:
        signal.raise_signal(signal.SIGTERM)


class Preempted(Job):
    preempted = True


@pytest.fixture
def program(tmp_path: Path) -> Program:
    path = write_config(tmp_path, tmp_path)
    config = load_config(path, [f"cluster.max_restarts={MAX_RESTARTS}", "cluster.time=30"])
    return Program(config, tmp_path, "launch/pretrain.py", str(path), [])


class Stretch(Supervisor):
    """A start of the batch script, in which the ranks are started once for each of `ranks`."""

    def __init__(self, program: Program, allocation: Allocation, *ranks: Ranks) -> None:
        super().__init__(program, allocation)
        self._ranks = iter(ranks)

    def _choose_nodes(self) -> list[str]:
        return ["n1"]

    def _run_ranks(self, nodes: list[str]) -> Ending:
        return next(self._ranks)(self._program.folder)


class OutOfTimeBeforeTraining(Stretch):
    def _choose_nodes(self) -> list[str]:
        signal.raise_signal(signal.SIGUSR1)
        raise _NotReadyError("a signal came", set())


def stretches(program: Program, ranks: Sequence[Ranks], job: type[Job] = Job) -> list[int]:
    """Exit codes of one batch script that is started again for each of `ranks`."""
    return [Stretch(program, job("17", restarts), run).run() for restarts, run in enumerate(ranks)]


def events(program: Program, name: str) -> list[dict[str, Any]]:
    return [event for event in Journal(program.folder, "17").of_this_job() if event["event"] == name]


def saves(folder: Path, step: int) -> None:
    checkpoint = folder / f"checkpoints/step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMIT.json").write_text("{}")


def out_of_time(folder: Path) -> Ending:
    signal.raise_signal(signal.SIGUSR1)
    return Ending(REQUEUE, {"requeue": True}, "")


def is_preempted(folder: Path) -> Ending:
    signal.raise_signal(signal.SIGTERM)
    return Ending(REQUEUE, {"requeue": True}, "")


def crashes(folder: Path) -> Ending:
    return Ending(FAILED, None, "Boom")


def finish(folder: Path) -> Ending:
    return Ending(DONE, None, "")


def saving(step: int, ranks: Ranks) -> Ranks:
    def run(folder: Path) -> Ending:
        saves(folder, step)
        return ranks(folder)

    return run


def test_requeue_without_a_newer_checkpoint_gives_up(program: Program) -> None:
    assert stretches(program, [out_of_time] * 3) == [REQUEUE, REQUEUE, FAILED]
    assert [event["restarts"] for event in events(program, "no progress")] == [1, 2, 3]
    (end,) = events(program, "gave up")
    assert "3 failures without a checkpoint after step 0" in end["why"]
    assert "the time limit (cluster.time 30) came before a checkpoint after step 0: raise it, or save" in end["why"]


def test_status_reports_a_requeue_without_a_newer_checkpoint(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM to ask
    stretches(program, [saving(20, out_of_time), out_of_time])
    known = read_status(program.folder)
    assert known.restarts_without_progress == 1
    assert known.last_error is not None
    assert "before a checkpoint after step 20" in known.last_error.message


def test_newer_checkpoint_resets_the_restart_count(program: Program) -> None:
    whole = [out_of_time, out_of_time, saving(20, out_of_time), out_of_time, out_of_time, saving(40, out_of_time)]
    assert stretches(program, whole) == [REQUEUE] * 6
    assert [event["restarts"] for event in events(program, "no progress")] == [1, 2, 1, 2]


def test_preemptions_neither_count_nor_reset_the_restart_count(program: Program) -> None:
    assert stretches(program, [is_preempted] * 5) == [REQUEUE] * 5
    mixed = [out_of_time, is_preempted, out_of_time, is_preempted, out_of_time]
    assert stretches(program, mixed) == [REQUEUE] * 4 + [FAILED]


def test_time_limit_signal_of_a_preempted_job_does_not_count(program: Program) -> None:
    assert stretches(program, [out_of_time] * 5, Preempted) == [REQUEUE] * 5


def test_time_limit_before_training_starts_counts(program: Program) -> None:
    codes = [OutOfTimeBeforeTraining(program, Job("17", restarts)).run() for restarts in range(3)]
    assert codes == [REQUEUE, REQUEUE, FAILED]


def test_crashes_and_time_limits_share_one_restart_count(program: Program) -> None:
    assert Stretch(program, Job("17", 0), crashes, out_of_time).run() == REQUEUE
    assert stretches(program, [crashes]) == [FAILED]
    assert "the last one: Boom" in events(program, "gave up")[0]["why"]


def test_manually_stopped_run_does_not_count_as_failed(program: Program) -> None:
    (program.folder / STOP).parent.mkdir(parents=True)
    (program.folder / STOP).touch()
    assert stretches(program, [out_of_time] * 4) == [REQUEUE] * 4
    assert events(program, "no progress") == []


@pytest.mark.parametrize(
    ("last", "counts"), [(None, 1), ("start", 1), ("excluded", 1), ("stopping", 0), ("requeue", 0)]
)
def test_vanished_job_counts_as_crash_unless_told_to_stop(program: Program, last: str | None, counts: int) -> None:
    """Killed outright in the pre-flight or in training; or by a preemption that did not wait for it."""
    if last:
        Journal(program.folder, "17").write(last)
    assert Stretch(program, Job("17", 1), finish).run() == DONE
    assert len(events(program, "crash")) == counts


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Puts programs into the place of those on the PATH, and an scontrol that knows the address of any node."""
    for name, text in {"scontrol": "#!/usr/bin/env bash\necho NodeAddr=127.0.0.1", **scripts}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_failed_environment_copy_is_removed(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk = '#!/usr/bin/env bash\nfor to; do :; done; touch "$to/half"; exit 1'
    here = '#!/usr/bin/env bash\nwhile [ "$1" != bash ]; do shift; done; exec "$@"'
    put_on_path(tmp_path, monkeypatch, cp=full_disk, srun=here)
    scratch = tmp_path / "scratch"
    overrides = [f"cluster.scratch={scratch}", "cluster.environment.copy_to_scratch=true"]
    config = load_config(program.config_file, overrides)
    copy_environment(config.cluster, ["n1"])
    assert list(scratch.iterdir()) == []


def test_signal_is_repeated_until_the_ranks_acknowledge(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun does not keep a signal for ranks that it has yet to start."""
    started = tmp_path / "started"
    srun = f"""#!/usr/bin/env bash
        trap 'came=$((came + 1)); if [ $came = 3 ]; then echo "0: SIGUSR1: {STOPPING}"; fi' USR1
        touch {started}
        until [ "$came" = 3 ]; do sleep 0.1; done
        sleep 3
        echo "came $came"
        exit {REQUEUE}"""
    put_on_path(tmp_path, monkeypatch, srun=srun)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")  # so that no other node watches this one

    def signal_this_process() -> None:
        while not started.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    supervisor = Stretch(program, Job("17", 0))
    signal.signal(signal.SIGUSR1, supervisor._on_signal)
    sender = threading.Thread(target=signal_this_process)
    sender.start()
    ending = Supervisor._run_ranks(supervisor, ["n1"])
    sender.join()
    assert (ending.code, ending.error) == (REQUEUE, "came 3")
    assert len(events(program, "stopping")) == 1
