"""Draw a run as one HTML page that needs no network, or several runs side by side.

python launch/report.py RUN [--out FILE] [--no-model] [--samples]     RUN/report.html
python launch/report.py RUN RUN … --out FILE                          their curves, settings and results side by side

RUN is a run's folder, runs/NAME. It may be at work, have failed or been killed: the page shows what there is. The
newest whole checkpoint is run on the validation data, where both are there; --no-model leaves that out. --samples shows
images of the data set, which their licence has to allow; ATTRIBUTION.txt beside its manifest.json is quoted with them.
"""

import argparse
import contextlib
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import command
from pipeline.errors import ExternalError, InputError
from pipeline.redact import redact, redact_urls
from pipeline.shards.cache import DEFAULT_CACHE, CacheOptions

if TYPE_CHECKING:
    from pipeline.track.report import Examination

REPORT = "report.html"


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="launch/report.py", description="Draw a run, or several, as an HTML page.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default RUN/{REPORT})")
    parser.add_argument("--no-model", action="store_true", help="do not run the network on the validation data")
    parser.add_argument("--samples", action="store_true", help="show images of the data set")
    command.add_cache(parser)
    arguments = parser.parse_args()
    began = time.perf_counter()
    if len(arguments.runs) == 1:
        (run,), cache = arguments.runs, command.cache_of(arguments)
        out = write(run, arguments.out, model=not arguments.no_model, samples=arguments.samples, cache=cache)
    else:
        if arguments.out is None:
            raise InputError("--out is missing: a comparison belongs to no run's folder, so name its file")
        out = write_comparison(arguments.runs, arguments.out)
    seconds = round(time.perf_counter() - began, 1)
    return {"report": str(out), "bytes": out.stat().st_size, "seconds": seconds}


def write(
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
        from launch import examine  # torch takes seconds to import, which pages without pictures do without

        return examine.examine(folder, samples=samples, cache=cache)
    except (InputError, ExternalError, OSError) as error:
        return f"Not known: {redact(str(error))}"
    except Exception as error:  # the rest of the page is worth more than a traceback
        print(f"{folder}: its network could not be examined: {error!r}", file=sys.stderr, flush=True)
        return f"Not known: {type(error).__name__}: {error}"


if __name__ == "__main__":
    command.run(main)
