"""MLflow, promotion gates, and the fine-tuning jobs that follow a run."""

import math
import re
import urllib.parse
from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.fields import CONTROL, text_matching
from pipeline.config.section import Section


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking server. None: MLFLOW_TRACKING_URI or, without one, sqlite:///ROOT/mlflow.db with artifacts beside
    it."""
    experiment: str = "pretrain"
    model_name: (
        Annotated[str, text_matching(rf"[^/:@{CONTROL}]+", "a model's name is not empty and has none of / : @")] | None
    ) = None
    """Registered model that receives this run's versions. None: the run's name."""
    system_metrics: bool = True
    """Load of each node's cores, memory, disk, network and GPUs, every ten seconds."""
    keep_versions: int = Field(default=1, ge=0)
    """Best ones to keep registered, beside the run's last. Those with an alias or a child stay in any case."""
    patience_s: float = Field(default=120.0, gt=0.0)
    """How long the end of a run waits for the server. `launch/registry.py sync` sends what is left then."""
    report: bool = True
    """Write report.html at the end of the run. launch/report.py does at any time."""
    log_diff: bool = False
    """Log the uncommitted changes to the code. They can hold secrets."""
    log_samples: bool = False
    """Log sheets of augmented training images and of predictions, where their licence allows it."""

    @model_validator(mode="after")
    def _is_a_server(self) -> "TrackingConfig":
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
    """What a metric has to reach. One that was not measured, or is not finite, fails."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("a bound has a min, a max or both")
        return self

    def holds(self, value: float | None) -> bool:
        if value is None or not math.isfinite(value):
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        ends = (f"at least {self.min}", self.min), (f"at most {self.max}", self.max)
        return " and ".join(text for text, end in ends if end is not None)


class Gates(Section):
    """What a model version has to pass to become @champion. See launch/registry.py promote."""

    metrics: dict[str, Bound] = {}
    champion: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    """How much worse than the present champion's a metric may be, on the same data. Metrics whose name ends in loss are
    better when lower, all others when higher."""
    data: str | None = None
    """Packed data set to score both on. None: the metrics that were registered, which must be of equal data."""


class HandoffConfig(Section):
    """A fine-tuning job to start when this run has ended."""

    config: str
    """Its YAML file."""
    set: list[str] = []
    """Overrides, as on the command line."""
    gate: dict[str, Bound] = {}
    """What this run's model has to reach, or the job is not started."""
