"""Draw a run as one HTML page that needs no network, or several runs side by side.

python launch/report.py RUN [--out FILE] [--no-model] [--samples]     RUN/report.html
python launch/report.py RUN RUN … --out FILE                          their curves, settings and results side by side

RUN is a run's folder, runs/NAME. It may be at work, have failed or been killed: the page shows what there is. The
newest whole checkpoint is run on the validation data, where both are there; --no-model leaves that out. --samples shows
images of the data set, which their licence has to allow; ATTRIBUTION.txt beside its manifest.json is quoted with them.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.errors import InputError
from pipeline.job.report_page import REPORT, write_comparison, write_report


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="launch/report.py", description="Draw a run, or several, as an HTML page.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default RUN/{REPORT})")
    parser.add_argument("--no-model", action="store_true", help="do not run the network on the validation data")
    parser.add_argument("--samples", action="store_true", help="show images of the data set")
    cli.add_cache(parser)
    arguments = parser.parse_args()
    began = time.perf_counter()
    if len(arguments.runs) == 1:
        (run,), cache = arguments.runs, cli.cache_of(arguments)
        out = write_report(run, arguments.out, model=not arguments.no_model, samples=arguments.samples, cache=cache)
    else:
        if arguments.out is None:
            raise InputError("--out is missing: a comparison belongs to no run's folder, so name its file")
        out = write_comparison(arguments.runs, arguments.out)
    seconds = round(time.perf_counter() - began, 1)
    return {"report": str(out), "bytes": out.stat().st_size, "seconds": seconds}
