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

from attngen.algebra import BOOLEAN, Access, Const, Dot, Expr, Load, Op, Reduce, number, op, substitute, terms
from attngen.index import Axis, numbered
from attngen.passes import effects
from attngen.passes.arrange import NotYet, Piece, Scribe, is_plain, pieces
from attngen.passes.candidates import Marks, divided
from attngen.passes.memory import storage
from attngen.passes.semantics import Reader, TooMuch, dtype_of, is_tensor, op_name, shape_of

_KEY = Axis("merged", 2)  # along which pieces are joined, however many they are
_MOST = 8  # pieces
MASKING = -1e3  # a score this low is masked

Monomial = frozenset[tuple[Expr, int]]  # the terms of an exponent, which is summed over ``_KEY``


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
    above: Counter[frozenset[tuple[Monomial, int]]] = field(default_factory=Counter)
    below: Counter[frozenset[tuple[Monomial, int]]] = field(default_factory=Counter)


class _Other(Exception):
    """Not made of exponentials and their sums."""


def run(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Merge what comes in pieces. The nodes that held such results, and those that hold their values now."""
    marks = Marks()
    for node in graph.nodes:
        marks.add(node)
    ends = [divided(node) or node for node in graph.nodes if _adds_up(node, marks)]
    if not ends:
        return {}
    facts = effects.run(graph)
    reader = Reader(graph, facts.stale, level=marks.level_of)
    fixed = frozenset(n for n in graph.nodes if is_tensor(n) and storage(n) not in facts.writes) - facts.cut
    moved = {}
    for end in ends:
        if end in fixed and (whole := _merged(end, reader, Scribe(end, facts.order, fixed))) is not None:
            whole.meta = dict(end.meta)
            end.replace_all_uses_with(whole)
            moved[end] = whole
    return moved


def _adds_up(node: fx.Node, marks: Marks) -> bool:
    """The last of a chain of additions of products that are made of exponentials, perhaps scaled by some."""
    if not _is_addition(node, marks) or any(_is_addition(user, marks) for user in node.users):
        return False
    return any(marks.highest(n.all_input_nodes) >= 2 for n in node.all_input_nodes)


def _is_addition(node: fx.Node, marks: Marks) -> bool:
    return op_name(node) == "add" and sum(n in marks.pairs for n in node.all_input_nodes) == 2


def _merged(end: fx.Node, reader: Reader, scribe: Scribe) -> fx.Node | None:
    axes = tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(end)))
    try:
        parts = _linear(reader.at(end, axes))
        if not 1 < len(parts) <= _MOST:
            return None
        sides = [_sides(part, reader) for part in parts]
        exponents = _exponents([weight for weight, _, _ in sides], [key for _, _, key in sides])
        by_log = any(isinstance(n, Op) and n.name == "log" for weight, _, _ in sides for n in weight.walk())
        lowest = MASKING if by_log else -math.inf
        scores = [_piece_of(e, key, lowest, reader) for e, (_, _, key) in zip(exponents, sides, strict=True)]
        values = [_values(reader, access, key) for _, access, key in sides]
        return _written(axes, scores, values, dtype_of(end), scribe)
    except (_Other, NotYet, TooMuch, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------------------- reading


def _linear(expr: Expr) -> list[_Term]:
    """The products with values that ``expr`` adds up, and what each is multiplied with."""
    if isinstance(expr, Dot):
        return [_Term(expr)]
    if isinstance(expr, Op) and expr.name == "add":
        return [*_linear(expr.args[0]), *_linear(expr.args[1])]
    if isinstance(expr, Op) and expr.name in ("mul", "div"):
        left, right = expr.args
        if expr.name == "mul" and not _is_sum_of_products(left):
            left, right = right, left
        if expr.name == "mul":
            return [replace(term, factors=(*term.factors, right)) for term in _linear(left)]
        return [replace(term, divisors=(*term.divisors, right)) for term in _linear(left)]
    raise _Other


def _is_sum_of_products(expr: Expr) -> bool:
    if isinstance(expr, Op) and expr.name in ("add", "mul", "div"):
        return any(map(_is_sum_of_products, expr.args[: 1 if expr.name == "div" else 2]))
    return isinstance(expr, Dot)


def _sides(term: _Term, reader: Reader) -> tuple[Expr, Access, Axis]:
    """The weight, which is made of exponentials, the values, and the keys that are summed over."""
    dot = term.product
    sides = [(a, b) for a, b in ((dot.lhs, dot.rhs), (dot.rhs, dot.lhs)) if reader.is_power(a.source)]  # type: ignore[arg-type]
    if len(sides) != 1 or not dot.axis.extent.is_Integer:
        raise _Other
    ((weights, values),) = sides
    place = tuple(place.value for place in weights.index)  # type: ignore[attr-defined]
    weight = reduce(partial(op, "mul"), term.factors, reader.at(weights.source, place))  # type: ignore[arg-type]
    return reduce(partial(op, "div"), term.divisors, weight), values, dot.axis


# ------------------------------------------------------------------------------------------------------------- proving


def _exponents(weights: Sequence[Expr], keys: Sequence[Axis]) -> list[Counter[Expr]]:
    """The scores that the weights are one softmax of, less what is the same in all of them."""
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
    shared = Counter({e: n for e, n in read[0].exponent.items() if not any(key in e.axes for key in keys)})
    for each in read:
        shared &= each.exponent
    return [each.exponent - shared for each in read]


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
        negative = isinstance(term, Op) and term.name == "mul" and term.args[1] == Const(-1.0)
        inner = term.args[0] if isinstance(term, Op) and negative else term
        if not (isinstance(inner, Op) and inner.name == "log"):
            found.exponent = _added(found.exponent, Counter([term]))
            continue
        of_log = _quotient(inner.args[0])
        above, below = (of_log.below, of_log.above) if negative else (of_log.above, of_log.below)
        found.above, found.below = found.above + above, found.below + below
        found.exponent = _added(found.exponent, _negated(of_log.exponent) if negative else of_log.exponent)
    return found


def _sum(expr: Expr) -> frozenset[tuple[Monomial, int]]:
    """A sum of exponentials over keys, and of such sums times exponentials."""
    return frozenset(Counter(_monomials(expr)).items())


def _monomials(expr: Expr) -> list[Monomial]:
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


def _piece_of(exponent: Counter[Expr], key: Axis, lowest: float, reader: Reader) -> Piece:
    """The tensor that holds these scores. None may be as low as ``lowest``.

    A piece of -inf throughout makes NaN, where all pieces may not; and beside numbers as low as masks are, the logarithm of
    how many there are is lost to rounding.
    """
    if any(_may_be_as_low(term, key, lowest) for term in exponent):
        raise _Other
    for expr, (node, index) in reader.provenance.items():
        if key in expr.axes and Counter(terms(expr)) == exponent and is_plain(index, shape_of(node)):
            return Piece(node, index).renamed({key: _KEY})
    raise _Other


def _may_be_as_low(expr: Expr, key: Axis, lowest: float) -> bool:
    """A number that low, or something loaded that moves with the keys, other than in a condition."""
    if isinstance(expr, Load):
        return expr.kind == "float" and key in expr.axes
    if isinstance(expr, Op):
        branches = expr.args[expr.name == "where" :]
        return expr.name not in BOOLEAN and any(_may_be_as_low(e, key, lowest) for e in branches)
    value = number(expr)
    return value is not None and value <= lowest


def _values(reader: Reader, access: Access, key: Axis) -> Piece:
    found = next((piece for piece in pieces(reader, access) if key in piece.axes), None)
    if found is None:
        raise _Other
    return found.renamed({key: _KEY})


def _written(
    axes: Sequence[Axis], scores: Sequence[Piece], values: Sequence[Piece], dtype: torch.dtype, scribe: Scribe
) -> fx.Node:
    rows, features = (
        [axis for axis in axes if any(axis in piece.axes for piece in each)] for each in (scores, values)
    )
    whole = scribe.joined(scores, [*rows, _KEY], _KEY, dtype_of(scores[0].node))
    weights = scribe.call(torch.ops.aten.softmax.int, whole, -1)
    if dtype_of(weights) != dtype:
        weights = scribe.call(torch.ops.aten.to.dtype, weights, dtype)
    joined = scribe.joined(values, [*features, _KEY], _KEY, dtype)
    return scribe.product(weights, [*rows, _KEY], joined, [*features, _KEY], axes)
