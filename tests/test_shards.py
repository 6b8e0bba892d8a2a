"""Packing: the same bytes every time, readable by webdataset, and bad input refused without leaving a trace."""

import gc
import io
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.errors import InputError
from pipeline.shards.index import ShardSet, read_manifest
from pipeline.shards.pack import pack
from pipeline.shards.store import CorruptSampleError, ShardStore
from pipeline.shards.verify import verify


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_packing_twice_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "a", samples_per_shard=4)
    pack(tree, tmp_path / "b", samples_per_shard=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pack(tree, tmp_path / "c", samples_per_shard=4, seed=1)
    assert read_manifest(tmp_path / "c").digest != read_manifest(tmp_path / "a").digest


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards_back(tree: Path, tmp_path: Path) -> None:
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


def test_the_index_says_what_lies_where(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out", samples_per_shard=4)
    shards = ShardSet(tmp_path / "out")
    assert len(shards) == 6
    store = ShardStore(shards, max_open=1)
    for shard, entry in enumerate(shards.manifest.shards):
        for row, record in enumerate(shards.index(shard)):
            data = store.read(shard, row)
            key = shards.key(shard, row)
            original = next(path for path in tree.rglob("*") if str(path.relative_to(tree)).startswith(f"{key}."))
            assert data == original.read_bytes()
            assert zlib.crc32(data) == record["crc32"]
            assert Image.open(io.BytesIO(data)).size == (record["width"], record["height"])
            assert shards.manifest.classes[record["label"]] == original.parent.name
        assert entry.samples == len(shards.index(shard))
    store.close()


def test_a_validation_split_takes_the_training_classes(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "dog", tmp_path / "val" / "dog")
    manifest = pack(tmp_path / "val", tmp_path / "out", classes=["bird", "cat", "dog"])
    assert manifest.classes == ["bird", "cat", "dog"]
    assert set(ShardSet(tmp_path / "out").index(0)["label"]) == {2}
    with pytest.raises(InputError, match=r"class folders \['dog'\] are not among the 1 classes of --classes-from"):
        pack(tmp_path / "val", tmp_path / "other", classes=["cat"])


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


def truncated(tree: Path) -> None:
    path = tree / "cat" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def garbage(tree: Path) -> None:
    (tree / "cat" / "x.jpg").write_bytes(b"not an image")


def gif_named_jpg(tree: Path) -> None:
    Image.new("RGB", (8, 8)).save(tree / "cat" / "x.jpg", format="GIF")


def colliding_extensions(tree: Path) -> None:
    shutil.copy(tree / "cat" / "0.jpg", tree / "cat" / "0.jpeg")


def colliding_dots(tree: Path) -> None:
    shutil.copy(tree / "cat" / "0.jpg", tree / "cat" / "a.b.jpg")
    shutil.copy(tree / "cat" / "0.jpg", tree / "cat" / "a_b.jpg")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (empty_folder, "no class folders"),
        (no_class_folders, "no class folders"),
        (empty_class, "emu: no images"),
        (truncated, "0.jpg: not a readable image"),
        (garbage, "x.jpg: not a readable image"),
        (gif_named_jpg, "x.jpg: holds GIF, not JPEG or PNG"),
        (colliding_extensions, "would both be 'cat/0' in the shards"),
        (colliding_dots, "would both be 'cat/a_b' in the shards"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(tree: Path, tmp_path: Path, spoil, message: str) -> None:
    spoil(tree)
    with pytest.raises(InputError) as error:
        pack(tree, tmp_path / "out")
    assert message in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"images"}


def test_an_output_folder_that_holds_something_is_left_alone(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(InputError, match="already holds something"):
        pack(tree, tmp_path / "out")
    assert contents(tmp_path / "out") == {"precious": b"mine"}


def test_files_that_are_left_out_are_told(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "cat" / "notes.txt").write_text("hello")
    pack(tree, tmp_path / "out")
    assert "left out 1 files" in capsys.readouterr().err


def damage_tar(folder: Path, at: int) -> None:
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_and_named(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    shards = ShardSet(tmp_path / "out")
    damage_tar(tmp_path / "out", int(shards.index(0)[2]["offset"]) + 50)
    key = shards.key(0, 2)
    assert key in verify(tmp_path / "out")[0]
    with pytest.raises(CorruptSampleError, match=f"sample '{key}' .row 2. does not match its checksum"):
        ShardStore(shards).read(0, 2)


def test_a_lost_block_is_told_although_names_are_lost_with_it(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    start = int(shards.index(0)[1]["offset"])
    path = shards.tar("shard-000000")
    data = bytearray(path.read_bytes())
    data[start - 512 : start + 512] = bytes(1024)
    path.write_bytes(data)
    assert "row 1" in verify(tmp_path / "out")[0]
    with pytest.raises(CorruptSampleError, match="row 1"):
        ShardStore(shards).read(0, 1)


def test_verify_looks_at_the_index(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out")
    (tmp_path / "out" / "shard-000000.index.npy").write_bytes(b"garbage")
    assert "does not match manifest.json" in verify(tmp_path / "out")[0]


def test_names_in_any_script_and_of_any_length_survive(tree: Path, tmp_path: Path) -> None:
    names = ["été", "猫", "x" * 200]
    for name in names:
        shutil.copy(tree / "cat" / "0.jpg", tree / "cat" / f"{name}.jpg")
    pack(tree, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert {f"cat/{name}" for name in names} <= {shards.key(0, row) for row in range(len(shards))}


def test_links_to_folders_are_followed_once(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tree / "cat" / "0.jpg", tmp_path / "elsewhere" / "far.jpg")
    (tree / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "cat" / "loop").symlink_to(tree / "cat")
    manifest = pack(tree, tmp_path / "out")
    assert manifest.samples == 7


def test_a_failed_pack_removes_the_parents_it_made(tree: Path, tmp_path: Path) -> None:
    garbage(tree)
    with pytest.raises(InputError, match="not a readable image"):
        pack(tree, tmp_path / "p" / "q" / "out")
    assert not (tmp_path / "p").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be created"):
        pack(tree, tmp_path / "file" / "out")


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


def shorten_shard(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-512])


def remove_shard(folder: Path) -> None:
    (folder / "shard-000000.tar").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_manifest, "cannot read the manifest: No such file or directory; make one with launch/shards.py pack"),
        (edit_manifest, "its digest and counts do not match its contents"),
        (miscount_manifest, "its digest and counts do not match its contents"),
        (lead_manifest_out, "String should match pattern"),
        (newer_manifest, "format 99, but this version reads format 1"),
        (garble_manifest, "not a manifest"),
        (shorten_shard, "bytes, but manifest.json lists"),
        (remove_shard, "is missing, but manifest.json lists"),
    ],
)
def test_shards_that_do_not_match_their_manifest_are_refused(tree: Path, tmp_path: Path, spoil, message: str) -> None:
    pack(tree, tmp_path / "out")
    spoil(tmp_path / "out")
    with pytest.raises(InputError) as error:
        ShardSet(tmp_path / "out")
    assert message in str(error.value)


def test_an_index_of_another_packing_is_refused(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "a")
    pack(tree, tmp_path / "b", seed=1)
    shutil.copy(tmp_path / "b" / "shard-000000.index.npy", tmp_path / "a")
    with pytest.raises(InputError, match=r"does not match manifest\.json"):
        ShardSet(tmp_path / "a").index(0)
