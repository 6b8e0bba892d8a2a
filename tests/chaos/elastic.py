"""One run over changing worlds and ZeRO stages, compared with an uninterrupted one of one rank.

python -m tests.chaos.elastic

    leg 1 on W ranks at stage S ──checkpoint──▶ leg 2 on other ranks at another stage ──checkpoint──▶ …

In fp32 with mixup, cutmix and drop-path on. Every leg restores what the leg before it saved; all worlds of 1 to 4 ranks
and all stages occur, with the optimiser offloaded to the host as well. Prints the largest relative difference of a
step's loss for each sequence.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline import cli
from tests.chaos.runs import pack_digits
from tests.conftest import run_ranks, write_config

BOUND = 1e-5
STEPS_PER_LEG = 4

SEQUENCES = [  # ranks/stage of each leg; "o": optimiser offloaded to the host
    "1/0 2/1 3/2 4/3 1/0",
    "4/0 3/3 2/2 1/1 4/2",
    "2/3 2/0 2/2 2/1 2/3",
    "3/1 3/0 1/3 4/1 1/2",
    "1/2 4/3 4/0 1/3 4/1",
    "1/1 2/1o 2/2o 2/3o 1/0",
    "2/0 2/2o 3/3o 3/1o 1/2",
]

# Starting processes is what costs time, so all sequences go on together: each does its next legs when such a world is
# there.
WORLDS = "1 2 3 4 3 2 1 4 2o 3o 1"
STRAIGHT = "straight"


class Leg(NamedTuple):
    world: str
    stage: str

    @classmethod
    def parse(cls, text: str) -> "Leg":
        ranks, stage = text.removesuffix("o").split("/")
        return cls(ranks + ("o" if text.endswith("o") else ""), stage)


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.elastic", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    began = time.monotonic()
    sequences = {text: [Leg.parse(part) for part in text.split()] for text in SEQUENCES}
    with tempfile.TemporaryDirectory() as temporary:
        losses, straight = run(sequences, Path(temporary))
    worst = {text: max(abs(losses[text][step] / straight[step] - 1) for step in losses[text]) for text in sequences}
    width = max(map(len, worst))
    print(f"{'ranks/stage of each leg':{width}}  steps  largest difference of a loss")
    for text, difference in worst.items():
        print(f"{text:{width}}  {len(losses[text]):5}  {difference:.1e}")
    return {
        "sequences": len(worst),
        "legs": sum(map(len, sequences.values())),
        "worst": max(worst.values()),
        "bound": BOUND,
        "ok": max(worst.values()) <= BOUND,
        "seconds": round(time.monotonic() - began, 1),
    }


def run(sequences: dict[str, list[Leg]], folder: Path) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    """Losses by step of every sequence, and of the uninterrupted run."""
    configs = write_configs(folder)
    num_steps = STEPS_PER_LEG * max(map(len, sequences.values()))
    names = {f"sequence-{number}": text for number, text in enumerate(sequences)}
    losses: dict[str, dict[int, float]] = {name: {} for name in [*names, STRAIGHT]}
    rest = {name: list(sequences[text]) for name, text in names.items()}
    for number, world in enumerate(WORLDS.split()):
        legs = [f"{STRAIGHT}:0:{num_steps}"] if number == 0 else []
        for name, waiting in rest.items():
            while waiting and waiting[0].world == world:
                stage = waiting.pop(0).stage
                last_step = STEPS_PER_LEG * (len(sequences[names[name]]) - len(waiting))
                legs.append(f"{name}:{stage}:{last_step}")
        ranks, config = int(world.removesuffix("o")), configs[world.endswith("o")]
        print(f"world {world}: {' '.join(legs)}", file=sys.stderr, flush=True)
        for report in run_ranks(ranks, "legs", config, folder / "checkpoints", "fp32", *legs):
            found = {int(step): loss for step, loss in report["losses"].items()}
            assert not losses[report["run"]].keys() & found.keys(), "a step was done twice"
            losses[report["run"]] |= found
    straight = losses.pop(STRAIGHT)
    assert list(straight) == list(range(num_steps))
    for name, text in names.items():
        assert list(losses[name]) == list(range(STEPS_PER_LEG * len(sequences[text]))), f"{text}: WORLDS is too short"
    return {text: losses[name] for name, text in names.items()}, straight


def write_configs(folder: Path) -> dict[bool, Path]:
    """By whether the optimiser is offloaded."""
    plain = write_config(pack_digits(folder / "digits"), folder)
    tree = yaml.safe_load(plain.read_text())
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
    tree["engine"] = {"deepspeed": offload}
    offloaded = folder / "offloaded.yaml"
    offloaded.write_text(yaml.safe_dump(tree))
    return {False: plain, True: offloaded}


if __name__ == "__main__":
    cli.run(main)
