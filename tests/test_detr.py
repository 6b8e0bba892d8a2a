"""DETR against Transformers' own on the same maps, with the same weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from pvt.dense import backbone
from pvt.detector import Extent, Objects
from pvt.detr import BBOX_WEIGHT, GIOU_WEIGHT, Detr

pytestmark = pytest.mark.gpu

NUM_CLASSES, QUERIES, LAYERS = 7, 12, 3
SIZES = {"width": 64, "heads": 4, "feedforward": 128, "encoder_layers": 2, "decoder_layers": LAYERS}
CANVAS = (128, 192)
EXTENTS: list[Extent] = [(128, 192), (97, 110), (30, 40)]


class Maps(nn.Module):
    """In place of a backbone of Transformers: our own's maps."""

    def __init__(self, detector: Detr) -> None:
        super().__init__()
        self.detector = [detector]  # hidden from the module, whose weights these are not

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.detector[0].maps(images)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Detr]:
    """Transformers' detector and ours with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    our = Detr(backbone("resnet18", 64), NUM_CLASSES, queries=QUERIES, **SIZES).eval()
    with torch.no_grad():  # nothing left at 0 or 1, attention so sharp that queries differ, and boxes with them
        for name, parameter in our.named_parameters():
            if not name.startswith("backbone."):
                factor = 10 if "q_proj" in name or "box_head" in name else 1
                parameter.mul_(factor).add_(torch.randn_like(parameter), alpha=0.1)
    config: Any = DetrConfig(
        backbone="resnet18",  # pyright: ignore[reportCallIssue] - Transformers takes more than it declares
        num_queries=QUERIES,
        d_model=SIZES["width"],
        encoder_attention_heads=SIZES["heads"],
        decoder_attention_heads=SIZES["heads"],
        encoder_ffn_dim=SIZES["feedforward"],
        decoder_ffn_dim=SIZES["feedforward"],
        encoder_layers=SIZES["encoder_layers"],
        decoder_layers=LAYERS,
        num_labels=NUM_CLASSES,  # pyright: ignore[reportCallIssue]
    )
    their = DetrForObjectDetection(config).eval()
    state = {
        THEIR_NAMES.get(part, f"model.{part}") + dot + rest: tensor
        for name, tensor in our.state_dict().items()
        for part, dot, rest in [name.partition(".")]
        if part != "backbone"
    }
    missing, unexpected = their.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [name for name in missing if not name.startswith("model.backbone.")] == []
    their.model.backbone.model = Maps(our)
    return their, our


THEIR_NAMES = {
    "projection": "model.input_projection",
    "queries": "model.query_position_embeddings.weight",
    "norm": "model.decoder.layernorm",
    "encoder": "model.encoder.layers",
    "decoder": "model.decoder.layers",
    "classifier": "class_labels_classifier",
    "box_head": "bbox_predictor",
}


def scenes(nums: tuple[int, ...] = (5, 1, 3)) -> tuple[Tensor, Tensor, list[Objects]]:
    """Canvases, Transformers' masks of what of them is image, and what is to be found."""
    torch.manual_seed(1)
    images, masks, targets = torch.zeros(3, 3, *CANVAS), torch.zeros(3, *CANVAS), []
    for image, mask, (height, width), num in zip(images, masks, EXTENTS, nums, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width)
        mask[:height, :width] = 1
        corner, sides = torch.rand(num, 2) * 0.5, 0.1 + torch.rand(num, 2) * 0.4
        boxes = torch.cat([corner, corner + sides], dim=1) * torch.tensor([width, height] * 2)
        targets.append(Objects(boxes, torch.randint(NUM_CLASSES, (num,))))
    return images, masks, targets


def label(objects: Objects, extent: Extent) -> dict[str, Tensor]:
    """As Transformers wants it."""
    height, width = extent
    boxes = box_convert(objects.boxes, "xyxy", "cxcywh") / torch.tensor([width, height] * 2)
    return {"class_labels": objects.labels, "boxes": boxes}


def after_each_layer(their: Any, outputs: Any) -> Tensor:
    """Normed states [LAYERS, N, QUERIES, C]. Of those that Transformers reports, the last alone has been normed."""
    before = torch.stack(outputs.decoder_hidden_states[-LAYERS:-1])
    return torch.cat([their.model.decoder.layernorm(before), outputs.last_hidden_state[None]])


def test_outputs_match_transformers(pair: tuple[Any, Detr]) -> None:
    their, our = pair
    images, masks, _ = scenes()
    with torch.no_grad():
        expected = their(images, pixel_mask=masks, output_hidden_states=True)
        logits, boxes = our.predict(our.maps(images), EXTENTS)
        states = after_each_layer(their, expected)
        torch.testing.assert_close(logits, their.class_labels_classifier(states), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(boxes, their.bbox_predictor(states).sigmoid(), rtol=1e-5, atol=1e-5)
    assert logits.shape == (LAYERS, 3, QUERIES, NUM_CLASSES + 1)
    assert boxes.std(dim=2).mean() > 0.03
    torch.testing.assert_close(logits[-1], expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(boxes[-1], expected.pred_boxes, rtol=1e-5, atol=1e-5)


def test_losses_of_one_image_match_transformers(pair: tuple[Any, Detr]) -> None:
    """With an auxiliary loss after each layer of the decoder but the last."""
    their, our = pair
    images, masks, targets = scenes()
    with torch.no_grad():
        losses = our(images, EXTENTS, targets)
        for i, extent in enumerate(EXTENTS):
            labels = [label(targets[i], extent)]
            expected = their(images[i : i + 1], pixel_mask=masks[i : i + 1], labels=labels, output_hidden_states=True)
            states = after_each_layer(their, expected)
            config = copy.copy(their.config)
            config.auxiliary_loss = True
            total, parts, _ = ForObjectDetectionLoss(
                expected.logits,
                labels,
                images.device,
                expected.pred_boxes,
                config,
                their.class_labels_classifier(states),
                their.bbox_predictor(states).sigmoid(),
            )
            sums = {
                kind: sum(float(loss) for name, loss in parts.items() if name.startswith(kind))
                for kind in ("loss_ce", "loss_bbox", "loss_giou")
            }
            assert float(losses["classification"][i]) == pytest.approx(sums["loss_ce"], rel=1e-5)
            assert float(losses["bbox"][i]) == pytest.approx(BBOX_WEIGHT * sums["loss_bbox"], rel=1e-5)
            assert float(losses["giou"][i]) == pytest.approx(GIOU_WEIGHT * sums["loss_giou"], rel=1e-5)
            assert float(sum(loss[i] for loss in losses.values())) == pytest.approx(float(total), rel=1e-5)


def test_detections_match_transformers(pair: tuple[Any, Detr]) -> None:
    their, our = pair
    images, masks, _ = scenes()
    with torch.no_grad():
        expected = their(images, pixel_mask=masks)
        found = our(images, EXTENTS)
    theirs = DetrImageProcessor().post_process_object_detection(expected, threshold=0, target_sizes=EXTENTS)
    for image, other, (height, width) in zip(found, theirs, EXTENTS, strict=True):
        order = other["scores"].argsort(descending=True)
        torch.testing.assert_close(image.scores, other["scores"][order], rtol=1e-5, atol=1e-6)
        assert torch.equal(image.labels, other["labels"][order])
        boxes = other["boxes"][order].clamp(min=0).minimum(torch.tensor([width, height] * 2))  # ours are cut off
        torch.testing.assert_close(image.boxes, boxes, rtol=1e-5, atol=1e-3)


def test_images_without_objects_have_only_no_object_loss(pair: tuple[Any, Detr]) -> None:
    _, our = pair
    images, _, targets = scenes((0, 1, 0))
    losses = our(images, EXTENTS, targets)
    logits, _ = our.predict(our.maps(images), EXTENTS)
    none = -logits.log_softmax(-1)[..., -1].mean(dim=2).sum(dim=0)  # a mean over queries for each layer
    for i in (0, 2):
        torch.testing.assert_close(losses["classification"][i], none[i], rtol=1e-5, atol=1e-5)
        assert losses["bbox"][i] == losses["giou"][i] == 0


def test_more_objects_than_queries_give_finite_losses(pair: tuple[Any, Detr]) -> None:
    _, our = pair
    images, _, targets = scenes((2 * QUERIES, 1, 0))
    assert all(loss.isfinite().all() for loss in our(images, EXTENTS, targets).values())


def test_nan_in_image_gives_nan_losses_without_error(pair: tuple[Any, Detr]) -> None:
    """Transformers' matching would raise an error instead."""
    _, our = pair
    images, _, targets = scenes()
    images[1, 0, 0, 0] = torch.nan
    losses = our(images, EXTENTS, targets)
    assert losses.keys() == {"classification", "bbox", "giou"}
    assert all(loss.shape == (3,) and loss.isnan().all() for loss in losses.values())


def test_attention_ignores_padding(pair: tuple[Any, Detr]) -> None:
    """Whatever its maps hold. Positions are those in the image."""
    _, our = pair
    images, _, _ = scenes()
    maps = our.maps(images)
    noisy = maps[-1].clone()
    noisy[1, :, 4:], noisy[1, :, :, 4:], noisy[2, :, 1:], noisy[2, :, :, 2:] = 3.0, 3.0, 3.0, 3.0
    assert not torch.equal(noisy, maps[-1])
    with torch.no_grad():
        for made, expected in zip(our.predict([noisy], EXTENTS), our.predict(maps, EXTENTS), strict=True):
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_initialisation_matches_paper() -> None:
    """Xavier's uniform distribution in the transformer, of which Transformers' own knows nothing."""
    detector = Detr(backbone("pvt_pico", 64), NUM_CLASSES)
    for part in (detector.encoder, detector.decoder):
        for name, parameter in part.named_parameters():
            if parameter.ndim > 1:
                bound = (6 / sum(parameter.shape)) ** 0.5
                assert 0.99 * bound < parameter.abs().max() <= bound, name
            elif "norm" not in name:
                assert not parameter.any(), name


def test_parameter_count_matches_paper() -> None:
    """DETR's paper, table 1, with ResNet-50. Its code's classes are 91 and none."""
    with torch.device("meta"):
        detector = Detr(backbone("resnet50", 64), 91)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in detector.named_children()}
    attention, feedforward, norm = 4 * 257 * 256, 257 * 2048 + 2049 * 256, 2 * 256
    assert counts == {
        "backbone": 25_557_032 - 2_049_000,
        "projection": 2049 * 256,
        "position_embedding": 0,
        "encoder": 6 * (attention + feedforward + 2 * norm),
        "decoder": 6 * (2 * attention + feedforward + 3 * norm),
        "norm": norm,
        "classifier": 257 * 92,
        "box_head": 2 * 257 * 256 + 257 * 4,
    }
    assert detector.queries.numel() == 100 * 256
    assert 41e6 < sum(counts.values()) + detector.queries.numel() < 42e6
