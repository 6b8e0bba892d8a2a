"""Images a second of launch/predict.py and of a loop like timm's inference.py, on the same files, weights and cores.

    photographs ─▶ rounds, in turns: launch/predict.py │ benchmarks/predict_timm.py ─▶ table, plot
    random network, a head fitted to tell the photographs apart ──registry──┘ weights

python -m benchmarks.predict [--rounds N] [--images N] [--models pvt_pico:64 pvt_tiny:224] [--workers N]

Each run is a process of its own. "Loop" is from the first file to the table of answers, for ours without the listing of
files, 0.1 ms each; "all" has the start of the process, too: imports, and for ours the verified model. Both take batches
of 256 and give the five best labels. timm's loop is in predict_timm.py, with a decoding worker for each core.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tqdm import tqdm

from benchmarks import photographs, report
from pipeline import cli, files
from pipeline.config import ClassificationConfig, ImageConfig, ModelConfig
from pipeline.errors import ExternalError
from pipeline.tasks import classify, probe
from pipeline.tasks.load_model import Preprocess
from pipeline.track import tracking_server
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import registry

NUM_CLASSES = 11  # the photographs that all variants are made of
FITTED = 10 * NUM_CLASSES  # variants that the head is fitted to
OURS, TIMM = "ours", "timm"


def main() -> dict[str, Any]:
    arguments = _arguments()
    images = arguments.data / f"images-{arguments.images}"
    if not images.exists():
        images.parent.mkdir(parents=True, exist_ok=True)
        photographs.write(images, arguments.images)
    figures, rounds, panels = {}, {}, {}
    for model in arguments.models:
        name, _, size = model.partition(":")
        folder = arguments.data / model.replace(":", "-")
        if not folder.exists():
            register(name, int(size), images, folder)
        runs: dict[str, list[dict[str, float]]] = {OURS: [], TIMM: []}
        for _ in tqdm(range(arguments.rounds), model, unit="round", disable=None):
            runs[OURS].append(run_ours(folder, images))
            runs[TIMM].append(run_timm(name, int(size), folder, images, arguments.workers))
        rates = {
            (who, what): arguments.images / statistics.median(run[what] for run in runs[who])
            for who in runs
            for what in ("loop_s", "all_s", "cpu_s")
        }
        figures[model] = {
            **{f"{who}_{what.removesuffix('_s')}": round(rate, 2) for (who, what), rate in rates.items()},
            **{
                f"ratio_{what.removesuffix('_s')}": round(rates[OURS, what] / rates[TIMM, what], 2) for _, what in rates
            },
            "different_top1": count_different(folder),
        }
        rounds[model] = runs
        panels[model] = {who: [arguments.images / run["loop_s"] for run in runs[who]] for who in runs}
    print(table(figures), file=sys.stderr)
    return report.finish(
        "predict",
        {"images": arguments.images, "models": figures},
        arguments.out,
        device="cpu",
        details={"rounds": rounds, "workers": arguments.workers},
        draw=report.bars(panels, "images/s", f"predicting from files: {report.device_name('cpu')}"),
    )


def register(name: str, size: int, images: Path, folder: Path) -> None:
    """Makes models:/bench/1 of a network of random weights, whose head is fitted to tell the photographs apart."""
    torch.manual_seed(0)
    # OpenMP's threads spin while they wait, which on a busy machine takes minutes.
    torch.set_num_threads(1)
    config = ModelConfig(name=name)
    network: Any = classify.build_model(config, size, NUM_CLASSES).eval()
    card = ModelCard(
        task=ClassificationConfig(),
        model=config,
        image=ImageConfig(size=size),
        eval_batch_size=256,
        classes=[str(number) for number in range(NUM_CLASSES)],
        metrics={},
        sha256={},
        lineage={"run": "a" * 32, "step": "1", "data": "d" * 64},
    )
    preprocess = Preprocess(card)
    # The number of a variant says which photograph it was made of.
    numbers = {path: int(path.stem.rpartition("-")[2]) for path in images.glob("*/*.jpg")}
    chosen = sorted(path for path, number in numbers.items() if number < FITTED)
    features = torch.cat([probe.features(network, preprocess(path)[None]) for path in chosen])
    labels = torch.tensor([numbers[path] % NUM_CLASSES for path in chosen])
    weight, bias = probe.logistic_regression(features, labels, NUM_CLASSES, l2=1e-3)
    network.head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    entry = folder / "entry"
    entry.mkdir(parents=True)
    safetensors.torch.save_file(network.state_dict(), entry / WEIGHTS)
    card.model_copy(update={"sha256": {WEIGHTS: files.sha256(entry / WEIGHTS)}}).write(entry)
    client = tracking_server.connect(_tracking_uri(folder), create=True)
    experiment = tracking_server.find_experiment(client, "benchmark")
    registry.register(client, "bench", entry, experiment_id=experiment, run_id=None)


def run_ours(folder: Path, images: Path) -> dict[str, float]:
    command = ["launch/predict.py", "--model", "models:/bench/1", "--tracking-uri", _tracking_uri(folder)]
    result, times = _run([*command, str(images), "--out", str(folder / "ours.csv"), "--quiet"])
    return {"loop_s": result["images"] / result["images_per_second"], **times}


def run_timm(name: str, size: int, folder: Path, images: Path, workers: int) -> dict[str, float]:
    job = {
        "model": name,
        "size": size,
        "classes": NUM_CLASSES,
        "weights": str(folder / "entry" / WEIGHTS),
        "images": str(images),
        "batch_size": 256,
        "workers": workers,
        "crop_pct": ImageConfig().crop_pct,
        "out": str(folder / "timm.csv"),
    }
    result, times = _run(["benchmarks/predict_timm.py", json.dumps(job)])
    return {"loop_s": result["seconds"], **times}


def _run(command: list[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns a command's result, and the seconds that it and its cores took."""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise ExternalError(f"{command[0]} ended with {run.returncode}: {run.stderr[-2000:]}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(run.stdout.splitlines()[-1]), {"all_s": seconds, "cpu_s": cpu_s}


def count_different(folder: Path) -> int:
    """Returns the number of files to which the two give different labels."""
    with (folder / "ours.csv").open() as file:
        ours = {row["path"]: int(row["label"]) for row in csv.DictReader(file)}
    with (folder / "timm.csv").open() as file:
        theirs = {row[0]: int(row[1]) for row in list(csv.reader(file))[1:]}
    assert ours.keys() == theirs.keys()
    return sum(ours[path] != theirs[path] for path in ours)


def table(figures: dict[str, dict[str, float]]) -> str:
    lines = [
        "| images/s | ours | timm | ratio | all: ours | timm | ratio | a core: ours | timm | ratio | top-1 differs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model, of in figures.items():
        cells = [
            f"{of[f'ours_{what}']:.1f} | {of[f'timm_{what}']:.1f} | **{of[f'ratio_{what}']:.2f}**"
            for what in ("loop", "all", "cpu")
        ]
        lines.append(f"| {model} | {' | '.join(cells)} | {of['different_top1']} |")
    return "\n".join(lines)


def _tracking_uri(folder: Path) -> str:
    return f"sqlite:///{(folder / 'mlflow.db').absolute()}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=report.count, default=3, help="(default: 3)")
    parser.add_argument("--images", type=report.count, default=5000, help="photographs (default: 5,000, 0.35 GB)")
    parser.add_argument("--models", nargs="+", default=["pvt_pico:64", "pvt_tiny:224"], metavar="NAME:SIZE")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=report.count, default=cores, help="decoding processes of timm (default: cores)"
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data/predict"), help="made when missing")
    report.add_out(parser, "predict")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
