"""Hostile and damaged input, made at random, against the commands and the feed.

python -m tests.chaos.hostile --minutes N --seed S

    generators ──▶ Case ──▶ sandbox, watched processes ──▶ verdict

Refused, skipped and reported, and accepted and right are what has to come out. Crashed (a traceback, a signal), hung
(time or memory), outside (a file beside the sandbox, or code of the input that ran) and wrong are defects: exit code 1.
A case is a function of the seed and its number, so `--only NUMBER` repeats one.
"""

import argparse
import collections
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import cli
from tests.chaos.hostile import data, models, servers, texts
from tests.chaos.hostile.mutate import Rng
from tests.chaos.hostile.trial import DEFECTS, VERDICTS, Case, Outcome, Sandbox, run

Generator = Callable[[Rng, Sandbox], Case]


KINDS = (
    *("images", "feed", "tars", "packed", "lists", "own", "configurations", "settings", "names"),
    *("weights", "stored", "cached", "predicted", "http", "s3"),
)
"""Of input, by their generators' names."""


def generators(folder: Path, stack: ExitStack, kinds: Sequence[str] = KINDS) -> dict[str, Generator]:
    """Returns the generators of some kinds by their names. What they share lies in `folder`; servers end with
    `stack`."""
    prepared = data.prepare(folder)
    server = stack.enter_context(servers.HostileServer(prepared))
    found: dict[str, Generator] = {
        "images": data.packed_images,
        "feed": data.fed_images,
        "tars": data.tars,
        "packed": data.packed(prepared),
        "lists": data.lists,
        "own": data.own_images,
        "configurations": texts.configurations,
        "settings": texts.settings,
        "names": texts.names,
        "http": servers.http(server),
        "s3": servers.s3(server),
    }
    if {"weights", "stored", "cached", "predicted"} & set(kinds):  # preparing them takes long
        registered = models.prepare(folder, prepared)
        found["weights"] = models.weights(registered)
        found["stored"] = models.stored(registered)
        found["cached"] = models.cached(registered)
        found["predicted"] = models.predicted(registered)
    return {kind: found[kind] for kind in kinds}


def trial(number: int, seed: int, generator: Generator, folder: Path, keep: bool = False) -> Outcome:
    """Runs one case in a sandbox of its own below `folder`, which is removed unless it is to be kept."""
    sandbox = Sandbox(folder / f"case-{number}")
    try:
        case = generator(np.random.default_rng([seed, number]), sandbox)
        return run(case, sandbox)
    finally:
        if not keep:
            shutil.rmtree(sandbox.root, ignore_errors=True)


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """Yields a line of Markdown for each kind of input, with the counts of its verdicts."""
    yield f"| input | tried | {' | '.join(VERDICTS)} | most seconds | most MiB |"
    yield "|---" * (len(VERDICTS) + 4) + "|"
    groups: dict[str, list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome.kind].append(outcome)
    for kind, group in sorted(groups.items()):
        counts = [sum(each.inputs for each in group if each.verdict == verdict) for verdict in VERDICTS]
        seconds, peak = max(each.seconds for each in group), max(each.peak_bytes for each in group)
        yield f"| {kind} | {sum(counts)} | {' | '.join(map(str, counts))} | {seconds:.1f} | {peak >> 20} |"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.hostile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, metavar="N", help="how long to make new cases (default 5)")
    parser.add_argument("--cases", type=int, metavar="N", help="at most so many cases")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time (default 2)")
    parser.add_argument("--kinds", metavar="A,B,…", help="of these generators alone")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat one case")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for the sandboxes, which stay there")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True)))
        chosen = generators(folder, stack, options.kinds.split(",") if options.kinds else KINDS)
        outcomes = _all(options, chosen, options.keep or folder)
    for line in table(outcomes):
        print(line, file=sys.stderr)
    counts = {verdict: sum(each.inputs for each in outcomes if each.verdict == verdict) for verdict in VERDICTS}
    ok = bool(outcomes) and not any(counts[verdict] for verdict in DEFECTS)
    return {"ok": ok, "seed": options.seed, "inputs": sum(counts.values()), **counts}


def _all(options: argparse.Namespace, chosen: Mapping[str, Generator], folder: Path) -> list[Outcome]:
    names = list(chosen)
    numbers = [options.only] if options.only is not None else itertools.count()
    deadline = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        running: dict[Future[Outcome], int] = {}
        for number in itertools.islice(numbers, options.cases):
            if time.monotonic() > deadline:
                break
            name = names[number % len(names)]
            running[pool.submit(trial, number, options.seed, chosen[name], folder, bool(options.keep))] = number
            if len(running) >= options.jobs:
                outcomes += _ended(running)
        while running:
            outcomes += _ended(running)
    return outcomes


def _ended(running: dict[Future[Outcome], int]) -> Iterator[Outcome]:
    """Yields what has ended, and reports defects at once."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        number, outcome = running.pop(future), future.result()
        if outcome.verdict in DEFECTS:
            print(f"case {number}: {outcome.verdict}: {outcome.kind}: {outcome.detail}", file=sys.stderr, flush=True)
        yield outcome


if __name__ == "__main__":
    cli.run(main)
