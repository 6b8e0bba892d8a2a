"""Schedule, optimiser groups, loss and metric against timm; skipped steps; lengths and meters."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim._param_groups import param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

import pvt  # noqa: F401 - registers its models with timm
from pipeline.config import Config, Length, OptimConfig
from pipeline.job import training_job
from pipeline.tasks.classify import ClassificationTask
from pipeline.train.loss_scale import LossScale
from pipeline.train.meters import MetricsFile
from pipeline.train.optim import parameter_groups
from pipeline.train.schedule import Schedule, lr_at
from pipeline.world import World
from tests.batches import batch_of
from tests.conftest import run_ranks, write_config


def test_cosine_lr_with_warmup_matches_timm() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = CosineLRScheduler(
        optimizer, t_initial=90, lr_min=1e-5, warmup_t=10, warmup_lr_init=1e-6, warmup_prefix=True
    )
    config = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6)
    for step in range(100):
        theirs.step(step)
        ours = lr_at(step, config, warmup_steps=10, total_steps=100)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
    assert lr_at(100, config, warmup_steps=10, total_steps=100) == pytest.approx(1e-5)


def test_poly_lr_matches_timm() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    theirs = PolyLRScheduler(optimizer, t_initial=50, power=0.9, lr_min=1e-6)
    config = OptimConfig(lr=2e-4, min_lr=1e-6, schedule="poly", power=0.9)
    for step in range(50):
        theirs.step(step)
        ours = lr_at(step, config, warmup_steps=0, total_steps=50)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step


def test_multistep_lr_matches_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    theirs = MultiStepLR(optimizer, milestones=[8, 11], gamma=0.1)
    config = OptimConfig(lr=1e-4, schedule="steps", milestones=(Length(8, "steps"), Length(11, "steps")))
    for step in range(12):
        ours = lr_at(step, config, warmup_steps=0, total_steps=12, milestones=(8, 11))
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        theirs.step()
    assert lr_at(0, config, warmup_steps=2, total_steps=12, milestones=(8, 11)) == config.warmup_lr


def test_backbone_lr_scales_backbone_groups() -> None:
    model = timm.create_model("resnet18")
    backbone = {name: 0 for name, _ in model.named_parameters() if not name.startswith("fc.")}
    groups = parameter_groups(model, OptimConfig(lr=1e-3, backbone_lr=0.1), backbone)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {name: scales[id(p)] for name, p in model.named_parameters()} == {
        name: 0.1 if name in backbone else 1.0 for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("name", ["pvt_pico", "resnet18"])
def test_optimiser_groups_match_timm(name: str) -> None:
    model = timm.create_model(name)
    spared = getattr(model, "no_weight_decay", list)()
    theirs = {
        g["weight_decay"]: g["params"] for g in param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)
    }
    for group in parameter_groups(model, OptimConfig(lr=1e-3, weight_decay=0.05)):
        assert [id(p) for p in group["params"]] == [id(p) for p in theirs[group["weight_decay"]]]


def test_loss_matches_timm_soft_target_cross_entropy() -> None:
    model = torch.nn.Linear(8, 5)
    images, targets = torch.randn(6, 8), torch.rand(6, 5).softmax(dim=1)
    losses = ClassificationTask(model).losses(model, batch_of(images, targets))
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), SoftTargetCrossEntropy()(model(images), targets))


def test_metric_counts_only_samples_with_weight() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 12), torch.randint(12, (50,))
    metric = ClassificationTask(torch.nn.Identity()).metric()
    weights = torch.ones(50)
    weights[45:] = 0
    for part in (slice(0, 20), slice(20, 50)):
        metric.update(logits[part], labels[part], weights[part])
    result = metric.result(World())
    order = logits[:45].argsort(dim=1, descending=True)
    assert result["top1"] == (order[:, 0] == labels[:45]).double().mean().item()
    assert result["top5"] == (order[:, :5] == labels[:45, None]).any(dim=1).double().mean().item()
    assert result["val_loss"] == pytest.approx(functional.cross_entropy(logits[:45], labels[:45]).item(), rel=1e-6)


def test_loss_scale_halves_on_overflow_and_doubles_after_a_window() -> None:
    scale = LossScale(value=8.0, window=3)
    for finite in (True, True, False, True, True, True):
        scale.update(finite)
    assert (scale.value, scale.good_steps) == (8.0, 0)
    for _ in range(10):
        scale.update(False)
    assert scale.value == scale.floor


def test_non_finite_step_is_skipped_at_every_zero_stage(digits: Path, tmp_path: Path) -> None:
    reports = run_ranks(2, "skip", write_config(digits, tmp_path))
    assert len(reports) == 8
    for report in reports:
        label = f"ZeRO-{report['stage']} {report['precision']}"
        assert report["applied"] == [True, False, True], label
        assert report["unchanged"] == [False, True, False], label
        assert report["adam_steps"] == 2, label
        # Nothing of the discarded step, of two micro-batches, is left in the next one's gradients.
        assert report["norms"][1] == pytest.approx(report["norms"][0], rel=1e-6), label
        if report["precision"] == "fp16":
            assert report["loss_scales"] == [2.0**16, 2.0**15, 2.0**15], label


def test_schedule_converts_lengths_to_steps(make_config: Callable[..., Config]) -> None:
    config = make_config(
        "train.length=4 epochs",
        "train.eval_every=480 images",
        "train.save_every=25 %",
        "optim.warmup=10 %",
        "optim.schedule=steps",
        "optim.milestones=[2 epochs, 75 %]",
    )
    schedule = Schedule.of(config, steps_per_epoch=25)
    assert schedule == Schedule(
        total=100,
        warmup=10,
        milestones=(50, 75),
        log_every=1,
        eval_every=10,
        save_every=25,
        keep_every=0,
        replay_check_every=0,
    )
    assert [step for step in range(1, 101) if schedule.due(schedule.save_every, step)] == [25, 50, 75, 100]
    assert [step for step in range(1, 101) if schedule.due(0, step)] == [100]


def test_finished_run_without_checkpoints_is_not_restarted(make_config: Callable[..., Config], tmp_path: Path) -> None:
    result = {"steps": 20, "top1": 0.5}
    (tmp_path / "result.json").write_text(json.dumps(result))
    schedule, longer = (
        Schedule.of(make_config(f"train.length={steps} steps"), steps_per_epoch=25) for steps in (20, 30)
    )
    assert training_job._finished_result(tmp_path, schedule, None) == result
    assert training_job._finished_result(tmp_path, longer, None) is None
    (tmp_path / "result.json").write_text(json.dumps({**result, "requeue": True}))
    assert training_job._finished_result(tmp_path, schedule, None) is None


def test_metrics_lines_are_kept_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    listener = MetricsFile(path, step=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70, limits[1]))  # bytes: the second line fits in part
    try:
        for step in range(1, 6):
            listener.on_step(step, {"loss": 1.0, "seconds": 2.0})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err.count("kept until they can be written") == 1
    listener.on_step(6, {"loss": 1.0, "seconds": 2.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_non_finite_metrics_are_written_as_null(tmp_path: Path) -> None:
    listener = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    listener.on_step(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}


def test_layer_decay_applies_and_batch_norm_statistics_are_shared(digits: Path, tmp_path: Path) -> None:
    reports = run_ranks(2, "layered", write_config(digits, tmp_path), 0, 1, 3)
    assert [report["stage"] for report in reports] == [0, 1, 3]
    for report in reports:
        top = max(report["depths"].values())
        assert top > 3
        has_gradient = {name: moved for name, moved in report["moved"].items() if moved}  # branches begin as nothing
        assert len(has_gradient) > len(report["moved"]) / 2
        for name, moved in has_gradient.items():
            assert moved == pytest.approx(1e-3 * 0.5 ** (top - report["depths"][name]), rel=0.01), name
        assert report["spread"] == 0.0
        assert report["size"] > 0.01


def test_step_synchronises_with_the_device_once(digits: Path, tmp_path: Path) -> None:
    config = "train.length=8 steps,train.log_every=8 steps,train.micro_batch_size=12,train.ema_decay=0.9"
    [found] = run_ranks(1, "reads", write_config(digits, tmp_path), f"{config},data.val=null")
    assert found["reads"][:-1] == [["tolist"]] * 7  # the last step is logged
