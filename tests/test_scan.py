"""Tars that others made: the same samples as tarfile finds, whoever wrote them, and every fault told."""

import dataclasses
import json
import shutil
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.shards.bad_samples import SampleFault, read_skipped
from pipeline.shards.index import ShardSet, read_manifest
from pipeline.shards.index_tars import index_tars
from pipeline.shards.pack import pack
from pipeline.shards.store import Cache
from pipeline.shards.tar import Reader, TarError, members, padded
from pipeline.shards.verify import verify
from tests.damage import Damage, Member, build, tar_of
from tests.datasets import contents
from tests.servers import FaultyServer

CLASSES = ("n01440764", "n02119022", "été", "猫")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def image_bytes(seed: int, format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed % 9, 30, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Sample:
    key: str
    extension: str
    label: str
    image: bytes


class Streamed(BytesIO):
    """Bytes that are made as they are read."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        super().__init__()
        self._parts, self._rest = parts, b""

    def read(self, size: int | None = -1) -> bytes:
        self._rest = self._rest or next(self._parts, b"")
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def samples(long: int = 0) -> list[Sample]:
    """Of four classes, with nested keys in several scripts, one of them as long as wanted."""
    keys = ["x", "éà", "猫 2", "y" * 60]
    if long:
        keys[3] = "/".join(["y" * 90] * (long // 90 + 1))[:long]
    extensions = ["jpg", "JPEG", "Png", "jpeg"]
    return [
        Sample(
            f"train/{CLASSES[number % 4]}/{number}/{keys[number // 4]}"
            if number // 4 == 3 and long
            else f"train/{CLASSES[number % 4]}/{keys[number // 4]}{number}",
            extensions[number % 4],
            CLASSES[number % 4],
            image_bytes(number, "PNG" if number % 4 == 2 else "JPEG"),
        )
        for number in range(16)
    ]


def write_tree(folder: Path, wanted: list[Sample]) -> None:
    for sample in wanted:
        path = folder / f"{sample.key}.{sample.extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
        (folder / f"{sample.key}.cls").write_text(sample.label)


def expected(wanted: list[Sample]) -> dict[str, tuple[str, bytes]]:
    return {sample.key: (sample.label, sample.image) for sample in wanted}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps remote shards out of the cache that the user of this machine has."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("cache")))


# Writers


def with_tarfile(format: int) -> Callable[[Path, Path, list[Sample]], None]:
    def write(tree: Path, tar: Path, wanted: list[Sample]) -> None:
        parts = [
            Member(f"{sample.key}.{extension}", data)
            for sample in wanted
            for extension, data in ((sample.extension, sample.image), ("cls", sample.label.encode()))
        ]
        tar.write_bytes(tar_of(parts, format))

    return write


def with_command(*command: str) -> Callable[[Path, Path, list[Sample]], None]:
    """A tar program, on the files sorted by name so that the parts of a sample are side by side."""

    def write(tree: Path, tar: Path, wanted: list[Sample]) -> None:
        if shutil.which(command[0]) is None:
            pytest.skip(f"no {command[0]} here")
        names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
        subprocess.run(
            [*command, "-cf", tar, "--no-recursion", "-C", tree, "-T", "-"],
            input="\n".join(names),
            check=True,
            text=True,
        )

    return write


def with_webdataset(tree: Path, tar: Path, wanted: list[Sample]) -> None:
    with webdataset.TarWriter(str(tar)) as sink:  # pyright: ignore[reportAttributeAccessIssue]
        for sample in wanted:
            sink.write({"__key__": sample.key, sample.extension: sample.image, "cls": sample.label, "txt": "a photo"})


WRITERS = {
    **{f"tarfile {name}": with_tarfile(format) for name, format in FORMATS.items()},
    **{f"tar {name}": with_command("tar", f"--format={name}") for name in ("gnu", "pax", "ustar", "posix")},
    **{f"bsdtar {name}": with_command("bsdtar", "--format", name) for name in ("gnutar", "pax", "ustar")},
    "webdataset": with_webdataset,
}


@pytest.mark.parametrize("long", [0, 150, 300], ids=lambda long: f"names of {long}" if long else "short names")
@pytest.mark.parametrize("writer", WRITERS)
def test_tars_of_other_writers_are_indexed_unchanged(tmp_path: Path, writer: str, long: int) -> None:
    if long == 300 and "ustar" in writer:
        pytest.skip("beyond what the format holds")
    wanted = samples(long)
    write_tree(tmp_path / "tree", wanted)
    root = tmp_path / "root"
    root.mkdir()
    WRITERS[writer](tmp_path / "tree", root / "data.tar", wanted)
    before = (root / "data.tar").read_bytes()
    manifest, faults = index_tars(str(root), labels="folder" if not long else "cls")
    assert faults == []
    assert manifest is not None
    assert manifest.classes == sorted(CLASSES)
    assert contents(root) == expected(wanted)
    assert verify(root, deep=True) == []
    assert (root / "data.tar").read_bytes() == before


def test_tar_of_a_folder_with_dot_slash_names_is_indexed(tmp_path: Path) -> None:
    """As people pack a tree: names begin with ./ and folders are members."""
    wanted = samples()
    write_tree(tmp_path / "tree", wanted)
    root = tmp_path / "root"
    root.mkdir()
    command = ["tar", "--sort=name", "-cf", root / "data.tar", "-C", tmp_path / "tree", "."]
    subprocess.run(command, check=True)
    index_tars(str(root))
    assert contents(root) == {f"./{key}": value for key, value in expected(wanted).items()}


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_shard_writer_tars_are_indexed(tmp_path: Path) -> None:
    wanted = samples()
    pattern = str(tmp_path / "data-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as sink:  # pyright: ignore[reportAttributeAccessIssue]
        for sample in wanted:
            label = CLASSES.index(sample.label)
            parts = {sample.extension: sample.image, "cls": label, "seg.png": b"a mask", "json": {"label": 7}}
            sink.write({"__key__": sample.key, **parts})
    manifest, _ = index_tars(str(tmp_path), classes=list(CLASSES))
    assert manifest is not None
    assert [shard.samples for shard in manifest.shards] == [5, 5, 5, 1]
    assert contents(tmp_path) == expected(wanted)


def test_img2dataset_tars_are_indexed_by_json_field(tmp_path: Path) -> None:
    """Flat numbered keys with .jpg, .txt and .json, in the order and with the fields that version 1.47 writes."""
    wanted = [dataclasses.replace(sample, key=f"00000{i:04d}") for i, sample in enumerate(samples())]
    parts = []
    for number, sample in enumerate(wanted):
        fields = {"class_name": sample.label, "class_id": CLASSES.index(sample.label), "caption": f"photo {number}",
                  "url": f"http://example.org/{number}.jpg", "key": sample.key, "status": "success", "width": 30,
                  "exif": "{}", "sha256": "0" * 64}  # fmt: skip
        parts += [
            Member(f"{sample.key}.jpg", sample.image),
            Member(f"{sample.key}.json", json.dumps(fields, indent=4).encode()),
            Member(f"{sample.key}.txt", b"photo"),
        ]
    (tmp_path / "00000.tar").write_bytes(tar_of(parts, tarfile.GNU_FORMAT))
    (tmp_path / "00000.parquet").write_bytes(b"not looked at")
    (tmp_path / "00000_stats.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"as label json:class_name or json:class_id .*:\n.* index .* --image jpg --label json:class_n"
    ):
        index_tars(str(tmp_path))
    index_tars(str(tmp_path), tmp_path / "by-name", labels="json:class_name")
    assert contents(tmp_path / "by-name") == expected(wanted)
    manifest, _ = index_tars(str(tmp_path), tmp_path / "by-number", labels="json:class_id")
    assert manifest is not None
    assert manifest.classes == ["0", "1", "2", "3"]
    numbers = {key: CLASSES[int(label)] for key, (label, _) in contents(tmp_path / "by-number").items()}
    assert numbers == {sample.key: sample.label for sample in wanted}


# The reader of tars against Python's

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=120)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PATHS, st.integers(0, 1500)), max_size=5), st.sampled_from(sorted(FORMATS)))
def test_tar_members_match_tarfile(wanted: list[tuple[str, int]], format: str) -> None:
    try:
        data = tar_of([Member(name, b"x" * size) for name, size in wanted], FORMATS[format])
    except ValueError:
        assume(False)  # too long a name for ustar
        raise
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        theirs = [(member.name, member.offset, member.offset_data, member.size) for member in tar]
    ours = [(member.name, member.header, member.offset, member.size) for member in members(Reader(BytesIO(data)))]
    assert ours == theirs
    assert [name for name, *_ in ours] == [name for name, _ in wanted]


def test_global_pax_headers_and_sparse_files_match_tarfile(tmp_path: Path) -> None:
    """A sparse file of so many pieces that their list goes on behind its header."""
    with (tmp_path / "holes").open("wb") as file:
        for piece in range(30):
            file.seek(piece * 100_000)
            file.write(b"piece")
    (tmp_path / "next").write_text("next")
    for format in ("gnu", "posix"):
        tar = tmp_path / f"{format}.tar"
        command = ["tar", f"--format={format}", "--sparse", "-cf", tar, "-C", tmp_path, "holes", "next"]
        subprocess.run(command, check=True)
        with tarfile.open(tar) as theirs, tar.open("rb") as file:
            found = [(member.name, member.header, member.kind) for member in members(Reader(file))]
            assert found == [(m.name, m.offset, "sparse" if m.issparse() else "file") for m in theirs]
        assert [kind for *_, kind in found] == ["sparse", "file"]
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", pax_headers={"comment": "x"}) as tar:
        tar.addfile(tarfile.TarInfo("é" * 99))
    data = buffer.getvalue()
    with tarfile.open(fileobj=BytesIO(data)) as theirs:
        assert [(m.name, m.header) for m in members(Reader(BytesIO(data)))] == [(m.name, m.offset) for m in theirs]


@pytest.mark.parametrize("kind", [tarfile.XGLTYPE, tarfile.XHDTYPE])
def test_huge_pax_headers_use_bounded_memory(kind: bytes) -> None:
    """A hundred PAX headers of a thousand keys each, of which none is used."""

    def stream() -> Iterator[bytes]:
        for number in range(100):
            content = b"".join(b"%d key%06d=%s\n" % (115, number * 1000 + key, b"v" * 100) for key in range(999))
            yield tar_of([Member("pax", content, type=kind)])[: 512 + padded(len(content))]
        yield tar_of([Member("a")])

    tracemalloc.start()
    reader = Reader(Streamed(stream()))
    if kind == tarfile.XHDTYPE:
        with pytest.raises(TarError, match=r"damaged at byte 0: a name or header of \d+ bytes"):
            list(members(reader))
    else:
        assert [member.name for member in members(reader)] == ["a"]
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_oversized_label_part_is_reported(tmp_path: Path) -> None:
    parts = [Member("a.jpg", image_bytes(0)), Member("a.json", b'{"label": 1, "x": [' + b"{}," * 2_000_000 + b"{}]}")]
    (tmp_path / "data.tar").write_bytes(tar_of(parts))
    _, (fault,) = index_tars(str(tmp_path), labels="json:label")
    assert fault.reason == "its json part has 6,000,023 bytes; the limit is 4,194,304"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_tar_raises_only_tar_error(data: st.DataObject) -> None:
    parts = [Member("a" * 120 + "é", b"1" * 700), Member("b", b"2" * 20, pax={"comment": "hello"}), Member("c")]
    tar = bytearray(tar_of(parts, data.draw(st.sampled_from(sorted(FORMATS.values())[1:]))))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(tar) - 1))
        piece = data.draw(st.binary(max_size=12))
        tar[start : start + len(piece)] = piece
        if data.draw(st.booleans()):  # a checksum that fits lets damage further in
            block = start // 512 * 512
            header = tar[block : block + 512]
            header[148:156] = b" " * 8
            tar[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    tar = tar[: data.draw(st.integers(0, len(tar)))]
    reader = Reader(BytesIO(bytes(tar)))
    try:
        for member in members(reader):
            assert 0 <= member.header < member.offset <= reader.position
    except TarError:
        pass
    assert reader.position <= len(tar)


# Labels


def labelled(root: Path, labels: list[Any], part: str = "cls") -> None:
    """A tar of one sample for each label, without folders."""
    parts = []
    for number, label in enumerate(labels):
        data = json.dumps({"label": label}) if part == "json" else str(label)
        parts += [Member(f"{number}.jpg", image_bytes(number)), Member(f"{number}.{part}", data.encode())]
    root.mkdir(exist_ok=True)
    (root / "data.tar").write_bytes(tar_of(parts))


def found(root: Path) -> list[str]:
    return [label for label, _ in contents(root).values()]


@pytest.mark.parametrize(
    ("labels", "part", "classes", "names"),
    [
        ([2, 0, 2], "cls", ["0", "1", "2"], ["2", "0", "2"]),
        (["002", " 0\n", 1], "cls", ["0", "1", "2"], ["2", "0", "1"]),
        (["dog", "cat", "dog"], "cls", ["cat", "dog"], ["dog", "cat", "dog"]),
        ([1, 0], "json", ["0", "1"], ["1", "0"]),
        ([1.0, 0.0], "json", ["0", "1"], ["1", "0"]),
        (["dog", "7", "cat"], "json", ["7", "cat", "dog"], ["dog", "7", "cat"]),
    ],
)
def test_labels_may_be_numbers_or_names(tmp_path: Path, labels: list, part: str, classes: list, names: list) -> None:
    labelled(tmp_path / "root", labels, part)
    manifest, faults = index_tars(str(tmp_path / "root"), labels="json:label" if part == "json" else "cls")
    assert faults == []
    assert manifest is not None
    assert manifest.classes == classes
    assert found(tmp_path / "root") == names


@pytest.mark.parametrize(
    ("labels", "part", "reason"),
    [
        ([0, 1, "dog"], "cls", "label 'dog' is none of the 2 classes"),
        ([0, 1, 1 << 20], "cls", "label '1048576' is none of the 2 classes"),
        ([0, 1, 1 << 60], "cls", "label '1152921504606846976' is none of the 2 classes"),
        ([0, 1, -1], "cls", "label '-1' is none of the 2 classes"),
        ([0, 1, None], "json", "label is null; a label is a number or a name"),
        ([0, 1, True], "json", "label is true; a label is a number or a name"),
        ([0, 1, float("nan")], "json", "label is NaN; a label is a number or a name"),
        ([0, 1, "a\u2028b"], "json", r"label 'a\u2028b': neither a number nor a readable name"),
        ([0, 1, ["dog"]], "json", 'label is ["dog"]; a label is a number or a name'),
        ([0, 1, "1 5"], "cls", "label '1 5' is several numbers; a sample has one class"),
        ([0, 1, "1, 5,7"], "json", "label '1, 5,7' is several numbers; a sample has one class"),
    ],
)
def test_invalid_labels_are_reported(tmp_path: Path, labels: list, part: str, reason: str) -> None:
    labelled(tmp_path / "root", labels, part)
    source = "json:label" if part == "json" else "cls"
    manifest, faults = index_tars(str(tmp_path / "root"), labels=source)
    assert manifest is None
    assert faults == [SampleFault("data.tar", "2", reason)]
    index_tars(str(tmp_path / "root"), labels=source, skip_bad=True)
    assert found(tmp_path / "root") == ["0", "1"]


def test_labels_outside_the_given_classes_are_reported(tmp_path: Path) -> None:
    labelled(tmp_path / "names", ["cat", "dog", "cow"])
    _, faults = index_tars(str(tmp_path / "names"), classes=["ant", "cat", "dog"], skip_bad=True)
    assert faults == [SampleFault("data.tar", "2", "label 'cow' is none of the 3 classes")]
    assert found(tmp_path / "names") == ["cat", "dog"]
    labelled(tmp_path / "numbers", [0, 1, 3])
    _, faults = index_tars(str(tmp_path / "numbers"), classes=["ant", "cat", "dog"], skip_bad=True)
    assert faults == [SampleFault("data.tar", "2", "label '3' is none of the 3 classes")]
    assert found(tmp_path / "numbers") == ["ant", "cat"]


def test_numeric_labels_match_numeric_class_names(tmp_path: Path) -> None:
    labelled(tmp_path / "root", [10, "02", 9])
    index_tars(str(tmp_path / "root"), classes=["2", "9", "10"])
    assert found(tmp_path / "root") == ["10", "2", "9"]


def test_labels_counting_from_one_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled(tmp_path / "zero", [0, 1, 2])
    index_tars(str(tmp_path / "zero"))
    assert "count from 1" not in capsys.readouterr().err
    labelled(tmp_path / "one", [1, 2, 3, 2])
    with pytest.raises(InputError, match="labels are 1 … 3 of 3 classes, so they count from 1"):
        index_tars(str(tmp_path / "one"), classes=["ant", "bee", "cow"], skip_bad=True)
    assert listing(tmp_path / "one").keys() == {"data.tar"}
    manifest, _ = index_tars(str(tmp_path / "one"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "labels are" in line]
    assert "labels are 1 … 3 and none is 0, so class 0 has no samples; if they count from 1" in line
    assert manifest is not None
    assert manifest.classes == ["0", "1", "2", "3"]
    assert found(tmp_path / "one") == ["1", "2", "3", "2"]


# Where things are written


def test_index_can_be_written_to_another_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    labelled(root, [0, 1])
    (root / "part\\2.tar").write_bytes(b"")
    (root / "deeper").mkdir()
    (root / "deeper" / "more.tar").write_bytes(tar_of([Member("x.jpg", image_bytes(3)), Member("x.cls", b"1")]))
    before = listing(root)
    manifest, faults = index_tars(str(root), tmp_path / "out", skip_bad=True)
    assert [fault.shard for fault in faults] == ["part\\2.tar"]
    assert "not a file below the data set's root" in faults[0].reason
    assert faults[0].reason.endswith(": rename it")
    assert listing(root) == before
    assert manifest is not None
    assert manifest.tars == str(root)
    names = {"data.index.npy", "deeper/more.index.npy", "manifest.json", "skipped.jsonl"}
    assert listing(tmp_path / "out").keys() == names
    assert found(tmp_path / "out") == ["0", "1", "1"]
    assert read_skipped(tmp_path / "out") == [fault._asdict() for fault in faults]
    assert verify(tmp_path / "out", deep=True) == []


SHARD_NAMES = ["part 2/spaced name.tar", "a+b.tar", "データ/été(1).tar", "100%&#?.tar", "-.tar"]


def test_shard_names_in_any_script_are_indexed(tmp_path: Path) -> None:
    """And each its own keys: the same key may stand in several."""
    root, out = tmp_path / "root", tmp_path / "out"
    for number, name in enumerate(SHARD_NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(tar_of([Member("0.jpg", image_bytes(number)), Member("0.cls", b"0")]))
    manifest, faults = index_tars(str(root), out)
    assert faults == []
    assert manifest is not None
    assert sorted(shard.tar.name for shard in manifest.shards) == sorted(SHARD_NAMES)
    shards = ShardSet(out)
    shards.check()
    assert [shards.key(number, 0) for number in range(5)] == ["0"] * 5
    read = {shards.url(number): shards.read(number, 0) for number in range(5)}
    assert read == {str(root / name): image_bytes(number) for number, name in enumerate(SHARD_NAMES)}
    assert verify(out, deep=True) == []


def test_links_to_folders_of_tars_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled(tmp_path / "far", [0, 1])
    labelled(tmp_path / "root", [1, 0, 1])
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "gone.tar").symlink_to("nowhere")
    manifest, faults = index_tars(str(tmp_path / "root"), skip_bad=True)
    assert faults == [SampleFault("gone.tar", None, "no such file")]
    assert manifest is not None
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("data", 3), ("linked/data", 2)]
    assert "repeat others" not in capsys.readouterr().err


def test_duplicate_tars_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled(tmp_path, [0, 1])
    shutil.copy(tmp_path / "data.tar", tmp_path / "copy.tar")
    manifest, faults = index_tars(str(tmp_path))
    assert faults == []
    assert manifest is not None
    assert manifest.samples == 4
    warning = "these tars repeat others, so their samples count more than once: data.tar"
    assert warning in capsys.readouterr().err.splitlines()


def test_found_usable_refused_and_ignored_files_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [Member("0.jpg", image_bytes(0)), Member("0.cls", b"0"), Member("0.txt", b"a photo")]
    bad = [Member("1.jpg", b"no image"), Member("1.cls", b"1")]
    hidden = ["__MACOSX/._0.jpg", "._0.jpg", "a/Thumbs.db", "@eaDir/0.jpg", ".git/x.jpg", "readme"]
    (tmp_path / "data.tar").write_bytes(tar_of([*good, *bad, *(Member(name, b"x") for name in hidden)]))
    (tmp_path / "bad.tar").write_text("hello")
    (tmp_path / "more.tgz").touch()
    (tmp_path / "._data.tar").touch()
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "@eaDir" / "data.tar").touch()
    _, faults = index_tars(str(tmp_path), skip_bad=True)
    assert {fault.shard for fault in faults} == {"data.tar", "bad.tar", "more.tgz"}
    lines = capsys.readouterr().err.splitlines()
    assert (
        "found 3 tars with 11 files; usable: 1 tars with 3 files of 1 samples; refused: 2 tars, 2 files; "
        "ignored: 6 files that are hidden, system files or without extension"
    ) in lines
    assert [line for line in lines if line.startswith("ignored 2 hidden and system entries")]


def test_index_with_faults_writes_nothing(tmp_path: Path) -> None:
    labelled(tmp_path, [0, 1])
    (tmp_path / "empty.tar").touch()
    before = listing(tmp_path)
    manifest, faults = index_tars(str(tmp_path))
    assert manifest is None
    assert faults == [SampleFault("empty.tar", None, "an empty file")]
    assert listing(tmp_path) == before


def test_existing_index_is_not_overwritten(tmp_path: Path) -> None:
    labelled(tmp_path, [0, 1])
    index_tars(str(tmp_path))
    with pytest.raises(InputError, match="there is an index already; remove this file"):
        index_tars(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    manifest, _ = index_tars(str(tmp_path))
    assert manifest == read_manifest(tmp_path)


def nothing(root: Path) -> None:
    root.mkdir()


def not_there(root: Path) -> None:
    pass


def all_bad(root: Path) -> None:
    root.mkdir()
    (root / "x.tar").write_text("hello")


def no_labels(root: Path) -> None:
    root.mkdir()
    (root / "x.tar").write_bytes(tar_of([Member("x.jpg", image_bytes(0)), Member("x.txt", b"a photo")]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "no .tar files below it"),
        (not_there, "no such folder"),
        (all_bad, "not one sample can be used:\n  x.tar: not a tar"),
        (
            no_labels,
            "no label can be seen in the first sample, 'x' with parts jpg, txt: found jpg, txt; as image jpg would",
        ),
    ],
)
def test_unindexable_folder_is_rejected(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "root")
    with pytest.raises(InputError) as error:
        index_tars(str(tmp_path / "root"), skip_bad=True)
    assert message in str(error.value)


@pytest.mark.parametrize("data", ["[1, 2]", "5", "null", "[" * 100_000, "hello", "\xff"])
def test_unreadable_json_labels_are_reported(tmp_path: Path, data: str) -> None:
    """By auto as by a field: a .json part may hold anything."""
    parts = [Member("0.jpg", image_bytes(0)), Member("0.json", data.encode("latin-1"))]
    (tmp_path / "data.tar").write_bytes(tar_of(parts))
    with pytest.raises(
        InputError, match=r"no label can be seen in the first sample, '0' .*: found jpg, json, and nothing"
    ):
        index_tars(str(tmp_path))
    _, faults = index_tars(str(tmp_path), labels="json:label", classes=["a"])
    assert len(faults) == 1
    assert faults[0].reason.startswith(("its json part has no field 'label'", "its json part is not JSON"))


@pytest.mark.parametrize("labels", ["json", "json:", ":x", ""])
def test_unknown_label_source_is_rejected(tmp_path: Path, labels: str) -> None:
    labelled(tmp_path, [0, 1])
    with pytest.raises(InputError, match="expected auto, cls, folder, json:FIELD or the name"):
        index_tars(str(tmp_path), labels=labels)


@pytest.mark.usefixtures("private_cache")
def test_tars_by_pattern_from_a_web_server_are_indexed(tmp_path: Path) -> None:
    """HTTP has no listing, so a pattern names the tars. One of them is missing."""
    wanted = samples()
    for number in range(4):
        with_tarfile(tarfile.GNU_FORMAT)(tmp_path, tmp_path / f"data-{number:03d}.tar", wanted[number * 4 :][:4])
    out = tmp_path / "out"
    with FaultyServer(tmp_path) as server:
        pattern = f"{server.url}/data-{{000..004}}.tar"
        with pytest.raises(InputError, match="give a local folder to --out"):
            index_tars(pattern)
        _, faults = index_tars(pattern, out, skip_bad=True)
        assert faults == [SampleFault("data-004.tar", None, "no such file")]
        assert read_manifest(out).tars == server.url
        assert contents(out) == expected(wanted)
        assert verify(out, deep=True) == []
    index_tars(f"{tmp_path}/data-{{000..003}}.tar")
    assert contents(tmp_path) == expected(wanted)


@pytest.mark.usefixtures("private_cache")
def test_query_of_signed_urls_is_used_and_kept_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their query is sent as it is, and shown nowhere. A file that only its owner may read keeps it for training."""
    tars, out = tmp_path / "tars", tmp_path / "out"
    tars.mkdir()
    for number in range(3):
        parts = [Member("0.jpg", image_bytes(number)), Member("0.cls", b"0")]
        (tars / f"a b+{number:03d}.tar").write_bytes(tar_of(parts))
    query = "X-Amz-Credential=AK%2F1&X-Amz-Signature=s3cret%2B"
    with FaultyServer(tars) as server:
        manifest, faults = index_tars(f"{server.url}/a%20b+{{000..002}}.tar?{query}", out)
        assert faults == []
        assert manifest is not None
        assert manifest.samples == 3
        shards = ShardSet(out)
        assert [shards.read(number, 0) for number in range(3)] == [image_bytes(number) for number in range(3)]
        assert verify(out, deep=True) == []
        assert {request.query for request in server.requests} == {query}
        assert (out / "tars.query").stat().st_mode & 0o777 == 0o600
        assert "s3cret" not in (out / "manifest.json").read_text() + repr(manifest) + shards.url(0)
        (out / "tars.query").write_text("renewed=1\n")
        shards = ShardSet(out, cache=Cache(tmp_path / "fresh", 0))
        shards.read(0, 0)
        assert server.requests[-1].query == "renewed=1"
        (out / "tars.query").unlink()
        (out / "tars.query").mkdir()
        with pytest.raises(InputError, match=r"tars\.query: cannot be read: Is a directory; ask its owner"):
            ShardSet(out)
        (out / "tars.query").rmdir()
        (out / "manifest.json").unlink()
        index_tars(f"{server.url}/a%20b+000.tar", out)
    assert not (out / "tars.query").exists()
    assert "s3cret" not in (out / "manifest.json").read_text() + "".join(capsys.readouterr())


@pytest.mark.usefixtures("private_cache")
def test_tars_of_an_object_store_are_indexed(tmp_path: Path) -> None:
    wanted = samples()
    with_tarfile(tarfile.GNU_FORMAT)(tmp_path, tmp_path / "data.tar", wanted)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "data.tar"), "/bucket/deep/data.tar")
    index_tars("memory://bucket", tmp_path / "out")
    assert read_manifest(tmp_path / "out").tars == "memory://bucket"
    assert contents(tmp_path / "out") == expected(wanted)
    fs.rm("/bucket", recursive=True)
    assert verify(tmp_path / "out") == [
        SampleFault("deep/data.tar", None, "memory://bucket/deep/data.tar: no such file")
    ]


def test_index_does_not_depend_on_worker_count(tmp_path: Path) -> None:
    wanted = samples()
    for number in range(4):
        with_tarfile(tarfile.PAX_FORMAT)(tmp_path, tmp_path / f"{number}.tar", wanted[number * 4 :][:4])
    (tmp_path / "4.tar").write_text("hello")
    one = index_tars(str(tmp_path), tmp_path / "one", skip_bad=True)
    three = index_tars(str(tmp_path), tmp_path / "three", skip_bad=True, workers=3)
    assert one == three
    assert listing(tmp_path / "one") == listing(tmp_path / "three")
    assert verify(tmp_path / "one", workers=2, deep=True) == []


# Damage


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> Damage:
    return build(tmp_path_factory.mktemp("damage"))


REASONS = {
    "cut_in_an_image": {"cut short"},
    "cut_in_a_header": {"cut short", "no .cls part"},
    "cut_between_samples": {"cut short"},
    "flipped_in_a_header": {"no member begins there"},
    "lost_block": {"data follows the end mark"},
    "joined": {"data follows the end mark"},
    "negative_size": {"is not a number"},
    "huge_size": {"cut short", "the limit is 268,435,456"},
    "huge_pax_header": {"a name or header of 8589935104 bytes"},
    "broken_pax_header": {"a PAX header that cannot be read"},
    "compressed": {"decompress it"},
    "repeated_key": {"a second sample of this key"},
    "parts_apart": {"do not stand side by side"},
    "two_images": {"more than one part"},
    "bad_pixels": {"damaged: ", "not a readable image: "},
    "traversal": {"which leads out of the tar"},
    "stray_traversal": {"which leads out of the tar"},
    "link": {"is a link"},
    "device": {"is no ordinary file"},
    "sparse": {"is a sparse file"},
}


def by_shard(faults: list[SampleFault]) -> dict[str, set[str | None]]:
    return {shard: {fault.key for fault in faults if fault.shard == shard} for shard in {f.shard for f in faults}}


def test_every_kind_of_shard_damage_is_reported(damage: Damage) -> None:
    before = listing(damage.shards)
    manifest, faults = index_tars(str(damage.shards))
    assert manifest is None
    assert by_shard(faults) == {name: keys for name, keys in damage.bad_keys.items() if keys}
    assert listing(damage.shards) == before
    for kind, reasons in REASONS.items():
        told = [fault.reason for fault in faults if damage.shard_damage[fault.shard] == kind]
        assert told
        assert all(any(reason in text for reason in reasons) for text in told), kind
        assert all(any(reason in text for text in told) for reason in reasons), kind


def test_intact_samples_of_damaged_shards_are_indexed(damage: Damage, tmp_path: Path) -> None:
    manifest, faults = index_tars(str(damage.shards), tmp_path, skip_bad=True)
    assert manifest is not None
    assert [fault._asdict() for fault in faults] == read_skipped(tmp_path)
    assert contents(tmp_path).keys() == damage.good_keys
    assert verify(tmp_path, deep=True) == []


def test_no_decode_checks_only_headers(damage: Damage, tmp_path: Path) -> None:
    _, faults = index_tars(str(damage.shards), tmp_path, skip_bad=True, decode=False)
    assert not {fault.key for fault in faults} & damage.hidden_keys
    assert contents(tmp_path).keys() == damage.good_keys | damage.hidden_keys
    assert verify(tmp_path) == []
    assert {fault.key for fault in verify(tmp_path, deep=True)} == damage.hidden_keys


def test_every_damaged_image_is_reported_by_pack(damage: Damage, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="images that cannot be packed"):
        pack(damage.images, tmp_path / "out")
    pack(damage.images, tmp_path / "out", skip_bad=True)
    skipped = read_skipped(tmp_path / "out")
    assert {line["path"] for line in skipped} == damage.image_damage.keys()
    assert contents(tmp_path / "out").keys() == damage.good_images
    assert verify(tmp_path / "out", deep=True) == []
