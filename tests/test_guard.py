"""The guard's decisions on known sequences of losses and gradient norms."""

import json
import math
import random
import statistics

import pytest

from pipeline.config import GuardConfig
from pipeline.errors import ExternalError
from pipeline.train.guard import Anomaly, Diverged, Guard

CHANCE = math.log(1000)


def make(chance: float | None = CHANCE, **config: float) -> Guard:
    return Guard(GuardConfig.model_validate(config), chance)


def noisy(mean: float, count: int, spread: float = 0.1, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(mean, spread) for _ in range(count)]


def take(guard: Guard, step: int, loss: float, grad_norm: float = 1.0, regime: int = 0) -> list[Anomaly]:
    """A step as the loop and an engine take it: skipped if judged so or if its gradients are not finite."""
    judged = guard.judge(step, loss, regime)
    accounted = guard.account(step, loss, grad_norm, applied=judged is None and math.isfinite(grad_norm))
    return [anomaly for anomaly in (judged, accounted) if anomaly]


def run(guard: Guard, losses: list[float], start: int = 0, grad_norm: float = 1.0) -> list[Anomaly]:
    return [anomaly for step, loss in enumerate(losses, start) for anomaly in take(guard, step, loss, grad_norm)]


def kinds(anomalies: list[Anomaly]) -> list[tuple[int, str]]:
    return [(anomaly.step, anomaly.kind) for anomaly in anomalies]


def test_normal_noise_raises_no_anomaly_and_advances_safe_step() -> None:
    guard, safe = make(), []
    for step, loss in enumerate(noisy(4.0, 1000)):
        assert take(guard, step, loss, grad_norm=math.exp(loss - 4)) == []
        safe.append(guard.safe_step)
    assert safe == list(range(1000))
    assert not guard.must_roll_back


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_is_skipped_from_first_step(loss: float) -> None:
    assert kinds(take(make(), 0, loss, grad_norm=math.nan)) == [(0, "non-finite loss")]


def test_spike_threshold_is_six_sigma_above_window_mean() -> None:
    losses = noisy(2.3, 300)
    guard = make()
    run(guard, losses)
    mean, deviation = statistics.mean(losses[-128:]), statistics.stdev(losses[-128:])
    spike = mean + 6.001 * deviation
    assert guard.judge(300, mean + 5.999 * deviation) is None
    anomaly = guard.judge(300, spike)
    assert anomaly
    assert anomaly.kind == "loss spike"
    assert anomaly.message == (
        f"loss {spike:.4g} is 6.0 standard deviations above the mean {mean:.4g} of the last 128 steps"
    )
    assert guard.judge(300, mean - 50 * deviation) is None


def test_spikes_are_detected_once_window_is_half_full() -> None:
    losses = noisy(4.0, 64)
    few, enough = make(), make()
    run(few, losses[:63])
    run(enough, losses)
    assert few.judge(63, 100.0) is None
    assert enough.judge(64, 100.0) is not None


def test_skipped_loss_does_not_enter_window() -> None:
    guard = make(rollback_after=100)
    run(guard, noisy(4.0, 128))
    before = guard.state()
    assert kinds(run(guard, [6.0] * 50, start=128)) == [(step, "loss spike") for step in range(128, 178)]
    assert guard.state()["losses"] == before["losses"]


def test_tiny_deviation_of_constant_loss_is_no_spike() -> None:
    for usual, wobble, spike in ((2.0, 2.01, 2.02), (0.0, 5e-6, 7e-6)):
        guard = make()
        run(guard, [usual] * 128)
        assert guard.judge(128, wobble) is None
        assert guard.judge(128, spike) is not None


def test_resolution_change_resets_window() -> None:
    same, changed = make(), make()
    run(same, noisy(2.0, 128))
    run(changed, noisy(2.0, 128))
    assert same.judge(128, 4.0, regime=0) is not None
    assert take(changed, 128, 4.0, regime=192) == []
    assert changed.state()["losses"] == [4.0]
    assert changed.state()["grad_norms"] == [1.0]


def test_gradient_anomalies_are_reported_by_kind() -> None:
    guard = make()
    run(guard, noisy(4.0, 128))
    assert kinds(take(guard, 128, 4.0, grad_norm=math.inf)) == [(128, "non-finite gradients")]
    assert guard.state()["skipped_in_a_row"] == 1
    spike = take(guard, 129, 4.0, grad_norm=50.0)
    assert kinds(spike) == [(129, "gradient spike")]
    assert spike[0].message.startswith("gradient norm 50 is ")
    assert guard.state()["skipped_in_a_row"] == 0
    assert guard.safe_step == 129
    # A loss that was judged is not told a second time for the gradients that come with it.
    assert kinds(take(guard, 130, 9.0, grad_norm=math.nan)) == [(130, "loss spike")]


def test_consecutive_skips_trigger_rollback_to_safe_step() -> None:
    guard = make(rollback_after=3)
    run(guard, noisy(4.0, 100))
    run(guard, [math.nan, math.nan, 4.0, math.nan, math.nan], start=100)
    assert not guard.must_roll_back
    run(guard, [math.nan], start=105)
    assert guard.must_roll_back
    assert guard.safe_step == 102


def test_excused_overflow_neither_counts_nor_resets_skips() -> None:
    guard = make(rollback_after=3)
    for step in range(10):
        assert guard.account(step, 4.0, math.inf, applied=False, excused=True) is None
    assert not guard.must_roll_back
    run(guard, [math.nan, math.nan], start=10)
    guard.account(12, 4.0, math.inf, applied=False, excused=True)
    assert not guard.must_roll_back
    run(guard, [math.nan], start=13)
    assert guard.must_roll_back


def collapsing(steps: int = 128) -> list[float]:
    """Learning down to 3.2, then up within 300 steps, slowly enough to pass as noise, and flat just above ln(1000)."""
    down = [7.0 - 3.8 * step / 400 for step in range(400)]
    up = [3.2 + (CHANCE - 3.2) * step / 300 for step in range(300)]
    return [*down, *noisy(3.2, 200), *up, *noisy(CHANCE + 0.02, steps, 0.01)]


def test_collapse_to_chance_triggers_rollback_to_before_it() -> None:
    guard, losses = make(), collapsing()
    anomalies = run(guard, losses)
    first = anomalies[0]
    assert kinds(anomalies[:1]) == [(first.step, "collapse")]
    # The rise's end lies within 2 % of chance already.
    assert 990 < first.step < len(losses)
    assert f"by chance it is {CHANCE:.4g}, for 128 steps after a best mean of 3.19" in first.message
    assert guard.must_roll_back
    healthy = guard.safe_step
    assert losses[healthy] <= (guard.state()["best"] + CHANCE) / 2 < losses[healthy + 1]
    unknowing = make(chance=None)
    assert run(unknowing, losses) == []
    assert unknowing.safe_step == len(losses) - 1


def test_chance_loss_before_learning_is_no_collapse() -> None:
    guard = make()
    assert run(guard, noisy(CHANCE, 1000, 0.01)) == []
    assert guard.safe_step == 999


def test_sudden_collapse_is_reported_as_loss_spikes() -> None:
    # As in PVT's issue 6: from 4.6 to 6.93 within few steps.
    guard = make()
    run(guard, noisy(4.6, 300, 0.2))
    anomalies = run(guard, [5.4, 6.0, *[6.93] * 5], start=300)
    assert anomalies[-1].message.endswith("; guessing gives 6.908")
    assert guard.must_roll_back
    assert guard.safe_step == 300


def troubled(steps: int = 1500) -> list[tuple[float, float, int]]:
    """(loss, gradient norm, regime) with everything in it."""
    rng = random.Random(1)
    series = []
    for step in range(steps):
        loss = 2.5 + 4.5 * math.exp(-step / 200) + rng.gauss(0, 0.1) + (rng.random() < 0.02) * 5
        norm = math.exp(rng.gauss(0, 0.3)) * (1 + 40 * (rng.random() < 0.01))
        series.append((math.nan if rng.random() < 0.01 else loss, norm, 128 if step < 700 else 224))
    return series


def test_guard_restored_from_json_decides_identically() -> None:
    series = troubled()

    def go(guard: Guard, start: int, end: int) -> list[Anomaly]:
        return [a for step in range(start, end) for a in take(guard, step, *series[step])]

    whole = make()
    expected = go(whole, 0, 1500)
    assert {anomaly.kind for anomaly in expected} == {"non-finite loss", "loss spike", "gradient spike"}
    for cut in (0, 1, 63, 699, 700, 1111):
        first, second = make(), make()
        found = go(first, 0, cut)
        second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert second.state() == first.state()
        assert found + go(second, cut, 1500) == expected
        assert second.state() == whole.state()
        assert second.safe_step == whole.safe_step


def test_rollback_restores_saved_state_and_is_counted() -> None:
    guard = make(rollback_after=2)
    run(guard, noisy(4.0, 149))
    take(guard, 149, math.nan)  # the step before the save
    saved = json.loads(json.dumps(guard.state()))
    run(guard, noisy(3.9, 30, seed=1), start=150)
    run(guard, [math.nan] * 2, start=180)
    assert (guard.must_roll_back, guard.safe_step) == (True, 179)
    guard.roll_back(saved)
    assert (guard.must_roll_back, guard.safe_step, guard.rollbacks) == (False, 150, 1)
    assert guard.state()["losses"] == saved["losses"]
    # A checkpoint of this moment has the weights of step 150, which can be trusted, and is called 182.
    at_182 = guard.state()
    # A second row right after it: the same checkpoint.
    for start in (182, 184):
        run(guard, [math.nan], start=start)
        assert not guard.must_roll_back  # the skip before the save is forgotten
        run(guard, [math.nan], start=start + 1)
        assert (guard.must_roll_back, guard.safe_step) == (True, 150)
        guard.roll_back(saved)
    assert guard.rollbacks == 3
    take(guard, 186, 4.0)
    assert guard.safe_step == 186
    other = make(rollback_after=2)
    other.load(at_182)
    run(other, [4.0, math.nan, math.nan], start=182)
    assert (other.must_roll_back, other.safe_step) == (True, 182)
    other.roll_back(at_182)
    assert other.safe_step == 182


def test_exceeding_max_rollbacks_raises_without_changing_state() -> None:
    guard = make(rollback_after=2, max_rollbacks=2)
    saved = guard.state()
    for start in (10, 20):
        run(guard, [math.nan] * 2, start=start)
        guard.roll_back(saved)
    restored = make(rollback_after=2, max_rollbacks=2)
    restored.load(json.loads(json.dumps(guard.state())))
    run(restored, [math.nan] * 2, start=30)
    before = restored.state()
    with pytest.raises(Diverged, match=r"step 32: .* guard\.max_rollbacks is 2, used at steps 12, 22: ") as error:
        restored.roll_back(saved)
    assert isinstance(error.value, ExternalError)
    assert restored.state() == before
