"""Classes as people write them: names, or numbers that are positions in a list of classes."""

import re
import sys
from collections.abc import Collection

from pipeline.errors import InputError


def is_number(label: str) -> bool:
    return re.fullmatch(r"\d{1,9}", label, re.ASCII) is not None


def are_several(label: str) -> bool:
    """Whether it is several numbers, such as "1 5" of an image with several classes. A sample has one class."""
    return re.fullmatch(r"-?\d+([\s,;]+-?\d+)+", label, re.ASCII) is not None


def check_first(numbers: Collection[int], num_classes: int, where: str) -> None:
    """Raises InputError for labels that count `num_classes` classes from 1: each would mean the class after its own."""
    if numbers and min(numbers) > 0 and num_classes in numbers:
        raise InputError(
            f"{where}: labels are {min(numbers)} … {max(numbers)} of {num_classes} classes, so they count from 1, "
            "but the first class has the number 0: subtract 1 from each label, or use the names of the classes"
        )


def numbered(found: Collection[int], where: str) -> list[str]:
    """The class list "0", "1", … to the largest number found. That labels begin above 0 is reported."""
    if found and min(found) > 0:
        print(
            f"warning: {where}: labels are {min(found)} … {max(found)} and none is 0, so class 0 has no samples; "
            "if they count from 1, subtract 1 from each, or the network has an output that is never used",
            file=sys.stderr,
        )
    return [str(number) for number in range(max(found, default=-1) + 1)]
