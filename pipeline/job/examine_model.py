"""Runs a run's network on its validation data, for the run's report.

checkpoints/ or versions/ ──newest whole weights──▶ network ─┬─▶ some samples: pictures of what its stages see
data.val ──the run's own evaluation───────────▶ batches ─────┴─▶ scores, and a confusion matrix or average precisions
"""

import contextlib
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline import files
from pipeline.coco_results import as_results
from pipeline.config import Config, TaskConfig, load_config
from pipeline.errors import InputError
from pipeline.evaluation_view import to_picture
from pipeline.feed.box_transforms import Truth
from pipeline.feed.loader import EvalFeed, MicroBatch
from pipeline.pictures.palette import colourise, palette
from pipeline.run_folder import CHECKPOINTS, CONFIG
from pipeline.shards.cache import CacheOptions
from pipeline.shards.images import IGNORED, decode
from pipeline.shards.index import ShardSet
from pipeline.shards.open_data import open_validation
from pipeline.shards.picture_credits import ATTRIBUTION
from pipeline.tasks import segment
from pipeline.tasks.build import TASK_CLASSES, build_trained
from pipeline.tasks.classify import ClassificationTask
from pipeline.tasks.detect import DetectionMetric, DetectionTask
from pipeline.tasks.draw_predictions import draw_objects
from pipeline.tasks.segment import SegmentationMetric, SegmentationTask
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.report import Examination, Picture
from pipeline.track.report.examination import Counts, Map, scores_of_classes
from pipeline.track.sync.record import Record
from pipeline.train.checkpoint_files import EMA, MODEL, verify_checkpoint
from pipeline.world import World
from pvt.detector import Detections

MOST_SAMPLES = 20_000
BUDGET_S = 30.0
"""About how long the evaluation may take, by how long a batch takes; of a larger data set, a part is evaluated."""
NUM_PICTURES = 6
MIN_SCORE = 0.5
"""The least score of objects that are drawn."""
_INPUT_PX, _MAP_PX, _OBJECTS_PX = 160, 320, 340
"""The greatest sides of pictures of inputs, of label maps, and of images with objects."""


def examine_model(folder: Path, *, samples: bool, cache: CacheOptions) -> Examination:
    """Returns what the run's network does with its validation data. `samples`: with images of the data set. `cache`
    comes before the run's data.cache and data.cache_gb. Raises InputError, ExternalError or OSError where it cannot
    be known."""
    config = load_config(folder / CONFIG)
    data = config.data
    source, weights = _find_weights(folder)
    cached = {"cache": cache.folder or data.cache, "cache_gb": cache.gb or data.cache_gb}
    shards = open_validation(data.model_copy(update=cached))
    if shards is None:
        raise InputError("the run has no validation data: data.val is not set")
    path = data.val or shards.root
    try:
        _require_same_data(folder, shards, path)
        examiner = _examiner_of(config.task)(config, shards, weights)
        with torch.inference_mode():
            pictures = examiner.draw_pictures(samples)
            most = min(MOST_SAMPLES, max(32, int(BUDGET_S / examiner.measure_sample())))
            scores = examiner.score(most)
        no_credits = f"{path}. No {ATTRIBUTION} is beside its manifest.json: look up its licence before sharing it."
        return Examination(
            source=source,
            data=path,
            num_samples=len(shards),
            num_examined=examiner.num_examined,
            is_whole=most >= len(shards),
            classes=shards.classes,
            counted=examiner.counted,
            confusion=examiner.confusion,
            class_scores=examiner.class_scores(),
            scores=scores,
            pictures=pictures,
            attribution=(shards.attribution or no_credits) if samples else None,
            legend=examiner.legend(),
        )
    finally:
        shards.close()


class _Examiner(ABC):
    """A run's network and the data that it is examined with."""

    counted: Literal["samples", "pixels", "objects"]

    def __init__(self, config: Config, shards: ShardSet, weights: Path) -> None:
        self._config, self._shards = config, shards
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self._task: Any = build_trained(config.task, config.model, config.image, shards.classes, weights)
        self._network: Any = self._task.model.to(self._device)
        self._metric: Any = self._task.metric()
        self.num_examined = 0
        self.confusion: Counts = np.zeros((0, 0), np.int64)

    def draw_pictures(self, samples: bool) -> list[Picture]:
        """Returns pictures of some samples from all over the data set. `samples`: with images of the data set."""
        pictures: list[Picture] = []
        for batch in self._batches(max(1, len(self._shards) // NUM_PICTURES), 1):
            if batch.weights[0] and len(pictures) < NUM_PICTURES:
                output = self._task.outputs(self._network, batch)[0]
                headline, verdict, images = self._describe(batch, output, samples)
                key = self._shards.key(int(batch.samples.shard[0]), int(batch.samples.row[0]))
                pictures.append(Picture(key, headline, verdict, images if samples else {}, self._maps(batch)))
        return pictures

    def measure_sample(self) -> float:
        """Returns about how many seconds the evaluation of a sample takes."""
        size = min(32, self._config.evaluate.batch_size, len(self._shards))
        for batch in self._batches(1, size):
            began = time.perf_counter()
            outputs = self._task.outputs(self._network, batch)
            self._task.metric().update(outputs, batch.targets, batch.weights)
            return (time.perf_counter() - began) / size
        return BUDGET_S

    def score(self, most: int) -> dict[str, float]:
        """Returns the scores of at most `most` samples: of all of them, as the run evaluates them, or of small batches
        from all over the data set."""
        every = -(-len(self._shards) // most)
        size = self._config.evaluate.batch_size
        for batch in self._batches(every, size if every == 1 else min(32, size, most)):
            outputs = self._task.outputs(self._network, batch)
            self._metric.update(outputs, batch.targets, batch.weights)
            self.num_examined += int((batch.weights > 0).sum())
            self._count(batch, outputs)
        try:
            return self._metric.result(World())
        except InputError:
            # A part of the data may have nothing in it that could be scored.
            if every > 1:
                return {}
            raise

    def class_scores(self) -> dict[str, Any]:
        return dict(scores_of_classes(self.confusion, self.counted))

    def legend(self) -> list[tuple[str, str]]:
        """Returns classes and colours of the label maps that were drawn."""
        return []

    @abstractmethod
    def _describe(self, batch: MicroBatch, output: Any, samples: bool) -> tuple[str, str, dict[str, Image.Image]]:
        """Returns headline, verdict and images of a batch of one; the images only where `samples` asks for them."""

    @abstractmethod
    def _count(self, batch: MicroBatch, outputs: Any) -> None:
        """Updates what the report needs and the metric does not keep."""

    def _batches(self, every: int, size: int) -> EvalFeed:
        # The first of `every` ranks takes each `every`-th batch.
        world, config = World(size=every, device=self._device), self._config
        return EvalFeed(self._shards, world, config.image, task=config.task, batch_size=size)

    def _input(self, batch: MicroBatch, side_px: int) -> Image.Image:
        """Returns the network's input without padding."""
        height, width = batch.extents[0]
        image = to_picture(batch.images[0, :, :height, :width].float().cpu(), self._config.image)
        image.thumbnail((side_px, side_px))
        return image

    def _maps(self, batch: MicroBatch) -> dict[str, Map]:
        """Returns the length of each location's features, of four stages or of four layers as far apart as can be."""
        backbone: Any = self._network.backbone if self._config.task.is_dense else self._network
        if not hasattr(backbone, "forward_intermediates"):
            return {}
        stages: Any = backbone.forward_intermediates(batch.images, intermediates_only=True)
        if len(stages) > 4:
            last = len(stages) - 1
            stages = [stages[0], stages[round(last / 3)], stages[round(last * 2 / 3)], stages[last]]
        maps = {}
        for number, stage in enumerate(stages, 1):
            lengths = stage[0].float().norm(dim=0).cpu().numpy()
            # What lies beside and below the image is padding.
            height = round(lengths.shape[0] * batch.extents[0][0] / batch.images.shape[2])
            width = round(lengths.shape[1] * batch.extents[0][1] / batch.images.shape[3])
            maps[f"stage {number}"] = lengths[: max(1, height), : max(1, width)]
        return maps


class _ClassificationExaminer(_Examiner):
    counted = "samples"

    def __init__(self, config: Config, shards: ShardSet, weights: Path) -> None:
        super().__init__(config, shards, weights)
        self.confusion = np.zeros((len(shards.classes), len(shards.classes)), np.int64)

    def _describe(self, batch: MicroBatch, output: Tensor, samples: bool) -> tuple[str, str, dict[str, Image.Image]]:
        probability, prediction = output.softmax(dim=0).max(dim=0)
        label, classes = int(batch.targets[0]), self._shards.classes
        verdict = "right" if label == int(prediction) else f"predicted as {classes[int(prediction)]}"
        return classes[label], f", {verdict} with {probability:.2%}", {"input": self._input(batch, _INPUT_PX)}

    def _count(self, batch: MicroBatch, outputs: Tensor) -> None:
        known = batch.weights > 0
        truth, predictions = batch.targets[known].cpu().numpy(), outputs.argmax(dim=1)[known].cpu().numpy()
        np.add.at(self.confusion, (truth, predictions), 1)


class _SegmentationExaminer(_Examiner):
    counted = "pixels"

    def __init__(self, config: Config, shards: ShardSet, weights: Path) -> None:
        super().__init__(config, shards, weights)
        self._num_classes = len(shards.classes)
        self.confusion = np.zeros((self._num_classes, self._num_classes), np.int64)
        self._shown = np.zeros(256, np.int64)  # pixels of each class on the maps that were drawn

    def _describe(self, batch: MicroBatch, output: Tensor, samples: bool) -> tuple[str, str, dict[str, Image.Image]]:
        target = batch.targets[0]
        truth, prediction = target.labels.cpu().numpy(), segment.predict(output, target).byte().cpu().numpy()
        labelled = truth != IGNORED
        right = f"{(truth == prediction)[labelled].mean():.2%}" if labelled.any() else "–"
        images = {"input": self._input(batch, _MAP_PX)}
        for name, labels in (("truth", truth), ("prediction", prediction)):
            images[name] = colourise(labels, self._num_classes)
            images[name].thumbnail((_MAP_PX, _MAP_PX), Image.Resampling.NEAREST)
            self._shown += samples * np.bincount(labels.ravel(), minlength=256)
        return right, " of its pixels right", images

    def legend(self) -> list[tuple[str, str]]:
        legend = []
        colours = palette(self._num_classes)
        for label in np.argsort(-self._shown[: self._num_classes], kind="stable").tolist():
            if self._shown[label]:
                legend.append((self._shards.classes[label], f"#{bytes(colours[label]).hex()}"))
        return [*legend, ("no label", "#000000")] if legend else []

    def _count(self, batch: MicroBatch, outputs: Tensor) -> None:
        metric: SegmentationMetric = self._metric
        if metric.confusion is not None:
            self.confusion = metric.confusion.cpu().numpy()


class _DetectionExaminer(_Examiner):
    counted = "objects"

    def __init__(self, config: Config, shards: ShardSet, weights: Path) -> None:
        super().__init__(config, shards, weights)
        self._objects = np.zeros(len(shards.classes), np.int64)

    def _describe(
        self, batch: MicroBatch, output: Detections, samples: bool
    ) -> tuple[str, str, dict[str, Image.Image]]:
        truth = batch.targets[0]
        wanted = sorted(_list_objects(truth), key=lambda each: each["area"])  # small ones on top
        found = [each for each in as_results(output, truth.size, truth.extent) if each["score"] >= MIN_SCORE]
        images = {}
        if samples:
            image = decode(self._shards.read(int(batch.samples.shard[0]), int(batch.samples.row[0])))
            for name, objects in (("truth", wanted), ("found", found)):
                images[name] = draw_objects(image, objects, self._shards.classes, _OBJECTS_PX)
        return f"{len(wanted)} objects", f"; found with a score of {MIN_SCORE:g} or more: {len(found)}", images

    def class_scores(self) -> dict[str, Any]:
        metric: DetectionMetric = self._metric
        return {"objects": self._objects, **{f"{kind} AP": aps for kind, aps in metric.class_aps.items()}}

    def _count(self, batch: MicroBatch, outputs: list[Detections]) -> None:
        for truth, weight in zip(batch.targets, batch.weights.tolist(), strict=True):
            if weight:
                np.add.at(self._objects, [each["label"] for each in _list_objects(truth)], 1)


_CPU = torch.device("cpu")


EXAMINERS: dict[Any, type[_Examiner]] = {
    ClassificationTask: _ClassificationExaminer,
    SegmentationTask: _SegmentationExaminer,
    DetectionTask: _DetectionExaminer,
}
"""What examines a network, by the class of its task."""


def _examiner_of(task: TaskConfig) -> type[_Examiner]:
    examiner = EXAMINERS.get(TASK_CLASSES[task.name])
    if examiner is None:
        raise InputError(f"networks of task {task.name} are not examined")
    return examiner


def _list_objects(truth: Truth) -> list[dict[str, Any]]:
    """Returns the objects that are to be found one by one: all but crowds."""
    return [each for each in truth.annotations if not each["iscrowd"]]


def _find_weights(folder: Path) -> tuple[str, Path]:
    """Returns name and file of the newest whole checkpoint's weights, or of a version's that waits to be registered.
    The moving average comes first, where one is kept."""
    for checkpoint in sorted((folder / CHECKPOINTS).glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, InputError):  # removed this instant, or of a newer format
            if verify_checkpoint(checkpoint):
                average = checkpoint / EMA
                if average.exists():
                    return f"checkpoint {checkpoint.name}, moving average", average
                return f"checkpoint {checkpoint.name}", checkpoint / MODEL
    for entry in sorted((folder / "versions").glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, InputError):
            if files.sha256(entry / WEIGHTS) == ModelCard.read(entry).sha256[WEIGHTS]:
                return f"version {entry.name}", entry / WEIGHTS
    raise InputError(f"{folder}: no whole checkpoint is in checkpoints/, nor weights in versions/")


def _require_same_data(folder: Path, shards: ShardSet, path: str) -> None:
    known: list[str] = []
    with contextlib.suppress(InputError):  # without a record there is nothing to compare with
        known = [each.digest for each in Record.read(folder).inputs if each.context == "validation"]
    if known and shards.digest not in known:
        found, recorded = shards.digest[:12], known[0][:12]
        raise InputError(f"{path} is another data set now ({found}) than in the run ({recorded})")
