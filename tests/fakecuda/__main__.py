"""Counts what the host does in training, evaluating, feeding and saving, on a machine without a GPU.

python -m tests.fakecuda [--quick]

Prints a line for each path: kernel launches, matrix products, memsets, copies by direction, synchronisations,
collectives, allocations. Then where each path synchronises. Exit code 1 if one waits for what it must not.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from pipeline import cli
from pipeline.errors import ExternalError
from tests.fakecuda.build import CannotBuildError, build
from tests.fakecuda.rules import violations
from tests.fakecuda.run import run

TASKS = ("semantic_fpn", "retinanet", "mask_rcnn", "detr")
STAGES = range(4)

QUICK = {
    1: [
        *(f"step.pvt_pico.{stage}" for stage in STAGES),
        "step.semantic_fpn.0",
        "evaluation.classification",
        *("feed", "damaged"),
        "save.pvt_pico.0",
        *("streams", "streams.broken", "memory", "memory.broken"),
    ]
}
FULL = {
    1: [
        *(f"step.{model}.{stage}" for model in ("pvt_tiny", "pvt_large") for stage in STAGES),
        *(f"step.{task}.0" for task in TASKS),
        *(f"evaluation.{task}" for task in ("classification", *TASKS)),
        *("feed", "damaged"),
        *(f"save.pvt_large.{stage}" for stage in STAGES),
        *("streams", "streams.broken", "memory", "memory.broken"),
    ],
    2: [f"step.pvt_tiny.{stage}" for stage in STAGES],
}
"""Paths by the number of ranks."""


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.fakecuda", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what `make test` counts, with the smallest model")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            variables = build(Path(folder))
        except CannotBuildError as error:
            raise ExternalError(str(error)) from error
        for ranks, paths in (QUICK if arguments.quick else FULL).items():
            results += [{**result, "ranks": ranks} for result in run(variables, paths, ranks=ranks)]
    show(results)
    wrong = [line for result in results for line in violations(result)]
    if wrong:
        raise ExternalError("\n".join(wrong))
    return {"paths": len(results), "counts": [{"path": r["path"], "ranks": r["ranks"], **r["counts"]} for r in results]}


def show(results: list[dict[str, Any]]) -> None:
    names = [_title(result) for result in results]
    width, columns = max(map(len, names)), list(results[0]["counts"])
    print(" " * width, *columns)
    for name, result in zip(names, results, strict=True):
        print(f"{name:{width}}", *(f"{result['counts'][column]:{len(column)}}" for column in columns))
    print()
    for name, result in zip(names, results, strict=True):
        print(f"{name}:")
        for site, count in sorted(result["sites"].items()):
            print(f"    {count:4} {site}")


def _title(result: dict[str, Any]) -> str:
    return f"{result['name']}, {result['ranks']} ranks" if result["ranks"] > 1 else result["name"]


if __name__ == "__main__":
    cli.run(main)
