"""How much of its wall time a long run spends in steps that count, with failures, for 8 to 16,384 GPUs. A simulation.

python -m benchmarks.goodput [--days 14] [--save-every-s 60] [--stall-s …] [--restart-s …] [--detect-s …]

    start ─▶ steps, a stall for each save ─▶ failure ─▶ detect ─▶ start ─▶ from the newest committed checkpoint …

Time to failure is exponential, and the mean over a job is inversely proportional to its GPUs. A save stalls training,
then is written behind it, and counts when it is committed; a failure loses what came after. The effective training
time ratio (ETTR) is the time in steps that were not lost over the wall time, `--days`, as in `pipeline.train.goodput`,
without evaluation and without waiting in a queue or for data. Nothing grows with the number of GPUs but the rate of
failures.

Beside it stands the expectation to first order, with C the time from save to save, stall included:

    1 - stall / C - (detect + restart + commit + C / 2) / MTBF - restart / length of the run

and the save interval that Young and Daly found best, √(2 · stall · MTBF).
"""

import argparse
import dataclasses
import math
import statistics
from typing import Any

import numpy as np

from pipeline import cli

# Measured by benchmarks.checkpoint for PVT-Large on two CPU cores, rounded up.
STALL_S = 0.15
COMMIT_S = 2.5
# Assumed. On two CPU cores start-up takes 5 s (start_up_s in goodput.json), without NCCL, compilation and many nodes.
STEP_S = 0.5
RESTART_S = 60.0  # from process start to first step
DETECT_S = 10.0  # from a rank's death to new processes on spare nodes. A hang takes train.hang_timeout_s instead.

# Kokolis et al. 2024 (arXiv 2410.21680): jobs of 1,024 GPUs failed every 7.9 hours.
MTBF_HOURS_PER_GPU = 7.9 * 1024

GPUS = (8, 64, 256, 1024, 4096, 16384)
GOAL = 0.99  # at 1,024 GPUs


@dataclasses.dataclass(frozen=True)
class Job:
    """All in seconds."""

    length_s: float  # wall time
    step_s: float
    save_every_s: float  # of steps; taken as a whole number of them
    stall_s: float
    commit_s: float  # from the end of the stall
    restart_s: float
    detect_s: float
    mtbf_s: float

    @property
    def interval_s(self) -> float:
        return max(1, round(self.save_every_s / self.step_s)) * self.step_s

    @property
    def cycle_s(self) -> float:
        return self.interval_s + self.stall_s

    def expectation(self) -> float:
        """The ETTR to first order: failures are rare, none comes while another is dealt with."""
        lost_s = self.detect_s + self.restart_s + self.commit_s + self.cycle_s / 2
        return 1 - self.stall_s / self.cycle_s - lost_s / self.mtbf_s - self.restart_s / self.length_s

    def best_interval_s(self) -> float:
        return math.sqrt(2 * self.stall_s * self.mtbf_s)


@dataclasses.dataclass(frozen=True)
class Outcome:
    ettr: float
    failures: int


def simulate(job: Job, rng: np.random.Generator) -> Outcome:
    """One run, from failure to failure. What happens between two is arithmetic."""
    wall_s, saved_s, failures = 0.0, 0.0, 0  # saved: steps in the newest committed checkpoint
    while wall_s < job.length_s:
        failure_s = rng.exponential(job.mtbf_s)  # from the start of this process
        left_s = job.length_s - wall_s
        if failure_s >= left_s:
            saves, rest_s = divmod(max(0.0, left_s - job.restart_s), job.cycle_s)
            saved_s += saves * job.interval_s + min(rest_s, job.interval_s)
            break
        saved_s += job.interval_s * max(0, (failure_s - job.restart_s - job.commit_s) // job.cycle_s)
        wall_s += failure_s + job.detect_s
        failures += 1
    return Outcome(saved_s / job.length_s, failures)


def main() -> dict[str, Any]:
    arguments = _arguments()
    rng = np.random.default_rng(arguments.seed)
    print(f"{'GPUs':>6}{'MTBF':>10}{'failures':>10}{'ETTR':>9}{'worst':>9}{'expected':>10}{'best interval':>15}")
    ettr = {}
    for gpus in GPUS:
        job = Job(
            length_s=arguments.days * 86400,
            step_s=arguments.step_s,
            save_every_s=arguments.save_every_s,
            stall_s=arguments.stall_s,
            commit_s=arguments.commit_s,
            restart_s=arguments.restart_s,
            detect_s=arguments.detect_s,
            mtbf_s=3600 * arguments.mtbf_hours_per_gpu / gpus,
        )
        outcomes = [simulate(job, rng) for _ in range(arguments.runs)]
        ettr[gpus] = statistics.fmean(outcome.ettr for outcome in outcomes)
        failures = statistics.fmean(outcome.failures for outcome in outcomes)
        worst = min(outcome.ettr for outcome in outcomes)
        print(
            f"{gpus:6}{job.mtbf_s / 3600:8.2f} h{failures:10.1f}{ettr[gpus]:9.2%}{worst:9.2%}{job.expectation():10.2%}"
            f"{job.best_interval_s():13.0f} s"
        )
    return {
        "ettr": {str(gpus): round(value, 5) for gpus, value in ettr.items()},
        **vars(arguments),
        "goal_met_at_1024": ettr[1024] > GOAL,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description="Simulate a run with failures.")

    def add(name: str, default: float, text: str) -> None:
        parser.add_argument(name, type=float, default=default, metavar="X", help=f"{text} (default: {default:g})")

    add("--days", 14.0, "length of the run, wall time")
    add("--step-s", STEP_S, "one step")
    add("--save-every-s", 60.0, "steps between saves")
    add("--stall-s", STALL_S, "how long a save keeps training waiting")
    add("--commit-s", COMMIT_S, "from there until the checkpoint counts")
    add("--restart-s", RESTART_S, "from process start to first step")
    add("--detect-s", DETECT_S, "from a failure to the new processes")
    add("--mtbf-hours-per-gpu", MTBF_HOURS_PER_GPU, "a job's mean time between failures, times its GPUs")
    parser.add_argument("--runs", type=int, default=200, help="runs simulated for each number of GPUs (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.commit_s > arguments.save_every_s:
        parser.error(f"--commit-s {arguments.commit_s}: saves overlap at --save-every-s {arguments.save_every_s}")
    may_be_zero = ("stall_s", "commit_s", "restart_s", "detect_s", "seed")
    for name, value in vars(arguments).items():
        if not 0 <= value < math.inf or (value == 0 and name not in may_be_zero):
            least = "of at least 0" if name in may_be_zero else "above 0"
            parser.error(f"--{name.replace('_', '-')} is a number {least}, found {value}")
    return arguments


if __name__ == "__main__":
    cli.run(main)
