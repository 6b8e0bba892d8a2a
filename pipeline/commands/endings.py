"""What a command says to people at its end: what came out, and what to do next."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.run_folder import REPORT
from pipeline.track.metric_names import format_scores, is_detail

_NO_SCORES = ("steps", "images_per_second", "ettr", "samples")


def describe_training(result: Mapping[str, Any], config: Config) -> str:
    """Returns the ending of a training run: its scores, where its report lies, and the next commands."""
    folder = config.run.folder
    if result.get("at_work"):
        return f"{folder}: another process is at work on this hand-off"
    if result.get("requeue"):
        return f"{folder}: stopped early and saved in {result['checkpoint']}: the same command goes on from there"
    lines = [f"{folder}: {config.model.name} after {result['steps']:,} steps: {_format_scores(result)}"]
    if Path(folder, REPORT).exists():
        lines.append(f"report: {Path(folder, REPORT)}")
    model = result.get("best") or result.get("model")
    if not model:
        lines.append(f"the model is not registered yet: python launch/registry.py sync {folder}")
        return "\n".join(lines)
    lines.append("next:")
    if isinstance(config.data.val, str):
        lines.append(f"  python launch/evaluate.py --model {model} --data {config.data.val} --draw 16")
    lines.append(f"  python launch/predict.py --model {model} PICTURES --out seen.csv --sheet seen.png")
    return "\n".join(lines)


def describe_evaluation(result: Mapping[str, Any]) -> str:
    """Returns the ending of an evaluation: the scores of a model on a data set."""
    ending = f"{result['model']} on {result['samples']:,} samples of {result['data']}: {_format_scores(result)}"
    if "drawing" in result:
        ending += f"\ndrawn: {result['drawing']}"
    return ending


def _format_scores(result: Mapping[str, Any]) -> str:
    scores: dict[str, float | None] = {}
    for name, value in result.items():
        if isinstance(value, int | float) and name not in _NO_SCORES and not is_detail(name):
            scores[name] = value
    return format_scores(scores)
