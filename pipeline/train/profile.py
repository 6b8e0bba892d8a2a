"""Where each millisecond of a training step goes, on rank 0: runs/NAME/profile/.

    begin, end ──torch.profiler──▶ trace.json.gz ──summarise──▶ profile.json ──▶ summary.md, the report's section

Phases are ranges that the loop and the engine name (torch.profiler.record_function), on the host's clock. The kind of
work follows from the names of kernels where a GPU ran any, else from those of operators on the thread that trains. The
feed's threads work beside it and are not recorded.
"""

import collections
import contextlib
import functools
import gzip
import heapq
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from pipeline import files
from pipeline.config import Config
from pipeline.train import op_kinds
from pipeline.world import World

log = logging.getLogger(__name__)

TRACE, NUMBERS, SUMMARY = "trace.json.gz", "profile.json", "summary.md"
STEP = "training step"
PHASES = ("waiting for data", "replay check", "forward", "exchange of losses", "backward", "update", "moving average")
REST = "the rest"
_NUM_LONGEST = 10
_IS_OPERATOR = re.compile(r"(?!(torch::)?autograd::)\w+::|## Call CompiledFxGraph")
_MAX_NAME_LENGTH = 120
"""The most characters of a name that are shown: kernels have templates for names."""

Event = dict[str, Any]
"""An event of a Chrome trace. A span of time has "ph": "X", "ts" and "dur" in microseconds, "name", "cat" and "tid"."""


@dataclass(frozen=True)
class Work:
    """An operator or a kernel, in the mean step."""

    name: str
    kind: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Costs:
    """The time of a step, as the mean over those of a trace. Phases add up to step_ms, and so do kinds."""

    num_steps: int
    step_ms: float
    on_device: bool
    """Whether kinds are those of a GPU's kernels."""
    phases: dict[str, float]
    """Milliseconds, in the order of the phases."""
    kinds: dict[str, float]
    """Milliseconds, longest first; the last entry is the remaining time."""
    longest: list[Work]


class Profiler:
    """Profiles one process. If that fails, it is reported, and training goes on without a profile."""

    def __init__(self, folder: Path, config: Config, world: World, at: int) -> None:
        """The profile begins after `at` steps; a run that resumes later than that has none."""
        self._folder = folder
        self._config = config
        self._world = world
        self._at = at
        self._profile: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Called as a step begins, after `step` steps."""
        with self._reporting_errors():
            if step == self._at:
                num_steps = self._config.profile.steps
                self._left = 1 + num_steps
                plan = torch.profiler.schedule(wait=0, warmup=1, active=num_steps)
                self._profile = torch.profiler.profile(schedule=plan)
                self._profile.start()
            if self._profile:
                self._step = record_function(STEP)
                self._step.__enter__()

    def end(self) -> None:
        """Called as a step ends. After the last one of the profile, writes it."""
        with self._reporting_errors():
            if self._profile is None:
                return
            self._step.__exit__(None, None, None)
            self._left -= 1
            if self._left:
                self._profile.step()
                return
            profile, self._profile = self._profile, None
            profile.stop()
            self._write(profile)

    def close(self) -> None:
        """Stops the profile of a run that ends in the middle of it."""
        profile, self._profile = self._profile, None
        if profile:
            with contextlib.suppress(Exception):
                profile.stop()

    @contextlib.contextmanager
    def _reporting_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning(f"{self._folder}: no profile: {error!r}")
            self.close()

    def _write(self, profile: torch.profiler.profile) -> None:
        self._folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "trace.json")
            profile.export_chrome_trace(str(path))
            trace = path.read_bytes()
        files.write(self._folder / TRACE, gzip.compress(trace, compresslevel=4))
        costs = summarise(json.loads(trace)["traceEvents"])
        first = self._at + 2
        last = self._at + 1 + costs.num_steps
        which = f"steps {first} to {last}" if last > first else f"step {first}"
        headline = self._format_headline(costs)
        numbers = {"format": 1, "headline": headline, "first_step": first, "last_step": last, **asdict(costs)}
        document = json.dumps(numbers, indent=1) + "\n"
        summary = page(costs, headline, which)
        files.write(self._folder / NUMBERS, document.encode())
        files.write(self._folder / SUMMARY, summary.encode())
        phases = _format_shares(costs.phases, costs.step_ms)
        log.info(f"profile of {which}: {headline}")
        log.info(f"profile: {phases}; more in {self._folder / SUMMARY}")

    def _format_headline(self, costs: Costs) -> str:
        config, world = self._config, self._world
        batch = config.train.global_batch_size
        ranks = _format_count(world.size, "rank")
        if world.device.type == "cuda":
            device = torch.cuda.get_device_name(world.device)
        else:
            device = f"CPU with {_format_count(torch.get_num_threads(), 'thread')}"
        precision = config.engine.precision
        images_per_second = 1000 * batch / costs.step_ms
        by_time = sorted(costs.kinds.items(), key=lambda item: -item[1])
        largest = _format_shares(dict(by_time[:3]), costs.step_ms)
        return (
            f"{config.model.name}, {batch} images on {ranks}, {precision}, {device}: "
            f"{costs.step_ms:.1f} ms a step, {images_per_second:.0f} images/s; most of it {largest}"
        )


class _Span(NamedTuple):
    """When an operator or a kernel ran, in microseconds."""

    start: float
    end: float
    work: tuple[str, str]
    """Its name and kind."""
    beside: bool
    """Whether it runs beside others, and counts only where no other does."""

    def within(self, start: float, end: float) -> "_Span":
        return self._replace(start=max(self.start, start), end=min(self.end, end))


def summarise(events: Sequence[Event]) -> Costs:
    """Returns where the time of a step goes, from a Chrome trace of torch.profiler with ranges that are called STEP.

    Raises ValueError for a trace without any.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    ranges = [event for event in timed if event["cat"] == "user_annotation"]
    steps = [event for event in ranges if event["name"] == STEP]
    if not steps:
        raise ValueError("the trace has no step")
    thread = steps[0]["tid"]
    kernels = [event for event in timed if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = [_kernel_span(event) for event in kernels] if kernels else _operator_spans(timed, thread)
    phase_ranges = [event for event in ranges if event["tid"] == thread and event["name"] in PHASES]

    # All in microseconds, over all steps.
    step_us = 0.0
    work_us, kinds_us, phases_us, calls = (collections.Counter[Any]() for _ in range(4))
    for step in steps:
        start, end = _window(step)
        step_us += end - start
        inside = [span.within(start, end) for span in spans if span.start < end and span.end > start]
        work_us.update(_own_times(inside))
        calls.update(span.work for span in inside)
        for event in phase_ranges:
            if start <= event["ts"] < end:
                phases_us[event["name"]] += event["dur"]
    for (_, kind), us in work_us.items():
        kinds_us[kind] += us

    # From here on in milliseconds of the mean step.
    to_ms = 1000 * len(steps)
    phases = {name: phases_us[name] / to_ms for name in PHASES if name in phases_us}
    phases[REST] = (step_us - phases_us.total()) / to_ms
    kinds = {kind: us / to_ms for kind, us in kinds_us.most_common()}
    idle = "the device is idle" if kernels else "Python and waiting"
    kinds[idle] = (step_us - kinds_us.total()) / to_ms
    longest = []
    for (name, kind), us in work_us.most_common(_NUM_LONGEST):
        num_calls = calls[name, kind] / len(steps)
        longest.append(Work(_shorten(name), kind, num_calls, us / to_ms))
    return Costs(len(steps), step_us / to_ms, bool(kernels), phases, kinds, longest)


def _kernel_span(event: Event) -> _Span:
    name = event["name"]
    kind = op_kinds.kind_of_kernel(name)
    # These run on streams of their own.
    beside = kind in (op_kinds.COMMUNICATION, op_kinds.DECODING)
    return _Span(*_window(event), (name, kind), beside)


def _window(event: Event) -> tuple[float, float]:
    """Returns when an event began and ended, in microseconds."""
    return event["ts"], event["ts"] + event["dur"]


def _operator_spans(timed: Sequence[Event], thread: Any) -> list[_Span]:
    """Returns the operators of the thread that trains, and what Gloo's threads do for it.

    Autograd's own ranges are no work.
    """
    spans = []
    for event in timed:
        name = event["name"]
        is_here = event["tid"] == thread
        is_operator = event["cat"] == "cpu_op" and _IS_OPERATOR.match(name) is not None
        is_communication = name.startswith("gloo:")
        if is_operator if is_here else is_communication:
            work = name, op_kinds.kind_of_operator(name)
            spans.append(_Span(*_window(event), work, beside=not is_here))
    return spans


def _own_times(spans: Sequence[_Span]) -> dict[tuple[str, str], float]:
    """Returns microseconds by name and kind. Each instant counts once.

    It counts for the span that began last, which is the innermost of nested operators. Spans that run beside others
    count where no other one runs.
    """
    # Each span's start with its index, and each end; at the same time ends come first.
    points = [(span.end, -1) for span in spans]
    points += [(span.start, index) for index, span in enumerate(spans)]
    points.sort()
    times = collections.defaultdict[tuple[str, str], float](float)
    # A heap, whose first entry is the span that counts.
    running: list[tuple[bool, float, float, int]] = []
    before = 0.0
    for now, index in points:
        while running and spans[running[0][-1]].end <= before:
            heapq.heappop(running)
        if running:
            counted = spans[running[0][-1]]
            times[counted.work] += now - before
        before = now
        if index >= 0:
            span = spans[index]
            heapq.heappush(running, (span.beside, -span.start, span.end, index))
    return times


def page(costs: Costs, headline: str, which: str) -> str:
    """Returns the summary, in Markdown."""
    unit = "kernel" if costs.on_device else "operator"
    where = "kernels on the device" if costs.on_device else "operators on the thread that trains"
    render_table = functools.partial(_render_table, costs.step_ms)
    longest = []
    for work in costs.longest:
        longest.append((f"`{work.name}`", work.kind, f"{work.calls:g}", work.ms))
    return f"""# Where a step's time goes

{headline}.

Mean over {which} of rank 0. Being profiled makes steps slower; other steps have `step_s` in metrics.jsonl.

## By phase, on the host's clock

{render_table(("phase",), list(costs.phases.items()))}

## By kind of work, {where}

{render_table(("kind",), list(costs.kinds.items()))}

## The {_NUM_LONGEST} {unit}s that take longest

{render_table((unit, "kind", "calls"), longest)}

{TRACE} has all of it on a time line: open it in ui.perfetto.dev or chrome://tracing.
"""


def _render_table(step_ms: float, header: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    """Returns a Markdown table. Rows end with milliseconds, and their share of the step is added."""
    lines = [[*header, "ms", "share"], ["---"] * len(header) + ["---:", "---:"]]
    for *cells, ms in rows:
        lines.append([*cells, f"{ms:.2f}", f"{ms / step_ms:.1%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shorten(name: str) -> str:
    """Returns a kernel's name without namespaces, cut at _MAX_NAME_LENGTH."""
    for prefix in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.replace(prefix, "")
    if len(name) > _MAX_NAME_LENGTH:
        name = f"{name[:_MAX_NAME_LENGTH]}…"
    return name


def _format_shares(times: Mapping[str, float], step_ms: float) -> str:
    return ", ".join(f"{name} {ms / step_ms:.0%}" for name, ms in times.items())


def _format_count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
