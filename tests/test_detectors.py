"""RetinaNet and Mask R-CNN against torchvision's on a ResNet-50, the paper's counts, and what all detectors share."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import detection as reference
from torchvision.models import resnet50
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from pvt.dense import backbone, checkpoint_filter_fn
from pvt.detector import Anchors, Detections, Detector, Extent, Objects
from pvt.detr import Detr
from pvt.mask_rcnn import MaskRcnn
from pvt.retinanet import RetinaNet

pytestmark = pytest.mark.gpu

NUM_CLASSES = 5
CANVAS = (128, 256)  # of which each of torchvision's strides is a divisor, see Anchors
EXTENTS: list[Extent] = [(96, 160), (70, 140), (33, 20)]  # the last one without objects
FEW = 20  # detections, each of which a mask head looks at at length
SMALL = {
    "retinanet": functools.partial(RetinaNet, pyramid_channels=32, smallest_anchor=16),
    "mask_rcnn": functools.partial(
        MaskRcnn, pyramid_channels=32, smallest_anchor=8, max_detections=FEW, box_width=64, mask_width=16
    ),
    "detr": functools.partial(
        Detr, queries=10, width=32, heads=4, encoder_layers=2, decoder_layers=2, feedforward=64, dropout=0.0
    ),
}

small = pytest.mark.parametrize("name", SMALL)


def objects(num: int, extent: Extent) -> Objects:
    """At random places, each with a filled ellipse for a mask."""
    height, width = extent
    size = torch.tensor([width, height])
    corner, sides = torch.rand(num, 2) * size * 0.6, (0.1 + torch.rand(num, 2) * 0.3) * size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    (left, top), (wide, high) = corner.T[..., None, None], sides.T[..., None, None]
    masks = ((x - left) / wide - 0.5) ** 2 + ((y - top) / high - 0.5) ** 2 < 0.25
    labels = torch.randint(NUM_CLASSES, (num,))
    return Objects(torch.cat([corner, corner + sides], dim=1), labels, masks.to(torch.uint8))


def scenes() -> tuple[Tensor, list[Extent], list[Objects]]:
    """Canvases of three images, the last one without objects."""
    torch.manual_seed(1)
    images = torch.zeros(len(EXTENTS), 3, 96, 160)
    for image, (height, width) in zip(images, EXTENTS, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width)
    return images, EXTENTS, [objects(num, extent) for num, extent in zip((4, 2, 0), EXTENTS, strict=True)]


def network(name: str, model: str = "pvt_pico", **config: Any) -> Any:
    """A small detector in training mode that draws nothing at random: it takes all that heads would sample from."""
    torch.manual_seed(0)
    made = SMALL[name](backbone(model, 64), NUM_CLASSES, **config)
    if isinstance(made, MaskRcnn):
        made.rpn.fg_bg_sampler.batch_size_per_image = 1_000_000
        made.roi_heads.fg_bg_sampler.batch_size_per_image = 1_000_000
    return made.train()


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# Against torchvision.


def theirs(kind: str, anchors: AnchorGenerator) -> Any:
    """torchvision's detector on its ResNet-50, with statistics in the norms and much to find, in evaluation mode."""
    torch.manual_seed(0)
    trunk = resnet50(weights=None)
    coarser = {"retinanet": LastLevelP6P7(2048, 256), "mask_rcnn": LastLevelMaxPool()}[kind]
    stages = [2, 3, 4] if kind == "retinanet" else [1, 2, 3, 4]
    extractor = _resnet_fpn_extractor(trunk, 5, returned_layers=stages, extra_blocks=coarser)
    sizes = {"min_size": CANVAS[0], "max_size": CANVAS[1], "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if kind == "retinanet":
        made: Any = reference.RetinaNet(
            extractor, NUM_CLASSES, anchor_generator=anchors, detections_per_img=FEW, **sizes
        )
        for module in made.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType] - it has one
        nn.init.normal_(made.head.classification_head.cls_logits.weight, std=0.003)  # no score of 1
        nn.init.normal_(made.head.regression_head.bbox_reg.weight, std=0.001)  # no box outside the image
    else:
        made = reference.MaskRCNN(
            extractor,
            NUM_CLASSES + 1,
            rpn_anchor_generator=anchors,
            rpn_post_nms_top_n_train=1000,
            box_detections_per_img=FEW,
            **sizes,
        )
    for module in made.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    made.backbone.train()(torch.randn(4, 3, *CANVAS))
    return made.eval()


def copy(their: nn.Module, our: Detector) -> None:
    """torchvision's weights, all of which must have a place in ours, into ours."""
    named = {
        name.replace("backbone.body.", "backbone.").replace("backbone.fpn.", "pyramid."): tensor
        for name, tensor in their.state_dict().items()
    }
    our.load_state_dict(named)


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    """torchvision's and our detectors with the same weights, whose anchors torchvision computes by itself."""
    made = {}
    for kind, cls in (("retinanet", RetinaNet), ("mask_rcnn", MaskRcnn)):
        our = cls(backbone("resnet50", 64), NUM_CLASSES, max_detections=FEW).eval()
        anchors = our.anchors if isinstance(our, RetinaNet) else our.rpn.anchor_generator
        their = theirs(kind, AnchorGenerator(anchors.sizes, anchors.aspect_ratios))
        copy(their, our)
        made[kind] = their, our
    return made


kinds = pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])


@kinds
def test_pyramid_and_anchors_match_torchvision(kind: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    their, our = pairs[kind]
    images = torch.randn(1, 3, *CANVAS)
    with torch.no_grad():
        expected = list(their.backbone(images).values())
        levels = our.levels(our.maps(images))
    levels = list(levels.values()) if isinstance(levels, dict) else levels
    assert [level.shape[-2] for level in levels] == [CANVAS[0] // stride for stride in our_anchors(our).strides]
    for level, other in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    image_list = ImageList(images, [CANVAS])
    (made,) = our_anchors(our)(image_list, levels)
    (wanted,) = (their.anchor_generator if kind == "retinanet" else their.rpn.anchor_generator)(image_list, expected)
    assert torch.equal(made, wanted)


def our_anchors(our: Detector) -> Anchors:
    if isinstance(our, MaskRcnn):
        assert isinstance(our.rpn.anchor_generator, Anchors)
        return our.rpn.anchor_generator
    assert isinstance(our, RetinaNet)
    return our.anchors


@kinds
@pytest.mark.parametrize("num", [0, 6])
def test_losses_of_one_image_match_torchvision(kind: str, num: int, pairs: dict[str, tuple[Any, Any]]) -> None:
    their, our = pairs[kind]
    torch.manual_seed(num)
    images, wanted = torch.randn(1, 3, *CANVAS), objects(num, CANVAS)
    target = {
        "boxes": wanted.boxes,
        "labels": wanted.labels + (kind == "mask_rcnn"),  # theirs has the background for class 0
        "masks": wanted.masks,
    }
    try:
        for part in (their.train().backbone, their.transform, our.train().backbone):
            part.eval()  # in training, theirs draws a size
        torch.manual_seed(7)
        expected = {name.removeprefix("loss_"): loss for name, loss in their([images[0]], [target]).items()}
        torch.manual_seed(7)
        losses = our(images, [CANVAS], [wanted])
    finally:
        their.eval()
        our.eval()
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.shape == (1,)
        torch.testing.assert_close(
            loss[0], expected[name], rtol=1e-5, atol=1e-6, msg=lambda told, n=name: f"{n}: {told}"
        )


@kinds
def test_detections_match_torchvision(kind: str, pairs: dict[str, tuple[Any, Any]]) -> None:
    their, our = pairs[kind]
    torch.manual_seed(2)
    images = torch.randn(2, 3, *CANVAS)
    with torch.no_grad():
        expected, found = their(list(images)), our(images, [CANVAS] * 2)
    for image, other in zip(found, expected, strict=True):
        assert len(image) == len(other["boxes"]) == FEW
        torch.testing.assert_close(image.boxes, other["boxes"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(image.scores, other["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(image.labels, other["labels"] - int(kind == "mask_rcnn"))
        assert (image.masks is None) == (kind == "retinanet")
        if image.masks is not None:
            their_masks = paste_masks_in_image(image.masks[:, None], image.boxes, CANVAS)
            torch.testing.assert_close(their_masks, other["masks"], rtol=1e-4, atol=1e-4)


# The PVT paper's tables 3 and 4.


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_retinanet_pvt_small_parameter_count_matches_paper() -> None:
    """Counted with position embeddings for 224 px, as the paper's code keeps them, and COCO's 80 classes.

    pvt_small without head and norm  23,971,840   24,485,864 - 513,000 - 1,024
    1x1 convolutions, 3 levels          246,528   (128 + 320 + 512) * 256 + 3 * 256
    3x3 convolutions, 3 levels        1,770,240   3 * (256 * 256 * 9 + 256)
    strides 64 and 128                1,769,984   (512 + 256) * 256 * 9 + 2 * 256
    heads: 2 * 4 convolutions         4,720,640   8 * (256 * 256 * 9 + 256)
           classes                    1,659,600   9 * 80 * (256 * 9 + 1)
           boxes                         82,980   9 * 4 * (256 * 9 + 1)
                                     34,221,812
    """
    with torch.device("meta"):
        detector = RetinaNet(backbone("pvt_small", 224), 80)
    assert {name: count(part) for name, part in detector.named_children()} == {
        "backbone": 23_971_840,
        "pyramid": 246_528 + 1_770_240 + 1_769_984,
        "anchors": 0,
        "head": 4_720_640 + 1_659_600 + 82_980,
    }
    assert count(detector) == 34_221_812


def test_mask_rcnn_pvt_small_parameter_count_matches_paper() -> None:
    """Counted as RetinaNet's.

    pvt_small without head and norm  23,971,840
    1x1 convolutions, 4 levels          263,168   (64 + 128 + 320 + 512) * 256 + 4 * 256
    3x3 convolutions, 4 levels        2,360,320   4 * (256 * 256 * 9 + 256)
    proposals: convolution              590,080   256 * 256 * 9 + 256
               objectness and boxes       3,855   3 * (1 + 4) * 257
    boxes: two layers                13,895,680   (256 * 49 + 1) * 1024 + 1025 * 1024
           classes and boxes            415,125   81 * (1 + 4) * 1025
    masks: four convolutions          2,360,320   4 * (256 * 256 * 9 + 256)
           doubling                     262,400   256 * 256 * 4 + 256
           classes                       20,817   81 * 257
                                     44,143,605
    """
    with torch.device("meta"):
        detector = MaskRcnn(backbone("pvt_small", 224), 80)
    assert {name: count(part) for name, part in detector.named_children()} == {
        "backbone": 23_971_840,
        "pyramid": 263_168 + 2_360_320,
        "rpn": 590_080 + 3_855,
        "roi_heads": 13_895_680 + 415_125 + 2_360_320 + 262_400 + 20_817,
    }
    assert count(detector) == 44_143_605


@pytest.mark.parametrize(
    ("name", "retinanet", "mask_rcnn"),
    [("pvt_tiny", 23.0, 32.9), ("pvt_medium", 53.9, 63.9), ("pvt_large", 71.1, 81.0), ("resnet50", 37.7, 44.2)],
)
def test_parameter_counts_on_other_backbones_match_paper(name: str, retinanet: float, mask_rcnn: float) -> None:
    """In millions. Of ResNet-50 the paper counts what is trained, not the stem and the first stage."""
    with torch.device("meta"):
        trunk = backbone(name, 224)
        frozen = 225_344 if name == "resnet50" else 0
        counts = [count(detector(trunk, 80)) - frozen for detector in (RetinaNet, MaskRcnn)]
    assert [round(parameters / 1e6, 1) for parameters in counts] == [retinanet, mask_rcnn]


# Anchors and wiring.


def test_anchor_centres_are_multiples_of_stride() -> None:
    """Also on a canvas of 800 x 1344, whose coarsest maps have 13 x 21 and 7 x 11 places."""
    strides = (8, 16, 32, 64, 128)
    grids = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    made = Anchors(strides, 32, (1.0, 2.0)).on([torch.empty(1, 1, *grid, dtype=torch.bfloat16) for grid in grids])
    for level, (anchors, stride, (height, width)) in enumerate(zip(made, strides, grids, strict=True)):
        assert anchors.dtype == torch.float32
        of_places = anchors.reshape(height, width, 6, 4)
        centres = (of_places[..., :2] + of_places[..., 2:]) / 2
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        expected = torch.stack([columns, rows], dim=-1)[:, :, None].expand_as(centres) * float(stride)
        assert torch.equal(centres, expected)
        sides = of_places[0, 0, :, 2:] - of_places[0, 0, :, :2]
        shapes = [(ratio, scale) for ratio in (0.5, 1.0, 2.0) for scale in (1.0, 2.0)]
        for (width_px, height_px), (ratio, scale) in zip(sides.tolist(), shapes, strict=True):
            side = 32 * 2**level * scale
            assert width_px == pytest.approx(side / ratio**0.5, abs=1)  # torchvision rounds
            assert height_px == pytest.approx(side * ratio**0.5, abs=1)


def test_retinanet_coarsest_levels_come_from_backbone_map() -> None:
    """Whatever their widths: torchvision takes the pyramid's map where both are the same."""
    for channels in (32, 128):  # pvt_pico's last map has 128
        detector = RetinaNet(backbone("pvt_pico", 64), NUM_CLASSES, pyramid_channels=channels)
        maps = [torch.randn(1, width, 64 >> i, 64 >> i) for i, width in enumerate(detector.widths)]
        coarser: Any = detector.pyramid.extra_blocks
        with torch.no_grad():
            levels, stride_64 = detector.levels(maps), coarser.p6(maps[-1])
            assert torch.equal(levels[3], stride_64)
            assert torch.equal(levels[4], coarser.p7(stride_64.relu()))


def test_roi_pooling_scale_is_independent_of_extent() -> None:
    """torchvision would take the scale 1 / 2 of an image that fills a quarter of its canvas, for good."""
    detector = network("mask_rcnn").eval()
    pool: Any = detector.roi_heads.box_roi_pool
    levels = {str(stride): torch.zeros(1, 1, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)}
    levels["4"][:] = torch.arange(16.0) * 4  # the horizontal position of each place in pixels
    with torch.no_grad():
        pooled = pool(levels, [torch.tensor([[8.0, 8.0, 22.0, 22.0]])], [(32, 32)])
    assert torch.allclose(pooled[0, 0, 0], 8.0 + torch.arange(7) * 2 + 1, atol=1e-4)


# What all detectors share.


@small
def test_losses_of_an_image_do_not_depend_on_rest_of_batch(name: str) -> None:
    detector = network(name)
    images, extents, targets = scenes()
    with torch.no_grad():
        together = detector(images, extents, targets)
        for i in range(len(images)):
            alone = detector(images[i : i + 1], extents[i : i + 1], targets[i : i + 1])
            for loss, values in together.items():
                assert values.dtype == torch.float32
                torch.testing.assert_close(values[i], alone[loss][0], rtol=1e-4, atol=1e-5)


@small
@pytest.mark.parametrize("chosen", [[0, 1, 2], [2]])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_are_finite_and_every_parameter_gets_a_gradient(
    name: str, chosen: list[int], precision: torch.dtype
) -> None:
    """Without any object, too: a parameter that waits for one would make ranks wait for each other."""
    detector = network(name)
    images, extents, targets = scenes()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        losses = detector(images[chosen], [extents[i] for i in chosen], [targets[i] for i in chosen])
    assert all(loss.dtype == torch.float32 and loss.isfinite().all() for loss in losses.values())
    total(losses).backward()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    if 0 in chosen:
        # DETR's decoder begins with states of 0, of which its first attention to itself makes nothing.
        idle = {name for name, gradient in gradients.items() if not gradient.any()}
        assert {name for name in idle if not name.startswith("decoder.0.self_attn")} == set()


def test_retinanet_losses_are_computed_in_float32() -> None:
    """From what its head gives under autocast, which is bfloat16."""
    detector = network("retinanet")
    images, extents, targets = scenes()
    given: list[dict[str, Tensor]] = []
    detector.head.register_forward_hook(lambda module, inputs, outputs: given.append(outputs))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            losses = detector(images, extents, targets)
        assert {output.dtype for output in given[0].values()} == {torch.bfloat16}
        anchors = torch.cat(detector.anchors.on(detector.levels(detector.maps(images))))
        for i, objects_ in enumerate(targets):
            outputs = {name: output[i : i + 1].float() for name, output in given[0].items()}
            wanted = [{"boxes": objects_.boxes, "labels": objects_.labels}]
            expected = detector.head.compute_loss(wanted, outputs, [anchors], [detector._match(objects_, anchors)])
            assert all(torch.equal(losses[name][i], loss) for name, loss in expected.items())


def sure(detector: Detector) -> Detector:
    """The same with random predictors far from their cautious start: it finds much, everywhere."""
    torch.manual_seed(3)
    for name, parameter in detector.named_parameters():
        if name.endswith(("cls_logits.weight", "bbox_reg.weight", "bbox_pred.weight", "cls_score.weight")):
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("cls_logits.bias"):
            nn.init.zeros_(parameter)
    return detector.eval()


@small
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_boxes_are_inside_extent_and_sorted_by_score(name: str, precision: torch.dtype) -> None:
    detector = sure(network(name, max_detections=7))
    images, extents, _ = scenes()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        found: list[Detections] = detector(images, extents)
    assert len(found) == len(extents)
    for image, (height, width) in zip(found, extents, strict=True):
        assert len(image) == len(image.boxes) == len(image.scores) == 7
        assert image.boxes.dtype == image.scores.dtype == torch.float32
        assert image.labels.dtype == torch.int64
        assert (image.boxes >= 0).all()
        assert (image.boxes <= torch.tensor([width, height] * 2)).all()
        assert (image.boxes[:, 2:] > image.boxes[:, :2]).all()
        assert torch.equal(image.scores, image.scores.sort(descending=True).values)
        assert 0 <= int(image.labels.min()) <= int(image.labels.max()) < NUM_CLASSES
        assert (image.masks is not None) == (name == "mask_rcnn")
        if image.masks is not None:
            assert image.masks.shape == (7, 28, 28)
            assert image.masks.dtype == torch.float32
            assert 0 <= image.masks.min() <= image.masks.max() <= 1


@small
def test_empty_detections_have_valid_shapes(name: str) -> None:
    detector = network(name).eval()
    images, extents, _ = scenes()
    if isinstance(detector, RetinaNet):
        detector.min_score = 1.0
    elif isinstance(detector, MaskRcnn):
        detector.roi_heads.score_thresh = 1.0
    else:
        detector.max_detections = 0
    with torch.no_grad():
        for image in detector(images, extents):
            assert image.boxes.shape == (0, 4)
            assert len(image) == len(image.scores) == 0
            assert image.masks is None or image.masks.shape == (0, 28, 28)


def test_mask_rcnn_without_proposals_has_finite_losses() -> None:
    """All beyond the image, as of a network that diverges: nothing is found, and losses are still finite."""
    detector = network("mask_rcnn")
    images, extents, targets = scenes()
    nn.init.constant_(detector.rpn.head.bbox_pred.bias, 1e4)
    losses = detector(images[2:], extents[2:], targets[2:])
    assert all(loss.isfinite().all() for loss in losses.values())
    total(losses).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())
    with torch.no_grad():
        assert [len(image) for image in detector.eval()(images, extents)] == [0, 0, 0]


@small
def test_input_is_padded_to_size_divisor(name: str) -> None:
    detector = network(name)
    images, extents, targets = scenes()
    cut, padded = images[:, :, :70, :140], images.clone()
    padded[:, :, 70:], padded[:, :, :, 140:] = 0, 0
    cut_extents = [(min(height, 70), min(width, 140)) for height, width in extents]
    with torch.no_grad():
        losses, expected = detector(cut, cut_extents, targets), detector(padded, cut_extents, targets)
    assert all(torch.equal(losses[loss], expected[loss]) for loss in expected)


@small
def test_boxes_are_clipped_to_extent_on_larger_canvas(name: str) -> None:
    """Its boxes are cut off at the extent, whatever a larger canvas adds."""
    detector = sure(network(name))
    images, extents, _ = scenes()
    larger = torch.zeros(3, 3, 192, 224)
    larger[:, :, :96, :160] = images
    with torch.no_grad():
        found = detector(larger, extents)
    for image, (height, width) in zip(found, extents, strict=True):
        assert len(image)
        assert (image.boxes <= torch.tensor([width, height] * 2)).all()


@small
def test_gradient_checkpointing_does_not_change_results(name: str) -> None:
    results = []
    for recompute in (False, True):
        detector = network(name)
        detector.set_grad_checkpointing(recompute)
        assert all(stage.grad_checkpointing == recompute for stage in detector.backbone.stages)
        losses = detector(*scenes())
        total(losses).backward()
        results.append([*losses.values(), *(parameter.grad for parameter in detector.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@small
def test_samplers_and_dropout_use_torch_generator(name: str) -> None:
    config: dict[str, Any] = {"dropout": 0.1} if name == "detr" else {}
    detector = network(name, **config)
    if isinstance(detector, MaskRcnn):
        detector.rpn.fg_bg_sampler.batch_size_per_image = 32
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        with torch.no_grad():
            draws.append(total(detector(*scenes_at(seed))))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) == (name == "retinanet")  # which draws nothing


def scenes_at(seed: int) -> tuple[Tensor, list[Extent], list[Objects]]:
    """The scenes, with torch's generator left as if they had not been made."""
    made = scenes()
    torch.manual_seed(seed)
    return made


@small
def test_drop_path_masks_are_passed_to_backbone(name: str) -> None:
    detector = SMALL[name](backbone("pvt_pico", 64, drop_path_rate=0.5), NUM_CLASSES).eval()
    images, extents, _ = scenes()
    rates = torch.tensor(detector.drop_path_rates)
    masks = torch.zeros(len(rates), len(images))
    trunk: Any = detector.backbone
    with torch.no_grad():
        expected = trunk.forward_intermediates(images, intermediates_only=True, drop_path=masks)
        for made, other in zip(detector.maps(images, masks), expected, strict=True):
            assert torch.equal(made, other)
        masked = detector.detect(expected, extents)
        for image, other in zip(detector(images, extents, drop_path=masks), masked, strict=True):
            assert torch.equal(image.boxes, other.boxes)


@small
@pytest.mark.parametrize("model", ["resnet18", "convnext_atto"])
def test_losses_backpropagate_on_other_backbones(name: str, model: str) -> None:
    detector = network(name, model)
    for module in detector.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    losses = detector(*scenes())
    total(losses).backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())


@small
def test_pretrained_cfg_lists_class_dependent_layers(name: str) -> None:
    """Those whose shapes depend on how many classes there are, and no others."""
    few = {key: tensor.shape for key, tensor in network(name).state_dict().items()}
    detector = SMALL[name](backbone("pvt_pico", 64), NUM_CLASSES + 2)
    differing = {key.rpartition(".")[0] for key, tensor in detector.state_dict().items() if tensor.shape != few[key]}
    heads = detector.pretrained_cfg["classifier"]
    assert differing == ({heads} if isinstance(heads, str) else set(heads))


@small
def test_checkpoint_of_other_image_size_is_resized(name: str) -> None:
    detector, larger = network(name), SMALL[name](backbone("pvt_pico", 96), NUM_CLASSES)
    larger.load_state_dict(checkpoint_filter_fn(detector.state_dict(), larger))
    assert larger.no_weight_decay() == {"backbone.stages.3.cls_token"}
    assert torch.equal(
        larger.backbone.stages[0].blocks[0].mlp.fc1.weight, detector.backbone.stages[0].blocks[0].mlp.fc1.weight
    )


def test_indexing_detections_keeps_order() -> None:
    found = Detections(torch.arange(12.0).reshape(3, 4), torch.tensor([0.1, 0.9, 0.5]), torch.tensor([7, 8, 9]))
    chosen = found[torch.tensor([1, 2])]
    assert chosen.labels.tolist() == [8, 9]
    assert chosen.boxes[:, 0].tolist() == [4.0, 8.0]
    assert chosen.masks is None
