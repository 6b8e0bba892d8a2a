"""What to do about steps that would harm the weights.

    reduced loss ──judge──▶ leave it out? ──engine──▶ gradient norm, applied? ──settle──▶ must_roll_back, safe_step

Everything is decided from numbers that are equal on all ranks, so all decide alike without talking to each other, and
from nothing else, so a resumed or repeated run decides alike too.
"""

import math
import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import GuardConfig
from pipeline.errors import ExternalError

Kind = Literal["non-finite loss", "loss spike", "non-finite gradients", "gradient spike", "collapse"]

_HAS_LEARNT = 0.9  # of the chance loss: a window's mean below this shows that the network did better than guessing
_IS_GUESSING = 0.02  # losses no further than this fraction from the chance loss are a guesser's


@dataclass(frozen=True)
class Anomaly:
    step: int
    kind: Kind
    message: str


class Diverged(ExternalError):
    """Rolling back has not helped often enough."""


class Guard:
    """Watches one run. Steps are numbered as State.step counts them: `step` is what it was before the step."""

    def __init__(self, config: GuardConfig, chance_loss: float | None = None) -> None:
        """`chance_loss`: of a network that has learnt nothing, ln(classes). None: a collapse cannot be told."""
        self._config = config
        self._chance = math.nan if chance_loss is None else chance_loss  # with nan no comparison below is true
        self.load(
            {
                "regime": 0,
                "losses": [],
                "grad_norms": [],
                "best": None,
                "skipped_in_a_row": 0,
                "step": 0,
                "safe_step": 0,
                "rollback_steps": [],
            }
        )

    def judge(self, step: int, loss: float, regime: int = 0) -> Anomaly | None:
        """Before the update, which has to be left out unless this returns None.

        `regime`: the images' size. Another one makes another loss usual, so what was usual before is forgotten.
        """
        if regime != self._regime:
            self._regime = regime
            self._losses.clear()
            self._grad_norms.clear()
        return self._loss_anomaly(step, loss)

    def settle(self, step: int, loss: float, grad_norm: float, applied: bool, excused: bool = False) -> Anomaly | None:
        """After the step. `excused`: left out for a reason that is no anomaly, fp16 overflow above the scale's floor.

        An excused step neither counts as one of a row nor ends one. It tells about the loss scale alone: counted, the
        scale's descent at the start would roll a healthy run back; ending a row, one between two bad steps would
        hide that nothing has been learnt since the first.
        """
        self._step = step + 1
        if applied:
            return self._settle_applied(step, loss, grad_norm)
        if excused:
            return None
        self._skipped_in_a_row += 1
        if math.isfinite(grad_norm) or self._loss_anomaly(step, loss):
            return None  # `judge` has told
        return Anomaly(step, "non-finite gradients", f"the gradient norm is {grad_norm} at a loss of {loss:.4g}")

    @property
    def must_roll_back(self) -> bool:
        return self._skipped_in_a_row >= self._config.rollback_after or self._collapsed

    @property
    def safe_step(self) -> int:
        """The newest number of consumed steps after which the weights can be trusted: roll back to the newest regular
        checkpoint that is not newer.

        Weights are trusted once they gave a usual loss, one step after they came about: the update before a row of
        bad steps may be what spoilt them, and going back to just after it would not end.
        """
        return self._safe_step

    @property
    def rollbacks(self) -> int:
        return len(self._rollback_steps)

    def roll_back(self, saved: dict[str, Any]) -> None:
        """Go back to `saved`, the state in the checkpoint that the weights are taken from. Call before they are.
        Steps are counted on from where the run is.

        Raises Diverged, and changes nothing, when there have been max_rollbacks.
        """
        step, earlier = self._step, self._rollback_steps
        if len(earlier) >= self._config.max_rollbacks:
            used = f", used at steps {', '.join(map(str, earlier))}" if earlier else ""
            raise Diverged(
                f"step {step}: training has diverged and guard.max_rollbacks is {self._config.max_rollbacks}{used}: "
                "lower optim.lr, lengthen optim.warmup, set or lower optim.clip_grad, or try another run.seed"
            )
        self.load(saved)
        # The checkpoint's step; the saved safe_step is older, as its weights had given no loss yet, and a second row
        # right after this one would go back further.
        self._safe_step = saved["step"]
        self._step, self._rollback_steps, self._skipped_in_a_row = step, [*earlier, step], 0

    def state(self) -> dict[str, Any]:
        """For JSON, which keeps every bit of a float."""
        return {
            "regime": self._regime,
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "best": self._best if math.isfinite(self._best) else None,  # JSON has no infinity
            "skipped_in_a_row": self._skipped_in_a_row,
            "step": self._step,
            "safe_step": self._safe_step,
            "rollback_steps": list(self._rollback_steps),
        }

    def load(self, state: dict[str, Any]) -> None:
        window = self._config.window
        self._regime: int = state["regime"]
        self._losses = deque[float](state["losses"], maxlen=window)  # of applied steps, as are the norms
        self._grad_norms = deque[float](state["grad_norms"], maxlen=window)
        # The lowest mean of a full window of losses.
        self._best: float = math.inf if state["best"] is None else state["best"]
        self._skipped_in_a_row: int = state["skipped_in_a_row"]
        self._step: int = state["step"]
        self._safe_step: int = state["safe_step"]
        self._rollback_steps: list[int] = list(state["rollback_steps"])

    def _loss_anomaly(self, step: int, loss: float) -> Anomaly | None:
        if not math.isfinite(loss):
            return Anomaly(step, "non-finite loss", f"loss is {loss}")
        if message := self._spike("loss", loss, self._losses):
            # A collapse that comes at once is a row of these.
            guess = f"; guessing gives {self._chance:.4g}" if self._has_learnt and self._is_guess(loss) else ""
            return Anomaly(step, "loss spike", message + guess)
        return None

    def _settle_applied(self, step: int, loss: float, grad_norm: float) -> Anomaly | None:
        assert math.isfinite(loss + grad_norm), "an update that had to be left out was applied"
        spike = self._spike("gradient norm", grad_norm, self._grad_norms)
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._skipped_in_a_row = 0
        if len(self._losses) == self._config.window:
            self._best = min(self._best, statistics.fmean(self._losses))
        if self._is_healthy(loss):
            self._safe_step = step  # not step + 1: the loss is that of the weights before the update
        if self._collapsed:
            message = (
                f"the network has collapsed to guessing: loss has been {statistics.fmean(self._losses):.4g}, by chance "
                f"it is {self._chance:.4g}, for {len(self._losses)} steps after a best mean of {self._best:.4g}"
            )
            return Anomaly(step, "collapse", message)
        return Anomaly(step, "gradient spike", spike) if spike else None

    def _spike(self, name: str, value: float, window: Collection[float]) -> str | None:
        """Says by how much a value exceeds what is usual; None if it does not, or if too few are known to tell, half
        a window as in OLMo-core's SkipStepOptimizer."""
        if len(window) < self._config.window / 2:
            return None
        mean = statistics.fmean(window)
        # fsum is exact, so the order of the window does not enter. statistics.stdev takes eight times as long.
        deviation = math.sqrt(math.fsum((known - mean) ** 2 for known in window) / (len(window) - 1))
        # Where values hardly differ (small repetitive data), rounding would be many deviations. A rise by less than
        # some thousandths, or of a loss of nothing to next to nothing, does no harm.
        deviation = max(deviation, 1e-3 * abs(mean), 1e-6)
        excess = (value - mean) / deviation
        if excess <= self._config.sigmas:
            return None
        return (
            f"{name} {value:.4g} is {excess:.1f} standard deviations above the mean {mean:.4g} of the last "
            f"{len(window)} steps"
        )

    def _is_healthy(self, loss: float) -> bool:
        """Whether the weights that gave the loss have not begun to collapse."""
        return not self._has_learnt or loss <= (self._best + self._chance) / 2

    @property
    def _has_learnt(self) -> bool:
        return self._best < _HAS_LEARNT * self._chance

    @property
    def _collapsed(self) -> bool:
        """As PVT-Large does in some runs: within 30 steps of epoch 38 its loss went from 4.6 to 6.93, just above
        ln(1000), and stayed there (github.com/whai362/PVT/issues/6). No loss was infinite."""
        window_is_full = len(self._losses) == self._config.window
        return self._has_learnt and window_is_full and all(map(self._is_guess, self._losses))

    def _is_guess(self, loss: float) -> bool:
        return abs(loss - self._chance) <= _IS_GUESSING * self._chance
