"""Scores that add up several products: one site whose heads are those of all of them, or pairs that are loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import assert_replaced_with_its_gradient, watched
from test_weights import Call
from torch import Tensor

import attngen

BATCH, HEADS, ROWS, KEYS = 2, 3, 56, 60
Function = Callable[..., Tensor]


def inputs(grad: bool = False) -> list[Tensor]:
    """Queries and keys of 4 features, others of 2, keys of 2 for all heads, and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, ROWS, 4), (HEADS, KEYS, 4), (HEADS, ROWS, 2), (HEADS, KEYS, 2), (1, KEYS, 2), (HEADS, KEYS, 8)]
    return [torch.randn(BATCH, *shape, generator=generator, requires_grad=grad) for shape in shapes]


def added(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT + qr @ kr.mT) * 0.4 + shared.mean(), -1) @ v


def scaled_apart(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.4 + (qr @ kr.mT) * 0.4 + shared.mean(), -1) @ v


def heads_share_keys(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    score = q @ k.mT + qr @ shared.mT + kr.mean()
    keep = torch.arange(KEYS) <= torch.arange(ROWS)[:, None] + 4
    return torch.softmax(score.masked_fill(~keep, -torch.inf), -1) @ v


def three_of_them(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + qr @ kr.mT + qr @ shared.mT, -1) @ v


def latent(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    """Keys that all heads share are the values too, and rotated ones beside them (DeepSeek)."""
    q, qr = q.transpose(1, 2), qr.transpose(1, 2)
    kept, rotated = k[:, 0], shared[:, 0]
    score = torch.einsum("bshc,btc->bsht", q, kept) + torch.einsum("bshr,btr->bsht", qr, rotated)
    return torch.einsum("bsht,btc->bshc", (score * 0.3).softmax(-1), kept) + v.mean() + kr.mean()


FOUND = (added, scaled_apart, heads_share_keys, three_of_them, latent)


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_one_product_over_all_features(function: Function) -> None:
    run, analyses = watched(Call(function))
    args = inputs()
    torch.testing.assert_close(run(*args), function(*args))
    (analysis,) = analyses
    ((site, special),) = analysis.hits
    assert special.spec.head_dim >= 6 and not any(site.key in x.index and site.row in x.index for x in special.spec.extras)
    assert analysis.errors()[0] < 2e-6


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


def scaled_unlike(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.4 + (qr @ kr.mT) * 0.3 + shared.mean(), -1) @ v


def subtracted(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT - qr @ kr.mT + shared.mean(), -1) @ v


def of_other_rows(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    """The second product has queries and keys exchanged."""
    second = (kr @ qr.mT)[:, :, :56, :] + shared.mean()
    return torch.softmax((q @ k.mT)[..., :56] + second, -1) @ v[:, :, :56]


def changed_between(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    keys = k.clone()
    first = q @ keys.mT
    keys.zero_()
    return torch.softmax(first + qr @ kr.mT + shared.mean(), -1) @ v


def few_keys(q: Tensor, k: Tensor, qr: Tensor, kr: Tensor, shared: Tensor, v: Tensor) -> Tensor:
    """Joined, queries and keys would be larger than the product."""
    return torch.softmax(q @ k[:, :, :9].mT + qr @ kr[:, :, :9].mT + shared.mean(), -1) @ v[:, :, :9]


@pytest.mark.parametrize(
    "function", [scaled_unlike, subtracted, of_other_rows, changed_between, few_keys], ids=lambda f: f.__name__
)
def test_other_sums_are_not_joined(function: Function) -> None:
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    assert all(special.spec.head_dim < 6 for _, special in analyses[0].hits)
    torch._dynamo.reset()
    out = torch.compile(function, backend="attngen", options={"inner": "eager"})(*inputs())
    torch.testing.assert_close(out, function(*inputs()))


def test_no_product_is_kept() -> None:
    with attngen.record() as reports:
        torch._dynamo.reset()
        torch.compile(added, backend="attngen", options={"inner": "eager"})(*inputs())
    (site,) = [site for report in reports for site in report.sites]
    assert site.computes is not None and "i, j" not in site.computes
