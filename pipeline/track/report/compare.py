"""Runs side by side: their curves in the same charts, the settings in which they differ, and what came out."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.track.metric_names import is_detail, is_fraction, name_of
from pipeline.track.report.charts import Line, chart
from pipeline.track.report.html import Child, Html, absent, duration, join, number, section, table, tag
from pipeline.track.report.page import STATUS, document, ettr_of, known_count
from pipeline.track.report.run_files import RunFiles, as_number

_CURVES = {
    "loss": "Training loss",
    "val_loss": "Validation loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images a second",
    "ettr": "Effective training time",
}


def compare(runs: Sequence[RunFiles]) -> str:
    """Several runs as HTML. Those of one name are told apart by their folders."""
    names = [run.name for run in runs]
    labels = [run.name if names.count(run.name) == 1 else str(run.folder) for run in runs]
    title = " · ".join(labels)
    faults = [tag("li", f"{label}: {fault}") for label, run in zip(labels, runs, strict=True) for fault in run.faults]
    body = join(
        tag("header", tag("h1", "Comparison"), tag("p", f"{len(runs)} runs: {title}")),
        tag("div", "Some files could not be read:", tag("ul", faults), class_="faults") if faults else None,
        section("Results", _results(runs, labels), about="The best of each row is set in bold."),
        section("Curves", _curves(runs, labels)),
        section("Settings that differ", _differences(runs, labels)),
    )
    return document(f"Comparison: {title}", body, made=runs[0].read_at)


def _results(runs: Sequence[RunFiles], labels: Sequence[str]) -> Html:
    rows: list[list[Child]] = [["state", *(STATUS.get(run.status, run.status) for run in runs)]]
    rows.append(_row("steps", [run.steps_done for run in runs]))
    names = dict.fromkeys(name for run in runs for name in run.validation if name != "bad_samples")
    for name in [name for name in names if not is_detail(name)]:
        lowest = name.endswith("loss")
        found = [run.validation.get(name) for run in runs]
        bests = [curve.best(lowest=lowest) if curve else None for curve in found]
        best = [each[0] if each else None for each in bests]
        rows.append(_row(f"best {name_of(name)}", best, lowest=lowest, percent=is_fraction(name)))
        last = [curve.last if curve else None for curve in found]
        rows.append(_row(f"last {name_of(name)}", last, lowest=lowest, percent=is_fraction(name)))
    losses = [run.training["loss"].last if "loss" in run.training else None for run in runs]
    rows.append(_row("last training loss", losses))
    rates = [as_number(run.result.get("images_per_second")) for run in runs]
    rows.append(_row("images a second", [rate if np.isfinite(rate) else None for rate in rates], lowest=False))
    rows.append(_row("effective time", [ettr_of(run) for run in runs], lowest=False, percent=True))
    rows.append(["wall time", *(_wall_time(run) for run in runs)])
    rows.append(_row("restarts", [known_count(run.goodput.get("restarts")) for run in runs]))
    rows.append(
        _row("steps left out", [run.training["skipped"].last if "skipped" in run.training else None for run in runs])
    )
    rows.append(_row("quarantined samples", [len(run.quarantine) for run in runs]))
    rows.append(["newest version", *(next((each.uri for each in run.versions[::-1] if each.uri), "–") for run in runs)])
    rows.append(["code", *(tag("code", str(run.tags.get("mlflow.source.git.commit", "–"))[:12]) for run in runs)])
    rows.append(["data", *(tag("code", str(run.tags.get("data.digest", "–"))[:12]) for run in runs)])
    return table(["", *labels], rows, class_="results")


def _row(
    name: str, values: Sequence[float | None], *, lowest: bool | None = None, percent: bool = False
) -> list[Child]:
    """`lowest`: which value is best, and None where none is."""
    known = [value for value in values if value is not None]
    best = None if lowest is None or len(known) < 2 else min(known) if lowest else max(known)
    cells = [
        tag("span", number(value, percent=percent), class_="best" if best is not None and value == best else None)
        for value in values
    ]
    return [name, *cells]


def _wall_time(run: RunFiles) -> str:
    return "–" if run.began is None or run.last_sign is None else duration(run.last_sign - run.began)


def _curves(runs: Sequence[RunFiles], labels: Sequence[str]) -> Html:
    names = [name for run in runs for name in run.validation if name not in ("val_loss", "bad_samples")]
    scores = [name for name in names if not is_detail(name)]
    charts = []
    for name, title in {**_CURVES, **{name: name_of(name) for name in scores}}.items():
        lines, styles = [], []
        for style, (run, label) in enumerate(zip(runs, labels, strict=True)):
            curve = run.training.get(name) or run.validation.get(name)
            if curve is not None:
                lines.append(Line(curve.steps, curve.values, label, dots=name in run.validation))
                styles.append(style)
        if lines:
            percent = is_fraction(name) or name == "ettr"
            charts.append(
                chart(title, lines, styles=styles, percent=percent, x_range=(0, 0), from_zero=name in ("lr", "ettr"))
            )
    return tag("div", charts, class_="charts") if charts else absent("No readings yet.")


def _differences(runs: Sequence[RunFiles], labels: Sequence[str]) -> Html:
    flat = [dict(_flatten(run.config)) for run in runs]
    names = dict.fromkeys(name for config in flat for name in config)
    rows = []
    for name in names:
        values = [config.get(name, "not set") for config in flat]
        if name != "run.name" and any(value != values[0] for value in values):
            rows.append([tag("code", name), *(_written(value) for value in values)])
    return table(["setting", *labels], rows, class_="results") if rows else absent("None but the name.")


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
