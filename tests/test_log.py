"""Log lines have one format on all ranks, and the options of the commands say which are shown."""

import argparse
import logging
import re

import pytest

from pipeline import log

STAMP = r"\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2}"
ours = logging.getLogger("pipeline.tests")


@pytest.fixture(autouse=True)
def real_format(plain_log: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    log.configure()


def parse(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    log.add_options(parser)
    parser.parse_args(arguments)


def test_log_line_has_time_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    ours.info("step 1/20")
    ours.warning("disk is almost full")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{STAMP} INFO step 1/20", first)
    assert re.fullmatch(rf"{STAMP} WARNING disk is almost full", second)


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_log_line_names_rank_if_there_are_several(
    names: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rank, world_size = names
    monkeypatch.setenv(rank, "3")
    monkeypatch.setenv(world_size, "8")
    ours.info("step 1/20")
    assert re.fullmatch(rf"{STAMP} INFO rank 3: step 1/20\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], ["INFO", "WARNING", "ERROR"]),
        (["--quiet"], ["WARNING", "ERROR"]),
        (["--verbose"], ["DEBUG", "INFO", "WARNING", "ERROR"]),
    ],
)
def test_quiet_and_verbose_select_log_levels(
    options: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parse(*options)
    for level in ("debug", "info", "warning", "error"):
        getattr(ours, level)("text")
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == shown


def test_quiet_and_verbose_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--quiet", "--verbose")
    assert "not allowed with" in capsys.readouterr().err
