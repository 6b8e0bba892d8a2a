"""Fills the templates beside this file, and formats numbers, times and pictures for them.

All that a template puts in is escaped unless it is `Markup`: numbers and code from here, drawings from plots.py.
"""

import base64
import io
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pipeline.value_text import format_duration

SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5568f", "#c98a00", "#3c9bd6", "#555b66", "#7a5cc9")
"""The colours of Okabe and Ito (2008), which people with any kind of colour blindness tell apart, without yellow, too
faint on white. The style sheet has them as --s0, --s1, …, lighter on dark pages."""


def render(template: str, **values: Any) -> str:
    """Returns a page made of one of the templates."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"slug": _slug, "moment": moment, "picture": _encode_picture}
    return environment.get_template(template).render(values)


def number(value: float | None, *, percent: bool = False, text: str = "") -> Markup:
    """Returns a number as an element that also holds all of its digits. `text`: how it is written."""
    if value is None or math.isnan(value):
        return Markup('<data value="">–</data>')
    default = f"{100 * value:.2f} %" if percent else short(value)
    return Markup('<data value="{}">{}</data>').format(repr(value), text or default)


def code(text: object) -> Markup:
    return Markup("<code>{}</code>").format(text)


def short(value: float) -> str:
    """Returns four significant digits, with thousands set apart: 0.01235, 1,234, 1.235e-06."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def moment(time_s: float | None) -> str:
    """Returns seconds since 1970 as a date, UTC."""
    try:
        return "–" if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "–"


class Share(NamedTuple):
    """A part of a bar, with its row in the table below."""

    name: str
    time: Markup
    percent: Markup
    fraction: float
    colour: str


def shares(seconds: Mapping[str, float], *, in_ms: bool = False) -> list[Share]:
    """Returns what time was spent on, in the order given; the last entry is what remains."""
    whole = sum(seconds.values())
    found = []
    for index, (name, value) in enumerate(seconds.items()):
        time = number(value, text=f"{1000 * value:,.2f} ms" if in_ms else format_duration(value))
        colour = "var(--rule)" if index == len(seconds) - 1 else f"var(--s{index % len(SERIES)})"
        fraction = value / whole
        found.append(Share(name, time, number(fraction, percent=True), fraction, colour))
    return found


def _slug(title: str) -> str:
    """Returns the id of a section."""
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def _encode_picture(image: Image.Image) -> str:
    """Returns the address of a picture that is inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
