"""Write scikit-learn's digits as a class-per-folder JPEG tree: the demo's images.

python launch/digits.py --out DIR

1,797 real scans of handwritten digits (UCI "Optical Recognition of Handwritten Digits") come with scikit-learn, so
nothing is downloaded. Every fifth goes to DIR/val, the others to DIR/train.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from launch import command

SIZE_PX = 32


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="launch/digits.py", description="Write the demo's images.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    digits: Any = load_digits()
    counts = {"train": 0, "val": 0}
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if number % 5 == 0 else "train"
        path = out / split / str(label) / f"digit-{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
        image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC).save(path, quality=95)
        counts[split] += 1
    return {"images": str(out), **counts}


if __name__ == "__main__":
    command.run(main)
