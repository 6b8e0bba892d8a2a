"""The model registry: checkpoints in as numbered versions, verified folders out.

A version is an MLflow model from code (nothing pickled) whose artifacts are model.safetensors and model.json. Its
tags hold the SHA-256 of both, so that the database vouches for the files.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import shutil
import tempfile
from pathlib import Path

import mlflow.artifacts
import mlflow.pyfunc
import pandas
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema
from PIL import Image
from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.track.card import CARD, WEIGHTS, Card

CANDIDATE = "candidate"

_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("binary", "image")]),
    outputs=Schema([ColSpec("string", "label"), ColSpec("double", "score")]),
)


@dataclasses.dataclass(frozen=True)
class Version:
    """A registered version in a local folder whose files match their digests."""

    uri: str  # models:/NAME/VERSION, never an alias
    folder: Path
    card: Card

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS


def register(name: str, weights: Path, card: Card, *, run_id: str, step: int) -> str:
    """Register a safetensors file as the next version of `name`, point @candidate at it and return its URI.

    Belongs inside the MLflow run `run_id` that made it.
    """
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        shutil.copyfile(weights, staged / WEIGHTS)
        card.write(staged)
        digests = {f"sha256.{file}": _sha256(staged / file) for file in (WEIGHTS, CARD)}
        logged = mlflow.pyfunc.log_model(
            name="model",  # of the run's logged model; stricter rules hold for it than for registered ones
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={file: str(staged / file) for file in (WEIGHTS, CARD)},
            signature=_SIGNATURE,
            input_example=pandas.DataFrame({"image": [_grey_image(card.image.size)]}),
            pip_requirements=_requirements(),
            registered_model_name=name,
            step=step,
        )
    version = str(logged.registered_model_version)
    client = MlflowClient()
    tags = {**digests, "run_id": run_id, "step": step, **card.lineage}
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, str(value))
    client.set_registered_model_alias(name, CANDIDATE, version)
    return f"models:/{name}/{version}"


def fetch(uri: str, folder: Path) -> Version:
    """Copy models:/NAME/VERSION or models:/NAME@ALIAS into `folder` and check it against its tags.

    Raises InputError for a URI that names no version, and where a file's digest differs from the registered one.
    """
    client = MlflowClient()
    name, version = _resolve(client, uri)
    tags = client.get_model_version(name, version).tags
    pinned = f"models:/{name}/{version}"
    root = Path(mlflow.artifacts.download_artifacts(pinned, dst_path=str(folder))) / "artifacts"
    for file in (WEIGHTS, CARD):
        registered, found = tags.get(f"sha256.{file}"), _sha256(root / file)
        if registered != found:
            raise InputError(
                f"{pinned}: {file} has SHA-256 {found}, but {registered} was registered: "
                "the artifact was changed; do not use it, register the checkpoint again"
            )
    try:
        return Version(pinned, root, Card.read(root))
    except ValidationError as error:
        raise InputError(f"{pinned}: {CARD} is not one that this version reads: {error.errors()[0]['msg']}") from error


def _resolve(client: MlflowClient, uri: str) -> tuple[str, str]:
    reference = uri.removeprefix("models:/")
    alias = reference.partition("@")
    number = reference.partition("/")
    try:
        if not uri.startswith("models:/"):
            raise InputError(f"{uri}: a registered model is models:/NAME/VERSION or models:/NAME@ALIAS")
        if alias[2]:
            return alias[0], str(client.get_model_version_by_alias(alias[0], alias[2]).version)
        if number[2].isdigit():
            return number[0], str(client.get_model_version(number[0], number[2]).version)
    except MlflowException as error:
        raise InputError(f"{uri}: {error.message}{_known(client)}") from error
    raise InputError(f"{uri}: names no version: give models:/NAME/VERSION or models:/NAME@ALIAS")


def _known(client: MlflowClient) -> str:
    try:
        models = client.search_registered_models(max_results=20)
    except MlflowException:  # the server, rather than the name, is the trouble
        return ""
    return f" (registered models: {', '.join(model.name for model in models) or 'none'})"


def _requirements() -> list[str]:
    """What served.py needs beside this project, which is not looked up by name: any package could own it."""
    packages = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "safetensors", "timm", "torch")
    return [f"{package}=={importlib.metadata.version(package)}" for package in packages]


def _grey_image(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
