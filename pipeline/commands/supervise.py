"""What a batch script of launch/submit.py or slurm/ runs: see pipeline/cluster/supervise.py.

python launch/supervise.py --config FILE [--set key=value …]      train or fine-tune
python launch/supervise.py --handoff KEY --of RUN                  a fine-tuning job that RUN hands off to
python launch/supervise.py --deputy-of NODE                        watch the node where one of those runs
"""

import argparse
import os
import sys
from pathlib import Path

from pipeline.cluster import script
from pipeline.cluster.slurm import Allocation
from pipeline.cluster.supervise import LOG, Program, Supervisor, deputise
from pipeline.config import Config, load_config
from pipeline.errors import DONE, FAILED, USAGE
from pipeline.job import handoff
from pipeline.track.sync.tracker import record_failure

CODE = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch/supervise.py", description="What a batch script runs.")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--of", type=Path, metavar="RUN", help="which run hands off")
    parser.add_argument("--handoff", metavar="KEY", help="to which of its jobs")
    parser.add_argument("--deputy-of", metavar="NODE", help="queue the job again if this node is lost")
    arguments = parser.parse_args()
    allocation = Allocation.of(os.environ)
    if arguments.deputy_of:
        deputise(allocation, arguments.deputy_of)
        return
    if (arguments.config is None) == (arguments.of is None) or bool(arguments.of) != bool(arguments.handoff):
        parser.error("give --config, or --of and --handoff")
    program = _handed_off(arguments.of, arguments.handoff) if arguments.of else _given(arguments.config, arguments.set)
    if program is None:
        sys.exit(DONE)
    script.check_batch_script(program.config)
    _log_to(program.folder / LOG)
    code = Supervisor(program, allocation).run()
    if code in (FAILED, USAGE):
        record_failure(program.folder)
    sys.exit(code)


def _given(file: str, overrides: list[str]) -> Program:
    config = load_config(file, overrides)
    overrides = [*overrides, *_on_scratch(config)]
    name = "finetune" if config.init else "pretrain"
    return Program(config, CODE, f"launch/{name}.py", file, overrides)


def _on_scratch(config: Config) -> list[str]:
    """Where shards are kept that are fetched: on the node's own disk, if it has one."""
    here = config.cluster.scratch and config.data.cache is None
    return [f"data.cache={config.cluster.scratch}/shards"] if here else []


def _handed_off(parent: Path, key: str) -> Program | None:
    """The child's; None where the parent's model has not reached what the entry asks for."""
    config = handoff.settings_of(parent)
    (entry,) = (entry for entry in config.handoff if handoff.key_of(entry) == key)
    claim, why = handoff.decide(parent, config, entry)
    if claim is None:
        print(f"{entry.config}: not started: {why}", file=sys.stderr)
        return None
    cluster = handoff.cluster_of(config, entry).model_dump_json()
    overrides = [*claim.overrides(config), f"cluster={cluster}"]
    child = load_config(claim.config, overrides)
    overrides += _on_scratch(child)
    claimed = ["--claim", str(handoff.path_of(parent, entry))]
    return Program(child, CODE, "launch/finetune.py", claim.config, overrides, claimed)


def _log_to(path: Path) -> None:
    """One log for all of a run's jobs, whatever file SLURM has been told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
