"""A step on another node that requeues the job once its first node is lost, and the supervisor with it."""

import logging
import time

from pipeline.cluster.slurm import Allocation

log = logging.getLogger(__name__)

_POLL_S = 20


def watch_node(allocation: Allocation, first: str) -> None:
    """Watches the job's first node until SLURM ends this process with the job."""
    # Because of --no-kill, SLURM would keep a job without its supervisor and without any process until its time limit.
    while True:
        time.sleep(_POLL_S)
        try:
            if first not in allocation.nodes():
                log.info(f"{first} is lost: queueing the job again")
                # SLURM then ends this process, too.
                allocation.requeue(set())
        except Exception as error:
            # Nobody else is left to try again.
            log.info(f"not yet: {error}")
