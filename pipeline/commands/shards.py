"""Makes, verifies and shows data sets.

python launch/shards.py pack --images SOURCE --out DIR     images into shards
python launch/shards.py pack --tars URL … --out DIR        tars that cannot be used as they are
python launch/shards.py pack --imagenet FOLDER --out DIR   ImageNet-1k's archives, into DIR/train and DIR/val
python launch/shards.py pack --ade20k MAPS --out DIR       images with a class for each pixel
python launch/shards.py pack --coco FILE.json --out DIR    images with boxes and masks of objects
python launch/shards.py index ROOT                         existing tars, without rewriting them
python launch/shards.py verify ROOT                        every byte against the manifest
python launch/shards.py show ROOT                          counts, sizes and a contact sheet
python launch/shards.py stats DATA [OTHER ...]             means, sizes, suspicious images and duplicates
python launch/shards.py preview --config FILE              a run's images after augmentation
"""

import argparse
import contextlib
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline import cli, files
from pipeline.cli import Subcommand
from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.shards import ade20k, coco, foreign_tars, image_sources, imagenet, own_images, unlabelled
from pipeline.shards.bad_samples import SampleFault, first_few, read_skipped
from pipeline.shards.filesystems import split_query
from pipeline.shards.image_listing import ImageListing
from pipeline.shards.index_tars import index_tars, packing_line
from pipeline.shards.manifest import Manifest, read_classes, read_manifest
from pipeline.shards.pack import pack
from pipeline.shards.part_names import NO_LABEL, USUAL, PartNames
from pipeline.shards.process_pool import cores
from pipeline.shards.scan_tar import REPACK
from pipeline.shards.verify import verify

LISTED = 20
"""The maximum number of skipped images in the result of pack and index; OUT/skipped.jsonl lists all."""


def main() -> dict[str, Any]:
    return cli.choose("launch/shards.py", "Make, verify and show data sets.", SUBCOMMANDS)


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
    parser.add_argument(
        "--tars",
        nargs="+",
        metavar="URL",
        help="folders or URLs of tars, compressed or not, patterns in quotes: 'DIR/train-{000..146}.tar.gz', "
        "'DIR/*.tar'; or 'pipe:COMMAND', whose output is a tar",
    )
    parser.add_argument(
        "--imagenet",
        type=Path,
        metavar="FOLDER",
        help="ImageNet-1k: ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz; or "
        "ILSVRC/ and LOC_val_solution.csv from Kaggle",
    )
    _add_names(parser, "--label")
    parser.add_argument("--coco", metavar="FILE.json", help="ROOT/annotations/instances_SPLIT.json: boxes and masks")
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="do not read labels: SOURCE is any folder, a list of paths or .parquet files; also with --tars",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for shards and manifest")
    _add_shared(parser)
    parser.add_argument("--val-fraction", type=float, metavar="F", help="make DIR/train and DIR/val, F of each class")
    parser.add_argument("--max-side", type=positive_number, metavar="PX", help="scale images with a longer side down")
    parser.add_argument(
        "--quality", type=number_within(1, 100), metavar="Q", help="quality of JPEGs made by packing (default 90)"
    )
    parser.add_argument(
        "--bits-stored",
        type=number_within(8, 16),
        metavar="N",
        help="scale 16-bit images whose values are 0 ... 2^N - 1 to 8 bits, and store them as PNG, or as JPEG where "
        "8-bit images are",
    )
    parser.add_argument("--samples-per-shard", type=positive_number, default=1000, metavar="N", help="default 1000")
    parser.add_argument(
        "--seed", type=number_within(0, 2**32 - 1), default=0, help="seed of the shuffle across classes"
    )


def _pack(arguments: Namespace) -> dict[str, Any]:
    if arguments.unlabelled:
        _refuse_labels(arguments)
    # Before a listing that may take long.
    files.require_empty(arguments.out)
    classes = _read_classes(arguments)
    source = _find_source(arguments, classes)
    splits = [""] if arguments.val_fraction is None else [own_images.TRAINING, own_images.VALIDATION]
    if isinstance(source, Mapping):
        splits = list(source)
    manifest = pack(
        source,
        arguments.out,
        classes=classes,
        val_fraction=arguments.val_fraction,
        max_side=arguments.max_side,
        quality=arguments.quality,
        bits_stored=arguments.bits_stored,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        skip_bad=arguments.skip_bad,
        workers=arguments.workers,
    )
    skipped = read_skipped(arguments.out)
    data = arguments.out
    result = {"data": str(data), **_count_contents(manifest)}
    if len(splits) > 1:
        result["val"] = _count_contents(read_manifest(data / own_images.VALIDATION))
    data /= splits[0]
    cli.show(_describe_contents(data, manifest, len(skipped)))
    return {**result, **_summarise_skipped(skipped)}


def _find_source(
    arguments: Namespace,
    classes: list[str] | None,
) -> ImageListing | Mapping[str, ImageListing]:
    """Returns the source of the images. Raises InputError where the options name none or several."""
    layouts = [name for name in ("ade20k", "coco", "imagenet", "tars") if getattr(arguments, name)]
    has_splits = bool(layouts) and layouts != ["tars"]
    if arguments.val_fraction is not None and has_splits:
        raise InputError("pack: --val-fraction splits images with a class each: pack the SPLITs of these data sets")
    if len(layouts) > 1:
        raise InputError(f"pack: --{layouts[0]} and --{layouts[1]} name data sets of different kinds: give one of them")
    names = PartNames(arguments.image, NO_LABEL if arguments.unlabelled else arguments.label)
    if has_splits and names != USUAL:
        raise InputError(f"pack: --image and --label name columns or members, which --{layouts[0]} has none of")
    if arguments.ade20k:
        return ade20k.find(arguments.ade20k, arguments.images, classes)
    if arguments.coco:
        return coco.find(arguments.coco, arguments.images, classes)
    if arguments.images and layouts:
        raise InputError(f"pack: --images and --{layouts[0]} both name the images: give one of them")
    if arguments.imagenet:
        return imagenet.find(arguments.imagenet, classes, arguments.workers)
    if arguments.tars:
        return foreign_tars.find(arguments.tars, names, classes, arguments.workers)
    if arguments.images:
        if arguments.unlabelled:
            return unlabelled.find(arguments.images, arguments.image)
        return image_sources.find(arguments.images, classes, names)
    raise InputError(
        "pack: give --images SOURCE, or --ade20k ROOT/annotations/SPLIT, "
        "or --coco ROOT/annotations/instances_SPLIT.json, or --tars URL, or --imagenet FOLDER"
    )


def _refuse_labels(arguments: Namespace) -> None:
    """Raises InputError for options that are about labels beside --unlabelled."""
    for option in ("ade20k", "coco", "imagenet", "val_fraction", "classes_from", "label"):
        if getattr(arguments, option, None) not in (None, NO_LABEL):
            name = option.replace("_", "-")
            raise InputError(f"--{name} needs labels, and --unlabelled reads none: give one of them")


def _index_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("root", help="folder or URL of .tar files, or a pattern in quotes: DIR/train-{000..146}.tar")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for indices and manifest (default: beside the tars)"
    )
    _add_names(parser, "--label", "--labels")
    parser.add_argument(
        "--unlabelled", dest="label", action="store_const", const=NO_LABEL, help="as --labels none: without labels"
    )
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="read only the headers of images")
    _add_shared(parser)


def _index(arguments: Namespace) -> dict[str, Any]:
    if arguments.label == NO_LABEL:
        _refuse_labels(arguments)
    manifest, faults = index_tars(
        arguments.root,
        arguments.out,
        labels=arguments.label or "auto",
        image=arguments.image,
        classes=_read_classes(arguments),
        skip_bad=arguments.skip_bad,
        decode=arguments.decode,
        workers=arguments.workers,
    )
    # Without --skip-bad one fault is enough to write no manifest.
    if manifest is None:
        result = _report_faults(faults)
        if any(fault.reason.endswith(REPACK) for fault in faults):
            line = packing_line(arguments.root, PartNames(arguments.image, arguments.label))
            cli.show(f"tars that cannot be used as they are can be packed:\n  {line}")
        return {"data": redact(arguments.root), **result}
    return {
        "data": redact(str(arguments.out or arguments.root)),
        **_count_contents(manifest),
        **_summarise_skipped([fault._asdict() for fault in faults]),
    }


def _verify_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("root", help="folder or URL of a data set")
    parser.add_argument("--deep", action="store_true", help="also decode every image and annotation")
    _add_workers(parser)


def _verify(arguments: Namespace) -> dict[str, Any]:
    faults = verify(arguments.root, deep=arguments.deep, workers=arguments.workers)
    return {"data": redact(arguments.root), **_report_faults(faults)}


def _show_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("root", help="folder or URL of a data set")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="contact sheet (default ./ROOT-sheet.png)")
    parser.add_argument("--seed", type=number_within(0, 2**32 - 1), default=0, help="seed of the choice of samples")


def _show(arguments: Namespace) -> dict[str, Any]:
    # Imported late: matplotlib takes a second to import.
    from pipeline.shards.show_dataset import format_summary, show_dataset

    sheet = arguments.out or _name_picture(arguments.root, "sheet")
    summary = show_dataset(arguments.root, sheet, arguments.seed)
    cli.show(format_summary(summary))
    return summary


def _stats_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", help="folders or URLs of data sets: training, validation …")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="picture (default ./DATA-stats.png)")
    cli.add_cache(parser)
    _add_workers(parser)


def _stats(arguments: Namespace) -> dict[str, Any]:
    # Imported late: matplotlib takes a second to import.
    from pipeline.shards.dataset_stats import format_stats, make_stats

    picture = arguments.out or _name_picture(arguments.data[0], "stats")
    # Before every image is decoded, which may take hours.
    if not os.access(picture.parent, os.W_OK):
        raise InputError(f"--out {picture}: cannot be written: name a file in a folder that can")
    result = make_stats(arguments.data, picture, cli.cache_of(arguments), arguments.workers)
    cli.show(format_stats(result))
    return result


def _name_picture(root: str, kind: str) -> Path:
    # The query of a URL may contain a secret.
    location, _ = split_query(root)
    return Path(f"{Path(location).absolute().name}-{kind}.png")


def _preview_arguments(parser: ArgumentParser) -> None:
    cli.add_config(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.png", help="default ./NAME-preview.png with NAME from run.name"
    )


def _preview(arguments: Namespace) -> dict[str, Any]:
    config = cli.read_config(arguments)
    # Imported late: the feed's libraries take seconds to import, and the other commands do not need them.
    from pipeline.feed.preview import preview
    from pipeline.shards.open_data import open_training

    out = arguments.out or Path(f"{config.run.name}-preview.png")
    with contextlib.closing(open_training(config.data)) as shards:
        return preview(config, shards, out)


SUBCOMMANDS = {
    "pack": Subcommand("pack images into shards", _pack_arguments, _pack),
    "index": Subcommand("index existing tars, without rewriting them", _index_arguments, _index),
    "verify": Subcommand("compare shards with their manifest", _verify_arguments, _verify),
    "show": Subcommand("print counts, balance and sizes, and draw a contact sheet", _show_arguments, _show),
    "stats": Subcommand("measure every image, and find suspicious ones and duplicates", _stats_arguments, _stats),
    "preview": Subcommand("draw a run's images after augmentation", _preview_arguments, _preview),
}


def _add_names(parser: ArgumentParser, *label: str) -> None:
    parser.add_argument(
        "--image",
        "--image-column",
        metavar="NAME",
        help="column of the images or of their paths; in tars, what follows a sample's key, such as input.jpg",
    )
    parser.add_argument(
        *label,
        "--label-column",
        metavar="NAME",
        help="column of the labels; in tars cls, folder, json:FIELD, json:a.b or another member (default: as found)",
    )


def _add_shared(parser: ArgumentParser) -> None:
    parser.add_argument("--classes-from", metavar="ROOT", help="data set whose class list to use")
    parser.add_argument("--skip-bad", action="store_true", help="skip images that cannot be used, and list them")
    _add_workers(parser)


def _add_workers(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=positive_number, default=cores(), metavar="N", help="processes (default: cores)"
    )


def _read_classes(arguments: Namespace) -> list[str] | None:
    return read_classes(arguments.classes_from) if arguments.classes_from else None


def _count_contents(manifest: Manifest) -> dict[str, Any]:
    return {
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "classes": len(manifest.classes),
        "digest": manifest.digest,
    }


def _describe_contents(data: Path | str, manifest: Manifest, num_skipped: int) -> str:
    skipped = f", {num_skipped:,} skipped" if num_skipped else ""
    samples = f"{manifest.samples:,} samples of {len(manifest.classes):,} classes"
    if manifest.annotations == "unlabelled":
        samples = f"{manifest.samples:,} images without labels"
    return (
        f"{data}: {samples} in {len(manifest.shards):,} shards{skipped}"
        f"\nlook at them: python launch/shards.py show {data}"
    )


def _summarise_skipped(faults: list[dict[str, Any]]) -> dict[str, Any]:
    return {"num_skipped": len(faults), "skipped": faults[:LISTED]}


def _report_faults(faults: list[SampleFault]) -> dict[str, Any]:
    if faults:
        cli.show(f"{len(faults)} faults:\n{first_few(faults)}")
    return {"ok": not faults, "faults": [fault._asdict() for fault in faults]}


# argparse shows the names of these functions where a text is no number.


def positive_number(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def number_within(low: int, high: int) -> Callable[[str], int]:
    """Returns a function that converts an argument to a number from `low` to `high`."""

    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} … {high}")
        return value

    return number
