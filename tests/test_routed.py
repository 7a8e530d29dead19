"""Attention of tokens that a router picked: queries, keys and values are gathered by data before (CoLT5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor

BATCH, HEADS, LENGTH, SIZE = 2, 3, 40, 8
QUERIES, KEYS = 12, 20
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, LENGTH, HEADS * SIZE, generator=generator, requires_grad=grad) for _ in range(3)]


def picked(x: Tensor, count: int) -> Tensor:
    """The places of the tokens that score highest, in order."""
    return x[..., 0].topk(count, -1).indices.sort(-1).values


def heads(x: Tensor) -> Tensor:
    return x.view(BATCH, -1, HEADS, SIZE).transpose(1, 2)


def by_gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    here, there = picked(q, QUERIES), picked(k, KEYS)
    q, k, v = (
        heads(torch.gather(x, 1, place[..., None].expand(-1, -1, HEADS * SIZE)))
        for x, place in ((q, here), (k, there), (v, there))
    )
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


def by_index_and_put_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal by the tokens' own places, and added to where they were taken from."""
    here, there, batch = picked(q, QUERIES), picked(k, KEYS), torch.arange(BATCH)[:, None]
    s = heads(q[batch, here]) @ heads(k[batch, there]).mT * 0.3
    s = s.masked_fill((there[:, None, :] > here[:, :, None])[:, None], torch.finfo(s.dtype).min)
    out = (s.softmax(-1) @ heads(v[batch, there])).transpose(1, 2).reshape(BATCH, QUERIES, HEADS * SIZE)
    return q.scatter_add(1, here[..., None].expand(-1, -1, HEADS * SIZE), out)


def routed_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The router's score of a key is added to its scores, and a mask is gathered with the keys."""
    place = picked(k, KEYS)
    kept = torch.gather(v[..., 1] > -1.5, 1, place)
    router = torch.gather(k[..., 0], 1, place)
    gathered = [heads(torch.gather(x, 1, place[..., None].expand(-1, -1, HEADS * SIZE))) for x in (k, v)]
    s = heads(q) @ gathered[0].mT * 0.3 + router[:, None, None, :]
    return torch.softmax(s.masked_fill(~kept[:, None, None, :], -1e9), -1) @ gathered[1]


FOUND = (by_gather, by_index_and_put_back, routed_bias)


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_found_and_equal(function: Function) -> None:
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    (analysis,) = analyses
    assert len(analysis.hits) == 1 and analysis.errors()[0] < 2e-6


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


def keys_for_each_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The best keys of each query: there is no tensor of keys that they share."""
    place = (heads(q) @ heads(k).mT).topk(5, -1).indices[..., None].expand(-1, -1, -1, -1, SIZE)
    own = [torch.gather(heads(x)[:, :, None].expand(-1, -1, LENGTH, -1, -1), 3, place) for x in (k, v)]
    s = (heads(q)[..., None, :] * own[0]).sum(-1)
    return (s.softmax(-1)[..., None] * own[1]).sum(-2)


def weights_gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is picked of the weights is no longer normalised, and stands in another order than the values."""
    weights = torch.softmax(heads(q) @ heads(k).mT, -1)
    place = picked(k, KEYS)[:, None, None, :].expand(-1, HEADS, LENGTH, -1)
    return torch.gather(weights, 3, place) @ heads(v)[:, :, :KEYS]


@pytest.mark.parametrize("function", [keys_for_each_query, weights_gathered], ids=lambda f: f.__name__)
def test_left_alone(function: Function) -> None:
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    assert not analyses[0].hits
    torch._dynamo.reset()
    out = torch.compile(function, backend="attngen", options=EAGER)(*inputs())
    torch.testing.assert_close(out, function(*inputs()))
