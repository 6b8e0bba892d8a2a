"""What is fed of data sets that are damaged in many ways, against a model of the rule.

python -m tests.chaos.damaged_feed --seeds 10

    pictures ─▶ packed shards, indexed tars ─▶ damage ─┬─▶ feeds of 1, 2 and 3 ranks, restarted, knowing other finds
                                                       └─▶ the rule, by hand: which sample must be where

The rule: a view can be used if the file's bytes match their checksum and the view's window decodes by itself. Otherwise
the next sample of the same place takes it, and so on. Prints what was damaged and replaced for each seed.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import cli, keys
from pipeline.config import Config, ImageConfig, load_config
from pipeline.feed import augment
from pipeline.feed.dali import Probe
from pipeline.feed.loader import EvalFeed, TrainFeed
from pipeline.feed.order import Order
from pipeline.feed.quarantine import Quarantine
from pipeline.keys import Stream
from pipeline.shards import index_tars
from pipeline.shards.image_header import read_size
from pipeline.shards.index import Manifest, ShardSet, read_manifest
from pipeline.shards.pack import pack
from pipeline.world import World
from tests import damage

STEPS = 12
MIDDLE = 5  # where a run is started again
NUM_SAMPLES = 72
SAMPLES_PER_SHARD = 12
KINDS = ("flipped", "exchanged", "cut", "cut", "without scans", "rewritten")
RESUMED_WORLD = 3

Where = tuple[int, int]  # step and position
Fed = dict[Where, tuple[int, str]]  # the sample's id and a digest of its pixels and target


def pictures(folder: Path, rng: np.random.Generator) -> None:
    """Writes windows of photographs as class folders: baseline and progressive JPEGs, and PNGs."""
    for number in range(NUM_SAMPLES):
        label = number % 2
        photo = damage._photos()[label]
        height, width = rng.integers(90, 160, 2)
        y, x = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
        image = Image.fromarray(photo[y : y + height, x : x + width])
        path = folder / damage.CLASSES[label] / f"{number:04d}.{'png' if number % 6 == 5 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, progressive=number % 3 == 0)  # which PNG ignores


def spoiled(kind: str, data: bytes, rng: np.random.Generator) -> bytes:
    """Returns a damaged copy of an encoded image, no longer than it."""
    start = data.index(b"\xff\xda" if data.startswith(b"\xff\xd8") else b"IDAT") + 20
    if kind == "exchanged":
        buffer = BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG")
        return buffer.getvalue()
    if kind == "cut":
        return data[: int(rng.integers(start, len(data)))]
    scans = [found for found in range(len(data) - 1) if data[found : found + 2] == b"\xff\xda"]
    if kind == "without scans" and len(scans) > 1:
        return data[: scans[int(rng.integers(1, len(scans)))]] + b"\xff\xd9"
    changed = bytearray(data)
    for place in rng.integers(start, len(data), 3):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def spoil(folder: Path, tars: Path, rng: np.random.Generator) -> Counter[str]:
    """Damages a quarter of the samples of a data set. What is not flipped or exchanged has the checksums of what is
    left of it, as if it had been indexed so."""
    manifest, shards, kinds = read_manifest(folder), [], Counter[str]()
    for shard in manifest.shards:
        tar, index = tars / shard.tar.name, folder / shard.index.name
        data, records = bytearray(tar.read_bytes()), np.load(index)
        for row in rng.choice(len(records), len(records) // 4, replace=False):
            begin, size = int(records["offset"][row]), int(records["size"][row])
            kind = str(rng.choice(KINDS))
            left = spoiled(kind, bytes(data[begin : begin + size]), rng)
            data[begin : begin + size] = left.ljust(size, b"\0")
            if kind not in ("flipped", "exchanged"):
                records["size"][row], records["crc32"][row] = len(left), zlib.crc32(left)
            kinds[kind] += 1
        tar.write_bytes(data)
        np.save(index, records)
        digests = {"sha256": hashlib.sha256(data).hexdigest(), "index_sha256": _sha256(index)}
        shards.append(dataclasses.replace(shard, **digests))
    changed = Manifest.of(manifest.classes, shards, manifest.tars)
    (folder / "manifest.json").write_bytes(changed.encode())
    return kinds


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_config(data: Path, folder: Path, *overrides: str) -> Config:
    tree = {
        "run": {"name": "damaged", "root": str(folder / "runs")},
        "model": {"name": "pvt_pico"},
        "image": {"size": 48},
        "data": {"train": str(data), "lanes": 6, "shuffle_window": 8, "max_bad_fraction": 1.0},
        "augment": {"crop_scale": [0.05, 0.6], "hflip": 0.5},
        "train": {"length": f"{STEPS} steps", "global_batch_size": 24, "deterministic": True},
        "optim": {"lr": 1e-3},
    }
    path = folder / "damaged.json"
    path.write_text(json.dumps(tree))
    return load_config(path, list(overrides))


def fed(config: Config, world_size: int, first_step: int = 0, quarantine: Path | None = None) -> Fed:
    """What all ranks of a world are fed from a step on, in turns."""
    shards, found = ShardSet(*config.data.train_paths), Fed()
    with contextlib.ExitStack() as stack:
        feeds = [
            stack.enter_context(
                contextlib.closing(
                    TrainFeed(
                        config,
                        shards,
                        World(rank, world_size),
                        first_step=first_step,
                        quarantine=Quarantine(shards, quarantine),
                    )
                )
            )
            for rank in range(world_size)
        ]
        for step, feed in itertools.product(range(first_step, STEPS), feeds):
            for batch in feed.next():
                for n in np.flatnonzero(batch.weights.numpy()):
                    pixels = hashlib.sha256(batch.images[n].numpy().tobytes() + batch.targets[n].numpy().tobytes())
                    found[step, int(batch.samples.position[n])] = int(batch.samples.id[n]), pixels.hexdigest()
    return found


class Rule:
    """The rule, written down a second time: slowly, and without state."""

    def __init__(self, config: Config) -> None:
        self._config, self._shards = config, ShardSet(*config.data.train_paths)
        self._order = Order.of(config, self._shards.part_samples)
        self._probe = Probe()

    def ids(self) -> dict[Where, int]:
        """The sample that has to be at each place."""
        found: dict[Where, int] = {}
        for step in range(STEPS):
            planned = self._order.samples(step)
            for place in range(len(planned.id)):
                partner = None
                if self._config.mix.is_active:
                    partner = int(planned.id[place + 1]) if place % 2 == 0 else found[step, place - 1]
                found[step, place] = next(self._usable(step, place, partner))
        return found

    def _usable(self, step: int, place: int, partner: int | None) -> Iterator[int]:
        for later in itertools.count(step):
            one = self._order.samples(later).take([place])
            if later > step and one.id[0] == partner:
                continue
            key = keys.key(self._config.run.seed, Stream.AUGMENT, one.epoch, one.id, one.copy)
            record = self._shards.index(int(one.shard[0]))[int(one.row[0])]
            hw = np.array([[record["height"], record["width"]]], np.int64)
            view = augment.training_views(self._config.augment, self._config.image, 48, key, hw)
            if self.can_be_used(int(one.shard[0]), record, view):
                yield int(one.id[0])

    def can_be_used(self, shard: int, record: np.void, view: augment.Views) -> bool:
        with Path(self._shards.url(shard)).open("rb") as file:
            file.seek(int(record["offset"]))
            data = file.read(int(record["size"]))
        if zlib.crc32(data) != record["crc32"] or read_size(data) != (record["height"], record["width"]):
            return False
        return self._probe.decodes(np.frombuffer(data, np.uint8), view)


def scored(data: Path, world_size: int, quarantine: Path | None = None) -> list[int]:
    """The samples that count in an evaluation."""
    shards, counted = ShardSet(data), []
    for rank in range(world_size):
        known = Quarantine(shards, quarantine)
        for batch in EvalFeed(shards, World(rank, world_size), ImageConfig(size=48), batch_size=32, quarantine=known):
            counted += batch.samples.id[batch.weights.numpy() > 0].tolist()
    return sorted(counted)


def check(data: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """Compares all ways of being fed with the rule. Returns how much was replaced."""
    each, quarantine = make_config(data, folder, *overrides), folder / "quarantine.jsonl"
    quarantine.unlink(missing_ok=True)
    first = fed(each, 1)
    assert {where: sample for where, (sample, _) in first.items()} == Rule(each).ids()
    assert fed(each, 2, quarantine=quarantine) == first
    rest = {where: what for where, what in first.items() if where[0] >= MIDDLE}
    assert fed(each, RESUMED_WORLD, MIDDLE, quarantine) == rest  # knowing more than the first attempt did there
    assert fed(each, 1, MIDDLE) == rest  # and nothing
    counted = scored(data, 1)
    assert scored(data, 3, quarantine) == counted
    order = Order.of(each, ShardSet(data).part_samples)
    replaced = sum(int(first[step, place][0] != order.samples(step).id[place]) for step, place in first)
    return {"fed": len(first), "replaced": replaced, "evaluated": len(counted), "of": NUM_SAMPLES}


def run(seed: int, folder: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    pictures(folder / "images", rng)
    pack(folder / "images", folder / "packed", samples_per_shard=SAMPLES_PER_SHARD)
    tars = _tars(folder / "images", folder / "tars")
    index_tars.index_tars(str(tars), folder / "indexed")
    rows = []
    for name, at, overrides in (("packed", folder / "packed", ["mix.mixup_alpha=0.8"]), ("indexed", tars, [])):
        kinds = spoil(folder / name, at, rng)
        rows.append({"seed": seed, "data": name, **kinds, **check(folder / name, folder, *overrides)})
    return rows


def _tars(images: Path, folder: Path) -> Path:
    """Tars as others make them."""
    folder.mkdir()
    paths = sorted(images.rglob("*.*"), key=lambda path: path.name)
    for number in range(0, len(paths), SAMPLES_PER_SHARD):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for path in paths[number : number + SAMPLES_PER_SHARD]:
                tar.add(path, f"{path.parent.name}/{path.name}")
    return folder


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.damaged_feed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            for row in run(seed, Path(folder)):
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    return {"seeds": seeds, "replaced": sum(row["replaced"] for row in rows)}


if __name__ == "__main__":
    cli.run(main)
