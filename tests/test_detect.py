"""Detection: its metric is pycocotools' own, its losses are the network's, its starting weights a classifier's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from pipeline.coco_results import as_results
from pipeline.config import ClassificationConfig, DetrConfig, ImageConfig, MaskRcnnConfig, ModelConfig, RetinaNetConfig
from pipeline.errors import InputError
from pipeline.feed.box_transforms import BoxTransform, Truth
from pipeline.shards import object_annotations
from pipeline.shards.index import CorruptSampleError
from pipeline.tasks.build import build_task, start_from
from pipeline.tasks.detect import DetectionMetric, DetectionTask
from pipeline.world import World
from pvt.detector import Detections, Objects
from tests.batches import batch_of
from tests.conftest import run_ranks
from tests.workers.detections import CLASSES, scored

CATEGORY_IDS = [2, 3, 5, 70, 90]
SUMMARY = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100"]
TASKS = {
    "retinanet": RetinaNetConfig(pyramid_channels=32),
    "mask_rcnn": MaskRcnnConfig(pyramid_channels=32, box_width=64, mask_width=16, sampled_boxes=64),
    "detr": DetrConfig(width=32, heads=4, encoder_layers=1, decoder_layers=2, feedforward=64, queries=12),
}


def judged_from_files(folder: Path, masks: bool, iou_type: Any) -> COCOeval:
    """As anybody would do it: with a file of annotations and one of results."""
    found, truths = scored(masks)
    images = [{"id": t.image_id, "height": t.size[0], "width": t.size[1], "file_name": "x.jpg"} for t in truths]
    annotations = [
        {**entry, "id": number, "image_id": truth.image_id, "category_id": CATEGORY_IDS[entry["label"]]}
        for number, (truth, entry) in enumerate(((t, e) for t in truths for e in t.annotations), 1)
    ]
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    (folder / "truth.json").write_text(
        json.dumps({"images": images, "categories": categories, "annotations": annotations})
    )
    results = []
    for detections, truth in zip(found, truths, strict=True):
        for result in as_results(detections, truth.size, truth.extent):
            label, box = result.pop("label"), result.pop("bbox")
            results.append({**result, "image_id": truth.image_id, "category_id": CATEGORY_IDS[label]})
            if iou_type == "bbox":
                results[-1]["bbox"] = box
    (folder / "results.json").write_text(json.dumps(results))
    truth = COCO(str(folder / "truth.json"))
    judged = COCOeval(truth, truth.loadRes(str(folder / "results.json")), iou_type)
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    return judged


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_detection_metric_matches_pycocotools_on_any_world_size(ranks: int, tmp_path: Path) -> None:
    [report] = run_ranks(ranks, "detections", "masks")
    result, class_aps = report["result"], report["class_aps"]
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        theirs = judged_from_files(tmp_path, True, iou_type)
        expected = {f"{kind}_{name}": value for name, value in zip(SUMMARY, theirs.stats, strict=False) if value > -1}
        ours = {name: value for name, value in result.items() if name.startswith(f"{kind}_")}
        assert ours == pytest.approx(expected, abs=1e-6)
        assert 0.1 < ours[f"{kind}_ap"] < 0.9
        precision = theirs.eval["precision"][:, :, :, 0, 2]
        by_class = [precision[:, :, k].mean() for k in range(4)]
        assert class_aps[kind][:4] == pytest.approx(by_class, abs=1e-6)
        assert np.isnan(class_aps[kind][4])


def test_metric_without_masks_reports_box_scores_only() -> None:
    [report] = run_ranks(1, "detections", "boxes")
    assert "box_ap" in report["result"]
    assert not any(name.startswith("mask") for name in [*report["result"], *report["class_aps"]])


def test_metric_without_detections_is_zero() -> None:
    _, truths = scored(masks=False)
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    metric = DetectionMetric(CLASSES, masks=False)
    metric.update([nothing] * len(truths), truths, torch.ones(len(truths)))
    assert metric.result(World())["box_ap"] == 0.0


def test_data_set_without_objects_is_rejected() -> None:
    found, truths = scored(masks=False)
    metric = DetectionMetric(CLASSES, masks=False)
    metric.update([found[0]], [Truth(1, truths[0].size, truths[0].extent, [])], torch.ones(1))
    with pytest.raises(InputError, match="no object"):
        metric.result(World())


def test_results_are_in_stored_image_pixels() -> None:
    detections = Detections(
        torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([0.5]), torch.tensor([1]), torch.ones(1, 28, 28)
    )
    [result] = as_results(detections, (200, 300), (100, 100))
    assert result["bbox"] == pytest.approx([30, 40, 60, 80])
    mask = object_annotations.mask(result, 200, 300)
    assert mask.shape == (200, 300)
    inside = mask[41:119, 31:89]
    assert inside.all()
    assert int(mask.sum()) == pytest.approx(60 * 80, rel=0.05)


def task_of(task: str, classes: list[str] = CLASSES, **model: Any) -> DetectionTask:
    torch.manual_seed(0)
    config = ModelConfig(**{"name": "pvt_pico", "image_size": 64, **model})
    built = build_task(TASKS[task], config, ImageConfig(size=64), classes)
    assert isinstance(built, DetectionTask)
    return built


@pytest.mark.parametrize(("name", "steps"), [("retinanet", 70), ("mask_rcnn", 30), ("detr", 30)])
def test_detector_overfits_two_images(name: str, steps: int) -> None:
    """Bright squares on noise: found after some dozen steps, and not before."""
    task = task_of(name)
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=draws) * 0.1
    targets, truths = [], []
    for i, (x, y, side, label) in enumerate([(8, 12, 32, 0), (20, 16, 40, 2)]):
        images[i, label % 3, y : y + side, x : x + side] += 2.0
        masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
        masks[0, y : y + side, x : x + side] = 1
        box = torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32)
        targets.append(Objects(box, torch.tensor([label]), masks if name == "mask_rcnn" else None))
        area = {"area": side * side, "iscrowd": 0}
        encoded: Any = rle.encode(np.asfortranarray(masks[0].numpy()))
        truths.append(
            Truth(
                i, (64, 64), (64, 64), [{"label": label, "bbox": [x, y, side, side], "segmentation": encoded, **area}]
            )
        )
    batch = batch_of(images, targets)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    for step in range(steps):
        torch.manual_seed(step)
        losses = task.losses(task.model.train(), batch)
        assert losses.shape == (2,)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    scores = score(task, images, truths)
    assert scores["box_ap50"] > 0.7
    assert ("mask_ap50" in scores) == (name == "mask_rcnn")
    assert score(task_of(name), images, truths)["box_ap50"] < 0.5


def score(task: DetectionTask, images: torch.Tensor, truths: list[Truth]) -> dict[str, float]:
    metric = task.metric()
    with torch.inference_mode():
        metric.update(task.outputs(task.model.eval(), batch_of(images)), truths, torch.ones(len(images)))
    return metric.result(World())


@pytest.mark.parametrize("name", TASKS)
def test_detector_starts_from_classifier_or_other_detector(name: str) -> None:
    classifier: nn.Module = timm.create_model("pvt_pico", num_classes=3, img_size=64)
    task, config = task_of(name), ModelConfig(name="pvt_pico", image_size=64)
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    kinds: Any = {"source_task": ClassificationConfig(), "source_classes": ["a", "b", "c"]}
    start_from(task, TASKS[name], config, CLASSES, classifier.state_dict(), "models:/c/1", **kinds)
    after = task.model.state_dict()
    theirs = classifier.state_dict()
    for key, tensor in after.items():
        expected = theirs[key.removeprefix("backbone.")] if key.startswith("backbone.") else before[key]
        assert torch.equal(tensor, expected), key
    assert task.depths["backbone.stages.0.patch_embed.proj.weight"] == 0
    assert {key for key, _ in task.model.named_parameters() if key.startswith("backbone.")} == task.depths.keys()

    other = task_of(name, classes=["x", "y"])
    fresh = {key: tensor.clone() for key, tensor in other.model.state_dict().items()}
    kinds = {"source_task": TASKS[name], "source_classes": CLASSES}
    start_from(other, TASKS[name], config, ["x", "y"], after, "models:/d/1", **kinds)
    of_classes = [key for key, tensor in fresh.items() if tensor.shape != after[key].shape]
    assert of_classes
    for key, tensor in other.model.state_dict().items():
        if key in of_classes:
            assert torch.equal(tensor, fresh[key]), key
    shared = [key for key in after if key.startswith("backbone.")]
    assert all(torch.equal(other.model.state_dict()[key], after[key]) for key in shared)

    detector = task_of("retinanet" if name != "retinanet" else "mask_rcnn")
    kinds = {"source_task": TASKS[name], "source_classes": CLASSES}
    start_from(
        detector,
        RetinaNetConfig() if name != "retinanet" else MaskRcnnConfig(),
        config,
        CLASSES,
        after,
        "models:/d/1",
        **kinds,
    )
    assert all(torch.equal(detector.model.state_dict()[key], after[key]) for key in shared)


def test_settings_without_effect_are_rejected() -> None:
    with pytest.raises(InputError, match="drop_rate"):
        task_of("detr", drop_rate=0.1)
    with pytest.raises(InputError, match="strides"):
        task_of("retinanet", name="vit_tiny_patch16_224", image_size=None)


def test_duplicate_image_ids_are_rejected() -> None:
    found, truths = scored(masks=False)
    metric = DetectionMetric(CLASSES, masks=False)
    metric.update(found[:1] * 2, truths[:1] * 2, torch.ones(2))
    with pytest.raises(InputError, match="two images of id 100"):
        metric.result(World())


@pytest.mark.parametrize("crowd", [0, 1])
def test_mask_target_without_segmentation_is_rejected(crowd: int) -> None:
    entry = {"id": 7, "label": 0, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": crowd}
    stored = object_annotations.encode(object_annotations.Annotated(1, 60, 80, [entry]))
    image = ImageConfig(size=64)
    boxes, masks = (BoxTransform(task, image, len(CLASSES)) for task in (RetinaNetConfig(), MaskRcnnConfig()))
    view = boxes.evaluation_views(np.array([[60, 80]]))
    _, truth = boxes.evaluation_target(stored, view)
    assert truth.annotations == [entry]
    with pytest.raises(CorruptSampleError, match="annotation 7 has no segmentation"):
        masks.evaluation_target(stored, view)
    with pytest.raises(CorruptSampleError, match="80 × 60 pixels"):
        boxes.evaluation_target(stored, boxes.evaluation_views(np.array([[70, 80]])))
