"""From a registered classifier to registered detectors: trained, killed, sharded, scored, drawn, started from."""

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.scenes import write_dataset
from pipeline.scenes.compose_scene import NAMES
from pipeline.shards import coco
from pipeline.shards.pack import pack
from pipeline.track import tracking_server
from pipeline.track.registry import registry
from tests.chaos.runs import Job, checkpoint_differences, metrics_differences, trace_differences
from tests.conftest import write_config
from tests.finetuning import command, losses_of, register_classifier, result_of, seen_by
from tests.ranks import PATIENCE_S, start

STEPS = 6
TARGET = "launch/finetune.py"
TASKS: dict[str, dict[str, Any]] = {
    "retinanet": {"pyramid_channels": 16},
    "mask_rcnn": {"pyramid_channels": 16, "box_width": 32, "mask_width": 16, "sampled_boxes": 32},
    "detr": {"width": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 64, "crop_prob": 0.5},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train and DIR/val, packed, and DIR/coco, as they were before."""
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset.write_dataset(folder, {"train": 24, "val": 6}, side_px=(128, 170))
    for split in ("train", "val"):
        found = coco.find(folder / f"coco/annotations/instances_{split}.json")
        pack(found, folder / split, samples_per_shard=8)
    return folder


@pytest.fixture(scope="module")
def root(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs whose registry holds models:/pico/1."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copy(empty_database, folder)
    register_classifier(folder)
    return folder


def configuration(scenes: Path, root: Path, task: str, name: str, **sections: Any) -> Path:
    tree: dict[str, Any] = yaml.safe_load(write_config(scenes, root).read_text())
    tree |= {"augment": {"color_jitter": 0.4}, "mix": {}, "init": {"model": "models:/pico/1"}}
    tree["run"] = {"name": name, "root": str(root)}
    tree["task"] = {"name": task, "train_short_sides": [64, 80, 96], "long_side": 128, **TASKS[task]}
    tree["task"] |= {"crop_short_sides": [80, 96], "crop_sides": [48, 80]}
    tree["model"] |= {"image_size": 32}
    tree["image"] |= {"size": 80, "interpolation": "bilinear"}
    tree["data"] |= {"lanes": 4, "shuffle_window": 8}
    tree["optim"] |= {"schedule": "steps", "milestones": ["4 steps"], "backbone_lr": 0.5, "warmup": "1 steps"}
    tree["train"] |= {
        "length": f"{STEPS} steps",
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "save_every": "2 steps",
        "eval_every": "3 steps",
        "ema_decay": 0.9,
    }
    tree["evaluate"] = {"batch_size": 1}
    tree["debug"] = {"trace_samples": True}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def finished(scenes: Path, root: Path, task: str, name: str, ranks: int = 2, **sections: Any) -> Job:
    job = Job(configuration(scenes, root, task, name, **sections), name, ranks=ranks, target=TARGET)
    job.finish()
    return job


@pytest.fixture(scope="module")
def trained(scenes: Path, root: Path) -> Job:
    """Mask R-CNN on two ranks, undisturbed, registered as models:/mask/1."""
    return finished(scenes, root, "mask_rcnn", "mask", tracking={"log_samples": True})


@pytest.mark.slow
def test_killed_fine_tuning_matches_uninterrupted_run(scenes: Path, root: Path, trained: Job) -> None:
    killed = Job(configuration(scenes, root, "mask_rcnn", "killed"), "killed", ranks=2, target=TARGET)
    with killed.start() as attempt:
        assert attempt.wait_until(lambda: attempt.step >= 3 and killed.newest_step() >= 2, PATIENCE_S)
        attempt.kill(range(2), signal.SIGKILL)
        attempt.wait(PATIENCE_S)
    assert killed.newest_step() in (2, 4)
    again = killed.finish()
    assert again.resumed_at in (2, 4)
    last = f"checkpoints/step-{STEPS:08d}"
    assert checkpoint_differences(killed.folder / last, trained.folder / last) == []
    assert trace_differences(killed.folder / "trace", trained.folder / "trace") == []
    scores = tuple(name for name in result_of(trained) if name.startswith(("box_", "mask_")))
    assert {"box_ap", "mask_ap"} <= set(scores)
    ours, reference = killed.folder / "metrics.jsonl", trained.folder / "metrics.jsonl"
    assert metrics_differences(ours, reference, STEPS, ("step", *scores)) == []


def test_other_world_size_sees_same_samples_boxes_and_masks(scenes: Path, root: Path, trained: Job) -> None:
    steps = 4  # more than an epoch
    length = {"length": f"{steps} steps", "eval_every": f"{steps} steps"}
    single = finished(scenes, root, "mask_rcnn", "single", ranks=1, train=length)
    seen = {(step, position): what for (step, position), what in seen_by(trained).items() if step <= steps}
    assert len(seen) == steps * 8
    assert seen_by(single) == seen


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mask_rcnn", "detr"])
def test_zero_3_losses_match_zero_1(scenes: Path, root: Path, task: str) -> None:
    still: Any = {"train": {"length": "3 steps", "ema_decay": None}}
    whole, sharded = (
        finished(scenes, root, task, f"{task}-zero-{stage}", engine={"zero_stage": stage, "precision": "fp32"}, **still)
        for stage in (1, 3)
    )
    # Which proposals are learnt from hangs on the last digits of their scores.
    assert losses_of(sharded)[0] == pytest.approx(losses_of(whole)[0], rel=1e-5)
    assert losses_of(sharded) == pytest.approx(losses_of(whole), rel=2e-2)


@pytest.mark.parametrize("task", ["retinanet", "detr"])
def test_detectors_train_from_unpacked_coco_annotations(scenes: Path, root: Path, task: str) -> None:
    files = {split: str(scenes / f"coco/annotations/instances_{split}.json") for split in ("train", "val")}
    data = {**files, "cache": str(root / "cache")}
    job = finished(scenes, root, task, task, ranks=1, data=data, train={"length": "2 steps", "eval_every": "2 steps"})
    assert 0 <= result_of(job)["box_ap"] < 0.5
    card = registry.resolve(f"models:/{task}@candidate").card
    assert card.task.name == task
    assert card.classes == list(NAMES)


def test_detector_is_registered_evaluated_and_drawn(scenes: Path, root: Path, trained: Job) -> None:
    uri = f"sqlite:///{root / 'mlflow.db'}"
    tracking_server.connect(uri)
    version = registry.resolve("models:/mask@candidate")
    assert version.card.lineage["parent"] == "models:/pico/1"
    result = result_of(trained)
    assert version.card.metrics == {name: result[name] for name in version.card.metrics}
    arguments = ["--model", "models:/mask/1", "--data", scenes / "val", "--tracking-uri", uri]
    sheet = root / "sheet.png"
    found, _ = command("launch/evaluate.py", *arguments, "--draw", 3, "--out", sheet, log=root / "log")
    assert {name: found[name] for name in version.card.metrics} == version.card.metrics
    with Image.open(sheet) as picture:
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 1000
    logs = [root / f"log-{rank}" for rank in range(2)]
    for process in start(2, "launch/evaluate.py", arguments, logs):
        assert process.wait(PATIENCE_S) == 0, logs[0].with_suffix(".err").read_text()
    assert '"box_ap": ' + repr(found["box_ap"]) in logs[0].with_suffix(".out").read_text()
    assert (trained.folder / "predictions.png").exists()


def test_data_of_wrong_kind_is_rejected_before_training(scenes: Path, root: Path) -> None:
    path = configuration(scenes, root, "retinanet", "other")
    _, told = command(TARGET, "--config", path, "--set", "task=semantic_fpn", log=root / "log", expected=2)
    assert "its data set holds images with objects, but task semantic_fpn needs images with label maps" in told
