"""What is wrong is refused alike by every command, before what takes seconds is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_config
from tests.ranks import ROOT
from tests.refusals import CASES, COMMANDS, agree, answers, prepare
from tests.test_commands import forked

HEAVY = ["torch", "mlflow", "deepspeed", "timm", "nvidia.dali", "transformers", "pandas", "pyarrow", "matplotlib"]

PROBE = """
import json, os, runpy, sys
import numpy, pipeline.config  # once for all

def imported(arguments):
    reader, writer = os.pipe()
    if os.fork() == 0:
        def end(code):
            raise SystemExit(code)

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit, leave = end, os._exit
        sys.argv = arguments
        code = "ran to its end"
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        os.write(writer, json.dumps([code, [name for name in HEAVY if name in sys.modules]]).encode())
        leave(0)
    os.close(writer)
    with open(reader) as answer:
        return json.load(answer)

HEAVY = json.loads(sys.argv[1])
print(json.dumps([imported(arguments) for arguments in json.loads(sys.argv[2])]))
"""
"""Runs commands in forks of one process: of each its exit code, and what it has imported of HEAVY."""


def probe(lines: list[list[str]]) -> list[tuple[int, list[str]]]:
    words = [sys.executable, "-c", PROBE, json.dumps(HEAVY), json.dumps(lines)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [(code, names) for code, names in json.loads(done.stdout)]


def test_help_does_not_import_heavy_packages() -> None:
    commands = sorted(str(path) for path in (ROOT / "launch").glob("*.py") if "__main__" in path.read_text())
    assert len(commands) >= 14
    found = dict(zip(commands, probe([[name, "--help"] for name in commands]), strict=True))
    assert found == {name: (0, []) for name in commands}


def test_invalid_configuration_is_rejected_before_heavy_imports(tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path)
    lines = []
    for name, *options in [
        ["pretrain.py"],
        ["finetune.py"],
        ["doctor.py"],
        ["submit.py", "--dry-run"],
        ["trial.py"],
        ["doctor.py", "--tune"],
        ["shards.py", "preview"],
    ]:
        program = [str(ROOT / "launch" / name), *options]
        lines.append([*program, "--config", str(config), "--set", "optim.learning_rate=1"])
    assert list(zip(lines, probe(lines), strict=True)) == [(line, (2, [])) for line in lines]


@pytest.mark.parametrize("override", ["data.val=other", "data.lanes=1", "model.name=pvt_larg", "image.size=33"])
def test_commands_reject_bad_settings_with_the_same_message(
    digits: Path, digit_images: Path, tmp_path: Path, override: str
) -> None:
    def run(name: str, arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
        program, *options = COMMANDS[name]
        return forked(program, *options, *arguments, cwd=folder, ranks=2 if name == "pretrain" else 1)

    prepare(digits, digit_images, tmp_path)
    found = answers(override, tmp_path, run)
    assert agree(found, CASES[override].format(folder=digits)), found
    # Nothing half made: doctor has looked whether the folder of all runs can be written.
    assert not [path for path in tmp_path.glob("runs/**/*") if path.is_file()]
