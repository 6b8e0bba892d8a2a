"""Writes the reference of all settings: type, default, meaning and an example of each, from the code of the sections.

python -m pipeline.config.reference > docs/configuration.md
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from pipeline.config import Config
from pipeline.config.section import Section, sections_in

_HEAD = """\
# Settings

Every setting of a run is a key of its YAML file, and `--set KEY=VALUE` overrides it. An unknown key is an error that
names the nearest one. `extends: FILE` begins with another file's settings. `--print-config` prints the complete
configuration of a command. This page is printed by `python -m pipeline.config.reference`.

Types: `Positive` is a number above 0, `Fraction` 0 to 1, `BelowOne` 0 to 1 without 1, `LengthField` a training length
such as `300 epochs`, `20000 steps`, `1e9 images` or `5 %` of the run, `Folder` a path. `null` unsets a setting of type
`… | None`. Examples are from the configurations in [configs/](../configs/).
"""
_CONFIGS = Path(__file__).parents[2] / "configs"


def reference() -> str:
    """Returns the page in Markdown."""
    examples = _collect_examples()
    blocks = [_HEAD]
    for name, field in Config.model_fields.items():
        for section in sections_in(field.annotation):
            rows = [*_rows(section, name, examples)]
            title = f"{name}: {{name: {_task_name(section)}}}" if name == "task" else name
            table = ["| key | type | default | meaning | example |", "|---|---|---|---|---|", *rows]
            blocks.append("\n".join([f"## `{title}`", "", _one_line(section.__doc__ or ""), "", *table, ""]))
    return "\n".join(blocks)


def _task_name(section: type[Section]) -> str:
    return section.model_fields["name"].default


def _rows(section: type[Section], prefix: str, examples: dict[str, str]) -> Iterator[str]:
    """Yields a row for each setting of a section, and of the sections inside it."""
    described = _describe_fields(section)
    for name, field in section.model_fields.items():
        if name == "name" and prefix == "task":
            continue
        key = f"{prefix}.{name}"
        kind, meaning = described[name]
        default = _format_default(field.get_default(call_default_factory=True))
        example = examples.get(key, "")
        cells = [f"`{key}`", f"`{kind}`", default, meaning, example]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        for inner in sections_in(field.annotation):
            yield from _rows(inner, key, examples)


def _describe_fields(section: type[Section]) -> dict[str, tuple[str, str]]:
    """Returns the type of each field as its code has it, and the docstring below it, both in one line."""
    described: dict[str, tuple[str, str]] = {}
    # Sections inherit fields; those of the section itself come last and count.
    for kind in reversed([each for each in section.__mro__ if issubclass(each, Section)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign):
                continue
            meaning = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                meaning = _one_line(str(following.value.value))
            described[ast.unparse(statement.target)] = _type_text(statement.annotation), meaning
    return described


def _type_text(annotation: ast.expr) -> str:
    """Returns the source of an annotation, without the validators of Annotated and the word Literal."""
    if isinstance(annotation, ast.BinOp):
        return f"{_type_text(annotation.left)} | {_type_text(annotation.right)}"
    if not isinstance(annotation, ast.Subscript):
        return ast.unparse(annotation).replace("_Word", "str")
    name = ast.unparse(annotation.value)
    arguments = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if name == "Annotated":
        return _type_text(arguments[0])
    if name == "Literal":
        return " or ".join(str(ast.literal_eval(argument)) for argument in arguments)
    return f"{name}[{', '.join(map(_type_text, arguments))}]"


def _format_default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Section):
        return "see below"
    return f"`{_as_yaml(value)}`"


def _as_yaml(value: Any) -> str:
    """Returns a value as one line of YAML."""
    # Lengths and RandAugment are written as their texts.
    if isinstance(value, tuple):
        value = [item if isinstance(item, int | float) else str(item) for item in value]
    elif not isinstance(value, bool | int | float | str | None | list | dict):
        value = str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("\n...")


def _collect_examples() -> dict[str, str]:
    """Returns a value of each key that the shipped configurations set, of the first that does."""
    examples: dict[str, str] = {}

    def collect(tree: dict[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict):
                collect(value, f"{key}.")
            examples.setdefault(key, f"`{_as_yaml(value)}`")

    for path in sorted(_CONFIGS.rglob("*.yaml")):
        collect(yaml.safe_load(path.read_text()), "")
    return examples


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(reference(), end="")
