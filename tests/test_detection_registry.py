"""Registered detectors: resolved, served, promoted, exported, reported; against evaluation, and torchvision's NMS.

scenes ──packed──▶ evaluation's feed ──▶ network ──▶ COCO's results ─┐
   └──the same bytes──▶ the served model, an exported graph ─────────┴─ equal?
"""

import base64
import functools
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlflow.pyfunc
import numpy as np
import onnx
import onnxruntime
import pandas
import pytest
import safetensors.torch
import torch
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from pipeline import files
from pipeline import network as networks
from pipeline.coco_results import as_results
from pipeline.config import (
    Bound,
    DetrConfig,
    Gates,
    ImageConfig,
    MaskRcnnConfig,
    ModelConfig,
    RetinaNetConfig,
    dump_config,
    load_config,
)
from pipeline.errors import InputError
from pipeline.feed.loader import EvalFeed
from pipeline.job import examine_model, report_page
from pipeline.pictures.boxes import draw_boxes
from pipeline.pictures.palette import palette
from pipeline.scenes import write_dataset
from pipeline.scenes.compose_scene import NAMES
from pipeline.shards import coco
from pipeline.shards.index import ShardSet
from pipeline.shards.object_annotations import mask
from pipeline.shards.pack import pack
from pipeline.tasks.detect import DetectionTask
from pipeline.track import export, tracking_server
from pipeline.track.export import compare_outputs
from pipeline.track.export.source import ExportSource
from pipeline.track.metric_names import label_of
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import promote, registry
from pipeline.track.serve.defaults import MIN_SCORE
from pipeline.track.sync.outbox import Outbox
from pipeline.world import World
from pvt.detector import Detector
from tests.model_server import ModelServer, serving
from tests.test_report import images_of, parse

pytestmark = [
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated"),  # MLflow's, about its use of pandas
]

IMAGE = ImageConfig(size=160, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation="bilinear")
SIDES: dict[str, Any] = {"short_side": 160, "long_side": 240}
ANCHORS: dict[str, Any] = {**SIDES, "pyramid_channels": 32, "max_detections": 12}
TASKS: dict[str, Any] = {
    "retinanet": RetinaNetConfig(**ANCHORS),
    "mask_rcnn": MaskRcnnConfig(**ANCHORS),
    "detr": DetrConfig(**SIDES, queries=9, width=32, heads=2, encoder_layers=1, decoder_layers=1, feedforward=64),
}
MODEL, CONVOLUTIONAL = ModelConfig(name="pvt_pico"), ModelConfig(name="test_resnet")
EXPORTS = {"retinanet": "torch-export", "detr": "onnx"}
"""Of convolutional models, whose graphs take half the time; test_segmentation_registry.py has PVT's."""
METRICS: dict[str, float | None] = {"box_ap": 0.42, "box_ap50": 0.6}
LIMITS = {"PVT_SERVE_MAX_PIXELS": "200000"}


CLASSES: list[str] = list(NAMES)


class Registry:
    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.client: MlflowClient = tracking_server.connect(self.uri, create=True)
        self.experiment_id = self.client.create_experiment("e", artifact_location=(folder / "artifacts").as_uri())

    def add(
        self,
        name: str,
        network: Detector,
        task: Any,
        metrics: dict[str, float | None],
        model: ModelConfig = MODEL,
    ) -> str:
        entry = self.folder / f"entry-{name}-{len(list(self.folder.glob('entry-*')))}"
        entry.mkdir()
        safetensors.torch.save_file(network.state_dict(), entry / WEIGHTS)
        card(entry / WEIGHTS, task, metrics, model).write(entry)
        return registry.register(self.client, name, entry, experiment_id=self.experiment_id, run_id=None)


def card(weights: Path, task: Any, metrics: dict[str, float | None], model: ModelConfig = MODEL) -> ModelCard:
    return ModelCard(
        task=task,
        model=model,
        image=IMAGE,
        eval_batch_size=1,
        classes=CLASSES,
        metrics=metrics,
        sha256={WEIGHTS: files.sha256(weights)},
        lineage={"run": files.sha256(weights)[:32], "step": "8", "data": "d" * 64},
    )


def random_detector(name: str, seed: int = 0, model: ModelConfig = MODEL) -> Any:
    """Of random weights, but sure of what it says, as a trained one is."""
    torch.manual_seed(seed)
    task: Any = TASKS[name]
    network = networks.build(task, model, IMAGE.size, len(CLASSES)).eval().requires_grad_(False)
    if name == "retinanet":
        outputs = network.head(network.levels(network.maps(torch.randn(1, 3, 160, 160))))
        head = network.head
        for layer, output in (
            (head.classification_head.cls_logits, outputs["cls_logits"]),
            (head.regression_head.bbox_reg, outputs["bbox_regression"]),
        ):
            layer.weight /= output.std()
            layer.bias.zero_()
    elif name == "mask_rcnn":
        network.roi_heads.box_predictor.cls_score.weight *= 10
    else:
        network.classifier.weight *= 10
        network.queries *= 10
    return network


@pytest.fixture(scope="module")
def networks_by_task() -> dict[str, Detector]:
    return {name: random_detector(name) for name in TASKS}


@pytest.fixture(scope="module")
def models(
    networks_by_task: dict[str, Detector], empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(empty_database, folder)
    made = Registry(folder)
    for name, network in networks_by_task.items():
        assert made.add(name, network, TASKS[name], METRICS) == f"models:/{name}/1"
    return made


@pytest.fixture(autouse=True)
def connected(models: Registry) -> None:
    tracking_server.connect(models.uri)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """Scenes of the size in which they are seen, and others."""
    folder = tmp_path_factory.mktemp("scenes")
    made = {}
    for seed, (name, side_px) in enumerate({"same": (160, 160), "other": (120, 300)}.items()):
        write_dataset.write_dataset(folder / name, {"val": 3}, seed=seed, side_px=side_px)
        pack(coco.find(folder / name / "coco/annotations/instances_val.json"), folder / f"{name}-packed")
        made[name] = ShardSet(folder / f"{name}-packed")
        assert made[name].classes == CLASSES
    return made


class Evaluated(NamedTuple):
    data: bytes
    results: list[dict[str, Any]]


def evaluated(network: Detector, task: Any, shards: ShardSet) -> list[Evaluated]:
    """Each image, and what evaluation finds in it."""
    found = []
    for batch in EvalFeed(shards, World(), IMAGE, task=task, batch_size=1):
        (truth,), (detections,) = batch.targets, network(batch.images, batch.extents)
        data = shards.read(int(batch.samples.shard[0]), int(batch.samples.row[0]))
        found.append(Evaluated(data, as_results(detections, truth.size, truth.extent)))
    return found


def loaded(name: str) -> Any:
    return mlflow.pyfunc.load_model(str(registry.resolve(f"models:/{name}/1").folder.parent))


def answers_of(model: Any, images: list[bytes], **params: Any) -> list[dict[str, Any]]:
    return model.predict(pandas.DataFrame({"image": images}), params=params).to_dict("records")


def check_answer(answer: dict[str, Any], results: list[dict[str, Any]]) -> None:
    assert answer["labels"] == [CLASSES[result["label"]] for result in results]
    np.testing.assert_allclose(answer["scores"], [result["score"] for result in results], rtol=0, atol=1e-5)
    np.testing.assert_allclose(answer["boxes"], [result["bbox"] for result in results], rtol=0, atol=0.01)
    assert answer.get("segmentations", []) == [result["segmentation"] for result in results if "segmentation" in result]


# Served


@pytest.mark.parametrize("name", TASKS)
def test_served_detections_match_evaluation(
    name: str, networks_by_task: dict[str, Detector], scenes: dict[str, ShardSet]
) -> None:
    """By way of shards, DALI and torch's resize there, and of Pillow's here."""
    model, network, task = loaded(name), networks_by_task[name], TASKS[name]
    found = evaluated(network, task, scenes["same"])
    answers = answers_of(model, [each.data for each in found], min_score=0.0)
    for answer, (_, results) in zip(answers, found, strict=True):
        assert len(results) == (9 if name == "detr" else 12)
        check_answer(answer, results)
    for data, results in evaluated(network, task, scenes["other"]):
        (answer,) = answers_of(model, [data], min_score=0.0)
        expected = [result["score"] for result in results]
        np.testing.assert_allclose(answer["scores"], expected, rtol=0, atol=0.02)
        for result in results[:3]:  # which, if their scores are nearly equal, may change places
            labelled = zip(answer["boxes"], answer["labels"], strict=True)
            same = [box for box, label in labelled if label == CLASSES[result["label"]]]
            assert np.abs(np.array(same) - result["bbox"]).max(axis=1).min() < 5


def test_low_scores_are_omitted_unless_requested(scenes: dict[str, ShardSet]) -> None:
    model, data = loaded("detr"), scenes["same"].read(0, 0)
    (every,) = answers_of(model, [data], min_score=0.0)
    scores = every["scores"]
    assert len(scores) == 9 > sum(score >= scores[3] for score in scores)
    cases: list[tuple[dict[str, float], float]] = [({}, MIN_SCORE), ({"min_score": scores[3]}, scores[3])]
    for params, least in cases:
        (answer,) = answers_of(model, [data], **params)
        count = sum(score >= least for score in scores)
        assert answer == {column: values[:count] for column, values in every.items()}


@pytest.mark.parametrize("name", TASKS)
def test_version_records_task_metric_and_signature(name: str) -> None:
    version = registry.resolve(f"models:/{name}/1")
    assert version.card.task == TASKS[name]
    assert (version.tags["task"], version.tags["metric.box_ap"], version.tags["good"]) == (name, "0.42", "true")
    signature = Model.load(str(version.folder.parent)).signature
    assert signature is not None
    masks = ["segmentations"] if name == "mask_rcnn" else []
    assert signature.outputs.input_names() == ["boxes", "labels", "scores", *masks]
    (parameter,) = signature.params.params
    assert (parameter.name, parameter.default) == ("min_score", MIN_SCORE)
    needed = (version.folder.parent / "requirements.txt").read_text()
    assert "pycocotools==" in needed
    assert ("transformers==" in needed) == (name == "detr")


@pytest.fixture(scope="module")
def served(models: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    tracking_server.connect(models.uri)
    copy = registry.resolve("models:/mask_rcnn/1").folder.parent
    with serving(copy, tmp_path_factory.mktemp("served"), LIMITS) as at:
        yield at


def split(images: list[bytes], **params: Any) -> dict[str, Any]:
    rows = [[base64.b64encode(image).decode()] for image in images]
    return {"dataframe_split": {"columns": ["image"], "data": rows}, "params": params}


def test_masks_over_http_match_evaluation(
    served: ModelServer, networks_by_task: dict[str, Detector], scenes: dict[str, ShardSet]
) -> None:
    found = evaluated(networks_by_task["mask_rcnn"], TASKS["mask_rcnn"], scenes["same"])
    for answer, (_, results) in zip(served.predictions(split([each.data for each in found])), found, strict=True):
        check_answer(answer, results)
        pixels = sum(int(mask({"segmentation": runs}, 160, 160).sum()) for runs in answer["segmentations"])
        assert pixels > 100
    bad = [
        (split([found[0].data], min_score=1.5), "min_score is 1.5; 0 to 1 was expected"),
        (split([found[0].data], min_score=math.nan), "min_score"),
        (split([found[0].data, b"\xffhello"]), "row 1: not an image"),
        (split([found[0].data] * 8), "the images have 204,800 pixels; those of a request may have 200,000"),
    ]
    for body, reason in bad:
        status, told = served.post(body)
        assert (status, reason in told) == (400, True), told


def test_internal_error_reveals_no_details(scenes: dict[str, ShardSet]) -> None:
    model = loaded("detr")
    model.unwrap_python_model()._model._network.classifier.bias[0] = math.nan
    with pytest.raises(MlflowException) as raised:
        answers_of(model, [scenes["same"].read(0, 0)])
    assert raised.value.get_http_status_code() == 500
    assert json.loads(raised.value.serialize_as_json())["message"].startswith("internal error")


# Promoted


def test_promotion_gates_use_box_ap(models: Registry, networks_by_task: dict[str, Detector]) -> None:
    gates = Gates(metrics={"box_ap": Bound(min=0.3)}, champion={"box_ap": 0.01})
    network, task = networks_by_task["retinanet"], TASKS["retinanet"]
    first = models.add("judged", network, task, METRICS)
    told = promote.promote(first, gates)
    assert told["ok"], told
    (loads,) = [row for row in told["gates"] if row["gate"] == "loads"]
    assert loads["value"].endswith(" boxes for the input example")
    worse = models.add("judged", random_detector("retinanet", 1), task, {"box_ap": 0.2})
    told = promote.promote(worse, gates)
    assert {"metrics.box_ap", "champion.box_ap"} <= {row["gate"] for row in told["gates"] if not row["passed"]}


@pytest.mark.parametrize("name", ["retinanet", "detr"])
def test_version_with_nan_weights_is_not_promoted(models: Registry, name: str) -> None:
    """RetinaNet with such finds nothing, as on a grey picture."""
    broken = random_detector(name)
    next(iter(broken.backbone.parameters())).view(-1)[0] = math.nan
    uri = models.add(f"broken-{name}", broken, TASKS[name], {"box_ap": 0.9})
    told = promote.promote(uri, Gates(metrics={"box_ap": Bound(min=0.1)}))
    (loads,) = [row for row in told["gates"] if row["gate"] == "loads"]
    assert (loads["passed"], "not finite" in loads["value"]) == (False, True)


# Exported

VARYING = {
    "retinanet": {"batch": "any", **dict.fromkeys(("height", "width"), "multiples of 32, at least 160")},
    "detr": {"batch": "any", **dict.fromkeys(("height", "width"), "multiples of 32")},
}
Run = Callable[..., Sequence[Tensor]]


class Exported(NamedTuple):
    folder: Path
    result: dict[str, Any]
    network: Any
    run: Run

    @property
    def about(self) -> dict[str, Any]:
        return json.loads((self.folder / "preprocessing.json").read_bytes())


def open_onnx(folder: Path) -> Run:
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx")

    def run(image: Tensor, extent: Tensor) -> list[Tensor]:
        fed = {"image": image.numpy(), "extent": extent.numpy()}
        return [torch.from_numpy(each) for each in session.run(["logits", "boxes"], fed)]

    return run


def open_torch_export(folder: Path) -> Run:
    return torch.export.load(folder / "model.pt2").module()


OPEN = {"onnx": open_onnx, "torch-export": open_torch_export}


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request: pytest.FixtureRequest, models: Registry, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, to = request.param, EXPORTS[request.param]
    network, folder = random_detector(name, model=CONVOLUTIONAL), tmp_path_factory.mktemp(name) / to
    tracking_server.connect(models.uri)
    uri = models.add(f"{name}-graph", network, TASKS[name], METRICS, CONVOLUTIONAL)
    return Exported(folder, export.export(uri, to, folder), network, OPEN[to](folder))


def by_hand(network: Any, image: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and boxes in pixels, with nothing of exports."""
    maps, extents = network.maps(image), [(height, width) for height, width in extent.tolist()]
    if hasattr(network, "queries"):
        logits, boxes = (each[-1] for each in network.predict(maps, extents))
        x, y, width, height = (boxes * extent.float()[:, None, [1, 0, 1, 0]]).unbind(-1)
        corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)
    else:
        levels = network.levels(maps)
        logits, offsets = network.head(levels).values()
        anchors = torch.cat(network.anchors.on(levels))
        corners = torch.stack([network.box_coder.decode_single(each, anchors) for each in offsets])
    limits = extent[:, None, [1, 0, 1, 0]].float()
    return logits, torch.maximum(torch.zeros(()), torch.minimum(corners, limits))


def test_exported_detectors_match_network(exported: Exported) -> None:
    result = exported.result
    for shape in ((1, 3, 160, 160), (3, 3, 160, 320), (2, 3, 224, 192)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        extent = torch.tensor([[shape[2] - 9 * i, shape[3] - 70 * i] for i in range(shape[0])])
        expected = by_hand(exported.network, images, extent)
        assert expected[0].std() > 0.5  # of a size at which the tolerance means something
        for ours, theirs, atol in zip(expected, exported.run(images, extent), (1e-4, 0.05), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=atol)
    assert result["varying"] == VARYING[exported.about["task"]]
    assert (result["images"], result["same_top1"]) == (6, result["predictions"])
    assert result["logit_difference"] < 1e-4
    assert result["box_difference"] < 0.05
    least = exported.about["preprocessing"].get("pad_to_at_least_px")
    assert least == (160 if exported.about["task"] == "retinanet" else None)
    assert (exported.about["extent"]["layout"], exported.about["boxes"]["name"]) == ("N2", "boxes")


def prepared(about: dict[str, Any], image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """A graph's input and the extent, as preprocessing.json says."""
    before = about["preprocessing"]
    short, long = before["resize_short_side_px"], before["unless_long_side_exceeds_px"]
    factor = min(short / min(image.size), long / max(image.size))
    width, height = (max(1, round(side * factor)) for side in image.size)
    values = np.asarray(image.resize((width, height), Image.Resampling[before["interpolation"].upper()]), np.float32)
    values = (values / before["divide_by"] - np.float32(before["mean"])) / np.float32(before["std"])
    multiple = before["pad_to_multiples_of_px"]
    values = np.pad(values, ((0, -height % multiple), (0, -width % multiple), (0, 0)))
    return torch.from_numpy(values.transpose(2, 0, 1)[None].copy()), (height, width)


def choose_anchors(about: dict[str, Any], logits: Tensor, boxes: Tensor, canvas: Sequence[int]) -> Any:
    """Of an image's anchors, as preprocessing.json says: boxes, scores, labels."""
    scores = 1 / (1 + torch.exp(-logits))
    anchors, kept = about["anchors"], []
    places = [math.prod(math.ceil(side / stride) for side in canvas) for stride in anchors["strides_px"]]
    ends = np.cumsum(places) * anchors["of_a_place"]
    assert ends[-1] == len(scores)
    for first, end in zip([0, *ends], ends, strict=False):
        flat = scores[first:end].flatten()
        best = flat.argsort(descending=True)[: about["candidates_of_a_map"]]
        best = best[flat[best] > about["min_score"]].tolist()
        kept += [(first + at // scores.shape[1], at % scores.shape[1]) for at in best]
    rows, labels = torch.tensor(kept).T
    chosen, values = boxes[rows], scores[rows, labels]
    large = (chosen[:, 2:] - chosen[:, :2]).min(dim=1).values >= about["min_side_px"]
    chosen, values, labels = chosen[large], values[large], labels[large]
    best = batched_nms(chosen, values, labels, about["max_overlap"])[: about["max_detections"]]
    return chosen[best], values[best], labels[best]


def squarish(data: bytes) -> bool:
    size = Image.open(io.BytesIO(data)).size
    return max(size) < 1.5 * min(size)


def test_preprocessing_json_suffices_to_run_exported_graph(exported: Exported, scenes: dict[str, ShardSet]) -> None:
    """What it makes of a graph's outputs is what the served model answers."""
    about = exported.about
    # The others are made so narrow that RetinaNet's graph wants them padded further than its network does.
    data = next(data for data in map(functools.partial(scenes["other"].read, 0), range(3)) if squarish(data))
    image = Image.open(io.BytesIO(data))
    canvas, (height, width) = prepared(about, image)
    logits, boxes = (each[0] for each in exported.run(canvas, torch.tensor([[height, width]])))
    if about["task"] == "detr":
        values, labels = logits.softmax(-1)[:, :-1].max(-1)
        best = values.argsort(descending=True)[: about["max_detections"]]
        boxes, values, labels = boxes[best], values[best], labels[best]
    else:
        boxes, values, labels = choose_anchors(about, logits, boxes, canvas.shape[2:])
    boxes = boxes * torch.tensor([image.width / width, image.height / height] * 2)
    version = registry.resolve(exported.result["model"])
    model = mlflow.pyfunc.load_model(str(version.folder.parent))
    (answer,) = answers_of(model, [data], min_score=0.0)
    assert answer["labels"] == [about["classes"][label] for label in labels]
    np.testing.assert_allclose(answer["scores"], values, rtol=0, atol=1e-4)
    expected = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    np.testing.assert_allclose(answer["boxes"], expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", TASKS)
def test_all_detectors_export_to_safetensors(name: str, tmp_path: Path) -> None:
    result = export.export(f"models:/{name}/1", "safetensors", tmp_path / "out")
    assert (result["logit_difference"], result["box_difference"]) == (0, 0)
    assert result["predictions"] > 6
    assert ModelCard.read(tmp_path / "out").task == TASKS[name]


SERVE_IT = "as many regions as the first one has found.*serve it.*safetensors"
REFUSED = [
    *((name, to, f"cannot hold {name}") for name in TASKS for to in ("timm", "transformers")),
    *(("mask_rcnn", to, SERVE_IT) for to in ("onnx", "torch-export")),
]


@pytest.mark.parametrize(("name", "to", "why"), REFUSED)
def test_unsupported_export_format_is_rejected(name: str, to: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^--to {to}: .*models:/{name}/1.*") as raised:
        export.export(f"models:/{name}/1", to, tmp_path / "out")
    assert re.search(why, str(raised.value))
    assert ("onnx" in str(raised.value).partition("export it to")[2]) == (name != "mask_rcnn")
    assert list(tmp_path.iterdir()) == []


def test_export_check_detects_changed_outputs() -> None:
    source, images = ExportSource(registry.resolve("models:/retinanet/1")), compare_outputs.real_images(None)[:2]
    varying = source.varying

    def changed(name: str, by: float) -> compare_outputs.OpenedExport:
        other = source.build()
        other.get_parameter(f"head.{name}.bias").add_(by)
        return compare_outputs.OpenedExport(source.graph(other))

    compare_outputs.compare_outputs(source, changed("classification_head.cls_logits", 0.0), varying, images, "x")
    with pytest.raises(compare_outputs.ExternalError, match="its export to x gives other logits"):
        compare_outputs.compare_outputs(source, changed("classification_head.cls_logits", 0.01), varying, images, "x")
    with pytest.raises(compare_outputs.ExternalError, match="its export to x gives other boxes"):
        compare_outputs.compare_outputs(source, changed("regression_head.bbox_reg", 0.01), varying, images, "x")


# Reported


def report_of(name: str, network: Detector, data: Path, folder: Path) -> Path:
    """A run's folder with a version that waits, and validation data."""
    tree: dict[str, Any] = {
        "run": {"name": name, "root": str(folder)},
        "task": TASKS[name].model_dump(mode="json"),
        "model": MODEL.model_dump(mode="json"),
        "image": IMAGE.model_dump(mode="json"),
        "data": {"train": str(data), "val": str(data), "lanes": 1},
        "optim": {"lr": 1e-3},
        "train": {"length": "8 steps", "global_batch_size": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "config.yaml")
    safetensors.torch.save_file(network.state_dict(), folder / WEIGHTS)
    Outbox(config.run.folder).put({WEIGHTS: folder / WEIGHTS}, card(folder / WEIGHTS, TASKS[name], METRICS))
    (config.run.folder / "config.yaml").write_text(dump_config(config))
    scores = {f"{kind}_{part}": 0.1 for kind in ("box", "mask") for part in ("ap", "ap50", "ap75", "ap_small", "ar100")}
    readings = [{"step": 2, "time": 1.7e9, "loss": 3.0}, {"step": 8, "time": 1.7e9, **scores, "box_ap": 0.42}]
    (config.run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in readings))
    return config.run.folder


@pytest.mark.parametrize("name", ["mask_rcnn", "detr"])
def test_report_shows_ap_and_detections(
    name: str, networks_by_task: dict[str, Detector], scenes: dict[str, ShardSet], tmp_path: Path
) -> None:
    network, shards = networks_by_task[name], scenes["same"]
    data = Path(shards.url(0)).parent
    folder = report_of(name, network, data, tmp_path)
    page = parse(report_page.write_report(folder, tmp_path / "page.html", samples=True))
    metric = DetectionTask(network, CLASSES).metric()
    wanted, num_found = dict.fromkeys(CLASSES, 0), []
    for batch in EvalFeed(shards, World(), IMAGE, task=TASKS[name], batch_size=1):
        (detections,), (truth,) = network(batch.images, batch.extents), batch.targets
        metric.update([detections], [truth], batch.weights)
        for entry in truth.annotations:
            wanted[CLASSES[entry["label"]]] += not entry["iscrowd"]
        num_found.append(int((detections.scores >= examine_model.MIN_SCORE).sum()))
    scores = metric.result(World())
    section = page.section("classes")
    facts = {row.all("dt")[0].text: row.all("dd")[0] for row in section.all("dl")[0].all("div")}
    shown = {metric_name: facts[label_of(metric_name)].value for metric_name in scores}
    assert shown == pytest.approx(scores, nan_ok=True)
    assert ("mask AP" in facts) == (name == "mask_rcnn")
    of_classes = {row[0]: row[1:] for row in section.table()[1:]}
    assert {name: int(row[0]) for name, row in of_classes.items()} == {name: n for name, n in wanted.items() if n}
    aps = dict(zip(CLASSES, metric.class_aps["box"], strict=True))
    assert all(row[1] == f"{100 * aps[name]:.2f} %" for name, row in of_classes.items())
    assert "42.00 %" in page.text  # the run's best
    pictures = images_of(page.section("inside-the-network"))
    kinds = [alt.partition(" of ")[0] for alt in pictures]
    assert (kinds.count("truth"), kinds.count("found"), kinds.count("stage 4")) == (3, 3, 3)
    assert max(next(iter(pictures.values())).size) == 340
    told = page.section("inside-the-network").all("p", "picture-about")
    assert [int(re.findall(r"more: (\d+)", each.text)[0]) for each in told] == num_found
    bare = images_of(parse(report_page.write_report(folder, tmp_path / "bare.html")).section("inside-the-network"))
    assert {alt.partition(" of ")[0] for alt in bare} == {f"stage {number}" for number in (1, 2, 3, 4)}


# Drawn


def test_boxes_and_masks_are_drawn_in_class_colours() -> None:
    picture = Image.new("RGB", (60, 40), "white")
    whole, half = np.ones((40, 60), np.uint8), np.zeros((40, 60), np.uint8)
    half[:, :30] = 1
    boxes = [[4, 20, 10, 10], [30, 20, 20, 15]]
    drawn = np.asarray(draw_boxes(picture, boxes, [1, 0], None, [half, whole], ["a", "b"]))
    first, second = palette(2)
    assert (drawn[20, 4] == second).all()  # a frame's corner
    assert (drawn[35, 50] == first).all()
    assert np.abs(drawn[1, 1] - (0.55 * 255 + 0.45 * second)).max() <= 1
    assert np.abs(drawn[1, 58] - (0.55 * 255 + 0.45 * first)).max() <= 1
    twice = draw_boxes(picture, [[4, 20, 10, 10]], [1], [0.5], None, ["a", "b"], side_px=120)
    assert twice.size == (120, 80)
    assert (np.asarray(twice)[40, 8] == palette(2)[1]).all()
