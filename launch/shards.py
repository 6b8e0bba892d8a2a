"""Make and check data sets.

python launch/shards.py pack --images DIR --out DIR [--classes-from DIR]
python launch/shards.py verify DIR
"""

import argparse
from pathlib import Path
from typing import Any

from launch import command
from pipeline.shards.index import read_manifest
from pipeline.shards.pack import pack
from pipeline.shards.verify import verify


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="launch/shards.py", description="Make and check data sets.")
    commands = parser.add_subparsers(dest="command", required=True)

    packing = commands.add_parser("pack", help="pack a class-per-folder image tree into shards")
    packing.add_argument("--images", type=Path, required=True, help="folder with one sub-folder for each class")
    packing.add_argument("--out", type=Path, required=True, help="new folder for shards, index and manifest")
    packing.add_argument("--classes-from", type=Path, metavar="DIR", help="packed data set whose class map to use")
    packing.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N")
    packing.add_argument("--seed", type=_seed, default=0, help="of the shuffle across classes")

    verifying = commands.add_parser("verify", help="compare shards with their manifest")
    verifying.add_argument("data", type=Path, help="packed data set")

    arguments = parser.parse_args()
    if arguments.command == "verify":
        faults = verify(arguments.data)
        return {"ok": not faults, "data": str(arguments.data), "faults": faults}

    classes = read_manifest(arguments.classes_from).classes if arguments.classes_from else None
    manifest = pack(
        arguments.images,
        arguments.out,
        classes=classes,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
    )
    return {
        "data": str(arguments.out),
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "classes": len(manifest.classes),
        "digest": manifest.digest,
    }


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 … 2^32 - 1")
    return number


if __name__ == "__main__":
    command.run(main)
