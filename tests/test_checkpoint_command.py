"""launch/checkpoint.py: what it says of whole checkpoints is so, and it finds what was done to others."""

import contextlib
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
from safetensors.numpy import load_file, save_file

import pvt  # noqa: F401 - registers its models with timm
from pipeline.commands import checkpoint as checkpoint_command
from pipeline.config import GuardConfig
from pipeline.errors import InputError
from pipeline.train import checkpoint_files
from pipeline.train.guard import Guard
from tests.conftest import ROOT, run_ranks, write_config
from tests.ranks import PATIENCE_S

OLD, NEW = "step-00000002", "step-00000004"


@pytest.fixture(scope="module")
def saved(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with whole checkpoints of steps 2 and 4, saved by two ranks at stages 0 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, "legs", write_config(digits, folder), folder, "fp16", "checkpoints:0:2", "checkpoints:2:4")
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "checkpoints", tmp_path / "tiny" / "checkpoints")
    return tmp_path / "tiny"


def execute(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    command = [sys.executable, "launch/checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)


def result_of(*arguments: object) -> tuple[dict[str, Any], str]:
    """The command's result, in this process, and what it told beside it."""
    told = io.StringIO()
    with mock.patch.object(sys, "argv", ["checkpoint.py", *map(str, arguments)]), contextlib.redirect_stderr(told):
        return json.loads(json.dumps(checkpoint_command.main(), allow_nan=False)), told.getvalue()


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def commit_again(folder: Path, name: str) -> None:
    """Enter a file as it is now into COMMIT.json and the part-R.json that lists it."""
    data = (folder / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    document = json.loads((folder / "COMMIT.json").read_text())
    document["files"][name] = entry
    (folder / "COMMIT.json").write_text(json.dumps(document))
    for path in folder.glob("part-*.json"):
        part = json.loads(path.read_text())
        if name in part:
            path.write_text(json.dumps({**part, name: entry}))


def set_state(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "state.json").read_text())
    document["state"] |= changes
    (folder / "state.json").write_text(json.dumps(document))
    commit_again(folder, "state.json")


def forget(folder: Path, name: str) -> None:
    """Remove a file and every mention of it."""
    (folder / name).unlink()
    for path in (folder / "COMMIT.json", *folder.glob("part-*.json")):
        document = json.loads(path.read_text())
        document.get("files", document).pop(name, None)
        path.write_text(json.dumps(document))


def change_tensors(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    commit_again(folder, name)


def split_range(folder: Path) -> tuple[str, str, int, int]:
    """A file with a range of a moment that begins inside the parameter; the range's name and its bounds."""
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        for key in sorted(load_file(path)):
            name, start, stop = checkpoint_files.parse_range(key)
            if start > 0 and stop - start > 8:
                return path.name, name, start, stop
    raise AssertionError("no parameter is shared by two ranks")


def test_checkpoint_command_does_not_import_torch() -> None:
    code = (
        "import sys, pipeline.commands.checkpoint; print(sorted({'torch', 'deepspeed', 'numpy'} & sys.modules.keys()))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


def test_list_reports_checkpoints(run: Path) -> None:
    new = run / "checkpoints" / NEW
    set_state(new, scores={"top1": 0.5, "val_loss": math.nan}, scored_step=4, skipped=1)
    set_state(run / "checkpoints" / OLD, scores={"top1": 0.25}, scored_step=1)
    result, told = result_of("list", run)
    assert (result["run"], result["newest"]) == (str(run), 4)
    old_row, row = result["checkpoints"]
    assert (row["step"], row["state"], row["folder"]) == (4, "whole?", str(new))
    assert row["bytes"] == sum(path.stat().st_size for path in new.iterdir())
    assert datetime.fromisoformat(row["saved"]).timestamp() == int((new / "COMMIT.json").stat().st_mtime)
    assert (row["scores"], row["skipped"]) == ({"top1": 0.5, "val_loss": None}, 1)
    assert (old_row["step"], old_row["scores"], old_row["skipped"]) == (2, None, 0)  # its scores are of another step
    assert "top1 50.0 %, val_loss not finite" in told


def test_list_checks_file_sizes_only(run: Path) -> None:
    old, new = run / "checkpoints" / OLD, run / "checkpoints" / NEW
    flip_bit(new / "model.safetensors")
    (old / "model.safetensors").write_bytes(b"")
    shutil.copytree(new, run / "checkpoints" / "step-00000006")
    (run / "checkpoints/step-00000006/COMMIT.json").unlink()
    shutil.copytree(new, run / "checkpoints" / "step-00000008")
    (run / "checkpoints/step-00000008/COMMIT.json").write_text('{"format": 9}')
    result, told = result_of("list", run)
    states = {row["step"]: row["state"] for row in result["checkpoints"]}
    assert states == {2: "damaged", 4: "whole?", 6: "uncommitted", 8: "other format"}
    assert result["newest"] == 4
    assert "model.safetensors has 0 bytes, but COMMIT.json lists" in told
    assert "verify compares their bytes" in told


def test_verify_passes_whole_checkpoints(run: Path) -> None:
    result, told = result_of("verify", run)
    assert result["ok"] is True
    rows = [(row["step"], row["state"], row["fault"], row["untrained"]) for row in result["checkpoints"]]
    assert rows == [(2, "whole", None, []), (4, "whole", None, [])]
    assert [line.split(",")[0] for line in told.splitlines()] == [f"{OLD} whole", f"{NEW} whole"]
    result, _ = result_of("verify", run, "--step", 2)
    assert [row["step"] for row in result["checkpoints"]] == [2]
    result, _ = result_of("verify", run / "checkpoints" / NEW)
    assert [row["step"] for row in result["checkpoints"]] == [4]


def lose_range(folder: Path) -> str:
    file, name, start, stop = split_range(folder)
    change_tensors(folder, file, lambda tensors: tensors.pop(f"{name}[{start}:{stop}]"))
    return f"{name}[{start}:{stop}] is missing"


def lose_moment(folder: Path) -> str:
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        change_tensors(
            folder, path.name, lambda tensors: [tensors.pop(key) for key in list(tensors) if "exp_avg_sq.norm.w" in key]
        )
    return "exp_avg_sq.norm.weight[0:128] is missing"


def overlap_range(folder: Path) -> str:
    file, name, start, stop = split_range(folder)

    def change(tensors: dict[str, Any]) -> None:
        values = tensors[f"{name}[{start}:{stop}]"]
        tensors[f"{name}[{start}:{start + 4}]"] = values[:4].copy()

    change_tensors(folder, file, change)
    return f"{name}[{start}:{start + 4}] is there twice"


def overshoot(folder: Path) -> str:
    change_tensors(folder, "model.safetensors", lambda t: t.update({"norm.weight": t["norm.weight"][:100].copy()}))
    change_tensors(folder, "ema.safetensors", lambda t: t.update({"norm.weight": t["norm.weight"][:100].copy()}))
    return "goes beyond its 100 values"


def mislabel_range(folder: Path) -> str:
    file, name, start, stop = split_range(folder)

    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{name}[{start}:{stop}]"] = tensors[f"{name}[{start}:{stop}]"][:-1].copy()

    change_tensors(folder, file, change)
    return "is no range of a moment"


def garble_header(folder: Path) -> str:
    (folder / "optimizer-1.safetensors").write_bytes(b"\xff" * 64)
    commit_again(folder, "optimizer-1.safetensors")
    return "optimizer-1.safetensors: Error while deserializing header"


def lose_rank(folder: Path) -> str:
    forget(folder, "optimizer-1.safetensors")
    return "COMMIT.json does not list optimizer-1.safetensors"


def lose_average(folder: Path) -> str:
    forget(folder, "ema.safetensors")
    return "updates of an average, but there is no ema.safetensors"


def lose_weight(folder: Path) -> str:
    for name in ("model.safetensors", "ema.safetensors"):
        change_tensors(folder, name, lambda tensors: tensors.pop("norm.weight"))
    return "model.safetensors does not hold norm.weight, of which there are moments"


def flip(folder: Path) -> str:
    flip_bit(folder / "ema.safetensors")
    return "ema.safetensors has SHA-256"


def differ(folder: Path) -> str:
    change_tensors(folder, "ema.safetensors", lambda tensors: tensors.pop("norm.weight"))
    return "ema.safetensors does not hold the tensors that model.safetensors does"


def add_file(folder: Path) -> str:
    (folder / "notes.txt").touch()
    return "notes.txt should not be there"


def list_more(folder: Path) -> str:
    (folder / "more.bin").touch()
    commit_again(folder, "more.bin")
    return "COMMIT.json lists more.bin, which is no file of a checkpoint"


def lose_part(folder: Path) -> str:
    (folder / "part-1.json").unlink()
    return "part-1.json is missing"


def change_part(folder: Path) -> str:
    (folder / "part-1.json").write_text("{}")
    return "the part-R.json files together do not list what COMMIT.json does"


def change_step(folder: Path) -> str:
    set_state(folder, step=3)
    return "state.json is of step 3"


SPOILS = [
    flip, add_file, list_more, lose_rank, lose_part, change_part, change_step, lose_average, garble_header, differ,
    lose_weight, lose_range, lose_moment, overlap_range, overshoot, mislabel_range,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_verify_reports_damage(run: Path, spoil: Callable[[Path], str]) -> None:
    new = run / "checkpoints" / NEW
    expected = spoil(new)
    # Where a digest differs, a run would not resume either; all else can only be seen from what the files say.
    assert (checkpoint_files.damage(new) is None) == (spoil is not flip)
    result, told = result_of("verify", run)
    assert not result["ok"]
    old_row, row = result["checkpoints"]
    assert (old_row["state"], row["state"]) == ("whole", "damaged")
    assert expected in row["fault"]
    assert f"{NEW} damaged: {row['fault']}" in told


def test_verify_reports_tensor_without_moments(run: Path) -> None:
    new = run / "checkpoints" / NEW
    for path in new.glob("optimizer-*.safetensors"):
        change_tensors(
            new, path.name, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".norm.weight[" in key]
        )
    result, told = result_of("verify", run, "--step", 4)
    (row,) = result["checkpoints"]
    assert "norm.weight" in row["untrained"]
    assert "without moments, as only buffers and frozen parameters should be: " in told


def test_verify_reports_uncommitted_leftover_without_failing(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / NEW, run / "checkpoints" / "step-00000006")
    (run / "checkpoints/step-00000006/COMMIT.json").unlink()
    result, told = result_of("verify", run)
    assert result["ok"] is True
    assert [row["state"] for row in result["checkpoints"]] == ["whole", "whole", "uncommitted"]
    assert "step-00000006 uncommitted: no COMMIT.json" in told
    # Alone it is not what somebody who asks for a whole checkpoint wants to hear passed.
    assert result_of("verify", run, "--step", 6)[0]["ok"] is False


def test_checkpoint_removed_meanwhile_is_skipped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run / "checkpoints" / "step-00000001", run / "checkpoints" / OLD]
    for row_of in (checkpoint_command._verify_row, checkpoint_command._list_row):
        rows = checkpoint_command._make_rows(folders, row_of)
        assert [row["step"] for row in rows] == [2]
        assert "step-00000001 has been removed in the meantime" in capsys.readouterr().err


def test_show_reports_checkpoint_contents(run: Path) -> None:
    new = run / "checkpoints" / NEW
    guard = Guard(GuardConfig(window=8), chance_loss=2.3)
    fresh = guard.state()
    guard.account(0, loss=9.0, grad_norm=1.0, applied=True)
    guard.roll_back(fresh)
    for step in range(1, 4):
        guard.account(step, loss=1.0 + step, grad_norm=1.0, applied=True)
    set_state(new, guard=guard.state(), scores={"top1": 0.5}, scored_step=2, run_id="abc", skipped=1)
    network = timm.create_model("pvt_pico", num_classes=10, img_size=32)
    result, told = result_of("show", run)
    state = json.loads((new / "state.json").read_text())["state"]
    assert (result["step"], result["skipped"], result["run_id"]) == (4, 1, "abc")
    assert all(result[name] == state[name] for name in ("adam_steps", "ema_steps", "loss_scale"))
    assert result["ema_steps"] > 0
    assert result["loss_scale"]["value"] > 1
    assert (result["guard"]["rollback_steps"], result["guard"]["window"]) == ([1], 3)
    assert result["guard"]["window_loss"] == pytest.approx(3.0)
    assert (result["scores"], result["scored_step"]) == ({"top1": 0.5}, 2)
    assert (result["identity"]["model"], result["identity"]["seed"]) == ("pvt_pico", 0)
    assert result["tensors"] == len(load_file(new / "model.safetensors"))
    assert result["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert result["files"] == {path.name: path.stat().st_size for path in new.iterdir()}
    lines = [" ".join(line.split()) for line in told.splitlines()]
    for line in (
        "step 4, of which 1 skipped",
        "rollbacks 1, at step 1",
        "guard's window mean loss 3 of 3 steps",
        "scores top1 50.0 % at step 2",
        f"model {result['tensors']} tensors, {result['parameters']:,} parameters",
        "identity.model pvt_pico",
    ):
        assert line in lines


def test_show_selects_newest_whole_checkpoint(run: Path) -> None:
    flip_bit(run / "checkpoints" / NEW / "model.safetensors")
    result, told = result_of("show", run)
    assert result["step"] == 2
    assert f"{NEW} is skipped: model.safetensors has SHA-256" in told
    assert result["guard"] is None
    result, _ = result_of("show", run, "--step", 2)
    assert result["step"] == 2
    with pytest.raises(InputError, match="no whole checkpoint to show, of step 4"):
        result_of("show", run, "--step", 4)


def test_invalid_arguments_are_rejected(run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("list", tmp_path / "other"), "other: no such folder"),
        (("verify", tmp_path), "no checkpoints in it; give a run's folder"),
        (("verify", run, "--step", 3), "no checkpoint of step 3; it has steps 2, 4"),
        (("show", run / "checkpoints" / NEW, "--step", 2), "no checkpoint of step 2; it has step 4"),
    ):
        with pytest.raises(InputError, match=message):
            result_of(*arguments)


def test_exit_code_tells_whole_damaged_and_missing_checkpoints_apart(run: Path) -> None:
    flip_bit(run / "checkpoints" / NEW / "model.safetensors")
    for arguments, code in ((("list", run), 0), (("verify", run), 1), (("verify", run, "--step", 3), 2)):
        process = execute(*arguments)
        assert process.returncode == code, process.stderr
        assert "Traceback" not in process.stderr
        assert bool(process.stdout) == (code < 2)
        assert not process.stdout or json.loads(process.stdout)
