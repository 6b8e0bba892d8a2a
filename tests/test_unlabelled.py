"""Images without labels: packed and indexed, looked at and predicted, and refused by whatever needs labels."""

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.commands import shards as command
from pipeline.config import Config, SemanticFpnConfig
from pipeline.errors import InputError
from pipeline.feed.loader import EvalFeed
from pipeline.feed.preview import preview
from pipeline.job import start_checks, tune
from pipeline.shards import unlabelled
from pipeline.shards.index import ShardSet
from pipeline.shards.index_tars import index_tars
from pipeline.shards.manifest import Manifest, Shard, read_classes, read_manifest
from pipeline.shards.open_data import open_validation
from pipeline.shards.pack import pack
from pipeline.shards.show_dataset import format_summary, show_dataset
from pipeline.shards.verify import verify
from pipeline.world import World

NUM_IMAGES = 60


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise in a folder and in folders below it, beside a file of another kind."""
    folder = tmp_path_factory.mktemp("noise") / "tree"
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / ("", "a", "a/b")[number % 3] / f"{number:02}.{'png' if number % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + number, 40, 3), np.uint8)).save(path)
    (folder / "read.me").touch()
    return folder


@pytest.fixture(scope="module")
def packed(tree: Path) -> Path:
    pack(unlabelled.find(tree), tree.with_name("packed"), samples_per_shard=25)
    return tree.with_name("packed")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["launch/shards.py", *map(str, arguments), "--workers", "1"])
    return command.main()


def contents(root: Path) -> dict[str, bytes]:
    """The members of a data set's tars."""
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def pictures(tree: Path) -> dict[str, bytes]:
    files = [path for path in tree.rglob("*.*") if path.suffix in (".jpg", ".png")]
    return {str(path.relative_to(tree)): path.read_bytes() for path in files}


def write_csv(tree: Path, path: Path) -> Path:
    path.with_suffix(".csv").write_text("\n".join(["path,size", *(f"{tree / name},1" for name in pictures(tree))]))
    return path.with_suffix(".csv")


def write_jsonl(tree: Path, path: Path) -> Path:
    lines = [json.dumps({"path": str(tree / name)}) for name in pictures(tree)]
    path.with_suffix(".jsonl").write_text("\n".join(lines))
    return path.with_suffix(".jsonl")


def write_named_parquet(tree: Path, path: Path) -> Path:
    pq.write_table(pa.table({"img": list(pictures(tree).values()), "label": [1] * NUM_IMAGES}), path)
    return path


def write_tar(tree: Path, path: Path) -> Path:
    """A compressed tar, in which some images have labels."""
    with tarfile.open(path, "w:gz") as tar:
        for name in pictures(tree):
            tar.add(tree / name, name)
        tar.addfile(tarfile.TarInfo("00.cls"))
    return path


def write_parquet(tree: Path, path: Path) -> Path:
    pq.write_table(pa.table({"image": list(pictures(tree).values())}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


# Sources


def test_tree_becomes_shards_of_images_alone(tree: Path, packed: Path) -> None:
    assert contents(packed) == pictures(tree)
    shards = ShardSet(packed)
    assert (shards.classes, shards.annotations, len(shards)) == ([], "unlabelled", NUM_IMAGES)
    for shard in range(3):
        records = shards.index(shard)
        assert not records["label"].any()
        for row, record in enumerate(records):
            (path,) = tree.glob(f"{shards.key(shard, row)}.*")
            with Image.open(path) as image:
                assert image.size == (record["width"], record["height"])


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_lists_and_tables_without_labels_give_the_same_images(
    tree: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Path], Path]
) -> None:
    source = write(tree, tmp_path / "source")
    result = run(monkeypatch, "pack", "--images", source, "--unlabelled", "--out", tmp_path / "out")
    assert (result["samples"], result["classes"]) == (NUM_IMAGES, 0)
    found = contents(tmp_path / "out")
    assert sorted(found.values()) == sorted(pictures(tree).values())
    if write is not write_parquet:
        assert found == pictures(tree)


@pytest.mark.parametrize("option", [["--unlabelled"], ["--labels", "none"]])
def test_tars_without_labels_are_indexed_as_packed(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    run(monkeypatch, "index", packed, *option, "--out", tmp_path)
    assert read_manifest(tmp_path).digest == read_manifest(packed).digest


def test_existing_labels_are_not_read(digits: Path, tmp_path: Path) -> None:
    manifest, faults = index_tars(str(digits / "val"), tmp_path, labels="none")
    assert manifest
    assert (manifest.annotations, manifest.samples, faults) == ("unlabelled", 360, [])
    assert not any(ShardSet(tmp_path).index(shard)["label"].any() for shard in range(2))


def test_manifests_of_other_kinds_stay_as_they_were() -> None:
    """Their bytes and digests are those of before there were images without labels."""
    shard = Shard("shard-000000", 2, 1024, "0" * 64, 192, "f" * 64)
    digests = {kind: Manifest.of(["cat", "dog"], [shard], annotations=kind).digest[:16] for kind in (None, "objects")}
    assert digests == {None: "cf9195e6b11a353a", "objects": "809c50dca76a12c4"}
    assert b"annotations" not in Manifest.of(["cat"], [shard]).encode()


# What takes them


def test_show_verify_and_preview_take_images_without_labels(
    packed: Path, tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    summary = show_dataset(packed, tmp_path / "sheet.png")
    assert (summary["annotations"], summary["samples"]) == ("unlabelled", NUM_IMAGES)
    assert "60 samples of 0 classes" in format_summary(summary)
    assert verify(packed, deep=True) == []
    config = make_config(f"data.train={packed}", "data.val=null", "train.global_batch_size=12", "data.lanes=2")
    assert preview(config, ShardSet(packed), tmp_path / "preview.png")["samples"] == 6


# What needs labels


@pytest.mark.parametrize("which", ["data.train", "data.val"])
def test_training_is_refused_before_it_starts(
    packed: Path, digits: Path, make_config: Callable[..., Config], which: str
) -> None:
    config = make_config(f"{which}={packed}")
    told = r"shard-000000.tar: its data set holds images without labels, but task classification needs labelled images:"
    with pytest.raises(InputError, match=f"{told} pack them with their labels") as error:
        start_checks.forecast(config, 1)
    assert "\n" not in str(error.value)
    if which == "data.train":
        with pytest.raises(InputError, match=told):
            tune.micro_batch_sizes(config, 1)
    with pytest.raises(InputError, match=told):
        EvalFeed(ShardSet(packed), World(), config.image, batch_size=4)


def test_dense_tasks_and_their_previews_are_refused(
    packed: Path, tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(f"data.train={packed}", "data.val=null").model_copy(update={"task": SemanticFpnConfig()})
    with pytest.raises(InputError, match="holds images without labels, but task semantic_fpn needs images with label"):
        preview(config, ShardSet(packed), tmp_path / "preview.png")


def test_labelled_and_unlabelled_data_are_not_mixed(packed: Path, digits: Path) -> None:
    with pytest.raises(InputError, match=r"packed has images without labels and .*val labelled images"):
        ShardSet(digits / "val", packed)


def test_classes_of_unlabelled_data_are_refused(
    packed: Path, digit_images: Path, tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    with pytest.raises(InputError, match="holds images without labels, so it has no classes: name a data set"):
        read_classes(packed)
    config = make_config(f"data.train={packed}", f"data.val={digit_images / 'val'}", f"data.cache={tmp_path}")
    with pytest.raises(InputError, match="holds images without labels, so it has no classes"):
        open_validation(config.data)


@pytest.mark.parametrize(
    ("source", "name", "write", "options"),
    [
        ("--tars", "noise.tar.gz", write_tar, []),
        ("--images", "noise.parquet", write_named_parquet, ["--image-column", "img"]),
    ],
)
def test_tars_and_named_columns_are_packed_without_labels(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    name: str,
    write: Callable[[Path, Path], Path],
    options: list[str],
) -> None:
    path = write(tree, tmp_path / name)
    run(monkeypatch, "pack", source, path, *options, "--unlabelled", "--out", tmp_path / "out")
    assert sorted(contents(tmp_path / "out").values()) == sorted(pictures(tree).values())
    assert read_manifest(tmp_path / "out").annotations == "unlabelled"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--imagenet", "x"),
        ("--label", "cls"),
        ("--val-fraction", "0.1"),
        ("--classes-from", "packed"),
        ("--coco", "x.json"),
        ("--ade20k", "x"),
    ],
)
def test_options_about_labels_are_refused_beside_unlabelled(
    tree: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    monkeypatch.chdir(packed.parent)
    with pytest.raises(InputError, match=f"{option} needs labels, and --unlabelled reads none: give one of them"):
        run(monkeypatch, "pack", "--images", tree, "--unlabelled", option, value, "--out", tmp_path / "out")


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_sources_without_labels_name_the_option(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Path], Path]
) -> None:
    with pytest.raises(
        InputError, match=r"(?s)label.*[;\n] ?images without labels are packed with --unlabelled"
    ) as error:
        run(monkeypatch, "pack", "--images", write(tree, tmp_path / "source"), "--out", tmp_path / "out")
    # One line, or with a line to type between.
    assert str(error.value).count("\n") in (0, 2)


def test_flat_folder_names_the_option_before_the_queue_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config]
) -> None:
    told = r"no class folders, and 1 images without a class; .* images without labels are packed with --unlabelled"
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/3.png")
    with pytest.raises(InputError, match=told):
        run(monkeypatch, "pack", "--images", tmp_path / "flat", "--out", tmp_path / "out")
    config = make_config(f"data.train={tmp_path / 'flat'}", "data.val=null", "data.val_fraction=0.1")
    with pytest.raises(InputError, match=told):
        start_checks.forecast(config, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.mkdir(), "has no image among its 0 files: they end in jpg, jpeg"),
        (lambda root: root.write_text("hello"), "expected a folder, a .csv or .jsonl list, or a .parquet file"),
        (lambda root: None, "no such file or folder"),
    ],
)
def test_sources_without_images_are_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(InputError, match=message):
        unlabelled.find(tmp_path / "source")
