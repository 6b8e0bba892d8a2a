"""Writes scikit-learn's digits as JPEG files in one folder for each class: the demo's images.

python launch/digits.py --out DIR [--classes 0-6]

1,797 real scans of handwritten digits (UCI "Optical Recognition of Handwritten Digits") come with scikit-learn, so
nothing is downloaded. Every fifth goes to DIR/val, the others to DIR/train.
"""

import re
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.errors import InputError

SIZE_PX = 32


def main() -> dict[str, Any]:
    parser = cli.make_parser("launch/digits.py", "Write the demo's images.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", default="0-9", metavar="A-B", help="range of digits (default 0-9)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    classes = digit_range(arguments.classes)
    # Imported late: they take seconds, which --help and wrong usage do without.
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    counts = {"train": 0, "val": 0}
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label not in classes:
            continue
        # The same split for every range of digits.
        split = "val" if number % 5 == 0 else "train"
        path = out / split / str(label) / f"digit-{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # The scans have grey values from 0 to 16.
        image = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
        image = image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
        image.save(path, quality=95)
        counts[split] += 1
    return {"images": str(out), **counts}


def digit_range(text: str) -> range:
    """Returns the digits that "A-B" names. Raises InputError."""
    match = re.fullmatch(r"([0-9])-([0-9])", text)
    if not match or match[1] > match[2]:
        raise InputError(f"--classes {text}: expected A-B with digits A <= B, such as 0-6")
    return range(int(match[1]), int(match[2]) + 1)
