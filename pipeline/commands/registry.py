"""Look at registered models, check them, trace them, make one the champion, and bring in others' weights.

python launch/registry.py list [NAME]                       models, or one's versions
python launch/registry.py show URI                          what is known of a version
python launch/registry.py verify URI                        every byte in the store against its digest
python launch/registry.py fetch URI                         a copy here, every byte checked
python launch/registry.py lineage URI|NAME [--out FILE]     data set, run, version, and what was made of it
python launch/registry.py promote URI --gates FILE [--why]  move @champion to it if it passes
python launch/registry.py rollback NAME [--why TEXT]        undo that
python launch/registry.py import FILE --name N --model M    published weights as a version
python launch/registry.py export URI --to T --out FOLDER    for timm, Transformers, onnxruntime, torch.export
python launch/registry.py sync RUN                          send what the tracking server lacks of a run
python launch/registry.py relocate                          repair the paths of a runs folder that was moved or copied

URI is models:/NAME/VERSION or models:/NAME@ALIAS, RUN a run's folder, runs/NAME.
"""

import contextlib
import re
import sys
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cli, lease
from pipeline.cli import Subcommand
from pipeline.cluster import slurm
from pipeline.errors import InputError
from pipeline.redact import printable

if TYPE_CHECKING:  # MLflow takes a second to import, which --help and wrong usage do without
    from pipeline.track.registry.registry import MlflowClient, ModelVersion


def main() -> dict[str, Any]:
    return cli.choose("launch/registry.py", "Look after registered models.", SUBCOMMANDS)


def _list_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a registered model; without it, all of them")
    _add_server(parser)


def _list(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.registry import versions

    rows = [_row(version) for version in versions(_connect(arguments), arguments.name)]
    if arguments.name and not rows:
        raise InputError(f"{arguments.name}: no registered model has this name, or it has no version")
    print(_table(rows), file=sys.stderr)
    return {"versions": rows}


def _row(version: "ModelVersion") -> dict[str, Any]:
    from pipeline.track.registry.registry import METRIC, metric_of, uri_of

    names = [tag.removeprefix(METRIC) for tag in version.tags if tag.startswith(METRIC)]
    return {
        "uri": uri_of(version),
        "aliases": sorted(version.aliases),
        "model": version.tags.get("model"),
        "step": version.tags.get("step"),
        "created": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        "metrics": {name: metric_of(version, name) for name in names},
    }


def _table(rows: list[dict[str, Any]]) -> str:
    from pipeline.track.metric_names import is_detail

    wide = max([len(row["uri"]) for row in rows] + [7])
    lines = [f"{'version':{wide}}  {'model':10}  {'step':>9}  {'created':25}  metrics, aliases"]
    for row in rows:
        scores = {name: value for name, value in row["metrics"].items() if not is_detail(name)}
        told = [_told(scores), *(f"@{alias}" for alias in row["aliases"])]
        about = f"{row['model'] or '':10}  {row['step'] or '':>9}  {row['created']}"
        lines.append(f"{row['uri']:{wide}}  {about}  {'  '.join(filter(None, told))}".rstrip())
    return "\n".join(map(printable, lines))


def _told(metrics: dict[str, float | None]) -> str:
    shown = {name: "not finite" if value is None else f"{value:.4g}" for name, value in metrics.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _show(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.registry import find

    version = find(_connect(arguments), arguments.uri)
    result = {**_row(version), "run_id": version.run_id, "tags": dict(sorted(version.tags.items()))}
    rows = {
        "aliases": " ".join(f"@{alias}" for alias in result["aliases"]) or "none",
        "created": result["created"],
        "metrics": _told(result["metrics"]) or "none",
        "run id": version.run_id or "none",
        **result["tags"],
    }
    lines = [result["uri"], *(f"  {name:38}{value}" for name, value in rows.items())]
    print("\n".join(map(printable, lines)), file=sys.stderr)
    return result


def _verify(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.registry import verify

    _connect(arguments)
    result = verify(arguments.uri)
    for file in result["files"]:
        print(file["fault"] or f"{file['file']} as registered", file=sys.stderr)
    return result


def _fetch(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.registry import resolve

    _connect(arguments)
    version = resolve(arguments.uri)
    return {"model": version.uri, "path": str(version.folder.parent)}


def _lineage_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="URI|NAME", help="a version, or a registered model with all its versions")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also draw it: .png or .svg")
    _add_server(parser)


def _lineage(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry import lineage

    _connect(arguments)
    tree = lineage.lineage(arguments.subject)
    print(lineage.text(tree), file=sys.stderr)
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

        here = world.start()

        def score(model: str, data: str) -> dict[str, Any]:
            opened = evaluate.open_all(model, data, tracking_uri, here, cli.cache_of(arguments))
            return evaluate.score(opened, here) or {}

        result = promote(arguments.uri, gates, score=score, why=arguments.why)
        world.stop()
    for row in result["gates"]:
        print(_gate(row), file=sys.stderr)
    if "note" in result:
        print(f"{result['model']}: {result['note']}", file=sys.stderr)
    return result


def _gate(row: dict[str, Any]) -> str:
    about = [row["rule"]] if "rule" in row else []
    about += [f"the champion has {row['champion']}"] if "champion" in row else []
    told = f"{'passed' if row['passed'] else 'FAILED'}  {row['gate']}: {row['value']}"
    return f"{told} ({'; '.join(about)})" if about else told


def _rollback_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the registered model")
    _add_why(parser)
    _add_server(parser)


def _rollback(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry.promote import rollback

    _connect(arguments)
    return rollback(arguments.name, why=arguments.why)


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="FILE|FOLDER",
        help=".pth of the public repository, .safetensors file, or folder that Transformers wrote",
    )
    parser.add_argument("--name", required=True, help="of the registered model that receives the version")
    parser.add_argument("--model", required=True, help="architecture, such as pvt_large")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="default: that of the position embeddings, or 224 where it has none",
    )
    parser.add_argument(
        "--weights", metavar="ENTRY", help="of a training checkpoint; default: the moving average, or else the weights"
    )
    parser.add_argument("--sha256", metavar="HEX", help="refuse the file unless this is its digest, as published")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, a line each, in order")
    classes.add_argument("--classes-from", metavar="ROOT", help="data set whose class list to use")
    _add_server(parser)


def _import(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.registry import import_weights

    classes = _classes(arguments)
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


def _classes(arguments: Namespace) -> list[str] | None:
    """Raises InputError for a list that cannot be one of classes."""
    if arguments.classes_from:
        from pipeline.shards.index import read_manifest

        return read_manifest(arguments.classes_from).classes
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
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to be made; not one with files")
    parser.add_argument("--data", metavar="DIR", help="packed data set to compare on; default: two photographs")
    cli.add_cache(parser)


def _export(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.export import export

    _connect(arguments)
    cache = cli.cache_of(arguments)
    result = export(arguments.uri, arguments.to, arguments.out, arguments.data, shards_cache=cache)
    what = "images" if result["predictions"] == result["images"] else "places of the maps"
    same = f"{result['same_top1']} of {result['predictions']} {what} get the same class"
    print(f"{same}, logits differ by up to {result['logit_difference']:.1g}; open it with:", file=sys.stderr)
    print(f"  {result['open']}", file=sys.stderr)
    return result


def _sync_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, which says where it is tracked")


def _sync(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track.sync.mirror import Mirror
    from pipeline.track.sync.outbox import Outbox
    from pipeline.track.sync.record import Record
    from pipeline.track.tracking_server import Unreachable

    folder: Path = arguments.run
    record = Record.read(folder)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lease.hold(folder, slurm.has_ended))
        except BlockingIOError:
            raise InputError(f"{folder}: its job is at work and sends everything by itself; wait for its end") from None
        if record.status == "RUNNING":  # and yet nobody is at work: the job was killed
            record.end(folder, "KILLED")
        mirror = Mirror(folder)
        lacking, before = mirror.behind, mirror.run_id
        try:
            mirror.sync()
        except Unreachable as error:
            raise Unreachable(f"{error}; still to be sent: {mirror.behind}") from error
        if before not in (None, mirror.run_id):
            lacking = "everything, as the server had lost the run"
        left, missing = mirror.behind, [entry.name for entry in Outbox(folder).missing()]
    print(f"{folder}: sent: {lacking or 'nothing was lacking'}", file=sys.stderr)
    return {
        "run": str(folder),
        "ok": not left,
        "run_id": mirror.run_id,
        "status": record.status,
        "sent": lacking,
        "left": left,
        "missing": missing,
    }


def _relocate(arguments: Namespace) -> dict[str, Any]:
    from pipeline.track import relocate, tracking_server

    uri = tracking_server.tracking_uri(arguments.tracking_uri)
    database = tracking_server.embedded(uri)
    if database is None or not database.exists():
        raise InputError(f"--tracking-uri {uri}: no such database; give the moved one, as sqlite:///NEW/runs/mlflow.db")
    num_paths = relocate.relocate(database)
    print(f"{database}: {num_paths} paths were changed", file=sys.stderr)
    return {"database": str(database), "paths": num_paths}


def _add_uri(parser: ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    _add_server(parser)


def _add_server(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="default $MLFLOW_TRACKING_URI or, without it, runs/mlflow.db"
    )


def _add_why(parser: ArgumentParser) -> None:
    parser.add_argument("--why", metavar="TEXT", help="to be kept with it")


def _connect(arguments: Namespace, *, create: bool = False) -> "MlflowClient":
    from pipeline.track import tracking_server

    return tracking_server.connect(tracking_server.tracking_uri(arguments.tracking_uri), create=create)


SUBCOMMANDS = {
    "list": Subcommand("list registered versions", _list_arguments, _list),
    "show": Subcommand("print what is known of a version", _add_uri, _show),
    "verify": Subcommand("compare every stored byte of a version with its digest", _add_uri, _verify),
    "fetch": Subcommand("copy a version here, every byte checked, and print where it is", _add_uri, _fetch),
    "lineage": Subcommand("print where a model comes from and what was made of it", _lineage_arguments, _lineage),
    "promote": Subcommand("make a version @champion if it passes every gate", _promote_arguments, _promote),
    "rollback": Subcommand("undo the last promotion that stands", _rollback_arguments, _rollback),
    "import": Subcommand("register weights that others have published", _import_arguments, _import),
    "export": Subcommand("write a version for another program, once it computes the same", _export_arguments, _export),
    "sync": Subcommand("send what the tracking server lacks of a run", _sync_arguments, _sync),
    "relocate": Subcommand("repair the paths of a database that was moved or copied", _add_server, _relocate),
}
