"""Queries and requests to SLURM, through its own commands."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ExternalError, InputError

_PATIENCE_S = 60.0
_DEAD_STATES = ("down", "drained", "fail", "power", "unknown")


def ask(*command: str, text: str | None = None) -> str:
    """Returns the standard output of one of SLURM's commands, which gets `text` on its standard input.

    Raises InputError on a machine without SLURM, and ExternalError with SLURM's message when it refuses.
    """
    if shutil.which(command[0]) is None:
        raise InputError(
            f"{command[0]} is not on the PATH: this machine has no SLURM. Submit from a login node of the cluster, or "
            "train on this machine with deepspeed launch/pretrain.py; --dry-run shows the batch script anywhere"
        )
    try:
        done = subprocess.run(command, input=text or "", capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise ExternalError(f"{' '.join(command)}: no answer from SLURM for {_PATIENCE_S:g} s") from error
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        raise ExternalError(f"{' '.join(command)}: {why}")
    return done.stdout


def submit(script: str, *, dependency: str | None = None) -> str:
    """Puts a batch script into the queue; returns the job's id. Raises ExternalError."""
    command = ["sbatch", "--parsable"]
    if dependency:
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    # The answer is ID or ID;CLUSTER.
    return ask(*command, text=script).strip().partition(";")[0]


def refusal(script: str) -> str | None:
    """Returns why SLURM would not accept a batch script, or None if it would."""
    try:
        ask("sbatch", "--test-only", text=script)
    except ExternalError as error:
        return str(error).partition(": ")[2].replace("sbatch: error: ", "")
    return None


def partitions() -> list[str]:
    return sorted(set(ask("sinfo", "--noheader", "--format=%R").split()))


def states(job: str) -> dict[str, str]:
    """Returns the state of a job that waits or runs, by its id; for an array, the state of each of its jobs. A job that
    has ended has none."""
    try:
        lines = ask("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i %T").splitlines()
    except ExternalError as error:
        # SLURM forgets jobs some minutes after their end.
        if "Invalid job id" in str(error):
            return {}
        raise
    return dict(line.split() for line in lines)


def has_ended(job: str) -> bool:
    """Returns whether a job, CLUSTER/ID, is known to have left this cluster's queue."""
    cluster, _, number = job.rpartition("/")
    if cluster != os.environ.get("SLURM_CLUSTER_NAME", ""):
        return False
    with contextlib.suppress(InputError, ExternalError):
        return not states(number)
    return False


@dataclass(frozen=True)
class Allocation:
    """The nodes and the job that SLURM has allocated to a batch script."""

    job: str
    restarts: int
    """The number of times that SLURM has restarted this job."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Allocation":
        """Returns the allocation that environment variables describe. Raises InputError outside a batch script."""
        if "SLURM_JOB_ID" not in environ:
            raise InputError("no SLURM_JOB_ID: this is what a batch script runs; submit one with launch/submit.py")
        return cls(environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT") or 0))

    def nodes(self) -> list[str]:
        """Returns the nodes that are up now, in SLURM's order."""
        # A lost node leaves the allocation before sinfo reports its state, so squeue has to be asked, too.
        allocated = ask("squeue", "--noheader", f"--jobs={self.job}", "--format=%N").strip()
        dead = set()
        for line in ask("sinfo", "--noheader", "--Node", f"--nodes={allocated}", "--format=%N %T").splitlines():
            name, state = line.split()
            if state.startswith(_DEAD_STATES):
                dead.add(name)
        names = ask("scontrol", "show", "hostnames", allocated).split()
        return [name for name in names if name not in dead]

    def is_ending(self) -> bool:
        """Returns whether SLURM has ended the job, because it was cancelled or its time is over."""
        return states(self.job).get(self.job) == "COMPLETING"

    def is_preempted(self) -> bool:
        """Returns whether SLURM takes the job's nodes for another job."""
        # The signal does not tell: a preemption with a GraceTime moves the time limit to the end of that, so SLURM may
        # send the signal of the time limit then, too.
        record = ask("scontrol", "show", "job", self.job, "--oneliner")
        return re.search(r"\bPreemptTime=(?!None)\S", record) is not None

    def requeue(self, exclude: set[str]) -> None:
        """Puts the job back into the queue, without the nodes in `exclude`. SLURM then ends its processes, with SIGTERM
        first, and starts it again two minutes later or when there is room. Raises ExternalError if it refuses."""
        # That SIGTERM goes to all processes of the job, scontrol among them, which inherits the signals blocked here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            if not exclude:
                ask("scontrol", "requeue", self.job)
                return
            # Held first: the nodes of a job that has started can no longer be changed.
            ask("scontrol", "requeuehold", self.job)
            try:
                ask("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={','.join(sorted(exclude))}")
            finally:
                ask("scontrol", "release", self.job)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def parse_seconds(text: str) -> int | None:
    """Returns the seconds of a duration as SLURM writes it: [DAYS-]HOURS:MINUTES:SECONDS, MINUTES[:SECONDS] or
    DAYS-HOURS[:MINUTES]; None for UNLIMITED and other words."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *groups = match.groups()
    fields = [int(group) for group in groups if group is not None]
    # Without days, one or two fields begin with the minutes.
    if days is None and len(fields) < 3:
        fields.insert(0, 0)
    while len(fields) < 3:
        fields.append(0)
    hours, minutes, seconds = fields
    hours += 24 * int(days or 0)
    return (hours * 60 + minutes) * 60 + seconds


def node_name() -> str:
    """Returns this node's name in SLURM, which may differ from the host's: several nodes may be one machine."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
