"""What time was spent on, as a bar with its table: the run's as a whole, and that of a training step."""

from collections.abc import Callable, Mapping

from pipeline.track.report.html import Html, duration, join, number, section, table, tag
from pipeline.track.report.run_files import Document, RunFiles, as_number, mapping

_SERIES = [f"--s{place}" for place in range(8)]
_REMAINS = "--rule"
_MOST_WORKS = 50


def shares(seconds: Mapping[str, float], colours: Mapping[str, str], told: Callable[[float], str] = duration) -> Html:
    """In the order given. What has no colour is what remains."""
    whole = sum(seconds.values())
    bar = [
        tag(
            "i",
            style=f"--c:var({colours.get(name, _REMAINS)});width:{100 * value / whole:.3f}%",
            title=f"{name} {told(value)}",
        )
        for name, value in seconds.items()
    ]
    rows = [
        (
            join(tag("i", class_="key", style=f"--c:var({colours.get(name, _REMAINS)})"), name),
            tag("data", told(value), value=repr(value)),
            number(value / whole, percent=True),
        )
        for name, value in seconds.items()
    ]
    return join(tag("div", bar, class_="shares"), table(("spent on", "time", "share"), rows))


def step(run: RunFiles) -> Html | None:
    """The section of a run that was profiled."""
    profile = run.profile
    where = "kernels on the device" if profile.get("on_device") is True else "operators on the thread that trains"
    bars = [
        _bar("By phase, on the host's clock", profile.get("phases")),
        _bar(f"By kind of work, {where}", profile.get("kinds")),
    ]
    if not any(bars):
        return None
    first, last = profile.get("first_step"), profile.get("last_step")
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    about = (
        f"{profile.get('headline')}. Mean over {which} of rank 0; being profiled makes a step slower. "
        "profile/trace.json.gz has them on a time line, for ui.perfetto.dev."
    )
    return section("Where a step's time goes", tag("div", bars, class_="two"), _longest(profile), about=about)


def _bar(title: str, costs: object) -> Html | None:
    """`costs`: milliseconds by name, as far as they are that."""
    seconds = {name: as_number(ms) / 1000 for name, ms in mapping(costs).items() if as_number(ms) > 0}
    if not seconds:
        return None
    names = list(seconds)[:-1]  # the last is what remains
    colours = {name: _SERIES[place % len(_SERIES)] for place, name in enumerate(names)}
    return tag("div", tag("h3", title), shares(seconds, colours, _milliseconds))


def _longest(profile: Document) -> Html | None:
    found = profile.get("longest")
    works = [mapping(work) for work in found[:_MOST_WORKS]] if isinstance(found, list) else []
    rows = [
        (
            str(work.get("name")),
            str(work.get("kind")),
            number(as_number(work.get("calls"))),
            tag("data", _milliseconds(as_number(work.get("ms")) / 1000), value=repr(as_number(work.get("ms")))),
        )
        for work in works
    ]
    what = f"The {len(rows)} that take longest"
    return tag("details", tag("summary", what), table(("name", "kind", "calls", "time"), rows)) if rows else None


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"
