"""Manages registered models: lists, verifies, traces, promotes, imports and exports their versions.

python launch/registry.py list [NAME]                       all registered models, or the versions of one
python launch/registry.py show URI                          the metadata of a version
python launch/registry.py verify URI                        every stored byte against its digest
python launch/registry.py fetch URI                         a local copy, every byte checked
python launch/registry.py lineage URI|NAME [--out FILE]     data set, run, version, and the models derived from it
python launch/registry.py promote URI --gates FILE [--why]  move @champion to the version if it passes the gates
python launch/registry.py rollback NAME [--why TEXT]        undo the last promotion
python launch/registry.py import FILE --name N --model M    published weights as a version
python launch/registry.py export URI --to T --out FOLDER    for timm, Transformers, onnxruntime, torch.export
python launch/registry.py sync RUN                          send what is missing on the tracking server of a run
python launch/registry.py relocate                          repair the paths of a runs folder that was moved or copied

URI is models:/NAME/VERSION or models:/NAME@ALIAS, RUN a run's folder, runs/NAME.
"""

import contextlib
import re
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cli, lease
from pipeline.cli import Subcommand
from pipeline.cluster import slurm
from pipeline.commands.text_table import align_columns, list_values
from pipeline.errors import InputError
from pipeline.redact import printable
from pipeline.track.metric_names import format_scores, is_detail

# MLflow takes a second to import, which --help and wrong usage do without.
if TYPE_CHECKING:
    from pipeline.track.registry.registry import MlflowClient, ModelVersion


def main() -> dict[str, Any]:
    return cli.choose("launch/registry.py", "Manage registered models.", SUBCOMMANDS)


def _list_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a registered model; without it, all of them")
    _add_server(parser)


def _list(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.registry import list_versions

    rows = [_describe_version(version) for version in list_versions(_connect(arguments), arguments.name)]
    if arguments.name and not rows:
        raise InputError(f"{arguments.name}: no registered model has this name, or it has no version")
    cli.show(_render_table(rows))
    return {"versions": rows}


def _describe_version(version: "ModelVersion") -> dict[str, Any]:
    from pipeline.track.registry.registry import METRIC, metric_of, uri_of

    names = [tag.removeprefix(METRIC) for tag in version.tags if tag.startswith(METRIC)]
    created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    return {
        "uri": uri_of(version),
        "aliases": sorted(version.aliases),
        "model": version.tags.get("model"),
        "step": version.tags.get("step"),
        "created": created.isoformat(timespec="seconds"),
        "metrics": {name: metric_of(version, name) for name in names},
    }


def _render_table(rows: list[dict[str, Any]]) -> str:
    cells = [("version", "model", "step", "created", "metrics, aliases")]
    for row in rows:
        scores = {name: value for name, value in row["metrics"].items() if not is_detail(name)}
        details = [format_scores(scores)] if scores else []
        details += [f"@{alias}" for alias in row["aliases"]]
        cells.append((row["uri"], row["model"] or "", row["step"] or "", row["created"], "  ".join(details)))
    return "\n".join(printable(line) for line in align_columns(cells, right=(2,)))


def _show(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.registry import find_version

    version = find_version(_connect(arguments), arguments.uri)
    result = {**_describe_version(version), "run_id": version.run_id, "tags": dict(sorted(version.tags.items()))}
    rows = {
        "aliases": " ".join(f"@{alias}" for alias in result["aliases"]) or "none",
        "created": result["created"],
        "metrics": format_scores(result["metrics"]) or "none",
        "run id": version.run_id or "none",
        **result["tags"],
    }
    cli.show("\n".join(printable(line) for line in list_values(result["uri"], rows)))
    return result


def _verify(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.registry import verify

    _connect(arguments)
    result = verify(arguments.uri)
    for file in result["files"]:
        cli.show(file["fault"] or f"{file['file']} is as registered")
    return result


def _fetch(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.registry import resolve

    _connect(arguments)
    version = resolve(arguments.uri)
    cli.show(f"{version.uri} is in {version.folder.parent}, as registered")
    return {"model": version.uri, "path": str(version.folder.parent)}


def _lineage_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="URI|NAME", help="a version, or a registered model with all its versions")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also draw it to a .png or .svg file")
    _add_server(parser)


def _lineage(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry import lineage

    _connect(arguments)
    tree = lineage.lineage(arguments.subject)
    cli.show(lineage.text(tree))
    if arguments.out:
        lineage.draw(tree, arguments.out)
        tree["picture"] = str(arguments.out)
    return tree


def _promote_arguments(parser: ArgumentParser) -> None:
    _add_uri(parser)
    parser.add_argument("--gates", required=True, metavar="FILE", help="YAML; see configs/gates/classification.yaml")
    cli.add_cache(parser)
    _add_why(parser)


def _promote(arguments: Namespace) -> dict[str, Any]:
    from pipeline.config import Gates, load_section
    from pipeline.track.registry.promote import promote

    gates = load_section(Gates, arguments.gates)
    tracking_uri = _connect(arguments).tracking_uri
    if gates.data is None:
        result = promote(arguments.uri, gates, why=arguments.why)
    else:
        from pipeline import world
        from pipeline.commands import evaluate

        # The gates name a data set, so the version is scored here, by all ranks of this command.
        here = world.start()

        def score(model: str, data: str) -> dict[str, Any]:
            opened = evaluate.open_all(model, data, tracking_uri, here, cli.cache_of(arguments))
            return evaluate.score(opened, here) or {}

        result = promote(arguments.uri, gates, score=score, why=arguments.why)
        world.stop()
    for row in result["gates"]:
        cli.show(_format_gate(row))
    cli.show(_describe_promotion(result))
    return result


def _describe_promotion(result: dict[str, Any]) -> str:
    model = result["model"]
    if "note" in result:
        return f"{model}: {result['note']}"
    previous = result["previous"] or "no version"
    if result["ok"]:
        return f"{model} is the champion now; {previous} was before"
    return f"{model} was not promoted: {previous} stays the champion"


def _format_gate(row: dict[str, Any]) -> str:
    verdict = "passed" if row["passed"] else "FAILED"
    text = f"{verdict}  {row['gate']}: {row['value']}"
    details = []
    if "rule" in row:
        details.append(row["rule"])
    if "champion" in row:
        details.append(f"the champion has {row['champion']}")
    return f"{text} ({'; '.join(details)})" if details else text


def _rollback_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the registered model")
    _add_why(parser)
    _add_server(parser)


def _rollback(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.promote import rollback

    _connect(arguments)
    result = rollback(arguments.name, why=arguments.why)
    champion = result["champion"] or "no version"
    cli.show(f"{champion} is the champion again; {result['previous']} was before")
    return result


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="FILE|FOLDER",
        help=".pth file of the public repository, .safetensors file, or folder written by Transformers",
    )
    parser.add_argument("--name", required=True, help="name of the registered model that receives the version")
    parser.add_argument("--model", required=True, help="architecture, such as pvt_large")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="default: the size for which the position embeddings were made, or 224 without them",
    )
    parser.add_argument(
        "--weights",
        metavar="ENTRY",
        help="entry of a training checkpoint; default: the moving average, or else the weights",
    )
    parser.add_argument("--sha256", metavar="HEX", help="refuse the file unless this is its digest, as published")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes in order, one a line")
    classes.add_argument("--classes-from", metavar="ROOT", help="data set whose class list to use")
    _add_server(parser)


def _import(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry import import_weights

    classes = _read_classes(arguments)
    if arguments.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", arguments.sha256):
        raise InputError(f"--sha256 {arguments.sha256}: 64 hexadecimal digits were expected")
    uri = import_weights.import_weights(
        _connect(arguments, create=True),
        arguments.source,
        arguments.name,
        model=arguments.model,
        image_size=arguments.image_size,
        classes=classes,
        entry=arguments.weights,
        sha256=arguments.sha256,
    )
    return {"model": uri, "source": str(arguments.source)}


def _read_classes(arguments: Namespace) -> list[str] | None:
    """Returns the names of the classes, if given. Raises InputError for a list with an empty or a repeated name."""
    if arguments.classes_from:
        from pipeline.shards.manifest import read_classes

        return read_classes(arguments.classes_from)
    if arguments.classes is None:
        return None
    try:
        names = arguments.classes.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {arguments.classes}: cannot be read: {error}") from error
    if "" in names or len(set(names)) != len(names):
        raise InputError(f"--classes {arguments.classes}: a name on every line, each once, was expected")
    return names


def _export_arguments(parser: ArgumentParser) -> None:
    _add_uri(parser)
    parser.add_argument("--to", required=True, help="timm, transformers, safetensors, onnx or torch-export")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty folder")
    parser.add_argument("--data", metavar="DIR", help="packed data set to compare on; default: two photographs")
    cli.add_cache(parser)


def _export(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.export import export

    _connect(arguments)
    cache = cli.cache_of(arguments)
    result = export(arguments.uri, arguments.to, arguments.out, arguments.data, shards_cache=cache)
    # A classifier makes one prediction for each image, others make one for each position of a map.
    unit = "images" if result["predictions"] == result["images"] else "positions of the maps"
    same = f"{result['same_top1']} of {result['predictions']} {unit} get the same class"
    cli.show(f"{same}, logits differ by up to {result['logit_difference']:.1g}; open it with:")
    cli.show(f"  {result['open']}")
    return result


def _sync_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, which has the tracking server's address")


def _sync(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.sync.mirror import Mirror
    from pipeline.track.sync.outbox import Outbox
    from pipeline.track.sync.record import Record
    from pipeline.track.tracking_server import Unreachable

    folder: Path = arguments.run
    record = Record.read(folder)
    with contextlib.ExitStack() as resources:
        try:
            resources.enter_context(lease.hold(folder, slurm.has_ended))
        except BlockingIOError:
            raise InputError(f"{folder}: its job is at work and sends everything by itself; wait for its end") from None
        # The lease is free, so the job that has this status was killed.
        if record.status == "RUNNING":
            record.end(folder, "KILLED")
        mirror = Mirror(folder)
        to_send = mirror.behind
        previous_id = mirror.run_id
        try:
            mirror.sync()
        except Unreachable as error:
            raise Unreachable(f"{error}; still to be sent: {mirror.behind}") from error
        if previous_id not in (None, mirror.run_id):
            to_send = "everything, as the server had lost the run"
        left = mirror.behind
        missing = [entry.name for entry in Outbox(folder).missing()]
    cli.show(f"{folder}: sent: {to_send or 'nothing was missing'}")
    return {
        "run": str(folder),
        "ok": not left,
        "run_id": mirror.run_id,
        "status": record.status,
        "sent": to_send,
        "left": left,
        "missing": missing,
    }


def _relocate(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track import relocate, tracking_server

    uri = tracking_server.tracking_uri(arguments.tracking_uri)
    database = tracking_server.embedded_database(uri)
    if database is None or not database.exists():
        raise InputError(f"--tracking-uri {uri}: no such database; give the moved one, as sqlite:///NEW/runs/mlflow.db")
    num_paths = relocate.relocate(database)
    cli.show(f"{database}: {num_paths} paths were changed")
    return {"database": str(database), "paths": num_paths}


def _add_uri(parser: ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    _add_server(parser)


def _add_server(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="tracking server (default $MLFLOW_TRACKING_URI or, without it, runs/mlflow.db)",
    )


def _add_why(parser: ArgumentParser) -> None:
    parser.add_argument("--why", metavar="TEXT", help="reason, which is stored with the promotion")


def _connect(arguments: Namespace, *, create: bool = False) -> "MlflowClient":
    from pipeline.track import tracking_server

    return tracking_server.connect(tracking_server.tracking_uri(arguments.tracking_uri), create=create)


SUBCOMMANDS = {
    "list": Subcommand("list registered versions", _list_arguments, _list),
    "show": Subcommand("print the metadata of a version", _add_uri, _show),
    "verify": Subcommand("compare every stored byte of a version with its digest", _add_uri, _verify),
    "fetch": Subcommand("copy a version here, every byte checked, and print its path", _add_uri, _fetch),
    "lineage": Subcommand(
        "print what a model was made from and what was derived from it", _lineage_arguments, _lineage
    ),
    "promote": Subcommand("make a version @champion if it passes every gate", _promote_arguments, _promote),
    "rollback": Subcommand("undo the last promotion that stands", _rollback_arguments, _rollback),
    "import": Subcommand("register published weights", _import_arguments, _import),
    "export": Subcommand("write a version for another program and compare their outputs", _export_arguments, _export),
    "sync": Subcommand("send what is missing on the tracking server of a run", _sync_arguments, _sync),
    "relocate": Subcommand("repair the paths of a database that was moved or copied", _add_server, _relocate),
}
