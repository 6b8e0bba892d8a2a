"""The first ten minutes on a GPU: what is there, what is right, and how fast it is, with nothing lost when time is up.

python -m benchmarks.accept [--budget 540] [--device cuda] [--quick] [--out DIR]

    stages, each a process of its own ──▶ a line each in DIR/accept.jsonl ──▶ DIR/accept.md: rows for our documents

Every stage has its share of the budget, and what those before it have left of theirs. One that runs past it is ended
with all of its processes. What needs a package that is not installed is skipped, with the reason. Nothing is fetched
from a network. Lines are written as soon as stages end, so this command may be killed at any moment; started again with
the same DIR it goes on with the stages that are not done. `--quick` is for tests: the smallest sizes, and fewer stages.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import accept_table, report
from benchmarks.accept_stages import STAGES, Stage
from pipeline import cli, files
from pipeline.errors import InputError

GRACE_S = 3.0
"""For a process that was interrupted, to end its own."""
LEAST_S = 2.0
"""A stage that would have less is skipped."""

Line = dict[str, Any]


def main() -> dict[str, Any]:
    arguments = _arguments()
    if arguments.device == "cuda":
        _require_gpu()
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _set_environment(arguments.device)
    path = arguments.out / "accept.jsonl"
    lines = read(path)
    done = {line["command"] for line in lines if line["outcome"] == "done"}
    whole = sum(stage.share for stage in STAGES)
    processes = _processes(arguments.device)
    ends = time.monotonic()
    for stage in STAGES:
        ends += arguments.budget * stage.share / whole
        words = stage.words(arguments.out, quick=arguments.quick)
        if shlex.join(words or ()) in done:
            continue
        line = run(stage, words, ends - time.monotonic(), arguments.out / "logs", processes)
        line["quick"] = arguments.quick
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        _report(line)
        files.write(arguments.out / "accept.md", accept_table.page(lines).encode())
    outcomes = {line["stage"]: line["outcome"] for line in lines}  # of a stage that was repeated, the last
    return {"ok": not {"failed", "ended"} & set(outcomes.values()), "stages": outcomes, "table": str(arguments.out)}


def read(path: Path) -> list[Line]:
    """Returns the lines so far. The last one may have been cut off by the end of a machine."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def run(stage: Stage, words: Sequence[str] | None, limit_s: float, logs: Path, processes: Any) -> Line:
    """Runs a stage for at most `limit_s` seconds. Returns its line for accept.jsonl."""
    line = {"stage": stage.name, "command": shlex.join(words or ()), "limit_s": round(limit_s, 1), "seconds": 0.0}
    if words is None:
        return {**line, "outcome": "skipped", "reason": "skipped with --quick"}
    if missing := [name for name in stage.needs if not _is_installed(name)]:
        return {**line, "outcome": "skipped", "reason": f"needs {', '.join(missing)}, which is not installed"}
    if limit_s < LEAST_S:
        return {**line, "outcome": "skipped", "reason": "the budget is spent"}
    logs.mkdir(exist_ok=True)
    log = logs / stage.name.replace(" ", "-")
    began_s = time.monotonic()
    code = run_process(words, log, limit_s, processes)
    line["seconds"] = round(time.monotonic() - began_s, 1)
    printed, logged = (log.with_suffix(suffix).read_text(errors="replace").strip() for suffix in (".out", ".err"))
    line |= {"result": stage.read(log.with_suffix(".out")), "table": accept_table.rows_of(logged)}
    if code is None:
        return {**line, "outcome": "ended", "reason": f"it took longer than {limit_s:.0f} s"}
    if code:
        return {**line, "outcome": "failed", "reason": f"exit code {code}: {(logged or printed)[-2000:]}"}
    return {**line, "outcome": "done", "reason": ""}


def _processes(device: str) -> Any:
    """Returns the context that starts processes. For a GPU each is a new interpreter, because CUDA does not survive a
    fork. Else it is the fork of one that has imported what takes long."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step", "pipeline.job.training_job"])
    first = context.Process(target=int)  # which waits for these imports
    first.start()
    first.join()
    return context


def run_process(words: Sequence[str], log: Path, limit_s: float, processes: Any) -> int | None:
    """Returns the exit code of `python -m WORDS`, or None if it took too long. All that it started is ended."""
    process = processes.Process(target=_become, args=(list(words), log))
    process.start()
    try:
        process.join(limit_s)
        return process.exitcode
    finally:
        _end(process)


def _become(words: list[str], log: Path) -> None:
    """Turns this process into `python -m WORDS`, at the head of a process group, with its output in files."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _end(process: Any) -> None:
    """Ends a process and its group. One that still runs is interrupted first: it may have started other groups."""
    for number in (signal.SIGINT, signal.SIGKILL) if process.exitcode is None else (signal.SIGKILL,):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.join(GRACE_S)


def _is_installed(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
        # A folder that a package has left behind is found as well, and has no origin.
        return spec is not None and spec.origin is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _require_gpu() -> None:
    """Raises InputError on a machine where torch sees no GPU: the stages would take hours on its CPUs."""
    import torch  # takes seconds to import

    if not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch sees no GPU here; --device cpu --quick runs the smallest sizes on the CPU"
        )


def _set_environment(device: str) -> None:
    """Sets the variables of all stages. On a busy machine OpenMP's threads spin for minutes while they wait."""
    os.environ |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def _report(line: Line) -> None:
    reason = line["reason"].splitlines()[-1:]
    print(" ".join([f"{line['stage']}: {line['outcome']} after {line['seconds']:.0f} s", *reason]), file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accept", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=report.count, default=540, metavar="SECONDS", help="for all (default: 540)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, and fewer stages")
    parser.add_argument("--out", type=Path, default=Path("runs/accept"), metavar="DIR", help="(default: runs/accept)")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
