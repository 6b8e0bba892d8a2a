"""A data set at rest: its manifest and indices are believed only where they agree, and every changed byte is found."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.shards import index_tars
from pipeline.shards.bad_samples import SampleFault
from pipeline.shards.index import (
    RECORD,
    CorruptSampleError,
    Manifest,
    Shard,
    ShardSet,
    decode_records,
    key_in,
    read_manifest,
)
from pipeline.shards.pack import pack
from pipeline.shards.verify import verify
from tests.damage import Member, tar_of


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Two classes of three images each, in shards of four and two."""
    rng = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.{('jpg', 'png')[number // 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + number, 30, 3), np.uint8)).save(path)
    pack(tmp_path / "images", tmp_path / "out", samples_per_shard=4)
    return tmp_path / "out"


# What a manifest says


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"cat"', '"cow"'))


def miscount_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 6', '"samples": 7'))


def lead_manifest_out(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"shard-000000"', '"../shard-000000"'))


def newer_manifest(folder: Path) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**tree, "format": 99}))


def garble_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_manifest, "cannot read the manifest: No such file or directory; make one with launch/shards.py"),
        (edit_manifest, "its digest and counts do not match its contents"),
        (miscount_manifest, "its digest and counts do not match its contents"),
        (lead_manifest_out, "not a file below the data set's root"),
        (newer_manifest, "format 99, but this version reads format 2"),
        (garble_manifest, "manifest.json: not JSON: Expecting property name"),
    ],
)
def test_wrong_manifest_is_rejected(packed: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(packed)
    for use in (ShardSet, verify):
        with pytest.raises(InputError) as error:
            use(packed)
        assert message in str(error.value)


def first(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree["shards"][0].update(fields)


def whole(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(samples="six"), "shards.0.samples: expected a whole number (found 'six')"),
        (first(samples=0), "shards.0.samples: has to be more than 0 (found 0)"),
        (first(bytes=-5), "shards.0.bytes: has to be at least 0 (found -5)"),
        (first(bytes=10**40), "shards.0.bytes: has to be less than 9223372036854775808 (found 1000"),
        (first(bytes=10**200), "not JSON: a number of 201 digits; 100 at most"),
        (first(index_bytes=10**15), "shards.0.index_bytes: has to be at most 1073741824 (found 1000000000000000)"),
        (first(samples=math.nan), "shards.0.samples: has to be a finite number (found nan)"),
        (first(sha256="x"), "shards.0.sha256: SHA-256 'x'; expected 64 digits of lower-case hexadecimal"),
        (first(name="../x"), "shards.0.name: '../x': not a file below the data set's root"),
        (first(name="/etc/x"), "shards.0.name: '/etc/x': not a file below the data set's root"),
        (first(name="a\nb"), "shards.0.name: 'a\\nb': not a file below the data set's root"),
        (first(name="\ud800"), "shards.0.name: '\\ud800': not a file below the data set's root"),
        (first(more=1), "shards.0.more: no such key (found 1)"),
        (lambda tree: tree["shards"][0].pop("sha256"), "shards.0.sha256: a value is missing here"),
        (whole(shards={}), "shards: expected a list"),
        (whole(shards=[]), "shards: expected at least 1 values (found [])"),
        (whole(shards=[7]), "shards.0: expected a mapping (found 7)"),
        (whole(shards=[{}] * 100_000), "shards.0.name: a value is missing here"),
        (
            whole(classes=[["cat"], "dog"]),
            "classes.0: expected text; put a number into quotes to make it text (found ['",
        ),
        (whole(classes=["\x1b[31m", "dog"]), "classes: '\\x1b[31m' is no class name: control characters are refused"),
        (whole(classes=["cat", "cat"]), "classes: expected at most 1048576 names, each once"),
    ],
)
def test_invalid_manifest_value_is_reported_with_key_value_and_rule(
    packed: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    tree = json.loads((packed / "manifest.json").read_text())
    change(tree)
    (packed / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(InputError) as error:
        read_manifest(packed)
    assert str(error.value).startswith(f"{packed}/manifest.json: {message}")
    assert str(error.value).endswith("; copy or pack the data again")
    assert len(str(error.value).splitlines()) == 1
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON: Expecting value"),
        (b"[" * 1_000_000, "not JSON: values are nested too deeply"),
        (b"\xff\xfe{}", "not JSON: byte 0 is not UTF-8"),
        (b'{"format": 2, "format": 3}', "not JSON: 'format' is set twice"),
        (b"[1]", "expected a mapping of settings (found [1])"),
    ],
)
def test_unparsable_manifest_is_reported_in_one_line(packed: Path, data: bytes, message: str) -> None:
    (packed / "manifest.json").write_bytes(data)
    with pytest.raises(InputError) as error:
        read_manifest(packed)
    assert str(error.value).startswith(f"{packed}/manifest.json: {message}")
    assert len(str(error.value).splitlines()) == 1


def test_manifest_that_is_a_device_is_rejected_without_retries(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (packed / "manifest.json").unlink()
    (packed / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="cannot read the manifest: not a regular file; make one"):
        read_manifest(packed)
    assert capfd.readouterr().err == ""


def shorten_shard(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-512])


def remove_shard(folder: Path) -> None:
    (folder / "shard-000000.tar").unlink()


@pytest.mark.parametrize(
    ("spoil", "message", "fault"),
    [
        (shorten_shard, "bytes, but manifest.json lists", "bytes, but the manifest lists"),
        (remove_shard, "is missing, but manifest.json lists", "No such file or directory"),
    ],
)
def test_missing_or_truncated_shard_is_rejected(
    packed: Path, spoil: Callable[[Path], None], message: str, fault: str
) -> None:
    spoil(packed)
    with pytest.raises(InputError) as error:
        ShardSet(packed).check()
    assert message in str(error.value)
    (found,) = verify(packed)
    assert found.shard == "shard-000000.tar"
    assert found.key is None
    assert fault in found.reason


def test_index_of_another_packing_is_rejected(packed: Path, tmp_path: Path) -> None:
    pack(tmp_path / "images", tmp_path / "other", samples_per_shard=4, seed=1)
    shutil.copy(tmp_path / "other" / "shard-000000.index.npy", packed)
    with pytest.raises(InputError, match="it was changed"):
        ShardSet(packed).index(0)
    (fault,) = verify(packed)
    assert "shard-000000.index.npy" in fault.reason


def test_several_data_sets_are_concatenated(packed: Path, tmp_path: Path) -> None:
    pack(tmp_path / "images", tmp_path / "more", seed=1)
    both = ShardSet(packed, tmp_path / "more")
    assert len(both) == 12
    assert both.shard_samples.tolist() == [4, 2, 6]
    assert {both.key(2, row) for row in range(6)} == {both.key(s, r) for s, n in ((0, 4), (1, 2)) for r in range(n)}
    shutil.copytree(tmp_path / "images" / "cat", tmp_path / "cats" / "cat")
    pack(tmp_path / "cats", tmp_path / "cats-only")
    with pytest.raises(InputError, match="have different classes"):
        ShardSet(packed, tmp_path / "cats-only")


# Damage


def overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def test_verify_finds_every_flipped_bit(packed: Path) -> None:
    """Wherever it lies, and named where it lies in an image."""
    path = packed / "shard-000000.tar"
    original = path.read_bytes()
    shards = ShardSet(packed)
    rows = [
        (shards.key(0, row), int(record["offset"]), int(record["size"])) for row, record in enumerate(shards.index(0))
    ]
    rng = np.random.default_rng(0)
    for start in [*rng.integers(0, len(original), 60).tolist(), 0, len(original) - 1]:
        overwrite(path, start, bytes([original[start] ^ 1 << int(rng.integers(8))]))
        hit = [key for key, offset, size in rows if offset <= start < offset + size]
        (fault,) = verify(packed)
        assert fault.shard == "shard-000000.tar"
        assert fault.key == (hit[0] if hit else None)
        overwrite(path, start, original[start : start + 1])
    assert verify(packed) == []


def test_reading_a_damaged_sample_raises(packed: Path) -> None:
    shards = ShardSet(packed)
    overwrite(packed / "shard-000000.tar", int(shards.index(0)[2]["offset"]) + 50, b"????")
    with pytest.raises(CorruptSampleError, match="do not match their checksum"):
        shards.read(0, 2)


def test_verify_reports_a_zeroed_tar_header_by_row(packed: Path) -> None:
    record = ShardSet(packed).index(0)[1]
    overwrite(packed / "shard-000000.tar", int(record["header"]), bytes(1024))
    assert verify(packed) == [SampleFault("shard-000000.tar", "row 1", "its image does not match its checksum")]


def test_verify_reports_a_truncated_shard(packed: Path) -> None:
    path = packed / "shard-000000.tar"
    record = ShardSet(packed).index(0)[2]
    path.write_bytes(path.read_bytes()[: int(record["offset"]) + 10])
    assert f"cut short at byte {path.stat().st_size}: the last 2 samples are lost" in verify(packed)[0].reason


def test_deep_verify_decodes_images(tmp_path: Path) -> None:
    """What was damaged before it was indexed has the right checksum."""
    buffer = BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    data = buffer.getvalue()
    parts = [Member("good.jpg", data), Member("good.cls", b"0"), Member("bad.jpg", data[:-40]), Member("bad.cls", b"0")]
    (tmp_path / "data.tar").write_bytes(tar_of(parts))
    index_tars.index_tars(str(tmp_path), decode=False)
    assert verify(tmp_path) == []
    (fault,) = verify(tmp_path, deep=True)
    assert (fault.shard, fault.key) == ("data.tar", "bad")
    assert "truncated" in fault.reason


# Indices that agree with their manifest and are wrong all the same


def shorter(records: np.ndarray) -> np.ndarray:
    return records[:-1]


def other_type(records: np.ndarray) -> np.ndarray:
    return np.zeros(len(records), [("offset", "<u8")])


def overlapping(records: np.ndarray) -> np.ndarray:
    records["size"][0] += 5000
    return records


def backwards(records: np.ndarray) -> np.ndarray:
    return records[::-1].copy()


def label_beyond(records: np.ndarray) -> np.ndarray:
    records["label"][1] = 2
    return records


def bomb(records: np.ndarray) -> np.ndarray:
    records["height"][1] = records["width"][1] = 65535
    return records


def label_below(records: np.ndarray) -> np.ndarray:
    records["label"][1] = -1
    return records


def no_height(records: np.ndarray) -> np.ndarray:
    records["height"][1] = 0
    return records


def far_beyond(records: np.ndarray) -> np.ndarray:
    records["offset"][1] = 2**64 - 10
    return records


def far_header(records: np.ndarray) -> np.ndarray:
    records["header"][1] = 2**64 - 100
    return records


def huge(records: np.ndarray) -> np.ndarray:
    records["size"][3] = 2**32 - 1
    return records


def two_axes(records: np.ndarray) -> np.ndarray:
    return np.stack([records, records])


def objects_of_python(records: np.ndarray) -> np.ndarray:
    return np.array([{}] * 4, object)


def other_size(records: np.ndarray) -> np.ndarray:
    records["width"][1] += 1
    return records


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shorter, "not 4 records"),
        (other_type, "not 4 records"),
        (overlapping, "samples overlap"),
        (backwards, "samples overlap"),
        (label_beyond, "labels beyond the 2 classes"),
        (label_below, "labels beyond the 2 classes"),
        (no_height, "images of more than 134217728 pixels, or of none"),
        (far_beyond, "samples beyond the"),
        (far_header, "samples beyond the"),
        (huge, "samples beyond the"),
        (two_axes, "not 4 records"),
        (objects_of_python, "not 4 records"),
        (bomb, "images of more than 134217728 pixels"),
        (other_size, "but the index says"),
    ],
)
def test_index_that_contradicts_its_tar_is_reported(
    packed: Path, change: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    records = np.load(packed / "shard-000000.index.npy")
    assert records.dtype == RECORD
    buffer = BytesIO()
    np.save(buffer, change(records))
    forge_index(packed, buffer.getvalue())
    (packed / "shard-000001.tar").unlink()
    fault, other = verify(packed, deep=True)
    assert (fault.shard, other.shard) == ("shard-000000.tar", "shard-000001.tar"), "every fault of every shard"
    assert reason in fault.reason
    if change is not other_size:  # which the tar alone tells
        with pytest.raises(InputError, match=f"^{packed}/shard-000000.index.npy: its index is wrong: .*index the data"):
            ShardSet(packed).index(0)


def forge_index(folder: Path, data: bytes) -> None:
    """Gives the first shard another index, which the manifest then lists."""
    manifest = read_manifest(folder)
    (folder / "shard-000000.index.npy").write_bytes(data)
    first = dataclasses.asdict(manifest.shards[0])
    first |= {"index_bytes": len(data), "index_sha256": hashlib.sha256(data).hexdigest()}
    forged = Manifest.of(manifest.classes, [Shard(**first), manifest.shards[1]])
    (folder / "manifest.json").write_text(forged.model_dump_json())


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        npy(b"{'descr': " + b"[" * 5000 + b"}"),
        npy(repr({"descr": RECORD.descr, "fortran_order": False, "shape": (10**12,)}).encode() + b"\n"),
        npy(repr({"descr": RECORD.descr, "fortran_order": False, "shape": (4,)}).encode() + b"\n"),
    ],
)
def test_unreadable_index_is_reported(packed: Path, data: bytes) -> None:
    forge_index(packed, data)
    (fault,) = verify(packed)
    assert fault.reason.startswith(f"{packed}/shard-000000.index.npy: its index is wrong: it holds not 4 records")


def test_verify_reports_tar_faults_despite_a_wrong_index(packed: Path) -> None:
    forge_index(packed, b"hello")
    overwrite(packed / "shard-000000.tar", 700, b"????")
    index, tar = (fault.reason for fault in verify(packed))
    assert index.endswith("its index is wrong: it holds not 4 records; index the data set again")
    assert tar == "differs from the manifest"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_decode_records_never_raises_on_damaged_bytes(data: st.DataObject) -> None:
    buffer = BytesIO()
    np.save(buffer, np.ones(3, RECORD))
    spoilt = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(spoilt)))
        spoilt[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=12))
    records = decode_records(bytes(spoilt), RECORD)
    assert records.dtype == RECORD
    assert len(records) in (0, 3)
    assert isinstance(key_in(bytes(spoilt), 7), str)


def test_verify_does_not_depend_on_worker_count(packed: Path) -> None:
    overwrite(packed / "shard-000000.tar", 700, b"????")
    (packed / "shard-000001.tar").unlink()
    assert verify(packed, workers=2) == verify(packed)
    assert len(verify(packed)) == 2
