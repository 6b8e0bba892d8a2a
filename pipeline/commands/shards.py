"""Make, check and look at data sets.

python launch/shards.py pack --images SOURCE --out DIR     images into shards
python launch/shards.py pack --ade20k MAPS --out DIR       images with a class for each pixel
python launch/shards.py pack --coco FILE.json --out DIR    images with boxes and masks of objects
python launch/shards.py index ROOT                         tars that others made, as they are
python launch/shards.py verify ROOT                        every byte against the manifest
python launch/shards.py show ROOT                          counts, sizes and a contact sheet
python launch/shards.py preview --config FILE              what a run's augmentation makes of its images
"""

import argparse
import contextlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.cli import Subcommand
from pipeline.config import load_config
from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.shards import ade20k, coco
from pipeline.shards.bad_samples import SampleFault, first_few, read_skipped
from pipeline.shards.filesystems import split_query
from pipeline.shards.image_sources import ImageListing
from pipeline.shards.index import Manifest, read_manifest
from pipeline.shards.index_tars import index_tars
from pipeline.shards.pack import pack
from pipeline.shards.process_pool import cores
from pipeline.shards.verify import verify

LISTED = 20
"""Skipped images in the result of pack and index; OUT/skipped.jsonl has all."""


def main() -> dict[str, Any]:
    return cli.choose("launch/shards.py", "Make, check and look at data sets.", SUBCOMMANDS)


def _pack_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        metavar="SOURCE",
        help="folder with one sub-folder for each class; .csv or .jsonl list of path and label; "
        ".parquet file, folder of them or pattern in quotes; with --ade20k or --coco a folder "
        "(default ROOT/images/SPLIT or ROOT/SPLIT)",
    )
    parser.add_argument(
        "--ade20k",
        metavar="MAPS",
        help="ROOT/annotations/SPLIT: folder of label maps; their classes are named in ROOT/objectInfo150.txt",
    )
    parser.add_argument("--coco", metavar="FILE.json", help="ROOT/annotations/instances_SPLIT.json: boxes and masks")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for shards and manifest")
    _add_shared(parser)
    parser.add_argument("--max-side", type=_positive, metavar="PX", help="scale images with a longer side down")
    parser.add_argument("--quality", type=_within(1, 100), metavar="Q", help="of JPEGs made by packing (default 90)")
    parser.add_argument(
        "--bits-stored",
        type=_within(8, 16),
        metavar="N",
        help="scale 16-bit images whose values are 0 ... 2^N - 1 to 8 bits; they become PNGs, or JPEGs as others do",
    )
    parser.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--seed", type=_within(0, 2**32 - 1), default=0, help="of the shuffle across classes")


def _pack(arguments: Namespace) -> dict[str, Any]:
    classes = _classes(arguments)
    manifest = pack(
        _source(arguments, classes),
        arguments.out,
        classes=classes,
        max_side=arguments.max_side,
        quality=arguments.quality,
        bits_stored=arguments.bits_stored,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        skip_bad=arguments.skip_bad,
        workers=arguments.workers,
    )
    return {"data": str(arguments.out), **_counts(manifest), **_skipped(read_skipped(arguments.out))}


def _source(arguments: Namespace, classes: list[str] | None) -> str | ImageListing:
    if arguments.ade20k and arguments.coco:
        raise InputError("pack: --ade20k and --coco name data sets of different kinds: give one of them")
    if arguments.ade20k:
        return ade20k.find(arguments.ade20k, arguments.images, classes)
    if arguments.coco:
        return coco.find(arguments.coco, arguments.images, classes)
    if arguments.images:
        return arguments.images
    raise InputError(
        "pack: give --images SOURCE, or --ade20k ROOT/annotations/SPLIT, "
        "or --coco ROOT/annotations/instances_SPLIT.json"
    )


def _index_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("root", help="folder or URL of .tar files, or a pattern in quotes: DIR/train-{000..146}.tar")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where indices and manifest go if not beside the tars")
    parser.add_argument("--labels", default="auto", help="auto (default), cls, json:FIELD or folder")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="trust what the images' headers say")
    _add_shared(parser)


def _index(arguments: Namespace) -> dict[str, Any]:
    manifest, faults = index_tars(
        arguments.root,
        arguments.out,
        labels=arguments.labels,
        classes=_classes(arguments),
        skip_bad=arguments.skip_bad,
        decode=arguments.decode,
        workers=arguments.workers,
    )
    if manifest is None:
        return {"data": redact(arguments.root), **_faults(faults)}
    return {
        "data": redact(str(arguments.out or arguments.root)),
        **_counts(manifest),
        **_skipped([fault._asdict() for fault in faults]),
    }


def _verify_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("root", help="folder or URL of a data set")
    parser.add_argument("--deep", action="store_true", help="also decode every image and annotation")
    _add_workers(parser)


def _verify(arguments: Namespace) -> dict[str, Any]:
    faults = verify(arguments.root, deep=arguments.deep, workers=arguments.workers)
    return {"data": redact(arguments.root), **_faults(faults)}


def _show_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("root", help="folder or URL of a data set")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="contact sheet (default ./ROOT-sheet.png)")
    parser.add_argument("--seed", type=_within(0, 2**32 - 1), default=0, help="of the choice of samples")


def _show(arguments: Namespace) -> dict[str, Any]:
    from pipeline.shards.show_dataset import show_dataset, table  # matplotlib takes a second to import

    sheet = arguments.out or Path(f"{Path(split_query(arguments.root)[0]).absolute().name}-sheet.png")
    summary = show_dataset(arguments.root, sheet, arguments.seed)
    print(table(summary), file=sys.stderr)
    return summary


def _preview_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default ./NAME-preview.png, NAME as in run.name")


def _preview(arguments: Namespace) -> dict[str, Any]:
    config = load_config(arguments.config, arguments.set)
    # The feed's libraries take seconds to import, and the other commands do without them.
    from pipeline.feed.preview import preview
    from pipeline.shards.open_data import open_training

    with contextlib.closing(open_training(config.data)) as shards:
        return preview(config, shards, arguments.out or Path(f"{config.run.name}-preview.png"))


SUBCOMMANDS = {
    "pack": Subcommand("pack images into shards", _pack_arguments, _pack),
    "index": Subcommand("index tars that others made, without rewriting them", _index_arguments, _index),
    "verify": Subcommand("compare shards with their manifest", _verify_arguments, _verify),
    "show": Subcommand("print counts, balance and sizes, and draw a contact sheet", _show_arguments, _show),
    "preview": Subcommand("draw what a run's augmentation makes of its images", _preview_arguments, _preview),
}


def _add_shared(parser: ArgumentParser) -> None:
    parser.add_argument("--classes-from", metavar="ROOT", help="data set whose class list to use")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be used and list it")
    _add_workers(parser)


def _add_workers(parser: ArgumentParser) -> None:
    parser.add_argument("--workers", type=_positive, default=cores(), metavar="N", help="processes (default: cores)")


def _classes(arguments: Namespace) -> list[str] | None:
    return read_manifest(arguments.classes_from).classes if arguments.classes_from else None


def _counts(manifest: Manifest) -> dict[str, Any]:
    return {
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "classes": len(manifest.classes),
        "digest": manifest.digest,
    }


def _skipped(faults: list[dict[str, Any]]) -> dict[str, Any]:
    return {"num_skipped": len(faults), "skipped": faults[:LISTED]}


def _faults(faults: list[SampleFault]) -> dict[str, Any]:
    if faults:
        print(f"{len(faults)} faults:\n{first_few(faults)}", file=sys.stderr)
    return {"ok": not faults, "faults": [fault._asdict() for fault in faults]}


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _within(low: int, high: int) -> Callable[[str], int]:
    """Returns what turns an argument into a number from `low` to `high`."""

    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} … {high}")
        return int(text)

    return number
