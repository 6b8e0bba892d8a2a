"""Whether this machine is ready, or the nodes of a SLURM job are.

python launch/doctor.py [--config FILE] [--set KEY=VALUE]      this machine, and what the run would use of it
python launch/doctor.py --node --config FILE --sent SECONDS    one task a node, before a job's ranks are started
srun … python launch/doctor.py --all-reduce                    one task a rank; the bandwidth between them
python launch/doctor.py --tune --config FILE [--ranks N]       the run's quickest micro-batch and engine settings here

A table of what was looked at goes to standard error. Exit code 1: something is not as it has to be; 2: pretrain.py
would refuse the configuration. The tracking server is only warned of: training goes on without it. With --all-reduce
each rank says that it has arrived before it joins the others, so that who is missing can be told from what was printed.
--tune tries settings for some minutes and writes what makes the run faster into a new file that extends its
configuration.
"""

import argparse
import contextlib
import dataclasses
import http.client
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline.cluster import preflight
from pipeline.cluster.preflight import Check, check
from pipeline.cluster.slurm import node_name
from pipeline.config import Config, load_config
from pipeline.errors import FAILED, ExternalError, InputError
from pipeline.redact import redact
from pipeline.shards.process_pool import cores

PACKAGES = {
    "torch": ["torch"],
    "deepspeed": ["deepspeed"],
    "dali": ["nvidia-dali-cuda130", "nvidia-dali-cuda120"],
    "mlflow": ["mlflow"],
}
"""Of each, one of these distributions has to be installed."""
SERVER_S = 5.0
"""How long a tracking server may take to answer."""


def main() -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(prog="launch/doctor.py", description="Look whether this machine is ready.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="look at what this run would use, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--node", action="store_true", help="look at this node of a SLURM job")
    what.add_argument("--all-reduce", action="store_true", help="measure what goes between the ranks")
    what.add_argument("--tune", action="store_true", help="find the run's quickest settings on this machine")
    parser.add_argument("--sent", type=float, metavar="SECONDS", help="--node: time since 1970 where this was started")
    parser.add_argument("--mib", type=int, default=64, metavar="N", help="--all-reduce: of so much (default 64)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="--all-reduce: wait so long (default 120)"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="of the run (default: as cluster asks for; --tune: one for each GPU, or 2)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="--tune: to be made (default runs/tuned/NAME.yaml)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="--tune: at most (default 5)")
    arguments = parser.parse_args()
    if arguments.all_reduce:
        return _all_reduce(arguments.mib, arguments.timeout)
    if arguments.node and not arguments.config:
        parser.error("--node needs --config: the run that the node is wanted for")
    if arguments.tune and not arguments.config:
        parser.error("--tune needs --config: the run that is to be quick")
    if arguments.tune:
        return _tune(arguments)
    config = load_config(arguments.config, arguments.set) if arguments.config else None
    if config and arguments.node:
        checks = [*preflight.of_node(config, arguments.sent), tracking(config).as_warning()]
        return {"node": node_name(), **_result(checks)}
    checks = list(_told(_of_machine(config)))
    if config and all(found.ok for found in checks if found.name == "shards"):
        from pipeline.job import start_checks  # what it imports in turn takes seconds

        checks += _told([Check("run", True, start_checks.forecast(config, arguments.ranks or _ranks(config)))])
    return _result(checks)


def _result(checks: list[Check]) -> dict[str, Any]:
    return {"ok": all(found.ok for found in checks), "checks": [dataclasses.asdict(found) for found in checks]}


def _ranks(config: Config) -> int:
    """What the run asks SLURM for, if it does; otherwise one for each GPU of this machine, or one."""
    if "cluster" in config.model_fields_set:
        return config.cluster.nodes * config.cluster.ranks
    return len(preflight.driver_states()) or 1


def _told(checks: Iterable[Check]) -> Iterator[Check]:
    """The same, with a line for each as it comes: some take a while."""
    for found in checks:
        state = "warning" if found.warning else "ok" if found.ok else "FAILED"
        print(f"{state:9}{found.name:11}{found.told}", file=sys.stderr, flush=True)
        yield found


def _of_machine(config: Config | None) -> Iterator[Check]:
    yield Check("python", True, f"{platform.python_version()}, {sys.executable}")
    yield from (package(name, distributions) for name, distributions in PACKAGES.items())
    yield preflight.gpus(None)
    yield Check("cores", True, str(cores()))
    memory = psutil.virtual_memory()
    yield Check("memory", True, f"{memory.total / 1e9:.0f} GB, of which {memory.available / 1e9:.0f} free")
    if config is None:
        yield Check("disk", True, f"{Path.cwd()}: {shutil.disk_usage('.').free / 1e9:,.0f} GB free")
    else:
        yield from preflight.of_run(config)
        yield tracking(config).as_warning()


def package(name: str, distributions: list[str]) -> Check:
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Check(name, True, importlib.metadata.version(distribution))
    return Check(name, False, f"not installed: make setup, or pip install {' or '.join(distributions)}")


@check("mlflow")
def tracking(config: Config) -> str:
    """Whether the run's tracking server answers. Does without MLflow, which takes seconds to import."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = uri or f"sqlite:///{Path(config.run.root) / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return preflight.usable(Path(uri.removeprefix("sqlite:///")).parent, preflight.NODE_BYTES)
    if uri.startswith(("http://", "https://")):
        return _answer(uri)
    return f"{redact(uri)}: is not looked at"


def _answer(uri: str) -> str:
    parts = urllib.parse.urlsplit(uri)
    server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"  # without a password
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=SERVER_S) as response:
            return f"{server} answers {response.status}"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there, and credentials are for the run
            return f"{server} answers {error.code}"
        reason = f"answers {error.code}"
    except (OSError, http.client.HTTPException) as error:
        reason = f"cannot be reached: {getattr(error, 'reason', None) or error or type(error).__name__}"
    raise ExternalError(f"{server} {reason}; the run notes everything and sends it when the server is there")


def _all_reduce(mib: int, timeout_s: float) -> dict[str, Any] | None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its stack traces say less than our one line
    from pipeline import world  # whose torch takes seconds to import

    place = world.read_place(world.launcher_variables(os.environ))
    who = {"node": node_name(), "rank": place.rank}
    print(json.dumps({**who, "arrived": True}), flush=True)
    named = f"rank {place.rank} of {place.size} on {who['node']}"
    # A clock of our own: not everything below NCCL heeds the process group's.
    waiting = threading.Timer(timeout_s, _give_up, [f"{named}: no all-reduce with the others within {timeout_s:g} s"])
    waiting.daemon = True
    waiting.start()
    try:
        here = world.start(timeout_s)
        bandwidth = preflight.all_reduce(here, mib)
        world.stop()
    except ExternalError:
        raise
    except (InputError, RuntimeError) as error:
        raise ExternalError(f"{named}: cannot join the others: {str(error).partition(chr(10))[0]}") from error
    finally:
        waiting.cancel()
    return {"all_reduce_gb_s": round(bandwidth, 3), "ranks": here.size} if here.is_first else None


def _tune(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipeline.job import tune

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does, so that trials under way are ended
    return tune.tune(
        arguments.config, arguments.set, ranks=arguments.ranks, out=arguments.out, minutes=arguments.minutes
    )


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(FAILED)
