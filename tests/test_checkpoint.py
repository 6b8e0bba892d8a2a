"""Checkpoints: exact on the same world, portable over worlds and ZeRO stages, refused when not whole."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import InputError
from pipeline.train.checkpoint import Checkpoint, Checkpoints, Retention
from pipeline.train.checkpoint_files import damage
from pipeline.world import World
from tests.conftest import run_ranks, write_config

IDENTITY = {
    "seed": 0,
    "global_batch_size": 48,
    "lanes": 12,
    "shuffle_window": 64,
    "copies": 1,
    "mixture": [1.0],
    "model": "pvt_pico",
    "image_size": 32,
}


def small_batches(digits: Path, folder: Path) -> Path:
    """A configuration whose step is three micro-batches on each of two ranks."""
    path = write_config(digits, folder)
    tree = yaml.safe_load(path.read_text())
    tree["train"] |= {"global_batch_size": 24, "micro_batch_size": 4}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("ranks", "precision"),
    [
        (2, "fp32"),
        pytest.param(1, "fp32", marks=[pytest.mark.gpu, pytest.mark.slow]),
        pytest.param(1, "fp16", marks=[pytest.mark.gpu, pytest.mark.slow]),
        pytest.param(2, "fp16", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(digits: Path, tmp_path: Path, ranks: int, precision: str) -> None:
    path = small_batches(digits, tmp_path)
    legs = [leg for stage in range(4) for leg in (f"s{stage}:{stage}:5", f"r{stage}:{stage}:2", f"r{stage}:{stage}:5")]
    reports = run_ranks(ranks, "legs", path, tmp_path / "checkpoints", precision, *legs)
    for stage in range(4):
        straight, _, restarted = reports[3 * stage : 3 * stage + 3]
        assert restarted["digest"] == straight["digest"], stage
        assert restarted["losses"] == {k: v for k, v in straight["losses"].items() if int(k) >= 2}


def test_checkpoint_loads_at_any_zero_stage_and_world_size(digits: Path, tmp_path: Path) -> None:
    path = small_batches(digits, tmp_path)
    folder = tmp_path / "checkpoints"
    legs = run_ranks(2, "legs", path, folder, "fp32", "run:2:2", "run:3:4", "run:0:6", "run:1:8")
    *more, straight = run_ranks(1, "legs", path, folder, "fp32", "run:3:10", "run:0:12", "straight:1:14")
    legs += more + run_ranks(3, "legs", path, folder, "fp32", "run:2:14")
    losses = {step: loss for leg in legs for step, loss in leg["losses"].items()}
    assert losses == pytest.approx(straight["losses"], rel=1e-5)


@pytest.fixture(scope="module")
def saved(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole checkpoints of steps 2 and 4, saved by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, "legs", write_config(digits, folder), folder, "fp32", "checkpoints:1:2", "checkpoints:1:4")
    return folder / "checkpoints"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def find(folder: Path, source: str = "auto", allow: list[str] | None = None, **changes: Any) -> Path | None:
    return Checkpoints(folder, World(), {**IDENTITY, **changes}).find(source, allow or [])


def test_checkpoint_holds_documented_files(folder: Path) -> None:
    newest = folder / "step-00000004"
    assert {path.name for path in newest.iterdir()} == {
        "COMMIT.json",
        "ema.safetensors",
        "model.safetensors",
        "optimizer-0.safetensors",
        "optimizer-1.safetensors",
        "part-0.json",
        "part-1.json",
        "state.json",
    }
    assert json.loads((newest / "state.json").read_text())["state"]["step"] == 4
    # Readable by whoever the umask allows; safetensors by itself would write for the owner alone.
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((newest / "model.safetensors").stat().st_mode) == 0o666 & ~umask


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "uncommitted": (lambda c: (c / "COMMIT.json").unlink(), "no COMMIT.json: saving it did not finish"),
    "old format": (
        lambda c: (c / "COMMIT.json").write_text('{"format": 1, "files": {}}'),
        "but this version reads format 2",
    ),
    "garbled commit": (lambda c: (c / "COMMIT.json").write_text("{"), "COMMIT.json cannot be read"),
    "empty commit": (lambda c: (c / "COMMIT.json").write_text('{"format": 2, "files": {}}'), "does not list model"),
    "no mapping": (lambda c: (c / "COMMIT.json").write_text("[]"), "COMMIT.json cannot be read"),
    "wrong types": (
        lambda c: (c / "COMMIT.json").write_text('{"format": 2, "files": {"a": {"bytes": "x", "sha256": "y"}}}'),
        "COMMIT.json cannot be read: files.a.bytes: expected a whole number (found 'x')",
    ),
    "a name that leads out": (
        lambda c: (c / "COMMIT.json").write_text('{"format": 2, "files": {"../a": {"bytes": 1, "sha256": "y"}}}'),
        "COMMIT.json cannot be read: files.../a.[key]: a file's name, without folders (found '../a')",
    ),
    "a device": (
        lambda c: (c / "ema.safetensors").unlink() or (c / "ema.safetensors").symlink_to("/dev/zero"),
        "ema.safetensors cannot be read: not a regular file",
    ),
    "bit flipped": (lambda c: flip_bit(c / "optimizer-1.safetensors"), "optimizer-1.safetensors has SHA-256"),
    "truncated": (lambda c: (c / "model.safetensors").write_bytes(b""), "model.safetensors has SHA-256"),
    "file missing": (lambda c: (c / "optimizer-0.safetensors").unlink(), "optimizer-0.safetensors cannot be read"),
    "state edited": (lambda c: (c / "state.json").write_text("{}"), "state.json has SHA-256"),
}


@pytest.mark.parametrize("case", SPOILS)
def test_damaged_checkpoint_is_skipped_for_older_whole_one(folder: Path, case: str) -> None:
    spoil, message = SPOILS[case]
    assert find(folder) == folder / "step-00000004"
    spoil(folder / "step-00000004")
    assert message in (damage(folder / "step-00000004") or "")
    assert find(folder) == folder / "step-00000002"
    with pytest.raises(InputError, match=r"resume\.source"):
        find(folder / "empty", str(folder / "step-00000004"))


def test_newer_checkpoint_format_is_rejected_not_skipped(folder: Path) -> None:
    (folder / "step-00000004" / "COMMIT.json").write_text('{"format": 9, "files": []}')
    with pytest.raises(InputError, match="format 9, but this version reads format 2"):
        find(folder)


@pytest.mark.parametrize("case", [case for case in SPOILS if case != "uncommitted"])
def test_damaged_checkpoints_are_rejected_unless_starting_over(
    folder: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILS[case]
    for checkpoint in folder.iterdir():
        spoil(checkpoint)
    before = contents(folder)
    for source in ("auto", str(folder / "step-00000002")):
        with pytest.raises(InputError, match=r"none of 2 checkpoints can be used.*resume\.start_over=true") as error:
            find(folder, source)
        assert "step-00000004" in str(error.value)
        assert message in str(error.value)
    assert contents(folder) == before
    checkpoints = Checkpoints(folder, World(), IDENTITY)
    checkpoints.set_aside()
    assert checkpoints.find("auto", []) is None
    (aside,) = folder.parent.glob("checkpoints-*")
    assert contents(aside) == before
    assert f"starting at step 0; {aside} holds" in capfd.readouterr().err


def test_start_over_keeps_folder_with_whole_checkpoint(folder: Path) -> None:
    flip_bit(folder / "step-00000004" / "model.safetensors")
    checkpoints = Checkpoints(folder, World(), IDENTITY)
    checkpoints.set_aside()
    assert checkpoints.find("auto", []) == folder / "step-00000002"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_replaced_checkpoint_is_kept_until_new_one_is_committed(folder: Path) -> None:
    newest, checkpoints = folder / "step-00000004", Checkpoints(folder, World(), IDENTITY)
    before = contents(folder)
    for half_made in ("renamed", "begun"):
        checkpoints.make(4)
        assert find(folder) == folder / "step-00000002"
        if half_made == "renamed":
            newest.rmdir()
        else:
            (newest / "state.json").write_text("{}")
        checkpoints.sweep()
        assert contents(folder) == before
    checkpoints.make(4)
    for name in ("model.safetensors", "part-0.json", "state.json"):
        shutil.copy(folder / ".step-00000004.replaced" / name, newest)
    checkpoints.commit(newest)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]


def test_retention_does_not_count_damaged_later_checkpoints(folder: Path) -> None:
    flip_bit(folder / "step-00000004" / "model.safetensors")
    shutil.copytree(folder / "step-00000002", folder / "step-00000003")
    Checkpoints(folder, World(), IDENTITY).retain(Retention(last=1, best=0), newest=3, safe_step=3)
    assert find(folder) == folder / "step-00000003"
    assert not (folder / "step-00000002").exists()


def test_unknown_state_fields_are_ignored(folder: Path) -> None:
    document = json.loads((folder / "step-00000004/state.json").read_text())
    document["state"]["bad_samples"] = 3
    (folder / "step-00000004/state.json").write_text(json.dumps(document))
    assert Checkpoint(folder / "step-00000004").state.step == 4


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[]", "expected a mapping (found [])"),
        ('{"identity": {}}', "state: expected a mapping (found null)"),
        ('{"identity": {}, "state": {"step": "four"}}', "step: expected a whole number (found 'four')"),
        ('{"identity": {}, "state": {"scores": [1]}}', "scores: expected a mapping (found [1])"),
    ],
)
def test_damaged_state_json_is_reported_in_one_line(folder: Path, document: str, message: str) -> None:
    (folder / "step-00000004" / "state.json").write_text(document)
    with pytest.raises(InputError) as error:
        Checkpoint(folder / "step-00000004")
    assert str(error.value) == f"{folder / 'step-00000004' / 'state.json'}: {message}"


def test_missing_resume_source_is_reported(folder: Path) -> None:
    with pytest.raises(InputError, match=r"resume\.source .*step-9: no such folder"):
        find(folder / "empty", str(folder / "step-9"))


def test_resume_source_is_used_only_if_run_has_no_checkpoint(
    saved: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = str(saved / "step-00000002")
    assert find(tmp_path / "new", source) == saved / "step-00000002"
    assert capfd.readouterr().err == ""
    assert find(folder, source) == folder / "step-00000004"
    assert (
        f"step-00000004: the run goes on from here: it has begun, and resume.source {source}" in capfd.readouterr().err
    )
    assert find(folder, str(tmp_path / "gone")) == folder / "step-00000004"
    capfd.readouterr()
    assert find(folder, str(folder / ".." / folder.name / "step-00000004")) == folder / "step-00000004"
    assert capfd.readouterr().err == ""
    for step in (2, 4):
        flip_bit(folder / f"step-{step:08d}" / "model.safetensors")
    with pytest.raises(InputError, match="none of 2 checkpoints can be used"):
        find(folder, source)


def test_damaged_checkpoint_step_is_saved_again(digits: Path, folder: Path) -> None:
    flip_bit(folder / "step-00000004" / "model.safetensors")
    path = write_config(digits, folder.parent)
    run_ranks(1, "legs", path, folder.parent, "fp32", "checkpoints:0:4")
    assert damage(folder / "step-00000004") is None
    assert find(folder) == folder / "step-00000004"


def test_checkpoint_at_step_zero_resumes_bit_exact(digits: Path, tmp_path: Path) -> None:
    path = small_batches(digits, tmp_path)
    legs = [leg for stage in range(4) for leg in (f"s{stage}:{stage}:2", f"r{stage}:{stage}:0", f"r{stage}:{stage}:2")]
    reports = run_ranks(1, "legs", path, tmp_path / "checkpoints", "fp32", *legs)
    for stage in range(4):
        straight, _, restarted = reports[3 * stage : 3 * stage + 3]
        assert restarted["digest"] == straight["digest"], stage


def test_different_run_identity_is_rejected_unless_allowed(folder: Path) -> None:
    with pytest.raises(InputError, match="lanes is 12 in the checkpoint and 24 in this run"):
        find(folder, lanes=24)
    assert find(folder, allow=["lanes"], lanes=24)
    with pytest.raises(InputError, match="model is 'pvt_pico' in the checkpoint and 'pvt_tiny' in this run") as error:
        find(folder, allow=["model"], model="pvt_tiny")
    assert "resume.allow" not in str(error.value)
    with pytest.raises(InputError, match="data is None in the checkpoint and 'other' in this run"):
        find(folder, data="other")


def test_resume_never_rejects_used_folder(folder: Path) -> None:
    with pytest.raises(InputError, match="choose another"):
        find(folder, "never")
    assert find(folder / "empty", "never") is None
