"""Commands run in this process: they start in no time, and do the same."""

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from tests.ranks import ROOT


def run(
    main: Callable[[], dict[str, Any] | None], *arguments: object, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs a command's `main` in `folder` as launch/ does; returns its exit code and what it wrote."""
    words, out, err = ["command", *map(str, arguments)], io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        patch.chdir(folder)
        patch.setattr(cli.os, "_exit", sys.exit)  # as after bad input
        with pytest.raises(SystemExit) as ending:
            cli.run(main)
    return subprocess.CompletedProcess(words, int(ending.value.code or 0), out.getvalue(), err.getvalue())
