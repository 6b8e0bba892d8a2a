"""Is fine-tuning a registered model better than training from scratch, at equal steps?

python -m benchmarks.transfer --config configs/finetune/scenes.yaml --model models:/scene-digits@candidate
    [--seeds 3] [--ranks 2] [--set KEY=VALUE]

    for each seed:  the model's backbone, before any step │ fine-tuned │ the same configuration from random weights

Prints a table of the task's main metric to standard error. The runs are left in runs/transfer/, in a folder for each
configuration and model; one that has finished is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.config import fingerprint, load_config
from pipeline.errors import ExternalError
from pipeline.track import tracking_server
from pipeline.track.sync.record import MAIN_METRIC, Record

STARTS = ("before", "fine-tuned", "from scratch")
_STILL = ("train.length=1 steps", "optim.warmup=0 steps", "optim.lr=1e-12")


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="of a fine-tuning run")
    parser.add_argument("--model", required=True, metavar="URI", help="what fine-tuning starts from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args()
    if min(arguments.seeds, arguments.ranks) < 1:
        parser.error("--seeds and --ranks are at least 1")
    config = load_config(arguments.config, arguments.set)
    name, about = config.run.name, [config.model_dump(mode="json"), arguments.model, arguments.ranks]
    root = Path("runs/transfer") / f"{name}-{fingerprint(about)[:8]}"
    scores: dict[str, list[float]] = {start: [] for start in STARTS}
    print(f"{name}\n| seed | {' | '.join(STARTS)} |\n|---|---|---|---|", file=sys.stderr)
    metric = ""
    for seed in range(arguments.seeds):
        for start in STARTS:
            folder = root / f"{name}-{start.replace(' ', '-')}-{seed}"
            result = _run(arguments, start, folder, seed)
            metric = Record.read(folder).tags[MAIN_METRIC]
            scores[start].append(result[metric])
        row = " | ".join(f"{scores[start][-1]:.4f}" for start in STARTS)
        print(f"| {seed} | {row} |", file=sys.stderr, flush=True)
    means = {start: statistics.mean(values) for start, values in scores.items()}
    better = sum(ours > theirs for ours, theirs in zip(scores["fine-tuned"], scores["from scratch"], strict=True))
    return {"config": arguments.config, "metric": metric, "scores": scores, "means": means, "better": better}


def _run(arguments: argparse.Namespace, start: str, folder: Path, seed: int) -> dict[str, Any]:
    """The result of a run; of one that has finished before, what it was."""
    config = [
        *arguments.set,
        f"run.seed={seed}",
        f"run.name={folder.name}",
        f"run.root={folder.parent}",
        f"tracking.uri={tracking_server.tracking_uri(None)}",
        "tracking.report=false",
        "tracking.log_samples=false",
        *(() if start == "from scratch" else (f"init.model={arguments.model}",)),
        *(_STILL if start == "before" else ()),
    ]
    target = "launch/pretrain.py" if start == "from scratch" else "launch/finetune.py"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={arguments.ranks}",
    ]
    starter = [*torchrun, target, "--config", arguments.config]
    process = subprocess.run(
        [*starter, *(part for setting in config for part in ("--set", setting))], capture_output=True, text=True
    )
    path = folder / "result.json"
    if process.returncode or not path.exists():
        raise ExternalError(f"{folder} failed: {process.stderr[-2000:]}")
    return json.loads(path.read_text())


if __name__ == "__main__":
    cli.run(main)
