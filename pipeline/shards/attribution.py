"""What has to be said of a data set's pictures wherever they are shown."""

from pathlib import Path

ATTRIBUTION = "ATTRIBUTION.txt"
"""Beside manifest.json. Packing copies it from the folder of the images or the nearest one above."""

_LEVELS = 4  # from DIR/ade20k/images/training up to DIR


def attribution(root: str | Path) -> str | None:
    """The text of a local data set's, if it has one."""
    try:
        return (Path(root) / ATTRIBUTION).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def above(image: str | Path) -> str | None:
    """The text in the image's folder or the nearest one above it that has one."""
    return next(filter(None, map(attribution, Path(image).resolve().parents[:_LEVELS])), None)
