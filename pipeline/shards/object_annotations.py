"""Checks and packs the objects of an image: boxes, areas and masks, in pixels of the packed image.

    an annotation of COCO's ──packed_form──▶ Annotated ──encode──▶ KEY.json ──decode──▶ Annotated ──mask──▶ pixels
                                                         prepare: checked against its image, and scaled with it

    {"image_id": 17, "height": 480, "width": 640, "annotations": [
        {"id": 1, "label": 0, "bbox": [x, y, w, h], "area": 125.5, "iscrowd": 0, "segmentation": [[x, y, x, y, …], …]},
        {"id": 2, "label": 3, "bbox": [x, y, w, h], "area": 980, "iscrowd": 1, "segmentation": {"size": [480, 640],
         "counts": "…"}}]}

`label` is a position in the manifest's classes; everything else is as in COCO. A segmentation is optional. It is either
a list of polygons, whose union is the mask, or run lengths as pycocotools compresses them.
"""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as masks

from pipeline.shards.images import Header
from pipeline.shards.index import MAX_PIXELS

Mask = npt.NDArray[np.uint8]
"""[height, width] of 0 and 1."""

MAX_BYTES = 1 << 24
"""The limit for the JSON of an image's objects, which take several times as much memory in Python."""

MAX_OUTLINE = 64
"""The limit for the length of an object's outline, in sums of its image's height and width."""

Runs = npt.NDArray[np.int64]
"""[runs] lengths of runs of 0, 1, 0, …."""

_FIELDS = ("id", "bbox", "area", "iscrowd")
# Scaled coordinates are rounded to so many decimals.
_DECIMALS = 3


class BadObjectsError(ValueError):
    """These annotations cannot be used. The message says which one and why."""


@dataclasses.dataclass(frozen=True)
class Annotated:
    """An image's size and its objects."""

    image_id: int
    height: int
    width: int
    annotations: list[dict[str, Any]]


def encode(annotated: Annotated) -> bytes:
    text = json.dumps(
        vars(annotated),
        separators=(",", ":"),
        allow_nan=False,
    )
    return text.encode()


def decode(data: bytes, num_classes: int) -> Annotated:
    """Reads and checks what `encode` wrote. Raises BadObjectsError."""
    if len(data) > MAX_BYTES:
        raise BadObjectsError(f"objects in {len(data):,} bytes of JSON; the limit is {MAX_BYTES:,}")
    try:
        annotated = Annotated(**json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise BadObjectsError(f"no objects in JSON: {error}") from error
    numbers = annotated.image_id, annotated.height, annotated.width
    # By type, because to isinstance true is an int as well.
    are_whole = all(type(number) is int for number in numbers)
    if not are_whole or not isinstance(annotated.annotations, list):
        raise BadObjectsError("no objects in JSON: image_id, height and width are numbers, and annotations a list")
    _check_size(annotated.height, annotated.width)
    for annotation in annotated.annotations:
        _check_annotation(
            annotation,
            num_classes,
            annotated.height,
            annotated.width,
        )
    return annotated


def prepare(
    data: bytes,
    size: tuple[int, int],
    packed: Header,
    num_classes: int,
) -> bytes:
    """Returns what to pack for the objects of an image of `size`, height and width, that is packed as `packed`.

    Raises BadObjectsError where the annotations are for an image of another size.
    """
    annotated = decode(data, num_classes)
    if (annotated.height, annotated.width) != size:
        raise BadObjectsError(
            f"{size[1]} × {size[0]} pixels, but its annotations are of {annotated.width} × {annotated.height}: "
            "they belong to another picture, or to this one turned"
        )
    if size == (packed.height, packed.width):
        return data
    resized = _resize(annotated, packed.height, packed.width)
    return encode(resized)


def packed_form(
    annotation: dict[str, Any],
    label: int,
    num_classes: int,
    height: int,
    width: int,
) -> dict[str, Any]:
    """Returns what is packed for an annotation of COCO's in an image of `height` and `width`.

    Run lengths are compressed. Polygons of fewer than three points enclose no pixel and are dropped; a mask that
    consists of such polygons alone is packed as one without pixels. Raises BadObjectsError.
    """
    _check_size(height, width)
    for name in _FIELDS:
        if name not in annotation:
            raise BadObjectsError(f"annotation {annotation.get('id')!r}: has no {name}")
    packed = {
        "id": annotation["id"],
        "label": label,
        "bbox": annotation["bbox"],
        "area": annotation["area"],
        "iscrowd": annotation["iscrowd"],
    }
    segmentation = annotation.get("segmentation")
    # Some programs write null or [] for objects that have a box alone.
    if segmentation:
        if isinstance(segmentation, list):
            segmentation = [polygon for polygon in segmentation if not _is_pointless(polygon)]
            if not segmentation:
                segmentation = _encode_mask(np.zeros((height, width), np.uint8))
        elif _has_size(segmentation, height, width) and isinstance(segmentation.get("counts"), list):
            segmentation = _compress_runs(packed["id"], segmentation["counts"], height, width)
        packed["segmentation"] = segmentation
    _check_annotation(packed, num_classes, height, width)
    return packed


def num_pointless(annotation: dict[str, Any]) -> int:
    """Returns how many polygons of an annotation of COCO's `packed_form` drops."""
    segmentation = annotation.get("segmentation")
    if not isinstance(segmentation, list):
        return 0
    return sum(map(_is_pointless, segmentation))


def mask(annotation: dict[str, Any], height: int, width: int) -> Mask:
    """Returns the mask of a packed annotation that has a segmentation, in an image of this size.

    The pixels are those that pycocotools computes.
    """
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        polygons = masks.frPyObjects(segmentation, height, width)
        segmentation = masks.merge(polygons)
    runs = _decode_runs(segmentation["counts"])
    # pycocotools' own decoding warns with numpy 2, and warnings cannot be silenced in one thread alone.
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    return np.repeat(values, runs).reshape(width, height).T


def _resize(annotated: Annotated, height: int, width: int) -> Annotated:
    """Returns the annotations as they are once their image has been resized to `height` and `width`."""
    x = width / annotated.width
    y = height / annotated.height
    resized = []
    for annotation in annotated.annotations:
        changed = {
            "bbox": _scale_points(annotation["bbox"], x, y),
            "area": annotation["area"] * x * y,
        }
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list):
            changed["segmentation"] = [_scale_points(polygon, x, y) for polygon in segmentation]
        elif segmentation:
            # Label maps are resized in the same way, see images.prepare_map.
            pixels = Image.fromarray(mask(annotation, annotated.height, annotated.width))
            pixels = pixels.resize((width, height), Image.Resampling.NEAREST)
            changed["segmentation"] = _encode_mask(np.asarray(pixels))
        resized.append({**annotation, **changed})
    return Annotated(annotated.image_id, height, width, resized)


def _scale_points(values: list[float], x: float, y: float) -> list[float]:
    """Returns x, y, x, y, … scaled; a box's width and height as well."""
    scaled = []
    for index, value in enumerate(values):
        factor = y if index % 2 else x
        scaled.append(round(value * factor, _DECIMALS))
    return scaled


def _check_size(height: int, width: int) -> None:
    """Raises BadObjectsError for a size that no packed image has. Masks take a byte a pixel."""
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise BadObjectsError(f"objects of an image of {width} × {height} pixels: at most {MAX_PIXELS:,} are taken")


def _check_annotation(
    annotation: Any,
    num_classes: int,
    height: int,
    width: int,
) -> None:
    """Raises BadObjectsError for a packed annotation that differs from the format in this module's docstring."""
    number = None
    if isinstance(annotation, dict):
        number = annotation.get("id")
    if type(number) is not int:
        raise BadObjectsError(f"annotation {number!r}: its id is not a whole number")
    label = annotation.get("label")
    if type(label) is not int or not 0 <= label < num_classes:
        raise BadObjectsError(f"annotation {number}: label {label!r} is not below the {num_classes} classes")
    area = annotation.get("area")
    if area is None or not _are_numbers([area]) or area < 0:
        raise BadObjectsError(f"annotation {number}: area {area!r} is not a number of pixels")
    crowd = annotation.get("iscrowd")
    if crowd not in (0, 1):
        raise BadObjectsError(f"annotation {number}: iscrowd {crowd!r} is not 0 or 1")
    box = annotation.get("bbox")
    problem = _box_problem(box, height, width)
    if problem:
        raise BadObjectsError(f"annotation {number}: bbox {box!r} {problem}")
    if "segmentation" not in annotation:
        return
    problem = _segmentation_problem(annotation["segmentation"], height, width)
    if problem:
        raise BadObjectsError(f"annotation {number}: its segmentation {problem}")


def _box_problem(box: Any, height: int, width: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        return "is not four finite numbers: x, y, width, height"
    if min(box[2:]) < 0:
        return "has a negative side"
    left, top, box_width, box_height = box
    for start, side, end in ((left, box_width, width), (top, box_height, height)):
        inside = min(start + side, end) - max(start, 0)
        if inside < 0 or (inside == 0 and side > 0):
            return f"lies outside the image of {width} × {height} pixels"
    return None


def _segmentation_problem(segmentation: Any, height: int, width: int) -> str | None:
    if isinstance(segmentation, list):
        for polygon in segmentation:
            problem = _polygon_problem(polygon, height, width)
            if problem:
                return problem
        # pycocotools walks the outlines in fifths of a pixel, and holds each step.
        limit = MAX_OUTLINE * (height + width)
        if sum(map(_outline_length, segmentation)) > limit:
            return f"has outlines of more than {limit:,} pixels"
        return None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "is neither a list of polygons nor run lengths with size and counts"
    if not _has_size(segmentation, height, width):
        return f"is of [height, width] {segmentation['size']!r}, but its image of {[height, width]}"
    if not isinstance(segmentation["counts"], str):
        return "has counts that are no lengths of runs"
    runs = _decode_runs(segmentation["counts"])
    if len(runs) == 0:
        return "is not compressed as pycocotools compresses run lengths"
    return _runs_problem(runs, height, width)


def _polygon_problem(polygon: Any, height: int, width: int) -> str | None:
    if not isinstance(polygon, list) or not _are_numbers(polygon):
        return "has a polygon that is not a list of finite numbers"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"has a polygon of {len(polygon)} numbers: x and y of at least three points were expected"
    # pycocotools walks along every edge, however long it is.
    reach = 2 * max(height, width)
    if min(polygon) < -reach or max(polygon) > reach:
        return f"has a polygon with a point far outside the image of {width} × {height} pixels"
    return None


def _outline_length(polygon: list[float]) -> float:
    """Returns the length of a polygon's outline in pixels, a step to any of a pixel's eight neighbours counted as 1."""
    corners = np.reshape(polygon, (-1, 2))
    edges = np.abs(corners - np.roll(corners, 1, axis=0))
    return float(edges.max(axis=1).sum())


def _runs_problem(runs: Runs, height: int, width: int) -> str | None:
    total = int(runs.sum())
    if runs.min(initial=0) < 0 or total != height * width:
        return f"has runs of {total} pixels, but its image {height * width}"
    return None


def _has_size(segmentation: Any, height: int, width: int) -> bool:
    return isinstance(segmentation, dict) and segmentation.get("size") == [height, width]


def _are_numbers(values: list[Any]) -> bool:
    try:
        # The sum is computed in C: COCO has tens of millions of coordinates.
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _is_pointless(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) in (0, 2, 4)


def _encode_mask(pixels: Mask) -> dict[str, Any]:
    return _decode_counts(masks.encode(np.asfortranarray(pixels)))


def _compress_runs(
    number: Any,
    counts: list[Any],
    height: int,
    width: int,
) -> dict[str, Any]:
    """Returns run lengths that are a list of numbers, from annotation `number`, as pycocotools compresses them."""
    limit = height * width
    if not counts or not all(type(count) is int and 0 <= count <= limit for count in counts):
        raise BadObjectsError(f"annotation {number!r}: its segmentation has counts that are no lengths of runs")
    problem = _runs_problem(np.array(counts, np.int64), height, width)
    if problem:
        raise BadObjectsError(f"annotation {number!r}: its segmentation {problem}")
    runs: Any = {"size": [height, width], "counts": counts}
    return _decode_counts(masks.frPyObjects(runs, height, width))


def _decode_counts(runs: Any) -> dict[str, Any]:
    """Returns pycocotools' run lengths with the counts as text, which JSON can hold."""
    return {
        "size": list(runs["size"]),
        "counts": runs["counts"].decode("ascii"),
    }


def _decode_runs(counts: str | bytes) -> Runs:
    """Returns the lengths of the runs of 0, 1, 0, … down the columns, [runs]; none for counts that are damaged.

    pycocotools writes each number in digits of 5 bits, the lowest first, with a sixth bit on all but the last digit.
    From the fourth number on it is the difference from the last but one. pycocotools' own decoder reads past the end
    of counts that were cut short.
    """
    if isinstance(counts, str):
        counts = counts.encode("utf-8")
    nothing = np.empty(0, np.int64)
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if len(digits) == 0 or digits.min() < 0 or digits.max() > 63:
        return nothing
    is_last = (digits & 0x20) == 0
    if not is_last[-1]:
        return nothing
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    num_digits = ends - starts + 1
    # Six digits are enough for the pixels of any image that is packed.
    if num_digits.max() > 6:
        return nothing
    index_in_number = np.arange(len(digits)) - np.repeat(starts, num_digits)
    values = np.add.reduceat((digits & 0x1F) << 5 * index_in_number, starts)
    # The numbers are two's complements: the last digit's highest bit is the sign.
    is_negative = (digits[ends] & 0x10) > 0
    values -= is_negative * (np.int64(1) << 5 * num_digits)
    # The first number stays as it is. From the second on, numbers add up over every other run.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
