"""A save that crashes at any of its system calls leaves the last whole checkpoint to be found, and nothing in the way.

strace kills the saving process as it enters a call, so between any two calls there is a crash. A patched `open`
would not see what compiled code writes.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.train.checkpoint import Checkpoints
from pipeline.train.checkpoint_files import COMMIT, damage
from pipeline.world import World
from tests.chaos.saves import IDENTITY
from tests.ranks import ROOT

# All that changes a file system or makes a change lasting; "?": not every architecture has it.
CALLS = (
    "openat,?open,?creat,?mkdir,mkdirat,write,writev,pwrite64,pwritev,ftruncate,fallocate,?sendfile,copy_file_range,"
    "fsync,fdatasync,?rename,?renameat,renameat2,?link,linkat,?symlink,symlinkat,?unlink,unlinkat,?rmdir,?chmod,fchmod,"
    "fchmodat"
)


@dataclasses.dataclass(frozen=True)
class Call:
    """The `number`-th system call of its name that the process makes on the path."""

    name: str
    path: str
    number: int
    line: str = dataclasses.field(compare=False)


class Server:
    """tests/chaos/saves.py, which forks a process for each save."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.saves"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while self._answer() != "ready":
            pass

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the server has ended"
        return line.rstrip("\n")

    def _say(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def save(self, folder: Path, step: int) -> int:
        """Returns the exit code."""
        self._say(f"{folder} {step}\n")
        self._answer()
        self._say("\n")
        return int(self._answer())

    def save_traced(self, folder: Path, step: int, *options: str) -> tuple[int, list["Call"]]:
        """Returns the exit code and the calls below the folder that strace saw, with the options given."""
        self._say(f"{folder} {step}\n")
        child = self._answer()
        log = folder.with_name("strace.log")
        log.unlink(missing_ok=True)
        command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-p", child, "-e", f"trace={CALLS}", *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr
            attached = tracer.stderr.readline()
            assert "attached" in attached, attached + tracer.stderr.read()
            self._say("\n")
            code = int(self._answer())
        return code, calls_below(folder, log.read_text().splitlines())

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if shutil.which("strace") is None:
        # Without it nothing below proves anything, so where it must be there its absence must not pass.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("strace is not installed")
    server = Server()
    yield server
    server.close()


def calls_below(folder: Path, log: list[str]) -> list[Call]:
    """Those that change something, in order. A call belongs to the path that strace's -P has to be given to see it."""
    calls: list[Call] = []
    numbers: Counter[tuple[str, str, str]] = Counter()
    for line in log:
        if not (match := re.match(r"(\d+) +(\w+)\((.*)", line)):
            continue  # an exit, or the rest of a call that another thread's came between
        thread, name, arguments = match.groups()
        descriptor = re.match(r"(?:\d+|AT_FDCWD)<(.*?)>", arguments)
        named = re.search(r'"(/[^"]*)"', arguments)
        path = named[1] if named else descriptor[1] if descriptor else ""
        numbers[thread, name, path] += 1
        if Path(path).is_relative_to(folder) and "O_RDONLY" not in arguments:
            calls.append(Call(name, path, numbers[thread, name, path], line))
    ambiguous = [call for call, count in Counter(calls).items() if count > 1]
    assert not ambiguous, f"two threads make the same call on the same path: {ambiguous}"
    return calls


def find(folder: Path) -> Path | None:
    return Checkpoints(folder, World(), IDENTITY).find("auto", [])


@pytest.mark.parametrize("over_remains", [False, True], ids=["fresh", "over remains"])
def test_checkpoint_save_survives_crash_at_any_system_call(server: Server, tmp_path: Path, over_remains: bool) -> None:
    before, folder = tmp_path / "before", tmp_path / "checkpoints"
    older, newer, next_one = (folder / f"step-{step:08d}" for step in (1, 2, 3))
    assert server.save(before, 1) == 0

    def reset() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    reset()
    if over_remains:
        # What a crash right before the commit leaves.
        path = newer / f".{COMMIT}.partial"
        assert server.save_traced(folder, 2, "-P", str(path), "-e", "inject=openat:signal=KILL")[0] == -9
        shutil.rmtree(before)
        shutil.copytree(folder, before)
        reset()

    code, calls = server.save_traced(folder, 2)
    assert code == 0
    assert find(folder) == newer
    (commit,) = [
        number
        for number, call in enumerate(calls)
        if call.name.startswith("rename") and f"{COMMIT}.partial" in call.path
    ]
    for number, call in enumerate(calls):
        reset()
        code, seen = server.save_traced(
            folder, 2, "-P", call.path, "-e", f"inject={call.name}:signal=KILL:when={call.number}"
        )
        assert code == -9, call
        assert seen[-1] == call, f"crashed in {seen[-1].line}, not in {call.line}"
        assert find(folder) == (newer if number > commit else older), call.line
        assert server.save(folder, 3) == 0, call.line
        assert find(folder) == next_one, call.line
        assert damage(next_one) is None
        assert {path.name for path in folder.iterdir()} == {next_one.name}, f"left behind after {call.line}"
    names = Counter(call.name for call in calls)
    print(f"{len(calls)} crashes: {dict(names)}")
    assert len(calls) > 30
    assert names.keys() >= {"openat", "write", "fsync"}
    assert {call.path for call in calls if call.name == "write"} == {
        f"{newer}/.{name}.partial"
        for name in (
            "model.safetensors",
            "ema.safetensors",
            "optimizer-0.safetensors",
            "state.json",
            "part-0.json",
            COMMIT,
        )
    }


def test_checkpoint_files_are_synced_before_commit(server: Server, tmp_path: Path) -> None:
    """A crash of the process does not show what has not reached the disk; the order of calls does."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    code, calls = server.save_traced(folder, 2)
    assert code == 0
    unsynced: set[str] = set()
    for call in calls:
        name = call.name.removesuffix("at").removesuffix("at2")
        if name in ("mkdir", "rename"):
            assert name == "mkdir" or call.path not in unsynced, f"renamed before it was synced: {call.line}"
            if f"{COMMIT}.partial" in call.path:
                assert not unsynced, f"not synced before the commit: {unsynced}"
            unsynced.add(str(Path(call.path).parent))
        elif name.startswith(("write", "pwrite", "ftruncate")):
            unsynced.add(call.path)
        elif name.startswith(("fsync", "fdatasync")):
            unsynced.discard(call.path)
    assert not unsynced, f"not synced at the end: {unsynced}"
