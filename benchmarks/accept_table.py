"""What benchmarks.accept has found as a page: rows for docs/verification.md, tables for RESULTS.md."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

VERIFICATION = Path(__file__).parent.parent / "docs/verification.md"

Line = dict[str, Any]


class Row(NamedTuple):
    """A row of docs/verification.md by its beginning, and its evidence: tests, or a stage and how its result reads."""

    begins: str
    tests: Sequence[str] = ()
    stage: str = ""
    say: Callable[[Any], str] = str
    note: str = ""
    """The part of the row that is tested on one GPU; empty: all of it."""


def _killed(result: Any) -> str:
    same = all(result[name] for name in ("bit_identical", "trace_identical", "metrics_identical"))
    return f"{result['kills']} SIGKILLs, one rank: {'bit for bit' if same else 'DIFFERS'}"


def _peaks(result: Any) -> str:
    gib = [case["peak_mib"] / 1024 for case in result["cases"]]
    return f"{result['precision']} {gib[0]:.1f} GiB, with activation checkpointing {gib[1]:.1f}"


ROWS = (
    Row(
        "model against Transformers' PVT",
        (
            "tests/test_pvt_model.py::test_logits_and_feature_maps_match_transformers",
            "tests/test_pvt_model.py::test_gradients_match_transformers",
        ),
    ),
    Row("crops and RandAugment's 15 operations", ("tests/test_augment.py::test_rand_augment_ops_match_timm",)),
    Row(
        "ZeRO 0–3 on 1, 2 and 3 ranks against plain AdamW",
        ("tests/test_engine.py::test_fp32_matches_single_process_adamw",),
        note="one rank",
    ),
    Row(
        "ZeRO 0–3 in bf16 and fp16",
        ("tests/test_engine.py::test_low_precision_losses_match_across_zero_stages",),
        note="one rank",
    ),
    Row("restart on the same world", ("tests/test_checkpoint.py::test_resume_is_bit_exact",), note="one rank"),
    Row("50 SIGKILLs at random", stage="kill and resume", say=_killed),
    Row(
        "Semantic FPN's decoder",
        ("tests/test_semantic_fpn.py::test_decoder_matches_segmentation_models_pytorch",),
        note="the decoder",
    ),
    Row("PVT-Large + Mask R-CNN", stage="memory", say=_peaks),
    Row(
        "reference, optimised and compiled kernels",
        (
            "tests/test_pvt_model.py::test_optimised_kernels_match_plain_operators",
            "tests/test_compile.py::test_compiled_blocks_match_eager",
        ),
    ),
    Row(
        "training with and without a profile",
        ("tests/test_profile.py::test_profiling_does_not_change_training",),
        note="plain blocks, one rank",
    ),
)


def page(lines: Sequence[Line]) -> str:
    """Returns the page in Markdown."""
    latest = {line["stage"]: line for line in lines}
    blocks = [
        ["# What was accepted, and on what", "", proved(latest)],
        ["| stage | outcome | seconds | limit, s | |", "|---|---|---:|---:|---|", *map(_outcome, latest.values())],
        [
            "## docs/verification.md",
            "",
            "| | CPU, two cores | GPU |",
            "|---|---|---|",
            *verified_rows(latest),
        ],
    ]
    for name, line in latest.items():
        if line.get("table"):
            blocks.append([f"## {name}", "", f"    python -m {line['command']}", "", *line["table"]])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def proved(latest: dict[str, Line]) -> str:
    """Returns the hardware and the versions that the results hold for."""
    found = latest.get("versions", {}).get("result")
    if not found:
        return "The versions are not known: that stage did not end."
    packages = [f"{name} {each.get('version', 'does not work')}" for name, each in found["imports"].items()]
    device = [f"{name} {found[name]}" for name in ("cuda", "nccl", "cudnn", "driver") if name in found]
    return f"{found['date']}; {found['device']}; Python {found['python']}; {', '.join([*device, *packages])}."


def rows_of(text: str) -> list[str]:
    """Returns the lines of the Markdown tables in a command's output."""
    return [line for line in text.splitlines() if line.startswith("|")]


def verified_rows(latest: dict[str, Line]) -> Iterable[str]:
    """Yields the rows of docs/verification.md that have a result, with it in their last cell."""
    written = [line for line in VERIFICATION.read_text().splitlines() if line.startswith("| ")]
    for row in ROWS:
        if found := _found(row, latest):
            (line,) = [line for line in written if line.startswith(f"| {row.begins}")]
            yield re.sub(r"\| [^|]* \|$", lambda _, found=found: f"| {found} |", line)


def _found(row: Row, latest: dict[str, Line]) -> str:
    line = latest.get(row.stage or "tests", {})
    result = line.get("result")
    if not result or line["quick"]:
        return ""
    if row.stage:
        return row.say(result) if line["outcome"] == "done" else ""
    counts = [result["tests"].get(test, {}) for test in row.tests]
    passed = sum(each.get("passed", 0) for each in counts)
    failed = sum(each.get("failed", 0) + each.get("error", 0) for each in counts)
    if failed:
        return f"FAILED: {failed} of {passed + failed} tests"
    if not all(counts):  # not all of them were reached
        return ""
    return f"as on a CPU{f', {row.note}' * bool(row.note)} ({passed} tests)"


def _outcome(line: Line) -> str:
    reason = (line["reason"].splitlines() or [""])[-1].replace("|", "/")
    return f"| {line['stage']} | {line['outcome']} | {line['seconds']:.0f} | {line['limit_s']:.0f} | {reason} |"
