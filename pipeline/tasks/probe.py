"""Evaluates features as they are: by a vote of nearest neighbours, and by a linear classifier.

    images ──frozen network──▶ features [n, D] ─┬─ knn ──────────▶ scores [m, K]
                                                └─ linear_probe ─▶ scores [m, K]

n training images, m images to classify, D features, K classes.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import InputError

_CHUNK = 2**26
"""Elements of a tensor that grows with the product of two sizes: 256 MiB in fp32."""

_MAX_ITERATIONS = 5000

_MAX_GRADIENT = 1e-5
"""Largest gradient of a linear classifier that counts as converged."""

log = logging.getLogger(__name__)


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the inputs of a timm model's last layer: images [n, 3, H, W] -> [n, D]. For evaluation mode."""
    network: Any = model
    maps = network.forward_features(images)
    return network.forward_head(maps, pre_logits=True)


@torch.no_grad()
def knn(
    train_x: Tensor,
    train_y: Tensor,
    x: Tensor,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Returns votes [m, K] of the k nearest neighbours by cosine similarity; the sum of each row is 1.

    A vote has the weight exp(similarity / temperature). Wu et al., "Unsupervised Feature Learning via Non-Parametric
    Instance Discrimination", 2018, section 3.4; k and temperature are DINO's. Features train_x [n, D] with classes
    train_y [n], and x [m, D].
    """
    if k > len(train_x):
        raise InputError(f"k-NN with k {k} needs as many training images, and there are {len(train_x)}: lower k")
    train_x = functional.normalize(train_x, dim=1)
    x = functional.normalize(x, dim=1)
    votes = [_vote(train_x, train_y, chunk, num_classes, k, temperature) for chunk in _split_rows(x, len(train_x))]
    return torch.cat(votes)


def _vote(
    train_x: Tensor,
    train_y: Tensor,
    x: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
) -> Tensor:
    similarities, nearest = (x @ train_x.T).topk(k)  # [m, k]
    weights = functional.softmax(similarities / temperature, dim=1)
    votes = x.new_zeros(len(x), num_classes)
    rows = torch.arange(len(x), device=x.device)
    # One vote of each row at a time, so that the votes of a class are always added in the same order.
    for neighbour in range(k):
        classes = train_y[nearest[:, neighbour]]
        votes[rows, classes] += weights[:, neighbour]
    return votes


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    x: Tensor,
    num_classes: int,
    *,
    l2: float = 1.0,
) -> Tensor:
    """Returns scores [m, K] of a logistic regression, whose softmax are its probabilities.

    It minimises Σ cross-entropy + l2 / 2 · Σ weight², scikit-learn's LogisticRegression(C=1 / l2), on features that are
    shifted and scaled to mean 0 and deviation 1 over the training images.
    """
    train_x = train_x.double()
    mean = train_x.mean(dim=0)
    scale = train_x.std(dim=0, correction=0)
    # A feature that is the same in all training images says nothing, and must not divide by 0.
    scale = torch.where(scale > 0, scale, 1.0)
    weight, bias = logistic_regression((train_x - mean) / scale, train_y, num_classes, l2)
    return (x.double() - mean) / scale @ weight.T + bias


def logistic_regression(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    l2: float,
) -> tuple[Tensor, Tensor]:
    """Returns the weight [K, D] and bias [K] that minimise Σ cross-entropy + l2 / 2 · Σ weight².

    They are found by L-BFGS in float64 from 0.
    """
    x = x.double()
    weight = torch.zeros(
        num_classes,
        x.shape[1],
        dtype=x.dtype,
        device=x.device,
        requires_grad=True,
    )
    bias = torch.zeros(
        num_classes,
        dtype=x.dtype,
        device=x.device,
        requires_grad=True,
    )
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        max_eval=2 * _MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    x_chunks = _split_rows(x, num_classes)
    y_chunks = _split_rows(y, num_classes)

    def objective() -> float:
        """Returns the objective for each image, so that the tolerance means the same for any number of them."""
        optimizer.zero_grad()
        penalty = l2 / 2 * weight.square().sum() / len(x)
        penalty.backward()
        total = penalty.item()
        # A backward pass for each chunk, so that the logits of one alone are in memory.
        for x_chunk, y_chunk in zip(x_chunks, y_chunks, strict=True):
            logits = x_chunk @ weight.T + bias
            loss = functional.cross_entropy(logits, y_chunk, reduction="sum") / len(x)
            loss.backward()
            total += loss.item()
        return total

    optimizer.step(objective)
    assert weight.grad is not None
    gradient = weight.grad.abs().max().item()
    if gradient > _MAX_GRADIENT:
        log.warning("the linear probe has not converged: its largest gradient is %.1e; a larger l2 helps", gradient)
    return weight.detach(), bias.detach()


def _split_rows(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Splits rows into chunks whose product with `columns` has a bounded size."""
    return rows.split(max(1, _CHUNK // columns))
