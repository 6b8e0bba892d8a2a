"""A run's folder as its readers find it: complete, cut short, and damaged."""

import json
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.run_folder import RunFolder, as_number, committed_checkpoints, finished_result, parse_lines


def test_damaged_lines_are_counted_except_a_truncated_last_one() -> None:
    assert parse_lines('{"a": 1}\n[2]\n\n{"a"\n{"b": 2}') == ([{"a": 1}, {"b": 2}], [2, 4])
    assert parse_lines('{"a": 1}\n{"b": ') == ([{"a": 1}], [])
    assert parse_lines("[" * 100_000 + "\n") == ([], [1])


def test_result_exists_once_the_run_has_ended(tmp_path: Path) -> None:
    assert finished_result(tmp_path) is None
    result = tmp_path / "result.json"
    result.write_text('{"steps": 7, "requeue": true}')
    assert finished_result(tmp_path) is None
    result.write_text('{"steps": 7}')
    assert finished_result(tmp_path) == {"steps": 7}
    result.write_text('{"steps"')
    with pytest.raises(InputError, match=r"result\.json"):
        finished_result(tmp_path)


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    for name in ("step-00000100", "step-00000020", "step-copy", ".step-00000030.discarded", "step-00000200"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "COMMIT.json").touch()
    (tmp_path / "step-00000200" / "COMMIT.json").unlink()
    assert list(committed_checkpoints(tmp_path)) == [20, 100]


def test_readings_and_evaluations_are_separated(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "val_loss": 3.0},
        {"step": None, "loss": 1.0},
        {"step": -1, "loss": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert RunFolder(tmp_path).metrics() == ([lines[0]], [lines[1]])


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_unreadable_file_is_empty_and_reported(tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path)
    assert run.document(name) == {}
    assert run.faults == []
    (tmp_path / name).write_text("[1")
    assert run.document(name) == {}
    assert [fault.partition(":")[0] for fault in run.faults] == [name]


def test_non_finite_values_are_not_numbers() -> None:
    assert [as_number(value) for value in (3, 0.5, True, "7", float("nan"), 10**400, None)] == [3, 0.5, *[None] * 5]
