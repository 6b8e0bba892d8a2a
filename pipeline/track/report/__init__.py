"""A run as one page of HTML that needs no network, and several runs side by side.

    runs/NAME/ ──run_files──▶ RunFiles ──────┬─▶ page ────▶ page.html.jinja ────▶ report.html
    checkpoint ──examine_model──▶ Examination ┘
    several RunFiles ──▶ compare ──▶ compare.html.jinja ──▶ compare.html

`plots` draws curves with matplotlib, `timeline` lists what happened when, `examination` has the confusion matrix, the
classes and the pictures, `render` fills templates, which escape all that they put in. Everything comes from files, any
of which may be missing, cut short or still being written.
"""

from pipeline.track.report.compare import compare
from pipeline.track.report.examination import Examination, Picture
from pipeline.track.report.page import page
from pipeline.track.report.run_files import RunFiles

__all__ = [
    "Examination",
    "Picture",
    "RunFiles",
    "compare",
    "page",
]
