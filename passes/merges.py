"""Attention over pieces of the keys, merged by what each piece adds up to, as one softmax over all of them.

    sum of exp(lse_i - lse) * (softmax(s_i) @ v_i), or what a running maximum and a running sum leave
    -->  softmax(cat([s_1, ..., s_n], -1)) @ cat([v_1, ..., v_n])

Each term weighs its values with ``exp(e_i) / sum``, where the sum adds up ``exp(e_1) ... exp(e_n)`` over the keys of all
pieces: that is what ``_monomials`` proves, whatever maxima and sums the graph takes on the way. ``passes.joins`` then makes
one product of the scores. Like there, only the graph that is analysed changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce

import torch
from torch import fx

from attngen.algebra import BOOLEAN, Access, Dot, Expr, Op, Reduce, number, op, substitute, terms
from attngen.index import Axis, numbered
from attngen.passes import effects
from attngen.passes.arrange import NotYet, Piece, Scribe, is_plain, pieces
from attngen.passes.candidates import Marks, divided, is_sum
from attngen.passes.maxima import Shifts, is_zero, may_be_anything, negated
from attngen.passes.memory import storage
from attngen.passes.semantics import Reader, TooMuch, bind, dtype_of, is_tensor, op_name, shape_of

_KEY = Axis("merged", 2)  # along which pieces are joined, however many they are
_MOST = 8  # pieces
MASKING = -1e3  # a score this low is masked

Monomial = frozenset[tuple[Expr, int]]  # the terms of an exponent, which is summed over ``_KEY``
Sum = frozenset[tuple[Monomial, int]]


@dataclass(frozen=True)
class _Term:
    """``weights * values`` summed over ``key``; the weights are the product of ``factors``, over the ``divisors``."""

    product: Dot
    factors: tuple[Expr, ...] = ()
    divisors: tuple[Expr, ...] = ()


@dataclass
class _Quotient:
    """``exp(exponent) * (sums above) / (sums below)``, where each sum is of exponentials summed over keys."""

    exponent: Counter[Expr] = field(default_factory=Counter)
    above: Counter[Sum] = field(default_factory=Counter)
    below: Counter[Sum] = field(default_factory=Counter)


class _Other(Exception):
    """Not made of exponentials and their sums."""


def run(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Merge what comes in pieces. The nodes that held such results, and those that hold their values now."""
    marks = Marks()
    for node in graph.nodes:
        marks.add(node)
    added = [node for node in graph.nodes if _adds_up(node, marks) or _adds_stacked(node, marks)]
    if not added:
        return {}
    facts = effects.run(graph)
    reader = Reader(graph, facts.stale, level=marks.level_of)
    fixed = frozenset(n for n in graph.nodes if is_tensor(n) and storage(n) not in facts.writes) - facts.cut
    moved: dict[fx.Node, fx.Node] = {}
    for end in reversed([divided(node) or node for node in added]):  # what was merged so far is part of what comes later
        live = effects.run(graph).live if moved else facts.live
        if end in fixed and end in live and (whole := _merged(end, reader, Scribe(end, facts.order, fixed))) is not None:
            whole.meta = dict(end.meta)
            end.replace_all_uses_with(whole)
            moved[end] = whole
    return moved


def _adds_up(node: fx.Node, marks: Marks) -> bool:
    """The last of a chain of additions of products that are made of exponentials, perhaps scaled by some."""
    if not _is_addition(node, marks) or any(_is_addition(user, marks) for user in node.users):
        return False
    return any(marks.highest(n.all_input_nodes) >= 2 for n in node.all_input_nodes)


def _adds_stacked(node: fx.Node, marks: Marks) -> bool:
    """A sum of a few stacked tensors, made of exponentials."""
    return is_sum(node) and marks.highest(node.all_input_nodes) >= 2 and len(bind(node).get("dim") or []) == 1


def _is_addition(node: fx.Node, marks: Marks) -> bool:
    return op_name(node) == "add" and sum(n in marks.pairs for n in node.all_input_nodes) == 2


def _merged(end: fx.Node, reader: Reader, scribe: Scribe) -> fx.Node | None:
    axes = tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(end)))
    shifts = Shifts()
    try:
        parts = _linear(shifts.opened(reader.at(end, axes)))
        if not 1 < len(parts) <= _MOST:
            return None
        sides = [_sides(part, reader, shifts) for part in parts]
        shifts.note([weight for weight, _, _ in sides])
        exponents, divisor = _exponents([weight for weight, _, _ in sides], [key for _, _, key in sides], shifts)
        if not _is_known(shifts, sides, exponents) or not shifts.is_needless(divisor):
            return None
        scores = [_piece_of(e, key, reader) for e, (_, _, key) in zip(exponents, sides, strict=True)]
        values = [_values(reader, access, key) for _, access, key in sides]
        return _written(axes, scores, values, dtype_of(end), scribe, safe=shifts.makes_zeros())
    except (_Other, NotYet, TooMuch, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------------------- reading


def _linear(expr: Expr) -> list[_Term]:
    """The products with values that ``expr`` adds up, and what each is multiplied with."""
    if isinstance(expr, Dot) or is_zero(expr):
        return [_Term(expr)] if isinstance(expr, Dot) else []
    if isinstance(expr, Op) and expr.name == "add":
        return [*_linear(expr.args[0]), *_linear(expr.args[1])]
    if isinstance(expr, Op) and expr.name in ("mul", "div"):
        left, right = expr.args
        if expr.name == "mul" and not _is_sum_of_products(left):
            left, right = right, left
        if expr.name == "mul":
            return [replace(term, factors=(*term.factors, right)) for term in _linear(left)]
        if is_zero(left):
            _monomials(right)
        return [replace(term, divisors=(*term.divisors, right)) for term in _linear(left)]
    raise _Other


def _is_sum_of_products(expr: Expr) -> bool:
    if isinstance(expr, Op) and expr.name in ("add", "mul", "div"):
        return any(map(_is_sum_of_products, expr.args[: 1 if expr.name == "div" else 2]))
    return isinstance(expr, Dot)


def _sides(term: _Term, reader: Reader, shifts: Shifts) -> tuple[Expr, Access, Axis]:
    """The weight, which is made of exponentials, the values, and the keys that are summed over."""
    dot = term.product
    sides = [(a, b) for a, b in ((dot.lhs, dot.rhs), (dot.rhs, dot.lhs)) if reader.level(a.source) >= 2]  # type: ignore[arg-type]
    if len(sides) != 1 or not dot.axis.extent.is_Integer:
        raise _Other
    ((weights, values),) = sides
    place = tuple(place.value for place in weights.index)  # type: ignore[attr-defined]
    weight = shifts.opened(reader.at(weights.source, place))  # type: ignore[arg-type]
    weight = reduce(partial(op, "mul"), term.factors, weight)
    return reduce(partial(op, "div"), map(shifts.unguarded, term.divisors), weight), values, dot.axis


# ------------------------------------------------------------------------------------------------------------- proving


def _exponents(weights: Sequence[Expr], keys: Sequence[Axis], shifts: Shifts) -> tuple[list[Counter[Expr]], Sum]:
    """The scores that the weights are one softmax of, less the maximum of all of them; and what they are divided by."""
    read = [_quotient(weight) for weight in weights]
    for each in read:
        common = each.above & each.below
        each.above, each.below = each.above - common, each.below - common
        if each.above or each.below != read[0].below or each.below.total() != 1:
            raise _Other
    (whole,) = read[0].below
    named = [_monomial(each.exponent, key) for each, key in zip(read, keys, strict=True)]
    if Counter(named) != Counter(dict(whole)):
        raise _Other
    shared = Counter({e: n for e, n in read[0].exponent.items() if (negated(e) or e) in shifts.found})
    for each in read:
        shared &= each.exponent
    return [each.exponent - shared for each in read], whole


def _quotient(expr: Expr) -> _Quotient:
    if isinstance(expr, Op) and expr.name in ("mul", "div"):
        left, right = map(_quotient, expr.args)
        if expr.name == "div":
            right = _Quotient(_negated(right.exponent), right.below, right.above)
        return _Quotient(_added(left.exponent, right.exponent), left.above + right.above, left.below + right.below)
    if isinstance(expr, Op) and expr.name == "exp":
        return _power(expr.args[0])
    return _Quotient(above=Counter([_sum(expr)]))


def _power(exponent: Expr) -> _Quotient:
    """``exp(x + log(z) - log(w)) = exp(x) * z / w``."""
    found = _Quotient()
    for term in terms(exponent):
        inner = negated(term) or term
        negative = inner is not term
        if not (isinstance(inner, Op) and _is_log_of_sums(inner)):
            found.exponent = _added(found.exponent, Counter([term]))
            continue
        of_log = _quotient(inner.args[0])
        above, below = (of_log.below, of_log.above) if negative else (of_log.above, of_log.below)
        found.above, found.below = found.above + above, found.below + below
        found.exponent = _added(found.exponent, _negated(of_log.exponent) if negative else of_log.exponent)
    return found


def _is_log_of_sums(expr: Expr) -> bool:
    return isinstance(expr, Op) and expr.name == "log" and any(isinstance(node, Reduce) for node in expr.walk())


def _sum(expr: Expr) -> Sum:
    """A sum of exponentials over keys, and of such sums times exponentials."""
    return frozenset(Counter(_monomials(expr)).items())


def _monomials(expr: Expr) -> list[Monomial]:
    if is_zero(expr):
        return []
    if isinstance(expr, Op) and expr.name == "add":
        return [*_monomials(expr.args[0]), *_monomials(expr.args[1])]
    if isinstance(expr, Reduce):
        inside = _quotient(expr.body) if expr.name == "sum" and not isinstance(expr.body, Reduce) else None
        if inside is None or inside.above or inside.below:
            raise _Other
        return [_monomial(inside.exponent, expr.axis)]
    if isinstance(expr, Op) and expr.name in ("mul", "div", "exp"):
        found = _quotient(expr)
        if found.below or found.above.total() != 1:
            raise _Other
        (whole,) = found.above
        return [frozenset(_added(Counter(dict(m)), found.exponent).items()) for m, n in whole for _ in range(n)]
    raise _Other


def _monomial(exponent: Counter[Expr], key: Axis) -> Monomial:
    merged = numbered("merged", key.extent)
    return frozenset(Counter({substitute(e, {key: merged}): n for e, n in exponent.items()}).items())


def _negated(exponent: Counter[Expr]) -> Counter[Expr]:
    return Counter({e: n for term, n in exponent.items() for e in terms(term, -1.0)})


def _added(left: Counter[Expr], right: Counter[Expr]) -> Counter[Expr]:
    """Without what cancels."""
    found = left + right
    for term in list(found):
        (against, *more) = terms(term, -1.0)
        both = 0 if more else min(found[term], found[against])
        found[term] -= both
        found[against] -= both
    return +found


# ------------------------------------------------------------------------------------------------------------- writing


def _is_known(shifts: Shifts, sides: Sequence[tuple[Expr, Access, Axis]], scores: Sequence[Counter[Expr]]) -> bool:
    """The pieces make NaN of a row where one softmax does, and lose no row of numbers as low as masks are.

    A piece of -inf throughout makes NaN by its own maximum, or its log-sum-exp. Beside numbers as low as masks are, the
    logarithm of how many there are is lost to rounding; and where no maximum is taken off, nothing is left of them.
    """
    by_log = any(_is_log_of_sums(node) for weight, _, _ in sides for node in weight.walk())
    if shifts.found and not by_log:
        again = any(len(_quotient(weight).below) > 1 for weight, _, _ in sides)  # sums that cancel, if they are not zero
        return shifts.has_keys() if again else shifts.whatever_is_loaded() or shifts.by_position()
    pairs = zip(scores, sides, strict=True)
    return not any(_may_be_low(term, key, by_log=by_log) for each, (_, _, key) in pairs for term in each)


def _may_be_low(expr: Expr, key: Axis, *, by_log: bool) -> bool:
    """A number as low as masks are, or something loaded that moves with the keys, other than in a condition."""
    if may_be_anything(expr, key):
        return True
    if isinstance(expr, Op):
        branches = expr.args[expr.name == "where" :]
        return expr.name not in BOOLEAN and any(_may_be_low(e, key, by_log=by_log) for e in branches)
    value = number(expr)
    return value is not None and value <= MASKING and (by_log or value > -math.inf)


def _piece_of(exponent: Counter[Expr], key: Axis, reader: Reader) -> Piece:
    """The tensor that holds these scores."""
    for expr, (node, index) in reader.provenance.items():
        if key in expr.axes and Counter(terms(expr)) == exponent and is_plain(index, shape_of(node)):
            return Piece(node, index).renamed({key: _KEY})
    raise _Other


def _values(reader: Reader, access: Access, key: Axis) -> Piece:
    found = next((piece for piece in pieces(reader, access) if key in piece.axes), None)
    if found is None:
        raise _Other
    return found.renamed({key: _KEY})


def _written(
    axes: Sequence[Axis], scores: Sequence[Piece], values: Sequence[Piece], dtype: torch.dtype, scribe: Scribe, *, safe: bool
) -> fx.Node:
    features = [axis for axis in axes if any(axis in piece.axes for piece in values)]
    moving = {axis for piece in scores for axis in piece.axes}
    rows = [axis for axis in axes if axis in moving or axis not in features]  # one of one element moves neither
    whole = scribe.joined(scores, [*rows, _KEY], _KEY, dtype_of(scores[0].node))
    softmax = torch.ops.aten._safe_softmax.default if safe else torch.ops.aten.softmax.int
    weights = scribe.call(softmax, whole, -1)
    if dtype_of(weights) != dtype:
        weights = scribe.call(torch.ops.aten.to.dtype, weights, dtype)
    joined = scribe.joined(values, [*features, _KEY], _KEY, dtype)
    return scribe.product(weights, [*rows, _KEY], joined, [*features, _KEY], axes)
