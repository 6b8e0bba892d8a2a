"""Do class weights help where some classes are rare? Digits 5 to 9 have a tenth of their images, with and without.

python -m benchmarks.imbalance [--seeds 3] [--steps 100]

    for each seed:  configs/pretrain/demo.yaml as it is │ with task.class_weights: balanced

Prints balanced accuracy and macro F1 on all held-out scans to standard error. The runs are left in runs/imbalance/.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import cli, world
from pipeline.config import load_config
from pipeline.job.training_job import run_job
from pipeline.shards.pack import pack
from pipeline.world import World

ROOT = Path("runs/imbalance")
METRICS = ("balanced_accuracy", "macro_f1")
SETTINGS = {"unweighted": "null", "balanced": "balanced"}
RARE = range(5, 10)
KEPT = 10
"""Of so many images of a rare class, one is kept."""


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imbalance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    if min(arguments.seeds, arguments.steps) < 1:
        parser.error("--seeds and --steps are at least 1")
    _write_data()
    here = world.start()
    scores: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in METRICS} for name in SETTINGS}
    print("| seed | class weights | balanced accuracy | macro F1 |\n|---|---|---|---|", file=sys.stderr)
    for seed in range(arguments.seeds):
        for name in SETTINGS:
            result = _train(here, name, seed, arguments.steps)
            for metric in METRICS:
                scores[name][metric].append(result[metric])
            row = " | ".join(f"{result[metric]:.3f}" for metric in METRICS)
            print(f"| {seed} | {name} | {row} |", file=sys.stderr, flush=True)
    world.stop()
    means = {name: {metric: statistics.mean(scores[name][metric]) for metric in METRICS} for name in SETTINGS}
    return {"scores": scores, "means": means}


def _write_data() -> None:
    """Packs the digits without most of the training images of the rare classes, unless that was done before."""
    if (ROOT / "val/manifest.json").exists():
        return
    images = ROOT / "images"
    subprocess.run([sys.executable, "launch/digits.py", "--out", images], check=True, capture_output=True)
    for digit in RARE:
        for number, path in enumerate(sorted((images / "train" / str(digit)).iterdir())):
            if number % KEPT:
                path.unlink()
    for split in ("train", "val"):
        pack(images / split, ROOT / split)


def _train(here: World, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Returns a run's result; a run that has finished is not run again."""
    settings = {
        "run.name": f"{name}-{seed}-{steps}",
        "run.root": ROOT,
        "run.seed": seed,
        "task.class_weights": SETTINGS[name],
        "data.train": ROOT / "train",
        "data.val": ROOT / "val",
        "train.length": f"{steps} steps",
        "train.eval_every": f"{steps} steps",
        "tracking": f"{{uri: 'sqlite:///{ROOT}/mlflow.db', system_metrics: false, report: false}}",
        "handoff": "[]",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    result = run_job(load_config("configs/pretrain/demo.yaml", overrides), here)
    assert result is not None
    return result


if __name__ == "__main__":
    cli.run(main)
