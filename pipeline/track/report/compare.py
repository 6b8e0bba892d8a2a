"""Gathers several runs side by side for compare.html.jinja: their results, their curves in the same charts, and the
settings in which they differ."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.track.metric_names import is_detail, is_fraction, label_of
from pipeline.track.report.page import STATUS, list_tiles
from pipeline.track.report.plots import Chart, Line, draw_chart
from pipeline.track.report.render import code, render
from pipeline.track.report.run_files import Array, RunFiles

_CURVES = {
    "loss": "Training loss",
    "val_loss": "Validation loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images a second",
    "ettr": "Effective training time",
}
_NO_VALUES: Array = np.empty(0)


def compare(runs: Sequence[RunFiles]) -> str:
    """Returns several runs as HTML. Runs of the same name are told apart by their folders."""
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.folder) for run in runs]
    metrics = dict.fromkeys(name for run in runs for name in run.metrics if not is_detail(name))
    return render(
        "compare.html.jinja",
        title=f"Comparison: {' · '.join(labels)}",
        made=runs[0].read_at,
        labels=labels,
        faults=[f"{label}: {fault}" for label, run in zip(labels, runs, strict=True) for fault in run.faults],
        results=_result_rows(runs),
        charts=[_draw_chart(runs, labels, name) for name in [*_CURVES, *metrics]],
        differences=_list_differences(runs),
    )


def _result_rows(runs: Sequence[RunFiles]) -> list[list[str | Markup]]:
    results = [{tile.name: tile.value for tile in list_tiles(run)} for run in runs]
    rows: list[list[str | Markup]] = [["state", *(STATUS.get(run.status, run.status) for run in runs)]]
    for name in dict.fromkeys(name for each in results for name in each):
        rows.append([name, *(each.get(name, "–") for each in results)])
    for name, tag in (("code", "mlflow.source.git.commit"), ("data", "data.digest")):
        rows.append([name, *(code(str(run.tags.get(tag, "–"))[:12]) for run in runs)])
    return rows


def _draw_chart(runs: Sequence[RunFiles], labels: Sequence[str], name: str) -> Chart:
    lines = []
    for run, label in zip(runs, labels, strict=True):
        curve = run.curve(name)
        # A run without this curve keeps its colour, and its entry in the legend.
        steps, values = (curve.steps, curve.values) if curve else (_NO_VALUES, _NO_VALUES)
        lines.append(Line(steps, values, label, dots=name not in run.training))
    percent = is_fraction(name) or name == "ettr"
    return draw_chart(_CURVES.get(name, label_of(name)), lines, percent=percent, from_zero=name in ("lr", "ettr"))


def _list_differences(runs: Sequence[RunFiles]) -> list[list[str | Markup]]:
    settings = [dict(_flatten(run.config)) for run in runs]
    rows: list[list[str | Markup]] = []
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each.get(name, "not set") for each in settings]
        if name != "run.name" and any(value != values[0] for value in values):
            texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
            rows.append([code(name), *texts])
    return rows


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
