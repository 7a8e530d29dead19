"""Bands of scores that are computed in chunks and moved about in memory, as keys that all queries share.

    a few products of chunks of queries and keys, padded, seen with rows that are one longer, parts of them written into
    one tensor of [query, offset]; softmax over offsets; weights padded and seen with rows that are one shorter, times
    chunks of values  -->  softmax over j of q[i] . k[j] where 0 <= j - i + left < width, times v[j]

Sliding windows are written so where products of whole matrices are wanted (Longformer). What is moved where is not
recognised but looked at: see ``passes.grids``. First the product with the values becomes one over the offsets, as the padding
around the weights is zeros. Then all that the score is made of is read at the row and at the key that the value has,
wherever the key exists; where it does not, the score must be -inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import sympy as sp
from torch import fx

from attngen.algebra import TRUE, Access, Const, Dot, Expr, Int, Load, Op, Reduce, negate, number, op, rebuild, where
from attngen.compat import FloorDiv
from attngen.index import ZERO, Axis, floordiv, modulo
from attngen.normaliser import Normalised
from attngen.passes.arrange import layers
from attngen.passes.bands import SHARED, moving
from attngen.passes.effects import written
from attngen.passes.grids import Pairs, is_inside
from attngen.passes.roles import Sides
from attngen.passes.semantics import Index, Reader, bind, dtype_of, op_name, shape_of, size_arg

# ------------------------------------------------------------------------------------------------------------- weights


def without_zeros(reader: Reader, sides: Sides) -> Sides:
    """The same product over the keys that the weights have before zeros were put around them."""
    for node, index in layers(reader, sides.weights):
        if (padded := _padding(reader, node, index)) is not None and padded.value == 0:
            return _within(reader, sides, padded) or sides
    return sides


@dataclass(frozen=True)
class _Padded:
    """``source[index]`` where that is ``inside``, else ``value``."""

    source: fx.Node
    index: Index
    inside: Expr
    value: float


def _padding(reader: Reader, node: fx.Node, index: Index) -> _Padded | None:
    if op_name(node) not in ("pad", "constant_pad_nd") or reader.is_stale(node) or reader.reads_passing(node):
        return None
    args = bind(node)
    value = args.get("value") or 0.0
    if args.get("mode", "constant") != "constant" or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    places, shape, inside = list(index), shape_of(args["self"]), []
    for k, (left, right) in enumerate(zip(args["pad"][::2], args["pad"][1::2], strict=True)):
        places[-1 - k] = sp.expand(places[-1 - k] - size_arg(left))
        if (left, right) != (0, 0):
            inside.append(is_inside(places[-1 - k], shape[-1 - k]))
    return _Padded(args["self"], tuple(places), op("and", *inside), value)


def _within(reader: Reader, sides: Sides, padded: _Padded) -> Sides | None:
    """The sum over ``key`` as one over a dimension of ``padded``: each of its positions is met once, at the same row."""
    key = sides.key
    moved = {dim: place for dim, place in enumerate(padded.index) if key in place.free_symbols}
    rows = {axis for place in moved.values() for axis in place.atoms(Axis)} - {key}
    pairs = Pairs(rows.pop(), key) if len(rows) == 1 else None
    if pairs is None or not (pairs.countable and pairs.knows(padded.inside)):
        return None
    inside = pairs.where(padded.inside)
    among = [pairs.first, *(place.value for place in sides.weights.index if key not in place.axes)]  # type: ignore[attr-defined]
    plain = {dim: inside.plain(place, among) for dim, place in moved.items()}
    along = [dim for dim, place in plain.items() if place is None]
    start = inside.plain(key - moved[along[0]], among) if len(along) == 1 else None
    if start is None:
        return None
    size, (low, high) = shape_of(padded.source)[along[0]], pairs.ends(start)
    if low < 0 or high + size > key.extent or not pairs.agree(padded.inside, is_inside(key - start, size)):
        return None
    new = reader.bound(sides.node, size, "offset")
    places = tuple(new if dim in along else plain.get(dim, place) for dim, place in enumerate(padded.index))
    values = tuple(Int(place.value.xreplace({key: new + start})) for place in sides.values.index)  # type: ignore[attr-defined]
    return replace(sides, key=new, weights=reader.access(padded.source, places), values=Access(sides.values.source, values))


# -------------------------------------------------------------------------------------------------------------- scores


def over_shared_keys(reader: Reader, sides: Sides, normalised: Normalised) -> tuple[Sides, Normalised]:
    """The same softmax over keys that all queries share, if scores put together in parts come to that."""
    if not normalised.softmax or not in_parts(normalised.score, sides.key) or _loads_over(normalised.gain, sides.key):
        return sides, normalised
    for node, index, inside in _within_padding(reader, sides.values):
        dims = [dim for dim, place in enumerate(index) if sides.key in place.free_symbols]
        start = sp.expand(index[dims[0]] - sides.key) if len(dims) == 1 else ZERO
        rows = start.atoms(Axis)
        pairs = Pairs(next(iter(rows)), sides.key) if len(rows) == 1 and rows <= set(sides.axes) else None
        if pairs is None or not (pairs.countable and pairs.knows(inside)):
            continue
        band = _Band(reader, pairs, start, shape_of(node)[dims[0]])
        exists = pairs.agree(inside, band.exists) or inside == TRUE
        found = band.shared(sides, normalised, Access(node, tuple(map(Int, index)))) if exists else None
        if found is not None:
            return found
    return sides, normalised


def in_parts(score: Expr, key: Axis) -> bool:
    """Some product is read at places that depend on the key on both sides, or at several places."""
    dots = [e for e in score.walk() if isinstance(e, Dot)]
    crossed = any(key in dot.lhs.axes and key in dot.rhs.axes for dot in dots)
    return crossed or len({dot.node for dot in dots}) < len(dots)


def _loads_over(gain: Expr, key: Axis) -> bool:
    return any(isinstance(node, Load) and key in node.axes for node in gain.walk())


def _within_padding(reader: Reader, access: Access) -> Iterator[tuple[fx.Node, Index, Expr]]:
    """The tensors that ``access`` is read from, once all padding is off, and where it is no padding that is read."""
    inside: Expr = TRUE
    while True:
        found = list(layers(reader, access))
        padded = _padding(reader, *found[-1]) if found else None
        if padded is None:
            yield from ((node, index, inside) for node, index in found)
            return
        access, inside = reader.access(padded.source, padded.index), op("and", inside, padded.inside)


class _Band:
    """Keys of a row's own: of ``pairs`` of row and key, the latter is at place ``key + start`` of ``size`` that all share."""

    def __init__(self, reader: Reader, pairs: Pairs, start: sp.Expr, size: sp.Expr) -> None:
        self._reader, self._pairs, self._start, self._size = reader, pairs, start, size
        self._row, self._key, self._place = pairs.first, pairs.second, sp.expand(pairs.second + start)
        self.exists = is_inside(self._place, size)

    def shared(self, sides: Sides, normalised: Normalised, values: Access) -> tuple[Sides, Normalised] | None:
        if not self._is_masked(normalised.score, self._pairs.where(negate(self.exists))):
            return None
        score, gain = (self._plain(expr, self._pairs.where(self.exists)) for expr in (normalised.score, normalised.gain))
        new = self._reader.bound(sides.node, self._size, SHARED)
        place = sp.expand(new - self._start)
        known = {dot: self._at(dot, new) for dot in score.walk() if isinstance(dot, Dot)}
        moved = [moving(self._key, place, known)(expr) for expr in (score, gain)]
        if moved[0] is None or moved[1] is None:
            return None
        score = where(is_inside(place, self._key.extent), moved[0], Const(-math.inf))
        sides = replace(sides, key=new, values=_with(values, self._place, new))
        return sides, replace(normalised, score=score, gain=moved[1])

    def _at(self, dot: Dot, new: Axis) -> Dot:
        return Dot(_with(dot.lhs, self._place, new), _with(dot.rhs, self._place, new), dot.axis, dot.node)

    def _is_masked(self, expr: Expr, pairs: Pairs) -> bool:
        """``expr`` is -inf at all ``pairs``, whatever finite data are added to it."""
        if pairs.never():
            return True
        if isinstance(expr, Op) and expr.name == "where":
            condition, yes, no = expr.args
            if not pairs.knows(condition):
                return self._is_masked(yes, pairs) and self._is_masked(no, pairs)
            return self._is_masked(yes, pairs.where(condition)) and self._is_masked(no, pairs.where(negate(condition)))
        if isinstance(expr, Op) and expr.name in ("add", "sub"):
            return any(self._is_masked(arg, pairs) for arg in expr.args[: 1 if expr.name == "sub" else 2])
        if isinstance(expr, Op) and expr.name == "rounded":
            return self._is_masked(expr.args[0], pairs)
        if isinstance(expr, Op) and expr.name in ("mul", "div"):
            value, by = expr.args
            return 0 < (number(by) or 0) < math.inf and self._is_masked(value, pairs)
        return number(expr) == -math.inf

    def _plain(self, expr: Expr, pairs: Pairs) -> Expr:
        """``expr`` with the plain arithmetic and the branches that it comes to at the ``pairs``."""
        if isinstance(expr, Int):
            return Int(self._counted(expr.value, (self._place, self._row), pairs)) if self._key in expr.axes else expr
        if isinstance(expr, Dot):
            return self._product(expr, pairs)
        if isinstance(expr, Reduce):
            return expr
        if isinstance(expr, Op) and expr.name == "where" and pairs.knows(expr.args[0]):
            condition, yes, no = expr.args
            if pairs.never(condition):
                return self._plain(no, pairs)
            if pairs.always(condition):
                return self._plain(yes, pairs)
            return where(condition, self._plain(yes, pairs.where(condition)), self._plain(no, pairs.where(negate(condition))))
        children = tuple(self._plain(child, pairs) for child in expr.children)
        return expr if children == expr.children else rebuild(expr, children)

    def _product(self, dot: Dot, pairs: Pairs) -> Dot:
        """The product of the row's query with the key at its place, if that is what ``dot`` is at the ``pairs``."""
        query, key = (self._row, self._row.extent), (self._place, self._size)
        for at in ((query, key), (key, query)):
            left = self._read_at(dot.lhs, dot.axis, at[0], pairs)
            right = self._read_at(dot.rhs, dot.axis, at[1], pairs)
            if left is not None and right is not None:
                return Dot(left, right, dot.axis, dot.node)
        return dot

    def _read_at(self, access: Access, inner: Axis, at: tuple[sp.Expr, sp.Expr], pairs: Pairs) -> Access | None:
        """The last tensor that ``access`` is read from along one dimension: ``at`` a place of so many, if ``pairs`` count."""
        found = None
        below: tuple[fx.Node, Index] | None = access.source, tuple(each.value for each in access.index)  # type: ignore
        while below is not None:
            node = self._reader.resolve(below[0])
            index = tuple(self._counted(each, at[:1], pairs) for each in below[1])
            moved = [dim for dim, place in enumerate(index) if place.free_symbols & {self._row, self._key}]
            fits = [(index[dim], shape_of(node)[dim]) for dim in moved] == [at]
            if fits and inner in index and node.graph is self._reader.graph:
                found = Access(node, tuple(map(Int, index)))
            below = None if written(node) else self._reader.view(node, index)
            if below is None and (padded := _padding(self._reader, node, index)) is not None and pairs.knows(padded.inside):
                below = (padded.source, padded.index) if pairs.always(padded.inside) else None
            if below is not None and dtype_of(below[0]) != dtype_of(node):
                break
        return found

    def _counted(self, index: sp.Expr, among: Sequence[sp.Expr], pairs: Pairs) -> sp.Expr:
        """``index``, with the parts made of row and key as one ``among`` others, or a number, if they are that there."""
        moving = {self._row, self._key}
        parts = sp.Add.make_args(sp.expand(index))
        known = [part for part in parts if set() < part.free_symbols <= moving]
        plain = pairs.plain(sp.Add(*known), among) if known else None

        def divided(expr: sp.Expr) -> sp.Expr:
            if not moving & expr.free_symbols or expr.is_Symbol:
                return expr
            if isinstance(expr, (FloorDiv, sp.Mod)):
                divide = floordiv if isinstance(expr, FloorDiv) else modulo
                return divide(self._counted(expr.args[0], among, pairs), expr.args[1])
            return expr.func(*map(divided, expr.args))

        rest = [divided(part) for part in parts if part not in known]
        return sp.expand(sp.Add(*rest, *(known if plain is None else [plain])))


def _with(access: Access, place: sp.Expr, new: Axis) -> Access:
    """``access`` with ``new`` wherever it is read at ``place``."""
    return Access(access.source, tuple(Int(new) if each == Int(place) else each for each in access.index))
