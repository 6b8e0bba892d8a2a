"""Types of single settings: bounded numbers, text that matches a pattern, training lengths, RandAugment."""

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator

Positive = Annotated[float, Field(gt=0.0)]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


@dataclasses.dataclass(frozen=True)
class Length:
    """A length of training: "300 epochs", "20000 steps", "1e9 images" or "5 %" of the whole run."""

    amount: float
    unit: Literal["steps", "epochs", "images", "%"]

    @classmethod
    def parse(cls, text: Any) -> "Length":
        """Returns the length that a text such as "300 epochs" stands for. Raises ValueError for any other text."""
        if isinstance(text, Length):
            return text
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*(step|epoch|image|%)s?\s*", str(text))
        if not match:
            raise ValueError('a length is a number and a unit: "300 epochs", "20000 steps", "1e9 images" or "5 %"')
        unit = match[2] if match[2] == "%" else f"{match[2]}s"
        return cls(float(match[1]), unit)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        # "300 epochs" rather than "300.0 epochs": the text is written to config.yaml.
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    def steps(self, *, steps_per_epoch: int, global_batch_size: int, total: int | None = None) -> int:
        """Returns the length in optimiser steps, rounded to the nearest.

        `total` is the length of the whole run in steps, which a length in "%" needs.
        """
        if self.unit == "%":
            assert total is not None
            return round(self.amount / 100 * total)
        steps_per_unit = {"steps": 1, "epochs": steps_per_epoch, "images": 1 / global_batch_size}
        return round(self.amount * steps_per_unit[self.unit])


LengthField = Annotated[Length, PlainValidator(Length.parse), PlainSerializer(str)]


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment's settings. Their text is timm's: "rand-m9-mstd0.5-inc1"."""

    magnitude: float = 10.0
    """Strength of the operations, from 0 to `max_magnitude`."""
    num_layers: int = 2
    """Number of operations drawn for each image."""
    prob: float = 0.5
    """Probability that a drawn operation is applied."""
    magnitude_std: float = 0.0
    """Standard deviation of the magnitude; infinite for a uniform draw from 0 to `magnitude`."""
    max_magnitude: float = 10.0
    """Upper bound of a drawn magnitude."""
    increasing: bool = False
    """Uses the variants of the operations whose effect grows with the magnitude."""

    @classmethod
    def parse(cls, text: Any) -> "RandAugment":
        """Returns the settings that a text in timm's notation stands for. Raises ValueError for any other text."""
        if isinstance(text, RandAugment):
            return text
        kind, *parts = str(text).split("-")
        values = _read_values(parts) if kind == "rand" else None
        if values is None or values.get("prob", 0) > 1:
            raise ValueError(
                "RandAugment is written rand-m9-mstd0.5-inc1: after rand- any of m (magnitude), n (layers), p "
                "(probability of each, at most 1), mstd (standard deviation of the magnitude), mmax (its bound), inc1, "
                "separated by dashes"
            )
        # timm's notation asks for a uniform draw by any standard deviation above 100.
        if values.get("magnitude_std", 0) > 100:
            values["magnitude_std"] = math.inf
        return cls(**values)

    def __str__(self) -> str:
        return (
            f"rand-m{self.magnitude:g}-n{self.num_layers}-p{self.prob:g}-mstd{self.magnitude_std:g}"
            f"-mmax{self.max_magnitude:g}-inc{self.increasing:d}"
        )


def _read_values(parts: list[str]) -> dict[str, Any] | None:
    """Returns RandAugment's settings from parts such as "m9", by name; None where one of them is malformed."""
    fields = {"m": "magnitude", "n": "num_layers", "p": "prob", "mstd": "magnitude_std", "mmax": "max_magnitude"}
    values: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|mmax|m|n|p|inc)(\d+(?:\.\d+)?|inf)", part)
        if not match:
            return None
        number = float(match[2])
        # timm writes any number behind inc; 0 turns it off.
        if match[1] == "inc":
            values["increasing"] = number != 0
        elif match[1] == "n":
            values["num_layers"] = int(number)
        else:
            values[fields[match[1]]] = number
    return values


RandAugmentField = Annotated[RandAugment, PlainValidator(RandAugment.parse), PlainSerializer(str)]


def _check_weights(value: Any) -> Any:
    """Returns the value if it is class weights. Raises ValueError, which names what is wrong with it."""
    if value == "balanced":
        return value
    weights = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(weights, list | tuple) or not weights:
        raise ValueError("expected balanced, a list of a number for each class, or a mapping of classes to numbers")
    wrong = [weight for weight in weights if not isinstance(weight, int | float) or not 0 <= weight < math.inf]
    if wrong or not any(weights):
        raise ValueError(f"class weights are finite numbers from 0, not all of them 0: change {wrong or 'one of them'}")
    return value


ClassWeights = Annotated[Literal["balanced"] | tuple[float, ...] | dict[str, float], BeforeValidator(_check_weights)]


def text_matching(pattern: str, rule: str) -> AfterValidator:
    """Returns a validator for text that matches a regular expression from end to end; the error is the `rule`."""

    def check_text(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(rule)
        return value

    return AfterValidator(check_text)


CONTROL = r"\x00-\x1f\x7f"
"""Control characters, for use inside of a regular expression's brackets."""

Folder = Annotated[
    str,
    text_matching(rf"(?!\w+://)[^{CONTROL}]+", "expected a folder's path: no URL, and without control characters"),
]
