"""Sites that read the same scores or weights: replaced together, or, where anybody else reads them, not at all."""

from __future__ import annotations

import pytest
import torch
from analysis import Function, analysed, inputs_of, scores, weights
from test_inductor import EAGER
from torch import Tensor

import attngen


def weights_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    return w @ v + w @ (v * 2 + k)


def scores_under_two_masks(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scores(q, k) * 0.25
    return s.masked_fill(m, -9.0).softmax(-1) @ v - s.tril().softmax(-1) @ k


def scores_of_two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Text and layout add their scores up, each for values of its own (LiLT)."""
    text, layout = scores(q, k) / 4, scores(q[..., :4], k[..., :4]) / 2
    return torch.cat([(text + layout).softmax(-1) @ v, (layout + text).softmax(-1) @ v[..., :4]], -1)


def read_by_a_third(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    return w @ v + w @ k + w.mean()


def one_of_them_is_read(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """The first site would go if the second did, and that one has its weights read."""
    s = scores(q, k)
    w = s.masked_fill(m, -9.0).softmax(-1)
    return s.softmax(-1) @ v + w @ v + w.sum()


def one_of_them_is_no_site(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.softmax(-1) @ v + s.softmax(-2) @ v


def added_to_the_next(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores of one layer are a bias in the next, which reads them as a tensor (RealFormer)."""
    s = scores(q, k) * 0.25
    y = s.softmax(-1) @ v
    return (scores(torch.cat([y, y], -1), torch.cat([k, v], -1)) * 0.1 + s).softmax(-1) @ v


SHARED: dict[Function, int] = {
    weights_twice: 2,
    scores_under_two_masks: 2,
    scores_of_two_products: 2,
    read_by_a_third: 0,
    one_of_them_is_read: 0,
    one_of_them_is_no_site: 0,
    added_to_the_next: 1,
}


@pytest.mark.parametrize(("function", "count"), SHARED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_found_together_and_exact(function: Function, count: int) -> None:
    found = analysed(function)
    assert len(found.hits) == count, [str(miss) for miss in found.misses]
    assert all(error < 5e-6 for error in found.errors())
    assert count or any("also read by" in miss.reason for miss in found.misses)


@pytest.mark.parametrize("function", SHARED, ids=lambda function: function.__name__)
def test_results_and_gradients_are_those_of_eager(function: Function) -> None:
    torch._dynamo.reset()
    results = []
    for run in (function, torch.compile(function, backend="attngen", options=EAGER)):
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs_of(function).values()]
        with attngen.record() as reports:
            out = run(*inputs)
        (out * torch.arange(out.numel()).cos().view(out.shape)).sum().backward()
        results.append([out, *(x.grad for x in inputs if x.grad is not None)])
    assert sum(len(report.replaced) for report in reports) == SHARED[function]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
