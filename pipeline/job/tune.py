"""The largest useful micro-batch and the fastest engine settings of a run on this machine, found by measurement.

    Search ──overrides──▶ measure ──N ranks of tune_trial.py, in process groups of their own──▶ Trial
      │                                                                                           │
      ├──◀── images a second and memory; or why it does not count: out of memory, killed, refused ┘
      └──▶ fragment: a YAML file that `extends` the configuration by the settings that were faster

The search changes one setting after the other, each together with the best of those before it. Nothing is measured in
this process: the memory of a trial is free again when its ranks have ended, and a trial that fails is one that does not
fit.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import files, yaml_text
from pipeline.cluster.slurm import node_name
from pipeline.config import Config, load_config, present_key
from pipeline.config.load import put_setting
from pipeline.errors import ExternalError, InputError
from pipeline.feed.order import Order, partition
from pipeline.job.local_ranks import run_ranks
from pipeline.shards.open_data import open_training, require_kind
from pipeline.shards.process_pool import cores

log = logging.getLogger(__name__)

TRIAL = ["-P", "-m", "pipeline.job.tune_trial"]
"""With -P nothing in the working directory shadows a module."""

MIN_GAIN = 0.02
"""A setting is changed where steps become at least this much faster. The same steps measured twice differ by about as
much, so a smaller difference would be noise."""
MEMORY_SHARE = 0.8
"""The share of a rank's memory that a trial may take. Evaluation, a checkpoint that is being written, a moving average
and, in dense tasks, larger images need the rest."""
START = 8
"""The number of samples in the first micro-batch. Smaller ones are tried where it does not fit."""
PATIENCE = 2
"""The number of doublings in a row without a gain after which the search stops."""
TRIAL_S = 150.0
"""The maximum duration of a trial, which imports libraries and may compile for the first time."""

MICRO_BATCH = "train.micro_batch_size"
COMPILE = "engine.compile"
CHECKPOINTING = "model.grad_checkpointing"

Overrides = dict[str, Any]
"""Values by setting, such as {"engine.compile": True}."""


class Trial(NamedTuple):
    """The result of a measurement with some settings."""

    overrides: Overrides
    failed: str = ""
    """The reason why the settings do not count; empty where they do."""
    refused: bool = False
    """Whether the configuration is invalid with these settings."""
    images_per_second: float = 0.0
    """The images of all ranks, without those that pad a batch."""
    step_s: float = 0.0
    peak_memory_gb: float = 0.0
    """The peak of the rank that used most."""
    memory_gb: float = 0.0
    """The memory that is available to a rank."""
    device: str = ""


Measure = Callable[[Overrides, float], Trial]
"""A function that measures overrides within a number of seconds."""


class Search:
    """Tries one setting after the other and keeps the best so far. Each trial is a line of a table on standard error.

    `sizes`: the micro-batches that can be tried, ascending; `configured`: the one that the configuration results in,
    which is among them.
    """

    def __init__(
        self,
        config: Config,
        sizes: Sequence[int],
        configured: int,
        measure: Measure,
        budget_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._sizes = sizes
        self._configured = configured
        self._measure = measure
        self._clock = clock
        self._deadline = clock() + budget_s
        self._shortest_trial_s = 0.0
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.complete = False
        """Whether everything was tried before the time was over."""

    def run(self) -> Trial:
        """Returns the best trial. Raises InputError where the configuration is refused as it is, ExternalError where
        nothing fits or no trial has ended in time."""
        log.info(f"{'':60}{'images/s':>11}{'step ms':>10}{'GB':>8}")
        with contextlib.suppress(_OutOfTimeError):
            # The micro-batch comes first: whether the other settings pay depends on it.
            self._find_micro_batch()
            self._try_change({COMPILE: not self._config.engine.compile})
            if self._config.model.grad_checkpointing:
                self._try_change({CHECKPOINTING: False})
            self.complete = True
        if self.best is None:
            raise ExternalError("--minutes: no trial has ended within them; give it more")
        return self.best

    @property
    def as_configured(self) -> Trial | None:
        """The best trial of the configuration as it is, if it was tried and fits."""
        unchanged = [trial for trial in self.trials if trial.overrides == {MICRO_BATCH: self._configured}]
        fitting = [trial for trial in unchanged if not trial.failed]
        return max(fitting, key=_speed, default=None)

    @property
    def chosen(self) -> Overrides:
        """The settings of the best trial that differ from the configuration."""
        overrides = dict(self.best.overrides) if self.best else {}
        if overrides.get(MICRO_BATCH) == self._configured:
            del overrides[MICRO_BATCH]
        return overrides

    def _find_micro_batch(self) -> None:
        self.best, larger_sizes = self._find_first_that_fits()
        fitting = [self.best]
        without_gain = 0
        for size in larger_sizes:
            # The configured size is measured in any case: the others are compared with it.
            if without_gain >= PATIENCE and size != self._configured:
                continue
            if not self._has_room(fitting, size):
                break
            trial = self._run_trial({MICRO_BATCH: size})
            if trial.failed:
                break
            fitting.append(trial)
            without_gain += 1
            if _is_faster(trial, self.best):
                self.best = trial
                without_gain = 0
        configured = self.as_configured
        if configured and self.best is not configured:
            self._choose_faster(self.best, configured)

    def _find_first_that_fits(self) -> tuple[Trial, Sequence[int]]:
        """Returns the first trial that fits, and the larger sizes that may fit, too."""
        smallest_start = min(START, self._configured)
        start = next(index for index, size in enumerate(self._sizes) if size >= smallest_start)
        # Where the start does not fit, the next smaller ones are tried.
        for index in range(start, -1, -1):
            trial = self._run_trial({MICRO_BATCH: self._sizes[index]})
            if trial.failed:
                continue
            # After a smaller start all larger sizes are known not to fit.
            larger_sizes = self._sizes[start + 1 :] if index == start else ()
            return trial, larger_sizes
        raise ExternalError(
            f"not even a micro-batch of {self._sizes[0]} fits: {self.trials[-1].failed}. Set "
            "model.grad_checkpointing=true, or take a smaller image.size or model, or more ranks with "
            "engine.zero_stage=3"
        )

    def _has_room(self, fitting: Sequence[Trial], size: int) -> bool:
        """Returns whether a micro-batch is expected to fit, by a line through the two largest that did."""
        if len(fitting) < 2:
            return True
        before, last = fitting[-2:]
        last_size = last.overrides[MICRO_BATCH]
        gb_per_sample = (last.peak_memory_gb - before.peak_memory_gb) / (last_size - before.overrides[MICRO_BATCH])
        expected_gb = last.peak_memory_gb + gb_per_sample * (size - last_size)
        if expected_gb <= MEMORY_SHARE * last.memory_gb:
            return True
        _print_row({MICRO_BATCH: size}, f"not tried: {_describe_memory(expected_gb, last.memory_gb)}")
        return False

    def _try_change(self, changes: Overrides) -> None:
        """Adds the changes to the best settings so far if they make steps faster."""
        trial = self._run_trial(changes)
        assert self.best
        if not trial.failed and _is_faster(trial, self.best):
            self._choose_faster(trial, self.best)

    def _choose_faster(self, trial: Trial, before: Trial) -> None:
        """Keeps `trial` if it is still faster once `before` has been measured again."""
        # The machine may have been busy when `before` was measured.
        repeated = self._run_trial(before.overrides, again=True)
        before = max(before, repeated, key=_speed)
        self.best = trial if _is_faster(trial, before) else before

    def _run_trial(self, changes: Overrides, *, again: bool = False) -> Trial:
        """Measures the best settings so far with the changes; `again`: the settings in `changes` alone."""
        begin = self._clock()
        left_s = self._deadline - begin
        # A trial that cannot end in time would only delay the result.
        if left_s <= self._shortest_trial_s:
            raise _OutOfTimeError
        overrides = dict(changes)
        if self.best and not again:
            overrides = {**self.best.overrides, **changes}
        trial = self._measure(overrides, min(TRIAL_S, left_s))
        took_s = self._clock() - begin
        if trial.refused and not self.trials:
            raise InputError(trial.failed)
        if not trial.failed:
            self._shortest_trial_s = min(took_s, self._shortest_trial_s or took_s)
            if trial.peak_memory_gb > MEMORY_SHARE * trial.memory_gb:
                trial = trial._replace(failed=_describe_memory(trial.peak_memory_gb, trial.memory_gb))
        self.trials.append(trial)
        numbers = f"{trial.images_per_second:>11,.1f}{1000 * trial.step_s:>10.1f}{trial.peak_memory_gb:>8.2f}"
        _print_row(changes, trial.failed or numbers, again=again)
        return trial


class _OutOfTimeError(Exception):
    pass


def _speed(trial: Trial) -> float:
    return 0.0 if trial.failed else trial.images_per_second


def _is_faster(one: Trial, other: Trial) -> bool:
    return _speed(one) >= (1 + MIN_GAIN) * _speed(other)


def _describe_memory(needed_gb: float, memory_gb: float) -> str:
    return f"{needed_gb:.1f} of {memory_gb:.1f} GB, more than {MEMORY_SHARE:.0%}"


def _print_row(changes: Overrides, result: str, *, again: bool = False) -> None:
    settings = ", ".join(format_overrides(changes))
    if again:
        settings = f"again: {settings}"
    last_line = result.splitlines()[-1].strip()
    log.info(f"{settings:60}{last_line[:120]:>29}")


def format_overrides(overrides: Overrides) -> list[str]:
    """Returns overrides as arguments of `--set`."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def tune(
    path: Path,
    given: list[str],
    *,
    ranks: int | None = None,
    out: Path | None = None,
    minutes: float = 5.0,
) -> dict[str, Any]:
    """Searches, with the overrides `given`, and writes the fragment; returns the command's result.

    Raises InputError for an invalid configuration, data set or output file, and what `Search.run` raises.
    """
    config = load_config(path, given)
    if ranks is None:
        # Imported late: its torch takes seconds to import.
        from pipeline import world

        ranks = world.default_ranks()
    if ranks < 1 or not minutes > 0:
        raise InputError(f"--ranks {ranks} --minutes {minutes:g}: at least one rank, and some time")
    out = out or Path(config.run.root) / "tuned" / f"{config.run.name}.yaml"
    sizes, configured = micro_batch_sizes(config, ranks)
    require_new(out, path, given, config)
    # Asked before the trials, which are load themselves.
    busy = _describe_load()
    measure = make_measure(path, given, ranks)
    search = Search(config, sizes, configured, measure, 60 * minutes)
    best = search.run()
    summary = _summarise(search, best, ranks, minutes, busy)
    for line in summary:
        log.info(line)
    command = shlex.join(["python", *sys.argv])
    head = [f"{path}, tuned on {time.strftime('%F')}:", "", f"  {command}", "", *summary]
    overrides = [*given, *format_overrides(search.chosen)]
    tuned = load_config(path, overrides)
    files.write(out, fragment(out, path, overrides, tuned, head).encode(), private=True)
    assert load_config(out) == tuned
    return {
        "ok": True,
        "config": str(out),
        "settings": search.chosen,
        "images_per_second": best.images_per_second,
        "complete": search.complete,
        "trials": [_to_json(trial) for trial in search.trials],
    }


def _to_json(trial: Trial) -> dict[str, Any]:
    if trial.failed:
        return {"overrides": trial.overrides, "failed": trial.failed}
    return {
        "overrides": trial.overrides,
        "images_per_second": trial.images_per_second,
        "step_s": trial.step_s,
        "peak_memory_gb": trial.peak_memory_gb,
    }


def _summarise(search: Search, best: Trial, ranks: int, minutes: float, busy: str) -> list[str]:
    """Returns lines with the result and the machine that it holds for."""
    changed = ", ".join(format_overrides(search.chosen)) or "nothing"
    machine = f"{ranks} × {best.device} of {node_name()} ({cores()} cores)"
    memory = f"{best.peak_memory_gb:.2f} of {best.memory_gb:.1f} GB a rank"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    lines = [
        f"changed: {changed}",
        f"{best.images_per_second:,.1f} images/s on {machine}, {memory}; {versions}",
    ]
    if search.as_configured:
        lines.append(f"as it was: {search.as_configured.images_per_second:,.1f} images/s")
    if busy:
        lines.append(busy)
    if not search.complete:
        lines.append(f"not everything was tried: the {minutes:g} minutes of --minutes were over")
    return lines


def _describe_load() -> str:
    """Returns a warning where other processes use this machine's cores, too; empty otherwise."""
    load = os.getloadavg()[0]
    if load <= cores() / 2:
        return ""
    return f"the machine was busy (load {load:.1f} on {cores()} cores): measure again when it is idle"


# The data


def micro_batch_sizes(config: Config, ranks: int) -> tuple[list[int], int]:
    """Returns the micro-batch sizes that can be tried, ascending, and the one that the configuration results in, which
    is one of them.

    They are powers of two, as far as a rank's slice of the global batch can be cut into them, up to the whole slice.
    Raises InputError for missing data, and for more ranks than the run can use.
    """
    training = open_training(config.data)
    require_kind(config.task, training)
    order = Order.of(config, training.part_samples)

    def resulting_size(limit: int | None) -> int:
        train = config.train.model_copy(update={"micro_batch_size": limit})
        limited = config.model_copy(update={"train": train})
        return partition(order, 0, ranks, limited).micro_batch_size

    # Equal micro-batches are not always of the size asked for, so that several limits may result in one size.
    whole_slice = resulting_size(None)
    configured = resulting_size(config.train.micro_batch_size)
    sizes = {configured, whole_slice}
    for exponent in range(whole_slice.bit_length()):
        sizes.add(resulting_size(2**exponent))
    return sorted(sizes), configured


# The trials


def make_measure(path: Path, given: list[str], ranks: int) -> Measure:
    """Returns the measure that starts a trial's ranks on this machine."""

    def measure(overrides: Overrides, limit_s: float) -> Trial:
        settings = [*given, *format_overrides(overrides)]
        # Settings that do not go together are known without starting ranks.
        try:
            load_config(path, settings)
        except InputError as error:
            return Trial(overrides, str(error), refused=True)
        # The ranks end themselves some seconds later, should nobody be left to end them.
        arguments = ["--config", str(path), "--limit", str(limit_s + 5)]
        for setting in settings:
            arguments += ["--set", setting]
        ended = run_ranks([sys.executable, *TRIAL, *arguments], ranks, limit_s)
        if ended.failed:
            return Trial(overrides, ended.failed, refused=ended.refused)
        measured = json.loads(ended.printed.splitlines()[-1])
        return Trial(overrides, **measured)

    return measure


# The fragment


def fragment(out: Path, path: Path, overrides: list[str], config: Config, head: Sequence[str] = ()) -> str:
    """Returns YAML for the file `out`, which extends the configuration in `path` by the settings that `overrides` name,
    with their values in `config`. `head`: the lines of its comment."""
    tree: dict[str, Any] = {"extends": os.path.relpath(path.resolve(), out.parent.resolve())}
    resolved = config.model_dump(mode="json")
    for override in overrides:
        path_of_key = present_key(Config, override.partition("=")[0].strip()).split(".")
        value: Any = resolved
        for name in path_of_key:
            value = (value or {}).get(name)
        put_setting(tree, path_of_key, value, override)
    comment = "".join(f"# {line}".rstrip() + "\n" for line in head)
    return f"{comment}\n{yaml_text.write(tree)}"


def require_new(out: Path, path: Path, given: list[str], config: Config) -> None:
    """Raises InputError where the fragment could not be written, or would not result in the same configuration as
    `given` does."""
    # Checked before minutes are spent on the search.
    if out.exists():
        raise InputError(f"{out}: is there already; remove it, or name another file with --out")
    is_same = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=out.parent, prefix=f".{out.name}.") as draft:
            draft.write(fragment(out, path, given, config))
            draft.flush()
            with contextlib.suppress(InputError):
                is_same = load_config(draft.name) == config
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from error
    if not is_same:
        raise InputError(
            "--set replaces a whole section, and a file that extends another cannot: put it into a file of its own, "
            f"beside {path}, and tune that"
        )
