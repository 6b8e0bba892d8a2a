"""Score a registered model on a packed data set, draw what it predicts, or probe its frozen features.

python launch/evaluate.py --model models:/NAME@ALIAS --data DIR [--draw N]
python launch/evaluate.py --model models:/NAME@ALIAS --data DIR --train DIR --probe knn|linear

A probe fits a classifier to the features of one data set and scores it on another; their classes need not be the
model's. Several ranks share the work: deepspeed launch/evaluate.py …
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import cli
from pipeline.config import ClassificationConfig
from pipeline.errors import InputError
from pipeline.redact import printable
from pipeline.shards.cache import CacheOptions
from pipeline.shards.index import ShardSet
from pipeline.shards.open_data import open_data
from pipeline.track.model_card import ModelCard

if TYPE_CHECKING:  # these take seconds to import, which --help and wrong usage do without
    import torch
    from torch import Tensor

    from pipeline.tasks.build import AnyTask
    from pipeline.tasks.classify import ClassificationTask
    from pipeline.track.registry import registry
    from pipeline.world import World


class OpenedModel(NamedTuple):
    uri: str
    """With the version's number."""
    data: str
    card: ModelCard
    task: "AnyTask"
    shards: ShardSet


def main() -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Score a registered model.")
    parser.add_argument("--model", required=True, metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="packed data set, or label maps of ADE20K's layout"
    )
    parser.add_argument("--tracking-uri", metavar="URI")
    parser.add_argument("--draw", type=int, metavar="N", help="draw N predictions")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="of --draw (default ./NAME-VERSION.png)")
    parser.add_argument(
        "--log",
        action="store_true",
        help="also attach the drawing to the model's MLflow run, which the images' licence has to allow",
    )
    parser.add_argument("--probe", choices=("knn", "linear"), help="classify by the features of the frozen backbone")
    parser.add_argument("--train", metavar="DIR", help="packed data set that the probe is fitted to")
    cli.add_cache(parser)
    parser.add_argument("--k", type=int, default=20, metavar="K", help="neighbours of --probe knn (default 20)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    _check(arguments)
    cache = cli.cache_of(arguments)
    from pipeline import world

    here = world.start()
    if arguments.probe:
        result = probed(arguments, here)
    else:
        opened = open_all(arguments.model, arguments.data, arguments.tracking_uri, here, cache)
        result = score(opened, here)
        if result and arguments.draw:
            result["drawing"] = str(_draw(opened, arguments.draw, arguments.out, arguments.log))
    world.stop()
    return result


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.probe) != bool(arguments.train):
        raise InputError("--probe and --train belong together: what to fit, and the data set to fit it to")
    if arguments.probe and arguments.draw:
        raise InputError("--draw shows what the model predicts, and --probe asks its features only: give one of them")
    if arguments.draw is not None and arguments.draw < 1:
        raise InputError(f"--draw {arguments.draw}: a number of at least 1 was expected")
    if arguments.k < 1:
        raise InputError(f"--k {arguments.k}: a number of at least 1 was expected")
    if (arguments.out or arguments.log) and not arguments.draw:
        raise InputError("--out and --log are for a drawing: give --draw N, too")
    if arguments.out and not arguments.out.parent.is_dir():
        raise InputError(f"--out {arguments.out}: there is no folder {arguments.out.parent}: make it")


def open_all(uri: str, data: str, tracking_uri: str | None, here: "World", cache: CacheOptions) -> OpenedModel:
    """A registered model on this rank's device, in evaluation mode, and a data set of its classes.

    Raises InputError where one of them cannot be read or they do not fit.
    """
    opened = here.first_then_all(lambda: _open(uri, data, tracking_uri, cache))
    opened.task.model.to(here.device)
    return opened


def score(opened: OpenedModel, here: "World") -> dict[str, Any] | None:
    """Evaluate as the training run did: the registered weights in fp32, its batches, its view of each image."""
    import torch

    from pipeline.feed.loader import EvalFeed
    from pipeline.train.evaluate import evaluate

    uri, data, card, task, shards = opened
    batches = EvalFeed(shards, here, card.image, task=card.task, batch_size=card.eval_batch_size)
    with torch.inference_mode():
        scores = evaluate(lambda batch: task.outputs(task.model, batch), batches, task.metric(), here)
    if not here.is_first:
        return None
    assert scores is not None  # nothing told it to give up
    return {"model": uri, "data": data, "digest": shards.digest, "samples": len(shards), **scores}


def probed(arguments: argparse.Namespace, here: "World") -> dict[str, Any] | None:
    """Score k nearest neighbours, or a linear classifier, on the features of the registered classifier's backbone."""
    from pipeline.tasks import probe
    from pipeline.tasks.classify import ClassificationMetric
    from pipeline.world import World

    pinned, card, task, fitted, shards = here.first_then_all(lambda: _open_for_probe(arguments))
    network = task.model.to(here.device)
    (train_x, train_y, _), (x, y, weights) = (_features(network, card, each, here) for each in (fitted, shards))
    if not here.is_first:
        return None
    if arguments.probe == "knn":
        scores = probe.knn(train_x, train_y, x, len(shards.classes), k=arguments.k)
    else:
        scores = probe.linear_probe(train_x, train_y, x, len(shards.classes))
    metric = ClassificationMetric()
    metric.update(scores, y, weights)
    found = metric.result(World())
    return {
        "model": pinned,
        "probe": arguments.probe,
        **({"k": arguments.k} if arguments.probe == "knn" else {}),
        "train": arguments.train,
        "data": arguments.data,
        "digest": shards.digest,
        "samples": len(shards),
        "top1": found["top1"],
        "top5": found["top5"],
        "bad_samples": len(shards) - int(weights.sum()),
    }


def _features(
    network: "torch.nn.Module", card: ModelCard, shards: ShardSet, here: "World"
) -> "tuple[Tensor, Tensor, Tensor]":
    """Features [n, d], labels [n] and weights [n] of all samples, on all ranks."""
    import torch

    from pipeline.feed.loader import EvalFeed
    from pipeline.tasks import probe

    batches = EvalFeed(shards, here, card.image, batch_size=card.eval_batch_size)
    with torch.inference_mode():
        parts = [(probe.features(network, batch.images), batch.targets, batch.weights) for batch in batches]
    gathered = (here.gather(torch.stack(column)) for column in zip(*parts, strict=True))
    # [rank, batch, sample, …] to the stored order, in which rank r has batches r, r + W, …
    features, labels, weights = (each.transpose(0, 1).flatten(0, 2) for each in gathered)
    counts = weights > 0
    return features[counts], labels[counts], weights[counts]


def _open_for_probe(arguments: argparse.Namespace) -> "tuple[str, ModelCard, ClassificationTask, ShardSet, ShardSet]":
    from pipeline.feed.task_transforms import require_kind
    from pipeline.tasks.classify import ClassificationTask
    from pipeline.track import tracking_server
    from pipeline.track.registry import registry

    tracking_server.connect(tracking_server.tracking_uri(arguments.tracking_uri))
    train, data, cache = arguments.train, arguments.data, cli.cache_of(arguments)
    fitted, shards = open_data(train, cache=cache), open_data(data, cache=cache)
    for each in (fitted, shards):
        require_kind(ClassificationConfig(), each)
    if fitted.classes != shards.classes:
        raise InputError(
            f"--train {train} has the classes {_some(fitted.classes)} but --data {data} {_some(shards.classes)}: "
            "pack one of them with --classes-from of the other"
        )
    version = registry.resolve(arguments.model)
    task = _task(version)
    if not isinstance(task, ClassificationTask):
        raise InputError(f"--probe {version.uri}: is a {version.card.task.name}; features are those of a classifier")
    return version.uri, version.card, task, fitted, shards


def _open(uri: str, data: str, tracking_uri: str | None, cache: CacheOptions) -> OpenedModel:
    from pipeline.feed.task_transforms import require_kind
    from pipeline.track import tracking_server
    from pipeline.track.registry import registry

    tracking_server.connect(tracking_server.tracking_uri(tracking_uri))
    shards = open_data(data, cache=cache)
    version = registry.resolve(uri)
    card = version.card
    card.require_head(version.uri)
    require_kind(card.task, shards)
    if shards.classes != card.classes:
        raise InputError(
            f"{data} has the classes {_some(shards.classes)} but {version.uri} was trained on "
            f"{_some(card.classes)}: pack the data with --classes-from of the training data"
        )
    return OpenedModel(version.uri, data, card, _task(version), shards)


def _task(version: "registry.Version") -> "AnyTask":
    from pipeline.tasks.build import build_trained

    card = version.card
    return build_trained(card.task, card.model, card.image, card.classes, version.weights)


def _draw(opened: OpenedModel, count: int, out: Path | None, log: bool) -> Path:
    from pipeline.tasks import draw_predictions
    from pipeline.track.registry import registry

    name, number = opened.uri.removeprefix("models:/").split("/")
    path = out or Path(f"{name}-{number}.png")
    draw_predictions.draw_predictions(opened.task, opened.shards, opened.card, count, path, opened.uri)
    if log:
        registry.attach(opened.uri, path)
    return path


def _some(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(map(printable, names[:5]))}{', …' if len(names) > 5 else ''}"
