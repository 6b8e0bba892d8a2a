"""Reads a configuration from YAML and command-line overrides, writes one, and computes fingerprints."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline import files, json_text, yaml_text
from pipeline.config.config import Config
from pipeline.config.messages import describe_fault, explain, shown
from pipeline.config.section import Section, present_key, rename_keys
from pipeline.errors import InputError

MAX_EXTENDED = 20
"""Maximum number of files that extend one another."""

MAX_YAML_BYTES = 1 << 20

SomeSection = TypeVar("SomeSection", bound=Section)

Value = TypeVar("Value")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies `key.path=value` overrides (values are YAML) and validates the result.

    Raises InputError that lists every wrong key with the value found, the rule and the nearest valid name.
    """
    return load_section(Config, path, overrides)


def load_section(kind: type[SomeSection], path: str | Path, overrides: list[str] | None = None) -> SomeSection:
    """Does what `load_config` does for a file that holds another section, such as Gates."""
    tree = read_yaml(path, kind)
    _apply_overrides(kind, tree, overrides or [])
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # All mistakes at once: whoever waits in a queue for a job does not want them one by one.
        lines = [f"  {explain(kind, detail)}" for detail in error.errors()]
        raise InputError("\n".join([f"{path}: configuration refused", *lines])) from None


def _apply_overrides(kind: type[Section], tree: dict[str, Any], overrides: list[str]) -> None:
    """Sets the values of KEY=VALUE overrides in a tree. The last of several for a setting wins, whatever its name."""
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise InputError(f"--set {override!r}: expected KEY=VALUE, such as --set optim.lr=1e-3")
        # A former name in the file has been renamed, so an override of either name replaces it.
        key = present_key(kind, name.strip())
        put_setting(tree, key.split("."), yaml_text.read(text, f"--set {override!r}"), override)


def read_yaml(
    path: str | Path,
    kind: type[Section] | None = None,
    *,
    extended_by: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """Returns the mapping in a YAML file, with the present names of settings that `kind` has renamed.

    `extends: OTHER`, a path relative to the file's folder, lays the file over that other one: mappings are merged key
    by key, every other value is replaced as a whole. Raises InputError.
    """
    try:
        text = files.read(path, MAX_YAML_BYTES).decode()
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except ValueError as error:
        # The bytes are not UTF-8, or the path has a null character.
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    here = Path(path).resolve()
    # Resolved, so that a file which extends itself by way of a link is found, too.
    if here in extended_by:
        raise InputError(f"{extended_by[-1]}: extends {here.name}, which extends it in turn")
    if len(extended_by) > MAX_EXTENDED:
        raise InputError(f"{path}: the last of more than {MAX_EXTENDED} files that extend one another: join some")
    tree = yaml_text.read(text, path)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of sections, found {shown(tree)}")
    if kind:
        # In each file by itself: a present name then overrides a former one in the file below.
        tree = rename_keys(kind, tree)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise InputError(f"{path}: extends {base!r}; expected the path of one other YAML file")
    below = read_yaml(Path(path).parent / base, kind, extended_by=(*extended_by, here))
    return _merge(below, tree)


def _merge(below: Any, above: Any) -> Any:
    """Returns `above` laid over `below`: mappings are merged, every other value is replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(below.get(key), value)
    return merged


def dump_config(config: Config) -> str:
    """Returns the resolved configuration as YAML; `load_config` reads it back to an equal Config."""
    return yaml_text.write(config.model_dump(mode="json"))


def fingerprint(value: Any) -> str:
    """Returns the SHA-256 of a JSON-like value, independent of the order of keys."""
    # Sorted keys, no spaces, no NaN: equal values have equal bytes.
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


def put_setting(tree: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    """Sets the value at `path` in a tree, and creates the sections on the way."""
    for name in path[:-1]:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise InputError(f"--set {override!r}: {name} holds {node!r}, not a section")
        tree = node
    tree[path[-1]] = value
