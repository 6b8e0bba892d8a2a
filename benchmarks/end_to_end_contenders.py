"""The contenders of benchmarks.end_to_end that are not launch/pretrain.py: python -m … NAME JSON."""

import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.end_to_end import BASELINE, STEP, SYNTHETIC, WARM_UP_STEPS, configuration
from benchmarks.plain_pvt import PlainPvt
from benchmarks.step import DEPTHS
from pipeline.flops import DTYPES
from pipeline.world import keep_freed_memory

NUM_CLASSES, DROP_PATH = 10, 0.1
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(name: str, job: dict[str, Any]) -> None:
    torch.manual_seed(0)
    step = {SYNTHETIC: engine_step, STEP: bare_step}.get(name, baseline_step)(job, name)
    repeat(step, WARM_UP_STEPS, job["warm_up"])
    steps, seconds = repeat(step, job["steps"], job["seconds"])
    print(json.dumps({"images_per_second": steps * job["batch"] / seconds}), flush=True)
    os._exit(0)  # without waiting for workers that have work left


def repeat(step: Callable[[], object], steps: int, seconds: float) -> tuple[int, float]:
    """At least so many steps and seconds. Returns how many of both they were.

    The device is waited for after every `steps` of them, not after each: they are queued as in training.
    """
    done, begin = 0, _now()
    while done < steps or _now() - begin < seconds:
        for _ in range(steps):
            step()
        done += steps
    return done, _now() - begin


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def engine_step(job: dict[str, Any], _: str) -> Callable[[], object]:
    from pipeline import world
    from pipeline.config import Config
    from pipeline.feed.loader import TrainFeed
    from pipeline.shards.index import ShardSet
    from pipeline.tasks.build import build_task
    from pipeline.train.engine import Engine

    config = Config.model_validate(configuration(job))
    here, shards = world.start(), ShardSet(job["shards"])
    task = build_task(config.task, config.model, config.image, shards.classes)
    feed = TrainFeed(config, shards, here, drop_path_rates=task.drop_path_rates)
    engine = Engine(config, task, here, feed.blank)
    batches = feed.next()
    assert batches
    feed.close()
    numbers = itertools.count(1)
    return lambda: engine.step(batches, step=next(numbers), lr=1e-4)


def bare_step(job: dict[str, Any], _: str) -> Callable[[], object]:
    if DEVICE.type == "cpu":
        keep_freed_memory()  # as our training does, or it would be faster than its own bare step
    network = timm.create_model(job["model"], num_classes=NUM_CLASSES, drop_path_rate=DROP_PATH).to(DEVICE).train()
    images = torch.randn(job["batch"], 3, 224, 224, device=DEVICE)
    labels = torch.randint(NUM_CLASSES, (job["batch"],), device=DEVICE)
    return training(network, itertools.repeat((images, labels)), DTYPES[job["precision"]])


def baseline_step(job: dict[str, Any], name: str) -> Callable[[], object]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", rank=0, world_size=1)
    if name == BASELINE:
        network: nn.Module = PlainPvt(DEPTHS[job["model"]], NUM_CLASSES, drop_path_rate=DROP_PATH)
    else:
        network = timm.create_model(job["model"], num_classes=NUM_CLASSES, drop_path_rate=DROP_PATH)
    network = nn.parallel.DistributedDataParallel(network.to(DEVICE).train())
    return training(network, loaded(job), DTYPES[job["precision"]])


def training(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        images, labels = (tensor.to(DEVICE, non_blocking=True) for tensor in next(batches))
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loaded(job: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    from PIL import Image
    from torchvision.transforms import v2
    from webdataset.compat import WebDataset

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def prepared(sample: dict[str, Any]) -> tuple[Tensor, int]:
        return transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")), int(sample["cls"])

    tars = sorted(map(str, Path(job["shards"]).glob("*.tar")))
    dataset: Any = WebDataset(tars, shardshuffle=False, resampled=True).shuffle(1000).map(prepared)
    loader = torch.utils.data.DataLoader(
        dataset, job["batch"], num_workers=job["workers"], drop_last=True, pin_memory=DEVICE.type == "cuda"
    )
    return iter(loader)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
