"""A sample of python -m tests.chaos.hostile, and that its verdicts can be reached."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.hostile import __main__ as hostile
from tests.chaos.hostile import trial
from tests.chaos.hostile.trial import Case, Ran, Sandbox, Verdict, run

PROGRAMS: dict[Verdict, str] = {
    "right": "print('{}')",
    "refused": "import sys; print('error: no', file=sys.stderr); sys.exit(2)",
    "skipped": """print('{"skipped": [1]}')""",
    "crashed": "raise ValueError('no')",
    "hung": "import time; time.sleep(600)",
    "outside": "open('../beside/letter.txt', 'w').write('x')",
    "wrong": r"import sys; print('\x1b[2J', file=sys.stderr)",
}
"""A command for each verdict."""


@pytest.mark.parametrize("verdict", PROGRAMS)
def test_trial_reports_each_verdict(verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox(tmp_path / "sandbox")
    program = sandbox.work / "program.py"
    program.write_text(PROGRAMS[verdict])
    if verdict == "hung":
        monkeypatch.setattr(trial, "LIMIT_S", 1.0)
    assert run(Case("program", [(str(program),)]), sandbox).verdict == verdict


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crashed"),
        ("import sys; sys.exit(1)", "crashed"),
        ("kept = bytes(range(256)) * (6 << 20)\nwhile True: pass", "hung"),
        ("import os; open(os.environ['HOSTILE_MARK'], 'w')", "outside"),
        ("print('Input should be a number [type=int]', file=__import__('sys').stderr)", "wrong"),
    ],
)
def test_trial_verdict_for_other_failure_modes(
    program: str, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LIMIT_BYTES", 1 << 30)
    sandbox = Sandbox(tmp_path / "sandbox")
    path = sandbox.work / "program.py"
    path.write_text(program)
    assert run(Case("program", [(str(path),)]), sandbox).verdict == verdict


def test_judge_overrides_trial_verdict(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "sandbox")
    path = sandbox.work / "program.py"
    path.write_text(PROGRAMS["right"])
    judged: list[Ran] = []

    def judge(ran: Sequence[Ran]) -> str:
        judged.extend(ran)
        return "other pixels"

    outcome = run(Case("program", [(str(path),)], judge), sandbox)
    assert outcome.verdict == "wrong"
    assert "other pixels" in outcome.detail
    assert [each.result for each in judged] == [{}]


MOST_KINDS = "images,tars,packed,lists,own,configurations,settings,names,weights,stored,cached,predicted"


@pytest.mark.parametrize(("kinds", "cases"), [("images,tars", 2), pytest.param(MOST_KINDS, 10, marks=pytest.mark.slow)])
def test_hostile_input_does_no_harm(kinds: str, cases: int) -> None:
    """A case of each kind; the command makes as many as there is time for, with servers, too."""
    result = hostile.main(["--kinds", kinds, "--cases", str(cases), "--seed", "3", "--minutes", "60"])
    assert result["ok"], result
    assert result["inputs"] > 10 * cases
