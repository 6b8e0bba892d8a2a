"""From a folder of images to a run: recognised, split by hashes, packed once, described; refused in one line."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipeline.commands import shards as shards_command
from pipeline.config import Config, dump_config, load_config
from pipeline.errors import ExternalError, InputError
from pipeline.feed.order import Order
from pipeline.job import start_checks
from pipeline.shards import own_images, pack, public_datasets
from pipeline.shards.index import ShardSet, read_manifest
from pipeline.shards.open_data import open_manifests, open_training, open_validation
from tests import in_process
from tests.ranks import PATIENCE_S, ROOT
from tests.test_commands import forked, result_of

COUNTS = {"cat": 12, "dog": 7, "emu": 2}
"""Images of each class."""

OWN = ROOT / "configs/own.yaml"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        for number in range(count):
            path = folder / name / f"IMG {number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
    return folder


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Makes the configuration own.yaml with a cache of the test's own, for data that the first argument names."""

    # Workers take seconds to start.
    monkeypatch.setattr(public_datasets, "cores", lambda: 1)

    def make(train: object, *overrides: str) -> Config:
        cache = f"data.cache={tmp_path / 'cache'}"
        return load_config(OWN, [f"data.train={train}", cache, f"run.root={tmp_path / 'runs'}", *overrides])

    return make


Configure = Callable[..., Config]


def samples(shards: ShardSet) -> dict[str, tuple[str, bytes]]:
    """Key, class and image of every sample."""
    return {
        shards.key(number, row): (shards.classes[record["label"]], shards.read(number, row))
        for number in range(len(shards.shard_samples))
        for row, record in enumerate(shards.index(number))
    }


def both(config: Config) -> tuple[dict[str, tuple[str, bytes]], dict[str, tuple[str, bytes]]]:
    validation = open_validation(config.data)
    assert validation
    assert validation.classes == open_training(config.data).classes
    return samples(open_training(config.data)), samples(validation)


def pictures(folder: Path) -> dict[str, tuple[str, bytes]]:
    paths = sorted(folder.rglob("*.jpg"))
    return {f"{path.parent.name}/{path.stem}": (path.parent.name, path.read_bytes()) for path in paths}


# The split


def test_split_takes_the_smallest_hashes_of_each_class(tree: Path, configure: Configure) -> None:
    training, validation = both(configure(tree, "data.val_fraction=0.25"))
    assert training | validation == pictures(tree)
    assert len(training) + len(validation) == sum(COUNTS.values())
    for name, count in COUNTS.items():
        of_class = [key for key in training | validation if key.startswith(f"{name}/")]
        of_class.sort(key=lambda key: hashlib.sha256(key.encode()).hexdigest())
        expected = of_class[: max(1, round(count / 4))]
        assert {key for key in validation if key.startswith(f"{name}/")} == set(expected)


def test_split_depends_on_names_alone(tree: Path, configure: Configure, tmp_path: Path) -> None:
    _, validation = both(configure(tree))
    moved = tmp_path / "elsewhere/images"
    shutil.copytree(tree, moved)
    assert both(configure(moved))[1] == validation
    Image.new("RGB", (20, 20)).save(moved / "emu/new.jpg")
    assert {key for key in both(configure(moved))[1] if "emu" not in key} == {
        key for key in validation if "emu" not in key
    }


@pytest.mark.parametrize("fraction", [0.1, 0.8])
def test_split_that_empties_a_class_is_rejected(tree: Path, configure: Configure, fraction: float) -> None:
    if fraction < 0.5:
        (tree / "emu/IMG 0.jpg").unlink()
    with pytest.raises(InputError, match=rf"a validation fraction of {fraction} leaves nothing .* emu \(\d\): add"):
        open_training(configure(tree, f"data.val_fraction={fraction}").data)


def test_pack_writes_both_splits_or_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["pack", "--images", tree, "--out", tmp_path / "out", "--val-fraction", "0.25"]
    done = in_process.run(shards_command.main, *words)
    result = json.loads(done.stdout)
    assert (result["samples"], result["val"]["samples"]) == (15, 6)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack, "_write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack.pack(tree, tmp_path / "again", val_fraction=0.25)
    assert not (tmp_path / "again").exists()
    pack.pack(tree, tmp_path / "again", val_fraction=0.25)
    for split in ("train", "val"):
        assert read_manifest(tmp_path / "again" / split) == read_manifest(tmp_path / "out" / split)


# What data.train may be


def test_folder_with_train_and_val_gives_both_splits(tree: Path, configure: Configure) -> None:
    splits = tree.with_name("splits")
    shutil.copytree(tree, splits / "train")
    shutil.copytree(tree, splits / "Validation")
    shutil.rmtree(splits / "Validation/dog")  # a class all the same
    (splits / "test").mkdir()
    training, validation = both(configure(splits))
    assert training == pictures(splits / "train")
    assert validation == pictures(splits / "Validation")
    pack.pack(tree, splits.with_name("packed") / "train")
    pack.pack(tree, splits.with_name("packed") / "val")
    assert both(configure(splits.with_name("packed"))) == (training, training)
    assert both(configure(splits, f"data.val={tree}"))[1] == training


def test_lists_and_parquet_files_are_packed(tree: Path, configure: Configure, tmp_path: Path) -> None:
    paths = sorted(tree.rglob("*.jpg"))
    rows = [f"{path.relative_to(tree)},{path.parent.name}" for path in paths]
    (tree / "list.csv").write_text("\n".join(["path,label", *rows]))
    assert both(configure(tree / "list.csv")) == both(configure(tree))
    columns = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
    for number in range(2):
        pq.write_table(
            pa.table({name: column[number::2] for name, column in columns.items()}), tmp_path / f"{number}.parquet"
        )
    training, validation = both(configure(f"{tmp_path}/*.parquet"))
    assert sorted([*training.values(), *validation.values()]) == sorted(pictures(tree).values())
    assert len(validation) == 3


def test_packed_or_remote_data_is_opened_in_place(tree: Path, configure: Configure, tmp_path: Path) -> None:
    pack.pack(tree, tmp_path / "out")
    assert open_training(configure(tmp_path / "out", "data.val_fraction=null").data).root == str(tmp_path / "out")
    for refuse in (open_training, open_validation, open_manifests):
        with pytest.raises(
            InputError, match=r"data.val_fraction 0.1 splits images .* for .*/out set data.val, or pack"
        ):
            refuse(configure(tmp_path / "out").data)
    with pytest.raises(InputError, match=r"nowhere/manifest.json: cannot read the manifest: No such file"):
        open_training(configure("nowhere").data)
    assert not own_images.is_images("s3://bucket/photos")
    (tmp_path / "out/manifest.json").unlink()
    assert not own_images.is_images(tmp_path / "out")  # tars that have to be indexed


def test_changed_folder_is_packed_again(tree: Path, configure: Configure, tmp_path: Path) -> None:
    config = configure(tree)
    before = open_training(config.data)
    assert open_training(config.data).root == before.root
    (tree / "cat/IMG 3.jpg").write_bytes((tree / "dog/IMG 3.jpg").read_bytes())
    training, validation = both(config)
    assert (training | validation)["cat/IMG 3"][1] == (tree / "dog/IMG 3.jpg").read_bytes()
    assert open_training(config.data).digest != before.digest
    assert len(list((tmp_path / "cache").glob("images-*/train"))) == 2


def test_concurrent_jobs_pack_once(tree: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pipeline import log; from pipeline.shards.public_datasets import packed; log.configure(); "
        "print(packed(*sys.argv[1:], val_fraction=0.1))"
    )
    words = [sys.executable, "-c", script, str(tree), str(tmp_path / "cache")]
    jobs = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "12"]
    said = [job.communicate(timeout=PATIENCE_S) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert len({out for out, _ in said}) == 1
    assert sum("packing it into" in err for _, err in said) == 1


# Bad input


def beside_classes(tree: Path) -> None:
    shutil.copy(tree / "cat/IMG 0.jpg", tree / "stray.JPG")


def without_classes(tree: Path) -> None:
    for path in list(tree.rglob("*.jpg")):
        path.rename(tree / f"{path.parent.name} {path.name}")
    for name in COUNTS:
        (tree / name).rmdir()


def one_class(tree: Path) -> None:
    shutil.rmtree(tree / "dog")
    shutil.rmtree(tree / "emu")


def nothing(tree: Path) -> None:
    shutil.rmtree(tree)
    tree.mkdir()


def beside_splits(tree: Path) -> None:
    tree.rename(tree.with_name("train"))
    for name in ("train", "val"):
        shutil.copytree(tree.with_name("train"), tree / name)
    beside_classes(tree.with_name("train"))
    shutil.copy(tree.with_name("train") / "stray.JPG", tree)


def unreadable(tree: Path) -> None:
    (tree / "cat/IMG 5.jpg").write_text("no picture")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (beside_classes, "stray.JPG: lies beside the class folders: move it into one of them"),
        (without_classes, "no class folders, and 21 images without a class; expected "),
        (one_class, "images of the class cat alone, of which nothing can be learnt: expected a folder"),
        (nothing, "no class folders, and 0 images without a class"),
        (beside_splits, "stray.JPG: lies beside the splits train, val: move it into a class"),
        (unreadable, "cat/IMG 5.jpg: not an image"),
    ],
)
def test_bad_folder_is_rejected_and_leaves_nothing(
    tree: Path, configure: Configure, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(tree)
    with pytest.raises(InputError, match=re.escape(message)):
        open_training(configure(tree).data)
    assert not list((tmp_path / "cache").glob("images-*/*")) + list((tmp_path / "cache").glob(".images-*"))


def test_unwritable_cache_is_reported_by_name(
    tree: Path, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(InputError, match="cache: cannot be used as a cache: File exists"):
        open_training(configure(tree).data)
    (tmp_path / "cache").unlink()

    def fill_disk(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(public_datasets, "pack", fill_disk)
    with pytest.raises(ExternalError, match=r"images-\w+: cannot be written: No space left on device: free some space"):
        open_training(configure(tree).data)


# Lanes and fingerprints


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_lanes_depend_on_the_configuration_alone(configure: Configure, mixing: bool, copies: int) -> None:
    for batch in (6, 8, 47, 48, 64, 94, 96, 100, 144, 192, 256, 1000, 1022):
        overrides = [f"train.global_batch_size={batch}", f"data.copies={copies}", f"mix.mixup_alpha={int(mixing)}"]

        def fits(lanes: int) -> bool:
            share, rest = divmod(batch, lanes)  # noqa: B023
            return rest == 0 and (share % 2 == 0 or not mixing) and (copies == 1 or share > copies)

        chosen = max(filter(fits, range(1, 65)), default=None)
        if batch % 48 == 0 and (not mixing or fits(48)):
            chosen = 48  # as ever
        if chosen is None:
            with pytest.raises(InputError, match=f"train.global_batch_size {batch} fits no data.lanes"):
                configure("photos", *overrides)
            continue
        config = configure("photos", *overrides)
        assert config.data.lanes == config.identity()["lanes"] == chosen
        assert yaml.safe_load(dump_config(config))["data"]["lanes"] == chosen
        assert math.gcd(batch, chosen) == chosen


def test_more_ranks_than_lanes_are_rejected_with_a_remedy(configure: Configure) -> None:
    config = configure("photos", "train.global_batch_size=144")
    with pytest.raises(
        InputError, match=r"49 ranks, but data.lanes is 48: .* start at most 48 ranks or set data.lanes=72"
    ):
        start_checks.partition(Order.of(config, [np.array([500])]), 0, 49, config)
    assert configure("photos", "train.global_batch_size=144", "data.lanes=72").data.lanes == 72


def test_dumps_of_older_configurations_are_unchanged(configure: Configure) -> None:
    without = yaml.safe_load(dump_config(configure("photos", "data.val_fraction=null")))
    assert "val_fraction" not in without["data"]
    assert "recipe_steps" not in without["train"]
    assert yaml.safe_load(dump_config(configure("photos")))["data"]["val_fraction"] == 0.1


# What a run says beforehand


def test_run_description_states_data_and_steps(
    tree: Path, configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack.pack(tree, tmp_path / "out", val_fraction=0.25)
    config = configure(tmp_path / "out", "train.global_batch_size=4", "optim.warmup=5 steps", "train.recipe_steps=601")
    told = start_checks.forecast(config, 3)
    for part in (
        "15 training samples of 3 classes, from 1 of emu to 9 of cat, which is 60.0%; 6 validation samples",
        "60 steps of 4 images (3 an epoch), world size 3, warm-up 5",
        "64 px, hflip 0.5, crop resized, crop_scale [0.35, 1.0], label_smoothing 0.1",
        "pvt_pico, ",
        "33.3% of the work is padding",
        "hours of training",
    ):
        assert part in told
    assert "60 steps of these data, and the settings are for 601 (train.recipe_steps)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert start_checks.forecast(
            config.model_copy(update={"train": config.train.model_copy(update={"recipe_steps": 600})}), 1
        )
    assert not caplog.text
    assert "steps are known once" in start_checks.forecast(configure(tree), 1)


@pytest.mark.slow
def test_own_folder_trains_to_a_registered_model(tree: Path, tmp_path: Path) -> None:
    overrides = [
        f"data.train={tree}",
        f"data.cache={tmp_path / 'cache'}",
        "image.size=32",
        "train.length=3 steps",
        "train.global_batch_size=6",
        "optim.warmup=1 steps",
        "train.eval_every=null",
        "train.save_every=null",
        "tracking.system_metrics=false",
    ]
    words = [word for override in overrides for word in ("--set", override)]
    done = forked("launch/pretrain.py", "--config", OWN, *words, cwd=tmp_path, ranks=2)
    result = result_of(done)
    assert result["model"] == "models:/own/1"
    assert "18 training samples of 3 classes" in done.stderr
    assert done.stderr.count("packing it into") == 1
    run = tmp_path / "runs/own"
    assert "confusion" in (run / "report.html").read_text().lower()
    (validation,) = [
        each for each in json.loads((run / "run.json").read_text())["inputs"] if each["context"] == "validation"
    ]
    assert len(ShardSet(validation["path"])) == 3
