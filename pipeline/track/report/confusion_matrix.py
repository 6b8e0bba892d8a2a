"""What a network takes for what: the confusion matrix, its worst and best classes.

A classifier takes samples for something, a segmentation network pixels: `Examination.counted` says which are counted.
A detector finds objects, or not: precision.py has its tables.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.track.report.average_precision import ClassPrecision
from pipeline.track.report.html import Html, absent, join, number, picture, table, tag
from pipeline.track.report.network_view import Pictures

MOST_COUNTED = 20
"""Classes up to which the matrix shows its counts; above, it is a picture."""
MOST_CELLS = 250
"""Rows of that picture; of more classes, neighbours are added up."""
MOST_LISTED = 20

_BLUE = (0, 114, 178)

Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Examination:
    """What a network does with validation data."""

    source: str
    """Which weights."""
    step: int
    data: str
    total: int
    """Samples of the data set."""
    looked_at: int
    is_whole: bool
    """Whether all of them were looked at, but for damaged ones."""
    classes: list[str]
    counted: Literal["samples", "pixels", "objects"]
    """What it says the class of."""
    confusion: Counts
    """[K, K]: rows are the true classes, columns what they were taken for. Of objects nothing."""
    scores: dict[str, float]
    pictures: Pictures
    attribution: str | None
    """What has to be said of the pictures."""
    precisions: Sequence[ClassPrecision] = ()
    """How well objects of each class are found."""


def confusion(found: Examination) -> Html:
    count = len(found.classes)
    if count <= MOST_COUNTED:
        return _counts(found.confusion, found.classes, found.counted)
    cells = -(-count // -(-count // MOST_CELLS))
    every = -(-count // cells)
    about = f"Each cell adds up {every} × {every} neighbouring classes." if every > 1 else ""
    return tag(
        "figure",
        picture(_matrix(found.confusion, every), f"confusion matrix of {count} classes", "matrix-picture"),
        tag(
            "figcaption",
            f"Down: the true class, 0 to {count - 1}. Across: what it was taken for. Stronger is more, by the root of "
            f"its share of the row. {about}",
        ),
    )


def class_tables(found: Examination) -> Html:
    """The classes that were seen, by the share that was right; of pixels by intersection over union."""
    rank = overlaps(found.confusion) if found.counted == "pixels" else _rights(found.confusion)
    seen = np.flatnonzero(np.isfinite(rank))
    order = seen[np.lexsort((seen, rank[seen]))].tolist()
    draw = _overlap_table if found.counted == "pixels" else _class_table
    if not order:
        return absent("No sample was looked at.")
    if len(order) <= MOST_LISTED:
        return join(tag("h3", "Classes, worst first"), draw(found, order))
    worst, best = order[:MOST_LISTED], order[::-1][:MOST_LISTED]
    every = draw(found, seen.tolist()) if found.counted == "pixels" else None
    return join(
        tag(
            "div",
            tag("div", tag("h3", f"Worst {MOST_LISTED} classes"), draw(found, worst)),
            tag("div", tag("h3", f"Best {MOST_LISTED} classes"), draw(found, best)),
            class_="two",
        ),
        tag("details", tag("summary", f"All {len(seen)} classes"), every) if every else None,
    )


def overlaps(confusion: Counts) -> npt.NDArray[np.float64]:
    """Intersection over union of each class, [K]; nan for one that is neither there nor predicted."""
    both = confusion.diagonal()
    return _ratio(both, confusion.sum(axis=0) + confusion.sum(axis=1) - both)


def _rights(confusion: Counts) -> npt.NDArray[np.float64]:
    """Which share of each class was taken for it, [K]; nan for one that is not there."""
    return _ratio(confusion.diagonal(), confusion.sum(axis=1))


def _ratio(part: Counts, whole: Counts) -> npt.NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(1, whole), np.nan)


def confused_pairs(found: Examination) -> Html:
    wrong = found.confusion.copy()
    np.fill_diagonal(wrong, 0)
    flat = wrong.ravel()
    places = np.flatnonzero(flat)
    # Most first, then in the order of the classes.
    places = places[np.argsort(-flat[places], kind="stable")][:MOST_LISTED]
    if not len(places):
        return absent("None: every sample that was looked at was taken for what it is.")
    rows = []
    for place in places.tolist():
        truth, guess = divmod(place, len(found.classes))
        count, of = int(flat[place]), int(found.confusion[truth].sum())
        rows.append((found.classes[truth], found.classes[guess], number(count), number(count / of, percent=True)))
    return table(("class", "taken for", found.counted, "of the class"), rows, class_="pairs")


def _class_table(found: Examination, classes: Sequence[int]) -> Html:
    rows = []
    for label in classes:
        row = found.confusion[label]
        samples, right = int(row.sum()), int(row[label])
        guess, count = _mostly(row, label)
        mostly = f"{found.classes[guess]} ({count})" if count else "–"
        rows.append(
            (found.classes[label], number(samples), number(right), number(right / samples, percent=True), mostly)
        )
    return table(("class", "samples", "right", "share", "most often taken for"), rows, class_="classes")


def _overlap_table(found: Examination, classes: Sequence[int]) -> Html:
    iou, right = overlaps(found.confusion), _rights(found.confusion)
    rows = []
    for label in classes:
        pixels = int(found.confusion[label].sum())
        guess, count = _mostly(found.confusion[label], label)
        mostly = f"{found.classes[guess]} ({count / pixels:.1%})" if count else "–"
        shares = (number(float(share[label]), percent=True) for share in (iou, right))
        rows.append((found.classes[label], number(pixels), *shares, mostly))
    return table(("class", "pixels", "IoU", "of its pixels right", "most often taken for"), rows, class_="classes")


def _mostly(row: Counts, label: int) -> tuple[int, int]:
    """Which other class it is taken for most often, and how often."""
    others = row.copy()
    others[label] = 0
    return int(others.argmax()), int(others.max())


def _counts(matrix: Counts, classes: Sequence[str], counted: str) -> Html:
    """A table whose cells are tinted by their share of the row; pixels, of which there are millions, are per cents."""
    short_names = all(len(name) <= 3 for name in classes)
    heads = [
        tag("th", name if short_names else str(number), title=name, scope="col") for number, name in enumerate(classes)
    ]
    rows = []
    for label, name in enumerate(classes):
        total = max(1, int(matrix[label].sum()))
        cells = [
            tag(
                "td",
                _cell(int(count), total, counted) if count else tag("span", "0", class_="nought"),
                style=f"--share:{(int(count) / total) ** 0.5:.3f}" if count else None,
                class_=("full" if count > 0.4 * total else "part") if count else None,
                title=f"{name} taken for {classes[guess]}: {int(count)} of {total}",
            )
            for guess, count in enumerate(matrix[label])
        ]
        rows.append(tag("tr", tag("th", name if short_names else f"{label} {name}", scope="row"), *cells))
    head = tag("thead", tag("tr", tag("th", "true ↓ taken for →", class_="corner"), *heads))
    return tag("table", head, tag("tbody", rows), class_="matrix")


def _cell(count: int, total: int, counted: str) -> str:
    if counted == "samples":
        return str(count)
    share = 100 * count / total
    return f"{share:.0f}" if share >= 0.5 else "<1"


def _matrix(matrix: Counts, every: int) -> Image.Image:
    """Transparent where there is nothing, so that it goes with a light and a dark page."""
    starts = np.arange(0, len(matrix), every)
    binned = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1).astype(np.float64)
    share = np.sqrt(binned / np.maximum(1, binned.sum(axis=1, keepdims=True)))
    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3] = _BLUE
    pixels[..., 3] = np.round(255 * share)
    scale = max(1, 500 // len(share))
    return Image.fromarray(pixels).resize((len(share) * scale, len(share) * scale), Image.Resampling.NEAREST)
