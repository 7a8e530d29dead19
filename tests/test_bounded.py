"""No graph makes the analysis take long: proofs follow a fixed number of steps, and work grows as the graph does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from analysis import assert_replaced_with_its_gradient
from torch import Tensor, fx

from attngen.errors import Miss
from attngen.passes import detect, lower

TOO_MUCH = "more is computed between the two products than a proof follows"
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def chain(q: Tensor, k: Tensor, v: Tensor, *, steps: int) -> Tensor:
    s = q @ k.mT
    for _ in range(steps):
        s = s.tanh()
    return s.softmax(-1) @ v


def diamonds(q: Tensor, k: Tensor, v: Tensor, *, steps: int) -> Tensor:
    """Written out as a tree, the scores double with each step."""
    s = q @ k.mT
    for _ in range(steps):
        s = s + 0.1 * s.tanh()
    return s.softmax(-1) @ v


def diamonds_of_weights(q: Tensor, k: Tensor, v: Tensor, *, steps: int) -> Tensor:
    w = (q @ k.mT).softmax(-1)
    for _ in range(steps):
        w = w * w
    return w @ v


def diamonds_of_masks(q: Tensor, k: Tensor, v: Tensor, *, steps: int) -> Tensor:
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
    for step in range(steps):
        mask = torch.where(torch.arange(k.shape[-2]) > step, mask, mask - 1.0)
    return (q @ k.mT + mask).softmax(-1) @ v


def sinkhorn(q: Tensor, k: Tensor, v: Tensor, *, steps: int) -> Tensor:
    """Rows and columns are normalised in turn: each step reads the one before at ever more places."""
    w = (q @ k.mT).softmax(-1)
    for _ in range(steps):
        w = w / (w.sum(-2, keepdim=True) + 1e-6)
        w = w / (w.sum(-1, keepdim=True) + 1e-6)
    return w @ v


def row_by_row(q: Tensor, k: Tensor, v: Tensor, *, steps: int) -> Tensor:
    """The inverse of a triangular matrix, as gated delta rules unroll it: each row is made of those before."""
    w = (q @ k.mT).exp().tril(-1)
    for row in range(1, steps):
        w[..., row, :row] = w[..., row, :row] + (w[..., row, :row, None] * w[..., :row, :row]).sum(-2)
    return w @ v


def inputs(*, requires_grad: bool = False, size: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, 8, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


def lowered(function: Callable[..., Any], *args: Tensor) -> lower.Lowered:
    kept: list[lower.Lowered] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        kept.append(lower.run(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    (graph,) = kept
    return graph


def calls(function: Callable[..., Any], *args: Tensor) -> int:
    """How many functions of attngen the analysis of a graph calls."""
    graph = lowered(function, *args)
    count = 0

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and "attngen" in frame.f_globals.get("__name__", "")

    sys.setprofile(profile)
    try:
        detect.run(graph)
    finally:
        sys.setprofile(None)
    return count


# Enough steps for the one and the other.
FEW = {chain: 40, diamonds: 8, diamonds_of_weights: 0, diamonds_of_masks: 8}
ENDLESS = {chain: 200, diamonds: 200, diamonds_of_weights: 200, diamonds_of_masks: 200, sinkhorn: 40}


@pytest.mark.parametrize("function", ENDLESS)
def test_what_goes_on_and_on_is_left_alone(function: Function) -> None:
    (found,) = detect.run(lowered(partial(function, steps=ENDLESS[function]), *inputs()))
    assert isinstance(found, Miss) and found.reason == TOO_MUCH


@pytest.mark.parametrize("function", FEW)
def test_a_few_steps_are_followed(function: Function) -> None:
    assert_replaced_with_its_gradient(partial(function, steps=FEW[function]), partial(inputs, requires_grad=True))


@pytest.mark.parametrize("function", ENDLESS)
def test_attention_beside_it_is_found(function: Function) -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v + function(v, k, q, steps=ENDLESS[function])

    found = detect.run(lowered(both, *inputs()))
    assert [isinstance(one, Miss) for one in found] == [False, True]


@pytest.mark.parametrize("function", [*ENDLESS, row_by_row])
def test_twice_the_steps_are_no_more_than_twice_the_work(function: Function) -> None:
    steps, size = (20, 40) if function is row_by_row else (60, 12)
    few, more, tensors = partial(function, steps=steps), partial(function, steps=2 * steps), inputs(size=size)
    calls(few, *tensors)  # questions about positions are answered once per process
    assert calls(more, *tensors) < 2.2 * calls(few, *tensors)


def test_each_further_layer_is_the_same_work() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, *, number: int) -> Tensor:
        for _ in range(number):
            q = sinkhorn(q, k, v, steps=10) + (q @ k.mT).softmax(-1) @ v
        return q

    _, two, three, five = (calls(partial(layers, number=number), *inputs()) for number in (2, 2, 3, 5))
    assert five - three < 2.1 * (three - two)
