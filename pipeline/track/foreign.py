"""Weights that others have published, as a registered version.

    .pth of the public repository ─┐
    .safetensors file             ─┼─read──▶ tensors in our names ──fit──▶ the architecture's, one by one ──▶ registry
    Transformers' folder          ─┘

Its lineage ends at the file: the version's run, in the experiment "import", holds the file's path and SHA-256. The same
import again is the same run and the same version.
"""

import argparse
import hashlib
import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

from pipeline import config
from pipeline.errors import InputError
from pipeline.shards.retry import redact
from pipeline.track import package, registry, server
from pipeline.track.card import WEIGHTS, Card
from pipeline.track.revision import code_revision
from pvt.convert import from_any
from pvt.create import create_model

EXPERIMENT = "import"
_NAMED = 5
"""Tensors that a message names."""


def import_weights(
    client: MlflowClient,
    source: Path,
    name: str,
    *,
    model: str,
    image_size: int = 224,
    classes: list[str] | None = None,
) -> str:
    """Register the weights in `source` (a file, or a folder that Transformers wrote) as the next version of `name`.

    Without `classes` they are called "0", "1", … Returns the version's URI.
    Raises InputError for what cannot be read without running code from it and for weights that are not exactly those of
    the architecture, and Unreachable.
    """
    file = _file_in(source)
    tensors = _fit(read(file), file, model, image_size)
    num_classes = len(tensors[_head(model)])
    classes = classes or [str(index) for index in range(num_classes)]
    if len(classes) != num_classes:
        raise InputError(f"{file}: has a head of {num_classes} classes, but {len(classes)} names were given")
    digest = package.sha256(file)
    settings = {"model": config.Model(name=model), "image": config.Image(size=image_size)}
    fingerprint = config.fingerprint({key: value.model_dump(mode="json") for key, value in settings.items()})
    uuid = hashlib.sha256(json.dumps([name, digest, fingerprint, classes]).encode()).hexdigest()[:32]
    revision = code_revision().get("mlflow.source.git.commit")
    with tempfile.TemporaryDirectory(prefix="pvt-import-") as folder:
        entry = Path(folder)
        safetensors.torch.save_file(tensors, entry / WEIGHTS)
        card = Card(
            task=config.Classification(),
            **settings,
            eval_batch_size=config.Evaluate().batch_size,
            classes=classes,
            metrics={},
            sha256={WEIGHTS: package.sha256(entry / WEIGHTS)},
            lineage={
                "run": uuid,
                "step": "0",
                "config": fingerprint,
                **({"code": revision} if revision else {}),
                "source": f"{file.name} sha256:{digest}",
            },
        )
        card.write(entry)
        return _register(client, name, entry, {"source.path": str(source.absolute()), "source.sha256": digest}, uuid)


def read(file: Path) -> dict[str, Tensor]:
    """A file's tensors under our names; one that shows neither foreign layout keeps its own. No code in it is run."""
    try:
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            # Training checkpoints hold their command line, too, as this class, which does nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # The rest of torch's message advises to open the file without this protection.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is damaged or of another kind"
        raise InputError(
            f"{file}: is no file of tensors alone: {reason}; nothing in it was run: get the weights as .safetensors, "
            "or as a .pth with a state dict and no more"
        ) from error
    except Exception as error:  # anything, from readers that are given any bytes
        raise InputError(f"{file}: cannot be read as weights: {_short(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, Mapping) else []
    if not isinstance(state, Mapping) or not state or wrong:
        found = f"entries that are no tensors: {_some(wrong)}" if wrong else f"a {type(state).__name__}"
        raise InputError(f"{file}: a mapping of names to tensors was expected, found {found}")
    try:
        return from_any(state)
    except ValueError as error:
        raise InputError(f"{file}: {_short(error)}") from error


def _file_in(source: Path) -> Path:
    if not source.is_dir():
        if not source.is_file():
            raise InputError(f"{source}: no such file or folder")
        return source
    file = source / "model.safetensors"
    try:
        kind = json.loads((source / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{source}: has no config.json that can be read, so it is no Transformers model") from error
    if kind != "pvt":
        raise InputError(f"{source / 'config.json'}: model_type is {kind!r}, but only 'pvt', PVT v1, can be imported")
    if not file.is_file():
        raise InputError(f"{source}: has no model.safetensors; save the model with Transformers again, in one file")
    return file


def _fit(tensors: dict[str, Tensor], file: Path, model: str, image_size: int) -> dict[str, Tensor]:
    """The tensors in fp32, once they are those of the architecture, each with its shape."""
    head = _head(model)
    if head not in tensors:
        raise InputError(f"{file}: has no head ({head}): a classifier is needed; there are {_some(tensors)}")
    try:
        with torch.device("meta"):
            expected = create_model(model, image_size, num_classes=len(tensors[head])).state_dict()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--model {model} cannot be built for {image_size} px: {error}") from error
    faults = {
        "missing": [key for key in expected if key not in tensors],
        "unknown": [key for key in tensors if key not in expected],
        "other shapes": [
            f"{key} {list(tensors[key].shape)} instead of {list(expected[key].shape)}"
            for key in expected
            if key in tensors and tensors[key].shape != expected[key].shape
        ],
        "not finite": [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()],
    }
    if any(faults.values()):
        found = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in faults.items() if keys)
        raise InputError(f"{file}: is not a {model} for {image_size} px: {found}: check --model and --image-size")
    return {key: tensors[key].to(expected[key].dtype).contiguous() for key in expected}


def _head(model: str) -> str:
    """The name of the classifier's weight."""
    described = timm.get_pretrained_cfg(model)
    return f"{described.classifier if described and isinstance(described.classifier, str) else 'head'}.weight"


def _register(client: MlflowClient, name: str, entry: Path, source: dict[str, str], uuid: str) -> str:
    with server.reaching(f"models:/{name}"):
        experiment_id = server.find_experiment(client, EXPERIMENT)
        found = client.search_runs([experiment_id], f"tags.`run.uuid` = '{uuid}'", max_results=1)
        tags = {"run.uuid": uuid, **{key: redact(value) for key, value in source.items()}, **code_revision()}
        run = found[0] if found else client.create_run(experiment_id, run_name=f"import-{name}", tags=tags)
    run_id, status = run.info.run_id, "FAILED"
    try:
        uri = registry.register(client, name, entry, experiment_id=experiment_id, run_id=run_id)
        status = "FINISHED"
    finally:
        with server.reaching(f"models:/{name}"):
            client.set_terminated(run_id, status)
    return uri


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _short(error: Exception) -> str:
    """Errors of conversion name every tensor."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 400 else f"{text[:400]} …"
