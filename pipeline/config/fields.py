"""Types of single settings: bounded numbers, text that matches a pattern, lengths of training, RandAugment."""

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator

Positive = Annotated[float, Field(gt=0.0)]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


@dataclasses.dataclass(frozen=True)
class Length:
    """A stretch of training: "300 epochs", "20000 steps", "1e9 images" or "5 %" of the whole run."""

    amount: float
    unit: Literal["steps", "epochs", "images", "%"]

    @classmethod
    def parse(cls, text: Any) -> "Length":
        if isinstance(text, Length):
            return text
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*(step|epoch|image|%)s?\s*", str(text))
        if not match:
            raise ValueError('a length is a number and a unit: "300 epochs", "20000 steps", "1e9 images" or "5 %"')
        unit = match[2] if match[2] == "%" else f"{match[2]}s"
        return cls(float(match[1]), unit)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    def steps(self, *, steps_per_epoch: int, global_batch_size: int, total: int | None = None) -> int:
        """In optimiser steps, rounded to the nearest. `total` is the whole run in steps, needed for "%"."""
        if self.unit == "%":
            assert total is not None
            return round(self.amount / 100 * total)
        steps_per_unit = {"steps": 1, "epochs": steps_per_epoch, "images": 1 / global_batch_size}
        return round(self.amount * steps_per_unit[self.unit])


LengthField = Annotated[Length, PlainValidator(Length.parse), PlainSerializer(str)]


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment's settings. In text as timm writes them: "rand-m9-mstd0.5-inc1"."""

    magnitude: float = 10.0
    num_layers: int = 2
    prob: float = 0.5
    """Chance that a layer's operation is applied."""
    magnitude_std: float = 0.0
    """Standard deviation of the magnitude; infinite for a uniform draw from 0 to `magnitude`."""
    max_magnitude: float = 10.0
    increasing: bool = False
    """Operations whose effect grows with the magnitude."""

    @classmethod
    def parse(cls, text: Any) -> "RandAugment":
        if isinstance(text, RandAugment):
            return text
        kind, *parts = str(text).split("-")
        fields = {"m": "magnitude", "n": "num_layers", "p": "prob", "mstd": "magnitude_std", "mmax": "max_magnitude"}
        values: dict[str, Any] = {}
        for part in parts:
            match = re.fullmatch(r"(mstd|mmax|m|n|p|inc)(\d+(?:\.\d+)?|inf)", part)
            if kind != "rand" or not match:
                break
            number = float(match[2])
            if match[1] == "inc":
                values["increasing"] = number != 0
            elif match[1] == "n":
                values["num_layers"] = int(number)
            else:
                values[fields[match[1]]] = number
        else:
            if kind == "rand" and values.get("prob", 0) <= 1:
                # timm's notation calls for a uniform draw by any standard deviation above 100.
                if values.get("magnitude_std", 0) > 100:
                    values["magnitude_std"] = math.inf
                return cls(**values)
        raise ValueError(
            "RandAugment is written rand-m9-mstd0.5-inc1: after rand- any of m (magnitude), n (layers), p (chance of "
            "each, at most 1), mstd (deviation of the magnitude), mmax (its bound), inc1, separated by dashes"
        )

    def __str__(self) -> str:
        return (
            f"rand-m{self.magnitude:g}-n{self.num_layers}-p{self.prob:g}-mstd{self.magnitude_std:g}"
            f"-mmax{self.max_magnitude:g}-inc{self.increasing:d}"
        )


RandAugmentField = Annotated[RandAugment, PlainValidator(RandAugment.parse), PlainSerializer(str)]


def text_matching(pattern: str, rule: str) -> AfterValidator:
    """Text that matches a regular expression from end to end, or an error that states the rule in words."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(rule)
        return value

    return AfterValidator(check)


CONTROL = r"\x00-\x1f\x7f"

Folder = Annotated[
    str, text_matching(rf"(?!\w+://)[^{CONTROL}]+", "expected a folder's path: no URL, and without control characters")
]
