"""Writes scenes of handwritten digits on photographs, in the layouts of ADE20K and COCO, as data for dense tasks; and
their digits one by one, for pretraining.

python launch/scenes.py --out DIR [--train 400] [--val 100] [--seed 0] [--sides 160-320] [--classes 0-9]

Digits are scikit-learn's scans, from 16 to 200 pixels large; photographs are those that scikit-learn and scikit-image
bring with them, so nothing is downloaded. DIR/ATTRIBUTION.txt names their authors and licences: keep it with the
pictures. The same arguments give the same bytes.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cli, files
from pipeline.commands.digits import digit_range
from pipeline.errors import InputError, needing

if TYPE_CHECKING:
    from pipeline.scenes.photographs import Split

MIN_SIDE_PX, MAX_SIDE_PX = 128, 512


def main() -> dict[str, Any]:
    parser = cli.make_parser("launch/scenes.py", "Write scenes as data for dense tasks.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--train", type=non_negative_number, default=400, metavar="N", help="number of training scenes (default 400)"
    )
    parser.add_argument(
        "--val", type=non_negative_number, default=100, metavar="N", help="number of validation scenes (default 100)"
    )
    parser.add_argument("--seed", type=non_negative_number, default=0, help="default 0")
    parser.add_argument(
        "--sides", default="160-320", metavar="A-B", help="range of the scenes' sides in pixels (default 160-320)"
    )
    parser.add_argument("--classes", default="0-9", metavar="A-B", help="range of digits (default 0-9)")
    arguments = parser.parse_args()
    classes = digit_range(arguments.classes)
    out: Path = arguments.out
    sides = _parse_sides(arguments.sides)
    files.require_empty(out)
    # These take seconds to import, which --help and wrong usage do without.
    from tqdm import tqdm

    with needing("scenes", "launch/scenes.py"):
        from pipeline.scenes import write_dataset

    counts: dict[Split, int] = {"train": arguments.train, "val": arguments.val}
    # A command that was interrupted must not leave a folder that looks complete.
    partial = files.partial_of(out.resolve())
    with tqdm(total=sum(counts.values()), desc="composing", unit="img", file=sys.stderr, disable=None) as bar:
        shutil.rmtree(partial, ignore_errors=True)
        instances = write_dataset.write_dataset(partial, counts, arguments.seed, sides, classes, bar.update)
    partial.replace(out.resolve())
    return {"out": str(out), **counts, "instances": instances}


def _parse_sides(text: str) -> tuple[int, int]:
    """Returns the smallest and the largest side. Raises InputError."""
    match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text)
    if not match or not MIN_SIDE_PX <= int(match[1]) <= int(match[2]) <= MAX_SIDE_PX:
        raise InputError(f"--sides {text}: expected A-B with {MIN_SIDE_PX} <= A <= B <= {MAX_SIDE_PX}, such as 160-320")
    return int(match[1]), int(match[2])


def non_negative_number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number
