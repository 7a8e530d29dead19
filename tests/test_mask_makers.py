"""Masks and biases by operators that write in place, or in integers that wrap round: a spec says what they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from analysis import watched
from torch import Tensor, nn

N = 16
Made = Callable[[Tensor], Tensor]  # of a matrix of random numbers


def _turned(mask: Tensor) -> Tensor:
    mask.t().tril_()
    return mask


def _hashed(at: Tensor) -> Tensor:
    return (at[:, None] * 1103515245 + at * 40503) % 97 < 40


MADE: dict[str, Made] = {
    "diagonal filled": lambda x: torch.ones(N, N, dtype=torch.bool).fill_diagonal_(False),
    "diagonal of data filled": lambda x: x.clone().fill_diagonal_(3.0),
    "diagonals of a tall matrix": lambda x: torch.zeros(N, N // 2).fill_diagonal_(3.0, True).repeat(1, 2),
    "diagonal scattered": lambda x: torch.diagonal_scatter(torch.zeros(N, N), torch.ones(N - 1), 1),
    "columns filled": lambda x: torch.zeros(N, N).index_fill_(1, torch.tensor([1, 3]), -3.0),
    "scattered": lambda x: torch.zeros(N, N).scatter_(1, torch.arange(N)[:, None].flip(0), 2.0),
    "scattered by truth": lambda x: torch.zeros(N, N).masked_scatter_(x > 0, x),
    "cut through a view": lambda x: _turned(torch.ones(N, N)),
    "unsigned, below zero": lambda x: (torch.arange(N).to(torch.uint8) - 5 > 3).expand(N, N),
    "unsigned zeros less one": lambda x: (x > 0).byte() - 1,
    "unsigned product": lambda x: (x > 0).byte() * 200 * 2 > 150,
    "in place": lambda x: (x > 0).byte().add_(255) > 3,
    "beyond eight bits": lambda x: ((torch.arange(N) * 40).to(torch.int8) > 3).expand(N, N),
    "beyond sixteen bits": lambda x: (torch.arange(N, dtype=torch.int16) * 4000 > 100).expand(N, N),
    "unsigned, filled with less than zero": lambda x: torch.zeros(N, N, dtype=torch.uint8).masked_fill(x > 0, -1),
    "unsigned, chosen from numbers": lambda x: torch.where(x > 0, torch.tensor(3, dtype=torch.uint8), -1),
    "unsigned, full of less than zero": lambda x: torch.full((N, N), -3, dtype=torch.uint8).tril(),
    "unsigned, no more than less than zero": lambda x: (x > 0).byte().clamp(max=-1),
    "unsigned triangle": lambda x: torch.ones(N, N, dtype=torch.uint8).triu(1) == 1,
    "truth filled with a number": lambda x: torch.zeros(N, N, dtype=torch.bool).masked_fill_(x > 0, -5).float(),
    "a hash of 32 bits": lambda x: _hashed(torch.arange(N, dtype=torch.int32)),
    "a hash of 64 bits": lambda x: _hashed(torch.arange(N)),
    "a running sum of eight bits": lambda x: torch.full((N, N), 30, dtype=torch.int8).cumsum(-1, dtype=torch.int8),
}


@pytest.mark.parametrize("name", MADE)
def test_the_spec_says_what_it_is(name: str) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            made, scores = MADE[name](x), q @ k.mT
            scores = scores.masked_fill(made, -1e4) if made.dtype == torch.bool else scores + 0.1 * made
            return scores.softmax(-1) @ v

    module, analyses = watched(Attention())
    with torch.no_grad():
        module(*torch.randn(3, 2, N, 8, generator=torch.Generator().manual_seed(0)), torch.randn(N, N))
    ((error,),) = [analysis.errors() for analysis in analyses]
    assert error < 1e-5
    if "hash" in name:  # in a kernel its numbers would wrap round
        assert any(extra.name == "t0" for _, special in analyses[0].hits for extra in special.spec.extras)
