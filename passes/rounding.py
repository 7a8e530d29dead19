"""Sums that the model rounds to 16 bits, where a number that masks leaves nothing of a score in them.

fp16 scores plus -65504 are -65504, all of them; a kernel adds in float32, where they would keep their differences. Such a
sum is read as ``rounded``. A row that is masked throughout is computed from that, as the model does. Elsewhere masks are
out of the score, and what is loaded, where a mask may be, is ``drown``-ed by itself: that costs less.
"""

from __future__ import annotations

import math

import torch

from attngen.algebra import LOST, Const, Dot, Expr, Load, Op, Reduce, number, op, transform, where
from attngen.index import Axis

HALF = (torch.float16, torch.bfloat16)
# A fill shows in what they give.
LINEAR = frozenset(["add", "sub", "mul", "div", "neg", "min", "max", "relu", "where", "rounded"])


def in_half(sign: str, left: Expr, right: Expr, dtype: torch.dtype) -> Expr:
    """``left ± right`` in a 16-bit type; ``rounded`` where something in it may be a mask."""
    result = op(sign, left, right)
    if not (isinstance(result, Op) and result.name == sign) or _is_statistic(left) or _is_statistic(right):
        return result
    limit = Const(-LOST / torch.finfo(dtype).eps)
    scored = _is_scored(left) or _is_scored(right)
    if any(_holds_fill(side, limit) or (scored and _is_loaded(side)) for side in (left, right)):
        return op("rounded", result, limit)
    return result


def in_type(term: Expr, dtype: torch.dtype) -> Expr:
    """A number as a 16-bit type holds it."""
    value = number(term)
    return term if value is None or dtype not in HALF else Const(torch.tensor(value, dtype=dtype).item())


def drowns(fill: float | None, dtype: torch.dtype) -> bool:
    """Nothing of a score is left beside the negative ``fill`` in this type: what it holds there is not meant."""
    return fill is not None and -fill * torch.finfo(dtype).eps >= LOST


def is_rounded(expr: Expr) -> bool:
    return isinstance(expr, Op) and expr.name == "rounded"


def opened(expr: Expr) -> Expr:
    """The sum in a ``rounded``, of which what is loaded is ``drown``-ed."""
    assert isinstance(expr, Op)
    inside, limit = expr.args
    if not (isinstance(inside, Op) and inside.name in ("add", "sub")):
        return inside
    sign, (left, right) = inside.name, inside.args
    if sign == "sub" and _is_scored(left):
        sign, right = "add", op("neg", right)
    if not (_is_scored(left) or _is_scored(right)):
        return op(sign, left, right)
    return op(sign, _drowned(left, limit), _drowned(right, limit))


def quick(score: Expr) -> Expr:
    """``score`` where nothing is masked: unrounded, but for sums that hold a number as low as masks are."""

    def rule(expr: Expr) -> Expr | None:
        if not is_rounded(expr) or _holds_fill(expr, expr.args[1]):  # type: ignore[attr-defined]
            return None
        return transform(opened(expr), rule)

    return transform(score, rule)


def without_idle(score: Expr, *pair: Axis) -> Expr:
    """What is loaded once per head (the slope of ALiBi, a learned offset) is no mask, and drowns no score."""

    def rule(expr: Expr) -> Expr | None:
        if not is_rounded(expr) or _holds_fill(expr, expr.args[1]):  # type: ignore[attr-defined]
            return None
        moving = any(isinstance(n, Load) and axis in n.axes for n in expr.walk() for axis in pair)
        return None if moving else transform(expr.args[0], rule)  # type: ignore[attr-defined]

    return transform(score, rule)


def _drowned(term: Expr, limit: Expr) -> Expr:
    """``term`` with what is loaded in it so low that it drowns scores in float32, where it does in 16 bits."""
    if is_rounded(term):
        return _drowned(term.args[0], limit)  # type: ignore[attr-defined]
    if isinstance(term, Op) and term.name == "where":
        condition, *branches = term.args
        return where(condition, *(_drowned(branch, limit) for branch in branches))
    if not _is_loaded(term):
        return term
    if isinstance(term, Op) and term.name == "add" and any(isinstance(a, Op) and a.name == "where" for a in term.args):
        return op("add", *(_drowned(part, limit) for part in term.args))  # the mask in it must stay visible
    return op("drown", term, limit)


def _is_statistic(term: Expr) -> bool:
    """One of the whole row, such as its maximum: what is taken off to be stable cancels, and must stay visible."""
    if isinstance(term, Op) and term.name != "where":
        return any(map(_is_statistic, term.args)) and all(_is_statistic(a) or number(a) is not None for a in term.args)
    return isinstance(term, Reduce)


def _holds_fill(term: Expr, limit: Expr) -> bool:
    """A number in it, as it is or chosen by a condition, leaves nothing of a score in 16 bits."""
    lowest, value = number(limit), number(term)
    assert lowest is not None
    if value is not None:
        return -lowest <= abs(value) < math.inf
    if not isinstance(term, Op) or term.name not in LINEAR:
        return False
    values = term.args[1:] if term.name == "where" else term.args[:1] if is_rounded(term) else term.args
    return any(_holds_fill(part, limit) for part in values)


def _is_scored(term: Expr) -> bool:
    """It holds a score, and not the weights made of it."""
    summed = any(n.scored for n in term.walk() if isinstance(n, Reduce) and n.name == "sum")
    return term.scored and not summed


def _is_loaded(term: Expr) -> bool:
    """Made of loaded numbers, and not of scores."""
    parts = term.walk()
    return any(isinstance(n, Load) for n in parts) and not any(isinstance(n, (Dot, Reduce)) for n in parts)
