"""A micro-batch before its pixels are read: which samples it holds and how they are seen.

loader.py makes plans ──▶ image_stream.py carries them out
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.feed.augment import Views
from pipeline.feed.mixup import Blends
from pipeline.feed.order import Samples

Array = npt.NDArray[Any]


class Candidate(NamedTuple):
    """A sample that may be taken for one index of a micro-batch, and how it is seen there."""

    # One sample.
    samples: Samples
    weight: np.float32
    # One view.
    view: Views
    target: Any

    @property
    def shard_and_row(self) -> tuple[int, int]:
        return int(self.samples.shard[0]), int(self.samples.row[0])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a micro-batch of N samples but its pixels."""

    samples: Samples
    # [N] float32.
    weights: Array
    views: Views
    # [N] int64 class labels or, once annotations are read, a list of N targets.
    targets: Any
    # Yields replacements for the sample at an index, should it be damaged, in order of preference.
    substitutes: Callable[[int], Iterator[Candidate]]
    blends: Blends | None = None
    # [num_branches, N] float32.
    drop_path: Array | None = None

    def candidate(self, index: int) -> Candidate:
        """Returns the sample that is planned at an index."""
        one = slice(index, index + 1)
        return Candidate(
            self.samples.take(one),
            self.weights[index],
            self.views[one],
            self.targets[index],
        )

    def filled(self, candidates: Sequence[Candidate]) -> "Plan":
        """Returns this plan with N candidates instead of the samples that were planned."""
        samples, weights, views, targets = zip(*candidates, strict=True)
        are_labels = isinstance(targets[0], np.integer)
        return dataclasses.replace(
            self,
            samples=Samples.joined(samples),
            weights=np.array(weights),
            views=Views.joined(views),
            targets=np.array(targets) if are_labels else list(targets),
        )
