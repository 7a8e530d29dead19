"""Guards against dividing by zero, on sums that are at least one: they change nothing. And those against NaN.

``exp(x - max(x))`` has a one where ``x`` is largest, so its sum is no less. A row of -inf throughout, whose sum is NaN, is
NaN with the guard as well. Of masks that multiply exponentials, or a maximum over other scores, nothing of that is known.
"""

from __future__ import annotations

from collections import Counter

from attngen.algebra import Expr, Op, Reduce, number, substitute, terms

LARGEST = 1e4  # no weight that dropout scaled up gets there
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


def never_nan(expr: Expr) -> Expr | None:
    """``where(w is NaN, 0, w) -> w``: where a row has no key it is NaN, and only the softmax of it is guarded so."""
    if not (isinstance(expr, Op) and expr.name == "where"):
        return None
    condition, yes, no = expr.args
    for kept, other, tests in ((no, yes, ("isnan", "ne")), (yes, no, ("not", "eq"))):
        weight = _in_range(kept)
        if number(other) == 0 and weight is not None and _tests(condition, tests, weight):
            return weight
    return None


def _tests(condition: Expr, tests: tuple[str, str], weight: Expr) -> bool:
    """``isnan(w)`` or ``w != w``, or the contrary of these."""
    contrary = Op("isnan", (weight,)), Op("ne", (weight, weight)), Op("eq", (weight, weight))
    known = {"isnan": contrary[0], "ne": contrary[1], "not": Op("not", contrary[:1]), "eq": contrary[2]}
    return any(condition == known[name] for name in tests)


def _in_range(expr: Expr) -> Expr | None:
    """``min(max(w, lowest), highest) -> w``: weights are finite, or NaN."""
    for name, sign in (("min", 1), ("max", -1)):
        if isinstance(expr, Op) and expr.name == name:
            bounded = [a for a in expr.args if number(a) is None]
            limits = [value for a in expr.args if (value := number(a)) is not None]
            if len(bounded) != 1 or not all(sign * limit >= LARGEST for limit in limits):
                return None
            (expr,) = bounded
    return expr
