"""What the engine consumes does not depend on the world, on accumulation or on restarts. Read from its own tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.shards.pack import pack
from tests.conftest import run_ranks, write_config
from tests.painting import paint
from tests.workers.painted import ENDS_AT

STEPS, SAVE_EVERY, BATCH = 8, 3, 24

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
    tree["data"] |= {"val": None, "copies": 2, "lanes": 6}
    tree["train"] |= {"length": f"{STEPS} steps", "save_every": f"{SAVE_EVERY} steps", "global_batch_size": BATCH}
    tree["debug"] = {"trace_samples": True}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_trace(run: Path) -> Trace:
    trace: Trace = {}
    for path in (run / "trace").glob("rank-*.jsonl"):
        for line in lines(path):
            for sample in line["samples"]:
                if sample["weight"] > 0:
                    trace[line["step"], sample["position"]] = sample
    return trace


def read_painted(run: Path) -> dict[tuple[int, int], int]:
    return {
        (line["step"], position): number
        for path in run.glob("painted-*.jsonl")
        for line in lines(path)
        for position, number in line["numbers"]
    }


PLAIN = ["mix={}", "augment={crop: center, hflip: 0}"]
FULL = ["augment={rand_augment: rand-m9-mstd0.5-inc1, erase_prob: 0.25}"]


@pytest.fixture(scope="module")
def runs(painted: Path) -> Path:
    """A folder with runs on one rank, and on three: "plain-1" and "plain-3" without augmentation, "full-1" and
    "full-2-3" with all of it. The last one has begun on two ranks, which ended without warning after step ENDS_AT: some
    steps are done again, from the checkpoint before, by the three."""

    def job(name: str, *overrides: str) -> str:
        return json.dumps([f"run.name={name}", "tracking.model_name=painted", *overrides])

    def run(ranks: int, *jobs: str) -> None:
        run_ranks(ranks, "painted", painted / "tiny.yaml", *jobs)

    run(1, job("plain-1", *PLAIN), job("full-1", *FULL))
    run(2, job("full-2-3", *FULL, "END"))
    accumulating = "train.micro_batch_size=4"  # of a rank's eight samples
    run(3, job("full-2-3", *FULL, accumulating), job("plain-3", *PLAIN, accumulating))
    return painted / "runs"


def test_pixels_fed_match_the_sample_order(runs: Path) -> None:
    numbers = read_painted(runs / "plain-1")
    assert len(numbers) == STEPS * BATCH
    assert read_painted(runs / "plain-3") == numbers
    keys = {where: sample["key"] for where, sample in read_trace(runs / "plain-1").items()}
    assert {where: int(key.split("/")[1]) for where, key in keys.items()} == numbers


def test_traces_are_equal_across_world_sizes_and_restarts(runs: Path) -> None:
    lone = read_trace(runs / "full-1")
    assert len(lone) == STEPS * BATCH
    assert len({sample["pixels"] for sample in lone.values()}) > 0.95 * len(lone)  # solarising may leave one colour
    assert len({sample["drop_path"] for sample in lone.values()}) > 1
    assert read_trace(runs / "full-2-3") == lone
    steps = [line["step"] for line in lines(runs / "full-2-3" / "painted-0.jsonl")]
    begun, again = steps[:ENDS_AT], steps[ENDS_AT:]
    assert begun == [*range(1, ENDS_AT + 1)]
    assert again == [*range(again[0], STEPS + 1)]
    assert again[0] <= ENDS_AT
