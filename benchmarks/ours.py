"""Our feed as a contender of benchmarks.feed: python -m benchmarks.ours JSON, the JSON being a Job of peers.py."""

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.peers import BATCH_SIZE, ERASE_PROB, IMAGE_SIZE, RAND_AUGMENT, Job, measure
from pipeline.config import Config
from pipeline.feed.loader import TrainFeed
from pipeline.shards.index import ShardSet
from pipeline.world import World

AUGMENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"rand_augment": RAND_AUGMENT, "erase_prob": ERASE_PROB, "erase_mode": "pixel"},
}


def batches_of(job: Job) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    shards = f"{job.data}/shards"
    config = Config.model_validate(
        {
            "run": {"name": "feed-benchmark"},
            "model": {"name": "pvt_tiny"},
            "image": {"size": IMAGE_SIZE},
            "data": {"train": shards, "lanes": 8},
            "augment": AUGMENT[job.recipe],
            "optim": {"lr": 1e-3},
            "train": {"length": "1 epochs", "global_batch_size": BATCH_SIZE},
        }
    )
    device = torch.device("cuda", 0) if job.device == "cuda" else torch.device("cpu")
    feed = TrainFeed(config, ShardSet(shards), World(device=device))
    for micro_batch in itertools.chain.from_iterable(iter(feed.next, None)):
        yield micro_batch.images, micro_batch.targets


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(measure(batches_of(job), job)))
