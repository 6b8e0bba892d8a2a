"""Writes a run's report, report.html, or one page for several runs."""

import contextlib
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ExternalError, InputError
from pipeline.redact import redact, redact_urls
from pipeline.shards.cache import DEFAULT_CACHE, CacheOptions

if TYPE_CHECKING:
    from pipeline.track.report import Examination

REPORT = "report.html"


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    model: bool = True,
    samples: bool = False,
    cache: CacheOptions = DEFAULT_CACHE,
) -> Path:
    """Draw the run in `folder` into `out`, by default its report.html; returns the page's path.

    `model`: run the newest whole checkpoint on the validation data. `samples`: show images of the data sets, also done
    where the run's tracking.log_samples says so. `cache`: for remote shards, instead of the run's own. Writes nothing
    else. Raises InputError for a folder that holds no run, and where the page cannot be written.
    """
    from pipeline.track.report import RunFiles, page

    run = RunFiles(folder)
    samples = samples or run.get("tracking", "log_samples") is True
    examined = _examined(folder, samples, cache) if model else "Left out: the page was made with --no-model."
    return _write(out or folder / REPORT, page(run, examined, samples=samples))


def write_comparison(folders: list[Path], out: Path) -> Path:
    """Draw several runs side by side into `out`. Raises InputError as `write` does."""
    from pipeline.track.report import RunFiles, compare

    return _write(out, compare([RunFiles(folder) for folder in folders]))


def _write(out: Path, text: str) -> Path:
    # Whole or not at all, and under a name of its own until then: two may draw the same page at once.
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}")
    try:
        partial.write_text(redact_urls(text), encoding="utf-8", errors="replace")
        partial.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from error
    return out


def _examined(folder: Path, samples: bool, cache: CacheOptions) -> "Examination | str":
    """What the run's network does with its validation data, or why that cannot be told. `samples`: with the images."""
    try:
        from pipeline.job import examine_model  # torch takes seconds to import, which pages without pictures do without

        return examine_model.examine_model(folder, samples=samples, cache=cache)
    except (InputError, ExternalError, OSError) as error:
        return f"Not known: {redact(str(error))}"
    except Exception as error:  # the rest of the page is worth more than a traceback
        print(f"{folder}: its network could not be examined: {error!r}", file=sys.stderr, flush=True)
        return f"Not known: {type(error).__name__}: {error}"
