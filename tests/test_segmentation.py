"""From a registered classifier to a registered segmenter: trained, killed, scored, drawn, started from."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.config import load_config
from pipeline.scenes import write_dataset
from pipeline.scenes.compose_scene import NAMES
from pipeline.shards import ade20k
from pipeline.shards.pack import pack
from pipeline.tasks.build import build_task
from pipeline.track import tracking_server
from pipeline.track.model_card import WEIGHTS
from pipeline.track.registry import registry
from pipeline.track.serve import load_network
from tests.chaos.runs import Job, checkpoint_differences, metrics_differences, trace_differences
from tests.conftest import write_config
from tests.finetuning import command, lines_of, losses_of, register_classifier, result_of, seen_by
from tests.ranks import PATIENCE_S, start

STEPS = 12
LEARNING_RATE = 1e-3
SCORES = ("step", "miou", "macc", "aacc", "val_loss")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train and DIR/val, packed."""
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset.write_dataset(folder, {"train": 32, "val": 10}, side_px=(128, 150))
    for split, name in (("train", "training"), ("val", "validation")):
        pack(ade20k.find(folder / "ade20k/annotations" / name), folder / split, samples_per_shard=8)
    return folder


@pytest.fixture(scope="module")
def root(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs whose registry holds models:/pico/1."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copy(empty_database, folder)
    register_classifier(folder)
    return folder


def configuration(scenes: Path, root: Path, name: str = "segment", **sections: Any) -> Path:
    tree: dict[str, Any] = yaml.safe_load(write_config(scenes, root).read_text())
    tree |= {"augment": {"color_jitter": 0.4}, "mix": {}, "init": {"model": "models:/pico/1"}}
    tree["run"] = {"name": name, "root": str(root)}
    tree["task"] = {"name": "semantic_fpn", "channels": 32, "pyramid_channels": 32, "dropout": 0.1, "short_side": 96}
    tree["model"] |= {"image_size": 32}
    tree["image"] |= {"size": 64, "interpolation": "bilinear"}
    tree["data"] |= {"lanes": 4, "shuffle_window": 8}
    tree["optim"] |= {"schedule": "poly", "min_lr": 0.0, "layer_decay": 0.9}
    tree["train"] |= {
        "length": f"{STEPS} steps",
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "save_every": "4 steps",
        "eval_every": "6 steps",
        "ema_decay": 0.9,
    }
    tree["evaluate"] = {"batch_size": 2}
    tree["debug"] = {"trace_samples": True}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(scenes: Path, root: Path) -> Job:
    """A run on two ranks that nobody disturbed, registered as models:/segment/1."""
    path = configuration(scenes, root, tracking={"log_samples": True})
    job = Job(path, "segment", ranks=2, target="launch/finetune.py")
    job.finish()
    return job


@pytest.mark.slow
def test_killed_segmentation_resumes_to_identical_results(scenes: Path, root: Path, trained: Job) -> None:
    killed = Job(configuration(scenes, root, "killed"), "killed", ranks=2, target="launch/finetune.py")
    with killed.start() as attempt:
        assert attempt.wait_until(lambda: attempt.step >= 6 and killed.newest_step() >= 4, PATIENCE_S)
        attempt.kill(range(2), signal.SIGKILL)
        attempt.wait(PATIENCE_S)
    assert killed.newest_step() in (4, 8)
    again = killed.finish()
    assert again.resumed_at in (4, 8)
    last = f"checkpoints/step-{STEPS:08d}"
    assert checkpoint_differences(killed.folder / last, trained.folder / last) == []
    assert trace_differences(killed.folder / "trace", trained.folder / "trace") == []
    ours, reference = killed.folder / "metrics.jsonl", trained.folder / "metrics.jsonl"
    assert metrics_differences(ours, reference, STEPS, SCORES) == []


def test_samples_and_labels_are_equal_on_another_world_size(scenes: Path, root: Path, trained: Job) -> None:
    steps = 6  # more than an epoch
    path = configuration(scenes, root, "single", train={"length": f"{steps} steps"})
    single = Job(path, "single", ranks=1, target="launch/finetune.py")
    single.finish()
    seen = {(step, position): what for (step, position), what in seen_by(trained).items() if step <= steps}
    assert len(seen) == steps * 8
    assert seen_by(single) == seen
    ours, theirs = (lines_of(job.folder / "metrics.jsonl")[0] for job in (single, trained))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)  # dropout in the head differs, bf16 rounds


def test_zero_3_losses_match_unsharded_training(scenes: Path, root: Path, trained: Job) -> None:
    path = configuration(scenes, root, "sharded", engine={"precision": "fp32", "zero_stage": 3})
    sharded = Job(path, "sharded", ranks=2, target=trained.target)
    sharded.finish()
    assert losses_of(sharded) == pytest.approx(losses_of(trained), rel=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_fine_tuning_starts_from_the_registered_backbone_and_keeps_frozen_stages(
    scenes: Path, root: Path, stage: int
) -> None:
    path = configuration(
        scenes,
        root,
        f"frozen-{stage}",
        model={"frozen_stages": 2},
        optim={"lr": LEARNING_RATE, "layer_decay": None, "warmup": "0 steps"},
        train={"length": "1 steps", "ema_decay": None},
        engine={"zero_stage": stage},
    )
    job = Job(path, f"frozen-{stage}", ranks=1, target="launch/finetune.py")
    job.finish()
    given = safetensors.torch.load_file(root / "entry" / WEIGHTS)
    made = safetensors.torch.load_file(job.checkpoints / "step-00000001/model.safetensors")
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in made.items() if name.startswith("backbone.")}
    assert given.keys() - backbone.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    for name, tensor in backbone.items():
        # Adam's first step moves each weight by the learning rate; fresh weights differ by twenty times that.
        torch.testing.assert_close(tensor, given[name], rtol=0, atol=1.1 * LEARNING_RATE)
    moved = {name.split(".")[1] for name, tensor in backbone.items() if not torch.equal(tensor, given[name])}
    assert moved == {"2", "3"}


def test_segmenter_is_registered_with_task_lineage_and_metrics(root: Path, trained: Job) -> None:
    tracking_server.connect(f"sqlite:///{root / 'mlflow.db'}")
    version = registry.resolve("models:/segment@candidate")
    assert version.card.task == load_config(trained.folder / "config.yaml").task
    assert version.card.classes == [write_dataset.BACKGROUND, *NAMES]
    assert version.card.lineage["parent"] == version.tags["parent"] == "models:/pico/1"
    assert version.tags["task"] == "semantic_fpn"
    result = result_of(trained)
    assert version.card.metrics == {name: result[name] for name in version.card.metrics}
    assert set(SCORES[1:]) <= version.card.metrics.keys()
    # What serves and exports it is what evaluates it.
    card = version.card
    evaluated = build_task(card.task, card.model, card.image, card.classes).model.eval()
    evaluated.load_state_dict(safetensors.torch.load_file(version.weights))
    images = torch.rand(2, 3, 96, 64)
    torch.testing.assert_close(
        load_network.load_network(card, version.weights)(images), evaluated(images), rtol=0, atol=0
    )


def test_evaluation_on_two_ranks_reproduces_training_scores(scenes: Path, root: Path, trained: Job) -> None:
    arguments = [
        "--model",
        "models:/segment/1",
        "--data",
        scenes / "val",
        "--tracking-uri",
        f"sqlite:///{root}/mlflow.db",
    ]
    logs = [root / f"evaluate-{rank}" for rank in range(2)]
    for process in start(2, "launch/evaluate.py", arguments, logs):
        assert process.wait(PATIENCE_S) == 0
    assert_scores_of_training(json.loads(logs[0].with_suffix(".out").read_text().splitlines()[-1]), trained)


def assert_scores_of_training(found: dict[str, Any], trained: Job) -> None:
    result = result_of(trained)
    assert {name: found[name] for name in SCORES[1:]} == pytest.approx(
        {name: result[name] for name in SCORES[1:]}, abs=1e-9
    )


def test_evaluation_reproduces_training_scores_draws_and_logs(scenes: Path, root: Path, trained: Job) -> None:
    for name in ("predictions.png", "samples.png"):
        with Image.open(trained.folder / name) as picture:
            assert picture.width > 600
    sheet = root / "drawn.png"
    data = scenes / "ade20k/annotations/validation"  # unpacked
    uri = f"sqlite:///{root}/mlflow.db"
    found, _ = command(
        "launch/evaluate.py",
        *("--model", "models:/segment/1", "--data", data, "--tracking-uri", uri),
        *("--draw", 3, "--out", sheet, "--log"),
        log=root / "log",
    )
    assert_scores_of_training(found, trained)
    assert found["drawing"] == str(sheet)
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 1000, "photographs are in it"
    client = MlflowClient(uri)
    version = client.get_model_version("segment", "1")
    assert version.run_id
    logged = {file.path for file in client.list_artifacts(version.run_id, "predictions")}
    assert logged == {"predictions/drawn.png"}


def test_fine_tuning_from_a_segmenter_keeps_its_head(scenes: Path, root: Path, trained: Job) -> None:
    path = configuration(
        scenes,
        root,
        "further",
        init={"model": "models:/segment/1"},
        optim={"lr": 1e-30, "warmup": "0 steps"},
        train={"length": "1 steps", "ema_decay": None},
    )
    Job(path, "further", ranks=1, target="launch/finetune.py").finish()
    uri = f"sqlite:///{root}/mlflow.db"
    tracking_server.connect(uri)
    given = safetensors.torch.load_file(registry.resolve("models:/segment/1").weights)
    made = safetensors.torch.load_file(root / "further/checkpoints/step-00000001/model.safetensors")
    torch.testing.assert_close(made, given, rtol=0, atol=1e-20)


def test_mismatched_data_or_model_is_rejected(scenes: Path, digits: Path, root: Path, trained: Job) -> None:
    uri = f"sqlite:///{root}/mlflow.db"
    _, told = command(
        "launch/evaluate.py",
        *("--model", "models:/segment/1", "--data", digits / "val", "--tracking-uri", uri),
        log=root / "log",
        expected=2,
    )
    assert "holds labelled images, but task semantic_fpn needs images with label maps" in told
    path = configuration(scenes, root, "wide")
    finetune = ("launch/finetune.py", "--config", path, "--set")
    _, told = command(*finetune, "model.name=pvt_tiny", log=root / "log", expected=2)
    assert "init.model models:/pico/1 is a pvt_pico, but model.name is pvt_tiny" in told
    _, told = command(*finetune, "model.name=vit_tiny_patch16_224", log=root / "log", expected=2)
    assert "strides" in told
    _, told = command(*finetune, "mix.mixup_alpha=0.5", log=root / "log", expected=2)
    assert "mix.mixup_alpha has no effect with task semantic_fpn" in told
    _, told = command(*finetune, "task=classification", "--set", "model.image_size=null", log=root / "log", expected=2)
    assert "holds images with label maps, but task classification needs labelled images" in told
    other = root / "other"
    shutil.copytree(scenes / "ade20k", other)
    names = (other / ade20k.CLASSES).read_text().replace("nine", "ten")
    (other / ade20k.CLASSES).write_text(names)
    _, told = command(
        "launch/evaluate.py",
        *("--model", "models:/segment/1", "--data", other / "annotations/validation", "--tracking-uri", uri),
        log=root / "log",
        expected=2,
    )
    assert "was trained on 11: background, zero" in told
    assert not (root / "wide").exists()


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_probe_scores_features_of_a_registered_model(digits: Path, root: Path, kind: str) -> None:
    uri = f"sqlite:///{root}/mlflow.db"
    found, _ = command(
        "launch/evaluate.py",
        *("--model", "models:/pico/1", "--data", digits / "val", "--train", digits / "train"),
        *("--probe", kind, "--tracking-uri", uri),
        log=root / "log",
    )
    assert found["samples"] == 360
    assert found["top1"] > 0.7  # of random features: a tenth would be chance


def test_probe_without_suitable_training_data_is_rejected(scenes: Path, digits: Path, root: Path, trained: Job) -> None:
    arguments = ("--model", "models:/pico/1", "--data", digits / "val", "--tracking-uri", f"sqlite:///{root}/mlflow.db")
    _, told = command("launch/evaluate.py", *arguments, "--probe", "knn", log=root / "log", expected=2)
    assert "--probe and --train belong together" in told
    _, told = command(
        "launch/evaluate.py", *arguments, "--probe", "knn", "--train", scenes / "train", log=root / "log", expected=2
    )
    assert "holds images with label maps" in told
