"""Imports published weights as a registered version.

    .pth of the public repository ─┐
    .safetensors file             ─┼─read──▶ tensors under our names ──fit──▶ the architecture's tensors ──▶ registry
    Transformers' folder          ─┘  │
                                      └ an entry of a training checkpoint, without the prefixes of wrapper modules

The lineage ends at the file: the version's run, in the experiment "import", holds the file's path and SHA-256. A
repeated import gives the same run and the same version.
"""

import argparse
import hashlib
import json
import logging
import math
import pickle
import re
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

from pipeline import files
from pipeline.config import ClassificationConfig, EvaluateConfig, ImageConfig, ModelConfig, fingerprint
from pipeline.errors import InputError
from pipeline.redact import redact
from pipeline.track import tracking_server
from pipeline.track.code_version import code_revision
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.registry import registry
from pvt.convert import from_any
from pvt.create import create_model

log = logging.getLogger(__name__)

EXPERIMENT = "import"
_MAX_NAMED = 5
"""Tensors that a message names."""
_MAX_NAME_LENGTH = 200
"""Characters of a tensor's name, or of another name in a message."""
_MAX_ERROR_LENGTH = 400
"""Characters of another library's error in a message."""
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_ENTRIES = (*_AVERAGED, "state_dict", "model", "model_state_dict", "module")
"""Keys of the weights in training checkpoints. As in timm, their moving average comes first."""
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
"""Prefixes of names by DistributedDataParallel, torch.compile, Lightning and dense networks; there may be several."""
_USUAL_PX = 224
_MAX_CONFIG_BYTES = 1 << 20
"""Size of a config.json."""
_MOST_SHARED = 2
"""How often on average a file's bytes may belong to several tensors, as tied weights do."""
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_DTYPES = _FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


class Weights(NamedTuple):
    """The content of a file of weights."""

    tensors: dict[str, Tensor]
    """The tensors by our names."""
    entry: str | None
    """The key of the weights in the file, such as "model_ema"; None for a file of tensors alone."""
    skipped: list[str]
    """Names of everything else in the file."""


def _numpy_types() -> list[Any]:
    """Returns what pickles of numpy's numbers and arrays of numbers refer to. None of it runs code from the file."""
    named = []
    # numpy's module was renamed, and files have either name.
    for core in ("core", "_core"):
        for name in ("scalar", "_reconstruct"):
            function = getattr(np._core.multiarray, name)  # pyright: ignore[reportAttributeAccessIssue]
            named.append((function, f"numpy.{core}.multiarray.{name}"))
    # O and V are Python objects and raw bytes.
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
    """Registers the weights in `source` (a file, or a folder that Transformers wrote) as the next version of `name`.

    `image_size`: pixels, by default those of the position embeddings. `classes`: names, by default "0", "1", …; weights
    without a head have none. `entry`: key of the weights in a training checkpoint. `sha256`: the expected digest of the
    file, in hex. Returns the version's URI. Raises InputError for a file that cannot be read without running code from
    it and for weights that are not exactly those of the architecture, and Unreachable.
    """
    file = _find_file(source)
    # The digest is compared before the file is opened: nothing reads a file that is not the expected one.
    digest = files.sha256(file)
    if sha256 and sha256.lower() != digest:
        raise InputError(f"--sha256 {sha256}: but {file} has {digest}: it is damaged, or another file: get it again")
    weights = read(file, entry, _head_of(model))
    if image_size is None:
        image_size = _image_size(weights.tensors, model)
    tensors = _fit(weights.tensors, file, model, image_size)
    num_classes = _count_classes(tensors, model)
    classes = classes or [str(index) for index in range(num_classes)]
    if len(classes) != num_classes:
        raise InputError(f"{file}: has a head of {num_classes} classes, but {len(classes)} names were given")
    config = {
        "model": ModelConfig(name=model),
        "image": ImageConfig(size=image_size),
    }
    config_digest = fingerprint({key: value.model_dump(mode="json") for key, value in config.items()})
    # A checkpoint's usual entry is not part of the run's identity; a chosen or averaged one is.
    identity: list[Any] = [name, digest, config_digest, classes]
    if entry or (weights.entry or "").startswith(_AVERAGED):
        identity.append(weights.entry)
    uuid = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    _announce(weights, file, image_size, num_classes)
    lineage = {"run": uuid, "step": "0", "config": config_digest}
    revision = code_revision().get("mlflow.source.git.commit")
    if revision:
        lineage["code"] = revision
    lineage["source"] = f"{file.name} sha256:{digest}"
    with tempfile.TemporaryDirectory(prefix="pvt-import-") as scratch:
        folder = Path(scratch)
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
        card = ModelCard(
            task=ClassificationConfig(),
            **config,
            eval_batch_size=EvaluateConfig().batch_size,
            classes=classes,
            metrics={},
            sha256={WEIGHTS: files.sha256(folder / WEIGHTS)},
            lineage=lineage,
        )
        card.write(folder)
        tags = {
            "source.path": str(source.absolute()),
            "source.sha256": digest,
            "source.entry": weights.entry or "none",
        }
        return _register(client, name, folder, tags, uuid)


def read(file: Path, entry: str | None = None, head: str = "head.weight") -> Weights:
    """Reads a file's tensors under our names, without running code in it. Names of neither foreign layout stay.

    Raises InputError for a file that cannot be read so, and for an `entry` that the file does not have.
    """
    entry, state = _select_entry(_load(file), entry, file)
    tensors = {}
    skipped = []
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        else:
            skipped.append(key)
    _require_plain(tensors, file)
    # torch's AveragedModel counts the weights that it has averaged.
    tensors.pop("n_averaged", None)
    if not tensors:
        raise InputError(
            f"{file}: a mapping of names to tensors was expected, found entries that are no tensors: "
            f"{_list_some(state)}"
        )
    tensors, outside = _strip_wrappers(tensors, head)
    try:
        return Weights(from_any(tensors), entry, skipped + outside)
    except (ValueError, TypeError, RuntimeError) as error:
        # Tensors that are joined and do not fit raise the RuntimeError.
        raise InputError(f"{file}: {_shorten_error(error)}") from error


def _require_plain(tensors: Mapping[Any, Tensor], file: Path) -> None:
    """Raises InputError for names and tensors that no network has, before anything is computed with them."""
    if odd := [key for key in tensors if not _is_name(key)]:
        raise InputError(f"{file}: these are no names of tensors: {_list_some(odd)}: save a module's state dict")
    if odd := [key for key, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_meta]:
        raise InputError(f"{file}: is sparse, or has no values: {_list_some(odd)}: save dense tensors")
    if odd := [f"{key} {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in _DTYPES]:
        raise InputError(f"{file}: is quantised, or of another type: {_list_some(odd)}: save the weights in fp32")
    # A few bytes in a file can stand for a tensor of any size.
    in_file = file.stat().st_size
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if num_bytes > _MOST_SHARED * in_file:
        raise InputError(
            f"{file}: has {in_file:,} bytes, but its tensors would have {num_bytes:,}: save them without expanding any"
        )


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isprintable() and 0 < len(key) < _MAX_NAME_LENGTH


def _require_undamaged(file: Path) -> None:
    """Raises InputError for a damaged file in torch's zip format, because torch checks no checksums."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        num_bytes = sum(member.file_size for member in members)
        if num_bytes > file.stat().st_size or any(member.compress_type for member in members):
            raise InputError(f"{file}: its members are compressed, or overlap, as torch writes none: save it again")
        if damaged := archive.testzip():
            raise InputError(
                f"{file}: is damaged: {_list_some([damaged])} differs from its checksum: get the file again"
            )


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        zipped = zipfile.is_zipfile(file)
        if zipped:
            _require_undamaged(file)
        # Training checkpoints also hold their command line, as a Namespace, which runs no code, and numpy's numbers.
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_types()]):
            # Tensors of a memory-mapped file take no memory, whatever size they claim.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        # The rest of torch's message advises to open the file without this protection.
        reason = "it is damaged or of another kind"
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks for {asked[1][:_MAX_NAME_LENGTH]}"
        raise InputError(
            f"{file}: is no file of tensors alone: {reason}; nothing in it was run: get the weights as .safetensors, "
            "or as a .pth with a state dict and no more"
        ) from error
    except Exception as error:
        # The libraries raise any kind of error for arbitrary bytes.
        raise InputError(f"{file}: cannot be read as weights: {_shorten_error(error)}") from error


def _select_entry(state: Any, entry: str | None, file: Path) -> tuple[str | None, Mapping[str, Any]]:
    """Returns the weights in a training checkpoint and their key, or all of a file that is no training checkpoint."""
    if not isinstance(state, Mapping):
        raise InputError(f"{file}: a mapping of names to tensors was expected, found a {type(state).__name__}")
    path = []
    if entry:
        if not isinstance(state.get(entry), Mapping):
            held = [key for key, value in state.items() if isinstance(value, Mapping)]
            raise InputError(
                f"--weights {entry}: {file} has no such entry of weights; it has {_list_some(held) or 'none'}"
            )
        path.append(entry)
        state = state[entry]
    while key := next((key for key in _ENTRIES if isinstance(state.get(key), Mapping)), None):
        path.append(key)
        state = state[key]
        # A mapping in a pickle can contain itself.
        if len(path) > len(_ENTRIES):
            raise InputError(f"{file}: its entries are nested without an end: {'.'.join(path)}")
    return ".".join(path) or None, state


def _strip_wrappers(tensors: dict[str, Tensor], head: str) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors without the prefixes of wrapper modules, and the names of those outside of the wrapper.

    A classifier's head stays, also where it is beside its wrapped backbone.
    """
    heads = (head, head.replace("weight", "bias"))
    outside = []
    # There may be several wrappers around each other.
    while wrapper := _find_wrapper(tensors):
        inside = {}
        for key, tensor in tensors.items():
            if key.startswith((wrapper, *heads)):
                inside[key.removeprefix(wrapper)] = tensor
            else:
                outside.append(key)
        tensors = inside
    return tensors, outside


def _find_wrapper(names: Iterable[str]) -> str | None:
    for wrapper in _WRAPPERS:
        if any(name.startswith(wrapper) for name in names):
            return wrapper
    return None


def _announce(weights: Weights, file: Path, image_size: int, num_classes: int) -> None:
    entry = f" of its entry {weights.entry} (--weights takes another)" if weights.entry else ""
    head = f"a head of {num_classes} classes" if num_classes else "no head"
    skipped = f"; skipped: {_list_some(weights.skipped)}" if weights.skipped else ""
    log.info(f"{file}: {len(weights.tensors)} tensors{entry}, {head}, {image_size} px{skipped}")


def _find_file(source: Path) -> Path:
    """Returns the file with the weights, after checks of a folder that Transformers wrote."""
    if not source.is_dir():
        if not source.is_file():
            raise InputError(f"{source}: no such file or folder")
        return source
    config = source / "config.json"
    try:
        kind = _read_model_type(config)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{source}: has no config.json that can be read, so it is no Transformers model") from error
    if kind != "pvt":
        raise InputError(
            f"{config}: model_type is {repr(kind)[:_MAX_NAME_LENGTH]}, but only 'pvt', PVT v1, can be imported"
        )
    file = source / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{source}: has no model.safetensors; save the model with Transformers again, in one file")
    return file


def _read_model_type(config: Path) -> Any:
    """Raises AttributeError for a document without keys, and as json.loads does for one that is no JSON."""
    document: Any = None
    # Nothing is read from a pipe or a device, nor a file that would fill the memory.
    if config.is_file() and config.stat().st_size < _MAX_CONFIG_BYTES:
        document = json.loads(config.read_bytes())
    return document.get("model_type")


def _fit(tensors: dict[str, Tensor], file: Path, model: str, image_size: int) -> dict[str, Tensor]:
    """Returns the tensors in fp32. Raises InputError unless they are those of the architecture, in names and shapes."""
    expected = _expect_tensors(model, image_size, _count_classes(tensors, model))
    faults: dict[str, list[str]] = {
        "missing": [key for key in expected if key not in tensors],
        "unknown": [key for key in tensors if key not in expected],
        "other shapes": [],
        "other types": [],
    }
    for key, wanted in expected.items():
        found = tensors.get(key)
        if found is None:
            continue
        if found.shape != wanted.shape:
            faults["other shapes"].append(f"{key} {list(found.shape)} instead of {list(wanted.shape)}")
        if found.is_floating_point() != wanted.is_floating_point():
            faults["other types"].append(f"{key} {found.dtype}")
    # Values are looked at last: other types and shapes are the better explanation.
    if not any(faults.values()):
        faults["not finite"] = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_list_some(keys)}" for kind, keys in faults.items() if keys)
        raise InputError(f"{file}: is not a {model} for {image_size} px: {listed}: check --model and --image-size")
    return {key: tensors[key].to(wanted.dtype).contiguous() for key, wanted in expected.items()}


def _expect_tensors(model: str, image_size: int, num_classes: int) -> dict[str, Tensor]:
    """Returns the architecture's tensors, on the meta device. Raises InputError for one that cannot be built."""
    try:
        # On the meta device tensors have shapes, but no memory.
        with torch.device("meta"):
            return create_model(model, image_size, num_classes=num_classes).state_dict()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--model {model} cannot be built for {image_size} px: {error}") from error


def _image_size(tensors: dict[str, Tensor], model: str) -> int:
    """Returns the image size in pixels that the position embeddings fit; 224 for a network that has none."""
    for name, usual in _expect_tensors(model, _USUAL_PX, 0).items():
        if name.endswith("pos_embed") and usual.ndim == 3 and name in tensors and tensors[name].ndim == 3:
            grid = math.isqrt(usual.shape[1])
            # Class tokens have an embedding, too.
            num_patches = tensors[name].shape[1] - (usual.shape[1] - grid**2)
            side = math.isqrt(max(0, num_patches))
            if side**2 == num_patches:
                return _USUAL_PX * side // grid
    return _USUAL_PX


def _count_classes(tensors: dict[str, Tensor], model: str) -> int:
    head = tensors.get(_head_of(model))
    return len(head) if head is not None and head.ndim else 0


def _head_of(model: str) -> str:
    """Returns the name of the classifier's weight."""
    config = timm.get_pretrained_cfg(model)
    if config and isinstance(config.classifier, str):
        return f"{config.classifier}.weight"
    return "head.weight"


def _register(client: MlflowClient, name: str, entry: Path, source: dict[str, str], uuid: str) -> str:
    """Registers an entry as the version of the import's run, which is created where there is none yet."""
    with tracking_server.reaching(f"models:/{name}"):
        experiment_id = tracking_server.find_experiment(client, EXPERIMENT)
        # A repeated import continues the run of the first one.
        runs = client.search_runs([experiment_id], f"tags.`run.uuid` = '{uuid}'", max_results=1)
        if runs:
            run = runs[0]
        else:
            tags = {"run.uuid": uuid}
            for key, value in source.items():
                tags[key] = redact(value)
            tags |= code_revision()
            run = client.create_run(experiment_id, run_name=f"import-{name}", tags=tags)
    run_id = run.info.run_id
    status = "FAILED"
    try:
        uri = registry.register(client, name, entry, experiment_id=experiment_id, run_id=run_id)
        status = "FINISHED"
    finally:
        with tracking_server.reaching(f"models:/{name}"):
            client.set_terminated(run_id, status)
    return uri


def _list_some(names: Iterable[Any]) -> str:
    """Returns the first names and the number of the others. Names may be anything that a file holds."""
    shown = []
    for name in names:
        # repr escapes control characters.
        text = repr(name)[1:-1] if isinstance(name, str) else f"a {type(name).__name__}"
        shown.append(text[:_MAX_NAME_LENGTH])
    listed = ", ".join(shown[:_MAX_NAMED])
    if len(shown) > _MAX_NAMED:
        listed += f" and {len(shown) - _MAX_NAMED} more"
    return listed


def _shorten_error(error: Exception) -> str:
    """Returns the beginning of an error in one line: errors of conversion name every tensor."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = "".join(letter if letter.isprintable() else "�" for letter in text[: _MAX_ERROR_LENGTH + 1])
    if len(text) <= _MAX_ERROR_LENGTH:
        return text
    return f"{text[:_MAX_ERROR_LENGTH]} …"
