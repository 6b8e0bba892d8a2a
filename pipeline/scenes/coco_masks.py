"""Masks as COCO writes them.

mask ──▶ rle        run lengths, for crowds
mask ──▶ polygons   outlines along the edges of pixels, from which pycocotools makes the same mask again
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from skimage.measure import label

Mask = npt.NDArray[np.bool_]  # [height, width]
Point = tuple[int, int]  # x, y of a corner of pixels


class Box(NamedTuple):
    x: int
    y: int
    width: int
    height: int


def box(mask: Mask) -> Box:
    """The smallest that holds a mask, which is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    return Box(columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)


def rle(mask: Mask) -> dict[str, Any]:
    """Lengths of the runs of 0, 1, 0, … down the columns, not compressed."""
    pixels = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(pixels, prepend=np.int8(0))).tolist()
    ends = [*changes, pixels.size]
    return {"size": list(mask.shape), "counts": [end - start for start, end in zip([0, *changes], ends, strict=True)]}


def polygons(mask: Mask) -> list[list[int]]:
    """x, y, x, y, … of one polygon for each part of the mask that hangs together.

    COCO unites a mask's polygons and so has none for holes: a hole is joined to the outline by a cut without width.
    """
    x, y, width, height = box(mask)
    parts = np.asarray(label(mask[y : y + height, x : x + width], connectivity=1))
    return [_polygon(parts == number, x, y) for number in range(1, parts.max() + 1)]


def _polygon(part: Mask, left: int, top: int) -> list[int]:
    outline, *holes = sorted(_loops(part), key=min)  # the leftmost corner is the outline's
    points = [*outline, outline[0]]
    for hole in holes:
        points += [*hole, hole[0], outline[0]]
    return [value for x, y in points[:-1] for value in (left + x, top + y)]


def _loops(part: Mask) -> list[list[Point]]:
    """The corners of each closed line between the part's pixels and others, which it has on its right."""
    filled = np.pad(part, 1)
    inside, above, left = filled[1:, 1:], filled[:-1, 1:], filled[1:, :-1]
    edges: dict[Point, list[Point]] = {}  # from each corner, to where
    for mask, start, end in (
        (inside & ~above, (0, 0), (1, 0)),
        (above & ~inside, (1, 0), (0, 0)),
        (left & ~inside, (0, 0), (0, 1)),
        (inside & ~left, (0, 1), (0, 0)),
    ):
        for y, x in np.argwhere(mask).tolist():
            edges.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    loops = []
    while edges:
        loops.append(_follow(edges, next(iter(edges))))
    return loops


def _follow(edges: dict[Point, list[Point]], first: Point) -> list[Point]:
    """Take one closed line out of the edges: its corners, without those that it passes straight."""
    corners: list[Point] = []
    here, step = first, (0, 0)
    while True:
        there = edges[here].pop()  # any, where two pixels touch by their corners: what is filled is the same
        if not edges[here]:
            del edges[here]
        next_step = there[0] - here[0], there[1] - here[1]
        if next_step != step:
            corners.append(here)
        here, step = there, next_step
        if here == first and first not in edges:
            return corners
