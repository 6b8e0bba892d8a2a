"""Where each millisecond of a training step goes, on rank 0: runs/NAME/profile/.

    begin, end ──torch.profiler──▶ trace.json.gz ──summarise──▶ profile.json ──▶ summary.md, the report's section

Phases are ranges that the loop and the engine name (torch.profiler.record_function), on the host's clock. Kinds of work
are told by the names of kernels where a GPU ran any, else by those of operators on the thread that trains. The feed's
threads work beside it and are not recorded.
"""

import collections
import contextlib
import functools
import gzip
import heapq
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from pipeline import files
from pipeline.config import Config
from pipeline.train import op_kinds
from pipeline.world import World

TRACE, NUMBERS, SUMMARY = "trace.json.gz", "profile.json", "summary.md"
STEP = "training step"
PHASES = ("waiting for data", "replay check", "forward", "exchange of losses", "backward", "update", "moving average")
REST = "the rest"
_NUM_LONGEST = 10
_IS_OPERATOR = re.compile(r"(?!(torch::)?autograd::)\w+::|## Call CompiledFxGraph")
_MOST_OF_A_NAME = 120  # characters; kernels have templates for names

Event = dict[str, Any]
"""Of a Chrome trace: a span of time has "ph": "X", its "ts" and "dur" in microseconds, "name", "cat" and "tid"."""


@dataclass(frozen=True)
class Work:
    """An operator or a kernel."""

    name: str
    kind: str
    calls: float  # a step
    ms: float  # a step


@dataclass(frozen=True)
class Costs:
    """Of a step, mean over those of a trace. Phases add up to step_ms, and so do kinds."""

    num_steps: int
    step_ms: float
    on_device: bool  # kinds are of a GPU's kernels
    phases: dict[str, float]  # ms, in order
    kinds: dict[str, float]  # ms, longest first, and last what remains
    longest: list[Work]


class Profiler:
    """Of one process. What goes wrong in here is told, and training goes on without a profile."""

    def __init__(self, folder: Path, config: Config, world: World, at: int) -> None:
        """Begin when `at` steps were taken; a run that resumes later than that has no profile."""
        self._folder, self._config, self._world, self._at = folder, config, world, at
        self._profile: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """A step begins; `step` were taken."""
        with self._told():
            if step == self._at:
                self._left = 1 + self._config.profile.steps
                plan = torch.profiler.schedule(wait=0, warmup=1, active=self._config.profile.steps)
                self._profile = torch.profiler.profile(schedule=plan)
                self._profile.start()
            if self._profile:
                self._step = record_function(STEP)
                self._step.__enter__()

    def end(self) -> None:
        """It was taken. After the last of the profile that is written."""
        with self._told():
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
        """For a run that ends in the middle."""
        profile, self._profile = self._profile, None
        if profile:
            with contextlib.suppress(Exception):
                profile.stop()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            print(f"warning: {self._folder}: no profile: {error!r}", file=sys.stderr, flush=True)
            self.close()

    def _write(self, profile: torch.profiler.profile) -> None:
        self._folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "trace.json")
            profile.export_chrome_trace(str(path))
            trace = path.read_bytes()
        files.write(self._folder / TRACE, gzip.compress(trace, compresslevel=4))
        costs = summarise(json.loads(trace)["traceEvents"])
        first, last = self._at + 2, self._at + 1 + costs.num_steps
        which = f"steps {first} to {last}" if last > first else f"step {first}"
        headline = self._headline(costs)
        numbers = {"format": 1, "headline": headline, "first_step": first, "last_step": last, **asdict(costs)}
        files.write(self._folder / NUMBERS, json.dumps(numbers, indent=1).encode() + b"\n")
        files.write(self._folder / SUMMARY, page(costs, headline, which).encode())
        phases = ", ".join(f"{name} {ms / costs.step_ms:.0%}" for name, ms in costs.phases.items())
        print(f"profile of {which}: {headline}", file=sys.stderr)
        print(f"profile: {phases}; more in {self._folder / SUMMARY}", file=sys.stderr, flush=True)

    def _headline(self, costs: Costs) -> str:
        config, world = self._config, self._world
        batch = config.train.global_batch_size
        if world.device.type == "cuda":
            device = torch.cuda.get_device_name(world.device)
        else:
            device = f"CPU with {_counted(torch.get_num_threads(), 'thread')}"
        largest = sorted(costs.kinds.items(), key=lambda item: -item[1])[:3]
        told = ", ".join(f"{kind} {ms / costs.step_ms:.0%}" for kind, ms in largest)
        return (
            f"{config.model.name}, {batch} images on {_counted(world.size, 'rank')}, {config.engine.precision}, "
            f"{device}: {costs.step_ms:.1f} ms a step, {1000 * batch / costs.step_ms:.0f} images/s; most of it {told}"
        )


class _Span(NamedTuple):
    start: float
    end: float
    work: tuple[str, str]  # name and kind
    beside: bool  # counts only where nothing else is done

    def within(self, start: float, end: float) -> "_Span":
        return self._replace(start=max(self.start, start), end=min(self.end, end))


def summarise(events: Sequence[Event]) -> Costs:
    """What a Chrome trace of torch.profiler tells of the ranges in it that are called STEP."""
    timed = [event for event in events if event.get("ph") == "X"]
    ranges = [event for event in timed if event["cat"] == "user_annotation"]
    steps = [event for event in ranges if event["name"] == STEP]
    if not steps:
        raise ValueError("the trace has no step")
    thread, windows = steps[0]["tid"], [(step["ts"], step["ts"] + step["dur"]) for step in steps]
    step_us, per = sum(end - start for start, end in windows), 1000 * len(steps)
    kernels = [event for event in timed if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = list(map(_kernel, kernels)) if kernels else _operators(timed, thread)
    own, calls, phases = (collections.Counter[Any]() for _ in range(3))
    for start, end in windows:
        inside = [span.within(start, end) for span in spans if span.start < end and span.end > start]
        own.update(_own(inside))
        calls.update(span.work for span in inside)
        for event in ranges:
            if event["tid"] == thread and event["name"] in PHASES and start <= event["ts"] < end:
                phases[event["name"]] += event["dur"]
    kinds_us = collections.Counter[str]()
    for (_, kind), us in own.items():
        kinds_us[kind] += us
    remains = "the device is idle" if kernels else "Python and waiting"
    return Costs(
        num_steps=len(steps),
        step_ms=step_us / per,
        on_device=bool(kernels),
        phases={
            **{name: phases[name] / per for name in PHASES if name in phases},
            REST: (step_us - phases.total()) / per,
        },
        kinds={
            **{kind: us / per for kind, us in kinds_us.most_common()},
            remains: (step_us - kinds_us.total()) / per,
        },
        longest=[
            Work(_shown(name), kind, calls[name, kind] / len(steps), us / per)
            for (name, kind), us in own.most_common(_NUM_LONGEST)
        ],
    )


def _kernel(event: Event) -> _Span:
    kind = op_kinds.kind_of_kernel(event["name"])
    beside = kind in (op_kinds.COMMUNICATION, op_kinds.DECODING)  # on streams of their own
    return _Span(event["ts"], event["ts"] + event["dur"], (event["name"], kind), beside)


def _operators(timed: Sequence[Event], thread: Any) -> list[_Span]:
    """Operators of the thread that trains, and what Gloo's threads do for it. Autograd's own ranges are no work."""
    spans = []
    for event in timed:
        name, here = event["name"], event["tid"] == thread
        is_operator = event["cat"] == "cpu_op" and _IS_OPERATOR.match(name)
        if is_operator if here else name.startswith("gloo:"):
            work = name, op_kinds.kind_of_operator(name)
            spans.append(_Span(event["ts"], event["ts"] + event["dur"], work, beside=not here))
    return spans


def _own(spans: Sequence[_Span]) -> dict[tuple[str, str], float]:
    """Microseconds by name and kind. Each instant counts once: for what began last, so for the innermost of nested
    operators, and where only such run that go on beside others for one of those."""
    points = sorted([(span.start, place) for place, span in enumerate(spans)] + [(span.end, -1) for span in spans])
    own, running, before = collections.defaultdict[tuple[str, str], float](float), [], 0.0
    for now, place in points:
        while running and spans[running[0][-1]].end <= before:
            heapq.heappop(running)
        if running:
            own[spans[running[0][-1]].work] += now - before
        before = now
        if place >= 0:
            heapq.heappush(running, (spans[place].beside, -spans[place].start, spans[place].end, place))
    return own


def page(costs: Costs, headline: str, which: str) -> str:
    """The summary, in Markdown."""
    unit = "kernel" if costs.on_device else "operator"
    where = "kernels on the device" if costs.on_device else "operators on the thread that trains"
    named = functools.partial(_table, costs.step_ms)
    longest = [(f"`{work.name}`", work.kind, f"{work.calls:g}", work.ms) for work in costs.longest]
    return f"""# Where a step's time goes

{headline}.

Mean over {which} of rank 0. Being profiled makes steps slower; other steps have `step_s` in metrics.jsonl.

## By phase, on the host's clock

{named(("phase",), [(name, ms) for name, ms in costs.phases.items()])}

## By kind of work, {where}

{named(("kind",), [(name, ms) for name, ms in costs.kinds.items()])}

## The {_NUM_LONGEST} {unit}s that take longest

{named((unit, "kind", "calls"), longest)}

{TRACE} has all of it on a time line: open it in ui.perfetto.dev or chrome://tracing.
"""


def _table(step_ms: float, header: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    """Rows end with milliseconds, which get a share beside them."""
    lines = [[*header, "ms", "share"], [*("---" for _ in header), "---:", "---:"]]
    lines += [[*cells, f"{ms:.2f}", f"{ms / step_ms:.1%}"] for *cells, ms in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(name: str) -> str:
    """A kernel's name, as far as there is room for it."""
    for part in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.replace(part, "")
    return name if len(name) <= _MOST_OF_A_NAME else f"{name[:_MOST_OF_A_NAME]}…"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
