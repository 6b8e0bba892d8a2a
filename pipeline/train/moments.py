"""Adam's moments as DeepSpeed holds them, and each rank's partition of what ZeRO shares out.

stage 0       every rank holds all moments; its fragments are an equal range of all parameters laid end to end
stages 1, 2   a rank's fragments are the range of each parameter that DeepSpeed has linked to it ("_hp_mapping")
stage 3       a rank's fragments are its partitions of all parameters, without the padding of the last one
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.train.checkpoint_files import MOMENTS
from pipeline.train.import_deepspeed import deepspeed
from pipeline.world import World

ReadMoment = Callable[[str, str, int, int], Tensor]
"""Returns a range of a flattened moment, given the parameter's name, the moment, and where the range starts and stops.
"""


class Fragment(NamedTuple):
    """A range of one moment of one parameter."""

    name: str
    """The parameter's name."""
    moment: str
    """One of MOMENTS."""
    start: int
    """Where the range begins in the flattened parameter."""
    values: Tensor
    """A view of the values, flat."""


class Moments:
    """Reads and writes the moments of one engine's optimiser. No method communicates."""

    def __init__(
        self,
        stage: int,
        world: World,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        zero_optimizer: Any,
    ) -> None:
        """`optimizer` is AdamW itself, `zero_optimizer` what DeepSpeed has wrapped it with at stages 1 to 3."""
        self._stage = stage
        self._world = world
        self._parameters = parameters
        self._optimizer = optimizer
        self._zero_optimizer = zero_optimizer
        # Used at stage 0, where every rank holds all values.
        self._num_values = sum(parameter.numel() for parameter in parameters.values())

    def adam_steps(self) -> int:
        """Returns the number of updates that were applied, which is what Adam's bias correction counts."""
        steps = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        if not steps:
            return 0
        # One wait for the device, not one for each parameter.
        return int(torch.stack(steps).max())

    def fragments(self) -> Iterator[Fragment]:
        """Yields this rank's share of the moments. The ranks' shares together hold each value once."""
        if self._stage > 0:
            return self._held()
        rank, size = self._world.rank, self._world.size
        first = self._num_values * rank // size
        last = self._num_values * (rank + 1) // size
        return self._range(first, last)

    def load(self, read: ReadMoment, adam_steps: int) -> None:
        """Puts back what `fragments` and `adam_steps` gave, on any world and at any stage."""
        for name, moment, start, values in self._held():
            values.copy_(read(name, moment, start, start + values.numel()))
        self.reset_steps(adam_steps)

    def reset_steps(self, adam_steps: int) -> None:
        """Sets the number of applied updates."""
        for state in self._optimizer.state.values():
            state["step"].fill_(adam_steps)

    def link(self) -> None:
        """Lets DeepSpeed find the moments of all parameters.

        At stages 1 and 2 it looks for them once: when the first of the optimiser's groups has taken its first step and
        the others have no moments yet.
        """
        if self._stage not in (1, 2):
            return
        zero = self._zero_optimizer
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            deepspeed.utils.lazy_init_hp_params_optimizer_state(parameters, flat, self._optimizer.state)

    def _held(self) -> Iterator[Fragment]:
        """Yields all moments that this rank holds: at stage 0 more than its share."""
        if self._stage == 0:
            return self._range(0, self._num_values)
        if self._stage == 3:
            return iter(self._partitioned)
        return self._linked()

    def _range(self, first: int, last: int) -> Iterator[Fragment]:
        """Yields, at stage 0, the moments of the range `first` … `last` of all parameters laid end to end."""
        offset = 0
        for name, parameter in self._parameters.items():
            numel = parameter.numel()
            start = min(max(first - offset, 0), numel)
            stop = min(max(last - offset, 0), numel)
            offset += numel
            if start == stop:
                continue
            for moment in MOMENTS:
                values = self._optimizer.state[parameter][moment].view(-1)
                yield Fragment(name, moment, start, values[start:stop])

    def _linked(self) -> Iterator[Fragment]:
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's
            # All of the parameter may be on other ranks.
            if mapping is None:
                continue
            start = mapping.lp_fragment_address.start
            for moment in MOMENTS:
                yield Fragment(name, moment, start, mapping.get_optim_state_fragment(moment))

    @functools.cached_property
    def _partitioned(self) -> list[Fragment]:
        # Kept, because DeepSpeed waits for the device whenever it is asked for a partition.
        fragments = []
        for name, parameter in self._parameters.items():
            numel = parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's
            for moment in MOMENTS:
                values = local_partition(parameter, moment)
                start = self._world.rank * values.numel()
                if start < numel:
                    unpadded = values[: numel - start]
                    fragments.append(Fragment(name, moment, start, unpadded))
        return fragments


def local_partition(parameter: Any, moment: str | None = None) -> Tensor:
    """Returns this rank's partition of a parameter or of one of its moments at stage 3: fp32, flat, padded."""
    return parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, True, moment)[0].detach()
