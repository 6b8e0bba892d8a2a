"""Weights that others have published, as a registered version.

    .pth of the public repository ─┐
    .safetensors file             ─┼─read──▶ tensors in our names ──fit──▶ the architecture's, one by one ──▶ registry
    Transformers' folder          ─┘  │
                                      └ an entry of a training checkpoint, without the names of what was wrapped around

Its lineage ends at the file: the version's run, in the experiment "import", holds the file's path and SHA-256. The same
import again is the same run and the same version.
"""

import argparse
import hashlib
import json
import math
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

from pipeline.config import ClassificationConfig, EvaluateConfig, ImageConfig, ModelConfig, fingerprint
from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.track import tracking_server
from pipeline.track.code_version import code_revision
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import model_files, registry
from pvt.convert import from_any
from pvt.create import create_model

EXPERIMENT = "import"
_NAMED = 5
"""Tensors that a message names."""
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_ENTRIES = (*_AVERAGED, "state_dict", "model", "model_state_dict", "module")
"""Where training checkpoints hold weights. As in timm, their moving average comes first."""
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
"""What DistributedDataParallel, torch.compile, Lightning and dense networks put before each name, also several."""
_USUAL_PX = 224
_SHOWN = 200
"""Letters of a tensor's name, or of another one in a message."""
_MAX_CONFIG = 1 << 20
"""Bytes of a config.json."""
_MOST_SHARED = 2
"""How often on average a file's bytes may be part of several tensors, as tied weights are."""
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_DTYPES = _FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


class Weights(NamedTuple):
    tensors: dict[str, Tensor]
    """By our names."""
    entry: str | None
    """Where in the file they were, such as "model_ema"; None for a file of tensors alone."""
    skipped: list[str]
    """Everything else that was beside them."""


def _numpy_types() -> list[Any]:
    """What pickles of numpy's scalars and arrays of numbers name, by both of its module's names. They carry no code."""
    functions = (np._core.multiarray.scalar, np._core.multiarray._reconstruct)  # pyright: ignore[reportAttributeAccessIssue]
    named = [(each, f"numpy.{core}.multiarray.{each.__name__}") for core in ("core", "_core") for each in functions]
    kinds = [type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"]
    return [*named, np.dtype, np.ndarray, *kinds]


def import_weights(
    client: MlflowClient,
    source: Path,
    name: str,
    *,
    model: str,
    image_size: int | None = None,
    classes: list[str] | None = None,
    entry: str | None = None,
    sha256: str | None = None,
) -> str:
    """Register the weights in `source` (a file, or a folder that Transformers wrote) as the next version of `name`.

    Without `image_size` (pixels) it is that of the position embeddings. Without `classes` they are called "0", "1", …
    Weights without a head have none. `entry`: of a training checkpoint. `sha256`: what the file has to have, in hex.
    Returns the version's URI. Raises InputError for what cannot be read without running code from it and for weights
    that are not exactly those of the architecture, and Unreachable.
    """
    file = _file_in(source)
    digest = model_files.sha256(file)
    if sha256 and sha256.lower() != digest:
        raise InputError(f"--sha256 {sha256}: but {file} has {digest}: it is damaged, or another file: get it again")
    found = read(file, entry, _head(model))
    if image_size is None:
        image_size = _image_size(found.tensors, model)
    tensors = _fit(found.tensors, file, model, image_size)
    num_classes = _num_classes(tensors, model)
    classes = classes or [str(index) for index in range(num_classes)]
    if len(classes) != num_classes:
        raise InputError(f"{file}: has a head of {num_classes} classes, but {len(classes)} names were given")
    config = {"model": ModelConfig(name=model), "image": ImageConfig(size=image_size)}
    config_digest = fingerprint({key: value.model_dump(mode="json") for key, value in config.items()})
    chosen = [found.entry] if entry or (found.entry or "").startswith(_AVERAGED) else []
    uuid = hashlib.sha256(json.dumps([name, digest, config_digest, classes, *chosen]).encode()).hexdigest()[:32]
    _announce(found, file, image_size, num_classes)
    revision = code_revision().get("mlflow.source.git.commit")
    with tempfile.TemporaryDirectory(prefix="pvt-import-") as scratch:
        folder = Path(scratch)
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
        card = ModelCard(
            task=ClassificationConfig(),
            **config,
            eval_batch_size=EvaluateConfig().batch_size,
            classes=classes,
            metrics={},
            sha256={WEIGHTS: model_files.sha256(folder / WEIGHTS)},
            lineage={
                "run": uuid,
                "step": "0",
                "config": config_digest,
                **({"code": revision} if revision else {}),
                "source": f"{file.name} sha256:{digest}",
            },
        )
        card.write(folder)
        origin = {"source.path": str(source.absolute()), "source.sha256": digest, "source.entry": found.entry or "none"}
        return _register(client, name, folder, origin, uuid)


def read(file: Path, entry: str | None = None, head: str = "head.weight") -> Weights:
    """A file's tensors under our names; one that shows neither foreign layout keeps its own. No code in it is run.

    Raises InputError for what cannot be read so, and for an `entry` that the file does not have.
    """
    entry, state = _chosen(_load(file), entry, file)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    _require_plain(tensors, file)
    tensors.pop("n_averaged", None)  # of torch's AveragedModel
    if not tensors:
        raise InputError(
            f"{file}: a mapping of names to tensors was expected, found entries that are no tensors: {_some(state)}"
        )
    tensors, outside = _unwrapped(tensors, head)
    skipped = [*(key for key, value in state.items() if not isinstance(value, Tensor)), *outside]
    try:
        return Weights(from_any(tensors), entry, skipped)
    except (ValueError, TypeError, RuntimeError) as error:  # the latter of tensors that are joined
        raise InputError(f"{file}: {_short(error)}") from error


def _require_plain(tensors: Mapping[Any, Tensor], file: Path) -> None:
    """Raises InputError for names and tensors that no network has, before anything is computed with them.

    A few bytes in a file can stand for a tensor of any size, and other kinds of tensors make other errors.
    """
    if odd := [key for key in tensors if not (isinstance(key, str) and key.isprintable() and 0 < len(key) < _SHOWN)]:
        raise InputError(f"{file}: these are no names of tensors: {_some(odd)}: save a module's state dict")
    if odd := [key for key, each in tensors.items() if each.layout != torch.strided or each.is_meta]:
        raise InputError(f"{file}: is sparse, or has no values: {_some(odd)}: save dense tensors")
    if odd := [f"{key} {each.dtype}" for key, each in tensors.items() if each.dtype not in _DTYPES]:
        raise InputError(f"{file}: is quantised, or of another type: {_some(odd)}: save the weights in fp32")
    num_bytes, in_file = sum(each.numel() * each.itemsize for each in tensors.values()), file.stat().st_size
    if num_bytes > _MOST_SHARED * in_file:
        raise InputError(
            f"{file}: has {in_file:,} bytes, but its tensors would have {num_bytes:,}: save them without expanding any"
        )


def _require_whole(file: Path) -> None:
    """Raises InputError for a file in torch's zip format that is damaged, which torch does not notice."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > file.stat().st_size:
            raise InputError(f"{file}: its parts are compressed, or overlap, as torch writes none: save it again")
        if damaged := archive.testzip():
            raise InputError(f"{file}: is damaged: {_some([damaged])} differs from its checksum: get the file again")


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        if zipped := zipfile.is_zipfile(file):
            _require_whole(file)
        # Training checkpoints hold their command line, too, as Namespace, which does nothing, and scores of numpy's.
        # Of a mapped file no tensor gets memory, whatever size it claims.
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_types()]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        # The rest of torch's message advises to open the file without this protection.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1][:_SHOWN]}" if asked else "it is damaged or of another kind"
        raise InputError(
            f"{file}: is no file of tensors alone: {reason}; nothing in it was run: get the weights as .safetensors, "
            "or as a .pth with a state dict and no more"
        ) from error
    except Exception as error:  # anything, from readers that are given any bytes
        raise InputError(f"{file}: cannot be read as weights: {_short(error)}") from error


def _chosen(state: Any, entry: str | None, file: Path) -> tuple[str | None, Mapping[str, Any]]:
    """The weights in a training checkpoint, and where they were; everything of a file that is none."""
    if not isinstance(state, Mapping):
        raise InputError(f"{file}: a mapping of names to tensors was expected, found a {type(state).__name__}")
    path = []
    if entry:
        if not isinstance(state.get(entry), Mapping):
            held = [key for key, value in state.items() if isinstance(value, Mapping)]
            raise InputError(f"--weights {entry}: {file} has no such entry of weights; it has {_some(held) or 'none'}")
        path, state = [entry], state[entry]
    while key := next((key for key in _ENTRIES if isinstance(state.get(key), Mapping)), None):
        path, state = [*path, key], state[key]
        if len(path) > len(_ENTRIES):
            raise InputError(f"{file}: its entries are nested without an end: {'.'.join(path)}")
    return ".".join(path) or None, state


def _unwrapped(tensors: dict[str, Tensor], head: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without the names of what was wrapped around the network, and what is outside of it. A classifier's
    head stays, also beside its backbone."""
    outside: list[str] = []
    while wrapper := next((each for each in _WRAPPERS if any(key.startswith(each) for key in tensors)), None):
        of_head = (head, head.replace("weight", "bias"))
        inside = {
            key.removeprefix(wrapper): tensor for key, tensor in tensors.items() if key.startswith((wrapper, *of_head))
        }
        outside += [key for key in tensors if not key.startswith((wrapper, *of_head))]
        tensors = inside
    return tensors, outside


def _announce(found: Weights, file: Path, image_size: int, num_classes: int) -> None:
    entry = f" of its entry {found.entry} (--weights takes another)" if found.entry else ""
    head = f"a head of {num_classes} classes" if num_classes else "no head"
    skipped = f"; skipped: {_some(found.skipped)}" if found.skipped else ""
    print(f"{file}: {len(found.tensors)} tensors{entry}, {head}, {image_size} px{skipped}", file=sys.stderr, flush=True)


def _file_in(source: Path) -> Path:
    if not source.is_dir():
        if not source.is_file():
            raise InputError(f"{source}: no such file or folder")
        return source
    file, about = source / "model.safetensors", source / "config.json"
    try:
        described: Any = (
            json.loads(about.read_bytes()) if about.is_file() and about.stat().st_size < _MAX_CONFIG else None
        )
        kind = described.get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{source}: has no config.json that can be read, so it is no Transformers model") from error
    if kind != "pvt":
        raise InputError(
            f"{source / 'config.json'}: model_type is {repr(kind)[:_SHOWN]}, but only 'pvt', PVT v1, can be imported"
        )
    if not file.is_file():
        raise InputError(f"{source}: has no model.safetensors; save the model with Transformers again, in one file")
    return file


def _fit(tensors: dict[str, Tensor], file: Path, model: str, image_size: int) -> dict[str, Tensor]:
    """The tensors in fp32, once they are those of the architecture, each with its shape."""
    expected = _expected(model, image_size, _num_classes(tensors, model))
    faults: dict[str, list[str]] = {
        "missing": [key for key in expected if key not in tensors],
        "unknown": [key for key in tensors if key not in expected],
        "other shapes": [
            f"{key} {list(tensors[key].shape)} instead of {list(expected[key].shape)}"
            for key in expected
            if key in tensors and tensors[key].shape != expected[key].shape
        ],
        "other types": [
            f"{key} {tensors[key].dtype}"
            for key in expected
            if key in tensors and tensors[key].is_floating_point() != expected[key].is_floating_point()
        ],
    }
    if not any(faults.values()):
        faults["not finite"] = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if any(faults.values()):
        found = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in faults.items() if keys)
        raise InputError(f"{file}: is not a {model} for {image_size} px: {found}: check --model and --image-size")
    return {key: tensors[key].to(expected[key].dtype).contiguous() for key in expected}


def _expected(model: str, image_size: int, num_classes: int) -> dict[str, Tensor]:
    """The architecture's tensors, on the meta device. Raises InputError for one that cannot be built."""
    try:
        with torch.device("meta"):
            return create_model(model, image_size, num_classes=num_classes).state_dict()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--model {model} cannot be built for {image_size} px: {error}") from error


def _image_size(tensors: dict[str, Tensor], model: str) -> int:
    """The side in pixels of the images that the position embeddings are for; 224 for a network that has none."""
    for name, usual in _expected(model, _USUAL_PX, 0).items():
        if name.endswith("pos_embed") and usual.ndim == 3 and name in tensors and tensors[name].ndim == 3:
            grid = math.isqrt(usual.shape[1])
            num_prefix = usual.shape[1] - grid**2  # class tokens
            side = math.isqrt(max(0, tensors[name].shape[1] - num_prefix))
            if side**2 == tensors[name].shape[1] - num_prefix:
                return _USUAL_PX * side // grid
    return _USUAL_PX


def _num_classes(tensors: dict[str, Tensor], model: str) -> int:
    head = _head(model)
    return len(tensors[head]) if head in tensors and tensors[head].ndim else 0


def _head(model: str) -> str:
    """The name of the classifier's weight."""
    described = timm.get_pretrained_cfg(model)
    return f"{described.classifier if described and isinstance(described.classifier, str) else 'head'}.weight"


def _register(client: MlflowClient, name: str, entry: Path, source: dict[str, str], uuid: str) -> str:
    with tracking_server.reaching(f"models:/{name}"):
        experiment_id = tracking_server.find_experiment(client, EXPERIMENT)
        found = client.search_runs([experiment_id], f"tags.`run.uuid` = '{uuid}'", max_results=1)
        tags = {"run.uuid": uuid, **{key: redact(value) for key, value in source.items()}, **code_revision()}
        run = found[0] if found else client.create_run(experiment_id, run_name=f"import-{name}", tags=tags)
    run_id, status = run.info.run_id, "FAILED"
    try:
        uri = registry.register(client, name, entry, experiment_id=experiment_id, run_id=run_id)
        status = "FINISHED"
    finally:
        with tracking_server.reaching(f"models:/{name}"):
            client.set_terminated(run_id, status)
    return uri


def _some(names: Iterable[Any]) -> str:
    names = [(repr(name)[1:-1] if isinstance(name, str) else f"a {type(name).__name__}")[:_SHOWN] for name in names]
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _short(error: Exception) -> str:
    """Errors of conversion name every tensor."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = "".join(letter if letter.isprintable() else "�" for letter in text[:401])
    return text if len(text) <= 400 else f"{text[:400]} …"
