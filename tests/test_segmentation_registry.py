"""A registered segmentation model: resolved, served over HTTP, exported; each against what plain PyTorch makes of it.

photographs ──PIL, torch──▶ network ──▶ all classes at full size at once ──▶ argmax ─┐
      └──the same bytes──HTTP──▶ server ──▶ masks ─────────────────────────────────┴─ equal?
"""

import base64
import functools
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pandas
import pytest
import safetensors.torch
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline import cli, files
from pipeline.commands import registry as launch_registry
from pipeline.config import Bound, Gates, ImageConfig, ModelConfig, SemanticFpnConfig, load_section
from pipeline.errors import InputError
from pipeline.evaluation_view import whole_size
from pipeline.feed.augment import whole_views
from pipeline.feed.loader import EvalFeed
from pipeline.shards import ade20k
from pipeline.shards.images import decode_map
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from pipeline.tasks.segment import predict
from pipeline.track import export, tracking_server
from pipeline.track.export import compare_outputs
from pipeline.track.export.source import ExportSource
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import model_files, promote, registry
from pipeline.track.serve.segmenter import class_map
from pipeline.world import World
from pvt.semantic_fpn import SemanticFpn, backbone
from tests.model_server import ModelServer, serving
from tests.ranks import ROOT

# MLflow's, about its use of pandas.
pytestmark = pytest.mark.filterwarnings("ignore:Operation with range is deprecated")

CLASSES = ["sky", "roof", "wall", "tree", "sea", "road", "door"]
IMAGE = ImageConfig(size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
TASK = SemanticFpnConfig(channels=32, short_side=64, long_side=150)
URI = "models:/scenes/1"
LIMITS = {"PVT_SERVE_MAX_ROWS": "8", "PVT_SERVE_MAX_PIXELS": "1000000"}


class Registry:
    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.client: MlflowClient = tracking_server.connect(self.uri, create=True)
        self.experiment_id = self.client.create_experiment("e", artifact_location=(folder / "artifacts").as_uri())

    def add(self, name: str, network: torch.nn.Module, metrics: dict[str, float | None], **changes: Any) -> str:
        entry = self.folder / f"entry-{name}-{len(list(self.folder.glob('entry-*')))}"
        entry.mkdir()
        safetensors.torch.save_file(network.state_dict(), entry / WEIGHTS)
        fields: dict[str, Any] = {
            "task": TASK,
            "model": ModelConfig(name="pvt_pico"),
            "image": IMAGE,
            "eval_batch_size": 1,
            "classes": CLASSES,
            "metrics": metrics,
            "sha256": {WEIGHTS: files.sha256(entry / WEIGHTS)},
            "lineage": {"run": files.sha256(entry / WEIGHTS)[:32], "step": "1", "data": "d" * 64},
        }
        ModelCard(**{**fields, **changes}).write(entry)
        return registry.register(self.client, name, entry, experiment_id=self.experiment_id, run_id=None)


def random_network(seed: int = 0) -> SemanticFpn:
    """Of random weights, but each class is the best one somewhere, as with a trained network."""
    torch.manual_seed(seed)
    network = SemanticFpn(backbone("pvt_pico", IMAGE.size), len(CLASSES), TASK.channels, TASK.dropout)
    network.eval().requires_grad_(False)
    network.classifier.weight *= 100
    photo = torch.from_numpy(load_sample_images().images[0][None, :416, :640] / 255).permute(0, 3, 1, 2).float()
    logits = network((photo - 0.5) / 0.25)
    network.classifier.bias = torch.nn.Parameter(-logits.mean(dim=(0, 2, 3)), requires_grad=False)
    return network


@pytest.fixture(scope="module")
def network() -> SemanticFpn:
    return random_network()


@pytest.fixture(scope="module")
def models(network: SemanticFpn, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(empty_database, folder)
    made = Registry(folder)
    assert made.add("scenes", network, {"miou": 0.42, "macc": 0.5, "aacc": 0.7, "val_loss": 1.0}) == URI
    return made


@pytest.fixture(autouse=True)
def connected(models: Registry) -> None:
    tracking_server.connect(models.uri)


@pytest.fixture(scope="module")
def served(models: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    copy = registry.resolve(URI).folder.parent
    with serving(copy, tmp_path_factory.mktemp("served"), LIMITS) as at:
        yield at


# The reference


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Cuttings of photographs: wide, tall, small, thin, a palette's, a JPEG."""
    china, flower = (Image.fromarray(photo) for photo in load_sample_images().images)
    return [
        encoded(china.crop((0, 0, 300, 200)), "JPEG"),
        encoded(flower.crop((200, 50, 310, 260))),
        encoded(china.crop((100, 100, 133, 131))),  # made larger
        encoded(flower.crop((0, 100, 640, 140))),  # whose long side decides
        encoded(china.crop((0, 0, 400, 1))),
        encoded(flower.convert("L").resize((129, 97)).quantize(32)),
    ]


def by_hand(network: SemanticFpn, data: bytes) -> tuple[npt.NDArray[np.int64], Tensor]:
    """The map of an image, [h, w], and by how much the best class is ahead at each pixel."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor = min(64 / min(image.size), 150 / max(image.size))
    width, height = (max(1, round(side * factor)) for side in image.size)
    small = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) / 255
    canvas = np.zeros((1, 3, math.ceil(height / 32) * 32, math.ceil(width / 32) * 32), np.float32)
    canvas[0, :, :height, :width] = ((small - IMAGE.mean) / IMAGE.std).transpose(2, 0, 1)
    logits = network(torch.from_numpy(canvas))
    on_canvas = interpolate(logits, canvas.shape[2:], mode="bilinear")[..., :height, :width]
    at_full_size = interpolate(on_canvas, (image.height, image.width), mode="bilinear")[0]
    first, second = at_full_size.topk(2, dim=0).values
    return at_full_size.argmax(0).numpy(), first - second


def check_answer(answer: dict[str, Any], network: SemanticFpn, data: bytes) -> None:
    expected, ahead = by_hand(network, data)
    png = base64.b64decode(answer["mask"], validate=True)
    assert (png[24], png[25]) == (8, 3)  # bits of a palette's indices
    mask = decode_map(png)
    assert mask.shape == expected.shape
    differs = mask != expected + 1
    assert not (differs & (ahead.numpy() > 1e-3)).any()
    assert differs.mean() < 1e-3
    values, counts = np.unique(mask, return_counts=True)
    told = dict(zip(answer["values"], answer["shares"], strict=True))
    assert told == {int(value): count / mask.size for value, count in zip(values, counts, strict=True)}
    assert answer["shares"] == sorted(answer["shares"], reverse=True)
    assert answer["labels"] == [CLASSES[value - 1] for value in answer["values"]]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def split(*rows: bytes) -> dict[str, Any]:
    return {"dataframe_split": {"columns": ["image"], "data": [[b64(row)] for row in rows]}}


# Registered


def test_segmentation_version_has_task_tags_and_signature() -> None:
    version = registry.resolve(URI)
    assert version.card.task == TASK
    assert version.tags["task"] == "semantic_fpn"
    assert (version.tags["metric.miou"], version.tags["good"]) == ("0.42", "true")
    model = Model.load(str(version.folder.parent))
    signature = model.signature
    assert signature is not None
    assert [(each.name, str(each.type)) for each in signature.inputs] == [("image", "DataType.binary")]
    assert signature.outputs.input_names() == ["mask", "labels", "values", "shares"]
    assert signature.params is None
    needed = (version.folder.parent / "requirements.txt").read_text()
    assert f"torchvision=={model_files.importlib.metadata.version('torchvision')}\n" in f"{needed}\n"


def test_list_and_show_print_segmentation_metrics(
    models: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["list", "scenes"], ["show", URI]):
        monkeypatch.setattr(sys, "argv", ["registry.py", *arguments, "--tracking-uri", models.uri])
        with pytest.raises(SystemExit) as ending:
            cli.run(launch_registry.main)
        printed = capsys.readouterr()
        assert ending.value.code == 0
        for text in ("miou", "0.42", "macc"):
            assert text in printed.out


def test_promotion_applies_segmentation_gates(models: Registry, network: SemanticFpn) -> None:
    gates = load_section(Gates, ROOT / "configs/gates/segmentation.yaml")
    assert {"miou"} <= gates.metrics.keys() & gates.champion.keys()
    scores: dict[str, float | None] = {"miou": 0.42, "macc": 0.5, "aacc": 0.7, "val_loss": 1.0}
    first = models.add("judged", network, scores)
    told = promote.promote(first, gates)
    assert told["ok"], told
    (loads,) = [row for row in told["gates"] if row["gate"] == "loads"]
    assert any(f"{name} with a share of the pixels of " in loads["value"] for name in CLASSES)
    worse = models.add("judged", random_network(1), {**scores, "miou": 0.05})
    told = promote.promote(worse, gates)
    refused = {row["gate"] for row in told["gates"] if not row["passed"]}
    assert not told["ok"]
    assert "metrics.miou" in refused


def test_version_with_non_finite_output_is_not_promoted(models: Registry) -> None:
    broken = random_network(2)
    with torch.no_grad():
        broken.classifier.bias[2] = math.nan  # pyright: ignore[reportOptionalSubscript]
    uri = models.add("broken", broken, {"miou": 0.9})
    told = promote.promote(uri, Gates(metrics={"miou": Bound(min=0.1)}))
    (loads,) = [row for row in told["gates"] if row["gate"] == "loads"]
    assert not loads["passed"]
    assert "not finite" in loads["value"]


# Served


def test_masks_over_http_match_plain_pytorch(served: ModelServer, network: SemanticFpn) -> None:
    images = pictures()
    answers = served.predictions(split(*images))
    assert len(answers) == len(images)
    for answer, data in zip(answers, images, strict=True):
        check_answer(answer, network, data)
    assert max(len(answer["labels"]) for answer in answers) >= 3  # else classes could be mixed up unseen


def test_masks_from_pyfunc_match_plain_pytorch(network: SemanticFpn) -> None:
    model = mlflow.pyfunc.load_model(str(registry.resolve(URI).folder.parent))
    images = pictures()
    answers = model.predict(pandas.DataFrame({"image": images}))
    assert list(answers.columns) == ["mask", "labels", "values", "shares"]
    for answer, data in zip(answers.to_dict("records"), images, strict=True):
        check_answer(answer, network, data)
    assert len(model.predict(pandas.DataFrame({"image": images})[:0])) == 0


def test_documented_segmentation_client_works(served: ModelServer, network: SemanticFpn, tmp_path: Path) -> None:
    text = (ROOT / "docs/serving.md").read_text()
    (python,) = [block for block in text.split("```")[1::2] if block.startswith("python") and "mask" in block]
    (tmp_path / "photo.jpg").write_bytes(pictures()[0])
    python = python.removeprefix("python").replace("http://127.0.0.1:5001", served.url)
    (tmp_path / "client.py").write_text(python)
    ran = subprocess.run([sys.executable, "client.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected, _ = by_hand(network, pictures()[0])
    (mask,) = tmp_path.glob("*.png")
    assert decode_map(mask.read_bytes()).shape == expected.shape
    assert ran.stdout.split()[0] == CLASSES[np.bincount(expected.ravel()).argmax()]


def test_served_masks_match_evaluation(network: SemanticFpn, tmp_path: Path) -> None:
    """By way of shards, DALI and torch's resize there, and of Pillow's here."""
    for folder in ("images/any", "annotations/any"):
        (tmp_path / "ade" / folder).mkdir(parents=True)
    for number, data in enumerate(pictures()):
        kind = "png" if data.startswith(b"\x89PNG") else "jpg"
        (tmp_path / f"ade/images/any/{number}.{kind}").write_bytes(data)
        size = Image.open(io.BytesIO(data)).size
        (tmp_path / f"ade/annotations/any/{number}.png").write_bytes(encoded(Image.new("L", size, 1)))
    pack(ade20k.find(tmp_path / "ade/annotations/any", classes=CLASSES), tmp_path / "packed")
    shards = ShardSet(tmp_path / "packed")
    model = mlflow.pyfunc.load_model(str(registry.resolve(URI).folder.parent))
    differing, num_pixels = 0, 0
    for batch in EvalFeed(shards, World(), IMAGE, task=TASK, batch_size=1):
        (target,) = batch.targets
        expected = predict(network(batch.images)[0], target).numpy()
        data = shards.read(int(batch.samples.shard[0]), int(batch.samples.row[0]))
        (mask,) = model.predict(pandas.DataFrame({"image": [data]}))["mask"]
        differing += int((decode_map(base64.b64decode(mask)) != expected + 1).sum())
        num_pixels += expected.size
    assert num_pixels == sum(math.prod(Image.open(io.BytesIO(data)).size) for data in pictures())
    assert differing / num_pixels < 0.002


BAD: dict[str, tuple[Callable[[], list[bytes]], str]] = {
    "not an image": (lambda: [pictures()[0], b"\xffhello"], "row 1: not an image"),
    "truncated": (lambda: [pictures()[2], pictures()[0][:-600]], "row 1: .*truncated"),
    "too many rows": (lambda: [pictures()[2]] * 9, "9 rows; a request may have 8"),
    "too many pixels": (lambda: [encoded(Image.new("L", (1001, 1000)))], "row 0: 1001 × 1000 pixels, more than"),
    "too many in all": (
        lambda: [encoded(Image.new("L", (700, 700)))] * 3,
        "the images have 1,470,000 pixels; those of a request may have 1,000,000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_rejected_with_a_reason(served: ModelServer, case: str) -> None:
    rows, reason = BAD[case]
    status, answer = served.post(split(*rows()))
    assert status == 400, answer
    assert re.search(reason, json.loads(answer)["message"]), answer


def test_internal_error_does_not_leak_details() -> None:
    model = mlflow.pyfunc.load_model(str(registry.resolve(URI).folder.parent))
    network = model.unwrap_python_model()._model._network
    network.classifier.bias[0] = math.inf
    with pytest.raises(MlflowException) as raised:
        model.predict(pandas.DataFrame({"image": pictures()[:1]}))
    assert raised.value.get_http_status_code() == 500
    assert json.loads(raised.value.serialize_as_json())["message"].startswith("internal error")


def test_class_map_matches_argmax_over_all_classes_at_once() -> None:
    logits = torch.randn(150, 8, 24, generator=torch.Generator().manual_seed(0))
    for size in ((33, 95), (1, 7), (400, 300)):
        found = class_map(logits, (31, 94), size)
        on_canvas = interpolate(logits[None], (32, 96), mode="bilinear")[..., :31, :94]
        at_full_size = interpolate(on_canvas, size, mode="bilinear")[0]
        # Where two classes tie but for rounding, either is right.
        lost = at_full_size.amax(0) - at_full_size.gather(0, found[None].long())[0]
        assert lost.max() < 1e-5


@pytest.mark.parametrize("hw", [(480, 640), (640, 480), (50, 51), (1, 4000), (300, 97), (64, 64), (64, 65), (2, 3)])
def test_sizes_follow_the_rule_that_exports_state(hw: tuple[int, int]) -> None:
    for task in (TASK, SemanticFpnConfig(), SemanticFpnConfig(short_side=33)):
        short, long = task.sides(IMAGE)
        factor = min(short / min(hw), long / max(hw))
        expected = tuple(max(1, round(side * factor)) for side in hw)
        assert whole_size(task, IMAGE, *hw) == expected
        assert tuple(whole_views(task, IMAGE, np.array([hw])).resized[0].tolist()) == expected


# Exported

Opener = Callable[[Path], Callable[[Tensor], Tensor]]


def open_safetensors(folder: Path) -> Callable[[Tensor], Tensor]:
    network = random_network(7)
    network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return network


def open_onnx(folder: Path) -> Callable[[Tensor], Tensor]:
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def open_torch_export(folder: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(folder / "model.pt2").module()


OPEN: dict[str, Opener] = {
    "safetensors": open_safetensors,
    "onnx": open_onnx,
    "torch-export": open_torch_export,
}
VARYING = {"batch": "any", "height": "multiples of 32", "width": "multiples of 32"}


Exported = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def exported(models: Registry, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def export_once(to: str) -> tuple[Path, dict[str, Any]]:
        return folder / to, export.export(URI, to, folder / to)

    return export_once


@pytest.mark.parametrize(
    "to", ["safetensors", *(pytest.param(to, marks=pytest.mark.slow) for to in ("onnx", "torch-export"))]
)
def test_exported_segmenter_matches_the_network(to: str, network: SemanticFpn, exported: Exported) -> None:
    folder, result = exported(to)
    opened = OPEN[to](folder)
    for shape in ((1, 3, 64, 64), (3, 3, 32, 160), (2, 3, 224, 96)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = network(images)
        assert expected.std() > 1  # of a size at which the tolerance means something
        torch.testing.assert_close(opened(images), expected, rtol=0, atol=1e-4)
    assert (result["images"], result["varying"]) == (6, VARYING)
    assert result["predictions"] > 6 * 16 * 16
    assert result["same_top1"] >= 0.9999 * result["predictions"]
    assert result["logit_difference"] < 1e-4
    if to == "safetensors":
        assert ModelCard.read(folder).task == TASK
        return
    about = json.loads((folder / "preprocessing.json").read_bytes())
    assert about["classes"] == CLASSES
    assert about["output"]["layout"] == "NCHW"
    assert about["preprocessing"]["resize_short_side_px"] == 64
    assert about["preprocessing"]["unless_long_side_exceeds_px"] == 150
    assert about["preprocessing"]["pad_to_multiples_of_px"] == 32
    assert "center_crop_px" not in about["preprocessing"]


def test_preprocessing_json_suffices_to_reproduce_masks(network: SemanticFpn, exported: Exported) -> None:
    """A map made as the file says, from nothing else."""
    folder, _ = exported("onnx")
    about = json.loads((folder / "preprocessing.json").read_bytes())
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    before, after = about["preprocessing"], about["postprocessing"]
    image = Image.open(io.BytesIO(pictures()[0])).convert("RGB")
    short, long, multiple = (
        before[name] for name in ("resize_short_side_px", "unless_long_side_exceeds_px", "pad_to_multiples_of_px")
    )
    factor = min(short / min(image.size), long / max(image.size))
    width, height = (max(1, round(side * factor)) for side in image.size)
    assert before["antialias"]
    values = np.asarray(image.resize((width, height), Image.Resampling[before["interpolation"].upper()]), np.float32)
    values = (values / before["divide_by"] - np.float32(before["mean"])) / np.float32(before["std"])
    values = np.pad(values, ((0, -height % multiple), (0, -width % multiple), (0, 0)))
    (logits,) = session.run(None, {about["input"]["name"]: values.transpose(2, 0, 1)[None]})
    assert len(after) == 4
    options = about["postprocessing_resize"]
    on_canvas = interpolate(torch.from_numpy(logits), values.shape[:2], **options)[..., :height, :width]
    found = interpolate(on_canvas, (image.height, image.width), **options)[0].argmax(0)
    expected, _ = by_hand(network, pictures()[0])
    assert (found.numpy() != expected).mean() < 1e-3


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_export_to_classification_only_formats_is_rejected(to: str, tmp_path: Path) -> None:
    rule = f"--to {to}: cannot hold semantic_fpn, which {URI} is: export it to onnx, torch-export or safetensors"
    with pytest.raises(InputError, match=rule):
        export.export(URI, to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_check_detects_a_differing_weight() -> None:
    source, images = ExportSource(registry.resolve(URI)), compare_outputs.real_images(None)[:2]
    other = source.build()
    with torch.no_grad():
        other.classifier.bias[3] += 0.01  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue, reportIndexIssue]
    compare_outputs.compare_outputs(source, compare_outputs.OpenedExport(source.build()), VARYING, images, "x")
    with pytest.raises(compare_outputs.ExternalError, match="its export to x gives other logits"):
        compare_outputs.compare_outputs(source, compare_outputs.OpenedExport(other), VARYING, images, "x")
    fixed = compare_outputs.OpenedExport(lambda batch: source.network(batch[:1]).expand(len(batch), -1, -1, -1))
    with pytest.raises(compare_outputs.ExternalError, match="other logits"):  # of the batch of two
        compare_outputs.compare_outputs(source, fixed, VARYING, images, "x")
