"""Finds the credits that have to accompany a data set's pictures wherever they are shown."""

from pathlib import Path

from pipeline import files

ATTRIBUTION = "ATTRIBUTION.txt"
"""The file beside manifest.json. Packing copies it from the folder of the images or the nearest one above."""

# From DIR/ade20k/images/training up to DIR.
_LEVELS = 4


def find_attribution(image: str | Path) -> str | None:
    """Returns the text of the ATTRIBUTION.txt in the image's folder or the nearest one above it; None without one."""
    for folder in Path(image).resolve().parents[:_LEVELS]:
        try:
            text = files.read(folder / ATTRIBUTION).decode(errors="replace").strip()
        except OSError:
            continue
        if text:
            return text
    return None
