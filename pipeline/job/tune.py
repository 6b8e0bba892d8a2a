"""The largest useful micro-batch and the best engine settings of a run on this machine, found by trying.

    Search ──overrides──▶ measure ──N ranks of tune_trial.py , in process groups of their own──▶ Trial
      │                                                                                            │
      ├──◀── images a second and memory; or why it does not count: out of memory, killed, refused ─┘
      └──▶ fragment: a YAML file that `extends` the configuration by what has made it quicker

One setting after the other, each with the best of those before it. Nothing is measured in this process, so what a trial
takes is free again when its ranks have ended, and a trial that ends badly is one that does not fit.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import files, yaml_text
from pipeline.cluster.slurm import node_name
from pipeline.config import Config, load_config
from pipeline.errors import USAGE, ExternalError, InputError
from pipeline.feed.order import Order, partition
from pipeline.shards.open_data import open_training
from pipeline.shards.process_pool import cores

TRIAL = ["-P", "-m", "pipeline.job.tune_trial"]
"""With -P nothing in the working directory shadows a module."""

MIN_GAIN = 0.02
"""A setting is changed where steps become at least this much quicker. The same steps measured twice differ by about as
much, so less would be noise."""
MEMORY_SHARE = 0.8
"""Of the memory that a rank has. Evaluation, a checkpoint on its way, a moving average and, in dense tasks, larger
images come on top."""
START = 8
"""Samples of the first micro-batch. Smaller ones are tried where it does not fit."""
PATIENCE = 2
"""Doublings in a row that may bring nothing."""
TRIAL_S = 150.0
"""Most that one may take: importing, and compiling for the first time."""
BUCKETS = (5_000_000, 25_000_000)
"""Elements, even in number. Smaller buckets than those that are the default: reduction begins earlier."""

MICRO_BATCH = "train.micro_batch_size"
COMPILE = "engine.compile"
CHECKPOINTING = "model.grad_checkpointing"
STAGE = "engine.zero_stage"
ZERO = "engine.deepspeed.zero_optimization"

Overrides = dict[str, Any]
"""Values by setting, such as {"engine.zero_stage": 2}."""


class Trial(NamedTuple):
    """What came of some settings."""

    overrides: Overrides
    failed: str = ""
    """Why they do not count, if they do not."""
    refused: bool = False
    """The configuration is wrong with them."""
    images_per_second: float = 0.0
    """Of all ranks, without those that fill up a batch."""
    step_s: float = 0.0
    peak_memory_gb: float = 0.0
    """Of the rank that took most."""
    memory_gb: float = 0.0
    """What a rank could have had."""
    num_parameters: int = 0
    device: str = ""


Measure = Callable[[Overrides, float], Trial]
"""Of overrides, and of the seconds that it may take."""


class Search:
    """Goes through the settings, the best so far being kept. Each trial is a line of a table on standard error.

    `sizes`: micro-batches that can be tried, ascending; `configured`: the one that the configuration makes, among them.
    """

    def __init__(
        self,
        config: Config,
        sizes: Sequence[int],
        configured: int,
        ranks: int,
        measure: Measure,
        budget_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._sizes, self._configured, self._ranks = config, sizes, configured, ranks
        self._measure, self._clock, self._deadline = measure, clock, clock() + budget_s
        self._quickest_s = 0.0
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.complete = False
        """Whether everything was tried before the time was over."""

    def run(self) -> Trial:
        """The best trial. Raises InputError where the configuration is refused as it is, ExternalError where nothing
        fits or no trial has ended in time."""
        print(f"{'':60}{'images/s':>11}{'step ms':>10}{'GB':>8}", file=sys.stderr, flush=True)
        with contextlib.suppress(_OutOfTimeError):
            self._find_micro_batch()
            self._change({COMPILE: not self._config.engine.compile})
            if self._config.model.grad_checkpointing:
                self._change({CHECKPOINTING: False})
            if self._ranks > 1:
                self._find_communication()
            self.complete = True
        if self.best is None:
            raise ExternalError("--minutes: no trial has ended within them; give it more")
        return self.best

    @property
    def as_configured(self) -> Trial | None:
        """The best trial of the configuration as it is, if it was tried and fits."""
        found = [trial for trial in self.trials if trial.overrides == {MICRO_BATCH: self._configured}]
        return max((trial for trial in found if not trial.failed), key=_speed, default=None)

    @property
    def chosen(self) -> Overrides:
        """What the best trial has that the configuration has not."""
        overrides = self.best.overrides if self.best else {}
        return {key: value for key, value in overrides.items() if (key, value) != (MICRO_BATCH, self._configured)}

    def _find_micro_batch(self) -> None:
        self.best, larger = self._first_that_fits()
        fitting, idle = [self.best], 0
        for size in larger:
            if idle >= PATIENCE and size != self._configured:  # which is what the others are compared with
                continue
            if not self._has_room(fitting, size):
                break
            trial = self._try({MICRO_BATCH: size})
            if trial.failed:
                break
            fitting.append(trial)
            idle += 1
            if _is_quicker(trial, self.best):
                self.best, idle = trial, 0
        if self.as_configured and self.best is not self.as_configured:
            self._decide(self.best, self.as_configured)

    def _first_that_fits(self) -> tuple[Trial, Sequence[int]]:
        """The trial, and the larger sizes that may fit. Where none does, at a higher stage, whose ranks share more."""
        start = next(at for at, size in enumerate(self._sizes) if size >= min(START, self._configured))
        for at in range(start, -1, -1):
            trial = self._try({MICRO_BATCH: self._sizes[at]})
            if not trial.failed:
                return trial, self._sizes[start + 1 :] if at == start else ()
        failed = self.trials[-1].failed
        for stage in range((self._config.engine.zero_stage or 0) + 1, 4 if self._ranks > 1 else 0):
            trial = self._try({MICRO_BATCH: self._sizes[0], STAGE: stage})
            if not trial.failed:
                return trial, self._sizes[1:]
        raise ExternalError(
            f"not even a micro-batch of {self._sizes[0]} fits: {failed}. Set model.grad_checkpointing=true, or take a "
            "smaller image.size or model, or more ranks with engine.zero_stage=3"
        )

    def _has_room(self, fitting: Sequence[Trial], size: int) -> bool:
        """Whether a micro-batch is expected to fit, by a line through the two largest that did."""
        if len(fitting) < 2:
            return True
        (before, size_before), (last, size_last) = ((trial, trial.overrides[MICRO_BATCH]) for trial in fitting[-2:])
        slope = (last.peak_memory_gb - before.peak_memory_gb) / (size_last - size_before)
        expected = last.peak_memory_gb + slope * (size - size_last)
        if expected <= MEMORY_SHARE * last.memory_gb:
            return True
        _tell({MICRO_BATCH: size}, f"not tried: {_too_much(expected, last.memory_gb)}")
        return False

    def _find_communication(self) -> None:
        engine = self._config.engine
        zero, given = engine.deepspeed.get("zero_optimization", {}), engine.stage(self._best.num_parameters)
        needed, present = self._best.overrides.get(STAGE, 0), self._best.overrides.get(STAGE, given)
        for stage in range(needed, 3):  # lower ones do not fit
            if stage != present:
                self._change({STAGE: stage})
        stage = self._best.overrides.get(STAGE, given)
        if stage == 0:  # which has neither buckets nor overlap
            return
        for size in BUCKETS:
            if size < self._best.num_parameters and zero.get("reduce_bucket_size") != size:
                self._change({f"{ZERO}.reduce_bucket_size": size, f"{ZERO}.allgather_bucket_size": size})
        self._change({f"{ZERO}.overlap_comm": not zero.get("overlap_comm", stage == 3)})

    @property
    def _best(self) -> Trial:
        assert self.best
        return self.best

    def _change(self, changes: Overrides) -> None:
        """Add the changes to the best so far if they make it quicker."""
        trial = self._try(changes)
        if not trial.failed and _is_quicker(trial, self._best):
            self._decide(trial, self._best)

    def _decide(self, trial: Trial, before: Trial) -> None:
        """Whether it is quicker than the one before, which is measured again: it may have had a slow moment."""
        again = self._try(before.overrides, again=True)
        before = max(before, again, key=_speed)
        self.best = trial if _is_quicker(trial, before) else before

    def _try(self, changes: Overrides, *, again: bool = False) -> Trial:
        """The best so far with the changes."""
        begin = self._clock()
        left_s = self._deadline - begin
        if left_s <= self._quickest_s:
            raise _OutOfTimeError
        overrides = dict(changes) if again else {**(self.best.overrides if self.best else {}), **changes}
        trial = self._measure(overrides, min(TRIAL_S, left_s))
        took_s = self._clock() - begin
        if trial.refused and not self.trials:
            raise InputError(trial.failed)
        if not trial.failed:
            self._quickest_s = min(took_s, self._quickest_s or took_s)
            if trial.peak_memory_gb > MEMORY_SHARE * trial.memory_gb:
                trial = trial._replace(failed=_too_much(trial.peak_memory_gb, trial.memory_gb))
        self.trials.append(trial)
        numbers = f"{trial.images_per_second:>11,.1f}{1000 * trial.step_s:>10.1f}{trial.peak_memory_gb:>8.2f}"
        _tell(changes, trial.failed or numbers, again=again)
        return trial


class _OutOfTimeError(Exception):
    pass


def _speed(trial: Trial) -> float:
    return 0.0 if trial.failed else trial.images_per_second


def _is_quicker(one: Trial, other: Trial) -> bool:
    return _speed(one) >= (1 + MIN_GAIN) * _speed(other)


def _too_much(wanted_gb: float, memory_gb: float) -> str:
    return f"{wanted_gb:.1f} of {memory_gb:.1f} GB, more than {MEMORY_SHARE:.0%}"


def _tell(changes: Overrides, found: str, *, again: bool = False) -> None:
    what = "again: " * again + ", ".join(as_words(changes)).replace(f"{ZERO}.", "")
    print(f"{what:60}{found.splitlines()[-1].strip()[:120]:>29}", file=sys.stderr, flush=True)


def as_words(overrides: Overrides) -> list[str]:
    """As `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def tune(
    path: Path, given: list[str], *, ranks: int | None = None, out: Path | None = None, minutes: float = 5.0
) -> dict[str, Any]:
    """Search, with the overrides `given`, and write the fragment; returns the command's result.

    Raises InputError for a configuration, data or a file to write that will not do, and what `Search.run` raises.
    """
    config = load_config(path, given)
    ranks = _default_ranks() if ranks is None else ranks
    if ranks < 1 or not minutes > 0:
        raise InputError(f"--ranks {ranks} --minutes {minutes:g}: at least one rank, and some time")
    out = out or Path(config.run.root) / "tuned" / f"{config.run.name}.yaml"
    sizes, configured = micro_batch_sizes(config, ranks)
    require_new(out, path, given, config)
    busy = _busy()
    search = Search(config, sizes, configured, ranks, measuring(path, given, ranks), 60 * minutes)
    best = search.run()
    chosen = search.chosen
    told = _told(search, best, ranks, minutes, busy)
    print("\n".join(told), file=sys.stderr, flush=True)
    head = [f"{path}, tuned on {time.strftime('%F')}:", "", f"  {_command()}", "", *told]
    files.write(out, fragment(out, path, given, config, chosen, head).encode(), private=True)
    assert load_config(out) == load_config(path, [*given, *as_words(chosen)])
    return {
        "ok": True,
        "config": str(out),
        "settings": chosen,
        "images_per_second": best.images_per_second,
        "complete": search.complete,
        "trials": [_as_json(trial) for trial in search.trials],
    }


def _default_ranks() -> int:
    from pipeline import world  # whose torch takes seconds to import

    return world.default_ranks()


def _as_json(trial: Trial) -> dict[str, Any]:
    if trial.failed:
        return {"overrides": trial.overrides, "failed": trial.failed}
    return {name: getattr(trial, name) for name in ("overrides", "images_per_second", "step_s", "peak_memory_gb")}


def _told(search: Search, best: Trial, ranks: int, minutes: float, busy: str) -> list[str]:
    """What was found, and on what."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    lines = [
        f"changed: {', '.join(as_words(search.chosen)) or 'nothing'}",
        f"{best.images_per_second:,.1f} images/s on {ranks} × {best.device} of {node_name()} ({cores()} cores), "
        f"{best.peak_memory_gb:.2f} of {best.memory_gb:.1f} GB a rank; {versions}",
    ]
    if search.as_configured:
        lines.append(f"as it was: {search.as_configured.images_per_second:,.1f} images/s")
    if busy:
        lines.append(busy)
    if not search.complete:
        lines.append(f"not everything was tried: the {minutes:g} minutes of --minutes were over")
    return lines


def _busy() -> str:
    """What to say where others compute on this machine's cores, too."""
    load = os.getloadavg()[0]
    if load <= cores() / 2:
        return ""
    return f"others were at work here (load {load:.1f} on {cores()} cores): measure again when they are not"


def _command() -> str:
    return shlex.join(["python", *sys.argv])


# The data


def micro_batch_sizes(config: Config, ranks: int) -> tuple[list[int], int]:
    """Those that can be tried, ascending: powers of two as far as a rank's part of the global batch can be cut into
    them, up to the whole part; and the one that the settings make, which is one of them.

    Raises InputError for missing data, and for more ranks than the run can use.
    """
    order = Order.of(config, open_training(config.data).part_samples)

    def dealt(most: int | None) -> int:
        train = config.train.model_copy(update={"micro_batch_size": most})
        return partition(order, 0, ranks, config.model_copy(update={"train": train})).micro_batch_size

    whole, configured = dealt(None), dealt(config.train.micro_batch_size)
    powers = (2**exponent for exponent in range(whole.bit_length()))
    return sorted({*map(dealt, powers), configured, whole}), configured


# The trials


def measuring(path: Path, given: list[str], ranks: int) -> Measure:
    """The measure that starts a trial's ranks on this machine."""

    def measure(overrides: Overrides, limit_s: float) -> Trial:
        words = [*given, *as_words(overrides)]
        try:
            load_config(path, words)
        except InputError as error:
            return Trial(overrides, str(error), refused=True)
        arguments = ["--config", str(path), "--limit", str(limit_s + 5)]
        for word in words:
            arguments += ["--set", word]
        ended = run_ranks([sys.executable, *TRIAL, *arguments], ranks, limit_s)
        if ended.failed:
            return Trial(overrides, ended.failed, refused=ended.refused)
        return Trial(overrides, **json.loads(ended.printed.splitlines()[-1]))

    return measure


class Ended(NamedTuple):
    """What came of some ranks."""

    printed: str = ""
    """By rank 0."""
    failed: str = ""
    refused: bool = False


def run_ranks(program: list[str], ranks: int, limit_s: float) -> Ended:
    """Run a program as ranks that find each other, until all have ended, one of them badly, or the time is over.

    Each is a process group of its own, which is gone when this returns or raises.
    """
    with tempfile.TemporaryDirectory() as folder, _started(program, ranks, Path(folder)) as processes:
        deadline = time.monotonic() + limit_s
        while not any(process.poll() for process in processes):
            if all(process.returncode == 0 for process in processes):
                return Ended(Path(folder, "0.out").read_text())
            if time.monotonic() > deadline:
                return Ended(failed=f"not done within {limit_s:.0f} s")
            time.sleep(0.02)
        # One that runs out of memory takes others along, which then say that they have lost it.
        codes = [process.poll() for process in processes]
        ends = [_end(code, Path(folder, f"{rank}.err")) for rank, code in enumerate(codes) if code]
    return next((end for end in ends if "memory" in end.failed.lower()), ends[0])


@contextlib.contextmanager
def _started(program: list[str], ranks: int, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    # A batch system's cores of a task are those of this command, to be shared by its ranks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = []
    try:
        with _signals_later():  # one that is being started when a signal comes would be nobody's
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with Path(folder, f"{rank}.out").open("wb") as output, Path(folder, f"{rank}.err").open("wb") as errors:
                    processes.append(
                        subprocess.Popen(
                            program,
                            env={**environment, **place},
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=errors,
                            process_group=0,
                        )
                    )
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """What would interrupt this process does so at the end. Blocking signals would leave them to other threads."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda *arrived: came.append(arrived[0]))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _end(code: int, errors: Path) -> Ended:
    """Of a rank that has ended badly."""
    if code == -signal.SIGKILL:
        return Ended(failed="killed, as the kernel does where memory runs out")
    if code < 0:
        return Ended(failed=f"ended by {signal.Signals(-code).name}")
    text = errors.read_text(errors="replace").strip()
    if code == USAGE:
        return Ended(failed=re.split(r"(?m)^error: ", text)[-1], refused=True)
    return Ended(failed=(text.splitlines() or ["without a word"])[-1].removeprefix("error: "))


# The fragment


def fragment(
    out: Path, path: Path, given: list[str], config: Config, chosen: Overrides, head: Sequence[str] = ()
) -> str:
    """YAML for the file `out` that extends the configuration in `path` by the overrides `given`, as they came out in
    `settings`, and by what was chosen. `head`: its comment."""
    tree: dict[str, Any] = {"extends": os.path.relpath(path.resolve(), out.parent.resolve())}
    resolved = config.model_dump(mode="json")
    for override in given:
        key = override.partition("=")[0].strip()
        _put(tree, key, _at(resolved, key))
    for key, value in chosen.items():
        _put(tree, key, value)
    comment = "".join(f"# {line}".rstrip() + "\n" for line in head)
    return f"{comment}\n{yaml_text.write(tree)}"


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[last] = value


def require_new(out: Path, path: Path, given: list[str], config: Config) -> None:
    """Raises InputError where the fragment could not be written, or would not say what `given` does: known before
    minutes are spent."""
    if out.exists():
        raise InputError(f"{out}: is there already; remove it, or name another file with --out")
    draft, same = out.with_name(f".{out.name}.{os.getpid()}"), False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write(draft, fragment(out, path, given, config, {}).encode(), private=True)
        with contextlib.suppress(InputError):
            same = load_config(draft) == config
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    if not same:
        raise InputError(
            "--set replaces a whole section, and a file that extends another cannot: put it into a file of its own, "
            f"beside {path}, and tune that"
        )
