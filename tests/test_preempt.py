"""Signals on real processes, whose main thread is inside native code where no Python handler would run."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import pytest

from pipeline.train.stop_signal import StopSignal
from tests.ranks import PATIENCE_S, ROOT

# A C function waits for standard input; ctypes lets the other threads run meanwhile.
SCRIPT = """
import ctypes, sys
from pipeline.train.stop_signal import StopSignal

with StopSignal(deadline_s=float(sys.argv[1])) as stop:
    print("ready", flush=True)
    num_read = ctypes.CDLL(None).read(0, ctypes.create_string_buffer(1), 1)
    print(num_read, stop.requested, flush=True)
"""


class Child:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        self.process, self.stdin, self.stdout, self.stderr = process, process.stdin, process.stdout, process.stderr

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end_native_call(self) -> str:
        """What the process prints then."""
        self.stdin.write("x")
        self.stdin.flush()
        return line(self.stdout)

    def ended(self) -> int:
        return self.process.wait(timeout=PATIENCE_S)


def line(stream: IO[str]) -> str:
    return stream.readline().rstrip("\n")


@contextlib.contextmanager
def child(deadline_s: float) -> Iterator[Child]:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(deadline_s)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            child = Child(process)
            assert line(child.stdout) == "ready"
            time.sleep(0.1)  # until the native call has begun
            yield child
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_requests_a_stop_during_native_code(number: signal.Signals) -> None:
    with child(deadline_s=100) as stopped:
        stopped.signal(number)
        # Printed by the thread, while the native call goes on.
        assert line(stopped.stderr) == f"{number.name}: stopping after this step; a second signal or 100 s force it"
        assert stopped.end_native_call() == f"1 {number.name}"
        assert stopped.ended() == 0


def test_stopping_before_the_deadline_exits_with_zero() -> None:
    with child(deadline_s=20) as stopped:
        stopped.signal(signal.SIGTERM)
        assert line(stopped.stderr).startswith("SIGTERM: ")
        assert stopped.end_native_call() == "1 SIGTERM"
        assert stopped.ended() == 0


# What depends on the time between signals. The scenarios wait for seconds each, so all of them play at once.


def repeated_signal_forces_exit_but_an_immediate_echo_does_not() -> None:
    with child(deadline_s=100) as stopped:
        stopped.signal(signal.SIGUSR1)
        assert line(stopped.stderr).startswith("SIGUSR1: ")
        stopped.signal(signal.SIGTERM)
        stopped.signal(signal.SIGUSR1)
        time.sleep(1.2)
        assert stopped.process.poll() is None
        stopped.signal(signal.SIGTERM)
        assert stopped.ended() == 85
        assert line(stopped.stderr) == "SIGTERM after SIGUSR1: forced out, without saving"


def sigusr1_repeated_after(first: signal.Signals) -> None:
    with child(deadline_s=100) as stopped:
        stopped.signal(first)
        assert line(stopped.stderr).startswith(f"{first.name}: ")
        for _ in range(5):
            time.sleep(1.1)
            stopped.signal(signal.SIGUSR1)
        assert stopped.end_native_call() == f"1 {first.name}"
        assert stopped.ended() == 0


def a_different_signal_before_five_seconds_does_not_force_exit() -> None:
    with child(deadline_s=100) as stopped:
        stopped.signal(signal.SIGUSR1)
        assert line(stopped.stderr).startswith("SIGUSR1: ")
        time.sleep(1)
        stopped.signal(signal.SIGTERM)
        time.sleep(4.2)
        assert stopped.process.poll() is None
        assert stopped.end_native_call() == "1 SIGUSR1"


def a_different_signal_after_five_seconds_forces_exit() -> None:
    with child(deadline_s=100) as stopped:
        stopped.signal(signal.SIGUSR1)
        assert line(stopped.stderr).startswith("SIGUSR1: ")
        time.sleep(5.2)
        stopped.signal(signal.SIGTERM)
        assert stopped.ended() == 85
        assert line(stopped.stderr) == "SIGTERM after SIGUSR1: forced out, without saving"


def sigterm_from_launcher_after_ctrl_c_does_not_force_exit() -> None:
    with child(deadline_s=100) as stopped:
        stopped.signal(signal.SIGINT)
        assert line(stopped.stderr) == "SIGINT: stopping after this step; a second signal or 100 s force it"
        time.sleep(0.3)
        stopped.signal(signal.SIGTERM)
        time.sleep(5.5)
        stopped.signal(signal.SIGTERM)  # of a launcher that waited for another rank first
        time.sleep(0.2)
        assert stopped.process.poll() is None
        stopped.signal(signal.SIGINT)
        assert stopped.ended() == 85
        assert line(stopped.stderr) == "SIGINT after SIGINT: forced out, without saving"


def preempt_deadline_forces_exit() -> None:
    with child(deadline_s=1.5) as stopped:
        began = time.monotonic()
        stopped.signal(signal.SIGTERM)
        assert stopped.ended() == 85
        assert 1.4 < time.monotonic() - began < 100
        assert stopped.stderr.read().splitlines()[1:] == ["not stopped 1.5 s after SIGTERM: forced out, without saving"]


SCENARIOS = {
    "repeated signal": repeated_signal_forces_exit_but_an_immediate_echo_does_not,
    "SIGUSR1 repeated after SIGTERM": lambda: sigusr1_repeated_after(signal.SIGTERM),
    "SIGUSR1 repeated after itself": lambda: sigusr1_repeated_after(signal.SIGUSR1),
    "another signal soon": a_different_signal_before_five_seconds_does_not_force_exit,
    "another signal late": a_different_signal_after_five_seconds_forces_exit,
    "SIGTERM after Ctrl-C": sigterm_from_launcher_after_ctrl_c_does_not_force_exit,
    "deadline": preempt_deadline_forces_exit,
}


@pytest.fixture(scope="module")
def playing() -> Iterator[dict[str, Future[None]]]:
    """By name the scenarios, which have begun."""
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {name: pool.submit(play) for name, play in SCENARIOS.items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_time_between_signals_decides_whether_they_force_exit(playing: dict[str, Future[None]], scenario: str) -> None:
    playing[scenario].result()


def test_ignored_sigint_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal(deadline_s=100) as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            deadline = time.monotonic() + 30
            while stop.requested is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert stop.requested == "SIGTERM"
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_signals_keep_their_handlers() -> None:
    previous = signal.signal(signal.SIGUSR2, signal.default_int_handler)
    try:
        with StopSignal(deadline_s=100) as stop:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGUSR2)
            time.sleep(0.1)
        assert stop.requested is None
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_signal_handlers_are_restored_on_exit() -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        threads = threading.active_count()
        with pytest.raises(ValueError, match="inside"), StopSignal(deadline_s=100) as stop:
            raise ValueError("inside")
        assert threading.active_count() == threads
        assert signal.set_wakeup_fd(-1) == -1
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        assert stop.requested is None
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, previous)
