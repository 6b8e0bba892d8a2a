"""One trial: hostile input in a sandbox, commands that are given it, and what became of them.

Case ──▶ SANDBOX/work   what the commands read and write; their working directory
         SANDBOX/home   HOME and TMPDIR
         SANDBOX/beside what nothing may touch            ──▶ processes, watched ──▶ Verdict
"""

import dataclasses
import json
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from pipeline.errors import DONE, FAILED, USAGE
from tests.ranks import Rank

Verdict = Literal["refused", "skipped", "right", "crashed", "hung", "outside", "wrong"]
VERDICTS: tuple[Verdict, ...] = ("refused", "skipped", "right", "crashed", "hung", "outside", "wrong")
DEFECTS: tuple[Verdict, ...] = ("crashed", "hung", "outside", "wrong")

LIMIT_S = 120.0
"""Longest that a command may take. Idle, none takes more than ten seconds."""
LIMIT_BYTES = 4 << 30
"""Most memory of its own that a command's processes may hold together."""
MARK = "HOSTILE_MARK"
"""Environment variable that names the file which hostile code writes when it is run."""
_POLL_S = 0.05
_DALI = "\x1b[0;31m[ERROR] \x1b[0m"
"""What nvImageCodec, DALI's decoder, puts before its own messages."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys instead of showing; progress bars use \\r, which is allowed."""


class Ran(NamedTuple):
    """What a command did."""

    code: int
    result: dict[str, Any]
    """The last line of its standard output; empty where that is no JSON object."""
    output: str
    error: str
    hung: str
    """Why it had to be killed; empty where it ended by itself."""


Judge = Callable[[Sequence[Ran]], str]
"""Says what is wrong with the results of a case's commands; empty where nothing is."""


@dataclasses.dataclass
class Case:
    """Hostile input that lies in a sandbox, and what is done with it."""

    kind: str
    commands: Sequence[Sequence[str]]
    """Each a program, a file of the project or a module, with its arguments."""
    judge: Judge = lambda ran: ""
    inputs: int = 1
    """How many hostile inputs it holds."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Outcome(NamedTuple):
    kind: str
    inputs: int
    verdict: Verdict
    detail: str
    seconds: float
    peak_bytes: int


class Sandbox:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / "work"
        self.home = root / "home"
        self.beside = root / "beside"
        self.mark = root / "mark"
        for folder in (self.work, self.home, self.beside):
            folder.mkdir(parents=True)
        (self.beside / "letter.txt").write_text("untouched")

    def trespass(self) -> str:
        """Says what was changed outside of the folders that commands may write to."""
        if self.mark.exists():
            return "code of the input was run"
        found = sorted(str(path.relative_to(self.root)) for path in self.root.iterdir())
        beside = [path.name for path in self.beside.iterdir()]
        if found != ["beside", "home", "work"] or beside != ["letter.txt"]:
            return f"files beside the sandbox: {found}, {beside}"
        if (self.beside / "letter.txt").read_text() != "untouched":
            return "a file beside the sandbox was changed"
        return ""


def run(case: Case, sandbox: Sandbox) -> Outcome:
    """Run a case's commands in order, up to the first that has to be killed or crashes."""
    begun = time.monotonic()
    ran: list[Ran] = []
    peak = 0
    verdict: tuple[Verdict, str] | None = None
    for number, (program, *arguments) in enumerate(case.commands):
        done, memory = _watched(program, arguments, case, sandbox, number)
        peak = max(peak, memory)
        ran.append(done)
        if verdict := _failure(done):
            break
    if trespass := sandbox.trespass():
        verdict = "outside", trespass
    if verdict is None:
        wrong = case.judge(ran)
        verdict = ("wrong", wrong) if wrong else (_harmless(ran), "")
    told = f"{verdict[1]} [{' '.join(case.commands[len(ran) - 1])}]" if verdict[1] else ""
    return Outcome(case.kind, case.inputs, verdict[0], told, time.monotonic() - begun, peak)


def _watched(program: str, arguments: Sequence[str], case: Case, sandbox: Sandbox, number: int) -> tuple[Ran, int]:
    """Returns what a command did, and the most memory in bytes that it held."""
    environment = {
        "HOME": sandbox.home,
        "TMPDIR": sandbox.home,
        "PVT_MODEL_CACHE": sandbox.work / "models",
        MARK: sandbox.mark,
        **case.environment,
    }
    log = sandbox.home / f"command-{number}"
    process = Rank(program, arguments, environment, log, sandbox.work)
    deadline = time.monotonic() + LIMIT_S
    peak, hung = 0, ""
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        if peak > LIMIT_BYTES:
            hung = f"holds {peak >> 20} MiB of memory"
        elif time.monotonic() > deadline:
            hung = f"runs after {LIMIT_S:g} s"
        if hung:
            _kill(process)
        time.sleep(_POLL_S)
    output = log.with_suffix(".out").read_text(errors="replace")
    error = log.with_suffix(".err").read_text(errors="replace")
    code = process.returncode
    assert code is not None
    return Ran(code, _result(output), output, error, hung), peak


def _memory(pid: int) -> int:
    """Returns the bytes of memory of their own that a process and its children hold."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            status = Path(f"/proc/{each.pid}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            total += int(found[1]) << 10 if found else 0
    except (psutil.Error, OSError):  # it has ended
        return total
    return total


def _kill(process: Rank) -> None:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        children = []
    process.kill()
    for child in children:
        try:
            child.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
    process.wait()


def _result(output: str) -> dict[str, Any]:
    try:
        found = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _failure(ran: Ran) -> tuple[Verdict, str] | None:
    """Says how a command broke the rules that hold for every command."""
    if ran.hung:
        return "hung", ran.hung
    if "Traceback (most recent call last)" in ran.error:
        return "crashed", ran.error.strip().splitlines()[-1][:300]
    if ran.code not in (DONE, FAILED, USAGE):
        return "crashed", f"exit code {ran.code}: {ran.error[-300:]}"
    if ran.code != DONE and not ran.result and "error: " not in ran.error:
        return "crashed", f"exit code {ran.code} without a message: {ran.error[-300:]}"
    if "pydantic.dev" in ran.error or "[type=" in ran.error:
        return "wrong", "a message of pydantic's reached the user"
    if found := _CONTROL.search(ran.error.replace(_DALI, "") + ran.output):
        return "wrong", f"a control character was printed: {found[0]!r}"
    return None


def _harmless(ran: Sequence[Ran]) -> Verdict:
    if any(each.code != DONE for each in ran):
        return "refused"
    if any(each.result.get(name) for each in ran for name in ("skipped", "bad", "unreadable")):
        return "skipped"
    return "right"
