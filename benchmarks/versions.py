"""What is installed here, whether it can be imported, and what the device's libraries say that they are.

python -m benchmarks.versions

Each package is imported in this process, one after the other, and an import that fails is reported with its reason.
What is known after torch, the first, is printed at once, as a line of its own: the others may take longer than there is
time for.
"""

import contextlib
import importlib
import importlib.metadata
import json
import platform
import sys
import time
from typing import Any

from benchmarks import report
from pipeline import cli

OTHERS = ("triton", "timm", "transformers", "deepspeed", "nvidia.dali", "mlflow", "webdataset", "pytest")


def main() -> dict[str, Any]:
    imports = {"torch": imported("torch")}
    device = "cpu" if "failed" in imports["torch"] else _device()
    below = {"python": platform.python_version(), **libraries(device), **report.measured_on(device)}
    print(json.dumps({"imports": imports, **below}), flush=True)
    imports |= {name: imported(name) for name in OTHERS}
    print("| package | version | import |\n|---|---|---|", file=sys.stderr)
    for name, found in imports.items():
        print(f"| {name} | {found.get('version') or ''} | {found.get('failed') or 'works'} |", file=sys.stderr)
    for name, version in {"python": below["python"], **libraries(device)}.items():
        print(f"| {name} | {version} | |", file=sys.stderr)
    return {"imports": imports, **below}


def imported(name: str) -> dict[str, Any]:
    """Returns a package's version and the seconds that its import took, or why it failed."""
    began_s = time.perf_counter()
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a package does when it is imported
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
    version = getattr(module, "__version__", None)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = version or importlib.metadata.version(name)
    return {"version": version, "seconds": round(time.perf_counter() - began_s, 2)}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def libraries(device: str) -> dict[str, Any]:
    """Returns the versions of CUDA, NCCL, cuDNN and the driver; nothing without a GPU."""
    if device == "cpu":
        return {}
    import torch
    import torch.cuda.nccl

    return {
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "gpus": torch.cuda.device_count(),
    }


def _driver() -> str | None:
    try:
        from pipeline import nvidia_driver  # whose package of NVIDIA's may be missing here
    except ImportError:
        return None
    found = nvidia_driver.read_driver()
    return found.version if found else None


if __name__ == "__main__":
    cli.run(main)
