"""Fine-tuning jobs in tests: what they start from, and what they leave."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pipeline import files
from pipeline.config import ClassificationConfig, ImageConfig, ModelConfig
from pipeline.tasks import classify
from pipeline.track import tracking_server
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import registry
from tests.chaos.runs import Job
from tests.ranks import PATIENCE_S, start


def register_classifier(folder: Path) -> None:
    """In FOLDER/mlflow.db models:/pico/1, a classifier of ten classes at 32 px, with random weights; they are in
    FOLDER/entry, too."""
    client = tracking_server.connect(f"sqlite:///{folder / 'mlflow.db'}", create=True)
    torch.manual_seed(1)
    classifier = classify.build_model(ModelConfig(name="pvt_pico"), 32, 10)
    entry = folder / "entry"
    entry.mkdir()
    safetensors.torch.save_file(classifier.state_dict(), entry / WEIGHTS)
    ModelCard(
        task=ClassificationConfig(),
        model=ModelConfig(name="pvt_pico"),
        image=ImageConfig(size=32),
        eval_batch_size=8,
        classes=[str(digit) for digit in range(10)],
        metrics={},
        sha256={WEIGHTS: files.sha256(entry / WEIGHTS)},
        lineage={"run": "a" * 32, "step": "1", "data": "d" * 64},
    ).write(entry)
    experiment = tracking_server.find_experiment(client, "pretrain")
    registry.register(client, "pico", entry, experiment_id=experiment, run_id=None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def result_of(job: Job) -> dict[str, Any]:
    return json.loads((job.folder / "result.json").read_text())


def losses_of(job: Job) -> list[float]:
    return [line["loss"] for line in lines_of(job.folder / "metrics.jsonl") if "loss" in line]


def seen_by(job: Job) -> dict[tuple[int, int], tuple[str, str, str]]:
    """By step and position what was trained on: key, hash of the pixels, hash of the target."""
    lines = [line for path in job.folder.glob("trace/*.jsonl") for line in lines_of(path)]
    return {
        (line["step"], sample["position"]): (sample["key"], sample["pixels"], sample["label"])
        for line in lines
        for sample in line["samples"]
        if sample["weight"]
    }


def command(target: str, *arguments: object, log: Path, expected: int = 0) -> tuple[dict[str, Any], str]:
    """The result and the messages of a command on one rank."""
    (process,) = start(1, target, arguments, [log])
    told = log.with_suffix(".err")
    assert process.wait(PATIENCE_S) == expected, told.read_text()
    lines = log.with_suffix(".out").read_text().splitlines()
    return {} if expected else json.loads(lines[-1]), told.read_text()
