"""How the pages call a metric, which of them share a chart, and which are shares of one."""

CHARTS = {"Accuracy": ("top1", "top5"), "Overlap and accuracy": ("miou", "macc", "aacc")}
"""All of them shares, to be written as per cents."""
_NAMES = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}


def is_share(metric: str) -> bool:
    return any(metric in names for names in CHARTS.values())


def name_of(metric: str) -> str:
    return _NAMES.get(metric, metric)
