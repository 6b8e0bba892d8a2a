"""Lists what happened in a run, step by step."""

import math
from typing import NamedTuple

from pipeline.track.metric_names import is_fraction, label_of
from pipeline.track.report.render import short
from pipeline.track.report.run_files import RunFiles, as_number

_SKIPPED = ("non-finite loss", "loss spike", "non-finite gradients")
"""Anomalies whose step is skipped."""


class Event(NamedTuple):
    step: int
    kind: str
    text: str
    time: float | None = None
    """Seconds since 1970, where it was recorded."""


def list_events(run: RunFiles) -> list[Event]:
    """Returns a run's events by step, and those of a step in the order in which they happen."""
    events = [] if run.began is None else [Event(0, "start", "first start", run.began)]
    for line in run.anomalies:
        step, kind = as_number(line.get("step")), str(line.get("kind"))
        if math.isfinite(step):
            title = "skipped step" if kind in _SKIPPED else "anomaly"
            samples = f" ({line['samples']:,} samples)" if line["samples"] else ""
            events.append(Event(int(step), title, f"{kind}: {line.get('message')}{samples}"))
    events += [Event(step, "rollback", "back to weights from before the trouble") for step in run.rollbacks]
    curve = run.validation.get(run.main_metric)
    if curve is not None:
        percent = is_fraction(run.main_metric)
        for step, time, value in zip(curve.steps.tolist(), curve.times.tolist(), curve.values.tolist(), strict=True):
            text = f"{100 * value:.2f} %" if percent and math.isfinite(value) else short(value)
            text = f"{label_of(run.main_metric)} {text}"
            events.append(Event(int(step), "evaluation", text, time if math.isfinite(time) else None))
    events += [Event(step, "checkpoint", f"{folder.name} is kept") for step, folder in run.checkpoints.items()]
    end = as_number(run.record.get("ended_ms")) / 1000
    if math.isfinite(end):
        events.append(Event(run.steps_done or 0, "end", f"ended as {run.status}", end))
    return sorted(events, key=lambda event: event.step)
