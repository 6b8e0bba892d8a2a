"""How commands end: a JSON line for programs, sentences for people, and scores in the order of the task."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands.endings import describe_evaluation, describe_training
from pipeline.config import load_config
from pipeline.track.metric_names import for_display
from tests.conftest import write_config
from tests.ranks import ROOT

COMMAND = """
from pipeline import cli

def main():
    cli.make_parser("command", "Does something.").parse_args()
    {shows}
    return {{"data": "here", "classes": ["ant", "bee"], "skipped": []}}

cli.run(main)
"""


def on_terminal(script: str, *options: str) -> str:
    """Runs a script whose standard output is a terminal; returns what it printed there and on standard error."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *options],
            cwd=ROOT,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
        os.write(theirs, b"END")
        printed = b""
        while not printed.endswith(b"END"):
            printed += os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    return printed.removesuffix(b"END").decode() + done.stderr


def test_command_prints_one_json_line_without_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(shows="")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"data": "here", "classes": ["ant", "bee"], "skipped": []}
    assert done.stderr == ""


def test_terminal_lists_result_that_was_not_shown() -> None:
    text = on_terminal(COMMAND.format(shows=""))
    assert text.splitlines() == ["data: here", "classes: 2 entries, which --json shows", "skipped: none"]


def test_terminal_shows_only_what_was_shown() -> None:
    assert on_terminal(COMMAND.format(shows="cli.show('2 classes')")) == "2 classes\n"


def test_json_option_prints_json_on_terminal() -> None:
    assert json.loads(on_terminal(COMMAND.format(shows=""), "--json"))["data"] == "here"


def test_main_metric_is_first_and_zero_bad_samples_are_omitted() -> None:
    assert list(for_display({"val_loss": 1.0, "bad_samples": 0.0, "macc": 0.4, "miou": 0.5})) == [
        "miou",
        "val_loss",
        "macc",
    ]
    assert list(for_display({"bad_samples": 2, "top1": 0.5})) == ["top1", "bad_samples"]


@pytest.fixture
def result() -> dict[str, object]:
    return {
        "run": "runs/tiny",
        "model": "models:/tiny/2",
        "best": "models:/tiny/1",
        "steps": 1200,
        "val_loss": 0.25,
        "top1": 0.9333,
        "bad_samples": 0,
        "images_per_second": 99.0,
        "ettr": 0.9,
    }


def test_training_ending_shows_scores_and_next_commands(result: dict[str, object], tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path), [])
    first, *others = describe_training(result, config).splitlines()
    assert first == f"{config.run.folder}: pvt_pico after 1,200 steps: top1 93.3 %, val_loss 0.25"
    # The best version is what people want, not the last one.
    assert others[-1] == "  python launch/predict.py --model models:/tiny/1 PICTURES --out seen.csv --sheet seen.png"
    assert f"--model models:/tiny/1 --data {config.data.val}" in others[-2]


def test_training_ending_without_registration_suggests_sync(result: dict[str, object], tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path), [])
    ending = describe_training(result | {"model": None, "best": None}, config)
    assert ending.endswith(f"python launch/registry.py sync {config.run.folder}")


def test_stopped_training_ending_shows_checkpoint(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path), [])
    ending = describe_training({"requeue": True, "checkpoint": "step-7"}, config)
    assert "stopped early and saved in step-7" in ending


def test_evaluation_ending_shows_scores() -> None:
    ending = describe_evaluation({"model": "models:/tiny/1", "data": "val", "samples": 1797, "top1": 1.0})
    assert ending == "models:/tiny/1 on 1,797 samples of val: top1 100.0 %"


def test_hand_off_running_elsewhere_has_no_scores(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tmp_path), [])
    assert "at work" in describe_training({"run": "runs/tiny", "at_work": True}, config)
