"""Explains in one line why a value was rejected: its key, the rule, and the value found."""

import difflib
import json
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pipeline.config.section import Section, sections_in
from pipeline.config.task import TASKS

_RULES = {
    "value_error": "{error}",
    "assertion_error": "{error}",
    "extra_forbidden": "no such setting",
    "unexpected_keyword_argument": "no such key",
    "greater_than_equal": "has to be at least {ge}",
    "greater_than": "has to be more than {gt}",
    "less_than_equal": "has to be at most {le}",
    "less_than": "has to be less than {lt}",
    "multiple_of": "has to be a multiple of {multiple_of}",
    "finite_number": "has to be a finite number",
    "float": "expected a number",
    "int": "expected a whole number",
    "bool": "expected true or false",
    "string_too_short": "expected text that is not empty",
    "string": "expected text; put a number into quotes to make it text",
    "literal_error": "expected {expected}",
    "union_tag_invalid": "expected one of {expected_tags}",
    "union_tag_not_found": "its name is missing",
    "too_short": "expected at least {min_length} values",
    "too_long": "expected at most {max_length} values",
    "missing": "a value is missing here",
    "tuple": "expected a list",
    "list": "expected a list",
    "dict": "expected a mapping",
    "dataclass": "expected a mapping",
    "model": "expected a mapping of settings",
}
"""Our words for pydantic's errors, by the beginning of an error's type; the first one that fits counts."""

_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "epochs": "train.length",
    "max_steps": "train.length",
    "img_size": "image.size",
    "num_workers": "data.num_threads",
}
"""The names that other trainers give to settings, and our keys."""

MAX_SHOWN = 100
"""Characters of a value that an error message shows."""


def explain(kind: type[Section], detail: ErrorDetails) -> str:
    """Returns the line for one of pydantic's errors, with suggestions where a key is unknown."""
    path = [str(part) for part in detail["loc"]]
    names = _fields_at(kind, path[:-1])
    # pydantic puts the kind of task that it chose behind "task"; nobody writes it there.
    if path[:1] == ["task"] and path[1:2] and path[1] in TASKS:
        del path[1]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        owners = [name for name, task in TASKS.items() if path[:-1] == ["task"] and path[-1] in task.model_fields]
        if owners:
            return f"{key}: no such setting of this task, only of {', '.join(owners)}: remove it, or set task.name"
        near = " or ".join(_suggest(kind, path, names))
        if near:
            return f"{key}: no such setting; did you mean {near}?"
        if names:
            return f"{key}: no such setting; valid here: {', '.join(names)}"
        return f"{key}: no such setting"
    if detail["type"] == "missing" and not path[-1].isdigit():
        return f"{key}: this setting has no default; add it or pass --set {key}=VALUE"
    return describe_fault(detail, path)


def describe_fault(detail: ErrorDetails, path: Iterable[str]) -> str:
    """Returns the key, the rule and the value found, as one line."""
    text = rule_of(detail)
    # A whole section as "the value found" would bury the rule that compares several of its settings.
    if not isinstance(detail["input"], dict | BaseModel):
        text += f" (found {shown(detail['input'])})"
    key = ".".join(path)
    return f"{key}: {text}" if key else text


def rule_of(detail: ErrorDetails) -> str:
    """Returns what one of pydantic's errors says, in our words."""
    for beginning, rule in _RULES.items():
        if detail["type"].startswith(beginning):
            return rule.format(**detail.get("ctx", {}))
    return "this cannot be its value"


def _suggest(kind: type[Section], path: list[str], names: list[str]) -> list[str]:
    """Returns at most three settings that an unknown key may mean; `names` are the valid ones in its place."""
    *above, last = path
    same = [key for key in setting_names(kind) if key.rpartition(".")[2] == last or key == _ELSEWHERE.get(last)]
    if same:
        # Kinds of tasks share settings, whose keys are then equal.
        return list(dict.fromkeys(same))[:3]
    near = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
    return [".".join([*above, name]) for name in near]


def setting_names(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """Yields the keys of all settings of a section and of those in it, except in lists and mappings of sections."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        if typing.get_origin(field.annotation) not in (tuple, dict):
            for section in sections_in(field.annotation):
                yield from setting_names(section, f"{prefix}{name}.")


def _fields_at(section: type[Section], path: list[str]) -> list[str]:
    """Returns the names of the settings in the section at `path`, or none where there is no section."""
    for name in path:
        if name in TASKS:
            section = TASKS[name]
        elif name in section.model_fields:
            inside = sections_in(section.model_fields[name].annotation)
            if not inside:
                return []
            section = inside[0]
        # Otherwise it is an index in a list of sections.
    return list(section.model_fields)


def shown(value: Any) -> str:
    """Returns a value as error messages show it: null, true and false as in YAML, long ones cut."""
    # repr would show None and True, which nobody writes in YAML.
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[: MAX_SHOWN - 1]}…"
