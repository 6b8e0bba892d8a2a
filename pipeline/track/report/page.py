"""Gathers the page of one run for page.html.jinja, from its head to its provenance."""

from typing import Any, NamedTuple

import numpy as np
import yaml
from markupsafe import Markup

from pipeline.run_folder import as_mapping
from pipeline.track.metric_names import CHARTS, for_display, is_detail, is_fraction, label_of
from pipeline.track.report.examination import Examination, class_rows, confused_pairs, confusion_cells
from pipeline.track.report.plots import Chart, Line, draw_chart
from pipeline.track.report.render import Share, code, moment, number, render, shares, short
from pipeline.track.report.run_files import RunFiles, as_number
from pipeline.track.report.timeline import list_events
from pipeline.value_text import format_duration

STATUS = {
    "FINISHED": "finished",
    "RUNNING": "running",
    "FAILED": "failed",
    "KILLED": "stopped by a signal",
    "UNKNOWN": "unknown",
}
_ADVICE = {
    "RUNNING": "If it is no longer running, the same command resumes it.",
    "KILLED": "The same command resumes it.",
    "FAILED": "Its log says why; once that is fixed, the same command resumes it.",
}
_MOST_LISTED = 200
_MOST_CELLS = 20
"""Classes up to which the confusion matrix is shown."""


class Tile(NamedTuple):
    """A number at the head of the page."""

    name: str
    value: Markup
    note: str = ""


def page(run: RunFiles, examined: Examination | str) -> str:
    """Returns a run as HTML. `examined`: what its network does, or why that is not known."""
    return render(
        "page.html.jinja",
        title=run.name,
        run=run,
        made=run.read_at,
        status=STATUS.get(run.status, run.status),
        summary=_summarise(run),
        tiles=list_tiles(run),
        versions=_version_table(run),
        commands=_suggest_commands(run),
        charts=_draw_charts(run),
        wall_time=_wall_time(run),
        profile=_profile(run),
        events=list_events(run),
        quarantine=_quarantine_rows(run),
        most_listed=_MOST_LISTED,
        examined=examined,
        shown={} if isinstance(examined, str) else _describe(examined),
        facts=_list_facts(run),
        inputs=_input_rows(run),
        files={"config.yaml": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True), **run.texts},
    )


def list_tiles(run: RunFiles) -> list[Tile]:
    """Returns the run's results."""
    tiles = [Tile("steps", number(run.steps_done))]
    metric, percent = run.main_metric, is_fraction(run.main_metric)
    curve = run.validation.get(metric)
    best = curve.best(lowest=metric.endswith("loss")) if curve else None
    if best:
        tiles.append(Tile(f"best {label_of(metric)}", number(best[0], percent=percent), f"at step {best[1]:,.0f}"))
        tiles.append(Tile(f"last {label_of(metric)}", number(run.last(metric), percent=percent), "last evaluation"))
    for name, title, note in (
        ("balanced_accuracy", label_of("balanced_accuracy"), "mean recall of classes"),
        ("macro_f1", label_of("macro_f1"), "mean over classes"),
        ("majority", label_of("majority"), "top1 of always answering it"),
        ("loss", "training loss", "last reading"),
        ("grad_norm", "gradient norm", "last reading"),
        ("val_loss", "validation loss", "last evaluation"),
    ):
        if run.curve(name):
            tiles.append(Tile(title, number(run.last(name), percent=is_fraction(name)), note))
    rate, ettr = as_number(run.result.get("images_per_second")), as_number(run.result.get("ettr"))
    if "images_per_second" in run.training:
        is_known = bool(np.isfinite(rate))
        note = "while training" if is_known else "last reading"
        tiles.append(Tile("images a second", number(rate if is_known else run.last("images_per_second")), note))
    if "ettr" in run.training:
        ettr_now = ettr if np.isfinite(ettr) else run.last("ettr")
        tiles.append(Tile("effective time", number(ettr_now, percent=True), "of the wall time"))
    rollbacks = f"rollbacks: {len(run.rollbacks)}" if run.rollbacks else ""
    tiles.append(Tile("restarts", number(as_number(run.goodput.get("restarts")))))
    tiles.append(Tile("skipped steps", number(run.last("skipped")), rollbacks))
    tiles.append(Tile("quarantined", number(len(run.quarantine)), "samples"))
    return tiles


def _summarise(run: RunFiles) -> str:
    task = run.get("task", "name")
    parts = [str(run.get("model", "name") or "unknown model")]
    if task and task != "classification":
        parts.append(str(task))
    parts.append(f"from {moment(run.began)}")
    if run.began is not None and run.last_sign is not None:
        end = "its end" if run.record.get("ended_ms") else "its last sign of life"
        parts.append(f"{format_duration(run.last_sign - run.began)} until {end}")
        if run.status == "RUNNING":
            parts.append(f"{format_duration(max(0.0, run.read_at - run.last_sign))} before this page was made")
    return f"{', '.join(parts)}. {_ADVICE.get(run.status, '')}"


def _version_table(run: RunFiles) -> tuple[list[str], list[list[str | Markup]]]:
    largest: dict[str, float] = {}
    for version in run.versions:
        for name, score in version.metrics.items():
            largest[name] = max(score, largest.get(name, 0.0))
    shown = [name for name in for_display(largest) if not is_detail(name)]
    rows: list[list[str | Markup]] = []
    for version in reversed(run.versions):
        scores = [number(version.metrics.get(name), percent=is_fraction(name)) for name in shown]
        uri = version.uri or "waits to be registered"
        rows.append([uri, number(version.step), *scores, code(version.sha256[:12])])
    return ["version", "step", *map(label_of, shown), "SHA-256"], rows


def _suggest_commands(run: RunFiles) -> tuple[str, list[str]]:
    """Returns what can be done with the best version whose metrics are finite, or with those that wait."""
    sign = -1.0 if run.main_metric.endswith("loss") else 1.0
    scores = {}
    for version in run.versions:
        if version.uri and np.isfinite([*version.metrics.values()]).all():
            scores[version.uri] = sign * version.metrics.get(run.main_metric, -sign * np.inf)
    if not scores:
        about = "Once the tracking server can be reached, this registers what waits:"
        return about, [f"python launch/registry.py sync {run.folder}"]
    uri = max(scores, key=lambda each: scores[each])
    return "Score it again, fine-tune from it, see what was made from it:", [
        f"python launch/evaluate.py --model {uri} --data {run.get('data', 'val') or 'DIR'}",
        f"deepspeed launch/finetune.py --config FILE --set init.model={uri}",
        f"python launch/registry.py lineage {uri}",
    ]


def _draw_charts(run: RunFiles) -> list[Chart]:
    if not run.training and not run.validation:
        return []
    clip = as_number(run.get("optim", "clip_grad"))
    clip_note = f"Before clipping at {short(clip)}." if np.isfinite(clip) else ""
    charts = [_draw_chart(run, "Loss", {"loss": "training", "val_loss": "validation"})]
    for title, names in CHARTS.items():
        labels = {name: label_of(name) for name in names if name in run.validation}
        if labels:
            charts.append(_draw_chart(run, title, labels, percent=True))
    charts += [_draw_chart(run, name, {name: name}) for name in run.metrics if not is_fraction(name)]
    charts += [
        _draw_chart(run, "Learning rate", {"lr": ""}, from_zero=True),
        _draw_chart(run, "Gradient norm", {"grad_norm": ""}, from_zero=True, note=clip_note),
        _draw_chart(run, "Throughput", {"images_per_second": ""}, unit="images a second", from_zero=True),
        _draw_chart(
            run, "Step time", {"step_s": "step", "data_wait_s": "waiting for data"}, unit="seconds", from_zero=True
        ),
        _draw_chart(run, "Effective training time", {"ettr": ""}, percent=True, from_zero=True),
    ]
    if "slowest_speed" in run.training:
        note = "Its own work, beside the median rank's."
        charts.append(_draw_chart(run, "Slowest rank's speed", {"slowest_speed": ""}, percent=True, note=note))
    return charts


def _draw_chart(run: RunFiles, title: str, labels: dict[str, str], **options: Any) -> Chart:
    """Returns a chart of some of the run's curves. `labels`: what the legend calls them."""
    lines = []
    for name, label in labels.items():
        curve = run.curve(name)
        if curve is not None:
            lines.append(Line(curve.steps, curve.values, label, dots=name not in run.training))
    return draw_chart(title, lines, last_step=run.steps_done or 0, marks=run.rollbacks, **options)


def _wall_time(run: RunFiles) -> tuple[str, list[Share]] | None:
    """Returns the wall time since the first start, and what it was spent on."""
    known = _costs(run.goodput.get("seconds"))
    wall_s = as_number(run.goodput.get("last")) - as_number(run.goodput.get("began"))
    if not known or not wall_s > 0:
        return None
    spent_s = sum(known.values())
    longest_first = sorted(known.items(), key=lambda item: -item[1])
    seconds = {name.replace("_", " "): value for name, value in longest_first}
    return format_duration(max(wall_s, spent_s)), shares({**seconds, "other": max(0.0, wall_s - spent_s)})


def _profile(run: RunFiles) -> tuple[str, list[tuple[str, list[Share]]]] | None:
    """Returns what a profiled run says of its steps, with their phases and kinds of work."""
    profile = run.profile
    where = "kernels on the device" if profile.get("on_device") is True else "operators on the thread that trains"
    bars = []
    for title, key in (("By phase, on the host's clock", "phases"), (f"By kind of work, {where}", "kinds")):
        seconds = {name: ms / 1000 for name, ms in _costs(profile.get(key)).items()}
        if seconds:
            bars.append((title, shares(seconds, in_ms=True)))
    first, last = profile.get("first_step"), profile.get("last_step")
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    about = f"{profile.get('headline')}. Mean over {steps} of rank 0; being profiled makes a step slower."
    return (about, bars) if bars else None


def _costs(tree: object) -> dict[str, float]:
    """Returns the numbers above 0 of a mapping."""
    return {name: as_number(value) for name, value in as_mapping(tree).items() if as_number(value) > 0}


def _quarantine_rows(run: RunFiles) -> list[list[str]]:
    paths = {str(each.get("digest")): str(each.get("path")) for each in run.inputs}
    rows = []
    for line in run.quarantine[:_MOST_LISTED]:
        digest = str(line.get("data"))
        rows.append([*(str(line.get(key)) for key in ("key", "tar", "reason")), paths.get(digest, digest[:12])])
    return rows


def _describe(examined: Examination) -> dict[str, Any]:
    """Returns what examination.html.jinja shows beside the examination itself."""
    part = f"all {examined.num_samples:,} samples"
    if not examined.is_whole:
        part = f"{examined.num_examined:,} of {examined.num_samples:,} samples, spread over the set"
    elif examined.num_examined < examined.num_samples:
        part += f" but {examined.num_samples - examined.num_examined:,} damaged"
    facts: list[tuple[str, str | Markup]] = [("weights", examined.source), ("samples", number(examined.num_examined))]
    if examined.counted == "pixels":
        facts.append(("labelled pixels", number(int(examined.confusion.sum()))))
    for name, value in examined.scores.items():
        facts.append((label_of(name), number(value, percent=is_fraction(name))))
    has_table = 0 < len(examined.confusion) <= _MOST_CELLS
    return {
        "about": f"Computed for this page: {examined.source} on {part} of {examined.data}.",
        "facts": facts,
        "cells": confusion_cells(examined) if has_table else [],
        "has_long_names": any(len(name) > 4 for name in examined.classes),
        "pairs": confused_pairs(examined),
        "classes": class_rows(examined),
    }


def _list_facts(run: RunFiles) -> list[tuple[str, str | Markup]]:
    names = {"mlflow.source.git.commit": "code", "parent.version": "starts from"}
    facts: list[tuple[str, str | Markup]] = [("run", code(run.record.get("uuid", "not recorded")))]
    facts += [(names.get(name, name), str(value)) for name, value in run.tags.items()]
    if run.children:
        facts.append(("handed off to", ", ".join(str(child.get("name")) for child in run.children)))
    return facts


def _input_rows(run: RunFiles) -> list[list[str | Markup]]:
    rows: list[list[str | Markup]] = []
    for each in run.inputs:
        counts = [number(as_number(each.get(key))) for key in ("samples", "classes")]
        rows.append([str(each.get("context")), str(each.get("path")), *counts, code(each.get("digest"))])
    return rows
