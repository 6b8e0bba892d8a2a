"""Processes many shards at once in worker processes, with one progress bar.

    tasks ──▶ workers, each taking the next ──▶ results in the order of the tasks

Workers end when this process ends, however it ends, so that none writes into a folder that another job has taken over.
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

# The value of the shared counter that ends the workers' tasks.
_STOP = -1
_advance: Callable[[int], object] = lambda amount: None  # noqa: E731


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def advance(amount: int = 1) -> None:
    """Advances the progress bar; called by a task. Ends the task if its result is no longer wanted."""
    _advance(amount)


def map_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    total: int,
    name: str,
    unit: str = "img",
) -> Iterator[Result]:
    """Yields the result of `function` for every task, in order, from `workers` processes or, with one, from this one.

    `function` must be a module's function, and its arguments and results must be picklable. `total` is the sum of all
    calls of `advance`. What a task raises is raised here.
    """
    bar = tqdm(
        total=total,
        desc=name,
        unit=unit,
        file=sys.stderr,
        disable=None,
        dynamic_ncols=True,
    )
    with bar:
        results = _map_here(function, tasks, bar) if workers <= 1 else _map_in_workers(function, tasks, workers, bar)
        # Closed explicitly: a caller that stops early must not leave workers behind.
        with contextlib.closing(results):
            yield from results


def _map_here(function: Callable[[Task], Result], tasks: Iterable[Task], bar: tqdm) -> Generator[Result, None, None]:
    global _advance
    _advance = bar.update
    yield from map(function, tasks)


def _map_in_workers(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    bar: tqdm,
) -> Generator[Result, None, None]:
    # Not forked: a copy of a process that has threads may hold their locks for ever.
    context = multiprocessing.get_context("spawn")
    count = context.Value("q")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(count,)) as pool:
        tasks = iter(tasks)
        futures = deque()
        try:
            while True:
                # Two tasks a worker keep it busy, and hold few results in memory.
                while len(futures) < 2 * workers and (task := next(tasks, None)) is not None:
                    with _block_interrupts():
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
def _block_interrupts() -> Iterator[None]:
    """Blocks Ctrl-C for processes that are started inside.

    A terminal sends it to all processes, but only the first one handles it, and ends its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(count: "Synchronized[int]") -> None:
    """Prepares a worker process: its progress goes to the shared counter, and it ends with its parent."""
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
