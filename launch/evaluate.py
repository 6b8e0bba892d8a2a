"""Score a registered model on a packed data set.

python launch/evaluate.py --model models:/NAME@ALIAS --data DIR [--tracking-uri URI]
"""

import argparse
from typing import Any

import safetensors.torch
import torch
from torch import nn

from launch import command
from pipeline import world
from pipeline.errors import InputError
from pipeline.feed.loader import EvalFeed
from pipeline.shards.index import ShardSet
from pipeline.tasks.classify import Classification, build_model
from pipeline.track import registry, server
from pipeline.track.card import Card
from pipeline.train.evaluate import evaluate
from pipeline.world import World


def main() -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Score a registered model.")
    parser.add_argument("--model", required=True, metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument("--data", required=True, metavar="DIR", help="packed data set")
    parser.add_argument("--tracking-uri", default=server.tracking_uri(None), metavar="URI")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    here = world.start()
    result = score(arguments.model, arguments.data, arguments.tracking_uri, here)
    world.stop()
    return result


def score(uri: str, data: str, tracking_uri: str, here: World) -> dict[str, Any] | None:
    """Evaluate as the training run did: the registered weights in fp32, its batches, its view of each image."""
    shards, card, network, pinned = command.first_then_all(here, lambda: _open(uri, data, tracking_uri))
    task = Classification(network.to(here.device).eval())
    batches = EvalFeed(shards, here, card.image, batch_size=card.eval_batch_size)
    with torch.inference_mode():
        scores = evaluate(task.model, batches, task.metric(), here)
    if not here.is_first:
        return None
    assert scores is not None  # nothing told it to give up
    return {"model": pinned, "data": data, "digest": shards.digest, "samples": len(shards), **scores}


def _open(uri: str, data: str, tracking_uri: str) -> tuple[ShardSet, Card, nn.Module, str]:
    server.connect(tracking_uri)
    shards = ShardSet(data)
    version = registry.resolve(uri)
    card = version.card
    if shards.classes != card.classes:
        raise InputError(
            f"{data} has the classes {_some(shards.classes)} but {version.uri} was trained on "
            f"{_some(card.classes)}: pack the data with --classes-from of the training data"
        )
    network = build_model(card.model, card.image.size, len(card.classes))
    network.load_state_dict(safetensors.torch.load_file(version.weights))
    return shards, card, network, version.uri


def _some(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


if __name__ == "__main__":
    command.run(main)
