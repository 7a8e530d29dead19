"""Weights that are no softmax or are normalised last, and contractions written as sums: found and right.

Each has a twin that differs in one point and must be left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import assert_replaced_with_its_gradient, watched
from torch import Tensor, nn
from torch.nn import functional as F

from attngen.verify import within_budget

BATCH, HEADS, LENGTH, SIZE = 2, 3, 37, 16


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SIZE**-0.5


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k) - math.log(LENGTH)) @ v


def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.relu(scores(q, k)) ** 2 / LENGTH).tril() @ v


def product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).tril() @ v


def masked_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    far = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return scores(q, k).masked_fill(far, 0.0) @ v


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    rate = torch.log(1 - torch.exp2(-5 - torch.arange(HEADS).float()))[:, None, None]
    decay = torch.where(distance >= 0, torch.exp(rate * distance), 0.0)
    return (scores(q, k) * decay) @ v


def fixed_decay(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).float()
    return (scores(q, k) * 0.9**distance).tril() @ v


def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


def late_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) * 0.25)
    return torch.einsum("bhij,bhjd->bihd", e, v) / e.sum(-1).transpose(1, 2)[..., None]


def late_reciprocal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e @ v) * (1 / e.sum(-1, keepdim=True))


def summed_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax((q[:, :, :, None] * k[:, :, None]).sum(-1) * 0.25, -1)
    return (weights[..., None] * v[:, :, None]).sum(-2)


def summed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q[:, :, :, None] * k[:, :, None]).sum(-1) * 0.25, -1) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights that a layer turns down per head and query, and doubles."""
    return (2 * torch.softmax(scores(q, k), -1) * torch.sigmoid(q[..., :1])) @ v


def weighed_by_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(scores(q, k), -1) * k[..., 0].unsqueeze(-2)) @ v


def dropped_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.9
    return (torch.softmax(scores(q, k), -1).masked_fill(~keep, 0.0) / 0.9) @ v


def emptied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows without a key give NaN, and are then set to zero."""
    keep = (torch.arange(LENGTH) % 5 == 1) & (torch.arange(LENGTH)[:, None] > torch.arange(LENGTH))
    weights = torch.softmax(scores(q, k).masked_fill(~keep, -torch.inf), -1)
    return weights.masked_fill(~keep, 0.0) @ v


def signed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights by the size of a score, with its sign."""
    s = scores(q, k)
    return (torch.softmax(s.abs(), -1) * s.sign()) @ v


def at_least_zero(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def from_zero_to_one(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def larger_than_zero(x: Tensor) -> Tensor:
    return torch.maximum(x, torch.zeros(()))


def padded_with_zeros(weigh: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Keys of nothing but zeros have scores of exactly zero, where a limit is met: half a gradient would be too much."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padding = torch.zeros(BATCH, HEADS, 4, SIZE)
        return weigh(scores(q, torch.cat([k[:, :, :-4], k[:, :, -4:] * padding], 2))) @ v

    function.__name__ = f"zeros_under_{weigh.__name__}"
    return function


FOUND = {
    gated: "softmax",
    weighed_by_key: "softmax",
    dropped_by_hand: "softmax",
    emptied: "softmax",
    signed: "softmax",
    padded_with_zeros(F.relu): "weights",
    padded_with_zeros(F.relu6): "weights",
    padded_with_zeros(at_least_zero): "weights",
    padded_with_zeros(from_zero_to_one): "weights",
    padded_with_zeros(larger_than_zero): "weights",
    sigmoid: "sigmoid",
    squared_relu: "weights",
    product: "weights",
    masked_product: "weights",
    retention: "weights",
    fixed_decay: "weights",
    late: "softmax",
    late_einsum: "softmax",
    late_reciprocal: "softmax",
    summed_products: "softmax",
    summed_scores: "softmax",
}


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def inputs(grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_found_and_equal(function: Callable[..., Tensor]) -> None:
    run, analyses = watched(Call(function))
    args = inputs()
    torch.testing.assert_close(run(*args), function(*args))
    (analysis,) = analyses
    assert len(analysis.hits) == 1 and not analysis.misses
    assert analysis.errors()[0] < 2e-6
    assert analysis.hits[0][1].spec.softmax == (FOUND[function] == "softmax")


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Callable[..., Tensor]) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


# ---------------------------------------------------------------------------------------------------- left as they are


def feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.sigmoid(x @ up) @ down


def late_other_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum runs over the queries: each result is divided by the sum of another row."""
    e = scores(q, k).exp()
    return (e @ v) / e.sum(-2)[..., None]


def late_feature_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divided by what differs from feature to feature."""
    e = scores(q, k).exp()
    return (e @ v) / e.sum(-1, keepdim=True).expand(-1, -1, -1, SIZE).cumsum(-1)


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products in one weight."""
    return (torch.sigmoid(scores(q, k)) * scores(k, q)) @ v


def normed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights of a row depend on each other."""
    return F.layer_norm(scores(q, k), (LENGTH,)) @ v


def half_emptied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Some of the NaN of a row without keys is set to zero, not all."""
    keep = torch.arange(LENGTH)[:, None] > torch.arange(LENGTH)
    weights = torch.softmax(scores(q, k).masked_fill(~keep, -torch.inf), -1)
    return weights.masked_fill(torch.arange(LENGTH) > 3, 0.0) @ v


ALONE = (half_emptied, late_other_sum, late_feature_sum, two_products, normed)


@pytest.mark.parametrize("function", ALONE, ids=lambda f: f.__name__)
def test_left_alone(function: Callable[..., Tensor]) -> None:
    run, analyses = watched(Call(function))
    args = inputs()
    torch.testing.assert_close(run(*args), function(*args), equal_nan=True)
    assert not analyses[0].hits


def test_a_layer_with_batched_weights_is_no_attention() -> None:
    """Experts' weights have a batch dimension, and are still weights."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 16, 64)), nn.Parameter(torch.randn(3, 64, 16))

        def forward(self, x: Tensor) -> Tensor:
            return feed_forward(x, self.up, self.down)

    run, analyses = watched(Experts())
    run(torch.randn(3, 10, 16))
    assert not analyses[0].hits and not analyses[0].misses


def test_a_weights_product_that_is_read_elsewhere_stays() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.sigmoid(scores(q, k))
        return weights @ v, weights.amax(-1)

    run, analyses = watched(Call(both))
    run(*inputs())
    assert not analyses[0].hits


def features(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = features(q), features(k)
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)


def linear_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu(), k.relu()
    total = torch.einsum("bhid,bhd->bhi", q, k.sum(2)) + 1e-6
    return torch.einsum("bhid,bhde,bhi->bhie", q, torch.einsum("bhjd,bhje->bhde", k, v), 1 / total)


THREE: tuple[Callable[..., Tensor], ...] = (
    lambda q, k, v: q @ (k.softmax(2).transpose(-1, -2) @ v),
    lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    lambda q, k, v: scores(q, k) @ v,
    lambda q, k, v: (features(q) @ features(k).mT) @ v / LENGTH,
    linear_attention,
    linear_einsum,
)


@pytest.mark.parametrize("function", THREE)
def test_a_product_of_three_matrices_is_no_attention(function: Callable[..., Tensor]) -> None:
    """In which order to multiply is the model's choice."""
    run, analyses = watched(Call(function))
    run(*inputs())
    assert not analyses[0].found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_other_order_of_three_products_may_be_far_off(dtype: torch.dtype) -> None:
    """Why it is not chosen where it is cheaper: queries that cancel what keys and values have in common."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 512, 32, generator=generator) for _ in range(3))
    q, k, v = (x.to(dtype) for x in ((q - q.mean(-1, keepdim=True)) / 32, k / 10 + 5, v + 5))
    exact = (q.double() @ k.double().mT) @ v.double()
    verdict = within_budget(q @ (k.mT @ v), exact, (q @ k.mT) @ v)
    assert verdict.error > 10 * verdict.budget
    harmless = [torch.randn(2, 512, 32, generator=generator).to(dtype) for _ in range(3)]
    q, k, v = harmless
    assert within_budget(q @ (k.mT @ v), (q.double() @ k.double().mT) @ v.double(), (q @ k.mT) @ v).ok
