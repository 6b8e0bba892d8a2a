"""Runs a program as ranks on this machine that find each other, and leaves none of them behind."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import USAGE

_POLL_S = 0.02


class Ended(NamedTuple):
    """How a group of ranks ended."""

    printed: str = ""
    """The standard output of rank 0."""
    failed: str = ""
    """The reason of a failure; empty where all ranks succeeded."""
    refused: bool = False
    """Whether a rank ended with the exit code of wrong usage."""


def run_ranks(program: list[str], ranks: int, limit_s: float) -> Ended:
    """Runs a program as `ranks` ranks, until all have ended, one of them has failed, or `limit_s` seconds have passed.

    Each rank is a process group of its own, which no longer exists when this function returns or raises.
    """
    with tempfile.TemporaryDirectory() as folder, _start_ranks(program, ranks, Path(folder)) as processes:
        deadline = time.monotonic() + limit_s
        while not any(process.poll() for process in processes):
            if all(process.returncode == 0 for process in processes):
                return Ended(Path(folder, "0.out").read_text())
            if time.monotonic() > deadline:
                return Ended(failed=f"not done within {limit_s:.0f} s")
            time.sleep(_POLL_S)
        failures = []
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                failures.append(_describe_failure(code, Path(folder, f"{rank}.err")))
    # A rank that runs out of memory makes others fail, which then report that they have lost a peer.
    for failure in failures:
        if "memory" in failure.failed.lower():
            return failure
    return failures[0]


@contextlib.contextmanager
def _start_ranks(program: list[str], ranks: int, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    # The cores that a batch system gives to a task are those of this command, and its ranks share them.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_find_free_port()),
    }
    processes = []
    try:
        # A rank that is being started when a signal arrives would not be in the list, and nobody would end it.
        with _delay_signals():
            for rank in range(ranks):
                processes.append(_start_rank(program, environment, rank, folder))
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _start_rank(program: list[str], environment: dict[str, str], rank: int, folder: Path) -> subprocess.Popen[bytes]:
    output_path = Path(folder, f"{rank}.out")
    errors_path = Path(folder, f"{rank}.err")
    with output_path.open("wb") as output, errors_path.open("wb") as errors:
        return subprocess.Popen(
            program,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            process_group=0,
        )


@contextlib.contextmanager
def _delay_signals() -> Iterator[None]:
    """Delivers the signals that would interrupt this process at the end of the block."""
    # Blocking them (pthread_sigmask) would not do: the kernel would give them to other threads.
    arrived: list[int] = []
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, lambda *received: arrived.append(received[0]))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in arrived:
        signal.raise_signal(number)


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _describe_failure(code: int, errors: Path) -> Ended:
    """Returns the ending of a rank that failed. `errors`: the file with its standard error."""
    if code == -signal.SIGKILL:
        return Ended(failed="killed, as the kernel does where memory runs out")
    if code < 0:
        return Ended(failed=f"ended by {signal.Signals(-code).name}")
    text = errors.read_text(errors="replace").strip()
    if code == USAGE:
        message = re.split(r"(?m)^error: ", text)[-1]
        return Ended(failed=message, refused=True)
    lines = text.splitlines() or ["without an error message"]
    return Ended(failed=lines[-1].removeprefix("error: "))
