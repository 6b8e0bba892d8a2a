"""How well a detector finds objects: COCO's average precision, over all and of each class."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.track.report.html import Html, absent, join, number, table, tag

MOST_LISTED = 20

_COLUMNS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar1": "AR of 1",
    "ar10": "AR of 10",
    "ar100": "AR of 100",
}


class ClassPrecision(NamedTuple):
    name: str
    objects: int
    """To be found."""
    box: float
    """Average precision over all thresholds; nan without objects."""
    mask: float | None
    """The same of masks; None of networks without."""


def summary(scores: Mapping[str, float]) -> Html:
    """COCO's twelve numbers but for recall by size, of boxes and of masks."""
    rows = []
    for kind in ("box", "mask"):
        values = [scores.get(f"{kind}_{name}") for name in _COLUMNS]
        if any(value is not None for value in values):
            rows.append((kind, *(number(value, percent=True) for value in values)))
    return table(("", *_COLUMNS.values()), rows, class_="precision")


def class_table(precisions: Sequence[ClassPrecision]) -> Html:
    """The classes that have objects, worst first."""
    seen = [each for each in precisions if not math.isnan(each.box)]
    order = sorted(seen, key=lambda each: each.box)
    missing = len(precisions) - len(seen)
    note = tag("p", f"Classes without objects: {missing:,}.", class_="note") if missing else None
    if not order:
        return absent("No object was there to be found.")
    if len(order) <= MOST_LISTED:
        return join(tag("h3", "Classes, worst first"), _classes(order), note)
    return join(
        tag(
            "div",
            tag("div", tag("h3", f"Worst {MOST_LISTED} classes"), _classes(order[:MOST_LISTED])),
            tag("div", tag("h3", f"Best {MOST_LISTED} classes"), _classes(order[::-1][:MOST_LISTED])),
            class_="two",
        ),
        tag("details", tag("summary", f"All {len(seen)} classes"), _classes(seen)),
        note,
    )


def _classes(precisions: Sequence[ClassPrecision]) -> Html:
    with_masks = any(each.mask is not None for each in precisions)
    rows = []
    for each in precisions:
        row = [each.name, number(each.objects), number(each.box, percent=True)]
        rows.append([*row, number(each.mask, percent=True)] if with_masks else row)
    header = ["class", "objects", "box AP"]
    return table([*header, "mask AP"] if with_masks else header, rows, class_="classes")
