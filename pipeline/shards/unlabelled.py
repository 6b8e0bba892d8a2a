"""Lists images without labels, which are packed to be shown, measured and predicted.

    DIR/**/NAME.jpg              ┐
    LIST.csv, LIST.jsonl: path   ├──▶ ImageListing without classes
    FILE.parquet, DIR/*.parquet  ┘

Labels are not read where there are any: folders are parts of the images' keys.
"""

import dataclasses
import logging
import os
from pathlib import Path

from pipeline.errors import InputError
from pipeline.shards import image_sources, parquet
from pipeline.shards.class_folders import files_below, report_ignored
from pipeline.shards.image_listing import ImageEntry, ImageListing, key_of, list_containers, make_listing
from pipeline.shards.image_sources import EXTENSIONS

log = logging.getLogger(__name__)


def find(images: str | Path, column: str | None = None) -> ImageListing:
    """Lists the images below a folder, of a list or of Parquet files; `column` names that of images or their paths.

    Raises InputError for what cannot be listed.
    """
    path = Path(images)
    if tables := image_sources.find_tables(images):
        image = column or parquet.IMAGE
        labels: list[list[str | None]] = [[""] * parquet.count_rows(table, image) for table in tables]
        listing = list_containers(image_sources.rows_of_tables(tables, labels, image), [""], str(images))
        return dataclasses.replace(listing, classes=[], annotations="unlabelled")
    if path.is_dir():
        entries = _list_tree(path)
    else:
        rows = image_sources.read_list(image_sources.require_list(path), column or "path", label=None)
        entries = image_sources.entries_of_rows(path, rows, {"": 0})
    return make_listing([], entries, annotations="unlabelled")


def _list_tree(folder: Path) -> list[ImageEntry]:
    ignored: list[str] = []
    files = list(files_below(str(folder), ignored))
    pictures = list(filter(image_sources.is_picture, files))
    report_ignored(ignored)
    if not pictures:
        raise InputError(f"{folder}: has no image among its {len(files)} files: they end in {', '.join(EXTENSIONS)}")
    if len(pictures) < len(files):
        log.warning(f"skipped {len(files) - len(pictures)} files that are no images")
    return [ImageEntry(key_of(os.path.relpath(path, folder)), path, 0) for path in pictures]
