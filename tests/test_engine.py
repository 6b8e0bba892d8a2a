"""ZeRO 0 to 3 against plain PyTorch, on one rank, on two, and on three with padding."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import run_ranks, write_config
from tests.ranks import ROOT
from tests.tolerances import of_sums


def configuration(digits: Path, folder: Path, **changes: object) -> Path:
    path = write_config(digits, folder)
    tree = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size", "stages"),
    [
        pytest.param(1, 4, (0, 1, 2, 3), marks=pytest.mark.gpu),
        pytest.param(2, 2, (0,), marks=pytest.mark.gpu),  # which can share one
        (2, 2, (1, 2, 3)),
        (3, None, (0, 1, 2, 3)),
    ],
)
def test_fp32_matches_single_process_adamw(
    digits: Path, tmp_path: Path, ranks: int, micro_batch_size: int | None, stages: tuple[int, ...]
) -> None:
    # At 64 px every attention has at least four keys; at 32 px most have one, and queries no gradient but rounding.
    # Four lanes: three ranks serve 1, 1 and 2 of them, so two ranks are padded. One rank and two accumulate twice.
    path = configuration(
        digits,
        tmp_path,
        image__size=64,
        data__lanes=4,
        train__global_batch_size=8,
        train__micro_batch_size=micro_batch_size,
    )
    reports = run_ranks(ranks, "zero", path, 8, "fp32", *stages)
    assert [report["stage"] for report in reports] == [*stages]
    for report in reports:
        worst = max(report["distances"], key=report["distances"].get)
        print(f"{ranks} ranks, ZeRO-{report['stage']}: worst {worst} {report['distances'][worst]:.2e}")
        assert all(distance <= of_sums(5e-6) for distance in report["distances"].values()), (report["stage"], worst)
        assert report["losses"] == pytest.approx(report["expected_losses"], rel=of_sums(1e-5))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=[pytest.mark.gpu, pytest.mark.slow]), 2])
def test_low_precision_losses_match_across_zero_stages(
    digits: Path, tmp_path: Path, ranks: int, precision: str
) -> None:
    path = configuration(digits, tmp_path, data__lanes=4, train__global_batch_size=16)
    reports = run_ranks(ranks, "zero", path, 14, precision, 0, 1, 2, 3)
    for report in reports[1:]:
        assert report["losses"] == pytest.approx(reports[0]["losses"], rel=2e-3)
    assert reports[0]["losses"][-1] < 0.95 * reports[0]["losses"][0]


def test_importing_deepspeed_does_not_import_mlflow() -> None:
    # Nor leaves anything in the way of a later import.
    script = """
import sys
from pipeline.train import import_deepspeed
print(import_deepspeed.deepspeed.__name__, *sorted(name for name in sys.modules if name.startswith("mlflow")))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "deepspeed"
