"""Encodes masks as COCO does.

mask ──▶ rle        run lengths, for crowds
mask ──▶ polygons   outlines along the edges of pixels, from which pycocotools decodes the same mask
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from skimage.measure import label

Mask = npt.NDArray[np.bool_]
"""[height, width]."""
Point = tuple[int, int]
"""The x and y of a corner of pixels."""


class Box(NamedTuple):
    x: int
    y: int
    width: int
    height: int


def box(mask: Mask) -> Box:
    """Returns the bounding box of a mask, which must not be empty."""
    rows = np.flatnonzero(mask.any(1)).tolist()
    columns = np.flatnonzero(mask.any(0)).tolist()
    top, bottom = rows[0], rows[-1]
    left, right = columns[0], columns[-1]
    return Box(
        left,
        top,
        right - left + 1,
        bottom - top + 1,
    )


def rle(mask: Mask) -> dict[str, Any]:
    """Returns the lengths of the runs of 0, 1, 0, … down the columns, not compressed."""
    pixels = mask.ravel(order="F").astype(np.int8)
    # A zero in front, because the first run is one of zeros, and may be empty.
    changes = np.flatnonzero(np.diff(pixels, prepend=np.int8(0)))
    edges = np.concatenate(([0], changes, [pixels.size]))
    counts = np.diff(edges)
    return {
        "size": list(mask.shape),
        "counts": counts.tolist(),
    }


def polygons(mask: Mask) -> list[list[int]]:
    """Returns one polygon, x, y, x, y, …, for each connected component of the mask.

    COCO unites a mask's polygons, so it cannot express holes: a hole is joined to the outline by a cut without width.
    """
    x, y, width, height = box(mask)
    crop = mask[y : y + height, x : x + width]
    components = np.asarray(label(crop, connectivity=1))
    numbers = range(1, components.max() + 1)
    return [_trace_polygon(components == number, x, y) for number in numbers]


def _trace_polygon(component: Mask, left: int, top: int) -> list[int]:
    # The outline comes first, because it has the leftmost corner.
    outline, *holes = sorted(_trace_loops(component), key=min)
    start = outline[0]
    points = [*outline]
    for hole in holes:
        # Back to the start of the outline, and around the hole from there.
        points += [start, *hole, hole[0]]
    polygon = []
    for x, y in points:
        polygon += [left + x, top + y]
    return polygon


def _trace_loops(component: Mask) -> list[list[Point]]:
    """Returns the corners of each closed line around pixels of the component, which are on the line's right."""
    filled = np.pad(component, 1)
    inside = filled[1:, 1:]
    above = filled[:-1, 1:]
    left = filled[1:, :-1]
    # For each corner, the corners at which edges that start there end.
    edges: dict[Point, list[Point]] = {}
    # The edges of each direction: the pixels that have one above or left of them, and its start and end.
    directions = (
        (inside & ~above, (0, 0), (1, 0)),
        (above & ~inside, (1, 0), (0, 0)),
        (left & ~inside, (0, 0), (0, 1)),
        (inside & ~left, (0, 1), (0, 0)),
    )
    for has_edge, (start_x, start_y), (end_x, end_y) in directions:
        for y, x in np.argwhere(has_edge).tolist():
            start = x + start_x, y + start_y
            end = x + end_x, y + end_y
            edges.setdefault(start, []).append(end)
    loops = []
    while edges:
        first = next(iter(edges))
        loops.append(_take_loop(edges, first))
    return loops


def _take_loop(edges: dict[Point, list[Point]], first: Point) -> list[Point]:
    """Removes one closed line from the edges, and returns the corners at which it turns."""
    corners: list[Point] = []
    here = first
    step = (0, 0)
    while True:
        # Where two pixels touch by their corners there are two edges. Any will do: the filled area is the same.
        there = edges[here].pop()
        if not edges[here]:
            del edges[here]
        next_step = there[0] - here[0], there[1] - here[1]
        if next_step != step:
            corners.append(here)
        here = there
        step = next_step
        if here == first and first not in edges:
            return corners
