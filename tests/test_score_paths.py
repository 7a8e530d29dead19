"""Scores of several products, and pads, slices and gathers between a product and the softmax: found and right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import Analysis, assert_replaced_with_its_gradient, watched
from torch import Tensor
from torch.nn import functional as F

from attngen.algebra import ONE
from attngen.spec import KEY, ROW

BATCH, HEADS, LENGTH, SIZE = 2, 3, 36, 16
BLOCK = 12


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SIZE**-0.5


def decomposed_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Relative positions of a 6 x 6 window, rows and columns apart: two more products in the score."""
    generator = torch.Generator().manual_seed(2)
    rows, columns = torch.randn(2, 6, 6, SIZE, generator=generator)
    image = q.reshape(BATCH * HEADS, 6, 6, SIZE)
    by_row = torch.einsum("bhwc,hkc->bhwk", image, rows)
    by_column = torch.einsum("bhwc,wkc->bhwk", image, columns)
    score = scores(q, k).view(BATCH * HEADS, 6, 6, 6, 6) + by_row[..., :, None] + by_column[..., None, :]
    return torch.softmax(score.view(BATCH, HEADS, LENGTH, LENGTH), -1) @ v


def split_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One score from two products, the second over one key head that all share."""
    shared = k[:, :1, :, :8]
    return torch.softmax(scores(q, k) + 0.25 * (q[..., :8] @ shared.transpose(-1, -2)), -1) @ v


def disentangled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of queries with positions, gathered by distance."""
    positions = torch.randn(16, SIZE, generator=torch.Generator().manual_seed(2))
    bucket = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) + 8).clamp(0, 15)
    by_distance = torch.gather(q @ positions.t(), -1, bucket.expand(BATCH, HEADS, LENGTH, LENGTH))
    return torch.softmax(scores(q, k) + 0.25 * by_distance, -1) @ v


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products with all distances, brought into place by a pad and two views (Transformer-XL, Conformer)."""
    distances = torch.randn(HEADS, 2 * LENGTH - 1, SIZE, generator=torch.Generator().manual_seed(2))
    product = F.pad((q + 1) @ distances.transpose(-1, -2), (1, 0))
    product = product.view(BATCH, HEADS, -1, LENGTH)[:, :, 1:].view(BATCH, HEADS, LENGTH, 2 * LENGTH - 1)
    return torch.softmax(scores(q, k) + product[..., :LENGTH] * 0.25, -1) @ v


def blocks_beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks of queries over their own and both neighbouring blocks of keys, padded at the ends (LongT5)."""

    def blocks(x: Tensor) -> Tensor:
        return x.reshape(BATCH, HEADS, -1, BLOCK, SIZE)

    def beside(x: Tensor) -> Tensor:
        padded = F.pad(blocks(x), (0, 0, 0, 0, 1, 1))
        return torch.cat([padded[:, :, start : start + LENGTH // BLOCK] for start in range(3)], 3)

    real = beside(torch.ones_like(k))[..., 0] > 0
    score = scores(blocks(q), beside(k)).masked_fill(~real[:, :, :, None], -1e10)
    return (torch.softmax(score, -1) @ beside(v)).reshape(BATCH, HEADS, LENGTH, SIZE)


def mask_by_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask that is written for one pair and mapped over all."""
    place = torch.arange(LENGTH)
    keep = torch.vmap(torch.vmap(lambda i, j: (j <= i) & (j > i - 8), (None, 0)), (0, None))(place, place)
    return torch.softmax(scores(q, k).masked_fill(~keep, -torch.inf), -1) @ v


def negated_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A scale below zero, which must not reach the mask."""
    return torch.nn.functional.scaled_dot_product_attention(q, k * -1.0, v, is_causal=True, scale=1.0)


def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A second product of which a part is changed in place before it is added (Funnel)."""
    second = (torch.flip(q, (-1,)) @ torch.flip(k, (-2,)).transpose(-1, -2))[:, :, :, :LENGTH]
    second *= torch.linspace(0, 1, LENGTH)
    return torch.softmax(scores(q, k) + second, -1) @ v


def mask_in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask filled region by region, and a small tree at its corner (Swin, Medusa)."""
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    keep[-3:, -3:] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    regions = torch.zeros(LENGTH)
    regions[10:20] = 1
    regions[20:] = 2
    same = regions[:, None] - regions
    bias = same.masked_fill(same != 0, -100.0).masked_fill(same == 0, 0.0)
    return torch.softmax((scores(q, k) + bias).masked_fill(~keep, -torch.inf), -1) @ v


def sinks_and_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sink joined to scores whose mask is looked up by position (gpt-oss)."""
    padding = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [20]])).long()
    looked_up = padding.to(torch.bool)[torch.arange(BATCH)[:, None, None, None], torch.arange(LENGTH)]
    score = scores(q, k) + torch.where(looked_up, 0.0, torch.finfo(torch.float32).min)
    sinks = torch.linspace(-1, 1, HEADS)[None, :, None, None].expand(BATCH, -1, LENGTH, -1)
    joined = torch.cat([score, sinks], -1)
    return torch.softmax(joined - joined.max(-1, keepdim=True).values, -1)[..., :-1] @ v


def sink_by_log_sum_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sink as a factor of the result: exp(s) / (sum + exp(sink)) = softmax * sigmoid(logsumexp - sink) (Granite)."""
    score = scores(q, k).masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
    scale = torch.sigmoid(torch.logsumexp(score, -1) - torch.linspace(-1, 1, HEADS)[:, None])
    return (torch.softmax(score, -1) @ v) * scale[..., None]


def literal_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A static cache written at literal positions."""
    places = torch.tensor([5, 6])
    keys, values = (torch.zeros(BATCH, HEADS, 64, SIZE).index_copy(2, places, x[:, :, :2]) for x in (k, v))
    keep = torch.arange(64) <= places[:, None]
    return torch.softmax(scores(q[:, :, :2], keys).masked_fill(~keep, -torch.inf), -1) @ values


def slopes_by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = q[0, :, 0, 0].exp()
    i = torch.arange(LENGTH)
    distance = (i - i[:, None]).abs() - (i[:, None] - i) * 0.5
    return torch.softmax(scores(q, k) - slopes[:, None, None] * distance, -1) @ v


def waves_by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = q[0, :, 0, 0].exp()
    i = torch.arange(LENGTH)
    return torch.softmax(scores(q, k) + torch.sin(slopes[:, None, None] * (i - i[:, None])), -1) @ v


def bias_by_piece(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One function of one vector, computed for each piece of the keys by itself: no tensor holds all of it."""
    bias, s = q[0, 0, :, 0], scores(q, k)
    first, second, third = (s[..., part] for part in (slice(0, 9), slice(9, 20), slice(20, None)))
    joined = torch.cat([first + bias[:9].sin(), second + bias[9:20].sin(), third], -1)
    return torch.softmax(joined, -1) @ v


def bias_of_all_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias, s = q[0, 0, :, 0], scores(q, k)
    return torch.softmax(torch.cat([s[..., :9] + bias[:9].sin(), s[..., 9:] + bias[9:].sin()], -1), -1) @ v


def a_size_that_is_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``torch.div`` of numbers is a tensor, also where it is used as a size (Longformer)."""
    half = torch.div(q.shape[2], 2, rounding_mode="floor")
    bias = torch.cat([q.new_zeros((half,)), q.new_ones((half,))])
    return torch.softmax(scores(q, k) + bias, -1) @ v


FOUND = (
    a_size_that_is_a_tensor,
    bias_by_piece,
    bias_of_all_pieces,
    slopes_by_distance,
    waves_by_distance,
    decomposed_positions,
    split_heads,
    disentangled,
    shifted,
    blocks_beside,
    mask_by_vmap,
    negated_keys,
    scaled_in_place,
    mask_in_pieces,
    sinks_and_padding,
    literal_positions,
    sink_by_log_sum_exp,
)


def inputs(grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Callable[..., Tensor]) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


def test_what_is_loaded_is_read_without_divisions() -> None:
    analysis = _analysed(shifted)
    (spec,) = [special.spec for _, special in analysis.hits]
    assert spec.extras[0].index[2:] == (ROW, KEY)


def test_a_sink_by_log_sum_exp_is_a_sink() -> None:
    (spec,) = [special.spec for _, special in _analysed(sink_by_log_sum_exp).hits]
    assert len(spec.sinks) == 1 and spec.gain == ONE


def test_a_sink_by_a_log_sum_exp_of_other_units_is_none() -> None:
    """The sum of shifted exponentials, and a sum that has a sink already: neither makes the factor one more term."""

    def shifted_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = torch.exp(scores(q, k) - scores(q, k).amax(-1, keepdim=True))
        total = e.sum(-1, keepdim=True)
        return ((e / total) @ v) * torch.sigmoid(torch.log(total) - 0.5)

    def second_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = torch.exp(scores(q, k))
        total = e.sum(-1, keepdim=True)
        return ((e / (total + 1)) @ v) * torch.sigmoid(torch.log(total) - 0.5)

    for function in (shifted_sum, second_sink):
        compiled = torch.compile(function, backend="attngen", options={"inner": "eager"})
        torch.testing.assert_close(compiled(*inputs()), function(*inputs()))
        assert not any(special.spec.sinks and special.spec.gain == ONE for _, special in _analysed(function).hits)


def test_a_sink_by_log_sum_exp_leaves_empty_rows_nan() -> None:
    def emptied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = scores(q, k).masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(0), -torch.inf)
        return (torch.softmax(score, -1) @ v) * torch.sigmoid(torch.logsumexp(score, -1) - 0.5)[..., None]

    assert not _analysed(emptied).hits


def test_a_slope_times_a_distance_is_computed_and_a_costly_function_of_it_a_table() -> None:
    (spec,) = [special.spec for _, special in _analysed(slopes_by_distance).hits]
    (slope,) = spec.extras
    assert not any(place.has(ROW, KEY) for place in slope.index)
    (spec,) = [special.spec for _, special in _analysed(waves_by_distance).hits]
    (table,) = spec.extras
    assert table.index[-1] == KEY - ROW + ROW.extent - 1


def test_a_mask_by_vmap_is_a_window() -> None:
    analysis = _analysed(mask_by_vmap)
    (spec,) = [special.spec for _, special in analysis.hits]
    assert not spec.extras


def _analysed(function: Callable[..., Tensor]) -> Analysis:
    class Call(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return function(*args)

    run, analyses = watched(Call())
    run(*inputs())
    (analysis,) = analyses
    return analysis


def test_a_second_product_that_changes_the_weights_of_another_row_is_no_term() -> None:
    """The second product is over the queries' own dimension: the softmax would mix rows."""

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(scores(q, k) + scores(q, k).transpose(-1, -2), -2) @ v

    analysis = _analysed(wrong)
    assert not analysis.hits
