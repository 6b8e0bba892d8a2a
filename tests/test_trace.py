"""What the engine consumes does not depend on the world, on accumulation or on restarts. Read from its own tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.shards.pack import pack
from tests.conftest import run_ranks, write_config
from tests.painting import paint

STEPS = 12

Trace = dict[tuple[int, int], dict[str, Any]]  # by step and position


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 painted images in two classes, packed, and a configuration that shows them whole."""
    folder = tmp_path_factory.mktemp("painted")
    for number in range(300):
        path = folder / "images" / ["even", "odd"][number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        paint(number).save(path)
    pack(folder / "images", folder / "train", samples_per_shard=30)
    tree = yaml.safe_load(write_config(folder, folder).read_text())
    tree["data"] |= {"val": None, "copies": 2}
    tree["train"]["save_every"] = "5 steps"
    tree["debug"] = {"trace_samples": True}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


def job(folder: Path, name: str, ranks: int, micro: int | None, *overrides: str, last_step: int = STEPS) -> Path:
    length = [f"run.name={name}", f"train.length={STEPS} steps", "tracking.model_name=painted"]
    size = f"train.micro_batch_size={micro or 'null'}"
    run_ranks(ranks, "painted", folder / "tiny.yaml", last_step, *length, size, *overrides)
    return folder / "runs" / name


def read_trace(run: Path) -> Trace:
    trace: Trace = {}
    for path in (run / "trace").glob("rank-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            for sample in line["samples"]:
                if sample["weight"] > 0:
                    trace[line["step"], sample["position"]] = sample
    return trace


def read_painted(run: Path) -> dict[tuple[int, int], int]:
    return {
        (line["step"], position): number
        for path in run.glob("painted-*.jsonl")
        for line in map(json.loads, path.read_text().splitlines())
        for position, number in line["numbers"]
    }


PLAIN = ["mix={}", "augment={crop: center, hflip: 0}"]
FULL = ["augment={rand_augment: rand-m9-mstd0.5-inc1, erase_prob: 0.25}"]


def test_pixels_fed_match_the_sample_order(painted: Path) -> None:
    alone, three = job(painted, "plain-1", 1, None, *PLAIN), job(painted, "plain-3", 3, 8, *PLAIN)
    numbers = read_painted(alone)
    assert len(numbers) == STEPS * 48
    assert read_painted(three) == numbers
    keys = {where: sample["key"] for where, sample in read_trace(alone).items()}
    assert {where: int(key.split("/")[1]) for where, key in keys.items()} == numbers


def test_traces_are_equal_across_world_sizes_and_restarts(painted: Path) -> None:
    lone = read_trace(job(painted, "full-1", 1, None, *FULL))
    assert len(lone) == STEPS * 48
    assert len({sample["pixels"] for sample in lone.values()}) > 0.95 * len(lone)  # solarising may leave one colour
    assert len({sample["drop_path"] for sample in lone.values()}) > 1
    rows = [("1", 1, "", lone)]
    for ranks, accumulation in ((2, 2), (4, 1)):
        micro = -(-48 // ranks // accumulation)
        rows.append((str(ranks), accumulation, "", read_trace(job(painted, f"full-{ranks}", ranks, micro, *FULL))))
    # Ends without warning after step 8, so that 6 to 8 are done again, from the checkpoint of step 5, by another world.
    job(painted, "restarted", 2, None, *FULL, last_step=8)
    run = job(painted, "restarted", 3, 8, *FULL)
    rows.append(("2, then 3", 2, "after 8 steps", read_trace(run)))
    for ranks, accumulation, restart, trace in rows:
        print(f"{ranks:10}{accumulation:4} {restart:16}{len(trace)} samples, equal: {trace == lone}")
    assert all(trace == lone for *_, trace in rows)
