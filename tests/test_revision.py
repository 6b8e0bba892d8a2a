"""Which code runs: told by git in a checkout, and by what was noted in a snapshot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.track import code_version
from pipeline.track.code_version import code_revision, read_uncommitted, snapshot
from tests.ranks import ROOT

FILES = {
    "pyproject.toml": "[project]\n",
    "launch/start.py": "print('start')\n",
    "pipeline/gone.py": "",
    "pipeline/loop.py": "step = 1\n",
    "pvt/model.py": "",
    "configs/demo.yaml": "a: 1\n",
    "docs/page.md": "# Page\n",
    ".gitignore": "__pycache__/\n/runs/\n*.log\n",
}
NEEDED = FILES.keys() - {"docs/page.md", ".gitignore"}
KEY = "mlflow.source.git.commit"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the code, where it is taken to run from."""
    folder = tmp_path / "code"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(code_version, "ROOT", folder)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    return folder


@pytest.fixture
def checkout(folder: Path) -> Path:
    git(folder, "init", "-q")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path, what: str = "--all") -> str:
    git(folder, "add", what)
    git(folder, "commit", "-q", "-m", "change")
    return git(folder, "rev-parse", "HEAD").strip()


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_code_revision_is_the_commit_and_a_dirty_flag(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD").strip()
    (checkout / "docs/page.md").write_text("other\n")
    (checkout / "pipeline/a.log").touch()
    assert code_revision() == {KEY: head, "code.dirty": "false"}
    assert read_uncommitted() == ""
    (checkout / "pipeline/new.py").touch()
    assert code_revision() == {KEY: head, "code.dirty": "true"}
    (checkout / "pipeline/loop.py").write_text("step = 2\n")
    assert read_uncommitted() == git(checkout, "diff", "HEAD", "pipeline/loop.py")
    assert "+step = 2" in read_uncommitted()


def test_snapshot_copies_the_working_tree_and_its_revision(checkout: Path, tmp_path: Path) -> None:
    (checkout / "pipeline/gone.py").unlink()
    (checkout / "pipeline/loop.py").write_text("step = 2\n")
    (checkout / "pipeline/new.py").write_text("new = 1\n")
    (checkout / "pipeline/a.log").touch()
    (checkout / "launch/start.py").chmod(0o755)
    (checkout / "runs").mkdir()
    then = code_revision()
    snapshot(tmp_path / "copy")
    expected = {name: FILES[name] for name in NEEDED - {"pipeline/gone.py"}}
    changed = {"pipeline/loop.py": "step = 2\n", "pipeline/new.py": "new = 1\n"}
    assert texts(tmp_path / "copy") == {**expected, **changed, "revision.json": json.dumps(then) + "\n"}
    assert os.access(tmp_path / "copy/launch/start.py", os.X_OK)


@pytest.mark.parametrize("diff", [False, True])
def test_code_revision_in_a_snapshot_matches_the_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, diff: bool
) -> None:
    (checkout / "pipeline/loop.py").write_text("step = 2\n")
    copy, again = checkout / "runs/tiny/slurm/code", checkout / "runs/other/slurm/code"
    then, patch = code_revision(), read_uncommitted()
    snapshot(copy, diff=diff)
    assert commit(checkout) != then[KEY]
    assert "step = 2" in patch
    monkeypatch.setattr(code_version, "ROOT", copy)  # which lies in a checkout that has moved on
    assert code_revision() == then
    assert read_uncommitted() == (patch if diff else "")
    (copy / "pipeline/__pycache__").mkdir()
    (copy / "pipeline/__pycache__/loop.pyc").touch()
    snapshot(again, diff=diff)
    (copy / "pipeline/__pycache__/loop.pyc").unlink()
    assert texts(again) == texts(copy)


def test_snapshot_replaces_a_previous_one(checkout: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    snapshot(copy)
    left = [copy.with_name(".copy.partial") / "pvt/left.py", copy.with_name(".copy.old") / "pvt/left.py"]
    for path in left:  # by one that was killed
        path.parent.mkdir(parents=True)
        path.touch()
    (checkout / "pvt/model.py").rename(checkout / "pvt/other.py")
    snapshot(copy)
    assert [path.name for path in (copy / "pvt").iterdir()] == ["other.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "copy"]


@pytest.mark.parametrize("where", ["no checkout", "a checkout of something else", "a checkout without a commit"])
def test_code_revision_is_empty_outside_a_checkout(folder: Path, tmp_path: Path, where: str) -> None:
    if where == "a checkout of something else":
        (tmp_path / "other.txt").touch()
        git(tmp_path, "init", "-q")
        commit(tmp_path, "other.txt")
    elif where == "a checkout without a commit":
        git(folder, "init", "-q")
    assert code_revision() == {}
    assert read_uncommitted() == ""
    (folder / "pvt/__pycache__").mkdir()
    (folder / "pvt/__pycache__/model.pyc").touch()
    snapshot(tmp_path / "copy", diff=True)
    assert set(texts(tmp_path / "copy")) == {*NEEDED, "revision.json", "uncommitted.patch"}
    assert json.loads((tmp_path / "copy/revision.json").read_text()) == {}


def test_code_runs_from_a_snapshot(tmp_path: Path) -> None:
    snapshot(tmp_path / "copy")
    code = "import json, pipeline.track.code_version as r; print(json.dumps([r.__file__, r.code_revision()]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "copy")}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert json.loads(told.stdout) == [str(tmp_path / "copy/pipeline/track/code_version.py"), code_revision()]
    command = [sys.executable, str(tmp_path / "copy/launch/registry.py"), "--help"]
    assert (
        "lineage"
        in subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    )
