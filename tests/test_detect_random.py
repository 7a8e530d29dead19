"""Random programs around two products: whatever is found computes what the program computes.

Most of them are no attention, or one with something in between; the point is that none is taken for what it is not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from analysis import Analysis, analyse
from torch import Tensor, nn
from torch.nn.functional import pad

BATCH, HEADS, LENGTH = 2, 4, 6  # also the width, so that a mistaken dimension still has the right size
SHAPE = (BATCH, HEADS, LENGTH, LENGTH)
Step = Callable[[Tensor, dict[str, Tensor]], Tensor]
FILLS = (-math.inf, -1e30, torch.finfo(torch.float32).min, -1e4, -5.0)


def upper() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def distance() -> Tensor:
    return torch.arange(LENGTH)[None] - torch.arange(LENGTH)[:, None]


REARRANGED: list[Step] = [
    lambda s, x: s.transpose(-1, -2),
    lambda s, x: s.permute(1, 0, 2, 3).reshape(SHAPE),
    lambda s, x: s.flip(-1),
    lambda s, x: s.flip(-2),
    lambda s, x: s.flip(1),
    lambda s, x: s.roll(1, -1),
    lambda s, x: s.reshape(BATCH * HEADS, LENGTH, LENGTH).view(SHAPE),
    lambda s, x: s.reshape(HEADS, BATCH, LENGTH, LENGTH).transpose(0, 1).reshape(SHAPE),
    lambda s, x: s.reshape(BATCH, HEADS, LENGTH, 2, 3).transpose(-1, -2).reshape(SHAPE),
    lambda s, x: s.reshape(BATCH, 2, 2, LENGTH, LENGTH).transpose(1, 2).reshape(SHAPE),
    lambda s, x: torch.cat([s[..., 3:], s[..., :3]], -1),
    lambda s, x: torch.cat([s[..., :3], s[..., 3:]], -1),
    lambda s, x: pad(s, (1, 0))[..., :-1],
    lambda s, x: s[:, [1, 0, 2, 3]],
    lambda s, x: s.gather(-1, x["order"].expand(SHAPE)),
    lambda s, x: s[:, :2].repeat_interleave(2, 1),
    lambda s, x: s[:, :2].repeat(1, 2, 1, 1),
]
CHANGED: list[Step] = [
    lambda s, x: s * 0.3,
    lambda s, x: s.mul_(0.5),
    lambda s, x: s + x["bias"],
    lambda s, x: s + x["bias"].T,
    lambda s, x: s + x["slopes"].view(HEADS, 1, 1) * distance(),
    lambda s, x: s * x["slopes"].view(HEADS, 1, 1),
    lambda s, x: s + x["table"][distance().clamp(-2, 2) + 2],
    lambda s, x: s + x["q"][..., 0].unsqueeze(-2),
    lambda s, x: s / (1 + x["q"][..., :1].abs()),
    lambda s, x: s.tanh(),
    lambda s, x: s.clamp(-2, 2),
    lambda s, x: s.tril(),
    lambda s, x: s + s.mean(),
    lambda s, x: s - s.amax(-1, keepdim=True),
    lambda s, x: s - s.amax(-2, keepdim=True),
]
MASKED: list[Step] = [
    *(lambda s, x, fill=fill: s.masked_fill(x["mask"], fill) for fill in FILLS),
    *(lambda s, x, fill=fill: s.masked_fill_(upper(), fill) for fill in FILLS),
    lambda s, x: s * (1 - x["mask"].float()) - 1e4 * x["mask"].float(),
    lambda s, x: s + x["mask"].float() * -1e30,
]
LIBRARY: list[Step] = [*[lambda s, x: s.softmax(-1)] * 5, lambda s, x: s.softmax(-2), lambda s, x: s.softmax(1)]
HAND_WRITTEN: list[Step] = [  # without the maximum, a row of huge negative scores is lost to rounding
    lambda s, x: s.exp() / s.exp().sum(-1, keepdim=True),
    lambda s, x: s.log_softmax(-1).exp(),
    lambda s, x: (s - s.logsumexp(-1, keepdim=True)).exp(),
]
DISTURBED: list[Step] = [*REARRANGED, lambda w, x: w * 2, lambda w, x: w.masked_fill(x["mask"], 0.0)]


class Program(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.on_q, self.on_k, self.on_v = (draw.choice([[], [], draw.sample(REARRANGED, 1)]) for _ in "qkv")
        library = draw.random() < 0.7
        steps = [*REARRANGED, *CHANGED, *CHANGED, *(MASKED if library else [])]
        self.on_scores = draw.sample(steps, draw.randint(0, 3))
        self.normalise = draw.choice(LIBRARY if library else HAND_WRITTEN)
        self.on_weights = draw.choice([[], [], [], draw.sample(DISTURBED, 1)])
        self.spelling = draw.choice(["matmul", "einsum"])

    def forward(self, **x: Tensor) -> Tensor:
        q, k, v = x["q"] + 0, x["k"] + 0, x["v"] + 0
        for step in self.on_q:
            q = step(q, x)
        for step in self.on_k:
            k = step(k, x)
        for step in self.on_v:
            v = step(v, x)
        s = q @ k.transpose(-1, -2) if self.spelling == "matmul" else torch.einsum("bhid,bhjd->bhij", q, k)
        for step in self.on_scores:
            s = step(s, x)
        w = self.normalise(s, x)
        for step in self.on_weights:
            w = step(w, x)
        return w @ v if self.spelling == "matmul" else torch.einsum("bhij,bhjd->bhid", w, v)


def inputs_of(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    mask = torch.rand(LENGTH, LENGTH) > 0.6
    mask[seed % LENGTH] = seed % 2 == 0
    return {
        **{name: torch.randn(SHAPE) for name in "qkv"},
        "mask": mask,
        "bias": torch.randn(LENGTH, LENGTH),
        "slopes": torch.randn(HEADS),
        "table": torch.randn(5),
        "order": torch.randperm(LENGTH),
    }


@cache
def analysed(seed: int) -> Analysis:
    return analyse(Program(seed), inputs_of(seed))


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_what_is_found_is_right(first: int) -> None:
    for seed in range(first, first + 10):
        found = analysed(seed)
        for site, special in found.hits:
            assert found.error(site, special) < 2e-5, (seed, special.spec.text)


def test_enough_is_found_for_that_to_mean_something() -> None:
    counts = [len(analysed(seed).hits) for seed in range(30)]
    assert 5 <= sum(counts) <= 25
