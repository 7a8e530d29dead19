"""Attention over pieces of the keys, merged by what each piece adds up to, as one softmax over all of them.

    sum of exp(lse_i - lse) * (softmax(s_i) @ v_i), or what a running maximum and a running sum leave
    -->  softmax(cat([s_1, ..., s_n], -1)) @ cat([v_1, ..., v_n])

Each term weighs its values with ``exp(e_i) / sum``, where the sum adds up ``exp(e_1) ... exp(e_n)`` over the keys of all
pieces: that is what ``passes.powers`` proves, whatever maxima and sums the graph takes on the way. ``passes.joins`` then
makes one product of the scores. Like there, only the graph that is analysed changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from attngen.algebra import BOOLEAN, ONE, Access, Dot, Expr, Op, number, op, terms
from attngen.index import Axis, numbered
from attngen.normaliser import MASKING
from attngen.passes import effects
from attngen.passes.arrange import NotYet, Piece, Scribe, is_plain, pieces
from attngen.passes.candidates import Marks, divided, is_sum
from attngen.passes.maxima import LOWEST, Shifts, is_zero, may_be_anything, negated
from attngen.passes.memory import MEMORY, storage
from attngen.passes.powers import Other, divides_by_sums, is_log_of_sums, monomial, monomials, plain, quotient
from attngen.passes.semantics import Reader, TooMuch, bind, dtype_of, is_tensor, op_name, shape_of

_KEY = Axis("merged", 2)  # along which pieces are joined, however many they are
_MOST = 16  # pieces


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
        if end not in live or not (end in fixed or _is_last_to_write(end, facts)):
            continue
        if (whole := _merged(end, reader, Scribe(end, facts.order, fixed))) is not None:
            whole.meta = dict(end.meta) if end in fixed else {**end.meta, "val": _elsewhere(end.meta["val"])}
            if end not in fixed:
                whole.meta.pop(MEMORY, None)
            end.replace_all_uses_with(whole)
            moved[end] = whole
    return moved


def _is_last_to_write(end: fx.Node, facts: effects.Effects) -> bool:
    """``end`` has the memory to itself from then on: sums that were added up, and divided, in place."""
    names = [node for node in facts.order if is_tensor(node) and storage(node) == storage(end)]
    before = [node for node in names if facts.order[node] < facts.order[end]]
    if end in facts.cut or not effects.written(end) or facts.writes[storage(end)][-1] is not end:
        return False
    used = max((facts.order[user] for node in before for user in node.users), default=0)
    return used <= facts.order[end] and all(node.op == "call_function" for node in before)


def _elsewhere(value: torch.Tensor) -> torch.Tensor:
    """A tensor like ``value`` in memory of its own."""
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _adds_up(node: fx.Node, marks: Marks) -> bool:
    """The last of a chain of additions of products that are made of exponentials, perhaps scaled by some."""
    if not _is_addition(node, marks) or any(_is_addition(user, marks) for user in node.users):
        return False
    return any(marks.highest(n.all_input_nodes) >= 2 for n in node.all_input_nodes)


def _adds_stacked(node: fx.Node, marks: Marks) -> bool:
    """A sum of a few stacked tensors, made of exponentials."""
    return is_sum(node) and marks.highest(node.all_input_nodes) >= 2 and len(bind(node).get("dim") or []) == 1


def _is_addition(node: fx.Node, marks: Marks) -> bool:
    """Of products, or of one to what was zero before the first piece."""
    inputs = node.all_input_nodes
    products = sum(n in marks.pairs for n in inputs)
    return op_name(node) in ("add", "sub") and len(inputs) == 2 and products >= (1 if marks.highest(inputs) >= 2 else 2)


def _merged(end: fx.Node, reader: Reader, scribe: Scribe) -> fx.Node | None:
    axes = tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(end)))
    shifts = Shifts()
    try:
        result = plain(shifts.opened(reader.at(end, axes)))
        parts = _linear(result, shifts)
        if not 1 <= len(parts) <= _MOST or (len(parts) == 1 and not any(map(_begins, result.walk()))):
            return None
        if min(sign for sign, _ in parts.values()) < 0:
            return None
        sides = [_sides(product, share, reader, shifts) for product, (_, share) in parts.items()]
        shifts.note([weight for weight, _, _ in sides])
        exponents = _exponents(sides, shifts)
        if not _is_known(shifts, sides, exponents):
            return None
        scores = [_piece_of(e, key, reader) for e, (_, _, key) in zip(exponents, sides, strict=True)]
        values = [_values(reader, access, key) for _, access, key in sides]
        least = _least(shifts.start, scores)
        return _written(axes, scores, values, dtype_of(end), scribe, least=least, safe=shifts.makes_zeros())
    except (Other, NotYet, TooMuch, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------------------- reading


def _linear(expr: Expr, shifts: Shifts) -> dict[Dot, tuple[int, Expr]]:
    """The products with values that ``expr`` adds up, and what each is multiplied with: a sign, and what is positive."""
    if isinstance(expr, Dot) or is_zero(expr):
        return {expr: (1, ONE)} if isinstance(expr, Dot) else {}
    if not (isinstance(expr, Op) and expr.name in ("add", "sub", "mul", "div")):
        raise Other
    left, right = expr.args
    if expr.name in ("add", "sub"):
        found = _linear(left, shifts)
        for product, (sign, share) in _linear(right, shifts).items():
            sign = -sign if expr.name == "sub" else sign
            known, other = found.get(product, (sign, None))
            found[product] = known, share if other is None else op("add" if known == sign else "sub", other, share)
        return found
    if expr.name == "mul" and not _is_sum_of_products(left):
        left, right = right, left
    if expr.name == "div":
        if is_zero(left):
            monomials(right)
        right = shifts.unguarded(right)
    return {product: (sign, op(expr.name, share, right)) for product, (sign, share) in _linear(left, shifts).items()}


def _begins(expr: Expr) -> bool:
    """What is added up begins with zeros."""
    return isinstance(expr, Op) and expr.name == "mul" and is_zero(expr)


def _is_sum_of_products(expr: Expr) -> bool:
    if isinstance(expr, Op) and expr.name in ("add", "sub", "mul", "div"):
        return any(map(_is_sum_of_products, expr.args[: 1 if expr.name == "div" else 2]))
    return isinstance(expr, Dot)


def _sides(dot: Dot, share: Expr, reader: Reader, shifts: Shifts) -> tuple[Expr, Access, Axis]:
    """The weight, which is made of exponentials, the values, and the keys that are summed over."""
    sides = [(a, b) for a, b in ((dot.lhs, dot.rhs), (dot.rhs, dot.lhs)) if reader.level(a.source) >= 2]  # type: ignore[arg-type]
    if len(sides) != 1 or not dot.axis.extent.is_Integer:
        raise Other
    ((weights, values),) = sides
    place = tuple(place.value for place in weights.index)  # type: ignore[attr-defined]
    weight = plain(shifts.opened(reader.at(weights.source, place)))  # type: ignore[arg-type]
    return op("mul", weight, share), values, dot.axis


# ------------------------------------------------------------------------------------------------------------- proving


def _exponents(sides: Sequence[tuple[Expr, Access, Axis]], shifts: Shifts) -> list[Counter[Expr]]:
    """The scores that the weights are one softmax of, less the maximum of all of them."""
    read = [quotient(weight) for weight, _, _ in sides]
    if any(each.above or each.below != read[0].below or each.below.total() != 1 for each in read):
        raise Other
    (whole,) = read[0].below
    named = [monomial(each.exponent, key) for each, (_, _, key) in zip(read, sides, strict=True)]
    if Counter(named) != Counter(dict(whole)) or not shifts.are_needless(monomials):
        raise Other
    shared = Counter({e: n for e, n in read[0].exponent.items() if (negated(e) or e) in shifts.found})
    for each in read:
        shared &= each.exponent
    return [each.exponent - shared for each in read]


# ------------------------------------------------------------------------------------------------------------- writing


def _is_known(shifts: Shifts, sides: Sequence[tuple[Expr, Access, Axis]], scores: Sequence[Counter[Expr]]) -> bool:
    """The pieces make NaN of a row where one softmax does, and lose no row of numbers as low as masks are.

    A piece of -inf throughout makes NaN by its own maximum, or its log-sum-exp. Beside numbers as low as masks are, the
    logarithm of how many there are is lost to rounding; and where no maximum is taken off, nothing is left of them.
    """
    by_log = any(is_log_of_sums(node) for weight, _, _ in sides for node in weight.walk())
    if shifts.found and not by_log:
        again = any(divides_by_sums(weight) > 1 for weight, _, _ in sides)
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


def _least(start: float, scores: Sequence[Piece]) -> float | None:
    """The score below which, relative to ``start`` or a larger maximum, exponentials are zero; None if none is so low.

    Of half precision it is not known whether exponentials are as well.
    """
    if start <= LOWEST:
        return None
    (dtype,) = {dtype_of(piece.node) for piece in scores}
    if dtype not in (torch.float32, torch.float64) or not math.isfinite(start):
        raise Other
    return start + math.log(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2)


def _piece_of(exponent: Counter[Expr], key: Axis, reader: Reader) -> Piece:
    """The tensor that holds these scores."""
    for expr, (node, index) in reader.provenance.items():
        if key in expr.axes and Counter(terms(expr)) == exponent and is_plain(index, shape_of(node)):
            return Piece(node, index).renamed({key: _KEY})
    raise Other


def _values(reader: Reader, access: Access, key: Axis) -> Piece:
    found = next((piece for piece in pieces(reader, access) if key in piece.axes), None)
    if found is None:
        raise Other
    return found.renamed({key: _KEY})


def _written(
    axes: Sequence[Axis],
    scores: Sequence[Piece],
    values: Sequence[Piece],
    dtype: torch.dtype,
    scribe: Scribe,
    *,
    least: float | None,
    safe: bool,
) -> fx.Node:
    features = [axis for axis in axes if any(axis in piece.axes for piece in values)]
    moving = {axis for piece in scores for axis in piece.axes}
    rows = [axis for axis in axes if axis in moving or axis not in features]  # one of one element moves neither
    whole = scribe.joined(scores, [*rows, _KEY], _KEY, dtype_of(scores[0].node))
    if least is not None:
        low = scribe.call(torch.ops.aten.lt.Scalar, whole, least)
        whole = scribe.call(torch.ops.aten.masked_fill.Scalar, whole, low, -math.inf)
    softmax = torch.ops.aten._safe_softmax.default if safe else torch.ops.aten.softmax.int
    weights = scribe.call(softmax, whole, -1)
    if dtype_of(weights) != dtype:
        weights = scribe.call(torch.ops.aten.to.dtype, weights, dtype)
    joined = scribe.joined(values, [*features, _KEY], _KEY, dtype)
    return scribe.product(weights, [*rows, _KEY], joined, [*features, _KEY], axes)
