"""What fine-tuning takes over from a pretrained model: timm's and our own networks."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import pvt  # noqa: F401 - registers its models with timm
from pipeline.config import ModelConfig
from pipeline.errors import InputError
from pipeline.tasks.classify import build_model
from pipeline.tasks.pretrained import load_pretrained


def network(name: str = "pvt_pico", size: int = 32, classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(ModelConfig(name=name), size, classes).eval()


@pytest.mark.parametrize("name", ["pvt_pico", "vit_tiny_patch16_224"])
def test_new_classes_get_fresh_head_on_pretrained_features(name: str) -> None:
    old, new = network(name), network(name, classes=3, seed=1)
    head = {key: value.clone() for key, value in new.state_dict().items() if key.startswith("head.")}
    load_pretrained(new, old.state_dict(), "models:/m/1", keep_head=False)
    images = torch.rand(2, 3, 32, 32)
    features: Any = (model.forward_features(images) for model in (old, new))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(*features, rtol=0, atol=0)
    assert head
    assert all(torch.equal(value, new.state_dict()[key]) for key, value in head.items())


def test_same_classes_keep_pretrained_head() -> None:
    old, new = network(), network(seed=1)
    load_pretrained(new, old.state_dict(), "models:/m/1", keep_head=True)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(new(images), old(images), rtol=0, atol=0)


def test_position_embeddings_are_resized_for_other_image_size() -> None:
    old, new = network(size=64), network(size=96, seed=1)
    load_pretrained(new, old.state_dict(), "models:/m/1", keep_head=True)
    images = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(new(images), old(images), rtol=1e-5, atol=1e-6)


def test_other_architecture_is_rejected() -> None:
    for other in (network("pvt_tiny"), timm.create_model("resnet18", num_classes=10)):
        with pytest.raises(InputError, match=r"models:/m/1 does not fit the model: .* \(\d+ in all\)"):
            load_pretrained(network("pvt_pico"), other.state_dict(), "models:/m/1", keep_head=True)
