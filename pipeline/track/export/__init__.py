"""Exports registered models in the formats of other programs.

    version ──resolve──▶ ExportSource ──write──▶ .FOLDER.partial ──opened by the target's own call──┐
                               └──our own network──▶ logits of real images ◀──compare──▶ logits ────┴─▶ FOLDER

Each target is a module to_NAME.py with the functions of `ExportTarget`. A folder gets its name only after the export in
it was opened and gave the same logits.
"""

import contextlib
import errno
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from pipeline import files
from pipeline.errors import ExternalError, InputError, needing
from pipeline.shards.cache import DEFAULT_CACHE, CacheOptions
from pipeline.track.export import compare_outputs
from pipeline.track.export.source import ExportSource
from pipeline.track.registry import registry

MODULES = {
    "timm": "to_timm",
    "transformers": "to_transformers",
    "safetensors": "to_safetensors",
    "onnx": "to_onnx",
    "torch-export": "to_torch_export",
}
"""The module of each target."""


class ExportTarget(Protocol):
    """The functions of each to_NAME.py."""

    def write(self, source: ExportSource, folder: Path) -> dict[str, str]:
        """Fills an empty folder. Returns the sizes of the input that may vary, each with its permitted values.

        Raises InputError for a model that the format cannot hold.
        """
        ...

    def load(self, source: ExportSource, folder: Path) -> compare_outputs.OpenedExport:
        """Opens the folder as the format's users do."""
        ...

    def call(self, source: ExportSource, folder: Path) -> str:
        """Returns a line of Python that opens the folder, to be copied."""
        ...


def export(
    uri: str,
    to: str,
    out: Path,
    data: str | None = None,
    cache: Path | None = None,
    shards_cache: CacheOptions = DEFAULT_CACHE,
) -> dict[str, Any]:
    """Writes models:/NAME/VERSION or models:/NAME@ALIAS to the folder `out` for the program `to`, one of MODULES.

    The export is compared with the model itself on images of the packed data set `data`, or on photographs that
    scikit-learn ships. `cache` is for copies of models, `shards_cache` for remote shards. Returns a report: the files,
    the differences, and the call that opens the export.
    Raises InputError for an unknown target, one whose packages are missing or that cannot hold this model, for a folder
    that is not empty or cannot be written, and as registry.resolve does; ExternalError where the logits differ.
    """
    target = _import_target(to)
    with _complete_or_absent(out) as folder:
        source = ExportSource(registry.resolve(uri, cache))
        varying = target.write(source, folder)
        most = compare_outputs.MOST_WHOLE_IMAGES if source.sees_whole else compare_outputs.MOST_IMAGES
        images = compare_outputs.real_images(data, most, shards_cache)
        opened = target.load(source, folder)
        comparison = compare_outputs.compare_outputs(source, opened, varying, images, to)
        written = [
            {
                "file": path.relative_to(folder).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": files.sha256(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
    return {
        "model": source.uri,
        "to": to,
        "out": str(out),
        "files": written,
        **comparison._asdict(),
        "varying": varying,
        "open": target.call(source, out),
    }


def _import_target(name: str) -> ExportTarget:
    if name not in MODULES:
        raise InputError(f"--to {name}: models are exported to {', '.join(MODULES)}")
    # A target imports its library when it is used, so that no other target's library need be installed.
    with needing("export", f"--to {name}"):
        return cast(ExportTarget, importlib.import_module(f"{__name__}.{MODULES[name]}"))


@contextlib.contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """Yields a folder to fill. It gets the name `out` at the end of the block; after an error it is removed."""
    out = out.absolute()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with _explain_os_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out}: is there already and no empty folder: remove it, or name another")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    try:
        yield partial
        with _explain_os_errors(out):
            # The contents first, then the name: after a power cut a folder of this name is complete.
            _make_durable(partial)
            partial.rename(out)
            files.sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_durable(folder: Path) -> None:
    """Opens the files to those who may read the folder, as safetensors does not, and syncs them to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    files.sync_folder(folder)


@contextlib.contextmanager
def _explain_os_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExternalError(f"--out {out}: {error.strerror}: make room, or name a folder elsewhere") from error
        raise InputError(f"--out {out}: cannot be written: {error.strerror}; name a folder that can be") from error
