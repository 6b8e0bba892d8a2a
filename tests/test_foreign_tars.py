"""Tars of others are packed to the same images as a tree of them, or refused all together, with the line to type."""

import bz2
import gzip
import io
import json
import lzma
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.commands import shards as shards_command
from pipeline.errors import InputError
from pipeline.shards import foreign_tars, image_sources, own_images, public_datasets
from pipeline.shards.bad_samples import read_skipped
from pipeline.shards.index import ShardSet
from pipeline.shards.index_tars import index_tars, packing_line
from pipeline.shards.manifest import Manifest
from pipeline.shards.pack import pack
from pipeline.shards.part_names import USUAL, PartNames
from pipeline.shards.tar import Reader, members
from tests.damage import Damage, Member, build, tar_of
from tests.datasets import contents
from tests.ranks import PATIENCE_S
from tests.servers import FaultyServer

CLASSES = ["cat", "dog"]
NUM_SAMPLES = 8

# webdataset leaves closing its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def encode(number: int, format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (20 + number % 7, 24, 3), np.uint8)
    buffer = io.BytesIO()
    # Lossless, so that pixels can be compared whatever the format.
    Image.fromarray(pixels).save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    return buffer.getvalue()


def parts(number: int, image: str = "jpg", label: str = "cls") -> list[Member]:
    format = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP"}[image.rpartition(".")[2]]
    key = f"{number:05d}"
    return [
        Member(f"{key}.{image}", encode(number, format)),
        Member(f"{key}.{label}", CLASSES[number % 2].encode()),
    ]


def all_parts(**names: str) -> list[Member]:
    return [part for number in range(NUM_SAMPLES) for part in parts(number, **names)]


@pytest.fixture
def from_tree(tmp_path: Path) -> Callable[..., dict[str, tuple[str, bytes]]]:
    """Packs the same images from class folders, and returns their contents by the number of the sample."""

    def make(format: str = "JPEG", **options: Any) -> dict[str, tuple[str, bytes]]:
        tree = tmp_path / "tree" / format
        for number in range(NUM_SAMPLES):
            path = tree / CLASSES[number % 2] / f"{number:05d}.{format.lower()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(number, format))
        if not (tmp_path / f"from-tree-{format}").exists():
            pack(tree, tmp_path / f"from-tree-{format}", **options)
        return by_number(tmp_path / f"from-tree-{format}")

    return make


def by_number(root: Path) -> dict[str, tuple[str, bytes]]:
    return {key.rpartition("/")[2]: sample for key, sample in contents(root).items()}


def pack_tars(
    urls: Path | Sequence[str],
    out: Path,
    names: PartNames = USUAL,
    classes: list[str] | None = None,
    workers: int = 1,
    **options: Any,
) -> Manifest:
    urls = [str(urls)] if isinstance(urls, Path) else urls
    return pack(foreign_tars.find(urls, names, classes, workers), out, workers=workers, **options)


# Sources


def with_arrow(kind: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, kind) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESSIONS = {
    "tar": bytes,
    "tgz": gzip.compress,
    "tar.gz": lambda data: gzip.compress(data[:5000]) + gzip.compress(data[5000:]),
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": with_arrow("zstd"),
    "tar.lz4": with_arrow("lz4"),
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_tars_are_packed_as_a_tree(tmp_path: Path, suffix: str, from_tree: Any) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(COMPRESSIONS[suffix](tar_of(all_parts())))
    assert pack_tars(tmp_path / f"x.{suffix}", tmp_path / "out").classes == CLASSES
    assert by_number(tmp_path / "out") == from_tree()
    assert contents(tmp_path / "out").keys() == {f"x/{number:05d}" for number in range(NUM_SAMPLES)}


@pytest.mark.parametrize("image", ["webp", "bmp", "png", "JPEG"])
def test_images_of_other_formats_are_converted_as_those_of_a_tree(tmp_path: Path, image: str, from_tree: Any) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(all_parts(image=image)))
    pack_tars(tmp_path / "x.tar", tmp_path / "out", quality=95)
    assert by_number(tmp_path / "out") == from_tree(image.upper(), quality=95)


def test_tars_of_webdatasets_writer_are_packed_and_indexed(tmp_path: Path, from_tree: Any) -> None:
    """Hubs distribute shards with .jpg, .cls and .json, which can be indexed and packed alike."""
    (tmp_path / "hub").mkdir()
    pattern = str(tmp_path / "hub" / "imagenet1k-train-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=3) as sink:  # pyright: ignore[reportAttributeAccessIssue]
        for number in range(NUM_SAMPLES):
            fields = {"label": number % 2, "filename": f"{number}.JPEG"}
            sink.write({"__key__": f"{number:05d}", "jpg": encode(number), "cls": number % 2, "json": fields})
    expected = from_tree()
    pack_tars([f"{tmp_path}/hub/imagenet1k-train-{{0000..0002}}.tar"], tmp_path / "out", classes=CLASSES)
    assert by_number(tmp_path / "out") == expected
    for urls in (
        [str(tmp_path / "hub")],
        [f"{tmp_path}/hub/*-000[01].tar", f"{tmp_path}/hub/imagenet1k-train-0002.tar"],
    ):
        assert len(foreign_tars.find(urls, USUAL, None, 1).entries) == NUM_SAMPLES
    index_tars(str(tmp_path / "hub"), tmp_path / "indexed", classes=CLASSES)
    assert {label for label, _ in contents(tmp_path / "indexed").values()} == set(CLASSES)
    assert {key: data for key, (_, data) in contents(tmp_path / "indexed").items()} == {
        key: data for key, (_, data) in expected.items()
    }


def test_members_far_apart_and_links_are_packed_as_a_tree(tmp_path: Path, from_tree: Any) -> None:
    """All images behind all labels; the last four samples are links to images and labels of the first."""
    images = [parts(number)[0] for number in range(NUM_SAMPLES)]
    labels = [parts(number)[1] for number in range(NUM_SAMPLES)]
    images += [
        Member("a/10.jpg", type=tarfile.LNKTYPE, link="00000.jpg"),
        Member("a/11.jpg", type=tarfile.SYMTYPE, link="../00001.jpg"),
        Member("a/12.jpg", type=tarfile.SYMTYPE, link="11.jpg"),
        Member("a/13.jpg", type=tarfile.LNKTYPE, link="./00003.jpg"),
    ]
    labels += [
        Member(f"a/{number}.cls", type=tarfile.LNKTYPE, link=f"0000{number % 10}.cls") for number in range(10, 14)
    ]
    # A symbolic link may come before what it leads to.
    images.insert(0, images.pop(NUM_SAMPLES + 1))
    (tmp_path / "x.tar").write_bytes(tar_of([*labels, *images]))
    pack_tars(tmp_path / "x.tar", tmp_path / "out", samples_per_shard=3)
    expected = from_tree()
    expected |= {"10": expected["00000"], "11": expected["00001"], "13": expected["00003"]}
    expected["12"] = expected["10"][0], expected["11"][1]
    assert by_number(tmp_path / "out") == expected
    lost = [Member("b.jpg", type=tarfile.SYMTYPE, link="/etc/passwd"), Member("b.cls", b"cat")]
    (tmp_path / "x.tar").write_bytes(tar_of([*labels, *images, *lost]))
    with pytest.raises(
        InputError, match=r"x.tar#b: its jpg part is a link to '/etc/passwd', which is none of this tar"
    ):
        pack_tars(tmp_path / "x.tar", tmp_path / "again")


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_are_packed_as_what_they_contain(tmp_path: Path, format: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(buffer, "BMP")
    for number in range(2):
        folder = tmp_path / "tree" / CLASSES[number]
        folder.mkdir(parents=True)
        with (folder / "black.bmp").open("wb") as file:
            file.write(buffer.getvalue()[:100])
            file.truncate(len(buffer.getvalue()))
    tar = tmp_path / "x.tar"
    subprocess.run(["tar", f"--format={format}", "-S", "-cf", tar, "-C", tmp_path / "tree", *CLASSES], check=True)
    with tar.open("rb") as file:
        found = {member.name: (member.kind, member.whole_size) for member in members(Reader(file)) if member.size}
    assert found == {f"{name}/black.bmp": ("sparse", len(buffer.getvalue())) for name in CLASSES}
    pack_tars(tar, tmp_path / "out", quality=90)
    pack(tmp_path / "tree", tmp_path / "from-tree", quality=90)
    assert contents(tmp_path / "out") == {
        f"x/{key}": sample for key, sample in contents(tmp_path / "from-tree").items()
    }


def test_huge_sparse_member_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "a.cls").write_text("cat")
    subprocess.run(["tar", "-S", "-cf", "x.tar", "a.jpg", "a.cls"], check=True, cwd=tmp_path)
    with pytest.raises(InputError, match=r"x.tar#a: its image has more than 1,073,741,824 bytes"):
        pack_tars(tmp_path / "x.tar", tmp_path / "out")


def test_equal_keys_in_different_tars_are_different_samples(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(tar_of(parts(0) + parts(1)))
    pack_tars([f"{tmp_path}/{{a,b}}/x.tar"], tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {f"{folder}/x/0000{number}" for folder in "ab" for number in range(2)}
    shutil.copy(tmp_path / "a/x.tar", tmp_path / "a/x.tar.gz")
    with pytest.raises(InputError, match=r"a/x.tar and .*a/x.tar.gz would give the same keys: name only one"):
        pack_tars(tmp_path / "a", tmp_path / "again")


def test_folders_are_classes_where_there_are_no_labels(tmp_path: Path, from_tree: Any) -> None:
    expected = from_tree()
    subprocess.run(["tar", "-czf", "../../x.tar.gz", "."], check=True, cwd=tmp_path / "tree/JPEG")
    pack_tars(tmp_path / "x.tar.gz", tmp_path / "out")
    assert by_number(tmp_path / "out") == expected


def test_tars_of_stores_are_packed_and_signatures_kept_secret(
    tmp_path: Path, from_tree: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = from_tree()
    data = tar_of(all_parts())
    (tmp_path / "web").mkdir()
    for number in range(2):
        half = all_parts()[NUM_SAMPLES * number : NUM_SAMPLES * (number + 1)]
        (tmp_path / "web" / f"x-{number}.tar").write_bytes(tar_of(half))
    fsspec.filesystem("memory").pipe("/foreign/deep/x.tar", data)
    pack_tars(["memory://foreign/deep"], tmp_path / "memory")
    assert by_number(tmp_path / "memory") == expected
    with FaultyServer(tmp_path / "web") as server:
        pack_tars([f"{server.url}/x-{{0..1}}.tar?sig=s3cret"], tmp_path / "http")
        assert by_number(tmp_path / "http") == expected
        with pytest.raises(InputError, match=r"x-2.tar: no such file") as error:
            pack_tars([f"{server.url}/x-{{0..2}}.tar?sig=s3cret"], tmp_path / "again")
    assert "s3cret" not in str(error.value) + "".join(capsys.readouterr())


def test_pipe_is_run_for_people_and_never_for_a_configuration(tmp_path: Path, from_tree: Any) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(all_parts()))
    pack_tars([f"pipe:cat {tmp_path}/x.tar"], tmp_path / "out")
    assert by_number(tmp_path / "out") == from_tree()
    with pytest.raises(InputError, match="pipe:false: an empty file"):
        pack_tars(["pipe:false"], tmp_path / "again")
    command = f"pipe:touch {tmp_path}/ran"
    assert not public_datasets.is_unpacked(command)
    assert not own_images.is_images(command)
    with pytest.raises(InputError):
        image_sources.find(command)
    with pytest.raises(InputError):
        index_tars(command)
    assert not (tmp_path / "ran").exists()


# Names


def test_members_can_be_named_for_pack_and_index(tmp_path: Path, from_tree: Any) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(all_parts(image="input.jpg", label="output.cls")))
    names = PartNames("input.jpg", ".OUTPUT.cls")
    pack_tars(tmp_path / "x.tar", tmp_path / "out", names)
    assert by_number(tmp_path / "out") == from_tree()
    index_tars(str(tmp_path / "x.tar"), tmp_path / "indexed", labels="output.cls", image="input.jpg")
    assert contents(tmp_path / "indexed") == from_tree()


def with_json(fields: Callable[[int], Any], name: str = "json") -> bytes:
    found = []
    for number in range(NUM_SAMPLES):
        image, _ = parts(number)
        found += [image, Member(f"{number:05d}.{name}", json.dumps(fields(number)).encode())]
    return tar_of(found)


@pytest.mark.parametrize(
    ("name", "label", "fields"),
    [
        ("json", "json:label", lambda number: {"label": CLASSES[number % 2]}),
        ("json", "json:a.b", lambda number: {"a": {"b": CLASSES[number % 2]}, "b": 5}),
        ("json", "json:a.b", lambda number: {"a.b": CLASSES[number % 2]}),
        ("meta.json", "meta.json:a.b.c", lambda number: {"a": {"b": {"c": CLASSES[number % 2]}}}),
    ],
)
def test_labels_inside_json_are_found_by_path(
    tmp_path: Path, from_tree: Any, name: str, label: str, fields: Callable[[int], Any]
) -> None:
    (tmp_path / "x.tar").write_bytes(with_json(fields, name))
    pack_tars(tmp_path / "x.tar", tmp_path / "out", PartNames(label=label))
    assert by_number(tmp_path / "out") == from_tree()
    index_tars(str(tmp_path / "x.tar"), tmp_path / "indexed", labels=label)
    assert contents(tmp_path / "indexed") == from_tree()


def test_missing_members_are_proposed_with_the_line_to_type(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(tar_of(all_parts(image="input.jpg", label="output.cls")))
    found = "found input.jpg, output.cls; as image input.jpg would fit, as label output.cls"
    line = "python launch/shards.py {} --image input.jpg --label output.cls"
    with pytest.raises(InputError) as error:
        pack_tars(tar, tmp_path / "out")
    assert f"{found}:\n  {line.format(f'pack --tars {tar} --out DIR')}" in str(error.value)
    with pytest.raises(InputError) as error:
        index_tars(str(tar))
    assert f"{found}:\n  {line.format(f'index {tmp_path}')}" in str(error.value)
    tar.write_bytes(with_json(lambda number: {"a": {"b": number}, "text": "long " * 20}))
    with pytest.raises(InputError, match=r"found jpg, json:a.b, json:text; as image jpg would fit, as label json:a.b:"):
        pack_tars(tar, tmp_path / "out")
    tar.write_bytes(tar_of([Member("a.txt", b"hello"), Member("a.npy", bytes(9))]))
    with pytest.raises(InputError, match="found txt, npy, and nothing of it looks like an image"):
        pack_tars(tar, tmp_path / "out")


def test_columns_can_be_named_and_are_proposed(tmp_path: Path, from_tree: Any) -> None:
    """The class names are those of the named column."""
    expected = from_tree()
    features = {name: {"names": names} for name, names in (("coarse", ["x", "y"]), ("fine", CLASSES))}
    schema = pa.schema(
        [("img", pa.struct([("bytes", pa.binary())])), ("coarse", pa.int64()), ("fine", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"img": {"bytes": encode(n)}, "coarse": 0, "fine": n % 2} for n in range(NUM_SAMPLES)]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "x.parquet")
    listing = image_sources.find(tmp_path / "x.parquet", None, PartNames("img", "fine"))
    pack(listing, tmp_path / "parquet")
    assert sorted(contents(tmp_path / "parquet").values()) == sorted(expected.values())
    message = (
        r"found img, coarse, fine; as image img would fit, as label coarse or fine:\n.*x.parquet --out DIR --image img"
    )
    with pytest.raises(InputError, match=message):
        image_sources.find(tmp_path / "x.parquet")

    paths = sorted((tmp_path / "tree").rglob("*.jpeg"))
    table = [{"file": str(path), "width": 24, "class": path.parent.name} for path in paths]
    lines = ["file,width,class", *[",".join(map(str, row.values())) for row in table]]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, table)))
    for name in ("list.csv", "list.jsonl"):
        pack(image_sources.find(tmp_path / name, None, PartNames("file", "class")), tmp_path / f"{name}-out")
        assert by_number(tmp_path / f"{name}-out") == expected
        message = rf"as image file would fit, as label class or width:\n.*{name} --out DIR --image file --label class"
        with pytest.raises(InputError, match=message):
            image_sources.find(tmp_path / name, None, PartNames("path", "class"))
    with pytest.raises(InputError, match="class folders have none: remove them"):
        image_sources.find(tmp_path / "tree/JPEG", None, PartNames("img"))


# Bad input


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> Damage:
    return build(tmp_path_factory.mktemp("damage"))


TAKEN = {"compressed", "parts_apart", "link", "bad_label"}
"""What is no damage here, or is judged by all labels together."""


def test_every_kind_of_damage_is_reported_and_the_rest_packed(damage: Damage, tmp_path: Path) -> None:
    # Their maps are none, which nothing but reading them shows.
    for name in list(damage.shard_damage):
        if b"GNU.sparse.major" in (damage.shards / name).read_bytes():
            with pytest.raises(InputError, match=rf"{name}: could be listed and cannot be read: .*: make it again"):
                pack_tars(damage.shards / name, tmp_path / "out", skip_bad=True)
            (damage.shards / name).unlink()
            del damage.shard_damage[name]
            damage.good_keys -= {key for key in damage.good_keys if f"/{name.partition('.')[0]}-" in key}
    with pytest.raises(InputError, match="images that cannot be packed") as error:
        pack_tars(damage.shards, tmp_path / "out")
    assert "and " in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"out-refused.jsonl"}
    pack_tars(damage.shards, tmp_path / "out", skip_bad=True)
    skipped = {str(line["key"]) for line in read_skipped(tmp_path / "out")}
    packed = contents(tmp_path / "out").keys()
    assert not skipped & packed
    for name, kind in damage.shard_damage.items():
        if kind in TAKEN:
            continue
        prefix = name.partition(".")[0]
        for key in damage.bad_keys[name]:
            expected = prefix if key is None else f"{prefix}/{key.replace('.', '_')}"
            # The name of a member that is part of no sample is no key.
            is_stray = kind == "stray_traversal" and any(line.startswith(f"{prefix}/") for line in skipped)
            assert expected in skipped or is_stray, (kind, key)
    # Of two samples of one key nobody knows which is meant; `index` takes the first.
    twice = {
        key for name, kind in damage.shard_damage.items() if kind == "repeated_key" for key in damage.bad_keys[name]
    }
    assert {key.partition("/")[2] for key in packed} >= damage.good_keys - twice


def broken(tmp_path: Path, data: bytes, name: str = "x.tar") -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


GOOD = tar_of(all_parts())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.tar", GOOD[:15_000], "x.tar: cut short behind byte"),
        ("x.tar.gz", gzip.compress(GOOD)[:-2000], "x.tar.gz: Compressed file ended before the end-of-stream marker"),
        ("x.tar.gz", b"\x1f\x8b" + bytes(50), "x.tar.gz: Unknown compression method"),
        ("x.tar.zst", with_arrow("zstd")(GOOD)[:-2000], "x.tar.zst: "),
        ("x.tar", GOOD.replace(b"00001.jpg", b"x0001.jpg"), "x.tar: damaged at byte"),
        ("x.tar", b"", "x.tar: an empty file"),
        ("x.tar", tar_of([]), "x.tar: holds no samples"),
        ("x.tar", tar_of([*all_parts(), Member("1.jpg", b"x")]), r"x.tar#1: has no class"),
        ("x.tar", tar_of([*all_parts(), Member("1.cls", b"cat")]), r"x.tar#1: has no image; it has cls"),
        ("x.tar", tar_of([*all_parts(), *parts(0)]), r"x.tar#00000: a second label of this key"),
        ("x.tar", tar_of([*all_parts(), parts(0, "png")[0]]), r"x.tar#00000: a second image of this key: jpg and png"),
        ("x.tar", tar_of([*all_parts(), Member("../a.jpg")]), r"x.tar#__/a: has the name '../a.jpg', which leads out"),
        ("x.tar", tar_of([*all_parts(), Member("a.cls", b"1 2")]), r"x.tar#a: label '1 2' is several numbers"),
    ],
)
def test_bad_tar_is_rejected_with_its_reason(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(InputError) as error:
        pack_tars(broken(tmp_path, data, name), tmp_path / "out")
    assert message in str(error.value)


def test_what_names_no_tars_of_one_split_is_rejected(tmp_path: Path) -> None:
    for name in ("in1k-train-0.tar", "in1k-validation-0.tar"):
        broken(tmp_path, GOOD, name)
    broken(tmp_path, b"", "list.csv")
    for urls, message in (
        ([f"{tmp_path}/*.tar"], r"several splits, such as .*train-0.tar \(train\), .*validation-0.tar \(validation\)"),
        ([f"{tmp_path}/*.tgz"], "no such tars; * stands for any text, {000..146} for numbers".replace("*", r"\*")),
        ([f"{tmp_path}/list.csv"], "list.csv: neither a folder nor a name of tars"),
        ([f"{tmp_path}/x-{{0..1.tar"], "expected a pattern such as"),
    ):
        with pytest.raises(InputError, match=message):
            foreign_tars.find(urls, USUAL, None, 1)
    with pytest.raises(InputError, match=r"in1k-train-1.tar: no such file"):
        pack_tars([f"{tmp_path}/in1k-train-{{0..1}}.tar"], tmp_path / "out")


def test_numbers_keep_their_value_as_index_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        Member(f"{n}.{part}", encode(n) if part == "jpg" else b"%03d" % (n + 2))
        for n in range(3)
        for part in ("jpg", "cls")
    ]
    broken(tmp_path, tar_of([*found, Member("x.jpg", encode(0)), Member("x.cls", b"-1")]))
    assert pack_tars(tmp_path / "x.tar", tmp_path / "out", skip_bad=True).classes == ["0", "1", "2", "3", "4"]
    assert {key: label for key, (label, _) in contents(tmp_path / "out").items()} == {
        "x/0": "2",
        "x/1": "3",
        "x/2": "4",
    }
    assert [line["reason"] for line in read_skipped(tmp_path / "out")] == ["has no class"]
    index_tars(str(tmp_path), tmp_path / "indexed", skip_bad=True)
    assert ShardSet(tmp_path / "indexed").classes == ShardSet(tmp_path / "out").classes


def test_changed_tar_is_not_taken_for_the_one_that_was_listed(tmp_path: Path) -> None:
    listing = foreign_tars.find([str(broken(tmp_path, GOOD))], USUAL, None, 1)
    for data, message in (
        (tar_of(all_parts()[:6]), "was changed while it was packed"),
        (GOOD[:9000], "cannot be read: "),
    ):
        broken(tmp_path, data)
        with pytest.raises(InputError, match=message):
            pack(listing, tmp_path / "out")
    digest = foreign_tars.find([str(broken(tmp_path, GOOD))], USUAL, None, 1).digest
    os.utime(tmp_path / "x.tar", (1, 1))
    assert digest != foreign_tars.find([str(tmp_path / "x.tar")], USUAL, None, 1).digest


def test_index_names_the_line_that_packs_what_it_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    far = [parts(0)[0], parts(1)[0], parts(1)[1], parts(0)[1]]
    link = [*parts(0), Member("1.jpg", type=tarfile.LNKTYPE, link="00000.jpg"), Member("1.cls", b"cat")]
    for name, data in {
        "webp.tar": tar_of(all_parts(image="webp")),
        "gzip.tar.gz": gzip.compress(GOOD),
        "far.tar": tar_of(far),
        "link.tar": tar_of(link),
    }.items():
        tar = broken(tmp_path, data, name)
        monkeypatch.setattr(sys, "argv", ["shards.py", "index", str(tar)])
        line = f"python launch/shards.py pack --tars {tar} --out DIR"
        if name == "far.tar":
            with pytest.raises(InputError, match=f"if labels lie far from their images, pack the tars: {line}"):
                shards_command.main()
        else:
            assert not shards_command.main()["ok"]
            assert f"can be packed:\n  {line}\n" in capsys.readouterr().err
        monkeypatch.setattr(
            sys, "argv", [*line.split()[1:-1], str(tmp_path / f"{name}-out"), "--quality", "90", "--workers", "1"]
        )
        assert shards_command.main()["samples"] >= 2
        tar.unlink()
    assert packing_line("x", PartNames("a b")) == "python launch/shards.py pack --tars x --out DIR --image 'a b'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tars", "x", "--images", "y"], "--images and --tars both name the images"),
        (["--tars", "x", "--imagenet", "y"], "--imagenet and --tars name data sets of different kinds"),
        (["--imagenet", "x", "--val-fraction", "0.1"], "--val-fraction splits images with a class each"),
        (["--imagenet", "x", "--label", "y"], "--image and --label name columns or members, which --imagenet has none"),
    ],
)
def test_options_that_exclude_each_other_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["shards.py", "pack", *options, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=message):
        shards_command.main()


# Interruptions


def test_killed_pack_of_tars_continues(tmp_path: Path) -> None:
    """Once while images are sorted and once while shards are written: what was done by then is kept."""
    names = []
    for number in range(4):
        found = [part for n in range(25) for part in parts(100 * number + n)]
        # Large enough images that packing takes a while.
        large = [Member(part.name, part.data + bytes(50_000) * part.name.endswith("jpg")) for part in found]
        names.append(str(broken(tmp_path, tar_of(large), f"x-{number}.tar")))
    partial = tmp_path / ".out.partial"
    kept: dict[Path, int] = {}
    for pattern, count in (("*/spill/*.npy", 1), ("*/done/*.json", 4)):
        # A fork, which has imported everything.
        process = multiprocessing.get_context("fork").Process(
            target=pack_tars, args=(names, tmp_path / "out"), kwargs={"samples_per_shard": 5}
        )
        process.start()
        deadline = time.monotonic() + PATIENCE_S
        while len(list(partial.glob(pattern))) < count:
            assert process.is_alive()
            assert time.monotonic() < deadline
        process.kill()
        process.join()
        assert not (tmp_path / "out").exists()
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        kept = {path: path.stat().st_mtime_ns for path in partial.glob("*/spill/*.npy")}
    assert kept
    pack_tars(names, tmp_path / "out", samples_per_shard=5)
    pack_tars(names, tmp_path / "fresh", samples_per_shard=5)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")
    assert not partial.exists()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    """Each worker imports webdataset, which takes seconds."""
    for number in range(3):
        broken(tmp_path, tar_of([part for n in range(5) for part in parts(10 * number + n)]), f"x-{number}.tar")
    for workers in (1, 2):
        pack_tars([f"{tmp_path}/*.tar"], tmp_path / str(workers), workers=workers, samples_per_shard=4)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
