"""Hostile weights to be imported, and model versions that were changed in their store or in a cache."""

import csv
import functools
import importlib.util
import io
import json
import marshal
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from pvt.create import create_model
from tests.chaos.hostile import data as hostile_data
from tests.chaos.hostile import mutate
from tests.chaos.hostile.mutate import Rng, pick
from tests.chaos.hostile.trial import MARK, Case, Ran, Sandbox
from tests.ranks import PATIENCE_S, Rank

REGISTRY = "launch/registry.py"
EVALUATE = "launch/evaluate.py"
PREDICT = "launch/predict.py"
MODEL = "pvt_pico"
URI = "models:/base/1"
_NUM_PREDICTED = 12
EVIL = f"import os\nopen(os.environ[{MARK!r}], 'w').write('ran')\n"


class Prepared(NamedTuple):
    registry: Path
    """A folder with a tracking database and a store that hold version 1 of "base"."""
    imports: Path
    """Another such folder, for versions that trials make."""
    cache: Path
    """A cache that holds its checked copy."""
    data: Path
    """A packed data set of its classes."""
    score: float
    """Its top-1 there."""


def prepare(folder: Path, data: Path) -> Prepared:
    registry, imports, cache = (folder / name for name in ("registry", "imports", "cache"))
    safetensors.torch.save_file(_tensors(), folder / "base.safetensors")

    def run(target: str, *words: str, store: Path) -> dict[str, Any]:
        log, environment = folder / "log", {"MLFLOW_TRACKING_URI": _uri(store), "PVT_MODEL_CACHE": str(cache)}
        code = Rank(target, words, environment, log, folder).wait(PATIENCE_S)
        assert code == 0, log.with_suffix(".err").read_text()
        return json.loads(log.with_suffix(".out").read_text().splitlines()[-1])

    words = ["import", "base.safetensors", "--name", "base", "--model", MODEL, "--classes-from", str(data)]
    for each in (registry, imports):
        run(REGISTRY, *words, store=each)
    scored = run(EVALUATE, "--model", URI, "--data", str(data), store=registry)
    return Prepared(registry, imports, cache, data, scored["top1"])


def _uri(registry: Path) -> str:
    return f"sqlite:///{registry}/runs/mlflow.db"


@functools.cache
def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return create_model(MODEL, 32, num_classes=2).state_dict()


# Weights

_WITH_CHECKSUMS = "damaged archive"


class _Runs:
    """An object whose pickle runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (EVIL,)


def _saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def _with(**entries: Any) -> bytes:
    return _saved({**_tensors(), **entries})


def _first(change: Callable[[Tensor], Any]) -> bytes:
    """The weights with one tensor changed."""
    tensors: dict[str, Any] = dict(_tensors())
    name = max(tensors, key=lambda each: tensors[each].numel())
    tensors[name] = change(tensors[name])
    return _saved(tensors)


def _deflated(data: bytes) -> bytes:
    """The same archive, its members compressed, with a member that unpacks to half a gigabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.infolist():
            new.writestr(each.filename, old.read(each))
        new.writestr(f"{old.namelist()[0].split('/')[0]}/data/999", bytes(1 << 29))
    return buffer.getvalue()


def _deep() -> bytes:
    tree: Any = {}
    for _ in range(400):
        tree = {"state_dict": tree}
    return _saved(tree)


def _header(document: bytes, length: int | None = None) -> bytes:
    """A .safetensors file with any header."""
    return (len(document) if length is None else length).to_bytes(8, "little") + document


_PTH: dict[str, Callable[[], bytes]] = {
    "code": lambda: _saved({"x": _Runs()}),
    "code in a bare pickle": lambda: pickle.dumps(_Runs()),
    "code beside weights": lambda: _with(hook=_Runs()),
    "no mapping": lambda: _saved([1, 2, 3]),
    "sparse": lambda: _first(lambda tensor: tensor.to_sparse()),
    "quantised": lambda: _first(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
    "meta": lambda: _first(lambda tensor: tensor.to("meta")),
    "giant": lambda: _first(lambda tensor: torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))),
    "giant stride": lambda: _with(extra=torch.zeros(1).as_strided((1 << 40,), (0,))),
    "complex": lambda: _first(lambda tensor: tensor.to(torch.complex64)),
    "text keys": lambda: _saved({"": torch.zeros(1), "\x1b[2J": torch.zeros(1), "a" * 10_000: torch.zeros(1)}),
    "other keys": lambda: _saved({1: torch.zeros(1), None: torch.zeros(1), (2, 3): torch.zeros(1)}),
    "not finite": lambda: _first(lambda tensor: tensor * float("nan")),
    "deep": _deep,
    "deflated": lambda: _deflated(_saved(_tensors())),
    "empty": lambda: b"",
    "itself": lambda: _itself(),
}
_SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "long header": lambda: _header(b"{}", 1 << 62),
    "no JSON": lambda: _header(b"x" * 100),
    "deep JSON": lambda: _header(b"[" * 100_000),
    "giant": lambda: _header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
    "overflow": lambda: _header(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'
    ),
    "negative": lambda: _header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}'),
    "many": lambda: _header(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(100_000)) + b"}"
    ),
}


def _itself() -> bytes:
    tree: dict[str, Any] = dict(_tensors())
    tree["model"] = tree
    return _saved(tree)


def weights(prepared: Prepared) -> Callable[[Rng, Sandbox], Case]:
    """A file of weights, damaged or made to do harm."""

    def make(rng: Rng, sandbox: Sandbox) -> Case:
        kind, suffix, data = _weights(rng)
        (sandbox.work / f"weights{suffix}").write_bytes(data)

        def judge(ran: Sequence[Ran]) -> str:
            is_taken = kind == _WITH_CHECKSUMS and ran[0].code == 0 and not _is_same(data)
            return "a damaged archive was imported" if is_taken else ""

        name = f"w{int(rng.integers(1 << 40))}"
        words = ("import", f"weights{suffix}", "--name", name, "--model", MODEL)
        environment = {"MLFLOW_TRACKING_URI": _uri(prepared.imports)}
        return Case(f"weights: {kind}", [(REGISTRY, *words)], judge, environment=environment)

    return make


def _weights(rng: Rng) -> tuple[str, str, bytes]:
    """Returns the kind, suffix and content of a file."""
    chance = int(rng.integers(8))
    if chance < 4:
        return _WITH_CHECKSUMS, ".pth", mutate.some_bytes(rng, _saved(_tensors()))
    if chance == 4:
        return "damaged safetensors", ".safetensors", mutate.some_bytes(rng, safetensors.torch.save(_tensors()))
    if chance == 5:
        old = _saved(_tensors(), _use_new_zipfile_serialization=False)
        return "damaged old pickle", ".pth", mutate.some_bytes(rng, old)
    suffix, special = pick(rng, ((".pth", _PTH), (".safetensors", _SAFETENSORS)))
    kind = pick(rng, sorted(special))
    return kind, suffix, special[kind]()


def _is_same(data: bytes) -> bool:
    """Whether an archive that was changed somewhere still holds the same tensors."""
    expected = _tensors()
    try:
        found = torch.load(io.BytesIO(data), weights_only=True)
        return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    except Exception:  # whatever torch raises
        return False


# Versions


def _byte_code(source: str) -> bytes:
    """Byte code that Python runs without a look at the source beside it (PEP 552, unchecked)."""
    code = marshal.dumps(compile(source, "x", "exec"))
    return importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + code


def _plant(rng: Rng, folder: Path) -> str:
    """Adds or changes a file of a version so that it, or what opens it, might run code. Returns what."""
    served = (folder / "served.py").read_text()
    planted: dict[str, bytes] = {
        f"__pycache__/served.{sys.implementation.cache_tag}.pyc": _byte_code(EVIL + served),
        f"__pycache__/__init__.{sys.implementation.cache_tag}.pyc": _byte_code(EVIL),
        "served.pyc": _byte_code(EVIL + served),
        "served.so": b"\x7fELF",
        "sitecustomize.py": EVIL.encode(),
        "usercustomize.py": EVIL.encode(),
        "evil.pth": b"import sys; " + EVIL.replace("\n", ";").encode(),
        "torch.py": EVIL.encode(),
        "pipeline/__init__.py": EVIL.encode(),
        "code/served.py": EVIL.encode(),
        "served.py": (EVIL + served).encode(),
        "SERVED.PY": EVIL.encode(),
        "python_model.pkl": pickle.dumps(_Runs()),
        "artifacts/model.pth": pickle.dumps(_Runs()),
        "artifacts/model.safetensors": pickle.dumps(_Runs()),
        "artifacts/__pycache__/x.pyc": _byte_code(EVIL),
        "registered_model_meta": b"!!python/object/apply:os.system ['touch evil']",
    }
    name = pick(rng, sorted(planted))
    path = folder / name
    if path.parent.is_file():  # which is registered so that no folder of byte code may lie there
        path.parent.unlink()
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(planted[name])
    return f"planted {name}"


def _described(rng: Rng, folder: Path) -> str:
    """Changes what the version says of itself. Returns what."""
    texts = (each for each in folder.rglob("*") if each.suffix in (".json", ".txt", ".yaml", "") and each.is_file())
    path = pick(rng, sorted(texts))
    data = path.read_bytes()
    path.unlink()
    if path.name == "MLmodel":
        text = data.decode()
        change = pick(rng, ("loader", "path", "bytes", "code"))
        if change == "loader":
            data = text.replace("loader_module: ", "loader_module: evil.").encode()
        elif change == "path":
            data = text.replace("served.py", "../../../evil.py").encode()
        elif change == "code":
            data = text.replace("python_function:", "python_function:\n    code: .").encode()
        else:
            data = mutate.some_bytes(rng, data)
    elif path.suffix == ".json":
        data = mutate.json_text(rng, json.loads(data))
    else:
        data = mutate.some_bytes(rng, data)
    path.write_bytes(data)
    return f"changed {path.name}"


def _replaced(rng: Rng, folder: Path) -> str:
    """Damages a file, replaces it by a link to a damaged one, or by something that is no file. Returns what."""
    path = pick(rng, sorted(each for each in folder.rglob("*") if each.is_file()))
    kind = pick(rng, ("bytes", "link", "other", "other"))
    if kind == "other":
        return f"{mutate.something_else(rng, path)} for a file"
    data = mutate.some_bytes(rng, path.read_bytes())
    path.unlink()
    place = folder.parent / "elsewhere" if kind == "link" else path
    place.write_bytes(data)
    if kind == "link":
        path.symlink_to(place)
    return f"{kind} for a file"


def _change(rng: Rng, folder: Path) -> str:
    for each in (folder, *folder.rglob("*")):  # copies are read-only
        if not each.is_symlink():
            each.chmod(0o755 if each.is_dir() else 0o644)
    return pick(rng, (_plant, _plant, _described, _replaced))(rng, folder)


def stored(prepared: Prepared) -> Callable[[Rng, Sandbox], Case]:
    """A version that was changed where the registry keeps it."""

    def make(rng: Rng, sandbox: Sandbox) -> Case:
        registry = sandbox.work / "registry"
        shutil.copytree(prepared.registry, registry)
        (folder,) = (path.parent for path in registry.rglob("MLmodel"))
        before = mutate.content(folder)
        kind = _change(rng, folder)
        is_changed = mutate.content(folder) != before
        commands = [
            (REGISTRY, "relocate"),
            (REGISTRY, "verify", URI),
            (EVALUATE, "--model", URI, "--data", str(prepared.data)),
        ]

        def judge(ran: Sequence[Ran]) -> str:
            _, verified, evaluated = ran
            if is_changed and "registered_model_meta" not in kind and not verified.code:
                return "verify found nothing"
            if evaluated.code == 0 and evaluated.result["top1"] != prepared.score:
                return f"evaluated to {evaluated.result['top1']} instead of {prepared.score}"
            return ""

        environment = {"MLFLOW_TRACKING_URI": _uri(registry)}
        return Case(f"stored version: {kind}", commands, judge, environment=environment)

    return make


def cached(prepared: Prepared) -> Callable[[Rng, Sandbox], Case]:
    """A version whose copy in a shared cache was changed."""

    def make(rng: Rng, sandbox: Sandbox) -> Case:
        shutil.copytree(prepared.cache, sandbox.work / "models")
        (folder,) = (path.parent for path in (sandbox.work / "models").rglob("MLmodel"))
        kind = _change(rng, folder)
        commands = [
            (EVALUATE, "--model", URI, "--data", str(prepared.data)),
            ("tests.chaos.hostile.serve", URI),
        ]

        def judge(ran: Sequence[Ran]) -> str:
            if any(each.code for each in ran):
                return f"a damaged copy was not replaced: {ran[-1].error[-300:]}"
            if ran[0].result["top1"] != prepared.score:
                return f"evaluated to {ran[0].result['top1']} instead of {prepared.score}"
            return ""

        environment = {"MLFLOW_TRACKING_URI": _uri(prepared.registry)}
        return Case(f"cached version: {kind}", commands, judge, environment=environment)

    return make


# Predictions


def predicted(prepared: Prepared) -> Callable[[Rng, Sandbox], Case]:
    """Hostile images, some of them in a tar, whose classes are asked for."""

    def make(rng: Rng, sandbox: Sandbox) -> Case:
        loose = sandbox.work / "loose"
        good, _ = hostile_data.hostile_tree(rng, loose, _NUM_PREDICTED)
        (loose / "some.tar").write_bytes(pick(rng, hostile_data.HOSTILE_TARS)(rng))
        words = ("--model", URI, "loose", "--out", "seen.csv", "--features", "seen.npy", "--sheet", "seen.png")

        def judge(ran: Sequence[Ran]) -> str:
            if ran[0].code:
                return f"good images were refused for bad ones: {ran[0].error[-300:]}"
            with (sandbox.work / "seen.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            if len(rows) != ran[0].result["images"]:
                return f"{len(rows)} rows of {ran[0].result['images']} images"
            answered = {Path(row["path"]).stem for row in rows if row["label"]}
            if missing := good - answered:
                return f"good images have no answer: {sorted(missing)}"
            neither = [row["path"] for row in rows if bool(row["label"]) == bool(row["error"])]
            return f"neither answered nor reported: {neither}" if neither else ""

        environment = {"MLFLOW_TRACKING_URI": _uri(prepared.registry)}
        return Case("predicted images", [(PREDICT, *words)], judge, _NUM_PREDICTED + 1, environment)

    return make
