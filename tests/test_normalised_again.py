"""Weights that are set to zero where they are NaN, masked after the softmax, or raised to a power, and normalised again."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from analysis import Analysis, assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor
from torch.nn import functional as F

import attngen
from attngen.algebra import ONE

BATCH, HEADS, LENGTH, SIZE = 2, 3, 20, 8
PLACES = torch.arange(LENGTH)
CAUSAL, LATE = PLACES[:, None] >= PLACES, PLACES[:, None] > PLACES + 3  # the first rows of ``LATE`` see no key
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SIZE**-0.5


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator, requires_grad=True) for _ in range(3)]


def padding(q: Tensor) -> Tensor:
    """Data: some keys count."""
    return (q[:, 0, :, 0] > -0.5)[:, None, None]


def over_sum(w: Tensor) -> Tensor:
    return w / w.sum(-1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------- never NaN


def nan_to_num(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~LATE, -math.inf).softmax(-1).nan_to_num(0.0) @ v


def nan_to_num_with_bounds(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).masked_fill(~LATE, -math.inf).softmax(-1)
    return torch.nan_to_num(w, nan=0.0, posinf=1e5, neginf=-1e5) / 2 @ v


def where_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).masked_fill(~LATE, -math.inf).softmax(-1)
    return torch.where(torch.isnan(w), torch.zeros_like(w), w) @ v


def where_unequal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).masked_fill(~padding(q) | ~LATE, -math.inf).softmax(-1)
    return torch.where(w == w, w, 0.0) @ v


def filled_where_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).masked_fill(~LATE, -math.inf).softmax(-1).masked_fill(~padding(q), 0.0)
    return w.masked_fill(w.isnan(), 0.0) @ v


NEVER_NAN = (nan_to_num, nan_to_num_with_bounds, where_nan, where_unequal, filled_where_nan)

# ------------------------------------------------------------------------------------------------------ normalised again


def masked_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return over_sum(scores(q, k).softmax(-1) * CAUSAL) @ v


def masked_later_by_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return over_sum(scores(q, k).softmax(-1).masked_fill(~padding(q), 0.0)) @ v


def masked_later_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return over_sum(over_sum((s - s.amax(-1, keepdim=True)).exp()).tril()) @ v


def masked_before_and_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return over_sum(scores(q, k).masked_fill(~CAUSAL, -math.inf).softmax(-1) * ((PLACES[:, None] - PLACES) % 3 == 0)) @ v


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return over_sum(scores(q, k).masked_fill(~padding(q), -1e9).softmax(-1).square()) @ v


def sharpened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return over_sum(scores(q, k).masked_fill(~CAUSAL, -1e9).softmax(-1) ** 1.5) @ v


def root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return over_sum(scores(q, k).softmax(-1).sqrt()) @ v


def exponential_of_masked_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(scores(q, k), -1).masked_fill(~CAUSAL, -math.inf).exp() @ v


def exponential_of_logarithm_and_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, -math.inf)
    return (F.log_softmax(scores(q, k), -1) + mask).exp() @ v


def and_a_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """AllenNLP's masked softmax: a row without keys is zero."""
    mask = LATE.float()
    w = torch.softmax(scores(q, k) * mask, -1) * mask
    return w / (w.sum(-1, keepdim=True) + 1e-13) @ v


def and_much(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1) * padding(q)
    return w / (w.sum(-1, keepdim=True) + 0.3) @ v


def and_a_little_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    w = over_sum((s - s.amax(-1, keepdim=True)).exp()).tril()
    return w / (w.sum(-1, keepdim=True) + 1e-6) @ v


AGAIN = (
    masked_later, masked_later_by_data, masked_later_by_hand, masked_before_and_after, squared, sharpened, root,
    exponential_of_masked_logarithm, exponential_of_logarithm_and_mask, and_a_little, and_much, and_a_little_by_hand,
)  # fmt: skip


@pytest.mark.parametrize("function", [*NEVER_NAN, *AGAIN], ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function) -> None:
    assert_replaced_with_its_gradient(function, inputs)


def analysed(function: Function) -> Analysis:
    run, analyses = watched(Call(function))
    run(*inputs())
    (analysis,) = analyses
    return analysis


@pytest.mark.parametrize("function", [*NEVER_NAN, *AGAIN], ids=lambda f: f.__name__)
def test_its_spec_has_the_value_of_the_graph(function: Function) -> None:
    analysis = analysed(function)
    assert len(analysis.hits) == 1 and not analysis.misses
    assert analysis.errors()[0] < 2e-6
    assert analysis.hits[0][1].spec.empty == ("never_nan" if function in NEVER_NAN else "nan")


def test_what_is_masked_later_is_a_mask() -> None:
    for function in (masked_later, masked_later_by_hand):
        spec = analysed(function).hits[0][1].spec
        assert spec.gain == ONE and spec.mask.axes == CAUSAL_AXES


CAUSAL_AXES = analysed(lambda q, k, v: scores(q, k).masked_fill(~CAUSAL, -math.inf).softmax(-1) @ v).hits[0][1].spec.mask.axes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [nan_to_num, where_nan, where_unequal], ids=lambda f: f.__name__)
def test_rows_that_are_nan_for_another_reason_are_zero_as_well(function: Function, bad: float) -> None:
    q, k, v = (x.detach() for x in inputs())
    q[:, :, 7] = bad
    torch._dynamo.reset()
    with attngen.record() as reports:
        out = torch.compile(function, backend="attngen", options=EAGER)(q, k, v)
    assert [site.status for site in reports[0].sites] == ["replaced"]
    torch.testing.assert_close(out, function(q, k, v))
    assert not out.isnan().any()


# ------------------------------------------------------------------------------------------------------------ left alone


def another_number_for_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~LATE, -math.inf).softmax(-1).nan_to_num(1.0) @ v


def nan_of_other_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(~LATE, -math.inf)
    return torch.where((2 * s).softmax(-1).isnan(), 0.0, s.softmax(-1)) @ v


def nan_anywhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).masked_fill(~LATE, -math.inf).softmax(-1)
    return torch.where(w.isnan().any(), 0.0, w) @ v


def nan_of_a_gain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Infinity is a large number afterwards."""
    return (scores(q, k).softmax(-1) / (q[..., :1] > 0).float()).nan_to_num(0.0) @ v


def no_nan_and_then_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).masked_fill(~LATE, -math.inf).softmax(-1).nan_to_num(0.0)
    return over_sum(w * (PLACES % 3 == 0)) @ v


def other_powers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    return w**3 / (w**2).sum(-1, keepdim=True) @ v


def square_over_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    return w.square() / w.sum(-1, keepdim=True) @ v


def power_of_a_difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return over_sum((scores(q, k).softmax(-1) - 0.02) ** 2) @ v


def negative_power(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return over_sum(scores(q, k).softmax(-1) ** -1.0) @ v


def other_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    return w.tril() / w.tril(3).sum(-1, keepdim=True) @ v


def sum_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1).tril()
    return w / w.sum(-2, keepdim=True) @ v


def sum_at_least(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1).tril()
    return w / w.sum(-1, keepdim=True).clamp(min=0.2) @ v


def less_a_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1).tril()
    return w / (w.sum(-1, keepdim=True) - 1e-2) @ v


def fill_that_shows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(scores(q, k), -1).masked_fill(~CAUSAL, -3.0).exp() @ v


def logarithm_of_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(scores(q, k), -1).tril().exp() @ v


def left_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row whose keys are padding gave all its weight to them, none is left: not the mean over keys to come."""
    w = scores(q, k).masked_fill(~CAUSAL, -1e9).softmax(-1) * (padding(q) & (PLACES > 4))
    return over_sum(w) @ v


def left_padding_and_a_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).masked_fill(~LATE, -1e9).softmax(-1) * padding(q)
    return w / (w.sum(-1, keepdim=True) + 1e-6) @ v


@pytest.mark.parametrize(
    "function",
    [
        another_number_for_nan, nan_of_other_weights, nan_anywhere, nan_of_a_gain, no_nan_and_then_normalised, other_powers,
        square_over_the_sum, power_of_a_difference, negative_power, other_masks, sum_over_queries, sum_at_least,
        less_a_little, fill_that_shows, logarithm_of_zeros, left_padding, left_padding_and_a_little,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_left_alone(function: Function) -> None:
    tensors = [x.detach() for x in inputs()]
    torch._dynamo.reset()
    with attngen.record() as reports:
        out = torch.compile(function, backend="attngen", options=EAGER)(*tensors)
    torch.testing.assert_close(out, function(*tensors), equal_nan=True)
    assert all(site.status != "replaced" for report in reports for site in report.sites)
