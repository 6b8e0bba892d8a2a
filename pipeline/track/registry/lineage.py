"""The lineage of a model as a tree: what it was made from, and what was made from it.

    data set ─▶ run ─▶ version ─▶ run that was started from it ─▶ its version ─▶ …

It is read from tags alone: of versions "run", "data", "parent" and "child.UUID"; of runs "run.uuid", "parent.version"
and "data.digest". A node is {"kind", "name", "details", "children"}, of kind "data", "run" or "version".
"""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline import files
from pipeline.errors import InputError
from pipeline.track.metric_names import for_display, format_score, is_detail
from pipeline.track.registry import registry
from pipeline.track.registry.registry import metric_of
from pipeline.track.registry.version_tags import CHILD, METRIC, uri_of
from pipeline.track.tracking_server import Unreachable

Node = dict[str, Any]

_MAX_CHARACTERS = 30
_MAX_LINES = 3
"""Size of a box's text. In a monospaced font of 8 points a character is 0.067 inches wide."""
_WIDTH_IN = 2.25
_HEIGHT_IN = 0.62
"""Size of a box, in inches."""
_MARGIN_IN = 0.2
_COLUMN_IN = 2.85
_ROW_IN = 0.84
"""Distances from one box to the next."""
_COLOURS = {
    "data": "#e3efe3",
    "run": "#eef0f3",
    "version": "#dfe9f7",
}
_INK = "#1c1f24"
_FAINT = "#9aa0a8"


def lineage(subject: str) -> dict[str, Any]:
    """Returns the lineage of `subject`: models:/NAME/VERSION, models:/NAME@ALIAS, or NAME for all of its versions.

    "roots" are the data sets that the subject goes back to. Each is a tree down to the subject, and from there to
    everything that was made of it. Raises InputError for an unknown subject.
    """
    client = MlflowClient()
    if subject.startswith("models:/") and ("@" in subject or subject.count("/") > 1):
        wanted = [registry.find_version(client, subject)]
    else:
        wanted = registry.list_versions(client, subject.removeprefix("models:/"))
        if not wanted:
            raise InputError(f"{subject}: no registered model has this name, or it has no version")
    tree = _Tree(client)
    for version in wanted:
        tree.add_descendants(version, tree.add_ancestors(version))
    return {"subject": subject, "roots": tree.roots}


def text(tree: dict[str, Any]) -> str:
    """Returns the tree as indented text, a line for each node."""

    def lines(node: Node, first: str, rest: str) -> Iterator[str]:
        yield first + _title(node)
        children = node["children"]
        for child in children:
            if child is children[-1]:
                yield from lines(child, f"{rest}└─ ", f"{rest}   ")
            else:
                yield from lines(child, f"{rest}├─ ", f"{rest}│  ")

    return "\n".join(line for root in tree["roots"] for line in lines(root, "", ""))


def draw(tree: dict[str, Any], path: Path) -> None:
    """Draws the tree as a .png or .svg that reads from left to right. Raises InputError where it cannot be written."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--out {path}: a picture is a .png or an .svg")
    # The Agg canvas needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    boxes = _lay_out(tree["roots"])
    width = max(box.column for box in boxes) * _COLUMN_IN + _WIDTH_IN + 2 * _MARGIN_IN
    height = max(box.row for box in boxes) * _ROW_IN + _HEIGHT_IN + 2 * _MARGIN_IN
    figure = Figure((width, height), dpi=160)
    FigureCanvasAgg(figure)
    # One unit of the axes is an inch, and y grows downwards.
    axes = figure.add_axes(
        (0, 0, 1, 1),
        xlim=(-_MARGIN_IN, width - _MARGIN_IN),
        ylim=(height - _MARGIN_IN, -_MARGIN_IN),
    )
    axes.set_axis_off()
    for node, column, row, parent_row in boxes:
        x = column * _COLUMN_IN
        y = row * _ROW_IN
        rectangle = Rectangle(
            (x, y),
            _WIDTH_IN,
            _HEIGHT_IN,
            facecolor=_COLOURS[node["kind"]],
            edgecolor=_FAINT,
        )
        axes.add_patch(rectangle)
        for number, line in enumerate(_box_lines(node)):
            axes.text(
                x + 0.1,
                y + 0.14 + 0.17 * number,
                line,
                family="monospace",
                size=8,
                weight="normal" if number else "bold",
                color=_INK,
                va="center",
            )
        if parent_row is not None:
            # A line from the parent's right side to the box's left one, with two corners between the columns.
            corner = x - (_COLUMN_IN - _WIDTH_IN) / 2
            middle = y + _HEIGHT_IN / 2
            parent_middle = parent_row * _ROW_IN + _HEIGHT_IN / 2
            axes.plot(
                [x - _COLUMN_IN + _WIDTH_IN, corner, corner, x],
                [parent_middle, parent_middle, middle, middle],
                color=_FAINT,
                zorder=0,
            )
    with files.output(path) as partial:
        figure.savefig(partial)


class _Box(NamedTuple):
    """A node's box in the picture; rows and columns count from 0."""

    node: Node
    column: int
    row: int
    parent_row: int | None


class _Tree:
    """A tree that grows by paths. Paths share the nodes that they have in common."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._nodes: dict[tuple[str, str], Node] = {}
        self._grown: set[str] = set()
        self.roots: list[Node] = []

    def add_ancestors(self, version: ModelVersion) -> Node:
        """Adds the path from the first data set to a version; returns the version's node."""
        line = [version]
        # Tags can be edited, so a version may be its own ancestor.
        while (parent := self._find_parent(line[0])) is not None and uri_of(parent) not in map(uri_of, line):
            line.insert(0, parent)
        node = None
        for each in line:
            uuid = each.tags.get("run", "")
            run = self._find_run(uuid, each.run_id)
            node = node or self._add_origin(each, run)
            node = self._add(node, uuid, _run_node(run, uuid))
            node = self._add(node, uri_of(each), _version_node(each))
        assert node is not None
        return node

    def add_descendants(self, version: ModelVersion, node: Node) -> None:
        """Adds everything that was made of a version below its node."""
        uri = uri_of(version)
        if uri in self._grown:
            return
        # Noted before descending, so that a circle of edited tags ends.
        self._grown.add(uri)
        children = registry.list_versions(self._client, parent=uri)
        # Runs that were started from the version, also those that have registered nothing.
        runs = {tag.removeprefix(CHILD): run_id for tag, run_id in version.tags.items() if tag.startswith(CHILD)}
        for child in children:
            runs[child.tags["run"]] = child.run_id or ""
        for uuid, run_id in runs.items():
            # A run of another server has no details but its UUID, and is shown nevertheless.
            below = self._add(node, uuid, _run_node(self._find_run(uuid, run_id), uuid))
            for child in children:
                if child.tags["run"] == uuid:
                    self.add_descendants(child, self._add(below, uri_of(child), _version_node(child)))

    def _add_origin(self, version: ModelVersion, run: Run | None) -> Node:
        """Adds what the first version of a line was made from: its data, or a parent that no longer exists."""
        if "parent" in version.tags:
            parent = version.tags["parent"]
            return self._add(None, parent, _node("version", parent, "removed from the registry"))
        data = _data_node(version, run)
        return self._add(None, version.tags.get("data") or data["name"], data)

    def _add(self, parent: Node | None, key: str, node: Node) -> Node:
        """Adds `node` below `parent`, or to the roots. Returns it, or the node that already has its kind and key."""
        index = (node["kind"], key)
        if index not in self._nodes:
            self._nodes[index] = node
            siblings = parent["children"] if parent else self.roots
            siblings.append(node)
        return self._nodes[index]

    def _find_parent(self, version: ModelVersion) -> ModelVersion | None:
        parent = version.tags.get("parent")
        if parent is None:
            return None
        try:
            return registry.find_version(self._client, parent)
        except InputError:
            # The parent was removed from the registry.
            return None

    def _find_run(self, uuid: str, run_id: str | None) -> Run | None:
        if not run_id:
            return None
        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise Unreachable(f"run {uuid}: {error.message}") from error
            return None


def _node(kind: str, name: str, *details: str) -> Node:
    return {
        "kind": kind,
        "name": name,
        "details": [detail for detail in details if detail],
        "children": [],
    }


def _data_node(version: ModelVersion, run: Run | None) -> Node:
    if "data" not in version.tags:
        # Imported weights name their file instead.
        name, _, digest = version.tags.get("source", "unknown data").partition(" sha256:")
        return _node("data", name, digest and f"sha256 {digest[:12]}")
    names = []
    num_samples = 0
    inputs = run.inputs.dataset_inputs if run and run.inputs else []
    for each in inputs:
        if any(tag.value == "training" for tag in each.tags):
            names.append(each.dataset.name)
            num_samples += json.loads(each.dataset.profile or "{}").get("samples", 0)
    return _node(
        "data",
        " + ".join(names) or "data set",
        f"sha256 {version.tags['data'][:12]}",
        f"{num_samples:,} samples" if num_samples else "",
    )


def _run_node(run: Run | None, uuid: str) -> Node:
    short = uuid[:12]
    if run is None:
        return _node("run", short or "unknown run", "not on this server")
    return _node("run", run.info.run_name or short, run.info.status, short)


def _version_node(version: ModelVersion) -> Node:
    aliases = " ".join(f"@{alias}" for alias in sorted(version.aliases))
    details = [aliases, f"step {version.tags.get('step', '?')}"]
    names = [tag.removeprefix(METRIC) for tag in version.tags if tag.startswith(METRIC)]
    scores = {name: metric_of(version, name) for name in names if not is_detail(name)}
    details += [format_score(name, score) for name, score in for_display(scores).items()]
    return _node("version", uri_of(version), *details)


def _lay_out(nodes: list[Node]) -> list[_Box]:
    """Gives a row to each node without children; the others are level with their first child."""
    boxes: list[_Box] = []

    def put(node: Node, column: int, row: int, parent_row: int | None) -> int:
        """Adds a node's boxes; returns the next free row."""
        boxes.append(_Box(node, column, row, parent_row))
        next_row = row
        for child in node["children"]:
            next_row = put(child, column + 1, next_row, row)
        return max(next_row, row + 1)

    row = 0
    for node in nodes:
        row = put(node, 0, row, None)
    return boxes


def _title(node: Node) -> str:
    title = f"{node['kind']} {node['name']}"
    if node["details"]:
        title += f"  ({', '.join(node['details'])})"
    return title


def _box_lines(node: Node) -> list[str]:
    # Lines break between details, not inside of one.
    details = ", ".join(detail.replace(" ", "\N{NO-BREAK SPACE}") for detail in node["details"])
    lines = textwrap.wrap(
        details,
        _MAX_CHARACTERS,
        max_lines=_MAX_LINES - 1,
        placeholder=" …",
    )
    return [_shorten(node["name"]), *lines]


def _shorten(name: str) -> str:
    """Cuts a long name in the middle, because names often differ at their ends."""
    if len(name) <= _MAX_CHARACTERS:
        return name
    half = (_MAX_CHARACTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
