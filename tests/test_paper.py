"""The paper's tables, with and without a registry beside them."""

import sys
from pathlib import Path

import pytest

from benchmarks import paper
from pipeline.errors import InputError
from tests.ranks import ROOT


@pytest.fixture
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without runs/, and the first row of the first table alone."""
    first = paper.TABLES[0]
    monkeypatch.setattr(paper, "TABLES", (first._replace(folder=str(ROOT / first.folder), rows=first.rows[:1]),))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_nowhere")
def test_paper_tables_are_printed_without_a_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["paper"])
    (row,) = paper.main()[paper.TABLES[0].title]
    assert row["version"] is None
    assert row["here"]["parameters_m"] == pytest.approx(row["paper"]["parameters_m"], abs=0.1)
    assert "| not run |" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_nowhere")
def test_missing_registry_database_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["paper", "--tracking-uri", f"sqlite:///{tmp_path}/no.db"])
    with pytest.raises(InputError, match=r"no\.db: no such database"):
        paper.main()
