"""Images a second of whole training, feed included: ours, and what a careful user would write.

    photographs ──▶ shards ──▶ rounds: each contender a process of its own, in rotated order ──▶ table, JSON line

python -m benchmarks.end_to_end [--model pvt_tiny] [--batch 32] [--steps 30] [--rounds 5]

On one rank, at the same model, batch and precision (bf16), random resized crops and mirroring, AdamW; after so many
steps of warm-up:

- ours: launch/pretrain.py as it is started by hand, with its guard, metrics and tracking;
- synthetic: our engine, on one batch again and again;
- step: the same network and AdamW on that batch, with nothing around them;
- baseline: webdataset, Pillow, torchvision's transforms, DataLoader's workers, DistributedDataParallel, and the plain
  network of benchmarks.step; and the same with our network.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from benchmarks import photographs
from launch import command
from pipeline.shards.pack import pack

WARM_UP = 6
NUM_PHOTOGRAPHS = 1536
OURS, SYNTHETIC, STEP, BASELINE, BASELINE_OURS = (
    *("ours", "synthetic", "step", "baseline"),
    "baseline, our network",
)


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="pvt_tiny")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="measured in each run, after a warm-up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="the baseline's decoding processes")
    parser.add_argument("--data", type=Path, default=Path("runs/data/feed"), help="made when missing: 0.2 GB")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="for end_to_end.json")
    arguments = parser.parse_args()
    shards = _prepared(arguments.data)
    job = {"model": arguments.model, "batch": arguments.batch, "steps": arguments.steps, "shards": str(shards)}
    names = [OURS, SYNTHETIC, STEP, BASELINE, BASELINE_OURS]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    turns = [names[(place + number) % len(names)] for number in range(arguments.rounds) for place in range(len(names))]
    with tqdm(turns, "measuring", unit="run", disable=None) as progress:
        for name in progress:
            speeds[name].append(measured(name, {**job, "workers": arguments.workers}))
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
        **job,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "end_to_end.json").write_text(json.dumps({**result, "rounds": speeds}, indent=1) + "\n")
    return result


def _prepared(data: Path) -> Path:
    images = data / "images"
    if not images.exists():
        data.mkdir(parents=True, exist_ok=True)
        photographs.write(images, NUM_PHOTOGRAPHS)
    if not (data / "shards").exists():
        pack(images, data / "shards", samples_per_shard=48)
    return (data / "shards").resolve()


def measured(name: str, job: dict[str, Any]) -> float:
    """Images a second of one run."""
    with tempfile.TemporaryDirectory() as folder:
        if name != OURS:
            own = [
                sys.executable,
                "-m",
                "benchmarks.end_to_end_contenders",
                name,
                json.dumps({**job, "folder": folder}),
            ]
            done = subprocess.run(own, check=True, capture_output=True, text=True)
            return json.loads(done.stdout.splitlines()[-1])["images_per_second"]
        path = Path(folder, "run.yaml")
        path.write_text(yaml.safe_dump(configuration(job, folder)))
        subprocess.run([sys.executable, "launch/pretrain.py", "--config", path], check=True, capture_output=True)
        lines = map(json.loads, Path(folder, "end-to-end/metrics.jsonl").read_text().splitlines())
        times = {line["step"]: line["time"] for line in lines if "images_per_second" in line}
    last = WARM_UP + job["steps"]
    return job["steps"] * job["batch"] / (times[last] - times[WARM_UP])


def configuration(job: dict[str, Any], folder: str) -> dict[str, Any]:
    return {
        "run": {"name": "end-to-end", "root": folder},
        "model": {"name": job["model"], "drop_path_rate": 0.1},
        "image": {"size": 224},
        "data": {"train": job["shards"], "lanes": 1},
        "optim": {"lr": 1e-4},
        "train": {
            "length": f"{WARM_UP + job['steps']} steps",
            "global_batch_size": job["batch"],
            "log_every": "3 steps",
        },
        "engine": {"precision": "bf16"},
        "tracking": {"report": False},
    }


if __name__ == "__main__":
    command.run(main)
