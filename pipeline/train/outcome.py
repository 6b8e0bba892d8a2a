"""What one optimiser step did."""

import dataclasses
import math

from torch import Tensor


@dataclasses.dataclass
class Outcome:
    """What one optimiser step did: the same on all ranks but for `own_s`.

    `grad_norm` and `applied` wait for the device where the norm is not known yet.
    """

    loss: float
    """The mean over the global batch."""
    own_s: float
    """The seconds of this rank's forward passes: its own work, before it waits for other ranks."""
    norm: Tensor | float
    """The norm of the gradients before clipping: a tensor on the device until it is known."""
    skipped: bool | None = None
    """Whether the optimiser has skipped the step; None where it did so if the norm is not finite."""
    overflow: bool = False
    """Whether fp16's gradients overflowed while a smaller loss scale is left to try."""

    @property
    def is_known(self) -> bool:
        return not isinstance(self.norm, Tensor)

    @property
    def grad_norm(self) -> float:
        if isinstance(self.norm, Tensor):
            self.norm = self.norm.item()
        return self.norm

    @property
    def applied(self) -> bool:
        """Whether the weights have moved."""
        if self.skipped is None:
            return math.isfinite(self.grad_norm)
        return not self.skipped
