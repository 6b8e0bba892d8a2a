"""Answers for many images, on one rank or several.

    images ──EvalFeed──▶ batches ──network──▶ answers, features ──▶ WorkFolder ──▶ table, features, sheet
                 └──▶ images that cannot be used: their reasons

Batches are those of evaluation, so that scores are those of evaluation. A rank takes every W-th of those that are not
in the folder yet.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline import files, log
from pipeline.answers import AnswerOptions, Seen
from pipeline.errors import ExternalError, InputError
from pipeline.feed.loader import EvalFeed, MicroBatch
from pipeline.feed.quarantine import Quarantine
from pipeline.feed.task_transforms import WithoutTargets, task_transform
from pipeline.predict.work_folder import Row, WorkFolder
from pipeline.predict.write_outputs import write_features, write_rows
from pipeline.protocols import Task
from pipeline.shards import images
from pipeline.shards.loose_images import ImageCollection
from pipeline.tasks import probe
from pipeline.tasks.draw_predictions import DRAWINGS, answer_tile, draw_sheet
from pipeline.track.model_card import ModelCard
from pipeline.world import World

_NUM_DRAWN = 24
_LOG_EVERY_S = 30.0
"""How often progress is shown where no terminal shows it."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files to write; None for what is not wanted."""

    table: Path | None
    features: Path | None
    sheet: Path | None
    feature_kind: str = "pooled"

    @property
    def has_answers(self) -> bool:
        return self.table is not None or self.sheet is not None

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.table, self.features, self.sheet) if path]


class Predictor:
    """What is predicted: `uri` is the exact version of the task's model, whose card is `card`."""

    def __init__(
        self,
        uri: str,
        card: ModelCard,
        task: Task,
        images: ImageCollection,
        outputs: Outputs,
        options: AnswerOptions,
    ) -> None:
        self._uri = uri
        self._card = card
        self._task = task
        self._images = images
        self._outputs = outputs
        self._options = options
        self._batch_size = min(card.eval_batch_size, len(images))
        self._quarantine = Quarantine(images)
        names = [path.name for path in outputs.files]
        job = [uri, images.digest, images.unreadable, names, outputs.feature_kind, *options]
        self._folder = WorkFolder(outputs.files[0], {"job": job})

    def run(self, world: World) -> dict[str, Any] | None:
        """Predicts what is not in the folder yet and writes the outputs. Collective. Returns the command's result on
        rank 0, and None on the others.

        Raises InputError for outputs that cannot be written, and ExternalError where ranks find different images.
        """
        if world.from_first(self._images.digest) != self._images.digest:
            raise ExternalError("the ranks find different images: start again, and do not change the images meanwhile")
        started = time.monotonic()
        with contextlib.ExitStack() as stack:

            def prepare() -> list[int]:
                stack.enter_context(self._folder.locked())
                return self._find_missing()

            # The other ranks only wait for what the first one finds.
            missing = world.from_first(world.first_then_all(prepare if world.is_first else list))
            self._compute(missing, world)
            world.barrier()
            if not world.is_first:
                return None
            result = self._write_outputs()
            self._folder.remove()
        num_computed = sum(len(self._positions(number)) for number in missing)
        seconds = time.monotonic() - started
        return {**result, "images_per_second": round(num_computed / seconds, 2)}

    def _find_missing(self) -> list[int]:
        """Returns the numbers of the batches that are not in the folder, which is made ready for them."""
        finished = self._folder.prepare()
        if self._outputs.features:
            size = self._card.image.size
            device = next(self._task.model.parameters()).device
            with torch.inference_mode():
                features = self._compute_features(torch.zeros(1, 3, size, size, device=device))
            num_rows = len(self._images) + len(self._images.unreadable)
            self._folder.make_features((num_rows, *features.shape[1:]))
        num_batches = math.ceil(len(self._images) / self._batch_size)
        missing = []
        for number in range(num_batches):
            if not finished.keys() >= set(self._positions(number)):
                missing.append(number)
        return missing

    def _positions(self, batch: int) -> range:
        first = batch * self._batch_size
        return range(first, min(first + self._batch_size, len(self._images)))

    def _compute(self, missing: list[int], world: World) -> None:
        """Computes this rank's share of the missing batches."""
        own = missing[world.rank :: world.size]
        if not own:
            return
        card = self._card
        transform = task_transform(card.task, card.image, len(card.classes))
        feed = EvalFeed(
            self._images,
            world,
            card.image,
            transform=WithoutTargets(transform),
            batches=own,
            batch_size=self._batch_size,
            quarantine=self._quarantine,
        )
        counts = [len(self._positions(number)) for number in own]
        progress = tqdm(
            total=sum(counts),
            desc="predicting",
            unit="img",
            file=sys.stderr,
            disable=not world.is_first or log.is_quiet(),
            mininterval=0.1 if sys.stderr.isatty() else _LOG_EVERY_S,
        )
        with progress, torch.inference_mode():
            for number, batch in zip(own, feed, strict=True):
                rows = self._describe(number, batch)
                self._folder.append(world.rank, rows)
                progress.update(len(rows))

    def _describe(self, number: int, batch: MicroBatch) -> list[Row]:
        """Returns the rows of a batch's images. Writes their features into the folder."""
        source = self._images
        positions = self._positions(number)
        if self._outputs.features:
            features = self._compute_features(batch.images)[: len(positions)]
            self._folder.write_features(positions[0], features.float().cpu().numpy())
        answers: list[dict[str, Any]] = [{}] * len(batch.extents)
        if self._outputs.has_answers:
            outputs = self._task.outputs(self._task.model, batch)
            answers = self._task.answers(
                outputs,
                self._list_seen(batch),
                self._card.classes,
                self._options,
            )
        rows = []
        for position, weight, answer in zip(positions, batch.weights.tolist(), answers, strict=False):
            part, row = source.locate(position)
            if not weight:
                answer = {"error": self._quarantine.reason(part, row)}
            path = _printable(source.key(part, row))
            rows.append({"position": position, "path": path, **answer})
        return rows

    def _list_seen(self, batch: MicroBatch) -> list[Seen]:
        """Returns how the network sees the images of a batch."""
        records = self._images.records(batch.samples.shard, batch.samples.row)
        seen = []
        for record, extent in zip(records, batch.extents, strict=True):
            size = int(record["height"]), int(record["width"])
            seen.append(Seen(extent, size))
        return seen

    def _compute_features(self, inputs: Tensor) -> Tensor:
        """Returns what the last layer takes, [N, D], or the last stage's map, [N, C, h, w]."""
        network: Any = self._task.model
        if self._outputs.feature_kind == "pooled":
            return probe.features(network, inputs)
        return network.forward_intermediates(inputs, indices=1, norm=True, intermediates_only=True)[-1]

    def _write_outputs(self) -> dict[str, Any]:
        outputs = self._outputs
        found = self._folder.find_rows()
        columns = ["path"]
        num_bad = len(self._images.unreadable)
        for row in self._folder.read_rows(found):
            num_bad += "error" in row
            if len(columns) == 1 and "error" not in row:
                columns = [name for name in row if name != "position"]
        num_images = len(found) + len(self._images.unreadable)
        result = {"model": self._uri, "images": num_images, "unreadable": num_bad}
        if outputs.table:
            columns.append("error")
            with files.output(outputs.table) as file:
                write_rows(file, self._rows(), columns)
        if outputs.features:
            with files.output(outputs.features) as file:
                self._write_features(file)
        if outputs.sheet:
            self._draw(outputs.sheet)
        for kind in ("table", "features", "sheet"):
            path = getattr(outputs, kind)
            if path:
                result[kind] = str(path)
        return result

    def _rows(self) -> Iterator[Row]:
        """Yields the rows of all images, of those last that could not be listed."""
        yield from self._folder.read_rows(self._folder.find_rows())
        for name, reason in self._images.unreadable.items():
            yield {"path": _printable(name), "error": reason}

    def _write_features(self, file: Path) -> None:
        features = self._folder.open_features("r+")
        for number, row in enumerate(self._rows()):
            if "error" in row:
                features[number] = np.nan
        names = (row["path"] for row in self._rows())
        write_features(file, features, names)

    def _draw(self, file: Path) -> None:
        """Draws pictures from all over the images, and what was found in them."""
        found = self._folder.find_rows()
        step = math.ceil(len(found) / _NUM_DRAWN)
        chosen = {position: row for position, row in found.items() if position % step == 0}
        tiles = []
        for row in self._folder.read_rows(chosen):
            if "error" in row:
                continue
            part, number = self._images.locate(row["position"])
            original = images.decode(self._images.read(part, number))
            name = row["path"]
            tile = answer_tile(row, original, name, self._card.classes)
            if "mask" in row:
                tiles.append([(original, name, ""), tile])
            elif "boxes" in row:
                picture, _, caption = tile
                tiles.append([(picture, name, caption)])
            else:
                tiles.append([tile])
        if not tiles:
            raise InputError("none of the images that the sheet would show can be read: remove --sheet")
        about = f"{len(tiles)} of {len(found)} images"
        draw_sheet(tiles, DRAWINGS[type(self._task)], file, self._uri, about)


def _printable(name: str) -> str:
    """Returns a file's name as text, whatever its bytes are."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
