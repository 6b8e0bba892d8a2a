"""A run as one page of HTML that needs no network, and several of them side by side.

    runs/NAME/ ──reading──▶ RunFiles ─┬─▶ page ────▶ report.html
    checkpoint ──launch/report.py──▶ Examination ─┘
    several RunFiles ──▶ compare ──▶ compare.html

`markup` makes elements and escapes all that is put into them, `charts` draws numbers over steps, `events` what happened
when, `shares` what time was spent on, `classes` what a network takes for what, `precision` how well it finds objects,
`inside` pictures with what its stages see, `metrics` names what was measured. Everything comes from files, any of which
may be missing, cut short or still being written.
"""

from pipeline.track.report.average_precision import ClassPrecision
from pipeline.track.report.compare import compare
from pipeline.track.report.confusion_matrix import Examination
from pipeline.track.report.network_view import ClassifiedPicture, DetectedPicture, SegmentedPicture
from pipeline.track.report.page import page
from pipeline.track.report.run_files import RunFiles

__all__ = [
    "ClassPrecision",
    "ClassifiedPicture",
    "DetectedPicture",
    "Examination",
    "RunFiles",
    "SegmentedPicture",
    "compare",
    "page",
]
