"""What whole numbers and conditions are at every pair of two positions: a proof by looking at all of them.

Where data are moved about in memory (padded, seen with rows of another length, put together in parts), arithmetic says where
each element comes from, but only with a division for each step, and with choices for each part. What that comes to is
plain for those pairs that count, and there are few enough to look. What was seen is remembered: layers ask the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache

import sympy as sp
import torch
from torch import Tensor

from attngen.algebra import TRUE, Const, Expr, Int, Op, negate, op
from attngen.evaluate import Evaluator
from attngen.index import ZERO, Axis

MAX_PAIRS = 1 << 25
_AT_ONCE = 1 << 18  # pairs, which caches hold
_SAMPLES = 64  # pairs at which nearly all that is not so shows


@dataclass(frozen=True)
class Pairs:
    """The pairs of positions of two axes at which some conditions hold."""

    first: Axis
    second: Axis
    conditions: tuple[Expr, ...] = ()

    @property
    def countable(self) -> bool:
        size = self.first.extent * self.second.extent
        return bool(size.is_Integer and size <= MAX_PAIRS)

    def knows(self, expr: Expr) -> bool:
        """``expr`` is made of these two positions and of numbers alone."""
        if isinstance(expr, Int):
            return bool(expr.value.free_symbols <= {self.first, self.second})
        return isinstance(expr, Const) or (isinstance(expr, Op) and all(map(self.knows, expr.args)))

    def where(self, condition: Expr) -> Pairs:
        return self if condition == TRUE else Pairs(self.first, self.second, (*self.conditions, condition))

    def never(self, condition: Expr = TRUE) -> bool:
        with _plainly():
            return _some(self.where(condition)) is None

    def always(self, condition: Expr) -> bool:
        return self.never(negate(condition))

    def agree(self, one: Expr, other: Expr) -> bool:
        """The two conditions are the same at all these pairs."""
        return self.where(one).always(other) and self.where(other).always(one)

    def plain(self, place: sp.Expr, among: Sequence[sp.Expr]) -> sp.Expr | None:
        """The one ``among`` some expressions, or zero, that ``place`` is at all these pairs, but for a number added to it."""
        known = [each for each in (*among, ZERO) if self.knows(Int(each))]
        with _plainly():
            return _plain(self, place, tuple(known)) if self.knows(Int(place)) else None

    def ends(self, place: sp.Expr) -> tuple[int, int]:
        """The smallest and the largest value of ``place`` at any pair."""
        with _plainly():
            values = [at(Int(place)) for _, at in _everywhere(self)]
            return min(int(value.min()) for value in values), max(int(value.max()) for value in values)


def is_inside(place: sp.Expr, size: sp.Expr) -> Expr:
    return op("and", op("ge", Int(place), Int(ZERO)), op("lt", Int(place), Int(size)))


def _plainly() -> AbstractContextManager[None]:
    """Whatever is traced at the moment."""
    return torch.utils._python_dispatch._disable_current_modes()  # type: ignore[no-any-return]


@lru_cache(maxsize=8)  # of at most 32 MiB each
def _holds(pairs: Pairs) -> Tensor:
    """For each pair whether it is meant."""
    if not pairs.conditions:
        return torch.ones(int(pairs.first.extent), int(pairs.second.extent), dtype=torch.bool, device="cpu")
    before = _holds(Pairs(pairs.first, pairs.second, pairs.conditions[:-1]))
    return torch.cat([before[rows] & at(pairs.conditions[-1]) for rows, at in _everywhere(pairs)])


@lru_cache(maxsize=1 << 12)
def _plain(pairs: Pairs, place: sp.Expr, among: tuple[sp.Expr, ...]) -> sp.Expr | None:
    some = _some(pairs)
    if some is None:
        return None
    for each in among:
        difference = Int(sp.expand(place - each))
        offset = int(some(difference).flatten()[0])
        if bool((some(difference) == offset).all()) and _is_everywhere(pairs, difference, offset):
            return sp.expand(each + offset)
    return None


def _is_everywhere(pairs: Pairs, expr: Expr, value: int) -> bool:
    meant = _holds(pairs)
    return all(bool(((at(expr) == value) | ~meant[rows]).all()) for rows, at in _everywhere(pairs))


@lru_cache(maxsize=1 << 12)
def _some(pairs: Pairs) -> Evaluator | None:
    """At a few of the pairs; None if there are none at all."""
    found = _holds(pairs).flatten().nonzero().flatten()
    chosen = found[:: max(len(found) // _SAMPLES, 1)]
    width = int(pairs.second.extent)
    return _at(pairs, chosen // width, chosen % width) if len(found) else None


def _everywhere(pairs: Pairs) -> Iterator[tuple[slice, Evaluator]]:
    """At all pairs, some rows at a time."""
    count, columns = int(pairs.first.extent), torch.arange(int(pairs.second.extent), device="cpu")
    step = max(_AT_ONCE // len(columns), 1)
    for start in range(0, count, step):
        rows = torch.arange(start, min(start + step, count), device="cpu")
        yield slice(start, start + step), _at(pairs, rows[:, None], columns)


def _at(pairs: Pairs, first: Tensor, second: Tensor) -> Evaluator:
    return Evaluator({pairs.first: first, pairs.second: second}, lambda source: torch.zeros(()))
