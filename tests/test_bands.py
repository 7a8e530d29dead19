"""Neighbourhood attention: each query has a window of keys of its own, which becomes a band of keys that all share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor
from torch.nn.functional import pad

from attngen.index import never_negative
from attngen.mask import derive

BATCH, HEADS, LENGTH, SIZE, WIDTH = 2, 3, 30, 8, 7
HALF = WIDTH // 2
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator, requires_grad=grad) for _ in range(3)]


def windows(x: Tensor, left: int = HALF, right: int = HALF) -> Tensor:
    return pad(x, (0, 0, left, right)).unfold(2, WIDTH, 1)


def outside() -> Tensor:
    place = torch.arange(LENGTH)[:, None] + torch.arange(WIDTH) - HALF
    return (place < 0) | (place >= LENGTH)


def with_padding_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k)) * 0.3
    return torch.einsum("bhnw,bhndw->bhnd", s.masked_fill(outside(), -math.inf).softmax(-1), windows(v))


def padding_counts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys of zeros have scores of zero."""
    s = q[..., None, :] @ windows(k)
    return (s.softmax(-1) @ windows(v).mT).squeeze(-2)


def sums_of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q[..., None] * windows(k)).sum(-2)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return ((e / e.sum(-1, keepdim=True))[..., None, :] * windows(v)).sum(-1)


def relative_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = q[0, :, 0, :WIDTH].sin()
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k)) + bias[:, None]
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v))


def mask_of_the_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padding = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [22]]))[:, None, :, None]
    kept = pad(padding.expand(-1, HEADS, -1, -1).float(), (0, 0, WIDTH - 1, 0)).unfold(2, WIDTH, 1)[..., 0, :]
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k, WIDTH - 1, 0)).masked_fill(kept == 0, -1e9)
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v, WIDTH - 1, 0))


def every_second(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows two steps apart, without padding."""
    k, v = (x.unfold(2, WIDTH, 2) for x in (k, v))
    s = torch.einsum("bhnd,bhndw->bhnw", q[:, :, : k.shape[2]], k)
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), v)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnw,bhndw->bhnd", torch.einsum("bhnd,bhndw->bhnw", q, windows(k)).sigmoid(), windows(v))


def values_one_step_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k))
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v, HALF - 1, HALF + 1))


def keys_changed_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows are views: what they show is what is there by then."""
    k = k.clone()
    q, own, v = q[:, :, : LENGTH - WIDTH + 1], k.unfold(2, WIDTH, 1), v.unfold(2, WIDTH, 1)
    s = torch.einsum("bhnd,bhndw->bhnw", q, own)
    k.zero_()
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), v)


FOUND = (
    with_padding_masked, padding_counts, sums_of_products, relative_bias, mask_of_the_keys, every_second, sigmoid,
    values_one_step_on,
    keys_changed_between,
)  # fmt: skip


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_a_band_of_shared_keys(function: Function) -> None:
    run, analyses = watched(Call(function))
    args = inputs()
    torch.testing.assert_close(run(*args), function(*args))
    (analysis,) = analyses
    ((site, special),) = analysis.hits
    assert int(site.row.extent) > 1 and site.key.extent >= LENGTH and analysis.errors()[0] < 2e-6
    cover = derive(special.spec.mask)
    assert len(cover.visit) == 1 and not never_negative(-cover.visit[0].low)  # later rows begin with later keys


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


def values_in_reverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k))
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v).flip(-1))


def keys_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first keys for every query, values by window."""
    s = q @ k[:, :, :WIDTH].mT
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v))


def windows_over_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The window moves along what is summed over."""
    k, v = (pad(x, (HALF, HALF)).unfold(3, WIDTH, 1) for x in (k, v))
    s = torch.einsum("bhnd,bhndw->bhnw", q, k)
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), v)


def normalised_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k))
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-2), windows(v))


def two_windows_in_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows and columns of an image: what moves along two dimensions is no band."""
    q, k, v = (x.view(BATCH, HEADS, 5, 6, SIZE) for x in (q, k, v))
    k, v = (pad(x, (0, 0, 1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2) for x in (k, v))
    s = torch.einsum("bhxyd,bhxydw->bhxyw", q, k)
    return torch.einsum("bhxyw,bhxydw->bhxyd", s.softmax(-1), v)


def batch_beside_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows that do not overlap: keys of several batch elements in one dimension (LeViT)."""
    joined = torch.cat([x.transpose(1, 2).reshape(BATCH * LENGTH, HEADS, SIZE) for x in (q, k, v)], -1).flatten(1)
    joined = joined @ torch.eye(joined.shape[1])
    q, k, v = (x.transpose(1, 2) for x in joined.view(BATCH, LENGTH, HEADS, 3 * SIZE).split(SIZE, -1))
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [
        batch_beside_keys,
        values_in_reverse,
        keys_of_all,
        windows_over_features,
        normalised_over_queries,
        two_windows_in_one,
    ],
    ids=lambda f: f.__name__,
)
def test_other_windows_are_none(function: Function) -> None:
    """Left alone, or computed as it is written, query by query."""
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    assert all(site.key.extent <= LENGTH for site, _ in analyses[0].hits)
    torch._dynamo.reset()
    out = torch.compile(function, backend="attngen", options=EAGER)(*inputs())
    torch.testing.assert_close(out, function(*inputs()))
