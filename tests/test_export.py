"""Exports, each opened as its users open it, against the model itself.

python -m tests.test_export      PVT-Large at 224 px to every target, which takes a minute or two
"""

import hashlib
import io
import json
import math
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import onnx
import onnxruntime
import pandas
import pytest
import safetensors.torch
import timm
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor
from transformers import AutoImageProcessor, PvtForImageClassification

import pvt  # noqa: F401 - registers its models with timm
from pipeline import cli, files
from pipeline.commands import registry as launch_registry
from pipeline.config import ClassificationConfig, ImageConfig, ModelConfig
from pipeline.errors import ExternalError, InputError
from pipeline.feed.augment import evaluation_views
from pipeline.feed.image_ops import Finisher
from pipeline.shards.index import ShardSet
from pipeline.track import export, tracking_server
from pipeline.track.export import compare_outputs, to_timm, to_transformers
from pipeline.track.export.source import ExportSource
from pipeline.track.model_card import RAW, WEIGHTS, ModelCard
from pipeline.track.registry import model_cache, registry
from tests.ranks import ROOT

# MLflow's, about its use of pandas.
pytestmark = pytest.mark.filterwarnings("ignore:Operation with range is deprecated")

CLASSES = [f"digit {digit}" for digit in range(10)]


class Models:
    """A registry of models with random weights, every tensor of which matters to the logits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.client: MlflowClient = tracking_server.connect(self.uri, create=True)
        self.experiment_id = self.client.create_experiment("e", artifact_location=(folder / "artifacts").as_uri())

    def add(self, name: str, model: str, *, averaged: bool = False, **image: Any) -> str:
        entry = self.folder / f"entry-{name}"
        entry.mkdir()
        weight_files = (WEIGHTS, RAW) if averaged else (WEIGHTS,)
        for seed, file in enumerate(weight_files):
            safetensors.torch.save_file(weights(model, image["size"], seed), entry / file)
        ModelCard(
            task=ClassificationConfig(),
            model=ModelConfig(name=model, drop_path_rate=0.1),
            image=ImageConfig(**image),
            eval_batch_size=8,
            classes=CLASSES,
            averaged=averaged,
            metrics={},
            sha256={file: files.sha256(entry / file) for file in weight_files},
            lineage={"run": hashlib.sha256(name.encode()).hexdigest()[:32], "step": "1"},
        ).write(entry)
        return registry.register(self.client, name, entry, experiment_id=self.experiment_id, run_id=None)


def weights(model: str, size: int, seed: int) -> dict[str, Tensor]:
    """timm's initial weights make small logits; these are of the size of a trained model's."""
    torch.manual_seed(seed)
    network: Any = create(model, size)
    state = network.state_dict()
    for tensor in state.values():
        if tensor.ndim == 1:
            tensor.add_(0.01 * torch.randn_like(tensor))
        if tensor.ndim == 4 and model not in SIZELESS:
            tensor.mul_(0.02)  # variances behind convolutions of the order of eps, so that eps shows
    head = network.pretrained_cfg["classifier"]
    state[f"{head}.weight"].normal_(std=5 / math.sqrt(network.num_features))
    return state


SIZELESS = ("resnet10t",)
"""Networks of convolutions, which are built for no size."""


def create(model: str, size: int) -> torch.nn.Module:
    sizes: dict[str, Any] = {} if model in SIZELESS else {"img_size": size}
    return timm.create_model(model, num_classes=10, **sizes).eval()


@pytest.fixture(scope="module")
def models(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(empty_database, folder)
    found = Models(folder)
    found.add("pico", "pvt_pico", averaged=True, size=32, crop_pct=1.0, mean=[0.5] * 3, std=[0.25] * 3)
    return found


@pytest.fixture(autouse=True)
def connected(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(model_cache.VARIABLE, str(models.folder / "cache"))
    tracking_server.connect(models.uri)


PICO = "models:/pico/1"

Exported = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def exported(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """PICO for a target, compared on the digits: the folder, which is not to be changed, and the result."""
    folder = tmp_path_factory.mktemp("exported") / "deep"
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def export_once(to: str) -> tuple[Path, dict[str, Any]]:
        if to not in made:
            made[to] = folder / to, export.export(PICO, to, folder / to, str(digits / "val"))
        return made[to]

    return export_once


def ours(uri: str) -> ExportSource:
    return ExportSource(registry.resolve(uri))


def digit_pixels(source: ExportSource, digits: Path, count: int) -> Tensor:
    return torch.stack([source.pixels(image) for image in compare_outputs.real_images(str(digits / "val"))[:count]])


# Each target, opened without our code


def open_safetensors(folder: Path, size: int) -> Callable[[Tensor], Tensor]:
    network = create(ModelCard.read(folder).model.name, size)
    network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    return network


def open_timm(folder: Path, size: int) -> Callable[[Tensor], Tensor]:
    name = json.loads((folder / "config.json").read_bytes())["architecture"]
    return timm.create_model(name, checkpoint_path=folder / WEIGHTS, num_classes=10, img_size=size).eval()


def open_transformers(folder: Path, size: int) -> Callable[[Tensor], Tensor]:
    model = PvtForImageClassification.from_pretrained(folder).eval()
    return lambda images: model(pixel_values=images).logits


def open_onnx(folder: Path, size: int) -> Callable[[Tensor], Tensor]:
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def open_torch_export(folder: Path, size: int) -> Callable[[Tensor], Tensor]:
    return torch.export.load(folder / "model.pt2").module()


OPEN = {
    "safetensors": open_safetensors,
    "timm": open_timm,
    "transformers": open_transformers,
    "onnx": open_onnx,
    "torch-export": open_torch_export,
}
VARYING = {"batch": "any", "height": "multiples of 32", "width": "multiples of 32"}


@pytest.mark.parametrize("to", OPEN)
def test_exports_match_network(to: str, exported: Exported, digits: Path, tmp_path: Path) -> None:
    folder, result = exported(to)
    source, opened = ours(PICO), OPEN[to](folder, 32)
    pixels = digit_pixels(source, digits, 64)
    with torch.inference_mode():
        expected = source.network(pixels)
        assert expected.std() > 1  # of a size at which the tolerance means something
        for batch in (1, 5, 64):
            logits = opened(pixels[:batch])
            torch.testing.assert_close(logits, expected[:batch], rtol=0, atol=1e-4)
            assert torch.equal(logits.argmax(1), expected[:batch].argmax(1))
        varying = {"batch": "any"} if to == "transformers" else VARYING
        if to != "transformers":
            large = torch.nn.functional.interpolate(pixels[:3], (96, 64))
            torch.testing.assert_close(opened(large), source.network(large), rtol=0, atol=1e-4)
    assert (result["model"], result["to"], result["varying"]) == (PICO, to, varying)
    assert result["images"] == result["same_top1"] == 256
    assert result["logit_difference"] < 1e-4
    assert str(folder) in result["open"]
    written = {path.name: path for path in folder.iterdir()}
    assert {each["file"]: each["sha256"] for each in result["files"]} == {
        name: files.sha256(path) for name, path in written.items()
    }
    probe = tmp_path / "probe"
    probe.touch()
    assert {path.stat().st_mode for path in written.values()} == {probe.stat().st_mode}
    assert not list(folder.parent.glob(".*"))


def test_safetensors_export_copies_registered_files(tmp_path: Path) -> None:
    result = export.export(PICO, "safetensors", tmp_path / "out")
    version = registry.resolve(PICO)
    assert {each["file"]: each["sha256"] for each in result["files"]} == {
        name: files.sha256(version.folder / name) for name in ("model.json", WEIGHTS, RAW)
    }


def test_timm_reads_labels_and_preprocessing_from_export(models: Models, tmp_path: Path) -> None:
    uri = models.add("timm-96", "pvt_pico", size=96, crop_pct=0.9, mean=[0.4] * 3, std=[0.3] * 3)
    export.export(uri, "timm", tmp_path / "out")
    network: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert network.pretrained_cfg["label_names"] == CLASSES
    source, images = ours(uri), compare_outputs.real_images(None)
    transform: Any = create_transform(**resolve_model_data_config(network))
    pixels = torch.stack([source.pixels(image) for image in images])
    assert torch.equal(torch.stack([transform(image) for image in images]), pixels)
    with torch.inference_mode():
        assert torch.equal(network(pixels), source.network(pixels))


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_graph_exports_describe_preprocessing(to: str, exported: Exported) -> None:
    folder, _ = exported(to)
    about = json.loads((folder / "preprocessing.json").read_bytes())
    assert about["classes"] == CLASSES
    assert about["preprocessing"] == {
        "resize_short_side_px": 32,
        "interpolation": "bicubic",
        "antialias": True,
        "center_crop_px": 32,
        "divide_by": 255,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    if to == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        metadata = session.get_modelmeta().custom_metadata_map
        assert {key: json.loads(value) for key, value in metadata.items()} == about
        assert [each.shape for each in session.get_inputs()] == [["batch", 3, "32*h", "32*w"]]
        assert [each.shape for each in session.get_outputs()] == [["batch", 10]]
    else:
        extra = {"preprocessing.json": ""}
        torch.export.load(folder / "model.pt2", extra_files=extra)
        assert json.loads(extra["preprocessing.json"]) == about


def test_graph_exports_contain_no_pickle_and_no_paths(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, onnx_graph = (exported(to)[0] for to in ("torch-export", "onnx"))
    with zipfile.ZipFile(graph / "model.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("models/model.json") for name in members)
    assert not [name for name, data in members.items() if data[:1] == b"\x80" or data[:4] == b"PK\x03\x04"]
    configured = [json.loads(data)["config"] for name, data in members.items() if name.endswith("_config.json")]
    assert not [key for each in configured for key, payload in each.items() if payload["use_pickle"]]
    graphs = [*members.values(), (onnx_graph / "model.onnx").read_bytes()]
    for path in (ROOT, Path(torch.__file__).parent, graph.parent):
        assert not any(str(path).encode() in data for data in graphs)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for unpickler in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(unpickler, refuse)
    assert open_torch_export(graph, 32)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


# Preprocessing


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return compare_outputs.real_images(None)


def view(source: ExportSource, image: Image.Image, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """What evaluation shows to the network in training, or that moved down and right."""
    config = source.card.image
    views = evaluation_views(config, config.size, np.array([[image.height, image.width]]))
    views.corner[0] += np.array(shift, np.int32)
    out = torch.empty(1, 3, config.size, config.size)
    Finisher(config, torch.device("cpu")).finish_window(torch.from_numpy(np.array(image)), views, out)
    return out[0]


def levels(source: ExportSource, one: Tensor, other: Tensor) -> float:
    return (255 * torch.tensor(source.card.image.std)[:, None, None] * (one - other).abs()).max().item()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_transformers_export_pixels_match_evaluation(
    interpolation: str, models: Models, photographs: list[Image.Image], tmp_path: Path
) -> None:
    uri = models.add(f"photos-{interpolation}", "pvt_pico", size=64, crop_pct=0.8, interpolation=interpolation)
    export.export(uri, "transformers", tmp_path)
    source, processor = ours(uri), AutoImageProcessor.from_pretrained(tmp_path)
    shifted = 0
    for width in range(200, 212):  # resized to 80 by 80 to 84
        image = photographs[0].resize((width, 200))
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        beyond = 80 * width // 200 - 64
        # Exactly half a pixel is rounded to even by evaluation, and down by Transformers.
        shift = -1 if beyond % 4 == 3 else 0
        shifted += shift
        if interpolation != "nearest":  # where Pillow and torch break ties differently
            assert levels(source, source.pixels(image), view(source, image)) <= 1.01
        assert levels(source, theirs, view(source, image, (0, shift))) < 0.01
    assert shifted


# What is refused


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_export_check_detects_changed_weight(tmp_path: Path) -> None:
    source, images = ours(PICO), compare_outputs.real_images(None)
    assert to_transformers.write(source, tmp_path) == {"batch": "any"}
    compare_outputs.compare_outputs(
        source, to_transformers.load(source, tmp_path), {"batch": "any"}, images, "transformers"
    )
    state = safetensors.torch.load_file(tmp_path / WEIGHTS)
    state["pvt.encoder.block.2.0.attention.self.value.weight"][0, 0] += 1
    safetensors.torch.save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExternalError, match=r"its export to transformers gives other logits.*nothing was written"):
        compare_outputs.compare_outputs(
            source, to_transformers.load(source, tmp_path), {"batch": "any"}, images, "transformers"
        )


def test_export_check_detects_nan_and_changed_pixels(tmp_path: Path) -> None:
    source, images = ours(PICO), compare_outputs.real_images(None)
    nan = compare_outputs.OpenedExport(lambda batch: source.network(batch) * torch.nan)
    with pytest.raises(ExternalError, match="other logits: they differ by up to inf"):
        compare_outputs.compare_outputs(source, nan, {"batch": "any"}, images, "x")
    darker = compare_outputs.OpenedExport(source.network, lambda image: source.pixels(image) - 0.06)  # 3.8 grey levels
    with pytest.raises(ExternalError, match="prepares images otherwise"):
        compare_outputs.compare_outputs(source, darker, {"batch": "any"}, images, "x")
    fixed = compare_outputs.OpenedExport(lambda batch: source.network(batch[..., :32, :32]))
    compare_outputs.compare_outputs(source, fixed, {"batch": "any"}, images, "x")
    with pytest.raises(ExternalError, match="other logits"):
        compare_outputs.compare_outputs(source, fixed, VARYING, images, "x")


def test_export_that_fails_check_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = to_timm.write

    def damaged(source: ExportSource, folder: Path) -> dict[str, str]:
        varying = write(source, folder)
        state = safetensors.torch.load_file(folder / WEIGHTS)
        state["head.bias"][3] += 0.01
        safetensors.torch.save_file(state, folder / WEIGHTS)
        return varying

    monkeypatch.setattr(to_timm, "write", damaged)
    with pytest.raises(ExternalError, match=r"models:/pico/1: its export to timm gives other logits: .* 0.01, 0.0001"):
        export.export(PICO, "timm", tmp_path / "out")
    assert left(tmp_path) == []


def test_other_architectures_export_except_to_transformers(models: Models, tmp_path: Path) -> None:
    uri = models.add("vit", "vit_tiny_patch16_224", size=32)
    with pytest.raises(InputError, match="models:/vit/1 is a vit_tiny_patch16_224: Transformers knows no such model"):
        export.export(uri, "transformers", tmp_path / "out")
    assert left(tmp_path) == []
    source, pixels = ours(uri), torch.randn(5, 3, 32, 32)
    assert export.export(uri, "timm", tmp_path / "timm")["varying"] == {"batch": "any"}
    with torch.inference_mode():
        logits = open_timm(tmp_path / "timm", 32)(pixels)
        torch.testing.assert_close(logits, source.network(pixels), rtol=0, atol=1e-4)


def test_network_without_fixed_image_size_is_exported_and_served(models: Models, tmp_path: Path) -> None:
    uri = models.add("resnet", "resnet10t", size=64, crop_pct=1.0)
    version = registry.resolve(uri)
    network = create("resnet10t", 64)
    network.load_state_dict(safetensors.torch.load_file(version.weights))
    pixels = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = network(pixels)
        assert expected.std() > 0.3
        for to in ("safetensors", "torch-export"):
            assert export.export(uri, to, tmp_path / to)["varying"] == {"batch": "any"}
            torch.testing.assert_close(OPEN[to](tmp_path / to, 64)(pixels), expected, rtol=0, atol=1e-4)
        export.export(uri, "timm", tmp_path / "timm")
        opened = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        torch.testing.assert_close(opened(pixels), expected, rtol=0, atol=1e-4)
    photo = compare_outputs.real_images(None)[0].resize((64, 64))
    answer = served_alone(version, photo)
    expected = network(ours(uri).pixels(photo)[None]).softmax(dim=1)[0]
    assert answer["scores"] == pytest.approx(expected.sort(descending=True).values[:5].tolist(), abs=1e-5)


def served_alone(version: registry.Version, image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    model = mlflow.pyfunc.load_model(str(version.folder.parent))
    return model.predict(pandas.DataFrame({"image": [buffer.getvalue()]})).iloc[0].to_dict()


def test_invalid_output_folder_or_target_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(InputError, match=rf"--out {full}: is there already and no empty folder"):
        export.export(PICO, "timm", full)
    with pytest.raises(InputError, match="mine: is there already"):
        export.export(PICO, "timm", full / "mine")
    with pytest.raises(InputError, match=r"out: cannot be written: File exists"):
        export.export(PICO, "timm", full / "mine" / "out")
    with pytest.raises(InputError, match=r"--out /proc/out: cannot be written"):  # not even for root
        export.export(PICO, "timm", Path("/proc/out"))
    with pytest.raises(
        InputError, match="--to tensorrt: models are exported to timm, transformers, safetensors, onnx, torch-export"
    ):
        export.export(PICO, "tensorrt", tmp_path / "out")
    with pytest.raises(InputError, match=r"nowhere/manifest.json: cannot read the manifest"):
        export.export(PICO, "timm", tmp_path / "out", str(tmp_path / "nowhere"))
    assert left(tmp_path) == ["full"]
    (tmp_path / "empty").mkdir()
    export.export(PICO, "safetensors", tmp_path / "empty")


def test_tampered_version_is_not_exported(models: Models, tmp_path: Path) -> None:
    uri = models.add("tampered", "pvt_pico", size=32)
    version = registry.find_version(models.client, uri)
    store = Path(models.client.get_model_version_download_uri("tampered", version.version).removeprefix("file://"))
    file = store / "artifacts" / WEIGHTS
    data = file.read_bytes()
    file.unlink()  # shares its bytes with the entry
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"{uri}: artifacts/{WEIGHTS} has SHA-256 .* do not use it"):
        export.export(uri, "timm", tmp_path / "out")
    assert left(tmp_path) == []


def test_missing_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "pipeline.track.export.to_onnx", raising=False)
    with pytest.raises(InputError, match=r"needs the package onnxscript, .*: pip install -e '\.\[export\]' in"):
        export.export(PICO, "onnx", tmp_path / "out")
    assert left(tmp_path) == []


def test_damaged_sample_of_data_is_reported(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits / "val", data)
    shards = ShardSet(data)
    record = shards.index(0)[0]
    tar = next(iter(sorted(data.glob("*.tar"))))
    with tar.open("r+b") as file:
        file.seek(int(record["offset"]) + 100)
        file.write(b"damage")
    with pytest.raises(InputError, match=rf"--data {data}: sample .* of {tar}: its bytes do not match"):
        export.export(PICO, "timm", tmp_path / "out", str(data))
    assert left(tmp_path) == ["data"]


def test_export_command_prints_result(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", PICO, "--to", "timm", "--out", str(tmp_path / "out"), "--tracking-uri", models.uri]
    monkeypatch.setattr(sys, "argv", ["registry.py", *arguments])
    with pytest.raises(SystemExit) as ending:
        cli.run(launch_registry.main)
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert ending.value.code == 0
    assert (result["model"], result["images"], result["same_top1"]) == (PICO, 6, 6)
    assert result["open"] in err
    assert (tmp_path / "out" / WEIGHTS).exists()


# The models of the paper, at their size


@pytest.mark.parametrize("model", ["pvt_tiny", pytest.param("pvt_large", marks=pytest.mark.slow)])
def test_exports_of_paper_models_match_network(model: str, models: Models, tmp_path: Path) -> None:
    """As weights: graphs take half a minute each, and `python -m tests.test_export` makes those of the largest."""
    uri = models.add(model.replace("_", "-"), model, size=224)
    for to in ("timm", "transformers"):
        agree_on_photographs(uri, to, tmp_path / to)


def agree_on_photographs(uri: str, to: str, out: Path) -> dict[str, Any]:
    result = export.export(uri, to, out)
    assert result["images"] == result["same_top1"] == 6
    assert result["logit_difference"] < 1e-4
    return result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        uri = models.add("pvt-large", "pvt_large", size=224)
        for to in export.MODULES:
            began = time.monotonic()
            result = agree_on_photographs(uri, to, Path(folder, to))
            num_bytes = sum(file["bytes"] for file in result["files"])
            print(
                f"{to:14}{time.monotonic() - began:6.1f} s  {num_bytes / 1e6:6.1f} MB  same class "
                f"{result['same_top1']}/{result['images']}  logits to {result['logit_difference']:.1e}  "
                f"varying {result['varying']}"
            )


if __name__ == "__main__":
    main()
