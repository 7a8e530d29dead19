"""Attention compiled for any sizes: those that layers and views make of others, and those that functions are given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
from test_fresh_spellings import BATCH, HEADS, LENGTH, SIZE, scores
from test_inductor import EAGER
from torch import Tensor, nn
from torch.nn import functional as F

import attngen
from attngen import compat
from attngen.compat import FloorDiv


def bias_of_a_pair_layer(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    """A layer gives ``n ** 2 // n`` where ``n`` was."""
    layer = torch.linspace(-1, 1, 15).view(HEADS, 5)
    return (scores(q, k) + F.linear(pairs, layer).permute(0, 3, 1, 2)).softmax(-1) @ v


def values_of_other_heads(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v.flip(1)


def relu_over_the_length(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    return F.relu(scores(q, k)) / k.shape[2] @ v


def groups_without_a_row(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    """Sizes that the graph divides: ``s // 2``."""
    q = q[:, :2, 0].reshape(2, 1, 2, SIZE)
    return torch.einsum("bgrj,bgjd->bgrd", torch.einsum("bgrd,bgjd->bgrj", q, k[:, :1]).softmax(-1), v[:, :1]).flatten(1, 2)


_LAYER = nn.MultiheadAttention(HEADS * SIZE, HEADS, batch_first=True)


def multihead(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    """The library's function is opened, which takes the sizes that it was given."""
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    result: Tensor = _LAYER(q, k, v, key_padding_mask=pairs[:, 0, :, 0] > 2, need_weights=False)[0]
    return result


@pytest.mark.parametrize(
    "function",
    [bias_of_a_pair_layer, values_of_other_heads, relu_over_the_length, groups_without_a_row, multihead],
    ids=lambda f: f.__name__,
)
def test_any_sizes(function: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="attngen", options=EAGER, dynamic=True)
    with attngen.record() as reports, torch.no_grad():
        for length in (LENGTH, 13):
            tensors = [*torch.randn(3, BATCH, HEADS, length, SIZE), torch.randn(BATCH, length, length, 5)]
            torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert {site.status for report in reports for site in report.sites} == {"replaced"}


def test_sizes_are_divided_only_where_nothing_is_left() -> None:
    n, m = sp.symbols("n m", integer=True, positive=True)
    for value, divisor in ((n**2, n), (n * m, m), (2 * n * m + 4 * m, 2 * m), (n + 1, n), (n, 2), (n * m, 2 * m), (3 * n, 2)):
        made = compat._simplified(FloorDiv(value, divisor, evaluate=False))
        for a in range(1, 7):
            at = {n: a, m: a + 2}
            assert made.subs(at) == value.subs(at) // (divisor.subs(at) if isinstance(divisor, sp.Basic) else divisor)
    assert compat._simplified(FloorDiv(n**2, n, evaluate=False)) == n
