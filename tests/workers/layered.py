"""One rank that trains a network with batch norms and layer-wise rates for two steps; see test_train.py.

python -m tests.workers.layered CONFIG STAGE…

Rank 0 prints a JSON object for each stage.
"""

import json
import sys
from typing import Any

import torch

from pipeline import world
from pipeline.config import load_config
from pipeline.feed.loader import TrainFeed
from pipeline.shards.index import ShardSet
from pipeline.tasks.build import build_task
from pipeline.train.engine import Engine
from pipeline.world import World


def main() -> None:
    path, *stages = sys.argv[1:]
    here = world.start()
    for stage in stages:
        report = train(path, stage, here)
        if here.is_first:
            print(json.dumps(report), flush=True)
    world.stop()


def train(path: str, stage: str, here: World) -> dict[str, Any]:
    overrides = [f"engine.zero_stage={stage}", "model.name=resnet10t", "optim.layer_decay=0.5", "optim.weight_decay=0"]
    config = load_config(path, [*overrides, "engine.precision=fp32", "optim.clip_grad=null", "model.drop_path_rate=0"])
    shards = ShardSet(*config.data.train_paths)
    torch.manual_seed(0)
    task = build_task(config.task, config.model, config.image, shards.classes)
    feed = TrainFeed(config, shards, here)
    engine = Engine(config, task, here, feed.blank)
    before = {name: tensor.clone() for name, tensor in engine.weights().items()}
    engine.step(feed.next(), step=0, lr=1e-3)
    # Adam's first step moves every weight by its rate, whatever the gradient.
    after = engine.weights()
    trained = dict(task.model.named_parameters())
    moved = {name: (after[name] - before[name]).abs().max().item() for name in trained}
    engine.step(feed.next(), step=1, lr=1e-3)
    statistics = torch.cat(
        [value.flatten() for name, value in engine.weights().items() if name.endswith("running_mean")]
    )
    ranks = here.gather(statistics)
    feed.close()
    spread, size = ((ranks - ranks[0]).abs().max().item(), ranks[0].abs().max().item())
    return {"stage": int(stage), "moved": moved, "depths": task.depths, "spread": spread, "size": size}


if __name__ == "__main__":
    main()
