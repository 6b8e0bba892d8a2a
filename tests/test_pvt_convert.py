"""Converters between our state dicts, the public repository's and Transformers'."""

from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from transformers import PvtConfig, PvtForImageClassification

import pvt
from pvt.convert import from_any

TO = {"public": pvt.to_public, "transformers": pvt.to_transformers}
FROM = {"public": pvt.from_public, "transformers": pvt.from_transformers}


def create(variant: str = "pvt_pico", **kwargs: Any) -> Any:
    return timm.create_model(variant, **{"img_size": 32, "num_classes": 10, **kwargs})


def public_keys(depths, sr_ratios=(8, 4, 2, 1)):
    """Keys of the public repository, spelled out."""
    keys = {"cls_token"}
    for i, (depth, sr_ratio) in enumerate(zip(depths, sr_ratios, strict=True), 1):
        modules = [f"patch_embed{i}.proj", f"patch_embed{i}.norm"]
        for j in range(depth):
            names = ["norm1", "norm2", "attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2"]
            names += ["attn.sr", "attn.norm"] if sr_ratio > 1 else []
            modules += [f"block{i}.{j}.{name}" for name in names]
        modules += ["norm", "head"] if i == 4 else []
        keys |= {f"pos_embed{i}"} | {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return keys


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


@pytest.mark.parametrize("layout", TO)
@pytest.mark.parametrize("variant", ["pvt_pico", "pvt_small"])
@pytest.mark.parametrize("num_classes", [10, 0])
def test_state_dict_conversion_round_trips(layout, variant, num_classes):
    state = create(variant, num_classes=num_classes).state_dict()
    converted = TO[layout](state)
    assert_same(FROM[layout](converted), state)
    assert_same(TO[layout](FROM[layout](converted)), converted)
    assert_same(from_any(converted), state)
    assert_same(from_any(state), state)


def test_public_keys_match_the_public_repository():
    state = create("pvt_small").state_dict()
    public = pvt.to_public(state)
    assert public.keys() == public_keys((3, 4, 6, 3))
    for ours, theirs in {
        "stages.0.pos_embed": "pos_embed1",
        "stages.3.cls_token": "cls_token",
        "stages.1.patch_embed.proj.weight": "patch_embed2.proj.weight",
        "stages.2.blocks.5.attn.kv.bias": "block3.5.attn.kv.bias",
        "stages.0.blocks.1.attn.norm.weight": "block1.1.attn.norm.weight",
        "norm.bias": "norm.bias",
        "head.weight": "head.weight",
    }.items():
        assert public[theirs] is state[ours]


def test_transformers_keys_and_shapes_match_hugging_face():
    state = pvt.to_transformers(create("pvt_tiny", img_size=224).state_dict())
    twin = PvtForImageClassification(PvtConfig(num_labels=10)).state_dict()
    assert state.keys() == twin.keys()
    assert all(state[key].shape == twin[key].shape for key in twin)


def test_kv_is_split_into_key_and_value_for_transformers(tmp_path):
    state = create().state_dict()
    converted = pvt.to_transformers(state)
    kv = state["stages.2.blocks.0.attn.kv.weight"]
    prefix = "pvt.encoder.block.2.0.attention.self."
    assert torch.equal(converted[prefix + "key.weight"], kv[:96])
    assert torch.equal(converted[prefix + "value.weight"], kv[96:])
    safetensors.torch.save_file(converted, tmp_path / "model.safetensors")
    assert_same(pvt.from_transformers(safetensors.torch.load_file(tmp_path / "model.safetensors")), state)


def test_converters_do_not_modify_their_input():
    state = create().state_dict()
    before = dict(state)
    for convert in (pvt.to_public, pvt.to_transformers, from_any):
        convert(state)
    assert list(state) == list(before)
    assert all(state[key] is before[key] for key in before)


def test_training_checkpoint_is_unwrapped():
    state = create().state_dict()
    checkpoint = {"model": pvt.to_public(state), "optimizer": {"state": {}}, "epoch": 299}
    assert_same(pvt.from_public(checkpoint), state)
    assert_same(from_any(checkpoint), state)


@pytest.mark.parametrize(
    ("layout", "missing"),
    [
        ("ours", "stages.1.blocks.0.attn.sr.bias"),
        ("ours", "stages.0.patch_embed.proj.weight"),
        ("ours", "head.bias"),
        ("public", "pos_embed4"),
        ("public", "block3.0.mlp.fc2.bias"),
        ("public", "cls_token"),
        ("transformers", "pvt.encoder.block.0.0.attention.self.value.weight"),
        ("transformers", "pvt.encoder.layer_norm.weight"),
    ],
)
def test_missing_and_unknown_keys_are_reported(layout, missing):
    state = create().state_dict()
    state = state if layout == "ours" else TO[layout](state)
    convert = FROM.get(layout, pvt.to_public)
    extra = state | {"extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing keys \[\], unknown keys \['extra.weight'\]"):
        convert(extra)
    del extra[missing]
    with pytest.raises(ValueError, match=rf"missing keys \['{missing}'\], unknown keys \['extra.weight'\]"):
        convert(extra)


def test_missing_block_or_stage_is_reported():
    state = pvt.to_public(create("pvt_tiny").state_dict())
    without_block = {key: tensor for key, tensor in state.items() if not key.startswith("block2.0.")}
    with pytest.raises(ValueError, match=r"missing keys \['block2\.0\.norm1\.weight'.*, unknown keys \[\]"):
        pvt.from_public(without_block)
    without_stage = {key: tensor for key, tensor in state.items() if not key.startswith("block4.")}
    with pytest.raises(ValueError, match=r"missing keys \['block4\.0\.norm1\.weight'.*, unknown keys \[\]"):
        pvt.from_public(without_stage)


def test_state_dict_of_another_layout_is_rejected():
    state = create().state_dict()
    with pytest.raises(ValueError, match=r"'public': missing keys .*'pos_embed1'.*'stages\.0\.pos_embed'"):
        pvt.from_public(state)


# Through timm


@pytest.mark.parametrize("layout", ["ours", "public", "public training checkpoint", "transformers"])
def test_timm_checkpoint_path_loads_every_layout(layout, tmp_path):
    state = create().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save(
        {
            "ours": state,
            "public": pvt.to_public(state),
            "public training checkpoint": {"model": pvt.to_public(state), "epoch": 299},
            "transformers": pvt.to_transformers(state),
        }[layout],
        path,
    )
    assert_same(create(checkpoint_path=str(path)).state_dict(), state)


def test_pretrained_file_loads_into_features_only_backbone(tmp_path):
    """timm's way to give weights of one's own to `features_only`."""
    model = create()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": pvt.to_public(model.state_dict())}, path)
    overlay = {"file": str(path), "num_classes": 10}
    backbone = create(features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    loaded = backbone.model.state_dict()
    expected = model.state_dict()
    assert_same(loaded, {key: expected[key] for key in loaded})


def test_pretrained_file_is_adapted_to_channels_and_classes(tmp_path):
    """timm sums the first convolution over channels and drops a head of another size, by our keys."""
    state = create().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save(pvt.to_public(state), path)
    overlay = {"file": str(path), "num_classes": 10}
    adapted = create(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=3).state_dict()
    key = "stages.0.patch_embed.proj.weight"
    torch.testing.assert_close(adapted.pop(key), state.pop(key).sum(1, keepdim=True))
    assert adapted.pop("head.weight").shape == (3, 128)
    assert adapted.pop("head.bias").shape == (3,)
    del state["head.weight"], state["head.bias"]
    assert_same(adapted, state)


def test_incomplete_checkpoint_is_rejected(tmp_path):
    state = create().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save({key: tensor for key, tensor in pvt.to_public(state).items() if key != "pos_embed1"}, path)
    with pytest.raises(ValueError, match="pos_embed1"):
        create(checkpoint_path=str(path))
    model = create()
    del state["norm.weight"]
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["norm.weight"]
