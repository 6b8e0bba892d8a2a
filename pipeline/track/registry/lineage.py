"""Where a model comes from and what became of it, as a tree.

    data set ─▶ run ─▶ version ─▶ run that was started from it ─▶ its version ─▶ …

Read from tags alone: of versions "run", "data", "parent" and "child.UUID"; of runs "run.uuid", "parent.version" and
"data.digest". A node is {"kind", "name", "details", "children"}, of kind "data", "run" or "version".
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

from pipeline.errors import InputError
from pipeline.track.metric_names import is_detail
from pipeline.track.registry import registry
from pipeline.track.registry.registry import CHILD, METRIC, metric_of, uri_of
from pipeline.track.tracking_server import Unreachable

Node = dict[str, Any]

_WIDTH, _LINES = 30, 3  # of a box, in characters and lines
_WIDTH_IN, _HEIGHT_IN, _MARGIN = 2.25, 0.62, 0.2  # in inches; a monospaced letter of 8 points is 0.067 wide
_COLUMN, _ROW = 2.85, 0.84  # from one box to the next
_COLOURS = {"data": "#e3efe3", "run": "#eef0f3", "version": "#dfe9f7"}
_INK, _FAINT = "#1c1f24", "#9aa0a8"


def lineage(subject: str) -> dict[str, Any]:
    """ "roots", the data sets that `subject` (models:/NAME/VERSION, models:/NAME@ALIAS or NAME) goes back to, each a
    tree down to it and from there to everything that was made of it. Raises InputError for an unknown subject."""
    client = MlflowClient()
    if subject.startswith("models:/") and ("@" in subject or subject.count("/") > 1):
        wanted = [registry.find(client, subject)]
    else:
        wanted = registry.versions(client, subject.removeprefix("models:/"))
        if not wanted:
            raise InputError(f"{subject}: no registered model has this name, or it has no version")
    tree = _Tree(client)
    for version in wanted:
        tree.descend(version, tree.ancestors(version))
    return {"subject": subject, "roots": tree.roots}


def text(tree: dict[str, Any]) -> str:
    """As an indented tree, a line a node."""

    def lines(node: Node, first: str, rest: str) -> Iterator[str]:
        yield first + _title(node)
        for child in node["children"]:
            last = child is node["children"][-1]
            yield from lines(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    return "\n".join(line for root in tree["roots"] for line in lines(root, "", ""))


def draw(tree: dict[str, Any], path: Path) -> None:
    """As a picture, .png or .svg, that reads from left to right. Raises InputError where it cannot be written."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--out {path}: a picture is a .png or an .svg")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    places = _places(tree["roots"])
    columns, rows = max(place.column for place in places), max(place.row for place in places)
    size = (columns * _COLUMN + _WIDTH_IN + 2 * _MARGIN, rows * _ROW + _HEIGHT_IN + 2 * _MARGIN)
    figure = Figure(size, dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-_MARGIN, size[0] - _MARGIN), ylim=(size[1] - _MARGIN, -_MARGIN))
    axes.set_axis_off()
    for node, column, row, parent_row in places:
        x, y = column * _COLUMN, row * _ROW
        axes.add_patch(Rectangle((x, y), _WIDTH_IN, _HEIGHT_IN, facecolor=_COLOURS[node["kind"]], edgecolor=_FAINT))
        for number, line in enumerate(_box_lines(node)):
            weight = "bold" if number == 0 else "normal"
            place = (x + 0.1, y + 0.14 + 0.17 * number)
            axes.text(*place, line, family="monospace", size=8, weight=weight, color=_INK, va="center")
        if parent_row is not None:
            turn, level, above = x - (_COLUMN - _WIDTH_IN) / 2, y + _HEIGHT_IN / 2, parent_row * _ROW + _HEIGHT_IN / 2
            axes.plot([x - _COLUMN + _WIDTH_IN, turn, turn, x], [above, above, level, level], color=_FAINT, zorder=0)
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; name another file with --out") from error


class _Place(NamedTuple):
    """In the picture; rows and columns count from 0."""

    node: Node
    column: int
    row: int
    parent_row: int | None


class _Tree:
    """Grown from paths, which share what they have in common."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._nodes: dict[tuple[str, str], Node] = {}
        self._grown: set[str] = set()
        self.roots: list[Node] = []

    def ancestors(self, version: ModelVersion) -> Node:
        """Add the path from the first data set to a version; returns the version's node."""
        line = [version]
        while (parent := self._parent(line[0])) is not None and uri_of(parent) not in map(uri_of, line):
            line.insert(0, parent)
        node = None
        for each in line:
            uuid = each.tags.get("run", "")
            run = self._run(uuid, each.run_id)
            node = node or self._origin(line[0], run)
            node = self._add(node, uuid, _run_node(run, uuid))
            node = self._add(node, uri_of(each), _version_node(each))
        assert node is not None
        return node

    def descend(self, version: ModelVersion, node: Node) -> None:
        """Add everything that was made of a version below its node."""
        if uri_of(version) in self._grown:
            return
        self._grown.add(uri_of(version))
        made = registry.versions(self._client, parent=uri_of(version))
        runs = {tag.removeprefix(CHILD): run_id for tag, run_id in version.tags.items() if tag.startswith(CHILD)}
        runs |= {child.tags["run"]: child.run_id or "" for child in made}
        for uuid, run_id in runs.items():
            below = self._add(node, uuid, _run_node(self._run(uuid, run_id), uuid))
            for child in made:
                if child.tags["run"] == uuid:
                    self.descend(child, self._add(below, uri_of(child), _version_node(child)))

    def _origin(self, version: ModelVersion, run: Run | None) -> Node:
        if "parent" in version.tags:  # and yet the first of its line
            gone = version.tags["parent"]
            return self._add(None, gone, _node("version", gone, "removed from the registry"))
        data = _data_node(version, run)
        return self._add(None, version.tags.get("data") or data["name"], data)

    def _add(self, parent: Node | None, key: str, node: Node) -> Node:
        """The node of this kind and key: `node`, below `parent`, unless there is one."""
        whole = (node["kind"], key)
        if whole not in self._nodes:
            self._nodes[whole] = node
            (parent["children"] if parent else self.roots).append(node)
        return self._nodes[whole]

    def _parent(self, version: ModelVersion) -> ModelVersion | None:
        try:
            return registry.find(self._client, version.tags["parent"]) if "parent" in version.tags else None
        except InputError:  # removed
            return None

    def _run(self, uuid: str, run_id: str | None) -> Run | None:
        try:
            return self._client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise Unreachable(f"run {uuid}: {error.message}") from error
            return None


def _node(kind: str, name: str, *details: str) -> Node:
    return {"kind": kind, "name": name, "details": [detail for detail in details if detail], "children": []}


def _data_node(version: ModelVersion, run: Run | None) -> Node:
    if "data" not in version.tags:
        name, _, digest = version.tags.get("source", "unknown data").partition(" sha256:")
        return _node("data", name, digest and f"sha256 {digest[:12]}")
    inputs = run.inputs.dataset_inputs if run and run.inputs else []
    training = [each.dataset for each in inputs if any(tag.value == "training" for tag in each.tags)]
    samples = sum(json.loads(data.profile or "{}").get("samples", 0) for data in training)
    return _node(
        "data",
        " + ".join(data.name for data in training) or "data set",
        f"sha256 {version.tags['data'][:12]}",
        f"{samples:,} samples" if samples else "",
    )


def _run_node(run: Run | None, uuid: str) -> Node:
    if run is None:
        return _node("run", uuid[:12] or "unknown run", "not on this server")
    return _node("run", run.info.run_name or uuid[:12], run.info.status, uuid[:12])


def _version_node(version: ModelVersion) -> Node:
    names = [tag.removeprefix(METRIC) for tag in version.tags if tag.startswith(METRIC)]
    metrics = {name: metric_of(version, name) for name in names if not is_detail(name)}
    told = [f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in metrics.items()]
    aliases = " ".join(f"@{alias}" for alias in sorted(version.aliases))
    return _node("version", uri_of(version), aliases, f"step {version.tags.get('step', '?')}", *told)


def _places(nodes: list[Node]) -> list[_Place]:
    """A row for each node without children; the others are level with their first child."""
    places: list[_Place] = []

    def put(node: Node, column: int, row: int, parent_row: int | None) -> int:
        """Returns the next free row."""
        places.append(_Place(node, column, row, parent_row))
        next_row = row
        for child in node["children"]:
            next_row = put(child, column + 1, next_row, row)
        return max(next_row, row + 1)

    row = 0
    for node in nodes:
        row = put(node, 0, row, None)
    return places


def _title(node: Node) -> str:
    about = ", ".join(node["details"])
    return f"{node['kind']} {node['name']}" + (f"  ({about})" if about else "")


def _box_lines(node: Node) -> list[str]:
    unbroken = [detail.replace(" ", "\N{NO-BREAK SPACE}") for detail in node["details"]]
    about = textwrap.wrap(", ".join(unbroken), _WIDTH, max_lines=_LINES - 1, placeholder=" …")
    return [_cut(node["name"]), *about]


def _cut(name: str) -> str:
    """In the middle: names often differ at their ends."""
    half = (_WIDTH - 1) // 2
    return name if len(name) <= _WIDTH else f"{name[:half]}…{name[-half:]}"
