"""What a person is shown of a data set: the right counts, and a sheet with the right pictures."""

import contextlib
import functools
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.commands import shards as shards_command
from pipeline.config import Config, load_config
from pipeline.errors import InputError
from pipeline.feed.loader import TrainFeed
from pipeline.feed.order import Order
from pipeline.feed.preview import preview
from pipeline.pictures.contact_sheet import Sheet
from pipeline.shards.index import ShardSet
from pipeline.shards.index_tars import index_tars
from pipeline.shards.open_data import open_training
from pipeline.shards.pack import pack
from pipeline.shards.show_dataset import format_summary, show_dataset
from pipeline.world import World
from tests import in_process
from tests.conftest import write_config
from tests.servers import FaultyServer

TITLE_PX = 90  # with the data set's name and the seed
COLOURS = {"blue": (0, 0, 255), "green": (0, 128, 0), "red": (255, 0, 0)}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Flat pictures: 2 blue, 3 green, 5 red, of 40 to 49 by 20 pixels."""
    number = 0
    for name, count in zip(COLOURS, (2, 3, 5), strict=True):
        for _ in range(count):
            path = tmp_path / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + number, 20), COLOURS[name]).save(path)
            number += 1
    pack(tmp_path / "images", tmp_path / "packed", samples_per_shard=4)
    return tmp_path / "packed"


def test_summary_has_counts_and_sizes(packed: Path, tmp_path: Path) -> None:
    summary = show_dataset(packed, tmp_path / "sheet.png")
    assert summary["samples"] == 10
    assert summary["shards"] == 3
    assert summary["samples_per_class"] == {"min": 2, "median": 3.0, "max": 5}
    assert summary["largest_classes"] == {"red": 5, "green": 3, "blue": 2}
    assert summary["smallest_classes"] == {}, "each class is listed once"
    assert summary["short_side_px"]["p0"] == summary["short_side_px"]["p100"] == 20
    assert (summary["long_side_px"]["p0"], summary["long_side_px"]["p100"]) == (40, 49)
    sizes = [path.stat().st_size for path in (tmp_path / "images").rglob("*.png")]
    assert summary["bytes"] == sum(sizes)
    assert (summary["image_bytes"]["p0"], summary["image_bytes"]["p100"]) == (min(sizes), max(sizes))
    text = format_summary(summary)
    assert "10 samples of 3 classes in 3 shards" in text
    assert "min 2   median 3   max 5" in text


@pytest.mark.parametrize("num_classes", [1, 5, 7, 10, 12])
def test_summary_lists_each_class_once(num_classes: int, tmp_path: Path) -> None:
    sizes = {f"c{number:02}": number + 1 for number in range(num_classes)}
    for name, size in sizes.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(size):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / f"{number}.png")
    pack(tmp_path / "images", tmp_path / "packed")
    summary = show_dataset(tmp_path / "packed", tmp_path / "sheet.png")
    descending = list(sizes)[::-1]
    assert list(summary["largest_classes"]) == descending[:5]
    assert list(summary["smallest_classes"]) == descending[5:][::-1][:5]
    listed = [
        line.split()[-1]
        for line in format_summary(summary).splitlines()
        if line.split()[-1:] and line.split()[-1] in sizes
    ]
    assert sorted(listed) == sorted({*descending[:5], *descending[-5:]})


def test_contact_sheet_shows_samples_of_every_class(packed: Path, tmp_path: Path) -> None:
    show_dataset(packed, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    firsts = {name: np.argwhere((pixels == colour).all(axis=-1)) for name, colour in COLOURS.items()}
    areas = {name: len(found) for name, found in firsts.items()}
    # Each is scaled to the same width and a height that follows from its shape.
    assert areas["blue"] < areas["green"] < areas["red"]
    # Of a class side by side, in the order of the classes.
    assert tuple(firsts["blue"][0]) < tuple(firsts["green"][0]) or firsts["blue"][0][1] < firsts["green"][0][1]


def test_seed_chooses_the_samples_on_the_sheet(digits: Path, tmp_path: Path) -> None:
    sheets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        show_dataset(digits / "val", tmp_path / name, seed)
        sheets.append(np.asarray(Image.open(tmp_path / name))[TITLE_PX:])
    assert (sheets[0] == sheets[1]).all()
    assert (sheets[0] != sheets[2]).any(axis=-1).mean() > 0.3


def test_damaged_sample_changes_only_its_tile(packed: Path, tmp_path: Path) -> None:
    show_dataset(packed, tmp_path / "before.png")
    record = ShardSet(packed).index(0)[0]
    with (packed / "shard-000000.tar").open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(b"damage")
    show_dataset(packed, tmp_path / "after.png")
    before, after = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("before", "after"))
    changed = np.argwhere((before != after).any(axis=-1))
    height, width = np.ptp(changed, axis=0) + 1
    assert 0 < height <= 150  # one tile
    assert 100 < width <= 150


def test_unwritable_sheet_path_is_rejected(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: No such file or directory; name another file"):
        show_dataset(packed, tmp_path / "none" / "sheet.png")


def test_remote_data_set_gives_the_same_sheet(packed: Path, tmp_path: Path) -> None:
    with FaultyServer(packed) as server:
        summary = show_dataset(server.url, tmp_path / "sheet.png")
    assert summary["samples"] == 10
    show_dataset(packed, tmp_path / "local.png")
    local, remote = (np.asarray(Image.open(tmp_path / name))[TITLE_PX:] for name in ("local.png", "sheet.png"))
    assert (local == remote).all()


# The commands


run = functools.partial(in_process.run, shards_command.main)


def result_of(process: subprocess.CompletedProcess[str], returncode: int = 0) -> dict:
    assert process.returncode == returncode, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_shards_commands_end_with_a_json_result(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "red" / "bad.jpg").write_text("hello")
    refused = run("pack", "--images", "images", "--out", "p", folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[0] == "error: images that cannot be packed:"
    assert "images/red/bad.jpg: not an image" in refused.stderr
    result = result_of(run("pack", "--images", "images", "--out", "p", "--skip-bad", "--max-side", 30, folder=tmp_path))
    assert result["samples"] == 10
    assert result["num_skipped"] == 1
    assert result["skipped"] == [{"path": "images/red/bad.jpg", "key": "red/bad", "reason": "not an image"}]

    assert result_of(run("verify", "p", "--deep", folder=tmp_path)) == {"data": "p", "ok": True, "faults": []}
    (tmp_path / "p" / "shard-000000.tar").unlink()
    found = run("verify", "p", "--workers", 1, folder=tmp_path)
    (fault,) = result_of(found, returncode=1)["faults"]
    assert fault["shard"] == "shard-000000.tar"
    assert "1 faults:\n  shard-000000.tar:" in found.stderr

    shown = run("show", "packed", folder=tmp_path)
    assert result_of(shown)["sheet"] == "packed-sheet.png"
    assert (tmp_path / "packed-sheet.png").exists()
    assert "samples per class   min 2" in shown.stderr

    (tmp_path / "packed" / "manifest.json").unlink()
    (tmp_path / "packed" / "x.tar").write_text("hello")
    found = result_of(run("index", "packed", "--workers", 1, folder=tmp_path), returncode=1)
    assert found["faults"] == [{"shard": "x.tar", "key": None, "reason": "not a tar"}]
    result = result_of(run("index", "packed", "--skip-bad", "--out", "i", "--workers", 1, folder=tmp_path))
    assert result["samples"] == 10
    assert result["skipped"] == found["faults"]


# The preview of a run's augmentation


class Drawn:
    """What a preview puts on its sheet, row by row: pictures, captions and lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[tuple[Any, ...]]] = [[]]
        add, end_row = Sheet.add, Sheet.end_row

        def noted_add(sheet: Sheet, *tile: Any) -> None:
            self.rows[-1].append(tile)
            add(sheet, *tile)

        def noted_end(sheet: Sheet) -> None:
            self.rows.append([])
            end_row(sheet)

        monkeypatch.setattr(Sheet, "add", noted_add)
        monkeypatch.setattr(Sheet, "end_row", noted_end)

    def of(self, config: Config, path: Path) -> list[list[tuple[Any, ...]]]:
        preview(config, open_training(config.data), path)
        return [row for row in self.rows if row]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


def test_preview_writes_a_sheet_of_views(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(write_config(digits, tmp_path), ["augment.rand_augment=rand-m9-mstd0.5-inc1"])
    result = preview(config, open_training(config.data), tmp_path / "preview.png")
    assert result == {"sheet": str(tmp_path / "preview.png"), "samples": 6, "views": 6}
    assert capsys.readouterr().err == "tiny: reading the first batch, 48 samples\n"
    with Image.open(tmp_path / "preview.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert pixels.shape[0] > 9 * 150
    assert len(np.unique(pixels)) > 100


@pytest.mark.parametrize("extra", [[], ["data.copies=3", "mix.mixup_alpha=0", "mix.cutmix_alpha=0"]])
def test_preview_shows_samples_of_several_classes(
    drawn: Drawn, digit_images: Path, tmp_path: Path, extra: list[str]
) -> None:
    """Also of shards that hold one class after the other, as those that others have made often do."""
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    for number, folder in enumerate(sorted((digit_images / "train").iterdir())):
        with tarfile.open(tmp_path / "train" / f"{number}.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(str(number).encode()))
    index_tars(str(tmp_path / "train"))
    overrides = ["data.lanes=4", "train.micro_batch_size=8", "data.shuffle_window=16", *extra]
    config = load_config(write_config(tmp_path, tmp_path), overrides)
    rows = drawn.of(config, tmp_path / "preview.png")
    originals = [row[0] for row in rows if len(row) == 7]
    assert len({caption for _, caption, *_ in originals}) == 6, "different samples"
    classes = [lines[0] for _, _, *lines in originals]
    shards = open_training(config.data)
    fed = Order.of(config, shards.part_samples).samples(0)
    num_classes = len(set(shards.records(fed.shard, fed.row)["label"].tolist()))
    assert 1 < num_classes <= 6
    assert len(set(classes[:num_classes])) == num_classes, "each class of the first batch before any comes again"


def test_preview_shows_mixing_partners_ratios_and_labels(drawn: Drawn, digits: Path, tmp_path: Path) -> None:
    """The partners are those that were mixed, and ratio and labels those of the pixels and targets that are fed."""
    config = load_config(write_config(digits, tmp_path), ["augment.rand_augment=rand-m9-mstd0.5-inc1"])
    rows = [row for row in drawn.of(config, tmp_path / "preview.png") if len(row) == 4]
    assert len(rows) == 3
    shards = open_training(config.data)
    with contextlib.closing(TrainFeed(config, shards, World())) as feed:
        (batch,) = feed.next()
    of = batch.samples.shard, batch.samples.row
    places = {shards.key(int(s), int(r)): n for n, (s, r) in enumerate(zip(*of, strict=True))}
    kinds = set()
    for one, other, *mixed in rows:
        assert one[2] != other[2], "partners of two classes"
        unmixed = {tile[1]: np.asarray(tile[0], np.float64) for tile in (one, other)}
        for kind, picture, lines in ((tile[1], np.asarray(tile[0], np.float64), tile[2:]) for tile in mixed):
            parts = [line.split(" of ") for line in lines[:2]]
            shares, names = [float(share) for share, _ in parts], [key for _, key in parts]
            assert sum(shares) == pytest.approx(1)
            if kind == "mixup":
                expected = sum(share * unmixed[key] for share, key in zip(shares, names, strict=True))
                assert np.abs(picture - expected).max() < 3
            else:
                assert kind == "cutmix"
                own = (picture == unmixed[names[0]]).all(axis=-1)
                assert (own | (picture == unmixed[names[1]]).all(axis=-1)).all()
                differ = (unmixed[names[0]] != unmixed[names[1]]).any(axis=-1)
                assert own[differ].mean() == pytest.approx(shares[0], abs=0.25)
            target = batch.targets[places[names[0]]].numpy()
            told = dict(line.removeprefix("label ").rsplit(": ", 1) for line in lines[2:])
            assert list(told) == [names[0].split("/")[0], names[1].split("/")[0], "other labels"]
            for label in list(told)[:2]:
                assert float(told[label]) == pytest.approx(target[shards.classes.index(label)], abs=0.006)
            assert float(told[next(iter(told))]) == pytest.approx(0.01 + 0.9 * shares[0], abs=0.011)
            assert float(told["other labels"]) == pytest.approx(0.08, abs=0.001)
            kinds.add(kind)
    assert kinds == {"mixup", "cutmix"}
