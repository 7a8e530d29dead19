"""Gradients of what tables are looked up in: few numbers, each of which is read for many pairs."""

from __future__ import annotations

import torch
from torch import Tensor

import attngen

LENGTH, HEADS, SIZE, BUCKETS = 1024, 2, 16, 4


def by_distance(q: Tensor, k: Tensor, v: Tensor, biases: Tensor) -> Tensor:
    places = torch.arange(LENGTH)
    bucket = ((places - places[:, None]).abs() // 64).clamp(max=BUCKETS - 1)
    score = q @ k.transpose(-1, -2) * SIZE**-0.5 + biases[bucket].permute(2, 0, 1)
    return score.softmax(-1) @ v


def gradient(function: object, dtype: torch.dtype, inputs: list[Tensor], grad: Tensor) -> Tensor:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)  # type: ignore[operator]
    return torch.autograd.grad(out, leaves[3], grad.to(dtype))[0].double()


def test_what_thousands_of_pairs_read_adds_up_in_float32() -> None:
    """Most pairs are in the last bucket. In bfloat16 a sum over them would stop to grow early."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(HEADS, LENGTH, SIZE, generator=generator).bfloat16() for _ in range(3)]
    inputs.append(torch.randn(BUCKETS, HEADS, generator=generator).bfloat16())
    grad = torch.randn(HEADS, LENGTH, SIZE, generator=generator).bfloat16()
    with attngen.record() as reports:
        compiled = torch.compile(by_distance, backend="attngen", options={"inner": "eager"})
        ours = gradient(compiled, torch.bfloat16, inputs, grad)
    assert [site.status for report in reports for site in report.sites] == ["replaced"]
    exact = gradient(by_distance, torch.float64, inputs, grad)
    eager = gradient(by_distance, torch.bfloat16, inputs, grad)
    off = (ours - exact).norm() / exact.norm()
    assert off < 2**-7 and off < (eager - exact).norm() / exact.norm()
