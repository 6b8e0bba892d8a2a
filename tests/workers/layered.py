"""One rank that trains a network with batch norms and layer-wise rates for three steps; see test_train.py.

python -m tests.workers.layered CONFIG STAGE
"""

import json
import sys

import torch

from pipeline import world
from pipeline.config import load_config
from pipeline.feed.loader import TrainFeed
from pipeline.shards.index import ShardSet
from pipeline.tasks.build import build_task
from pipeline.train.engine import Engine


def main() -> None:
    path, stage = sys.argv[1:]
    here = world.start()
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
    if here.is_first:
        report = {"moved": moved, "depths": task.depths, "spread": (ranks - ranks[0]).abs().max().item()}
        print(json.dumps({**report, "size": ranks[0].abs().max().item()}), flush=True)
    world.stop()


if __name__ == "__main__":
    main()
