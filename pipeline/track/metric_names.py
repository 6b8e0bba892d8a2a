"""How the pages call a metric, which of them share a chart, which are shares of one, and which are details of others.

COCO's average precision and recall are of boxes and, where the network finds them, of masks: box_ap, mask_ap50, …
"""

_KINDS = ("box", "mask")
_BY_OVERLAP, _BY_SIZE, _RECALL = ("ap", "ap50", "ap75"), ("ap_small", "ap_medium", "ap_large"), ("ar1", "ar10", "ar100")
_DETAILS = {f"{kind}_{name}" for kind in _KINDS for name in (*_BY_SIZE, *_RECALL)}


def _charts_of(kind: str, plural: str) -> dict[str, tuple[str, ...]]:
    titles = {
        f"Average precision of {plural}": _BY_OVERLAP,
        f"Average precision of {plural} by their size": _BY_SIZE,
        f"Average recall of {plural}": _RECALL,
    }
    return {title: tuple(f"{kind}_{name}" for name in names) for title, names in titles.items()}


CHARTS = {
    "Accuracy": ("top1", "top5"),
    "Overlap and accuracy": ("miou", "macc", "aacc"),
    **_charts_of("box", "boxes"),
    **_charts_of("mask", "masks"),
}
"""All of them shares, to be written as per cents."""
_NAMES = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}


def is_fraction(metric: str) -> bool:
    return any(metric in names for names in CHARTS.values())


def is_detail(metric: str) -> bool:
    """Whether it is another one's of a part of the objects, which tables of many metrics leave out."""
    return metric in _DETAILS


def name_of(metric: str) -> str:
    kind, _, rest = metric.partition("_")
    if kind in _KINDS and rest.startswith(("ap", "ar")):
        return f"{kind} {rest[:2].upper()}{rest[2:].replace('_', ' ')}"
    return _NAMES.get(metric, metric)
