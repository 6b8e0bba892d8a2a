"""How the pages label a metric, which metrics share a chart, which are fractions of one, and which are details.

COCO's average precision and recall exist for boxes and, where the network predicts them, masks: box_ap, mask_ap50, …
"""

from collections.abc import Mapping
from typing import TypeVar

Score = TypeVar("Score", float, float | None)

_KINDS = ("box", "mask")
_BY_OVERLAP = ("ap", "ap50", "ap75")
_BY_SIZE = ("ap_small", "ap_medium", "ap_large")
_RECALL = ("ar1", "ar10", "ar100")
_DETAILS = {f"{kind}_{name}" for kind in _KINDS for name in (*_BY_SIZE, *_RECALL)}


def _build_charts(kind: str, plural: str) -> dict[str, tuple[str, ...]]:
    titles = {
        f"Average precision of {plural}": _BY_OVERLAP,
        f"Average precision of {plural} by their size": _BY_SIZE,
        f"Average recall of {plural}": _RECALL,
    }
    return {title: tuple(f"{kind}_{name}" for name in names) for title, names in titles.items()}


CHARTS = {
    "Accuracy": ("top1", "top5", "balanced_accuracy", "macro_f1", "majority"),
    "Overlap and accuracy": ("miou", "macc", "aacc"),
    **_build_charts("box", "boxes"),
    **_build_charts("mask", "masks"),
}
"""Metrics by the title of the chart that they share. All of them are fractions, which pages write as per cents."""
_LABELS = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "majority": "majority class",
    "miou": "mIoU",
    "macc": "mAcc",
    "aacc": "aAcc",
}


_MAIN = ("top1", "miou", "box_ap", "mask_ap")
"""The metrics by which the versions of each task are ranked."""
BAD_SAMPLES = "bad_samples"


def for_display(scores: Mapping[str, Score]) -> dict[str, Score]:
    """Returns scores with the main metric first, and without a number of damaged samples that is zero."""
    main = {name: scores[name] for name in _MAIN if name in scores}
    shown = {**main, **scores}
    if not shown.get(BAD_SAMPLES):
        shown.pop(BAD_SAMPLES, None)
    return shown


def format_score(name: str, score: float | None) -> str:
    """Returns a score with its label, such as "top1 93.3 %"; None stands for one that is not finite."""
    if score is None:
        value = "not finite"
    elif is_fraction(name):
        value = f"{100 * score:.1f} %"
    else:
        value = f"{score:.4g}"
    return f"{label_of(name)} {value}"


def format_scores(scores: Mapping[str, float | None]) -> str:
    """Returns the scores that are displayed, such as "top1 93.3 %, val_loss not finite"."""
    return ", ".join(format_score(name, score) for name, score in for_display(scores).items())


def is_fraction(metric: str) -> bool:
    """Whether a metric is a fraction of one, to be written as a percentage."""
    return any(metric in names for names in CHARTS.values())


def is_detail(metric: str) -> bool:
    """Whether a metric covers only some of the objects, or is a recall. Tables of many metrics omit those."""
    return metric in _DETAILS


def label_of(metric: str) -> str:
    """Returns a metric's label, such as "box AP50" for box_ap50."""
    kind, _, rest = metric.partition("_")
    if kind in _KINDS and rest.startswith(("ap", "ar")):
        return f"{kind} {rest[:2].upper()}{rest[2:].replace('_', ' ')}"
    return _LABELS.get(metric, metric)
