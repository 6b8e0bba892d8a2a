"""Writes a run's report, report.html, or one page for several runs."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import files
from pipeline.errors import ExternalError, InputError
from pipeline.redact import redact, redact_urls
from pipeline.run_folder import REPORT
from pipeline.shards.cache import DEFAULT_CACHE, CacheOptions

if TYPE_CHECKING:
    from pipeline.track.report import Examination

log = logging.getLogger(__name__)


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    model: bool = True,
    samples: bool = False,
    cache: CacheOptions = DEFAULT_CACHE,
) -> Path:
    """Draws the run in `folder` into `out`, by default its report.html, and returns that path. Writes nothing else.

    `model`: run the newest whole checkpoint on the validation data. `samples`: show images of that data, which is also
    done where the run's tracking.log_samples says so. `cache`: for remote shards, in place of the run's own. Raises
    InputError for a folder that holds no run, and where the page cannot be written.
    """
    # matplotlib takes a second to import, which --help is spared.
    from pipeline.track.report import RunFiles, page

    run = RunFiles(folder)
    samples = samples or run.get("tracking", "log_samples") is True
    examined = _examine(folder, samples, cache) if model else "Skipped: the page was made with --no-model."
    return _write(out or folder / REPORT, page(run, examined))


def write_comparison(folders: list[Path], out: Path) -> Path:
    """Draws several runs side by side into `out`. Raises InputError as write_report does."""
    from pipeline.track.report import RunFiles, compare

    return _write(out, compare([RunFiles(folder) for folder in folders]))


def _write(out: Path, text: str) -> Path:
    with files.output(out) as partial:
        partial.write_text(redact_urls(text), encoding="utf-8", errors="replace")
    return out


def _examine(folder: Path, samples: bool, cache: CacheOptions) -> "Examination | str":
    """Returns what the run's network does with its validation data, or why that is not known."""
    try:
        # torch takes seconds to import, which pages without pictures are spared.
        from pipeline.job import examine_model

        return examine_model.examine_model(folder, samples=samples, cache=cache)
    except (InputError, ExternalError, OSError) as error:
        return f"Not known: {redact(str(error))}"
    except Exception as error:  # the rest of the page is worth more than a traceback
        log.warning(f"{folder}: its network could not be examined: {error!r}")
        return f"Not known: {type(error).__name__}: {error}"
