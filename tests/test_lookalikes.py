"""What looks like attention and is not, or not quite: left alone, with the reason."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from analysis import Function, Module, analysed, scores, weights
from test_inductor import EAGER
from torch import Tensor
from torch.nn.functional import dropout, gumbel_softmax, layer_norm, linear, pad

import attngen
from attngen.verify import within_budget

CHANGED = "the weights are changed between the exponential and the product with the values"
OTHER_DIM = "the softmax runs over another dimension than the product with the values"
DROPPED = "the scores are dropped at random"
ADDED = "something is added to the attention weights"
MIXED = "the scores of different heads are mixed"
NO_PRODUCT = "the softmax is not over a product of queries and keys"


def dropped_before_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = dropout(scores(q, k).exp(), 0.1)
    return w / w.sum(-1, keepdim=True) @ v


def dropped_for_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One of the two might not be replaced, and draw random numbers of its own."""
    w = dropout(weights(q, k), 0.1)
    return torch.cat([w @ v, w @ v.square()], -1)


def written_as_other_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s.as_strided((2, 4, 6, 24), (576, 144, 12, 1)).zero_()
    return s.softmax(-1) @ v


def a_column_of_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s.as_strided(s.shape[:3], s.stride()[:3], 3).zero_()
    return s.softmax(-1) @ v


def scores_of_another_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[:, 0] = s[:, 1]
    return s.softmax(-1) @ v


def scores_of_the_row_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[:, :, 1:] += s[:, :, :-1].clone()
    return s.softmax(-1) @ v


def part_read_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    part = s[..., 1:]
    part.mul_(2)
    return s.softmax(-1) @ v + part.sum()


def part_written_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    w = s.softmax(-1)
    s[..., 0] = 1.0
    return w @ v


def only_the_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores under their old name, as they were before a copy was changed."""
    s = scores(q, k)
    other = s.clone()
    other[..., 1:] = 0.0
    return (s + other.sum()).softmax(-1) @ v


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


def largest_taken_off_early(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row without keys is what rounding leaves of scores beside -1e9, here of those less the largest."""
    s = 30 * scores(q, k)
    s = s - s.amax(-1, keepdim=True) + torch.zeros(12, 12).masked_fill(torch.ones(12, 12).tril().bool(), -1e9)
    return s.softmax(-1) @ v


def softmax_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s + s.softmax(-1)).softmax(-1) @ v


def wrong_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def only_a_part_knows_the_batch(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x[:1].expand(2, -1, -1, -1) for x in (q, k, v))
    return (scores(q, k) + w.chunk(6)[0][:, None, None]).softmax(-1) @ v


def two_lowest_set_to_zero(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    first, second = (torch.zeros(12, 12, dtype=torch.half).masked_fill(x, -65504.0) for x in (m, m.T))
    return (scores(q.half(), k.half()) + first + second).softmax(-1).masked_fill(m.T, 0.0) @ v.half()


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
    "one key": (lambda q, k, v: weights(q, k[..., :1, :]) @ v[..., :1, :], "there is only one key"),
    "weights transposed": (lambda q, k, v: weights(q, k).transpose(-1, -2) @ v, OTHER_DIM),
    "weights read by another product": (lambda q, k, v: weights(q, k)[..., :6] @ v[..., :6, :], "not the sum"),
    "heads and batch swapped": (lambda q, k, v: weights(q, k).transpose(0, 1).reshape(2, 4, 12, 12) @ v, "whole dim"),
    "heads scrambled": (lambda q, k, v: weights(q, k).reshape(2, 12, 4, 12).transpose(1, 2) @ v, "queries alone"),
    "heads rolled": (lambda q, k, v: weights(q, k).roll(1, 1) @ v, CHANGED),
    "heads mixed": (lambda q, k, v, w: torch.einsum("bhij,hg->bgij", scores(q, k), w[:4, :4]).softmax(-1) @ v, MIXED),
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
    "linear with one number as its bias": (lambda q, k, v, w: linear(weights(q, k), w, w[0, 0]) @ v, "added to it"),
    "contrastive": (lambda q, k, v: weights(q, k).mT @ v, OTHER_DIM),
    "contrastive, over heads": (lambda q, k, v: torch.einsum("bhij,bgid->bgjd", weights(q, k), v), CHANGED),
    "written as other memory": (written_as_other_memory, "put together in place"),
    "scores of another head written in": (scores_of_another_head, "no tensor for"),
    "scores of the row before added": (scores_of_the_row_before, "more than pointwise arithmetic"),
    "a written part is read": (part_read_elsewhere, "also read by sum"),
    "a part is written after the softmax": (part_written_after_the_softmax, "is written in place"),
    "a changed copy is read": (only_the_part, "more than pointwise arithmetic"),
    "weights thresholded": (lambda q, k, v: (lambda w: torch.where(w > 0.05, w, 0.0) @ v)(weights(q, k)), "are changed"),
    "a sum's logarithm, lost in a fill": (
        lambda q, k, v, m: (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp() @ v)(scores(q, k).masked_fill(m, -1e9)),
        "what comes out is rounding",
    ),
    "weights of rows that may be empty, some set to zero": (
        lambda q, k, v, m: (scores(q, k).masked_fill(m, -math.inf) * 0.25).softmax(-1).masked_fill(m.T, 0.0) @ v,
        "that may be NaN",
    ),
    "rows of two lowest numbers in 16 bits, some set to zero": (two_lowest_set_to_zero, "that may be NaN"),
    "only a part of a bias knows the batch": (only_a_part_knows_the_batch, "only a part of a tensor"),
    "one for NaN": (lambda q, k, v, m: scores(q, k).softmax(-1).nan_to_num(1.0) @ v, CHANGED),
    "top scores": (top_scores, "more than pointwise arithmetic"),
    "top weights": (top_weights, CHANGED),
    "weights plus identity": (lambda q, k, v: (weights(q, k) + torch.eye(12)) @ v, ADDED),
    "weights accumulated": (lambda q, k, v: weights(q, k).cumsum(-1) @ v, CHANGED),
    "weights in 8 bits": (lambda q, k, v: weights(q, k).to(torch.float8_e4m3fn).float() @ v, CHANGED),
    "scores in 8 bits": (lambda q, k, v: scores(q, k).to(torch.float8_e4m3fn).float().softmax(-1) @ v, NO_PRODUCT),
    "renormalised over queries": (renormalised, "weights are changed between"),
    "largest taken off before the mask": (largest_taken_off_early, "before a mask is added"),
    "softmax twice": (lambda q, k, v: weights(q, k).softmax(-1) @ v, ""),
    "symmetrised": (symmetrised, "more than pointwise arithmetic"),
    "both ways": (both_ways, "whole dimensions"),
    "softmax of the scores added": (softmax_added, ""),
    "maximum over queries": (wrong_maximum, "more than pointwise arithmetic"),
    "sum over queries": (wrong_sum, OTHER_DIM),
    "softmax plus one after a shift": (shifted_plus_one, "more than pointwise arithmetic"),
    "values differ per query": (values_per_query, "queries alone"),
    "every second key": (lambda q, k, v: scores(q, k)[..., ::2].softmax(-1) @ v[..., 1::2, :], "whole dimensions"),
    "keys reversed": (lambda q, k, v: scores(q, k).flip(-1).softmax(-1) @ v, "whole dimensions"),
    "dropout before the sum": (dropped_before_the_sum, "the attention weights are dropped at random"),
    "dropout for two": (dropped_for_two, "also read by"),
    "dropout on scores": (lambda q, k, v: dropout(scores(q, k), 0.1, True).softmax(-1) @ v, DROPPED),
    "gumbel": (lambda q, k, v: gumbel_softmax(scores(q, k), dim=-1) @ v, ""),
    "all operands of one batch element": (
        lambda q, k, v: weights(*(x[:1].expand(2, 4, 12, 16) for x in (q, k))) @ v[:1].expand(2, 4, 12, 16),
        "every operand is broadcast",
    ),
    "head size over the limit": (lambda q, k, v: weights(q.repeat(1, 1, 1, 33), k.repeat(1, 1, 1, 33)) @ v, ""),
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


# ------------------------------------------------------------------------------- what a matcher of patterns gets wrong
#
# Each of these fits the shape of a pattern that rewrites it into ``scaled_dot_product_attention`` with another meaning:
# wrong dimension, wrong permutation, masks taken for zeros and ones, empty rows. All sizes of ``SQUARE`` inputs are equal,
# so that a mistaken dimension goes unnoticed.

EXACT = None
NO_ROW = "no dimension counts the queries alone"
SIZE = 6


def square(function: Function) -> dict[str, Tensor]:
    """q, k, v of [6, 6, 6, 6]; ``x``, ``y``, ``z`` of five sixes; a mask of small whole numbers; a mask with a full row."""
    generator = torch.Generator().manual_seed(1)
    known = {name: torch.randn([SIZE] * 4, generator=generator) for name in "qkv"}
    known |= {name: torch.randn([SIZE] * 5, generator=generator) for name in "xyz"}
    known["marks"] = torch.randint(-1, 3, (SIZE, SIZE), generator=generator)
    known["m"] = torch.rand(SIZE, SIZE, generator=generator) > 0.5
    known["m"][2] = True
    known["t"] = torch.randn(SIZE, generator=generator).abs() + 0.5
    return {name: known[name] for name in inspect.signature(function).parameters}


def by_marks(q: Tensor, k: Tensor, v: Tensor, marks: Tensor) -> Tensor:
    """DistilBERT's spelling: zeros are masked, and nothing says that the others are ones."""
    s = scores(q / 8**0.5, k)
    mask = (marks[:, None, None, :] == 0).expand_as(s)
    return s.masked_fill(mask, -math.inf).softmax(-1) @ v


def by_ones(q: Tensor, k: Tensor, v: Tensor, marks: Tensor) -> Tensor:
    s = scores(q, k) * 0.3
    return s.masked_fill(~(marks == 1)[:, None, None, :], -1e4).softmax(-1) @ v


def added_marks(q: Tensor, k: Tensor, v: Tensor, marks: Tensor) -> Tensor:
    """BERT's extended mask, of marks that are not zeros and ones."""
    return (scores(q, k) / 8**0.5 + (1.0 - marks[:, None, None, :]) * 0.7).softmax(-1) @ v


def permuted(q: Tensor, k: Tensor, v: Tensor, *order: int) -> Tensor:
    q, k, v = (t.permute(order) for t in (q, k, v))
    return (weights(q / 8**0.5, k) @ v).permute(order)


def permuted_unlike(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values permuted otherwise than keys: another attention, but one all the same."""
    return weights(q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3)) @ v.permute(2, 0, 1, 3)


def five(x: Tensor, y: Tensor, z: Tensor, *order: int) -> Tensor:
    x, y, z = (t.permute(order) for t in (x, y, z))
    return weights(x * 0.3, y) @ z


def keys_read_across(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``k.transpose(1, 3)`` where ``k.transpose(2, 3)`` was meant: keys of head h are features."""
    return (q @ k.transpose(1, 3)).softmax(-1) @ v


def scores_read_across(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).transpose(1, 2).softmax(-1) @ v


def weights_read_across(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q, k).transpose(0, 2) @ v


def scale_per_key(q: Tensor, k: Tensor, v: Tensor, t: Tensor, m: Tensor) -> Tensor:
    return (scores(q, k) / t).masked_fill(m, -1e4).softmax(-1) @ v


def leaves_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept = torch.ones(SIZE, SIZE).tril(-SIZE)
    return (scores(q, k) + torch.zeros(SIZE, SIZE).masked_fill(kept == 0, -1e29)).softmax(-1) @ v


CONFUSING: dict[str, tuple[Function, str | None]] = {
    "over queries, scaled": (lambda q, k, v: (scores(q, k) / 8**0.5).softmax(-2) @ v, OTHER_DIM),
    "over heads, scaled": (lambda q, k, v: (scores(q, k) / 8**0.5).softmax(1) @ v, OTHER_DIM),
    "over the batch, scaled": (lambda q, k, v: (scores(q, k) * 0.3).softmax(dim=0) @ v, OTHER_DIM),
    "over queries, counted from the front": (lambda q, k, v: (scores(q, k) * 0.3).softmax(2) @ v, OTHER_DIM),
    "over queries, masked": (lambda q, k, v, m: (scores(q, k) + m * -9.0).softmax(-2) @ v, OTHER_DIM),
    "over queries, both turned": (lambda q, k, v: scores(q, k).softmax(-2).mT @ v, EXACT),
    "over queries, in float32": (
        lambda q, k, v: scores(q.half(), k.half()).softmax(-2, dtype=torch.float32).half() @ v.half(),
        OTHER_DIM,
    ),
    "over queries, log": (lambda q, k, v: scores(q, k).log_softmax(-2).exp() @ v, OTHER_DIM),
    "hand-written over heads": (lambda q, k, v: (lambda e: e / e.sum(1, keepdim=True))(scores(q, k).exp()) @ v, OTHER_DIM),
    "heads first": (lambda q, k, v: permuted(q, k, v, 0, 2, 1, 3), EXACT),
    "heads last": (lambda q, k, v: permuted(q, k, v, 0, 1, 2, 3), EXACT),
    "batch and rows swapped": (lambda q, k, v: permuted(q, k, v, 2, 1, 0, 3), EXACT),
    "features first": (lambda q, k, v: permuted(q, k, v, 3, 1, 2, 0), EXACT),
    "features and rows swapped": (lambda q, k, v: permuted(q, k, v, 0, 1, 3, 2), EXACT),
    "values permuted otherwise": (permuted_unlike, EXACT),
    "keys read across": (keys_read_across, EXACT),
    "scores read across heads": (scores_read_across, NO_ROW),
    "weights read across the batch": (weights_read_across, NO_ROW),
    "five dimensions": (lambda x, y, z: five(x, y, z, 0, 1, 3, 2, 4), EXACT),
    "five dimensions, turned": (lambda x, y, z: five(x, y, z, 4, 2, 3, 0, 1), EXACT),
    "five dimensions, another softmax": (lambda x, y, z: scores(x, y).softmax(-3) @ z, OTHER_DIM),
    "marks other than zero and one": (by_marks, EXACT),
    "marks other than zero and one, the ones kept": (by_ones, EXACT),
    "marks other than zero and one, added": (added_marks, EXACT),
    "a float mask compared with zero": (
        lambda q, k, v, t: scores(q, k).masked_fill((t - 1).relu() == 0, -1e4).softmax(-1) @ v,
        EXACT,
    ),
    "a mask for every pair of heads": (lambda q, k, v, m: (scores(q, k) + m[:, :, None, None] * -7.0).softmax(-1) @ v, EXACT),
    "a mask of the queries": (lambda q, k, v, m: scores(q, k).masked_fill(m[:, :, None], -1e4).softmax(-1) @ v, EXACT),
    "empty rows": (lambda q, k, v, m: (scores(q, k) * 0.3).masked_fill(m, -math.inf).softmax(-1) @ v, EXACT),
    "empty rows, added": (
        lambda q, k, v, m: (scores(q, k) * 0.3 + torch.zeros(SIZE, SIZE).masked_fill(m, -math.inf)).softmax(-1) @ v,
        EXACT,
    ),
    "empty rows of a finite number": (
        lambda q, k, v, m: (scores(q, k) * 0.3).masked_fill(m, torch.finfo(torch.float32).min).softmax(-1) @ v,
        EXACT,
    ),
    "a constant that drowns all scores": (lambda q, k, v: ((scores(q, k) - 1e29) * 0.25).softmax(-1) @ v, EXACT),
    "a mask that leaves nothing": (leaves_nothing, EXACT),
    "a fill that is no mask": (lambda q, k, v, m: scores(q, k).masked_fill(m, 2.0).softmax(-1) @ v, EXACT),
    "a fill of a tensor": (lambda q, k, v, m, t: torch.where(m, scores(q, k), -t[0]).softmax(-1) @ v, EXACT),
    "a tensor scale and a mask": (lambda q, k, v, m, t: (scores(q, k) / t[1] + m * -3.0).softmax(-1) @ v, EXACT),
    "a tensor scale per head and a mask": (
        lambda q, k, v, m, t: (scores(q, k) * t[:, None, None] + m * -3.0).softmax(-1) @ v,
        EXACT,
    ),
    "a tensor scale per key and a mask": (scale_per_key, EXACT),
    "a scale after the mask": (lambda q, k, v, m: (scores(q, k).masked_fill(m, -3.0) * 0.3).softmax(-1) @ v, EXACT),
    "a negative scale": (lambda q, k, v: (scores(q, k) / -3.0).softmax(-1) @ v, EXACT),
    "a scale of the wrong size": (lambda q, k, v: (scores(q, k) / 3.0).softmax(-1) @ v, EXACT),
    "scores of two products": (lambda q, k, v: (scores(q, k) + scores(q, v)).softmax(-1) @ v, EXACT),
    "scores added to themselves": (lambda q, k, v: (lambda s: (s + s).softmax(-1) @ v)(scores(q, k)), EXACT),
    "weights of other scores": (
        lambda q, k, v: (scores(q, k).softmax(-1) * scores(q, k)) @ v,
        EXACT,
    ),
    "a column written as other memory": (a_column_of_memory, EXACT),
    "dropout of nothing": (lambda q, k, v: dropout(weights(q, k), 0.0, True) @ v, EXACT),
    "rows without their neighbours": (lambda q, k, v: weights(q, k).diff(dim=-2, prepend=k[:, :, :1] * 0) @ v, ""),
    "only the diagonal": (lambda q, k, v: weights(q, k).diagonal(dim1=-2, dim2=-1).diag_embed() @ v, ""),
    "the weights of the first head": (
        lambda q, k, v: weights(q, k)[:, :1] @ v,
        "the values have no feature dimension of their own",
    ),
    "the weights of the last batch element": (
        lambda q, k, v: weights(q, k)[-1:] @ v,
        "the values have no feature dimension of their own",
    ),
}


@pytest.mark.parametrize("name", CONFUSING)
def test_not_confused(name: str) -> None:
    """Left alone for the reason in the table ("": not even near), or computed as it is written (``EXACT``)."""
    function, reason = CONFUSING[name]
    torch._dynamo.reset()
    inputs = square(function)
    with torch.no_grad(), attngen.record() as reports:
        ours = torch.compile(Module(function), backend="attngen", options=EAGER)(**inputs)
    reasons = [site.reason for report in reports for site in report.missed]
    assert sum(len(report.replaced) for report in reports) == (reason is EXACT), reasons
    assert not reason or reason in reasons
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    eager = function(**inputs)
    exact = function(**doubled).double() if eager.dtype == torch.float32 else eager.double()
    check = within_budget(ours, exact, eager)
    assert check.ok, str(check)


def test_enough_look_alikes() -> None:
    assert len(MISSED) + sum(reason is not EXACT for _, reason in CONFUSING.values()) >= 60


def sliding_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of overlapping chunks, put side by side into one band (Longformer)."""
    product = pad(scores(q, k), (0, 1))
    band = product.new_zeros(*q.shape[:-1], 5)
    band[..., :3] = product[..., :3]
    band[..., 3:] = product[..., -2:]
    return band.softmax(-1) @ v[:, :, :5]


def test_scores_put_together_in_pieces_are_missed_by_name() -> None:
    found = analysed(sliding_chunks)
    assert found.hits == [] and "put together from parts of one product" in found.misses[0].reason
