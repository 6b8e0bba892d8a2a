"""What the benchmarks' results have in common: hardware and versions beside the figures, a file, a picture.

    figures ──finish──▶ DIR/NAME.json, DIR/NAME.png, and the result that the command prints

Needs nothing but Python, so that benchmarks.step can be carried to any machine; without matplotlib there is no picture.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("torch", "timm", "transformers", "deepspeed", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "webdataset")

Draw = Callable[["Figure"], None]


def count(text: str) -> int:
    """An argument of argparse: how many rounds, images and the like."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--rounds", type=count, default=default, help=f"(default: {default})")
    parser.add_argument("--turn", type=float, default=1.0, metavar="SECONDS", help="of each in a round (default: 1)")


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR", help=f"for {name}.json and {name}.png"
    )


def finish(
    name: str,
    result: dict[str, Any],
    folder: Path,
    *,
    device: str,
    details: dict[str, Any] | None = None,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Keeps the result of the benchmark `name` in `folder`, with details and a picture. Returns it for the command to
    print, with what it was measured on; `device` is "cpu" or "cuda"."""
    result = {**result, **measured_on(device)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**result, **(details or {})}, indent=1) + "\n")
    if draw:
        _save(draw, folder / f"{name}.png")
    return result


def measured_on(device: str) -> dict[str, Any]:
    return {
        "date": time.strftime("%F"),
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), **_installed()},
    }


def device_name(device: str) -> str:
    if device == "cuda":
        import torch  # takes seconds

        return torch.cuda.get_device_name()
    names = [platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    return f"{len(os.sched_getaffinity(0))} cores of {names[0]}"


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _save(draw: Draw, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path}: not drawn, there is no matplotlib", file=sys.stderr)
        return
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(path, dpi=130)


def bars(panels: Mapping[str, Mapping[str, Sequence[float]]], unit: str, title: str, *, columns: int = 4) -> Draw:
    """Draws a panel for each title, in it a bar for each name: the median of its readings, with whiskers from the least
    to the most. Ours are orange."""

    def draw(figure: "Figure") -> None:
        across = min(columns, len(panels))
        down = -(-len(panels) // across)
        most = max(map(len, panels.values()))
        figure.set_size_inches(max(4.5, 3.2 * across), down * (0.32 * most + 0.9) + 0.3)
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for ax, (name, of) in zip(axes, panels.items(), strict=False):
            medians = [statistics.median(readings) for readings in of.values()]
            whiskers = [
                [middle - min(readings) for middle, readings in zip(medians, of.values(), strict=True)],
                [max(readings) - middle for middle, readings in zip(medians, of.values(), strict=True)],
            ]
            colours = ["tab:orange" if each.startswith("ours") else "tab:gray" for each in of]
            have_spread = any(len(readings) > 1 for readings in of.values())
            drawn = ax.barh(list(of), medians, xerr=whiskers if have_spread else None, color=colours, capsize=2)
            ax.bar_label(drawn, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}", padding=4)
            ax.set_xlim(right=1.2 * max(max(readings) for readings in of.values()))
            ax.invert_yaxis()
            ax.set_title(name, fontsize=10)
            ax.set_xlabel(unit)
            ax.spines[["top", "right"]].set_visible(False)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        figure.suptitle(title, fontsize=9)

    return draw
