"""The batch scripts, without a cluster."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline.cluster import script
from pipeline.cluster.slurm import parse_seconds
from pipeline.config import ClusterConfig, Config, EnvironmentConfig, load_config
from pipeline.errors import InputError
from tests.conftest import write_config
from tests.ranks import ROOT


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_shipped_sbatch_scripts_match_the_template(program: str) -> None:
    """Written by `python -c "from pipeline.cluster.script import ready; print(ready('pretrain'), end='')"`."""
    text = (ROOT / f"slurm/{program}.sbatch").read_text()
    assert text == script.render_ready_script(program)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_batch_script_requests_nodes_cpus_and_gpus() -> None:
    cluster = ClusterConfig(nodes=4, min_nodes=2, spares=1, cpus_per_rank=12, partition="gpu", time="2-00:00:00")
    lines = script.render_batch_script(cluster, name="big", log="log", code="/code", command="--config x").splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    wanted = "--nodes=2-5 --cpus-per-task=96 --gpus-per-node=8 --partition=gpu --time=2-00:00:00 --signal=B:USR1@180"
    assert set(wanted.split()) | {"--requeue", "--no-kill"} <= set(options)
    assert lines[0] == "#!/bin/bash"
    assert lines[-1] == "exec python /code/launch/supervise.py --config x"


CONDA = """
PS1="($NAME_OF_NOTHING) $PS1"
test -n "$NAME_OF_NOTHING" | grep -q something
export PATH="{bin}:$PATH"
[[ -n "$NAME_OF_NOTHING" ]] && export NOTHING=1
"""
"""As in the scripts of conda and its packages: variables that are not set, and tests that fail."""


def run_script(activate: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a batch script in bash. Its `python` is a program in folder/bin that prints its arguments."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    cluster = ClusterConfig(environment=EnvironmentConfig(activate=activate))
    text = script.render_batch_script(
        cluster, name="x", log="log", code="'/the code'", command="--config 'a b'", python="python"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("PS1", "NAME_OF_NOTHING")}
    return subprocess.run(["bash"], input=text, env=environ, capture_output=True, text=True)


def test_activation_may_use_unset_variables_and_failing_commands(tmp_path: Path) -> None:
    activation = tmp_path / "activate"
    activation.write_text(CONDA.format(bin=tmp_path / "bin"))
    done = run_script(f"source {activation}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["/the code", "/the code/launch/supervise.py", "--config", "a b"]
    assert f"exit status 1, python is {tmp_path}/bin/python" in done.stderr


def test_unset_variable_fails_after_activation(tmp_path: Path) -> None:
    text = script.render_batch_script(
        ClusterConfig(environment=EnvironmentConfig(activate="true")),
        name="x",
        log="log",
        code="/c",
        command="$NAME_OF_NOTHING",
    )
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True)
    assert done.returncode != 0
    assert "NAME_OF_NOTHING: unbound variable" in done.stderr


def test_log_path_with_spaces_is_quoted() -> None:
    text = script.render_batch_script(ClusterConfig(), name="x", log="/two words/it's/log", code="/c", command="")
    (line,) = re.findall(r"^#SBATCH (--output.*)$", text, re.MULTILINE)
    assert shlex.split(line) == ["--output=/two words/it's/log"]


@pytest.mark.parametrize("name", ["100%j", "a:b", "a\\b"])
def test_run_root_that_slurm_would_misread_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"run\.root .* under SLURM it may contain no %") as refused:
        script.check_batch_script(with_root(f"/runs/{name}", tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a\nb", "a\x7f"])
def test_run_root_with_control_characters_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"run\.root: .* without control characters"):
        with_root(f"/runs/{name}", tmp_path)


def test_run_root_with_spaces_is_accepted(tmp_path: Path) -> None:
    script.check_batch_script(with_root("/runs of/two words", tmp_path))


def with_root(root: str, folder: Path) -> Config:
    return load_config(write_config(folder, folder), [f"run.root={json.dumps(root)}", "cluster.gpus_per_node=1"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("90", 90 * 60), ("1:30", 90), ("2:00:05", 7205), ("1-0", 86400), ("1-12:30", 131400)],
        *[("2-00:00:01", 172801), ("UNLIMITED", None), ("NOT_SET", None)],
    ],
)
def test_slurm_time_limits_are_parsed(text: str, expected: int | None) -> None:
    assert parse_seconds(text) == expected
