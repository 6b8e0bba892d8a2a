"""What stats says of data sets: means as numpy computes them, planted duplicates and suspicious images, by name."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.commands import shards as command
from pipeline.config import ImageConfig
from pipeline.errors import InputError
from pipeline.shards import dataset_stats, unlabelled
from pipeline.shards.cache import DEFAULT_CACHE
from pipeline.shards.dataset_stats import SHOWN, format_stats, make_stats
from pipeline.shards.index import ShardSet
from pipeline.shards.measure_pixels import IMAGE, find_repeats, measure
from pipeline.shards.pack import pack


def noise(seed: int, height: int = 40, width: int = 50) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256 - 20 * (seed % 5), (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR/train and DIR/val, packed, of the images in DIR/images, with what is planted among them."""
    folder = tmp_path_factory.mktemp("stats")
    for number in range(40):
        split = folder / "images" / ("val" if number % 4 == 0 else "train") / "ab"[number % 2]
        split.mkdir(parents=True, exist_ok=True)
        noise(number, 30 + number % 9, 40).save(split / f"{number:02}.{'png' if number % 3 else 'jpg'}")
    train, val = (folder / "images" / split for split in ("train", "val"))
    (val / "b").mkdir(exist_ok=True)
    # A JPEG, and PNGs of its pixels: twice in train, and in val under another label.
    noise(100).save(train / "a/copied.jpg", quality=80)
    with Image.open(train / "a/copied.jpg") as decoded:
        decoded.save(train / "b/copy.png")
        decoded.save(val / "b/leak.png")
    noise(101).save(val / "b/original.png")
    shutil.copy(val / "b/original.png", val / "a/same.png")
    # Grey, once with one channel and once with three, and what has these bytes in another shape.
    grey = noise(102).convert("L")
    grey.save(train / "a/grey.png")
    grey.convert("RGB").save(train / "b/grey.png")
    Image.frombytes("L", (40, 50), grey.tobytes()).save(train / "b/turned.png")
    # What is suspicious.
    Image.new("RGB", (50, 40), (7, 80, 200)).save(train / "a/constant.png")
    noise(103, 5, 6).save(train / "b/tiny.png")
    noise(104, 300, 30).save(train / "a/tall.png")
    pack(train, folder / "train", samples_per_shard=16)
    pack(val, folder / "val", classes=["a", "b"])
    return folder


@pytest.fixture(scope="module")
def result(data: Path) -> dict[str, Any]:
    return stats(data, "train", "val")


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def stats(data: Path, *names: str, workers: int = 1) -> dict[str, Any]:
    return make_stats([str(data / name) for name in names], data / "picture.png", DEFAULT_CACHE, workers)


def keys_of(pairs: list[list[str]]) -> list[set[str]]:
    return [{name.partition("#")[2] for name in pair} for pair in pairs]


def test_means_and_deviations_match_numpy(data: Path, result: dict[str, Any]) -> None:
    for split, found in zip(("train", "val"), result["sets"], strict=True):
        images = list(map(opened, (data / "images" / split).rglob("*.*")))
        pixels = np.concatenate([np.asarray(image).reshape(-1, 3) for image in images]) / 255
        np.testing.assert_allclose(found["mean"], pixels.mean(axis=0), atol=5.1e-5)
        np.testing.assert_allclose(found["std"], pixels.std(axis=0), atol=5.1e-5)
        image = ImageConfig(**yaml.safe_load(found["config"])["image"])
        assert (list(image.mean), list(image.std)) == (found["mean"], found["std"])
        is_grey = [all(channel.tobytes() == image.tobytes()[::3] for channel in image.split()) for image in images]
        assert found["greyscale_share"] == pytest.approx(sum(is_grey) / len(images))


def test_counts_and_sizes_are_those_of_the_files(data: Path, result: dict[str, Any]) -> None:
    train = result["sets"][0]
    paths = list((data / "images/train").rglob("*.*"))
    assert train["samples"] == len(paths)
    assert train["bytes"] == sum(path.stat().st_size for path in paths)
    counts = [len(list((data / "images/train" / name).iterdir())) for name in "ab"]
    assert (train["samples_per_class"]["min"], train["samples_per_class"]["max"]) == (min(counts), max(counts))
    assert (train["short_side_px"]["p0"], train["long_side_px"]["p100"]) == (5, 300)


def test_planted_duplicates_are_found(result: dict[str, Any]) -> None:
    within, across = result["duplicates"]["within"], result["duplicates"]["across"]
    assert within["images"] == len(within["pairs"]) == 3
    expected = [{"a/copied", "b/copy"}, {"a/grey", "b/grey"}, {"a/same", "b/original"}]
    assert sorted(map(sorted, keys_of(within["pairs"]))) == sorted(map(sorted, expected))
    assert across["images"] == 1
    (pair,) = across["pairs"]
    assert "/train/shard-" in pair[0]
    assert "/val/shard-" in pair[1]
    assert keys_of([pair])[0] - {"a/copied", "b/copy"} == {"b/leak"}


def test_suspicious_images_are_named_with_their_reason(result: dict[str, Any]) -> None:
    found = {suspect["key"]: suspect["reason"] for suspect in result["suspicious"]}
    assert found == {"a/constant": "constant", "a/tall": "extreme shape", "b/tiny": "tiny"}
    assert [each["suspicious"] for each in result["sets"]] == [3, 0]
    text = format_stats(result)
    assert "extreme shape, 30 × 300 px: " in text
    assert "duplicates across data sets: 1\n" in text
    assert result["sets"][0]["config"] in text


def test_measurements_do_not_depend_on_worker_count(data: Path) -> None:
    roots = [str(data / "train"), str(data / "val")]
    one, two = (measure(roots, DEFAULT_CACHE, workers) for workers in (1, 2))
    assert one.images.tobytes() == two.images.tobytes()
    assert (one.histograms == two.histograms).all()


def test_damaged_images_come_first_and_equal_none(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "train")
    shards = ShardSet(tmp_path / "train")
    damaged = {shards.key(1, row) for row in (2, 3)}
    with (tmp_path / "train/shard-000001.tar").open("r+b") as file:
        for row in (2, 3):
            file.seek(int(shards.index(1)[row]["offset"]) + 30)
            file.write(b"damage")
    found = stats(tmp_path, "train")
    assert {suspect["key"] for suspect in found["suspicious"][:2]} == damaged
    assert {suspect["reason"] for suspect in found["suspicious"][:2]} == {"damaged"}
    assert not any(damaged & pair for pair in keys_of(found["duplicates"]["within"]["pairs"]))
    assert found["sets"][0]["suspicious"] >= 3


def test_at_most_ten_suspects_and_pairs_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_stats, "_draw", lambda *_: None)
    (tmp_path / "images").mkdir()
    for number in range(25):
        Image.new("RGB", (8, 8), (number // 2, 0, 0)).save(tmp_path / f"images/{number}.png")
    pack(unlabelled.find(tmp_path / "images"), tmp_path / "packed")
    found = stats(tmp_path, "packed")
    assert found["sets"][0]["suspicious"] == 25
    assert len(found["suspicious"]) == len(found["duplicates"]["within"]["pairs"]) == SHOWN
    assert found["duplicates"]["within"]["images"] == 12
    assert found["sets"][0]["annotations"] == "unlabelled"


def test_repeats_match_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    digests = [hashlib.blake2b(bytes([number]), digest_size=16).digest() for number in rng.integers(0, 60, 300)]
    digests[5] = digests[7] = b""
    seen: dict[bytes, int] = {}
    expected = []
    for position, digest in enumerate(digests):
        first = seen.setdefault(digest, position)
        if digest and first < position:
            expected.append((first, position))
    assert find_repeats(np.array(digests, IMAGE["digest"])).tolist() == [list(pair) for pair in expected]


def test_command_prints_a_result(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch/shards.py", "stats", str(data / "val"), "--workers", "1"])
    result = command.main()
    assert json.loads(json.dumps(result, allow_nan=False))["picture"] == "val-stats.png"
    assert (tmp_path / "val-stats.png").exists()
    assert "duplicates within data sets: 1" in capsys.readouterr().err


def no_shard(data: Path) -> None:
    (data / "shard-000000.tar").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_shard, "shard-000000.tar: is missing, but manifest.json lists"),
        (shutil.rmtree, "val: name a packed data set or a folder of images"),
    ],
)
def test_data_that_cannot_be_read_are_refused(
    data: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(data / "val", tmp_path / "val")
    spoil(tmp_path / "val")
    with pytest.raises(InputError, match=message):
        stats(tmp_path, "val")


def test_a_picture_that_cannot_be_written_is_refused_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "none/picture.png"
    monkeypatch.setattr(sys, "argv", ["launch/shards.py", "stats", str(data / "none"), "--out", str(out)])
    with pytest.raises(InputError, match=r"none/picture.png: cannot be written: name a file"):
        command.main()
