"""`mlflow server` in one process. MLflow's command starts uvicorn in a new interpreter, which imports all for seconds.

python -m tests.workers.mlflow_server OPTION…
"""

import os
import runpy
import sys
from collections.abc import Mapping

import mlflow.server
from mlflow.cli import cli


class RunHere:
    """In place of MLflow's subprocess: runs `python -m MODULE ARGUMENT…` until it ends."""

    def __init__(self, command: list[str], *, extra_env: Mapping[str, str], **_: object) -> None:
        os.environ.update(extra_env)
        module, *arguments = command[2:]
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    def wait(self) -> None:
        """It has ended."""


if __name__ == "__main__":
    mlflow.server._exec_cmd = RunHere  # pyright: ignore[reportPrivateImportUsage]
    cli(["server", *sys.argv[1:]])
