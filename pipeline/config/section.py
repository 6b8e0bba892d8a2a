"""What all sections of a configuration have in common: they are frozen, and refuse keys that they do not have."""

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

NOT_SET = ("null", "none", "off")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """None for the words that stand for it, which not every setting takes. Numbers are not booleans: pydantic would
        take false for 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = types_in(annotation)
        word = "null" if value is None else str(value).lower()
        if word in NOT_SET and not (word == "off" and bool in kinds):
            if type(None) in typing.get_args(annotation):
                return None
            raise ValueError(f"{word} means not set, and this setting needs a value: give one, or remove the line")
        if (int in kinds or float in kinds or 0 in kinds) and any(isinstance(each, bool) for each in _scalars(value)):
            raise ValueError("true and false are not numbers; where a setting may be unset, null does that")
        return value


def types_in(annotation: Any) -> list[Any]:
    """The types in an annotation: of tuple[int, float] | None int, float and NoneType."""
    parts = typing.get_args(annotation)
    return [kind for part in parts for kind in types_in(part)] if parts else [annotation]


def sections_in(annotation: Any) -> "list[type[Section]]":
    return [kind for kind in types_in(annotation) if isinstance(kind, type) and issubclass(kind, Section)]


def _scalars(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if parts is None:
        yield value
    for part in parts or ():
        yield from _scalars(part)
