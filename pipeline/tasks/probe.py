"""How good features are as they are: a vote of nearest neighbours, and a linear classifier.

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
"""Numbers of a tensor that grows with the product of two sizes: 256 MiB in fp32."""

_MAX_ITERATIONS = 5000

log = logging.getLogger(__name__)


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of a timm model, in evaluation mode, would be given: images [n, 3, H, W] -> [n, D]."""
    network: Any = model
    return network.forward_head(network.forward_features(images), pre_logits=True)


@torch.no_grad()
def knn(
    train_x: Tensor, train_y: Tensor, x: Tensor, num_classes: int, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes of the k nearest by cosine, each of weight exp(similarity / temperature): [m, K], a row's sum is 1.

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4; k and
    temperature are DINO's. Features train_x [n, D] with classes train_y [n], and x [m, D].
    """
    if k > len(train_x):
        raise InputError(f"k-NN with k {k} needs as many training images, and there are {len(train_x)}: lower k")
    train_x, x = functional.normalize(train_x, dim=1), functional.normalize(x, dim=1)
    return torch.cat([_vote(train_x, train_y, part, num_classes, k, temperature) for part in _parts(x, len(train_x))])


def _vote(train_x: Tensor, train_y: Tensor, x: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    similarities, nearest = (x @ train_x.T).topk(k)  # [m, k]
    weights = functional.softmax(similarities / temperature, dim=1)
    votes = x.new_zeros(len(x), num_classes)
    rows = torch.arange(len(x), device=x.device)
    for rank in range(k):  # one vote a row at a time, so that the order of a class's votes is always the same
        votes[rows, train_y[nearest[:, rank]]] += weights[:, rank]
    return votes


def linear_probe(train_x: Tensor, train_y: Tensor, x: Tensor, num_classes: int, *, l2: float = 1.0) -> Tensor:
    """Scores [m, K] of a logistic regression, whose softmax are its probabilities.

    It minimises Σ cross-entropy + l2 / 2 · Σ weight², scikit-learn's LogisticRegression(C=1 / l2), on features that are
    shifted and scaled to mean 0 and deviation 1 over the training images.
    """
    mean, scale = train_x.double().mean(dim=0), train_x.double().std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    weight, bias = logistic_regression((train_x.double() - mean) / scale, train_y, num_classes, l2)
    return (x.double() - mean) / scale @ weight.T + bias


def logistic_regression(x: Tensor, y: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weight [K, D] and bias [K] that minimise Σ cross-entropy + l2 / 2 · Σ weight², by L-BFGS in float64 from 0."""
    x = x.double()
    weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        max_eval=2 * _MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    parts = list(zip(_parts(x, num_classes), _parts(y, num_classes), strict=True))

    def objective() -> float:
        """Per image, so that the tolerance means the same for any number of them."""
        optimizer.zero_grad()
        penalty = l2 / 2 * weight.square().sum() / len(x)
        penalty.backward()
        total = penalty.item()
        for some_x, some_y in parts:
            loss = functional.cross_entropy(some_x @ weight.T + bias, some_y, reduction="sum") / len(x)
            loss.backward()
            total += loss.item()
        return total

    optimizer.step(objective)
    assert weight.grad is not None
    if (slope := weight.grad.abs().max().item()) > 1e-5:
        log.warning("the linear probe has not converged: its largest gradient is %.1e; a larger l2 helps", slope)
    return weight.detach(), bias.detach()


def _parts(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Rows in parts whose product with `columns` is of bounded size."""
    return rows.split(max(1, _CHUNK // columns))
