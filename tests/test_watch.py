"""The hang watch on real processes that are stopped, sleep, or hang in native code; stragglers."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.train.hang_watch import HangWatch, Heartbeat, Stragglers, silent_ranks, who_is_behind
from pipeline.world import World
from tests.ranks import PATIENCE_S, start

TIMEOUT_S = 2.0


class Job:
    """Ranks of tests/workers/hang.py, whose output goes to FOLDER/R.out and .err."""

    def __init__(self, folder: Path, how: str, ranks: int = 2, timeout_s: float = TIMEOUT_S) -> None:
        folder.mkdir()
        logs = [folder / str(rank) for rank in range(ranks)]
        self.folder = folder
        self.ranks = start(ranks, "tests.workers.hang", [folder, timeout_s, how], logs)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while f"{step}\n" not in (self.folder / "0.out").read_text():
            assert time.monotonic() < deadline, self.errors(0)
            time.sleep(0.02)

    def errors(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()  # also one that is stopped
            rank.wait()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Jobs that hang, or soon will. Each takes seconds to notice, so all of them begin at once."""
    folder = tmp_path_factory.mktemp("jobs")
    found = {
        "rank 0 stopped": Job(folder / "stopped-0", "runs"),
        "rank 1 stopped": Job(folder / "stopped-1", "runs"),
        "sleeps": Job(folder / "sleeps", "sleeps"),
        "holds": Job(folder / "holds", "holds"),
        "alone": Job(folder / "alone", "holds", ranks=1, timeout_s=0.5),
    }
    try:
        for rank in range(2):
            job = found[f"rank {rank} stopped"]
            job.wait_for_step(3)
            job.ranks[rank].send_signal(signal.SIGSTOP)
        yield found
    finally:
        for job in found.values():
            job.end()


def stacks(folder: Path, rank: int) -> str:
    return (folder / "stacks" / f"rank-{rank}.txt").read_text()


def test_rank_that_is_behind_is_reported_with_its_phase(jobs: dict[str, Job]) -> None:
    job = jobs["sleeps"]
    # The rank that hangs times out half a second before the other, which a launcher ends as soon as it has gone.
    assert job.ranks[1].wait(PATIENCE_S) == 1
    job.ranks[0].kill()
    for rank in range(2):
        line = job.errors(rank).splitlines()[-1]
        assert f"pid {job.ranks[1].pid}) is behind: in data at step 3 for " in line
        assert "rank 0 (" not in line
    assert "in wait_for_data\n" in stacks(job.folder, 1)
    assert "in exchange\n" in stacks(job.folder, 0)


@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_rank_is_reported_by_the_other_rank(jobs: dict[str, Job], stopped: int) -> None:
    other, job = 1 - stopped, jobs[f"rank {stopped} stopped"]
    assert job.ranks[other].wait(PATIENCE_S) == 1
    line = job.errors(other).splitlines()[-1]
    assert f"rank {other} made no progress for 2 s, it waits in exchange" in line
    assert f"rank {stopped} (" in line
    assert f", pid {job.ranks[stopped].pid}) is behind: it no longer runs" in line
    assert "all ranks" not in line
    assert "in exchange\n" in stacks(job.folder, other)
    assert line in stacks(job.folder, other)
    last_step, gave_up = ((job.folder / f"{other}.{end}").stat().st_mtime for end in ("out", "err"))
    assert gave_up - last_step > TIMEOUT_S - 0.1


def test_rank_hung_in_native_code_holding_the_gil_is_ended(jobs: dict[str, Job]) -> None:
    job = jobs["holds"]
    assert [rank.wait(PATIENCE_S) for rank in job.ranks] == [1, 1]
    line = job.errors(0).splitlines()[-1]
    assert f"pid {job.ranks[1].pid}) is behind: it no longer runs or is stuck in native code" in line
    assert "Timeout" in stacks(job.folder, 1)
    assert "in main\n" in stacks(job.folder, 1)


def test_single_rank_holding_the_gil_dumps_stacks_to_stderr(jobs: dict[str, Job]) -> None:
    assert jobs["alone"].ranks[0].wait(PATIENCE_S) == 1
    assert "Timeout" in jobs["alone"].errors(0)


def test_hang_watch_leaves_no_files_after_exit(tmp_path: Path) -> None:
    heartbeat, deadline = tmp_path / "watch" / "rank-0.json", time.monotonic() + PATIENCE_S
    with HangWatch(tmp_path / "watch", World(), 60, "a"):
        while not heartbeat.exists():
            assert time.monotonic() < deadline
        assert json.loads(heartbeat.read_text())["waits_in"] == "start-up"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_stacks_of_earlier_attempts_are_kept(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank-0.txt").write_text("of yesterday\n")
    with HangWatch(tmp_path / "watch", World(), 60, "today"):
        pass
    assert stacks(tmp_path, 0) == "of yesterday\n"


def test_only_valid_heartbeats_of_this_attempt_and_world_are_read(tmp_path: Path) -> None:
    texts = [json.dumps(vars(beat(rank, attempt=attempt))) for rank, attempt in enumerate(("b", "a", "b", "b"))]
    texts[2] = texts[2][:20]
    for rank, text in enumerate(texts):
        (tmp_path / f"rank-{rank}.json").write_text(text)
    assert HangWatch(tmp_path, World(rank=0, size=3), 60, "b")._read_heartbeats(range(3)) == {0: beat(0, attempt="b")}


def beat(rank: int, progress: int = 9, alive: float = 100.0, phase: str = "data", attempt: str = "a") -> Heartbeat:
    return Heartbeat(attempt, rank, f"node{rank}", 10 + rank, alive, progress, 3, phase, alive - 50, hung=rank == 0)


def blame(earlier: list[Heartbeat], now: list[Heartbeat], size: int) -> str:
    beats = {beat.rank: beat for beat in now}
    return who_is_behind(now[0], beats, silent_ranks({beat.rank: beat for beat in earlier}, beats), size)


def test_rank_behind_is_determined_from_heartbeats() -> None:
    earlier = [beat(rank, alive=60.0) for rank in range(3)]
    # Clocks of nodes differ: what counts is whether a heartbeat moved.
    assert blame(earlier, [beat(0), beat(1, alive=61.0), beat(2, alive=500.0)], 3) == "all ranks wait in data at step 3"
    assert blame(earlier, [beat(0), beat(1), beat(2, progress=8, phase="forward")], 3) == (
        "rank 2 (node2, pid 12) is behind: in forward at step 3 for 50 s"
    )
    # A rank that stands still has been overtaken since, so its count may be any.
    stopped = blame(earlier, [beat(0), beat(1, progress=8), earlier[2]], 3)
    assert stopped == (
        "rank 2 (node2, pid 12) is behind: it no longer runs or is stuck in native code (no heartbeat for 40 s), last "
        "seen in data at step 3"
    )
    assert blame([], [beat(0), beat(1)], 3) == "rank 2 is behind: it has not started, or has ended"
    assert blame([], [beat(0)], 20).endswith("rank 8 is behind: it has not started, or has ended; and 11 more ranks")


def test_repeated_phase_does_not_count_as_progress(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path, World(), 60, "a")
    for step, phase in ((1, "data"), (1, "evaluation"), (1, "evaluation"), (2, "evaluation"), (2, "data")):
        watch.at(step, phase)
    assert watch._heartbeat().progress == 4


def test_straggler_is_reported_after_three_slow_readings_in_a_row() -> None:
    stragglers = Stragglers(patience=3, slow=0.7)
    slow, fine = [1.0, 1.0, 2.0, 1.1], [1.0, 1.0, 1.4, 1.1]
    found = [stragglers.compare(own_s) for own_s in (slow, slow, fine, slow, slow, slow, slow, fine)]
    assert found == [[]] * 5 + [[(2, 0.5)]] * 2 + [[]]


@pytest.mark.parametrize(
    ("own_s", "named"),
    [([1.0], []), ([1.0, 1.4], []), ([1.5, 1.0], [0]), ([1.0, 1.0, 2.0, 2.0], [2, 3]), ([0.0, 0.0], [])],
)
def test_stragglers_are_ranks_well_below_median_speed(own_s: list[float], named: list[int]) -> None:
    assert [rank for rank, _ in Stragglers(patience=1).compare(own_s)] == named
