"""Who holds the others up: the hang watch, which ends a job that stands still, and the stragglers of one that moves.

    main thread ── at(step, phase) ──▶ watch thread ── heartbeat ──▶ watch/rank-R.json ──▶ all ranks: who is behind?
                                            └── nothing moved ──▶ stacks/rank-R.txt, one line on stderr, exit code 1

A hung rank makes all the others wait, so all time out at about the same moment and each writes its own stacks.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pipeline.world import World

_OTHERS_S = 3.0
"""How long a rank that gives up lets the others write their stacks: a launcher ends all once one has ended."""
_BACKSTOP_S = 5.0
"""Past the time-out; longer than giving up in order takes."""


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What a rank lets the others know. Times are Unix times of its own clock: others only show them."""

    attempt: str
    rank: int
    host: str
    pid: int
    alive: float
    """When this was written."""
    progress: int
    """Phases entered since the start."""
    step: int
    waits_in: str
    """The phase."""
    since: float
    """When it last moved."""
    hung: bool
    """Timed out, and its stacks are written."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class HangWatch:
    """Ends this process with exit code 1 once it has made no progress for `hang_timeout_s`, and says who is behind.

    A context manager, to be entered on all ranks. `folder` is one that all ranks see, on whatever file system;
    the stacks go to `stacks` beside it, after those of earlier attempts. `attempt` names this start of the job and
    is the same on all ranks: heartbeats that an earlier one left are not taken for ours.
    """

    def __init__(self, folder: Path, world: "World", hang_timeout_s: float, attempt: str) -> None:
        self._folder, self._rank, self._size, self._attempt = folder, world.rank, world.size, attempt
        self._timeout_s = hang_timeout_s
        self._interval_s = min(15.0, max(0.2, hang_timeout_s / 20))
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._now = (0, 0, "start-up", 0.0)

    def at(self, step: int, phase: str) -> None:
        """Tell that `phase` of `step` begins or, with the same arguments as before, that it still goes on.

        Ranks are compared by the number of phases they entered, so each enters the same ones in the same order.
        """
        progress, last_step, last_phase, _ = self._now
        self._now = (progress + (step != last_step or phase != last_phase), step, phase, time.monotonic())

    def __enter__(self) -> "HangWatch":
        stacks = self._folder.parent / "stacks"
        for folder in (self._folder, stacks):
            folder.mkdir(parents=True, exist_ok=True)
        # Open from the start, because the backstop cannot open it.
        self._stacks_path = stacks / f"rank-{self._rank}.txt"
        self._stacks = self._stacks_path.open("a")
        self._now = (0, 0, "start-up", time.monotonic())
        self._arm_backstop(self._now[-1])  # the thread may never come to run
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._path(self._rank).unlink(missing_ok=True)
        if self._stacks.tell() == 0:
            self._stacks_path.unlink(missing_ok=True)
        self._stacks.close()

    def _watch(self) -> None:
        moved_s, earlier = 0.0, None
        while True:
            self._write()
            if moved_s != self._now[-1]:
                moved_s, earlier = self._now[-1], None
                self._arm_backstop(moved_s)
            still_s = time.monotonic() - moved_s
            if still_s >= self._timeout_s:
                self._give_up(earlier or {})
            # Two looks, half the time-out apart, tell whether a heartbeat moves without comparing nodes' clocks.
            if earlier is None and still_s >= self._timeout_s / 2:
                earlier = self._read(range(self._size))
            if self._closing.wait(min(self._interval_s, self._timeout_s - still_s)):
                return

    def _arm_backstop(self, moved_s: float) -> None:
        """Against native code that hangs with the interpreter's lock, which stops this thread too.

        An interval later than it seems, because the main thread may move once more before this thread looks again.
        """
        left_s = self._timeout_s + self._interval_s + _BACKSTOP_S - (time.monotonic() - moved_s)
        # A lone rank's stacks go to stderr (2): there is no other rank to say why it ended.
        file = self._stacks if self._size > 1 else 2
        faulthandler.dump_traceback_later(max(left_s, 0.1), exit=True, file=file)

    def _give_up(self, earlier: Mapping[int, Heartbeat]) -> NoReturn:
        try:
            own = self._heartbeat()
            print(
                f"{own}, {time.strftime('%F %T %z')}, step {own.step}, {own.waits_in}:", file=self._stacks, flush=True
            )
            faulthandler.dump_traceback(self._stacks)
            own = self._write(hung=True)
            beats = {**self._read(range(self._size)), self._rank: own}
            silent = silent_ranks(earlier, beats)
            line = (
                f"hang: rank {own.rank} made no progress for {self._timeout_s:g} s, it waits in {own.waits_in} at step "
                f"{own.step}; {who_is_behind(own, beats, silent, self._size)}; stacks in {self._stacks_path.parent}/"
            )
            for file in (sys.stderr, self._stacks):
                print(line, file=file, flush=True)
            self._wait_for({rank for rank in beats if rank not in silent})
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _wait_for(self, ranks: set[int]) -> None:
        """Until these have written their stacks, within reason."""
        deadline = time.monotonic() + _OTHERS_S
        while time.monotonic() < deadline:
            ranks = {rank for rank, beat in self._read(ranks).items() if not beat.hung}
            if not ranks:
                return
            time.sleep(0.2)

    def _heartbeat(self, hung: bool = False) -> Heartbeat:
        progress, step, phase, moved_s = self._now
        now = time.time()
        since = now - (time.monotonic() - moved_s)
        return Heartbeat(
            self._attempt, self._rank, self._host, self._pid, now, progress, step, phase, since=since, hung=hung
        )

    def _write(self, hung: bool = False) -> Heartbeat:
        beat, path = self._heartbeat(hung), self._path(self._rank)
        # A full disk is no hang.
        with contextlib.suppress(OSError):
            # Whole at any moment, but not synced: it matters for as long as this process lives.
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(json.dumps(dataclasses.asdict(beat)))
            partial.rename(path)
        return beat

    def _read(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        """Heartbeats of this attempt, by rank."""
        beats = {}
        for rank in ranks:
            with contextlib.suppress(OSError, ValueError):
                fields = json.loads(self._path(rank).read_text())
                if fields["attempt"] == self._attempt:
                    beats[rank] = Heartbeat(**fields)
        return beats

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"


def silent_ranks(earlier: Mapping[int, Heartbeat], beats: Mapping[int, Heartbeat]) -> set[int]:
    """Ranks whose heartbeat has not moved: stopped, killed, on a lost node, or hung with the interpreter's lock."""
    return {rank for rank, beat in beats.items() if beat == earlier.get(rank) and not beat.hung}


def who_is_behind(own: Heartbeat, beats: Mapping[int, Heartbeat], silent: set[int], size: int) -> str:
    """The ranks that the others wait for: those that cannot run, or else those that entered fewest phases."""
    behind = [f"rank {rank} is behind: it has not started, or has ended" for rank in range(size) if rank not in beats]
    for beat in (beats[rank] for rank in sorted(silent)):
        quiet_s = max(0.0, own.alive - beat.alive)
        behind.append(
            f"{beat} is behind: it no longer runs or is stuck in native code (no heartbeat for {quiet_s:.0f} s), last "
            f"seen in {beat.waits_in} at step {beat.step}"
        )
    if not behind:
        least = min(beat.progress for beat in beats.values())
        last = [beat for _, beat in sorted(beats.items()) if beat.progress == least]
        if len(last) == size:
            return f"all ranks wait in {own.waits_in} at step {own.step}"
        behind = [
            f"{beat} is behind: in {beat.waits_in} at step {beat.step} for {beat.alive - beat.since:.0f} s"
            for beat in last
        ]
    shown = 8  # as many as a node has
    more = [f"and {len(behind) - shown} more ranks"] if len(behind) > shown else []
    return "; ".join(behind[:shown] + more)


class Stragglers:
    """Ranks that are slow for `patience` readings in a row: their speed is less than `slow` times the median's.

    The median is the faster of the two middle ones where the number of ranks is even. So of two ranks the slow one is
    compared with the other, not with their mean, which it would drag along.
    """

    def __init__(self, patience: int = 3, slow: float = 0.7) -> None:
        self._patience, self._slow = patience, slow
        self._in_a_row: dict[int, int] = {}

    def compare(self, own_s: Sequence[float]) -> list[tuple[int, float]]:
        """(rank, speed relative to the median) of the stragglers.

        `own_s` is each rank's own working time since the last reading, without its waiting for others.
        """
        median_s = statistics.median_low(own_s)
        speeds = {rank: median_s / s for rank, s in enumerate(own_s) if median_s < self._slow * s}
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in speeds}
        return [(rank, speed) for rank, speed in speeds.items() if self._in_a_row[rank] >= self._patience]
