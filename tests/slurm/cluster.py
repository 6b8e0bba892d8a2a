"""SLURM itself on loopback: munged, slurmctld and a slurmd for each of three nodes, which are all this machine.

Cluster ──start──▶ munged  slurmctld  slurmd × 3      in a folder of their own, on free ports
   │
   └──submit, hurry, kill, …──▶ Submitted: a run's folder and its job
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.ranks import PATIENCE_S, ROOT, free_port

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "shellcheck": "shellcheck",
}
NODES = ("n1", "n2", "n3")


def missing() -> list[str]:
    """Debian's packages that are not here."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None]


class Cluster:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.conf = folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def start(self) -> None:
        folder = self._folder
        for name in ("state", *NODES):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        # Ports at which ranks meet follow from the job's number, and other workers have clusters on this machine, too.
        first_job = 1 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        ports = ",".join(str(free_port()) for _ in NODES)
        self.conf.write_text(
            f"""ClusterName=test
FirstJobId={first_job}
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={free_port()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
MpiDefault=none
KillWait=120
SlurmdTimeout=10
NodeName=n[1-{len(NODES)}] NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=2
PartitionName=cpu Nodes=n[1-{len(NODES)}] Default=YES MaxTime=INFINITE State=UP
"""
        )
        munge = [f"--{what}={folder}/munge.{end}" for what, end in MUNGE.items()]
        self._run("munged", "munged", "--foreground", "--force", *munge)
        until(lambda: (folder / "munge.sock").exists(), PATIENCE_S)
        self._run("slurmctld", "slurmctld", "-D", "-f", self.conf)
        for name in NODES:
            self._run(name, "slurmd", "-D", "-N", name, "-f", self.conf)
        self.wait_for_idle_nodes()

    def _run(self, name: str, program: str, *arguments: object) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            path = shutil.which(program, path=self.env["PATH"])
            assert path
            self._daemons[name] = subprocess.Popen(
                [path, *map(str, arguments)], env=self.env, stdout=log, stderr=log, cwd=self._folder
            )

    def wait_for_idle_nodes(self) -> None:
        until(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES), PATIENCE_S)

    def processes(self, node: str) -> list[psutil.Process]:
        """Of jobs on a node, and the slurmstepd that each belongs to."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if (environment.get("SLURM_CONF"), environment.get("SLURMD_NODENAME")) == (str(self.conf), node):
                    family = [process, *(each for each in process.parents() if each.name().startswith("slurmstepd"))]
                    found |= {each.pid: each for each in family}
        return list(found.values())

    @contextlib.contextmanager
    def lost(self, node: str) -> Iterator[None]:
        """As when its power goes, until the block ends."""
        for process in [psutil.Process(self._daemons[node].pid), *self.processes(node)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._daemons[node].wait()
        try:
            yield
        finally:
            self._run(node, "slurmd", "-D", "-N", node, "-f", self.conf)
            self.wait_for_idle_nodes()

    def stop(self) -> None:
        """End what was started, the steps of jobs that are left among it."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.ask("scancel", "--user=root")
            until(lambda: not self.ask("squeue", "-h"), 30)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        if done.returncode and command[0] == "sinfo":
            return ""  # not up yet
        assert not done.returncode, (command, done.stdout, done.stderr)
        return done.stdout

    def submit(
        self, config: Path, *arguments: object, python: str | Path = sys.executable, **environment: str
    ) -> "Submitted":
        done = self.command("--config", config, *arguments, python=python, **environment)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        return Submitted(self, Path(result["run"]), result)

    def command(
        self, *arguments: object, python: str | Path = sys.executable, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.begin(*arguments, python=python, **environment)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def begin(
        self, *arguments: object, python: str | Path = sys.executable, **environment: str
    ) -> subprocess.Popen[str]:
        """launch/submit.py."""
        return subprocess.Popen(
            [python, "launch/submit.py", *map(str, arguments)],
            cwd=ROOT,
            env={**self.env, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


MUNGE = {"key-file": "key", "socket": "sock", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}


class Submitted:
    """A run that was submitted."""

    def __init__(self, cluster: Cluster, folder: Path, result: dict[str, Any]) -> None:
        self.cluster, self.folder, self.result = cluster, folder, result
        self.job: str = result["job"]

    @property
    def log(self) -> str:
        path = self.folder / "slurm/log"
        return path.read_text() if path.exists() else ""

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        path = self.folder / "slurm/events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in events if name in (None, event["event"])]

    def state(self) -> str:
        return self.cluster.ask("scontrol", "show", "job", self.job, "-o").partition("JobState=")[2].split()[0]

    def seconds(self) -> float:
        """How long the job has been running."""
        return time.time() - self.events("start")[-1]["time"]

    def wait_for_step(self, step: int, timeout_s: float = PATIENCE_S) -> None:
        """Until the ranks say that they have done it, or a later one."""
        begin = len(self.log)

        def done() -> bool:
            assert not self.events("gave up"), self.log[-3000:]
            self.hurry()
            return any(int(found) >= step for found in re.findall(r"step (\d+)/\d+  epoch", self.log[begin:]))

        until(done, timeout_s, lambda: self.log[-3000:])

    def wait(self, timeout_s: float = 2 * PATIENCE_S) -> str:
        """Until SLURM is done with the job. Returns its state. One that was queued again is started at once: SLURM
        would hold it back for two minutes."""

        def ended() -> bool:
            self.hurry()
            return self.state() not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")

        until(ended, timeout_s, lambda: self.log[-3000:])
        return self.state()

    def hurry(self) -> None:
        """Have a job that was queued again start now."""
        if "Reason=BeginTime" in self.cluster.ask("scontrol", "show", "job", self.job, "-o"):
            time.sleep(3)  # a credential as old as the last one's end would be revoked like it
            self.cluster.ask("scontrol", "update", f"JobId={self.job}", "StartTime=now")

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        name = f"{self.folder}/slurm/config.yaml"
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if name in line and any(word.endswith("launch/pretrain.py") for word in line) and "srun" not in line[0]:
                found.append(process)
        return found

    def kill_a_rank(self) -> None:
        self.ranks()[-1].send_signal(signal.SIGKILL)

    def kill_a_rank_and_its_slurmstepd(self) -> None:
        rank = self.ranks()[-1]
        for process in (rank.parent(), rank):
            assert process
            process.kill()


def until(done: Callable[[], bool], timeout_s: float, told: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"not after {timeout_s:g} s: {told()}"
        time.sleep(0.1)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
