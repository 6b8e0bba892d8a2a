"""MLflow tracking, promotion gates, and the fine-tuning jobs that follow a run."""

import math
import re
import urllib.parse
from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.fields import CONTROL, text_matching
from pipeline.config.section import Section


class TrackingConfig(Section):
    """What is logged to MLflow, and which models are registered there."""

    uri: str | None = None
    """URI of the MLflow tracking server. None: MLFLOW_TRACKING_URI or, without it, sqlite:///ROOT/mlflow.db with the
    artifacts beside it."""
    experiment: str = "pretrain"
    """Name of the MLflow experiment."""
    model_name: (
        Annotated[str, text_matching(rf"[^/:@{CONTROL}]+", "a model's name is not empty and has none of / : @")] | None
    ) = None
    """Name of the registered model that receives this run's versions. None: run.name."""
    system_metrics: bool = True
    """Logs the load of each node's cores, memory, disks, network and GPUs every ten seconds."""
    keep_versions: int = Field(default=1, ge=0)
    """Number of this run's best versions that stay registered, besides its last one. Versions that have an alias, or
    that other versions were fine-tuned from, always stay."""
    patience_s: float = Field(default=120.0, gt=0.0)
    """Maximum time, in seconds, that the end of the run waits for the server. `launch/registry.py sync` sends what is
    missing after that."""
    report: bool = True
    """Writes report.html at the end of the run. launch/report.py writes it at any time."""
    log_diff: bool = False
    """Logs the uncommitted changes to the code. They may contain secrets."""
    log_samples: bool = False
    """Logs pictures of augmented training images and of predictions. Their licence must allow it."""

    @model_validator(mode="after")
    def _is_a_server(self) -> "TrackingConfig":
        # The configuration is logged to the very server, and written to the run's folder.
        if self.uri and urllib.parse.urlsplit(self.uri).password:
            raise ValueError(
                "uri holds a password, which would be logged with the configuration: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        if self.uri and not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://", self.uri):
            raise ValueError(
                f"uri {self.uri!r} is no tracking server: give http://HOST:PORT, sqlite:///FILE or another database"
            )
        return self


class Bound(Section):
    """The bounds of a metric. A metric that was not measured, or is not finite, fails them."""

    min: float | None = None
    """Lowest value that passes. None: no lower bound."""
    max: float | None = None
    """Highest value that passes. None: no upper bound."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("a bound has a min, a max or both")
        return self

    def holds(self, value: float | None) -> bool:
        """Whether the value is finite and within the bounds."""
        if value is None or not math.isfinite(value):
            return False
        # The bounds themselves pass.
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        texts: list[str] = []
        if self.min is not None:
            texts.append(f"at least {self.min}")
        if self.max is not None:
            texts.append(f"at most {self.max}")
        return " and ".join(texts)


class Gates(Section):
    """The conditions under which launch/registry.py promotes a model version to @champion."""

    metrics: dict[str, Bound] = {}
    """Bounds of metrics by name."""
    champion: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    """By how much a metric may be worse than the present champion's on the same data. A metric whose name ends in loss
    is better when lower, every other one when higher."""
    data: str | None = None
    """Packed data set on which both models are evaluated. None: their registered metrics are compared, which must
    come from the same data."""


class HandoffConfig(Section):
    """A fine-tuning job that starts when this run has finished."""

    config: str
    """Path of the job's YAML file."""
    set: list[str] = []
    """Overrides of its settings, KEY=VALUE, as on the command line."""
    gate: dict[str, Bound] = {}
    """Bounds of metrics of this run's model by name. The job starts only if the model passes all of them."""
