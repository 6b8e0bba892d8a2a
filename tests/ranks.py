"""Ranks as forks of one process that has imported everything: they start in a second instead of eight.

test ──start(target, environment)──▶ fork server (tests/preload.py) ──fork──▶ rank, its output in files

On a GPU each is a new interpreter, because CUDA does not survive a fork.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 600.0
"""Longest that a test waits for what takes seconds on an idle machine: a busy one takes many times as long."""


@functools.cache
def _context() -> Any:
    import torch  # takes seconds, for nothing in ranks that were forked

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


class Rank:
    """A running process, with as much of subprocess.Popen's interface as is used here."""

    def __init__(
        self,
        target: str,
        arguments: Sequence[object],
        environment: Mapping[str, object],
        log: Path,
        folder: Path = ROOT,
    ) -> None:
        """Run a module ("tests.workers.legs") or a file ("launch/pretrain.py") as a program, in `folder`.

        Its output goes to `log` with the suffixes .out and .err: files, because a pipe fills up while nobody reads.
        """
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).write_bytes(b"")  # there from the start, for who wants to read
        environment = {name: str(value) for name, value in environment.items()}
        self._process = _context().Process(target=_run, args=(target, [*map(str, arguments)], environment, log, folder))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    ranks: int, target: str, arguments: Sequence[object], logs: Sequence[Path], folder: Path = ROOT
) -> list[Rank]:
    """One process a rank, which find each other as under a launcher."""
    port = free_port()
    return [
        Rank(
            target,
            arguments,
            {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                **({"PVT_TEST_BACKEND": "gloo"} if ranks > 1 else {}),  # on one GPU as on none
            },
            logs[rank],
            folder,
        )
        for rank in range(ranks)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(target: str, arguments: list[str], environment: dict[str, str], log: Path, folder: Path) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(environment)
    os.chdir(folder)
    if target.endswith(".py"):
        sys.argv = [target, *arguments]
        runpy.run_path(str(ROOT / target), run_name="__main__")
    else:
        sys.argv = [target, *arguments]
        runpy.run_module(target, run_name="__main__", alter_sys=True)
