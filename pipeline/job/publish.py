"""Publishes a job: the record of its run, the versions that it offers, its result.

    begin           run.json  config.yaml  packages.txt  data/  ┐
    a new best      versions/                                   ├──Tracker──▶ MLflow
    end             versions/  result.json                      ┘

All of it is written to the run's folder first. The tracking server gets its copy in the background, or later.
"""

import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pipeline import files
from pipeline.config import Config, dump_config, fingerprint
from pipeline.errors import InputError
from pipeline.feed.preview import preview
from pipeline.job import report_page
from pipeline.redact import redact
from pipeline.run_folder import CONFIG, RESULT
from pipeline.shards.index import Manifest, ShardSet
from pipeline.tasks import draw_predictions
from pipeline.tasks.build import build_trained
from pipeline.track.code_version import code_revision, read_uncommitted
from pipeline.track.model_card import RAW, WEIGHTS, ModelCard, ScoredData
from pipeline.track.sync.outbox import Outbox
from pipeline.track.sync.record import MAIN_METRIC, PARENT, DataInput, Record
from pipeline.track.sync.tracker import Tracker, list_packages
from pipeline.train.checkpoint_files import EMA, MODEL, Commit, score_of, scores_of
from pipeline.train.meters import finite_or_none

log = logging.getLogger(__name__)

NUM_PREDICTIONS = 8
HURRY_S = 10.0
"""The time that the server has when a job is stopped or has failed: the next start sends what remains."""


class Publisher:
    """A listener on rank 0. `parent` is the version that training starts from, if any."""

    def __init__(
        self,
        config: Config,
        training: ShardSet,
        validation: ShardSet | None,
        *,
        main_metric: str,
        uuid: str | None = None,
        parent: str | None = None,
    ) -> None:
        self._config = config
        self._training = training
        self._validation = validation
        self._metric = main_metric
        self.folder = config.run.folder
        # The result of an attempt that was stopped would be taken for this one's.
        (self.folder / RESULT).unlink(missing_ok=True)
        files.write(self.folder / CONFIG, dump_config(config).encode(), private=True)
        files.write(self.folder / "packages.txt", list_packages().encode())
        if config.tracking.log_diff:
            files.write(self.folder / "diff.patch", read_uncommitted().encode(), private=True)
        if config.tracking.log_samples:
            preview(config, training, self.folder / "samples.png")
        tags = {
            "seed": str(config.run.seed),
            "data.digest": training.digest,
            "data.path": redact(", ".join(config.data.train_paths)),
            MAIN_METRIC: main_metric,
            **code_revision(),
        }
        if parent:
            tags[PARENT] = parent
        self.record = Record.begin(self.folder, config.run.name, uuid_=uuid, tags=tags, inputs=self._copy_manifests())
        self.outbox = Outbox(self.folder)
        self.tracker = Tracker(self.folder, config.tracking.patience_s)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.tracker.on_step(step, metrics)

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.tracker.on_evaluation(step, metrics)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Offers the checkpoint as a version if it is the best so far."""
        # Compared with the versions in the outbox, and so with those of earlier jobs of the run, too.
        score = score_of(folder, self._metric)
        best = max(self.outbox.scores(self._metric).values(), default=-math.inf)
        if score is not None and score > best and self._config.tracking.keep_versions:
            self._offer_if_possible(step, folder)
        self.tracker.on_checkpoint(step, folder)

    def finish(self, step: int, checkpoint: Path) -> dict[str, Any]:
        """Offers the last checkpoint and waits for its registration; returns its part of the result. `model` is None
        where the server could not be reached."""
        # The last checkpoint is always offered, whatever its score.
        entry = self._offer(step, checkpoint)
        if self._config.tracking.log_samples and self._validation:
            draw = functools.partial(self._draw_predictions, checkpoint, self._validation)
            self._make_optional("predictions", draw)
        self.tracker.flush()
        registered = self.outbox.registered()
        ending = {"model": registered.get(entry), **finite_or_none(scores_of(checkpoint) or {})}
        scores = self.outbox.scores(self._metric)
        best = max(scores, key=lambda each: scores[each], default=entry)
        if scores and scores[best] > scores.get(entry, -math.inf):
            ending["best"] = registered.get(best)
        return ending

    def end(self, result: dict[str, Any]) -> None:
        """Ends the run on the server, and writes the result."""
        stopped = bool(result.get("requeue"))
        if self._config.tracking.report and not stopped:
            # The record first, because the report shows it.
            self.record.end(self.folder, "FINISHED")
            samples = self._config.tracking.log_samples
            self._make_optional("report", lambda: report_page.write_report(self.folder, samples=samples))
        if stopped:
            self.tracker.end("KILLED", HURRY_S)
        else:
            self.tracker.end("FINISHED", None)
        # The result last of all: where it exists, nothing is left to be done.
        files.write(self.folder / RESULT, json.dumps(redact(result), allow_nan=False).encode() + b"\n")

    def fail(self) -> None:
        self.tracker.end("FAILED", HURRY_S)

    def _offer(self, step: int, checkpoint: Path) -> Path:
        """Puts a checkpoint into the outbox as a version; returns its folder there."""
        config = self._config
        averaged = config.train.ema_decay is not None
        # The moving average is what the run evaluates; the raw weights are kept beside it.
        weights = {WEIGHTS: EMA, RAW: MODEL} if averaged else {WEIGHTS: MODEL}
        digests = Commit.read(checkpoint).files
        tags = self.record.tags
        lineage = {
            "run": self.record.uuid,
            "step": str(step),
            "config": fingerprint(config.model_dump(mode="json")),
            "data": self._training.digest,
        }
        if "mlflow.source.git.commit" in tags:
            lineage["code"] = tags["mlflow.source.git.commit"]
        if PARENT in tags:
            lineage["parent"] = tags[PARENT]
        scored = None
        if self._validation is not None:
            path = redact(config.data.val or self._validation.root)
            scored = ScoredData(path=path, digest=self._validation.digest, samples=len(self._validation))
        card = ModelCard(
            task=config.task,
            model=config.model,
            image=config.image,
            eval_batch_size=config.evaluate.batch_size,
            classes=self._training.classes,
            averaged=averaged,
            metrics=finite_or_none(scores_of(checkpoint) or {}),
            scored=scored,
            sha256={name: digests[file].sha256 for name, file in weights.items()},
            lineage=lineage,
        )
        return self.outbox.put({name: checkpoint / file for name, file in weights.items()}, card)

    def _offer_if_possible(self, step: int, checkpoint: Path) -> None:
        # A full disk must cost the run a version, and nothing more.
        try:
            self._offer(step, checkpoint)
        except OSError as error:
            log.error(f"{self.outbox.folder}: {error}; this version will not be registered")

    def _draw_predictions(self, checkpoint: Path, validation: ShardSet) -> None:
        """Draws some validation images with the network's predictions."""
        config = self._config
        averaged = config.train.ema_decay is not None
        weights = checkpoint / (EMA if averaged else MODEL)
        task = build_trained(config.task, config.model, config.image, validation.classes, weights)
        picture = self.folder / "predictions.png"
        draw_predictions.draw_predictions(task, validation, config, NUM_PREDICTIONS, picture, config.run.name)

    def _make_optional(self, name: str, make: Callable[[], object]) -> None:
        """Makes a page or picture of a run that has succeeded; an error is logged, and does not fail the run."""
        try:
            make()
        except Exception:
            log.exception(f"{self.folder}: no {name}")

    def _copy_manifests(self) -> list[DataInput]:
        """Copies the manifests of the data sets into the run's folder; returns the inputs for its record."""
        sources: list[tuple[Literal["training", "validation"], str, Manifest]] = []
        for path, manifest in zip(self._config.data.train_paths, self._training.manifests, strict=True):
            sources.append(("training", path, manifest))
        if self._validation:
            path = self._config.data.val or self._validation.root
            sources.append(("validation", path, self._validation.manifests[0]))
        inputs = []
        (self.folder / "data").mkdir(exist_ok=True)
        for number, (context, path, manifest) in enumerate(sources):
            copy = f"data/{context}-{number}.json"
            files.write(self.folder / copy, manifest.model_dump_json().encode())
            inputs.append(
                DataInput(
                    context=context,
                    path=path,
                    digest=manifest.digest,
                    samples=manifest.samples,
                    classes=len(manifest.classes),
                    manifest=copy,
                )
            )
        return inputs


def read_parent(folder: Path) -> str | None:
    """Returns the version that the run in `folder` started from, although an alias may have moved since; None where
    there is none."""
    try:
        return Record.read(folder).tags.get(PARENT)
    except InputError:
        return None
