"""What to do about steps that would harm the weights.

    reduced loss ──judge──▶ skip the step? ──engine──▶ gradient norm, applied? ──account──▶ must_roll_back, safe_step

Everything is decided from numbers that are equal on all ranks, so all decide alike without communication, and from
nothing else, so a resumed or repeated run decides alike too.
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

_HAS_LEARNT = 0.9
"""A window's mean below this fraction of the chance loss shows that the network did better than guessing."""
_IS_GUESSING = 0.02
"""A network whose losses are no further than this fraction from the chance loss guesses."""


@dataclass(frozen=True)
class Anomaly:
    step: int
    kind: Kind
    message: str


class Diverged(ExternalError):
    """Training has diverged, and rolling back does not help."""


class Guard:
    """Watches one run. Steps are numbered as State.step counts them: `step` is what it was before the step."""

    def __init__(self, config: GuardConfig, chance_loss: float | None = None) -> None:
        """`chance_loss` is that of a network that has learnt nothing, ln(classes); with None no collapse is found."""
        self._config = config
        self._chance = chance_loss
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
        """Returns what is wrong with a step's loss. Unless that is None, the update has to be skipped.

        `regime` is the images' size. Another size makes another loss usual, so earlier losses are forgotten.
        """
        if regime != self._regime:
            self._regime = regime
            self._losses.clear()
            self._grad_norms.clear()
        return self._find_loss_anomaly(step, loss)

    def account(self, step: int, loss: float, grad_norm: float, applied: bool, excused: bool = False) -> Anomaly | None:
        """Counts what came of a step. Returns what is wrong with it, if `judge` has not reported that.

        `excused` means that it was skipped for a reason that is no anomaly: fp16 overflow above the scale's floor. Such
        a step neither counts as one of a row nor ends one, because it shows nothing but that the loss scale was too
        high. If it counted, the scale's descent at the start would roll a healthy run back; if it ended a row, one
        between two bad steps would hide that nothing has been learnt since the first.
        """
        self._step = step + 1
        if applied:
            return self._account_applied(step, loss, grad_norm)
        if excused:
            return None
        self._skipped_in_a_row += 1
        # `judge` has reported it.
        if math.isfinite(grad_norm) or self._find_loss_anomaly(step, loss):
            return None
        return Anomaly(step, "non-finite gradients", f"the gradient norm is {grad_norm} at a loss of {loss:.4g}")

    @property
    def must_roll_back(self) -> bool:
        return self._skipped_in_a_row >= self._config.rollback_after or self._collapsed

    @property
    def safe_step(self) -> int:
        """The newest number of consumed steps after which the weights can be trusted: roll back to the newest regular
        checkpoint that is not newer.

        Weights are trusted once they gave a usual loss, one step after the update that made them. The update before a
        row of bad steps may be what spoilt them, and the run would go back to just after it again and again.
        """
        return self._safe_step

    @property
    def rollbacks(self) -> int:
        return len(self._rollback_steps)

    def roll_back(self, saved: dict[str, Any]) -> None:
        """Goes back to `saved`, the state in the checkpoint that the weights are taken from. Call it before they are.
        Steps are counted on from where the run is.

        Raises Diverged, and changes nothing, when there have been max_rollbacks.
        """
        step, earlier = self._step, self._rollback_steps
        if len(earlier) >= self._config.max_rollbacks:
            used = ""
            if earlier:
                used = f", used at steps {', '.join(map(str, earlier))}"
            raise Diverged(
                f"step {step}: training has diverged and guard.max_rollbacks is {self._config.max_rollbacks}{used}: "
                "lower optim.lr, lengthen optim.warmup, set or lower optim.clip_grad, or try another run.seed"
            )
        self.load(saved)
        # The checkpoint's step; the saved safe_step is older, as its weights had given no loss yet, and a second row
        # right after this one would go back further.
        self._safe_step = saved["step"]
        self._step = step
        self._rollback_steps = [*earlier, step]
        self._skipped_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """Returns the state for JSON, which keeps every bit of a float."""
        return {
            "regime": self._regime,
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            # JSON has no infinity.
            "best": self._best if math.isfinite(self._best) else None,
            "skipped_in_a_row": self._skipped_in_a_row,
            "step": self._step,
            "safe_step": self._safe_step,
            "rollback_steps": list(self._rollback_steps),
        }

    def load(self, state: dict[str, Any]) -> None:
        window = self._config.window
        self._regime: int = state["regime"]
        # Losses and norms are those of applied steps.
        self._losses = deque[float](state["losses"], maxlen=window)
        self._grad_norms = deque[float](state["grad_norms"], maxlen=window)
        # The lowest mean of a full window of losses.
        self._best: float = math.inf if state["best"] is None else state["best"]
        self._skipped_in_a_row: int = state["skipped_in_a_row"]
        self._step: int = state["step"]
        self._safe_step: int = state["safe_step"]
        self._rollback_steps: list[int] = list(state["rollback_steps"])

    def _find_loss_anomaly(self, step: int, loss: float) -> Anomaly | None:
        if not math.isfinite(loss):
            return Anomaly(step, "non-finite loss", f"loss is {loss}")
        message = self._describe_spike("loss", loss, self._losses)
        if message is None:
            return None
        if self._has_learnt and self._is_guess(loss):
            # A network that collapses from one step to the next shows as a row of these.
            message += f"; guessing gives {self._chance:.4g}"
        return Anomaly(step, "loss spike", message)

    def _account_applied(self, step: int, loss: float, grad_norm: float) -> Anomaly | None:
        assert math.isfinite(loss + grad_norm), "an update that had to be skipped was applied"
        spike = self._describe_spike("gradient norm", grad_norm, self._grad_norms)
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._skipped_in_a_row = 0
        if len(self._losses) == self._config.window:
            self._best = min(self._best, statistics.fmean(self._losses))
        if self._is_healthy(loss):
            # Not step + 1: the loss is that of the weights before the update.
            self._safe_step = step
        if self._collapsed:
            mean = statistics.fmean(self._losses)
            message = (
                f"the network has collapsed to guessing: loss has been {mean:.4g}, by chance "
                f"it is {self._chance:.4g}, for {len(self._losses)} steps after a best mean of {self._best:.4g}"
            )
            return Anomaly(step, "collapse", message)
        return Anomaly(step, "gradient spike", spike) if spike else None

    def _describe_spike(self, name: str, value: float, window: Collection[float]) -> str | None:
        """Returns by how much a value exceeds what is usual; None if it does not, or if fewer than half a window of
        values are known (as in OLMo-core's SkipStepOptimizer)."""
        if len(window) < self._config.window / 2:
            return None
        mean = statistics.fmean(window)
        # fsum is exact, so the window's order does not matter. statistics.stdev takes eight times as long.
        squares = math.fsum((known - mean) ** 2 for known in window)
        variance = squares / (len(window) - 1)
        deviation = math.sqrt(variance)
        # Where values hardly differ (small repetitive data), rounding would be many deviations. A rise by less than
        # some thousandths, or of a loss that is close to zero, does no harm.
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
        if self._chance is None or not self._has_learnt:
            return True
        return loss <= (self._best + self._chance) / 2

    @property
    def _has_learnt(self) -> bool:
        return self._chance is not None and self._best < _HAS_LEARNT * self._chance

    @property
    def _collapsed(self) -> bool:
        """Whether a network that had learnt something has done nothing but guess for a whole window.

        PVT-Large does so in some runs: within 30 steps of epoch 38 its loss went from 4.6 to 6.93, just above ln(1000),
        and stayed there (github.com/whai362/PVT/issues/6). No loss was infinite.
        """
        window_is_full = len(self._losses) == self._config.window
        return self._has_learnt and window_is_full and all(map(self._is_guess, self._losses))

    def _is_guess(self, loss: float) -> bool:
        if self._chance is None:
            return False
        return abs(loss - self._chance) <= _IS_GUESSING * self._chance
