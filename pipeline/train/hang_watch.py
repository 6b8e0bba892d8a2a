"""Ranks that hold the others up: the hang watch ends a job without progress, and stragglers slow one down.

    main thread ── at(step, phase) ──▶ watch thread ── heartbeat ──▶ watch/rank-R.json ──▶ all ranks: who is behind?
                                            └── nothing moved ──▶ stacks/rank-R.txt, one line on stderr, exit code 1

A hung rank makes all the others wait, so all time out at about the same moment and each writes its own stacks.
"""

import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from pipeline import files
from pipeline.world import World

log = logging.getLogger(__name__)

_OTHERS_S = 3.0
"""How long a rank that gives up lets the others write their stacks: a launcher ends all once one has ended."""
_BACKSTOP_S = 5.0
"""How long after the time-out the backstop ends the process: longer than it takes to give up in order."""
_MOST_LISTED = 8
"""The most ranks that a message lists: as many as a node has."""


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What a rank lets the others know. Times are Unix times of its own clock, which others only print."""

    attempt: str
    rank: int
    host: str
    pid: int
    alive: float
    """When the heartbeat was written."""
    progress: int
    """The number of phases entered since the start."""
    step: int
    waits_in: str
    """The phase that the rank is in."""
    since: float
    """When the rank last made progress."""
    hung: bool
    """Whether the rank has timed out, and its stacks are written."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


Heartbeats = Mapping[int, Heartbeat]
"""Heartbeats by rank."""


class HangWatch:
    """Ends this process with exit code 1 once it has made no progress for `hang_timeout_s`, and reports who is behind.

    It is a context manager, to be entered on all ranks. `folder` is one that all ranks see, on any file system; the
    stacks go to `stacks` beside it, after those of earlier attempts. `attempt` names this start of the job and is the
    same on all ranks, so that heartbeats of an earlier start are ignored.
    """

    def __init__(self, folder: Path, world: World, hang_timeout_s: float, attempt: str) -> None:
        self._folder = folder
        self._rank, self._size = world.rank, world.size
        self._attempt = attempt
        self._timeout_s = hang_timeout_s
        self._interval_s = min(15.0, max(0.2, hang_timeout_s / 20))
        self._host = socket.gethostname()
        self._pid = os.getpid()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._now = (0, 0, "start-up", 0.0)

    def at(self, step: int, phase: str) -> None:
        """Notes that `phase` of `step` begins or, with the same arguments as before, that it still goes on.

        Ranks are compared by the number of phases they entered, so each enters the same ones in the same order.
        """
        progress, last_step, last_phase, _ = self._now
        if (step, phase) != (last_step, last_phase):
            progress += 1
        # In one assignment, because the watch thread reads it at any time.
        self._now = (progress, step, phase, time.monotonic())

    def __enter__(self) -> "HangWatch":
        stacks = self._folder.parent / "stacks"
        for folder in (self._folder, stacks):
            folder.mkdir(parents=True, exist_ok=True)
        # Open from the start, because the backstop cannot open it.
        self._stacks_path = stacks / f"rank-{self._rank}.txt"
        self._stacks = self._stacks_path.open("a")
        self._now = (0, 0, "start-up", time.monotonic())
        # Before the thread starts, because that may never come to run.
        self._arm_backstop(self._now[-1])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._heartbeat_path(self._rank).unlink(missing_ok=True)
        if self._stacks.tell() == 0:
            self._stacks_path.unlink(missing_ok=True)
        self._stacks.close()

    def _watch(self) -> None:
        moved_s, earlier = 0.0, None
        while True:
            self._write_heartbeat()
            if moved_s != self._now[-1]:
                moved_s, earlier = self._now[-1], None
                self._arm_backstop(moved_s)
            still_s = time.monotonic() - moved_s
            if still_s >= self._timeout_s:
                self._give_up(earlier or {})
            # Two readings, half the time-out apart, show whether a heartbeat moves without comparing nodes' clocks.
            if earlier is None and still_s >= self._timeout_s / 2:
                earlier = self._read_heartbeats(range(self._size))
            wait_s = min(self._interval_s, self._timeout_s - still_s)
            if self._closing.wait(wait_s):
                return

    def _arm_backstop(self, moved_s: float) -> None:
        """Arms a timer against native code that hangs with the interpreter's lock, which stops this thread too."""
        # An interval is added because the main thread may move once more before this thread looks again.
        still_s = time.monotonic() - moved_s
        left_s = self._timeout_s + self._interval_s + _BACKSTOP_S - still_s
        left_s = max(left_s, 0.1)
        # A lone rank's stacks go to stderr (2): there is no other rank to report why it ended.
        file = self._stacks if self._size > 1 else 2
        faulthandler.dump_traceback_later(left_s, exit=True, file=file)

    def _give_up(self, earlier: Heartbeats) -> NoReturn:
        try:
            own = self._heartbeat()
            now = time.strftime("%F %T %z")
            print(f"{own}, {now}, step {own.step}, {own.waits_in}:", file=self._stacks, flush=True)
            faulthandler.dump_traceback(self._stacks)
            own = self._write_heartbeat(hung=True)
            beats = self._read_heartbeats(range(self._size))
            beats[self._rank] = own
            silent = silent_ranks(earlier, beats)
            behind = who_is_behind(own, beats, silent, self._size)
            line = (
                f"hang: rank {own.rank} made no progress for {self._timeout_s:g} s, it waits in {own.waits_in} at step "
                f"{own.step}; {behind}; stacks in {self._stacks_path.parent}/"
            )
            for file in (sys.stderr, self._stacks):
                print(line, file=file, flush=True)
            self._wait_for({rank for rank in beats if rank not in silent})
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _wait_for(self, ranks: set[int]) -> None:
        """Waits until these ranks have written their stacks, or for _OTHERS_S."""
        deadline = time.monotonic() + _OTHERS_S
        while time.monotonic() < deadline:
            beats = self._read_heartbeats(ranks)
            ranks = {rank for rank, beat in beats.items() if not beat.hung}
            if not ranks:
                return
            time.sleep(0.2)

    def _heartbeat(self, hung: bool = False) -> Heartbeat:
        progress, step, phase, moved_s = self._now
        now = time.time()
        return Heartbeat(
            attempt=self._attempt,
            rank=self._rank,
            host=self._host,
            pid=self._pid,
            alive=now,
            progress=progress,
            step=step,
            waits_in=phase,
            since=now - (time.monotonic() - moved_s),
            hung=hung,
        )

    def _write_heartbeat(self, hung: bool = False) -> Heartbeat:
        beat = self._heartbeat(hung)
        # A full disk is no hang.
        with contextlib.suppress(OSError):
            # Not synced, because it is void once this process ends.
            files.replace(self._heartbeat_path(self._rank), json.dumps(dataclasses.asdict(beat)))
        return beat

    def _read_heartbeats(self, ranks: Iterable[int]) -> dict[int, Heartbeat]:
        """Returns the heartbeats of this attempt, by rank."""
        beats = {}
        for rank in ranks:
            with contextlib.suppress(OSError, ValueError):
                fields = json.loads(self._heartbeat_path(rank).read_text())
                if fields["attempt"] == self._attempt:
                    beats[rank] = Heartbeat(**fields)
        return beats

    def _heartbeat_path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"


def silent_ranks(earlier: Heartbeats, beats: Heartbeats) -> set[int]:
    """Returns the ranks whose heartbeat has not moved: they are stopped, killed, on a lost node, or hang with the
    interpreter's lock."""
    silent = set()
    for rank, beat in beats.items():
        has_moved = beat != earlier.get(rank)
        if not has_moved and not beat.hung:
            silent.add(rank)
    return silent


def who_is_behind(own: Heartbeat, beats: Heartbeats, silent: set[int], size: int) -> str:
    """Describes the ranks that the others wait for: those that cannot run, or else those that entered fewest phases."""
    behind = []
    for rank in range(size):
        if rank not in beats:
            behind.append(f"rank {rank} is behind: it has not started, or has ended")
    for rank in sorted(silent):
        beat = beats[rank]
        quiet_s = max(0.0, own.alive - beat.alive)
        behind.append(
            f"{beat} is behind: it no longer runs or is stuck in native code (no heartbeat for {quiet_s:.0f} s), last "
            f"seen in {beat.waits_in} at step {beat.step}"
        )
    # Where all ranks run, those that entered fewest phases hold up the others.
    if not behind:
        least = min(beat.progress for beat in beats.values())
        last = []
        for _, beat in sorted(beats.items()):
            if beat.progress == least:
                last.append(beat)
        if len(last) == size:
            return f"all ranks wait in {own.waits_in} at step {own.step}"
        for beat in last:
            waited_s = beat.alive - beat.since
            behind.append(f"{beat} is behind: in {beat.waits_in} at step {beat.step} for {waited_s:.0f} s")
    listed = behind[:_MOST_LISTED]
    if len(behind) > _MOST_LISTED:
        listed.append(f"and {len(behind) - _MOST_LISTED} more ranks")
    return "; ".join(listed)


class Stragglers:
    """Ranks that are slow for `patience` readings in a row: their speed is less than `slow` times the median's.

    The median is the faster of the two middle ones where the number of ranks is even. So of two ranks the slow one is
    compared with the other, not with their mean, which it would drag along.
    """

    def __init__(self, patience: int = 3, slow: float = 0.7) -> None:
        self._patience, self._slow = patience, slow
        self._in_a_row: dict[int, int] = {}
        self._own_s = 0.0

    def add(self, own_s: float) -> None:
        """Adds what this rank has worked and waited for data in a step, before it waited for other ranks."""
        self._own_s += own_s

    def read(self, world: World) -> dict[str, float]:
        """Returns the slowest rank since the last reading and the most memory that any rank has needed.

        Collective. Rank 0 reports stragglers.
        """
        values = [self._own_s, world.peak_memory_gb()]
        own = torch.tensor(values, dtype=torch.float64, device=world.device)
        self._own_s = 0.0
        times, peaks = world.gather(own).T.tolist()
        reading = {"peak_memory_gb": max(peaks)}
        if world.size == 1:
            return reading
        for rank, speed in self.compare(times):
            if world.is_first:
                line = f"rank {rank} is slow: {speed:.2f} of the median rank's speed"
                log.warning(line)
        slowest_s = max(times)
        reading["slowest_rank"] = times.index(slowest_s)
        reading["slowest_speed"] = statistics.median_low(times) / slowest_s
        return reading

    def compare(self, own_s: Sequence[float]) -> list[tuple[int, float]]:
        """Returns the stragglers: their ranks and their speeds relative to the median.

        `own_s` is each rank's own working time since the last reading, without its waiting for others.
        """
        median_s = statistics.median_low(own_s)
        stragglers = []
        in_a_row = {}
        for rank, rank_s in enumerate(own_s):
            if median_s >= self._slow * rank_s:
                continue
            in_a_row[rank] = self._in_a_row.get(rank, 0) + 1
            if in_a_row[rank] >= self._patience:
                stragglers.append((rank, median_s / rank_s))
        self._in_a_row = in_a_row
        return stragglers
