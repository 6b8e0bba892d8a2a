"""Draws curves over steps as SVG. Title and legend are left to the page, where they are escaped and wrap.

Line ──at most 300 points, with the range of what each stands for──▶ matplotlib ──SVG──▶ Chart
                                          colours become variables of the page's style sheet
"""

import io
import re
import threading
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.track.report.render import SERIES, short
from pipeline.track.report.run_files import Array

MOST_POINTS = 300
_MOST = 1e30
"""Values beyond it are not drawn."""
_MOST_DOTS = 60
_SIZE_PX = (400, 200)
_PLOT_AREA = (0.135, 0.125, 0.83, 0.85)
"""Left, bottom, width and height, as fractions of the figure."""
_TICKS = (1, 2, 2.5, 5, 10)
_FAINT, _RULE, _BAD = "#626975", "#e0e3e8", "#b34700"
_VARIABLES = {_FAINT: "var(--faint)", _RULE: "var(--rule)", _BAD: "var(--bad)"}
_VARIABLES |= {colour: f"var(--s{number})" for number, colour in enumerate(SERIES)}

# matplotlib's settings belong to the process, and several threads may draw reports.
_LOCK = threading.Lock()


class Line(NamedTuple):
    steps: Array
    values: Array
    label: str
    dots: bool
    """Whether these are few values that stand for themselves, such as evaluations."""


class Chart(NamedTuple):
    title: str
    unit: str
    svg: Markup | None
    """None without a value."""
    legend: list[str]
    """The lines' labels; empty for a single line."""
    notes: list[str]


def draw_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    percent: bool = False,
    from_zero: bool = False,
    last_step: float = 0,
    marks: Sequence[float] = (),
    note: str = "",
) -> Chart:
    """Returns a chart; lines take their colours in the order given. Single outliers are cut off, which a note says.

    `percent`: the values are fractions. `last_step`: the axis reaches to it at least. `marks`: steps of rollbacks.
    """
    # The range of an axis must be a finite number, too.
    lines = [line._replace(values=np.where(np.abs(line.values) < _MOST, line.values, np.nan)) for line in lines]
    values = np.concatenate([np.empty(0), *(line.values for line in lines)])
    known = values[np.isfinite(values)]
    notes = [note] if note else []
    if not len(known):
        return Chart(title, unit, None, [], notes)
    if len(known) < len(values):
        notes.append(f"Readings not finite or missing: {len(values) - len(known):,}.")

    def write(value: float, _: object = None) -> str:
        return f"{100 * value:.4g} %" if percent else short(value)

    low, high = _find_range(known, from_zero)
    if high < known.max():
        notes.append(f"Beyond the axis: up to {write(float(known.max()))}.")
    figure = Figure((_SIZE_PX[0] / 72, _SIZE_PX[1] / 72), dpi=72)
    axes = figure.add_axes(_PLOT_AREA)
    _style(figure, axes)
    axes.yaxis.set_major_formatter(FuncFormatter(write))
    for number, line in enumerate(lines):
        _draw_line(axes, line, number)
    for step in marks:
        axes.axvline(step, color=_BAD, linewidth=1.2, linestyle=(0, (3, 3)))
    axes.set_xlim(0, max(last_step, *(line.steps.max(initial=1) for line in lines)))
    axes.set_ylim(low, high)
    legend = [line.label for line in lines] if len(lines) > 1 else []
    return Chart(title, unit, _to_svg(figure, title), legend, notes)


def thin(line: Line) -> tuple[Array, Array, Array, Array]:
    """Returns steps with the mean, least and greatest finite value of `MOST_POINTS` equal stretches of a line."""
    known = np.isfinite(line.values)
    steps, values = line.steps[known], line.values[known]
    edges = np.linspace(0, len(values), MOST_POINTS + 1).astype(int)
    first, sizes = edges[:-1], np.diff(edges)
    lows, highs = np.minimum.reduceat(values, first), np.maximum.reduceat(values, first)
    return np.add.reduceat(steps, first) / sizes, np.add.reduceat(values, first) / sizes, lows, highs


def _find_range(values: Array, from_zero: bool) -> tuple[float, float]:
    """Returns the ends of the y axis."""
    low, high = float(values.min()), float(values.max())
    usual, often = np.percentile(values, (5, 95)).tolist()
    # A loss that diverged for a few steps would flatten all others; the first ones of a run rarely reach so far.
    if len(values) >= 20 and high > often + 4 * (often - usual) > usual:
        high = 2 * often - usual
    if from_zero:
        low = min(0.0, low)
    if not high > low:
        half = abs(high) * 0.05 or 0.5
        low, high = low - half, high + half
    margin = 0.04 * (high - low)
    if not (from_zero and low == 0):
        low -= margin
    return low, high + margin


def _style(figure: Figure, axes: Axes) -> None:
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.tick_params(length=0, pad=5, labelsize=11.5, labelcolor=_FAINT)
    axes.grid(axis="y", color=_RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=_TICKS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short(step)))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=_TICKS))


def _draw_line(axes: Axes, line: Line, number: int) -> None:
    colour = SERIES[number % len(SERIES)]
    style = "solid" if number < len(SERIES) else "dashed"
    num_known = int(np.isfinite(line.values).sum())
    if num_known < 2 or (line.dots and len(line.values) <= _MOST_DOTS):
        axes.plot(
            line.steps,
            line.values,
            color=colour,
            linewidth=1,
            linestyle=style,
            marker="o",
            markersize=4.5,
            clip_on=False,
        )
    elif num_known <= 2 * MOST_POINTS:
        axes.plot(line.steps, line.values, color=colour, linewidth=1.5, linestyle=style)
    else:
        steps, means, lows, highs = thin(line)
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.25, linewidth=0)
        axes.plot(steps, means, color=colour, linewidth=1.5, linestyle=style)


def _to_svg(figure: Figure, salt: str) -> Markup:
    """Returns the figure as an element that goes into a page with others. `salt` sets its ids apart from theirs."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _LOCK, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its style sheet would hold for the whole page. Ids that end in a number are the same in every figure and unused.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    return Markup(re.sub("#[0-9a-f]{6}", lambda colour: _VARIABLES.get(colour[0], colour[0]), svg))
