"""What has to be said of a data set's pictures wherever they are shown."""

from pathlib import Path

from pipeline import files

ATTRIBUTION = "ATTRIBUTION.txt"
"""Beside manifest.json. Packing copies it from the folder of the images or the nearest one above."""

_LEVELS = 4  # from DIR/ade20k/images/training up to DIR


def find_attribution(image: str | Path) -> str | None:
    """The text in the image's folder or the nearest one above it that has one."""
    for folder in Path(image).resolve().parents[:_LEVELS]:
        try:
            text = files.read(folder / ATTRIBUTION).decode(errors="replace").strip()
        except OSError:
            continue
        if text:
            return text
    return None
