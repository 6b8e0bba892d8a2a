"""Layers and stages of timm's models, against timm's own layer-wise decay, and what freezing leaves as it was."""

from typing import Any

import pytest
import timm
import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from pipeline.tasks.layer_groups import freeze, layers, num_stages, stages
from pvt.semantic_fpn import backbone


def classifier(name: str) -> nn.Module:
    torch.manual_seed(0)
    sized: dict[str, Any] = {"img_size": 64} if name == "pvt_pico" else {}
    model = timm.create_model(name, num_classes=10, **sized)
    for parameter in model.parameters():
        if not parameter.any():  # some branches begin with a weight of 0, which no gradient gets through
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", ["pvt_pico", "resnet50", "convnext_atto"])
def test_layers_match_timm_layer_decay(name: str) -> None:
    model = classifier(name)
    depths = layers(model)
    top = max(depths.values())
    ours = {parameter: 0.75 ** (top - depths[name]) for name, parameter in model.named_parameters()}
    groups: Any = param_groups_layer_decay(model, layer_decay=0.75)
    theirs = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert ours == pytest.approx(theirs)
    assert len(set(ours.values())) > 4


@pytest.mark.parametrize("name", ["pvt_pico", "resnet50", "convnext_atto"])
def test_backbone_layers_match_classifier_layers(name: str) -> None:
    whole, pruned = layers(classifier(name)), layers(backbone(name, 64), "backbone.")
    assert pruned == {f"backbone.{key}": whole[key] for key in whole if f"backbone.{key}" in pruned}
    assert max(pruned.values()) == max(whole.values()) - 1


def test_pvt_parameters_are_assigned_to_stages() -> None:
    model = classifier("pvt_pico")
    expected = {name: int(name.split(".")[1]) for name, _ in model.named_parameters() if name.startswith("stages.")}
    assert stages(model) == {**expected, "norm.weight": 4, "norm.bias": 4}
    assert stages(backbone("pvt_pico", 64), "b.") == {f"b.{name}": stage for name, stage in expected.items()}
    assert num_stages(model) == num_stages(backbone("pvt_pico", 64)) == 4


def test_resnet_parameters_are_assigned_to_stages() -> None:
    found = stages(classifier("resnet50"), "b.")
    assert found["b.conv1.weight"] == found["b.bn1.weight"] == found["b.layer1.2.bn3.bias"] == 0
    assert found["b.layer2.0.conv1.weight"] == 1
    assert found["b.layer4.2.bn3.weight"] == 3 == max(found.values())
    assert "b.fc.weight" not in found


@pytest.mark.parametrize("name", ["pvt_pico", "resnet18", "efficientnet_b0"])
@pytest.mark.parametrize("frozen", [0, 2, 100])
def test_frozen_stages_are_unchanged_by_training(name: str, frozen: int) -> None:
    model = classifier(name)
    stage_of, before = stages(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    freeze(model, frozen)
    # With a decay, as a weight that only saw no gradient would move by it.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    images = torch.randn(4, 3, 64, 64)
    model(images)  # in training mode as it was built, and then as a loop sets it
    model.train()(images).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert list(after) == list(before)
    # Running means are beside the weights of their norms.
    of_norm = {key: key.rpartition(".")[0] + ".weight" for key in after}
    stage = {key: stage_of.get(key, stage_of.get(of_norm[key], 1000)) for key in after}
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert all(stage[key] >= frozen for key in moved)
    assert moved >= {key for key in after if stage[key] >= frozen}


def test_freezing_all_stages_leaves_only_head_trainable() -> None:
    model = classifier("pvt_pico")
    freeze(model, 4)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
