"""One rank of a run of launch/pretrain.py that is sent a signal as it enters a phase; see tests/chaos/signals.py.

python -m tests.workers.signalled PHASE[:SIGNAL,…] ARGUMENTS OF launch/pretrain.py…

Without a signal the phase is not disturbed. The hand-off is not started but noted, as RUN/handoff/begun.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import world
from pipeline.job import handoff, training_job
from pipeline.job.publish import Publisher
from pipeline.track.sync.tracker import Tracker
from pipeline.train.engine import Engine
from pipeline.train.loop import Trainer
from tests.ranks import ROOT

# Where a phase begins: a function and, of a Trainer's, the step from which on. For a run of 20 steps that is evaluated
# at every 4th and saved at every 8th.
PHASES: dict[str, tuple[Any, Callable[..., Any], int]] = {
    "start-up, before ranks meet": (world, world.start, 0),
    "start-up, before the network is made": (training_job, training_job.build_initial_task, 0),
    "start-up, before the engine is made": (Engine, Engine.__init__, 0),
    "start-up, before the record is written": (Publisher, Publisher.__init__, 0),
    "start-up, before the first step": (Trainer, Trainer.run, 0),
    "evaluation at a step without a save": (Trainer, Trainer._still_evaluating, 4),
    "evaluation at a step with a save": (Trainer, Trainer._still_evaluating, 8),
    "between evaluation and save": (Trainer, Trainer._save_if_due, 8),
    "save": (Trainer, Trainer._save, 8),
    "report of a checkpoint": (Trainer, Trainer._report_checkpoint, 8),
    "last evaluation": (Trainer, Trainer._still_evaluating, 20),
    "between last evaluation and last save": (Trainer, Trainer._save_if_due, 20),
    "last save": (Trainer, Trainer._finish, 20),
    "before registration": (Publisher, Publisher.finish, 0),
    "registration": (Tracker, Tracker.flush, 0),
    "before the result is written": (Publisher, Publisher.end, 0),
    "before the hand-off": (handoff, handoff.start_handoffs, 0),
    "after the hand-off": (handoff, handoff.start_handoffs, 0),
}


def main() -> None:
    phase, _, names = sys.argv[1].partition(":")
    numbers = [signal.Signals[name] for name in names.split(",") if name]
    handoff.start_handoffs = note_hand_off
    if numbers:
        place, function, step = PHASES[phase]
        name = function.__name__
        setattr(place, name, disturb(getattr(place, name), step, numbers, after=phase.startswith("after")))
    sys.argv[:2] = [str(ROOT / "launch/pretrain.py")]
    runpy.run_path(sys.argv[0], run_name="__main__")


def note_hand_off(folder: Path, ranks: int) -> None:
    (folder / "handoff").mkdir(exist_ok=True)
    with (folder / "handoff" / "begun").open("a") as note:
        note.write(f"{ranks}\n")


def disturb(
    function: Callable[..., Any], step: int, numbers: list[signal.Signals], *, after: bool
) -> Callable[..., Any]:
    """The function, which the first time from `step` on sends the signals before or after it does its work."""
    sent = False

    def disturbed(*arguments: Any, **named: Any) -> Any:
        nonlocal sent
        due = not sent and (step == 0 or arguments[0].state.step >= step)
        sent = sent or due
        if due and not after:
            send(numbers)
        result = function(*arguments, **named)
        if due and after:
            send(numbers)
        return result

    return disturbed


def send(numbers: list[signal.Signals]) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
    time.sleep(0.5)  # for the thread that listens


if __name__ == "__main__":
    main()
