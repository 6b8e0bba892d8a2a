"""HTML elements out of values, and numbers as people read them.

What is put into an element is escaped unless it is Html already, so a name cannot become markup.
"""

import base64
import html
import io
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TypeAlias

from PIL import Image

Child: TypeAlias = "Html | str | int | Iterable[Child] | None"
_VOID = ("br", "img", "meta")
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


class Html(str):
    """Markup, to be put into a page as it is."""

    __slots__ = ()


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. Attributes are named as in HTML but for `class_`; None and False leave one out."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is True:
            parts.append(f" {key}")
        elif value is not None and value is not False:
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"')
    parts.append(">")
    if name not in _VOID:
        parts += [_text(children), f"</{name}>"]
    return Html("".join(parts))


def join(*children: Child) -> Html:
    """Children without an element around them."""
    return Html(_text(children))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int):
        return html.escape(str(child), quote=False)
    return "".join(map(_text, child))


def section(title: str, *children: Child, about: Child = None) -> Html:
    """Part of a page; its id is made of the title."""
    heading = tag("h2", title)
    return tag("section", heading, tag("p", about, class_="about") if about else None, *children, id=slug(title))


def slug(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def absent(*why: Child) -> Html:
    """What stands in the place of something that cannot be shown."""
    return tag("p", *why, class_="absent")


def table(header: Iterable[Child], rows: Iterable[Iterable[Child]], *, class_: str | None = None) -> Html:
    """Rows of cells; one that begins with a digit or is a number element is set to the right by the style sheet."""
    head = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in header]))
    body = tag("tbody", [tag("tr", [tag("td", cell) for cell in row]) for row in rows])
    return tag("div", tag("table", head, body, class_=class_), class_="table")


def facts(rows: Iterable[tuple[Child, Child]]) -> Html:
    """Names and their values; those whose value is None are left out."""
    kept = [(name, value) for name, value in rows if value is not None]
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in kept])


def number(value: float | None, unit: str = "", *, percent: bool = False) -> Html:
    """A number with its unit, as an element that holds all of its digits, too."""
    if value is None or math.isnan(value):
        return tag("data", "–", value="")
    if percent:
        return tag("data", f"{100 * value:.2f} %", value=repr(value))
    return tag("data", short(value), f" {unit}" if unit else None, value=repr(value))


def short(value: float) -> str:
    """Four significant digits, and thousands set apart: 0.01235, 1,234, 1.235e-06."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:.4g}"


def count(number: float, what: str) -> str:
    """1 rollback, 1,234 rollbacks."""
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """In two units at most: 3 d 4 h, 5 min 6 s, 7.8 s."""
    if not math.isfinite(seconds):
        return "–"
    if 0 < seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{round(seconds)} s"
    left, parts = round(seconds), []
    for unit, length in (*_UNITS, ("s", 1)):
        count, left = divmod(left, length)
        if count or parts:
            parts.append(f"{count} {unit}")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if not part.startswith("0 "))


def moment(time_s: float | None) -> str:
    """Seconds since 1970 as a date, UTC."""
    if time_s is None:
        return "–"
    try:
        return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "–"


def size(num_bytes: float) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= length:
            return f"{num_bytes / length:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def picture(image: Image.Image, alt: str, class_: str) -> Html:
    """A picture inside of the page, as a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return tag("img", src=f"data:image/png;base64,{data}", alt=alt, class_=class_)
