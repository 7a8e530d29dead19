"""Attention over pieces of the keys that are merged by running sums or log-sum-exps: one site over all keys, or none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from analysis import assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor

BATCH, HEADS, LENGTH, SIZE = 2, 3, 48, 8
PARTS = (13, 20, 15)
PLACES = torch.arange(LENGTH)
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator, requires_grad=True) for _ in range(3)]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SIZE**-0.5


def partial(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True)


def halves(k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(k.split([20, 28], 2), v.split([20, 28], 2), strict=True))


def by_logarithms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (one, a), (two, b) = (partial(scores(q, kk), vv) for kk, vv in halves(k, v))
    whole = torch.logaddexp(a, b)
    return one * torch.exp(a - whole) + two * torch.exp(b - whole)


def one_after_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each piece is merged with what there is so far."""
    out, lse = partial(scores(q, k[:, :, : PARTS[0]]), v[:, :, : PARTS[0]])
    start = PARTS[0]
    for size in PARTS[1:]:
        piece, other = partial(scores(q, k[:, :, start : start + size]), v[:, :, start : start + size])
        new = torch.logaddexp(lse, other)
        out, lse, start = out * (lse - new).exp() + piece * (other - new).exp(), new, start + size
    return out


def running(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As FlashAttention goes over blocks."""
    out, total, largest = torch.zeros_like(v), torch.zeros_like(q[..., :1]), None
    for kk, vv in zip(k.split(PARTS, 2), v.split(PARTS, 2), strict=True):
        s = scores(q, kk)
        m = s.amax(-1, keepdim=True)
        if largest is None:
            p = (s - m).exp()
            out, total, largest = p @ vv, p.sum(-1, keepdim=True), m
            continue
        new = torch.maximum(largest, m)
        p, again = (s - new).exp(), (largest - new).exp()
        out, total, largest = out * again + p @ vv, total * again + p.sum(-1, keepdim=True), new
    return out / total


def running_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With a causal mask that fills in a number, and padding: rows without keys are the mean."""
    mask = (PLACES[:, None] >= PLACES) & (q[:, :, :, 0] > -1)[..., None, :]
    first, second = mask.split([20, 28], -1)
    (s, a), (t, b) = ((scores(q, kk), vv) for kk, vv in halves(k, v))
    s, t = s.masked_fill(~first, -1e9), t.masked_fill(~second, -1e9)
    m = s.amax(-1, keepdim=True)
    new = torch.maximum(m, t.amax(-1, keepdim=True))
    p, r, again = (s - m).exp(), (t - new).exp(), (m - new).exp()
    return (p @ a * again + r @ b) / (p.sum(-1, keepdim=True) * again + r.sum(-1, keepdim=True))


def without_a_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (p, a), (r, b) = ((scores(q, kk).exp(), vv) for kk, vv in halves(k, v))
    return (p @ a + r @ b) / (p.sum(-1, keepdim=True) + r.sum(-1, keepdim=True))


FOUND = (by_logarithms, one_after_another, running, running_masked, without_a_maximum)


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_one_site_over_all_keys(function: Function) -> None:
    run, analyses = watched(Call(function))
    args = [x.detach() for x in inputs()]
    torch.testing.assert_close(run(*args), function(*args))  # the graph that is analysed computes the same
    (analysis,) = analyses
    assert len(analysis.hits) == 1 and analysis.errors()[0] < 2e-6
    assert analysis.hits[0][0].key.extent == LENGTH


@pytest.mark.parametrize("kept", [(1, HEADS, LENGTH), (BATCH, 1, LENGTH), (1, 1, LENGTH), (BATCH, HEADS, 1)], ids=str)
def test_dimensions_of_one_element_are_dimensions(kept: tuple[int, int, int]) -> None:
    batch, heads, rows = kept

    def few() -> list[Tensor]:
        q, k, v = (x.detach()[:batch, :heads] for x in inputs())
        return [x.contiguous().requires_grad_() for x in (q[:, :, :rows], k, v)]

    assert_replaced_with_its_gradient(by_logarithms, few)


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function) -> None:
    assert_replaced_with_its_gradient(function, inputs)


# ------------------------------------------------------------------------------------------------------------ left alone


def shares_exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (one, a), (two, b) = (partial(scores(q, kk), vv) for kk, vv in halves(k, v))
    whole = torch.logaddexp(a, b)
    return one * torch.exp(b - whole) + two * torch.exp(a - whole)


def of_other_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (one, a), (two, _) = (partial(scores(q, kk), vv) for kk, vv in halves(k, v))
    b = (1.01 * scores(q, k[:, :, 20:])).logsumexp(-1, keepdim=True)
    whole = torch.logaddexp(a, b)
    return one * torch.exp(a - whole) + two * torch.exp(b - whole)


def one_piece_forgotten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (one, a), (two, b) = (partial(scores(q, kk), vv) for kk, vv in halves(k, v))
    whole = torch.logaddexp(a, a)
    return one * torch.exp(a - whole) + two * torch.exp(b - whole)


def one_maximum_for_each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first piece keeps its own maximum: no one softmax."""
    (s, a), (t, b) = ((scores(q, kk), vv) for kk, vv in halves(k, v))
    p, r = (s - s.amax(-1, keepdim=True)).exp(), (t - t.amax(-1, keepdim=True)).exp()
    return (p @ a + r @ b) / (p.sum(-1, keepdim=True) + r.sum(-1, keepdim=True))


def weights_in_other_proportions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (one, a), (two, b) = (partial(scores(q, kk), vv) for kk, vv in halves(k, v))
    whole = torch.logaddexp(a, b)
    return 2 * one * torch.exp(a - whole) + two * torch.exp(b - whole)


def pieces_without_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row that sees nothing of a piece is NaN there, and so in all."""
    mask = PLACES[:, None] >= PLACES
    pieces = zip(halves(k, v), mask.split([20, 28], -1), strict=True)
    (one, a), (two, b) = (partial(scores(q, kk).masked_fill(~m, -math.inf), vv) for (kk, vv), m in pieces)
    whole = torch.logaddexp(a, b)
    return one * torch.exp(a - whole) + two * torch.exp(b - whole)


def masked_by_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of a row of fills, the log-sum-exp is the fill: each piece counts as all of it."""
    mask = (PLACES[:, None] >= PLACES) & (q[:, :, :, 0] > -1)[..., None, :]
    pieces = zip(halves(k, v), mask.split([20, 28], -1), strict=True)
    (one, a), (two, b) = (partial(scores(q, kk).masked_fill(~m, -1e9), vv) for (kk, vv), m in pieces)
    whole = torch.logaddexp(a, b)
    return one * torch.exp(a - whole) + two * torch.exp(b - whole)


def of_other_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (one, a), (two, b) = (partial(scores(q, kk), vv) for kk, vv in halves(k, v))
    whole = torch.logaddexp(a.flip(2), b)
    return one * torch.exp(a - whole) + two * torch.exp(b - whole)


@pytest.mark.parametrize(
    "function",
    [
        shares_exchanged, of_other_scores, one_piece_forgotten, one_maximum_for_each, weights_in_other_proportions,
        pieces_without_keys, masked_by_a_number, of_other_queries,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_left_alone(function: Function) -> None:
    run, analyses = watched(Call(function))
    tensors = [x.detach() for x in inputs()]
    torch.testing.assert_close(run(*tensors), function(*tensors), equal_nan=True)
    assert all(site.key.extent < LENGTH for site, _ in analyses[0].hits)  # a piece may be one of its own
    torch._dynamo.reset()
    out = torch.compile(function, backend="attngen", options=EAGER)(*tensors)
    torch.testing.assert_close(out, function(*tensors), equal_nan=True)


def test_a_sum_of_which_nothing_is_left() -> None:
    """The only key is masked."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = scores(q, k[..., :1, :]).masked_fill(torch.arange(1) < 2, float("-inf")).exp()
        return (weights / weights.sum(-1, keepdim=True)) @ v[..., :1, :]

    compiled = torch.compile(function, backend="attngen", options={"inner": "eager", "strict": True})
    given = inputs()
    torch.testing.assert_close(compiled(*given), function(*given), equal_nan=True)
