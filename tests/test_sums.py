"""Weights that are a sum of softmaxes (differential attention): one kernel for each, added up before rounding, or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from analysis import Analysis, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor
from torch.nn.functional import dropout

import attngen
from attngen.verify import within_budget

BATCH, HEADS, LENGTH, SIZE = 2, 3, 37, 16
DRAWS = 12
Function = Callable[..., Tensor]


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * SIZE**-0.5).softmax(-1)


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Two pairs of queries and keys, values, and one number."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator) for _ in range(5)]
    return [x.to(dtype).requires_grad_() for x in (*tensors, torch.full((1,), 0.8))]


def cancelling(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Values around 20 and nearly as much subtracted: each term is much larger than the difference."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, HEADS, 512, SIZE, generator=generator) for _ in range(5)]
    tensors[4] += 20
    return [x.to(dtype).requires_grad_() for x in (*tensors, torch.full((1,), 0.96))]


def difference(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (weights(q1, k1) - rate * weights(q2, k2)) @ v


def causal(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    far = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    first, second = (
        (q @ k.mT * SIZE**-0.5).masked_fill(far, -math.inf).softmax(-1) for q, k in ((q1, k1), (q2, k2))
    )
    return torch.einsum("bhij,bhjd->bihd", first - rate * second, v)


def split_heads(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """As published: every second head belongs to the subtracted softmax, and all scores are one product."""
    q, k = torch.stack([q1, q2], 2).flatten(1, 2), torch.stack([k1, k2], 2).flatten(1, 2)
    w = weights(q.contiguous(), k.contiguous()).view(BATCH, HEADS, 2, LENGTH, LENGTH)
    return (w[:, :, 0] - rate * w[:, :, 1]) @ v


def rate_of_a_query(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (weights(q1, k1) - rate * q2[..., :1].sigmoid() * weights(q2, k2)) @ v


def rate_of_a_key(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (weights(q1, k1) - rate * k2[..., 0].sigmoid().unsqueeze(-2) * weights(q2, k2)) @ v


def scaled(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return ((1 - rate) * (weights(q1, k1) - weights(q2, k2) / 2) / 3) @ v


def mean(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """Two temperatures of one product, and a third softmax."""
    return rate * (((weights(q1, k1) + weights(2 * q1, k1) + weights(q2, k2)) / 3) @ v)


def no_dropout(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return dropout(weights(q1, k1) - rate * weights(q2, k2), 0.1, training=False).to(v.dtype).contiguous() @ v


FOUND = {
    difference: 2,
    causal: 2,
    split_heads: 2,
    rate_of_a_query: 2,
    rate_of_a_key: 2,
    scaled: 2,
    mean: 3,
    no_dropout: 2,
}


def analysed(function: Function) -> Analysis:
    run, analyses = watched(Call(function))
    with torch.no_grad():
        run(*(x.detach() for x in inputs()))
    return analyses[0]


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_found_and_equal(function: Function) -> None:
    analysis = analysed(function)
    assert len(analysis.hits) == FOUND[function] and not analysis.misses
    assert all(error < 2e-6 for error in analysis.errors())


def differentiated(run: Function, tensors: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad, allow_unused=True)]


def assert_within_budget(function: Function, make: Callable[..., list[Tensor]], **options: Any) -> None:
    """Result and gradients, of the function with all its sites replaced: of one number, over several draws, for eager's
    error in a single one is a matter of luck."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="attngen", options={**EAGER, **options})
    with attngen.record() as reports:
        ours = [differentiated(compiled, make(seed=seed)) for seed in range(DRAWS)]
    assert [site.status for report in reports for site in report.sites] == ["replaced"] * FOUND[function]
    eager = [differentiated(function, make(seed=seed)) for seed in range(DRAWS)]
    doubled = ([x.detach().double().requires_grad_() for x in make(seed=seed)] for seed in range(DRAWS))
    exact = [differentiated(function, tensors) for tensors in doubled]
    for place, several in enumerate(zip(*(zip(*runs, strict=True) for runs in (ours, exact, eager)), strict=True)):
        count = DRAWS if several[0][0].numel() == 1 else 1
        a, x, e = (torch.stack(each[:count]) for each in several)
        assert a.dtype == e.dtype
        verdict = within_budget(a, x, e, slack=3.0 if place else 2.0)
        assert verdict.ok, (place, verdict)


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function, dtype: torch.dtype) -> None:
    assert_within_budget(function, partial(inputs, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_terms_that_nearly_cancel_are_not_rounded_before(dtype: torch.dtype) -> None:
    """Two roundings would be over the budget."""
    assert_within_budget(difference, partial(cancelling, dtype))
    q1, k1, q2, k2, v, rate = (x.detach() for x in cancelling(dtype))
    exact = difference(*(x.double() for x in (q1, k1, q2, k2, v, rate)))
    twice = ((weights(q1.double(), k1.double()) @ v.double()).to(dtype) - rate * (weights(q2, k2) @ v)).to(dtype)
    assert not within_budget(twice, exact, difference(q1, k1, q2, k2, v, rate)).ok


def test_kernels_are_right() -> None:
    """In Triton's interpreter, or on the GPU there is."""
    if (problem := attngen.compat.interpreter_problem()) is not None:
        pytest.skip(problem)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(split_heads, backend="attngen", options={**EAGER, "verify": True})
        with attngen.record() as reports:
            out = compiled(*inputs(torch.float16))
    sites = [site for report in reports for site in report.sites]
    assert [site.status for site in sites] == ["replaced"] * 2
    assert [site.computes.rsplit(", ", 1)[1] for site in sites] == ["term 1 of 2", "term 2 of 2"]
    assert out.dtype == torch.float16


# ---------------------------------------------------------------------------------------------------- left as they are


def plus_identity(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (weights(q1, k1) - rate * weights(q2, k2) + torch.eye(LENGTH)) @ v


def plus_sigmoid(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (weights(q1, k1) - rate * (q2 @ k2.mT).sigmoid()) @ v


def over_queries(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (weights(q1, k1) - rate * (q2 @ k2.mT).softmax(-2)) @ v


def transposed(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (weights(q1, k1) - rate * weights(q2, k2).mT) @ v


def one_is_read(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    w = weights(q2, k2)
    return (weights(q1, k1) - rate * w) @ v + w.mean()


def one_makes_the_other(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    w = weights(q1, k1)
    return (w - rate * weights(q2 * w.amax(-1, keepdim=True), k2)) @ v


def rate_of_the_weights(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    w = weights(q1, k1)
    return (w - rate * w.amax(-1, keepdim=True) * weights(q2, k2)) @ v


def product_of_weights(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    w = weights(q1, k1)
    return (w * (w - rate * weights(q2, k2))) @ v


def many(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return sum((weights(n * q1, k1) for n in range(1, 6)), torch.zeros(())) @ v


ADDED = "something is added to the attention weights"
CHANGED = "the weights are changed between the exponential"
ALONE = {
    plus_identity: ADDED,
    plus_sigmoid: ADDED,
    over_queries: ADDED,
    transposed: ADDED,
    one_is_read: "also read by",
    one_makes_the_other: "",
    rate_of_the_weights: "",
    product_of_weights: "",
    many: CHANGED,
}


@pytest.mark.parametrize("function", ALONE, ids=lambda f: f.__name__)
def test_left_alone_as_a_whole(function: Function) -> None:
    analysis = analysed(function)
    assert not analysis.hits
    assert any(ALONE[function] in miss.reason for miss in analysis.misses), analysis.misses


def test_all_or_nothing() -> None:
    """The second softmax is over heads too wide for a kernel: the first one stays as well, and one reason is given."""

    def function(q: Tensor, k: Tensor, wide: Tensor, v: Tensor) -> Tensor:
        return (weights(q, k) - (wide @ wide.mT).softmax(-1)) @ v

    q, k, _, _, v, _ = (x.detach() for x in inputs())
    wide = torch.randn(BATCH, HEADS, LENGTH, 513) / 30
    report = attngen.explain(function, q, k, wide, v)
    assert [site.status for site in report.sites] == ["missed"]
    torch._dynamo.reset()
    with attngen.record() as reports:
        out = torch.compile(function, backend="attngen", options=EAGER)(q, k, wide, v)
    assert not reports[0].replaced
    torch.testing.assert_close(out, function(q, k, wide, v))
