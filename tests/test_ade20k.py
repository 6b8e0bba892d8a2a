"""Label maps: packed whole and checked, read back as they were, refused by name where they are wrong."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.commands import shards as shards_command
from pipeline.errors import InputError
from pipeline.pictures.palette import colourise, palette
from pipeline.shards import ade20k, images, public_datasets
from pipeline.shards.bad_samples import read_skipped
from pipeline.shards.images import BadImageError, decode_map
from pipeline.shards.index import (
    ANNOTATED_RECORD,
    CorruptSampleError,
    ShardSet,
)
from pipeline.shards.manifest import EXTENSIONS, Annotations, Manifest, Shard, read_manifest
from pipeline.shards.pack import pack
from pipeline.shards.show_dataset import format_summary, show_dataset
from pipeline.shards.store import Cache
from pipeline.shards.verify import verify
from tests.in_process import run
from tests.ranks import PATIENCE_S, ROOT
from tests.servers import FaultyServer

CLASSES = ["wall", "building, edifice", "windowpane, window"]
TABLE = (
    "Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n2\t0.1072\t6046\t612\tbuilding, edifice\n"
    "3\t0.0198\t4688\t460\twindowpane, window \n"
)
Damage = Callable[[Path, Path], object]


def encoded(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    """ROOT of six training images of various sizes, whose maps hold 0, all classes and 255, and of two others."""
    root, rng = tmp_path / "ade", np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 2)):
        for number in range(count):
            picture, labels = paths(root, number, split)
            picture.parent.mkdir(parents=True, exist_ok=True)
            labels.parent.mkdir(parents=True, exist_ok=True)
            height, width = 40 + 4 * number, 64
            picture.write_bytes(encoded(rng.integers(0, 255, (height, width, 3), np.uint8), "JPEG"))
            blocks = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (height // 4, width // 4))
            blocks[0, :5] = 0, 1, 2, 3, 255
            labels.write_bytes(encoded(np.kron(blocks, np.ones((4, 4), np.uint8))))
    (root / "objectInfo150.txt").write_text(TABLE)
    return root


def paths(root: Path, number: int, split: str = "training") -> tuple[Path, Path]:
    name = f"ADE_{split[:5]}_{number:08d}"
    return root / f"images/{split}/{name}.jpg", root / f"annotations/{split}/{name}.png"


def maps(root: Path) -> Path:
    return root / "annotations/training"


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(shards: ShardSet) -> dict[str, tuple[bytes, bytes]]:
    return {
        shards.key(shard, row): (shards.read(shard, row), shards.read_annotation(shard, row))
        for shard, count in enumerate(shards.shard_samples)
        for row in range(count)
    }


# At rest


def test_images_and_label_maps_are_packed_unchanged(ade: Path, tmp_path: Path) -> None:
    manifest = pack(ade20k.find(maps(ade)), tmp_path / "out", samples_per_shard=4)
    assert manifest.annotations == "semantic"
    assert manifest.classes == CLASSES
    shards = ShardSet(tmp_path / "out")
    assert shards.annotations == "semantic"
    expected = {}
    for number in range(6):
        picture, labels = paths(ade, number)
        expected[picture.stem] = picture.read_bytes(), labels.read_bytes()
    assert samples(shards) == expected
    records = shards.records(np.array([0, 1]), np.array([3, 1]))
    assert records.dtype == ANNOTATED_RECORD == shards.index(0).dtype
    assert (records["label"] == 0).all()


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_readable_by_tarfile_and_webdataset(ade: Path, tmp_path: Path) -> None:
    pack(ade20k.find(maps(ade)), tmp_path / "out")
    tar = tmp_path / "out/shard-000000.tar"
    with tarfile.open(tar) as members:
        names = [member.name for member in members]
    assert [name.partition(".")[2] for name in names] == ["jpg", "seg.png"] * 6
    assert [name.partition(".")[0] for name in names[::2]] == [name.partition(".")[0] for name in names[1::2]]
    read = webdataset.WebDataset(str(tar), shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    found = {sample["__key__"]: (sample["jpg"], sample["seg.png"]) for sample in read}
    assert found == samples(ShardSet(tmp_path / "out"))


def test_packed_bytes_are_independent_of_worker_count(ade: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        out = tmp_path / str(workers)
        pack(ade20k.find(maps(ade)), out, samples_per_shard=2, max_side=48, workers=workers)
    assert listing(tmp_path / "1") == listing(tmp_path / "2")
    assert len(list((tmp_path / "1").glob("*.tar"))) == 3


def test_manifest_digest_covers_annotation_kind() -> None:
    shards = [Shard("shard-000000", 1, 2, "3" * 64, 4, "5" * 64)]
    plain, annotated = Manifest.of(["a"], shards), Manifest.of(["a"], shards, annotations="semantic")
    assert annotated.digest != plain.digest
    # As every manifest before there were annotations.
    assert plain.digest == hashlib.sha256(b'["a"]\nshard-000000 1 2 %s 4 %s' % (b"3" * 64, b"5" * 64)).hexdigest()
    assert list(json.loads(plain.encode())) == ["format", "classes", "shards", "samples", "digest", "tars"]
    assert json.loads(annotated.encode())["annotations"] == "semantic"


def test_manifest_with_edited_annotations_is_rejected(ade: Path, tmp_path: Path) -> None:
    pack(ade20k.find(maps(ade)), tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    path.write_text(path.read_text().replace('"semantic"', "null"))
    with pytest.raises(InputError, match="it was edited"):
        read_manifest(tmp_path / "out")


def test_mixing_labelled_and_annotated_shards_is_rejected(ade: Path, digits: Path, tmp_path: Path) -> None:
    classes = read_manifest(digits / "val").classes
    (ade / "objectInfo150.txt").unlink()
    pack(ade20k.find(maps(ade), classes=classes), tmp_path / "out")
    with pytest.raises(InputError, match=r"has labelled images and .*out images with label maps"):
        ShardSet(tmp_path / "out", digits / "val")


def test_scaled_label_maps_stay_aligned_with_images(tmp_path: Path) -> None:
    """A picture whose colour says its class; both are scaled by a factor that is no whole number."""
    root = tmp_path / "ade"
    picture, labels = paths(root, 0)
    picture.parent.mkdir(parents=True)
    labels.parent.mkdir(parents=True)
    value = np.kron(1 + 2 * (np.indices((6, 10)).sum(0) % 2), np.ones((15, 15))).astype(np.uint8)
    picture.write_bytes(encoded(np.where(value[..., None] == 3, 255, 0).astype(np.uint8).repeat(3, 2)))
    labels.write_bytes(encoded(value))
    (root / "objectInfo150.txt").write_text(TABLE)
    pack(ade20k.find(maps(root)), tmp_path / "out", max_side=64)
    shards = ShardSet(tmp_path / "out")
    seen, small = np.asarray(images.decode(shards.read(0, 0)).convert("L")), decode_map(shards.read_annotation(0, 0))
    assert seen.shape == small.shape == (38, 64)
    assert set(np.unique(small)) == {1, 3}
    decided = np.abs(seen.astype(int) - 127) > 64
    assert decided.mean() > 0.8
    assert ((seen > 127) == (small == 3))[decided].all()


def test_cli_packs_and_verifies_ade20k(ade: Path, tmp_path: Path) -> None:
    done = run(shards_command.main, "pack", "--ade20k", maps(ade), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["samples"], result["classes"], result["num_skipped"]) == (6, 3, 0)
    assert result["digest"] == read_manifest(tmp_path / "out").digest
    done = run(shards_command.main, "verify", "--deep", tmp_path / "out")
    assert json.loads(done.stdout) == {"data": str(tmp_path / "out"), "ok": True, "faults": []}
    done = run(shards_command.main, "pack", "--out", tmp_path / "other")
    assert done.returncode == 2
    assert "give --images SOURCE, or --ade20k" in done.stderr


# Maps


def test_label_maps_decode_from_grey_and_palette_png() -> None:
    values = np.random.default_rng(0).integers(0, 256, (30, 50), np.uint8)
    assert (decode_map(encoded(values)) == values).all()
    for colours in (4, 256):  # which PNG stores as 2 and 8 bits
        indices = (values % np.uint16(colours)).astype(np.uint8)
        image = Image.fromarray(indices)
        image.putpalette(np.random.default_rng(1).integers(0, 256, 3 * colours).tolist())
        assert image.mode == "P"
        buffer = BytesIO()
        image.save(buffer, "PNG", bits=8 if colours == 256 else 2)
        assert (decode_map(buffer.getvalue()) == indices).all()
    assert decode_map(encoded(values)).flags.writeable  # torch warns of others


GREY_4_BITS = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x02\0\0\0\x01\x04\0\0\0\0"
    + zlib.crc32(b"IHDR\0\0\0\x02\0\0\0\x01\x04\0\0\0\0").to_bytes(4)
    + len(packed := zlib.compress(b"\0\x12")).to_bytes(4)
    + b"IDAT"
    + packed
    + zlib.crc32(b"IDAT" + packed).to_bytes(4)
    + b"\0\0\0\0IEND\xaeB`\x82"
)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(np.zeros((4, 4), np.uint16)), "not a PNG of 16 bits in PIL's mode I;16"),
        (encoded(np.zeros((4, 4, 3), np.uint8)), "not a PNG of 8 bits in PIL's mode RGB"),
        (encoded(np.zeros((4, 4), bool)), "not a PNG of 1 bits in PIL's mode 1"),
        (encoded(np.zeros((4, 4), np.uint8), "JPEG"), "not a JPEG"),
        (GREY_4_BITS, "not a PNG of 4 bits in PIL's mode L"),
        (encoded(np.zeros((4, 4), np.uint8))[:-20], "not laid out as the format wants"),
        (b"", "empty"),
    ],
)
def test_invalid_label_map_is_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_map(data)


def test_palette_colours_are_distinct() -> None:
    colours = palette(150).astype(int)
    assert palette(150).dtype == np.uint8
    assert (palette(10) == colours[:10]).all()
    distances = np.abs(np.vstack([colours, [[0, 0, 0], [255, 255, 255]]])[:, None] - colours).sum(-1)
    assert np.sort(distances, axis=1)[:150, 1].min() >= 17
    few = np.abs(colours[:12, None] - colours[:12]).sum(-1)
    assert few[few > 0].min() > 100
    picture = np.asarray(colourise(np.array([[0, 149, 150, 255]], np.uint8), 150))
    assert picture.tolist() == [[colours[0].tolist(), colours[149].tolist(), [0, 0, 0], [0, 0, 0]]]


# Bad input


def with_value(picture: Path, labels: Path) -> None:
    values = np.ones((52, 64), np.uint8)
    values[7, 9] = 4
    labels.write_bytes(encoded(values))


@pytest.mark.parametrize(
    ("damage", "is_map", "reason"),
    [
        (with_value, True, r"the value 4 at x 9, y 7; a pixel's value is 0, no label; 1 … 3, a class; or 255"),
        (
            lambda _, labels: labels.write_bytes(encoded(np.ones((52, 63), np.uint8))),
            True,
            "63 × 52 pixels, but its image has 64 × 52",
        ),
        (lambda _, labels: labels.write_bytes(encoded(np.ones((52, 64), np.uint16))), True, "PIL's mode I;16"),
        (lambda _, labels: labels.write_bytes(encoded(np.ones((52, 64, 3), np.uint8))), True, "PIL's mode RGB"),
        (lambda _, labels: os.truncate(labels, labels.stat().st_size // 2), True, "not laid out as the format wants"),
        (lambda _, labels: os.truncate(labels, 0), True, "empty"),
        (lambda _, labels: labels.unlink(), False, "has no map of its name in .*annotations/training"),
        (lambda picture, _: picture.unlink(), True, "has no image of its name in .*images/training"),
        (lambda picture, _: os.truncate(picture, 500), False, "not a readable image: Truncated"),
        (lambda _, labels: (labels.unlink(), labels.symlink_to("nowhere")), True, "cannot be read: No such file"),
    ],
)
def test_bad_image_map_pairs_are_rejected_or_skipped(
    ade: Path, tmp_path: Path, damage: Damage, is_map: bool, reason: str
) -> None:
    damage(*paths(ade, 3))
    with pytest.raises(InputError, match=reason) as error:
        pack(ade20k.find(maps(ade)), tmp_path / "out")
    path = str(paths(ade, 3)[is_map])
    assert path in str(error.value)
    assert not (tmp_path / "out").exists()
    manifest = pack(ade20k.find(maps(ade)), tmp_path / "out", skip_bad=True)
    assert manifest.samples == 5
    (skipped,) = read_skipped(tmp_path / "out")
    assert (skipped["path"], skipped["key"]) == (path, "ADE_train_00000003")
    assert not verify(tmp_path / "out", deep=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "objectInfo150.txt: no such file, which names the classes"),
        ("", "names columns, Idx and Name among them"),
        ("1\twall\n2\tdoor\n", "names columns, Idx and Name among them"),
        ("Idx\tName\n", "names no classes"),
        ("Idx\tName\n1\twall\n3\tdoor\n", "expected Idx 2 and a Name of its own"),
        ("Idx\tName\n1\twall\n2\twall\n", "expected Idx 2 and a Name of its own"),
        ("Idx\tName\n1\n", "expected Idx 1 and a Name of its own"),
        ("Idx\tName\n" + "".join(f"{n}\tclass {n}\n" for n in range(1, 256)), "255 classes; maps of 8 bits hold 254"),
    ],
)
def test_invalid_class_table_is_rejected(ade: Path, text: str | None, reason: str) -> None:
    (ade / "objectInfo150.txt").unlink()
    if text is not None:
        (ade / "objectInfo150.txt").write_text(text)
    with pytest.raises(InputError, match=reason):
        ade20k.find(maps(ade))


def test_label_maps_support_254_classes(ade: Path, tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(1, 255)]
    (ade / "objectInfo150.txt").unlink()
    height, width = decode_map(paths(ade, 0)[1].read_bytes()).shape
    values = (np.arange(height * width) % 256).astype(np.uint8).reshape(height, width)
    paths(ade, 0)[1].write_bytes(encoded(values))
    pack(ade20k.find(maps(ade), classes=names), tmp_path / "out")
    assert (decode_map(samples(ShardSet(tmp_path / "out"))["ADE_train_00000000"][1]) == values).all()


def test_mismatched_classes_are_rejected(ade: Path) -> None:
    with pytest.raises(InputError, match="3 classes, but --classes-from has 4, and value 2 means 'building, edifice'"):
        ade20k.find(maps(ade), classes=["wall", "door", "window", "sky"])
    assert ade20k.find(maps(ade), classes=CLASSES).classes == CLASSES


def test_images_folder_is_required_outside_standard_layout(ade: Path, tmp_path: Path) -> None:
    (ade / "annotations").rename(tmp_path / "maps")
    with pytest.raises(InputError, match=r"expected ROOT/annotations/SPLIT; .* give --images"):
        ade20k.find(tmp_path / "maps/training")
    found = ade20k.find(tmp_path / "maps/training", ade / "images/training", CLASSES)
    assert len(found.entries) == 6
    with pytest.raises(InputError, match="no such folder"):
        ade20k.find(ade / "annotations/testing")
    (tmp_path / "maps/training/ADE_train_00000000.txt").touch()
    for path in (tmp_path / "maps/training").glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match="no label maps"):
        ade20k.find(tmp_path / "maps/training", ade / "images/training", CLASSES)


# Damage to shards


def test_damaged_label_map_is_rejected_on_read_and_found_by_verify(ade: Path, tmp_path: Path) -> None:
    pack(ade20k.find(maps(ade)), tmp_path / "out")
    shards, tar = ShardSet(tmp_path / "out"), tmp_path / "out/shard-000000.tar"
    original, rng = tar.read_bytes(), np.random.default_rng(0)
    for row, record in enumerate(shards.index(0)):
        place = int(record["annotation_offset"]) + int(rng.integers(record["annotation_size"]))
        with tar.open("r+b") as file:
            file.seek(place)
            file.write(bytes([original[place] ^ 1 << int(rng.integers(8))]))
        with pytest.raises(CorruptSampleError, match="its annotation's bytes do not match their checksum"):
            shards.read_annotation(0, row)
        assert shards.read(0, row)
        (fault,) = verify(tmp_path / "out")
        assert (fault.key, fault.reason) == (shards.key(0, row), "its annotation does not match its checksum")
        tar.write_bytes(original)
    assert not verify(tmp_path / "out", deep=True)


def write_set(folder: Path, image: bytes, annotation: bytes, kind: Annotations = "semantic", **changes: int) -> Path:
    """A data set of one sample whose digests and checksums are right, whatever the sample is."""
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for name, data in (("a.jpg", image), (f"a.{EXTENSIONS[kind]}", annotation)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    size = images.header(image)
    second = 512 + -(-len(image) // 512) * 512 + 512
    record = np.zeros(1, ANNOTATED_RECORD)
    record[0] = (0, 512, len(image), 0, size.height, size.width, zlib.crc32(image), *(second, len(annotation)), 0)
    record["annotation_crc32"] = zlib.crc32(annotation)
    for name, value in changes.items():
        record[name] = value
    np.save(folder / "shard-000000.index.npy", record)
    tar, index = (folder / f"shard-000000.{part}" for part in ("tar", "index.npy"))
    digests = [(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for path in (tar, index)]
    manifest = Manifest.of(CLASSES, [Shard("shard-000000", 1, *digests[0], *digests[1])], annotations=kind)
    (folder / "manifest.json").write_bytes(manifest.encode())
    return folder


PICTURE = encoded(np.zeros((20, 30, 3), np.uint8), "JPEG")


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (encoded(np.full((20, 30), 3, np.uint8)), None),
        (encoded(np.full((20, 30), 4, np.uint8)), "its map has the value 4 at x 0, y 0"),
        (encoded(np.full((30, 20), 3, np.uint8)), "its map has 20 × 30 pixels, but its image 30 × 20"),
        (encoded(np.full((20, 30), 3, np.uint16)), "its annotation: a label map is a PNG of 8-bit"),
        (b"hello", "its annotation: not an image"),
    ],
)
def test_deep_verify_checks_label_maps(tmp_path: Path, annotation: bytes, reason: str | None) -> None:
    data = write_set(tmp_path / "data", PICTURE, annotation)
    assert not verify(data)
    faults = verify(data, deep=True)
    assert [fault.key for fault in faults] == ["a"] * bool(reason)
    assert all(reason in fault.reason for fault in faults if reason)
    if (reason and "pixels" in reason) or annotation == b"hello":
        with pytest.raises(CorruptSampleError, match="its map is no PNG of 30 × 20 pixels"):
            ShardSet(data).read_annotation(0, 0)


def test_verify_reports_overlapping_samples_in_index(tmp_path: Path) -> None:
    data = write_set(tmp_path / "data", PICTURE, encoded(np.ones((20, 30), np.uint8)), annotation_offset=600)
    (fault,) = verify(data)
    assert "its index is wrong: samples overlap" in fault.reason


# Straight from a folder


def pack_in_background(ade: Path, cache: Path) -> subprocess.Popen[str]:
    script = (
        "import sys; from pathlib import Path; from pipeline import log; "
        "from pipeline.shards.public_datasets import packed; log.configure(); "
        "print(packed(sys.argv[1], Path(sys.argv[2])))"
    )
    arguments = [sys.executable, "-c", script, str(maps(ade)), str(cache)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_concurrent_processes_pack_folder_once(ade: Path, tmp_path: Path) -> None:
    running = [pack_in_background(ade, tmp_path / "cache") for _ in range(3)]
    results = [process.communicate(timeout=PATIENCE_S) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    (root,) = {Path(out.strip()) for out, _ in results}
    assert sum("packing it into" in errors for _, errors in results) == 1
    pack(ade20k.find(maps(ade)), tmp_path / "out")
    assert listing(root) == listing(tmp_path / "out")
    before = root.stat()
    assert public_datasets.packed(maps(ade), tmp_path / "cache") == root
    assert os.path.samestat(before, root.stat())


@pytest.mark.parametrize("change", ["content", "name", "removed", "classes"])
def test_changed_folder_is_packed_again(ade: Path, tmp_path: Path, change: str) -> None:
    first = public_datasets.packed(maps(ade), tmp_path / "cache")
    before = listing(first)
    picture, labels = paths(ade, 2)
    if change == "content":
        labels.write_bytes(encoded(np.ones((48, 64), np.uint8)))
    elif change == "name":
        picture.rename(picture.with_stem("new"))
        labels.rename(labels.with_stem("new"))
    elif change == "removed":
        picture.unlink()
        labels.unlink()
    else:
        (ade / "objectInfo150.txt").write_text(TABLE.replace("wall", "fence"))
    second = public_datasets.packed(maps(ade), tmp_path / "cache")
    assert second != first
    assert read_manifest(second).digest != read_manifest(first).digest
    assert listing(first) == before


def test_killed_packing_is_completed_by_next_call(ade: Path, tmp_path: Path) -> None:
    process = pack_in_background(ade, tmp_path / "cache")
    while process.poll() is None and not list((tmp_path / "cache").glob(".ade20k-*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    root = public_datasets.packed(maps(ade), tmp_path / "cache")
    assert not verify(root, deep=True)
    assert not list((tmp_path / "cache").glob(".ade20k-*"))


def test_bad_folder_is_rejected_and_leaves_no_output(ade: Path, tmp_path: Path) -> None:
    with_value(*paths(ade, 3))
    for _ in range(2):
        with pytest.raises(InputError, match="the value 4 at x 9, y 7"):
            public_datasets.packed(maps(ade), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_default_cache_folder_is_private(ade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = public_datasets.packed(maps(ade))
    assert root.parent == tmp_path / f"pvt-shards-{os.getuid()}"
    assert root.parent.stat().st_mode & 0o077 == 0


def test_is_ade20k_recognises_annotation_folders(ade: Path, tmp_path: Path) -> None:
    assert ade20k.is_ade20k(maps(ade))
    assert ade20k.is_ade20k(f"{maps(ade)}/")
    assert not ade20k.is_ade20k(ade)
    assert not ade20k.is_ade20k("https://host/annotations/training")
    pack(ade20k.find(maps(ade)), tmp_path / "annotations/packed")
    assert not ade20k.is_ade20k(tmp_path / "annotations/packed")


# From afar


def test_remote_label_maps_are_read_through_cache(ade: Path, tmp_path: Path) -> None:
    pack(ade20k.find(maps(ade)), tmp_path / "out", samples_per_shard=4)
    expected = samples(ShardSet(tmp_path / "out"))
    with FaultyServer(tmp_path / "out") as server:
        cache = Cache(tmp_path / "cache", 1 << 30)
        shards = ShardSet(server.url, cache=cache)
        assert samples(shards) == expected
        assert len(server.gets(".tar")) == 2  # each shard once
        shutil.rmtree(tmp_path / "cache")
        cache = Cache(tmp_path / "cache", 0)  # with room for nothing
        server.spoil("flip", match=".tar")
        shards = ShardSet(server.url, cache=cache)
        assert shards.read_annotation(0, 0) == expected[ShardSet(tmp_path / "out").key(0, 0)][1]
        server.spoil("flip", times=100, match=".tar")
        with pytest.raises(CorruptSampleError, match="its annotation's bytes"):
            shards.read_annotation(0, 1)
        shards.close()


# Shown


def test_show_reports_pixel_share_of_each_class(ade: Path, tmp_path: Path) -> None:
    pack(ade20k.find(maps(ade)), tmp_path / "out")
    summary = show_dataset(tmp_path / "out", tmp_path / "sheet.png")
    values = np.concatenate([np.asarray(Image.open(paths(ade, number)[1])).ravel() for number in range(6)])
    counts = {name: int((values == value).sum()) for value, name in enumerate(CLASSES, 1)}
    assert summary["maps_read"] == 6
    assert summary["labelled_share"] == pytest.approx(sum(counts.values()) / len(values))
    shares = {name: count / sum(counts.values()) for name, count in counts.items()}
    assert summary["largest_classes"] == pytest.approx(shares)
    assert summary["smallest_classes"] == {}
    assert list(summary["largest_classes"]) == sorted(counts, key=lambda name: -counts[name])
    assert f"{summary['labelled_share']:.1%} of the pixels of 6 maps have a class" in format_summary(summary)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)
    for colour in palette(3):
        assert (pixels == colour).all(axis=1).sum() > 1000


def test_show_skips_damaged_label_map(ade: Path, tmp_path: Path) -> None:
    pack(ade20k.find(maps(ade)), tmp_path / "out")
    record = ShardSet(tmp_path / "out").index(0)[1]
    with (tmp_path / "out/shard-000000.tar").open("r+b") as file:
        file.seek(int(record["annotation_offset"]))
        file.write(b"damage")
    assert show_dataset(tmp_path / "out", tmp_path / "sheet.png")["maps_read"] == 5
