"""fp16's loss scale."""

import dataclasses


@dataclasses.dataclass
class LossScale:
    """The dynamic loss scale: halved when gradients overflow, doubled after `window` good steps in a row."""

    value: float = 2.0**16
    good_steps: int = 0
    window: int = 2000
    floor: float = 1.0

    def update(self, finite: bool) -> None:
        if not finite:
            self.good_steps = 0
            self.value = max(self.value / 2, self.floor)
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.value *= 2
            self.good_steps = 0
