"""Model versions that wait to be registered, so that neither a server that is away nor a checkpoint that is removed
meanwhile costs one.

    checkpoints/step-00000420/ ──put: hard links──▶ versions/step-00000420-DIGEST/ ──Mirror──▶ registry
                                                      model.safetensors  [raw.safetensors]  model.json
                                                      registered.json    once it is; the weights go
                                                      given-up.txt       if the run has gone back behind it

An entry counts once it has a model.json, which is written last. One without registered.json whose weights are gone is
missing: the registry has lost it, and nothing holds its weights any more. Knows no MLflow.
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline import files
from pipeline.track.model_card import CARD, WEIGHTS, ModelCard

REGISTERED, GIVEN_UP = "registered.json", "given-up.txt"


class Outbox:
    """Those of one run. Used by the job's rank 0, or by `registry.py sync` while no job is at work."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "versions"

    def put(self, weights: Mapping[str, Path], card: ModelCard) -> Path:
        """Note a version for registration; the same one again is left alone. `weights` are files by the names that the
        version gives them; their digests are in the card."""
        digest = "".join(card.sha256[name] for name in sorted(weights))[:16]
        entry = self.folder / f"step-{int(card.lineage['step']):08d}-{digest}"
        if (entry / CARD).exists():
            return entry
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir(parents=True)
        for name, path in weights.items():
            files.link(path, entry / name)
        card.write(entry)
        return entry

    def waiting(self) -> list[Path]:
        """Entries that are not registered yet, by step."""
        return [entry for entry in self._unregistered() if (entry / WEIGHTS).exists()]

    def missing(self) -> list[Path]:
        """Entries that the registry has lost and that nothing holds the weights of, by step."""
        return [entry for entry in self._unregistered() if not (entry / WEIGHTS).exists()]

    def registered(self) -> dict[Path, str]:
        """URIs of those that are, by entry, by step."""
        noted = [entry for entry in self._entries() if (entry / REGISTERED).exists()]
        return {entry: json.loads((entry / REGISTERED).read_text())["uri"] for entry in noted}

    def note(self, entry: Path, uri: str) -> None:
        """The entry has become models:/NAME/VERSION; its weights are no longer needed here."""
        files.write(entry / REGISTERED, json.dumps({"uri": uri}).encode() + b"\n")
        for weights in entry.glob("*.safetensors"):
            weights.unlink()

    def give_up(self, since: int, step: int) -> None:
        """Mark the entries between two steps, whose weights the run has rolled back: they are not registered any more,
        and never the best."""
        for entry in self._entries():
            if since < int(entry.name.split("-")[1]) < step:
                with contextlib.suppress(FileNotFoundError):  # trimmed this instant
                    files.write(entry / GIVEN_UP, f"at step {step} the run went back to step {since}".encode())

    def given_up(self) -> dict[str, str]:
        """Why, by URI, of the registered entries that are."""
        return {uri: (at / GIVEN_UP).read_text() for at, uri in self.registered().items() if is_given_up(at)}

    def reopen(self, entry: Path) -> bool:
        """Have an entry wait again that the registry has lost. False if nothing holds its weights: it is missing."""
        wanted, found = ModelCard.read(entry).sha256, dict[str, Path]()
        for path in self._holders(entry):
            with path.open("rb") as file:
                found[hashlib.file_digest(file, "sha256").hexdigest()] = path
        whole = found.keys() >= set(wanted.values())
        for name, digest in wanted.items() if whole else ():
            (entry / name).unlink(missing_ok=True)
            files.link(found[digest], entry / name)
        (entry / REGISTERED).unlink(missing_ok=True)
        return whole

    def trim(self, keep_best: int, metric: str) -> None:
        """Remove entries that better ones have overtaken before they were registered, all but the best and the last,
        and those given up before. To be called by who registers them."""
        waiting = self.waiting()
        scores = self.scores(metric)
        best = sorted(waiting, key=lambda entry: scores.get(entry, -math.inf), reverse=True)[:keep_best]
        given_up = {entry for entry in self._entries() if is_given_up(entry) and not (entry / REGISTERED).exists()}
        for entry in set(waiting[:-1]) - set(best) | given_up:
            shutil.rmtree(entry)

    def scores(self, metric: str) -> dict[Path, float]:
        """Of the entries that were scored and are without `faults_of`, waiting and registered, by step."""
        scores: dict[Path, float] = {}
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):  # trimmed this instant
                score = ModelCard.read(entry).metrics.get(metric)
                if score is not None and not faults_of(entry):
                    scores[entry] = score
        return scores

    def _holders(self, entry: Path) -> list[Path]:
        """Files that may be an entry's weights: those of its checkpoint, and those that a lost database has left among
        the artifacts beside it."""
        checkpoint = self.folder.parent / "checkpoints" / entry.name.rpartition("-")[0]
        cards = self.folder.parent.parent.glob(f"artifacts/*/models/*/artifacts/artifacts/{CARD}")
        stored = [path.parent for path in cards if path.read_bytes() == (entry / CARD).read_bytes()]
        weights = [path for folder in (checkpoint, *stored) for path in folder.glob("*.safetensors")]
        return [path for path in weights if not path.name.startswith("optimizer-")]

    def _unregistered(self) -> list[Path]:
        entries = [entry for entry in self._entries() if not is_given_up(entry)]
        return [entry for entry in entries if not (entry / REGISTERED).exists()]

    def _entries(self) -> list[Path]:
        return [card.parent for card in sorted(self.folder.glob(f"step-*/{CARD}"))]


def is_given_up(entry: Path) -> bool:
    return (entry / GIVEN_UP).exists()


def faults_of(entry: Path) -> list[str]:
    """Why an entry is no best and is handed off to nobody."""
    unknown = [f"{name} is not finite" for name, value in ModelCard.read(entry).metrics.items() if value is None]
    return ["its weights were rolled back", *unknown] if is_given_up(entry) else unknown
