"""The paths that are counted, each in full but for what the device computes.

python -m tests.fakecuda.paths PATH…, on the fake runtime, as one rank of any number. Rank 0 prints a JSON object for
each thing counted: its path, its name, its counts and where it synchronised.

    step.MODEL.STAGE   step.TASK.0   evaluation.TASK   feed   damaged   save.MODEL.STAGE   streams[.broken]
    memory[.broken]
"""

import concurrent.futures
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.cuda._sanitizer import CUDASanitizerDispatchMode, CUDASanitizerErrors

from pipeline import world
from pipeline.config import ClassificationConfig, Config, ImageConfig, SemanticFpnConfig
from pipeline.feed import image_stream
from pipeline.feed.box_transforms import Truth
from pipeline.feed.loader import MicroBatch, TrainFeed
from pipeline.feed.task_transforms import MaskTarget
from pipeline.protocols import Task
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from pipeline.tasks.build import build_task
from pipeline.train.checkpoint import Checkpoints, Retention, State
from pipeline.train.engine import Engine
from pipeline.train.evaluate import evaluate
from pipeline.train.saver import Saver
from pipeline.world import World
from pvt.detector import Objects
from tests.batches import batch_of
from tests.fakecuda.counting import Counted, busy, counting, flags_read_as
from tests.test_feed import spoil

WARM_UP = 3
"""Steps before one is counted: the first ones allocate, and DeepSpeed's timers begin with the third."""

IMAGES, CLASSES = 128, 1000
TASKS = ("semantic_fpn", "retinanet", "mask_rcnn", "detr")

Result = tuple[str, Counted]


def configuration(task: str = "classification", model: str = "pvt_pico", stage: int = 0, **sections: Any) -> Config:
    """Of a run in bf16 with clipping and drop path, two images a rank."""
    tree: dict[str, Any] = {
        "run": {"name": "counted"},
        "task": task,
        "model": {"name": model, "drop_path_rate": 0.1},
        "image": {"size": 64},
        "data": {"train": "not read", "lanes": 2},
        "optim": {"lr": 1e-4, "clip_grad": 1.0},
        "train": {"length": "100 steps", "global_batch_size": 2},
        "engine": {"precision": "bf16", "zero_stage": stage},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return Config.model_validate(tree)


def fresh_engine(config: Config, here: World, num_classes: int) -> tuple[Engine, Task, list[MicroBatch]]:
    """With a batch to train it on."""
    task = build_task(config.task, config.model, config.image, [str(label) for label in range(num_classes)])
    batches = [training_batch(config, here, task, num_classes)]
    return Engine(config, task, here, lambda step: batches), task, batches


def training_batch(config: Config, here: World, task: Task, num_classes: int) -> MicroBatch:
    n, size, device = config.train.global_batch_size // here.size, config.image.size, here.device
    targets: Any
    if isinstance(config.task, ClassificationConfig):
        targets = torch.zeros(n, num_classes, device=device)
    elif isinstance(config.task, SemanticFpnConfig):
        targets = torch.zeros(n, size, size, dtype=torch.int64, device=device)
    else:
        targets = [objects(size, device)] * n
    drop_path = torch.ones(len(task.drop_path_rates), n, device=device)
    return batch_of(torch.zeros(n, 3, size, size, device=device), targets, drop_path, torch.ones(n, device=device))


def objects(size: int, device: torch.device) -> Objects:
    """Two in an image."""
    boxes = torch.tensor([[0.0, 0.0, size / 2, size / 2], [size / 4, size / 4, size, size]])
    return Objects(boxes, torch.zeros(2, dtype=torch.int64), torch.ones(2, size, size, dtype=torch.uint8)).to(device)


def count_step(here: World, kind: str, stage: str) -> Result:
    """One step of training. `kind` is a model that learns to classify 1,000 classes, or another task with the smallest
    model."""
    if kind in TASKS:
        config, num_classes = configuration(kind), 3
    else:
        config = configuration(model=kind, stage=int(stage), train={"global_batch_size": 4 * here.size})
        config = config.model_copy(update={"image": ImageConfig(size=224)})
        num_classes = CLASSES
    engine, _, batches = fresh_engine(config, here, num_classes)
    with flags_read_as(kind == "detr"):  # whose losses are computed if its boxes are finite
        for step in range(WARM_UP):
            engine.step(batches, step=step, lr=1e-4)
        with counting() as counted:
            engine.step(batches, step=WARM_UP, lr=1e-4)
    return f"a step, {kind}, ZeRO-{stage}", counted


class _Batches(list[MicroBatch]):
    """As many of EvalFeed's attributes as `evaluate` uses."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(batch.images) for batch in self)


def count_evaluation(here: World, kind: str) -> Result:
    """Two batches of an evaluation, without the score: it would be one of no samples, because zeros are read."""
    config, num_classes = configuration(kind), 10
    engine, task, (batch,) = fresh_engine(config, here, num_classes)
    size, n = config.image.size, len(batch.images)
    truth: dict[str, Any] = {
        "classification": torch.zeros(n, dtype=torch.int64, device=here.device),
        "semantic_fpn": [
            MaskTarget(torch.zeros(size, size, dtype=torch.uint8, device=here.device), (size, size)) for _ in range(n)
        ],
    }
    targets = truth.get(kind, [Truth(number, (size, size), (size, size), []) for number in range(n)])
    batches: Any = _Batches([batch._replace(targets=targets, drop_path=None)] * 2)
    metric: Any = task.metric()
    metric.result = lambda world: {}
    evaluate(engine.evaluator(), batches, metric, here)
    with counting() as counted:
        evaluate(engine.evaluator(), batches, metric, here)
    return f"two batches of an evaluation, {kind}", counted


class BlankDecoder:
    """In place of DALI, which does not run on the fake device: reads, and makes images in which nothing is shown. Like
    DALI it raises RuntimeError for a batch with a JPEG that was cut off."""

    def __init__(self, source: Callable[[int], Any], *, device: torch.device, **_: Any) -> None:
        self._source, self._device, self._iteration = source, device, 0

    def next(self) -> Tensor | list[Tensor]:
        encoded, views = self._source(self._iteration)
        self._iteration += 1
        if not all(data.tobytes().endswith(b"\xff\xd9") for data in encoded):
            raise RuntimeError("a file of the batch does not decode")
        images = [torch.empty(*extent, 3, dtype=torch.uint8, device=self._device) for extent in views.extent.tolist()]
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images

    def close(self) -> None:
        pass


def tree_of_images(folder: Path, count: int) -> None:
    """Small photographs of nothing, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)


@contextlib.contextmanager
def image_feed(here: World, images: int = IMAGES, size: int = 224, cut_off: Sequence[int] = ()) -> Iterator[TrainFeed]:
    """Of batches with RandAugment, erasing, mixup and cutmix, for pvt_pico. `cut_off`: rows of JPEGs that end early."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(image_stream, "Decoder", BlankDecoder):
        tree_of_images(Path(folder, "images"), 2 * images)
        pack(Path(folder, "images"), Path(folder, "train"))
        spoil(Path(folder, "train"), 0, list(cut_off), seemingly_whole=True)
        config = configuration(
            image={"size": size},
            data={
                **{"train": f"{folder}/train", "shuffle_window": 16, "max_bad_fraction": 0.5},
                **{"num_threads": 1, "prefetch": 1},
            },
            augment={"rand_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.25, "hflip": 0.5},
            mix={"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
            train={"global_batch_size": images * here.size},
        )
        feed = TrainFeed(config, ShardSet(*config.data.train_paths), here, drop_path_rates=[0.1] * 8)
        try:
            yield feed
        finally:
            feed.close()


def count_feed(here: World) -> Result:
    with image_feed(here) as feed:
        for _ in range(WARM_UP):
            feed.next()
        with counting() as counted:
            feed.next()
    return f"the feed of {IMAGES} images", counted


def check_damaged(here: World) -> Result:
    """Two files that do not decode: they alone are found, by a decoder that needs no GPU."""
    with image_feed(here, images=8, size=32, cut_off=[2, 5]) as feed:
        with counting() as counted:
            for _ in range(WARM_UP):
                feed.next()
        found = [row for row in range(16) if feed._quarantine.holds(0, row)]
        assert found == [2, 5], f"found {found}"
    return "the feed of 16 files of which 2 do not decode", counted


def count_save(here: World, model: str, stage: str) -> Result:
    """A save, up to where training goes on."""
    config = configuration(model=model, stage=int(stage))
    engine, _, batches = fresh_engine(config, here, CLASSES)
    engine.step(batches, step=0, lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), here, {})
        saver = Saver(checkpoints, Retention(), engine, None, here)
        with counting() as counted:
            saver.save(State(step=1), 0)
        saver.close()  # waits for its threads; `finish` would wait for all ranks to say more than zero
    return f"a save, {model}, ZeRO-{stage}", counted


class _AtOnce(concurrent.futures.Executor):
    """Carries out what it is given in the thread that asks, which is the one that the sanitizer looks at."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        done.set_result(fn(*args, **kwargs))
        return done


def check_streams(here: World, broken: str = "") -> Result:
    """PyTorch's sanitizer over feed and steps. It raises CUDASanitizerErrors for a tensor that a stream uses while
    another may yet be writing it; with the feed `broken`, it has to."""
    with image_feed(here, images=8, size=32) as feed, contextlib.ExitStack() as stack:
        config = feed._config
        engine, *_ = fresh_engine(config, here, 2)
        feed._stream._conductor = _AtOnce()  # pyright: ignore[reportAttributeAccessIssue]
        if broken:
            stack.enter_context(mock.patch.object(torch.cuda.Stream, "synchronize"))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(pytest.raises(CUDASanitizerErrors))
        with counting() as counted, CUDASanitizerDispatchMode():
            for step in range(WARM_UP):
                engine.step(feed.next(), step=step, lr=1e-4)
    return f"{broken} feed and steps under the sanitizer".strip(), counted


def check_memory(here: World, broken: str = "") -> Result:
    """Whether the feed gets a batch's memory back while training may be reading it; with the feed `broken`, it has
    to."""
    with image_feed(here, images=8, size=32) as feed, busy(), contextlib.ExitStack() as stack:
        if broken:
            stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
        with counting() as counted:
            (batch,) = feed.next()
            shape, place = batch.images.shape, batch.images.data_ptr()
            del batch
            with torch.cuda.stream(feed._stream._cuda_stream):
                others = [torch.empty(shape, device=here.device) for _ in range(100)]
        comes_back = any(0 <= place - other.data_ptr() < other.nbytes for other in others)
        assert comes_back == bool(broken), "the feed writes what training reads" if comes_back else "nothing is proved"
    return f"the memory of a batch of a {broken} feed".replace("  ", " "), counted


PATHS: dict[str, Callable[..., Result]] = {
    "step": count_step,
    "evaluation": count_evaluation,
    "feed": count_feed,
    "damaged": check_damaged,
    "save": count_save,
    "streams": check_streams,
    "memory": check_memory,
}


def main() -> None:
    here = world.start()
    torch.backends.cudnn.enabled = False  # convolutions become products: cuDNN asks the driver for more than is faked
    # At stage 3 ranks compare what they have recorded in their first steps, which takes numbers that come back.
    with mock.patch("deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks"):
        for path in sys.argv[1:]:
            kind, *arguments = path.split(".")
            name, counted = PATHS[kind](here, *arguments)
            if here.is_first:
                report = {"path": path, "name": name, "counts": counted.counts, "sites": counted.sites}
                print(json.dumps(report), flush=True)
    world.stop()


if __name__ == "__main__":
    main()
