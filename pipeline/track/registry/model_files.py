"""The files of a model version: how they are made, and how a copy is compared with what was registered.

    model.json  model.safetensors  [raw.safetensors]
        └─build──▶ MLmodel  served.py  requirements.txt  input_example.json  …  artifacts/ with the files above
                       └─digests──▶ {path: SHA-256} ──tags of the version──▶ mismatches(…, a copy)

The version is an MLflow model from code: nothing in it is a pickle. The digests cover its code, too. A file named
__pycache__, where Python would make a folder, prevents that byte code is written beside the code or read there.
"""

import importlib.metadata
import io
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, Schema
from PIL import Image

from pipeline import files
from pipeline.config import TaskConfig
from pipeline.errors import InputError
from pipeline.track.model_card import CARD, ModelCard

ARTIFACTS = "artifacts"

_SERVED = Path(__file__).parents[2] / "serving" / "served.py"
_MLMODEL = "MLmodel"
_BYTE_CODE = "__pycache__"
_NO_FILE = "is a link, or something else that is no file"
_TOO_LARGE = "is larger than the whole version"


class FileMismatch(NamedTuple):
    """A file that differs from the registered one."""

    file: str
    registered: str | None
    """SHA-256; None for a file that was not registered."""
    found: str | None
    """SHA-256, or a phrase for what is no file or too large; None for a file that is missing."""

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.file} is missing, {self.registered} was registered"
        found = self.found
        if found not in (_NO_FILE, _TOO_LARGE):
            found = f"has SHA-256 {found}"
        return f"{self.file} {found}, but {self.registered or 'no such file'} was registered"

    @property
    def is_no_file(self) -> bool:
        """Whether a link, a device or the like was found instead of a file."""
        return self.found == _NO_FILE

    @property
    def is_byte_code(self) -> bool:
        """Whether Python may have written it beside the code of a version that was opened in the store itself."""
        return self.registered is None and self.file.startswith(f"{_BYTE_CODE}/")


def build(entry: Path, card: ModelCard, folder: Path, model: Model) -> None:
    """Makes a model folder of an entry, which shares its files by hard links where the file system has them."""
    # These take seconds to import, and commands that only read do not need them.
    import mlflow.pyfunc
    import pandas

    names = [CARD, *card.sha256]
    with tempfile.TemporaryDirectory() as scratch:
        # MLflow copies artifacts twice and these are large: it gets empty files for them, and never opens one.
        empty = {name: f"{scratch}/{name}" for name in names}
        for path in empty.values():
            Path(path).touch()
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(_SERVED),
            artifacts=empty,
            mlflow_model=model,
            signature=_make_signature(card.task),
            input_example=pandas.DataFrame({"image": [example(card.image.size)]}),
            pip_requirements=_list_requirements(card.task),
        )
    # The empty files are replaced by the real ones.
    for name in names:
        artifact = folder / ARTIFACTS / name
        artifact.unlink()
        files.link(entry / name, artifact)
    (folder / _BYTE_CODE).write_text("This file keeps Python from writing byte code here, and from running any.\n")
    # MLflow has counted the empty files.
    model.model_size_bytes = size(folder)
    model.save(folder / _MLMODEL)


def check(entry: Path, card: ModelCard) -> None:
    """Raises InputError for weights that differ from those that training saved."""
    for name, expected in card.sha256.items():
        path = entry / name
        found = files.sha256(path) if path.exists() else "missing"
        if found != expected:
            raise InputError(
                f"{path}: SHA-256 {found}, but {CARD} beside it says {expected}: the file was damaged after "
                "it was saved; remove the folder, and register from another checkpoint"
            )


def digests(folder: Path, most_bytes: float = math.inf) -> dict[str, str]:
    """Returns the SHA-256 of each file in a folder by its path; for links and the like, a phrase instead.

    Files of more than `most_bytes` are not read. Raises OSError, also for a folder that cannot be listed.
    """
    return {
        path.relative_to(folder).as_posix(): _compute_digest(path, most_bytes)
        for path in sorted(_list_entries(folder))
        if path.is_symlink() or not path.is_dir()
    }


def _compute_digest(path: Path, most_bytes: float) -> str:
    if path.is_symlink() or not path.is_file():
        return _NO_FILE
    # A file with holes can be larger than any disk, and would take as long to read.
    if path.stat().st_size > most_bytes:
        return _TOO_LARGE
    return files.sha256(path)


def mismatches(registered: Mapping[str, str], folder: Path, num_bytes: int = 0) -> list[FileMismatch]:
    """Compares a folder with a version's digests by path. `num_bytes`: the version's size, 0 if unknown."""
    found = digests(folder, num_bytes or math.inf)
    names = sorted(registered.keys() | found.keys())
    rows = [FileMismatch(name, registered.get(name), found.get(name)) for name in names]
    return [row for row in rows if row.registered != row.found]


def size(folder: Path) -> int:
    """Returns the size of a folder's files in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def example(image_size: int) -> bytes:
    """Returns a grey PNG, the input example of a version."""
    buffer = io.BytesIO()
    Image.new("RGB", (image_size, image_size), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def _list_entries(folder: Path) -> Iterator[Path]:
    # os.walk skips a folder that it cannot list, unless it gets a function that raises.
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        for name in (*folders, *names):
            yield Path(parent, name)


def _make_signature(task: TaskConfig) -> ModelSignature:
    """Returns the signature of what the served model takes and answers."""
    # MLflow runs the served code to save a model, so it is imported anyway; commands that only read do not need it.
    from pipeline.track.serve.served_model import SERVED

    served = SERVED[task.name]
    outputs = Schema([ColSpec(kind, name) for name, kind in served.columns.items()])
    params = ParamSchema(list(served.params)) if served.params else None
    # MLflow declares no default of None, and has one.
    return ModelSignature(Schema([ColSpec("binary", "image")]), outputs, params)  # pyright: ignore[reportArgumentType]


def _list_requirements(task: TaskConfig) -> list[str]:
    """Returns what the served code needs beside this project.

    The project is not among them: pip would look it up by its name, which any package on an index could have.
    """
    packages = [
        "mlflow",
        "numpy",
        "pandas",
        "pillow",
        "pycocotools",
        "pydantic",
        "pyyaml",
        "safetensors",
        "timm",
        "torch",
        "torchvision",
    ]
    packages += task.extra_packages
    return [f"{package}=={importlib.metadata.version(package)}" for package in packages]
