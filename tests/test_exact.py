"""Odd attention that is found all the same: it must be computed exactly as it is written, empty rows and all."""

from __future__ import annotations

import math

import pytest
import torch
from analysis import Function, analysed, assert_replaced_with_its_gradient, inputs_of, scores, weights
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention

import attngen
from attngen.algebra import Int, Op
from attngen.passes import effects
from attngen.passes.specialise import Table
from attngen.spec import KEY, ROW

LOWEST = torch.finfo(torch.float32).min


def in_place_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s.mul_(0.25)
    s.masked_fill_(torch.ones(12, 12, dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1) @ v


def in_place_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q + 1
    q.mul_(0.25)
    return weights(q, k) @ v


def strictly_upper(q: Tensor, k: Tensor, v: Tensor, fill: float) -> Tensor:
    keep = torch.ones(12, 12, dtype=torch.bool).triu(1)
    return scores(q, k).masked_fill(~keep, fill).softmax(-1) @ v


def sink_first(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    sink = w[0, :4].view(1, 4, 1, 1).expand(2, 4, 12, 1)
    return torch.cat([sink, scores(q, k)], -1).softmax(-1)[..., 1:] @ v


def grouped_the_other_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys of head ``h % 2``, values of head ``h // 2``."""
    return weights(q, k[:, :2].repeat(1, 2, 1, 1)) @ v[:, :2].repeat_interleave(2, 1)


def documents(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    ids = m[0].long().cumsum(0)
    return torch.where(ids[:, None] == ids, scores(q, k), -math.inf).softmax(-1) @ v


def late_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v + 1
    w = weights(q, k)
    v.mul_(3)
    return w @ v


def merged_for_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads are one dimension of the scores and two of the values; queries and keys are put together first."""
    q, k = (torch.cat([x[..., 8:], x[..., :8]], -1).view(8, 12, 16) for x in (q, k))
    s = torch.baddbmm(torch.zeros(8, 12, 12), q, k.transpose(1, 2), alpha=0.25)
    return s.view(2, 4, 12, 12).softmax(-1) @ v


def bias_of_a_layer_by_bucket(q: Tensor, k: Tensor, v: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """A bias that a layer gives each query for each distance, beside a mask (ProphetNet)."""
    places = torch.arange(12)
    buckets = (places[:, None] - places).clamp(0, 11).expand(2, 4, 12, 12)
    bias = linear(q, w[:, :1] * q[0, 0], w[0])
    added = torch.zeros(12, 12).masked_fill(m, LOWEST) + torch.zeros(12, 12).masked_fill(places > places[:, None], LOWEST)
    return (scores(q, k) * 0.25 + bias.gather(-1, buckets) + added).softmax(-1) @ v


def heads_in_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only a copy has a dimension of two heads; what is below it is read from the third on."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).reshape(8, 12, 16)[2:4] for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def turned(x: Tensor) -> Tensor:
    """Four of the sixteen features are the heads."""
    return x[0].chunk(4, -1)[0].permute(2, 1, 0).reshape(4, 12, 4)


EXACT: dict[str, Function] = {
    "empty rows of -inf give NaN": lambda q, k, v, m: scores(q, k).masked_fill(m, -math.inf).softmax(-1) @ v,
    "empty rows of SDPA give zero": lambda q, k, v, m: scaled_dot_product_attention(q, k, v, ~m),
    "empty rows of finfo.min give the mean": lambda q, k, v, m: scores(q, k).masked_fill(m, LOWEST).softmax(-1) @ v,
    "empty rows of -1e4 give the mean": lambda q, k, v, m: scores(q, k).masked_fill(m, -1e4).softmax(-1) @ v,
    "finfo.min added": lambda q, k, v, m: (scores(q, k) + torch.zeros(12, 12).masked_fill(m, LOWEST)).softmax(-1) @ v,
    "-1e9 added": lambda q, k, v, m: (scores(q, k) + (1 - (~m).float()) * -1e9).softmax(-1) @ v,
    "-1e4 added to large scores": lambda q, k, v, m: (scores(500 * q, k) + m * -1e4).softmax(-1) @ v,
    "-2e3 filled, then a larger bias": (
        lambda q, k, v, m: (scores(q, k).masked_fill(m, -2e3) + v[..., 0].unsqueeze(-2) * 1e4).softmax(-1) @ v
    ),
    "fills scaled away": lambda q, k, v, m: (scores(q, k).masked_fill(m, -1e4) * 1e-3).softmax(-1) @ v,
    "small fills": lambda q, k, v, m: scores(q, k).masked_fill(m, -2.0).softmax(-1) @ v,
    "two fills": lambda q, k, v, m: scores(q, k).masked_fill(m, -2e3).masked_fill(m.T, -1e30).softmax(-1) @ v,
    "finfo.min filled, then a loaded mask over whole rows": (
        lambda q, k, v, w: (
            scores(q, k).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), LOWEST)
            + torch.where(w[0] < 0, LOWEST, 0.0).sort().values
        ).softmax(-1)
        @ v
    ),
    "-1e9 under exponentials as they are: NaN": (
        lambda q, k, v, m: (lambda e: (e / e.sum(-1, keepdim=True)) @ v)(scores(q, k).masked_fill(m, -1e9).exp())
    ),
    "-1e9 under exponentials of what is above the maximum": (
        lambda q, k, v, m: (lambda s: (lambda e: (e / e.sum(-1, keepdim=True)) @ v)((s - s.amax(-1, keepdim=True)).exp()))(
            scores(q, k).masked_fill(m, -1e9)
        )
    ),
    "-1e9 under a logarithm": lambda q, k, v, m: scores(q, k).masked_fill(m, -1e9).log_softmax(-1).exp() @ v,
    "a fill that another term cancels": (
        lambda q, k, v, m: (lambda s: (s + -s.detach() + scores(q, k)).softmax(-1) @ v)(scores(q, k).masked_fill(m, -1e9))
    ),
    "a masked score less itself": (
        lambda q, k, v, m: (lambda s: (s - s.detach()).log_softmax(-1).exp() @ v)(
            scores(q, k).masked_fill(m, LOWEST) + torch.where(m, -5.0, 0.0)
        )
    ),
    "a mask subtracted": lambda q, k, v, m: (lambda s: (s - m * 1e9).log_softmax(-1).exp() @ v)(scores(q, k)),
    "a mask, and a number that drowns all of it": (
        lambda q, k, v: (scores(q, k) + torch.full((12, 12), -1e9).triu(1) + LOWEST).softmax(-1) @ v
    ),
    "two masks added": (
        lambda q, k, v, m: (lambda a: (scores(q, k) + a + a.T).softmax(-1) @ v)(torch.zeros(12, 12).masked_fill(m, -math.inf))
    ),
    "a mask that is not 0 or 1": lambda q, k, v, w: scores(q, k).masked_fill(w.trunc() == 0, -math.inf).softmax(-1) @ v,
    "an additive mask of any numbers": lambda q, k, v, w: (scores(q, k) + 3 * w).softmax(-1) @ v,
    "a mask that multiplies": lambda q, k, v: scores(q, k).tril().softmax(-1) @ v,
    "the empty last row gives NaN": lambda q, k, v: strictly_upper(q, k, v, -math.inf),
    "the empty last row gives the mean": lambda q, k, v: strictly_upper(q, k, v, -1e30),
    "a mask of the queries": lambda q, k, v: torch.where(q[..., :1] > 0, scores(q, k), -1e9).softmax(-1) @ v,
    "a mask of the keys": lambda q, k, v: torch.where(k[..., 0].unsqueeze(-2) > 0, scores(q, k), -1e9).softmax(-1) @ v,
    "documents": documents,
    "values of other heads": lambda q, k, v: weights(q, k) @ v.flip(1),
    "keys in reverse on both sides": lambda q, k, v: weights(q, k.flip(2)) @ v.flip(2),
    "the first heads of more, grouped": lambda q, k, v: weights(q, k.clone()[:, :2].repeat_interleave(2, 1)) @ v,
    "groups by remainder": grouped_the_other_way,
    "two heads of a batch folded into heads": heads_in_slices,
    "keys of one batch": lambda q, k, v: weights(q, k[:1]) @ v,
    "values of one head": lambda q, k, v: weights(q, k) @ v[:, :1],
    "linear on scores: scores as queries": lambda q, k, v, w: linear(scores(q, k), w).softmax(-1) @ v,
    "linear on weights: values of its own": lambda q, k, v, w: linear(weights(q, k), w) @ v,
    "queries as keys and values": lambda q: weights(q, q) @ q,
    "no scale": lambda q, k, v: weights(q, k) @ v,
    "negated": lambda q, k, v: (-scores(q, k)).softmax(-1) @ v,
    "squared": lambda q, k, v: (scores(q, k) ** 2).softmax(-1) @ v,
    "rounded": lambda q, k, v: scores(q, k).floor().softmax(-1) @ v,
    "clamped": lambda q, k, v: scores(q, k).clamp(-1, 1).softmax(-1) @ v,
    "a temperature per query": lambda q, k, v: (scores(q, k) / (q[..., :1].abs() + 1)).softmax(-1) @ v,
    "a temperature per key": lambda q, k, v: (scores(q, k) * k[..., 0].unsqueeze(-2)).softmax(-1) @ v,
    "a sink in front": sink_first,
    "softmax plus one": lambda q, k, v: (lambda e: (e / (1 + e.sum(-1, keepdim=True))) @ v)(scores(q, k).exp()),
    "one query": lambda q, k, v: weights(q[:, :, :1], k) @ v,
    "batch, head and query of one": lambda q, k, v: weights(q[:1, :1, :1], k[:1, :1]) @ v[:1, :1],
    "no batch": lambda q, k, v: weights(q[0, 0], k[0, 0]) @ v[0, 0],
    "a key padded after": lambda q, k, v: weights(q, pad(k, (0, 0, 0, 1))) @ pad(v, (0, 0, 0, 1)),
    "mask and scale in place": in_place_mask,
    "queries scaled in place": in_place_queries,
    "values changed before they are read": late_in_place,
    "batch and heads merged for the scores alone": merged_for_the_scores,
    "queries from a part of a longer dimension": lambda q, k, v: weights(turned(q), k[0, ..., :4]) @ v[0],
    "values from a part of a longer dimension": lambda q, k, v: weights(q[0], k[0]) @ turned(v),
    "a layer's bias by bucket, and masks": bias_of_a_layer_by_bucket,
}


@pytest.mark.parametrize("name", EXACT)
def test_found_and_exact(name: str) -> None:
    found = analysed(EXACT[name])
    assert len(found.hits) == 1, [str(miss) for miss in found.misses]
    assert max(found.errors()) < 5e-6


@pytest.mark.parametrize("weigh", [torch.softmax, lambda s, dim: s.log_softmax(dim).exp()], ids=["softmax", "log"])
def test_what_is_subtracted_masks_too(weigh: Function) -> None:
    found = analysed(lambda q, k, v: weigh(scores(q, k) - torch.ones(12, 12).triu(1) * 1e9, -1) @ v)
    ((_, special),) = found.hits
    assert special.spec.mask == Op("lt", (Int(KEY), Int(ROW + 1)))


@pytest.mark.parametrize("function", [merged_for_the_scores, bias_of_a_layer_by_bucket], ids=lambda f: f.__name__)
def test_gradients_of_what_is_read_in_other_places(function: Function) -> None:
    fixed = [x for name, x in inputs_of(function).items() if name == "m"]

    def inputs() -> list[Tensor]:
        return [x.requires_grad_() for name, x in inputs_of(function).items() if name != "m"]

    assert_replaced_with_its_gradient(lambda q, k, v, *rest: function(q, k, v, *fixed, *rest), inputs)


@pytest.mark.parametrize("place", [0, 1], ids=["queries", "keys"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spreads_as_in_the_model(place: int, value: float) -> None:
    """On a CPU plain attention is the library's, which makes zeros of rows of NaN."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights(q, k) @ v

    inputs = list(inputs_of(model).values())
    inputs[place][0, 0, 0, 0] = value
    torch._dynamo.reset()
    with torch.no_grad(), attngen.record() as reports:
        ours = torch.compile(model, backend="attngen", options={"inner": "eager", "strict": True})(*inputs)
    assert sum(len(report.replaced) for report in reports) == 1
    torch.testing.assert_close(ours, model(*inputs), equal_nan=True)


def test_sums_that_overflow_in_the_model_do_not() -> None:
    """The one known difference, by choice: exponentials that no maximum comes off are those of a softmax all the same."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        powers = scores(40 * q, k).exp()
        return powers / powers.sum(-1, keepdim=True) @ v

    inputs = list(inputs_of(model).values())
    torch._dynamo.reset()
    with torch.no_grad():
        ours = torch.compile(model, backend="attngen", options={"inner": "eager", "strict": True})(*inputs)
    assert model(*inputs).isnan().any()
    torch.testing.assert_close(ours, model(*(x.double() for x in inputs)).float(), rtol=1e-3, atol=1e-3)


def keys_written_before_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    k.zero_()
    return s.softmax(-1) @ v


def mask_written_before_the_product(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(m, -9.0)
    m.zero_()
    return s.softmax(-1) @ v


@pytest.mark.parametrize("function", [keys_written_before_the_product, mask_written_before_the_product])
def test_a_write_between_reading_and_replacing_is_noticed(function: Function) -> None:
    """The proof holds for the values when they are read; the replacement would read them later."""
    found = analysed(function)
    ((site, special),) = found.hits
    facts = effects.run(found.lowered.graph)
    inputs = [site.query.node, site.keys.node, site.values.node]
    inputs += [binding for binding in special.bindings if not isinstance(binding, Table)]
    disturbed = [effects.written_between([node], node, site.output, facts) for node in inputs]
    assert [miss for miss in disturbed if miss is not None]
