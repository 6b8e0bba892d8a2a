"""What holds for every network that is made to be trained, evaluated, served or exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config import Classification, Image, Model
from pipeline.tasks.build import build_task, build_trained
from pipeline.track.card import WEIGHTS, Card
from pipeline.track.network import load

CARD = Card(
    task=Classification(),
    model=Model(name="pvt_pico"),
    image=Image(size=32),
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
    return load(CARD, weights)


@pytest.mark.parametrize("make", [trained, evaluated, served_or_exported])
def test_fp32_is_no_tf32(make: Callable[[Path], Any], tmp_path: Path) -> None:
    safetensors.torch.save_file(trained(tmp_path).state_dict(), tmp_path / WEIGHTS)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    make(tmp_path / WEIGHTS)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=True):  # which raises where torch's two ways to say it were mixed
        pass
