"""Is fine-tuning a registered model better than training from scratch, at equal steps?

python -m benchmarks.transfer --config configs/finetune/scenes.yaml --model models:/scene-digits@candidate --metric miou
    [--seeds 3] [--ranks 2] [--set KEY=VALUE]

    for each seed:  the model's backbone, before any step │ fine-tuned │ the same configuration from random weights

Prints a table of the task's main metric to standard error. The runs are left in runs/transfer/.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch import command
from pipeline import config
from pipeline.errors import ExternalError
from pipeline.track import server

STARTS = ("before", "fine-tuned", "from scratch")
_STILL = ("train.length=1 steps", "optim.warmup=0 steps", "optim.lr=1e-12")


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="of a fine-tuning run")
    parser.add_argument("--model", required=True, metavar="URI", help="what fine-tuning starts from")
    parser.add_argument("--metric", required=True, help="the task's main metric: top1, miou")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args()
    name = config.load(arguments.config, arguments.set).run.name
    scores: dict[str, list[float]] = {start: [] for start in STARTS}
    print(f"{name}: {arguments.metric}\n| seed | {' | '.join(STARTS)} |\n|---|---|---|---|", file=sys.stderr)
    for seed in range(arguments.seeds):
        for start in STARTS:
            run = f"{name}-{start.replace(' ', '-')}-{seed}"
            result = _run(arguments, start, run, seed)
            scores[start].append(result[arguments.metric])
        row = " | ".join(f"{scores[start][-1]:.4f}" for start in STARTS)
        print(f"| {seed} | {row} |", file=sys.stderr, flush=True)
    means = {start: statistics.mean(values) for start, values in scores.items()}
    better = sum(ours > theirs for ours, theirs in zip(scores["fine-tuned"], scores["from scratch"], strict=True))
    return {"config": arguments.config, "metric": arguments.metric, "scores": scores, "means": means, "better": better}


def _run(arguments: argparse.Namespace, start: str, run: str, seed: int) -> dict[str, Any]:
    """The result of a run; of one that has finished before, what it was."""
    settings = [
        *arguments.set,
        f"run.seed={seed}",
        f"run.name={run}",
        "run.root=runs/transfer",
        f"tracking.uri={server.tracking_uri(None)}",
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
        [*starter, *(part for setting in settings for part in ("--set", setting))], capture_output=True, text=True
    )
    path = Path("runs/transfer") / run / "result.json"
    if process.returncode or not path.exists():
        raise ExternalError(f"{run} failed: {process.stderr[-2000:]}")
    return json.loads(path.read_text())


if __name__ == "__main__":
    command.run(main)
