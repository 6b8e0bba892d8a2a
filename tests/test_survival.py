"""Whole jobs through bad batches, divergence, signals, failing stores and flipped bits, at every ZeRO stage."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.track.sync.outbox import Outbox
from tests.conftest import run_ranks, write_config
from tests.workers.legs import digest


@pytest.fixture
def path(digits: Path, tmp_path: Path) -> Path:
    """A run that learns fast, so that what is wrong shows."""
    path = write_config(digits, tmp_path)
    tree = yaml.safe_load(path.read_text())
    tree["mix"] = {"label_smoothing": 0.1}
    tree["augment"] = {"crop_scale": [0.8, 1.0], "hflip": 0.0}
    tree["evaluate"] = {"batch_size": 32}
    tree["guard"] = {"window": 16, "rollback_after": 3}
    tree["train"] |= {"length": "48 steps", "save_every": "10 steps", "ema_decay": 0.9}
    path.write_text(yaml.safe_dump(tree))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(path: Path, name: str) -> Path:
    return path.parent / "runs" / name


def last(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def train(path: Path, ranks: int, *jobs: tuple[dict[int, str], str]) -> list[dict[str, Any]]:
    """The results, or errors, of jobs that are given as faults by step and as overrides. If the last one fails,
    AssertionError has what a rank said of all."""
    faults, overrides = zip(*jobs, strict=True)
    return run_ranks(ranks, "faulty", path, json.dumps(faults), *overrides)


@pytest.mark.slow
def test_bad_batches_are_skipped_and_divergence_rolled_back_at_all_stages(path: Path) -> None:
    faults = {20: "nan", 25: "labels", 33: "lr"}
    jobs = [f"run.name=s{stage},engine.zero_stage={stage}" for stage in range(4)]
    run_ranks(2, "faulty", path, json.dumps(faults), *jobs)
    for stage in range(4):
        metrics = [line for line in lines(run(path, f"s{stage}") / "metrics.jsonl") if "loss" in line]
        losses = {line["step"]: line["loss"] for line in metrics}
        assert sorted(losses) == list(range(1, 49))
        anomalies = lines(run(path, f"s{stage}") / "anomalies.jsonl")
        kinds = [(line["step"], line["kind"]) for line in anomalies if line["kind"] != "gradient spike"]
        assert kinds[:2] == [(21, "non-finite loss"), (26, "loss spike")], stage
        # The step at 3,000 times the rate is taken; what comes of it is not.
        assert kinds[2:] == [(35, "loss spike"), (36, "loss spike"), (37, "loss spike")], stage
        assert all(len(line["samples"]) == 48 for line in anomalies)
        assert metrics[-1]["skipped"] == 5
        assert losses[35] > 3 > losses[20] > losses[38], stage
        assert losses[38] < losses[31] + 0.3  # the weights of step 30
        assert losses[48] < losses[20]


def test_log_every_does_not_change_results(path: Path) -> None:
    # Steps that are not logged are read with the next one's loss: the rollback is due in the middle of step 38, which
    # then is taken again.
    faults = {20: "nan", 25: "labels", 33: "lr"}
    same = "engine.zero_stage=0,train.global_batch_size=24"
    jobs = [f"run.name={name},train.log_every={n} steps,{same}" for name, n in (("each", 1), ("few", 48))]
    run_ranks(2, "faulty", path, json.dumps(faults), *jobs)
    each, few = (run(path, name) for name in ("each", "few"))
    assert digest(last(few)) == digest(last(each))
    assert lines(few / "anomalies.jsonl") == lines(each / "anomalies.jsonl")
    steps = [[line["step"] for line in lines(folder / "metrics.jsonl") if "loss" in line] for folder in (each, few)]
    assert steps == [list(range(1, 49)), [48]]
    [(skipped, norm), (skipped_few, norm_few)] = [
        (lines(folder / "metrics.jsonl")[-2][key] for key in ("skipped", "grad_norm")) for folder in (each, few)
    ]
    assert (skipped_few, norm_few) == (skipped, norm)
    assert skipped == 5


@pytest.mark.slow
def test_stop_and_kill_around_a_rollback_give_identical_results(path: Path) -> None:
    def job(name: str, faults: dict[int, str]) -> tuple[dict[int, str], str]:
        return {33: "lr", **faults}, f"run.name={name},train.eval_every=12 steps"

    # A signal in the middle of the bad row saves an extra checkpoint there, and puts off an evaluation that is due.
    train(path, 2, job("straight", {}), job("bent", {35: "stop"}))
    assert last(run(path, "bent")).name == "step-00000036"
    # What is done again after this one begins at the checkpoint that was rolled back to.
    train(path, 2, job("bent", {38: "kill"}))
    train(path, 2, job("bent", {}))
    assert digest(last(run(path, "bent"))) == digest(last(run(path, "straight")))
    numbers = [
        [(line["step"], line.get("loss"), line.get("top1")) for line in lines(run(path, name) / "metrics.jsonl")]
        for name in ("straight", "bent")
    ]
    assert numbers[0] == numbers[1]
    assert [step for step, _, top1 in numbers[0] if top1] == [12, 24, 36, 48]


def test_divergence_beyond_max_rollbacks_ends_run_without_its_versions(path: Path) -> None:
    often = "train.eval_every=4 steps,checkpoint.every_minutes=1e-9"
    with pytest.raises(AssertionError, match=r"ended with 1:\n(.|\n)*training has diverged and guard") as error:
        run_ranks(1, "faulty", path, json.dumps({27: "lr"}), f"run.name=hopeless,guard.max_rollbacks=0,{often}")
    assert "Traceback" not in str(error.value)
    top1 = {line["step"]: line["top1"] for line in lines(run(path, "hopeless") / "metrics.jsonl") if "top1" in line}
    best = max(score for step, score in top1.items() if step <= 20)
    assert best < max(score for step, score in top1.items() if step > 20)
    # It would have gone back to step 20.
    assert all(score <= best for score in Outbox(run(path, "hopeless")).scores("top1").values())


def test_out_of_gpu_memory_is_reported_with_a_remedy(path: Path) -> None:
    jobs = [({2: "memory"}, f"run.name=large,train.micro_batch_size={size}") for size in (16, 2)]
    with pytest.raises(AssertionError, match="ended with 1:\n") as error:
        train(path, 1, *jobs)
    begins = r"error: rank 0 on \S+: out of GPU memory, with micro-batches of"
    for size, remedy in ((16, "train.micro_batch_size=8"), (2, "model.grad_checkpointing=true")):
        assert re.search(rf"{begins} {size}: --set {remedy} takes about half of it", str(error.value))
    assert "Traceback" not in str(error.value)


SHORT = "train.length=8 steps,train.save_every=4 steps,train.global_batch_size=24"


def test_failing_store_saves_and_resumes_without_losing_a_step(path: Path) -> None:
    jobs = []
    for stage in (0, 3):  # in this order: once stage 3 was used, DeepSpeed computes linear layers in another way
        settings = f"engine.zero_stage={stage},data.val=null,{SHORT}"
        stored = f"run.name=stored{stage},{settings}"
        jobs += [({6: "store"}, stored), ({}, stored), ({}, f"run.name=whole{stage},{settings}")]
    reports = train(path, 2, *jobs)
    for stage, failed in ((0, reports[0]), (3, reports[3])):
        assert "could not read its data" in failed["error"]
        assert (run(path, f"stored{stage}") / "checkpoints" / "step-00000006").exists()
        assert digest(last(run(path, f"stored{stage}"))) == digest(last(run(path, f"whole{stage}")))


def test_failed_evaluation_on_one_rank_saves_and_resumes(path: Path) -> None:
    job = f"run.name=eval,engine.zero_stage=3,train.ema_decay=null,{SHORT},train.eval_every=3 steps"
    failed, resumed = train(path, 2, ({0: "evaluation"}, job), ({}, job))
    assert "503 Service Unavailable" in failed["error"] or "another rank" in failed["error"]
    assert resumed["steps"] == 8
    assert (run(path, "eval") / "checkpoints" / "step-00000003").exists()
    assert [line["step"] for line in lines(run(path, "eval") / "metrics.jsonl") if "top1" in line] == [3, 6, 8]


CHECKED = "train.length=5 steps,train.replay_check_every=2 steps,train.global_batch_size=24,data.val=null"


def test_replay_check_names_the_rank_with_a_flipped_bit(path: Path) -> None:
    jobs = [({4: "flip"}, f"run.name=flip{stage},engine.zero_stage={stage},{CHECKED}") for stage in (0, 2)]
    with pytest.raises(AssertionError, match=r"rank \d ended with 1") as error:
        train(path, 3, *jobs)
    assert str(error.value).count("error: silent corruption at step 4: rank 2 holds other values of") == len(jobs)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=[pytest.mark.gpu, pytest.mark.slow]), 2])
def test_replay_check_names_the_rank_with_differing_gradients(path: Path, ranks: int) -> None:
    jobs = [({2: "miscompute"}, f"run.name=again{stage},engine.zero_stage={stage},{CHECKED}") for stage in (1, 3)]
    *failed, fine = train(path, ranks, *jobs, ({}, f"run.name=fine,engine.zero_stage=3,{CHECKED}"))
    told = f"corruption at step 2: rank {ranks - 1} computed other gradients"
    assert [told in report["error"] for report in failed] == [True, True]
    assert fine["steps"] == 5
