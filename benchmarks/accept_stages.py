"""The stages of benchmarks.accept: commands in order, what each needs, its share of the time, and how it is read.

Without torch, which takes seconds to import.
"""

import collections
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DALI, DEEPSPEED, MLFLOW = "nvidia.dali", "deepspeed", "mlflow"
TRAINING = (DALI, DEEPSPEED)
"""Packages that the engine imports: it takes the feed's batches, and so imports DALI."""


def last_result(output: Path) -> dict[str, Any] | None:
    """Returns the last JSON line that a command has printed, its result unless it was ended early."""
    return next(reversed(results(output)), None)


def results(output: Path) -> list[dict[str, Any]]:
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def all_results(output: Path) -> dict[str, Any] | None:
    """Returns the results of a command that prints a line for each model."""
    found = results(output)
    return {"models": {line["model"]: line for line in found}} if found else None


def outcomes(output: Path) -> dict[str, Any] | None:
    """Returns how often each test function passed or failed, by the output of `pytest -vv`, also one cut short."""
    tests: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in output.read_text(errors="replace").splitlines() if output.exists() else []:
        test, outcome = re.search(r"tests/[\w/]+\.py(::\w+)?", line), re.search(r"\b(PASSED|FAILED|ERROR)\b", line)
        if test and outcome and " - " not in line:  # which a line of the summary has
            tests[test[0]][outcome[0].lower()] += 1
    total = sum(tests.values(), collections.Counter())
    return {**total, "tests": {name: dict(counts) for name, counts in tests.items()}} if tests else None


class Stage(NamedTuple):
    name: str
    command: str
    """The arguments of `python -m`. OUT in them is the folder of the results."""
    share: int
    """The stage's share of the budget, relative to the sum of all stages."""
    quick: str | None = None
    """The same at the smallest sizes; None: the stage is skipped with --quick."""
    needs: Sequence[str] = ()
    """The modules that the stage imports."""
    read: Callable[[Path], dict[str, Any] | None] = last_result
    """Reads the result from standard output."""

    def words(self, out: Path, *, quick: bool) -> list[str] | None:
        chosen = self.quick if quick else self.command
        return None if chosen is None else [word.replace("OUT", str(out)) for word in chosen.split()]


def _step(batch: int, options: str, share: int, quick: str | None = None) -> Stage:
    name = f"steps at {batch}{' compiled' * ('--compile' in options)}"
    command = f"benchmarks.step pvt_large pvt_tiny --batch {batch} {options} --out OUT/{name.replace(' ', '-')}"
    return Stage(name, command, share, quick, ("transformers", DEEPSPEED), all_results)


_TINY = "--batch 1 --precision fp32 --rounds 1 --turn 0.01 --out OUT"

STAGES = (
    Stage("versions", "benchmarks.versions", 45, "benchmarks.versions"),
    Stage(
        "decoding",
        "benchmarks.decoding --photographs 640 --data OUT/data --out OUT",
        35,
        "benchmarks.decoding --photographs 96 --images 16 --data OUT/data --out OUT",
        (DALI,),
    ),
    Stage(
        "kill and resume",
        "tests.chaos.kill --kills 3 --ranks 1 --stage 0 --steps 40 --save-every 5",
        45,
        needs=(*TRAINING, MLFLOW),
    ),
    Stage(
        "tests",
        "pytest -m gpu -vv --continue-on-collection-errors tests",
        140,
        # In a process that has imported some of pytest's plugins.
        "pytest -W ignore::pytest.PytestAssertRewriteWarning -m gpu -vv tests/test_pvt_model.py -k bf16_and_fp32_agree",
        ("pytest",),
        outcomes,
    ),
    Stage(
        "launches",
        "benchmarks.launches pvt_large --batch 128 --out OUT",
        25,
        "benchmarks.launches pvt_tiny --batch 2 --precision fp32 --steps 1 --out OUT",
        TRAINING,
    ),
    _step(128, "--rounds 2", 35, f"benchmarks.step pvt_tiny {_TINY}"),
    _step(256, "--rounds 1", 30),
    _step(512, "--rounds 1", 30),
    _step(128, "--rounds 2 --compile", 60),
    Stage(
        "attention",
        "benchmarks.attention --batch 128 --rounds 1 --out OUT",
        25,
        f"benchmarks.attention --size 32 {_TINY}",
        (DEEPSPEED,),
    ),
    Stage(
        "roofline",
        "benchmarks.roofline pvt_large --batch 128 --rounds 2 --out OUT",
        20,
        f"benchmarks.roofline pvt_tiny {_TINY}",
        (DEEPSPEED,),
    ),
    Stage(
        "feed",
        "benchmarks.feed --contenders ours --device cuda --rounds 1 --images 12800 --data OUT/data --out OUT",
        25,
        "benchmarks.feed --contenders ours --recipes plain --rounds 1 --images 64 --data OUT/data --out OUT",
        (DALI,),
    ),
    Stage(
        "end to end",
        "benchmarks.end_to_end --model pvt_large --batch 128 --warm-up 5 --rounds 1 --data OUT/data --out OUT",
        80,
        needs=TRAINING,
    ),
    Stage(
        "saving",
        "benchmarks.checkpoint --model pvt_large --saves 1 --out OUT",
        30,
        "benchmarks.checkpoint --model pvt_pico --image-size 32 --saves 1 --out OUT",
        TRAINING,
    ),
    Stage(
        "memory",
        "benchmarks.memory pvt_large --out OUT",
        20,
        "benchmarks.memory resnet18 --size 64x64 --precision fp32 --out OUT",
        (DEEPSPEED,),
    ),
    Stage(
        "tune",
        "launch.doctor --tune --config configs/pretrain/pvt_large_in1k.yaml --minutes 1 --ranks 1 --out OUT/tuned.yaml "
        "--set data.train=OUT/data/shards --set data.val=null --set train.global_batch_size=128",
        45,
        needs=TRAINING,
    ),
    _step(256, "--rounds 1 --compile", 20),
    _step(512, "--rounds 1 --compile", 20),
)
