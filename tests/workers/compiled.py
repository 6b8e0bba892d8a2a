"""Steps of an engine without and with engine.compile, by a compiler that only counts what it runs: CONFIG."""

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from pipeline import world
from pipeline.config import load_config
from pipeline.feed.loader import TrainFeed
from pipeline.shards.index import ShardSet
from pipeline.tasks.build import build_task
from pipeline.train.engine import Engine

STEPS = 3
calls = 0


def counted(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        global calls
        calls += 1
        return graph(*inputs)

    return run


def main(path: str) -> None:
    here = world.start()
    losses, trained, beside = [], [], 0
    for compiles in (False, True):
        config = load_config(path, [f"engine.compile={compiles}"])
        shards = ShardSet(config.data.train_paths[0])
        torch.manual_seed(0)
        task = build_task(config.task, config.model, config.image, shards.classes)
        feed = TrainFeed(config, shards, here, drop_path_rates=task.drop_path_rates)
        engine = Engine(config, task, here, feed.blank)
        batches = feed.next()
        before = calls
        losses.append([engine.step(batches, step=step, lr=1e-3).loss for step in range(STEPS)])
        trained.append(calls - before)
        before = calls
        engine.evaluator()(batches[0])
        engine.gradients(batches[0], step=STEPS, micro=0)
        beside += calls - before
        feed.close()
    if here.is_first:
        report = {"losses": losses, "compiled_calls": trained, "compiled_calls_beside_training": beside}
        print(json.dumps(report), flush=True)
    world.stop()


if __name__ == "__main__":
    compile_module = nn.Module.compile
    with mock.patch.object(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend=counted, **options)
    ):
        main(sys.argv[1])
