"""Score a registered model on a packed data set, draw what it predicts, or probe its frozen features.

python launch/evaluate.py --model models:/NAME@ALIAS --data DIR [--draw N]
python launch/evaluate.py --model models:/NAME@ALIAS --data DIR --train DIR --probe knn|linear

A probe fits a classifier to the features of one data set and scores it on another; their classes need not be the
model's. Several ranks share the work: deepspeed launch/evaluate.py …
"""

import argparse
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from launch import command
from pipeline import config, world
from pipeline.errors import InputError
from pipeline.feed.loader import EvalFeed
from pipeline.feed.recipe import require_kind
from pipeline.shards import ade20k
from pipeline.shards.attribution import attribution
from pipeline.shards.index import ShardSet
from pipeline.tasks import predictions, probe
from pipeline.tasks.build import AnyTask, build_task
from pipeline.tasks.classify import Classification, ClassificationMetric
from pipeline.track import registry, server
from pipeline.track.card import Card
from pipeline.train.evaluate import evaluate
from pipeline.world import World


def main() -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Score a registered model.")
    parser.add_argument("--model", required=True, metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="packed data set, or label maps of ADE20K's layout"
    )
    parser.add_argument("--tracking-uri", default=server.tracking_uri(None), metavar="URI")
    parser.add_argument("--draw", type=int, metavar="N", help="draw N predictions")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="of --draw (default ./NAME-VERSION.png)")
    parser.add_argument(
        "--log",
        action="store_true",
        help="also attach the drawing to the model's MLflow run, which the images' licence has to allow",
    )
    parser.add_argument("--probe", choices=("knn", "linear"), help="classify by the features of the frozen backbone")
    parser.add_argument("--train", metavar="DIR", help="packed data set that the probe is fitted to")
    parser.add_argument("--k", type=int, default=20, metavar="K", help="neighbours of --probe knn (default 20)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    _check(arguments)
    here = world.start()
    if arguments.probe:
        result = probed(
            arguments.model, arguments.data, arguments.train, arguments.probe, arguments.tracking_uri, here, arguments.k
        )
    else:
        result = score(arguments.model, arguments.data, arguments.tracking_uri, here)
    if result and arguments.draw:
        result["drawing"] = str(_draw(arguments, here))
    world.stop()
    return result


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.probe) != bool(arguments.train):
        raise InputError("--probe and --train belong together: what to fit, and the data set to fit it to")
    if arguments.draw is not None and arguments.draw < 1:
        raise InputError(f"--draw {arguments.draw}: a number of at least 1 was expected")
    if arguments.k < 1:
        raise InputError(f"--k {arguments.k}: a number of at least 1 was expected")
    if (arguments.out or arguments.log) and not arguments.draw:
        raise InputError("--out and --log are for a drawing: give --draw N, too")


def score(uri: str, data: str, tracking_uri: str, here: World) -> dict[str, Any] | None:
    """Evaluate as the training run did: the registered weights in fp32, its batches, its view of each image."""
    shards, card, task, pinned = command.first_then_all(here, lambda: _open(uri, data, tracking_uri))
    network = task.model.to(here.device).eval()
    batches = EvalFeed(shards, here, card.image, task=card.task, batch_size=card.eval_batch_size)
    with torch.inference_mode():
        scores = evaluate(network, batches, task.metric(), here)
    if not here.is_first:
        return None
    assert scores is not None  # nothing told it to give up
    return {"model": pinned, "data": data, "digest": shards.digest, "samples": len(shards), **scores}


def probed(
    uri: str, data: str, train: str, kind: str, tracking_uri: str, here: World, k: int = 20
) -> dict[str, Any] | None:
    """Score k nearest neighbours, or a linear classifier, on the features of the registered classifier's backbone."""
    fitted, shards, card, network, pinned = command.first_then_all(
        here, lambda: _open_for_probe(uri, data, train, tracking_uri)
    )
    network = network.to(here.device).eval()
    (train_x, train_y, _), (x, y, weights) = (_features(network, card, each, here) for each in (fitted, shards))
    if not here.is_first:
        return None
    if kind == "knn":
        scores = probe.knn(train_x, train_y, x, len(shards.classes), k=min(k, len(train_x)))
    else:
        scores = probe.linear_probe(train_x, train_y, x, len(shards.classes))
    metric = ClassificationMetric()
    metric.update(scores, y, weights)
    found = metric.result(World())
    return {
        "model": pinned,
        "probe": kind,
        "train": train,
        "data": data,
        "digest": shards.digest,
        "samples": len(shards),
        "top1": found["top1"],
        "top5": found["top5"],
        "bad_samples": len(shards) - int(weights.sum()),
    }


def _features(network: torch.nn.Module, card: Card, shards: ShardSet, here: World) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, d], labels [n] and weights [n] of all samples, on all ranks."""
    batches = EvalFeed(shards, here, card.image, batch_size=card.eval_batch_size)
    with torch.inference_mode():
        parts = [(probe.features(network, batch.images), batch.targets, batch.weights) for batch in batches]
    gathered = (here.gather(torch.stack(column)) for column in zip(*parts, strict=True))
    # [rank, batch, sample, …] to the stored order, in which rank r has batches r, r + W, …
    features, labels, weights = (each.transpose(0, 1).flatten(0, 2) for each in gathered)
    counts = weights > 0
    return features[counts], labels[counts], weights[counts]


def _open_for_probe(
    uri: str, data: str, train: str, tracking_uri: str
) -> tuple[ShardSet, ShardSet, Card, torch.nn.Module, str]:
    server.connect(tracking_uri)
    fitted, shards = ShardSet(train), ShardSet(data)
    for each in (fitted, shards):
        require_kind(config.Classification(), each)
    if fitted.classes != shards.classes:
        raise InputError(
            f"--train {train} has the classes {_some(fitted.classes)} but --data {data} {_some(shards.classes)}: "
            "pack one of them with --classes-from of the other"
        )
    version = registry.resolve(uri)
    task = _task(version)
    if not isinstance(task, Classification):
        raise InputError(f"--probe {version.uri}: is a {version.card.task.name}; features are those of a classifier")
    return fitted, shards, version.card, task.model, version.uri


def _open(uri: str, data: str, tracking_uri: str) -> tuple[ShardSet, Card, AnyTask, str]:
    server.connect(tracking_uri)
    shards = ShardSet(ade20k.root_of(data))
    version = registry.resolve(uri)
    card = version.card
    require_kind(card.task, shards)
    if shards.classes != card.classes:
        raise InputError(
            f"{data} has the classes {_some(shards.classes)} but {version.uri} was trained on "
            f"{_some(card.classes)}: pack the data with --classes-from of the training data"
        )
    return shards, card, _task(version), version.uri


def _task(version: registry.Version) -> AnyTask:
    card = version.card
    task = build_task(card.task, card.model, card.image, card.classes)
    task.model.load_state_dict(safetensors.torch.load_file(version.weights))
    return task


def _draw(arguments: argparse.Namespace, here: World) -> Path:
    shards, card, task, pinned = _open(arguments.model, arguments.data, arguments.tracking_uri)
    name, number = pinned.removeprefix("models:/").split("/")
    path = arguments.out or Path(f"{name}-{number}.png")
    network = task.model.to(here.device).eval()
    predictions.draw(
        task,
        network,
        shards,
        card.task,
        card.image,
        arguments.draw,
        path,
        title=pinned,
        note=attribution(ade20k.root_of(arguments.data)),
        device=here.device,
    )
    if arguments.log:
        registry.attach(pinned, path)
    return path


def _some(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


if __name__ == "__main__":
    command.run(main)
