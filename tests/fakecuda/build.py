"""Compiles the fake CUDA runtime, and says with which environment a process takes it for NVIDIA's.

runtime.cpp, calls.c ──▶ libfakecuda.so, preloaded: its functions come before those of torch's own libraries
driver.c             ──▶ libcuda.so.1, found first
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent


class CannotBuildError(Exception):
    """The compilers or CUDA's headers are missing. Says what to install."""


def build(folder: Path) -> dict[str, str]:
    """Compile into `folder`. Returns the variables that a process needs, on top of its environment.

    Raises CannotBuildError, and CalledProcessError where a compiler refuses the sources.
    """
    if missing := [compiler for compiler in ("gcc", "g++") if not shutil.which(compiler)]:
        raise CannotBuildError(f"no {' and no '.join(missing)} here: apt-get install g++")
    runtime, driver = folder / "libfakecuda.so", folder / "driver" / "libcuda.so.1"
    driver.parent.mkdir()
    options = ["-O1", "-fPIC", "-Wall", "-Werror"]
    calls = folder / "calls.o"
    _run("gcc", *options, "-c", SOURCES / "calls.c", "-o", calls)
    _run("g++", *options, "-std=c++17", f"-I{headers()}", "-shared", SOURCES / "runtime.cpp", calls, "-o", runtime)
    _run("gcc", *options, "-shared", "-Wl,-soname,libcuda.so.1", SOURCES / "driver.c", "-o", driver)
    return {
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(driver.parent), os.environ.get("LD_LIBRARY_PATH")])),
        "FAKECUDA": str(runtime),
        # Attention goes to kernels of torch's own. cuDNN asks the driver for more than the fake one has.
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        "DS_ACCELERATOR": "cuda",
    }


def headers() -> Path:
    """The folder of cuda_runtime_api.h: Triton brings it. Raises CannotBuildError."""
    triton = importlib.util.find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or ()
    places = [*(Path(folder, "backends/nvidia/include") for folder in folders), Path("/usr/local/cuda/include")]
    for place in places:
        if (place / "cuda_runtime_api.h").exists() and (place / "crt" / "host_defines.h").exists():
            return place
    raise CannotBuildError(f"no cuda_runtime_api.h in {' or '.join(map(str, places))}: install triton")


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)
