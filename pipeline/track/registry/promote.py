"""@champion: the version that others should use. It moves only here, through gates, and back.

    version ──digests──▶ loads and scores──▶ metrics──▶ not worse than the champion──▶ @champion

Every gate is tried and told with its numbers. Each move is noted for good, as a tag "champion.TIME" of the registered
model; those which were not undone are the way back.
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
from pipeline.track.registry.registry import CHAMPION, GIVEN_UP, PROMOTED, SCORED, Version, metric_of, uri_of, worth

MOVE = "champion."

Scorer = Callable[[str, str], dict[str, Any]]
"""(models:/NAME/VERSION, data) -> metrics by name, among other things."""
Row = dict[str, Any]
"""A gate's name, the value found, whether it passed, and what it was compared with."""
Metrics = dict[str, float | None] | str
"""By name; or why there are none."""
MAX_WHY = 1000
_UNTRIED = "not tried: the files are not those that were registered"


def promote(uri: str, gates: Gates, *, score: Scorer | None = None, why: str | None = None) -> dict[str, Any]:
    """Move @champion to a version that passes every gate; "ok" says whether it is there now.

    `score` is needed where gates.data is set. Raises InputError for a version that does not exist, and Unreachable.
    """
    client, why = MlflowClient(), _checked(why)
    version = registry.find(client, uri)
    champion = _champion(client, version.name)
    pinned, previous = uri_of(version), uri_of(champion) if champion else None
    if pinned == previous:
        note = "is the champion already"
        return {"model": pinned, "ok": True, "champion": pinned, "previous": None, "gates": [], "note": note}
    digests = _digests(pinned)
    ours = _metrics(version, gates, score) if digests["passed"] else _UNTRIED
    theirs = _metrics(champion, gates, score) if champion and gates.champion else None
    comparable = gates.data is not None or _same_data(version, champion)
    rows = [
        digests,
        _loads(pinned) if digests["passed"] else {"gate": "loads", "value": _UNTRIED, "passed": False},
        *_faults(version, ours),
        *(_bound(name, bound, ours) for name, bound in gates.metrics.items()),
        *(_comparison(name, slack, ours, theirs, comparable) for name, slack in gates.champion.items()),
    ]
    ok = all(row["passed"] for row in rows)
    if ok:
        _crown(client, version, champion, rows, why)
    return {"model": pinned, "ok": ok, "champion": pinned if ok else previous, "previous": previous, "gates": rows}


def rollback(name: str, *, why: str | None = None) -> dict[str, Any]:
    """Undo the last promotion that still stands: @champion goes back, or away where there was none before.

    Raises InputError where there is nothing to undo, and where the version to go back to is gone.
    """
    client = MlflowClient()
    champion = _champion(client, name)
    way_back = _way_back(history(client, name), _number(champion)) if champion else []
    if champion is None or not way_back:
        raise InputError(f"models:/{name}@{CHAMPION}: there is no promotion to undo")
    move = {"to": way_back[-1]["from"], "from": _number(champion), "why": _checked(why), "undoes": True}
    target = registry.find(client, f"models:/{name}/{move['to']}") if move["to"] else None
    with tracking_server.reaching(f"models:/{name}@{CHAMPION}"):
        if target:
            client.set_registered_model_alias(name, CHAMPION, move["to"])
        else:
            client.delete_registered_model_alias(name, CHAMPION)
        at = _note(client, name, move)
    now = uri_of(target) if target else None
    return {"model": name, "champion": now, "previous": uri_of(champion), "at": at, "why": move["why"]}


def history(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """Every move of @champion: "at", "to", "from" and "why"; "undoes" for a rollback. By time."""
    with tracking_server.reaching(f"models:/{name}"):
        tags = client.get_registered_model(name).tags
    moves = {key.removeprefix(MOVE): json.loads(value) for key, value in tags.items() if key.startswith(MOVE)}
    return [{"at": at, **moves[at]} for at in sorted(moves)]


def _crown(
    client: MlflowClient, version: ModelVersion, champion: ModelVersion | None, rows: list[Row], why: str
) -> None:
    name, number = version.name, str(version.version)
    with tracking_server.reaching(uri_of(version)):
        # Noted before it is done: a move that is not noted could not be undone.
        at = _note(client, name, {"to": number, "from": _number(champion), "why": why})
        tags = {"at": at, "why": why, "gates": json.dumps(rows, ensure_ascii=False), "previous": _number(champion)}
        for key, value in tags.items():
            client.set_model_version_tag(name, number, f"{PROMOTED}{key}", value)
        client.set_registered_model_alias(name, CHAMPION, number)


def _way_back(moves: list[dict[str, Any]], champion: str) -> list[dict[str, Any]]:
    """The promotions that led to the champion and are not undone, the last one last.

    A move that the next one does not start from was undone, or noted and never made, or changed by other means.
    """
    standing: list[dict[str, Any]] = []
    for move in [*moves, {"from": champion}]:
        while standing and standing[-1]["to"] != move["from"]:
            standing.pop()
        if "undoes" not in move:
            standing.append(move)
    return standing[:-1]


def _note(client: MlflowClient, name: str, move: dict[str, Any]) -> str:
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    client.set_registered_model_tag(name, f"{MOVE}{at}", json.dumps(move, ensure_ascii=False))
    return at


def _checked(why: str | None) -> str:
    if why and len(why) > MAX_WHY:
        raise InputError(f"--why has {len(why)} characters, more than the {MAX_WHY} that are kept: shorten it")
    return why or ""


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    champions = [version for version in registry.versions(client, name) if CHAMPION in version.aliases]
    return champions[0] if champions else None


def _number(version: ModelVersion | None) -> str:
    return str(version.version) if version else ""


def _digests(pinned: str) -> Row:
    found = registry.verify(pinned)
    faults = [file["fault"] for file in found["files"] if file["fault"]]
    value = "; ".join(faults) or f"{len(found['files'])} files as registered"
    return {"gate": "digests", "value": value, "passed": found["ok"]}


def _loads(pinned: str) -> Row:
    try:
        told, number = _answer(registry.resolve(pinned))
    except (InputError, RuntimeError) as error:  # the latter for weights that are not finite
        return {"gate": "loads", "value": str(error), "passed": False}
    return {"gate": "loads", "value": f"{told} for the input example", "passed": math.isfinite(number)}


def _answer(version: Version) -> tuple[str, float]:
    """What the served model says, by the code of this checkout, and a number in it that has to be finite."""
    import torch

    from pipeline.track.serve.served_model import served_network

    example = model_files.example(version.card.image.size)
    with torch.inference_mode():
        model = served_network(version.card, version.weights)
        (answer,) = model.answers([model.view(example)], {})
    if "boxes" in answer:
        return f"{len(answer['boxes'])} boxes", sum(answer["scores"])
    number, of_what = (
        (answer["scores"][0], "probability") if "scores" in answer else (answer["shares"][0], "share of the pixels")
    )
    return f"{answer['labels'][0]} with a {of_what} of {number:.4g}", number


def _metrics(version: ModelVersion, gates: Gates, score: Scorer | None) -> Metrics:
    """Of the gates' data, or those that were registered; or why there are none."""
    names = {*gates.metrics, *gates.champion}
    if gates.data is None:
        return {name: metric_of(version, name) for name in names}
    assert score is not None, "gates with data need a scorer"
    try:
        scores = score(uri_of(version), gates.data)
    except InputError as error:
        return f"cannot be scored on {gates.data}: {error}"
    measured = {name for name, value in scores.items() if isinstance(value, float)}
    return {name: scores.get(name) for name in names | measured}


def _same_data(version: ModelVersion, champion: ModelVersion | None) -> bool:
    """Whether the registered metrics of both were measured on the same data."""
    return champion is not None and SCORED in version.tags and version.tags[SCORED] == champion.tags.get(SCORED)


def _faults(version: ModelVersion, ours: Metrics) -> list[Row]:
    """A row that fails, whatever the gates name, for a version that is given up or has a metric that is not finite."""
    numbers = [] if isinstance(ours, str) else filter(None, ours.values())
    why = version.tags.get(GIVEN_UP, "has a metric that is not finite")
    good = registry.is_good(version) and all(map(math.isfinite, numbers))
    return [] if good else [{"gate": "good", "value": why, "passed": False}]


def _bound(name: str, bound: Bound, ours: Metrics) -> Row:
    row = {"gate": f"metrics.{name}", "rule": str(bound)}
    if isinstance(ours, str):
        return {**row, "value": ours, "passed": False}
    return {**row, "value": _shown(ours[name]), "passed": bound.holds(ours[name])}


def _comparison(name: str, slack: float, ours: Metrics, theirs: Metrics | None, comparable: bool) -> Row:
    row = {"gate": f"champion.{name}", "rule": f"at most {slack} worse than the champion"}
    if theirs is None:
        return {**row, "value": "there is no champion", "passed": True}
    if isinstance(ours, str) or isinstance(theirs, str):
        return {**row, "value": ours if isinstance(ours, str) else theirs, "passed": False}
    if not comparable:
        why = "registered metrics are not of the same data as the champion's: set data in the gates, to score both on"
        return {**row, "value": why, "passed": False}
    numbers = {"value": _shown(ours[name]), "champion": _shown(theirs[name])}
    return {**row, **numbers, "passed": _not_worse(name, ours[name], theirs[name], slack)}


def _not_worse(name: str, ours: float | None, theirs: float | None, slack: float) -> bool:
    """A champion without a finite value, which nothing can be compared with, holds nobody up."""
    if ours is None or not math.isfinite(ours):
        return False
    if theirs is None or not math.isfinite(theirs):
        return True
    return worth(name, ours) >= worth(name, theirs) - slack


def _shown(value: float | None) -> float | str:
    return value if value is not None and math.isfinite(value) else "not measured, or not finite"
