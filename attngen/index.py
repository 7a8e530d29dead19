"""Integer index arithmetic: axes with known extents, exact floor division, and what a reshape does to an index.

Every position inside a tensor is a sympy expression over ``Axis`` symbols. An axis knows its extent, so facts such as
``0 <= h < 8`` never need a side table, and ``(b*8 + h) // 8`` folds to ``b`` by proof rather than by pattern.

Floor division is torch's ``FloorDiv``: ``sympy.floor(x / c)`` evaluates in floating point and is unsound here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import sympy as sp

from attngen.compat import FloorDiv

ZERO, ONE = sp.Integer(0), sp.Integer(1)
# Layers of a model ask the same questions: answers are kept, for axes that come from ``numbered`` are the same objects.
remembered = lru_cache(maxsize=1 << 14)


class Axis(sp.Dummy):
    """An index symbol with ``0 <= axis < extent``. Two axes are equal only if they are the same object."""

    __slots__ = ("extent",)
    extent: sp.Expr

    def __new__(cls, name: str, extent: sp.Expr | int) -> Axis:
        axis: Axis = super().__new__(cls, name, integer=True, nonnegative=True)
        axis.extent = sp.sympify(extent)
        return axis


@remembered
def numbered(name: str, extent: sp.Expr, number: int = 0) -> Axis:
    """The axis of this role and extent, the same object each time; ``number`` tells apart those of one site."""
    return Axis(name, extent)


def span(expr: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """The inclusive range of ``expr`` over all values of its axes; sizes stay symbolic, unknown ends are infinite."""
    if isinstance(expr, Axis):
        return ZERO, expr.extent - 1
    if isinstance(expr, sp.Add):
        lows, highs = zip(*(span(term) for term in expr.args), strict=True)
        return sp.Add(*lows), sp.Add(*highs)
    if isinstance(expr, sp.Mul):
        return _span_product(expr)
    if isinstance(expr, (sp.Max, sp.Min)):
        lows, highs = zip(*(span(term) for term in expr.args), strict=True)
        return expr.func(*lows), expr.func(*highs)
    if isinstance(expr, FloorDiv) and expr.args[1].is_positive:
        low, high = span(expr.args[0])
        return _div_end(low, expr.args[1]), _div_end(high, expr.args[1])
    if isinstance(expr, sp.Mod) and expr.args[1].is_positive:
        return ZERO, expr.args[1] - 1
    if isinstance(expr, sp.Abs):
        low, high = span(expr.args[0])
        return ZERO, sp.Max(sp.Abs(low), sp.Abs(high))
    if expr.atoms(Axis):
        return -sp.oo, sp.oo
    return expr, expr


def _div_end(end: sp.Expr, divisor: sp.Expr) -> sp.Expr:
    return end if end.is_infinite else FloorDiv(end, divisor)


def _span_product(expr: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    factor, rest = expr.as_independent(Axis, as_Add=False)
    if factor == 1 or not (factor.is_nonnegative or factor.is_nonpositive):
        return (-sp.oo, sp.oo)
    low, high = span(rest)
    if low.is_infinite or high.is_infinite:
        return (-sp.oo, sp.oo)
    ends = (factor * low, factor * high)
    return ends if factor.is_nonnegative else ends[::-1]


@remembered
def never_negative(expr: sp.Expr) -> bool:
    """True only if ``expr >= 0`` for every value of its axes and sizes."""
    expr = sp.expand(expr)
    if expr.is_nonnegative:
        return True
    return bool(sp.expand(span(expr)[0]).is_nonnegative)


def always_less(expr: sp.Expr, bound: sp.Expr) -> bool:
    """True only if ``expr < bound`` everywhere."""
    return never_negative(bound - expr - 1)


@remembered
def floordiv(expr: sp.Expr, divisor: sp.Expr) -> sp.Expr:
    """``expr // divisor`` (rounding down), split into the part that divides exactly and a remainder proved small."""
    if divisor == 1:
        return expr
    exact, rest = _split_multiples(expr, divisor)
    if rest == 0 or (never_negative(rest) and always_less(rest, divisor)):
        return exact
    return sp.expand(exact + FloorDiv(rest, divisor))


@remembered
def modulo(expr: sp.Expr, divisor: sp.Expr) -> sp.Expr:
    """``expr mod divisor`` with the sign of the divisor."""
    if divisor == 1:
        return ZERO
    _, rest = _split_multiples(expr, divisor)
    if rest == 0 or (never_negative(rest) and always_less(rest, divisor)):
        return rest
    rest = _without_remainders(rest, divisor)
    # sympy 1.14: Mod(Abs(2*x - 6), 6) -> 0 and Mod(2*Mod(x, 3), 3) -> 2*Mod(x, 3)
    if rest.has(sp.Abs, sp.Max, sp.Min, sp.Mod):
        return sp.expand(rest - divisor * FloorDiv(rest, divisor))
    return sp.Mod(rest, divisor)


def _without_remainders(expr: sp.Expr, divisor: sp.Expr) -> sp.Expr:
    """``expr`` with ``x`` for ``x mod n`` where that changes nothing modulo ``divisor``, of which ``n`` is a multiple."""
    terms = []
    for term in sp.Add.make_args(expr):
        weight, rest = term.as_coeff_Mul()
        inner = isinstance(rest, sp.Mod) and weight.is_Integer and (rest.args[1] / divisor).is_integer
        terms.append(weight * rest.args[0] if inner else term)
    return sp.expand(sp.Add(*terms))


def _split_multiples(expr: sp.Expr, divisor: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    exact: list[sp.Expr] = []
    rest: list[sp.Expr] = []
    for term in sp.Add.make_args(sp.expand(expr)):
        quotient = sp.cancel(term / divisor) if not term.has(FloorDiv, sp.Mod) else term / divisor
        whole = quotient.is_integer and sp.denom(quotient) == 1
        (exact if whole else rest).append(quotient if whole else term)
    return sp.Add(*exact), sp.Add(*rest)


@remembered
def recombine(expr: sp.Expr) -> sp.Expr:
    """``c*(x // c) + x mod c -> x``: undoes a split that a later merge joined again."""
    expr = sp.expand(expr)
    for remainder in expr.atoms(sp.Mod):
        weight, divisor = expr.coeff(remainder), remainder.args[1]
        for quotient in expr.atoms(FloorDiv) if weight != 0 else ():
            if _split_by(quotient, remainder) and sp.expand(expr.coeff(quotient) - weight * divisor) == 0:
                expr = sp.expand(expr - weight * (remainder + divisor * quotient - quotient.args[0]))
                break
    return expr


def _split_by(quotient: sp.Expr, remainder: sp.Expr) -> bool:
    """Of one value and divisor. sympy shifts the value of a remainder: ``(x - 1) mod 4 -> (x + 3) mod 4``."""
    (value, divisor), (shifted, modulus) = quotient.args, remainder.args
    return divisor == modulus and bool(sp.cancel((shifted - value) / divisor).is_Integer)


def reshape(index: Sequence[sp.Expr], shape: Sequence[sp.Expr], source: Sequence[sp.Expr]) -> tuple[sp.Expr, ...]:
    """The index into a tensor of shape ``source`` that a reshape to ``shape`` reads at ``index``.

    Dimensions are first cut into the smallest groups of equal size, so that only what is really split or merged pays
    for divisions.
    """
    return _reshaped(tuple(index), tuple(shape), tuple(source))


@remembered
def _reshaped(index: Sequence[sp.Expr], shape: Sequence[sp.Expr], source: Sequence[sp.Expr]) -> tuple[sp.Expr, ...]:
    result: list[sp.Expr] = []
    for new, old in _groups(shape, source):
        result += _regroup([index[d] for d in new], [shape[d] for d in new], [source[d] for d in old])
    return tuple(result)


def _groups(shape: Sequence[sp.Expr], source: Sequence[sp.Expr]) -> list[tuple[list[int], list[int]]]:
    groups: list[tuple[list[int], list[int]]] = []
    new: list[int] = []
    old: list[int] = []
    new_size = old_size = ONE
    a = b = 0
    while a < len(shape) or b < len(source):
        if new and old and sp.expand(new_size - old_size) == 0 and not _unit_follows(shape, a, source, b):
            groups.append((new, old))
            new, old, new_size, old_size = [], [], ONE, ONE
        take_new = a < len(shape) and (b == len(source) or not new or _smaller(new_size, old_size))
        if take_new:
            new, new_size, a = [*new, a], new_size * shape[a], a + 1
        else:
            old, old_size, b = [*old, b], old_size * source[b], b + 1
    return [*groups, (new, old)] if new or old else groups


def _unit_follows(shape: Sequence[sp.Expr], a: int, source: Sequence[sp.Expr], b: int) -> bool:
    """Trailing size-one dimensions belong to the group before them, or the last group would be half empty."""
    rest = [*shape[a:], *source[b:]]
    return bool(rest) and all(size == 1 for size in rest)


def _smaller(left: sp.Expr, right: sp.Expr) -> bool:
    ratio = sp.cancel(left / right)
    return ratio != 1 and (sp.denom(ratio) != 1)


def _regroup(index: list[sp.Expr], shape: list[sp.Expr], source: list[sp.Expr]) -> list[sp.Expr]:
    if len(index) == len(source) == 1:
        return [ZERO if source[0] == 1 else index[0]]
    flat = ZERO
    for position, size in zip(index, shape, strict=True):
        flat = flat * size + (ZERO if size == 1 else position)
    flat = recombine(flat)
    result: list[sp.Expr] = []
    for size in reversed(source):
        result.append(modulo(flat, size) if len(result) + 1 < len(source) else flat)
        flat = floordiv(flat, size)
    return [ZERO if size == 1 else value for value, size in zip(reversed(result), source, strict=True)]
