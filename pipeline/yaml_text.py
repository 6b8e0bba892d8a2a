"""Reads and writes YAML with YAML 1.2's scalars in PyYAML's reader, so that no value is silently taken for another.

    text ──read──▶ tree of dict, list, str, int, float, bool, None ──write──▶ text

Only the words true, false and null have a meaning here. The meaning of on, off and none depends on the setting, and
pipeline/config/ knows it. Dates and times are text, keys are text as it is written, and 5e7 is a number.
"""

import re
from typing import Any

import yaml

from pipeline.errors import InputError

MAX_NODES = 100_000
"""The limit for a document's values; each alias counts as what it stands for. A megabyte of settings has fewer."""
_MAX_DIGITS = 100
_MAX_DEPTH = 100
_TAG = "tag:yaml.org,2002:"

_SCALARS = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|[0-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
"""For each kind, the pattern of a plain scalar and its possible first characters. Integers are tried before floats."""


class _Loader(yaml.SafeLoader):
    # The inherited resolvers follow YAML 1.1, where 010 is eight and no is false.
    yaml_implicit_resolvers = {}

    depth = 0
    num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.depth += 1
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise _make_error(event, f"more than {MAX_NODES:,} values")
        if self.depth > _MAX_DEPTH:
            raise _make_error(event, "values are nested too deeply")
        # Tags could construct other types than those of JSON.
        if getattr(event, "tag", None) not in (None, "!", _TAG + "str"):
            raise _make_error(event, "tags are not used here: remove it, and put text into quotes")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == _TAG + "merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _make_error(key, "a key has to be a word, not a list or a mapping")
            name = key.value
            if name in lines:
                raise _make_error(key, f"{name!r} is set here and in line {lines[name]}: remove one of them")
            lines[name] = key.start_mark.line + 1
            # Keys are text: the class 1 and the key true keep their spelling.
            key.tag = _TAG + "str"
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = node.value.lstrip("+-")
        if len(digits) > _MAX_DIGITS:
            raise _make_error(node, f"a number of {len(digits)} digits; {_MAX_DIGITS} at most")
        # YAML 1.1 reads such numbers as octal, YAML 1.2 as decimal.
        if digits[0] == "0" and digits != "0" and digits[1] not in "bx":
            plain = node.value.replace(digits, digits.lstrip("0_") or "0")
            raise _make_error(
                node, f'{node.value} has leading zeros: write {plain} for a number, "{node.value}" for text'
            )
        return super().construct_yaml_int(node)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which _Loader, or another reader of YAML, would take for something else."""


_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)
for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


def _make_error(at: yaml.Node | yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def read(text: str, source: object) -> Any:
    """Returns the document's tree. Raises InputError with one line that names `source` and the position in it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        # Aliases of aliases grow exponentially when they are written out.
        if _count_nodes(node, {}) > MAX_NODES:
            raise InputError(
                f"{source}: cannot be read as YAML: more than {MAX_NODES:,} values with its aliases written out"
            )
        return loader.construct_document(node)
    except RecursionError:
        reason = "values contain themselves"
    except yaml.MarkedYAMLError as error:
        reason = ", ".join(filter(None, [error.context, error.problem]))
        mark = error.problem_mark
        if mark:
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {reason}"
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    raise InputError(f"{source}: cannot be read as YAML: {reason}")


def write(tree: Any) -> str:
    """Returns a document that `read`, and any reader of YAML 1.1, reads as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _count_nodes(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Returns the number of nodes from `node` down, itself included, with aliases written out."""
    if node in known:
        return known[node]
    count = 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            count += _count_nodes(key, known) + _count_nodes(value, known)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            count += _count_nodes(item, known)
    known[node] = count
    return count
