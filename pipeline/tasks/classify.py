"""Image classification: the task of pretraining, and one of the fine-tuning tasks."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import network
from pipeline.answers import AnswerOptions, Seen, classification_rows
from pipeline.config import ClassificationConfig, ModelConfig
from pipeline.errors import InputError
from pipeline.feed.loader import MicroBatch
from pipeline.tasks.layer_groups import layers
from pipeline.world import World


def build_model(model: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    """Returns the classifier that a configuration names. Raises InputError as network.build does."""
    return network.build(ClassificationConfig(), model, image_size, num_classes)


def check_image_sizes(
    model: ModelConfig,
    image_size: int,
    num_classes: int,
    sizes: Iterable[int],
) -> None:
    """Raises InputError for a size of the resolution schedule that the network does not take.

    The network is built for `image_size`.
    """
    # The meta device computes shapes alone, without memory for weights or results.
    with torch.device("meta"), torch.inference_mode():
        classifier = build_model(model, image_size, num_classes).eval()
        for size in sizes:
            try:
                classifier(torch.empty(1, 3, size, size))
            except (ValueError, AssertionError, RuntimeError) as error:
                raise InputError(f"augment.size_schedule: {model.name} does not take {size}: {error}") from error


def drop_path_of(batch: MicroBatch) -> dict[str, Tensor]:
    """Returns the batch's drop-path masks as a network's keyword argument; nothing for networks without masks."""
    if batch.drop_path is None:
        return {}
    return {"drop_path": batch.drop_path}


class ClassificationTask:
    """Soft-target cross-entropy as the loss, by class weights if set; `ClassificationMetric` has the metrics."""

    main_metric = "top1"

    def __init__(self, model: nn.Module, classes: Sequence[str] = ()) -> None:
        """Without `classes` the guard cannot tell a collapse to guessing from learning."""
        self.model = model
        self.class_weights: Tensor | None = None
        """[K], see class_weights.py; None: all classes weigh the same."""
        # Uniform guesses over K classes have a cross-entropy of ln K.
        self.chance_loss = math.log(len(classes)) if len(classes) > 1 else None
        self.drop_path_rates: tuple[float, ...] = getattr(model, "drop_path_rates", ())

    @property
    def depths(self) -> dict[str, int]:
        """The layer of each parameter, by name."""
        return layers(self.model)

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Returns the loss of each image, [N] float32: -Σ w[c] t[c] log p[c] over classes c of weight w[c]."""
        logits = self.outputs(model, batch)
        log_probabilities = functional.log_softmax(logits.float(), dim=-1)
        targets = batch.targets
        if self.class_weights is not None:
            targets = targets * self.class_weights
        return -(targets * log_probabilities).sum(dim=-1)

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Returns logits [N, K]."""
        return model(batch.images, **drop_path_of(batch))

    def answers(
        self,
        outputs: Tensor,
        seen: Sequence[Seen],
        classes: Sequence[str],
        options: AnswerOptions,
    ) -> list[dict[str, Any]]:
        """Returns what logits [N, K] say about each image, see answers.py."""
        return classification_rows(outputs.float().softmax(dim=1), classes, options.top_k)

    def metric(self) -> "ClassificationMetric":
        """Returns a metric that has counted nothing yet."""
        return ClassificationMetric()


class ClassificationMetric:
    """Counts in float64, which is exact for any number of samples that fits on a disk."""

    def __init__(self) -> None:
        # [4]: number of samples, correct at first, correct among five, sum of losses.
        self._sums: Any = 0.0
        # [3, K]: samples of each class, those predicted to be of it, those of it that were predicted correctly.
        self._class_counts: Any = 0

    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Counts a batch: logits [N, K], classes [N] and weights [N]."""
        logits = outputs.float()
        best = logits.topk(min(5, logits.shape[1])).indices
        is_correct = best == targets[:, None]
        loss = functional.cross_entropy(logits, targets, reduction="none")
        counts = [
            torch.ones_like(loss),
            is_correct[:, 0].float(),
            is_correct.any(dim=1).float(),
            loss,
        ]
        weighted = torch.stack(counts).double() * weights.double()
        # On the device, so that nothing waits for it before the end.
        self._sums = self._sums + weighted.sum(dim=1)
        is_sample = weights.long()
        class_counts = is_sample.new_zeros(3, logits.shape[1])
        class_counts[0].index_add_(0, targets, is_sample)
        class_counts[1].index_add_(0, best[:, 0], is_sample)
        class_counts[2].index_add_(0, targets, is_sample * is_correct[:, 0])
        self._class_counts = self._class_counts + class_counts

    def result(self, world: World) -> dict[str, float]:
        """Returns the metrics over the batches of all ranks. Collective."""
        samples, first, five, loss = world.sum(self._sums).tolist()
        # float64 holds the counts exactly, and not every backend sums integers.
        of_class, predicted, correct = world.sum(self._class_counts.double())
        # As scikit-learn does, nanmean skips classes without samples, and for F1 without predictions as well.
        return {
            "top1": first / samples,
            "top5": five / samples,
            "balanced_accuracy": (correct / of_class).nanmean().item(),
            "macro_f1": (2 * correct / (of_class + predicted)).nanmean().item(),
            "majority": of_class.max().item() / samples,
            "val_loss": loss / samples,
        }
