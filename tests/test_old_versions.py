"""Versions that an earlier revision registered still load, answer as they did, and verify.

    tests/data/version-63a1a75/        a version's files, as revision 63a1a75 registered them; weights are compressed
    tests/data/version-63a1a75.json    its tags; JPEGs, and what it answered; model cards of that revision's other tasks

MLflow runs the code that a version brings along, so the modules and names that this code imports have to stay. The
weights are pvt_pico's, trained on digits and then rounded to three values a tensor, so that they compress. Metrics and
lineage are made up.
"""

import ast
import base64
import importlib
import json
import lzma
import runpy
import shutil
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas
import pytest
import safetensors.torch
import torch

from pipeline.tasks.build import build_task
from pipeline.track import tracking_server
from pipeline.track.model_card import CARD, WEIGHTS, ModelCard
from pipeline.track.registry import registry
from tests.ranks import ROOT

# MLflow's, about its use of pandas.
pytestmark = pytest.mark.filterwarnings("ignore:Operation with range is deprecated")

STORED = ROOT / "tests/data/version-63a1a75"
SERVED = STORED / "served.py"
RECORDED: dict[str, Any] = json.loads(STORED.with_suffix(".json").read_text())
IMAGES = [base64.b64decode(image) for image in RECORDED["images"]]
URI = "models:/digits/1"
OLDER_NAMES = [("pipeline.track.package", "TOP_K")]  # what the code of versions from before 63a1a75 imports besides
COLUMNS = {
    "semantic_fpn": {"mask", "labels", "values", "shares"},
    "retinanet": {"boxes", "labels", "scores"},
    "mask_rcnn": {"boxes", "labels", "scores", "segmentations"},
    "detr": {"boxes", "labels", "scores"},
}


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The version's files as they were registered."""
    folder = tmp_path / "version"
    shutil.copytree(STORED, folder)
    packed = folder / f"artifacts/{WEIGHTS}.xz"
    (folder / "artifacts" / WEIGHTS).write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()
    return folder


def check_answers(folder: Path) -> None:
    """Checks that the version in `folder` gives the recorded answers."""
    model = mlflow.pyfunc.load_model(str(folder))
    found = model.predict(pandas.DataFrame({"image": IMAGES}), params={"top_k": RECORDED["top_k"]})
    for row, expected in zip(found.to_dict("records"), RECORDED["answers"], strict=True):
        assert row["label"] == expected["label"]
        assert row["labels"] == expected["labels"]
        assert row["score"] == pytest.approx(expected["score"], abs=1e-5)
        assert row["scores"] == pytest.approx(expected["scores"], abs=1e-5)


def imported_names(code: Path) -> list[tuple[str, str]]:
    """Returns module and name of each thing of this project that a file imports."""
    statements = [node for node in ast.walk(ast.parse(code.read_text())) if isinstance(node, ast.ImportFrom)]
    pairs = [(statement.module or "", alias.name) for statement in statements for alias in statement.names]
    return [(module, name) for module, name in pairs if module.split(".")[0] in ("pipeline", "pvt")]


def test_old_version_gives_its_recorded_predictions(version: Path) -> None:
    check_answers(version)


def test_old_version_files_match_the_digests_in_its_tags(version: Path, tmp_path: Path) -> None:
    client = tracking_server.connect(f"sqlite:///{tmp_path / 'mlflow.db'}", create=True)
    client.create_registered_model("digits")
    client.create_model_version("digits", version.as_uri(), tags=RECORDED["tags"])
    assert registry.verify(URI)["ok"]
    resolved = registry.resolve(URI, tmp_path / "cache")
    assert resolved.card.classes == [str(digit) for digit in range(7)]
    check_answers(resolved.folder.parent)
    (version / "served.py").write_text("# not what was registered\n")
    assert not registry.verify(URI)["ok"]


def test_old_version_weights_can_be_registered_again(version: Path, tmp_path: Path) -> None:
    client = tracking_server.connect(f"sqlite:///{tmp_path / 'mlflow.db'}", create=True)
    experiment = tracking_server.find_experiment(client, "pretrain")
    uri = registry.register(client, "digits", version / "artifacts", experiment_id=experiment, run_id=None)
    check_answers(registry.resolve(uri, tmp_path / "cache").folder.parent)


@pytest.mark.parametrize(("module", "name"), [*imported_names(SERVED), *OLDER_NAMES])
def test_names_imported_by_old_version_code_still_exist(module: str, name: str) -> None:
    if not hasattr(importlib.import_module(module), name):
        importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("task", COLUMNS)
def test_old_version_code_serves_every_dense_task(task: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(json.dumps(RECORDED["cards"][task]))
    card = ModelCard.read(tmp_path)
    assert card.task.name == task
    torch.manual_seed(0)
    network = build_task(card.task, card.model, card.image, card.classes).model
    safetensors.torch.save_file(network.state_dict(), tmp_path / WEIGHTS)
    code = runpy.run_path(str(SERVED))
    served = code["answering"](code["Card"].read(tmp_path), tmp_path / WEIGHTS)
    headers = [code["images"].header(image) for image in IMAGES]
    served.check(headers, {}, 1 << 20)
    with torch.inference_mode():
        answers = served.answers([served.view(image) for image in IMAGES], {})
    assert len(answers) == len(IMAGES)
    assert all(answer.keys() == COLUMNS[task] for answer in answers)
