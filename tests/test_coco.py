"""COCO's annotations: packed as pycocotools understands them, and refused by name where they are wrong."""

import contextlib
import copy
import itertools
import json
import math
import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from pipeline.commands import shards as shards_command
from pipeline.errors import InputError
from pipeline.scenes import write_dataset as scene_layouts
from pipeline.shards import coco, images, object_annotations, public_datasets
from pipeline.shards.bad_samples import read_skipped
from pipeline.shards.index import ShardSet, read_manifest
from pipeline.shards.object_annotations import Annotated, BadObjectsError
from pipeline.shards.pack import pack
from pipeline.shards.show_dataset import format_summary, show_dataset
from pipeline.shards.verify import verify
from tests.in_process import run
from tests.test_ade20k import write_set

# Of pycocotools 2.0.11, which is older than numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

HEIGHT, WIDTH = 48, 64
NAMES = {5: "person", 2: "bicycle, bike", 90: "toothbrush"}
CLASSES = ["bicycle, bike", "person", "toothbrush"]
Table = dict[str, Any]


def segmentation(number: int) -> Any:
    """Of all kinds that COCO has, and one that goes beyond the image."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[10 : 20 + number, 5:40:3] = 1
    compressed: Any = masks.encode(np.asfortranarray(pixels))
    counts = np.flatnonzero(np.diff(pixels.ravel("F"), prepend=0, append=1 - pixels[-1, -1]))
    return [
        [[4.5, 3.25, 30.75, 5.5, 20.0, 33.125]],
        [[4, 4, 40, 4, 40, 30, 4, 30], [20.5, 20.5, 63.75, 22.0, 60.1, 47.9]],
        {"size": [HEIGHT, WIDTH], "counts": np.diff(counts, prepend=0).tolist()},
        {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
        [[50.0, 30.0, 64.02, 30.0, 64.02, 48.4, 50.0, 48.4]],
    ][number]


def annotation(number: int, image: int, **changes: Any) -> dict[str, Any]:
    kind = number % 5
    boxes = [4.5, 3.25, 26.25, 29.88], [4, 4, 59.75, 43.9], [5, 10, 34, 12], [5, 10, 34, 13], [50, 30, 14.02, 18.4]
    fields = {"id": number, "image_id": image, "category_id": list(NAMES)[number % 3], "iscrowd": int(kind == 2)}
    return {**fields, "bbox": list(boxes[kind]), "area": 100.5 + number, "segmentation": segmentation(kind), **changes}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five images: one without annotations, one with a crowd, one with a box that has no area."""
    images = [
        {"id": number, "file_name": f"{number:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for number in (9, 3, 7, 4, 8)
    ]
    rng = np.random.default_rng(0)
    (tmp_path / "coco/val2017").mkdir(parents=True)
    for image in images:
        pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "coco/val2017" / image["file_name"])
    places = (9, 3, 7, 4, 9, 4, 4)
    annotations = [annotation(number, image) for number, image in enumerate(places, 1)]
    annotations.append(annotation(1000, 7, bbox=[10, 10, 0, 7]))
    categories = [{"id": number, "name": name, "supercategory": "thing"} for number, name in NAMES.items()]
    write(tmp_path / "coco", {"images": images, "annotations": annotations, "categories": categories})
    return tmp_path / "coco"


def annotations_of(root: Path) -> Path:
    return root / "annotations/instances_val2017.json"


def read(root: Path) -> Table:
    return json.loads(annotations_of(root).read_text())


def write(root: Path, table: Table) -> None:
    annotations_of(root).parent.mkdir(exist_ok=True)
    annotations_of(root).write_text(json.dumps(table))


def samples(folder: Path) -> dict[str, Annotated]:
    shards = ShardSet(folder)
    return {
        shards.key(shard, row): object_annotations.decode(shards.read_annotation(shard, row), len(shards.classes))
        for shard, count in enumerate(shards.shard_samples)
        for row in range(count)
    }


# As pycocotools reads it


def require_same(packed: dict[str, Annotated], classes: list[str], reference: COCO) -> int:
    """Everything that is packed is what pycocotools reads; how many annotations that is."""
    assert len(packed) == len(reference.getImgIds())
    seen = 0
    for key, annotated in packed.items():
        (image,) = reference.loadImgs(annotated.image_id)
        assert image["file_name"] == f"{key}.jpg"
        assert (annotated.height, annotated.width) == (image["height"], image["width"])
        expected = {entry["id"]: entry for entry in reference.loadAnns(reference.getAnnIds(annotated.image_id))}
        assert [entry["id"] for entry in annotated.annotations] == list(expected)
        for entry in annotated.annotations:
            theirs = expected[entry["id"]]
            assert {name: entry[name] for name in ("bbox", "area", "iscrowd")}.items() <= theirs.items()
            assert classes[entry["label"]] == reference.loadCats(theirs["category_id"])[0]["name"]
            pixels = object_annotations.mask(entry, annotated.height, annotated.width)
            assert pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, reference.annToMask(theirs))
            seen += 1
    return seen


def test_packed_annotations_match_pycocotools(root: Path, tmp_path: Path) -> None:
    manifest = pack(coco.find(annotations_of(root)), tmp_path / "out", samples_per_shard=2)
    assert manifest.annotations == "objects"
    assert manifest.classes == CLASSES
    packed = samples(tmp_path / "out")
    assert require_same(packed, CLASSES, COCO(annotations_of(root))) == 8
    assert packed["000000000008"].annotations == []
    kinds = {entry["id"]: entry["segmentation"] for annotated in packed.values() for entry in annotated.annotations}
    assert isinstance(kinds[2]["counts"], str), "run lengths are compressed"
    assert kinds[1] == segmentation(1), "polygons stay as they are"
    assert not verify(tmp_path / "out", deep=True)


def test_packed_scenes_match_pycocotools(tmp_path: Path) -> None:
    scene_layouts.write_dataset(tmp_path / "scenes", {"train": 30, "val": 0}, seed=1)
    path = tmp_path / "scenes/coco/annotations/instances_train.json"
    manifest = pack(coco.find(path), tmp_path / "out", samples_per_shard=8)
    reference = COCO(path)
    assert require_same(samples(tmp_path / "out"), manifest.classes, reference) == len(reference.getAnnIds()) > 80
    assert (tmp_path / "out/ATTRIBUTION.txt").exists()


def test_rle_mask_decoding_matches_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for number in range(300):
        height, width = rng.integers(1, 60, 2).tolist()
        pixels = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        if number % 2:
            pixels = np.kron(pixels, np.ones((9, 7), np.uint8))
        runs: Any = masks.encode(np.asfortranarray(pixels))
        packed = {"size": list(pixels.shape), "counts": runs["counts"].decode()}
        np.testing.assert_array_equal(object_annotations.mask({"segmentation": packed}, *pixels.shape), pixels)


def test_arbitrary_rle_counts_are_decoded_or_rejected() -> None:
    """pycocotools reads past the end of some of these."""
    entry: dict[str, Any] = {"id": 1, "bbox": [0, 0, 2, 2], "area": 1, "iscrowd": 1}
    characters, accepted = [chr(code) for code in range(32, 128)], set()
    for counts in map("".join, itertools.chain(*(itertools.product(characters, repeat=n) for n in (1, 2)))):
        entry["segmentation"] = {"size": [3, 3], "counts": counts}
        with contextlib.suppress(BadObjectsError):
            packed = object_annotations.packed_form(entry, 0, 1, 3, 3)
            decoded: Any = masks.decode(packed["segmentation"])  # pyright: ignore[reportArgumentType]
            np.testing.assert_array_equal(object_annotations.mask(packed, 3, 3), decoded)
            accepted.add(counts)
    assert accepted == {"9", "Y0"} | {f"{chr(48 + run)}{chr(48 + 9 - run)}" for run in range(10)}
    rng = np.random.default_rng(0)
    whole: Any = masks.encode(np.asfortranarray((rng.random((30, 40)) < 0.2).astype(np.uint8)))
    for _ in range(500):
        counts = [chr(code) for code in whole["counts"]]
        for place in rng.integers(len(counts), size=3):
            counts[place] = chr(rng.integers(32, 127))
        entry["segmentation"] = {"size": [30, 40], "counts": "".join(counts[: rng.integers(1, len(counts))])}
        with pytest.raises(BadObjectsError, match="annotation 1: its segmentation"):
            object_annotations.packed_form(entry, 0, 1, 30, 40)


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 0, 2]])
def test_classes_from_other_data_set_are_used(root: Path, tmp_path: Path, order: list[int]) -> None:
    classes = [*(CLASSES[place] for place in order), "hair drier"]
    manifest = pack(coco.find(annotations_of(root), classes=classes), tmp_path / "out")
    assert manifest.classes == classes
    assert require_same(samples(tmp_path / "out"), classes, COCO(annotations_of(root))) == 8
    with pytest.raises(InputError, match="categories 'toothbrush' are not among the 2 classes of --classes-from"):
        coco.find(annotations_of(root), classes=CLASSES[:2])


def test_images_in_separate_and_nested_folders_are_packed(root: Path, tmp_path: Path) -> None:
    tree = read(root)
    (root / "val2017").rename(tmp_path / "pictures")
    (tmp_path / "pictures/a.b").mkdir()
    (tmp_path / "pictures/000000000003.jpg").rename(tmp_path / "pictures/a.b/3.jpg")
    tree["images"][1]["file_name"] = "a.b/3.jpg"
    write(root, tree)
    annotations_of(root).rename(tmp_path / "any.json")
    with pytest.raises(InputError, match=r"any.json: expected ROOT/annotations/instances_SPLIT.json .* give --images"):
        coco.find(tmp_path / "any.json")
    pack(coco.find(tmp_path / "any.json", tmp_path / "pictures"), tmp_path / "out")
    assert sorted(samples(tmp_path / "out"))[-1] == "a_b/3"


def test_scaled_objects_stay_aligned_with_images(tmp_path: Path) -> None:
    scene_layouts.write_dataset(tmp_path / "scenes", {"train": 12, "val": 0}, seed=2)
    path = tmp_path / "scenes/coco/annotations/instances_train.json"
    pack(coco.find(path), tmp_path / "large")
    pack(coco.find(path), tmp_path / "small", max_side=100)
    large, small = samples(tmp_path / "large"), samples(tmp_path / "small")
    shards = ShardSet(tmp_path / "small")
    assert not verify(tmp_path / "small", deep=True)
    ious = []
    for row in range(12):
        key, record = shards.key(0, row), shards.index(0)[row]
        before, after = large[key], small[key]
        assert (after.height, after.width) == (record["height"], record["width"])
        assert max(after.height, after.width) == 100
        for one, other in zip(before.annotations, after.annotations, strict=True):
            pixels = Image.fromarray(object_annotations.mask(one, before.height, before.width))
            expected = np.asarray(pixels.resize((after.width, after.height), Image.Resampling.NEAREST))
            found = object_annotations.mask(other, after.height, after.width)
            ious.append((found & expected).sum() / max((found | expected).sum(), 1))
            assert abs(other["area"] - expected.sum()) < 4 + 0.15 * other["area"]
            box = masks.toBbox(masks.encode(np.asfortranarray(expected)))
            assert np.abs(box - other["bbox"]).max() <= 2
            assert (one["iscrowd"], one["label"], one["id"]) == (other["iscrowd"], other["label"], other["id"])
    assert np.mean(ious) > 0.85, "polygons are drawn anew, which differs at the rim of small objects"


def test_object_axes_are_scaled_independently() -> None:
    entry = {"id": 1, "label": 0, "bbox": [10, 4, 20, 8], "area": 160, "iscrowd": 0}
    entry["segmentation"] = [[10, 4, 30, 4, 30, 12, 10, 12]]
    stored = object_annotations.encode(Annotated(5, 40, 100, [entry]))
    packed = object_annotations.decode(
        object_annotations.prepare(stored, (40, 100), images.Header("jpg", 10, 50), 1), 1
    )
    scaled = {"bbox": [5, 1, 10, 2], "area": 20, "segmentation": [[5, 1, 15, 1, 15, 3, 5, 3]]}
    assert packed == Annotated(5, 10, 50, [{**entry, **scaled}])
    assert object_annotations.prepare(stored, (40, 100), images.Header("jpg", 40, 100), 1) == stored


# At rest


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_readable_by_tarfile_and_webdataset(root: Path, tmp_path: Path) -> None:
    pack(coco.find(annotations_of(root)), tmp_path / "out")
    tar = tmp_path / "out/shard-000000.tar"
    with tarfile.open(tar) as members:
        assert [member.name.partition(".")[2] for member in members] == ["jpg", "json"] * 5
    dataset = webdataset.WebDataset(str(tar), shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    found = {sample["__key__"]: Annotated(**json.loads(sample["json"])) for sample in dataset}
    assert found == samples(tmp_path / "out")


def test_packed_bytes_are_independent_of_worker_count(root: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        out = tmp_path / str(workers)
        pack(coco.find(annotations_of(root)), out, samples_per_shard=2, max_side=50, workers=workers)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "12")
    assert one == two


GOOD = {"id": 1, "label": 2, "bbox": [1, 1, 5, 5], "area": 9, "iscrowd": 0}


@pytest.mark.parametrize(
    ("annotated", "reason"),
    [
        ({"image_id": 1, "height": 20, "width": 30, "annotations": [GOOD]}, None),
        ({"image_id": 1, "height": 20, "width": 31, "annotations": [GOOD]}, "its objects are in 31 × 20 pixels"),
        ({"image_id": 1, "height": 20, "annotations": []}, "its annotation: no objects in JSON: .*width"),
        ({"image_id": "1", "height": 20, "width": 30, "annotations": []}, "image_id, height and width are numbers"),
        (
            {"image_id": 1, "height": 20, "width": 30, "annotations": [{**GOOD, "label": 3}]},
            "label 3 is not below the 3",
        ),
        ({"image_id": 1, "height": 20, "width": 30, "annotations": [[]]}, "annotation None: its id is not a whole"),
        ([], "no objects in JSON"),
    ],
)
def test_deep_verify_checks_objects(tmp_path: Path, annotated: Any, reason: str | None) -> None:
    buffer = BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG")
    data = write_set(tmp_path / "data", buffer.getvalue(), json.dumps(annotated).encode(), "objects")
    assert not verify(data)
    faults = verify(data, deep=True)
    assert [fault.key for fault in faults] == ["a"] * bool(reason)
    if reason:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(faults[0].reason)


# Bad input


def change(kind: str, number: int, **fields: Any) -> Callable[[Table, Path], object]:
    """Of an entry of images, annotations or categories; a field that becomes `...` is taken away."""

    def apply(tree: Table, root: Path) -> None:
        entry = next(entry for entry in tree[kind] if entry["id"] == number)
        entry |= fields
        for name, value in fields.items():
            if value is ...:
                del entry[name]

    return apply


FULL = HEIGHT * WIDTH


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda _, root: (root / "val2017/000000000004.jpg").unlink(),
            "000000000004.jpg: cannot be read: No such file",
        ),
        (
            lambda _, root: Image.new("RGB", (WIDTH, 50)).save(root / "val2017/000000000004.jpg"),
            "000000000004.jpg: 64 × 50 pixels, but its annotations are of 64 × 48",
        ),
        (change("images", 4, height=49), r"annotation 7: .* \[height, width\] \[48, 64\], but its image of \[49, 64\]"),
        (change("images", 8, height=49), "64 × 48 pixels, but its annotations are of 64 × 49"),
        (change("annotations", 4, category_id=3), "annotation 4: category_id 3 is not among categories"),
        (change("annotations", 4, category_id="person"), "annotation 4: category_id 'person' is not among"),
        (change("annotations", 4, area=...), "instances_val2017.json: annotation 4: has no area"),
        (change("annotations", 4, bbox=...), "annotation 4: has no bbox"),
        (change("annotations", 4, iscrowd=...), "annotation 4: has no iscrowd"),
        (change("annotations", 4, iscrowd=2), "annotation 4: iscrowd 2 is not 0 or 1"),
        (change("annotations", 4, area=-1), "annotation 4: area -1 is not a number of pixels"),
        (change("annotations", 4, area="big"), "annotation 4: area 'big' is not"),
        (change("annotations", 4, id="4"), "annotation '4': its id is not a whole number"),
        (change("annotations", 4, id=1), "annotation 1: another one has this id"),
        (change("annotations", 4, bbox=[1, 2, 3]), r"annotation 4: bbox \[1, 2, 3\] is not four finite numbers"),
        (change("annotations", 4, bbox=[1, 2, 3, None]), "is not four finite numbers"),
        (change("annotations", 4, bbox=[1, 2, 3, math.nan]), "is not four finite numbers"),
        (change("annotations", 4, bbox=[1, 2, math.inf, 3]), "is not four finite numbers"),
        (change("annotations", 4, bbox=[1, 2, 3, -3]), "has a negative side"),
        (change("annotations", 4, bbox=[64, 2, 3, 3]), "lies outside the image of 64 × 48 pixels"),
        (change("annotations", 4, bbox=[-9, 2, 8, 3]), "lies outside the image"),
        (change("annotations", 4, bbox=[1, 50, 3, 0]), "lies outside the image"),
        (
            change("annotations", 4, segmentation="all"),
            "its segmentation is neither a list of polygons nor run lengths",
        ),
        (change("annotations", 4, segmentation={"counts": [FULL]}), "is neither a list of polygons nor run lengths"),
        (change("annotations", 4, segmentation={"size": [48, 64]}), "is neither a list of polygons nor run lengths"),
        (change("annotations", 4, segmentation={"size": [64, 48], "counts": "0"}), r"\[64, 48\], but its image of"),
        (change("annotations", 4, segmentation={"size": [48, 64], "counts": "~"}), "is not compressed as pycocotools"),
        (change("annotations", 4, segmentation={"size": [48, 64], "counts": "é"}), "is not compressed as pycocotools"),
        (
            change("annotations", 4, segmentation={"size": [48, 64], "counts": "5"}),
            "has runs of 5 pixels, but its image",
        ),
        (
            change("annotations", 4, segmentation={"size": [48, 64], "counts": [9]}),
            "has runs of 9 pixels, but its image",
        ),
        (change("annotations", 4, segmentation={"size": [48, 64], "counts": [-1, FULL + 1]}), "are no lengths of runs"),
        (change("annotations", 4, segmentation=[[0, 0, 64, 48] * 500]), "has outlines of more than 7,168 pixels"),
        (change("annotations", 4, segmentation=[[1, 2, 3, 4, 5]]), "has a polygon of 5 numbers"),
        (change("annotations", 4, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "has a polygon of 7 numbers"),
        (change("annotations", 4, segmentation=[1, 2, 3, 4, 5, 6]), "has a polygon that is not a list"),
        (change("annotations", 4, segmentation=[[1, 2, 3, 4, 5, "6"]]), "has a polygon that is not a list of finite"),
        (change("annotations", 4, segmentation=[[1, 2, 3, 4, 5, 1e9]]), "has a polygon with a point far outside"),
    ],
)
def test_bad_samples_are_rejected_or_skipped(root: Path, tmp_path: Path, damage: Any, reason: str) -> None:
    tree = read(root)
    damage(tree, root)
    write(root, tree)
    with pytest.raises(InputError, match=reason):
        pack(coco.find(annotations_of(root)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = pack(coco.find(annotations_of(root)), tmp_path / "out", skip_bad=True)
    assert manifest.samples == 4
    (skipped,) = read_skipped(tmp_path / "out")
    assert skipped["key"] in ("000000000004", "000000000008")
    assert skipped["path"] == str(root / f"val2017/{skipped['key']}.jpg")
    assert not verify(tmp_path / "out", deep=True)


def test_annotations_without_image_are_rejected_or_skipped(root: Path, tmp_path: Path) -> None:
    tree = read(root)
    change("annotations", 4, image_id=5)(tree, root)
    write(root, tree)
    with pytest.raises(InputError, match="annotation 4 is of image 5, which is not among its images"):
        pack(coco.find(annotations_of(root)), tmp_path / "out")
    manifest = pack(coco.find(annotations_of(root)), tmp_path / "out", skip_bad=True)
    assert manifest.samples == 5
    (skipped,) = read_skipped(tmp_path / "out")
    assert (skipped["path"], skipped["key"]) == (str(annotations_of(root)), "annotation 4")


def test_annotations_of_other_data_set_are_rejected(root: Path, tmp_path: Path) -> None:
    (root / "val2017").rename(root / "train2017")
    (root / "val2017").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "val2017/1.jpg")
    with pytest.raises(InputError, match=r"val2017/000000000003.jpg: cannot be read: No such file"):
        pack(coco.find(annotations_of(root)), tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change("images", 4, id=3), "expected an id of its own, a whole number"),
        (change("images", 4, id="4"), "expected an id of its own, a whole number"),
        (change("images", 4, file_name=...), "image 4: file_name None; expected a path below"),
        (change("images", 4, file_name="../x.jpg"), r"image 4: file_name '../x.jpg'; expected a path below"),
        (change("images", 4, file_name="/etc/x.jpg"), "image 4: file_name '/etc/x.jpg'; expected a path below"),
        (change("images", 4, height=...), "image 4: height None and width 64; expected pixels"),
        (change("images", 4, width=0), "image 4: height 48 and width 0; expected pixels"),
        (change("categories", 5, id=2), "expected an id of its own"),
        (change("categories", 5, name="toothbrush"), "expected a name of its own"),
        (change("categories", 5, name=...), "expected a name of its own"),
        (lambda tree, _: tree.pop("categories"), "it has no list of categories"),
        (lambda tree, _: tree["categories"].clear(), "0 categories; at least one"),
        (lambda tree, _: tree["images"].clear(), "lists no images"),
        (lambda tree, _: tree["annotations"].append(7), "it has no list of annotations"),
        (lambda tree, _: tree.update(annotations={}), "it has no list of annotations"),
    ],
)
def test_invalid_annotation_file_is_rejected(root: Path, damage: Any, reason: str) -> None:
    tree = read(root)
    damage(tree, root)
    write(root, tree)
    with pytest.raises(InputError, match=reason):
        coco.find(annotations_of(root))


def test_duplicate_image_file_is_rejected(root: Path, tmp_path: Path) -> None:
    tree = read(root)
    change("images", 4, file_name="000000000003.jpg")(tree, root)
    write(root, tree)
    with pytest.raises(InputError, match="would both be '000000000003' in the shards"):
        pack(coco.find(annotations_of(root)), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[]", "it has no list of images"),
        (b"[" * 99999, "not JSON"),
    ],
)
def test_non_json_annotation_file_is_rejected(root: Path, text: bytes, reason: str) -> None:
    annotations_of(root).write_bytes(text)
    with pytest.raises(InputError, match=reason):
        coco.find(annotations_of(root))


def test_missing_files_are_reported(root: Path) -> None:
    with pytest.raises(InputError, match=r"instances_test.json: no such file; expected ROOT/annotations/instances_SPL"):
        coco.find(root / "annotations/instances_test.json")
    (root / "val2017").rename(root / "train2017")
    with pytest.raises(InputError, match=r"coco/val2017: no such folder; expected ROOT/annotations/instances_SPLIT"):
        coco.find(annotations_of(root))


def test_empty_boxes_are_kept_and_degenerate_polygons_skipped(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = read(root)
    change("annotations", 1, segmentation=[[1, 2, 3, 4], *segmentation(1)])(tree, root)
    change("annotations", 4, segmentation=[[1, 2]])(tree, root)
    change("annotations", 7, segmentation=[])(tree, root)
    write(root, tree)
    pack(coco.find(annotations_of(root)), tmp_path / "out")
    told = capsys.readouterr().err
    assert "1 boxes without area, which training ignores" in told
    assert "skipped 2 polygons of fewer than three points" in told
    packed = {entry["id"]: entry for found in samples(tmp_path / "out").values() for entry in found.annotations}
    assert packed[1]["segmentation"] == segmentation(1)
    assert not object_annotations.mask(packed[4], HEIGHT, WIDTH).any()
    assert "segmentation" not in packed[7]
    assert packed[1000]["bbox"] == [10, 10, 0, 7]


# Straight from a file


def test_configured_annotation_file_is_packed_once(root: Path, tmp_path: Path) -> None:
    found = public_datasets.root_of(annotations_of(root), str(tmp_path / "cache"))
    pack(coco.find(annotations_of(root)), tmp_path / "out")
    assert read_manifest(found).digest == read_manifest(tmp_path / "out").digest
    before = Path(found).stat()
    assert public_datasets.root_of(str(annotations_of(root)), str(tmp_path / "cache")) == found
    assert os.path.samestat(before, Path(found).stat())
    assert public_datasets.root_of(tmp_path / "out") == tmp_path / "out"
    assert public_datasets.root_of("https://host/annotations/instances_val2017.json").startswith("https://")  # pyright: ignore
    with pytest.raises(
        InputError, match=r"neither label maps in ROOT/annotations/SPLIT nor ROOT/annotations/instances"
    ):
        public_datasets.packed(tmp_path / "out")


@pytest.mark.parametrize("changed", ["annotation", "image", "removed"])
def test_changed_data_set_is_packed_again(root: Path, tmp_path: Path, changed: str) -> None:
    first = public_datasets.packed(annotations_of(root), tmp_path / "cache")
    tree = read(root)
    if changed == "annotation":
        change("annotations", 4, area=7)(tree, root)
        write(root, tree)
    elif changed == "image":
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "val2017/000000000008.jpg")
    else:
        tree["images"].pop()
        write(root, tree)
    second = public_datasets.packed(annotations_of(root), tmp_path / "cache")
    assert read_manifest(second).digest != read_manifest(first).digest


# Shown, and by command


def test_show_counts_objects_by_size_and_class(root: Path, tmp_path: Path) -> None:
    tree = read(root)
    for entry, area in zip(tree["annotations"], (10, 1023.9, 1024, 5000, 9215, 9216, 99999, 3), strict=True):
        entry["area"] = area
    write(root, tree)
    pack(coco.find(annotations_of(root)), tmp_path / "out")
    summary = show_dataset(tmp_path / "out", tmp_path / "sheet.png")
    single = [entry for entry in tree["annotations"] if not entry["iscrowd"]]
    assert (summary["objects"], summary["crowds"], summary["objects_with_mask"]) == (len(single), 2, len(single))
    assert summary["objects_by_size"] == {"small": 2, "medium": 3, "large": 1}
    assert summary["objects_per_image"] == {"min": 0, "mean": len(single) / 5, "max": 2}
    counts = {NAMES[number]: sum(entry["category_id"] == number for entry in single) for number in NAMES}
    assert (summary["largest_classes"], summary["smallest_classes"]) == (counts, {})
    assert "6 objects in 5 images, 6 of them with masks; 2 crowds beside them" in format_summary(summary)
    assert "small 2 (33%)   medium 3 (50%)   large 1 (17%)" in format_summary(summary)


def test_contact_sheet_draws_boxes(root: Path, tmp_path: Path) -> None:
    pack(coco.find(annotations_of(root)), tmp_path / "with")
    tree = read(root)
    tree["annotations"].clear()
    write(root, tree)
    pack(coco.find(annotations_of(root)), tmp_path / "without")
    sheets = []
    for name in ("with", "without"):
        show_dataset(tmp_path / name, tmp_path / f"{name}.png")
        sheets.append(np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)[90:400])
    assert (np.abs(sheets[0] - sheets[1]).sum(-1) > 0).mean() > 0.1


def test_show_skips_damaged_objects(root: Path, tmp_path: Path) -> None:
    pack(coco.find(annotations_of(root)), tmp_path / "out")
    record = ShardSet(tmp_path / "out").index(0)[1]
    with (tmp_path / "out/shard-000000.tar").open("r+b") as file:
        file.seek(int(record["annotation_offset"]) + 5)
        file.write(b"###")
    summary = show_dataset(tmp_path / "out", tmp_path / "sheet.png")
    assert summary["images_read"] == 4
    assert images.decode(ShardSet(tmp_path / "out").read(0, 1))


def test_cli_packs_and_verifies_coco(root: Path, tmp_path: Path) -> None:
    done = run(shards_command.main, "pack", "--coco", annotations_of(root), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["samples"], result["classes"], result["num_skipped"]) == (5, 3, 0)
    done = run(shards_command.main, "verify", "--deep", tmp_path / "out")
    assert json.loads(done.stdout) == {"data": str(tmp_path / "out"), "ok": True, "faults": []}
    tree = copy.deepcopy(read(root))
    change("annotations", 4, bbox=[99, 2, 3, 3])(tree, root)
    write(root, tree)
    done = run(shards_command.main, "pack", "--coco", annotations_of(root), "--out", tmp_path / "other")
    assert done.returncode == 2
    assert "000000000004.jpg: instances_val2017.json: annotation 4: bbox [99, 2, 3, 3] lies outside" in done.stderr
    done = run(
        shards_command.main, "pack", "--coco", annotations_of(root), "--ade20k", root, "--out", tmp_path / "other"
    )
    assert done.returncode == 2
    assert "--ade20k and --coco name data sets of different kinds" in done.stderr
