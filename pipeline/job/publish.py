"""What a job says of itself to others: the record of its run, the versions that it offers, its result.

    begin           run.json  config.yaml  packages.txt  data/  ┐
    a new best      versions/                                   ├──Tracker──▶ MLflow
    end             versions/  result.json                      ┘

All of it goes to the run's folder first. The tracking server gets its copy behind training, or later.
"""

import functools
import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pipeline import files
from pipeline.config import Config, dump_config, fingerprint
from pipeline.errors import InputError
from pipeline.feed.preview import preview
from pipeline.job import report_page
from pipeline.redact import redact
from pipeline.shards.index import Manifest, ShardSet
from pipeline.tasks import draw_predictions
from pipeline.tasks.build import build_trained
from pipeline.track.code_version import code_revision, uncommitted
from pipeline.track.model_card import RAW, WEIGHTS, ModelCard, ScoredData
from pipeline.track.sync.outbox import Outbox
from pipeline.track.sync.record import MAIN_METRIC, PARENT, DataInput, Record
from pipeline.track.sync.tracker import Tracker, packages
from pipeline.train.checkpoint_files import EMA, MODEL, Commit, score_of, scores_of
from pipeline.train.meters import finite_or_none

RESULT = "result.json"
NUM_PREDICTIONS = 8
HURRY_S = 10.0
"""For the server when a job has been told to stop, or has failed: what is left then goes with the next start."""


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
        self._config, self._training, self._validation = config, training, validation
        self._metric = main_metric
        self.folder = config.run.folder
        (self.folder / RESULT).unlink(missing_ok=True)  # of an attempt that was stopped
        files.write(self.folder / "config.yaml", dump_config(config).encode(), private=True)
        files.write(self.folder / "packages.txt", packages().encode())
        if config.tracking.log_diff:
            files.write(self.folder / "diff.patch", uncommitted().encode(), private=True)
        if config.tracking.log_samples:
            preview(config, training, self.folder / "samples.png")
        tags = {
            "seed": str(config.run.seed),
            "data.digest": training.digest,
            "data.path": redact(", ".join(config.data.train_paths)),
            MAIN_METRIC: main_metric,
            **code_revision(),
            **({PARENT: parent} if parent else {}),
        }
        self.record = Record.begin(self.folder, config.run.name, uuid_=uuid, tags=tags, inputs=self._inputs())
        self.outbox = Outbox(self.folder)
        self.tracker = Tracker(self.folder, config.tracking.patience_s)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.tracker.on_step(step, metrics)

    def on_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.tracker.on_evaluation(step, metrics)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Offer a new best."""
        score, best = score_of(folder, self._metric), max(self.outbox.scores(self._metric).values(), default=-math.inf)
        if score is not None and score > best and self._config.tracking.keep_versions:
            self._tell_of_trouble(lambda: self._offer(step, folder))
        self.tracker.on_checkpoint(step, folder)

    def finish(self, step: int, checkpoint: Path) -> dict[str, Any]:
        """Offer the last checkpoint and wait for registration; what the result says of that. `model` is None where the
        server could not be reached."""
        entry = self._offer(step, checkpoint)
        if self._config.tracking.log_samples and self._validation:
            self._for_people("predictions", functools.partial(self._draw, checkpoint, self._validation))
        self.tracker.flush()
        registered = self.outbox.registered()
        ending = {"model": registered.get(entry), **finite_or_none(scores_of(checkpoint) or {})}
        scores = self.outbox.scores(self._metric)
        best = max(scores, key=lambda each: scores[each], default=entry)
        if scores and scores[best] > scores.get(entry, -math.inf):
            ending["best"] = registered.get(best)
        return ending

    def end(self, result: dict[str, Any]) -> None:
        """Tell the server, and write the result down: last of all, so that who finds it has nothing to make up for."""
        stopped = bool(result.get("requeue"))
        if self._config.tracking.report and not stopped:
            self.record.end(self.folder, "FINISHED")  # which the report tells
            samples = self._config.tracking.log_samples
            self._for_people("report", lambda: report_page.write_report(self.folder, samples=samples))
        self.tracker.end("KILLED" if stopped else "FINISHED", HURRY_S if stopped else None)
        files.write(self.folder / RESULT, json.dumps(redact(result), allow_nan=False).encode() + b"\n")

    def fail(self) -> None:
        self.tracker.end("FAILED", HURRY_S)

    def _offer(self, step: int, checkpoint: Path) -> Path:
        averaged = self._config.train.ema_decay is not None
        weights = {WEIGHTS: EMA, RAW: MODEL} if averaged else {WEIGHTS: MODEL}
        digests = Commit.read(checkpoint).files
        validation, config = self._validation, self._config
        tags = self.record.tags
        card = ModelCard(
            task=config.task,
            model=config.model,
            image=config.image,
            eval_batch_size=config.evaluate.batch_size,
            classes=self._training.classes,
            averaged=averaged,
            metrics=finite_or_none(scores_of(checkpoint) or {}),
            scored=None
            if validation is None
            else ScoredData(path=redact(str(config.data.val)), digest=validation.digest, samples=len(validation)),
            sha256={name: digests[file].sha256 for name, file in weights.items()},
            lineage={
                "run": self.record.uuid,
                "step": str(step),
                "config": fingerprint(config.model_dump(mode="json")),
                "data": self._training.digest,
                **({"code": tags["mlflow.source.git.commit"]} if "mlflow.source.git.commit" in tags else {}),
                **({"parent": tags[PARENT]} if PARENT in tags else {}),
            },
        )
        return self.outbox.put({name: checkpoint / file for name, file in weights.items()}, card)

    def _draw(self, checkpoint: Path, validation: ShardSet) -> None:
        """Some validation images with what the network says of them."""
        config, averaged = self._config, self._config.train.ema_decay is not None
        weights = checkpoint / (EMA if averaged else MODEL)
        task = build_trained(config.task, config.model, config.image, validation.classes, weights)
        picture = self.folder / "predictions.png"
        draw_predictions.draw_predictions(task, validation, config, NUM_PREDICTIONS, picture, config.run.name)

    def _for_people(self, what: str, make: Callable[[], object]) -> None:
        """Something to look at, of a run that has succeeded: what goes wrong with it is told, and no more."""
        try:
            make()
        except Exception:
            print(f"{self.folder}: no {what}: {traceback.format_exc()}", file=sys.stderr, flush=True)

    def _tell_of_trouble(self, attempt: Callable[[], Any]) -> None:
        """A disk that is full costs a version on the way, and not the run."""
        try:
            attempt()
        except OSError as error:
            print(f"{self.outbox.folder}: {error}; this version will not be registered", file=sys.stderr, flush=True)

    def _inputs(self) -> list[DataInput]:
        trained = zip(self._config.data.train_paths, self._training.manifests, strict=True)
        parts: list[tuple[Literal["training", "validation"], str, Manifest]] = [("training", *part) for part in trained]
        if self._validation:
            parts.append(("validation", str(self._config.data.val), self._validation.manifests[0]))
        inputs = []
        (self.folder / "data").mkdir(exist_ok=True)
        for number, (context, path, manifest) in enumerate(parts):
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


def parent_of(folder: Path) -> str | None:
    """The version that the run in `folder` was started from, which an alias may have left since."""
    try:
        return Record.read(folder).tags.get(PARENT)
    except InputError:
        return None
