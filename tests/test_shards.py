"""A data set at rest: its manifest and indices are believed only where they agree, and every changed byte is found."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.shards import adopt
from pipeline.shards.faults import Fault
from pipeline.shards.index import RECORD, CorruptSampleError, Manifest, Shard, ShardSet, read_manifest
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
def test_a_wrong_manifest_is_refused(packed: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(packed)
    for use in (ShardSet, verify):
        with pytest.raises(InputError) as error:
            use(packed)
        assert message in str(error.value)


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
def test_a_shard_of_another_size_is_refused(
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


def test_an_index_of_another_packing_is_refused(packed: Path, tmp_path: Path) -> None:
    pack(tmp_path / "images", tmp_path / "other", samples_per_shard=4, seed=1)
    shutil.copy(tmp_path / "other" / "shard-000000.index.npy", packed)
    with pytest.raises(InputError, match="it was changed"):
        ShardSet(packed).index(0)
    (fault,) = verify(packed)
    assert "shard-000000.index.npy" in fault.reason


def test_several_data_sets_stand_end_to_end(packed: Path, tmp_path: Path) -> None:
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


def test_every_flipped_bit_is_found(packed: Path) -> None:
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


def test_a_flipped_bit_is_not_read(packed: Path) -> None:
    shards = ShardSet(packed)
    overwrite(packed / "shard-000000.tar", int(shards.index(0)[2]["offset"]) + 50, b"????")
    with pytest.raises(CorruptSampleError, match="do not match their checksum"):
        shards.read(0, 2)


def test_a_lost_block_is_told_although_names_are_lost_with_it(packed: Path) -> None:
    record = ShardSet(packed).index(0)[1]
    overwrite(packed / "shard-000000.tar", int(record["header"]), bytes(1024))
    assert verify(packed) == [Fault("shard-000000.tar", "row 1", "its image does not match its checksum")]


def test_a_cut_shard_is_told(packed: Path) -> None:
    path = packed / "shard-000000.tar"
    record = ShardSet(packed).index(0)[2]
    path.write_bytes(path.read_bytes()[: int(record["offset"]) + 10])
    assert f"cut short at byte {path.stat().st_size}: the last 2 samples are lost" in verify(packed)[0].reason


def test_deep_verification_decodes(tmp_path: Path) -> None:
    """What was damaged before it was indexed has the right checksum."""
    buffer = BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    data = buffer.getvalue()
    parts = [Member("good.jpg", data), Member("good.cls", b"0"), Member("bad.jpg", data[:-40]), Member("bad.cls", b"0")]
    (tmp_path / "data.tar").write_bytes(tar_of(parts))
    adopt.index(str(tmp_path), decode=False)
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
        (bomb, "images of more than 134217728 pixels"),
        (other_size, "but the index says"),
    ],
)
def test_an_index_that_contradicts_its_tar_is_told(
    packed: Path, change: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    manifest = read_manifest(packed)
    records = np.load(packed / "shard-000000.index.npy")
    assert records.dtype == RECORD
    buffer = BytesIO()
    np.save(buffer, change(records))
    (packed / "shard-000000.index.npy").write_bytes(buffer.getvalue())
    first = dataclasses.asdict(manifest.shards[0])
    first |= {"index_bytes": len(buffer.getvalue()), "index_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    forged = Manifest.of(manifest.classes, [Shard(**first), manifest.shards[1]])
    (packed / "manifest.json").write_text(forged.model_dump_json())
    (fault,) = verify(packed, deep=True)
    assert fault.shard == "shard-000000.tar"
    assert reason in fault.reason


def test_workers_do_not_change_what_is_found(packed: Path) -> None:
    overwrite(packed / "shard-000000.tar", 700, b"????")
    (packed / "shard-000001.tar").unlink()
    assert verify(packed, workers=2) == verify(packed)
    assert len(verify(packed)) == 2
