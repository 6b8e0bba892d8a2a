"""Promotion: @champion, the version that others should use, moves only here, through gates, and back.

    version ──digests──▶ loads and scores──▶ metrics──▶ not worse than the champion──▶ @champion

Every gate is tried and reported with its numbers. Each move is recorded permanently, as a tag "champion.TIME" of the
registered model; a rollback follows the moves that were not undone.
"""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from pipeline.config import Bound, Gates
from pipeline.errors import InputError
from pipeline.track import tracking_server
from pipeline.track.registry import model_files, registry
from pipeline.track.registry.registry import Version, metric_of, worth
from pipeline.track.registry.version_tags import CHAMPION, GIVEN_UP, PROMOTED, SCORED, uri_of

MOVE = "champion."
"""Prefix of the tags that record the moves."""

Scorer = Callable[[str, str], dict[str, Any]]
"""(models:/NAME/VERSION, data) -> metrics by name, among other things."""
Row = dict[str, Any]
"""A gate's name, the value found, whether it passed, and what it was compared with."""
Metrics = dict[str, float | None] | str
"""Metrics by name, or the reason why there are none."""
MAX_WHY = 1000
"""Characters of a reason that are kept."""
_UNTRIED = "not tried: the files are not those that were registered"


def promote(uri: str, gates: Gates, *, score: Scorer | None = None, why: str | None = None) -> dict[str, Any]:
    """Moves @champion to a version that passes every gate; "ok" says whether the version is the champion now.

    `score` is needed where gates.data is set. Raises InputError for a version that does not exist, and Unreachable.
    """
    client = MlflowClient()
    why = _check_reason(why)
    version = registry.find_version(client, uri)
    champion = _find_champion(client, version.name)
    pinned = uri_of(version)
    previous = uri_of(champion) if champion else None
    if pinned == previous:
        return {
            "model": pinned,
            "ok": True,
            "champion": pinned,
            "previous": None,
            "gates": [],
            "note": "is the champion already",
        }
    digests = _check_digests(pinned)
    # Files that are not the registered ones are neither opened nor scored.
    intact = digests["passed"]
    ours = _measure(version, gates, score) if intact else _UNTRIED
    theirs = None
    if champion and gates.champion:
        theirs = _measure(champion, gates, score)
    comparable = gates.data is not None or _have_same_data(version, champion)
    rows = [
        digests,
        _check_loading(pinned) if intact else _row("loads", False, _UNTRIED),
    ]
    if not _is_sound(version, ours):
        rows.append(_row("good", False, version.tags.get(GIVEN_UP, "has a metric that is not finite")))
    # Every gate is tried, also after one has failed: the report then shows all that is missing.
    for name, bound in gates.metrics.items():
        rows.append(_check_bound(name, bound, ours))
    for name, slack in gates.champion.items():
        rows.append(_compare(name, slack, ours, theirs, comparable))
    ok = all(row["passed"] for row in rows)
    if ok:
        _crown(client, version, champion, rows, why)
    return {
        "model": pinned,
        "ok": ok,
        "champion": pinned if ok else previous,
        "previous": previous,
        "gates": rows,
    }


def rollback(name: str, *, why: str | None = None) -> dict[str, Any]:
    """Undoes the last promotion that still stands: @champion goes back, or is removed where there was none before.

    Raises InputError where there is nothing to undo, and where the version to go back to was removed.
    """
    client = MlflowClient()
    champion = _find_champion(client, name)
    standing = []
    if champion:
        standing = _find_standing(history(client, name), _number(champion))
    if champion is None or not standing:
        raise InputError(f"models:/{name}@{CHAMPION}: there is no promotion to undo")
    number = standing[-1]["from"]
    why = _check_reason(why)
    target = registry.find_version(client, f"models:/{name}/{number}") if number else None
    # Unlike a promotion it is done before it is recorded: _find_standing also understands a move back without a record.
    with tracking_server.reaching(f"models:/{name}@{CHAMPION}"):
        if target:
            client.set_registered_model_alias(name, CHAMPION, number)
        else:
            client.delete_registered_model_alias(name, CHAMPION)
        move = {
            "to": number,
            "from": _number(champion),
            "why": why,
            "undoes": True,
        }
        at = _note_move(client, name, move)
    return {
        "model": name,
        "champion": uri_of(target) if target else None,
        "previous": uri_of(champion),
        "at": at,
        "why": why,
    }


def history(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """Returns every move of @champion by time: "at", "to", "from" and "why"; "undoes" for a rollback."""
    with tracking_server.reaching(f"models:/{name}"):
        tags = client.get_registered_model(name).tags
    moves = []
    for key, value in sorted(tags.items()):
        if key.startswith(MOVE):
            moves.append({"at": key.removeprefix(MOVE), **json.loads(value)})
    return moves


def _crown(
    client: MlflowClient, version: ModelVersion, champion: ModelVersion | None, rows: list[Row], why: str
) -> None:
    name = version.name
    number = _number(version)
    previous = _number(champion)
    with tracking_server.reaching(uri_of(version)):
        # Recorded before it is done: a move without a record could not be undone.
        tags = {
            "at": _note_move(client, name, {"to": number, "from": previous, "why": why}),
            "why": why,
            "gates": json.dumps(rows, ensure_ascii=False),
            "previous": previous,
        }
        for key, value in tags.items():
            client.set_model_version_tag(name, number, f"{PROMOTED}{key}", value)
        client.set_registered_model_alias(name, CHAMPION, number)


def _find_standing(moves: list[dict[str, Any]], champion: str) -> list[dict[str, Any]]:
    """Returns the promotions that led to the champion and were not undone, the last one last."""
    standing = []
    for move in [*moves, {"from": champion}]:
        # A move that the next one does not start from was undone, or recorded and never made, or changed by other
        # means.
        while standing and standing[-1]["to"] != move["from"]:
            standing.pop()
        if "undoes" not in move:
            standing.append(move)
    return standing[:-1]


def _note_move(client: MlflowClient, name: str, move: dict[str, Any]) -> str:
    """Records a move as a tag of the registered model; returns its time."""
    # In this format texts sort by time.
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    client.set_registered_model_tag(name, f"{MOVE}{at}", json.dumps(move, ensure_ascii=False))
    return at


def _check_reason(why: str | None) -> str:
    if why and len(why) > MAX_WHY:
        raise InputError(f"--why has {len(why)} characters, more than the {MAX_WHY} that are kept: shorten it")
    return why or ""


def _find_champion(client: MlflowClient, name: str) -> ModelVersion | None:
    for version in registry.list_versions(client, name):
        if CHAMPION in version.aliases:
            return version
    return None


def _number(version: ModelVersion | None) -> str:
    return str(version.version) if version else ""


def _row(gate: str, passed: bool, value: float | str, **compared: float | str) -> Row:
    return {
        "gate": gate,
        **compared,
        "value": value,
        "passed": passed,
    }


def _check_digests(pinned: str) -> Row:
    found = registry.verify(pinned)
    files = found["files"]
    faults = [file["fault"] for file in files if file["fault"]]
    return _row("digests", found["ok"], "; ".join(faults) or f"{len(files)} files as registered")


def _check_loading(pinned: str) -> Row:
    try:
        answer, number = _answer_example(registry.resolve(pinned))
    except (InputError, RuntimeError) as error:
        # A detector whose weights are not finite raises the RuntimeError.
        return _row("loads", False, str(error))
    return _row("loads", math.isfinite(number), f"{answer} for the input example")


def _answer_example(version: Version) -> tuple[str, float]:
    """Returns what the served model answers, by this checkout's code, and a number in it that must be finite."""
    # A rollback needs neither of these, and they take seconds to import.
    import torch

    from pipeline.track.serve.served_model import served_network

    example = model_files.example(version.card.image.size)
    with torch.inference_mode():
        model = served_network(version.card, version.weights)
        (answer,) = model.answers([model.view(example)], {})
        return model.describe(answer)


def _measure(version: ModelVersion, gates: Gates, score: Scorer | None) -> Metrics:
    """Returns the metrics on the gates' data, or without it those that were registered."""
    names = {*gates.metrics, *gates.champion}
    if gates.data is None:
        return {name: metric_of(version, name) for name in names}
    assert score is not None, "gates with data need a scorer"
    try:
        scores = score(uri_of(version), gates.data)
    except InputError as error:
        return f"cannot be scored on {gates.data}: {error}"
    # Scores without a gate are measured anyway, and have to be finite like the others.
    names |= {name for name, value in scores.items() if isinstance(value, float)}
    return {name: scores.get(name) for name in names}


def _have_same_data(version: ModelVersion, champion: ModelVersion | None) -> bool:
    """Whether the registered metrics of both were measured on the same data."""
    if champion is None or SCORED not in version.tags:
        return False
    return version.tags[SCORED] == champion.tags.get(SCORED)


def _is_sound(version: ModelVersion, ours: Metrics) -> bool:
    """Whether a version was not given up and has finite metrics, also those that no gate names."""
    numbers = [] if isinstance(ours, str) else filter(None, ours.values())
    return registry.is_good(version) and all(map(math.isfinite, numbers))


def _check_bound(name: str, bound: Bound, ours: Metrics) -> Row:
    gate = f"metrics.{name}"
    rule = str(bound)
    if isinstance(ours, str):
        return _row(gate, False, ours, rule=rule)
    return _row(gate, bound.holds(ours[name]), _format_value(ours[name]), rule=rule)


def _compare(name: str, slack: float, ours: Metrics, theirs: Metrics | None, comparable: bool) -> Row:
    gate = f"champion.{name}"
    rule = f"at most {slack} worse than the champion"
    if theirs is None:
        return _row(gate, True, "there is no champion", rule=rule)
    if isinstance(ours, str):
        return _row(gate, False, ours, rule=rule)
    if isinstance(theirs, str):
        return _row(gate, False, theirs, rule=rule)
    if not comparable:
        why = "registered metrics are not of the same data as the champion's: set data in the gates, to score both on"
        return _row(gate, False, why, rule=rule)
    return {
        "gate": gate,
        "rule": rule,
        "value": _format_value(ours[name]),
        "champion": _format_value(theirs[name]),
        "passed": _is_not_worse(name, ours[name], theirs[name], slack),
    }


def _is_not_worse(name: str, ours: float | None, theirs: float | None, slack: float) -> bool:
    if ours is None or not math.isfinite(ours):
        return False
    # Nothing can be compared with a champion without a finite value, so it blocks nothing.
    if theirs is None or not math.isfinite(theirs):
        return True
    return worth(name, ours) >= worth(name, theirs) - slack


def _format_value(value: float | None) -> float | str:
    if value is None or not math.isfinite(value):
        return "not measured, or not finite"
    return value
