"""Signals that ask a run to stop: it saves, ends and is queued again.

    SIGINT, SIGTERM, SIGUSR1 ── the interpreter's C handler ──▶ socket ── thread ──▶ requested ──▶ the loop's next step
                                                                            └── a second signal, the deadline ──▶ exit

Handlers written in Python run on the main thread between its bytecodes, so not while a native collective waits for
another rank. The C handler writes to the socket at once.
"""

import logging
import os
import signal
import socket
import threading
import time
from typing import Any, NoReturn

from pipeline.errors import REQUEUE, STOPPING

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ECHO_S = 1.0
"""How soon the same signal is no second one: launchers forward what the batch system sends to every process anyway."""
_ONE_CAUSE_S = 5.0
"""How soon another signal is no second one: a batch system may announce the same thing in two ways, by SIGTERM to every
process and by SIGUSR1 through the batch script."""


class StopSignal:
    """A context manager, entered on the main thread, that turns a signal into a request.

    `deadline_s` after the first signal, or at a second one, the process ends with `exit_code` wherever it is. The same
    signal counts as a second one after a second, and another signal after five. Once SIGINT has come, only another
    SIGINT counts. SIGUSR1 never counts: a batch script repeats it until the ranks answer. A SIGINT that the process was
    started to ignore, as shells start jobs in the background, stays ignored.
    """

    def __init__(self, deadline_s: float, exit_code: int = REQUEUE) -> None:
        self._deadline_s = deadline_s
        self._exit_code = exit_code
        self.requested: str | None = None
        """The name of the first signal that this process was sent."""

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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        # Ends the thread.
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def _listen(self) -> None:
        # When each signal first came.
        first_s: dict[int, float] = {}
        while True:
            left_s = None
            if first_s:
                deadline = min(first_s.values()) + self._deadline_s
                left_s = max(0.001, deadline - time.monotonic())
            self._receiver.settimeout(left_s)
            try:
                numbers = self._receiver.recv(4096)
            except TimeoutError:
                self._force(f"not stopped {self._deadline_s:g} s after {self.requested}")
            if not numbers:
                return
            for number in numbers:
                # Other signals that Python handles come here, too.
                if number not in _SIGNALS:
                    continue
                name, now_s = signal.Signals(number).name, time.monotonic()
                if not first_s:
                    self.requested = name
                    rule = f"a second signal or {self._deadline_s:g} s force it"
                    log.warning(f"{name}: {STOPPING}; {rule}")
                elif _is_second(number, now_s, first_s):
                    self._force(f"{name} after {self.requested}")
                first_s.setdefault(number, now_s)

    def _force(self, reason: str) -> NoReturn:
        log.warning(f"{reason}: forced out, without saving")
        os._exit(self._exit_code)


def _is_second(number: int, now_s: float, first_s: dict[int, float]) -> bool:
    """Whether a signal means to end the process at once, given when each signal first came."""
    if number == signal.SIGUSR1:
        return False
    # Launchers hand on Ctrl-C as SIGTERM. DeepSpeed's does so to one rank after the other, and waits up to 30 s for
    # each before it turns to the next.
    if signal.SIGINT in first_s and number != signal.SIGINT:
        return False
    is_repeated = now_s - first_s.get(number, now_s) >= _ECHO_S
    return is_repeated or now_s - min(first_s.values()) >= _ONE_CAUSE_S
