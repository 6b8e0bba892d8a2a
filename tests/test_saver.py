"""A safetensors file in memory; which checkpoints are kept; saving by the clock."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.train.checkpoint import Checkpoints, Retention, State
from pipeline.train.snapshot import Snapshot
from pipeline.world import World
from tests.conftest import run_ranks, write_config


def test_snapshot_is_a_valid_safetensors_file() -> None:
    torch.manual_seed(0)
    flat, square = torch.randn(40), torch.randn(6, 6)
    tensors = {
        "b": flat[10:20].view(5, 2),
        "a": flat[:10],
        "c": flat[20:30],
        "behind a gap": flat[35:],
        "turned": square.T,
        "within": square[2:4],
        "counter": torch.tensor(2**40),
        "half": torch.randn(3).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
    }
    snapshot = Snapshot(tensors, pin=False)
    moved = {name: tensor.clone() for name, tensor in tensors.items()}
    for saved in (tensors, tensors, moved, tensors):
        flat += 1
        snapshot.fill(saved)
        found = safetensors.torch.load(bytes(snapshot.data()))
        assert found.keys() == saved.keys()
        for name, tensor in saved.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("retention", "safe_step", "kept"),
    [
        (Retention(last=1, best=0), 100, {100}),
        (Retention(last=3, best=0), 100, {80, 90, 100}),
        (Retention(last=1, best=2), 100, {30, 50, 100}),
        (Retention(last=1, best=9), 100, {30, 50, 70, 100}),
        (Retention(last=1, best=0, every=20), 100, {20, 40, 60, 80, 100}),
        # Rolling back would take 40: 50 was saved after the trouble began, 45 because of a signal.
        (Retention(last=1, best=0, grid=10), 48, {40, 100}),
        (Retention(last=1, best=0, grid=10), 100, {100}),
    ],
)
def test_retention_keeps_last_best_periodic_and_rollback_checkpoints(
    retention: Retention, safe_step: int, kept: set[int]
) -> None:
    scores: dict[int, float | None] = dict.fromkeys([0, *range(10, 101, 10), 45], None)
    scores |= {30: 0.7, 50: 0.8, 70: 0.7}  # of equals the older one is the better
    assert retention.kept(scores, safe_step) == kept


def test_checkpoint_with_non_finite_score_is_not_kept_as_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, World(), {})
    for step, top1, val_loss in ((1, 0.5, 1.0), (2, 0.9, math.nan), (3, math.nan, 1.0), (4, 0.4, 1.0), (5, 0.3, 1.0)):
        state = State(step=step, scores={"top1": top1, "val_loss": val_loss}, scored_step=step)
        checkpoints.make(step)
        (checkpoints.path(step) / "state.json").write_bytes(checkpoints.state_document(state))
        (checkpoints.path(step) / "COMMIT.json").write_text("{}")
    checkpoints.retain(Retention(last=1, best=1), newest=5, safe_step=5)
    assert checkpoints.steps() == [1, 5]


def test_saves_by_the_clock_keep_the_rollback_checkpoint(digits: Path, tmp_path: Path) -> None:
    path = write_config(digits, tmp_path)
    overrides = "train.save_every=8 steps,checkpoint.every_minutes=1e-9,checkpoint.keep_last=2,data.val=null"
    run_ranks(2, "faulty", path, json.dumps({14: "kill"}), overrides)
    steps = Checkpoints(tmp_path / "runs/tiny/checkpoints", World(), {}).steps()
    assert steps[0] == 8  # what rolling back would take
    assert steps[-1] in (12, 13, 14)  # the newest may be half-written
    assert len(steps) == 3
