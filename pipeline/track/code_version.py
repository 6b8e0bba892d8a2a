"""Which code runs, and copies of it for jobs that start later, when the checkout may have moved on.

    checkout ──snapshot──▶ FOLDER/launch/ pipeline/ pvt/ configs/ pyproject.toml
       └──────git────────▶ FOLDER/revision.json  [uncommitted.patch]

Code that runs from a snapshot says what its revision.json says.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pipeline import files

ROOT = Path(__file__).resolve().parents[2]
"""Of the code that is running: a checkout, a snapshot, or where packages are installed."""
CODE = ("launch", "pipeline", "pvt", "configs", "pyproject.toml")
"""What is needed to run."""
REVISION, PATCH = "revision.json", "uncommitted.patch"


def code_revision() -> dict[str, str]:
    """Tags that name the code: commit, and whether CODE differed from it, new files included. Empty where nothing is
    known of it."""
    if (noted := ROOT / REVISION).exists():
        return json.loads(noted.read_text())
    if not _files_of_checkout():
        return {}
    dirty = bool(_git("status", "--porcelain", "--", *CODE))
    return {"mlflow.source.git.commit": _git("rev-parse", "HEAD").strip(), "code.dirty": str(dirty).lower()}


def uncommitted() -> str:
    """Changes of CODE's tracked files against the last commit, as a patch. Empty where nothing is known of it."""
    if (ROOT / REVISION).exists():
        patch = ROOT / PATCH
        return patch.read_text() if patch.exists() else ""
    return _git("diff", "HEAD", "--", *CODE) if _files_of_checkout() else ""


def snapshot(folder: Path, *, diff: bool = False) -> None:
    """Copy CODE as it is now, uncommitted changes and new files included, without what git ignores. What `folder` held
    before is replaced once the copy is whole. For one process at a time.

    `diff`: keep the uncommitted changes as a patch, too, for tracking.log_diff. They can hold secrets.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in _files_of_checkout() or _files():
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, partial / path)
    (partial / REVISION).write_text(json.dumps(code_revision()) + "\n")
    if diff:
        files.write(partial / PATCH, uncommitted().encode(), private=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _files_of_checkout() -> list[Path]:
    """Paths below ROOT. None outside a checkout, also where ROOT lies in one of something else, as environments may."""
    try:
        _git("cat-file", "-e", "HEAD:./pyproject.toml")
        listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [Path(name) for name in listed.split("\0") if (ROOT / name).is_file()]


def _files() -> Iterator[Path]:
    for name in CODE:
        for path in [ROOT / name, *(ROOT / name).rglob("*")]:
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
