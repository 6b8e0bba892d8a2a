"""Leases keep two jobs from working in one folder, also where the file system's locks do nothing.

    FOLDER/.lock     locked by the job; some file systems lock against processes of the same node alone, or not at all
    FOLDER/.lease    the job's host, process and SLURM job, written every RENEW_S and read before each save

A lease is stale, and is taken over, when its process has ended on this machine, when its SLURM job is the one that asks
or has left the queue, or when it stays unchanged for STALE_S while another job watches. No clocks are compared.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import FAILED

LOCK, LEASE = ".lock", ".lease"
RENEW_S, STALE_S = 10.0, 60.0
SETTLE_S = 0.2
"""Time between taking a stale lease over and looking whether another process did so at the same moment."""

Holder = dict[str, Any]
HasEnded = Callable[[str], bool]


class Lease:
    """This process's lease of `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LEASE
        self._own: Holder = {**_this_process(), "uuid": uuid.uuid4().hex}
        self._turn = threading.Lock()

    @property
    def lost(self) -> str | None:
        """One line that says who has taken the folder over; None as long as nobody has."""
        try:
            with self._turn:
                found = _holder(self._path.read_text())
        except FileNotFoundError:  # the job that had taken it over has ended meanwhile
            found = {"uuid": None}
        except OSError:  # a network file system that is away says nothing about the lease
            return None
        if found.get("uuid", self._own["uuid"]) == self._own["uuid"]:
            return None
        return f"{self._folder}: {_named(found)} has taken it over: this job ends, and writes nothing more there"

    def require(self) -> None:
        """Ends this process at once, with one line, where the folder has been taken over."""
        if lost := self.lost:
            print(f"error: {lost}", file=sys.stderr, flush=True)
            os._exit(FAILED)

    def take(self, has_ended: HasEnded) -> None:
        """Writes the lease. Raises BlockingIOError where another process is at work in the folder."""
        found, faster = stale(self._folder, has_ended), f"{self._folder}: another process was faster"
        try:
            if not found:
                self._path.touch(exist_ok=False)  # of several, one makes it; so far it names nobody
        except FileExistsError:
            raise BlockingIOError(faster) from None
        self._write()
        if found:
            print(f"{self._folder}: taken over from {found}", file=sys.stderr, flush=True)
            time.sleep(SETTLE_S)
        if self.lost:
            raise BlockingIOError(faster)

    def keep(self, ended: threading.Event) -> None:
        """Renews the lease until `ended` is set or the lease is lost."""
        while not ended.wait(RENEW_S):
            with contextlib.suppress(OSError):  # on a full disk the lease stays as it is for a while
                if self.lost:
                    return
                self._write()

    def release(self) -> None:
        """Removes the lease, unless it is another job's by now."""
        with contextlib.suppress(OSError):
            if not self.lost:
                self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        whole = self._path.with_name(f"{LEASE}.{self._own['uuid']}")
        with self._turn:
            files.write(whole, json.dumps({**self._own, "renewed": time.time()}).encode())
            whole.rename(self._path)


@contextlib.contextmanager
def hold(folder: Path, has_ended: HasEnded = lambda job: False) -> Iterator[Lease]:
    """Holds `folder` for this process alone. `has_ended` says whether a job, named as by `job_of`, has left the queue.

    Raises BlockingIOError where another process is at work in the folder, and InputError as files.locked does.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.locked(folder / LOCK, wait=False))
        lease, ended = Lease(folder), threading.Event()
        lease.take(has_ended)
        stack.callback(lease.release)
        thread = threading.Thread(target=lease.keep, args=[ended], name="lease", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)
        yield lease


def stale(folder: Path, has_ended: HasEnded = lambda job: False) -> str | None:
    """Returns whose lease of `folder` is stale, and why; None where there is no lease. Takes up to STALE_S seconds.

    Raises BlockingIOError for a lease that holds.
    """
    path, own = folder / LEASE, _this_process()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    found = _holder(text)
    if found.get("machine") == own["machine"]:
        if found.get("started") == _started(found["pid"]):
            raise BlockingIOError(f"{folder}: {_named(found)} is at work in it")
        return f"{_named(found)}, which has ended"
    if found.get("job") and found["job"] == own["job"]:
        return f"{_named(found)}: the same job, started again"
    if found.get("job") and has_ended(found["job"]):
        return f"{_named(found)}, which is not in the queue any more"
    print(
        f"{folder}: looking for {STALE_S:.0f} s whether {_named(found)} is at work in it", file=sys.stderr, flush=True
    )
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE_S / 10))
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() != text:
                raise BlockingIOError(f"{folder}: {_named(found)} is at work in it")
    return f"{_named(found)}, which has not renewed its lease for {STALE_S:.0f} s"


def job_of(environ: os._Environ[str] = os.environ) -> str | None:
    """Returns the SLURM job that this process is part of, as CLUSTER/ID, which a requeued job keeps; None outside."""
    job = environ.get("SLURM_JOB_ID")
    return job and f"{environ.get('SLURM_CLUSTER_NAME', '')}/{job}"


def _this_process() -> Holder:
    # A process id means something within one boot of one machine and one namespace of process ids (a container's).
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host = os.uname().nodename
    machine = f"{host} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return {"host": host, "machine": machine, "pid": os.getpid(), "started": _started(os.getpid()), "job": job_of()}


def _started(pid: int) -> int | None:
    """Returns when a process was started, in ticks since the machine was; None for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _holder(text: str) -> Holder:
    """Returns what a lease says; an empty mapping for text that is no lease."""
    try:
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}


def _named(found: Holder) -> str:
    job = f" of job {found['job']}" if found.get("job") else ""
    return f"process {found.get('pid', '?')} on {found.get('host', '?')}{job}"
