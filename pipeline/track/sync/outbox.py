"""Model versions that wait for their registration, so that none is lost while the server is down or with a checkpoint.

    checkpoints/step-00000420/ ──put: hard links──▶ versions/step-00000420-DIGEST/ ──Mirror──▶ registry
                                                      model.safetensors  [raw.safetensors]  model.json
                                                      registered.json    once it is registered; the weights go
                                                      given-up.txt       if the run was rolled back behind it

An entry is complete once it has a model.json, which is written last. An entry without registered.json whose weights are
gone is missing: the registry has lost it, and no other copy of its weights exists. This module does not import MLflow.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline import files
from pipeline.run_folder import CHECKPOINTS
from pipeline.track.model_card import CARD, WEIGHTS, ModelCard

REGISTERED = "registered.json"
GIVEN_UP = "given-up.txt"


class Outbox:
    """The versions of one run. The job's rank 0 uses it, or `registry.py sync` while no job is running."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "versions"

    def put(self, weights: Mapping[str, Path], card: ModelCard) -> Path:
        """Adds a version that is to be registered; returns its entry. One that exists already stays as it is.

        `weights`: files by the names that the version gives them. Their digests are in the card.
        """
        digest = "".join(card.sha256[name] for name in sorted(weights))[:16]
        entry = self.folder / f"step-{int(card.lineage['step']):08d}-{digest}"
        if (entry / CARD).exists():
            return entry
        # What a process that was killed in the middle has left.
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir(parents=True)
        for name, path in weights.items():
            files.link(path, entry / name)
        # The card comes last: it makes the entry count.
        card.write(entry)
        return entry

    def waiting(self) -> list[Path]:
        """Returns the entries that are not registered yet, by step."""
        return [entry for entry in self._list_unregistered() if (entry / WEIGHTS).exists()]

    def missing(self) -> list[Path]:
        """Returns the entries that the registry has lost and whose weights no longer exist, by step."""
        return [entry for entry in self._list_unregistered() if not (entry / WEIGHTS).exists()]

    def registered(self) -> dict[Path, str]:
        """Returns the URIs of the registered versions by entry, in the order of their steps."""
        noted = [entry for entry in self._list_entries() if (entry / REGISTERED).exists()]
        return {entry: json.loads((entry / REGISTERED).read_text())["uri"] for entry in noted}

    def note(self, entry: Path, uri: str) -> None:
        """Notes that the entry has become models:/NAME/VERSION, and removes its weights, which the registry now has."""
        # Noted before the weights go: an entry without either would be missing.
        files.write(entry / REGISTERED, json.dumps({"uri": uri}).encode() + b"\n")
        for weights in entry.glob("*.safetensors"):
            weights.unlink()

    def give_up(self, since: int, step: int) -> None:
        """Marks the entries between two steps, whose weights the run has rolled back.

        Such entries are no longer registered, and never the best.
        """
        reason = f"at step {step} the run went back to step {since}"
        for entry in self._list_entries():
            if since < int(entry.name.split("-")[1]) < step:
                # `trim` may remove the entry at this moment, in the tracker's thread.
                with contextlib.suppress(FileNotFoundError):
                    files.write(entry / GIVEN_UP, reason.encode())

    def given_up(self) -> dict[str, str]:
        """Returns the reasons why registered entries were given up, by URI."""
        registered = self.registered().items()
        return {uri: (entry / GIVEN_UP).read_text() for entry, uri in registered if is_given_up(entry)}

    def reopen(self, entry: Path) -> bool:
        """Makes an entry that the registry has lost wait again.

        Returns False if no copy of its weights exists: the entry is then missing.
        """
        wanted = ModelCard.read(entry).sha256
        copies = {files.sha256(path): path for path in self._find_copies(entry)}
        # By digest, because names and folders say nothing about the content.
        complete = copies.keys() >= set(wanted.values())
        if complete:
            for name, digest in wanted.items():
                (entry / name).unlink(missing_ok=True)
                files.link(copies[digest], entry / name)
        (entry / REGISTERED).unlink(missing_ok=True)
        return complete

    def trim(self, keep_best: int, metric: str) -> None:
        """Removes waiting entries except the best and the last, and entries that were given up before registration.

        Only the process that registers the entries may call this.
        """
        waiting = self.waiting()
        kept = {*self.rank(waiting, metric)[:keep_best], *waiting[-1:]}
        given_up = {entry for entry in self._list_entries() if is_given_up(entry) and not (entry / REGISTERED).exists()}
        for entry in given_up.union(set(waiting) - kept):
            shutil.rmtree(entry)

    def rank(self, entries: Iterable[Path], metric: str) -> list[Path]:
        """Returns entries with the best score first; those without one come last."""
        scores = self.scores(metric)
        return sorted(entries, key=lambda entry: scores.get(entry, -math.inf), reverse=True)

    def scores(self, metric: str) -> dict[Path, float]:
        """Returns the scores of the entries without faults, waiting and registered, in the order of their steps."""
        scores = {}
        for entry in self._list_entries():
            # `trim` may remove the entry at this moment.
            with contextlib.suppress(FileNotFoundError):
                score = ModelCard.read(entry).metrics.get(metric)
                if score is not None and not faults_of(entry):
                    scores[entry] = score
        return scores

    def _find_copies(self, entry: Path) -> list[Path]:
        """Returns files that may be copies of an entry's weights.

        These are its checkpoint's, and those that a lost database has left among the artifacts beside it.
        """
        run = self.folder.parent
        folders = [run / CHECKPOINTS / entry.name.rpartition("-")[0]]
        card = (entry / CARD).read_bytes()
        for stored in run.parent.glob(f"artifacts/*/models/*/artifacts/artifacts/{CARD}"):
            if stored.read_bytes() == card:
                folders.append(stored.parent)
        copies = []
        for folder in folders:
            copies += folder.glob("*.safetensors")
        return [path for path in copies if not path.name.startswith("optimizer-")]

    def _list_unregistered(self) -> list[Path]:
        return [entry for entry in self._list_entries() if not is_given_up(entry) and not (entry / REGISTERED).exists()]

    def _list_entries(self) -> list[Path]:
        return [card.parent for card in sorted(self.folder.glob(f"step-*/{CARD}"))]


def is_given_up(entry: Path) -> bool:
    """Whether the run has rolled back the entry's weights."""
    return (entry / GIVEN_UP).exists()


def faults_of(entry: Path) -> list[str]:
    """Returns the reasons why an entry can be neither the best nor handed off."""
    faults = [f"{name} is not finite" for name, value in ModelCard.read(entry).metrics.items() if value is None]
    if is_given_up(entry):
        faults.insert(0, "its weights were rolled back")
    return faults
