"""What each path may wait for, by the function of Python that waits."""

from typing import Any

LOSS = {"stream_syncs pipeline/train/engine.py:Engine.step": 1}
"""In training it is Trainer._agree that waits."""

ZERO_1_AND_2 = {
    "stream_syncs deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace": 4,
    "stream_syncs deepspeed/runtime/utils.py:is_invalid_grad_norm": 3,
}
_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
ZERO_3 = {
    # In a world of one DeepSpeed gathers nothing, but waits once for each group of parameters that it prefetches.
    "stream_syncs deepspeed/runtime/zero/partition_parameters.py:NoGatherCoalescedHandle.wait": 2,
    f"stream_syncs deepspeed/runtime/zero/stage3.py:{_STAGE_3}.independent_gradient_partition_epilogue": 1,
    f"stream_syncs deepspeed/runtime/zero/stage3.py:{_STAGE_3}.get_grad_norm_direct": 2,
    "stream_syncs deepspeed/runtime/utils.py:is_invalid_grad_norm": 1,
}
SAVE = {
    "stream_syncs pipeline/train/saver.py:Saver._copy": 1,
    "stream_syncs pipeline/train/moments.py:Moments.adam_steps": 1,
}

MAY_WAIT: dict[str, dict[str, int]] = {
    "step.0": LOSS,
    "step.1": LOSS | ZERO_1_AND_2,
    "step.2": LOSS | ZERO_1_AND_2,
    "step.3": LOSS | ZERO_3,
    "evaluation.classification": {"stream_syncs pipeline/train/evaluate.py:evaluate": 3},  # once, at its end
    "feed": {"stream_syncs pipeline/feed/image_stream.py:ImageStream._produce": 1},
    "save": SAVE,
    "memory": {"stream_syncs pipeline/feed/image_stream.py:ImageStream._produce": 1},
}
DETECTORS = ("retinanet", "mask_rcnn", "detr")
"""Their matching, sampling and suppression are torchvision's and Transformers', and wait for what they have found."""


def violations(result: dict[str, Any]) -> list[str]:
    """What a path did that it must not: a line each, empty for none."""
    path, counts, sites = result["path"], result["counts"], result["sites"]
    found = [f"{path}: {site}: {count}" for site, count in sites.items() if site.startswith("device_syncs")]
    allowed = _allowed(path)
    if allowed is not None:
        found += [
            f"{path}: {site}: {count}, of which {allowed.get(site, 0)} may be"
            for site, count in sites.items()
            if count > allowed.get(site, 0) and not site.startswith("device_syncs")
        ]
    if path.startswith("step.") and counts["allocations"]:
        found.append(f"{path}: {counts['allocations']} allocations of memory that torch had not kept")
    return found


def _allowed(path: str) -> dict[str, int] | None:
    """None where anything but the whole device may be waited for."""
    kind, *arguments = path.split(".")
    if kind == "step":
        return None if arguments[0] in DETECTORS else MAY_WAIT[f"step.{arguments[1]}"]
    return MAY_WAIT.get(path, MAY_WAIT.get(kind))
