"""Attention that is a part of one call in the captured graph: the call is opened, and what it wrote in place is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from analysis import assert_replaced_with_its_gradient
from test_inductor import EAGER
from torch import Tensor
from torch.nn import functional as F

import attngen

LENGTH, WIDTH, HEADS = 20, 16, 2
LATER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [13]])


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((LENGTH, 2, WIDTH), (3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH))
    return [torch.randn(shape, generator=generator).div(4).requires_grad_() for shape in shapes]


def whole(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, **masks: Tensor) -> Tensor:
    """The masks are truth values, which the function fills into numbers that it made, in place."""
    result, _ = F.multi_head_attention_forward(
        x, x, x, WIDTH, HEADS, weight, bias, None, None, False, 0.0, out, None, need_weights=False, **masks
    )
    return result


def causal(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    return whole(x, weight, bias, out, attn_mask=LATER)


def padded(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    return whole(x, weight, bias, out, key_padding_mask=PADDING)


def both(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    return whole(x, weight, bias, out, attn_mask=LATER, key_padding_mask=PADDING)


@pytest.mark.parametrize("function", [causal, padded, both], ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Callable[..., Tensor]) -> None:
    assert_replaced_with_its_gradient(function, inputs)


@torch._dynamo.allow_in_graph
def filled_twice(x: Tensor) -> Tensor:
    """The fill is seen through another name, and added to."""
    mask = torch.zeros_like(x @ x.mT)
    turned = mask.mT
    mask.masked_fill_(torch.ones_like(mask).tril(-1) > 0, -1e9).add_(x.sum())
    return (x @ x.mT + turned).softmax(-1) @ x


@torch._dynamo.allow_in_graph
def filled_into_an_input(x: Tensor) -> Tensor:
    scores = x @ x.mT
    x.masked_fill_(x > 1, 0.5)
    return scores.softmax(-1) @ x


@torch._dynamo.allow_in_graph
def filled_through_another_name(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x @ x.mT)
    turned = mask.mT
    mask.add_(x[..., :1])
    return (x @ x.mT + turned).softmax(-1) @ x


@pytest.mark.parametrize("function", [filled_twice, filled_through_another_name, filled_into_an_input])
def test_what_is_seen_elsewhere_is_written_in_place(function: Callable[[Tensor], Tensor]) -> None:
    theirs, ours = (torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)) for _ in range(2))

    def model(x: Tensor) -> Tensor:
        return function(x) + x

    torch._dynamo.reset()
    with torch.no_grad(), attngen.record() as reports:
        torch.testing.assert_close(torch.compile(model, backend="attngen", options=EAGER)(ours), model(theirs))
    torch.testing.assert_close(ours, theirs)
    assert [site.status for report in reports for site in report.sites] == ["missed"]
