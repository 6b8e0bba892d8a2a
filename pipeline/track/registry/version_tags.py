"""The tags and aliases of a registered version.

Tags: "sha256.PATH" of each file, "bytes" of all, the card's lineage, "metric.NAME", "good", what `show` prints of the
model, and "child.UUID" of each run that was started from it.
"""

from mlflow.entities.model_registry import ModelVersion

CANDIDATE = "candidate"
CHAMPION = "champion"
"""These two are aliases: the newest good version, and the promoted one."""
DIGEST = "sha256."
METRIC = "metric."
CHILD = "child."
PROMOTED = "promoted."
"""These four are prefixes of tags."""
GIVEN_UP = "given_up"
"""Tag of a version whose weights its run has rolled back; its value is the reason."""
SCORED = "scored"
"""Tag with the digest of the data that the metrics were measured on."""
GOOD = "good"
"""Tag, "true" or "false": whether all metrics are finite and the version was not given up."""
LOGGED = "logged_model"
"""Tag with the id of MLflow's logged model, which holds the files."""


def uri_of(version: ModelVersion) -> str:
    """Returns models:/NAME/VERSION."""
    return f"models:/{version.name}/{version.version}"
