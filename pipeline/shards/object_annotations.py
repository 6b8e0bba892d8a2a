"""The objects of one image at rest: boxes, areas and masks, in pixels of the packed image.

    an annotation of COCO's ──packed_form──▶ Annotated ──encode──▶ KEY.json ──decode──▶ Annotated ──mask──▶ pixels
                                                         prepare: checked against its image, and scaled with it

    {"image_id": 17, "height": 480, "width": 640, "annotations": [
        {"id": 1, "label": 0, "bbox": [x, y, w, h], "area": 125.5, "iscrowd": 0, "segmentation": [[x, y, x, y, …], …]},
        {"id": 2, "label": 3, "bbox": [x, y, w, h], "area": 980, "iscrowd": 1, "segmentation": {"size": [480, 640],
         "counts": "…"}}]}

`label` is a position in the manifest's classes, all else is as in COCO. A segmentation, which may be missing, is either
polygons, of which the mask is the union, or run lengths as pycocotools compresses them.
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

Mask = npt.NDArray[np.uint8]  # [height, width] of 0 and 1

MAX_BYTES = 1 << 24
"""Of an image's objects. Python's take several times as much memory."""

MAX_OUTLINE = 64
"""Of an object, in heights and widths of its image."""

_FIELDS = ("id", "bbox", "area", "iscrowd")
_DECIMALS = 3  # of coordinates that were scaled


class BadObjectsError(ValueError):
    """These annotations cannot be used. The message says which one and why."""


@dataclasses.dataclass(frozen=True)
class Annotated:
    """What is known of an image's objects."""

    image_id: int
    height: int
    width: int
    annotations: list[dict[str, Any]]


def encode(annotated: Annotated) -> bytes:
    return json.dumps(vars(annotated), separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes, num_classes: int) -> Annotated:
    """Raises BadObjectsError."""
    if len(data) > MAX_BYTES:
        raise BadObjectsError(f"objects in {len(data):,} bytes of JSON; the limit is {MAX_BYTES:,}")
    try:
        annotated = Annotated(**json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise BadObjectsError(f"no objects in JSON: {error}") from error
    sizes = annotated.image_id, annotated.height, annotated.width
    if not all(type(value) is int for value in sizes) or not isinstance(annotated.annotations, list):
        raise BadObjectsError("no objects in JSON: image_id, height and width are numbers, and annotations a list")
    _check_size(annotated.height, annotated.width)
    for annotation in annotated.annotations:
        _check(annotation, num_classes, annotated.height, annotated.width)
    return annotated


def prepare(data: bytes, size: tuple[int, int], packed: Header, num_classes: int) -> bytes:
    """What to pack of the objects of an image of `size`, height and width, that is packed as `packed`.

    Raises BadObjectsError where their image has another size.
    """
    annotated = decode(data, num_classes)
    if (annotated.height, annotated.width) != size:
        raise BadObjectsError(
            f"{size[1]} × {size[0]} pixels, but its annotations are of {annotated.width} × {annotated.height}: "
            "they belong to another picture, or to this one turned"
        )
    if size == (packed.height, packed.width):
        return data
    return encode(_scaled(annotated, packed.height, packed.width))


def packed_form(annotation: dict[str, Any], label: int, num_classes: int, height: int, width: int) -> dict[str, Any]:
    """An annotation of COCO's in an image of `height` and `width`, as it is packed.

    Run lengths are compressed. Polygons of fewer than three points enclose no pixel and are left out; a mask that was
    of such alone is packed as one without pixels. Raises BadObjectsError.
    """
    _check_size(height, width)
    for name in _FIELDS:
        if name not in annotation:
            raise BadObjectsError(f"annotation {annotation.get('id')!r}: has no {name}")
    found = {name: annotation[name] for name in _FIELDS}
    found = {"id": found.pop("id"), "label": label, **found}
    if segmentation := annotation.get("segmentation"):  # of boxes alone, some programs write null or []
        if isinstance(segmentation, list):
            segmentation = [polygon for polygon in segmentation if not _is_pointless(polygon)] or _empty(height, width)
        elif _fits(segmentation, height, width) and isinstance(segmentation.get("counts"), list):
            segmentation = _compressed(found["id"], segmentation["counts"], height, width)
        found["segmentation"] = segmentation
    _check(found, num_classes, height, width)
    return found


def num_pointless(annotation: dict[str, Any]) -> int:
    """How many polygons of an annotation of COCO's `packed_form` leaves out."""
    segmentation = annotation.get("segmentation")
    return sum(map(_is_pointless, segmentation)) if isinstance(segmentation, list) else 0


def mask(annotation: dict[str, Any], height: int, width: int) -> Mask:
    """The pixels of a packed annotation that has a segmentation, in an image of this size, as pycocotools sees them."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = masks.merge(masks.frPyObjects(segmentation, height, width))
    runs = _runs(segmentation["counts"])
    # pycocotools' own decoding warns with numpy 2, and warnings cannot be silenced in one thread alone.
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    return np.repeat(values, runs).reshape(width, height).T


def _scaled(annotated: Annotated, height: int, width: int) -> Annotated:
    """Of the image resized to `height` and `width`."""
    x, y = width / annotated.width, height / annotated.height
    scaled = []
    for annotation in annotated.annotations:
        changed = {"bbox": _scaled_points(annotation["bbox"], x, y), "area": annotation["area"] * x * y}
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list):
            changed["segmentation"] = [_scaled_points(polygon, x, y) for polygon in segmentation]
        elif segmentation:
            # As label maps are, see images.prepare_map.
            pixels = Image.fromarray(mask(annotation, annotated.height, annotated.width))
            changed["segmentation"] = _rle(np.asarray(pixels.resize((width, height), Image.Resampling.NEAREST)))
        scaled.append({**annotation, **changed})
    return Annotated(annotated.image_id, height, width, scaled)


def _scaled_points(values: list[float], x: float, y: float) -> list[float]:
    return [round(value * (y if place % 2 else x), _DECIMALS) for place, value in enumerate(values)]


def _check_size(height: int, width: int) -> None:
    """Raise BadObjectsError for an image that none can be: masks take a byte a pixel."""
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise BadObjectsError(f"objects of an image of {width} × {height} pixels: at most {MAX_PIXELS:,} are taken")


def _check(annotation: Any, num_classes: int, height: int, width: int) -> None:
    """Raise BadObjectsError for a packed annotation that is not as the head of this file says."""
    number = annotation.get("id") if isinstance(annotation, dict) else None
    if type(number) is not int:
        raise BadObjectsError(f"annotation {number!r}: its id is not a whole number")
    label, area, crowd = (annotation.get(name) for name in ("label", "area", "iscrowd"))
    if type(label) is not int or not 0 <= label < num_classes:
        raise BadObjectsError(f"annotation {number}: label {label!r} is not below the {num_classes} classes")
    if area is None or not _are_numbers([area]) or area < 0:
        raise BadObjectsError(f"annotation {number}: area {area!r} is not a number of pixels")
    if crowd not in (0, 1):
        raise BadObjectsError(f"annotation {number}: iscrowd {crowd!r} is not 0 or 1")
    if wrong := _wrong_box(annotation.get("bbox"), height, width):
        raise BadObjectsError(f"annotation {number}: bbox {annotation.get('bbox')!r} {wrong}")
    if "segmentation" in annotation and (wrong := _wrong_segmentation(annotation["segmentation"], height, width)):
        raise BadObjectsError(f"annotation {number}: its segmentation {wrong}")


def _wrong_box(box: Any, height: int, width: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        return "is not four finite numbers: x, y, width, height"
    if min(box[2:]) < 0:
        return "has a negative side"
    for start, side, end in zip(box[:2], box[2:], (width, height), strict=True):
        inside = min(start + side, end) - max(start, 0)
        if inside < 0 or (inside == 0 and side > 0):
            return f"lies outside the image of {width} × {height} pixels"
    return None


def _wrong_segmentation(segmentation: Any, height: int, width: int) -> str | None:
    if isinstance(segmentation, list):
        wrong = next(filter(None, (_wrong_polygon(polygon, height, width) for polygon in segmentation)), None)
        limit = MAX_OUTLINE * (height + width)
        return wrong or (f"has outlines of more than {limit:,} pixels" if _outline(segmentation) > limit else None)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "is neither a list of polygons nor run lengths with size and counts"
    if not _fits(segmentation, height, width):
        return f"is of [height, width] {segmentation['size']!r}, but its image of {[height, width]}"
    if not isinstance(segmentation["counts"], str):
        return "has counts that are no lengths of runs"
    runs = _runs(segmentation["counts"])
    if len(runs) == 0:
        return "is not compressed as pycocotools compresses run lengths"
    return _wrong_runs(runs, height, width)


def _wrong_polygon(polygon: Any, height: int, width: int) -> str | None:
    if not isinstance(polygon, list) or not _are_numbers(polygon):
        return "has a polygon that is not a list of finite numbers"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"has a polygon of {len(polygon)} numbers: x and y of at least three points were expected"
    # pycocotools walks along every edge, however long it is.
    reach = 2 * max(height, width)
    if min(polygon) < -reach or max(polygon) > reach:
        return f"has a polygon with a point far outside the image of {width} × {height} pixels"
    return None


def _outline(polygons: list[list[float]]) -> float:
    """Returns the length of the outlines in pixels. pycocotools walks them in fifths of one, and holds each step."""
    corners = [np.reshape(polygon, (-1, 2)) for polygon in polygons]
    return sum(float(np.abs(each - np.roll(each, 1, axis=0)).max(axis=1).sum()) for each in corners)


def _wrong_runs(runs: npt.NDArray[np.int64], height: int, width: int) -> str | None:
    total = int(runs.sum())
    if runs.min(initial=0) < 0 or total != height * width:
        return f"has runs of {total} pixels, but its image {height * width}"
    return None


def _fits(segmentation: Any, height: int, width: int) -> bool:
    return isinstance(segmentation, dict) and segmentation.get("size") == [height, width]


def _are_numbers(values: list[Any]) -> bool:
    try:
        return math.isfinite(sum(values))  # in C: COCO has tens of millions of coordinates
    except (TypeError, OverflowError):
        return False


def _is_pointless(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) in (0, 2, 4)


def _empty(height: int, width: int) -> dict[str, Any]:
    return _rle(np.zeros((height, width), np.uint8))


def _rle(pixels: Mask) -> dict[str, Any]:
    return _as_text(masks.encode(np.asfortranarray(pixels)))


def _compressed(number: Any, counts: list[Any], height: int, width: int) -> dict[str, Any]:
    """Run lengths that are a list of numbers, of annotation `number`."""
    if not counts or not all(type(count) is int and 0 <= count <= height * width for count in counts):
        raise BadObjectsError(f"annotation {number!r}: its segmentation has counts that are no lengths of runs")
    if wrong := _wrong_runs(np.array(counts, np.int64), height, width):
        raise BadObjectsError(f"annotation {number!r}: its segmentation {wrong}")
    runs: Any = {"size": [height, width], "counts": counts}
    return _as_text(masks.frPyObjects(runs, height, width))


def _as_text(runs: Any) -> dict[str, Any]:
    return {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}


def _runs(counts: str | bytes) -> npt.NDArray[np.int64]:
    """Lengths of runs of 0, 1, 0, … down the columns, as pycocotools compresses them; none where these are not such.

    Each number is written in digits of 5 bits, the lowest first, with a sixth bit on all but the last. From the fourth
    on it is the difference from the last but one. pycocotools itself reads past the end of what was cut short.
    """
    data = counts.encode("utf-8") if isinstance(counts, str) else counts
    digits = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    is_last = (digits & 0x20) == 0
    ends = np.flatnonzero(is_last)
    if len(digits) == 0 or digits.min() < 0 or digits.max() > 63 or not is_last[-1]:
        return np.empty(0, np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    num_digits = ends - starts + 1
    if num_digits.max() > 6:  # more than any image has pixels
        return np.empty(0, np.int64)
    place = np.arange(len(digits)) - np.repeat(starts, num_digits)
    values = np.add.reduceat((digits & 0x1F) << 5 * place, starts)
    values -= ((digits[ends] & 0x10) > 0) * (np.int64(1) << 5 * num_digits)  # two's complement
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return values
