"""docs/extending.md, followed: a toy task, backbone, data layout and export (tests/toys.py) go all the way."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline import network
from pipeline.config import Config, ModelConfig, SemanticFpnConfig
from pipeline.config.task import TASKS
from pipeline.errors import InputError
from pipeline.feed.task_transforms import TRANSFORMS
from pipeline.network import NETWORKS
from pipeline.tasks import draw_predictions
from pipeline.tasks.build import TASK_CLASSES
from pipeline.tasks.layer_groups import freeze
from pipeline.track.export.graphs import GRAPHS
from pipeline.track.serve.served_model import SERVED
from tests import toys
from tests.conftest import run_ranks
from tests.ranks import ROOT


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the toys did in a run of 40 steps."""
    folder = tmp_path_factory.mktemp("toys")
    for split, count in (("train", 96), ("val", 24)):
        toys.write_named(folder / f"{split}.named", count)
    tree: dict[str, Any] = {
        "run": {"name": "toys", "root": str(folder / "runs")},
        "task": {"name": "ordinal", "guess": 1.0},
        "model": {"name": "toy_pyramid"},
        "image": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
        "data": {**{split: str(folder / f"{split}.named") for split in ("train", "val")}, "lanes": 1},
        "optim": {"lr": 1e-2, "warmup": "4 steps"},
        "train": {"length": "40 steps", "global_batch_size": 24},
        "engine": {"precision": "fp32"},
        "tracking": {"system_metrics": False, "report": False},
    }
    tree["data"]["cache"] = str(folder / "cache")
    path = folder / "toys.yaml"
    path.write_text(yaml.safe_dump(tree))
    return run_ranks(1, "extending", path, folder / "exports")[-1]


def test_toy_task_trains_registers_and_scores(report: dict[str, Any]) -> None:
    assert report["trained"]["model"] == "models:/toys/1"
    assert report["trained"]["rounded"] > 0.9
    assert report["evaluated"]["rounded"] == report["trained"]["rounded"]


def test_toy_task_is_served_with_its_own_columns(report: dict[str, Any]) -> None:
    assert report["columns"] == ["number"]
    assert [round(answer["number"]) for answer in report["answers"]] == [0, 0, 0, 0]
    assert report["loads"][0].startswith("number ")


def test_toy_task_predicts_what_it_is_served_with(report: dict[str, Any]) -> None:
    predicted = [row["number"] for row in report["predictions"]]
    assert len(predicted) == 24
    served = [answer["number"] for answer in report["answers"]]
    assert predicted[: len(served)] == pytest.approx(served, abs=0.02)  # DALI and Pillow decode to a grey level


def test_toy_model_is_exported_to_the_toy_format(report: dict[str, Any]) -> None:
    assert report["export"]["logit_difference"] == 0
    with np.load(Path(report["export"]["out"]) / "weights.npz") as arrays:
        assert "head.weight" in arrays


def test_task_without_drawing_is_rejected_by_draw() -> None:
    task: Any = toys.OrdinalTask(torch.nn.Identity(), ["0"])
    config: Any = SimpleNamespace(task=toys.OrdinalConfig())
    none: Any = None
    with pytest.raises(InputError, match="task ordinal cannot be drawn"):
        draw_predictions.draw_predictions(task, none, config, 1, Path("x.png"), "")


def test_new_task_section_is_validated_and_round_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "ordinal", toys.OrdinalConfig)
    tree = {
        "run": {"name": "a"},
        "model": {"name": "toy_pyramid"},
        "data": {"train": "b"},
        "optim": {"lr": 1},
        "train": {"length": "1 step", "global_batch_size": 48},
    }
    config = Config.model_validate({**tree, "task": {"name": "ordinal", "guess": 3}})
    assert config.task == toys.OrdinalConfig(guess=3.0)
    assert Config.model_validate(config.model_dump()) == config
    with pytest.raises(ValueError, match="ordinal"):
        Config.model_validate({**tree, "task": {"name": "ordnal"}})


def test_toy_backbone_carries_a_dense_network() -> None:
    dense = network.build(SemanticFpnConfig(), ModelConfig(name="toy_pyramid"), 64, 3)
    assert dense.eval()(torch.zeros(1, 3, 96, 64)).shape == (1, 3, 24, 16)
    freeze(dense.backbone, 1)
    frozen = {name for name, parameter in dense.backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {"stem.weight", "stem.bias", "stages.0.weight", "stages.0.bias"}


def test_tables_have_every_task() -> None:
    for table in (NETWORKS, TRANSFORMS, TASK_CLASSES, SERVED, GRAPHS):
        assert table.keys() == TASKS.keys()


def test_document_names_the_existing_tables() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    paths = set(re.findall(r"`((?:pipeline|pvt|tests|docs)/[\w/]+\.\w+)`", text))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    worker = (ROOT / "tests/workers/extending.py").read_text()
    for table in ("TASKS", "NETWORKS", "TRANSFORMS", "TASK_CLASSES", "SERVED", "GRAPHS", "LAYOUTS", "MODULES"):
        assert f"`{table}`" in text
        assert table in worker
