"""Stop a run by each signal in each of its phases, start it again, and compare it with one that nobody disturbed.

python -m tests.chaos.signals

    reference: start ───────────────────────────────────────────────────────────▶ end ─┐
    disturbed: start ──▶ signal in a phase ──▶ 85 ──▶ the same command again ───▶ end ─┴─▶ equal

Compared are the result, the registered versions with their metrics and aliases, the run's tags and status, what is
handed off to which version, the lines of metrics.jsonl, and the last checkpoint to the last bit. Prints a table with a
line for each phase and signal; "SIGINT,SIGTERM" is what reaches a rank when Ctrl-C is typed under a launcher. Exit code
1: something differs.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from mlflow.tracking import MlflowClient

from pipeline import cli
from pipeline.config import load_config
from pipeline.errors import FAILED, USAGE
from pipeline.job import handoff
from pipeline.track.model_card import WEIGHTS
from pipeline.track.registry import registry
from pipeline.track.sync.record import Record
from tests.chaos.runs import Job, checkpoint_differences, metrics_differences, pack_digits, write_config
from tests.workers.signalled import PHASES

STEPS = 20
LIMIT_S = 300
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGINT,SIGTERM", "SIGKILL")
MEASURED = ("run", "run_id", "images_per_second", "ettr")
"""What a result holds that no two runs share."""


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.signals", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--phase", action="append", choices=PHASES, help="this one alone; may be given several times")
    parser.add_argument("--signal", action="append", choices=SIGNALS, help="this one alone; may be given several times")
    options = parser.parse_args()
    began = time.monotonic()
    blows = [[(phase, names)] for phase in options.phase or PHASES for names in options.signal or SIGNALS]
    with tempfile.TemporaryDirectory() as folder:
        rows = sweep(Path(folder), pack_digits(Path(folder, "digits")), options.ranks, blows)
    width = max(map(len, PHASES))
    print(f"{'phase':{width}}  {'signal':14}  {'exit codes':>10}  equal", file=sys.stderr)
    for row in rows:
        (phase, names), *_ = row["blows"]
        codes, faults = ", ".join(map(str, row["codes"])), "; ".join(row["differences"]) or "yes"
        print(f"{phase:{width}}  {names:14}  {codes:>10}  {faults}", file=sys.stderr)
    equal = sum(not row["differences"] for row in rows)
    return {"runs": len(rows), "equal": equal, "ok": equal == len(rows), "seconds": round(time.monotonic() - began, 1)}


def sweep(folder: Path, digits: Path, ranks: int, blows: Iterable[list[tuple[str, str]]]) -> list[dict[str, Any]]:
    """A run for each list of phases and signals, one attempt for each of them and one more to end it: the exit codes of
    the attempts that were disturbed, and how the run differs from an undisturbed one."""
    path = configuration(digits, folder, ranks)
    job = Job(path, "reference", ranks, target="tests.workers.signalled", first=("none",))
    job.finish(LIMIT_S)
    rows = []
    for number, series in enumerate(blows):
        began = time.monotonic()
        disturbed = dataclasses.replace(job, name=f"disturbed-{number}")
        codes = [strike(disturbed, phase, names) for phase, names in series]
        disturbed.finish(LIMIT_S)
        row = {"blows": series, "codes": codes, "differences": differences(disturbed, job)}
        print(f"{row} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def strike(job: Job, phase: str, names: str) -> int | None:
    """Start the job, which is sent the signals in the phase; returns rank 0's exit code."""
    with dataclasses.replace(job, first=(f"{phase}:{names}",)).start() as attempt:
        if not attempt.wait(LIMIT_S) or attempt.codes[0] in (FAILED, USAGE):
            raise RuntimeError(f"{names} in {phase}: ended with {attempt.codes}: {attempt.errors()[-3000:]}")
        return attempt.codes[0]


def configuration(digits: Path, folder: Path, ranks: int) -> Path:
    """Of a run that hands its best version off, if it has a score."""
    path = write_config(digits, folder, ranks=ranks, stage=1, steps=STEPS, save_every=8)
    tree = yaml.safe_load(path.read_text())
    tree["train"]["eval_every"], tree["evaluate"] = "4 steps", {"batch_size": 64}
    child = folder / "child.yaml"
    child.write_text(yaml.safe_dump(tree))
    tree["handoff"] = [{"config": str(child), "gate": {"top1": {"min": 0.01}}}]
    path.write_text(yaml.safe_dump(tree))
    return path


def differences(ours: Job, reference: Job) -> list[str]:
    found, expected = outcome(ours), outcome(reference)
    last = f"step-{STEPS:08d}"
    return [
        *(f"{name} is {found[name]}, not {expected[name]}" for name in expected if found[name] != expected[name]),
        *checkpoint_differences(ours.checkpoints / last, reference.checkpoints / last),
        *metrics_differences(ours.folder / "metrics.jsonl", reference.folder / "metrics.jsonl", STEPS),
    ]


def outcome(job: Job) -> dict[str, Any]:
    """What a run says of itself to others. Versions are told by their step: how many have been tried and removed again
    depends on how fast the server is."""
    record = Record.read(job.folder)
    client = MlflowClient(f"sqlite:///{job.folder.parent / 'mlflow.db'}")
    versions = registry.list_versions(client, job.name)
    steps = {registry.uri_of(version): version.tags["step"] for version in versions}
    result = json.loads((job.folder / "result.json").read_text())
    run = client.get_run(result["run_id"])
    config = load_config(job.folder / "config.yaml")
    decided = [handoff.decide(job.folder, config, entry) for entry in config.handoff]
    return {
        "result": {name: steps.get(value, value) for name, value in result.items() if name not in MEASURED},
        "versions": {
            version.tags["step"]: {
                **{name: value for name, value in version.tags.items() if name.startswith("metric.")},
                "weights": version.tags[f"{registry.DIGEST}artifacts/{WEIGHTS}"],
                "good": version.tags["good"],
                "aliases": sorted(version.aliases),
            }
            for version in versions
        },
        "tags": {name: value for name, value in record.tags.items() if not name.startswith(("mlflow.", "code."))},
        "status": [record.status, run.info.status],
        "hand-off": [(steps[claim.model] if claim else None, why) for claim, why in decided],
        "begun": (job.folder / "handoff" / "begun").exists(),
    }


if __name__ == "__main__":
    cli.run(main)
