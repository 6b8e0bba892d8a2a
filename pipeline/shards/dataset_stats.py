"""Says what is in data sets: sizes, classes, channels, suspicious images and duplicates.

data sets ──measure_pixels──▶ Measurements ──▶ result ──▶ text
                                    └──▶ picture, with a strip of the most suspicious images
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipeline import files
from pipeline.redact import printable, redact
from pipeline.shards import images, public_datasets
from pipeline.shards.cache import CacheOptions
from pipeline.shards.measure_pixels import Measurements, find_repeats, mean_and_std, measure
from pipeline.shards.show_dataset import Array, format_summary, summarise

SHOWN = 10
"""The number of suspicious images, and of pairs of equal ones, in the result."""


def make_stats(paths: list[str], picture: Path, cache: CacheOptions, workers: int) -> dict[str, Any]:
    """Returns statistics of the data sets at `paths`, and draws them into the PNG file `picture`.

    Raises InputError where a data set cannot be read or the picture cannot be written.
    """
    roots = [str(public_datasets.root_of(path, cache.folder)) for path in paths]
    names = redact(paths)
    measured = measure(roots, cache, workers)
    # A stable sort, so that equally suspicious images stay in their order.
    order = np.argsort(-measured.images["rating"], kind="stable")[:SHOWN]
    suspects = [image for image in measured.images[order] if image["rating"] > 1]
    _draw(measured, names, suspects, picture)
    return {
        "sets": [{"data": name, **_summarise(measured, number)} for number, name in enumerate(names)],
        "suspicious": [_describe(measured, image) for image in suspects],
        "duplicates": _find_duplicates(measured),
        "picture": str(picture),
    }


def _summarise(measured: Measurements, number: int) -> dict[str, Any]:
    table = _images_of(measured, number)
    mean, std = mean_and_std(measured.histograms[number])
    config = {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}
    return {
        **summarise(measured.sets[number], seed=0),
        "suspicious": int((table["rating"] > 1).sum()),
        "greyscale_share": float(table["is_grey"].mean()),
        **config,
        "config": "image: {{mean: {mean}, std: {std}}}".format(**config),
    }


def _images_of(measured: Measurements, number: int) -> Array:
    return measured.images[measured.images["set"] == number]


def _describe(measured: Measurements, image: np.void) -> dict[str, str]:
    shards, shard, row = _locate(measured, image)
    return {
        "shard": shards.url(shard),
        "key": shards.key(shard, row),
        "size": f"{image['width']} × {image['height']} px",
        "reason": image["reason"].decode(),
    }


def _locate(measured: Measurements, image: np.void) -> tuple[Any, int, int]:
    """Returns an image's data set, and shard and row there."""
    number, shard, row, *_ = image.item()
    return measured.sets[number], shard, row


def _find_duplicates(measured: Measurements) -> dict[str, Any]:
    """Returns the number and the first pairs of equal images, within a data set and across two."""
    pairs = measured.images[find_repeats(measured.images["digest"])]
    is_across = pairs["set"][:, 0] != pairs["set"][:, 1]
    found = {}
    for where, chosen in (("within", pairs[~is_across]), ("across", pairs[is_across])):
        names = []
        for pair in chosen[:SHOWN]:
            names.append(["{shard}#{key}".format(**_describe(measured, image)) for image in pair])
        found[where] = {"images": len(chosen), "pairs": names}
    return found


def format_stats(result: dict[str, Any]) -> str:
    """Returns the statistics as a text of some lines."""
    lines = []
    for each in result["sets"]:
        lines.append(format_summary(each))
        lines.append("{greyscale_share:.1%} greyscale, {suspicious:,} suspicious\n{config}\n".format(**each))
    for suspect in result["suspicious"]:
        lines.append(printable("{reason}, {size}: {shard}#{key}".format(**suspect)))
    for where, found in result["duplicates"].items():
        lines.append(f"duplicates {where} data sets: {found['images']:,}")
        for first, second in found["pairs"]:
            lines.append(printable(f"  {first} = {second}"))
    return "\n".join(lines)


def _draw(measured: Measurements, names: list[str], suspects: list[np.void], path: Path) -> None:
    figure = Figure((14, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1))
    upper, lower = parts
    panels = upper.subplots(1, 4)
    titles = ("short side, px: share of images", "width / height: share", "images a class", "mean ± deviation")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    for number, name in enumerate(names):
        _draw_set(panels, measured, number, name)
    panels[0].legend(frameon=False, fontsize=8)
    lower.suptitle("the most suspicious images" if suspects else "no suspicious images", fontsize=10)
    # Grey, on which white images can be seen.
    lower.set_facecolor("#f0f1f3")
    strip = lower.subplots(1, SHOWN)
    for axes in strip:
        axes.set_axis_off()
    for axes, image in zip(strip, suspects, strict=False):
        about = _describe(measured, image)
        about["key"] = about["key"][-20:]
        axes.set_title("{reason}\n{size}\n{key}".format(**about), fontsize=7, parse_math=False)
        # A damaged image has no digest, and no picture.
        if image["digest"]:
            axes.imshow(_read_picture(measured, image))
    with files.output(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _draw_set(panels: Array, measured: Measurements, number: int, name: str) -> None:
    """Draws a data set into the four panels."""
    sizes, shapes, classes, channels = panels
    table = _images_of(measured, number)
    colour = f"C{number}"
    # Shares, so that data sets of different sizes can be compared.
    style: dict[str, Any] = {"weights": np.full(len(table), 1 / len(table)), "histtype": "step", "color": colour}
    short = np.minimum(table["height"], table["width"])
    sizes.hist(short, bins=np.geomspace(4, 4096, 61), label=f"{name[-30:]}: {len(table):,}", **style)
    shapes.hist(table["width"] / table["height"], bins=np.geomspace(0.1, 10, 41), **style)
    for axes in (sizes, shapes):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    counts = np.bincount(table["label"], minlength=len(measured.sets[number].classes))
    classes.plot(np.sort(counts)[::-1], ".-", color=colour)
    classes.set_ylim(bottom=0)
    classes.xaxis.get_major_locator().set_params(integer=True)
    mean, std = mean_and_std(measured.histograms[number])
    channels.errorbar(np.arange(3) + 0.15 * number, mean, std, color=colour, fmt="o", capsize=3)
    channels.set_xticks(range(3), ("red", "green", "blue"))
    channels.margins(x=0.2)


def _read_picture(measured: Measurements, image: np.void) -> Image.Image:
    shards, shard, row = _locate(measured, image)
    picture = images.decode(shards.read(shard, row))
    picture.thumbnail((200, 200))
    return picture
