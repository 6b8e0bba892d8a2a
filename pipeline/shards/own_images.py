"""Recognises images that a run packs itself, and splits them into training and validation.

data.train, data.val     ──data_paths──▶ the paths of both, also of FOLDER/train and FOLDER/val
ImageListing ──split: the smallest hashes of each class──▶ two listings with the same classes
"""

import dataclasses
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig, fingerprint
from pipeline.errors import InputError
from pipeline.shards import image_sources
from pipeline.shards.ade20k import is_ade20k
from pipeline.shards.class_folders import entries_of, is_folder, refuse_flat
from pipeline.shards.image_listing import ImageListing
from pipeline.shards.manifest import MANIFEST
from pipeline.shards.spill import Container

TRAINING, VALIDATION = "train", "val"
"""The folders in which the two splits of a listing are packed."""


def is_images(path: str | Path) -> bool:
    """Returns whether a path names images that are not packed: class folders, a list or Parquet files.

    A folder of tars without a manifest is a data set that has to be indexed.
    """
    if "://" in str(path) or is_ade20k(path):
        return False
    path = Path(path)
    if path.is_dir():
        return not (path / MANIFEST).exists() and not any(path.glob("*.tar"))
    is_list = path.suffix in (".csv", ".jsonl", ".parquet")
    return is_list and (path.exists() or image_sources.is_pattern(path))


def data_paths(data: DataConfig) -> tuple[list[str], str | None]:
    """Returns the paths of a run's training data and of its validation data, None where it has none of its own.

    A folder with the splits train and val stands for both, as far as data.val does not name other ones.
    """
    splits = find_splits(data.train_paths[0]) if len(data.train) == 1 else None
    if splits is None:
        return data.train_paths, data.val or None
    training, validation = splits
    return [training], data.val or validation


def find_splits(folder: str | Path) -> tuple[str, str] | None:
    """Returns the folders of training and validation in a folder of splits; None for any other path.

    Raises InputError for images beside the splits.
    """
    if not is_images(folder) or not Path(folder).is_dir():
        return None
    entries = entries_of(str(folder), [])
    names = [entry.name for entry in entries if is_folder(entry)]
    stray = [entry.path for entry in entries if image_sources.is_picture(entry.name)]
    training = [name for name in names if re.fullmatch("train(ing)?", name, re.IGNORECASE)]
    validation = [name for name in names if re.fullmatch(image_sources.VALIDATION_NAMES, name, re.IGNORECASE)]
    # Of several it is not known which one is meant, and beside classes they are classes, too.
    if len(training) != 1 or len(validation) != 1 or not all(map(image_sources.SPLIT.fullmatch, names)):
        return None
    if stray:
        raise InputError(f"{stray[0]}: lies beside the splits {', '.join(names)}: move it into a class of one of them")
    return str(Path(folder, training[0])), str(Path(folder, validation[0]))


def check_folder(path: str | Path) -> None:
    """Raises InputError for a folder of images without class folders, before all of it is listed."""
    if not Path(path).is_dir() or image_sources.find_tables(path):
        return
    entries = entries_of(str(path), [])
    if not any(map(is_folder, entries)):
        refuse_flat(path, sum(image_sources.is_picture(entry.name) for entry in entries))


def split(listing: ImageListing, val_fraction: float) -> dict[str, ImageListing]:
    """Returns the listings of TRAINING and VALIDATION.

    Of each class, the images whose keys have the smallest hashes are for validation, at least one: the same images are
    chosen whatever the folder is called, and most of them are still when images are added. Raises InputError for
    classes of which none would remain for training.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"a validation fraction of {val_fraction:g}: expected a number between 0 and 1")
    hashes = [hashlib.sha256(os.fsencode(entry.key)).digest() for entry in listing.entries]
    members: dict[int, list[int]] = {}
    for index, entry in enumerate(listing.entries):
        members.setdefault(entry.label, []).append(index)
    chosen = np.zeros(len(hashes), bool)
    too_small = []
    for label, indices in sorted(members.items()):
        count = max(1, round(val_fraction * len(indices)))
        if count == len(indices):
            too_small.append(f"{listing.classes[label]} ({count})")
        indices.sort(key=hashes.__getitem__)
        chosen[indices[:count]] = True
    if too_small:
        raise InputError(
            f"a validation fraction of {val_fraction:g} leaves nothing to train on of the classes "
            f"{', '.join(too_small)}: add images of them, remove these classes, or take a smaller fraction"
        )
    return {
        TRAINING: _take(listing, ~chosen, [TRAINING, val_fraction]),
        VALIDATION: _take(listing, chosen, [VALIDATION, val_fraction]),
    }


def _take(listing: ImageListing, chosen: npt.NDArray[np.bool_], choice: list[str | float]) -> ImageListing:
    """Returns the listing of the entries where `chosen`, [entries], is true; `choice` identifies them."""
    containers = []
    start = 0
    for container in listing.containers:
        end = start + len(container.rows)
        rows = container.rows[chosen[start:end]]
        if len(rows):
            containers.append(Container(container.source, rows))
        start = end
    return dataclasses.replace(
        listing,
        entries=[listing.entries[index] for index in np.flatnonzero(chosen)],
        digest=fingerprint([listing.digest, choice]),
        containers=containers,
    )
