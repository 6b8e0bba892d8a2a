"""The command that a batch script of launch/submit.py or slurm/ runs: see pipeline/cluster/supervise.py.

python launch/supervise.py --config FILE [--set key=value …]      train or fine-tune
python launch/supervise.py --handoff KEY --of RUN                  a fine-tuning job that RUN hands off to
python launch/supervise.py --deputy-of NODE                        watch the node on which one of those runs
"""

import logging
import os
import sys
from pathlib import Path

from pipeline import cli
from pipeline.cluster import script
from pipeline.cluster.deputy import watch_node
from pipeline.cluster.slurm import Allocation
from pipeline.cluster.supervise import LOG, Program, Supervisor
from pipeline.config import Config, load_config
from pipeline.errors import DONE, FAILED, USAGE
from pipeline.job import handoff
from pipeline.track.sync.tracker import record_failure

log = logging.getLogger(__name__)

CODE = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = cli.make_parser("launch/supervise.py", "The command that a batch script runs.")
    parser.add_argument("--config", metavar="FILE")
    cli.add_overrides(parser)
    parser.add_argument("--of", type=Path, metavar="RUN", help="folder of the run that hands off")
    parser.add_argument("--handoff", metavar="KEY", help="key of the hand-off")
    parser.add_argument("--deputy-of", metavar="NODE", help="queue the job again if this node is lost")
    arguments = parser.parse_args()
    allocation = Allocation.of(os.environ)
    if arguments.deputy_of:
        watch_node(allocation, arguments.deputy_of)
        return
    has_config = arguments.config is not None
    has_run = arguments.of is not None
    if has_config == has_run or bool(arguments.of) != bool(arguments.handoff):
        parser.error("give --config, or --of and --handoff")
    if has_run:
        program = _handoff_program(arguments.of, arguments.handoff)
    else:
        program = _config_program(arguments.config, arguments.set)
    if program is None:
        sys.exit(DONE)
    script.check_batch_script(program.config)
    _redirect_output(program.folder / LOG)
    code = Supervisor(program, allocation).run()
    if code in (FAILED, USAGE):
        record_failure(program.folder)
    sys.exit(code)


def _config_program(file: str, overrides: list[str]) -> Program:
    config = load_config(file, overrides)
    overrides = [*overrides, *_cache_overrides(config)]
    name = "finetune" if config.init else "pretrain"
    return Program(config, CODE, f"launch/{name}.py", file, overrides)


def _cache_overrides(config: Config) -> list[str]:
    """Returns the override that keeps fetched shards on the node's own disk, if it has one and none is configured."""
    if config.cluster.scratch and config.data.cache is None:
        return [f"data.cache={config.cluster.scratch}/shards"]
    return []


def _handoff_program(parent: Path, key: str) -> Program | None:
    """Returns the program of the child; None where the parent's model does not pass the entry's gate."""
    config = handoff.load_run_config(parent)
    # Keys are unique: a run whose hand-offs repeat is refused.
    (entry,) = (entry for entry in config.handoff if handoff.entry_key(entry) == key)
    claim, why = handoff.decide(parent, config, entry)
    if claim is None:
        log.warning(f"{entry.config}: not started: {why}")
        return None
    cluster = handoff.cluster_of(config, entry).model_dump_json()
    overrides = [*claim.overrides(config), f"cluster={cluster}"]
    child = load_config(claim.config, overrides)
    overrides += _cache_overrides(child)
    claim_arguments = ["--claim", str(handoff.claim_path(parent, entry))]
    return Program(child, CODE, "launch/finetune.py", claim.config, overrides, claim_arguments)


def _redirect_output(path: Path) -> None:
    """Appends all further output to one log for all of a run's jobs, whatever file the batch script names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    # The file descriptors, so that child processes such as srun write to the log, too.
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
