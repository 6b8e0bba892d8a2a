"""Packing: the same bytes however it is done, from every kind of source; bad input refused without leaving a trace."""

import csv
import fcntl
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.commands import shards as shards_command
from pipeline.errors import InputError
from pipeline.shards import coco, images, parquet, spill
from pipeline.shards.bad_samples import read_skipped
from pipeline.shards.index import ShardSet, read_manifest
from pipeline.shards.pack import pack
from pipeline.shards.verify import verify
from tests.datasets import contents
from tests.ranks import PATIENCE_S, ROOT


def encoded(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of three images each, of various sizes and formats."""
    images = tmp_path / "images"
    rng = np.random.default_rng(0)
    for number in range(6):
        path = images / ("cat", "dog")[number % 2] / f"{number}.{('jpg', 'png')[number // 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + number, 30, 3), np.uint8)).save(path)
    return images


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    return load_sample_images().images[0]


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Bytes


def test_pack_is_deterministic_for_a_seed(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "a", samples_per_shard=4)
    pack(tree, tmp_path / "b", samples_per_shard=4)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    pack(tree, tmp_path / "c", samples_per_shard=4, seed=1)
    assert read_manifest(tmp_path / "c").digest != read_manifest(tmp_path / "a").digest


def test_pack_output_does_not_depend_on_worker_count(digit_images: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copytree(digit_images / "val", tmp_path / "images", dirs_exist_ok=True)
    (tmp_path / "images" / "3" / "bad.jpg").write_text("hello")
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        pack(tmp_path / "images", out, samples_per_shard=20, max_side=24, skip_bad=True, workers=workers)
        assert listing(out) == listing(tmp_path / "1")
    assert len(list((tmp_path / "1").glob("*.tar"))) == 19  # 361 images
    assert not list(tmp_path.glob(".*"))


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_packed_shards(tree: Path, tmp_path: Path) -> None:
    manifest = pack(tree, tmp_path / "out", samples_per_shard=4)
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    seen = {}
    read = webdataset.WebDataset(tars, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    for sample in read:
        extension = "jpg" if "jpg" in sample else "png"
        seen[f"{sample['__key__']}.{extension}"] = (sample[extension], manifest.classes[int(sample["cls"])])
    expected = {
        str(path.relative_to(tree)): (path.read_bytes(), path.parent.name) for path in tree.rglob("*") if path.is_file()
    }
    assert seen == expected
    gc.collect()


def test_tar_command_lists_packed_shards(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out")
    listed = subprocess.run(
        ["tar", "-tvf", tmp_path / "out" / "shard-000000.tar"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listed) == 12
    assert all(line.startswith("-rw-r--r-- 0/0") and "1970-01-01" in line for line in listed)


def test_index_records_match_the_packed_images(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out", samples_per_shard=4)
    shards = ShardSet(tmp_path / "out")
    assert len(shards) == 6
    for shard, samples in enumerate(shards.shard_samples):
        assert len(shards.index(shard)) == samples
        for row, record in enumerate(shards.index(shard)):
            data = shards.read(shard, row)
            key = shards.key(shard, row)
            (original,) = [path for path in tree.rglob("*.*") if path.with_suffix("") == tree / key]
            assert data == original.read_bytes()
            assert zlib.crc32(data) == record["crc32"]
            assert Image.open(BytesIO(data)).size == (record["width"], record["height"])
            assert shards.classes[record["label"]] == original.parent.name


def test_packed_samples_are_shuffled_across_classes(digits: Path) -> None:
    shards = ShardSet(digits / "train")
    labels = shards.index(0)["label"]
    changes = np.count_nonzero(np.diff(labels)) / (len(labels) - 1)
    assert changes > 0.8  # 0.9 in a uniform order of ten classes, 0.05 in the order of folders
    assert len(np.unique(labels)) == 10


# Sources


def test_pack_uses_the_given_classes(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "dog", tmp_path / "val" / "dog")
    manifest = pack(tmp_path / "val", tmp_path / "out", classes=["bird", "cat", "dog"])
    assert manifest.classes == ["bird", "cat", "dog"]
    assert set(ShardSet(tmp_path / "out").index(0)["label"]) == {2}
    with pytest.raises(InputError, match=r"class folders \['dog'\] are not among the 1 classes of --classes-from"):
        pack(tmp_path / "val", tmp_path / "other", classes=["cat"])


def write_csv(path: Path, rows: list[tuple[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        table = csv.writer(file)
        table.writerow(["label", "remark", "path"])
        table.writerows([(label, "", name) for name, label in rows])
    return path


def write_jsonl(path: Path, rows: list[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"path": name, "label": label}) + "\n" for name, label in rows))
    return path


def rows_of(tree: Path, base: Path | None = None) -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(base) if base else path), path.parent.name) for path in sorted(tree.rglob("*.*"))[::-1]
    ]


@pytest.mark.parametrize(("write", "suffix"), [(write_csv, "csv"), (write_jsonl, "jsonl")])
def test_list_and_folder_sources_give_identical_shards(
    tree: Path, tmp_path: Path, write: Callable, suffix: str
) -> None:
    pack(tree, tmp_path / "tree")
    relative = write(tmp_path / f"relative.{suffix}", rows_of(tree, tmp_path))
    pack(relative, tmp_path / "relative")
    absolute = write(tmp_path / f"absolute.{suffix}", rows_of(tree))
    pack(absolute, tmp_path / "absolute")
    assert listing(tmp_path / "relative") == listing(tmp_path / "tree")
    assert listing(tmp_path / "absolute") == listing(tmp_path / "tree")


def test_numeric_labels_in_a_list_are_sorted_numerically(tree: Path, tmp_path: Path) -> None:
    labels = [10, 9, 2, 10, 9, 2]
    rows = [(name, label) for (name, _), label in zip(rows_of(tree), labels, strict=True)]
    for path in (write_csv(tmp_path / "list.csv", rows), write_jsonl(tmp_path / "list.jsonl", rows)):
        assert pack(path, tmp_path / path.suffix[1:]).classes == ["2", "9", "10"]
    found = {key: label for key, (label, _) in contents(tmp_path / "csv").items()}
    assert found == {str(Path(name).relative_to(tree).with_suffix("")): str(label) for name, label in rows}
    # Where the classes have names, a number is a position among them.
    few = write_csv(tmp_path / "few.csv", [(name, label // 5) for name, label in rows])
    pack(few, tmp_path / "few", classes=["ant", "bee", "cow"])
    assert {label for label, _ in contents(tmp_path / "few").values()} == {"ant", "bee", "cow"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "file,label\na.jpg,1\n", "path and label among them; found file, label"),
        ("x.csv", "", "the first line names the columns"),
        ("x.csv", "path,label\n", "lists no images"),
        ("x.csv", "path,label\na.jpg\n", "line 2: label None; expected a class name or number"),
        ("x.csv", "path,label\n,cat\n", "line 2: path ''; expected the path of an image"),
        ("x.jsonl", "{}\n", "line 1: path None"),
        ("x.jsonl", "[1]\n", "line 1: path None"),
        ("x.jsonl", '{"path": "a.jpg", "label": 1.5}\n', "line 1: label 1.5; expected a class name or number"),
        ("x.jsonl", '{"path": "a.jpg", "label": "1 5"}\n', "line 1: label '1 5' is several numbers"),
        ("x.jsonl", "path,label\n", "not a .jsonl list in UTF-8"),
        ("x.jsonl", '{"path": "images/cat/0.jpg", "label": 1}\n' * 2, "would both be '0' in the shards"),
        ("x.txt", "path,label\n", "expected a folder, a .csv or .jsonl list, or a .parquet file"),
        ("x.parquet", "PAR1", "cannot be read as Parquet"),
        ("x.jsonl", '{"path": "gone.jpg", "label": 1}\n', "gone.jpg: cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_invalid_list_is_rejected(tree: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        pack(tmp_path / name, tmp_path / "out")
    assert message in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"images", name}


def write_hugging_face(
    folder: Path, rows: list[tuple[bytes | None, Any]], names: list[str] | None, num_files: int = 3, group: int = 4
) -> None:
    """As `datasets` writes an image data set: a struct of bytes and path, and the class names in the metadata."""
    folder.mkdir(exist_ok=True)
    label = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "int64"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps(features)},
    )
    size = -(-len(rows) // num_files)
    for number in range(num_files):
        chosen = rows[number * size : (number + 1) * size]
        images = [{"bytes": data, "path": f"{number}.JPEG"} for data, _ in chosen]
        table = pa.table({"image": images, "label": [label for _, label in chosen]}, schema)
        pq.write_table(table, folder / f"train-{number:05d}-of-{num_files:05d}.parquet", row_group_size=group)


def digit_rows(digit_images: Path, count: int) -> list[tuple[bytes | None, Any]]:
    paths = sorted((digit_images / "val").rglob("*.jpg"))[:: 360 // count][:count]
    return [(path.read_bytes(), int(path.parent.name)) for path in paths]


NAMES = [f"digit {number}" for number in "9876543210"]


def test_hugging_face_parquet_is_packed(digit_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = digit_rows(digit_images, 60)
    write_hugging_face(tmp_path / "data", rows, NAMES)
    manifest = pack(tmp_path / "data", tmp_path / "out", samples_per_shard=16)
    assert manifest.classes == NAMES  # in their own order, which gives the numbers their meaning
    expected = {
        f"train-0000{i // 20}-of-00003/{i % 20:08d}": (NAMES[label], data) for i, (data, label) in enumerate(rows)
    }
    assert contents(tmp_path / "out") == expected
    labels = np.concatenate([ShardSet(tmp_path / "out").index(shard)["label"] for shard in range(4)])
    assert np.count_nonzero(np.diff(labels)) > 40  # of 59; 9 in the order of the files

    monkeypatch.setattr(spill, "RUN_BYTES", 3000)  # some four images
    pack(tmp_path / "data", tmp_path / "runs", samples_per_shard=16)
    assert listing(tmp_path / "runs") == listing(tmp_path / "out")
    pack(str(tmp_path / "data" / "train-*.parquet"), tmp_path / "workers", samples_per_shard=16, workers=2)
    assert listing(tmp_path / "workers") == listing(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_parquet_spill_is_laid_out_in_shuffled_order(digit_images: Path, tmp_path: Path) -> None:
    """Within a run: so that a shard's images are read in a few pieces."""
    rows = digit_rows(digit_images, 20)
    write_hugging_face(tmp_path, rows, NAMES, num_files=1)
    positions = np.random.default_rng(0).permutation(20)[:15]
    chosen = np.arange(20)[5:]
    table = parquet.Table(tmp_path / "train-00000-of-00001.parquet", "image")
    spill.spill(spill.Container(table, chosen), positions, tmp_path / "spill")
    places = np.load(tmp_path / "spill.npy")
    assert (np.diff(places["position"]) > 0).all()
    assert (np.diff(places["offset"].astype(int)) > 0).all()
    found = list(spill.read_spilled([tmp_path / "spill"], 3, 12))
    wanted = {int(position): rows[row][0] for row, position in zip(chosen, positions, strict=True)}
    assert found == [wanted.get(position, b"") for position in range(3, 12)]


def test_parquet_without_class_names_or_labels(digit_images: Path, tmp_path: Path) -> None:
    rows = digit_rows(digit_images, 12)
    rows[3], rows[4], rows[5] = (rows[3][0], None), (rows[4][0], -1), (None, 1)
    write_hugging_face(tmp_path / "data", rows, None, num_files=1)
    with pytest.raises(InputError, match="row 3: has no class"):
        pack(tmp_path / "data", tmp_path / "out")
    manifest = pack(tmp_path / "data", tmp_path / "out", skip_bad=True)
    assert manifest.classes == [str(number) for number in range(10)]
    skipped = read_skipped(tmp_path / "out")
    assert [(line["key"], line["reason"]) for line in skipped] == [
        ("train-00000-of-00001/00000003", "has no class"),
        ("train-00000-of-00001/00000004", "has no class"),
        ("train-00000-of-00001/00000005", "empty"),
    ]
    assert len(contents(tmp_path / "out")) == 9
    pack(tmp_path / "data", tmp_path / "named", classes=NAMES, skip_bad=True)
    found = {int(key[-8:]): label for key, (label, _) in contents(tmp_path / "named").items()}
    assert found == {row: NAMES[label] for row, (_, label) in enumerate(rows) if row not in (3, 4, 5)}


def test_labels_counting_from_one_are_reported(
    digit_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(data, number % 3 + 1) for number, (data, _) in enumerate(digit_rows(digit_images, 6))]
    for names in (None, ["ant", "bee", "cow"]):
        write_hugging_face(tmp_path / str(bool(names)), rows, names, num_files=1)
    for source, classes in ((tmp_path / "True", None), (tmp_path / "False", ["ant", "bee", "cow"])):
        with pytest.raises(InputError, match="labels are 1 … 3 of 3 classes, so they count from 1"):
            pack(source, tmp_path / "out", classes=classes, skip_bad=True)
    assert pack(tmp_path / "False", tmp_path / "out").classes == ["0", "1", "2", "3"]
    assert "labels are 1 … 3 and none is 0, so class 0 has no samples" in capsys.readouterr().err
    few = write_csv(tmp_path / "list.csv", [(str(path), 3) for path in (digit_images / "val").rglob("0/*.jpg")][:2])
    with pytest.raises(InputError, match="labels are 3 … 3 of 3 classes, so they count from 1"):
        pack(few, tmp_path / "few", classes=["ant", "bee", "cow"])


def test_parquet_with_string_labels_and_plain_bytes_is_packed(digit_images: Path, tmp_path: Path) -> None:
    rows = digit_rows(digit_images, 6)
    table = pa.table({"image": [data for data, _ in rows], "label": ["b", "a", "b", "a", "b", "a"], "x": range(6)})
    pq.write_table(table, tmp_path / "x.parquet")
    pack(tmp_path / "x.parquet", tmp_path / "out")
    assert sorted(contents(tmp_path / "out").values()) == sorted(
        ("ba"[row % 2], data) for row, (data, _) in enumerate(rows)
    )


def test_parquet_folder_with_several_splits_is_rejected(digit_images: Path, tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "data", digit_rows(digit_images, 6), NAMES, num_files=1)
    shutil.copy(tmp_path / "data/train-00000-of-00001.parquet", tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"holds the splits test, train; name the files of one: --images '.*/test-"):
        pack(tmp_path / "data", tmp_path / "out")


def test_parquet_with_wrong_columns_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [b"x"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(
        InputError, match=r"expected the columns image and label; found img, label; .*\n.* --image img --label label"
    ):
        pack(tmp_path / "x.parquet", tmp_path / "out")
    pq.write_table(pa.table({"image": ["x"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="column image is string; expected bytes"):
        pack(tmp_path / "x.parquet", tmp_path / "out")
    pq.write_table(pa.table({"image": [b"x"], "label": [1.5]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="column label is double; expected numbers or class names"):
        pack(tmp_path / "x.parquet", tmp_path / "out")


# Images


def one_image(tmp_path: Path, data: bytes, name: str = "x.jpg") -> Path:
    path = tmp_path / "one" / "cat" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return tmp_path / "one"


def packed(tmp_path: Path, data: bytes, name: str = "x.jpg", **options: Any) -> tuple[str, bytes, np.void]:
    """The member's name, the bytes and the record that packing makes of one image."""
    out = tmp_path / "packed"
    pack(one_image(tmp_path, data, name), out, **options)
    with tarfile.open(out / "shard-000000.tar") as tar:
        names = tar.getnames()
    shards = ShardSet(out)
    result = names[0], shards.read(0, 0), shards.index(0)[0]
    assert verify(out, deep=True) == []
    shutil.rmtree(out)
    shutil.rmtree(tmp_path / "one")
    return result


def difference(data: bytes, reference: Image.Image) -> float:
    """Mean absolute difference in grey levels."""
    pixels = np.asarray(Image.open(BytesIO(data)).convert("RGB"), np.int16)
    return float(np.abs(pixels - np.asarray(reference.convert("RGB"), np.int16)).mean())


def test_max_side_scales_images_down(photo: np.ndarray, tmp_path: Path) -> None:
    data = encoded(photo, "JPEG", quality=95)
    name, small, record = packed(tmp_path, data, "x.JPEG", max_side=200)
    assert name == "cat/x.jpg"
    image = Image.open(BytesIO(small))
    assert image.format == "JPEG"
    assert image.size == (record["width"], record["height"]) == (200, 133)
    reference = Image.open(BytesIO(data)).resize((200, 133), Image.Resampling.LANCZOS)
    assert difference(small, Image.open(BytesIO(encoded(np.asarray(reference), "JPEG", quality=90)))) < 1.5
    _, larger, _ = packed(tmp_path, data, max_side=200, quality=98)
    assert difference(larger, reference) < difference(small, reference)
    assert len(larger) > len(small)
    _, portrait, record = packed(tmp_path, encoded(photo.transpose(1, 0, 2), "PNG"), "x.png", max_side=200)
    assert (record["width"], record["height"]) == (133, 200)
    assert Image.open(BytesIO(portrait)).format == "JPEG"


def test_images_within_max_side_keep_their_bytes(photo: np.ndarray, tmp_path: Path) -> None:
    for format, extension in (("JPEG", "jpg"), ("PNG", "png")):
        data = encoded(photo[:90, :100], format)
        choices: list[dict[str, Any]] = [{}, {"max_side": 100}, {"quality": 50}]
        for options in choices:
            name, same, _ = packed(tmp_path, data, **options)
            assert same == data
            assert name == f"cat/x.{extension}"


def test_file_extension_follows_image_content(photo: np.ndarray, tmp_path: Path) -> None:
    """A few of ImageNet's .JPEG files are PNGs, or have four channels; phones write several pictures into one file."""
    small = Image.fromarray(photo[:50, :60])
    name, _, _ = packed(tmp_path, encoded(photo[:50, :60], "PNG"), "n02105855_2933.JPEG")
    assert name == "cat/n02105855_2933.png"
    buffer = BytesIO()
    small.convert("CMYK").save(buffer, "JPEG")
    name, same, _ = packed(tmp_path, buffer.getvalue())
    assert (name, same) == ("cat/x.jpg", buffer.getvalue())
    _, scaled, _ = packed(tmp_path, buffer.getvalue(), max_side=30)
    assert difference(scaled, small.resize((30, 25), Image.Resampling.LANCZOS)) < 6
    buffer = BytesIO()
    small.save(buffer, "MPO", save_all=True, append_images=[small])
    assert Image.open(BytesIO(buffer.getvalue())).format == "MPO"
    name, same, _ = packed(tmp_path, buffer.getvalue())
    assert (name, same) == ("cat/x.jpg", buffer.getvalue())


@pytest.mark.parametrize("format", ["WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats_are_rejected_unless_converted(photo: np.ndarray, tmp_path: Path, format: str) -> None:
    image = Image.fromarray(photo[:50, :60])
    data = encoded(photo[:50, :60], format)
    name = f"x.{format.lower()}"
    with pytest.raises(InputError, match=f"holds {format}, not JPEG or PNG: pack with --quality to convert it"):
        pack(one_image(tmp_path, data, name), tmp_path / "out")
    found, converted, record = packed(tmp_path, data, name, quality=95)
    assert found == "cat/x.jpg"
    assert (record["width"], record["height"]) == (60, 50)
    assert difference(converted, image) < (12 if format == "GIF" else 4)  # 256 colours
    _, converted, record = packed(tmp_path, data, name, max_side=30)
    assert (record["width"], record["height"]) == (30, 25)
    assert difference(converted, image.resize((30, 25), Image.Resampling.LANCZOS)) < (12 if format == "GIF" else 6)


def test_malformed_png_is_rejected_unless_converted(photo: np.ndarray, tmp_path: Path) -> None:
    """A PNG without its last chunk, which training would skip."""
    data = encoded(photo[:50, :60], "PNG")[:-12]
    Image.open(BytesIO(data)).load()
    with pytest.raises(InputError, match="a PNG that is not laid out as the format wants: pack with --quality"):
        pack(one_image(tmp_path, data), tmp_path / "out")
    name, converted, _ = packed(tmp_path, data, quality=95)
    assert name == "cat/x.jpg"
    assert difference(converted, Image.fromarray(photo[:50, :60])) < 4


def test_16_bit_images_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    reference = Image.fromarray((ramp // 256).astype(np.uint8))
    for format in ("TIFF", "PNG"):
        _, converted, _ = packed(tmp_path, encoded(ramp, format), max_side=32)
        assert difference(converted, reference.resize((32, 32), Image.Resampling.LANCZOS)) < 2
    with pytest.raises(InputError, match="32 bits a pixel"):
        packed(tmp_path, encoded(ramp.astype(np.float32), "TIFF"), quality=90)


def test_transparent_and_palette_images_are_scaled(photo: np.ndarray, tmp_path: Path) -> None:
    image = Image.fromarray(photo[:50, :60])
    for other in (image.convert("RGBA"), image.convert("LA"), image.convert("1"), image.quantize(64)):
        buffer = BytesIO()
        other.save(buffer, "PNG")
        _, scaled, _ = packed(tmp_path, buffer.getvalue(), max_side=30)
        assert difference(scaled, other.convert("RGB").resize((30, 25), Image.Resampling.LANCZOS)) < 8


def test_images_beyond_pixel_or_side_limit_are_rejected(tmp_path: Path) -> None:
    """Just beyond the limit of the index, which is between the two limits at which PIL warns and refuses."""
    image = Image.new("1", (1 << 14, (1 << 13) + 1))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    choices: list[dict[str, Any]] = [{}, {"max_side": 100}]
    for options in choices:
        with pytest.raises(InputError, match="more than 134,217,728 pixels: taken for a decompression bomb"):
            packed(tmp_path, buffer.getvalue(), **options)
    side = encoded(np.zeros((1, 66_000), np.uint8), "PNG")
    with pytest.raises(InputError, match="66000 × 1 pixels; no side may exceed 65535: scale it down"):
        packed(tmp_path, side)
    _, _, record = packed(tmp_path, side, max_side=1000)
    assert (record["width"], record["height"]) == (1000, 1)


def test_huge_jpeg_is_accepted_when_max_side_scales_it_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG of more pixels than may be decoded, of which a half or an eighth of each side is decoded instead."""
    ramp = np.broadcast_to(np.arange(16_400, dtype=np.uint16)[:, None] // 65, (16_400, 8200)).astype(np.uint8)
    data = encoded(ramp, "JPEG")
    del ramp
    with pytest.raises(InputError, match="more than 134,217,728 pixels"):
        pack(one_image(tmp_path, data), tmp_path / "out")
    with pytest.raises(InputError, match="more than 134,217,728 pixels"):
        pack(one_image(tmp_path, data), tmp_path / "out", max_side=16_000)
    for side in (200, 8000):
        _, scaled, record = packed(tmp_path, data, max_side=side)
        assert (record["height"], record["width"]) == (side, side // 2)
        column = np.asarray(Image.open(BytesIO(scaled)).resize((1, 200), Image.Resampling.BOX), np.int16)[:, 0]
        assert abs(column[..., 0] - (np.arange(200) + 0.5) * 82 / 65).max() < 2
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    monkeypatch.setattr(images, "MAX_PIXELS", 1 << 30)
    with pytest.raises(InputError, match="bytes"):
        pack(one_image(tmp_path, data), tmp_path / "out")
    packed(tmp_path, data, max_side=200)


# Bad input


def test_pipes_and_devices_are_skipped_and_reported(tmp_path: Path) -> None:
    folder = one_image(tmp_path, encoded(np.zeros((9, 9, 3), np.uint8), "PNG"))
    (folder / "c").mkdir(exist_ok=True)
    os.mkfifo(folder / "c" / "pipe.jpg")
    (folder / "c" / "device.jpg").symlink_to("/dev/zero")
    pack(folder, tmp_path / "out", skip_bad=True)
    told = {Path(str(line["path"])).name: line["reason"] for line in read_skipped(tmp_path / "out")}
    assert told == dict.fromkeys(["pipe.jpg", "device.jpg"], "cannot be read: not a regular file")


@pytest.mark.parametrize(("name", "start"), [("list.csv", "path,label\n"), ("list.jsonl", "")])
def test_list_with_an_overlong_line_is_rejected(tmp_path: Path, name: str, start: str) -> None:
    (tmp_path / name).write_text(start)
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(InputError, match=f"{name}: not a .* list in UTF-8: a line of more than 1,048,576 characters"):
        pack(tmp_path / name, tmp_path / "out")


def test_parquet_with_fewer_bytes_than_rows_is_rejected(tmp_path: Path) -> None:
    rows = {"image": pa.nulls(100_000, pa.binary()), "label": pa.array(np.zeros(100_000, np.int64))}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet", compression="zstd")
    with pytest.raises(InputError, match=r"rows\.parquet: 100,000 rows in fewer bytes, so they hold no images"):
        pack(tmp_path / "rows.parquet", tmp_path / "out")


def test_oversized_coco_annotation_file_is_rejected(tmp_path: Path) -> None:
    for folder in ("annotations", "x"):
        (tmp_path / folder).mkdir()
    (tmp_path / "annotations" / "instances_x.json").touch()
    os.truncate(tmp_path / "annotations" / "instances_x.json", 1 << 40)
    with pytest.raises(InputError, match=r"instances_x\.json: cannot be read: more than 4,294,967,296 bytes"):
        coco.find(tmp_path / "annotations" / "instances_x.json")


def empty_folder(tree: Path) -> None:
    shutil.rmtree(tree)
    tree.mkdir()


def no_class_folders(tree: Path) -> None:
    for path in list(tree.rglob("*.*")):
        path.rename(tree / path.name)
    for folder in ("cat", "dog"):
        (tree / folder).rmdir()


def empty_class(tree: Path) -> None:
    (tree / "emu").mkdir()


def unreadable_class(tree: Path) -> None:
    (tree / os.fsdecode(b"\xff")).mkdir()


def truncated(tree: Path) -> None:
    path = tree / "cat" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def garbage(tree: Path) -> None:
    (tree / "cat" / "x.jpg").write_bytes(b"hello")


def colliding_extensions(tree: Path) -> None:
    shutil.copy(tree / "cat" / "0.jpg", tree / "cat" / "0.png")


def colliding_dots(tree: Path) -> None:
    shutil.copy(tree / "cat" / "0.jpg", tree / "cat" / "a.b.jpg")
    shutil.copy(tree / "cat" / "0.jpg", tree / "cat" / "a_b.jpg")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such file or folder"),
        (empty_folder, "no class folders"),
        (no_class_folders, "no class folders"),
        (empty_class, "emu: no images"),
        (unreadable_class, "a class name is readable text in UTF-8: rename the folder"),
        (truncated, "0.jpg: not a readable image"),
        (garbage, "x.jpg: not an image"),
        (colliding_extensions, "would both be 'cat/0' in the shards"),
        (colliding_dots, "would both be 'cat/a_b' in the shards"),
    ],
)
def test_invalid_folder_tree_is_rejected_without_leaving_files(tree: Path, tmp_path: Path, spoil, message: str) -> None:
    spoil(tree)
    with pytest.raises(InputError) as error:
        pack(tree, tmp_path / "out")
    assert message in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"images"}


def test_skip_bad_skips_and_lists_unreadable_images(tree: Path, tmp_path: Path) -> None:
    truncated(tree)
    garbage(tree)
    with pytest.raises(InputError, match="--skip-bad skips such images"):
        pack(tree, tmp_path / "out", samples_per_shard=1, workers=2)
    assert {path.name for path in tmp_path.iterdir()} == {"images"}
    manifest = pack(tree, tmp_path / "out", samples_per_shard=1, skip_bad=True)
    assert manifest.samples == len(manifest.shards) == 5
    assert {(line["path"], line["key"]) for line in read_skipped(tmp_path / "out")} == {
        (str(tree / "cat" / "0.jpg"), "cat/0"),
        (str(tree / "cat" / "x.jpg"), "cat/x"),
    }
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5  # none for a shard without an image
    assert verify(tmp_path / "out", deep=True) == []
    for path in tree.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="not one image can be packed"):
        pack(tree, tmp_path / "none", skip_bad=True)


def test_non_empty_output_folder_is_rejected_and_left_unchanged(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(InputError, match="already holds something"):
        pack(tree, tmp_path / "out")
    assert listing(tmp_path / "out") == {"precious": b"mine"}


def test_skipped_non_image_files_are_reported(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "cat" / "notes.txt").write_text("hello")
    (tree / "readme").write_text("hello")
    pack(tree, tmp_path / "out")
    assert "skipped 2 files" in capsys.readouterr().err


HIDDEN = [
    ".DS_Store",
    ".hidden/0.jpg",
    "._0.jpg",
    "__MACOSX/cat/0.jpg",
    "Thumbs.db",
    "desktop.ini",
    "@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg",
    ".ipynb_checkpoints/0-checkpoint.jpg",
    "lost+found/0.jpg",
    "#recycle/0.jpg",
    "0.jpg~",
    "~$0.jpg",
    "#0.jpg#",
    "0.jpg:Zone.Identifier",
]


def test_hidden_and_system_entries_are_ignored(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(tree, tmp_path / "clean")
    capsys.readouterr()
    for name in HIDDEN:
        for folder in (tree, tree / "cat"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / "cat" / "0.jpg", folder / name)
    pack(tree, tmp_path / "out")
    assert listing(tmp_path / "out") == listing(tmp_path / "clean")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ignored {2 * len(HIDDEN)} hidden and system entries, the first is ")


def test_hidden_parquet_files_are_ignored(digit_images: Path, tmp_path: Path) -> None:
    write_hugging_face(tmp_path / "data", digit_rows(digit_images, 6), NAMES, num_files=1)
    (tmp_path / "data" / "._train-00000-of-00001.parquet").write_text("of a Mac")
    assert pack(tmp_path / "data", tmp_path / "out").samples == 6


def test_folder_of_splits_is_rejected_with_commands_to_pack_each(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "my data"
    for split in ("val", "Train"):
        shutil.copytree(tree, root / split)
    (root / "test").mkdir()
    shutil.copy(tree / "cat" / "0.jpg", root / "test" / "0.jpg")
    (root / ".cache").mkdir()
    with pytest.raises(InputError) as error:
        pack(root, tmp_path / "out")
    message, *commands = str(error.value).splitlines()
    assert message.startswith(f"{root}: its folders Train, test, val are splits, not classes")
    assert "test without class folders need a .csv list" in message
    assert len(commands) == 2
    for command in commands:
        python, *words = shlex.split(command)
        assert python == "python"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [*words, "--workers", "1"])
        assert shards_command.main()["samples"] == 6
    assert read_manifest(tmp_path / "data/Train").classes == read_manifest(tmp_path / "data/val").classes


def test_class_named_like_a_split_is_accepted(tree: Path, tmp_path: Path) -> None:
    (tree / "cat").rename(tree / "train")  # beside a class that is no split
    assert pack(tree, tmp_path / "out").classes == ["dog", "train"]
    shutil.rmtree(tree / "dog")  # without folders in it
    assert pack(tree, tmp_path / "one").classes == ["train"]
    (tree / "train" / "inner").mkdir()
    with pytest.raises(InputError, match="are splits, not classes"):
        pack(tree, tmp_path / "two")
    assert pack(tree, tmp_path / "two", classes=["plane", "train"]).samples == 3


def test_all_listing_errors_are_reported_together(tree: Path, tmp_path: Path) -> None:
    for name in ("emu", "fox"):
        (tree / name).mkdir()
    for number in (0, 2):
        shutil.copy(tree / "cat" / f"{number}.jpg", tree / "cat" / f"{number}.png")
    (tree / "dog" / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(InputError) as error:
        pack(tree, tmp_path / "out")
    for part in ("emu: no images", "fox: no images", "'cat/0'", "'cat/2'", "gone.jpg: cannot be read"):
        assert part in str(error.value)
    manifest = pack(tree, tmp_path / "out", skip_bad=True)
    assert (manifest.classes, manifest.samples) == (["cat", "dog"], 6)
    assert [line["key"] for line in read_skipped(tmp_path / "out")] == ["emu", "fox", "cat/0", "cat/2", "dog/gone"]


def test_unreadable_folder_is_reported_by_name(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(folder: str) -> Any:
        if str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="dog: cannot be read: Permission denied"):
        pack(tree, tmp_path / "out")


def test_bad_images_of_all_shards_are_reported_together(tree: Path, tmp_path: Path) -> None:
    bad = {str(tree / "cat" / f"bad-{number:02d}.jpg") for number in range(12)}
    for path in bad:
        Path(path).write_bytes(b"hello")
    out, refused = tmp_path / "new" / "out", tmp_path / "new" / "out-refused.jsonl"
    with pytest.raises(InputError) as error:
        pack(tree, out, samples_per_shard=3)
    lines = str(error.value).splitlines()
    assert len([line for line in lines if line.endswith("not an image")]) == 10
    assert f"all 12 are listed in {refused}" in lines
    assert {json.loads(line)["path"] for line in refused.read_text().splitlines()} == bad
    assert [path.name for path in refused.parent.iterdir()] == [refused.name]
    for path in bad:
        Path(path).unlink()
    pack(tree, out)
    assert not refused.exists()


def test_unicode_non_utf8_and_long_file_names_are_kept(tree: Path, tmp_path: Path) -> None:
    names = ["été", "猫", "x" * 200, os.fsdecode(b"latin-1 \xe9")]
    for name in names:
        shutil.copy(tree / "cat" / "0.jpg", tree / "cat" / f"{name}.jpg")
    pack(tree, tmp_path / "out")
    assert {f"cat/{name}" for name in names} <= contents(tmp_path / "out").keys()


def test_symlinked_folders_are_followed_once(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tree / "cat" / "0.jpg", tmp_path / "elsewhere" / "far.jpg")
    (tree / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "cat" / "loop").symlink_to(tree / "cat")
    manifest = pack(tree, tmp_path / "out")
    assert manifest.samples == 7


def test_failed_pack_removes_the_parent_folders_it_created(tree: Path, tmp_path: Path) -> None:
    garbage(tree)
    with pytest.raises(InputError, match="not an image"):
        pack(tree, tmp_path / "p" / "q" / "out")
    assert not (tmp_path / "p").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be created"):
        pack(tree, tmp_path / "file" / "out")


# Interruption

NUM_SLOW = 250


@pytest.fixture
def slow_tree(photo: np.ndarray, tmp_path: Path) -> Path:
    """Large enough images that a pack of them can be interrupted."""
    data = encoded(photo, "JPEG")
    for number in range(NUM_SLOW):
        path = tmp_path / "images" / str(number % 3) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


def start_packing(
    tree: Path, out: Path, *prefix: str, workers: int = 2, samples_per_shard: int = 10
) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "launch/shards.py", "pack", "--images", tree, "--out", out]
    options = ["--samples-per-shard", str(samples_per_shard), "--workers", str(workers)]
    return subprocess.Popen(
        [*prefix, *map(str, command), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


Identity = tuple[int, int]  # inode and time of change: a file that is written again has others


def identities(tars: Iterable[Path]) -> dict[str, Identity]:
    return {tar.stem: (tar.stat().st_ino, tar.stat().st_mtime_ns) for tar in tars}


def finished(partial: Path) -> dict[str, Identity]:
    """The shards that are recorded as whole."""
    records = partial.glob("*/done/*.json")
    return identities(record.parent.parent / "data" / f"{record.stem}.tar" for record in records)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_killed_pack_resumes_and_repacks_damaged_shards(slow_tree: Path, tmp_path: Path, how: signal.Signals) -> None:
    partial = tmp_path / ".out.partial"
    process = start_packing(slow_tree, tmp_path / "out")
    deadline = time.monotonic() + PATIENCE_S
    while len(finished(partial)) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(InputError, match="somebody else is packing into it"):
        pack(slow_tree, tmp_path / "out", samples_per_shard=10)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    if how == signal.SIGINT:  # a terminal sends it to all of them
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, error = process.communicate(timeout=PATIENCE_S)
    assert not psutil.wait_procs(workers, timeout=PATIENCE_S)[1], "workers outlive the process that started them"
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command continues from there" in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    kept = finished(partial)
    assert 4 <= len(kept) < NUM_SLOW // 10

    (damaged,) = partial.glob(f"*/data/{min(kept)}.tar")
    with damaged.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    pack(slow_tree, tmp_path / "out", samples_per_shard=10)
    assert not partial.exists()
    pack(slow_tree, tmp_path / "fresh", samples_per_shard=10)
    assert listing(tmp_path / "out") == listing(tmp_path / "fresh")
    unchanged = kept.items() & identities((tmp_path / "out").glob("*.tar")).items()
    assert dict(unchanged).keys() == kept.keys() - {min(kept)}


@pytest.fixture
def stopped(photo: np.ndarray, tmp_path: Path) -> tuple[Path, dict[str, Identity]]:
    """A tree whose pack, a shard an image, has met a full disk at one image; and the shards that were whole by then."""
    for number in range(40):
        path = tmp_path / "images" / str(number % 3) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo[:40, number : number + 50], "PNG"))
    large = tmp_path / "images" / "0" / "large.png"
    large.write_bytes(encoded(photo, "PNG"))
    process = start_packing(
        tmp_path / "images", tmp_path / "out", "prlimit", "--fsize=100000", workers=1, samples_per_shard=1
    )
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "File too large" in error
    kept = finished(tmp_path / ".out.partial")
    assert 5 < len(kept) < 41
    assert not (tmp_path / "out").exists()
    return tmp_path / "images", kept


def remade(out: Path, kept: dict[str, Identity]) -> bool:
    unchanged = dict(kept.items() & identities(out.glob("*.tar")).items())
    assert unchanged in ({}, kept)
    return not unchanged


def other_input(tree: Path) -> dict[str, Any]:
    path = tree / "0" / "0.png"
    path.write_bytes(path.read_bytes())  # of the same size, which may not mean the same contents
    return {}


def another_image(tree: Path) -> dict[str, Any]:
    shutil.copy(tree / "0" / "0.png", tree / "0" / "last.png")
    return {}


def other_options(tree: Path) -> dict[str, Any]:
    return {"max_side": 30}


def other_workers(tree: Path) -> dict[str, Any]:
    return {"workers": 2, "skip_bad": True}


@pytest.mark.parametrize(
    ("change", "starts_afresh"),
    [
        (other_workers, False),
        (other_input, True),
        (another_image, True),
        (other_options, True),
    ],
)
def test_pack_resumes_only_with_the_same_input_and_options(
    stopped: tuple[Path, dict[str, Identity]],
    tmp_path: Path,
    change: Callable[[Path], dict[str, Any]],
    starts_afresh: bool,
) -> None:
    tree, kept = stopped
    options = change(tree)
    pack(tree, tmp_path / "out", samples_per_shard=1, **options)
    assert remade(tmp_path / "out", kept) == starts_afresh
    pack(tree, tmp_path / "fresh", samples_per_shard=1, **options)
    assert listing(tmp_path / "out") == listing(tmp_path / "fresh")
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out", "fresh"}


def test_stopped_parquet_pack_resumes(digit_images: Path, tmp_path: Path) -> None:
    """With the images that it had brought into order, as well as with its shards."""
    rows = digit_rows(digit_images, 30)
    rows[7] = (rows[7][0] or b"") + bytes(200_000), rows[7][1]  # a JPEG with something behind it
    write_hugging_face(tmp_path / "data", rows, NAMES)
    process = start_packing(
        tmp_path / "data", tmp_path / "out", "prlimit", "--fsize=150000", workers=1, samples_per_shard=1
    )
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, error
    pack(tmp_path / "data", tmp_path / "out", samples_per_shard=1)
    pack(tmp_path / "data", tmp_path / "fresh", samples_per_shard=1)
    assert listing(tmp_path / "out") == listing(tmp_path / "fresh")


def test_concurrent_pack_into_one_folder_is_rejected(tree: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="out: somebody else is packing into it; wait for it or give another"):
            pack(tree, tmp_path / "out")
    pack(tree, tmp_path / "out")
