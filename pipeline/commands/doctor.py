"""Checks whether this machine, or the nodes of a SLURM job, are ready for training.

python launch/doctor.py [--config FILE] [--set KEY=VALUE]      this machine, and what the run would use of it
python launch/doctor.py --node --config FILE --sent SECONDS    one task a node, before a job's ranks are started
srun … python launch/doctor.py --all-reduce                    one task a rank; the bandwidth between them
python launch/doctor.py --tune --config FILE [--ranks N]       the run's fastest micro-batch and engine settings here

A table of the checks goes to standard error. Exit code 1: a check has failed; 2: pretrain.py would refuse the
configuration. A tracking server that does not answer is only a warning, because training continues without it. With
--all-reduce each rank prints that it has arrived before it joins the others, so that the output shows which ranks are
missing. --tune tries settings for some minutes and writes those that make the run faster into a new file that extends
its configuration.
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

from pipeline import cli
from pipeline.cluster import preflight
from pipeline.cluster.preflight import Check, make_check
from pipeline.cluster.slurm import node_name
from pipeline.config import Config
from pipeline.errors import FAILED, ExternalError, InputError
from pipeline.redact import redact
from pipeline.shards.process_pool import cores

PACKAGES = {
    "torch": ["torch"],
    "deepspeed": ["deepspeed"],
    "dali": ["nvidia-dali-cuda130", "nvidia-dali-cuda120"],
    "mlflow": ["mlflow"],
}
"""The distributions of each package, one of which has to be installed."""
SERVER_S = 5.0
"""The time that a tracking server has to answer."""


def main() -> dict[str, Any] | None:
    parser = cli.make_parser("launch/doctor.py", "Check whether this machine is ready.")
    cli.add_config(parser, required=False, help="also check what this run would use")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--node", action="store_true", help="check this node of a SLURM job")
    mode.add_argument("--all-reduce", action="store_true", help="measure the bandwidth between the ranks")
    mode.add_argument("--tune", action="store_true", help="find the run's fastest settings on this machine")
    parser.add_argument("--sent", type=float, metavar="SECONDS", help="--node: time since 1970 where this was started")
    parser.add_argument("--mib", type=int, default=64, metavar="N", help="--all-reduce: size in MiB (default 64)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="--all-reduce: time to wait for the other ranks (default 120)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="number of ranks of the run (default: as cluster asks for; --tune: one for each GPU, or 2)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="--tune: new file (default runs/tuned/NAME.yaml)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="--tune: maximum duration (default 5)")
    arguments = parser.parse_args()
    if arguments.all_reduce:
        return _all_reduce(arguments.mib, arguments.timeout)
    if arguments.node and not arguments.config:
        parser.error("--node needs --config: the run that the node is checked for")
    if arguments.tune and not arguments.config:
        parser.error("--tune needs --config: the run that is to become faster")
    if arguments.print_config and not arguments.config:
        parser.error("--print-config needs --config")
    config = cli.read_config(arguments) if arguments.config else None
    if arguments.tune:
        return _tune(arguments)
    if config and arguments.node:
        checks = [*preflight.check_node(config, arguments.sent), tracking(config).as_warning()]
        return {"node": node_name(), **_make_result(checks)}
    checks = list(_print_checks(_check_machine(config)))
    # Without its data the run's length cannot be computed.
    has_data = all(check.ok for check in checks if check.name == "shards")
    if config and has_data:
        # Imported late: its imports take seconds.
        from pipeline.job import start_checks

        forecast = start_checks.forecast(config, arguments.ranks or _planned_ranks(config))
        checks += _print_checks([Check("run", True, forecast)])
    return _make_result(checks)


def _make_result(checks: list[Check]) -> dict[str, Any]:
    return {"ok": all(check.ok for check in checks), "checks": [dataclasses.asdict(check) for check in checks]}


def _planned_ranks(config: Config) -> int:
    """Returns the number of ranks that the run asks SLURM for, if it does; otherwise one for each GPU of this machine,
    or one."""
    if "cluster" in config.model_fields_set:
        return config.cluster.nodes * config.cluster.ranks
    return len(preflight.driver_states()) or 1


def _print_checks(checks: Iterable[Check]) -> Iterator[Check]:
    """Yields the checks, and prints a line for each at once, because some take a while."""
    for check in checks:
        state = "ok" if check.ok else "FAILED"
        if check.warning:
            state = "warning"
        cli.show(f"{state:9}{check.name:11}{check.told}")
        yield check


def _check_machine(config: Config | None) -> Iterator[Check]:
    yield Check("python", True, f"{platform.python_version()}, {sys.executable}")
    for name, distributions in PACKAGES.items():
        yield package(name, distributions)
    yield preflight.gpus(None)
    yield Check("cores", True, str(cores()))
    memory = psutil.virtual_memory()
    yield Check("memory", True, f"{memory.total / 1e9:.0f} GB, of which {memory.available / 1e9:.0f} free")
    if config is None:
        free = shutil.disk_usage(".").free
        yield Check("disk", True, f"{Path.cwd()}: {free / 1e9:,.0f} GB free")
    else:
        yield from preflight.check_run(config)
        yield tracking(config).as_warning()


def package(name: str, distributions: list[str]) -> Check:
    """Checks that one of the distributions of a package is installed."""
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Check(name, True, importlib.metadata.version(distribution))
    return Check(name, False, f"not installed: make setup, or pip install {' or '.join(distributions)}")


@make_check("mlflow")
def tracking(config: Config) -> str:
    """Checks whether the run's tracking server answers, without MLflow, which takes seconds to import."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = uri or f"sqlite:///{Path(config.run.root) / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        return preflight.require_space(database.parent, preflight.NODE_BYTES)
    if uri.startswith(("http://", "https://")):
        return _query_server(uri)
    return f"{redact(uri)}: not checked"


def _query_server(uri: str) -> str:
    parts = urllib.parse.urlsplit(uri)
    # Without a user name and password.
    host = parts.netloc.rpartition("@")[2]
    server = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=SERVER_S) as response:
            return f"{server} answers {response.status}"
    except urllib.error.HTTPError as error:
        # The server answers, and only the run has credentials.
        if error.code in (401, 403):
            return f"{server} answers {error.code}"
        reason = f"answers {error.code}"
    except (OSError, http.client.HTTPException) as error:
        reason = f"cannot be reached: {getattr(error, 'reason', None) or error or type(error).__name__}"
    raise ExternalError(f"{server} {reason}; the run keeps everything in its folder until the server can be reached")


def _all_reduce(mib: int, timeout_s: float) -> dict[str, Any] | None:
    # PyTorch's C++ stack traces would hide the one line that matters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # Imported late: its torch takes seconds to import.
    from pipeline import world

    place = world.read_world(world.launcher_variables(os.environ))
    node = node_name()
    print(json.dumps({"node": node, "rank": place.rank, "arrived": True}), flush=True)
    name = f"rank {place.rank} of {place.size} on {node}"
    # A timer of our own, because not everything below NCCL respects the process group's timeout.
    message = f"{name}: no all-reduce with the others within {timeout_s:g} s"
    timer = threading.Timer(timeout_s, _exit_with_error, [message])
    timer.daemon = True
    timer.start()
    try:
        here = world.start(timeout_s)
        bandwidth = preflight.all_reduce(here, mib)
        world.stop()
    except ExternalError:
        raise
    except (InputError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise ExternalError(f"{name}: cannot join the others: {first_line}") from error
    finally:
        timer.cancel()
    return {"all_reduce_gb_s": round(bandwidth, 3), "ranks": here.size} if here.is_first else None


def _tune(arguments: argparse.Namespace) -> dict[str, Any]:
    from pipeline.job import tune

    # SIGTERM then raises KeyboardInterrupt as Ctrl-C does, so that running trials are ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return tune.tune(
        Path(arguments.config),
        arguments.set,
        ranks=arguments.ranks,
        out=arguments.out,
        minutes=arguments.minutes,
    )


def _exit_with_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(FAILED)
