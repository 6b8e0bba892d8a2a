"""What a run's network does with its validation data, for the run's report.

checkpoints/ or versions/ ──newest whole weights──▶ network ─┬─▶ some samples: what its stages see, what it says of them
data.val ──the run's own evaluation───────────▶ batches ─────┴─▶ scores, and what is taken for what or found how well
"""

import contextlib
import hashlib
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.coco_results import as_results
from pipeline.config import ClassificationConfig, Config, SemanticFpnConfig, TaskConfig, load_config
from pipeline.errors import ExternalError, InputError
from pipeline.feed.box_transforms import Truth
from pipeline.feed.loader import EvalFeed, MicroBatch
from pipeline.shards.cache import CacheOptions
from pipeline.shards.images import IGNORED, decode
from pipeline.shards.index import ShardSet
from pipeline.shards.open_data import open_data
from pipeline.shards.picture_credits import ATTRIBUTION
from pipeline.tasks import segment
from pipeline.tasks.build import build_trained
from pipeline.tasks.detect import DetectionMetric
from pipeline.tasks.draw_predictions import drawn
from pipeline.tasks.segment import SegmentationMetric
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.report import ClassifiedPicture, ClassPrecision, DetectedPicture, Examination, SegmentedPicture
from pipeline.track.report.confusion_matrix import Counts
from pipeline.track.report.network_view import Map
from pipeline.track.sync.record import Record
from pipeline.train.checkpoint_files import EMA, MODEL, Commit, commit_fault, step_of
from pipeline.world import World
from pvt import PyramidVisionTransformer
from pvt.dense import DenseNetwork
from pvt.detector import Detections

MOST_SAMPLES = 20_000
BUDGET_S = 30.0
"""What running the network may take, about, going by how long it takes for some images."""
NUM_PICTURES = 6
MIN_SCORE = 0.5
"""Of objects that are drawn."""
PICTURE_PX = 340
"""Long side of a picture with objects."""


def examine_model(folder: Path, *, samples: bool, cache: CacheOptions) -> Examination:
    """Returns what the run's network does with its validation data. `samples`: with images of the data set. `cache`
    comes before the run's data.cache and data.cache_gb. Raises InputError, ExternalError or OSError where it cannot be
    known."""
    config = load_config(folder / "config.yaml")
    data = config.data
    if data.val is None:
        raise InputError("the run has no validation data: data.val is not set")
    source, step, weights = _newest_weights(folder)
    shards = open_data(data.val, cache=CacheOptions(cache.folder or data.cache, cache.gb or data.cache_gb))
    try:
        _require_same_data(folder, shards, data.val)
        found = _run_of(config.task)(config, shards, weights)
        with torch.inference_mode():
            pictures, seconds_each = found.look_inside(samples)
            most = min(MOST_SAMPLES, max(32, int(BUDGET_S / seconds_each)))
            scored = found.score(most)
        return Examination(
            source=source,
            step=step,
            data=data.val,
            total=len(shards),
            looked_at=scored.looked_at,
            is_whole=most >= len(shards),
            classes=shards.classes,
            counted=found.counted,
            confusion=scored.confusion,
            scores=scored.scores,
            pictures=pictures,
            attribution=_attribution(shards, data.val) if samples else None,
            precisions=scored.precisions,
        )
    finally:
        shards.close()


class _Scored(NamedTuple):
    looked_at: int
    scores: dict[str, float]
    confusion: Counts
    """[K, K] of true class and what it was taken for; of detection empty."""
    precisions: list[ClassPrecision]
    """Of detection."""


class _Run(ABC):
    """A run's network and the data that it is examined with."""

    counted: Literal["samples", "pixels", "objects"]

    def __init__(self, config: Config, shards: ShardSet, weights: Path) -> None:
        self._config, self._shards = config, shards
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self._task: Any = build_trained(config.task, config.model, config.image, shards.classes, weights)
        self._network: nn.Module = self._task.model.to(self._device)
        self._num_classes = len(shards.classes)

    def look_inside(self, samples: bool) -> tuple[list[Any], float]:
        """Pictures of some samples from all over the data set, and about how many seconds one takes."""
        stride = max(1, len(self._shards) // NUM_PICTURES)
        pictures: list[Any] = []
        seconds = [BUDGET_S]
        for batch in self._batches(stride, 1):
            if batch.weights[0] and len(pictures) < NUM_PICTURES:
                began = time.perf_counter()
                outputs = self._task.outputs(self._network, batch)
                self._task.metric().update(outputs, batch.targets, batch.weights)
                seconds.append(time.perf_counter() - began)
                pictures.append(self._picture(batch, outputs[0], samples))
        return pictures, self._seconds_each(seconds)

    def score(self, most: int) -> _Scored:
        """Of at most `most` samples: all of them as the run evaluates them, or small batches from all over the data
        set."""
        every = -(-len(self._shards) // most)
        size = self._config.evaluate.batch_size
        metric, looked_at = self._task.metric(), 0
        for batch in self._batches(every, size if every == 1 else min(32, size, most)):
            outputs = self._task.outputs(self._network, batch)
            metric.update(outputs, batch.targets, batch.weights)
            looked_at += int((batch.weights > 0).sum())
            self._count(batch, outputs)
        scores = {}
        # Some of the data may show nothing that could be scored.
        with contextlib.suppress(InputError) if every > 1 else contextlib.nullcontext():
            scores = metric.result(World())
        return _Scored(looked_at, scores, self._confusion(metric), self._precisions(metric))

    @abstractmethod
    def _picture(
        self, batch: MicroBatch, output: Any, samples: bool
    ) -> ClassifiedPicture | SegmentedPicture | DetectedPicture:
        """Of a batch of one. `samples`: with what the data set shows."""

    def _seconds_each(self, seconds: list[float]) -> float:
        """`seconds`: what the pictures' samples took."""
        return min(seconds)

    @abstractmethod
    def _count(self, batch: MicroBatch, outputs: Any) -> None:
        """What the metric does not keep."""

    def _confusion(self, metric: Any) -> Counts:
        return np.zeros((0, 0), np.int64)

    def _precisions(self, metric: Any) -> list[ClassPrecision]:
        return []

    def _batches(self, every: int, size: int) -> EvalFeed:
        """Each `every`-th batch, as the first of so many ranks would take them."""
        world, config = World(size=every, device=self._device), self._config
        return EvalFeed(self._shards, world, config.image, task=config.task, batch_size=size)

    def _key(self, batch: MicroBatch) -> str:
        return self._shards.key(int(batch.samples.shard[0]), int(batch.samples.row[0]))

    def _image(self, batch: MicroBatch) -> Any:
        """[H, W, 3] uint8, of the network's input, without padding."""
        mean, std = (torch.tensor(each)[:, None, None] for each in (self._config.image.mean, self._config.image.std))
        height, width = batch.extents[0]
        image = 255 * (batch.images[0, :, :height, :width].float().cpu() * std + mean)
        return image.clamp(0, 255).byte().permute(1, 2, 0).numpy()

    def _stage_maps(self, batch: MicroBatch) -> list[Map]:
        """Without padding."""
        (height, width), canvas = batch.extents[0], batch.images.shape[-2:]
        return [
            _cut(stage, height / canvas[0], width / canvas[1]) for stage in _stage_maps(self._network, batch.images)
        ]


class _Labelled(_Run):
    counted = "samples"

    def __init__(self, config: Config, shards: ShardSet, weights: Path) -> None:
        super().__init__(config, shards, weights)
        self._cells = np.zeros(self._num_classes**2, np.int64)

    def _picture(self, batch: MicroBatch, output: Tensor, samples: bool) -> ClassifiedPicture:
        probabilities = output.softmax(dim=0).cpu()
        return ClassifiedPicture(
            key=self._key(batch),
            label=int(batch.targets[0]),
            prediction=int(probabilities.argmax()),
            probability=float(probabilities.max()),
            image=self._image(batch) if samples else None,
            maps=self._stage_maps(batch),
            attention=_class_attention(self._network, batch.images),
        )

    def _seconds_each(self, seconds: list[float]) -> float:
        return _seconds_each(self._network, self._config.image.size, self._device)

    def _count(self, batch: MicroBatch, outputs: Tensor) -> None:
        kept = batch.weights > 0
        pairs = batch.targets[kept] * self._num_classes + outputs.argmax(dim=1)[kept]
        self._cells += np.bincount(pairs.cpu().numpy(), minlength=len(self._cells))

    def _confusion(self, metric: Any) -> Counts:
        return self._cells.reshape(self._num_classes, self._num_classes)


class _Segmented(_Run):
    counted = "pixels"

    def _picture(self, batch: MicroBatch, output: Tensor, samples: bool) -> SegmentedPicture:
        target = batch.targets[0]
        truth, prediction = target.labels.cpu().numpy(), segment.predict(output, target).byte().cpu().numpy()
        labelled = truth != IGNORED
        return SegmentedPicture(
            key=self._key(batch),
            right=float((truth == prediction)[labelled].mean()) if labelled.any() else float("nan"),
            image=self._image(batch) if samples else None,
            truth=truth if samples else None,
            prediction=prediction if samples else None,
            maps=self._stage_maps(batch),
        )

    def _count(self, batch: MicroBatch, outputs: Tensor) -> None:
        """Nothing: the metric keeps the pixels of each class."""

    def _confusion(self, metric: SegmentationMetric) -> Counts:
        if metric.confusion is None:  # all damaged
            return np.zeros((self._num_classes, self._num_classes), np.int64)
        return metric.confusion.cpu().numpy()


class _Detected(_Run):
    counted = "objects"

    def __init__(self, config: Config, shards: ShardSet, weights: Path) -> None:
        super().__init__(config, shards, weights)
        self._objects = np.zeros(self._num_classes, np.int64)  # of each class

    def _picture(self, batch: MicroBatch, output: Detections, samples: bool) -> DetectedPicture:
        truth = batch.targets[0]
        found = [each for each in as_results(output, truth.size, truth.extent) if each["score"] >= MIN_SCORE]
        wanted = sorted(_single(truth), key=lambda each: each["area"])  # small ones on top
        return DetectedPicture(
            key=self._key(batch),
            num_objects=len(wanted),
            num_found=len(found),
            min_score=MIN_SCORE,
            truth=self._drawn(batch, wanted) if samples else None,
            found=self._drawn(batch, found) if samples else None,
            maps=self._stage_maps(batch),
        )

    def _drawn(self, batch: MicroBatch, objects: list[dict[str, Any]]) -> Any:
        """[H, W, 3]: the stored image with objects, or results of detection, on it."""
        image = decode(self._shards.read(int(batch.samples.shard[0]), int(batch.samples.row[0])))
        return np.asarray(drawn(image, objects, self._shards.classes, PICTURE_PX))

    def _count(self, batch: MicroBatch, outputs: list[Detections]) -> None:
        for truth, weight in zip(batch.targets, batch.weights.tolist(), strict=True):
            if weight:
                np.add.at(self._objects, [each["label"] for each in _single(truth)], 1)

    def _precisions(self, metric: DetectionMetric) -> list[ClassPrecision]:
        boxes, masks = metric.class_aps["box"], metric.class_aps.get("mask", [None] * self._num_classes)
        return list(map(ClassPrecision, self._shards.classes, self._objects.tolist(), boxes, masks))


def _run_of(task: TaskConfig) -> type[_Run]:
    if isinstance(task, ClassificationConfig):
        return _Labelled
    return _Segmented if isinstance(task, SemanticFpnConfig) else _Detected


def _single(truth: Truth) -> list[dict[str, Any]]:
    """Those that are to be found, one by one: without crowds."""
    return [each for each in truth.annotations if not each["iscrowd"]]


_CPU = torch.device("cpu")


def _newest_weights(folder: Path) -> tuple[str, int, Path]:
    """What it is, its step and its file: that of the newest checkpoint, or of a version that waits to be registered,
    whose bytes are those that were written. The moving average, where one is kept."""
    for checkpoint in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, InputError):  # removed this instant, or of a newer format
            if commit_fault(checkpoint) is None:
                files = Commit.read(checkpoint).files
                name = EMA if EMA in files else MODEL
                if _digest(checkpoint / name) == files[name].sha256:
                    average = ", moving average" if name == EMA else ""
                    return f"checkpoint {checkpoint.name}{average}", step_of(checkpoint), checkpoint / name
                print(f"{checkpoint / name} is damaged and passed over", file=sys.stderr, flush=True)
    return _waiting_weights(folder)


def _waiting_weights(folder: Path) -> tuple[str, int, Path]:
    for entry in sorted((folder / "versions").glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, InputError):
            card = ModelCard.read(entry)
            if _digest(entry / WEIGHTS) == card.sha256[WEIGHTS]:
                return f"version {entry.name}", int(card.lineage["step"]), entry / WEIGHTS
    raise InputError(f"{folder}: no whole checkpoint is in checkpoints/, nor weights in versions/")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_same_data(folder: Path, shards: ShardSet, path: str) -> None:
    with contextlib.suppress(InputError):  # without a record there is nothing to compare with
        known = [each.digest for each in Record.read(folder).inputs if each.context == "validation"]
        if known and shards.digest not in known:
            raise _OtherDataError(
                f"{path} is another data set now ({shards.digest[:12]}) than in the run ({known[0][:12]})"
            )


class _OtherDataError(ExternalError):
    """The validation data has changed since."""


def _seconds_each(network: nn.Module, size: int, device: torch.device) -> float:
    """What the network takes for an image, in a batch if it is quick."""
    each_s = BUDGET_S
    for count in (1, 1, 32):  # the first time is slower
        began = time.perf_counter()
        network(torch.zeros(count, 3, size, size, device=device)).cpu()
        each_s = (time.perf_counter() - began) / count
        if each_s > 0.1:
            break
    return each_s


def _stage_maps(network: nn.Module, images: Tensor) -> list[Map]:
    """[H, W] of each of four stages, or of four layers as far apart as can be: the length of each place's features."""
    backbone: Any = network.backbone if isinstance(network, DenseNetwork) else network
    if not hasattr(backbone, "forward_intermediates"):
        return []
    maps: Any = backbone.forward_intermediates(images, intermediates_only=True)
    chosen = [maps[round(place * (len(maps) - 1) / 3)] for place in range(4)] if len(maps) > 4 else maps
    return [stage[0].float().norm(dim=0).cpu().numpy() for stage in chosen]


def _cut(values: Map, height: float, width: float) -> Map:
    """The part of a map that is not padding, given as fractions of its sides."""
    return values[: max(1, round(height * values.shape[0])), : max(1, round(width * values.shape[1]))]


def _class_attention(network: nn.Module, images: Tensor) -> Map | None:
    """[H, W]: how the class token of PVT's last block weighs the places of the last stage, mean over heads. None
    where there is but one place."""
    if not isinstance(network, PyramidVisionTransformer):
        return None
    attention: Any = network.stages[-1].blocks[-1].attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    seen: list[tuple[Tensor, tuple[int, int]]] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    try:
        network(images)
    finally:
        hook.remove()
    ((tokens, grid),) = seen
    if max(grid) == 1:  # a single place gets all
        return None
    q = attention.q(tokens[:, :1]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [1, heads, 1, D]
    k = attention.kv(tokens).unflatten(-1, (2, attention.num_heads, -1))[:, :, 0].transpose(1, 2)  # [1, heads, N, D]
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)[0, :, 0, 1:]  # [heads, H*W]
    return weights.float().mean(dim=0).unflatten(0, grid).cpu().numpy()


def _attribution(shards: ShardSet, path: str) -> str:
    return shards.attribution or (
        f"{path}. No {ATTRIBUTION} is beside its manifest.json: look up its licence before passing this page on."
    )
