"""What the order costs: seeking, start-up, memory.

python -m benchmarks.order [--out DIR]

Each figure is of a process of its own. Seeking is the time to compute a whole global batch of 1,024 samples at a
random place of the run, all lanes of it: a rank computes its part alone.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import report
from pipeline import cli

BATCH, LANES, WINDOW = 1024, 64, 4096


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.order", description=(__doc__ or "").splitlines()[0])
    report.add_out(parser, "order")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, folder = arguments.measure
        return seek() if kind == "seek" else open_manifest(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder))
        seeking, opening = measured("seek", folder), measured("open", folder)
    lines = ["| simulated epoch of | seek, ms a batch | 95 % | start-up, s |", "|---|---:|---:|---:|"]
    for name, figures in seeking.items():
        lines.append(f"| {name} | {figures['median_ms']:.2f} | {figures['p95_ms']:.2f} | {figures['startup_s']:.2f} |")
    lines += [
        "",
        f"opening a manifest of 10^9 samples in 10^5 shards, and its first batch: "
        f"{opening['startup_s']:.2f} s, {opening['startup_mb']:.0f} MB more than Python with its imports",
    ]
    print("\n".join(lines), file=sys.stderr)
    result = {"seek_ms": seeking["10^12 samples, 10^6 shards"]["median_ms"], **opening}
    bars = {"seek to a batch, ms": {name: figures["times_ms"] for name, figures in seeking.items()}}
    return report.finish(
        "order",
        {name: round(value, 3) for name, value in result.items()},
        arguments.out,
        device="cpu",
        details={"seeking": seeking},
        draw=report.bars(bars, "ms", f"the order: {report.device_name('cpu')}"),
    )


def measured(kind: str, folder: str) -> dict[str, Any]:
    own = [sys.executable, "-m", "benchmarks.order", "--measure", kind, folder]
    return json.loads(subprocess.run(own, check=True, capture_output=True, text=True).stdout)


def seek() -> dict[str, dict[str, Any]]:
    from pipeline.feed.order import Order

    figures = {}
    for name, samples, shards in (
        ("10^9 samples, 10^5 shards", 10**9, 10**5),
        ("10^12 samples, 10^6 shards", 10**12, 10**6),
    ):
        began = time.perf_counter()
        order = Order(
            [np.full(shards, samples // shards)],
            seed=0,
            global_batch_size=BATCH,
            lanes=LANES,
            shuffle_window=WINDOW,
        )
        order.samples(0)
        startup_s = time.perf_counter() - began
        rng, times = np.random.default_rng(0), []
        for step in rng.integers(order.steps_per_epoch, size=500).tolist():
            began = time.perf_counter()
            order.samples(step)
            times.append(1e3 * (time.perf_counter() - began))
        median, p95 = np.percentile(times, [50, 95])
        figures[name] = {"median_ms": median, "p95_ms": p95, "startup_s": startup_s, "times_ms": times}
    return figures


def write_manifest(folder: Path) -> None:
    """Of 10^5 shards that do not exist: opening reads the manifest alone."""
    from pipeline.shards.index import MANIFEST, Manifest, Shard

    shards = [
        Shard(
            name=f"shard-{number:06d}",
            samples=10_000,
            bytes=10**9 + number,
            sha256=f"{number:064x}",
            index_bytes=360_128,
            index_sha256=f"{number + 1:064x}",
        )
        for number in range(10**5)
    ]
    manifest = Manifest.of([str(number) for number in range(1000)], shards)
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def open_manifest(folder: Path) -> dict[str, float]:
    from pipeline.feed.order import Order
    from pipeline.shards.index import ShardSet

    before = psutil.Process().memory_info().rss / 1e6
    began = time.perf_counter()
    shards = ShardSet(folder)
    order = Order(shards.part_samples, seed=0, global_batch_size=BATCH, lanes=LANES, shuffle_window=WINDOW)
    order.samples(0)
    return {
        "startup_s": time.perf_counter() - began,
        "startup_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before,
    }


if __name__ == "__main__":
    cli.run(main)
