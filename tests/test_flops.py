"""Counted operations against the paper's, and what a run's MFU is made of."""

import pytest
import torch
from torch import nn

from pipeline import flops, network
from pipeline.config import ClassificationConfig, ModelConfig
from pipeline.train.meters import Utilisation


@pytest.mark.parametrize(("model", "gmacs"), [("pvt_tiny", 1.9), ("pvt_large", 9.8), ("resnet50", 4.1)])
def test_macs_match_papers(model: str, gmacs: float) -> None:
    counted = network.training_flops(ClassificationConfig(), ModelConfig(name=model), 224, 1000)
    assert counted / 3 / 2 / 1e9 == pytest.approx(gmacs, abs=0.06)


def test_training_flops_are_two_per_mac_in_three_passes() -> None:
    assert flops.training_flops(lambda: nn.Conv2d(3, 8, 4, stride=4), 32) == 3 * 2 * (3 * 4 * 4 * 8) * (8 * 8)


def test_mfu_is_model_flops_over_device_flops() -> None:
    assert Utilisation(lambda size: size**2, 1e6).mfu(25.0, 100) == pytest.approx(0.25)


def test_matmul_throughput_is_measured() -> None:
    fastest = flops.matrix_flop_s(torch.device("cpu"), torch.float32)
    assert 1e9 < fastest < 1e14
