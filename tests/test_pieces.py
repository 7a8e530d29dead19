"""Scores and weights that are changed in place through views of them: read as the values they are by then."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from analysis import Function, analysed, assert_replaced_with_its_gradient, scores, weights
from torch import Tensor

from attngen.text import readable


def changed(s: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    change(s)
    return s


def beside_a_class_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Decomposed relative positions of 2x4 queries and 2x2 keys, all but the first of each (MViT)."""
    q, k, v = q[:, :, :9], k[:, :, :5], v[:, :, :5]
    s = scores(q, k) * 0.25
    grid = q[:, :, 1:].reshape(2, 4, 2, 4, 16)
    high = torch.einsum("bnhwc,hkc->bnhwk", grid, torch.arange(64).sin().view(2, 2, 16))
    wide = torch.einsum("bnhwc,wkc->bnhwk", grid, torch.arange(128).sin().view(4, 2, 16))
    part = s[:, :, 1:, 1:].view(2, 4, 2, 4, 2, 2)
    s[:, :, 1:, 1:] = (part + high.unsqueeze(-1) + wide.unsqueeze(-2)).view(2, 4, 8, 4)
    return s.softmax(-1) @ v


def read_before_and_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first column of before is what the third has added to it."""
    s = scores(q, k)
    before = s.view(8, 12, 12)
    doubled = before[:, :, 2:] * 2
    s[..., 2:].copy_(doubled.view(2, 4, 12, 10))
    return before.softmax(-1).view(2, 4, 12, 12) @ v


def twice(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    s = scores(q, k)
    s[..., 3:, :] += w[3:]
    s[..., :6] *= 0.5
    s.view(2, 4, 3, 4, 12)[:, :, 1, 2:] = 1.5
    return s.softmax(-1) @ v


def keys_beyond(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[..., 9:] = -math.inf
    return s.softmax(-1) @ v


def put_together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of both halves of the keys, each in its part of one buffer."""
    s = torch.zeros(2, 4, 12, 12)
    s[..., :12] = scores(q, k)
    s[:, 1:, :, 0] -= 1
    return s.softmax(-1) @ v


def after_a_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A write to a part of what a write gave, seen through the first name of both."""
    s = scores(q, k)
    half = s[:, :2]
    half.mul_(0.5)[..., ::3].add_(1)
    return s.softmax(-1) @ v


def through_an_alias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k).clone()
    same = w.view(8, 12, 12)
    w.mul_(2)
    return same.view(2, 4, 12, 12) @ v


PIECES: dict[str, Function] = {
    "one column": lambda q, k, v: changed(scores(q, k), lambda s: s[..., 0].fill_(7.0)).softmax(-1) @ v,
    "every third column": lambda q, k, v: changed(scores(q, k), lambda s: s[..., 1::3].mul_(0.5)).softmax(-1) @ v,
    "a block": lambda q, k, v, w: changed(scores(q, k), lambda s: s[:, 1:, 2:7, 3:].sub_(w[2:7, 3:])).softmax(-1) @ v,
    "one head": lambda q, k, v, w: changed(scores(q, k), lambda s: s[:, 2].add_(w)).softmax(-1) @ v,
    "heads and batch as one": lambda q, k, v, w: changed(scores(q, k), lambda s: s.view(8, 12, 12)[5].add_(w)).softmax(3) @ v,
    "turned": lambda q, k, v, w: changed(scores(q, k), lambda s: s.mT[..., 2:, :].add_(w[2:])).softmax(-1) @ v,
    "a part of a part": lambda q, k, v: changed(scores(q, k), lambda s: s[..., 2:, :][..., 1:, 4].zero_()).softmax(-1) @ v,
    "the last column": lambda q, k, v: changed(scores(q, k), lambda s: s[..., -1:].add_(2)).softmax(-1) @ v,
    "weights of a head": lambda q, k, v: changed(weights(q, k).clone(), lambda w: w[:, 0].zero_()) @ v,
    "weights through an alias": through_an_alias,
    "beside a class token": beside_a_class_token,
    "read before and after": read_before_and_after,
    "several writes": twice,
    "keys beyond the end": keys_beyond,
    "a buffer": put_together,
    "after a scale": after_a_scale,
}


@pytest.mark.parametrize("name", PIECES)
def test_found_and_exact(name: str) -> None:
    found = analysed(PIECES[name])
    assert len(found.hits) == 1, [str(miss) for miss in found.misses]
    assert max(found.errors()) < 5e-6


@pytest.mark.parametrize("name", PIECES)
def test_replaced_with_its_gradient(name: str) -> None:
    function = PIECES[name]

    def inputs() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 4, 12, 16)] * 3 + [(12, 12)] * (function.__code__.co_argcount - 3)
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    assert_replaced_with_its_gradient(function, inputs)


def test_the_spec_says_where_the_piece_is() -> None:
    ((_, special),) = analysed(keys_beyond).hits
    assert (readable(special.spec.mask), readable(special.spec.score)) == ("j - 9 < 0", "qk")
    ((_, special),) = analysed(PIECES["one column"]).hits
    assert readable(special.spec.score) == "7 if j == 0 else qk"


def solved_row_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each row takes in those before it, as in the delta rule: its last row is made of 2^11 products."""
    s = scores(q, k).tril(-1)
    for row in range(1, 12):
        s[..., row, :row] += (s[..., row, :row].unsqueeze(-1) * s[..., :row, :row]).sum(-2)
    return s.softmax(-1) @ v


def test_what_is_written_many_times_is_not_followed() -> None:
    found = analysed(solved_row_by_row)
    assert found.hits == [] and "put together in place" in found.misses[0].reason


# ------------------------------------------------------------------------------------------------------ at random


View = tuple[str, tuple[Any, ...]]
SEEN: list[list[View]] = [[], [("view", (8, 12, 12))], [("transpose", (-1, -2))]]
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda part, w: part.add_(2),
    "scale": lambda part, w: part.mul_(0.5),
    "fill": lambda part, w: part.fill_(-1.0),
    "copy": lambda part, w: part.copy_(part * 0.5 + 1),
    "subtract a number": lambda part, w: part.sub_(w[0, 0]),
    "negate": lambda part, w: part.neg_(),
}


def shown(whole: Tensor, views: list[View]) -> Tensor:
    for method, args in views:
        whole = getattr(whole, method)(*args)
    return whole


def any_part(part: Tensor, rng: random.Random) -> list[View]:
    """Views that together show some elements of a tensor, once each, in some order of dimensions."""
    views: list[View] = []
    for _ in range(rng.randint(1, 4)):
        if part.dim() == 0:
            break
        dim = rng.randrange(part.dim())
        size = part.shape[dim]
        start = rng.randrange(size)
        after = [slice(None)] * (part.dim() - 1 - dim)
        choices: list[View] = [
            ("narrow", (dim, start, rng.randint(1, size - start))),
            ("select", (dim, start)),
            ("transpose", (dim, rng.randrange(part.dim()))),
            ("unsqueeze", (dim,)),
            *[("__getitem__", ((..., slice(start, None, step), *after),)) for step in (2, 3)],
            *[("unflatten", (dim, shape)) for shape in ((2, size // 2), (size // 2, 2)) if size % 2 == 0],
            *[("flatten", (dim, dim + 1)) for _ in range(3) if dim + 1 < part.dim() and part.is_contiguous()],
        ]
        views.append(rng.choice(choices))
        part = shown(part, views[-1:])
    return views


def at_random(seed: int) -> Function:
    """Scores that some parts of are written to, themselves or another view of them, which is then read."""
    rng = random.Random(seed)
    seen = rng.choice(SEEN)
    whole = torch.zeros(2, 4, 12, 12)
    steps = []
    for _ in range(rng.randint(1, 3)):
        through = rng.choice([[], seen])
        steps.append((through, any_part(shown(whole, through), rng), rng.choice(list(WRITES))))

    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        s = scores(q, k)
        views = [s, shown(s, seen)]
        for through, part, kind in steps:
            WRITES[kind](shown(views[bool(through)], part), w)
        s = views[1].mT if seen and seen[0][0] == "transpose" else views[1].view(2, 4, 12, 12)
        return s.softmax(-1) @ v

    return function


@pytest.mark.parametrize("seed", range(40))
def test_random_writes(seed: int) -> None:
    """Whatever is found is computed as it is written; and most is found."""
    found = analysed(at_random(seed))
    assert len(found.hits) <= 1 and all(error < 5e-6 for error in found.errors())
    assert found.hits or found.misses


def test_most_random_writes_are_followed() -> None:
    assert sum(len(analysed(at_random(seed)).hits) for seed in range(100, 120)) > 14
