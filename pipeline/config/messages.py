"""Explains in one line why a value was refused: its key, the rule, and the value found."""

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
"""In our words, by how the type of pydantic's error begins; the first one that fits."""

_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "epochs": "train.length",
    "max_steps": "train.length",
    "img_size": "image.size",
    "num_workers": "data.num_threads",
}
"""Settings by the names that other trainers have for them."""


def explain(kind: type[Section], detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    names = _fields_at(kind, path[:-1])
    if path[:1] == ["task"] and path[1:2] and path[1] in TASKS:  # which of them it was, says pydantic
        del path[1]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        valid = f"; valid here: {', '.join(names)}" if names else ""
        near = " or ".join(_near(kind, path, names))
        return f"{key}: no such setting{f'; did you mean {near}?' if near else valid}"
    if detail["type"] == "missing" and not path[-1].isdigit():
        return f"{key}: this setting has no default; add it or pass --set {key}=VALUE"
    return describe_fault(detail, path)


def describe_fault(detail: ErrorDetails, path: Iterable[str]) -> str:
    """Returns the key, the rule and the value found, as one line."""
    # A whole section as "the value found" would bury the rule that compares several of its settings.
    found = "" if isinstance(detail["input"], dict | BaseModel) else f" (found {shown(detail['input'])})"
    return ": ".join(filter(None, [".".join(path), f"{rule_of(detail)}{found}"]))


def rule_of(detail: ErrorDetails) -> str:
    """What an error of pydantic's says, in our words."""
    rules = (rule for beginning, rule in _RULES.items() if detail["type"].startswith(beginning))
    return next(rules, "this cannot be its value").format(**detail.get("ctx", {}))


def _near(kind: type[Section], path: list[str], names: list[str]) -> list[str]:
    """Settings that somebody may have meant by an unknown one."""
    *above, last = path
    known = dict.fromkeys(setting_names(kind))
    same = [key for key in known if key.rpartition(".")[2] == last or key == _ELSEWHERE.get(last)]
    return same[:3] or [".".join([*above, name]) for name in difflib.get_close_matches(last, names, n=1, cutoff=0.5)]


def setting_names(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """All settings of a section, and of those in it, but for those of lists."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        if typing.get_origin(field.annotation) not in (tuple, dict):
            for section in sections_in(field.annotation):
                yield from setting_names(section, f"{prefix}{name}.")


def _fields_at(section: type[Section], path: list[str]) -> list[str]:
    for name in path:
        if name in section.model_fields or name in TASKS:  # otherwise a place in a list
            inside = [TASKS[name]] if name in TASKS else sections_in(section.model_fields[name].annotation)
            if not inside:
                return []
            section = inside[0]
    return list(section.model_fields)


def shown(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
