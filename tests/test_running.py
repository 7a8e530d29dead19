"""Attention that goes over blocks of keys with running maxima, as people write it out: one site, or none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from analysis import assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from test_merges import LENGTH, PLACES, SIZE, inputs, scores
from test_weights import Call
from torch import Tensor
from torch.nn.functional import logsigmoid

import attngen

BLOCK = 16
LOWEST = torch.finfo(torch.float32).min
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Mask = Callable[[Tensor, Tensor], Tensor]


def rows() -> Tensor:
    return torch.arange(LENGTH)[:, None]


def causal(s: Tensor, keys: Tensor) -> Tensor:
    return s.masked_fill(keys > rows(), -math.inf)


def window(s: Tensor, keys: Tensor) -> Tensor:
    """Later rows see nothing of the first blocks."""
    return s.masked_fill((keys > rows()) | (keys < rows() - 12), -math.inf)


def filled(s: Tensor, keys: Tensor) -> Tensor:
    """Some rows throughout."""
    return s.masked_fill((keys > rows()) | (rows() % 5 == 0), -1e10)


def nothing_at_all(s: Tensor, keys: Tensor) -> Tensor:
    """Rows without any key, and rows whose keys are in one block alone, by data."""
    kept = (PLACES[:, None] % 5 > 0) & ((PLACES[:, None] % 7 < 5) | (PLACES[keys] < 20))
    return s.masked_fill(~kept, -math.inf)


def unmasked(s: Tensor, keys: Tensor) -> Tensor:
    return s


def running(
    mask: Mask,
    start: float = -math.inf,
    guard: float | None = None,
    total: float = 0.0,
    at_end: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Function:
    """``start``: of the maximum; ``guard``: what is taken off instead where that is -inf; ``total``: where sums start."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        largest = torch.full_like(q[..., :1], start)
        sums, out = torch.full_like(q[..., :1], total), torch.zeros_like(v)
        for first in range(0, LENGTH, BLOCK):
            keys = torch.arange(first, first + BLOCK)
            s = mask(scores(q, k[:, :, first : first + BLOCK]), keys)
            new = torch.maximum(largest, s.amax(-1, keepdim=True))
            off = new if guard is None else torch.where(new == -math.inf, guard, new)
            p, again = torch.exp(s - off), torch.exp(largest - off)
            sums = sums * again + p.sum(-1, keepdim=True)
            out = out * again + p @ v[:, :, first : first + BLOCK]
            largest = new
        return out / at_end(sums)

    return attend


def in_place(how: str, read: bool = False, given: bool = False) -> Function:
    """Sums that are added up ``how``, and ``read`` by another name afterwards, or in memory that the caller has, too."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        largest = torch.full_like(q[..., :1], -math.inf)
        sums, out = torch.zeros_like(largest), v.mul_(0.0).sin_() if given else torch.zeros_like(v)
        first = out[:, :, :1]
        for kk, vv in zip(k.split(BLOCK, 2), (k if given else v).split(BLOCK, 2), strict=True):
            s = scores(q, kk)
            new = torch.maximum(largest, s.amax(-1, keepdim=True))
            p, again = torch.exp(s - new), torch.exp(largest - new)
            if how == "copied":
                sums.copy_(sums * again + p.sum(-1, keepdim=True))
                out.copy_(out * again + p @ vv)
                largest.copy_(new)
                continue
            sums.mul_(again).add_(p.sum(-1, keepdim=True))
            out = out.mul_(again).add_(p @ vv) if how == "added" else out * again + p @ vv
            largest = new
        out = out / sums if how == "copied" else out.div_(sums)
        return out + first if read else out

    return attend


def normalised_each_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in the first FlashAttention: what there is so far is divided by its sum."""
    largest, sums, out = torch.full_like(q[..., 0], -math.inf), torch.zeros_like(q[..., 0]), torch.zeros_like(v)
    for first in range(0, LENGTH, BLOCK):
        s = causal(scores(q, k[:, :, first : first + BLOCK]), torch.arange(first, first + BLOCK))
        new = torch.maximum(largest, s.amax(-1))
        p, again = torch.exp(s - new[..., None]), torch.exp(largest - new)
        total = sums * again + p.sum(-1)
        out = (out * (sums * again)[..., None] + p @ v[:, :, first : first + BLOCK]) / total[..., None]
        largest, sums = new, total
    return out


def stacked(guard: float, mask: Mask = unmasked) -> Function:
    """All blocks first, then their maxima (Rabe and Staats)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, sums, maxima = [], [], []
        for first in range(0, LENGTH, BLOCK):
            s = mask(scores(q, k[:, :, first : first + BLOCK]), torch.arange(first, first + BLOCK))
            largest = s.amax(-1, keepdim=True).detach()
            p = torch.exp(s - largest)
            outs.append(p @ v[:, :, first : first + BLOCK])
            sums.append(p.sum(-1))
            maxima.append(largest.squeeze(-1))
        each = torch.stack(maxima, -1)
        share = torch.exp(each - each.amax(-1, keepdim=True)).detach()
        out = (torch.stack(outs, -1) * share[..., None, :]).sum(-1)
        return out / ((torch.stack(sums, -1) * share).sum(-1)[..., None] + guard)

    return attend


def shares_by_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each block counts by the softmax of its log-sum-exp."""
    outs, lses = [], []
    for first in range(0, LENGTH, BLOCK):
        s = scores(q, k[:, :, first : first + BLOCK])
        outs.append(s.softmax(-1) @ v[:, :, first : first + BLOCK])
        lses.append(s.logsumexp(-1, keepdim=True))
    return (torch.stack(outs) * torch.stack(lses).softmax(0)).sum(0)


def shares_by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    one, two = (scores(q, kk) for kk in k.split([20, 28], 2))
    each = torch.stack([one.logsumexp(-1), two.logsumexp(-1)])
    share = torch.exp(each - torch.logsumexp(each, 0))[..., None]
    return (one.softmax(-1) @ v[:, :, :20]) * share[0] + (two.softmax(-1) @ v[:, :, 20:]) * share[1]


def blocks(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each block's result and log-sum-exp."""
    parts = zip(k.split(BLOCK, 2), v.split(BLOCK, 2), strict=True)
    return [(s.softmax(-1) @ vv, s.logsumexp(-1, keepdim=True)) for s, vv in ((scores(q, kk), vv) for kk, vv in parts)]


def by_sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As blocks are merged that come round a ring of GPUs."""
    (out, lse), *rest = blocks(q, k, v)
    for piece, other in rest:
        out = out - torch.sigmoid(other - lse) * (out - piece)
        lse = lse - logsigmoid(lse - other)
    return out


def by_softplus(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (out, lse), *rest = blocks(q, k, v)
    for piece, other in rest:
        new = lse + torch.log(1 + torch.exp(other - lse))
        out, lse = torch.exp(lse - new) * out + torch.exp(other - new) * piece, new
    return out


def maximum_and_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = []
    for kk, vv in zip(k.split([20, 28], 2), v.split([20, 28], 2), strict=True):
        s = scores(q, kk)
        largest = s.amax(-1, keepdim=True)
        e = (s - largest).exp()
        total = e.sum(-1, keepdim=True)
        parts.append((e @ vv / total, largest + total.log()))
    (one, a), (two, b) = parts
    share = torch.sigmoid(b - a)
    return one * (1 - share) + two * share


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    largest, sums, out = torch.full_like(q[..., 0], -math.inf), torch.zeros_like(q[..., 0]), torch.zeros_like(v)
    for kk, vv in zip(k.split(BLOCK, 2), v.split(BLOCK, 2), strict=True):
        s = torch.einsum("bhid,bhjd->bhij", q, kk) * 0.3
        new = torch.maximum(largest, s.max(-1).values)
        p, again = torch.exp(s - new[..., None]), torch.exp(largest - new)
        sums, largest = sums * again + p.sum(-1), new
        out = out * again[..., None] + torch.einsum("bhij,bhjd->bhid", p, vv)
    return out / sums[..., None]


def one_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No more keys than a block has."""
    s = scores(q, k)
    start = torch.full_like(q[..., :1], -math.inf)
    largest = torch.maximum(start, s.amax(-1, keepdim=True))
    p, again = torch.exp(s - largest), torch.exp(start - largest)
    sums = torch.zeros_like(start) * again + p.sum(-1, keepdim=True)
    return (torch.zeros_like(v) * again + p @ v) / sums


def loaded(s: Tensor, keys: Tensor) -> Tensor:
    """A mask from data: -inf for a third of all keys, for all of some rows."""
    kept = (PLACES * 7 % 3)[keys].to(s.dtype)
    return s + torch.log(kept.clamp(max=1)) + torch.log((PLACES[:, None] % 5).clamp(max=1).to(s.dtype))


FOUND = {
    "running": running(unmasked),
    "causal": running(causal),
    "causal, from the lowest number": running(causal, LOWEST),
    "a window, from the lowest number": running(window, LOWEST),
    "causal, from a number": running(causal, -1e10),
    "causal, from a number above all scores": running(causal, 30.0),
    "filled with the number that maxima begin with": running(filled, -1e10),
    "a window, guarded": running(window, guard=0.0),
    "rows of nothing": running(nothing_at_all, guard=0.0),
    "rows of nothing are zero": running(nothing_at_all, guard=0.0, at_end=lambda z: torch.where(z == 0, 1.0, z)),
    "rows of nothing are zero by a least sum": running(nothing_at_all, LOWEST, at_end=lambda z: z.clamp(min=1e-6)),
    "rows of nothing are zero by a number": running(nothing_at_all, guard=0.0, at_end=lambda z: z + 1e-10),
    "a loaded mask": running(loaded, guard=0.0),
    "a guard of no use": running(causal, at_end=lambda z: z.clamp(min=1e-6)),
    "divided in place": in_place("divided"),
    "added up in place": in_place("added"),
    "copied in place": in_place("copied"),
    "normalised each time": normalised_each_time,
    "stacked": stacked(0.0),
    "stacked with a guard": stacked(1e-8),
    "shares by softmax": shares_by_softmax,
    "shares by log-sum-exp": shares_by_logsumexp,
    "by sigmoid": by_sigmoid,
    "by softplus": by_softplus,
    "maximum and logarithm": maximum_and_logarithm,
    "einsum": by_einsum,
    "one block": one_block,
}


@pytest.mark.parametrize("name", FOUND)
def test_one_site_over_all_keys(name: str) -> None:
    function = FOUND[name]
    run, analyses = watched(Call(function))
    args = [x.detach() for x in inputs()]
    torch.testing.assert_close(run(*args), function(*args), equal_nan=True)
    (analysis,) = analyses
    assert len(analysis.hits) == 1 and analysis.errors()[0] < 2e-6
    assert analysis.hits[0][0].key.extent == LENGTH


NO_GRADIENT = ("a loaded mask", "copied in place")  # in eager


@pytest.mark.parametrize("name", [name for name in FOUND if "nothing" not in name and name not in NO_GRADIENT])
def test_replaced_with_its_gradient(name: str) -> None:
    assert_replaced_with_its_gradient(FOUND[name], inputs)


def the_other_share(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (out, lse), *rest = blocks(q, k, v)
    for piece, other in rest:
        out = out - torch.sigmoid(lse - other) * (out - piece)
        lse = torch.logaddexp(lse, other)
    return out


def the_first_sum_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The running sum is not carried on."""
    (out, lse), *rest = blocks(q, k, v)
    for piece, other in rest:
        out = out - torch.sigmoid(other - lse) * (out - piece)
    return out


def shares_that_add_up_to_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (one, a), (two, b), _ = blocks(q, k, v)
    share = torch.sigmoid(b - a)
    return one * (2 - share) + two * share


def masked_and_merged_by_sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A block without keys is NaN, and so is all of its row."""
    parts = []
    for first in (0, 24):
        s = causal(scores(q, k[:, :, first : first + 24]), torch.arange(first, first + 24))
        parts.append((s.softmax(-1) @ v[:, :, first : first + 24], s.logsumexp(-1, keepdim=True)))
    (one, a), (two, b) = parts
    return one - torch.sigmoid(b - a) * (one - two)


LEFT = {
    "the other share": the_other_share,
    "the first sum only": the_first_sum_only,
    "shares that add up to more": shares_that_add_up_to_more,
    "masked, by sigmoid": masked_and_merged_by_sigmoid,
    "a window, of which the first blocks are empty": running(window),
    "rows of nothing": running(nothing_at_all),
    "rows of nothing, stacked": stacked(1e-8, causal),
    "a loaded mask": running(loaded),
    "a guard, and a maximum that may be above all scores": running(causal, 3.0, at_end=lambda z: z + 1e-10),
    "read by another name": in_place("added", read=True),
    "in memory of the caller": in_place("added", given=True),
    "a sum that begins with one": running(causal, total=1.0),
    "a guard that is no small number": running(causal, at_end=lambda z: z + 0.5),
    "a least sum above one": running(causal, at_end=lambda z: z.clamp(min=1.5)),
    "another number for an infinite maximum": running(nothing_at_all, guard=3.0),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    """Or not: what it is replaced by, if anything, computes the same, whichever rows are NaN, zero or neither."""
    tensors = [x.detach() for x in inputs()]
    tensors[0][0, 0, 5] = -40 * tensors[1][0, 0].mean(0).sign()  # low scores
    torch._dynamo.reset()
    out = torch.compile(LEFT[name], backend="attngen", options=EAGER)(*tensors)
    torch.testing.assert_close(out, LEFT[name](*tensors), equal_nan=True)
    run, analyses = watched(Call(LEFT[name]))
    torch.testing.assert_close(run(*tensors), LEFT[name](*tensors), equal_nan=True)
    assert all(site.key.extent < LENGTH for site, _ in analyses[0].hits)


@pytest.mark.parametrize("start", [-1e10, 3.0, 60.0])
def test_rows_far_below_the_number_that_maxima_begin_with(start: float) -> None:
    """Nothing is left of their exponentials; of lower scores of other rows neither."""
    tensors = [x.detach() for x in inputs()]
    tensors[1].abs_()
    tensors[0][0, 0, 5], tensors[0][0, 1, 7:] = -100.0, -1e11
    function = running(window, start)
    torch._dynamo.reset()
    with attngen.record() as reports:
        out = torch.compile(function, backend="attngen", options=EAGER)(*tensors)
    assert [len(report.replaced) for report in reports] == [1]
    torch.testing.assert_close(out, function(*tensors), equal_nan=True)
    assert out.isnan().any() and not out.isnan().all()


def test_numbers_as_low_as_masks_need_a_maximum() -> None:
    """Of a row of them, no exponential is left without it."""

    def without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = PLACES[:, None] % 5 > 0
        (p, a), (r, b) = (
            (scores(q, kk).masked_fill(~kept, -1e9).exp(), vv)
            for kk, vv in zip(k.split([20, 28], 2), v.split([20, 28], 2), strict=True)
        )
        return (p @ a + r @ b) / (p.sum(-1, keepdim=True) + r.sum(-1, keepdim=True))

    tensors = [x.detach() for x in inputs()]
    torch._dynamo.reset()
    out = torch.compile(without, backend="attngen", options=EAGER)(*tensors)
    torch.testing.assert_close(out, without(*tensors), equal_nan=True)
    assert out.isnan().any() and SIZE
