"""What looks like attention and is not, or not quite: left alone, with the reason."""

from __future__ import annotations

import math

import pytest
import torch
from analysis import Function, analysed, scores, weights
from torch import Tensor
from torch.nn.functional import dropout, gumbel_softmax, layer_norm, linear, scaled_dot_product_attention

CHANGED = "the weights are changed between the exponential and the product with the values"
OTHER_DIM = "the softmax runs over another dimension than the product with the values"
DROPPED = "the attention weights are dropped at random"
NO_PRODUCT = "the softmax is not over a product of queries and keys"


def in_place_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    w[:, 0].zero_()
    return w @ v


def in_place_through_an_alias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    same = w.view(8, 12, 12)
    w.mul_(2)
    return same @ v.view(8, 12, 16)


def in_place_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[..., 0].fill_(7.0)
    return s.softmax(-1) @ v


def top_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.masked_fill(s < s.topk(4, -1).values[..., -1:], -math.inf).softmax(-1) @ v


def top_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    value, place = w.topk(4, -1)
    return torch.zeros_like(w).scatter(-1, place, value) @ v


def symmetrised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s + s.transpose(-1, -2)).softmax(-1) @ v


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    both = torch.cat([scores(q, k), scores(k, q)], -1)
    return both.softmax(-1) @ torch.cat([v, v], -2)


def mean_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s + s.mean(-1, keepdim=True)).softmax(-1) @ v


def wrong_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def wrong_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / e.sum(-1).unsqueeze(-2)) @ v


def shifted_plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s - max) / (1 + sum exp(s - max)): the maximum does not cancel."""
    s = scores(q, k)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def values_per_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (weights(q, k).unsqueeze(-1) * (v.unsqueeze(2) * q.unsqueeze(3))).sum(3)


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.flatten(-2).softmax(-1).view_as(s) @ v


def heads_last_wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.einsum("bnmh,bmhd->bnhd", torch.einsum("bnhd,bmhd->bnmh", q, k).softmax(-1), v)


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    return (w / w.sum(-2, keepdim=True)) @ v


def einsum_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", w, v), w


def sum_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    total = s.logsumexp(-1, keepdim=True)
    return (s - total).exp() @ v, total


MISSED: dict[str, tuple[Function, str]] = {
    "softmax over queries": (lambda q, k, v: scores(q, k).softmax(-2) @ v, OTHER_DIM),
    "softmax over heads": (lambda q, k, v: scores(q, k).softmax(1) @ v, OTHER_DIM),
    "softmax over the batch": (lambda q, k, v: scores(q, k).softmax(0) @ v, OTHER_DIM),
    "softmax over heads, heads last": (heads_last_wrong, OTHER_DIM),
    "no queries": (lambda q, k, v: weights(q[:, :, :0], k) @ v, "the attention is empty"),
    "no keys": (lambda q, k, v: weights(q, k[:, :, :0]) @ v[:, :, :0], "the attention is empty"),
    "softmax over two dims": (flattened, "not the sum of these weights"),
    "weights transposed": (lambda q, k, v: weights(q, k).transpose(-1, -2) @ v, OTHER_DIM),
    "weights read by another product": (lambda q, k, v: weights(q, k)[..., :6] @ v[..., :6, :], "not the sum"),
    "heads and batch swapped": (lambda q, k, v: weights(q, k).transpose(0, 1).reshape(2, 4, 12, 12) @ v, "whole dim"),
    "heads scrambled": (lambda q, k, v: weights(q, k).reshape(2, 12, 4, 12).transpose(1, 2) @ v, "queries alone"),
    "heads rolled": (lambda q, k, v: weights(q, k).roll(1, 1) @ v, CHANGED),
    "heads mixed": (lambda q, k, v, w: torch.einsum("bhij,hg->bgij", scores(q, k), w[:4, :4]).softmax(-1) @ v, "alone"),
    "heads summed": (lambda q, k, v: torch.einsum("bhij,bhjd->bid", weights(q, k), v), OTHER_DIM),
    "weights returned": (lambda q, k, v: (lambda w: (w @ v, w))(weights(q, k)), "the attention weights are returned"),
    "weights read": (lambda q, k, v: (lambda w: w @ v + w.sum())(weights(q, k)), "also read by sum"),
    "einsum weights returned": (einsum_returned, "the attention weights are returned"),
    "normaliser returned": (sum_returned, "the attention weights are returned"),
    "scores read": (lambda q, k, v: (lambda s: s.softmax(-1) @ v + s.mean())(scores(q, k)), "also read by mean"),
    "values are the scores": (lambda q, k: (lambda s: s.softmax(-1) @ s.mT)(scores(q, k)), "computed from the scores"),
    "values are the weights": (lambda q, k: (lambda w: w @ w)(weights(q, k)), "computed from the scores"),
    "values scaled by the weights": (
        lambda q, k, v: (lambda w: w @ (v * w.amax()))(weights(q, k)),
        "computed from the scores",
    ),
    "layer norm on scores": (lambda q, k, v: layer_norm(scores(q, k), (12,)).softmax(-1) @ v, NO_PRODUCT),
    "layer norm on weights": (lambda q, k, v: layer_norm(weights(q, k), (12,)) @ v, CHANGED),
    "linear with a bias on weights": (lambda q, k, v, w: linear(weights(q, k), w, w[0]) @ v, "added to it"),
    "contrastive": (lambda q, k, v: weights(q, k).mT @ v, OTHER_DIM),
    "contrastive, over heads": (lambda q, k, v: torch.einsum("bhij,bgid->bgjd", weights(q, k), v), CHANGED),
    "weights changed in place": (in_place_weights, CHANGED),
    "weights changed through an alias": (in_place_through_an_alias, CHANGED),
    "scores changed in place": (in_place_scores, NO_PRODUCT),
    "weights thresholded": (lambda q, k, v: (lambda w: torch.where(w > 0.05, w, 0.0) @ v)(weights(q, k)), CHANGED),
    "weights masked": (lambda q, k, v, m: weights(q, k).masked_fill(m, 0.0) @ v, CHANGED),
    "weights without NaN": (lambda q, k, v, m: scores(q, k).softmax(-1).nan_to_num() @ v, CHANGED),
    "top scores": (top_scores, "more than pointwise arithmetic"),
    "top weights": (top_weights, CHANGED),
    "weights doubled": (lambda q, k, v: (2 * weights(q, k)) @ v, "scaled after they are normalised"),
    "weights gated by row": (lambda q, k, v: (weights(q, k) * k[..., :1]) @ v, "scaled after they are normalised"),
    "weights gated by key": (lambda q, k, v: (weights(q, k) * k[..., 0].unsqueeze(-2)) @ v, "product over keys"),
    "weights plus identity": (lambda q, k, v: (weights(q, k) + torch.eye(12)) @ v, CHANGED),
    "weights accumulated": (lambda q, k, v: weights(q, k).cumsum(-1) @ v, CHANGED),
    "weights in 8 bits": (lambda q, k, v: weights(q, k).to(torch.float8_e4m3fn).float() @ v, CHANGED),
    "scores in 8 bits": (lambda q, k, v: scores(q, k).to(torch.float8_e4m3fn).float().softmax(-1) @ v, NO_PRODUCT),
    "renormalised over queries": (renormalised, "not divided by one sum"),
    "softmax twice": (lambda q, k, v: weights(q, k).softmax(-1) @ v, ""),
    "symmetrised": (symmetrised, "2 products"),
    "two products": (lambda q, k, v: (scores(q, k) + scores(q, v)).softmax(-1) @ v, "2 products"),
    "both ways": (both_ways, "2 products"),
    "mean of the scores added": (mean_added, "more than pointwise arithmetic"),
    "maximum over queries": (wrong_maximum, "2 products"),
    "sum over queries": (wrong_sum, OTHER_DIM),
    "softmax plus one after a shift": (shifted_plus_one, "more than pointwise arithmetic"),
    "values differ per query": (values_per_query, "queries alone"),
    "every second key": (lambda q, k, v: scores(q, k)[..., ::2].softmax(-1) @ v[..., 1::2, :], "whole dimensions"),
    "keys reversed": (lambda q, k, v: scores(q, k).flip(-1).softmax(-1) @ v, "whole dimensions"),
    "dropout": (lambda q, k, v: dropout(weights(q, k), 0.1, True) @ v, DROPPED),
    "dropout inside": (lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=0.1), DROPPED),
    "dropout on scores": (lambda q, k, v: dropout(scores(q, k), 0.1, True).softmax(-1) @ v, DROPPED),
    "gumbel": (lambda q, k, v: gumbel_softmax(scores(q, k), dim=-1) @ v, ""),
    "all operands of one batch element": (
        lambda q, k, v: weights(*(x[:1].expand(2, 4, 12, 16) for x in (q, k))) @ v[:1].expand(2, 4, 12, 16),
        "every operand is broadcast",
    ),
    "head size over the limit": (lambda q, k, v: weights(q.repeat(1, 1, 1, 17), k.repeat(1, 1, 1, 17)) @ v, "272"),
    "double": (lambda q, k, v: weights(q.double(), k.double()) @ v.double(), "float64"),
}


@pytest.mark.parametrize("name", MISSED)
def test_missed_with_its_reason(name: str) -> None:
    function, reason = MISSED[name]
    found = analysed(function)
    assert found.hits == []
    assert found.misses
    assert any(reason in miss.reason for miss in found.misses), [str(miss) for miss in found.misses]
    assert all(miss.node for miss in found.misses)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k: weights(q, k),
        lambda q, v: q.softmax(-1) * v,
    ],
    ids=["contrastive logits", "no product"],
)
def test_no_candidate(function: Function) -> None:
    assert analysed(function).found == []
