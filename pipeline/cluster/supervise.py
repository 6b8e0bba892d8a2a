"""What a batch job does: look at its nodes, run the ranks, and start them again until the run has finished.

    ┌─▶ pre-flight on each node ─▶ all-reduce ─▶ ranks ──┬─ result.json: finished ──────────────────▶ 0
    │          │ too few are well       │ fails          ├─ result.json: stopped by a signal ───┐
    │          ├────────────────────────┼───────────────▶│                                      ├▶ requeue, 85
    │          │                        │                ├─ too few nodes are left ─────────────┘
    └──────────┴────────────────────────┴─────── crash ◀─┤
                                                         └─ configuration refused ─────────────────▶ 2
More than cluster.max_restarts crashes, or stretches up to the time limit, without a new checkpoint ▶ 1

Each of these is a line of events.jsonl, from which a job that SLURM has started again learns what has been.
"""

import collections
import hashlib
import json
import os
import re
import shlex
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

from pipeline.cluster.slurm import Allocation, ask, node_name
from pipeline.config import ClusterConfig, Config
from pipeline.errors import DONE, FAILED, REQUEUE, STOPPING, USAGE, ExternalError

SLURM = "slurm"
EVENTS, LOG, STOP, DEPUTY_LOG = (f"{SLURM}/{name}" for name in ("events.jsonl", "log", "stop", "deputy.log"))
"""Below a run's folder."""
PREFLIGHT_S, ALL_REDUCE_S, LAST_WAIT_S, POLL_S, DEPUTY_S = 300, 300, 60, 1, 20
TIME_LIMIT = signal.SIGUSR1.name
"""What SLURM sends to the batch script cluster.grace_s before the time limit; at a preemption it is SIGTERM."""
FAILURES = ("crash", "no progress")
"""Events that count towards cluster.max_restarts."""
_GOES_ON = ("stopping", "stopped", "requeue", "ended")
"""Last events of jobs that SLURM starts again for a reason that is known."""
_WHY = re.compile(r"\berror: |^\s*\w*(Error|Exception|Interrupt)\b")
_LABEL = re.compile(r"^\s*\d+: ")

Event = dict[str, Any]


class Journal:
    """runs/NAME/slurm/events.jsonl: what has happened to a run on the cluster, over all its jobs."""

    def __init__(self, folder: Path, job: str) -> None:
        self._path, self._job = folder / EVENTS, job
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        line = {"time": time.time(), "job": self._job, "event": event, **fields}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        details = ", ".join(f"{key} {_told(value)}" for key, value in fields.items())
        say(f"{event}: {details}" if details else event)

    def of_this_job(self) -> list[Event]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]  # a full disk may have cut one short
        return [event for event in events if event["job"] == self._job]


@dataclass(frozen=True)
class Program:
    """What the ranks run: a file below `code`, with a configuration and more arguments."""

    config: Config
    code: Path
    file: str
    config_file: str
    overrides: Sequence[str]
    more: Sequence[str] = ()

    @property
    def arguments(self) -> list[str]:
        return ["--config", self.config_file, *(word for each in self.overrides for word in ("--set", each))]

    @property
    def folder(self) -> Path:
        return self.config.run.folder


@dataclass(frozen=True)
class Ending:
    """Of one start of the ranks."""

    code: int
    result: dict[str, Any] | None  # that they have written, if any
    error: str


class _NotReady(Exception):
    def __init__(self, why: str, bad: set[str]) -> None:
        self.why, self.bad = why, bad


class Supervisor:
    def __init__(self, program: Program, allocation: Allocation) -> None:
        """For one stretch: from a start of the batch script to its end."""
        self._program, self._allocation = program, allocation
        self._cluster: ClusterConfig = program.config.cluster
        self._journal = Journal(program.folder, allocation.job)
        self._first_step = self._newest_step()
        self._stop: str | None = None  # name of the first signal that this job has been sent
        self._step: subprocess.Popen[str] | None = None
        self._answered = False  # whether a rank has said that it stops
        self._deputy: subprocess.Popen[bytes] | None = None
        self._starts = 0  # of the ranks
        self._blame: collections.Counter[str] = collections.Counter()

    def run(self) -> int:
        """Until the run has finished, or this job must not or cannot go on with it. Returns the exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        events = self._journal.of_this_job()
        self._starts = sum(event["event"] == "start" for event in events)
        last = events[-1]["event"] if events else None
        if self._allocation.restarts and last not in _GOES_ON:
            error = "the job was gone without a word, as when its first node is lost"
            if code := self._failure("crash", error):
                return code
        while True:
            try:
                nodes = self._choose()
            except _NotReady as trouble:
                if self._stop:
                    return self._in_vain() or self._leave(f"{self._stop} came before training began")
                return self._failure("crash", trouble.why) or self._leave(trouble.why, trouble.bad)
            ending = self._attempt(nodes)
            if ending.code == DONE or (ending.result and not ending.result.get("requeue")):
                self._journal.write("finished")
                return DONE
            # What has been accepted before is refused for a reason that passes: a lost node's lock on a network file
            # system, say.
            if ending.code == USAGE and self._starts == 1:
                self._journal.write("gave up", why=ending.error)
                return USAGE
            if ending.result or self._stop:
                self._journal.write("stopped", step=self._newest_step())
                return self._in_vain() or self._leave(self._stop or "the ranks were told to stop")
            if code := self._failure("crash", ending.error, ending.code):
                return code

    def _on_signal(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        self._stop = self._stop or name
        self._journal.write("stopping", signal=name)
        if self._step:
            self._step.send_signal(signal.SIGUSR1)  # srun forwards it to the ranks

    # Before training

    def _choose(self) -> list[str]:
        """Nodes to train on, cluster.nodes of them or as few as allowed. Raises _NotReady."""
        held = self._allocation.nodes()
        self._copy_environment(held)
        well = self._look_at(held)
        while True:
            bad = set(held) - set(well)
            if len(well) < self._cluster.fewest_nodes:
                rule = f"{len(well)} of {len(held)} nodes are well, {self._cluster.fewest_nodes} are needed"
                # What all of them suffer from is not theirs: a store, the shared disk.
                raise _NotReady(rule, bad if well or len(held) == 1 else set())
            # Where ranks have died before comes last.
            chosen = sorted(well, key=lambda name: self._blame[name])[: self._cluster.nodes]
            chosen = [name for name in held if name in chosen]
            came = self._all_reduce(chosen)
            if came == set(chosen) and not self._stop:  # once more, at another port: this one may be taken
                came = self._all_reduce(chosen)
            if self._stop:
                raise _NotReady("a signal came", bad)
            if came is None:
                return chosen
            if came == set(chosen):  # nothing tells which of them is to blame
                raise _NotReady(f"all-reduce over {', '.join(chosen)} failed; it says more above", bad)
            well = [name for name in well if name in came or name not in chosen]

    def _look_at(self, nodes: list[str]) -> list[str]:
        """Those that pass the pre-flight."""
        words = ["--node", *self._program.arguments, "--sent", f"{time.time():.0f}"]
        answers = self._ask(nodes, 1, "launch/doctor.py", words, PREFLIGHT_S)
        reports = {answer["node"]: answer for answer in answers if "checks" in answer}
        for name in nodes:
            report = reports.get(name)
            if report is None:
                self._journal.write("excluded", node=name, why="no answer to the pre-flight")
            elif not report["ok"]:
                why = "; ".join(f"{check['name']}: {check['told']}" for check in report["checks"] if not check["ok"])
                self._journal.write("excluded", node=name, why=why)
        return [name for name in nodes if reports.get(name, {}).get("ok")]

    def _all_reduce(self, nodes: list[str]) -> set[str] | None:
        """Have all ranks of the nodes add something up. If that fails, returns the nodes all of whose ranks have
        started."""
        answers = self._ask(nodes, self._cluster.ranks, "launch/doctor.py", ["--all-reduce"], ALL_REDUCE_S)
        for answer in answers:
            if "all_reduce_gb_s" in answer:
                say(f"all-reduce over {answer['ranks']} ranks: {answer['all_reduce_gb_s']:.2f} GB/s")
                return None
        arrived = collections.Counter(answer["node"] for answer in answers if "arrived" in answer)
        came = {name for name in nodes if arrived[name] == self._cluster.ranks}
        for name in set(nodes) - came:
            why = f"{arrived[name]} of {self._cluster.ranks} ranks came to the all-reduce"
            self._journal.write("excluded", node=name, why=why)
        return came

    def _ask(
        self, nodes: list[str], tasks: int, file: str, arguments: Sequence[str], patience_s: int
    ) -> list[dict[str, Any]]:
        """The JSON lines that a program prints on the nodes; what else it says goes to the log."""
        # Each task into a file of its own: srun hands on what they say in pieces of 1 KiB, as they come.
        with tempfile.TemporaryDirectory(
            dir=self._program.folder / SLURM, prefix="answers-", ignore_cleanup_errors=True
        ) as answers:
            command = [*self._srun(nodes, tasks), "--kill-on-bad-exit=0", f"--output={answers}/%t", "--error=all"]
            command += [*self._python(), str(self._program.code / file), *arguments]
            self._step = subprocess.Popen(command, text=True, env=self._env(nodes))
            try:
                self._step.wait(patience_s)
            except subprocess.TimeoutExpired:
                self._end_step()
            self._step = None
            lines = [line for path in sorted(Path(answers).iterdir()) for line in path.read_text().splitlines(True)]
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]

    def _end_step(self) -> int:
        assert self._step
        self._step.terminate()  # which ends its tasks as well
        try:
            return self._step.wait(LAST_WAIT_S)
        except subprocess.TimeoutExpired:
            self._step.kill()
            return self._step.wait()

    # Training

    def _attempt(self, nodes: list[str]) -> Ending:
        cluster, result = self._cluster, self._program.folder / "result.json"
        before = _identity(result)
        ranks = len(nodes) * cluster.ranks
        self._appoint_deputy(nodes)
        self._starts += 1
        self._answered = False
        self._journal.write("start", attempt=self._starts, nodes=nodes, ranks=ranks, step=self._newest_step())
        program = [self._program.code / self._program.file, *self._program.arguments, *self._program.more]
        program += ["--ranks", ranks, "--no-handoff"]
        if self._starts > 1 and self._program.config.resume.source == "never":
            program += ["--set", "resume.source=auto"]  # the checkpoints that are there now are this job's own
        command = [*self._srun(nodes, cluster.ranks), "--label", "--kill-on-bad-exit=1", *self._python(), *program]
        self._step = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._env(nodes),
        )
        said = collections.deque[str](maxlen=400)
        died = threading.Event()
        listener = threading.Thread(target=self._listen, args=(self._step.stdout, said, died))
        listener.start()
        code = self._wait(lambda: died.is_set() or _identity(result) not in (before, None))
        listener.join()
        document = json.loads(result.read_text()) if _identity(result) not in (before, None) else None
        return Ending(code, document, _why(said) or f"exit code {code}")

    def _listen(self, lines: IO[str], said: collections.deque[str], died: threading.Event) -> None:
        """Log what srun and the ranks say, and note whose ranks die."""
        with lines:
            for line in lines:
                print(line, end="", flush=True)
                said.append(_LABEL.sub("", line.rstrip()))
                self._answered = self._answered or STOPPING in line
                if (dead := re.match(r"srun: error: (\S+): tasks? ", line)) and not died.is_set():
                    self._blame[dead[1]] += 1  # the others fall because it has
                    died.set()

    def _wait(self, is_over: Callable[[], bool]) -> int:
        """For the ranks. Returns srun's exit code."""
        assert self._step
        over_since: float | None = None
        while True:
            try:
                code = self._step.wait(POLL_S)
                break
            except subprocess.TimeoutExpired:
                if self._stop and not self._answered:
                    # One that came before the ranks were started is lost: srun does not keep it for them.
                    self._step.send_signal(signal.SIGUSR1)
                if over_since is None:
                    over_since = time.monotonic() if is_over() else None
                elif time.monotonic() - over_since > LAST_WAIT_S:
                    # It waits without end for a node that does not answer any more, though all ranks are gone.
                    say(f"srun has not ended {LAST_WAIT_S} s after the ranks: ending it")
                    code = self._end_step()
                    break
        self._step = None
        return code

    def _appoint_deputy(self, nodes: list[str]) -> None:
        """Have another node watch this one. A step that does not end by itself: SLURM ends it with the job."""
        if self._deputy and self._deputy.poll() is None:
            return
        if others := [name for name in nodes if name != node_name()]:
            # On its own, without this node's srun: neither input from it nor output to it.
            alone = ["--input=none", f"--output={self._program.folder / DEPUTY_LOG}", "--open-mode=append"]
            command = [*self._srun(others[-1:], 1), *alone, sys.executable]
            command += [str(self._program.code / "launch/supervise.py")]
            command += ["--deputy-of", node_name()]
            quiet = subprocess.DEVNULL  # its end is no news
            self._deputy = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=self._env(others[-1:]))

    def _copy_environment(self, nodes: list[str]) -> None:
        """Have each node make its own copy, if that is wanted and not done yet. One that cannot will not answer to the
        pre-flight."""
        if not self._cluster.environment.copy_to_scratch:
            return
        copy = f"""set -e; to="{self._copied()}"; if [ -d "$to" ]; then exit; fi; mkdir -p "$(dirname "$to")"
            part=$(mktemp -d "$to.XXXXXX"); trap 'rm -rf "$part"' EXIT; cp -a {shlex.quote(sys.prefix)}/. "$part"
            mv -T "$part" "$to" || [ -d "$to" ]"""
        subprocess.run([*self._srun(nodes, 1), "--kill-on-bad-exit=0", "bash", "-c", copy], env=self._env(nodes))

    def _copied(self) -> str:
        """Where the copy of this environment lies, with variables for the node's shell."""
        made = (Path(sys.prefix) / "pyvenv.cfg").stat().st_mtime_ns if sys.prefix != sys.base_prefix else 0
        key = hashlib.sha256(f"{sys.prefix} {made}".encode()).hexdigest()[:12]
        return f"{self._cluster.scratch}/environment-{key}"

    def _python(self) -> list[str]:
        environment = self._cluster.environment
        if environment.container:
            gpus = ["--nv"] if self._cluster.gpus_per_node else []
            return ["apptainer", "exec", *gpus, environment.container, "python"]
        if environment.copy_to_scratch:
            return ["bash", "-c", f'exec "{self._copied()}/bin/python" "$@"', "python"]
        return [sys.executable]

    def _srun(self, nodes: list[str], tasks: int) -> list[str]:
        """The start of a command that runs `tasks` tasks on each of the nodes; ranks that follow each other share
        one."""
        cluster = self._cluster
        granted = int(os.environ.get("SLURM_CPUS_PER_TASK") or cluster.ranks * cluster.cpus_per_rank)
        return [
            "srun",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={tasks * len(nodes)}",
            f"--ntasks-per-node={tasks}",
            f"--cpus-per-task={max(1, granted // tasks)}",
            "--distribution=block",
            "--overlap",  # with a step that SLURM still believes in, though the node or its slurmstepd is lost
        ]

    def _env(self, nodes: list[str]) -> dict[str, str]:
        """The ranks meet at the first node's address as SLURM knows it: its name may mean nothing to the resolver."""
        about = ask("scontrol", "show", "node", nodes[0], "--oneliner")
        address = re.search(r"\bNodeAddr=(\S+)", about)
        # What SLURM says of the whole job's shape would be taken for the step's.
        shape = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_CPUS_PER_TASK", "SLURM_TASKS_PER_NODE", "SLURM_NNODES")
        kept = {name: value for name, value in os.environ.items() if name not in shape}
        return {**kept, "MASTER_ADDR": address[1] if address else nodes[0]}

    # After it

    def _newest_step(self) -> int:
        commits = (self._program.folder / "checkpoints").glob("step-*/COMMIT.json")
        return max((int(commit.parent.name[5:]) for commit in commits), default=0)

    def _in_vain(self) -> int | None:
        """Counts a stretch that its time limit has ended without a newer checkpoint. Returns the exit code where there
        have been too many."""
        step = self._newest_step()
        if self._stop != TIME_LIMIT or step != self._first_step or self._is_called_off:
            return None
        if self._allocation.is_preempted():
            return None
        error = f"the time limit (cluster.time {self._cluster.time}) came before a checkpoint after step {step}"
        remedy = "raise it, or save more often (checkpoint.every_minutes, train.save_every)"
        return self._failure("no progress", f"{error}: {remedy}", REQUEUE)

    def _failure(self, event: str, error: str, code: int = FAILED) -> int | None:
        """Notes it. Returns the exit code where there have been too many without a newer checkpoint, whether or not the
        job was preempted in between."""
        step, failures = self._newest_step(), 1
        earlier = [each for each in self._journal.of_this_job() if each["event"] in FAILURES]
        if earlier and earlier[-1]["step"] == step:
            failures = earlier[-1]["restarts"] + 1
        self._journal.write(event, code=code, step=step, restarts=failures, error=error)
        if failures <= self._cluster.max_restarts:
            return None
        why = f"{failures} failures without a checkpoint after step {step}, the last one: {error}"
        self._journal.write("gave up", why=why)
        return FAILED

    @property
    def _is_called_off(self) -> bool:
        """Whether a person wants the run to stop."""
        return (self._program.folder / STOP).exists()

    def _leave(self, why: str, exclude: Iterable[str] = ()) -> int:
        """Go back into the queue, unless a person wants the run to stop."""
        if self._is_called_off:
            say(f"{why}; {self._program.folder / STOP} says that this is all")
            return REQUEUE
        if self._allocation.is_ending():  # a job that somebody has cancelled would be taken back
            self._journal.write("ended", why=f"{why}: SLURM has ended the job, and queues it again itself or never")
            return REQUEUE
        self._journal.write("requeue", why=why)
        try:
            if exclude and self._cluster.exclude:
                exclude = {*exclude, *ask("scontrol", "show", "hostnames", self._cluster.exclude).split()}
            self._stop = None
            self._allocation.requeue(set(exclude))
            # An exit code of this job's own, before SLURM ends it, might be taken for the end of the job.
            until = time.monotonic() + LAST_WAIT_S
            while not self._stop and time.monotonic() < until:
                time.sleep(0.1)
        except ExternalError as error:  # a job that is being cancelled, say
            self._journal.write("gave up", why=f"SLURM does not requeue the job: {error}")
        return REQUEUE


def deputise(allocation: Allocation, first: str) -> None:
    """Queue the job again once its first node is lost, and the supervisor with it: SLURM would let it go on with nobody
    at work, because of --no-kill, until its time is up."""
    while True:
        time.sleep(DEPUTY_S)
        try:
            if first not in allocation.nodes():
                say(f"{first} is lost: queueing the job again")
                allocation.requeue(set())  # upon which SLURM ends this, too
        except Exception as error:  # nobody else is left to do it
            say(f"not yet: {error}")


def say(what: str) -> None:
    print(f"[{time.strftime('%F %T')}] {what}", file=sys.stderr, flush=True)


def _told(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _why(said: Sequence[str]) -> str:
    """Of the last things that were said, the one that tells what has gone wrong."""
    telling = [line for line in said if _WHY.search(line)]
    own = [line for line in telling if not line.startswith(("srun:", "slurmstepd"))]
    return (own or telling or [*said] or [""])[-1].strip()
