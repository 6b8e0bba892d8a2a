"""benchmarks.roofline: the bytes that it counts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.roofline import Moved

ROWS, WIDTH = 6, 4


@pytest.mark.parametrize(
    ("operation", "numbers"),
    [
        (lambda x: x.view(2, 3, WIDTH).transpose(0, 1)[1:].expand(2, 2, WIDTH).detach(), 0),
        (lambda x: torch.ops.aten._unsafe_view(x, [WIDTH, ROWS]), 0),
        (lambda x: x.split(2), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x.reshape(2, 3, WIDTH), 0),
        (lambda x: x.t().reshape(-1), 2 * ROWS * WIDTH),  # which has to copy
        (lambda x: x + x, 3 * ROWS * WIDTH),
        (lambda x: x.add_(1), 2 * ROWS * WIDTH),
    ],
)
def test_views_move_no_bytes_and_copies_are_counted(operation: Callable[[Tensor], object], numbers: int) -> None:
    with Moved() as moved:
        operation(torch.ones(ROWS, WIDTH))
    assert moved.bytes == 4 * (numbers + ROWS * WIDTH)  # torch.ones writes it


def test_linear_layer_bytes_are_operands_plus_result() -> None:
    layer, tokens = nn.Linear(WIDTH, 8, bias=False), torch.ones(2, 3, WIDTH)
    with Moved() as moved, torch.no_grad():
        layer(tokens)
    assert moved.bytes == 4 * (2 * 3 * WIDTH + 8 * WIDTH + 2 * 3 * 8)
