"""benchmarks.accept: what ends, fails, is missing or is cut off is told, and nothing that was found is lost."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accept, accept_table
from benchmarks.accept_stages import STAGES, Stage, outcomes
from pipeline.errors import InputError
from tests.ranks import PATIENCE_S, ROOT

SPAWN = multiprocessing.get_context("spawn")
STUCK = Stage("stuck", "tests.workers.stuck", 1)
HELP = Stage("help", "json.tool --help", 1)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def run(stage: Stage, limit_s: float, folder: Path) -> dict[str, Any]:
    return accept.run(stage, stage.words(folder, quick=False), limit_s, folder / "logs", SPAWN)


@pytest.mark.slow
def test_accept_runs_all_quick_stages_on_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.accept", "--device", "cpu", "--quick", "--budget", "1800"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "accept.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage.name for stage in STAGES]
    assert {line["stage"] for line in lines if line["outcome"] == "skipped"} == {
        stage.name for stage in STAGES if stage.quick is None
    }
    results = {line["stage"]: line["result"] for line in lines if line["outcome"] == "done"}
    assert all(results.values()), results
    assert results["tests"]["passed"] == 1
    assert results["decoding"]["differences"].keys() == {"torch"}
    assert results["launches"]["per_step"]["operators"] > 100
    assert results["steps at 128"]["models"].keys() == {"pvt_tiny"}
    page = (tmp_path / "accept.md").read_text()
    assert f"torch {results['versions']['imports']['torch']['version']}" in page
    for name in results:
        assert f"| {name} | done |" in page
    again = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert again.returncode == 0
    assert "done after" not in again.stderr


def test_timed_out_stage_is_killed_with_its_children(tmp_path: Path) -> None:
    line = run(STUCK, 5.0, tmp_path)
    assert (line["outcome"], line["reason"]) == ("ended", "it took longer than 5 s")
    assert line["seconds"] < 5 + 2 * accept.GRACE_S + 2
    assert not is_alive(line["result"]["child"])


def test_failed_stage_reports_reason(tmp_path: Path) -> None:
    line = run(Stage("fails", "benchmarks.order --no-such-option", 1), 300.0, tmp_path)
    assert line["outcome"] == "failed"
    assert line["reason"].startswith("exit code 2: ")
    assert "unrecognized arguments: --no-such-option" in line["reason"]


def test_stage_that_cannot_run_is_skipped_with_reason(tmp_path: Path) -> None:
    missing = run(HELP._replace(needs=("json", "no_such.package")), 60.0, tmp_path)
    assert (missing["outcome"], missing["reason"]) == ("skipped", "needs no_such.package, which is not installed")
    late = run(HELP, 0.5, tmp_path)
    assert (late["outcome"], late["reason"]) == ("skipped", "the budget is spent")


@pytest.fixture
def stopped(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, int, int]]:
    """A folder whose second stage was at work when a signal came, that stage's child, and the exit code."""
    script = """
from benchmarks import accept
from tests.test_accept import HELP, SPAWN, STUCK
accept.STAGES = (HELP, STUCK)
accept._processes = lambda device: SPAWN  # which need none of what is imported for the real stages
accept.cli.run(accept.main)
"""
    command = [sys.executable, "-c", script, "--device", "cpu", "--out", tmp_path]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    output, deadline = tmp_path / "logs/stuck.out", time.monotonic() + PATIENCE_S
    while not (output.exists() and output.read_text().endswith("\n")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = json.loads(output.read_text())["child"]
    process.send_signal(request.param)
    code = process.wait(60)
    yield tmp_path, child, code
    if is_alive(child):
        os.killpg(os.getpgid(child), signal.SIGKILL)


@pytest.mark.parametrize("stopped", [signal.SIGTERM, signal.SIGKILL], indirect=True)
def test_finished_stages_are_kept_when_accept_is_killed(stopped: tuple[Path, int, int]) -> None:
    folder, child, code = stopped
    (line,) = accept.read(folder / "accept.jsonl")
    assert (line["stage"], line["outcome"]) == ("help", "done")
    assert "| help | done |" in (folder / "accept.md").read_text()
    assert code in (128 + signal.SIGTERM, -signal.SIGKILL)
    if code > 0:
        assert not is_alive(child)


def test_truncated_result_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "accept.jsonl"
    assert accept.read(path) == []
    path.write_text('{"stage": "versions"}\n{"stage": "deco')
    assert accept.read(path) == [{"stage": "versions"}]


def test_pytest_outcomes_are_read_from_partial_output(tmp_path: Path) -> None:
    path = tmp_path / "tests.out"
    path.write_text("""
tests/test_a.py::test_one[fp32-a b] PASSED [ 25%]
tests/test_a.py::test_one[fp16] FAILED [ 50%]
[gw1] [ 75%] PASSED tests/test_b.py::test_two
tests/test_b.py::test_three
FAILED tests/test_a.py::test_one[fp16] - assert 1 == 2
""")
    assert outcomes(path) == {
        "passed": 2,
        "failed": 1,
        "tests": {"tests/test_a.py::test_one": {"passed": 1, "failed": 1}, "tests/test_b.py::test_two": {"passed": 1}},
    }
    path.write_text("")
    assert outcomes(path) is None


def line(stage: str, result: Any, **more: Any) -> dict[str, Any]:
    empty = {"outcome": "done", "reason": "", "seconds": 1.0, "limit_s": 2.0, "quick": False, "command": "x"}
    return {"stage": stage, "result": result, **empty, **more}


def test_verified_row_reports_stage_outcome() -> None:
    passes = {test: {"passed": 2} for test in accept_table.ROWS[0].tests}
    begins = f"| {accept_table.ROWS[0].begins}"

    def row(tests: Any, **more: Any) -> str:
        rows = accept_table.verified_rows({"tests": line("tests", {"tests": tests}, **more)})
        return next((row for row in rows if row.startswith(begins)), "")

    assert row(passes).endswith("| as on a CPU (4 tests) |")
    assert row(passes).count("|") == 4
    name, *_ = passes
    assert row({**passes, name: {"passed": 1, "failed": 2}}).endswith("| FAILED: 2 of 5 tests |")
    assert row({name: {"passed": 1}}) == ""  # the other was not reached
    assert row(passes, quick=True) == ""
    kills = {"kills": 3, "bit_identical": True, "trace_identical": True, "metrics_identical": False}
    (told,) = accept_table.verified_rows({"kill and resume": line("kill and resume", kills)})
    assert told.endswith("| 3 SIGKILLs, one rank: DIFFERS |")


@pytest.mark.parametrize("row", accept_table.ROWS, ids=lambda row: row.begins)
def test_table_rows_match_the_document_and_existing_tests(row: accept_table.Row) -> None:
    document = accept_table.VERIFICATION.read_text()
    assert len(re.findall(rf"^\| {re.escape(row.begins)}", document, re.MULTILINE)) == 1
    assert bool(row.tests) != bool(row.stage)
    assert row.stage in {"", *(stage.name for stage in STAGES)}
    for test in row.tests:
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text()


def test_accept_without_gpu_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["accept", "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=r"^--device cuda: torch sees no GPU here; --device cpu"):
        accept.main()
    assert not (tmp_path / "out").exists()
