"""Images a second of our feed and of others, from the same photographs on the same cores.

    photographs ─▶ shards, MDS, LitData ─▶ rounds: each contender a process of its own, in rotated order ─▶ table, plot

python -m benchmarks.feed [--rounds N] [--images N] [--recipes plain full] [--contenders …] [--device cpu|cuda]

Every contender delivers batches of 64 float32 images of 224 px, normalised, with their labels, to the main process,
which drops them. Recipes, the same for all, without mixup and cutmix:

- plain: random resized crop (bicubic, antialiased, area 0.08 to 1, ratio 3/4 to 4/3), mirror, normalise;
- full: plain, RandAugment rand-m9-mstd0.5-inc1, random erasing of 0.25 with pixel noise.

Peers live in an environment of their own: `make peers`. How each is set up is in peers.py.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import peers, photographs, report
from benchmarks.peers import BATCH_SIZE, Job
from pipeline import cli
from pipeline.errors import InputError
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack

OURS = "ours"
NUM_PHOTOGRAPHS = 1536
SAMPLES_PER_SHARD = 48  # some 4 MB: enough shards for every worker of a large machine to have its own
SHARD_BYTES = 4 << 20
MOST_DISTURBED = 0.05  # a run in which other processes took more of the cores' time is repeated,
ATTEMPTS = 3  # so often in all; then the least disturbed one counts

Rounds = dict[str, dict[str, list[dict[str, float]]]]  # recipe, contender, round: what Bench.measure says


def main() -> dict[str, Any]:
    arguments = _arguments()
    os.sched_setaffinity(0, arguments.cores)  # which every process started from here inherits
    names = list(dict.fromkeys(arguments.contenders))
    environment = Environment(arguments.peers_python, arguments.data)
    environment.prepare(with_peers=names != [OURS])
    bench = Bench(environment, arguments.device, arguments.images, len(arguments.cores))
    workers = {name: arguments.workers or bench.best_workers(name, arguments.recipes[0]) for name in names}

    rounds: Rounds = {recipe: {name: [] for name in names} for recipe in arguments.recipes}
    turns = [
        (recipe, names[(place + number) % len(names)])
        for number in range(arguments.rounds)
        for recipe in arguments.recipes
        for place in range(len(names))
    ]
    with tqdm(turns, "measuring", unit="run", disable=None) as progress:
        for recipe, name in progress:
            result = bench.measure(name, recipe, workers[name])
            rounds[recipe][name].append(result)
            progress.set_postfix_str(f"{name}, {recipe}: {result['images_per_second']:.0f} img/s")
    _check_pixels(rounds)

    print(table(rounds, workers), file=sys.stderr)
    medians = {recipe: {name: median(runs) for name, runs in of.items()} for recipe, of in rounds.items()}
    result = {
        **{f"ratio_{recipe}": _ratio(of) for recipe, of in medians.items()},
        "images_per_second": medians,
    }
    bars = {
        f"{recipe} recipe": {
            name: [run["images_per_second"] for run in of[name]]
            for name in sorted(of, key=lambda name: -medians[recipe][name])
        }
        for recipe, of in rounds.items()
    }
    return report.finish(
        "feed",
        result,
        arguments.out,
        device=arguments.device,
        details={"peers": environment.peers_versions(), "workers": workers, "rounds": rounds},
        draw=report.bars(bars, "images/s", f"the feed: {report.device_name(arguments.device)}", columns=2),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feed", description="Compare our feed with others.")
    everybody = [OURS, *peers.CONTENDERS]
    cores = sorted(os.sched_getaffinity(0))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, help="measured in each run after a warm-up; without it 1,600 a core")
    parser.add_argument("--recipes", nargs="+", choices=["plain", "full"], default=["plain", "full"])
    parser.add_argument("--contenders", nargs="+", choices=everybody, default=everybody, metavar="NAME")
    parser.add_argument("--cores", type=int, nargs="+", default=cores, help="numbers of the cores that all runs use")
    parser.add_argument("--workers", type=int, help="decoding processes of peers; without it the best of cores ± 1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, default=Path("runs/data/feed"), help="made when missing: 0.5 GB")
    report.add_out(parser, "feed")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    arguments = parser.parse_args()
    arguments.images = arguments.images or 1600 * len(arguments.cores)
    if arguments.rounds < 1 or arguments.images < BATCH_SIZE:
        parser.error(f"--rounds is at least 1 and --images at least {BATCH_SIZE}")
    if absent := set(arguments.cores) - set(cores):
        parser.error(f"--cores: {sorted(absent)} are not among this process's {cores}")
    return arguments


@dataclasses.dataclass(frozen=True)
class Environment:
    """The peers' interpreter and the photographs in everybody's format."""

    python: Path
    data: Path

    def prepare(self, with_peers: bool) -> None:
        images, converted = self.data / "images", self.data / "converted.json"
        if with_peers and not self.python.exists():
            raise InputError(f"{self.python}: no such interpreter; `make peers` makes it, or give --peers-python")
        if not images.exists():
            self.data.mkdir(parents=True, exist_ok=True)
            photographs.write(images, NUM_PHOTOGRAPHS)
        if not (self.data / "shards").exists():
            pack(images, self.data / "shards", samples_per_shard=SAMPLES_PER_SHARD)
        ShardSet(self.data / "shards")  # refuses now what another version packed
        if with_peers and not converted.exists():  # the file is written last
            for name in ("mds", "litdata"):
                shutil.rmtree(self.data / name, ignore_errors=True)
            options = {"images": str(images), "out": str(self.data), "shard_bytes": SHARD_BYTES}
            versions = _run(self.python, "-P", peers.__file__, "convert", json.dumps(options))
            converted.write_text(json.dumps(versions))

    def peers_versions(self) -> dict[str, str]:
        converted = self.data / "converted.json"
        return json.loads(converted.read_text()) if converted.exists() else {}


@dataclasses.dataclass(frozen=True)
class Bench:
    environment: Environment
    device: str
    images: int
    cores: int

    def measure(self, name: str, recipe: str, workers: int, share: float = 1.0) -> dict[str, float]:
        warmup, batches = peers.INSPECTED + 4 * (workers + 1), max(1, round(share * self.images / BATCH_SIZE))
        job = Job(
            contender=name,
            recipe=recipe,
            data=str(self.environment.data.resolve()),
            device=self.device,
            warmup=warmup,
            batches=batches,
            workers=workers,
            # One more, for what is read ahead and for workers that do not end at the same time.
            copies=1.0 + math.ceil((warmup + batches) * BATCH_SIZE / NUM_PHOTOGRAPHS),
        )
        attempts: list[dict[str, float]] = []
        while len(attempts) < ATTEMPTS and all(run["others_share"] > MOST_DISTURBED for run in attempts):
            attempts.append(self._attempt(job))
        return min(attempts, key=lambda run: run["others_share"])

    def _attempt(self, job: Job) -> dict[str, float]:
        options = json.dumps(dataclasses.asdict(job))
        if job.contender == OURS:
            result = _run(sys.executable, "-m", "benchmarks.ours", options)
        else:
            result = _run(self.environment.python, "-P", peers.__file__, "measure", options)
        return {
            "images_per_second": result["images"] / result["seconds"],
            "cpu_ms_per_image": 1000 * result["cpu_s"] / result["images"],
            "others_share": result["others_s"] / result["seconds"] / self.cores,
            "mean": result["mean"],
            "std": result["std"],
        }

    def best_workers(self, name: str, recipe: str) -> int:
        """The fastest number of worker processes around one a core. Our feed has threads and sets them itself."""
        if name == OURS:
            return self.cores
        choices = sorted({max(1, self.cores - 1), self.cores, self.cores + 1})
        rates = {n: self.measure(name, recipe, n, share=0.5)["images_per_second"] for n in choices}
        told = ", ".join(f"{rate:.0f} img/s with {n}" for n, rate in rates.items())
        print(f"{name}, workers: {told}", file=sys.stderr)
        return max(rates, key=lambda n: rates[n])


def _run(*arguments: Any) -> dict[str, Any]:
    done = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _check_pixels(rounds: Rounds) -> None:
    """Contenders that deliver other pixels than the rest would be measuring something else."""
    for recipe, contenders in rounds.items():
        for moment in ("mean", "std"):
            found = {name: statistics.mean(run[moment] for run in runs) for name, runs in contenders.items()}
            usual = statistics.median(found.values())
            if odd := {name: value for name, value in found.items() if abs(value - usual) > 0.15}:
                raise RuntimeError(f"{recipe}: pixels' {moment} is {odd}, of the others about {usual:.2f}")


def median(runs: list[dict[str, float]], what: str = "images_per_second") -> float:
    return statistics.median(run[what] for run in runs)


def _ratio(medians: dict[str, float]) -> float | None:
    """Ours over the best peer; None where either was not measured."""
    best = max((value for name, value in medians.items() if name != OURS), default=None)
    return round(medians[OURS] / best, 3) if OURS in medians and best else None


def table(rounds: Rounds, workers: dict[str, int]) -> str:
    """Markdown: images a second (median, slowest to fastest round), and processor time an image."""
    lines = []
    for recipe, contenders in rounds.items():
        lines += [
            f"| {recipe} | workers | img/s | slowest – fastest | of ours | CPU ms/img |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, runs in sorted(contenders.items(), key=lambda item: -median(item[1])):
            rates = [run["images_per_second"] for run in runs]
            relative = f"{median(runs) / median(contenders[OURS]):.2f}" if OURS in contenders else ""
            processes = "threads" if name == OURS else str(workers[name])
            lines.append(
                f"| {name} | {processes} | {median(runs):.0f} | {min(rates):.0f} – {max(rates):.0f} "
                f"| {relative} | {median(runs, 'cpu_ms_per_image'):.2f} |"
            )
        lines.append("")
    disturbed = max(run["others_share"] for of in rounds.values() for runs in of.values() for run in runs)
    return "\n".join([*lines, f"Other processes took at most {disturbed:.0%} of the cores' time in a run."])


if __name__ == "__main__":
    cli.run(main)
