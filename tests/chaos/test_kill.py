"""A run that is killed five times ends as one that is not. `python -m tests.chaos.kill` does it fifty times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT


@pytest.mark.slow
def test_killed_run_matches_uninterrupted_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos.kill", "--kills", "5", "--steps", "24", "--save-every", "5"]
    process = subprocess.run([*command, "--keep", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(process.stderr)
    result = json.loads(process.stdout.splitlines()[-1])
    assert process.returncode == 0, result["faults"]
    assert result["kills"] == result["restarts"] == 5
    assert result["kills_in_save"] >= 2
    assert result["resumed_above_zero"] >= 3
    assert result["bit_identical"]
    assert result["trace_identical"]
    assert result["metrics_identical"]
