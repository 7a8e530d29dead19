"""Quotients of exponentials and their sums over keys, whatever logarithms and shares of several sums they were written with.

``exp(a - log(z))``, ``z / (z + w)`` written ``sigmoid(log(z) - log(w))``, and ``1 - w / (z + w)`` are quotients of such sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import and_, or_

from attngen.algebra import ONE, Expr, Op, Reduce, number, op, substitute, terms, total, transform
from attngen.index import Axis, numbered
from attngen.passes.maxima import is_zero, negated

Monomial = frozenset[tuple[Expr, int]]  # the terms of an exponent
Sum = frozenset[tuple[Monomial, int]]  # of exponentials over keys, the key being named "merged" in all of them


class Other(Exception):
    """Not made of exponentials and their sums."""


@dataclass
class Quotient:
    """``exp(exponent) * (sums above) / (sums below)``. No sum has a factor that could be part of the exponent."""

    exponent: Counter[Expr] = field(default_factory=Counter)
    above: Counter[Sum] = field(default_factory=Counter)
    below: Counter[Sum] = field(default_factory=Counter)

    def inverse(self) -> Quotient:
        return Quotient(_negated(self.exponent), self.below, self.above)

    def times(self, other: Quotient) -> Quotient:
        return Quotient(added(self.exponent, other.exponent), self.above + other.above, self.below + other.below)

    def reduced(self) -> Quotient:
        """Without sums that are both above and below."""
        common = self.above & self.below
        return Quotient(self.exponent, self.above - common, self.below - common)


def quotient(expr: Expr) -> Quotient:
    if number(expr) == 1:
        return Quotient()
    if isinstance(expr, Op) and expr.name in ("mul", "div"):
        left, right = map(quotient, expr.args)
        return left.times(right if expr.name == "mul" else right.inverse()).reduced()
    if isinstance(expr, Op) and expr.name == "exp":
        return _power(expr.args[0])
    if isinstance(expr, Op) and expr.name == "sigmoid":
        return _added_up([(1, Quotient()), (1, _power(total(terms(expr.args[0], -1.0))))]).inverse()
    try:
        return _of_sum(Counter(monomials(expr)))
    except Other:
        if not (isinstance(expr, Op) and expr.name in ("add", "sub")):
            raise
        parts = [(1, expr.args[0]), (-1 if expr.name == "sub" else 1, expr.args[1])]
        return _added_up([(sign, quotient(part)) for sign, part in parts if not is_zero(part)])


def _power(exponent: Expr) -> Quotient:
    """``exp(x + log(z) - log(w)) = exp(x) * z / w``."""
    found = Quotient()
    for term in terms(exponent):
        inner = negated(term)
        if is_log_of_sums(term if inner is None else inner):
            of_log = quotient((term if inner is None else inner).args[0])  # type: ignore[attr-defined]
            found = found.times(of_log if inner is None else of_log.inverse())
        else:
            found = found.times(Quotient(Counter([term])))
    return found.reduced()


def _added_up(parts: Sequence[tuple[int, Quotient]]) -> Quotient:
    """The sum of quotients, each with a sign, over all that any of them is divided by. What they share is taken out first."""
    shared = Quotient(Counter(), *(reduce(and_, sums) for sums in zip(*((q.above, q.below) for _, q in parts), strict=True)))
    parts = [(sign, each.times(shared.inverse()).reduced()) for sign, each in parts]
    below: Counter[Sum] = reduce(or_, (each.below for _, each in parts))
    found = Counter[Monomial]()
    for sign, each in parts:
        above = each.above + (below - each.below)
        if above.total() != 1:
            raise Other
        (whole,) = above
        for power, count in whole:
            found[_times(power, each.exponent)] += sign * count
    found = Counter({power: count for power, count in found.items() if count})
    if not found or min(found.values()) < 0:
        raise Other
    return _of_sum(found).times(Quotient(below=below)).times(shared).reduced()


def _of_sum(powers: Counter[Monomial]) -> Quotient:
    """A sum, less the exponential of maxima that all of its terms are multiples of."""
    if not powers:  # all of them are masked
        raise Other
    apart = [Counter({e: n for e, n in power if _is_of_a_row(e)}) for power in powers]
    common = reduce(lambda one, other: one & other, apart)
    rest = Counter({frozenset((Counter(dict(power)) - common).items()): count for power, count in powers.items()})
    return Quotient(common, Counter([frozenset(rest.items())]))


def _is_of_a_row(term: Expr) -> bool:
    """Made over all keys; what is loaded for a row stays with the scores, whose value it may decide."""
    whole = any(isinstance(node, Reduce) for node in term.walk())
    return whole and not any(axis.name == "merged" for axis in term.axes)


def monomials(expr: Expr) -> list[Monomial]:
    """The exponentials, one for each term that is summed over keys, that ``expr`` adds up."""
    if is_zero(expr):
        return []
    if isinstance(expr, Op) and expr.name == "add":
        return [*monomials(expr.args[0]), *monomials(expr.args[1])]
    if isinstance(expr, Reduce):
        inside = quotient(expr.body) if expr.name == "sum" and not isinstance(expr.body, Reduce) else None
        if inside is None or inside.above or inside.below:
            raise Other
        return [monomial(inside.exponent, expr.axis)]
    if isinstance(expr, Op) and expr.name in ("mul", "div", "exp"):
        found = quotient(expr)
        if found.below or found.above.total() != 1:
            raise Other
        (whole,) = found.above
        return [_times(power, found.exponent) for power, count in whole for _ in range(count)]
    raise Other


def monomial(exponent: Counter[Expr], key: Axis) -> Monomial:
    merged = numbered("merged", key.extent)
    return frozenset(Counter({substitute(e, {key: merged}): n for e, n in exponent.items()}).items())


def is_log_of_sums(expr: Expr) -> bool:
    return isinstance(expr, Op) and expr.name == "log" and any(isinstance(node, Reduce) for node in expr.walk())


def divides_by_sums(expr: Expr) -> int:
    """How many times: sums that cancel are not zero."""
    divisors = [node.args[1] for node in expr.walk() if isinstance(node, Op) and node.name == "div"]
    return sum(any(isinstance(n, Reduce) and n.name == "sum" for n in divisor.walk()) for divisor in divisors)


def plain(expr: Expr) -> Expr:
    """``min(x, 0) - log(1 + exp(-abs(x))) --> log(sigmoid(x))``"""

    def rule(node: Expr) -> Expr | None:
        if not (isinstance(node, Op) and node.name == "sub" and isinstance(node.args[0], Op) and node.args[0].name == "min"):
            return None
        inner = next((part for part in node.args[0].args if number(part) is None), None)
        if inner is None or 0 not in map(number, node.args[0].args):
            return None
        small = op("exp", op("neg", op("abs", inner)))
        if node.args[1] not in (op("log", op("add", small, ONE)), op("log", op("add", ONE, small))):
            return None
        return op("log", op("sigmoid", plain(inner)))

    return transform(expr, rule)


def _times(power: Monomial, exponent: Counter[Expr]) -> Monomial:
    return frozenset(added(Counter(dict(power)), exponent).items())


def _negated(exponent: Counter[Expr]) -> Counter[Expr]:
    return Counter({e: n for term, n in exponent.items() for e in terms(term, -1.0)})


def added(left: Counter[Expr], right: Counter[Expr]) -> Counter[Expr]:
    """Without what cancels."""
    found = left + right
    for term in list(found):
        (against, *more) = terms(term, -1.0)
        both = 0 if more else min(found[term], found[against])
        found[term] -= both
        found[against] -= both
    return +found
