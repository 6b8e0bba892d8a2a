"""A registered model behind `mlflow models serve`: the real server on loopback, asked well and asked badly.

photographs ──pack──▶ shards ──EvalFeed──▶ network ──▶ scores as evaluation has them ─┐
          └──the same bytes──HTTP──▶ server ──▶ its answers ──────────────────────────┴─ equal?
"""

import base64
import io
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas
import psutil
import pytest
import safetensors.torch
import timm
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from PIL import Image
from sklearn.datasets import load_sample_images

import pvt  # noqa: F401 - registers its models with timm
from pipeline import files
from pipeline.config import ClassificationConfig, ImageConfig, ModelConfig
from pipeline.errors import InputError
from pipeline.feed.loader import EvalFeed
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from pipeline.track import tracking_server
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import model_files, registry
from pipeline.world import World
from tests.model_server import ModelServer, serving_by_command
from tests.ranks import ROOT

# MLflow's, about its use of pandas.
pytestmark = pytest.mark.filterwarnings("ignore:Operation with range is deprecated")

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
IMAGE = ImageConfig(size=32)
LIMITS = {"PVT_SERVE_MAX_ROWS": 16, "PVT_SERVE_MAX_BYTES": 1_000_000, "PVT_SERVE_MAX_PIXELS": 1_000_000}
SAME = 2e-6  # how far scores of one view may differ, computed in batches of another size
NEAR = 0.02  # and those of views that Pillow resized, or torch did


# Images


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Cuttings of photographs of many sizes and shapes, and each format that can be packed in all its variety."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    made = []
    for number in range(48):
        photo = photos[number % 2]
        width, height = rng.integers(33, 120, 2).tolist()
        left, top = rng.integers(0, photo.width - width), rng.integers(0, photo.height - height)
        cutting = photo.crop((int(left), int(top), int(left) + width, int(top) + height))
        made.append(encoded(cutting, "PNG") if number % 3 else encoded(cutting, "JPEG", quality=90))
    tall = photos[0].crop((100, 0, 300, 400))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation
    faded = tall.copy()
    faded.putalpha(Image.linear_gradient("L").resize(tall.size))
    deep = Image.fromarray(np.asarray(tall.convert("L")).astype(np.uint16) * 257)
    return [
        *made,
        encoded(tall, "JPEG", exif=turned),
        encoded(tall, "JPEG", progressive=True, subsampling=0),
        encoded(tall.convert("CMYK"), "JPEG"),
        encoded(tall.convert("L"), "JPEG"),
        encoded(tall.convert("1"), "PNG"),
        encoded(deep, "PNG"),
        encoded(faded, "PNG"),
        encoded(faded.convert("LA"), "PNG"),
        encoded(tall.quantize(64), "PNG", transparency=3),
    ]


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size, and holds a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


GREY = model_files.example(32)
TRUNCATED = encoded(Image.effect_noise((90, 90), 60), "JPEG")[:-900]
ZEROS = encoded(Image.new("RGB", (6000, 6000)), "PNG", compress_level=9)  # 0.1 MB that become 108


# The server


@dataclass
class Served:
    server: ModelServer
    images: list[bytes]
    scores: list[list[float]]
    """Of each image and class, as evaluation computes them."""

    def check(self, answer: dict[str, Any], number: int, within: float = NEAR) -> None:
        """That this is the answer for image `number`."""
        scores = self.scores[number]
        assert answer["label"] == CLASSES[scores.index(max(scores))]
        assert answer["score"] == pytest.approx(max(scores), abs=within)
        for label, score in zip(answer["labels"], answer["scores"], strict=True):
            assert score == pytest.approx(scores[CLASSES.index(label)], abs=within)

    def post(self, body: Any, kind: str = "application/json") -> tuple[int, str]:
        return self.server.post(body, kind)

    def predictions(self, body: Any, kind: str = "application/json") -> list[dict[str, Any]]:
        return self.server.predictions(body, kind)


@pytest.fixture(scope="module")
def served(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    shutil.copy(empty_database, folder)
    network = random_network()
    copy = registered(folder, network)
    images, scores = evaluated(folder, network)
    with serving_by_command(copy, folder, {name: str(limit) for name, limit in LIMITS.items()}) as server:
        yield Served(server, images, scores)


def random_network() -> torch.nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("pvt_pico", num_classes=len(CLASSES), img_size=IMAGE.size).eval()
    with torch.no_grad():
        network.head.weight *= 30  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue] - so answers differ
    return network


def registered(folder: Path, network: torch.nn.Module) -> Path:
    """The verified copy of a version."""
    entry = folder / "entry"
    entry.mkdir()
    safetensors.torch.save_file(network.state_dict(), entry / WEIGHTS)
    ModelCard(
        task=ClassificationConfig(),
        model=ModelConfig(name="pvt_pico"),
        image=IMAGE,
        eval_batch_size=8,
        classes=CLASSES,
        metrics={"top1": 0.5},
        sha256={WEIGHTS: files.sha256(entry / WEIGHTS)},
        lineage={"run": "a" * 32, "step": "1", "data": "d" * 64},
    ).write(entry)
    client = tracking_server.connect(f"sqlite:///{folder}/mlflow.db", create=True)
    experiment_id = tracking_server.find_experiment(client, "serving")
    return registry.resolve(
        registry.register(client, "tiny", entry, experiment_id=experiment_id, run_id=None)
    ).folder.parent


def evaluated(folder: Path, network: torch.nn.Module) -> tuple[list[bytes], list[list[float]]]:
    """Images, and their scores by way of shards, DALI and the evaluation's feed."""
    (folder / "images/any").mkdir(parents=True)
    for number, data in enumerate(pictures()):
        kind = "png" if data.startswith(b"\x89PNG") else "jpg"
        (folder / f"images/any/{number:03}.{kind}").write_bytes(data)
    pack(folder / "images", folder / "shards")
    shards = ShardSet(folder / "shards")
    found: list[bytes] = []
    scores: list[list[float]] = []
    for batch in EvalFeed(shards, World(0, 1), IMAGE, batch_size=16, num_threads=1):
        with torch.inference_mode():
            rows = network(batch.images).softmax(dim=1).tolist()
        for row, weight, shard, number in zip(rows, batch.weights, batch.samples.shard, batch.samples.row, strict=True):
            if weight:
                found.append(shards.read(int(shard), int(number)))
                scores.append(row)
    return found, scores


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def split(*rows: bytes, **more: Any) -> dict[str, Any]:
    return {"dataframe_split": {"columns": ["image"], "data": [[b64(row)] for row in rows]}, **more}


# Good requests


def test_health_endpoints_answer_on_loopback_only(served: Served) -> None:
    assert served.server.get("/ping")[0] == served.server.get("/health")[0] == 200
    assert served.server.get("/version") == (200, mlflow.__version__)
    assert served.server.start_up_s < 60
    listening = {
        at.laddr.ip for at in psutil.Process(served.server.pid).net_connections() if at.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_200_concurrent_requests_are_scored_correctly(served: Served) -> None:
    rng = np.random.default_rng(1)
    numbers = [rng.integers(0, len(served.images), size).tolist() for size in rng.integers(1, 9, 200)]
    model = mlflow.pyfunc.load_model(str(served.server.copy))
    alone = [model.predict(pandas.DataFrame({"image": [image]})).iloc[0] for image in served.images]
    assert len({answer["label"] for answer in alone}) >= 3  # else labels could be mixed up unseen

    def ask(rows: list[int]) -> list[dict[str, Any]]:
        return served.predictions(split(*(served.images[row] for row in rows), params={"top_k": 7}))

    with ThreadPoolExecutor(32) as pool:
        for rows, answers in zip(numbers, pool.map(ask, numbers), strict=True):
            assert len(answers) == len(rows)
            for row, answer in zip(rows, answers, strict=True):
                served.check(answer, row)
                assert answer["label"] == alone[row]["label"]
                assert answer["score"] == pytest.approx(alone[row]["score"], abs=SAME)
                assert sum(answer["scores"]) == pytest.approx(1, abs=1e-5)
                assert answer["scores"] == sorted(answer["scores"], reverse=True)


def test_every_request_format_is_accepted(served: Served) -> None:
    first, second = served.images[:2]
    parquet = io.BytesIO()
    pandas.DataFrame({"image": [first, second]}).to_parquet(parquet)
    rows = [{"image": b64(first)}, {"image": b64(second)}]
    for body, kind in (
        (split(first, second), "application/json"),
        ({"dataframe_records": rows}, "application/json"),
        ({"inputs": {"image": [b64(first), b64(second)]}}, "application/json"),
        ({"inputs": [b64(first), b64(second)]}, "application/json"),
        ({"instances": rows}, "application/json"),
        (parquet.getvalue(), "application/vnd.apache.parquet"),
    ):
        answers = served.predictions(body, kind)
        assert [len(answer["labels"]) for answer in answers] == [5, 5]
        served.check(answers[0], 0)
        served.check(answers[1], 1)


def test_top_k_sets_the_number_of_labels(served: Served) -> None:
    for top_k, told in ((1, 1), (3, 3), (7, 7), (1000, 7)):
        (answer,) = served.predictions(split(served.images[0], params={"top_k": top_k}))
        assert len(answer["labels"]) == len(set(answer["labels"])) == len(answer["scores"]) == told
        assert (answer["label"], answer["score"]) == (answer["labels"][0], answer["scores"][0])


def test_empty_request_gives_no_predictions(served: Served) -> None:
    assert served.predictions(split()) == []


def test_documented_clients_work(served: Served, tmp_path: Path) -> None:
    text = (ROOT / "docs/serving.md").read_text()
    text = text[: text.index("## Ask for maps")]  # whose client test_segmentation_registry.py runs
    assert text.count("http://127.0.0.1:5001") == 2
    curl, python = re.findall(
        r"^```(?:sh|python)\n(.+?)^```", text.replace("http://127.0.0.1:5001", served.server.url), re.M | re.S
    )
    (tmp_path / "photo.jpg").write_bytes(served.images[0])
    ran = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    label = CLASSES[served.scores[0].index(max(served.scores[0]))]
    assert [line.split()[0] for line in ran.stdout.splitlines()] == [label, label]
    if shutil.which("curl"):
        ran = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        (answer,) = json.loads(ran.stdout)["predictions"]
        served.check(answer, 0)


# Bad requests

BAD: dict[str, tuple[Any, str]] = {
    "not an image": (split(GREY, b"\xffhello, world", GREY), "row 1: not an image"),
    "empty": (split(b"", GREY), "row 0: empty"),
    "not base64": ({"inputs": {"image": ["hello, world"]}}, "row 0: neither an image nor base64 of one"),
    "truncated JPEG": (split(GREY, TRUNCATED), "row 1: .*truncated"),
    "truncated PNG": (split(GREY[:-20]), "row 0: a PNG that is not laid out"),
    "only a header": (split(GREY[:20]), "row 0: not a readable image"),
    "another format": (split(GREY, encoded(Image.new("RGB", (9, 9)), "WEBP")), "row 1: holds WEBP"),
    "animated": (split(encoded(Image.new("L", (9, 9)), "GIF", save_all=True)), "row 0: holds GIF"),
    "a program's input": (split(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n\xff"), "row 0: not an image"),
    "two bad rows": (split(b"\xff", GREY, b"\xff"), "row 0: not an image; row 2: not an image"),
    "many bad rows": (split(*[b"\xff"] * 9), r"row 4: not an image \(and 4 more\)"),
    "a number": ({"dataframe_split": {"columns": ["image"], "data": [[5]]}}, "column image"),
    "null": ({"dataframe_records": [{"image": None}]}, "column image"),
    "nested": ({"inputs": [[b64(GREY)]]}, "row 0: the bytes of an image were expected, not list"),
    "missing column": (
        {"dataframe_split": {"columns": ["picture"], "data": [[b64(GREY)]]}},
        r"missing inputs \['image'\]",
    ),
    "too many rows": (split(*[GREY] * 17), "17 rows; a request may have 16"),
    "too many bytes": (split(b"\xff" * 1_000_001), "1,000,001 bytes; .* 1,000,000"),
    "too many pixels": (split(GREY, png(1001, 1000)), "row 1: 1001 × 1000 pixels, more than 1,000,000"),
    "a bomb that is none": (split(png(50_000, 50_000)), "row 0: more than 134,217,728 pixels"),
    "a bomb": (split(ZEROS), "row 0: 6000 × 6000 pixels, more than 1,000,000"),
    "a line": (split(encoded(Image.new("L", (60_000, 1)), "PNG")), "row 0: 60000 × 1 pixels: too narrow"),
    "no labels wanted": (split(GREY, params={"top_k": 0}), "top_k is 0"),
    "null labels wanted": (split(GREY, params={"top_k": None}), "top_k is None"),
    "a word of labels wanted": (split(GREY, params={"top_k": "all"}), "top_k"),
    "not JSON": (b'{"inputs": oops', "valid JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "valid JSON"),
    "nothing": (b"", "valid JSON"),
    "a list": ([b64(GREY)], "must be a JSON dictionary"),
    "nothing known": ({"image": b64(GREY)}, "exactly one of the input fields"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_rejected_with_a_reason(served: Served, case: str) -> None:
    body, reason = BAD[case]
    status, answer = served.post(body)
    assert status == 400, answer
    message = json.loads(answer)["message"]
    assert re.search(reason, message), message
    assert not re.search(r"Traceback|site-packages|/pipeline/|stack_trace", answer)
    served.check(served.predictions(split(served.images[0]))[0], 0)


def test_other_content_types_are_rejected(served: Served) -> None:
    assert served.post(GREY, "image/png")[0] == 415
    assert served.post(b"image=x", "application/x-www-form-urlencoded")[0] == 415


def test_decompression_bombs_use_little_memory_and_time(served: Served) -> None:
    served.predictions(split(GREY))
    Path(f"/proc/{served.server.pid}/clear_refs").write_text("5")  # the peak is counted from here
    before, begin = peak_bytes(served.server.pid), time.monotonic()
    for bomb in [png(50_000, 50_000), ZEROS, png(2**31 - 1, 2**31 - 1)] * 5:
        assert served.post(split(bomb))[0] == 400
    assert time.monotonic() - begin < 5
    assert peak_bytes(served.server.pid) - before < 30 << 20


def peak_bytes(pid: int) -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) << 10


def test_served_copy_still_matches_its_digests(served: Served) -> None:
    served.predictions(split(GREY))
    tags = registry.find_version(registry.MlflowClient(), "models:/tiny/1").tags
    digests = {key.removeprefix("sha256."): value for key, value in tags.items() if key.startswith("sha256.")}
    assert digests
    assert model_files.mismatches(digests, served.server.copy) == []


# Without a server


def test_model_signature_has_inputs_outputs_and_top_k(served: Served) -> None:
    signature = Model.load(str(served.server.copy)).signature
    assert signature is not None
    assert [(each.name, str(each.type)) for each in signature.inputs] == [("image", "DataType.binary")]
    assert signature.outputs.input_names() == ["label", "score", "labels", "scores"]
    assert [(each.name, each.default) for each in signature.params] == [("top_k", 5)]


def test_pyfunc_predictions_match_evaluation(served: Served) -> None:
    model = mlflow.pyfunc.load_model("models:/tiny/1")
    images = pandas.DataFrame({"image": served.images})
    answers = model.predict(images, params={"top_k": 2})
    assert list(answers.columns) == ["label", "score", "labels", "scores"]
    assert len(answers) == len(images) > 32  # more than the network takes at once
    for number, answer in enumerate(answers.to_dict("records")):
        served.check(answer, number)
        assert len(answer["labels"]) == 2
    assert len(model.predict(images[:0])) == 0
    damaged = [*served.images[:40], TRUNCATED, math.nan]
    with pytest.raises(MlflowException, match="row 41: the bytes of an image were expected, not float"):
        model.predict(pandas.DataFrame({"image": damaged}))
    with pytest.raises(MlflowException, match=r"row 40: .*truncated"):
        model.predict(pandas.DataFrame({"image": damaged[:-1]}))


def test_internal_error_does_not_leak_details(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    model = mlflow.pyfunc.load_model(str(served.server.copy))
    model.unwrap_python_model()._model._network = None  # something that cannot be
    with pytest.raises(MlflowException) as raised:
        model.predict(pandas.DataFrame({"image": [GREY]}))
    assert raised.value.get_http_status_code() == 500
    answer = json.loads(raised.value.serialize_as_json())
    assert answer["message"] == "internal error, which the server's log describes"
    assert set(answer) <= {"error_code", "message", "sqlstate", "error_class"}


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_invalid_serving_limit_is_rejected(served: Served, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PVT_SERVE_MAX_PIXELS", value)
    with pytest.raises(InputError, match=f"PVT_SERVE_MAX_PIXELS={value}: a whole number"):
        mlflow.pyfunc.load_model(str(served.server.copy))
