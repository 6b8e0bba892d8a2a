"""Durations and lists of names as people read them, in tables, messages and pages."""

import math
from collections.abc import Sequence

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def format_duration(seconds: float) -> str:
    """Returns a time in two units at most: 3 d 4 h, 5 min 6 s, 7.8 s, 40 ms; 0.0 s for one that is below zero."""
    if not math.isfinite(seconds):
        return "–"
    if 0 < seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    rest = round(seconds)
    parts: list[str] = []
    for unit, length in _UNITS:
        amount, rest = divmod(rest, length)
        if amount or parts:
            parts.append(f"{amount} {unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0 "))


def list_first(names: Sequence[str], most: int = 5) -> str:
    """Returns the first of some names, quoted, and " …" where there are more."""
    listed = ", ".join(map(repr, names[:most]))
    return f"{listed} …" if len(names) > most else listed
