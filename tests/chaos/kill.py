"""Kill a run again and again, restart it until it is done, and compare it with one that nobody disturbed.

python -m tests.chaos.kill --kills 50

    reference: start ───────────────────────────────────────────────────────────────▶ end ─┐
    disturbed: start ──▶ SIGKILL, start ──▶ SIGKILL inside a save, start ──▶ … ─────▶ end ─┴─▶ equal to the last bit

Kills are drawn over steps, so that they fall on training and not on start-up, and two fifths are aimed inside saves.
Half of them kill every rank, half one alone, which the others have to notice. Exit code 1: something differs, or a rank
hung or ended with 0 although another was killed, or the kills were not what they should be (a third inside saves, half
of the restarts from a step above 0).
"""

import argparse
import dataclasses
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline import cli
from tests.chaos.runs import (
    COMMIT,
    Attempt,
    Job,
    checkpoint_differences,
    metrics_differences,
    pack_digits,
    step_of,
    trace_differences,
    write_config,
)

ATTEMPT_S = 300
SURVIVORS_S = 60  # for ranks to notice that another is gone
POLL_S = 0.001


@dataclasses.dataclass(frozen=True)
class Kill:
    step: int
    """Not before this one has been logged or, in a save, is being saved."""
    in_save: bool
    delay: float
    """How far into a save or a step, as a fraction of the time it takes."""
    ranks: list[int]


@dataclasses.dataclass
class Toll:
    """What the kills did."""

    kills: int = 0
    kills_in_save: int = 0
    kills_of_one_rank: int = 0
    restarts: int = 0
    resumed_above_zero: int = 0
    slowest_survivor_s: float = 0.0
    faults: list[str] = dataclasses.field(default_factory=list)


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=1, choices=range(4), help="ZeRO stage")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-every", type=int, default=7, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="run in FOLDER and leave everything there")
    options = parser.parse_args()
    if min(options.kills, options.ranks, options.steps, options.save_every) < 1:
        parser.error("--kills, --ranks, --steps and --save-every are at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return compare(folder, options)


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    digits = pack_digits(folder / "digits")
    config = write_config(
        digits,
        folder,
        ranks=options.ranks,
        stage=options.stage,
        steps=options.steps,
        save_every=options.save_every,
        precision=options.precision,
    )
    reference, disturbed = Job(config, "reference", options.ranks), Job(config, "disturbed", options.ranks)
    step_s, save_s = watch(reference)
    say(f"reference: {options.steps} steps of {step_s:.2f} s, most saves longer than {save_s:.2f} s")
    toll = disturb(disturbed, options.kills, options.steps, random.Random(options.seed), step_s, save_s)

    last = f"step-{options.steps:08d}"
    found = {
        "bit_identical": checkpoint_differences(disturbed.checkpoints / last, reference.checkpoints / last),
        "trace_identical": trace_differences(disturbed.folder / "trace", reference.folder / "trace"),
        "metrics_identical": metrics_differences(
            disturbed.folder / "metrics.jsonl", reference.folder / "metrics.jsonl", options.steps
        ),
    }
    if toll.kills < options.kills:
        toll.faults.append(f"the run ended after {toll.kills} kills")
    if toll.kills_in_save < toll.kills / 3:
        toll.faults.append(f"only {toll.kills_in_save} of {toll.kills} kills were inside saves")
    if toll.resumed_above_zero < toll.restarts / 2:
        toll.faults.append(f"only {toll.resumed_above_zero} of {toll.restarts} restarts resumed from a step above 0")
    for fault in itertools.chain(toll.faults, *found.values()):
        say(f"fault: {fault}")
    identical = {name: not differences for name, differences in found.items()}
    return {
        **dataclasses.asdict(toll),
        **identical,
        "ok": not toll.faults and all(identical.values()),
        "seconds": round(time.monotonic() - began, 1),
    }


def watch(job: Job) -> tuple[float, float]:
    """Run it undisturbed. Returns the usual seconds of a step and those of a fast save, which most others exceed."""
    steps: list[float] = []
    saves: dict[Path, list[float]] = {}
    with job.start() as attempt:
        while attempt.running:
            now = time.monotonic()
            if attempt.step > len(steps):
                steps.append(now)
            if folder := attempt.saving():
                saves.setdefault(folder, []).append(now)
            time.sleep(POLL_S)
        attempt.expect_success()
    step_s = statistics.median(after - before for before, after in itertools.pairwise(steps))
    seconds = sorted(times[-1] - times[0] for times in saves.values())
    return step_s, seconds[len(seconds) // 4]


def disturb(job: Job, kills: int, steps: int, draw: random.Random, step_s: float, save_s: float) -> Toll:
    """Kill the job as often as asked, then let it end."""
    toll = Toll()
    for number in range(kills):
        kill = draw_kill(draw, number, kills, steps, job.ranks, short=math.ceil(kills / 3) - toll.kills_in_save)
        expected = job.newest_step()
        with job.start() as attempt:
            saved = strike(attempt, kill, step_s, save_s)
            note_end(toll, attempt, kill, steps)
        if attempt.codes == [0] * job.ranks:
            break  # it was done before the blow fell
        attempt.expect_killed(kill.ranks)
        note_resume(toll, attempt, expected, first=number == 0)
        in_save = saved is not None and saved.exists() and not (saved / COMMIT).exists()
        toll.kills += 1
        toll.kills_in_save += in_save
        toll.kills_of_one_rank += len(kill.ranks) < job.ranks
        victims = "all ranks" if len(kill.ranks) == job.ranks else f"rank {kill.ranks[0]}"
        place = f"saving step {step_of(saved)}" if saved and in_save else f"step {attempt.step}"
        say(
            f"kill {toll.kills}/{kills}: {victims} at {place}, from {attempt.resumed_at}; next from {job.newest_step()}"
        )
    else:
        expected = job.newest_step()
        note_resume(toll, job.finish(ATTEMPT_S), expected, first=False)
    return toll


def draw_kill(draw: random.Random, number: int, kills: int, steps: int, ranks: int, short: int) -> Kill:
    """One in each equal part of the run, so that a run which goes forward only by its saves can always get there."""
    step = int((number + draw.random()) / kills * (steps - 1))
    in_save = number % 5 in (1, 3)
    delay, alone = draw.random(), draw.random() < 0.5
    victim = draw.randrange(ranks)
    return Kill(max(1, step), in_save or short >= kills - number, delay, [victim] if alone else list(range(ranks)))


def strike(attempt: Attempt, kill: Kill, step_s: float, save_s: float) -> Path | None:
    """Wait for the moment and kill. Returns the checkpoint that was being written, if that was aimed at."""
    if not kill.in_save:
        attempt.wait_until(lambda: attempt.step >= kill.step, ATTEMPT_S, POLL_S)
        time.sleep(kill.delay * step_s)
        attempt.kill(kill.ranks)
        return None
    saved: Path | None = None

    def is_saving() -> bool:
        nonlocal saved
        saved = attempt.saving()
        return saved is not None and step_of(saved) >= kill.step

    attempt.wait_until(is_saving, ATTEMPT_S, POLL_S)
    time.sleep(kill.delay * save_s)
    attempt.kill(kill.ranks)
    return saved


def note_end(toll: Toll, attempt: Attempt, kill: Kill, steps: int) -> None:
    """Wait for the ranks that were not killed. They have lost one, so they have to end, and not as if all were well."""
    began = time.monotonic()
    if not attempt.wait(SURVIVORS_S):
        hung = [rank for rank, code in enumerate(attempt.codes) if code is None]
        toll.faults.append(f"ranks {hung} still ran {SURVIVORS_S} s after rank {kill.ranks[0]} was killed")
        return
    toll.slowest_survivor_s = max(toll.slowest_survivor_s, round(time.monotonic() - began, 2))
    complete = attempt.job.newest_step() == steps  # then a rank may have ended already
    if 0 in attempt.codes and any(attempt.codes) and not complete:
        toll.faults.append(f"ranks ended with {attempt.codes} after rank {kill.ranks[0]} was killed")


def note_resume(toll: Toll, attempt: Attempt, expected: int, *, first: bool) -> None:
    if attempt.resumed_at != expected:
        toll.faults.append(f"resumed at {attempt.resumed_at}, but {expected} is the newest whole checkpoint")
    toll.restarts += not first
    toll.resumed_above_zero += not first and bool(attempt.resumed_at)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
