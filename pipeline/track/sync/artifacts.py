"""The files of a run's folder that become artifacts on the server, without their secrets."""

import json
from pathlib import Path

import yaml

from pipeline.redact import redact, redact_urls
from pipeline.run_folder import CONFIG, GOODPUT, METRICS

TREES = (CONFIG, "deepspeed.json")
"""Files in which values are redacted by their keys; in others, URLs are redacted."""
FILES = (
    *TREES,
    "packages.txt",
    "diff.patch",
    "samples.png",
    "predictions.png",
    "report.html",
    "anomalies.jsonl",
    "quarantine.jsonl",
    GOODPUT,
    METRICS,
)


def read_redacted(path: Path) -> bytes:
    """Returns a file's content without passwords and tokens."""
    content = path.read_bytes()
    if path.name == CONFIG:
        document = redact(yaml.safe_load(content))
        return yaml.safe_dump(document, sort_keys=False).encode()
    if path.name in TREES:
        document = redact(json.loads(content))
        return json.dumps(document, indent=2).encode() + b"\n"
    if path.suffix == ".png":
        return content
    # Latin-1 maps every byte to a character and back, so that bytes of any encoding stay as they are.
    return redact_urls(content.decode("latin-1")).encode("latin-1")
