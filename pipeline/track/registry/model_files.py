"""The files of a model version: how they are made, and how a copy is told from what was registered.

    model.json  model.safetensors  [raw.safetensors]
        └─build──▶ MLmodel  served.py  requirements.txt  input_example.json  …  artifacts/ with the files above
                       └─digests──▶ {path: SHA-256} ──tags of the version──▶ faults(…, a copy)

An MLflow model from code: nothing in it is a pickle. Its code is covered by the digests, too. A file in the place of
Python's folder of byte code keeps that from being written beside the code, and from being read there.
"""

import hashlib
import importlib.metadata
import io
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property
from PIL import Image

from pipeline import files
from pipeline.config import ClassificationConfig, DetrConfig, MaskRcnnConfig, SemanticFpnConfig, TaskConfig
from pipeline.errors import InputError
from pipeline.track.model_card import CARD, ModelCard
from pipeline.track.serve.defaults import MIN_SCORE, TOP_K

ARTIFACTS = "artifacts"

_SERVED = Path(__file__).parents[2] / "serving" / "served.py"
_MLMODEL = "MLmodel"
_BYTE_CODE = "__pycache__"
_NO_FILE = "is a link, or something else that is no file"
_TOO_LARGE = "is larger than the whole version"
_CLASSES = {
    "label": "string",
    "score": "double",
    "labels": Array("string"),
    "scores": Array("double"),
}
_MAPS = {
    "mask": "string",  # base64: of bytes MLflow's server makes lines of 76 letters
    "labels": Array("string"),
    "values": Array("long"),
    "shares": Array("double"),
}
_BOXES = {
    "boxes": Array(Array("double")),
    "labels": Array("string"),
    "scores": Array("double"),
}
_RUN_LENGTHS = Object([Property("size", Array("long")), Property("counts", "string")])


class FileMismatch(NamedTuple):
    """A file that differs from what was registered."""

    file: str
    registered: str | None
    """SHA-256; None for a file that does not belong there."""
    found: str | None
    """SHA-256, or what it is instead of a file; None for a file that is missing."""

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.file} is missing, {self.registered} was registered"
        found = self.found if self.found in (_NO_FILE, _TOO_LARGE) else f"has SHA-256 {self.found}"
        return f"{self.file} {found}, but {self.registered or 'no such file'} was registered"

    @property
    def is_no_file(self) -> bool:
        return self.found == _NO_FILE

    @property
    def is_byte_code(self) -> bool:
        """Whether Python may have left it beside the code of a version that was opened where it lies."""
        return self.registered is None and self.file.startswith(f"{_BYTE_CODE}/")


def build(entry: Path, card: ModelCard, folder: Path, model: Model) -> None:
    """Make a model folder of an entry, which shares its files by hard links where the file system has them."""
    import mlflow.pyfunc  # seconds, for nothing in commands that only read
    import pandas

    names = [CARD, *card.sha256]
    with tempfile.TemporaryDirectory() as scratch:
        # MLflow copies artifacts twice and these are large: it gets empty files for them, and never opens one.
        empty = {name: Path(scratch) / name for name in names}
        for path in empty.values():
            path.touch()
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(_SERVED),
            artifacts={name: str(path) for name, path in empty.items()},
            mlflow_model=model,
            signature=_signature(card.task),
            input_example=pandas.DataFrame({"image": [example(card.image.size)]}),
            pip_requirements=_requirements(card.task),
        )
    for name in names:
        (folder / ARTIFACTS / name).unlink()
        files.link(entry / name, folder / ARTIFACTS / name)
    (folder / _BYTE_CODE).write_text("This file keeps Python from writing byte code here, and from running any.\n")
    model.model_size_bytes = size(folder)
    model.save(folder / _MLMODEL)


def check(entry: Path, card: ModelCard) -> None:
    """Raises InputError for weights that are not those which training saved."""
    for name, expected in card.sha256.items():
        found = sha256(entry / name) if (entry / name).exists() else "missing"
        if found != expected:
            raise InputError(
                f"{entry / name}: SHA-256 {found}, but {CARD} beside it says {expected}: the file was damaged after "
                "it was saved; remove the folder, and register from another checkpoint"
            )


def digests(folder: Path, most_bytes: float = math.inf) -> dict[str, str]:
    """Returns the SHA-256 by path of each file in a folder, and for all else but folders what it is.

    Files of more than `most_bytes` are not read: one with holes can be larger than any disk. Raises OSError, also for a
    folder that cannot be listed.
    """
    return {
        path.relative_to(folder).as_posix(): _digest(path, most_bytes)
        for path in sorted(_entries(folder))
        if path.is_symlink() or not path.is_dir()
    }


def _digest(path: Path, most_bytes: float) -> str:
    if path.is_symlink() or not path.is_file():
        return _NO_FILE
    return sha256(path) if path.stat().st_size <= most_bytes else _TOO_LARGE


def mismatches(registered: Mapping[str, str], folder: Path, num_bytes: int = 0) -> list[FileMismatch]:
    """Returns what differs in a folder from the digests, by path, of a version of `num_bytes` (0: not known)."""
    found = digests(folder, num_bytes or math.inf)
    names = sorted(registered.keys() | found.keys())
    rows = [FileMismatch(name, registered.get(name), found.get(name)) for name in names]
    return [row for row in rows if row.registered != row.found]


def size(folder: Path) -> int:
    """In bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def example(image_size: int) -> bytes:
    """A grey PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (image_size, image_size), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def _entries(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in (*folders, *names))


def _signature(task: TaskConfig) -> ModelSignature:
    """Of what served.py answers."""
    columns: dict[str, Any]
    if isinstance(task, ClassificationConfig):
        columns, params = _CLASSES, [ParamSpec("top_k", "long", TOP_K)]
    elif isinstance(task, SemanticFpnConfig):
        columns, params = _MAPS, []
    else:
        columns, params = _BOXES, [ParamSpec("min_score", "double", MIN_SCORE)]
        if isinstance(task, MaskRcnnConfig):
            columns = {**_BOXES, "segmentations": Array(_RUN_LENGTHS)}
    outputs = Schema([ColSpec(kind, name) for name, kind in columns.items()])
    images = Schema([ColSpec("binary", "image")])
    return ModelSignature(images, outputs, ParamSchema(params)) if params else ModelSignature(images, outputs)


def _requirements(task: TaskConfig) -> list[str]:
    """What served.py needs beside this project, which is not looked up by name: any package could own it."""
    packages = [
        *("mlflow", "numpy", "pandas", "pillow", "pycocotools", "pydantic", "pyyaml"),
        *("safetensors", "timm", "torch", "torchvision"),
        *(("scipy", "transformers") if isinstance(task, DetrConfig) else ()),
    ]
    return [f"{package}=={importlib.metadata.version(package)}" for package in packages]
