"""Segmentation: loss against PyTorch's, metric against torchmetrics' on several ranks, predictions against PIL's."""

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from pipeline.config import ImageConfig, ModelConfig, SemanticFpnConfig
from pipeline.errors import InputError
from pipeline.feed.task_transforms import MaskTarget
from pipeline.shards.images import IGNORED
from pipeline.tasks.build import build_task
from pipeline.tasks.pretrained import load_backbone, load_pretrained
from pipeline.tasks.segment import SegmentationMetric, SegmentationTask, class_ious, predict
from pipeline.world import World
from pvt.semantic_fpn import SemanticFpn
from tests.batches import batch_of
from tests.conftest import run_ranks
from tests.workers.confusion import ABSENT, NUM_CLASSES, UNSEEN, scored

CLASSES = [f"class {c}" for c in range(NUM_CLASSES)]


def network(name: str = "pvt_pico", size: int = 64, classes: int = NUM_CLASSES, **config: Any) -> SemanticFpn:
    torch.manual_seed(0)
    names = [f"class {c}" for c in range(classes)]
    task = build_task(SemanticFpnConfig(), ModelConfig(name=name, **config), ImageConfig(size=size), names)
    assert isinstance(task.model, SemanticFpn)
    return task.model


def crops(size: int = 64) -> tuple[Tensor, Tensor]:
    """Images, and targets of which a part is ignored: of the first little, of the last all."""
    draws = torch.Generator().manual_seed(0)
    targets = torch.randint(0, NUM_CLASSES, (3, size, size), generator=draws)
    targets[torch.rand(3, size, size, generator=draws) < torch.tensor([0.1, 0.8, 1.0])[:, None, None]] = IGNORED
    return torch.randn(3, 3, size, size, generator=draws), targets


def test_segmentation_loss_matches_pytorch_over_all_pixels() -> None:
    task = SegmentationTask(network().eval(), CLASSES)
    images, targets = crops()
    losses = task.losses(task.model, batch_of(images, targets))
    logits = F.interpolate(task.model(images), size=(64, 64), mode="bilinear", align_corners=False)
    sums = [F.cross_entropy(a[None], b[None], ignore_index=IGNORED, reduction="sum") for a, b in zip(logits, targets)]  # noqa: B905
    torch.testing.assert_close(losses, torch.stack(sums) / 64**2)
    assert losses[2] == 0 < losses[1] < losses[0]
    # As the published code has it: one average over all pixels of a batch, of losses that are 0 where ignored.
    published = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").mean()
    torch.testing.assert_close(losses.mean(), published)
    losses.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.model.parameters())


def test_loss_of_crop_not_a_multiple_of_stride_matches_padded_crop() -> None:
    task = SegmentationTask(network().eval(), CLASSES)
    images, targets = crops(size=50)
    losses = task.losses(task.model, batch_of(images, targets))
    padded = F.pad(images, (0, 14, 0, 14)), F.pad(targets, (0, 14, 0, 14), value=IGNORED)
    # The last pixels take no part of the logits behind the image.
    torch.testing.assert_close(losses, task.losses(task.model, batch_of(*padded)) * 64**2 / 50**2, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["pvt_pico", "resnet18"])
def test_losses_under_autocast_match_fp32(name: str) -> None:
    """Within 1 %: bfloat16 has 8 bits of precision, 0.4 % a rounding."""
    task = SegmentationTask(network(name).eval(), CLASSES)
    task.model.classifier.weight.data *= 100  # logits of about 1, else all losses are log 7
    images, targets = crops()
    exact = task.losses(task.model, batch_of(images, targets))
    with torch.autocast("cpu", torch.bfloat16):
        assert task.model(images).dtype == torch.bfloat16
        rough = task.losses(task.model, batch_of(images, targets))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.01, atol=0)
    assert not torch.equal(rough, exact)


def test_drop_path_masks_reach_the_backbone() -> None:
    task = SegmentationTask(network(drop_path_rate=0.3).eval(), CLASSES)
    images, targets = crops()
    assert len(task.drop_path_rates) == 8
    kept, dropped = torch.ones(8, 3), torch.ones(8, 3)
    dropped[2:, 0] = 0
    plain = task.losses(task.model, batch_of(images, targets))
    torch.testing.assert_close(task.losses(task.model, batch_of(images, targets, kept)), plain)
    changed = task.losses(task.model, batch_of(images, targets, dropped)) != plain
    assert changed.tolist() == [True, False, False]


def test_bf16_logits_are_resized_in_fp32() -> None:
    """The network's are bfloat16 under autocast."""
    logits, targets = torch.randn(3, NUM_CLASSES, 16, 16).bfloat16(), crops()[1]
    task, itself = SegmentationTask(network(), CLASSES), torch.nn.Identity()
    losses = task.losses(itself, batch_of(logits, targets))
    assert torch.equal(losses, task.losses(itself, batch_of(logits.float(), targets)))
    target = MaskTarget(targets[0].byte(), (60, 64))
    assert torch.equal(predict(logits[0], target), predict(logits[0].float(), target))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_segmentation_metric_matches_torchmetrics_on_any_world_size(ranks: int) -> None:
    [result] = run_ranks(ranks, "confusion")
    logits, targets = scored()
    kwargs: Any = {"num_classes": NUM_CLASSES, "ignore_index": IGNORED}
    iou = MulticlassJaccardIndex(average="macro", **kwargs)
    overall, by_class = MulticlassAccuracy(average="micro", **kwargs), MulticlassAccuracy(average="none", **kwargs)
    pixel_losses = []
    for image, target in zip(logits, targets, strict=True):
        truth = target.labels[None].long()
        for metric in (iou, overall, by_class):
            metric.update(predict(image, target)[None], truth)
        seen = F.interpolate(image[None], scale_factor=4, mode="bilinear")[..., : target.extent[0], : target.extent[1]]
        resized = F.interpolate(seen, size=truth.shape[1:], mode="bilinear")
        pixel_losses.append(F.cross_entropy(resized, truth, ignore_index=IGNORED, reduction="none").mean())
    assert result["miou"] == pytest.approx(iou.compute().item(), abs=1e-6)
    assert result["aacc"] == pytest.approx(overall.compute().item(), abs=1e-6)
    there = [c for c in range(NUM_CLASSES) if c not in (UNSEEN, ABSENT)]
    assert result["macc"] == pytest.approx(by_class.compute()[there].mean().item(), abs=1e-6)
    assert result["val_loss"] == pytest.approx(torch.stack(pixel_losses).mean().item(), rel=1e-5)


def test_class_ious_from_a_confusion_matrix() -> None:
    confusion = torch.tensor([[2, 1, 0, 0], [0, 3, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert str(class_ious(confusion).tolist()) == str([2 / 3, 3 / 5, 0.0, float("nan")])


def test_metric_ignores_images_without_weight() -> None:
    logits, targets = scored()
    counted, blind = SegmentationMetric(NUM_CLASSES), SegmentationMetric(NUM_CLASSES)
    counted.update(logits[:2], targets[:2], torch.ones(2))
    nothing: Any = None
    blind.update(logits[[0, 3, 1]], [targets[0], nothing, targets[1]], torch.tensor([1.0, 0.0, 1.0]))
    assert counted.result(World()) == blind.result(World())
    assert json.dumps(counted.result(World()))


def test_metric_without_labelled_pixels_is_rejected() -> None:
    metric = SegmentationMetric(3)
    metric.update(torch.randn(1, 3, 8, 8), [MaskTarget(torch.full((30, 30), IGNORED).byte(), (32, 32))], torch.ones(1))
    with pytest.raises(InputError, match="no labelled pixel"):
        metric.result(World())


def test_predictions_at_original_size_match_pil_resize() -> None:
    """PIL enlarges each class's logits with the same bilinear filter."""

    def enlarged(levels: Any, height: int, width: int) -> Any:
        return [Image.fromarray(np.asarray(a)).resize((width, height), Image.Resampling.BILINEAR) for a in levels]

    logits = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(0))
    for extent, size in (((64, 96), (64, 96)), ((48, 71), (97, 150)), ((1, 96), (1, 96))):
        target = MaskTarget(torch.zeros(size, dtype=torch.uint8), extent)
        canvas = enlarged(logits.numpy(), 64, 96)
        cut = [np.asarray(level)[: extent[0], : extent[1]] for level in canvas]
        scores = np.stack([np.asarray(level) for level in enlarged(cut, *size)])
        ours = predict(logits, target).numpy()
        assert ours.shape == size
        best = np.sort(scores, axis=0)
        clear = best[-1] - best[-2] > 1e-4  # of two scores that are nearly equal, either may be the higher one
        assert clear.mean() > 0.99
        assert (ours == scores.argmax(axis=0))[clear].all()


def test_segmentation_overfits_four_images() -> None:
    """Coloured rectangles on grey, four images: nearly all pixels are right after 40 steps."""
    draws = torch.Generator().manual_seed(1)
    images, labels = torch.zeros(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.int64)
    for i in range(4):
        for c in (1, 2, 3):
            top, left = torch.randint(0, 40, (2,), generator=draws).tolist()
            images[i, :, top : top + 24, left : left + 24] = torch.eye(3)[c - 1][:, None, None]
            labels[i, top : top + 24, left : left + 24] = c
    labels[:, :2] = IGNORED
    task = SegmentationTask(network(classes=4), CLASSES[:4])
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    miou = []
    for step in range(41):
        if step % 40 == 0:
            metric = task.metric()
            with torch.no_grad():
                metric.update(
                    task.model.eval()(images), [MaskTarget(m.byte(), (64, 64)) for m in labels], torch.ones(4)
                )
            miou.append(metric.result(World())["miou"])
        optimizer.zero_grad()
        task.losses(task.model.train(), batch_of(images, labels)).mean().backward()
        optimizer.step()
    assert miou[0] < 0.3
    assert miou[1] > 0.9


@pytest.mark.parametrize("name", ["pvt_pico", "resnet18", "convnext_atto"])
def test_classifier_weights_initialise_the_segmentation_backbone(name: str) -> None:
    """Whatever its classes, and, with position embeddings, its size."""
    sized: dict[str, Any] = {"img_size": 32} if name == "pvt_pico" else {}
    classifier: Any = timm.create_model(name, num_classes=10, **sized).eval()
    segmenter = network(name).eval()
    fresh = segmenter.classifier.weight.clone()
    load_backbone(segmenter, name, classifier.state_dict(), "models:/digits/1")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = classifier.forward_intermediates(images, indices=4, intermediates_only=True)
        # Resized once for the grid, or every time the network is run: both are bilinear.
        torch.testing.assert_close(segmenter(images), segmenter.decode(maps), rtol=1e-4, atol=1e-5)
    assert torch.equal(segmenter.classifier.weight, fresh)


def test_classifier_of_another_architecture_is_rejected() -> None:
    other: Any = timm.create_model("pvt_tiny", img_size=32, num_classes=10)
    message = r"models:/t/1 does not fit the model: backbone.stages.0.blocks.0.attn.kv.bias is \[128\] and not \[64\]"
    with pytest.raises(InputError, match=message):
        load_backbone(network(), "pvt_pico", other.state_dict(), "models:/t/1")


def test_segmenter_weights_load_except_a_head_of_other_classes() -> None:
    old, same, other = network(size=32), network(size=64), network(size=64, classes=3)
    torch.nn.init.normal_(old.classifier.bias)  # pyright: ignore[reportArgumentType]
    load_pretrained(same, old.state_dict(), "models:/m/1", keep_head=True)
    fresh = other.classifier.weight.clone()
    load_pretrained(other, old.state_dict(), "models:/m/1", keep_head=False)
    for started in (same, other):
        for mine, theirs in ((started.branches, old.branches), (started.pyramid, old.pyramid)):
            assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(same.classifier.bias, old.classifier.bias)  # pyright: ignore[reportArgumentType]
    assert torch.equal(other.classifier.weight, fresh)
    with pytest.raises(InputError, match=r"classifier.bias is \[7\] and not \[3\]"):
        load_pretrained(other, old.state_dict(), "models:/m/1", keep_head=True)


@pytest.mark.parametrize(
    ("name", "size", "config", "message"),
    [
        ("pvt_pic", 64, {}, "'pvt_pic' is no timm model; near: pvt_pico"),
        ("vit_tiny_patch16_224", 64, {}, "maps at strides .16, 16, .*choose a pyramid"),
        ("pvt_pico", 50, {}, "'pvt_pico' for 50 px: input of 50x50 px: both sides must be divisible by 32"),
        ("swin_tiny_patch4_window7_224", 64, {}, "whole images are seen at sizes of their own"),
        ("hrnet_w18_small", 64, {"drop_path_rate": 0.1}, "drop_path_rate"),
        ("pvt_pico", 64, {"drop_rate": 0.1}, "model.drop_rate 0.1 is of a classifier's head.*dropout"),
    ],
)
def test_models_that_cannot_segment_are_rejected(name: str, size: int, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        network(name, size, **config)


def test_layer_depths_use_the_parameter_names_of_the_network() -> None:
    task = SegmentationTask(network(), CLASSES)
    names = {name for name, _ in task.model.named_parameters()}
    assert {name for name in names if name.startswith("backbone.")} == task.depths.keys()
    assert task.depths["backbone.stages.0.patch_embed.proj.weight"] == 0
    assert task.depths["backbone.stages.3.cls_token"] == 4
