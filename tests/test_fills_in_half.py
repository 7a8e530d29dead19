"""Masks of large negative numbers that the graph makes: what they leave of a score in 16 bits is what the model has there.

Fills of one score meet in rows that are masked throughout: they must be as equal, and as far apart, as in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from specs import QK, attention, loaded
from test_drowned import DTYPES, EAGER, close, compared, inputs_in, scores
from torch import Tensor

from attngen import blockwise
from attngen.algebra import Const, integer, op, where
from attngen.emit import Kernel, emit
from attngen.spec import KEY, ROW, AttentionSpec, Problem, Tile
from attngen.verify import run_interpreted, sample_inputs


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def causal_then_padding(q: Tensor, k: Tensor, v: Tensor, future: Tensor, hidden: Tensor) -> Tensor:
    """One is added, one filled in: a row that is masked by both in turn is the mean over all."""
    causal = torch.zeros(12, 12, dtype=q.dtype).masked_fill(future, lowest(q.dtype))
    return (scores(q, k) + causal).masked_fill(hidden, lowest(q.dtype)).softmax(-1) @ v


def two_added(q: Tensor, k: Tensor, v: Tensor, future: Tensor, hidden: Tensor) -> Tensor:
    """Where both mask, fp16 and bfloat16 have -inf."""
    first, second = (torch.zeros(12, 12, dtype=q.dtype).masked_fill(m, lowest(q.dtype)) for m in (future, hidden))
    return (scores(q, k) + first + second).softmax(-1) @ v


def filled_around_a_bias(q: Tensor, k: Tensor, v: Tensor, future: Tensor, hidden: Tensor) -> Tensor:
    fill = max(-1e9, lowest(q.dtype))
    bias = k[0, 0, :, 0] * torch.arange(12, dtype=q.dtype)
    return (scores(q, k).masked_fill(future, fill) + bias).masked_fill(hidden, fill).softmax(-1) @ v


def scaled_after(q: Tensor, k: Tensor, v: Tensor, future: Tensor, hidden: Tensor) -> Tensor:
    fills = torch.where(future | hidden, torch.full((), lowest(q.dtype), dtype=q.dtype), 0.0)
    return ((q @ k.mT + fills) * 0.25).softmax(-1) @ v


def below_all_numbers(q: Tensor, k: Tensor, v: Tensor, future: Tensor, hidden: Tensor) -> Tensor:
    """Large scores, without rounding: in fp16, what is far below zero is -inf under the mask."""
    fills = torch.zeros(12, 12, dtype=q.dtype).masked_fill(future | hidden, lowest(q.dtype))
    return ((q.round() * 8) @ k.round().mT + fills).softmax(-1) @ v


def masked_again_in_float32(q: Tensor, k: Tensor, v: Tensor, future: Tensor, hidden: Tensor) -> Tensor:
    fills = torch.where(hidden, torch.full((), lowest(q.dtype), dtype=q.dtype), 0.0)
    return (scores(q, k) + fills).float().masked_fill(future, -1e9).softmax(-1).to(q.dtype) @ v


def no_mask_at_all(q: Tensor, k: Tensor, v: Tensor, future: Tensor, hidden: Tensor) -> Tensor:
    """What would be a mask is scaled until it shows."""
    fills = torch.zeros(12, 12, dtype=q.dtype).masked_fill(future | hidden, -4e4)
    return ((scores(q, k) + fills) * 2.0**-15).softmax(-1) @ v


def without_softmax(q: Tensor, k: Tensor, v: Tensor, future: Tensor, hidden: Tensor) -> Tensor:
    fills = torch.zeros(12, 12, dtype=q.dtype).masked_fill(future | hidden, -4e4)
    return (scores(q, k) + fills) @ (v * 2.0**-15)


MADE = (
    causal_then_padding, two_added, filled_around_a_bias, scaled_after, below_all_numbers, masked_again_in_float32,
    no_mask_at_all, without_softmax,
)  # fmt: skip


def made_inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)
    hidden = torch.zeros(12, 12, dtype=torch.bool)
    hidden[[0, 3, 7]], hidden[5, :3] = True, True
    hidden[7, 2], hidden[2, :3] = False, True  # nothing is left of row 2, but some of it is masked once
    return (*inputs_in(dtype), future, hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MADE, ids=lambda model: model.__name__)
def test_fills_of_one_score_meet_as_in_the_model(model: Callable[..., Tensor], dtype: torch.dtype) -> None:
    close(*compared(model, *made_inputs(dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", [causal_then_padding, filled_around_a_bias], ids=lambda model: model.__name__)
def test_gradients_of_such_rows(model: Callable[..., Tensor], dtype: torch.dtype) -> None:
    *operands, future, hidden = made_inputs(dtype)
    found = []
    for run in (torch.compile(model, backend="attngen", options=EAGER), model):
        leaves = [x.clone().requires_grad_() for x in operands]
        out = run(*leaves, future, hidden)
        found.append(torch.autograd.grad((out * out.detach().cos()).sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        slack = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_fill_that_another_term_takes_back(dtype: torch.dtype) -> None:
    """``s - s.detach()`` is zero, where ``s`` is masked too: no pair is."""

    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        s = scores(q, k).masked_fill(m, torch.finfo(q.dtype).min)
        return (s - s.detach()).softmax(-1) @ v

    q, k, v = inputs_in(dtype)
    close(*compared(model, q, k, v, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)))


# ------------------------------------------------------------------------------------------------------------- kernels


MARK = loaded("t0", ROW, KEY, kind="int")


def made_in_half(dtype: torch.dtype) -> AttentionSpec:
    """The lowest number of ``dtype`` is added to what is marked, in that type."""
    shown = op("eq", MARK, integer(0))
    added = op("add", QK, where(shown, Const(0.0), Const(torch.finfo(dtype).min)))
    return attention(
        dtype=torch.float16, score=QK, mask=shown, whole=op("rounded", added, Const(-32 / torch.finfo(dtype).eps)),
        redo_below=-30000.0, extras={"t0": (torch.int64, (ROW, KEY))},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_round_sums_of_masked_rows(dtype: torch.dtype) -> None:
    """Scores from -40 to 40: what 16 bits leave of them beside the lowest number decides."""
    spec = made_in_half(dtype)
    marks = torch.zeros(12, 12, dtype=torch.int64)
    marks[3], marks[5, :8] = 1, 1
    inputs = [*sample_inputs(spec, Problem((1, 2), 12, 12))[:3], marks]
    inputs[0] = inputs[0] * 10
    kernel = emit(spec, Tile(32, 16, 4, 1))
    assert isinstance(kernel, Kernel), kernel
    (result,) = run_interpreted([(kernel, inputs)])
    assert isinstance(result, list), result
    q, k, v, _ = (x.float() for x in inputs)
    sums = ((q @ k.mT) * 0.125 + marks * torch.finfo(dtype).min).to(dtype).float()
    theirs = torch.where((marks == 1).all(-1, keepdim=True), sums, (q @ k.mT) * 0.125 + marks * -1e9).softmax(-1) @ v
    close(result[0], theirs.half())
    close(blockwise.forward(spec, inputs)[0], theirs.half())
