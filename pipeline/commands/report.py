"""Writes a run as one HTML page that needs no network, or several runs side by side.

python launch/report.py RUN [--out FILE] [--no-model] [--samples]     RUN/report.html
python launch/report.py RUN RUN … --out FILE                          their curves, settings and results side by side

RUN is a run's folder, runs/NAME. It may be active, have failed or been killed: the page shows what there is. The newest
whole checkpoint is evaluated on the validation data, where both exist; --no-model skips that. --samples shows images of
the data set, which their licence has to allow, together with the ATTRIBUTION.txt beside its manifest.json.
"""

import time
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.errors import InputError
from pipeline.job.report_page import write_comparison, write_report
from pipeline.run_folder import REPORT


def main() -> dict[str, Any]:
    parser = cli.make_parser("launch/report.py", "Write a run, or several, as an HTML page.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default RUN/{REPORT})")
    parser.add_argument("--no-model", action="store_true", help="do not evaluate the network on the validation data")
    parser.add_argument("--samples", action="store_true", help="show validation images")
    cli.add_cache(parser)
    arguments = parser.parse_args()
    start = time.perf_counter()
    if len(arguments.runs) == 1:
        out = write_report(
            arguments.runs[0],
            arguments.out,
            model=not arguments.no_model,
            samples=arguments.samples,
            cache=cli.cache_of(arguments),
        )
    else:
        # A comparison belongs to no run, so it has no default.
        if arguments.out is None:
            raise InputError("--out is missing: a comparison belongs to no run's folder, so name its file")
        out = write_comparison(arguments.runs, arguments.out)
    seconds = round(time.perf_counter() - start, 1)
    return {"report": str(out), "bytes": out.stat().st_size, "seconds": seconds}
