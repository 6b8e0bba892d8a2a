"""Scores a registered model on a packed data set, draws its predictions, or probes its frozen features.

python launch/evaluate.py --model models:/NAME@ALIAS --data DIR [--draw N]
python launch/evaluate.py --model models:/NAME@ALIAS --data DIR --train DIR --probe knn|linear

A probe fits a classifier to the features of one data set and scores it on another; their classes need not be the
model's. Several ranks share the work: deepspeed launch/evaluate.py …
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import cli
from pipeline.commands.endings import describe_evaluation
from pipeline.config import ClassificationConfig
from pipeline.errors import InputError
from pipeline.redact import printable
from pipeline.shards.cache import CacheOptions
from pipeline.shards.index import ShardSet
from pipeline.shards.open_data import open_data
from pipeline.track.model_card import ModelCard

# These take seconds to import, which --help and wrong usage do without.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.protocols import Task
    from pipeline.track.registry import registry
    from pipeline.world import World


class OpenedModel(NamedTuple):
    """A registered model, and a data set of its classes."""

    uri: str
    """The exact version."""
    data: str
    card: ModelCard
    task: "Task"
    shards: ShardSet


def main() -> dict[str, Any] | None:
    parser = cli.make_parser("launch/evaluate.py", "Score a registered model.")
    parser.add_argument("--model", required=True, metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="packed data set, or label maps of ADE20K's layout"
    )
    parser.add_argument("--tracking-uri", metavar="URI")
    parser.add_argument("--draw", type=int, metavar="N", help="draw N predictions")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="file of --draw (default ./NAME-VERSION.png)")
    parser.add_argument(
        "--log",
        action="store_true",
        help="also attach the drawing to the model's MLflow run; check that the images' licence allows that",
    )
    parser.add_argument("--probe", choices=("knn", "linear"), help="classify by the features of the frozen backbone")
    parser.add_argument("--train", metavar="DIR", help="packed data set to which the probe is fitted")
    cli.add_cache(parser)
    parser.add_argument(
        "--k", type=int, default=20, metavar="K", help="number of neighbours of --probe knn (default 20)"
    )
    # The deepspeed launcher adds this option.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    _check_usage(arguments)
    cache = cli.cache_of(arguments)
    # Imported late, after all checks that need no torch.
    from pipeline import world

    here = world.start()
    if arguments.probe:
        result = probe_features(arguments, here)
    else:
        opened = open_all(arguments.model, arguments.data, arguments.tracking_uri, here, cache)
        result = score(opened, here)
        if result and arguments.draw:
            result["drawing"] = str(_draw_predictions(opened, arguments.draw, arguments.out, arguments.log))
        if result:
            cli.show(describe_evaluation(result))
    world.stop()
    return result


def _check_usage(arguments: argparse.Namespace) -> None:
    if bool(arguments.probe) != bool(arguments.train):
        raise InputError("--probe and --train belong together: what to fit, and the data set to fit it to")
    if arguments.probe and arguments.draw:
        raise InputError("--draw shows the model's predictions, and --probe uses only its features: give one of them")
    if arguments.draw is not None and arguments.draw < 1:
        raise InputError(f"--draw {arguments.draw}: a number of at least 1 was expected")
    if arguments.k < 1:
        raise InputError(f"--k {arguments.k}: a number of at least 1 was expected")
    if (arguments.out or arguments.log) and not arguments.draw:
        raise InputError("--out and --log need a drawing: give --draw N, too")
    if arguments.out and not arguments.out.parent.is_dir():
        raise InputError(f"--out {arguments.out}: there is no folder {arguments.out.parent}: create it")


def open_all(uri: str, data: str, tracking_uri: str | None, here: "World", cache: CacheOptions) -> OpenedModel:
    """Returns a registered model on this rank's device, in evaluation mode, and a data set of its classes.

    Raises InputError where one of them cannot be read or they do not match.
    """
    opened = here.first_then_all(lambda: _open_model(uri, data, tracking_uri, cache))
    opened.task.model.to(here.device)
    return opened


def score(opened: OpenedModel, here: "World") -> dict[str, Any] | None:
    """Evaluates as the training run did: with the registered weights in fp32, its batch size and its view of an image.
    Returns the command's result on rank 0, and None on the others."""
    import torch

    from pipeline.feed.loader import EvalFeed
    from pipeline.train.evaluate import evaluate

    uri, data, card, task, shards = opened
    batches = EvalFeed(shards, here, card.image, task=card.task, batch_size=card.eval_batch_size)
    with torch.inference_mode():
        scores = evaluate(lambda batch: task.outputs(task.model, batch), batches, task.metric(), here)
    if not here.is_first:
        return None
    # Only a run that is being stopped gives an evaluation up.
    assert scores is not None
    return {"model": uri, "data": data, "digest": shards.digest, "samples": len(shards), **scores}


def probe_features(arguments: argparse.Namespace, here: "World") -> dict[str, Any] | None:
    """Scores k nearest neighbours, or a linear classifier, on the features of the registered classifier's backbone.
    Returns the command's result on rank 0, and None on the others."""
    from pipeline.tasks import probe
    from pipeline.tasks.classify import ClassificationMetric
    from pipeline.world import World

    pinned, card, task, train_shards, shards = here.first_then_all(lambda: _open_for_probe(arguments))
    network = task.model.to(here.device)
    train_features, train_labels, _ = _compute_features(network, card, train_shards, here)
    features, labels, weights = _compute_features(network, card, shards, here)
    if not here.is_first:
        return None
    num_classes = len(shards.classes)
    if arguments.probe == "knn":
        logits = probe.knn(train_features, train_labels, features, num_classes, k=arguments.k)
    else:
        logits = probe.linear_probe(train_features, train_labels, features, num_classes)
    metric = ClassificationMetric()
    metric.update(logits, labels, weights)
    # The features of all ranks are here, so this rank is a world of its own.
    scores = metric.result(World())
    result = {"model": pinned, "probe": arguments.probe}
    if arguments.probe == "knn":
        result["k"] = arguments.k
    return {
        **result,
        "train": arguments.train,
        "data": arguments.data,
        "digest": shards.digest,
        "samples": len(shards),
        # Votes and scores are no logits, so their loss says nothing.
        **{name: score for name, score in scores.items() if name != "val_loss"},
        "bad_samples": len(shards) - int(weights.sum()),
    }


def _compute_features(
    network: "torch.nn.Module", card: ModelCard, shards: ShardSet, here: "World"
) -> "tuple[Tensor, Tensor, Tensor]":
    """Returns features [n, d], labels [n] and weights [n] of all samples, on all ranks. Collective."""
    import torch

    from pipeline.feed.loader import EvalFeed
    from pipeline.tasks import probe

    feed = EvalFeed(shards, here, card.image, batch_size=card.eval_batch_size)
    with torch.inference_mode():
        batches = [(probe.features(network, batch.images), batch.targets, batch.weights) for batch in feed]
    # [rank, batch, sample, …] to the stored order, in which rank r has batches r, r + W, …
    columns = []
    for column in zip(*batches, strict=True):
        gathered = here.gather(torch.stack(column))
        columns.append(gathered.transpose(0, 1).flatten(0, 2))
    features, labels, weights = columns
    # Samples that pad the last batches, or are damaged, have weight zero.
    is_sample = weights > 0
    return features[is_sample], labels[is_sample], weights[is_sample]


def _open_for_probe(arguments: argparse.Namespace) -> "tuple[str, ModelCard, Task, ShardSet, ShardSet]":
    from pipeline.feed.task_transforms import require_annotations
    from pipeline.track import tracking_server
    from pipeline.track.registry import registry

    tracking_server.connect(tracking_server.tracking_uri(arguments.tracking_uri))
    cache = cli.cache_of(arguments)
    train_shards = open_data(arguments.train, cache=cache)
    shards = open_data(arguments.data, cache=cache)
    require_annotations(ClassificationConfig(), train_shards)
    require_annotations(ClassificationConfig(), shards)
    if train_shards.classes != shards.classes:
        raise InputError(
            f"--train {arguments.train} has the classes {_format_classes(train_shards.classes)} but "
            f"--data {arguments.data} {_format_classes(shards.classes)}: "
            "pack one of them with --classes-from of the other"
        )
    version = registry.resolve(arguments.model)
    task = _build_task(version)
    if version.card.task.is_dense:
        raise InputError(f"--probe {version.uri}: is a {version.card.task.name}; features are those of a classifier")
    return version.uri, version.card, task, train_shards, shards


def _open_model(uri: str, data: str, tracking_uri: str | None, cache: CacheOptions) -> OpenedModel:
    from pipeline.feed.task_transforms import require_annotations
    from pipeline.track import tracking_server
    from pipeline.track.registry import registry

    tracking_server.connect(tracking_server.tracking_uri(tracking_uri))
    shards = open_data(data, cache=cache)
    version = registry.resolve(uri)
    card = version.card
    card.require_head(version.uri)
    require_annotations(card.task, shards)
    if shards.classes != card.classes:
        raise InputError(
            f"{data} has the classes {_format_classes(shards.classes)} but {version.uri} was trained on "
            f"{_format_classes(card.classes)}: pack the data with --classes-from of the training data"
        )
    return OpenedModel(version.uri, data, card, _build_task(version), shards)


def _build_task(version: "registry.Version") -> "Task":
    from pipeline.tasks.build import build_trained

    card = version.card
    return build_trained(card.task, card.model, card.image, card.classes, version.weights)


def _draw_predictions(opened: OpenedModel, count: int, out: Path | None, log: bool) -> Path:
    from pipeline.tasks import draw_predictions
    from pipeline.track.registry import registry

    name, number = opened.uri.removeprefix("models:/").split("/")
    path = out or Path(f"{name}-{number}.png")
    draw_predictions.draw_predictions(opened.task, opened.shards, opened.card, count, path, opened.uri)
    if log:
        registry.attach(opened.uri, path)
    return path


def _format_classes(names: list[str]) -> str:
    """Returns the number of classes and their first names."""
    first = ", ".join(printable(name) for name in names[:5])
    return f"{len(names)}: {first}{', …' if len(names) > 5 else ''}"
