"""What is asked of SLURM, by way of its own commands."""

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
_DEAD = ("down", "drained", "fail", "power", "unknown")


def ask(*command: str, text: str | None = None) -> str:
    """Standard output of one of SLURM's commands, which is given `text` on its standard input.

    Raises InputError on a machine without SLURM, and ExternalError with what SLURM says when it refuses.
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
        raise ExternalError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def submit(script: str, *, dependency: str | None = None) -> str:
    """Put a batch script into the queue; its job's id. Raises ExternalError."""
    after = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return ask("sbatch", "--parsable", *after, text=script).strip().partition(";")[0]


def refusal(script: str) -> str | None:
    """Why SLURM would not take a batch script, or None if it would."""
    try:
        ask("sbatch", "--test-only", text=script)
    except ExternalError as error:
        return str(error).partition(": ")[2].replace("sbatch: error: ", "")
    return None


def partitions() -> list[str]:
    return sorted(set(ask("sinfo", "--noheader", "--format=%R").split()))


def states(job: str) -> dict[str, str]:
    """The state of a job that waits or runs, by its id; of an array, of each of its jobs. Nothing for one that has
    ended."""
    try:
        lines = ask("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i %T").splitlines()
    except ExternalError as error:
        if "Invalid job id" in str(error):  # it forgets them some minutes after their end
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
    """What a batch script has been given."""

    job: str
    restarts: int
    """How often SLURM has started this job before."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Allocation":
        """Raises InputError outside a batch script."""
        if "SLURM_JOB_ID" not in environ:
            raise InputError("no SLURM_JOB_ID: this is what a batch script runs; submit one with launch/submit.py")
        return cls(environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT") or 0))

    def nodes(self) -> list[str]:
        """Those that are up now, in SLURM's order. A node that was lost leaves the allocation, sooner than its state
        is told."""
        held = ask("squeue", "--noheader", f"--jobs={self.job}", "--format=%N").strip()
        lines = ask("sinfo", "--noheader", "--Node", f"--nodes={held}", "--format=%N %T").splitlines()
        dead = {name for name, state in map(str.split, lines) if state.startswith(_DEAD)}
        return [name for name in ask("scontrol", "show", "hostnames", held).split() if name not in dead]

    def is_ending(self) -> bool:
        """Whether SLURM has ended it: somebody has cancelled it, or its time is up."""
        return states(self.job).get(self.job) == "COMPLETING"

    def is_preempted(self) -> bool:
        """Whether SLURM is taking its nodes for another job. It may send the signal of the time limit then, too: a
        preemption with a GraceTime moves the limit to the end of that."""
        record = ask("scontrol", "show", "job", self.job, "--oneliner")
        return re.search(r"\bPreemptTime=(?!None)\S", record) is not None

    def requeue(self, exclude: set[str]) -> None:
        """Back into the queue, without the nodes in `exclude`. SLURM then ends this job's processes, with SIGTERM
        first, and starts it again two minutes later or when there is room. Raises ExternalError if it will not."""
        # That SIGTERM goes to all processes of the job, scontrol among them, which inherits what is blocked here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            if not exclude:
                ask("scontrol", "requeue", self.job)
                return
            ask("scontrol", "requeuehold", self.job)  # a job that has been started again keeps its nodes
            try:
                ask("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={','.join(sorted(exclude))}")
            finally:
                ask("scontrol", "release", self.job)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def seconds(text: str) -> int | None:
    """Of a time as SLURM writes it: [DAYS-]HOURS:MINUTES:SECONDS, MINUTES[:SECONDS] or DAYS-HOURS[:MINUTES]. None for
    UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *parts = match.groups()
    fields = [int(part) for part in parts if part is not None]
    if days is None and len(fields) < 3:
        fields.insert(0, 0)  # the first is of minutes
    hours, minutes, rest = [*fields, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def node_name() -> str:
    """As SLURM calls it: several of its nodes may be one machine."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
