"""YAML as people write it: YAML 1.2's scalars in PyYAML's reader, and no value that is silently another.

    text ──read──▶ tree of dict, list, str, int, float, bool, None ──write──▶ text

Of words only true, false and null have a meaning here. What on, off or none stand for depends on the setting, and
pipeline/config/ knows it. Dates and times are text, keys are what is written, and 5e7 is a number.
"""

import re
from typing import Any

import yaml

from pipeline.errors import InputError

MAX_NODES = 100_000
"""Values of a document, each alias counted as what it stands for. A megabyte of settings has fewer."""
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
"""Of each kind what a plain scalar matches, and how it may begin. An integer is looked for before a float."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # the inherited ones follow YAML 1.1, where 010 is eight and no is false

    depth = num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.depth += 1
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise _fault(event, f"more than {MAX_NODES:,} values")
        if self.depth > _MAX_DEPTH:
            raise _fault(event, "values are nested too deeply")
        if getattr(event, "tag", None) not in (None, "!", _TAG + "str"):
            raise _fault(event, "tags are not used here: remove it, and put text into quotes")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if key.tag != _TAG + "merge"):
            if not isinstance(key, yaml.ScalarNode):
                raise _fault(key, "a key has to be a word, not a list or a mapping")
            if key.value in lines:
                raise _fault(key, f"{key.value!r} is set here and in line {lines[key.value]}: remove one of them")
            lines[key.value] = key.start_mark.line + 1
            key.tag = _TAG + "str"
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = node.value.lstrip("+-")
        if len(digits) > _MAX_DIGITS:
            raise _fault(node, f"a number of {len(digits)} digits; {_MAX_DIGITS} at most")
        if digits[0] == "0" and digits != "0" and digits[1] not in "bx":
            plain = node.value.replace(digits, digits.lstrip("0_") or "0")
            raise _fault(node, f'{node.value} has leading zeros: write {plain} for a number, "{node.value}" for text')
        return super().construct_yaml_int(node)


class _Dumper(yaml.SafeDumper):
    """Quotes text that _Loader, or another reader of YAML, would take for something else."""


_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)
for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


def _fault(at: yaml.Node | yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def read(text: str, source: object) -> Any:
    """The tree that a document stands for. Raises InputError of one line, which says where in `source`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_nodes(node, {}) > MAX_NODES:
            raise InputError(
                f"{source}: cannot be read as YAML: more than {MAX_NODES:,} values with its aliases written out"
            )
        return loader.construct_document(node)
    except RecursionError:
        why = "values contain themselves"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        why = where + ", ".join(filter(None, [error.context, error.problem]))
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
    raise InputError(f"{source}: cannot be read as YAML: {why}")


def write(tree: Any) -> str:
    """A document that `read`, and any reader of YAML 1.1, takes for the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _num_nodes(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Of what is below `node`, itself included, with aliases written out."""
    if node not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        below = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[node] = 1 + sum(_num_nodes(part, known) for part in below)
    return known[node]
