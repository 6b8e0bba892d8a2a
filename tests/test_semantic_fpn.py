"""Semantic FPN against segmentation-models-pytorch's decoder, the paper's count of parameters, and its backbones."""

from types import SimpleNamespace
from typing import Any

import pytest
import segmentation_models_pytorch.decoders.fpn.decoder as reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvt.model import checkpoint_filter_fn as pvt_filter_fn
from pvt.semantic_fpn import SemanticFpn, backbone, checkpoint_filter_fn

pytestmark = pytest.mark.gpu

WIDTHS = (32, 64, 96, 128)  # of pvt_pico
BACKBONES = ("pvt_pico", "resnet50", "pvt_v2_b0", "convnext_atto", "efficientnet_b0")


def network(name: str = "pvt_pico", size: int = 64, **kwargs: Any) -> SemanticFpn:
    torch.manual_seed(0)
    made = SemanticFpn(backbone(name, size, **kwargs), num_classes=5).eval()
    nn.init.normal_(made.classifier.weight)  # far from 0, so that differences show
    return made


def maps(side: int = 16) -> list[Tensor]:
    return [torch.randn(2, width, side >> i, side >> i) for i, width in enumerate(WIDTHS)]


def test_decoder_matches_segmentation_models_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to two things that it does otherwise: it has no 3x3 convolutions after the pyramid, and aligns corners."""

    def interpolate(*args: Any, **kwargs: Any) -> Tensor:
        return F.interpolate(*args, **({**kwargs, "align_corners": False} if "align_corners" in kwargs else kwargs))

    monkeypatch.setattr(reference, "F", SimpleNamespace(interpolate=interpolate))
    ours = network()
    theirs = reference.FPNDecoder(list(WIDTHS), encoder_depth=4, pyramid_channels=256, segmentation_channels=128).eval()
    for i, block in enumerate(ours.pyramid.layer_blocks):
        nn.init.dirac_(block.get_parameter("0.weight"))
        for branch in theirs.seg_blocks[3 - i].modules():
            if isinstance(branch, nn.GroupNorm):  # else they are 1 and 0, and nothing would tell levels apart
                nn.init.normal_(branch.weight)
                nn.init.normal_(branch.bias)
    laterals = [theirs.p2.skip_conv, theirs.p3.skip_conv, theirs.p4.skip_conv, theirs.p5]
    for own, lateral in zip(ours.pyramid.inner_blocks, laterals, strict=True):
        own.load_state_dict({f"0.{name}": tensor for name, tensor in lateral.state_dict().items()})
    for own, branch in zip(ours.branches, reversed(theirs.seg_blocks), strict=True):
        parameters = list(own.parameters()), list(branch.parameters())
        for mine, other in zip(*parameters, strict=True):
            mine.data = other.data
    levels = maps()
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(levels), ours.classifier(theirs(levels)), rtol=1e-5, atol=1e-4)


def test_pvt_small_parameter_count_matches_the_paper() -> None:
    """Table 4 of the PVT paper: 28.2 M, counted with position embeddings for 224 px, as its code keeps them.

    pvt_small of 1,000 classes   24,485,864
    - its head                     -513,000
    - its final norm                 -1,024
    1x1 convolutions, 4 levels      263,168   (64 + 128 + 320 + 512) * 256 + 4 * 256
    3x3 convolutions, 4 levels    2,360,320   4 * (256 * 256 * 9 + 256)
    branches: 4 from 256          1,179,648   4 * 256 * 128 * 9
              3 from 128            442,368   3 * 128 * 128 * 9
              7 GroupNorms            1,792   7 * 2 * 128
    classifier                       19,350   128 * 150 + 150
                                 28,238,486
    """
    pieces = SemanticFpn(backbone("pvt_small", 224), num_classes=150)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in pieces.named_children()}
    assert counts == {
        "backbone": 24_485_864 - 513_000 - 1_024,
        "pyramid": 263_168 + 2_360_320,
        "branches": 1_179_648 + 442_368 + 1_792,
        "dropout": 0,
        "classifier": 19_350,
    }
    assert sum(counts.values()) == 28_238_486
    # At 512 px ours are learned for that grid: 16,384, 4,096, 1,024 and 257 rows and not 3,136, 784, 196 and 50.
    larger = sum(p.numel() for p in backbone("pvt_small", 512).parameters())
    assert larger - counts["backbone"] == (16_384 - 3_136) * 64 + (4_096 - 784) * 128 + (1_024 - 196) * 320 + 207 * 512


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    trained = network(name).train()
    for parameter in trained.parameters():
        if not parameter.any():  # some branches begin with a weight of 0, which nothing behind it gets through
            nn.init.normal_(parameter)
    trained(torch.randn(2, 3, 64, 64)).square().mean().backward()
    idle = [
        name for name, parameter in trained.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert idle == []


@pytest.mark.parametrize("name", ["pvt_pico", "resnet50", "pvt_v2_b0"])
def test_images_are_zero_padded_to_the_stride(name: str) -> None:
    segmenter = network(name)
    for height, width in ((70, 37), (64, 33), (1, 96)):
        images = torch.randn(2, 3, height, width)
        padded = torch.zeros(2, 3, 96 if height > 64 else 64 if height > 32 else 32, 64 if width < 64 else 96)
        padded[:, :, :height, :width] = images
        with torch.no_grad():
            logits, whole = segmenter(images), segmenter(padded)
        assert logits.shape == (2, 5, (height + 3) // 4, (width + 3) // 4)
        assert torch.equal(logits, whole[:, :, : logits.shape[2], : logits.shape[3]])


def test_pyramid_channels_are_configurable() -> None:
    narrow = SemanticFpn(backbone("pvt_pico", 64), num_classes=5, channels=64, pyramid_channels=32)
    first: Any = narrow.branches[3]
    assert first[0].weight.shape == (64, 32, 3, 3)
    assert narrow(torch.randn(1, 3, 64, 64)).shape == (1, 5, 16, 16)


def test_logits_do_not_depend_on_other_images_of_the_batch() -> None:
    segmenter = network().train()
    segmenter.dropout.eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(segmenter(images)[1:2], segmenter(images[1:2]), rtol=1e-4, atol=1e-4)


def test_drop_path_masks_are_passed_to_the_backbone() -> None:
    segmenter = network(drop_path_rate=0.5)
    images, rates = torch.randn(4, 3, 64, 64), torch.tensor(segmenter.drop_path_rates)
    assert segmenter.drop_path_rates == segmenter.backbone.drop_path_rates != ()
    masks = torch.bernoulli((1 - rates)[:, None].expand(-1, 4)) / (1 - rates)[:, None]
    trunk: Any = segmenter.backbone
    with torch.no_grad():
        masked = segmenter(images, drop_path=masks)
        assert torch.equal(masked, segmenter.decode(trunk.forward_intermediates(images, drop_path=masks)[1]))
        assert not torch.allclose(masked, segmenter(images))
    assert network("resnet50", drop_path_rate=0.5).drop_path_rates == ()


def test_torch_export_with_dynamic_batch_size() -> None:
    segmenter = network()
    example = torch.randn(2, 3, 64, 64)
    program = torch.export.export(segmenter, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), segmenter(images), rtol=1e-4, atol=1e-4)


def test_backbone_with_other_strides_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 gives maps at strides \[16, 16, .* needs \[4, 8, 16, "):
        backbone("vit_tiny_patch16_224", 224)
    with pytest.raises(ValueError, match=r"input of 48x48 px"):
        backbone("pvt_pico", 48)


def test_grad_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        segmenter = network()
        segmenter.set_grad_checkpointing(recompute)
        torch.manual_seed(1)
        segmenter.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
        gradients.append([p.grad for p in segmenter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpoint_of_another_image_size_is_resized() -> None:
    small, large = network(size=64), network(size=96)
    state = checkpoint_filter_fn(small.state_dict(), large)
    large.load_state_dict(state)
    expected = pvt_filter_fn(small.backbone.state_dict(), large.backbone)
    assert {f"backbone.{name}" for name in expected} | {name for name in state if "backbone" not in name} == set(state)
    assert all(torch.equal(state[f"backbone.{name}"], tensor) for name, tensor in expected.items())
    assert torch.equal(large.classifier.weight, small.classifier.weight)


@pytest.mark.parametrize("name", BACKBONES)
def test_matching_checkpoint_is_not_changed_by_the_filter(name: str) -> None:
    segmenter = network(name)
    state = segmenter.state_dict()
    filtered = checkpoint_filter_fn(state, segmenter)
    assert filtered.keys() == state.keys()
    assert all(torch.equal(filtered[name], tensor) for name, tensor in state.items())
