"""One rank that scores its share of some predictions; see test_segment.py.

python -m tests.workers.confusion

Rank 0 prints the metric's result.
"""

import json

import torch
from torch import Tensor

from pipeline import world
from pipeline.feed.task_transforms import MaskTarget
from pipeline.shards.images import IGNORED
from pipeline.tasks.segment import SegmentationMetric

NUM_CLASSES, NUM_IMAGES, BATCH = 7, 9, 2
UNSEEN, ABSENT = 5, 6  # a class that is predicted but not there, and one that is neither


def scored() -> tuple[Tensor, list[MaskTarget]]:
    """Logits on canvases of 64 x 96, and what the images, which are of many sizes, show."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_IMAGES, NUM_CLASSES, 16, 24, generator=draws)
    logits[:, ABSENT] = -100
    targets = []
    for i in range(NUM_IMAGES):
        size = torch.randint(40, 130, (2,), generator=draws).tolist()
        labels = torch.randint(0, UNSEEN, size, generator=draws, dtype=torch.uint8)
        labels[torch.rand(size, generator=draws) < 0.2] = IGNORED
        targets.append(MaskTarget(labels, (64 - 5 * i, 96) if i % 2 else (64, 96 - 7 * i)))
    targets[4].labels[:] = IGNORED
    return logits, targets


def main() -> None:
    here = world.start()
    logits, targets = scored()
    metric = SegmentationMetric(NUM_CLASSES)
    share = list(range(here.rank, NUM_IMAGES, here.size))
    for first in range(0, len(share), BATCH):
        taken = share[first : first + BATCH]
        # The last batch is filled up with an image that does not count.
        batch = [*taken, *[0] * (BATCH - len(taken))]
        weights = torch.tensor([1.0] * len(taken) + [0.0] * (BATCH - len(taken)))
        metric.update(logits[batch], [targets[i] for i in batch], weights)
    result = metric.result(here)
    if here.is_first:
        print(json.dumps(result))
    world.stop()


if __name__ == "__main__":
    main()
