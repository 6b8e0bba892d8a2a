"""Charts of lines over steps or hours: curves in SVG, which is stretched to the space there is, all text around them in
HTML, which keeps its size.

    Curve ──thin: at most 600 places, each with its least, mean and greatest──▶ paths ─┐
    axes ──nice: round numbers──▶ labels at per cents of the width ────────────────────┴──▶ figure
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.track.report.html import Html, absent, count, join, short, tag
from pipeline.track.report.run_files import Array

WIDTH, HEIGHT = 1000, 300  # of the drawing's own units, which the page stretches
MOST_PLACES, MOST_DOTS = 600, 60
_STYLES = 8  # colours that the style sheet has; the ones after them are dashed


class Line(NamedTuple):
    x: Array
    y: Array
    label: str
    dots: bool = False
    """Few values that stand for themselves, such as evaluations."""


class Mark(NamedTuple):
    """Something that happened at a place along the axis."""

    x: float
    label: str
    kind: str


class Axis(NamedTuple):
    low: float
    high: float
    ticks: list[float]

    def share(self, value: float | Array) -> float | Array:
        """0 at its beginning, 1 at its end."""
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    unit: str = "",
    percent: bool = False,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    x_range: tuple[float, float] | None = None,
    about: Html | str | None = None,
    styles: Sequence[int] | None = None,
    legend: bool = True,
) -> Html:
    """A figure. Values that are nan leave gaps; single outliers are cut off, which the caption says.

    `percent`: the values are fractions. `x_range`: what the axis covers at least. `styles`: each line's colour.
    """
    kept = [(number, line) for number, line in enumerate(lines) if np.isfinite(line.y).any()]
    caption = tag("figcaption", tag("strong", title), f" {unit}" if unit else None)
    if not kept:
        return tag("figure", caption, absent("No values yet."), class_="chart")
    x = _x_axis([line for _, line in kept], x_range)
    y, cut = _y_axis([line for _, line in kept], from_zero)
    colours = styles or range(len(lines))
    paths = [_paths(line, x, y, colours[number]) for number, line in kept]
    seen = [mark for mark in marks if x.low <= mark.x <= x.high]
    show = (lambda value: f"{100 * value:.4g} %") if percent else short
    labels_y = [tag("span", show(tick), style=f"bottom:{100 * _float(y.share(tick)):.2f}%") for tick in y.ticks]
    grid = [_rule(y.share(tick)) for tick in y.ticks]
    drawing = tag(
        "svg",
        *(grid + paths + [_stroke(mark, x) for mark in seen]),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title} over {x_label}",
    )
    told = kept if legend and len(lines) > 1 else []
    labels = [tag("li", _swatch(colours[number]), line.label) for number, line in told]
    notes = [about, f"Beyond the axis: up to {show(cut)}." if cut is not None else None, _gaps(kept)]
    return tag(
        "figure",
        caption,
        tag("ul", labels, class_="legend") if labels else None,
        tag("div", tag("div", labels_y, class_="ys"), tag("div", drawing, class_="area"), class_="plot"),
        x_labels(x, x_label),
        tag("p", [join(note, " ") for note in notes if note], class_="note"),
        class_="chart",
    )


def x_labels(x: Axis, label: str) -> Html:
    """The row below a drawing: numbers, and what they count."""
    spans = [tag("span", short(tick), style=f"left:{100 * _float(x.share(tick)):.2f}%") for tick in x.ticks]
    return join(tag("div", spans, class_="xs"), tag("div", label, class_="xlabel"))


def time_unit(span_s: float) -> tuple[str, int]:
    """Its name and its length in seconds, for an axis of that length."""
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    return next(pair for pair in units if span_s >= 2 * pair[1] or pair[1] == 1)


def nice(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def thin(x: Array, y: Array, places: int = MOST_PLACES) -> tuple[Array, Array, Array, Array]:
    """x, and the least, mean and greatest y, of `places` equal stretches of the lines; nan where all values are."""
    if len(y) <= 2 * places:
        return x, y, y, y
    edges = np.linspace(0, len(y), places + 1).astype(int)[:-1]
    known = np.isfinite(y)
    counts = np.add.reduceat(known.astype(float), edges)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.add.reduceat(np.where(known, y, 0.0), edges) / counts
    empty = counts == 0
    least = np.where(empty, np.nan, np.minimum.reduceat(np.where(known, y, np.inf), edges))
    greatest = np.where(empty, np.nan, np.maximum.reduceat(np.where(known, y, -np.inf), edges))
    return np.add.reduceat(x, edges) / np.diff([*edges, len(x)]), least, mean, greatest


def _x_axis(lines: Sequence[Line], wanted: tuple[float, float] | None) -> Axis:
    found = np.concatenate([line.x[np.isfinite(line.x)] for line in lines])
    low, high = float(found.min(initial=np.inf)), float(found.max(initial=-np.inf))
    if wanted:
        low, high = min(low, wanted[0]), max(high, wanted[1])
    if not high > low:
        low, high = low - 0.5, low + 0.5
    return Axis(low, high, nice(low, high, 4))


def _y_axis(lines: Sequence[Line], from_zero: bool) -> tuple[Axis, float | None]:
    """And the greatest value, where it is so far out that the axis ends below it."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    low, high, cut = float(values.min()), float(values.max()), None
    usual, often = (float(each) for each in np.percentile(values, (5, 95)))
    # A loss that diverged for a few steps would flatten all others; the first ones of a run rarely reach so far.
    if len(values) >= 20 and high > often + 4 * (often - usual) > usual:
        high, cut = often + (often - usual), high
    if from_zero:
        low = min(0.0, low)
    if not high > low:
        pad = abs(high) * 0.05 or 0.5
        low, high = low - pad, high + pad
    margin = 0.04 * (high - low)
    low = low if from_zero and low == 0 else low - margin
    return Axis(low, high + margin, nice(low, high + margin, 4)), cut


def _paths(line: Line, x: Axis, y: Axis, style: int) -> Html:
    class_ = f"s{style % _STYLES}{' dashed' if style >= _STYLES else ''}"
    if (line.dots and len(line.y) <= MOST_DOTS) or np.isfinite(line.y).sum() < 2:
        return join(_line(line.x, line.y, x, y, f"line thin {class_}"), _dots(line, x, y, class_))
    at, least, mean, greatest = thin(line.x, line.y)
    band = None if least is greatest else tag("path", d=_outline(at, least, greatest, x, y), class_=f"band {class_}")
    return join(band, _line(at, mean, x, y, f"line {class_}"))


def _line(at: Array, values: Array, x: Axis, y: Axis, class_: str) -> Html:
    points, pen = [], "M"
    for left, top in _places(at, values, x, y):
        if math.isfinite(left) and math.isfinite(top):
            points.append(f"{pen}{left:.6g} {top:.6g}")
            pen = "L"
        else:
            pen = "M"
    return tag("path", d="".join(points), class_=class_)


def _dots(line: Line, x: Axis, y: Axis, class_: str) -> list[Html]:
    """Lines of no length with round ends, which stay round however the drawing is stretched."""
    pairs = zip(_places(line.x, line.y, x, y), line.x.tolist(), line.y.tolist(), strict=True)
    return [
        tag(
            "path",
            tag("title", f"{line.label} {short(value)} at {short(at)}"),
            d=f"M{left:.6g} {top:.6g}h.01",
            class_=f"dot {class_}",
        )
        for (left, top), at, value in pairs
        if math.isfinite(left) and math.isfinite(top)
    ]


def _outline(at: Array, least: Array, greatest: Array, x: Axis, y: Axis) -> str:
    """A closed outline for each stretch without gaps."""
    pieces: list[str] = []
    known = np.isfinite(least) & np.isfinite(greatest)
    for run in np.split(np.arange(len(at)), np.flatnonzero(np.diff(known)) + 1):
        if len(run) > 1 and known[run[0]]:
            around = [*_places(at[run], greatest[run], x, y), *_places(at[run], least[run], x, y)[::-1]]
            pieces.append("M" + "L".join(f"{left:.6g} {top:.6g}" for left, top in around) + "Z")
    return "".join(pieces)


def _places(at: Array, values: Array, x: Axis, y: Axis) -> list[tuple[float, float]]:
    """In the drawing's units, to a tenth; far beyond its edges they are cut, as some renderers overflow."""
    left = np.round(WIDTH * np.asarray(x.share(at)), 1)
    top = np.round(HEIGHT * (1 - np.asarray(y.share(values))), 1).clip(-2 * HEIGHT, 3 * HEIGHT)
    return list(zip(left.tolist(), top.tolist(), strict=True))


def _rule(share: float | Array) -> Html:
    return tag("path", d=f"M0 {HEIGHT * (1 - _float(share)):.5g}H{WIDTH}", class_="grid")


def _stroke(mark: Mark, x: Axis) -> Html:
    left = WIDTH * _float(x.share(mark.x))
    return tag("path", tag("title", mark.label), d=f"M{left:.5g} 0V{HEIGHT}", class_=f"mark {mark.kind}")


def _swatch(style: int) -> Html:
    return tag("i", class_=f"swatch s{style % _STYLES}{' dashed' if style >= _STYLES else ''}")


def _gaps(lines: Sequence[tuple[int, Line]]) -> str | None:
    missing = sum(int((~np.isfinite(line.y)).sum()) for _, line in lines if not line.dots)
    return f"{count(missing, 'reading')} not finite or not there." if missing else None


def _float(value: float | Array) -> float:
    return float(value)
