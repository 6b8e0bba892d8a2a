"""Signals that ask a run to stop: save, end, be queued again.

    SIGINT, SIGTERM, SIGUSR1 ── the interpreter's C handler ──▶ socket ── thread ──▶ requested ──▶ the loop's next step
                                                                            └── a second signal, the deadline ──▶ exit

Handlers written in Python run on the main thread between its bytecodes, so not while a native collective waits for
another rank. The C handler writes to the socket at once.
"""

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any, NoReturn

from pipeline.errors import REQUEUE, STOPPING

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ECHO_S = 1.0
"""Launchers forward a signal that the batch system sent to every process anyway: so soon, it is no second one."""
_ONE_CAUSE_S = 5.0
"""A batch system may say the same thing in two ways, SIGTERM to every process and SIGUSR1 through the batch script: the
other signal counts as a second one only when so much later."""


class StopSignal:
    """A context manager, entered on the main thread, that turns a signal into a request.

    `deadline_s` after the first signal, or at a second one, the process ends with `exit_code` wherever it is. A second
    one is the same again after a second, or another one after five; once SIGINT has come, another SIGINT alone. SIGUSR1
    never is: a batch script repeats it until the ranks answer. A SIGINT that the process was started to ignore, as
    shells start jobs in the background, stays ignored.
    """

    def __init__(self, deadline_s: float, exit_code: int = REQUEUE) -> None:
        self._deadline_s, self._exit_code = deadline_s, exit_code
        self.requested: str | None = None
        """Name of the first signal that this process was sent."""

    def __enter__(self) -> "StopSignal":
        assert threading.current_thread() is threading.main_thread()
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="stop signal", daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._previous: dict[signal.Signals, Any] = {}
        for number in _SIGNALS:
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, lambda *_: None)
            # Native code's system calls go on after the signal, since nothing has changed for them.
            signal.siginterrupt(number, False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._sender.close()  # ends the thread
        self._thread.join()
        self._receiver.close()

    def _listen(self) -> None:
        came_s: dict[int, float] = {}  # when each signal first did
        while True:
            left_s = max(0.001, min(came_s.values()) + self._deadline_s - time.monotonic()) if came_s else None
            self._receiver.settimeout(left_s)
            try:
                numbers = self._receiver.recv(4096)
            except TimeoutError:
                self._force(f"not stopped {self._deadline_s:g} s after {self.requested}")
            if not numbers:
                return
            # Other signals that Python handles come here too.
            for number in filter(_SIGNALS.__contains__, numbers):
                name, now_s = signal.Signals(number).name, time.monotonic()
                if not came_s:
                    self.requested = name
                    rule = f"a second signal or {self._deadline_s:g} s force it"
                    print(f"{name}: {STOPPING}; {rule}", file=sys.stderr, flush=True)
                elif _is_second(number, now_s, came_s):
                    self._force(f"{name} after {self.requested}")
                came_s.setdefault(number, now_s)

    def _force(self, reason: str) -> NoReturn:
        print(f"{reason}: forced out, without saving", file=sys.stderr, flush=True)
        os._exit(self._exit_code)


def _is_second(number: int, now_s: float, came_s: dict[int, float]) -> bool:
    """Whether a signal means to end the process at once, given when each signal first came."""
    if number == signal.SIGUSR1:
        return False
    if signal.SIGINT in came_s and number != signal.SIGINT:
        # Launchers hand on Ctrl-C as SIGTERM. DeepSpeed's does so to one rank after the other, and waits up to 30 s for
        # each before it turns to the next.
        return False
    return now_s - came_s.get(number, now_s) >= _ECHO_S or now_s - min(came_s.values()) >= _ONE_CAUSE_S
