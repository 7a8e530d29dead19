"""Between which two numbers a value is, whatever the data: is a sum of weights one of numbers of one sign, may it be zero?

What weights of either sign add up to may be next to nothing beside each of them. Then hardly a digit of it is right, in the
model as in a kernel, and they agree in none of what they divide by it. Of thirty draws of decayed scores over their sum, kept
at one or more, some came out at four times eager's error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import sympy as sp
from torch import fx

from attngen.algebra import Access, Dot, Expr, Int, Op, Reduce, number, terms
from attngen.index import Axis, never_negative
from attngen.passes.candidates import is_total
from attngen.passes.semantics import Reader

Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)
_POSITIVE: Range = (0.0, math.inf)
_DIVISORS = {"div": 1, "rsqrt": 0, "pow": 0}  # which argument may be one


def cancels(reader: Reader, weight: Expr) -> bool:
    """``weight`` is divided by a sum over keys, see ``passes.totals``, of what may be of either sign."""
    return any(not _has_one_sign(_range(total, reader, {})) for divisor in _divisors(weight) for total in totals(divisor))


def may_divide_by_zero(reader: Reader, factor: Expr) -> bool:
    """``factor`` is divided by something made of a sum over keys that may be zero."""
    divisors = [divisor for divisor in _divisors(factor) if totals(divisor)]
    return any(low <= 0 <= high for low, high in (_range(divisor, reader, {}) for divisor in divisors))


def _divisors(expr: Expr) -> list[Expr]:
    return [node.args[_DIVISORS[node.name]] for node in expr.walk() if isinstance(node, Op) and node.name in _DIVISORS]


def totals(expr: Expr) -> list[Dot]:
    """The sums of weights in ``expr``; not those in an exponent, which is as right as a score is."""
    if isinstance(expr, Dot):
        return [expr] if isinstance(expr.node, fx.Node) and is_total(expr.node) else []
    inside = () if isinstance(expr, Op) and expr.name in ("exp", "exp2") else expr.children
    return [total for child in inside for total in totals(child)]


def _has_one_sign(found: Range) -> bool:
    return found[0] >= 0 or found[1] <= 0


# --------------------------------------------------------------------------------------------------------------- reading

_Known = dict[Expr, Range]  # what a condition says


def _range(expr: Expr, reader: Reader, known: _Known) -> Range:
    if (value := number(expr)) is not None:
        return value, value
    if expr in known:
        return known[expr]
    if isinstance(expr, Int):
        return _of_places(expr.value)
    if isinstance(expr, Dot):
        return _of_product(expr, reader)
    if isinstance(expr, Reduce):
        body = _range(expr.body, reader, known)
        return body if expr.name == "max" else _of_sum(body)
    if not isinstance(expr, Op):
        return ANY
    if expr.name == "where":
        return _of_choice(expr, reader, known)
    if (square := _least_square(expr, reader, known)) is not None:
        return square, math.inf
    if expr.name == "mul" and (parts := _monomial(expr))[0] > 0 and not any(power % 2 for power in parts[1].values()):
        return _POSITIVE
    rule = _RULES.get(expr.name)
    return ANY if rule is None else rule(*(_range(arg, reader, known) for arg in expr.args))


def _of_places(value: sp.Expr) -> Range:
    """A sum of positions, each along an axis of known length."""
    low = high = 0.0
    for part, factor in value.as_coefficients_dict().items():
        length = part.extent - 1 if isinstance(part, Axis) else sp.Integer(1) if part == 1 else None
        if length is None or not length.is_Integer:
            return _POSITIVE if never_negative(value) else ANY
        ends = float(factor) * (1.0 if part == 1 else 0.0), float(factor * length)
        low, high = low + min(ends), high + max(ends)
    return low, high


def _of_product(dot: Dot, reader: Reader) -> Range:
    """The sum of products of what ``dot`` reads, or of the weights that a column of ones adds up."""
    sides = [_range(_read(side, reader), reader, {}) for side in (dot.lhs, dot.rhs)]
    return _of_sum(_times(*sides))


def _read(side: Access, reader: Reader) -> Expr:
    index = tuple(place.value for place in side.index)  # type: ignore[attr-defined]
    return reader.at(side.source, index)  # type: ignore[arg-type]


def _of_sum(each: Range) -> Range:
    return (0.0 if each[0] >= 0 else -math.inf), (0.0 if each[1] <= 0 else math.inf)


def _of_choice(expr: Op, reader: Reader, known: _Known) -> Range:
    """Of either branch, where the condition may say more: ``x`` in ``where(x > 0, x, y)`` is positive."""
    condition, yes, no = expr.args
    there, elsewhere = dict(known), dict(known)
    if isinstance(condition, Op) and len(condition.args) == 2 and (limit := number(condition.args[1])) is not None:
        above, below = (limit, math.inf), (-math.inf, limit)
        if condition.name in ("gt", "ge", "lt", "le"):
            first, second = (above, below) if condition.name in ("gt", "ge") else (below, above)
            there[condition.args[0]], elsewhere[condition.args[0]] = first, second
    one, other = _range(yes, reader, there), _range(no, reader, elsewhere)
    return min(one[0], other[0]), max(one[1], other[1])


def _least_square(expr: Op, reader: Reader, known: _Known) -> float | None:
    """The least value of ``a * x * x + b * x + c`` with ``a > 0``, as of the series that stand for exponentials."""
    parts = [_monomial(term) for term in terms(expr)]
    squares = [(factor, atoms) for factor, atoms in parts if list(atoms.values()) == [2]]
    if len(squares) != 1 or squares[0][0] <= 0:
        return None
    ((a, atoms),) = squares
    (x,) = atoms
    linear = sum(factor for factor, others in parts if others == Counter([x]))
    rest = [term for term, (_, others) in zip(terms(expr), parts, strict=True) if x not in others]
    low = sum(_range(term, reader, known)[0] for term in rest)
    mixed = any(x in others and others not in (atoms, Counter([x])) for _, others in parts)
    return None if mixed or not math.isfinite(low) else low - linear * linear / (4 * a)


def _monomial(expr: Expr) -> tuple[float, Counter[Expr]]:
    """The number and the factors that a product is made of."""
    if (value := number(expr)) is not None:
        return value, Counter()
    if isinstance(expr, Op) and expr.name == "mul":
        (left, above), (right, below) = map(_monomial, expr.args)
        return left * right, above + below
    if isinstance(expr, Op) and expr.name == "div" and (divisor := number(expr.args[1])):
        factor, atoms = _monomial(expr.args[0])
        return factor / divisor, atoms
    if isinstance(expr, Op) and expr.name == "neg":
        factor, atoms = _monomial(expr.args[0])
        return -factor, atoms
    return 1.0, Counter([expr])


# -------------------------------------------------------------------------------------------------------------- arithmetic


def _product(x: float, y: float) -> float:
    return 0.0 if 0.0 in (x, y) else x * y


def _times(a: Range, b: Range) -> Range:
    ends = [_product(x, y) for x in a for y in b]
    return min(ends), max(ends)


def _over(a: Range, b: Range) -> Range:
    if b[0] < 0 < b[1] or b == (0.0, 0.0):
        return ANY
    low, high = (1 / b[1] if b[1] else -math.inf), (1 / b[0] if b[0] else math.inf)
    return _times(a, (low, high))


def _to_the_power(base: Range, exponent: Range) -> Range:
    return _POSITIVE if base[0] >= 0 or (exponent[0] == exponent[1] and exponent[0] % 2 == 0) else ANY


def _within(low: float, high: float) -> Callable[[Range], Range]:
    return lambda _: (low, high)


def _increasing(function: Callable[[float], float]) -> Callable[[Range], Range]:
    return lambda x: (function(x[0]), function(x[1]))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _log(x: float) -> float:
    return math.log(x) if 0 < x < math.inf else (math.inf if x > 0 else -math.inf)


def _magnitude(x: Range) -> Range:
    return (0.0 if x[0] <= 0 <= x[1] else min(map(abs, x))), max(map(abs, x))


def _cosine(x: Range) -> Range:
    return (0.0 if -math.pi / 2 <= x[0] and x[1] <= math.pi / 2 else -1.0), 1.0


_RULES: dict[str, Callable[..., Range]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "neg": lambda a: (-a[1], -a[0]),
    "mul": _times,
    "div": _over,
    "pow": _to_the_power,
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "relu": lambda a: (max(a[0], 0.0), max(a[1], 0.0)),
    "abs": _magnitude,
    "exp": _increasing(_exp),
    "exp2": _increasing(lambda x: _exp(x * math.log(2))),
    "log": _increasing(_log),
    "sqrt": _within(*_POSITIVE),
    "rsqrt": _within(*_POSITIVE),
    "sigmoid": _within(0.0, 1.0),
    "tanh": _within(-1.0, 1.0),
    "erf": _within(-1.0, 1.0),
    "sin": _within(-1.0, 1.0),
    "cos": _cosine,
    "float": lambda a: a,
}
