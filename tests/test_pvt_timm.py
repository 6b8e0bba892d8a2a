"""What timm and the libraries that build on it expect of a model."""

import re
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

import pvt

VARIANTS = ["pvt_large", "pvt_medium", "pvt_pico", "pvt_small", "pvt_tiny"]


def create(variant: str, **kwargs: Any) -> Any:  # to type checkers, attributes of an nn.Module are tensors
    return timm.create_model(variant, **kwargs)


def pico(**kwargs: Any) -> Any:
    model = create("pvt_pico", **{"img_size": 64, "num_classes": 10, **kwargs})
    assert isinstance(model, pvt.PyramidVisionTransformer)
    return model.eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_all_variants_are_registered_with_timm():
    assert [name for name in timm.list_models("pvt_*") if not name.startswith("pvt_v2")] == VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_pretrained_cfg_is_complete(variant):
    with torch.device("meta"):
        model = create(variant)
    data = resolve_data_config(model=model)
    assert data["input_size"] == (3, 224, 224)
    assert data["mean"] == (0.485, 0.456, 0.406)
    assert data["std"] == (0.229, 0.224, 0.225)
    assert data["interpolation"] == "bicubic"
    assert round(224 / data["crop_pct"]) == 256
    config = model.pretrained_cfg
    assert model.default_cfg is config
    assert config["num_classes"] == model.num_classes == 1000
    assert config["license"] == "apache-2.0"
    assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert not timm.is_model_pretrained(variant)


def test_pretrained_weights_are_unavailable():
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("pvt_pico", pretrained=True)


def test_create_model_arguments_are_applied(image):
    model = pico(img_size=(32, 64), in_chans=1, num_classes=7, drop_rate=0.2, drop_path_rate=0.3)
    assert model(image[:, :1]).shape == (2, 7)
    assert [stage.grid for stage in model.stages] == [(8, 16), (4, 8), (2, 4), (1, 2)]
    assert [stage.pos_embed.shape[1] for stage in model.stages] == [128, 32, 8, 3]
    assert model.head_drop.p == 0.2
    assert model.drop_path_rates[-1] == 0.3


# Classifier


def test_forward_is_features_then_head(image):
    model = pico()
    tokens = model.forward_features(image)
    assert tokens.shape == (2, 1 + 2 * 2, model.num_features)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert torch.equal(pooled, tokens[:, 0])
    assert torch.equal(model(image), model.head(pooled))


def test_reset_classifier_replaces_head_and_pooling(image):
    model = pico().double().train()
    features = model.forward_features(image.double())
    model.reset_classifier(5)
    head = model.get_classifier()
    assert isinstance(head, nn.Linear)
    assert (head.out_features, head.weight.dtype, head.training) == (5, torch.float64, True)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert head.bias.eq(0).all()
    assert model(image.double()).shape == (2, model.num_classes) == (2, 5)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image.double()), features[:, 0])
    model.reset_classifier(0, "")
    assert torch.equal(model(image.double()), features)
    model.reset_classifier(3, "token")
    assert model(image.double()).shape == (2, 3)
    with pytest.raises(ValueError, match="global_pool='avg'"):
        model.reset_classifier(3, "avg")


# Feature maps


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_only_returns_four_stages_all_trainable(variant):
    backbone = create(variant, features_only=True, img_size=64)
    channels = [32, 64, 96, 128] if variant == "pvt_pico" else [64, 128, 320, 512]
    assert backbone.feature_info.channels() == channels
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    grids = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(x.shape) for x in maps] == [(1, c, *grid) for c, grid in zip(channels, grids, strict=True)]
    # No parameter is left without a gradient: data-parallel training would wait for it.
    torch.stack([x.square().mean() for x in backbone(torch.randn(1, 3, 64, 96))]).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_features_only_maps_are_raw_stage_outputs(image):
    model = pico()
    backbone = create("pvt_pico", features_only=True, img_size=64).eval()
    state = {"model." + key: value for key, value in model.state_dict().items()}
    result = backbone.load_state_dict(state, strict=False)
    assert not result.missing_keys
    assert {key.split(".")[1] for key in result.unexpected_keys} == {"norm", "head"}
    x = image
    for stage, actual in zip(model.stages, backbone(image), strict=True):
        tokens, (height, width) = stage(x)
        x = tokens[:, -height * width :].transpose(1, 2).reshape(2, -1, height, width)
        assert torch.equal(actual, x)
        assert actual.is_contiguous()


def test_out_indices_prune_later_stages(image):
    backbone = create("pvt_pico", features_only=True, out_indices=(0, 2))
    assert backbone.feature_info.channels() == [32, 96]
    assert [x.shape[1] for x in backbone(image)] == [32, 96]
    assert len(backbone.model.stages) == 3
    last = create("pvt_pico", features_only=True, out_indices=(-1,))
    assert last.feature_info.reduction() == [32]


def test_forward_intermediates_options(image):
    model = pico()
    tokens, maps = model.forward_intermediates(image)
    assert torch.equal(tokens, model.forward_features(image))
    assert [x.shape[1] for x in maps] == [32, 64, 96, 128]
    assert torch.equal(model.forward_intermediates(image, 2, intermediates_only=True)[0], maps[2])
    normed = model.forward_intermediates(image, norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(normed[:3], maps[:3], strict=True))
    assert torch.equal(normed[3].flatten(2).transpose(1, 2), tokens[:, 1:])

    stage_3_ran = []
    model.stages[3].register_forward_hook(lambda *_: stage_3_ran.append(True))
    last, (first,) = model.forward_intermediates(image, [0], stop_early=True)
    assert not stage_3_ran
    assert torch.equal(first, maps[0])
    assert torch.equal(last, maps[0].flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(image, output_fmt="NLC")


def test_prune_intermediate_layers_removes_later_stages(image):
    model = pico(drop_path_rate=0.3)
    _, maps = model.forward_intermediates(image)
    assert model.prune_intermediate_layers([1]) == [1]
    assert (model.num_features, model.num_classes, len(model.drop_path_rates)) == (64, 0, 4)
    tokens, (pruned,) = model.forward_intermediates(image, [1], drop_path=torch.ones(4, 2))
    assert torch.equal(pruned, maps[1])
    assert torch.equal(tokens, model(image))

    model = pico()
    expected = model(image)
    assert model.prune_intermediate_layers(4, prune_head=False) == [0, 1, 2, 3]
    assert torch.equal(model(image), expected)
    model.prune_intermediate_layers(1, prune_norm=True)
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)


# Optimisers


def test_weight_decay_spares_class_token_biases_and_norms():
    model = pico()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    expected = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert decayed == expected - {"stages.3.cls_token"}
    assert "stages.3.pos_embed" in decayed


def test_group_matcher_orders_layers_by_block():
    model = pico(depths=(2, 1, 2, 1))
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    blocks = ["0.blocks.0", "0.blocks.1", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0"]
    order = {f"stages.{block}": layer for layer, block in enumerate(blocks, 1)}
    for name, layer in layers.items():
        if match := re.match(r"stages\.\d\.blocks\.\d", name):
            assert layer == order[match[0]], name
        elif match := re.match(r"stages\.([1-3])\.", name):
            assert layer == order[f"stages.{match[1]}.blocks.0"], name
        else:
            assert layer == (0 if name.startswith("stages.0.") else 7), name


def test_coarse_group_matcher_groups_by_stage():
    model = pico()
    layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    for name, layer in layers.items():
        if re.match(r"stages\.0\.(patch|pos)", name):
            assert layer == 0, name
        elif match := re.match(r"stages\.(\d)", name):
            assert layer == 1 + int(match[1]), name
        else:
            assert layer == 5, name


def test_layer_decay_scales_lr_by_depth():
    optimizer = create_optimizer_v2(pico(), opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == [0.5**i for i in range(5, -1, -1)]  # stem, four blocks, norm and head
