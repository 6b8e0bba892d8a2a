"""Who is at work in a folder, also where locks of the file system keep nobody off, are missing, or were left behind."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import files, lease
from pipeline.cluster import slurm
from pipeline.errors import InputError
from tests.ranks import ROOT

HOLD = """
import sys, time
from pathlib import Path
from pipeline import lease
try:
    with lease.hold(Path(sys.argv[1])):
        print("at work", flush=True)
        sys.stdin.read()
except BlockingIOError as error:
    print(error, flush=True)
"""


@pytest.fixture(scope="module")
def no_flock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose flock does nothing, to be preloaded."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("flock") / "flock.so"
    source = b"int flock(int descriptor, int operation) { return 0; }"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=source, check=True)
    assert ctypes.CDLL(str(library)).flock(-1, 0) == 0
    return library


@contextlib.contextmanager
def holder(folder: Path, **environment: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds a folder, or tries to, and what it says."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def leave(folder: Path, **other: object) -> None:
    """A lease of somebody else's."""
    known = {"host": "node7", "machine": "node7 boot pid", "pid": 7, "started": 1, "job": None, "uuid": "theirs"}
    files.write(folder / lease.LEASE, json.dumps({**known, **other}).encode())


def test_second_holder_is_rejected_if_flock_does_nothing(tmp_path: Path, no_flock: Path) -> None:
    with holder(tmp_path, LD_PRELOAD=no_flock) as (first, said):
        assert said == "at work"
        with holder(tmp_path, LD_PRELOAD=no_flock) as (_, why):
            assert why == f"{tmp_path}: process {first.pid} on {os.uname().nodename} is at work in it"
        first.communicate("")
    assert not (tmp_path / lease.LEASE).exists()
    with holder(tmp_path, LD_PRELOAD=no_flock) as (_, said):
        assert said == "at work"


def test_one_of_concurrent_holders_gets_lease(tmp_path: Path, no_flock: Path) -> None:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        several = [holder(tmp_path, LD_PRELOAD=no_flock) for _ in range(4)]
        said = list(pool.map(lambda each: stack.enter_context(each)[1], several))
    assert said.count("at work") == 1


def test_lease_of_killed_process_is_taken_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path) as (killed, _):
        killed.send_signal(signal.SIGKILL)
        # Not even while its parent has not asked for its end.
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
        with lease.hold(tmp_path):
            pass
    told = f"{tmp_path}: taken over from process {killed.pid} on {os.uname().nodename}, which has ended\n"
    assert capfd.readouterr().err == told


def test_lease_is_stale_if_process_id_was_reused(tmp_path: Path) -> None:
    with lease.hold(tmp_path):
        known = json.loads((tmp_path / lease.LEASE).read_text())
    leave(tmp_path, **{**known, "started": known["started"] - 1})
    assert lease.find_stale(tmp_path) == f"process {os.getpid()} on {known['host']}, which has ended"


def test_requeued_job_takes_over_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    leave(tmp_path, job="big/12")
    assert lease.find_stale(tmp_path) == "process 7 on node7 of job big/12: the same job, started again"


def test_lease_of_job_that_left_queue_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    queue = {"12": {}, "13": {"13": "RUNNING"}}
    monkeypatch.setattr(slurm, "states", queue.__getitem__)
    leave(tmp_path, job="big/12")
    assert str(lease.find_stale(tmp_path, slurm.has_ended)).endswith("which is not in the queue any more")
    assert not slurm.has_ended("big/13")
    assert not slurm.has_ended("small/12")  # of which this cluster's queue knows nothing


@pytest.mark.parametrize("renewed", [True, False])
def test_lease_of_other_host_is_stale_unless_renewed(
    renewed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", 2.0)
    leave(tmp_path, renewed=9e12)  # by a clock that is ahead
    with ThreadPoolExecutor() as pool:
        looking = pool.submit(lease.find_stale, tmp_path)
        if renewed:
            leave(tmp_path, renewed=1)  # and set back
            while not looking.done():
                leave(tmp_path, renewed=os.urandom(4).hex())
            with pytest.raises(BlockingIOError, match="node7 is at work"):
                looking.result()
        else:
            assert looking.result() == "process 7 on node7, which has not renewed its lease for 2 s"


def test_lost_lease_is_neither_renewed_nor_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with lease.hold(tmp_path) as held:
        first = (tmp_path / lease.LEASE).read_text()
        while (tmp_path / lease.LEASE).read_text() == first:  # it is renewed
            assert held.lost is None
        leave(tmp_path)
        while held.lost is None:  # a renewal that was under way
            leave(tmp_path)
        assert (
            held.lost
            == f"{tmp_path}: process 7 on node7 has taken it over: this job ends, and writes nothing more there"
        )
    assert json.loads((tmp_path / lease.LEASE).read_text())["uuid"] == "theirs"


def refuse(number: int) -> Any:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_missing_file_locks_are_reported_in_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with (
        pytest.raises(InputError, match=r"its file system has no locks .* mount it with them") as error,
        files.locked(tmp_path / "lock"),
    ):
        pass
    assert "\n" not in str(error.value)


def test_claim_and_link_fall_back_to_copies_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: files.claim(tmp_path / "claim", f"{number:1000}".encode()), range(32)))
    claimed = (tmp_path / "claim").read_bytes()
    assert len(claimed) == 1000
    files.claim(tmp_path / "claim", b"late")
    assert (tmp_path / "claim").read_bytes() == claimed
    for name in "ab":
        (tmp_path / name).mkdir()
        files.link(tmp_path / "claim", tmp_path / name / "copy")
        assert (tmp_path / name / "copy").read_bytes() == claimed
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith(f"{tmp_path}: hard links are refused (Operation not permitted), so files are copied")


def test_private_file_has_mode_0600(tmp_path: Path) -> None:
    (tmp_path / ".x.partial").touch(0o644)
    files.write(tmp_path / "x", b"1", private=True)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
