"""Sliding windows that are computed in overlapping chunks: a band of keys that all queries share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import sympy as sp
import torch
from analysis import assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor
from torch.nn.functional import dropout, pad

import attngen
from attngen.algebra import Const, Int, negate, op
from attngen.index import Axis, floordiv, modulo
from attngen.mask import derive
from attngen.passes.grids import Pairs, is_inside
from attngen.spec import KEY, ROW
from attngen.verify import within_budget

BATCH, HEADS, LENGTH, SIZE, SIDE = 2, 3, 32, 8, 4
WIDTH = 2 * SIDE + 1
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(grad: bool = False, length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, length, HEADS, SIZE, generator=generator, requires_grad=grad) for _ in range(3)]


def flat(x: Tensor) -> Tensor:
    """[batch, length, heads, size] -> [batch * heads, length, size]"""
    return x.transpose(1, 2).reshape(BATCH * HEADS, x.shape[1], SIZE)


def chunks(x: Tensor) -> Tensor:
    """[b, n, d] -> [b, n / SIDE - 1, 2 * SIDE, d], each half of a chunk the next one's other half."""
    x = x.view(x.shape[0], x.shape[1] // (2 * SIDE), 2 * SIDE, x.shape[2])
    size, stride = list(x.shape), list(x.stride())
    size[1], stride[1] = 2 * size[1] - 1, stride[1] // 2
    return x.as_strided(size, stride)


def as_band(s: Tensor) -> Tensor:
    """Products of chunks as [b, n, WIDTH]: the key ``c - SIDE`` after each query. What is no key's has any score."""
    b, count = s.shape[:2]
    s = pad(s, (0, 0, 0, 1)).view(b, count, 2 * SIDE, WIDTH)
    band = s.new_zeros(b, count + 1, SIDE, WIDTH)
    band[:, :-1, :, SIDE:] = s[:, :, :SIDE, : SIDE + 1]
    band[:, -1, :, SIDE:] = s[:, -1, SIDE:, : SIDE + 1]
    band[:, 1:, :, :SIDE] = s[:, :, -(SIDE + 1) : -1, SIDE + 1 :]
    band[:, 0, 1:SIDE, 1:SIDE] = s[:, 0, : SIDE - 1, 1 - SIDE :]
    return band.view(b, -1, WIDTH)


def masked(band: Tensor) -> Tensor:
    """-inf where there is no key, written in place."""
    corner = torch.ones(SIDE, SIDE + 1).tril().flip(0).bool()
    for part, outside in ((band[:, :SIDE, : SIDE + 1], corner), (band[:, -SIDE:, -SIDE - 1 :], corner.flip(0, 1))):
        part.copy_(torch.where(outside, -math.inf, part))
    return band


def band_of(q: Tensor, k: Tensor) -> Tensor:
    return as_band(torch.einsum("bcxd,bcyd->bcxy", chunks(flat(q)), chunks(flat(k))))


def weighted(p: Tensor, v: Tensor, shift: int = 0, value: float = -1.0) -> Tensor:
    """The values times weights of [b, n, WIDTH]."""
    length = v.shape[1]
    v = pad(flat(v), (0, 0, SIDE + shift, SIDE - shift), value=value)
    b, count = v.shape[0], length // SIDE
    v = v.as_strided((b, count, 3 * SIDE, SIZE), (v.stride(0), SIDE * v.stride(1), v.stride(1), v.stride(2)))
    p = pad(p.reshape(b, count, SIDE, WIDTH), (0, SIDE + 1)).view(b, count, -1)[:, :, :-SIDE]
    out = torch.einsum("bcwd,bcdh->bcwh", p.view(b, count, SIDE, 3 * SIDE + 1)[..., :-1], v)
    return out.view(BATCH, HEADS, length, SIZE).transpose(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(masked(band_of(q, k)).softmax(-1), v)


def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1.0
    q /= math.sqrt(SIZE)
    return weighted(masked(band_of(q, k)).softmax(-1, dtype=torch.float32), v)


def padding_in_the_same_layout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask is laid out by a product with ones; rows of padding are set to zero."""
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [19]])
    fill = padding[:, None, :, None].to(q.dtype).expand(-1, HEADS, -1, -1).reshape(-1, LENGTH, 1) * -1e9
    mask = as_band(torch.einsum("bcxd,bcyd->bcxy", chunks(torch.ones_like(fill)), chunks(fill)))
    s = masked(band_of(q, k))
    s += masked(mask)
    p = s.softmax(-1).view(BATCH, HEADS, LENGTH, WIDTH).masked_fill(padding[:, None, :, None], 0.0)
    return weighted(p.view(-1, LENGTH, WIDTH), v)


def bias_by_offset(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted((masked(band_of(q, k)) + torch.arange(WIDTH) * 0.1).softmax(-1), v)


def one_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x[:, : 2 * SIDE] for x in (q, k, v))
    return plain(q, k, v)


FOUND = (plain, scaled_in_place, padding_in_the_same_layout, bias_by_offset, one_chunk)


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_a_band_of_shared_keys(function: Function) -> None:
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    (analysis,) = analyses
    ((site, special),) = analysis.hits
    assert site.row.extent == site.key.extent and analysis.errors()[0] < 2e-6
    cover = derive(special.spec.mask)
    assert len(cover.visit) == 1
    assert not any(isinstance(node, Int) and node.value.has(sp.Mod) for node in special.spec.score.walk())


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


@pytest.mark.parametrize("function", [plain, padding_in_the_same_layout], ids=lambda f: f.__name__)
def test_in_bfloat16(function: Function) -> None:
    """Sums that are rounded are read as such; one number as low as masks does not make -inf of a score."""
    args = [x.bfloat16() for x in inputs()]
    torch._dynamo.reset()
    with torch.no_grad(), attngen.record() as reports:
        ours = torch.compile(function, backend="attngen", options=EAGER)(*args)
    assert [site.status for report in reports for site in report.sites] == ["replaced"]
    check = within_budget(ours, function(*(x.double() for x in args)), function(*args))
    assert check.ok, str(check)


def test_the_mask_is_the_window() -> None:
    run, analyses = watched(Call(plain))
    run(*inputs())
    ((_, special),) = analyses[0].hits
    assert special.spec.mask == is_inside(KEY - ROW + SIDE, sp.Integer(WIDTH)) and special.spec.extras == ()


def no_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is no key's counts."""
    return weighted(band_of(q, k).softmax(-1), v)


def half_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    band = band_of(q, k)
    band[:, :SIDE, : SIDE + 1].masked_fill_(torch.ones(SIDE, SIDE + 1).tril().flip(0).bool(), -math.inf)
    return weighted(band.softmax(-1), v)


def finite_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Padding of the values may count a little."""
    return weighted(masked(band_of(q, k)).clamp(min=-9.0).softmax(-1), v)


def divided_by_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is masked is NaN."""
    return weighted((masked(band_of(q, k)) / math.inf).softmax(-1), v)


def values_one_step_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(masked(band_of(q, k)).softmax(-1), v, shift=1)


def values_infinite_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(masked(band_of(q, k)).softmax(-1), v, value=math.inf)


def keys_in_reverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(masked(band_of(q, k.flip(1))).softmax(-1), v)


def offsets_in_reverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(masked(band_of(q, k)).flip(-1).softmax(-1), v)


def one_row_of_another_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bcxd,bcyd->bcxy", chunks(flat(q)), chunks(flat(k)))
    s[:, -1, -1] = s[:, -1, -2]
    return weighted(masked(as_band(s)).softmax(-1), v)


def normalised_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(masked(band_of(q, k)).softmax(-2).nan_to_num(), v)


def weights_padded_with_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = masked(band_of(q, k)).softmax(-1)
    windows = pad(flat(v), (0, 0, SIDE, SIDE)).unfold(1, WIDTH + 1, 1)
    p = pad(p[:, : windows.shape[1]], (0, 1), value=1.0)
    return torch.einsum("bnw,bndw->bnd", p, windows)


def keys_zeroed_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.sin()
    band = masked(band_of(q, k))
    k.zero_()
    return weighted(band.softmax(-1), v) + k


def values_written_in_their_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Padded, then changed where the values are."""
    p = masked(band_of(q, k)).softmax(-1)
    padded = pad(flat(v), (0, 0, SIDE, SIDE))
    padded[:, SIDE + 3] = 2.0
    return torch.einsum("bnw,bndw->bnd", p, padded.unfold(1, WIDTH, 1))


LOOK_ALIKES = (
    no_mask, half_a_mask, finite_mask, divided_by_infinity, values_one_step_on, values_infinite_outside, offsets_in_reverse,
    one_row_of_another_query, normalised_over_queries, weights_padded_with_ones, keys_zeroed_afterwards,
)  # fmt: skip


@pytest.mark.parametrize("function", LOOK_ALIKES, ids=lambda f: f.__name__)
def test_look_alikes_are_left_alone(function: Function) -> None:
    torch._dynamo.reset()
    with attngen.record() as reports:
        out = torch.compile(function, backend="attngen", options=EAGER)(*inputs())
    assert [len(report.replaced) for report in reports] == [0]
    torch.testing.assert_close(out, function(*inputs()), equal_nan=True)


def scores_set_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    band = masked(band_of(q, k))
    band[:, 5, 2] = 0.5
    return weighted(band.softmax(-1), v)


def unfolded_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights times a window of values for each query."""
    p = masked(band_of(q, k)).softmax(-1)
    return torch.einsum("bnw,bndw->bnd", p, pad(flat(v), (0, 0, SIDE, SIDE)).unfold(1, WIDTH, 1))


@pytest.mark.parametrize(
    "function",
    [keys_in_reverse, scores_set_by_hand, unfolded_values, values_written_in_their_padding],
    ids=lambda f: f.__name__,
)
def test_computed_whatever_it_is(function: Function) -> None:
    torch._dynamo.reset()
    out = torch.compile(function, backend="attngen", options=EAGER)(*inputs())
    torch.testing.assert_close(out, function(*inputs()))


def test_dropped_weights_are_the_same_in_the_backward() -> None:
    """The result is linear in the values: its gradient at the values gives it back."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weighted(dropout(masked(band_of(q, k)).softmax(-1), 0.3), v)

    torch._dynamo.reset()
    args = inputs(grad=True)
    with attngen.record() as reports:
        out = torch.compile(function, backend="attngen", options=EAGER)(*args)
    assert [site.status for report in reports for site in report.sites] == ["replaced"]
    (gradient,) = torch.autograd.grad(out, args[2], torch.ones_like(out))
    torch.testing.assert_close((gradient * args[2]).sum(), out.sum(), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- at all pairs

ROWS, COLUMNS = Axis("x", 12), Axis("y", 9)
PAIRS = Pairs(ROWS, COLUMNS)


def test_plain_where_it_counts() -> None:
    place = floordiv(9 * ROWS + COLUMNS, sp.Integer(8)) * 8 + modulo(9 * ROWS + COLUMNS, sp.Integer(8)) - 8 * ROWS
    near = PAIRS.where(is_inside(COLUMNS, sp.Integer(4)))
    assert PAIRS.plain(place, [ROWS, ROWS + COLUMNS]) == ROWS + COLUMNS
    assert PAIRS.plain(place, [ROWS]) is None and PAIRS.plain(ROWS + 3, [ROWS]) == ROWS + 3
    assert PAIRS.plain(floordiv(COLUMNS, sp.Integer(4)), [ROWS]) is None
    assert near.plain(floordiv(COLUMNS, sp.Integer(4)), [ROWS]) == 0


def test_one_pair_decides() -> None:
    """Differences at one pair of many are seen, wherever it is."""
    rows, columns = Axis("x", 700), Axis("y", 800)
    pairs = Pairs(rows, columns)
    for place in (0, 349, 699):
        only = op("and", op("eq", Int(rows), Int(sp.Integer(place))), op("eq", Int(columns), Int(sp.Integer(place))))
        assert not pairs.never(only) and not pairs.always(negate(only)) and not pairs.agree(only, Const(False))
        assert pairs.plain(rows + sp.Max(1 - sp.Abs(rows - place) - sp.Abs(columns - place), 0), [rows]) is None
    nowhere = pairs.where(op("lt", Int(rows + columns), Int(sp.S.Zero)))
    assert nowhere.never() and nowhere.plain(rows, [rows]) is None


def test_too_many_to_look_at() -> None:
    assert not Pairs(Axis("x", 1 << 16), Axis("y", 1 << 16)).countable
    assert not Pairs(Axis("x", sp.Symbol("n", integer=True, positive=True)), Axis("y", 2)).countable
