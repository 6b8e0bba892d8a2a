"""One rank that takes three steps, the second on NaN pixels on this rank or another, and then the same step before and
after one that it discards; see test_train.py.

python -m tests.workers.skip CONFIG
"""

import json
import sys
from typing import Any

import torch

from pipeline import world
from pipeline.config import load_config
from pipeline.feed.loader import MicroBatch, TrainFeed
from pipeline.shards.index import ShardSet
from pipeline.train.engine import Engine
from tests.workers.zero import fresh_task

SMALL = ("train.global_batch_size=24", "train.micro_batch_size=6")
"""Two micro-batches on each of two ranks."""


def main() -> None:
    (path,) = sys.argv[1:]
    here = world.start()
    for precision in ("fp32", "fp16"):
        for stage in range(4):
            config = load_config(path, [f"engine.zero_stage={stage}", f"engine.precision={precision}", *SMALL])
            task = fresh_task(config)
            feed = TrainFeed(config, ShardSet(*config.data.train_paths), here, drop_path_rates=task.drop_path_rates)
            engine = Engine(config, task, here, feed.blank)
            report: dict[str, Any] = {"stage": stage, "precision": precision}
            report |= {"applied": [], "unchanged": [], "loss_scales": []}
            batches: list[MicroBatch] = []
            for step in range(3):
                before = {name: tensor.clone() for name, tensor in engine.weights().items()}
                batches = feed.next()
                if step == 1 and here.rank == here.size - 1:
                    batches = [b._replace(images=torch.full_like(b.images, float("nan"))) for b in batches]
                outcome = engine.step(batches, step=step, lr=1e-3)
                after = engine.weights()
                report["applied"].append(outcome.applied)
                report["unchanged"].append(all(torch.equal(before[name], after[name]) for name in before))
                if engine.loss_scale:
                    report["loss_scales"].append(engine.loss_scale.value)
            report["adam_steps"] = engine.adam_steps()
            norm = engine.step(batches, step=3, lr=0.0).grad_norm
            engine.discard(engine.forward(batches, step=4))
            report["norms"] = [norm, engine.step(batches, step=3, lr=0.0).grad_norm]
            feed.close()
            if here.is_first:
                print(json.dumps(report), flush=True)
    world.stop()


if __name__ == "__main__":
    main()
