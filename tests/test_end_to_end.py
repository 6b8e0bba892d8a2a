"""benchmarks.end_to_end: when the clock starts, when it stops, and what it says."""

from benchmarks import end_to_end_contenders as contenders
from benchmarks.end_to_end import is_warm, speed_since

JOB = {"steps": 10, "seconds": 4.0, "warm_up": 10.0, "batch": 32}


def logged(*steps: int, step_s: float) -> dict[int, float]:
    return {step: 100.0 + step * step_s for step in steps}


def test_warm_up_lasts_minimum_steps_and_seconds() -> None:
    assert not is_warm({}, JOB)
    assert not is_warm(logged(5, 500, step_s=0.02), JOB)
    assert is_warm(logged(5, 510, step_s=0.02), JOB)
    assert not is_warm(logged(5, 10, step_s=30), JOB)
    assert is_warm(logged(5, 15, step_s=30), JOB)


def test_speed_is_measured_over_minimum_steps_and_seconds() -> None:
    assert speed_since(500, logged(5, 500, 600, step_s=0.02), JOB) is None  # 2 seconds
    assert speed_since(500, logged(5, 500, 700, step_s=0.02), JOB) == 32 / 0.02
    assert speed_since(15, logged(5, 15, 20, step_s=30), JOB) is None  # 5 steps
    assert speed_since(15, logged(5, 15, 25, step_s=30), JOB) == 32 / 30


def test_contenders_repeat_for_minimum_steps_and_seconds() -> None:
    taken = list[int]()
    steps, seconds = contenders.repeat(lambda: taken.append(1), 3, 0.05)
    assert steps == len(taken) >= 3
    assert steps % 3 == 0
    assert seconds >= 0.05
    assert contenders.repeat(lambda: None, 3, 0.0)[0] == 3
