"""Lists ImageNet-1k (ILSVRC2012) as it is distributed: archives, which are never unpacked, or Kaggle's folders.

    ILSVRC2012_img_train.tar, a tar with a tar for each class  ┐
    ILSVRC2012_img_val.tar, flat                               ├──find──▶ listings of train and val
    ILSVRC2012_devkit_t12.tar.gz: the class of each val image  │
    ILSVRC/Data/CLS-LOC/{train,val}, LOC_val_solution.csv      ┘

Classes are WordNet ids in sorted order, as torchvision and timm have the class folders that others unpack. The devkit
numbers them from 1, in an order of its own.
"""

import csv
import gzip
import io
import logging
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NoReturn, cast

from pipeline import files
from pipeline.errors import InputError
from pipeline.shards import image_sources
from pipeline.shards.bad_samples import first_few
from pipeline.shards.foreign_tars import Skimmer, Tar, list_scans, scan_tars
from pipeline.shards.image_listing import ImageEntry, ImageListing, make_listing
from pipeline.shards.own_images import TRAINING, VALIDATION
from pipeline.shards.part_names import USUAL
from pipeline.shards.tar import Reader, TarError, members

log = logging.getLogger(__name__)

NUM_CLASSES = 1000
NUM_IMAGES = {TRAINING: 1_281_167, VALIDATION: 50_000}

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
KAGGLE = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"

_MD5 = {
    TRAIN_TAR: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_TAR: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_MAX_DEVKIT_BYTES = 64 << 20
_MAX_SOLUTION_BYTES = 64 << 20


def find(folder: Path, classes: list[str] | None, workers: int) -> dict[str, ImageListing]:
    """Returns the listings of TRAINING and VALIDATION, or of the one that is there. `classes` fixes the class list.

    Raises InputError where neither is there, and where anything differs from ImageNet-1k.
    """
    finders = [
        (TRAINING, folder / TRAIN_TAR, _find_train_tar),
        (TRAINING, folder / KAGGLE / "train", _find_train_folders),
        (VALIDATION, folder / VAL_TAR, _find_val_tar),
        (VALIDATION, folder / KAGGLE / "val", _find_val_folder),
    ]
    listings: dict[str, ImageListing] = {}
    for split, path, find_split in finders:
        if split not in listings and path.exists():
            listings[split] = find_split(path, classes, workers)
            _check_counts(path, split, listings[split])
    if not listings:
        raise InputError(
            f"{folder}: no ImageNet: expected {TRAIN_TAR}, {VAL_TAR} and {DEVKIT} from image-net.org, or "
            f"{KAGGLE}/train and val with {SOLUTION} from Kaggle; a tree of class folders is packed by pack --images"
        )
    for split in NUM_IMAGES.keys() - listings.keys():
        log.warning(f"{folder}: has nothing of {split}, so {' and '.join(listings)} alone is packed")
    _check_classes(folder, [listing.classes for listing in listings.values()])
    return listings


def _check_counts(path: Path, split: str, listing: ImageListing) -> None:
    expected = NUM_IMAGES[split], NUM_CLASSES
    found = len(listing.entries), len(listing.classes)
    if found != expected:
        problem = (
            f"{found[0]:,} images of {found[1]:,} classes can be used; ImageNet-1k (ILSVRC2012) has {expected[0]:,} "
            f"of {expected[1]:,} in {split}"
        )
        if listing.bad:
            problem += f":\n{first_few(listing.bad)}\n"
        _refuse(path, problem)


def _check_classes(folder: Path, classes: list[list[str]]) -> None:
    if classes[0] != classes[-1]:
        others = sorted(set(classes[0]) ^ set(classes[-1]))
        raise InputError(
            f"{folder}: training and validation have different classes, {others[0]} among them: the files are of "
            "different years or sets: fetch those of ILSVRC2012's tasks 1 and 2"
        )


def _refuse(path: Path, problem: str) -> NoReturn:
    checksum = f", whose MD5 is {_MD5[path.name]}" if path.name in _MD5 else ""
    raise InputError(f"{path}: {problem}: it is incomplete or of another year: fetch ILSVRC2012's again{checksum}")


def _find_train_tar(path: Path, classes: list[str] | None, workers: int) -> ImageListing:
    tars = []
    try:
        with path.open("rb") as stream:
            for member in members(Skimmer(stream)):
                match = re.fullmatch(r"(?:.*/)?(n\d{8})\.tar", member.name)
                if not match:
                    _refuse(path, f"holds {member.name!r}, and not a tar for each class, such as n01440764.tar")
                tars.append(Tar(str(path.parent), path.name, match[1], USUAL, member.offset, member.size))
    except (OSError, TarError) as error:
        _refuse(path, str(error))
    tars.sort(key=lambda tar: tar.prefix)
    scans = scan_tars(tars, workers)
    for scan in scans:
        scan.labels = [scan.tar.prefix] * len(scan.keys)
    return list_scans(scans, classes or [tar.prefix for tar in tars], str(path))


def _find_train_folders(path: Path, classes: list[str] | None, workers: int) -> ImageListing:
    return image_sources.find(path, classes)


def _find_val_tar(path: Path, classes: list[str] | None, workers: int) -> ImageListing:
    wnids = _read_devkit(path.with_name(DEVKIT))
    scans = scan_tars([Tar(str(path.parent), path.name, VALIDATION, USUAL)], workers)
    for scan in scans:
        scan.labels = list(map(wnids.get, scan.keys))
    return list_scans(scans, classes or sorted(set(wnids.values())), str(path))


def _find_val_folder(path: Path, classes: list[str] | None, workers: int) -> ImageListing:
    solution = path.parents[len(KAGGLE.parts)] / SOLUTION
    wnids = {}
    try:
        text = files.read(solution, _MAX_SOLUTION_BYTES).decode()
        for row in csv.DictReader(io.StringIO(text)):
            # A box follows each class: WNID X Y X Y.
            wnids[row["ImageId"]], *_ = row["PredictionString"].split()
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{solution}: cannot be read as the classes of {path}: {error}: fetch it from Kaggle, as a table of "
            "ImageId,PredictionString"
        ) from error
    classes = classes or sorted(set(wnids.values()))
    labels = {name: number for number, name in enumerate(classes)}
    entries = []
    for image in sorted(path.glob("*.JPEG")):
        if wnids.get(image.stem) in labels:
            entries.append(ImageEntry(f"{VALIDATION}/{image.stem}", str(image), labels[wnids[image.stem]]))
    return make_listing(classes, entries)


def _read_devkit(path: Path) -> Mapping[str, str]:
    """Returns the WordNet id of each validation image, by its name without extension. Raises InputError."""
    if not path.exists():
        raise InputError(
            f"{path}: no such file, and {VAL_TAR} has no labels without it: fetch it, its MD5 is {_MD5[DEVKIT]}, or "
            f"move {VAL_TAR} away to pack training alone"
        )
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream:
            reader = Reader(cast(IO[bytes], stream))
            for member in members(reader):
                _, _, name = member.name.rpartition("/")
                if name in (META, TRUTH) and member.size <= _MAX_DEVKIT_BYTES:
                    found[name] = reader.take(member.size)
    except (OSError, EOFError, TarError, zlib.error) as error:
        _refuse(path, f"cannot be read: {error}")
    for name in (META, TRUTH):
        if name not in found:
            _refuse(path, f"holds no data/{name}")
    wnid_of = _read_synsets(path, found[META])
    numbers = found[TRUTH].split()
    if len(numbers) != NUM_IMAGES[VALIDATION]:
        _refuse(path, f"has the classes of {len(numbers):,} images, and not of {NUM_IMAGES[VALIDATION]:,}")
    wnids = {}
    for number, label in enumerate(numbers, 1):
        if label not in wnid_of:
            name = label.decode(errors="replace")
            _refuse(path, f"image {number} has the class {name!r}, which {META} does not name")
        wnids[f"ILSVRC2012_val_{number:08d}"] = wnid_of[label]
    return wnids


def _read_synsets(path: Path, meta: bytes) -> dict[bytes, str]:
    """Returns the WordNet ids of the devkit's numbers, which are in decimal digits, of classes without sub-classes."""
    # Imported late, because it takes half a second.
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        wnid_of = {b"%d" % leaf["ILSVRC2012_ID"]: str(leaf["WNID"]) for leaf in leaves}
    # Damaged bytes make it raise almost anything.
    except Exception as error:
        _refuse(path, f"{META} cannot be read as a table of classes: {error}")
    if len(wnid_of) != NUM_CLASSES:
        _refuse(path, f"{META} names {len(wnid_of):,} classes, and not {NUM_CLASSES:,}")
    return wnid_of
