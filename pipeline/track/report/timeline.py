"""What happened in a run and when: a lane for each kind of event over wall time, and all of them as a list."""

from typing import NamedTuple

import numpy as np

from pipeline.track.metric_names import name_of
from pipeline.track.report.charts import HEIGHT, WIDTH, Axis, Mark, nice, time_unit, x_labels
from pipeline.track.report.html import Html, absent, duration, join, moment, short, table, tag
from pipeline.track.report.run_files import RunFiles, as_number

MOST_MARKS = 400
"""In one lane; of more, every so-and-so-many-th is drawn."""
MOST_LISTED = 200

_LEFT_OUT = ("non-finite loss", "loss spike", "non-finite gradients")


class Event(NamedTuple):
    kind: str
    step: int | None
    time: float | None  # seconds since 1970
    label: str
    is_known: bool = True
    """Whether the time was noted, rather than read off the readings around."""


LANES = {
    "start": "starts",
    "end": "end",
    "skip": "steps left out",
    "spike": "gradient spikes, collapse",
    "rollback": "rollbacks",
    "quarantine": "quarantined",
    "evaluation": "evaluations",
    "checkpoint": "checkpoints kept",
    "version": "versions",
}


def events(run: RunFiles) -> list[Event]:
    """All of a run's, by time; those whose time is not known at the end."""
    found = [*_life(run), *_trouble(run), *_results(run)]
    return sorted(found, key=lambda event: (event.time is None, event.time or 0.0))


def _life(run: RunFiles) -> list[Event]:
    told = isinstance(run.goodput.get("starts"), list)
    starts = [
        Event("start", None, start, f"restart {number}" if number else "first start", told or number == 0)
        for number, start in enumerate(run.starts)
    ]
    end = as_number(run.record.get("ended_ms")) / 1000
    if np.isfinite(end):
        return [*starts, Event("end", run.steps_done, end, f"ended as {run.status}")]
    if run.status == "SILENT":
        return [*starts, Event("end", run.steps_done, run.last_sign, "last sign of life")]
    return starts


def _trouble(run: RunFiles) -> list[Event]:
    found = []
    for line in run.anomalies:
        step, kind = as_number(line["step"]), str(line.get("kind"))
        if not np.isfinite(step):
            continue
        samples = line["samples"]
        of = f" ({samples:,} samples)" if samples else ""
        lane = "skip" if kind in _LEFT_OUT else "spike"
        label = f"{kind}: {line.get('message')}{of}"
        found.append(Event(lane, int(step), run.time_of(step), label, False))
    found += [
        Event("rollback", step, run.time_of(step), "back to weights from before the trouble", False)
        for step in run.rollbacks
    ]
    for line in run.quarantine:
        time = as_number(line.get("time"))
        label = f"{line.get('tar')}: {line.get('key')}: {line.get('reason')}"
        found.append(Event("quarantine", None, time if np.isfinite(time) else None, label))
    return found


def _results(run: RunFiles) -> list[Event]:
    found = []
    if curve := run.validation.get(run.main_metric):
        for step, time, value in zip(curve.steps, curve.times, curve.values, strict=True):
            at = float(time) if np.isfinite(time) else None
            found.append(Event("evaluation", int(step), at, f"{name_of(run.main_metric)} {short(float(value))}"))
    for step, folder in run.checkpoints.items():
        try:
            time = (folder / "COMMIT.json").stat().st_mtime
        except OSError:  # removed this instant
            continue
        # A copied folder has other times of files.
        is_plausible = (run.began or 0) <= time <= (run.last_sign or 0) + 60
        found.append(Event("checkpoint", step, time if is_plausible else run.time_of(step), folder.name, is_plausible))
    for version in run.versions:
        label = version.uri or "waits to be registered"
        found.append(Event("version", version.step, run.time_of(version.step), label, False))
    return found


def marks(run: RunFiles) -> list[Mark]:
    """For charts over steps: what may explain a bend."""
    found = [Mark(step, f"rollback at step {step}", "rollback") for step in run.rollbacks]
    for start in run.starts[1:]:
        curve = run.training.get("loss")
        if curve is not None and (after := np.flatnonzero(curve.times >= start)).size:
            step = float(curve.steps[after[0]])
            found.append(Mark(step, f"restart before step {short(step)}", "start"))
    return found


def timeline(run: RunFiles, found: list[Event]) -> Html:
    """Steps done, and a lane for each kind of event, over hours or shorter units since the first start."""
    began = run.began
    last = max((event.time for event in found if event.time is not None), default=None)
    last = max((each for each in (last, run.last_sign) if each is not None), default=None)
    if began is None or last is None:
        return absent("Nothing that says when it happened is in the run's folder yet.")
    span = max(last - began, 1.0)
    unit, length = time_unit(span)
    x = Axis(0.0, span / length, nice(0.0, span / length, 6))
    lanes = []
    for kind, title in LANES.items():
        here = [event for event in found if event.kind == kind and event.time is not None]
        if here:
            lanes += [tag("div", f"{title} ({len(here):,})", class_="lane-name"), _lane(here, began, span, kind)]
    return tag(
        "div",
        tag("div", "steps done", class_="lane-name"),
        _progress(run, began, span),
        *lanes,
        tag("div", class_="lane-name"),
        tag("div", x_labels(x, f"{unit} since {moment(began)}"), class_="axis"),
        class_="timeline",
    )


def listed(run: RunFiles, found: list[Event]) -> Html:
    rows = [
        (_when(event), "" if event.step is None else f"{event.step:,}", LANES[event.kind], event.label)
        for event in found[:MOST_LISTED]
    ]
    left = len(found) - MOST_LISTED
    more = (
        tag("p", f"The first {MOST_LISTED}; {left:,} more are in the run's folder.", class_="note")
        if left > 0
        else None
    )
    return tag(
        "details",
        tag("summary", f"All {len(found):,} events" if found else "No events"),
        more,
        table(("when", "step", "kind", "what"), rows, class_="events"),
    )


def _when(event: Event) -> str:
    if event.time is None:
        return "not noted"
    return moment(event.time) if event.is_known else f"about {moment(event.time)}"


def _lane(here: list[Event], began: float, span: float, kind: str) -> Html:
    spans = []
    for event in here[:: -(-len(here) // MOST_MARKS)]:
        assert event.time is not None
        after_s = event.time - began
        step = "" if event.step is None else f", step {event.step:,}"
        share = min(1.0, max(0.0, after_s / span))
        label = f"{duration(after_s)}{step}: {event.label}"[:300]
        spans.append(tag("span", title=label, style=f"left:{100 * share:.2f}%"))
    return tag("div", spans, class_=f"lane {kind}")


def _progress(run: RunFiles, began: float, span: float) -> Html:
    curve = run.training.get("loss")
    done = run.steps_done or 0
    points = []
    if curve is not None:
        chosen = np.unique(np.linspace(0, len(curve.steps) - 1, 1000).astype(int)) if len(curve.steps) else []
        for place in chosen:
            left, top = (curve.times[place] - began) / span, 1 - curve.steps[place] / max(done, 1)
            if np.isfinite(left):
                points.append(f"{WIDTH * min(1, max(0, left)):.5g} {HEIGHT * min(1, max(0, top)):.5g}")
    path = tag("path", d="M" + "L".join(points), class_="line s0") if points else None
    drawing = tag(
        "svg",
        path,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label="steps done over time",
    )
    return tag("div", drawing, join(tag("span", f"{done:,}", class_="top")), class_="progress")
