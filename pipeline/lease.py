"""Leases prevent two jobs from working in one folder, also where the file system's locks have no effect.

    FOLDER/.lock     locked by the job; some file systems lock against processes of the same node alone, or not at all
    FOLDER/.lease    the job's host, process and SLURM job, written every RENEW_S and read before each save

A lease is stale, and is taken over, when its process has ended on this machine, when its SLURM job is the one that asks
or has left the queue, or when it stays unchanged for STALE_S while another job watches. No clocks are compared.
"""

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import FAILED

log = logging.getLogger(__name__)

LOCK = ".lock"
LEASE = ".lease"
RENEW_S = 10.0
STALE_S = 60.0
SETTLE_S = 0.2
"""The time between taking a stale lease over and checking whether another process did so at the same moment."""

Holder = dict[str, Any]
HasEnded = Callable[[str], bool]


class Lease:
    """This process's lease of `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LEASE
        self._own: Holder = {**_describe_process(), "uuid": uuid.uuid4().hex}
        # The saving thread reads the file while the renewing thread writes it.
        self._access = threading.Lock()

    @property
    def lost(self) -> str | None:
        """One line that says who has taken the folder over; None as long as this process holds it."""
        try:
            with self._access:
                holder = _parse_holder(self._path.read_text())
        # The job that had taken the folder over has ended meanwhile.
        except FileNotFoundError:
            holder = {"uuid": None}
        # A network file system that is down says nothing about the lease.
        except OSError:
            return None
        if holder.get("uuid", self._own["uuid"]) == self._own["uuid"]:
            return None
        return f"{self._folder}: {_name_holder(holder)} has taken it over: this job ends, and writes nothing more there"

    def require(self) -> None:
        """Ends this process at once, with one line, where the folder has been taken over."""
        message = self.lost
        if message:
            log.error(message)
            os._exit(FAILED)

    def take(self, has_ended: HasEnded) -> None:
        """Writes the lease. Raises BlockingIOError where another process is at work in the folder."""
        previous = find_stale(self._folder, has_ended)
        conflict = f"{self._folder}: another process was faster"
        if not previous:
            # Only one of several processes can create the file, which names nobody yet.
            try:
                self._path.touch(exist_ok=False)
            except FileExistsError:
                raise BlockingIOError(conflict) from None
        self._write()
        if previous:
            log.warning(f"{self._folder}: taken over from {previous}")
            time.sleep(SETTLE_S)
        if self.lost:
            raise BlockingIOError(conflict)

    def keep(self, ended: threading.Event) -> None:
        """Renews the lease until `ended` is set or the lease is lost."""
        while not ended.wait(RENEW_S):
            # On a full disk the lease stays as it is for a while.
            with contextlib.suppress(OSError):
                if self.lost:
                    return
                self._write()

    def release(self) -> None:
        """Removes the lease, unless another job has taken it over."""
        with contextlib.suppress(OSError):
            if not self.lost:
                self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        # Each process writes a file of its own, because two may take over a stale lease at once.
        own_path = self._path.with_name(f"{LEASE}.{self._own['uuid']}")
        content = {**self._own, "renewed": time.time()}
        with self._access:
            files.write(own_path, json.dumps(content).encode())
            own_path.rename(self._path)


@contextlib.contextmanager
def hold(folder: Path, has_ended: HasEnded = lambda job: False) -> Iterator[Lease]:
    """Holds `folder` for this process alone. `has_ended` says whether a job, named as by `job_of`, has left the queue.

    Raises BlockingIOError where another process is at work in the folder, and InputError as files.locked does.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.locked(folder / LOCK, wait=False))
        lease = Lease(folder)
        lease.take(has_ended)
        # Callbacks run in reverse: the thread ends before the lease is removed, or it would write it again.
        stack.callback(lease.release)
        ended = threading.Event()
        thread = threading.Thread(
            target=lease.keep,
            args=[ended],
            name="lease",
            daemon=True,
        )
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)
        yield lease


def find_stale(folder: Path, has_ended: HasEnded = lambda job: False) -> str | None:
    """Returns whose lease of `folder` is stale, and why; None where there is no lease. Takes up to STALE_S seconds.

    Raises BlockingIOError for a lease that holds.
    """
    path = folder / LEASE
    own = _describe_process()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    holder = _parse_holder(text)
    name = _name_holder(holder)
    if holder.get("machine") == own["machine"]:
        # A process id may have been reused by a process that was started later.
        if holder.get("started") == _read_start_time(holder["pid"]):
            raise BlockingIOError(f"{folder}: {name} is at work in it")
        return f"{name}, which has ended"
    job = holder.get("job")
    if job and job == own["job"]:
        return f"{name}: the same job, started again"
    if job and has_ended(job):
        return f"{name}, which is not in the queue any more"
    # Another machine's process: only renewals of the lease show that it is alive.
    log.info(f"{folder}: watching for {STALE_S:.0f} s whether {name} is at work in it")
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_S / 10))
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() != text:
                raise BlockingIOError(f"{folder}: {name} is at work in it")
    return f"{name}, which has not renewed its lease for {STALE_S:.0f} s"


def job_of(environ: os._Environ[str] = os.environ) -> str | None:
    """Returns the SLURM job that this process is part of, as CLUSTER/ID, which a requeued job keeps; None outside."""
    job = environ.get("SLURM_JOB_ID")
    cluster = environ.get("SLURM_CLUSTER_NAME", "")
    return job and f"{cluster}/{job}"


def _describe_process() -> Holder:
    # A process id means something within one boot of one machine and one namespace of process ids (a container's).
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host = os.uname().nodename
    namespace = Path("/proc/self/ns/pid").readlink()
    pid = os.getpid()
    return {
        "host": host,
        "machine": f"{host} {boot} {namespace}",
        "pid": pid,
        "started": _read_start_time(pid),
        "job": job_of(),
    }


def _read_start_time(pid: int) -> int | None:
    """Returns when a process was started, in clock ticks since the machine booted; None for one that has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold anything, so the fields are counted from behind it: see proc(5).
    _, _, fields = text.rpartition(")")
    state, *others = fields.split()
    # Zombie and dead processes hold nothing any more.
    return None if state in "ZX" else int(others[18])


def _parse_holder(text: str) -> Holder:
    """Returns the contents of a lease; an empty mapping for text that is no lease."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name_holder(holder: Holder) -> str:
    name = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    job = holder.get("job")
    return f"{name} of job {job}" if job else name
