"""What a network takes for what: the confusion matrix, its worst and best classes, and pictures of its inside."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.track.report.markup import Html, absent, join, number, picture, table, tag

MOST_COUNTED = 20
"""Classes up to which the matrix shows its counts; above, it is a picture."""
MOST_CELLS = 250
"""Rows of that picture; of more classes, neighbours are added up."""
MOST_LISTED = 20

_INPUT_PX = 160
"""Side of an input's picture; larger ones are scaled down to it."""

# Viridis, which reads alike to the colour-blind and in grey, at five places.
_VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)
_BLUE = (0, 114, 178)

Counts = npt.NDArray[np.int64]
Map = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One validation image as the network sees it."""

    key: str
    label: int
    prediction: int
    probability: float
    """Of the prediction."""
    image: npt.NDArray[np.uint8] | None
    """[S, S, 3]; None where sample pictures were not asked for."""
    maps: list[Map]
    """[H, W] of each stage."""
    attention: Map | None
    """[H, W]: where the class token of the last block looks. None for other architectures."""


@dataclasses.dataclass(frozen=True)
class Examination:
    """What a network does with validation data."""

    source: str
    """Which weights."""
    step: int
    data: str
    total: int
    """Samples of the data set; the matrix holds those that were looked at."""
    is_whole: bool
    """Whether all of them were looked at, but for damaged ones."""
    classes: list[str]
    confusion: Counts
    """[K, K]: rows are the true classes, columns what they were taken for."""
    scores: dict[str, float]
    pictures: list[Picture]
    attribution: str | None
    """What has to be said of the pictures."""

    @property
    def samples(self) -> int:
        return int(self.confusion.sum())


def confusion(found: Examination) -> Html:
    count = len(found.classes)
    if count <= MOST_COUNTED:
        return _counts(found.confusion, found.classes)
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
    matrix = found.confusion
    seen = np.flatnonzero(matrix.sum(axis=1))
    share = np.array([matrix[row, row] / matrix[row].sum() for row in seen])
    order = seen[np.lexsort((seen, share))].tolist()
    if not order:
        return absent("No sample was looked at.")
    if len(order) <= MOST_LISTED:
        return join(tag("h3", "Classes, worst first"), _class_table(found, order))
    worst, best = order[:MOST_LISTED], order[::-1][:MOST_LISTED]
    return tag(
        "div",
        tag("div", tag("h3", f"Worst {MOST_LISTED} classes"), _class_table(found, worst)),
        tag("div", tag("h3", f"Best {MOST_LISTED} classes"), _class_table(found, best)),
        class_="two",
    )


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
    return table(("class", "taken for", "samples", "of the class"), rows, class_="pairs")


def inside(pictures: Sequence[Picture], classes: Sequence[str]) -> Html:
    """A row for each image: its stages' maps, where the class token looks, and the image itself where allowed."""
    if not pictures:
        return absent("The network does not show its stages' maps.")
    rows = []
    for each in pictures:
        tiles = _tiles(each)
        rows.append(tag("div", _about(each, classes), *tiles, class_="inside", style=f"--tiles:{len(tiles)}"))
    return tag("div", rows, class_="insides")


def _about(each: Picture, classes: Sequence[str]) -> Html:
    right = each.label == each.prediction
    verdict = "right" if right else f"taken for {classes[each.prediction]}"
    return tag(
        "p",
        tag("strong", classes[each.label]),
        f", {verdict} with ",
        number(each.probability, percent=True),
        tag("br"),
        tag("small", each.key),
        class_="picture-about",
    )


def _tiles(each: Picture) -> list[Html]:
    named = [(f"stage {number + 1}", _heat(values), values.shape) for number, values in enumerate(each.maps)]
    if each.attention is not None:
        named.append(("attention", _heat(each.attention), each.attention.shape))
    if each.image is not None:
        image = Image.fromarray(each.image)
        image.thumbnail((_INPUT_PX, _INPUT_PX))
        named.insert(0, ("input", image, each.image.shape))
    return [
        tag(
            "figure",
            picture(image, f"{name} of {each.key}", "map"),
            tag("figcaption", name, tag("br"), tag("small", f"{shape[0]} × {shape[1]}")),
        )
        for name, image, shape in named
    ]


def _class_table(found: Examination, classes: Sequence[int]) -> Html:
    rows = []
    for label in classes:
        row = found.confusion[label]
        samples, right = int(row.sum()), int(row[label])
        others = row.copy()
        others[label] = 0
        guess = int(others.argmax())
        mostly = f"{found.classes[guess]} ({int(others[guess])})" if others[guess] else "–"
        rows.append(
            (found.classes[label], number(samples), number(right), number(right / samples, percent=True), mostly)
        )
    return table(("class", "samples", "right", "share", "most often taken for"), rows, class_="classes")


def _counts(matrix: Counts, classes: Sequence[str]) -> Html:
    """A table whose cells are tinted by their share of the row."""
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
                int(count) if count else tag("span", "0", class_="nought"),
                style=f"--share:{(int(count) / total) ** 0.5:.3f}" if count else None,
                class_=("full" if count > 0.4 * total else "part") if count else None,
                title=f"{name} taken for {classes[guess]}: {int(count)} of {total}",
            )
            for guess, count in enumerate(matrix[label])
        ]
        rows.append(tag("tr", tag("th", name if short_names else f"{label} {name}", scope="row"), *cells))
    head = tag("thead", tag("tr", tag("th", "true ↓ taken for →", class_="corner"), *heads))
    return tag("table", head, tag("tbody", rows), class_="matrix")


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


def _heat(values: Map) -> Image.Image:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    share = np.nan_to_num((values - low) / (high - low)) if high > low else np.full(values.shape, 0.5)
    place = share * (len(_VIRIDIS) - 1)
    below = np.minimum(place.astype(int), len(_VIRIDIS) - 2)
    rest = (place - below)[..., None]
    return Image.fromarray(np.round(_VIRIDIS[below] * (1 - rest) + _VIRIDIS[below + 1] * rest).astype(np.uint8))
