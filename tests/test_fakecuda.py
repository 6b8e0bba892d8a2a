"""The host's side of the CUDA path, on a fake runtime: what it launches, copies and waits for. See tests/fakecuda."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.fakecuda.__main__ import QUICK
from tests.fakecuda.build import CannotBuildError, build
from tests.fakecuda.rules import violations
from tests.fakecuda.run import run

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By path."""
    try:
        variables = build(tmp_path_factory.mktemp("fakecuda"))
    except CannotBuildError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    return {result["path"]: result for result in run(variables, QUICK[1])}


def test_cuda_paths_run_and_launches_are_counted(results: Results) -> None:
    assert list(results) == QUICK[1]
    for path in ("step.pvt_pico.0", "step.semantic_fpn.0", "evaluation.classification"):
        counts = results[path]["counts"]
        assert counts["launches"] > counts["products"] > 20, path


def test_no_unnecessary_device_synchronisation(results: Results) -> None:
    assert [line for result in results.values() for line in violations(result)] == []


@pytest.mark.parametrize("kind", ["pvt_pico", "semantic_fpn"])
def test_training_step_synchronises_once(results: Results, kind: str) -> None:
    counts = results[f"step.{kind}.0"]["counts"]
    assert (counts["stream_syncs"], counts["device_syncs"], counts["event_syncs"]) == (1, 0, 0)


def test_feed_groups_copies_and_synchronises_once(results: Results) -> None:
    counts = results["feed"]["counts"]
    assert (counts["stream_syncs"], counts["device_syncs"], counts["event_syncs"]) == (1, 0, 0)
    # Finishing: operations, arguments, flips. Labels. Mixing: boxes and weights, label weights. Weights and drop path.
    assert counts["to_device"] == 5


def test_checkpoint_save_synchronises_twice(results: Results) -> None:
    assert results["save.pvt_pico.0"]["counts"]["stream_syncs"] == 2


def test_missing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotBuildError, match="no gcc and no g\\+\\+ here: apt-get install g\\+\\+"):
        build(tmp_path)
