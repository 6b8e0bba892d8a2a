"""Supervises a batch job: checks its nodes, runs the ranks, and starts them again until the run has finished.

    ┌─▶ pre-flight on each node ─▶ all-reduce ─▶ ranks ──┬─ result.json: finished ──────────────────▶ 0
    │          │ too few are healthy    │ fails          ├─ result.json: stopped by a signal ───┐
    │          ├────────────────────────┼───────────────▶│                                      ├▶ requeue, 85
    │          │                        │                ├─ too few nodes are left ─────────────┘
    └──────────┴────────────────────────┴─────── crash ◀─┤
                                                         └─ configuration refused ─────────────────▶ 2
More than cluster.max_restarts crashes, or attempts up to the time limit, without a new checkpoint ─▶ 1

Each of these is an event in the journal, from which a job that SLURM has restarted learns its history.
"""

import collections
import json
import logging
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.cluster.job_step import copy_environment, python_command, srun_command, step_environment
from pipeline.cluster.journal import FAILURES, Journal
from pipeline.cluster.slurm import Allocation, ask, node_name
from pipeline.config import ClusterConfig, Config
from pipeline.errors import DONE, FAILED, REQUEUE, STOPPING, USAGE, ExternalError
from pipeline.run_folder import CHECKPOINTS, RESULT, SLURM, committed_checkpoints, read_lines

log = logging.getLogger(__name__)

LOG = f"{SLURM}/log"
STOP = f"{SLURM}/stop"
DEPUTY_LOG = f"{SLURM}/deputy.log"
"""Paths relative to the run's folder."""
PREFLIGHT_S = 300
ALL_REDUCE_S = 300
LAST_WAIT_S = 60
POLL_S = 1
TIME_LIMIT = signal.SIGUSR1.name
"""The signal that the batch script gets cluster.grace_s before the time limit; at a preemption it is SIGTERM."""
_EXPECTED_LAST_EVENTS = ("stopping", "stopped", "requeue", "ended")
"""The last events of jobs that SLURM restarts for a known reason."""
_ERROR_LINE = re.compile(r"\berror: |\bERROR |^\s*\w*(Error|Exception|Interrupt)\b")
_RANK_LABEL = re.compile(r"^\s*\d+: ")
_DEAD_TASKS = re.compile(r"srun: error: (\S+): tasks? ")


@dataclass(frozen=True)
class Program:
    """The program of the ranks: a file below `code`, with a configuration and more arguments."""

    config: Config
    code: Path
    file: str
    config_file: str
    overrides: Sequence[str]
    more: Sequence[str] = ()

    @property
    def arguments(self) -> list[str]:
        arguments = ["--config", self.config_file]
        for override in self.overrides:
            arguments += ["--set", override]
        return arguments

    @property
    def folder(self) -> Path:
        return self.config.run.folder


@dataclass(frozen=True)
class Ending:
    """How one start of the ranks ended."""

    code: int
    result: dict[str, Any] | None
    """The result that the ranks have written, if any."""
    error: str


class _NotReadyError(Exception):
    """Training cannot start on these nodes."""

    def __init__(self, why: str, bad_nodes: set[str]) -> None:
        self.why = why
        self.bad_nodes = bad_nodes


class Supervisor:
    """Supervises one stretch of a job: from a start of its batch script to the script's end."""

    def __init__(self, program: Program, allocation: Allocation) -> None:
        self._program = program
        self._allocation = allocation
        self._cluster: ClusterConfig = program.config.cluster
        self._journal = Journal(program.folder, allocation.job)
        self._first_step = self._newest_step()
        self._stop: str | None = None
        """The name of the first signal that this job has received."""
        self._step: subprocess.Popen[str] | None = None
        self._has_answered = False
        """Whether a rank has logged that it stops."""
        self._deputy: subprocess.Popen[bytes] | None = None
        self._num_starts = 0
        """How often this job has started the ranks."""
        self._num_deaths: collections.Counter[str] = collections.Counter()
        """How often the ranks of a node were the first to die."""

    def run(self) -> int:
        """Runs until the run has finished, or this job must not or cannot continue it. Returns the exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        events = self._journal.of_this_job()
        self._num_starts = sum(event["event"] == "start" for event in events)
        last_event = events[-1]["event"] if events else None
        if self._allocation.restarts and last_event not in _EXPECTED_LAST_EVENTS:
            error = "the job disappeared without an exit event, as when its first node is lost"
            if code := self._record_failure("crash", error):
                return code
        while True:
            try:
                nodes = self._choose_nodes()
            except _NotReadyError as error:
                if self._stop:
                    return self._check_progress() or self._leave(f"{self._stop} came before training began")
                return self._record_failure("crash", error.why) or self._leave(error.why, error.bad_nodes)
            ending = self._run_ranks(nodes)
            has_finished = ending.result and not ending.result.get("requeue")
            if ending.code == DONE or has_finished:
                self._journal.write("finished")
                return DONE
            # A configuration that was accepted before is refused for a reason that passes, such as the lock of a lost
            # node on a network file system. Only at the first start is it the configuration's fault.
            if ending.code == USAGE and self._num_starts == 1:
                self._journal.write("gave up", why=ending.error)
                return USAGE
            if ending.result or self._stop:
                self._journal.write("stopped", step=self._newest_step())
                return self._check_progress() or self._leave(self._stop or "the ranks were asked to stop")
            if code := self._record_failure("crash", ending.error, ending.code):
                return code

    def _on_signal(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        self._stop = self._stop or name
        self._journal.write("stopping", signal=name)
        # srun forwards it to the ranks.
        if self._step:
            self._step.send_signal(signal.SIGUSR1)

    # Before training

    def _choose_nodes(self) -> list[str]:
        """Returns the nodes to train on, cluster.nodes of them or as few as allowed. Raises _NotReadyError."""
        allocated = self._allocation.nodes()
        if self._cluster.environment.copy_to_scratch:
            copy_environment(self._cluster, allocated)
        healthy = self._check_nodes(allocated)
        while True:
            bad = set(allocated) - set(healthy)
            if len(healthy) < self._cluster.fewest_nodes:
                why = f"{len(healthy)} of {len(allocated)} nodes are healthy, {self._cluster.fewest_nodes} are needed"
                # A fault of all nodes has a cause outside them, such as a store or the shared disk.
                is_common = not healthy and len(allocated) > 1
                raise _NotReadyError(why, set() if is_common else bad)
            # Nodes whose ranks have died before are taken last.
            candidates = sorted(healthy, key=lambda name: self._num_deaths[name])[: self._cluster.nodes]
            chosen = [name for name in allocated if name in candidates]
            started = self._all_reduce(chosen)
            # Once more at another port, because the first one may have been in use.
            if started == set(chosen) and not self._stop:
                started = self._all_reduce(chosen)
            if self._stop:
                raise _NotReadyError("a signal came", bad)
            if started is None:
                return chosen
            # All ranks have started, so nothing tells which node is the faulty one.
            if started == set(chosen):
                raise _NotReadyError(f"all-reduce over {', '.join(chosen)} failed; see the log above", bad)
            healthy = [name for name in healthy if name in started or name not in chosen]

    def _check_nodes(self, nodes: list[str]) -> list[str]:
        """Returns the nodes that pass the pre-flight."""
        arguments = ["--node", *self._program.arguments, "--sent", f"{time.time():.0f}"]
        answers = self._run_on_nodes(nodes, 1, "launch/doctor.py", arguments, PREFLIGHT_S)
        reports = {answer["node"]: answer for answer in answers if "checks" in answer}
        healthy = []
        for name in nodes:
            report = reports.get(name)
            if report is None:
                self._journal.write("excluded", node=name, why="no answer to the pre-flight")
            elif not report["ok"]:
                faults = [f"{check['name']}: {check['told']}" for check in report["checks"] if not check["ok"]]
                self._journal.write("excluded", node=name, why="; ".join(faults))
            else:
                healthy.append(name)
        return healthy

    def _all_reduce(self, nodes: list[str]) -> set[str] | None:
        """Runs an all-reduce over all ranks of the nodes. Returns None if it succeeds; otherwise the nodes all of whose
        ranks have started."""
        num_ranks = self._cluster.ranks
        answers = self._run_on_nodes(nodes, num_ranks, "launch/doctor.py", ["--all-reduce"], ALL_REDUCE_S)
        for answer in answers:
            if "all_reduce_gb_s" in answer:
                log.info(f"all-reduce over {answer['ranks']} ranks: {answer['all_reduce_gb_s']:.2f} GB/s")
                return None
        arrived = collections.Counter(answer["node"] for answer in answers if "arrived" in answer)
        started = {name for name in nodes if arrived[name] == num_ranks}
        for name in set(nodes) - started:
            why = f"{arrived[name]} of {num_ranks} ranks came to the all-reduce"
            self._journal.write("excluded", node=name, why=why)
        return started

    def _run_on_nodes(
        self,
        nodes: list[str],
        tasks: int,
        file: str,
        arguments: Sequence[str],
        limit_s: int,
    ) -> list[dict[str, Any]]:
        """Returns the JSON lines that a program prints on the nodes; its standard error goes to the log."""
        # Each task writes to a file of its own: srun forwards output in pieces of 1 KiB, which would mix lines.
        with tempfile.TemporaryDirectory(
            dir=self._program.folder / SLURM,
            prefix="answers-",
            ignore_cleanup_errors=True,
        ) as folder:
            command = [
                *srun_command(self._cluster, nodes, tasks),
                "--kill-on-bad-exit=0",
                f"--output={folder}/%t",
                "--error=all",
                *python_command(self._cluster),
                str(self._program.code / file),
                *arguments,
            ]
            self._step = subprocess.Popen(command, text=True, env=step_environment(nodes))
            try:
                self._step.wait(limit_s)
            except subprocess.TimeoutExpired:
                self._end_step()
            self._step = None
            answers: list[dict[str, Any]] = []
            for path in sorted(Path(folder).iterdir()):
                # A line that is cut short is that of a task that was killed.
                answers += read_lines(path)
            return answers

    def _end_step(self) -> int:
        assert self._step
        # srun ends its tasks as well.
        self._step.terminate()
        try:
            return self._step.wait(LAST_WAIT_S)
        except subprocess.TimeoutExpired:
            self._step.kill()
            return self._step.wait()

    # Training

    def _run_ranks(self, nodes: list[str]) -> Ending:
        cluster = self._cluster
        result_path = self._program.folder / RESULT
        result_before = _file_identity(result_path)
        ranks = len(nodes) * cluster.ranks
        self._appoint_deputy(nodes)
        self._num_starts += 1
        self._has_answered = False
        self._journal.write("start", attempt=self._num_starts, nodes=nodes, ranks=ranks, step=self._newest_step())
        program = [self._program.code / self._program.file, *self._program.arguments, *self._program.more]
        program += ["--ranks", ranks, "--no-handoff"]
        # From the second start on the checkpoints are this job's own.
        if self._num_starts > 1 and self._program.config.resume.source == "never":
            program += ["--set", "resume.source=auto"]
        command = [
            *srun_command(cluster, nodes, cluster.ranks),
            "--label",
            "--kill-on-bad-exit=1",
            *python_command(cluster),
            *program,
        ]
        self._step = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=step_environment(nodes),
        )
        last_lines = collections.deque[str](maxlen=400)
        rank_died = threading.Event()

        def has_result() -> bool:
            return _file_identity(result_path) not in (result_before, None)

        listener = threading.Thread(target=self._listen, args=(self._step.stdout, last_lines, rank_died))
        listener.start()
        code = self._wait_for_ranks(lambda: rank_died.is_set() or has_result())
        listener.join()
        result = json.loads(result_path.read_text()) if has_result() else None
        return Ending(code, result, _find_error(last_lines) or f"exit code {code}")

    def _listen(self, lines: IO[str], last_lines: collections.deque[str], rank_died: threading.Event) -> None:
        """Logs the output of srun and the ranks, and notes the node whose ranks die first."""
        with lines:
            for line in lines:
                print(line, end="", flush=True)
                last_lines.append(_RANK_LABEL.sub("", line.rstrip()))
                if STOPPING in line:
                    self._has_answered = True
                dead = _DEAD_TASKS.match(line)
                # The others die only because it has.
                if dead and not rank_died.is_set():
                    self._num_deaths[dead[1]] += 1
                    rank_died.set()

    def _wait_for_ranks(self, is_over: Callable[[], bool]) -> int:
        """Waits for the end of the ranks. Returns srun's exit code."""
        assert self._step
        over_since: float | None = None
        while True:
            try:
                code = self._step.wait(POLL_S)
                break
            except subprocess.TimeoutExpired:
                # srun does not keep a signal for ranks that it has yet to start, so it is repeated until one answers.
                if self._stop and not self._has_answered:
                    self._step.send_signal(signal.SIGUSR1)
                if over_since is None:
                    over_since = time.monotonic() if is_over() else None
                elif time.monotonic() - over_since > LAST_WAIT_S:
                    # srun waits forever for a node that no longer answers, although all ranks have ended.
                    log.info(f"srun has not ended {LAST_WAIT_S} s after the ranks: ending it")
                    code = self._end_step()
                    break
        self._step = None
        return code

    def _appoint_deputy(self, nodes: list[str]) -> None:
        """Starts a step on another node that watches this one. It runs until SLURM ends it with the job."""
        if self._deputy and self._deputy.poll() is None:
            return
        others = [name for name in nodes if name != node_name()]
        if not others:
            return
        node = others[-1:]
        command = [
            *srun_command(self._cluster, node, 1),
            # It has to outlive this node and its srun, so there is neither input from it nor output to it.
            "--input=none",
            f"--output={self._program.folder / DEPUTY_LOG}",
            "--open-mode=append",
            sys.executable,
            str(self._program.code / "launch/supervise.py"),
            "--deputy-of",
            node_name(),
        ]
        # srun reports the end of the deputy, which means nothing.
        quiet = subprocess.DEVNULL
        self._deputy = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=step_environment(node))

    # After training

    def _newest_step(self) -> int:
        return max(committed_checkpoints(self._program.folder / CHECKPOINTS), default=0)

    def _check_progress(self) -> int | None:
        """Counts a stretch that its time limit ended without a newer checkpoint. Returns the exit code where there have
        been too many."""
        step = self._newest_step()
        if self._stop != TIME_LIMIT or step != self._first_step or self._is_stop_requested:
            return None
        if self._allocation.is_preempted():
            return None
        error = f"the time limit (cluster.time {self._cluster.time}) came before a checkpoint after step {step}"
        remedy = "raise it, or save more often (checkpoint.every_minutes, train.save_every)"
        return self._record_failure("no progress", f"{error}: {remedy}", REQUEUE)

    def _record_failure(self, event: str, error: str, code: int = FAILED) -> int | None:
        """Records a failure. Returns the exit code where there have been too many without a newer checkpoint, whether
        or not the job was preempted in between."""
        step = self._newest_step()
        num_failures = 1
        earlier = [each for each in self._journal.of_this_job() if each["event"] in FAILURES]
        if earlier and earlier[-1]["step"] == step:
            num_failures = earlier[-1]["restarts"] + 1
        self._journal.write(event, code=code, step=step, restarts=num_failures, error=error)
        if num_failures <= self._cluster.max_restarts:
            return None
        why = f"{num_failures} failures without a checkpoint after step {step}, the last one: {error}"
        self._journal.write("gave up", why=why)
        return FAILED

    @property
    def _is_stop_requested(self) -> bool:
        """Whether a user has asked for the run to stop, with `submit.py stop`."""
        return (self._program.folder / STOP).exists()

    def _leave(self, why: str, exclude: Iterable[str] = ()) -> int:
        """Requeues the job, unless a user has asked for the run to stop. Returns the exit code."""
        if self._is_stop_requested:
            log.info(f"{why}; {self._program.folder / STOP} asks for the run to stop here")
            return REQUEUE
        # Requeueing would bring back a job that somebody has cancelled.
        if self._allocation.is_ending():
            self._journal.write("ended", why=f"{why}: SLURM has ended the job, and queues it again itself or never")
            return REQUEUE
        self._journal.write("requeue", why=why)
        excluded = set(exclude)
        try:
            # The new list replaces that of the batch script.
            if excluded and self._cluster.exclude:
                excluded.update(ask("scontrol", "show", "hostnames", self._cluster.exclude).split())
            self._stop = None
            self._allocation.requeue(excluded)
            # An exit code of this job's own, before SLURM ends it, might be taken for the end of the job.
            until = time.monotonic() + LAST_WAIT_S
            while not self._stop and time.monotonic() < until:
                time.sleep(0.1)
        except ExternalError as error:
            # SLURM refuses for a job that is being cancelled, for example.
            self._journal.write("gave up", why=f"SLURM does not requeue the job: {error}")
        return REQUEUE


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _find_error(lines: Sequence[str]) -> str:
    """Returns the last line that reports an error; the program's own come before those of SLURM."""
    errors = [line for line in lines if _ERROR_LINE.search(line)]
    own_errors = [line for line in errors if not line.startswith(("srun:", "slurmstepd"))]
    candidates = own_errors or errors or list(lines)
    return candidates[-1].strip() if candidates else ""
