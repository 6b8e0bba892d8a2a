"""Scenes: true COCO and ADE20K layouts of one truth, the same bytes for the same seed, nothing shared by the splits."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter
from pycocotools import mask as masks
from pycocotools.coco import COCO

from pipeline.commands import scenes as scenes_command
from pipeline.scenes import photographs, write_dataset
from pipeline.scenes.coco_masks import polygons, rle
from pipeline.scenes.compose_scene import NAMES, compose, scans
from pipeline.scenes.photographs import Split
from pipeline.shards import ade20k
from pipeline.shards.images import decode_map
from pipeline.shards.pack import pack
from pipeline.shards.picture_credits import ATTRIBUTION
from tests import in_process

# Of pycocotools 2.0.11, which is older than numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

TRAIN, VAL = 40, 12


run = functools.partial(in_process.run, scenes_command.main)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "out"
    done = run("--out", folder, "--train", TRAIN, "--val", VAL, "--seed", 3)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["train"], result["val"]) == (TRAIN, VAL)
    return folder


def coco(scenes: Path, split: Split, capsys: pytest.CaptureFixture[str]) -> Any:
    table = COCO(scenes / f"coco/annotations/instances_{split}.json")
    capsys.readouterr()  # it prints
    return table


def test_scenes_are_deterministic_for_a_seed(scenes: Path, tmp_path: Path) -> None:
    write_dataset.write_dataset(tmp_path / "again", {"train": TRAIN, "val": VAL}, seed=3)
    assert contents(tmp_path / "again") == contents(scenes)
    write_dataset.write_dataset(tmp_path / "other", {"train": 2, "val": 2}, seed=4)
    name = "ade20k/images/training/scene_00000001.jpg"
    assert (tmp_path / "other" / name).read_bytes() != (scenes / name).read_bytes()


def test_scene_does_not_depend_on_the_number_of_scenes(scenes: Path, tmp_path: Path) -> None:
    write_dataset.write_dataset(tmp_path / "few", {"train": 5, "val": 0}, seed=3)
    few, many = contents(tmp_path / "few/ade20k"), contents(scenes / "ade20k")
    assert len(few) == 11
    assert all(many[name] == data for name, data in few.items() if not name.endswith(".txt"))


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("val", VAL)])
def test_pycocotools_reads_the_drawn_masks(
    scenes: Path, split: Split, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    table = coco(scenes, split, capsys)
    assert sorted(table.getImgIds()) == list(range(1, count + 1))
    names = {entry["id"]: entry["name"] for entry in table.loadCats(table.getCatIds())}
    for number in table.getImgIds():
        scene = compose(3, split, number)
        (entry,) = table.loadImgs(number)
        with Image.open(scenes / "coco" / split / entry["file_name"]) as image:
            assert (entry["width"], entry["height"]) == image.size
        annotations = table.loadAnns(table.getAnnIds(number))
        assert len(annotations) == len(scene.instances)
        for annotation, instance in zip(annotations, scene.instances, strict=True):
            mask = table.annToMask(annotation).astype(bool)
            assert (mask == instance.mask).all()
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == masks.toBbox(table.annToRLE(annotation)).tolist()
            assert annotation["iscrowd"] == instance.is_crowd
            assert names[annotation["category_id"]] == write_dataset.NAMES[instance.digit]


def test_masks_round_trip_as_polygons_and_rle() -> None:
    """With holes, islands in holes, and pixels that touch by their corners alone."""
    rng = np.random.default_rng(0)
    for number in range(300):
        height, width = rng.integers(1, 40, 2).tolist()
        noise = rng.random((height, width))
        if number % 2:
            coarse = Image.fromarray(rng.random((height // 5 + 1, width // 5 + 1)).astype(np.float32))
            noise = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        mask = noise < rng.uniform(0.1, 0.9)
        mask[rng.integers(height), rng.integers(width)] = True
        runs: Any = rle(mask)
        assert (masks.decode(masks.frPyObjects(runs, height, width)) == mask).all()
        outlines: Any = polygons(mask)
        drawn = masks.decode(masks.merge(masks.frPyObjects(outlines, height, width)))
        assert (drawn == mask).all()


def test_coco_files_follow_the_coco_layout(scenes: Path) -> None:
    table = json.loads((scenes / "coco/annotations/instances_train.json").read_text())
    ids = [category["id"] for category in table["categories"]]
    assert len(ids) == 10
    assert set(ids) < set(range(1, max(ids) + 1))  # with gaps
    kinds = {bool(entry["iscrowd"]): type(entry["segmentation"]) for entry in table["annotations"]}
    assert kinds == {False: list, True: dict}
    licences = {entry["id"] for entry in table["licenses"]}
    assert {entry["license"] for entry in table["images"]} <= licences
    one, other = (scenes / folder / "scene_00000001.jpg" for folder in ("coco/train", "ade20k/images/training"))
    assert one.samefile(other)


def test_scenes_cover_object_sizes_counts_classes_and_overlaps(scenes: Path) -> None:
    table = json.loads((scenes / "coco/annotations/instances_train.json").read_text())
    single = [entry for entry in table["annotations"] if not entry["iscrowd"]]
    sizes = np.array([entry["area"] for entry in single])
    small, large = (sizes < 32**2).mean(), (sizes > 96**2).mean()
    assert min(small, 1 - small - large) > 0.2
    assert large > 0.03
    assert sizes.min() >= 16
    counts = [sum(entry["image_id"] == image["id"] for entry in single) for image in table["images"]]
    assert min(counts) == 0
    assert max(counts) >= 6
    assert {entry["category_id"] for entry in single} == set(write_dataset.CATEGORY_IDS)
    boxes = [(entry["image_id"], *entry["bbox"]) for entry in single]
    pairs = [(a, b) for a in boxes for b in boxes if a < b and a[0] == b[0]]
    overlapping = sum(
        a[1] < b[1] + b[3] and b[1] < a[1] + a[3] and a[2] < b[2] + b[4] and b[2] < a[2] + a[4] for a, b in pairs
    )
    assert overlapping > 10


def grown(mask: npt.NDArray[np.bool_], pixels: int) -> npt.NDArray[np.bool_]:
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def test_ade20k_maps_match_coco_instances(scenes: Path) -> None:
    for number in range(1, TRAIN + 1):
        scene = compose(3, "train", number)
        with Image.open(scenes / f"ade20k/annotations/training/scene_{number:08d}.png") as image:
            assert image.mode == "L"
            classes = np.asarray(image)
        owners = np.zeros(classes.shape, int)
        for instance in scene.instances:
            assert set(np.unique(classes[instance.mask])) <= {0, 2 + instance.digit}  # 0: another's rim
            owners += instance.mask
        assert owners.max(initial=0) <= 1
        assert ((classes >= 2) <= (owners == 1)).all()
        strokes = owners > 0
        assert (classes[grown(strokes, 1) & ~strokes] == 0).all()
        assert (classes[~grown(strokes, 1)] == 1).all()


def test_digits_are_visible_where_their_masks_are(scenes: Path) -> None:
    contrasts, moved = [], []
    for number in range(1, 16):
        scene = compose(3, "train", number)
        with Image.open(scenes / f"coco/train/scene_{number:08d}.jpg") as image:
            grey = np.asarray(image.convert("L")).astype(float)
        for instance in scene.instances:
            for mask, found in ((instance.mask, contrasts), (np.roll(instance.mask, (9, 9), (0, 1)), moved)):
                ring = grown(mask, 4) & ~grown(mask, 1)
                found.append(abs(grey[mask].mean() - grey[ring].mean()))
    assert np.median(contrasts) > 60
    assert np.median(moved) < np.median(contrasts) / 2


def test_splits_share_no_photograph_pixels_and_no_digits() -> None:
    for photograph in photographs.PHOTOGRAPHS:
        left, right = (photograph.pixels(split) for split in ("train", "val"))
        whole = np.concatenate([left, right], axis=1)
        np.testing.assert_array_equal(whole, photographs._pixels(photograph.name, photograph.package))
        assert left.shape[1] > right.shape[1] > 100
    (train, _), (val, _) = scans("train"), scans("val")
    assert (len(train), len(val)) == (1437, 360)
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in val}
    shapes = [[compose(3, split, number).image.shape for number in range(4)] for split in ("train", "val")]
    assert shapes[0] != shapes[1]


def test_every_photograph_is_credited(scenes: Path) -> None:
    text = (scenes / "ATTRIBUTION.txt").read_text()
    for photograph in photographs.PHOTOGRAPHS:
        assert f"{photograph.author}, {photograph.licence}" in text
    assert text.count("CC BY 2.0") == 2  # scikit-learn's
    assert "CC BY 4.0" in text  # the digits


def test_scenes_pack_as_ade20k(scenes: Path, tmp_path: Path) -> None:
    manifest = pack(ade20k.find(scenes / "ade20k/annotations/validation"), tmp_path / "packed")
    assert manifest.samples == VAL
    assert manifest.classes == [write_dataset.BACKGROUND, *NAMES]


def test_ade20k_class_table_matches_the_maps(scenes: Path) -> None:
    lines = (scenes / "ade20k/objectInfo150.txt").read_text().splitlines()
    maps = [np.asarray(Image.open(path)) for path in (scenes / "ade20k/annotations/training").iterdir()]
    total = sum((values > 0).sum() for values in maps)
    for value, line in enumerate(lines[1:], 1):
        index, ratio, train, _, name = line.split("\t")
        assert (int(index), name) == (value, (write_dataset.BACKGROUND, *NAMES)[value - 1])
        assert int(train) == sum((values == value).any() for values in maps)
        assert float(ratio) == pytest.approx(sum((values == value).sum() for values in maps) / total, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{full}"], "already holds something; give an empty or a new folder"),
        (["--out", "{new}", "--sides", "20-40"], "--sides 20-40: expected A-B"),
        (["--out", "{new}", "--sides", "300-200"], "--sides 300-200: expected A-B"),
    ],
)
def test_scenes_command_rejects_wrong_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "note").touch()
    done = run(*(part.format(full=tmp_path, new=tmp_path / "new") for part in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "new").exists()


def test_digit_crops_match_the_annotations(scenes: Path, tmp_path: Path) -> None:
    table = json.loads((scenes / "coco/annotations/instances_val.json").read_text())
    names = {category["id"]: category["name"] for category in table["categories"]}
    sizes: dict[str, list[tuple[float, float]]] = {name: [] for name in names.values()}
    for annotation in table["annotations"]:
        if not annotation["iscrowd"]:
            sizes[names[annotation["category_id"]]].append(tuple(annotation["bbox"][2:]))
    for name, boxes in sizes.items():
        crops = sorted((scenes / "crops/val" / name).glob("*.jpg"))
        assert len(crops) == len(boxes)
        for crop, (width, height) in zip(crops, boxes, strict=True):
            with Image.open(crop) as picture:
                assert picture.width >= width - 1
                assert picture.height >= height - 1
    manifest = pack(scenes / "crops/val", tmp_path / "packed")
    assert manifest.classes == sorted(name for name, boxes in sizes.items() if boxes)
    assert (tmp_path / "packed" / ATTRIBUTION).read_text() == (scenes / ATTRIBUTION).read_text()


def test_scenes_can_be_limited_to_some_digits(tmp_path: Path) -> None:
    write_dataset.write_dataset(tmp_path, {"train": 12, "val": 3}, side_px=(128, 160), digits=range(3, 6))
    maps = [decode_map(path.read_bytes()) for path in tmp_path.glob("ade20k/annotations/*/*.png")]
    assert {*np.unique(np.concatenate([each.ravel() for each in maps])).tolist()} == {0, 1, 2, 3, 4}
    manifest = pack(ade20k.find(tmp_path / "ade20k/annotations/training"), tmp_path / "packed")
    assert manifest.classes == ["background", "three", "four", "five"]
    table = json.loads((tmp_path / "coco/annotations/instances_train.json").read_text())
    assert [category["name"] for category in table["categories"]] == ["three", "four", "five"]
    assert {path.name for path in tmp_path.glob("crops/train/*")} == {"three", "four", "five"}
