"""What holds for every network that is made to be trained, evaluated, served or exported."""

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.commands import scenes
from pipeline.config import ClassificationConfig, DetrConfig, ImageConfig, ModelConfig
from pipeline.errors import InputError
from pipeline.network import build
from pipeline.shards.open_data import open_data
from pipeline.tasks.build import build_task, build_trained
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.serve.load_network import load_network
from tests.ranks import ROOT

CARD = ModelCard(
    task=ClassificationConfig(),
    model=ModelConfig(name="pvt_pico"),
    image=ImageConfig(size=32),
    eval_batch_size=4,
    classes=["one", "two"],
    metrics={},
    sha256={},
    lineage={},
)


def trained(weights: Path) -> Any:
    return build_task(CARD.task, CARD.model, CARD.image, CARD.classes).model


def evaluated(weights: Path) -> Any:
    return build_trained(CARD.task, CARD.model, CARD.image, CARD.classes, weights).model


def served_or_exported(weights: Path) -> Any:
    return load_network(CARD, weights)


@pytest.mark.parametrize("make", [trained, evaluated, served_or_exported])
def test_tf32_is_disabled_for_fp32(make: Callable[[Path], Any], tmp_path: Path) -> None:
    safetensors.torch.save_file(trained(tmp_path).state_dict(), tmp_path / WEIGHTS)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    make(tmp_path / WEIGHTS)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=True):  # which raises where torch's two ways to say it were mixed
        pass


def test_mismatched_or_damaged_weights_are_rejected_in_one_line(tmp_path: Path) -> None:
    safetensors.torch.save_file({"head.bias": torch.zeros(2)}, tmp_path / WEIGHTS)
    for make in (evaluated, served_or_exported):
        with pytest.raises(
            InputError, match=rf"^{tmp_path / WEIGHTS}: are not the weights of the network .*"
        ) as refused:
            make(tmp_path / WEIGHTS)
        assert len(str(refused.value).splitlines()) == 1
    (tmp_path / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little"))
    for make in (evaluated, served_or_exported):
        with pytest.raises(InputError, match=rf"^{tmp_path / WEIGHTS}: cannot be read as weights: .*again$"):
            make(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    ("package", "extra", "need"),
    [
        ("transformers", "detr", lambda: build(DetrConfig(), ModelConfig(name="pvt_pico"), 32, 2)),
        ("skimage", "scenes", lambda: scenes.main()),
        ("s3fs", "s3", lambda: open_data("s3://bucket/data")),
    ],
)
def test_missing_optional_package_is_reported_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, extra: str, need: Callable[[], Any]
) -> None:
    ours = {"transformers": "pvt.detr", "skimage": "pipeline.scenes"}.get(package, package)
    for name in [name for name in sys.modules if f"{name}.".startswith((f"{ours}.", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--out", str(tmp_path / "out")])
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # once opened, it is kept
    with pytest.raises(InputError, match=rf"{package}.*pip install -e '\.\[{extra}\]' in this project's folder$"):
        need()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.search(rf"\[.*\b{extra}\b.*\]", declared["dev"][0])  # what `make setup` installs
