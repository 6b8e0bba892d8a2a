"""Work on many shards at once, in processes of their own, with one progress bar.

    tasks ──▶ workers, each taking the next ──▶ results in the order of the tasks

Workers end when this process ends, however it ends, so nobody writes into a folder that has been taken over.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")

_STOP = -1
_advance: Callable[[int], object] = lambda amount: None  # noqa: E731


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def advance(amount: int = 1) -> None:
    """Called by a task: `amount` more is done. Ends the task where its result is no longer wanted."""
    _advance(amount)


def each(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, total: int, name: str, unit: str = "img"
) -> Iterator[Result]:
    """`function` of every task, in order, from `workers` processes; where one is enough, this one works.

    `function` is a module's and its arguments and results can be pickled. `total` is what all calls of `advance` add
    up to. What a task raises is raised here.
    """
    with tqdm(total=total, desc=name, unit=unit, file=sys.stderr, disable=None, dynamic_ncols=True) as bar:
        results = _here(function, tasks, bar) if workers <= 1 else _there(function, tasks, workers, bar)
        with contextlib.closing(results):
            yield from results


def _here(function: Callable[[Task], Result], tasks: Iterable[Task], bar: tqdm) -> Generator[Result, None, None]:
    global _advance
    _advance = bar.update
    yield from map(function, tasks)


def _there(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, bar: tqdm
) -> Generator[Result, None, None]:
    # Not forked: a copy of a process that has threads may hold their locks for ever.
    context = multiprocessing.get_context("spawn")
    count = context.Value("q")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(count,)) as pool:
        tasks = iter(tasks)
        futures = deque()
        try:
            while True:
                while len(futures) < 2 * workers and (task := next(tasks, None)) is not None:
                    with _uninterrupted():
                        futures.append(pool.submit(function, task))
                if not futures:
                    break
                while wait([futures[0]], timeout=0.2).not_done:
                    bar.update(count.value - bar.n)
                bar.update(count.value - bar.n)
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()
            with count.get_lock():
                count.value = _STOP


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which reaches all of a terminal's: the first one tells the others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(count: "Synchronized[int]") -> None:
    """In each worker, first of all."""
    global _advance

    def add(amount: int) -> None:
        with count.get_lock():
            if count.value == _STOP:
                raise SystemExit
            count.value += amount

    _advance = add
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
