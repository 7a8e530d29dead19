"""Guards against dividing by zero, on sums that are at least one: they change nothing.

``exp(x - max(x))`` has a one where ``x`` is largest, so its sum is no less. A row of -inf throughout, whose sum is NaN, is
NaN with the guard as well. Of masks that multiply exponentials, or a maximum over other scores, nothing of that is known.
"""

from __future__ import annotations

from collections import Counter

from attngen.algebra import Expr, Op, Reduce, number, substitute, terms

LOST = 2.0**-25  # beside one in float32: the coarsest that kernels and sums of models differ in


def unguarded(divisor: Expr) -> Expr:
    """``max(z, c)`` and ``z + c --> z`` where ``z`` is at least one, and ``c`` less than that or lost beside it."""
    if isinstance(divisor, Op) and divisor.name == "max":
        guarded, guard = _apart(list(divisor.args))
        return guarded if guarded is not None and guard < 1 else divisor
    guarded, guard = _apart(terms(divisor))
    return guarded if guarded is not None and 0 <= guard < LOST else divisor


def _apart(parts: list[Expr]) -> tuple[Expr | None, float]:
    """A sum that is at least one and the number beside it, if ``parts`` are these two."""
    sums = [part for part in parts if _at_least_one(part)]
    numbers = [value for part in parts if (value := number(part)) is not None]
    return (sums[0], numbers[0]) if len(sums) == len(numbers) == 1 and len(parts) == 2 else (None, 0.0)


def _at_least_one(expr: Expr) -> bool:
    """The sum over an axis of ``exp(x - max(x))``, the maximum over the same ``x``."""
    if not (isinstance(expr, Reduce) and expr.name == "sum" and isinstance(expr.body, Op) and expr.body.name == "exp"):
        return False
    exponent = terms(expr.body.args[0])
    return any(_is_largest(part, exponent, expr) for part in exponent)


def _is_largest(part: Expr, exponent: list[Expr], whole: Reduce) -> bool:
    """``part`` takes off the maximum of all the other terms of the exponent."""
    (largest,) = terms(part, -1.0)[:1]
    if not (isinstance(largest, Reduce) and largest.name == "max" and largest.axis.extent == whole.axis.extent):
        return False
    others = Counter(exponent) - Counter([part])
    return Counter(terms(substitute(largest.body, {largest.axis: whole.axis}))) == others
