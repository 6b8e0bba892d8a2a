"""Interprets labels as people write them: class names, or numbers that are positions in a class list."""

import logging
import re
from collections.abc import Collection

from pipeline.errors import InputError

log = logging.getLogger(__name__)

UNLABELLED_REMEDY = "images without labels are packed with --unlabelled, to be shown and predicted"


def is_number(label: str) -> bool:
    return re.fullmatch(r"\d{1,9}", label, re.ASCII) is not None


def are_several(label: str) -> bool:
    """Returns whether a label is several numbers, such as "1 5" for an image with several classes.

    A sample has one class, so such labels are rejected.
    """
    return re.fullmatch(r"-?\d+([\s,;]+-?\d+)+", label, re.ASCII) is not None


def check_first(numbers: Collection[int], num_classes: int, where: str) -> None:
    """Raises InputError for labels that count `num_classes` classes from 1: each would mean the class after its own."""
    smallest = min(numbers, default=0)
    if smallest > 0 and num_classes in numbers:
        raise InputError(
            f"{where}: labels are {smallest} … {max(numbers)} of {num_classes} classes, so they count from 1, "
            "but the first class has the number 0: subtract 1 from each label, or use the names of the classes"
        )


def number_names(numbers: Collection[int], where: str) -> list[str]:
    """Returns the class list "0", "1", … up to the largest of the labels' numbers, and warns if none of them is 0."""
    smallest = min(numbers, default=0)
    largest = max(numbers, default=-1)
    if smallest > 0:
        log.warning(
            f"{where}: labels are {smallest} … {largest} and none is 0, so class 0 has no samples; "
            "if they count from 1, subtract 1 from each, or the network has an output that is never used"
        )
    return [str(number) for number in range(largest + 1)]
