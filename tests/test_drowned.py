"""Masks of large negative numbers that are loaded: added in 16 bits they leave nothing of a score, as in the model.

A row that is masked throughout is the mean of the values in eager fp16, because -65504 plus a score is -65504. A kernel
adds in float32, where the score would survive; the models here have such rows, and rows masked in part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from specs import QK, attention, loaded, plus
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attngen
from attngen import blockwise
from attngen.algebra import Const, Expr, op
from attngen.emit import Kernel, emit
from attngen.spec import KEY, ROW, AttentionSpec, Problem, Tile
from attngen.verify import check, run_interpreted, sample_inputs

EAGER: dict[str, Any] = {"inner": "eager", "strict": True}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL, SOME, NONE, PART = 3, 5, 7, 9  # rows of the mask: masked throughout, in part; -inf throughout, in part


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)) * 0.25


def masked(dtype: torch.dtype, fill: float | None = None) -> Tensor:
    fill = torch.finfo(dtype).min if fill is None else fill
    mask = torch.zeros(12, 12, dtype=dtype)
    mask[ALL], mask[SOME, :8], mask[NONE], mask[PART, 2:] = fill, fill, -math.inf, -math.inf
    return mask


Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (scores(q, k) + m).softmax(-1) @ v


def softmax_in_float32(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(m + scores(q, k), -1, dtype=torch.float32).to(q.dtype) @ v


def sum_in_float32(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (scores(q, k).float() + m).softmax(-1).to(q.dtype) @ v


def subtracted(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (scores(q, k) - m.neg()).softmax(-1) @ v


def per_key(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """One batch masked throughout, the other in part."""
    return (scores(q, k) + m[ALL : SOME + 1 : 2, None, None]).softmax(-1) @ v


def per_query(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (scores(q, k) + m[:, :1]).softmax(-1) @ v


def with_a_bias(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """Two per-pair tensors, whose sum the graph holds."""
    return (scores(q, k) + (k[1, 1, :, :12] + m)).softmax(-1) @ v


def after_a_bias(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (scores(q, k) + k[1, 1, :, :12] + m).softmax(-1) @ v


def with_a_causal_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    future = torch.ones(12, 12, dtype=torch.bool, device=q.device).triu(1)
    causal = torch.zeros(12, 12, dtype=q.dtype).masked_fill(future, -math.inf)
    return (scores(q, k) + causal + m).softmax(-1) @ v


def in_the_library(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """Adds in float32, whatever the dtype of the mask."""
    return scaled_dot_product_attention(q, k, v, m)


def filled_in_the_library(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    fill = torch.zeros(12, 12, dtype=q.dtype).masked_fill(m != 0, torch.finfo(q.dtype).min)
    return scaled_dot_product_attention(q, k, v, fill)


MODELS: tuple[Model, ...] = (
    added, softmax_in_float32, sum_in_float32, subtracted, per_key, per_query, with_a_bias, after_a_bias, with_a_causal_mask,
    in_the_library, filled_in_the_library,
)  # fmt: skip


def inputs_in(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 12, 16).to(dtype) for _ in range(3))
    return q, k, v


def compared(model: Model, *args: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), attngen.record() as reports:
        ours = torch.compile(model, backend="attngen", options=EAGER)(*args)
    assert sum(len(report.replaced) for report in reports) == 1
    return ours, model(*args)


def close(ours: Tensor, theirs: Tensor) -> None:
    """To a few roundings of weights and results that are at most a few units."""
    slack = 8 * torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_rows_come_out_as_in_the_model(model: Model, dtype: torch.dtype) -> None:
    ours, theirs = compared(model, *inputs_in(dtype), masked(dtype))
    close(ours, theirs)


@pytest.mark.parametrize(("dtype", "fill"), [(torch.bfloat16, -1e4), (torch.bfloat16, -1e9), (torch.float16, -4e4)])
def test_other_fills_that_leave_nothing(dtype: torch.dtype, fill: float) -> None:
    ours, theirs = compared(added, *inputs_in(dtype), masked(dtype, fill))
    close(ours, theirs)
    close(ours[:, :, ALL], inputs_in(dtype)[2].float().mean(-2).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "fill", "left"),
    [(torch.float16, -4e4, 3), (torch.float16, -6e4, 3), (torch.bfloat16, -5e3, 3)],
)
def test_large_scores_leave_what_they_leave_in_the_model(dtype: torch.dtype, fill: float, left: int) -> None:
    """Where numbers are 32 apart, a few sums with scores from -20 to 68 share the largest."""
    q, k, v = inputs_in(dtype)
    q[..., 0], q[..., 1:], k[..., 0] = 4.0, 0.0, torch.arange(12).to(dtype) * 8 - 20
    mask = masked(dtype, fill)
    sums = (scores(q, k) + mask)[0, 0, ALL]
    assert (sums == sums.max()).sum() == left
    ours, theirs = compared(added, q, k, v, mask)
    close(ours[:, :, ALL], theirs[:, :, ALL])


def test_of_two_fills_the_lower_one_counts_less() -> None:
    """A row whose visible keys are all at -1e9, and the others at the lowest number: the mean of the visible ones."""

    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        s = scores(q, k) + m.to(q.dtype) * -1e9
        return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), torch.finfo(s.dtype).min).softmax(-1) @ v

    q, k, v = inputs_in(torch.bfloat16)
    hidden = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bool)
    hidden[1, :2] = True
    close(*compared(model, q, k, v, hidden))


def test_what_is_kept_may_be_lower_than_the_fill() -> None:
    """A row whose visible keys are all at the lowest number, and the others at -1e9: the mean of the others."""

    def model(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        s = scores(q, k).masked_fill(~kept[:, None, None], -math.inf).clamp(min=torch.finfo(q.dtype).min)
        return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ v

    kept = torch.ones(2, 12, dtype=torch.bool)
    kept[0], kept[1, :3] = False, False
    close(*compared(model, *inputs_in(torch.float32), kept))


@pytest.mark.parametrize("subtracted", ["times 1e9", "as a whole number"])
def test_a_mask_of_whole_numbers_may_be_as_low_as_the_fill(subtracted: str) -> None:
    """A row whose visible keys are all lowered as far as the others are: the mean of all."""

    def model(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        hidden = hidden[:, None, None]
        low = hidden * 1e9 if subtracted == "times 1e9" else (hidden * 1_000_000_000).to(q.dtype)
        s = scores(q, k) - low
        return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ v

    hidden = torch.zeros(2, 12, dtype=torch.int64)
    hidden[0], hidden[1, :3] = 1, 1
    close(*compared(model, *inputs_in(torch.float32), hidden))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_made_from_numbers(dtype: torch.dtype) -> None:
    """One for what is kept, zero for what is not: the mask is computed in the kernel."""

    def model(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        return (scores(q, k) + (1.0 - kept[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min).softmax(-1) @ v

    kept = torch.ones(2, 12, dtype=torch.int64)
    kept[0], kept[1, 7:] = 0, 0
    close(*compared(model, *inputs_in(dtype), kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_no_sum_normalises_keep_large_numbers(dtype: torch.dtype) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return (scores(q, k) + m) @ v

    q, k, v = inputs_in(dtype)
    ours, theirs = compared(model, q, k, v * 2.0**-10, masked(dtype, -4.5e4).nan_to_num(neginf=-6e4))
    assert theirs[:, :, ALL].abs().max() > 40
    torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=400 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------------------------- kernels


PER_PAIR, PER_KEY, PER_QUERY = loaded("t0", ROW, KEY), loaded("t0", KEY, kind="int"), loaded("t0", ROW)
LOWEST = torch.finfo(torch.float32).min
FROM_NUMBERS = op("mul", op("sub", Const(1.0), op("float", PER_KEY)), Const(LOWEST))


def drown(term: Expr, dtype: torch.dtype) -> Expr:
    return op("drown", term, Const(-32 / torch.finfo(dtype).eps))


# The type of the operands, the tensor that is loaded, at which axes, the term made of it, and what the model adds.
LOADED: dict[str, tuple[torch.dtype, Tensor, tuple[Any, ...], Expr, Callable[[Tensor], Tensor]]] = {
    "fp16": (torch.float16, masked(torch.float16), (ROW, KEY), drown(PER_PAIR, torch.float16), lambda m: m),
    "numbers of bf16": (
        torch.float16, masked(torch.bfloat16).float(), (ROW, KEY), drown(PER_PAIR, torch.bfloat16), lambda m: m,
    ),
    "small numbers of bf16": (
        torch.float16, masked(torch.bfloat16, -1e4).float(), (ROW, KEY), drown(PER_PAIR, torch.bfloat16),
        lambda m: m * 1e6,
    ),
    "fp16 plus fp32": (torch.float16, masked(torch.float32), (ROW, KEY), PER_PAIR, lambda m: m),
    "fp32": (torch.float32, masked(torch.float32), (ROW, KEY), PER_PAIR, lambda m: m),
    "from numbers": (
        torch.float32, torch.zeros(12, dtype=torch.int64), (KEY,), FROM_NUMBERS, lambda m: (1.0 - m) * LOWEST,
    ),
    "per query": (torch.float32, masked(torch.float32)[:, 0], (ROW,), PER_QUERY, lambda m: m[:, None]),
}  # fmt: skip


def case_of(name: str) -> tuple[AttentionSpec, list[Tensor]]:
    dtype, mask, index, term, _ = LOADED[name]
    spec = attention(dtype=dtype, score=plus(QK, term), extras={"t0": (mask.dtype, index)})
    return spec, [*sample_inputs(spec, Problem((1, 2), 12, 12))[:3], mask]


@pytest.fixture(scope="module")
def launched() -> dict[str, Tensor]:
    """What the kernel of each case gives, all from one child process."""
    jobs = []
    for name in LOADED:
        spec, inputs = case_of(name)
        kernel = emit(spec, Tile(32, 16, 4, 1))
        assert isinstance(kernel, Kernel), kernel
        jobs.append((kernel, inputs))
    results = run_interpreted(jobs)
    assert all(isinstance(result, list) for result in results), results
    return {name: result[0] for name, result in zip(LOADED, results, strict=True) if isinstance(result, list)}


@pytest.mark.parametrize("name", LOADED)
def test_kernels_give_such_rows_as_the_model(name: str, launched: dict[str, Tensor]) -> None:
    spec, inputs = case_of(name)
    q, k, v, mask = inputs
    added = LOADED[name][-1](mask)
    theirs = ((q @ k.mT) * 0.125 + added).softmax(-1).to(q.dtype) @ v
    close(launched[name], theirs)
    close(blockwise.forward(spec, inputs)[0], theirs)


def test_float64_drowns_what_float32_does(launched: dict[str, Tensor]) -> None:
    """The reference that kernels are checked against loses the same scores."""
    verdict = check(launched["fp16"], *case_of("fp16"))
    assert verdict.ok and verdict.budget < 0.01, verdict
