"""Recognise a normaliser in the expression of an attention weight, whatever spelling it had in the graph.

A weight is read as a quotient of products. Library softmax, ``exp(x - max) / sum``, ``log_softmax().exp()`` and
``exp(x - logsumexp(x))`` all give ``exp(S) / (sum over keys of exp(S) + exp(sink) + ...)`` here, with the same ``S``.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import product

import sympy as sp

from attngen.algebra import ONE, Const, Expr, Op, Reduce, number, op, substitute, terms, total, transform, where
from attngen.guards import LARGEST, never_nan, unguarded
from attngen.index import Axis
from attngen.renormaliser import as_one_power, is_mask, normalised_once, raised, with_late_masks

MAX_COLUMNS = 4  # of extra logits (sinks) joined to the scores
_EMPTY = ("nan", "zero", "never_nan")  # what is made of a row that is NaN, the strongest last
OWN_SUM = "the weights are divided by their sum, but are no exponentials"  # nor free of them: see passes.totals
MASKING = -1e3  # a score set to less than this is masked; rows where that could show are computed again
CHANGED = "the weights are changed between the exponential and the product with the values"
NOTHING = -746.0  # its exponential is zero, in float64 too
MAX_SUMMANDS = 4  # of weights: the values are read once for each


@dataclass(frozen=True)
class Normalised:
    """``gain * exp(score) / (sum over the keys of exp(score) + sum of exp(sinks))``; not ``softmax``: ``score`` itself.

    ``late_sink``: a sink came in as a factor of the whole row, so that a row without keys is NaN all the same.
    ``lifted``: the model takes the row's maximum off first, so that the exponentials of a row of low scores are not all zero.
    ``early``: it does so before it adds a number that masks, which rounds what is left of a score.
    ``again``: it masks weights and divides by what is left of their sum, nothing if there were others of higher scores.
    ``by_log``: it takes the logarithm of the sum off, where the exponent of a row of low scores loses it to rounding.
    """

    score: Expr
    sinks: tuple[Expr, ...] = ()
    empty: str = "nan"
    softmax: bool = True
    gain: Expr = ONE
    late_sink: bool = False
    lifted: bool = True
    early: bool = False
    by_log: bool = False
    again: bool = False


def unnormalised(weight: Expr) -> Normalised | None:
    """A weight that depends on its own pair alone: sigmoid, squared ReLU, a decay, or the product as it is."""
    if not weight.scored or any(isinstance(n, Reduce) and n.scored for n in weight.walk()):
        return None
    return Normalised(weight, softmax=False)


def softmax(weight: Expr, key: Axis) -> Normalised | str:
    """The softmax over ``key`` that ``weight`` is, or a sentence saying why it is none."""
    weight = transform(weight, _natural)
    above, below, empty = quotient(weight)
    masked, sums = any(map(is_mask, above)), below
    above, below = normalised_once(above, below, key, quotient)
    again = masked and below != sums
    below = [unguarded(divisor) for divisor in below]
    moving = [factor for factor in above if key in factor.axes]
    powers = [factor for factor in moving if isinstance(factor, Op) and factor.name == "exp"]
    if not powers:
        if _over_own_sum(moving, below, key):
            return OWN_SUM
        return CHANGED if moving else "the weights are not exp(scores) over their sum"
    if not below:
        return "the weights are not divided by one sum"
    reason = ""
    above, below = as_one_power(with_late_masks(above, below, key), below, key, quotient)
    powers = [factor for factor in above if isinstance(factor, Op) and factor.name == "exp" and key in factor.axes]
    for power, divisor in product(powers, below):
        found = _normalised(power, divisor, key, empty)
        if isinstance(found, Normalised):
            lifted = found.score != power.args[0]  # type: ignore[attr-defined]
            by_log = not lifted and _takes_log_off(weight, divisor)
            early = lifted and _is_early(power.args[0], found.score)  # type: ignore[attr-defined]
            found = replace(found, lifted=lifted, early=early, by_log=by_log, again=again)
            as_it_stands = not found.sinks and not lifted
            late = _late_sink(above, power, key) if as_it_stands else None
            if late is not None:
                factor, sink = late
                found = replace(found, sinks=(sink,), late_sink=True)
                above = [f for f in above if f is not factor]
            return replace(found, gain=_without_factors(above, below, power, divisor))
        reason = found
    return reason


def _natural(expr: Expr) -> Expr | None:
    """Scores as the exponent of another number than e: ``2 ** x = exp(x * log(2))``; and ``exp(where(c, x, -inf))`` as
    ``where(c, exp(x), 0)`` where ``x`` is normalised by then. Else what is in exponents stays as it is."""
    if not isinstance(expr, Op) or expr.name not in ("exp", "exp2", "pow"):
        return None
    base = number(expr.args[0]) if expr.name == "pow" else 2.0
    if expr.name == "exp":
        return _late_mask(expr.args[0])
    if not expr.args[-1].scored or base is None or base <= 0:
        return None if expr.name == "pow" else expr
    return op("exp", op("mul", expr.args[-1], Const(math.log(base))))


def _late_mask(exponent: Expr) -> Expr:
    if isinstance(exponent, Op) and exponent.name == "where":
        condition, *branches = exponent.args
        fills = [value is not None and value <= NOTHING for value in map(number, branches)]
        kept = branches[fills.index(False)] if any(fills) and not all(fills) else exponent
        if any(_negated_log(part) is not None for part in terms(kept)):
            return where(condition, *(op("exp", e) if e is kept else Const(0.0) for e in branches))
    return op("exp", exponent)


def summands(weight: Expr, key: Axis) -> list[Expr]:
    """Weights that add up to ``weight``, which is a sum of sums over keys times anything; itself if it is none."""
    above, below, empty = quotient(weight)
    sums = [factor for factor in above if _adds_up(factor, key)]
    if len(sums) != 1 or empty != "nan":
        return [weight]
    rest = [factor for factor in above if factor is not sums[0]]
    parts = [reduce(partial(op, "mul"), rest, part) for part in terms(sums[0])]
    parts = [reduce(partial(op, "div"), below, part) for part in parts]
    found = [each for part in parts for each in summands(part, key)]
    return found if len(found) <= MAX_SUMMANDS else [weight]


def _adds_up(factor: Expr, key: Axis) -> bool:
    """A sum of several terms, one of which is normalised scores."""
    normalised = factor.scored and any(isinstance(n, Reduce) for n in factor.walk())
    return normalised and key in factor.axes and len(terms(factor)) > 1


def _over_own_sum(moving: list[Expr], below: list[Expr], key: Axis) -> bool:
    """What differs from key to key is divided by its sum over the keys, perhaps with something added to that."""
    sums = [each for divisor in below for each in terms(divisor) if isinstance(each, Reduce) and each.name == "sum"]
    bodies = [substitute(each.body, {each.axis: key}) for each in sums if each.axis.extent == key.extent]
    factors = [quotient(body)[0] for body in bodies]
    return any(Counter(f for f in above if key in f.axes) == Counter(moving) for above in factors) and bool(moving)


def _normalised(power: Expr, divisor: Expr, key: Axis, empty: str) -> Normalised | str:
    assert isinstance(power, Op)
    summands = terms(divisor)
    found = [(t, columns) for t in summands if (columns := _other_columns(t, power, key)) is not None]
    if len(found) != 1:
        return _why_not(summands, power, key)
    ((whole, columns),) = found
    extras = [_logarithm(t) for t in (*columns, *(t for t in summands if t is not whole))]
    if any(extra is None or key in extra.axes for extra in extras):
        return "the sum that normalises the weights has a term that is not a plain sink"
    score, sinks = _without_common_shift(power.args[0], [e for e in extras if e is not None], key)
    return Normalised(score, tuple(sinks), empty)


def _late_sink(factors: list[Expr], power: Expr, key: Axis) -> tuple[Expr, Expr] | None:
    """The factor ``sigmoid(log(sum of power) - s)``, and ``s``, of which it makes one more term of the sum."""
    for factor in factors:
        parts = terms(factor.args[0]) if isinstance(factor, Op) and factor.name == "sigmoid" else []
        sums = [p for p in parts if isinstance(p, Op) and p.name == "log" and _other_columns(p.args[0], power, key) == []]
        if len(sums) == 1:
            rest = total([part for part in parts if part is not sums[0]])
            return factor, total(terms(rest, -1.0))
    return None


def _without_factors(above: list[Expr], below: list[Expr], power: Expr, divisor: Expr) -> Expr:
    """What else multiplies and divides the weights."""
    gain: Expr = ONE
    for name, factors, taken in (("mul", list(above), power), ("div", list(below), divisor)):
        factors.remove(taken)
        gain = reduce(partial(op, name), factors, gain)
    return gain


def quotient(expr: Expr) -> tuple[list[Expr], list[Expr], str]:
    """Factors above and below the line, and what the spec calls ``empty``; an exponential gives up its ``- log(z)`` terms
    as factors below.

    A choice between something and zero is a product with one or zero; see ``passes.masking`` for what that hides.
    """
    if isinstance(expr, Op) and expr.name in ("mul", "div", "div_or_zero"):
        (up_l, down_l, empty_l), (up_r, down_r, empty_r) = (quotient(a) for a in expr.args)
        empty = "zero" if expr.name == "div_or_zero" else _EMPTY[max(map(_EMPTY.index, (empty_l, empty_r)))]
        return (up_l + up_r, down_l + down_r, empty) if expr.name == "mul" else (up_l + down_r, down_l + up_r, empty)
    if (guarded := never_nan(expr)) is not None and _is_bounded(guarded):
        above, below, _ = quotient(guarded)
        return above, below, "never_nan"
    if isinstance(expr, Op) and expr.name == "where" and 0 in (number(a) for a in expr.args[1:]):
        condition, yes, no = expr.args
        kept = yes if number(no) == 0 else no
        above, below, zero = quotient(kept)
        return [*above, op("where", condition, *(ONE if e is kept else Const(0.0) for e in (yes, no)))], below, zero
    if isinstance(expr, Op) and expr.name in ("pow", "sqrt"):
        exponent = 0.5 if expr.name == "sqrt" else number(expr.args[1])
        above, below, empty = quotient(expr.args[0])
        to_the_power = raised(above, below, exponent) if below and exponent else None
        return (*to_the_power, empty) if to_the_power else ([expr], [], "nan")
    if isinstance(expr, Op) and expr.name == "exp":
        parts = terms(expr.args[0])
        logs = {part: inner for part in parts if (inner := _negated_log(part)) is not None}
        rest = reduce(_without, [part for part in parts if part in logs], expr.args[0])
        return [op("exp", rest)], list(logs.values()), "nan"
    return [expr], [], "nan"


def _is_bounded(weight: Expr) -> bool:
    """Exponentials over their sum, times numbers: finite, or else NaN like all of its row."""
    above, below, _ = quotient(weight)
    others = [e for e in above if not (isinstance(e, Op) and e.name == "exp" and e.scored)]
    values = [number(n) for e in others for n in (e.args[1:] if isinstance(e, Op) and e.name == "where" else (e,))]
    bounded = all(value is not None and abs(value) < LARGEST for value in values)
    return bounded and any(e.scored for e in below) and all(e.scored or number(e) for e in below)


def _takes_log_off(weight: Expr, divisor: Expr) -> bool:
    powers = [node for node in weight.walk() if isinstance(node, Op) and node.name == "exp"]
    return any(_negated_log(part) == divisor for power in powers for part in terms(power.args[0]))


def _negated_log(part: Expr) -> Expr | None:
    """``- log(z) -> z`` where ``z`` is made of sums; the logarithm of a distance is a bias like any other."""
    if isinstance(part, Op) and part.name == "mul" and part.args[1] == Const(-1.0):
        inner = part.args[0]
        if isinstance(inner, Op) and inner.name == "log" and any(isinstance(n, Reduce) for n in inner.walk()):
            return inner.args[0]
    return None


def _other_columns(summand: Expr, power: Expr, key: Axis) -> list[Expr] | None:
    """None unless ``summand`` sums ``power`` over the keys; then what else it sums: columns joined before or after."""
    if not (isinstance(summand, Reduce) and summand.name == "sum"):
        return None
    extra = sp.expand(summand.axis.extent - key.extent)
    if not (extra.is_Integer and 0 <= extra <= MAX_COLUMNS):
        return None
    for before in range(int(extra) + 1):
        if _same_power(substitute(summand.body, {summand.axis: key + before}), power):
            places = [*range(before), *(key.extent + n for n in range(before, int(extra)))]
            return [substitute(summand.body, {summand.axis: sp.sympify(place)}) for place in places]
    return None


def _same_power(left: Expr, right: Expr) -> bool:
    """Equal exponentials, in whatever order the terms of the exponent were added up."""
    if left == right or not (isinstance(left, Op) and left.name == "exp" and isinstance(right, Op)):
        return left == right
    return right.name == "exp" and Counter(terms(left.args[0])) == Counter(terms(right.args[0]))


def _why_not(summands: list[Expr], power: Expr, key: Axis) -> str:
    sums = [t for t in summands if isinstance(t, Reduce)]
    if any(key in t.axes for t in sums):
        return "the softmax runs over another dimension than the product with the values"
    if sums:
        return "the sum that normalises the weights is not the sum of these weights"
    return "the weights are not divided by their sum"


def _logarithm(term: Expr) -> Expr | None:
    """``exp(x) -> x`` and a positive number to its logarithm."""
    if isinstance(term, Op) and term.name == "exp":
        return term.args[0]
    value = number(term)
    return op("log", Const(value)) if value is not None and value > 0 else None


def _without_common_shift(score: Expr, sinks: list[Expr], key: Axis) -> tuple[Expr, list[Expr]]:
    """Drop the running maximum that a stable spelling subtracts everywhere: it cancels."""
    shifts = [t for t in terms(score) if key not in t.axes and any(isinstance(n, Reduce) for n in t.walk())]
    for shift in shifts:
        everywhere = [score, *sinks]
        if all(shift in terms(e) for e in everywhere):
            score, *sinks = (_without(e, shift) for e in everywhere)
    return score, sinks


def _is_early(exponent: Expr, score: Expr) -> bool:
    """A maximum that was taken off the ``exponent``, which leaves ``score``, is one of scores without their mask."""
    dropped = Counter(terms(exponent)) - Counter(terms(score))
    return _masks(score) and any(not _masks(shift) for shift in dropped)


def _masks(expr: Expr) -> bool:
    """A finite number as low as masks are is in it."""
    numbers = (number(node) for node in expr.walk())
    return any(value is not None and -math.inf < value <= MASKING for value in numbers)


def _without(expr: Expr, term: Expr) -> Expr:
    """``expr`` less one of its ``terms``; the others in the order they were added: large numbers cancel in no other."""
    if isinstance(expr, Op) and expr.name in ("add", "sub"):
        left, right = expr.args
        theirs = terms(term, -1.0 if expr.name == "sub" else 1.0)
        if terms(right) == theirs:
            return left
        if theirs[0] in terms(right):
            return op(expr.name, left, _without(right, theirs[0]))
        if terms(left) == [term]:
            return right if expr.name == "add" else op("neg", right)
        if term in terms(left):
            return op(expr.name, _without(left, term), right)
    parts = terms(expr)
    parts.remove(term)
    return total(parts)
