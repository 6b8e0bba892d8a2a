"""A run's settings, tags and data sets as MLflow's entities, without secrets and within MLflow's limits."""

import json
import urllib.parse
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

from pipeline.config import Config
from pipeline.redact import redact
from pipeline.track.sync.record import DataInput


def make_params(config: Config, known: Container[str]) -> list[Param]:
    """Returns a parameter for each setting, except those that the server knows."""
    settings = redact(config.model_dump(mode="json"))
    return [Param(key, _cut(value, MAX_PARAM_VAL_LENGTH)) for key, value in _flatten(settings) if key not in known]


def make_tags(tags: dict[str, str]) -> list[RunTag]:
    return [RunTag(key, _cut(value, MAX_TAG_VAL_LENGTH)) for key, value in tags.items()]


def make_input(data: DataInput) -> DatasetInput:
    """Returns a data set that the run reads, named after the last two folders of its path."""
    path = redact(data.path)
    url = urllib.parse.urlsplit(path)
    kind = "http" if url.scheme == "https" else url.scheme or "local"
    # MLflow reads the source by its type: an HTTP source has a URL, every other one a URI.
    key = "url" if kind == "http" else "uri"
    name = "/".join(Path(url.path).parts[-2:]).strip("/")
    profile = {
        "samples": data.samples,
        "classes": data.classes,
        "sha256": data.digest,
    }
    dataset = Dataset(
        name=name or path,
        digest=data.digest[:MAX_DATASET_DIGEST_SIZE],
        source_type=kind,
        source=json.dumps({key: path}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, data.context)])


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields a tree of settings as pairs of dotted key and value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        # A mapping whose keys are no names, such as the resolution schedule, is one value.
        if isinstance(value, dict) and all(each.isidentifier() for each in value):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _cut(value: Any, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
