"""What a run's network is shown, what it says of it, and what its stages see."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.pictures.palette import colourise, palette
from pipeline.track.report.html import Html, absent, join, number, picture, tag

_INPUT_PX, _SCENE_PX = 160, 320
"""Sides of an input's picture; larger ones are scaled down to it."""

# Viridis, which reads alike to the colour-blind and in grey, at five places.
_VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)

Map = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class ClassifiedPicture:
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
class SegmentedPicture:
    """One validation image whose pixels the network tells apart."""

    key: str
    right: float
    """Share of its labelled pixels; nan where there is none."""
    image: npt.NDArray[np.uint8] | None
    """[H, W, 3], as the network sees it; None where sample pictures were not asked for, as the next two."""
    truth: npt.NDArray[np.uint8] | None
    """[h, w] of classes from 0; beyond the last, pixels without a label."""
    prediction: npt.NDArray[np.uint8] | None
    maps: list[Map]
    """[H, W] of each stage."""


@dataclasses.dataclass(frozen=True)
class DetectedPicture:
    """One validation image in which the network looked for objects."""

    key: str
    num_objects: int
    num_found: int
    """With a score of at least `min_score`."""
    min_score: float
    truth: Pixels | None
    """[H, W, 3], the image with its objects drawn; None where sample pictures were not asked for."""
    found: Pixels | None
    """The same with those that were found."""
    maps: list[Map]
    """[H, W] of each stage."""


Pictures = Sequence[ClassifiedPicture] | Sequence[SegmentedPicture] | Sequence[DetectedPicture]


def network_view(pictures: Pictures, classes: Sequence[str]) -> Html:
    """A row for each image: its stages' maps, where the class token looks, and the image itself where allowed, with
    its map of classes or its objects where there are such."""
    if not pictures:
        return absent("The network does not show its stages' maps.")
    rows = []
    for each in pictures:
        if isinstance(each, SegmentedPicture):
            rows.append(_scene(each, len(classes)))
        elif isinstance(each, DetectedPicture):
            rows.append(_findings(each))
        else:
            rows.append(_row(_about(each, classes), _tiles(each)))
    return join(tag("div", rows, class_="insides"), _legend(pictures, classes))


def _row(about: Html | None, tiles: Sequence[Html]) -> Html:
    return tag("div", about, *tiles, class_="inside", style=f"--tiles:{len(tiles)}")


def _scene(each: SegmentedPicture, num_classes: int) -> Html:
    about = tag("p", tag("strong", number(each.right, percent=True)), " of its pixels right", class_="picture-about")
    key = tag("p", tag("small", each.key), class_="picture-about")
    shown = []
    if each.image is not None:
        shown.append(("input", _smaller(Image.fromarray(each.image), Image.Resampling.BICUBIC), each.image.shape))
    for name, labels in (("truth", each.truth), ("prediction", each.prediction)):
        if labels is not None:
            shown.append((name, _smaller(colourise(labels, num_classes), Image.Resampling.NEAREST), labels.shape))
    stages = [_stage(number, values) for number, values in enumerate(each.maps)]
    large, small = (
        [_tile(name, image, shape, each.key, "map whole") for name, image, shape in tiles] for tiles in (shown, stages)
    )
    return tag("div", about, key, _row(None, large) if large else None, _row(None, small), class_="scene")


def _findings(each: DetectedPicture) -> Html:
    found = f" objects; found with a score of {each.min_score:g} or more: "
    about = tag("p", tag("strong", each.num_objects), found, tag("strong", each.num_found), class_="picture-about")
    key = tag("p", tag("small", each.key), class_="picture-about")
    drawn = [
        _tile(name, Image.fromarray(pixels), pixels.shape, each.key, "map whole")
        for name, pixels in (("truth", each.truth), ("found", each.found))
        if pixels is not None
    ]
    stages = [_tile(*_stage(number, values), each.key, "map whole") for number, values in enumerate(each.maps)]
    return tag("div", about, key, _row(None, drawn) if drawn else None, _row(None, stages), class_="scene findings")


def _legend(pictures: Pictures, classes: Sequence[str]) -> Html | None:
    """The colours of the classes on the maps that are shown, the largest first."""
    counts = np.zeros(len(classes), np.int64)
    for each in pictures:
        if isinstance(each, SegmentedPicture):
            for labels in (each.truth, each.prediction):
                if labels is not None:
                    counts += np.bincount(labels.ravel(), minlength=256)[: len(counts)]
    shown = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
    if not shown:
        return None
    colours = palette(len(counts))
    items = [
        tag("li", tag("i", class_="key", style="--c:#" + bytes(colours[label]).hex()), classes[label])
        for label in shown
    ]
    return tag("ul", items, tag("li", tag("i", class_="key", style="--c:#000"), "no label"), class_="legend")


def _about(each: ClassifiedPicture, classes: Sequence[str]) -> Html:
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


def _tiles(each: ClassifiedPicture) -> list[Html]:
    tiles = [_tile(*_stage(number, values), each.key) for number, values in enumerate(each.maps)]
    if each.attention is not None:
        tiles.append(_tile("attention", _heat(each.attention), each.attention.shape, each.key))
    if each.image is not None:
        image = Image.fromarray(each.image)
        image.thumbnail((_INPUT_PX, _INPUT_PX))
        tiles.insert(0, _tile("input", image, each.image.shape, each.key))
    return tiles


def _stage(number: int, values: Map) -> tuple[str, Image.Image, tuple[int, ...]]:
    return f"stage {number + 1}", _heat(values), values.shape


def _tile(name: str, image: Image.Image, shape: tuple[int, ...], key: str, class_: str = "map") -> Html:
    size = tag("small", f"{shape[0]} × {shape[1]}")
    return tag("figure", picture(image, f"{name} of {key}", class_), tag("figcaption", name, tag("br"), size))


def _smaller(image: Image.Image, resampling: Image.Resampling) -> Image.Image:
    image.thumbnail((_SCENE_PX, _SCENE_PX), resampling)
    return image


def _heat(values: Map) -> Image.Image:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    share = np.nan_to_num((values - low) / (high - low)) if high > low else np.full(values.shape, 0.5)
    place = share * (len(_VIRIDIS) - 1)
    below = np.minimum(place.astype(int), len(_VIRIDIS) - 2)
    rest = (place - below)[..., None]
    return Image.fromarray(np.round(_VIRIDIS[below] * (1 - rest) + _VIRIDIS[below + 1] * rest).astype(np.uint8))
