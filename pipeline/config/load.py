"""Reads a configuration from YAML and command-line overrides, writes one, and fingerprints it."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline import files, json_text, yaml_text
from pipeline.config.config import Config
from pipeline.config.messages import describe_fault, explain, shown
from pipeline.config.section import Section
from pipeline.errors import InputError

MAX_EXTENDED = 20
"""Files that extend one another."""

MAX_YAML_BYTES = 1 << 20

SomeSection = TypeVar("SomeSection", bound=Section)

Value = TypeVar("Value")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `key.path=value` overrides (values are YAML) and validate.

    Raises InputError that lists every wrong key with the value found, the rule and the nearest valid name.
    """
    return load_section(Config, path, overrides)


def load_section(kind: type[SomeSection], path: str | Path, overrides: list[str] | None = None) -> SomeSection:
    """`load` for a file that holds another section, such as Gates."""
    tree = read_yaml(path)
    for override in overrides or []:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise InputError(f"--set {override!r}: expected KEY=VALUE, such as --set optim.lr=1e-3")
        _put(tree, name.strip().split("."), yaml_text.read(text, f"--set {override!r}"), override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {explain(kind, detail)}" for detail in error.errors()]
        raise InputError("\n".join([f"{path}: configuration refused", *lines])) from None


def read_yaml(path: str | Path, *, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file. `extends: OTHER`, a path from the file's folder, lays it over that other file:
    mappings key by key, everything else whole. Raises InputError."""
    try:
        text = files.read(path, MAX_YAML_BYTES).decode()
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except ValueError as error:  # bytes that are no text, or a path that cannot be one
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    here = Path(path).resolve()
    if here in extended_by:
        raise InputError(f"{extended_by[-1]}: extends {here.name}, which extends it in turn")
    if len(extended_by) > MAX_EXTENDED:
        raise InputError(f"{path}: the last of more than {MAX_EXTENDED} files that extend one another: join some")
    tree = yaml_text.read(text, path)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {shown(tree)}")
    if (base := tree.pop("extends", None)) is None:
        return tree
    if not isinstance(base, str):
        raise InputError(f"{path}: extends {base!r}; expected the path of one other YAML file")
    return _overlaid(read_yaml(Path(path).parent / base, extended_by=(*extended_by, here)), tree)


def _overlaid(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _overlaid(below.get(key), value) for key, value in above.items()}}


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back to an equal Config."""
    return yaml_text.write(config.model_dump(mode="json"))


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(kind: type[Value], path: str | Path) -> Value:
    """Returns what a JSON file holds, as `kind`. Raises OSError where it cannot be read, and as `validated` does."""
    return validated(kind, json_text.read(files.read(path), path), path)


def validated(kind: type[Value], tree: Any, source: object) -> Value:
    """Returns a tree of JSON as a model, dataclass or other type. Raises InputError of one line for its first fault."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise InputError(f"{source}: {describe_fault(detail, map(str, detail['loc']))}") from None


def _put(tree: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for name in path[:-1]:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise InputError(f"--set {override!r}: {name} holds {node!r}, not a section")
        tree = node
    tree[path[-1]] = value
