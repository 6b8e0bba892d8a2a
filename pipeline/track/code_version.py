"""The version of the running code, and snapshots of it for jobs that start later, when the checkout may have changed.

    checkout ──snapshot──▶ FOLDER/launch/ pipeline/ pvt/ configs/ pyproject.toml
       └──────git────────▶ FOLDER/revision.json  [uncommitted.patch]

Code that runs from a snapshot reports what the snapshot's revision.json holds.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pipeline import files

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the running code: a checkout, a snapshot, or the place where packages are installed."""
CODE = ("launch", "pipeline", "pvt", "configs", "pyproject.toml")
"""The files and folders below ROOT that are needed to run."""
REVISION = "revision.json"
PATCH = "uncommitted.patch"


def code_revision() -> dict[str, str]:
    """Returns tags that name the code: its commit, and whether CODE differed from that, new files included.

    Empty where the revision is unknown.
    """
    recorded = ROOT / REVISION
    if recorded.exists():
        return json.loads(recorded.read_text())
    if not _list_checkout():
        return {}
    dirty = bool(_git("status", "--porcelain", "--", *CODE))
    return {
        "mlflow.source.git.commit": _git("rev-parse", "HEAD").strip(),
        "code.dirty": str(dirty).lower(),
    }


def read_uncommitted() -> str:
    """Returns the changes of CODE's tracked files against the last commit, as a patch.

    Empty where the revision is unknown.
    """
    if (ROOT / REVISION).exists():
        patch = ROOT / PATCH
        return patch.read_text() if patch.exists() else ""
    if not _list_checkout():
        return ""
    return _git("diff", "HEAD", "--", *CODE)


def snapshot(folder: Path, *, diff: bool = False) -> None:
    """Copies CODE as it is now, with uncommitted changes and new files but without what git ignores, to `folder`.

    An earlier snapshot in `folder` is replaced once the copy is complete. Only one process may do this at a time.

    `diff`: also keep the uncommitted changes as a patch, for tracking.log_diff. They can hold secrets.
    """
    partial = files.partial_of(folder)
    old = folder.with_name(f".{folder.name}.old")
    # A process that was killed may have left either.
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in _list_checkout() or _list_files():
        copy = partial / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy)
    (partial / REVISION).write_text(json.dumps(code_revision()) + "\n")
    if diff:
        files.write(partial / PATCH, read_uncommitted().encode(), private=True)
    # Jobs that start in between find one of the two, or none for an instant, but never half a copy.
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _list_checkout() -> list[Path]:
    """Returns the paths, below ROOT, of the files that git knows or does not ignore.

    Empty outside a checkout of this project, also where ROOT lies inside another project's, as environments may.
    """
    try:
        # Fails unless the repository around ROOT has ROOT's own pyproject.toml.
        _git("cat-file", "-e", "HEAD:./pyproject.toml")
        listing = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [Path(name) for name in listing.split("\0") if (ROOT / name).is_file()]


def _list_files() -> Iterator[Path]:
    for name in CODE:
        top = ROOT / name
        for path in [top, *top.rglob("*")]:
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT)


def _git(*arguments: str) -> str:
    process = subprocess.run(
        ["git", *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return process.stdout
