"""launch/predict.py: its scores are evaluation's and timm's; it takes what lies about, and goes on when killed."""

import csv
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.transforms_factory import create_transform

import pipeline
from pipeline.answers import AnswerOptions, decode_mask
from pipeline.coco_results import as_results
from pipeline.commands import evaluate, predict
from pipeline.config import ImageConfig, MaskRcnnConfig, ModelConfig, SemanticFpnConfig
from pipeline.errors import InputError
from pipeline.predict.predict import Outputs, Predictor
from pipeline.shards import unlabelled
from pipeline.shards.cache import DEFAULT_CACHE
from pipeline.shards.loose_images import open_images
from pipeline.shards.pack import pack
from pipeline.tasks.build import build_task
from pipeline.tasks.load_model import Preprocess
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.world import World
from tests.finetuning import register_classifier
from tests.ranks import PATIENCE_S, ROOT, start

NUM_IMAGES = 40
MODEL = "models:/pico/1"
CLASSES = [str(digit) for digit in range(10)]
SIDES: dict[str, Any] = {"short_side": 64, "long_side": 96, "pyramid_channels": 32}


def cuttings() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    made = []
    for number in range(NUM_IMAGES):
        width, height = rng.integers(40, 120, 2).tolist()
        left, top = rng.integers(0, 300, 2).tolist()
        made.append(photos[number % 2].crop((left, top, left + width, top + height)))
    return made


@pytest.fixture(scope="module")
def folder(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models:/pico/1 in mlflow.db, and photographs in images/CLASS/, the same packed in shards/."""
    folder = tmp_path_factory.mktemp("predict")
    shutil.copy(empty_database, folder)
    register_classifier(folder)
    for number, image in enumerate(cuttings()):
        path = folder / "images" / CLASSES[number % 10] / f"{number:02}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    pack(folder / "images", folder / "shards", samples_per_shard=15)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs the command in this process; returns its rows, which are JSON lines unless a file is named."""

    def run(*paths: object, options: tuple[object, ...] = (), out: str = "out.jsonl") -> list[dict[str, Any]]:
        arguments = opened(folder, *paths, "--out", tmp_path / out, "--top-k", 10, *options)
        result = predict._open(arguments, torch.device("cpu")).run(World())
        assert result
        assert result["table"] == str(tmp_path / out)
        assert not list(tmp_path.glob("*.partial"))
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()] if out == "out.jsonl" else []

    return run


def opened(folder: Path, *arguments: object) -> Any:
    """Parses and checks a command line."""
    with pytest.MonkeyPatch.context() as patch:
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        patch.setattr(sys, "argv", ["predict", "--model", MODEL, "--tracking-uri", uri, *map(str, arguments)])
        parsed = predict._parse()
    predict._check_usage(parsed)
    return parsed


def opened_image(path: Path | str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def scores_of(row: dict[str, Any]) -> list[float]:
    by_label = dict(zip(row["labels"], row["scores"], strict=True))
    return [by_label[name] for name in CLASSES]


# Scores


def test_scores_equal_evaluation_bit_for_bit(folder: Path, run: Callable[..., Any]) -> None:
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    model = evaluate.open_all(MODEL, str(folder / "shards"), uri, World(), DEFAULT_CACHE)
    logits: list[torch.Tensor] = []
    real = model.task.outputs
    model.task.outputs = lambda network, batch: logits.append(real(network, batch)) or logits[-1]  # type: ignore
    scores = evaluate.score(model, World())
    rows = run(folder / "shards")
    assert scores
    assert len(rows) == NUM_IMAGES
    expected = torch.cat(logits).softmax(dim=1)[:NUM_IMAGES]
    assert torch.equal(torch.tensor([scores_of(row) for row in rows]), expected)
    labels = [int(Path(row["path"].partition("#")[2]).parent.name) for row in rows]
    assert (
        sum(int(row["label"]) == label for row, label in zip(rows, labels, strict=True)) / NUM_IMAGES == scores["top1"]
    )
    # The same files unpacked, in another order and so in other batches.
    packed = {row["path"].partition("#")[2]: scores_of(row) for row in rows}
    for row in run(folder / "images"):
        key = str(Path(row["path"]).relative_to(folder / "images").with_suffix(""))
        assert scores_of(row) == pytest.approx(packed[key], abs=1e-6)


def test_packed_images_without_labels_are_predicted_alike(
    folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    pack(unlabelled.find(folder / "images"), tmp_path / "packed")
    found = []
    for data in (folder / "shards", tmp_path / "packed"):
        rows = run(data, options=("--features", tmp_path / "features.npy"))
        answers = [(row["path"].partition("#")[2], scores_of(row)) for row in rows]
        found.append((answers, np.load(tmp_path / "features.npy").tobytes()))
    assert found[0] == found[1]
    told = "holds images without labels, but task classification needs labelled images"
    with pytest.raises(InputError, match=told):
        evaluate.open_all(MODEL, str(tmp_path / "packed"), f"sqlite:///{folder / 'mlflow.db'}", World(), DEFAULT_CACHE)


def test_scores_match_timm_and_torch(folder: Path, run: Callable[..., Any]) -> None:
    rows = run(folder / "images")
    network = timm.create_model("pvt_pico", num_classes=10, img_size=32).eval()
    timm.models.load_checkpoint(network, str(folder / "entry" / WEIGHTS))
    transform: Any = create_transform(32, interpolation="bicubic", crop_pct=ImageConfig().crop_pct)
    shown = torch.stack([transform(opened_image(row["path"])) for row in rows])
    with torch.inference_mode():
        expected = network(shown).softmax(dim=1)
    found = torch.tensor([scores_of(row) for row in rows])
    torch.testing.assert_close(found, expected, atol=0.005, rtol=0)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9


def test_load_model_reproduces_predictions(folder: Path, run: Callable[..., Any]) -> None:
    network, preprocess = pipeline.load_model("models:/pico@candidate", f"sqlite:///{folder / 'mlflow.db'}")
    path = folder / "images" / "3" / "03.png"
    (row,) = run(path)
    with torch.inference_mode():
        (probabilities,) = network(preprocess(path)[None]).softmax(dim=1)
    assert probabilities.tolist() == pytest.approx(scores_of(row), abs=1e-6)
    assert torch.equal(preprocess(path.read_bytes()), preprocess(opened_image(path)))
    assert preprocess.card.classes == CLASSES


def test_importing_the_package_does_not_import_torch() -> None:
    command = "import sys, pipeline; pipeline.load_model; assert not {'torch', 'mlflow', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


def dense(task: Any, folder: Path) -> tuple[Any, ModelCard, list[Path]]:
    torch.manual_seed(0)
    image = ImageConfig(size=64)
    built = build_task(task, ModelConfig(name="pvt_pico"), image, CLASSES)
    built.model.eval()
    card = ModelCard(
        task=task, model=ModelConfig(name="pvt_pico"), image=image, eval_batch_size=1, classes=CLASSES, metrics={},
        sha256={}, lineage={},
    )  # fmt: skip
    return built, card, sorted((folder / "images").glob("[0369]/*.png"))[:3]


def test_boxes_and_masks_match_the_network(folder: Path, tmp_path: Path) -> None:
    task, card, paths = dense(MaskRcnnConfig(**SIDES, min_score=0.0, max_detections=5), folder)
    images = open_images([str(path) for path in paths], DEFAULT_CACHE)
    outputs = Outputs(tmp_path / "out.parquet", None, tmp_path / "sheet.png")
    Predictor("models:/boxes/1", card, task, images, outputs, AnswerOptions(5, 0.0)).run(World())
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths, strict=True):
        shown = Preprocess(card)(path)
        picture = opened_image(path)
        factor = min(64 / min(picture.size), 96 / max(picture.size))
        extent = round(picture.height * factor), round(picture.width * factor)
        with torch.inference_mode():
            (found,) = task.model(shown[None], [extent])
        expected = as_results(found, (picture.height, picture.width), extent)
        assert len(expected) == 5
        assert [CLASSES[each["label"]] for each in expected] == row["labels"]
        assert [each["score"] for each in expected] == pytest.approx(row["scores"], abs=1e-5)
        for each, box, segmentation in zip(expected, row["boxes"], row["segmentations"], strict=True):
            assert each["bbox"] == pytest.approx(box, abs=1e-2)
            assert segmentation["size"] == [picture.height, picture.width]
    assert opened_image(tmp_path / "sheet.png").width > 600


def test_maps_match_the_network(folder: Path, tmp_path: Path) -> None:
    task, card, paths = dense(SemanticFpnConfig(channels=32, short_side=64, long_side=96), folder)
    images = open_images([str(path) for path in paths], DEFAULT_CACHE)
    outputs = Outputs(tmp_path / "out.jsonl", None, tmp_path / "sheet.png")
    Predictor("models:/maps/1", card, task, images, outputs, AnswerOptions(5, 0.0)).run(World())
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, path in zip(rows, paths, strict=True):
        picture = opened_image(path)
        factor = min(64 / min(picture.size), 96 / max(picture.size))
        with torch.inference_mode():
            logits = task.model(Preprocess(card)(path)[None])
        whole = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")
        whole = whole[..., : round(picture.height * factor), : round(picture.width * factor)]
        size = picture.height, picture.width
        expected = torch.nn.functional.interpolate(whole, size, mode="bilinear")[0].argmax(0)
        assert (decode_mask(row["mask"]) == expected.numpy()).mean() > 0.999
        assert sum(row["shares"]) == pytest.approx(1)


def test_features_match_the_last_layer(folder: Path, tmp_path: Path) -> None:
    files = {"pooled": tmp_path / "f.npy", "map": tmp_path / "f.parquet"}
    for kind, file in files.items():
        arguments = opened(folder, folder / "images", "--features", file, "--feature-kind", kind)
        predict._open(arguments, torch.device("cpu")).run(World())
    network, preprocess = pipeline.load_model(MODEL, f"sqlite:///{folder / 'mlflow.db'}")
    table = pq.read_table(files["map"])
    shape = json.loads((table.schema.metadata or {})[b"shape"])
    pooled = np.load(files["pooled"])
    assert len(pooled) == len(table) == NUM_IMAGES
    paths = [Path(path) for path in table["path"].to_pylist()]
    # Of PNGs, which all decode alike.
    for number in [number for number, path in enumerate(paths) if path.suffix == ".png"][:3]:
        path = paths[number]
        with torch.inference_mode():
            tokens = network.forward_features(preprocess(path)[None])  # type: ignore
        assert pooled[number] == pytest.approx(tokens[0, 0].numpy(), abs=1e-5)
        stored = np.array(table["features"][number].as_py()).reshape(shape)
        np.testing.assert_allclose(stored.reshape(shape[0], -1).T, tokens[0, 1:].numpy(), atol=1e-5)


# What lies about


def test_folders_patterns_files_and_tars_can_be_mixed(folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    images = folder / "images"
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(images / "1", "one")
        tar.add(images / "2" / "02.jpg", "notes.txt")
    kinds = tmp_path / "kinds"
    kinds.mkdir()
    picture = opened_image(images / "0" / "00.png")
    for name in ("a.webp", "b.bmp", "c.tiff"):
        picture.save(kinds / name, lossless=True)
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(kinds / "deep.png")
    rows = run(images / "0", f"{images}/3/*.jpg", kinds, tmp_path / "some.tar", images / "0" / "00.png")
    names = [row["path"] for row in rows]
    assert names == [
        *(str(path) for path in sorted((images / "0").iterdir())),
        *(str(path) for path in sorted((images / "3").glob("*.jpg"))),
        *(str(path) for path in sorted(kinds.iterdir())),
        *(f"{tmp_path}/some.tar#one/{path.name}" for path in sorted((images / "1").iterdir())),
    ]
    by_name = dict(zip(names, rows, strict=True))
    for name in ("a.webp", "b.bmp", "c.tiff"):
        assert by_name[str(kinds / name)]["scores"] == pytest.approx(rows[0]["scores"], abs=1e-6)


def test_unreadable_files_are_listed(folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    whole = (folder / "images" / "1" / "01.jpg").read_bytes()
    (mixed / "a.jpg").write_bytes(whole)
    (mixed / "cut.jpg").write_bytes(whole[:-60])
    (mixed / "empty.jpg").touch()
    (mixed / "text.png").write_text("no picture")
    (mixed / "gone.jpg").symlink_to("nowhere")
    (mixed / "notes.txt").write_text("no picture either")
    rows = run(mixed, options=("--features", tmp_path / "f.npy", "--sheet", tmp_path / "s.png"))
    errors = {Path(row["path"]).name: row.get("error") for row in rows}
    assert sorted(errors) == ["a.jpg", "cut.jpg", "empty.jpg", "gone.jpg", "text.png"]
    assert errors["a.jpg"] is None
    assert errors["cut.jpg"] == "damaged: cut short"
    assert errors["empty.jpg"] == "empty"
    assert errors["gone.jpg"] == "No such file or directory"
    assert errors["text.png"] == "not an image"
    features = np.load(tmp_path / "f.npy")
    assert [bool(np.isnan(row).all()) for row in features] == [row.get("error") is not None for row in rows]


def test_csv_jsonl_and_parquet_hold_the_same_rows(folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    rows = run(folder / "images")
    run(folder / "images", out="out.csv")
    run(folder / "images", out="out.parquet")
    with io.StringIO((tmp_path / "out.csv").read_text()) as file:
        cells = list(csv.DictReader(file))
    assert [(row["path"], row["label"], row["scores"]) for row in rows] == [
        (cell["path"], cell["label"], json.loads(cell["scores"])) for cell in cells
    ]
    stored = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [{**row, "error": None} for row in rows] == stored


# Killed and started again


def test_killed_predict_continues(
    folder: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(folder / "images")
    out = tmp_path / "again.jsonl"
    computed: list[int] = []
    real = Predictor._describe

    def counted(self: Predictor, number: int, batch: Any) -> Any:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(number)
        return real(self, number, batch)

    def predictor() -> Predictor:
        arguments = opened(folder, folder / "images", "--out", out, "--top-k", 10)
        return predict._open(arguments, torch.device("cpu"))

    monkeypatch.setattr(Predictor, "_describe", counted)
    with pytest.raises(KeyboardInterrupt):
        predictor().run(World())
    assert computed == [0, 1, 2]
    assert not out.exists()
    # The line that was being written when the process was killed.
    with (tmp_path / "again.jsonl.partial" / "rows-0.jsonl").open("a") as file:
        file.write('{"position": 24, "pa')
    computed.clear()
    computed.append(-1)
    predictor().run(World())
    assert computed == [-1, 3, 4]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    # Work on other images is not taken for work on these.
    with pytest.raises(KeyboardInterrupt):
        predictor().run(World())
    computed.clear()
    arguments = opened(folder, folder / "images" / "0", "--out", out)
    predict._open(arguments, torch.device("cpu")).run(World())
    assert computed == [0]


def test_two_ranks_write_what_one_writes(folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    expected = run(folder / "shards")
    out = tmp_path / "ranks.jsonl"
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    arguments = ["--model", MODEL, "--tracking-uri", uri, folder / "shards", "--out", out, "--top-k", 10]
    logs = [tmp_path / "0", tmp_path / "1"]
    ranks = start(2, "launch/predict.py", arguments, logs)
    for rank, log in zip(ranks, logs, strict=True):
        assert rank.wait(PATIENCE_S) == 0, log.with_suffix(".err").read_text()
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert json.loads(logs[0].with_suffix(".out").read_text())["images"] == NUM_IMAGES
    assert logs[1].with_suffix(".out").read_text() == ""


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images"], "nothing to write: give --out"),
        (["images", "--out", "a.xls"], r"--out a.xls: its name must end in \.csv or \.jsonl or \.parquet"),
        (["images", "--out", "nowhere/a.csv"], "there is no folder nowhere: create it"),
        (["images", "--out", "/proc/a.csv"], r"/proc/a.csv.*: cannot be written: .*name another file"),
        (["images", "--out", "a.csv", "--top-k", "0"], "--top-k 0: a number of at least 1"),
        (["images", "--out", "a.csv", "--min-score", "2"], "--min-score 2: 0 to 1"),
        (["images", "--out", "a.parquet", "--features", "a.parquet"], "name one file: give each its own"),
        (
            ["images", "--out", "a.csv", "--min-score", "0.5"],
            "--min-score is for a detector, and models:/pico/1 is of task classification",
        ),
        (["missing", "--out", "a.csv"], "missing: no such file or folder: name a folder"),
        (["*.gif", "--out", "a.csv"], r"\*\.gif: no such file or folder"),
        (["empty", "--out", "a.csv"], "empty: has no image among its 1 files"),
        (["empty.tar", "--out", "a.csv"], r"empty.tar: has no images: its members do not end in \.jpg"),
        (["bad.jpg", "--out", "a.csv"], "none of 1 files can be read as an image"),
    ],
)
def test_bad_input_is_rejected_in_one_line(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(folder / "images")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    (tmp_path / "bad.jpg").touch()
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.add(tmp_path / "empty", "empty")
    with pytest.raises(InputError, match=message) as caught:
        predict._open(opened(folder, *arguments), torch.device("cpu")).run(World())
    assert "\n" not in str(caught.value)
