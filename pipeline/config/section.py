"""The base class of all sections: they are frozen, reject unknown keys, and accept the former names of renamed ones."""

import logging
import typing
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from pipeline.log import rank_and_world_size

log = logging.getLogger(__name__)

NOT_SET = ("null", "none", "off")
"""The words that unset a setting."""

_reported: set[str] = set()
"""Former names of which this process has warned."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    renamed: ClassVar[dict[str, str]] = {}
    """Former names of settings, each with the present name. Both are accepted, the former one with a warning."""

    @classmethod
    def choices(cls) -> "list[type[Section]]":
        """Returns the sections of which one stands where this one is asked for: itself, unless a name chooses."""
        return [cls]

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # load_config has renamed the keys of its sources already. This is for sections in lists, for tasks, and for
        # trees that do not come from YAML.
        for former, present in cls.renamed.items():
            if former in value and present in value:
                raise ValueError(f"{former} is the former name of {present}, and both are set: remove {former}")
        return rename_keys(cls, value)

    @field_validator("*", mode="before")
    @classmethod
    def _read_not_set(cls, value: Any, info: ValidationInfo) -> Any:
        """Returns None for the words that unset a setting, and rejects them where the setting needs a value.

        It also rejects booleans in the place of numbers, where pydantic would take false for 0.
        """
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = types_in(annotation)
        word = "null" if value is None else str(value).lower()
        # For a switch, off is one of its two values.
        if word in NOT_SET and not (word == "off" and bool in kinds):
            if type(None) in typing.get_args(annotation):
                return None
            raise ValueError(f"{word} means not set, and this setting needs a value: give one, or remove the line")
        # A literal such as engine.zero_stage's has 0 in the place of int.
        is_number = int in kinds or float in kinds or 0 in kinds
        if is_number and any(isinstance(scalar, bool) for scalar in _scalars(value)):
            raise ValueError("true and false are not numbers; where a setting may be unset, null does that")
        return value


def types_in(annotation: Any) -> list[Any]:
    """Returns the types in an annotation: int, float and NoneType for tuple[int, float] | None."""
    arguments = typing.get_args(annotation)
    if not arguments:
        return [annotation]
    return [kind for argument in arguments for kind in types_in(argument)]


def sections_in(annotation: Any) -> "list[type[Section]]":
    """Returns those types in an annotation that are sections, and of tasks all."""
    sections = [kind for kind in types_in(annotation) if isinstance(kind, type) and issubclass(kind, Section)]
    return [choice for section in sections for choice in section.choices()]


def present_key(kind: type[Section], key: str) -> str:
    """Returns a dotted key with the present names of renamed settings. It may lead on into a setting's value."""
    names = key.split(".")
    section = kind
    for i, name in enumerate(names):
        if not section:
            break
        if name in section.renamed:
            names[i] = section.renamed[name]
            above = names[:i]
            _warn_once(".".join([*above, name]), ".".join([*above, names[i]]))
        section = _section_at(section, names[i])
    return ".".join(names)


def rename_keys(kind: type[Section], tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a tree of settings with the present names of renamed ones, in the same order.

    Where a former and the present name are both there, both stay, for validation to reject.
    """
    renamed: dict[str, Any] = {}
    for key, value in tree.items():
        present = kind.renamed.get(key, key)
        if present != key and present not in tree:
            _warn_once(f"{prefix}{key}", f"{prefix}{present}")
            key = present
        section = _section_at(kind, key)
        if section and isinstance(value, dict):
            value = rename_keys(section, value, f"{prefix}{key}.")
        renamed[key] = value
    return renamed


def _section_at(kind: type[Section], name: str) -> type[Section] | None:
    """Returns the section that a setting is; None for a value, a list of sections and a choice of several kinds."""
    if name not in kind.model_fields:
        return None
    annotation = kind.model_fields[name].annotation
    sections = sections_in(annotation)
    if len(sections) != 1 or typing.get_origin(annotation) in (tuple, dict):
        return None
    return sections[0]


def _warn_once(former: str, present: str) -> None:
    # Every rank of a run reads the configuration; the first one speaks for all.
    rank, _ = rank_and_world_size()
    if former in _reported or rank != "0":
        return
    _reported.add(former)
    log.warning(f"{former} is now called {present}: rename it in the configuration")


def _scalars(value: Any) -> Iterator[Any]:
    """Yields the values in nested mappings and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for part in value:
        yield from _scalars(part)
