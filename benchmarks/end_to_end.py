"""Images a second of whole training, feed included: ours, and what a careful user would write.

    photographs ──▶ shards ──▶ rounds: each contender a process of its own, in rotated order ──▶ table, JSON line

python -m benchmarks.end_to_end [--model pvt_tiny] [--batch 32] [--steps 30] [--seconds 5] [--rounds 5] [--out DIR]

On one rank, at the same model, batch and precision, random resized crops and mirroring, AdamW. Each is warmed up
for at least 15 steps and ten seconds, and then measured for at least so many steps and seconds:

- ours: launch/pretrain.py as it is started by hand, with its guard, metrics and tracking. It is warmed up until the
  import of MLflow, which goes on behind its first steps, is over and the run has its copy on the server;
- synthetic: our engine, on one batch again and again;
- step: the same network and AdamW on that batch, with nothing around them;
- baseline: webdataset, Pillow, torchvision's transforms, DataLoader's workers, DistributedDataParallel, and the plain
  network of benchmarks.step; and the same with our network.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from benchmarks import photographs, report
from benchmarks.step import DEPTHS
from pipeline import cli
from pipeline.errors import ExternalError
from pipeline.flops import DTYPES
from pipeline.shards.pack import pack

WARM_UP_STEPS, WARM_UP_S = 15, 10.0
LOG_EVERY = 5
"""Steps: the lines of metrics.jsonl are the clock of ours."""
PATIENCE_S = 1800.0
"""Longest that a run of ours may take."""
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
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of autocast")
    parser.add_argument("--steps", type=report.count, default=30, help="measured in each run at least, after a warm-up")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured in each run at least")
    parser.add_argument("--warm-up", type=float, default=WARM_UP_S, metavar="SECONDS", help="before that, at least")
    parser.add_argument("--rounds", type=report.count, default=5)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=report.count, default=cores, help="of the baseline (default: one a core)")
    parser.add_argument("--data", type=Path, default=Path("runs/data/feed"), help="made when missing: 0.2 GB")
    report.add_out(parser, "end_to_end")
    arguments = parser.parse_args()
    names = ("model", "batch", "precision", "steps", "seconds", "warm_up", "workers")
    job = {name: getattr(arguments, name) for name in names}
    shards = _prepared(arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        return _measure({**job, "shards": str(shards), "folder": folder}, arguments.rounds, arguments.out)


def _measure(job: dict[str, Any], rounds: int, out: Path) -> dict[str, Any]:
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
    title = f"whole training of {job['model']}, batch {job['batch']}, {job['precision']}"
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
    """Returns the images a second of a run, which is ended once it has been measured."""
    config = configuration(job)
    run = Path(config["run"]["root"], config["run"]["name"])
    path, log = run.with_suffix(".yaml"), run.with_suffix(".log")
    path.write_text(yaml.safe_dump(config))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "launch/pretrain.py", "--config", path], stdout=output, stderr=output
        )
    try:
        return _read_speed(run, process, job)
    except ExternalError as error:
        raise ExternalError(f"{error}\n{log.read_text()[-4000:]}") from None
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(run, ignore_errors=True)


def _read_speed(run: Path, process: subprocess.Popen[bytes], job: dict[str, Any]) -> float:
    """Waits until a run has been measured, and returns its images a second.

    Raises ExternalError where the run ends before that or takes too long.
    """
    patience, since = time.monotonic() + PATIENCE_S, None
    while process.poll() is None and time.monotonic() < patience:
        times = _times(run / "metrics.jsonl")
        if since is None and is_warm(times, job) and _is_tracked(run):
            since = max(times)
        if since is not None and (speed := speed_since(since, times, job)):
            return speed
        time.sleep(0.1)
    raise ExternalError(f"launch/pretrain.py was not measured: it ended with {process.poll()}, or took too long")


def _times(metrics: Path) -> dict[int, float]:
    """Returns the time at which each step was logged, in seconds, by the step's number."""
    if not metrics.exists():
        return {}
    whole, _, _ = metrics.read_text().rpartition("\n")
    return {line["step"]: line["time"] for line in map(json.loads, whole.splitlines()) if "images_per_second" in line}


def is_warm(times: dict[int, float], job: dict[str, Any]) -> bool:
    return bool(times) and max(times) >= WARM_UP_STEPS and times[max(times)] - times[min(times)] >= job["warm_up"]


def _is_tracked(run: Path) -> bool:
    """Returns whether MLflow is imported and has the run. Without MLflow there is nothing to wait for."""
    return (run / "mlflow.json").exists() or not importlib.util.find_spec("mlflow")


def speed_since(first: int, times: dict[int, float], job: dict[str, Any]) -> float | None:
    """Returns the images a second from step `first` to the last logged one; None if too few steps or seconds."""
    last = max(times)
    seconds = times[last] - times[first]
    if last - first < job["steps"] or seconds < job["seconds"]:
        return None
    return (last - first) * job["batch"] / seconds


def configuration(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"name": "end-to-end", "root": job["folder"]},
        "model": {"name": job["model"], "drop_path_rate": 0.1},
        "image": {"size": 224},
        "data": {"train": job["shards"], "lanes": 1},
        "optim": {"lr": 1e-4},
        "train": {
            "length": "1000000 steps",  # more than are ever taken
            "global_batch_size": job["batch"],
            "log_every": f"{LOG_EVERY} steps",
        },
        "engine": {"precision": job["precision"]},
        "tracking": {"report": False},
    }


if __name__ == "__main__":
    cli.run(main)
