"""Images a second of whole training, feed included: ours, and what a careful user would write.

    photographs ──▶ shards ──▶ rounds: each contender a process of its own, in rotated order ──▶ table, JSON line

python -m benchmarks.end_to_end [--model pvt_tiny] [--batch 32] [--steps 30] [--rounds 5] [--out DIR]

On one rank, at the same model, batch and precision (bf16), random resized crops and mirroring, AdamW; after so many
steps of warm-up:

- ours: launch/pretrain.py as it is started by hand, with its guard, metrics and tracking, once the import of MLflow
  behind its first steps is over;
- synthetic: our engine, on one batch again and again;
- step: the same network and AdamW on that batch, with nothing around them;
- baseline: webdataset, Pillow, torchvision's transforms, DataLoader's workers, DistributedDataParallel, and the plain
  network of benchmarks.step; and the same with our network.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from benchmarks import photographs, report
from benchmarks.step import DEPTHS
from launch import command
from pipeline.shards.pack import pack

WARM_UP = 15
LOG_EVERY = 5
"""Of which the measured steps are a multiple: the lines of metrics.jsonl are the clock of ours."""
NUM_PHOTOGRAPHS = 1536
OURS, SYNTHETIC, STEP, BASELINE, BASELINE_OURS = (
    *("ours", "synthetic", "step", "baseline"),
    "baseline, our network",
)


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="pvt_tiny", choices=DEPTHS)
    parser.add_argument("--batch", type=report.count, default=32)
    parser.add_argument("--steps", type=report.count, default=30, help="measured in each run, after a warm-up")
    parser.add_argument("--rounds", type=report.count, default=5)
    parser.add_argument("--workers", type=report.count, default=2, help="the baseline's decoding processes")
    parser.add_argument("--data", type=Path, default=Path("runs/data/feed"), help="made when missing: 0.2 GB")
    report.add_out(parser, "end_to_end")
    arguments = parser.parse_args()
    if arguments.steps % LOG_EVERY:
        parser.error(f"--steps {arguments.steps} is not a multiple of {LOG_EVERY}")
    shards = _prepared(arguments.data)
    job = {"model": arguments.model, "batch": arguments.batch, "steps": arguments.steps, "shards": str(shards)}
    with tempfile.TemporaryDirectory() as folder:
        return _measure({**job, "workers": arguments.workers, "folder": folder}, arguments.rounds, arguments.out)


def _measure(job: dict[str, Any], rounds: int, out: Path) -> dict[str, Any]:
    ours_once({**job, "steps": LOG_EVERY})  # makes the tracking database, which takes seconds
    names = [OURS, SYNTHETIC, STEP, BASELINE, BASELINE_OURS]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    turns = [names[(place + number) % len(names)] for number in range(rounds) for place in range(len(names))]
    with tqdm(turns, "measuring", unit="run", disable=None) as progress:
        for name in progress:
            speeds[name].append(ours_once(job) if name == OURS else measured(name, job))
            progress.set_postfix_str(f"{name}: {speeds[name][-1]:.1f} img/s")
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    ours = medians[OURS]
    print("| | images/s | ours over it |\n|---|---:|---:|", file=sys.stderr)
    for name, speed in medians.items():
        print(f"| {name} | {speed:.1f} | {ours / speed:.3f} |", file=sys.stderr)
    result = {
        "ratio_baseline": ours / medians[BASELINE],
        "ratio_baseline_our_network": ours / medians[BASELINE_OURS],
        "ratio_synthetic": ours / medians[SYNTHETIC],
        "overhead": medians[STEP] / ours - 1,
        "images_per_second": medians,
        **{name: value for name, value in job.items() if name not in ("shards", "folder")},
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    title = f"whole training of {job['model']}, batch {job['batch']}, bf16"
    return report.finish(
        "end_to_end",
        result,
        out,
        device=device,
        details={"rounds": speeds},
        draw=report.bars({title: speeds}, "images/s", report.device_name(device)),
    )


def _prepared(data: Path) -> Path:
    images = data / "images"
    if not images.exists():
        data.mkdir(parents=True, exist_ok=True)
        photographs.write(images, NUM_PHOTOGRAPHS)
    if not (data / "shards").exists():
        pack(images, data / "shards", samples_per_shard=48)
    return (data / "shards").resolve()


def measured(name: str, job: dict[str, Any]) -> float:
    """Images a second of one run of a contender."""
    own = [sys.executable, "-m", "benchmarks.end_to_end_contenders", name, json.dumps(job)]
    done = subprocess.run(own, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["images_per_second"]


def ours_once(job: dict[str, Any]) -> float:
    settings = configuration(job)
    run = Path(settings["run"]["root"], settings["run"]["name"])
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    subprocess.run([sys.executable, "launch/pretrain.py", "--config", path], check=True, capture_output=True)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    times = {line["step"]: line["time"] for line in lines if "images_per_second" in line}
    shutil.rmtree(run)
    return job["steps"] * job["batch"] / (times[WARM_UP + job["steps"]] - times[WARM_UP])


def configuration(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"name": "end-to-end", "root": job["folder"]},
        "model": {"name": job["model"], "drop_path_rate": 0.1},
        "image": {"size": 224},
        "data": {"train": job["shards"], "lanes": 1},
        "optim": {"lr": 1e-4},
        "train": {
            "length": f"{WARM_UP + job['steps']} steps",
            "global_batch_size": job["batch"],
            "log_every": f"{LOG_EVERY} steps",
        },
        "engine": {"precision": "bf16"},
        "tracking": {"report": False},
    }


if __name__ == "__main__":
    command.run(main)
