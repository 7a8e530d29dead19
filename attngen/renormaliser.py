"""Weights that are normalised again: masked after the softmax, or raised to a power, and divided by the new sum.

Such a weight is a quotient of products, as ``attngen.normaliser`` reads it. What is the same for all keys leaves the inner
sum, and the first normaliser cancels; several exponentials, or one with a mask, become one exponential.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial, reduce

from attngen.algebra import ONE, TRUE, Const, Expr, Op, Reduce, negate, number, op, substitute, terms, total, transform, where
from attngen.index import Axis

Factors = tuple[list[Expr], list[Expr]]  # above the line, and below
Quotient = Callable[[Expr], tuple[list[Expr], list[Expr], str]]


def normalised_once(above: list[Expr], below: list[Expr], key: Axis, quotient: Quotient) -> Factors:
    """``x / sum(a * b / z) --> x * z / (a * sum(b))`` for what does not differ from key to key, and without what cancels."""
    new_above, new_below = list(above), list[Expr]()
    for divisor in below:
        new_above, divisor = _with_part_of_all(new_above, divisor, key, quotient)
        taken = _constants(divisor, key, quotient)
        rest, ups, downs = taken or (divisor, [], [])
        new_above, new_below = [*new_above, *downs], [*new_below, rest, *ups]
    common = Counter(new_above) & Counter(new_below)
    return list((Counter(new_above) - common).elements()), list((Counter(new_below) - common).elements())


def _with_part_of_all(above: list[Expr], divisor: Expr, key: Axis, quotient: Quotient) -> tuple[list[Expr], Expr]:
    """``m * p / (sum(m * p) + c) --> (m / (m + c)) * (m + c) * p / sum((m + c) * p)``, as ``p = exp(s) / z`` adds up to 1.

    ``m`` is one or zero, so ``(m + c) * exp(s)`` is the exponential of a score; ``m / (m + c)`` is a gain.
    """
    added = next((value for part in terms(divisor) if (value := number(part)) is not None), 0.0)
    sums = [part for part in terms(divisor) if number(part) is None]
    taken = _constants(sums[0], key, quotient) if len(sums) == 1 and added > 0 else None
    if taken is None or taken[1] or len(taken[2]) != 1:
        return above, divisor
    (rest, _, (whole,)) = taken
    powers, masks = _factors(rest, above, key, quotient)
    if len(powers) != 1 or _under_sum(whole, key) != powers[0]:
        return above, divisor
    counts = _over("and", list(map(_where_one, masks)), TRUE)
    power = op("exp", op("add", powers[0].args[0], where(counts, Const(math.log1p(added)), Const(math.log(added)))))
    gain = where(counts, Const(1 / (1 + added)), Const(0.0))
    kept = list((Counter(above) - Counter([*powers, *masks])).elements())
    return [*kept, power, gain], Reduce("sum", rest.axis, op("div", substitute(power, {key: rest.axis}), whole))


def _over(name: str, parts: list[Expr], start: Expr) -> Expr:
    return reduce(partial(op, name), parts, start)


def _where_one(mask: Op) -> Expr:
    return mask.args[0] if mask.args[1] == ONE else negate(mask.args[0])


def _constants(divisor: Expr, key: Axis, quotient: Quotient) -> tuple[Reduce, list[Expr], list[Expr]] | None:
    """The sum over keys without factors that are the same for all of them, and these, above and below."""
    if not (isinstance(divisor, Reduce) and _under_sum(divisor, key)):
        return None
    ups, downs, empty = quotient(divisor.body)
    ups = [e for e in ups if e != ONE]
    above, below = ([e for e in factors if divisor.axis not in e.axes] for factors in (ups, downs))
    if empty != "nan" or not (above or below) or len(below) < len(downs):
        return None
    kept = [e for e in ups if divisor.axis in e.axes]
    return Reduce("sum", divisor.axis, _over("mul", kept, ONE)), above, below


def _under_sum(expr: Expr, key: Axis) -> Expr | None:
    """What a sum over as many keys adds up, at ``key``."""
    if isinstance(expr, Reduce) and expr.name == "sum" and expr.axis.extent == key.extent:
        return substitute(expr.body, {expr.axis: key})
    return None


def raised(above: list[Expr], below: list[Expr], exponent: float) -> Factors | None:
    """The factors of a quotient to a power, if it is one of what is not negative: exponentials, ones, zeros and sums."""
    if exponent <= 0 or not all(_is_positive(factor) for factor in (*above, *below)):
        return None
    ups = [op("exp", total(terms(e.args[0], exponent))) if _is_power(e) else e for e in above]  # type: ignore[attr-defined]
    return ups, [op("pow", e, Const(exponent)) for e in below]


def _is_power(expr: Expr) -> bool:
    return isinstance(expr, Op) and expr.name == "exp"


def is_mask(expr: Expr) -> bool:
    """One or zero."""
    return isinstance(expr, Op) and expr.name == "where" and expr.args[1:] in ((ONE, Const(0.0)), (Const(0.0), ONE))


def _is_positive(expr: Expr) -> bool:
    return _is_power(expr) or is_mask(expr) or (isinstance(expr, Reduce) and expr.name == "sum" and _is_power(expr.body))


def as_one_power(above: list[Expr], below: list[Expr], key: Axis, quotient: Quotient) -> Factors:
    """``m * exp(s) * exp(t) / sum(m * exp(s) * exp(t))`` as ``exp(x) / sum(exp(x))``, where ``m`` is one or zero.

    ``x`` is ``s + t`` or -inf; ``s`` may be ``t``.
    """
    for divisor in below:
        for summand in terms(divisor):
            powers, masks = _factors(summand, above, key, quotient)
            if not powers or len(powers) + len(masks) < 2:
                continue
            exponent = total([power.args[0] for power in powers]) if len(powers) > 1 else powers[0].args[0]
            inside = op("exp", _masked(exponent, masks, key))
            assert isinstance(summand, Reduce)
            total_inside = Reduce("sum", summand.axis, substitute(inside, {key: summand.axis}))
            kept = list((Counter(above) - Counter([*powers, *masks])).elements())
            changes: dict[Expr, Expr] = {summand: total_inside}
            return [*kept, inside], [transform(e, changes.get) if e is divisor else e for e in below]
    return above, below


def _factors(summand: Expr, above: list[Expr], key: Axis, quotient: Quotient) -> tuple[list[Op], list[Op]]:
    """The exponentials and masks multiplied under the sum, if there is nothing else and the weights have all of them."""
    body = _under_sum(summand, key)
    factors, divisors, _ = quotient(body) if body is not None else ([], [], "nan")
    factors = [factor for factor in factors if factor != ONE]
    powers = [f for f in factors if isinstance(f, Op) and _is_power(f)]
    masks = [f for f in factors if isinstance(f, Op) and is_mask(f)]
    whole = not divisors and len(powers) + len(masks) == len(factors)
    return (powers, masks) if whole and Counter(factors) <= Counter(above) else ([], [])


def _masked(exponent: Expr, masks: list[Op], key: Axis) -> Expr:
    """-inf where a mask is zero; beside what is taken off the whole row, which must stay visible."""
    shifts = [t for t in terms(exponent) if key not in t.axes and any(isinstance(n, Reduce) for n in t.walk())]
    score = total(list((Counter(terms(exponent)) - Counter(shifts)).elements())) if shifts else exponent
    return total([where(_over("and", list(map(_where_one, masks)), TRUE), score, Const(-math.inf)), *shifts])


def with_late_masks(above: list[Expr], below: list[Expr], key: Axis) -> list[Expr]:
    """``exp(s + m) / sum(exp(s)) --> exp(s) * exp(m) / sum(exp(s))`` where ``m`` is a choice of numbers: zeros, -inf."""
    bodies = [body for e in below if (body := _under_sum(e, key)) is not None]
    found: list[Expr] = []
    for power in above:
        found += next((split for body in bodies if (split := _split(power, body)) is not None), [power])
    return found


def _split(power: Expr, body: Expr) -> list[Expr] | None:
    if not (isinstance(power, Op) and isinstance(body, Op) and _is_power(power) and _is_power(body)):
        return None
    here, there = Counter(terms(power.args[0])), Counter(terms(body.args[0]))
    late = list((here - there).elements())
    if not late or there - here or not all(_is_choice(e) for e in late):
        return None
    return [body, *(op("exp", e) for e in late)]


def _is_choice(expr: Expr) -> bool:
    values = [number(e) for e in expr.args[1:]] if isinstance(expr, Op) and expr.name == "where" else [None]
    return all(value is not None and value <= 0 for value in values)
