"""Windows of keys that each query has for itself, one step on from those of its neighbour, as keys that all share.

    softmax over c of q[i] . k[i + c], times v[i + c]  -->  softmax over j of q[i] . k[j] where 0 <= j - i < width, times v[j]

Neighbourhood attention is written so, with ``unfold``: then no window need be made, and rows of a tile read the same keys. In
an image, a window is a few keys of each of a few lines, that is of every so many keys (``passes.planes``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy as sp

from attngen.algebra import Access, Const, Dot, Expr, Int, Load, Op, Reduce, integer, op, where
from attngen.compat import FloorDiv
from attngen.index import Axis, always_less, floordiv, modulo, never_negative
from attngen.normaliser import Normalised
from attngen.passes.arrange import layers
from attngen.passes.roles import Sides
from attngen.passes.semantics import Reader, is_inside, shape_of

MOST_KEYS = 1 << 10  # of a window of several lines
SHARED = "shared"  # the name of an axis of keys that stands for windows of them


@dataclass(frozen=True)
class _Digits:
    """Where a key lies after the first of its window: ``lines`` of ``width``, ``pitch`` apart, in steps of ``step``."""

    lines: int
    width: int
    pitch: int
    step: int

    @classmethod
    def of(cls, place: sp.Expr, key: Axis) -> _Digits | None:
        if place == key:  # however many there are
            return cls(1, 0, 0, 1)
        if place.free_symbols != {key} or not key.extent.is_Integer or not 1 < key.extent <= MOST_KEYS:
            return None
        places = [int(place.xreplace({key: sp.Integer(n)})) for n in range(int(key.extent))]
        if places[0] != 0:
            return None
        step = places[1]
        width = next((n for n, at in enumerate(places) if at != n * step), len(places))
        pitch = places[width] if width < len(places) else width * step
        even = all(at == n // width * pitch + n % width * step for n, at in enumerate(places)) and len(places) % width == 0
        return cls(len(places) // width, width, pitch, step) if even and step > 0 and pitch >= width * step else None

    def reaches(self, step: sp.Expr, key: Axis) -> bool:
        """Windows that are ``step`` apart overlap."""
        if self.width == 0:
            return bool(step.is_positive and (key.extent - step).is_positive)
        return bool(0 < step < self.width * self.step or (self.lines > 1 and 0 < step < self.lines * self.pitch))

    def key_at(self, offset: sp.Expr, key: Axis) -> tuple[sp.Expr, Expr]:
        """The key that lies ``offset`` after the first of its window, and whether there is one."""
        if self.width == 0:
            return offset, op("and", op("ge", Int(offset), integer(0)), op("lt", Int(offset), Int(key.extent)))
        line, rest = floordiv(offset, sp.Integer(self.pitch)), modulo(offset, sp.Integer(self.pitch))
        inside = [op("ge", Int(offset), integer(0)), op("lt", Int(line), integer(self.lines))]
        inside += [op("lt", Int(rest), integer(self.width * self.step))]
        inside += [op("eq", Int(modulo(rest, sp.Integer(self.step))), integer(0))] if self.step > 1 else []
        return sp.expand(self.width * line + floordiv(rest, sp.Integer(self.step))), op("and", *inside)


@dataclass(frozen=True)
class _Window:
    """``access`` along ``dim``, read after ``start``, which differs from query to query, where ``digits`` say."""

    access: Access
    dim: int
    start: sp.Expr
    digits: _Digits

    @property
    def size(self) -> sp.Expr:
        return shape_of(self.access.source)[self.dim]  # type: ignore[arg-type]

    def shared(self, key: Axis) -> Access:
        places = [Int(key) if dim == self.dim else place for dim, place in enumerate(self.access.index)]
        return Access(self.access.source, tuple(places))


def run(reader: Reader, sides: Sides, normalised: Normalised, dot: Dot) -> tuple[Sides, Normalised, Dot] | None:
    """The same attention over keys that all queries share, if each has its own of a shared tensor."""
    key = sides.key
    of_keys, other = (dot.lhs, dot.rhs) if key in dot.lhs.axes else (dot.rhs, dot.lhs)
    keys, values = _window(reader, of_keys, sides), _window(reader, sides.values, sides)
    if keys is None or values is None or (keys.start, keys.digits) != (values.start, values.digits):
        return None
    if sp.expand(keys.size - values.size) != 0:
        return None
    blocked = any(axis.extent != 1 for axis in other.axes & set(sides.axes) - of_keys.axes)
    if blocked and keys.digits.lines > 1:  # a window for all queries of a block: whole lines would be more keys
        return None
    new = reader.bound(sides.node, keys.size, SHARED)
    moved = Dot(other, keys.shared(new), dot.axis, dot.node)
    place, inside = keys.digits.key_at(sp.expand(new - keys.start), key)
    change = moving(key, place, {dot: moved})
    score, gain = change(normalised.score), change(normalised.gain)
    if score is None or gain is None:
        return None
    score = where(inside, score, Const(-math.inf if normalised.softmax else 0.0))
    sides = replace(sides, key=new, values=values.shared(new))
    return sides, replace(normalised, score=score, gain=gain), moved


def _window(reader: Reader, access: Access, sides: Sides) -> _Window | None:
    """The first tensor that ``access`` is a view of, of which overlapping windows are read, one for each query."""
    for node, index in layers(reader, access):
        dims = [dim for dim, place in enumerate(index) if sides.key in place.free_symbols]
        if len(dims) != 1 or index[dims[0]] == sides.key or not is_inside(node, index):
            continue
        parts = sp.Add.make_args(sp.expand(index[dims[0]]))
        start = sp.Add(*(part for part in parts if sides.key not in part.free_symbols))
        digits = _Digits.of(sp.expand(index[dims[0]] - start), sides.key)
        rows = start.atoms(Axis)
        others = [place for dim, place in enumerate(index) if dim != dims[0]]
        if digits is None or not rows or not rows <= set(sides.axes) or any(place.atoms(Axis) & rows for place in others):
            continue
        steps = [start.coeff(row) for row in rows]
        even = not (start - sum(step * row for step, row in zip(steps, rows, strict=True))).atoms(Axis)
        if even and (len(rows) == 1 or digits.lines > 1) and all(digits.reaches(step, sides.key) for step in steps):
            return _Window(Access(node, tuple(map(Int, index))), dims[0], start, digits)
    return None


def moving(key: Axis, place: sp.Expr, known: dict[Dot, Dot]) -> Callable[[Expr], Expr | None]:
    """What an expression is with ``key`` at ``place``, or None where it is made of sums and products that are not known.

    Loads are read at the nearest place inside: where that makes a difference, the pair does not count.
    """

    def change(expr: Expr) -> Expr | None:
        if expr in known:
            return known[expr]  # type: ignore[index]
        if key not in expr.axes:
            return expr
        if isinstance(expr, Int):
            return Int(sp.expand(expr.value.xreplace({key: place})))
        if isinstance(expr, (Dot, Reduce)):
            return None
        parts = [change(part) for part in expr.children]
        if any(part is None for part in parts):
            return None
        if isinstance(expr, Load):
            return clamped(Load(expr.source, tuple(parts), expr.kind))  # type: ignore[arg-type]
        assert isinstance(expr, Op)
        return where(*parts) if expr.name == "where" else op(expr.name, *parts)  # type: ignore[arg-type]

    return change


def clamped(load: Load) -> Load:
    """Read at the nearest place that is surely inside; the graph only reads within a tensor, so others do not count."""
    places = list(load.index)
    for dim, (place, size) in enumerate(zip(load.index, shape_of(load.source), strict=True)):  # type: ignore[arg-type]
        if isinstance(place, Int) and size != 1:
            low = place.value if never_negative(place.value) else _not_negative(place.value)
            places[dim] = Int(low if always_less(low, size) else sp.Min(low, size - 1))
    return Load(load.source, tuple(places), load.kind)


def _not_negative(place: sp.Expr) -> sp.Expr:
    """``max(place, 0)``; divided before it is rounded down, it would be slower to divide."""
    if isinstance(place, FloorDiv) and place.args[1].is_positive:
        return FloorDiv(sp.Max(place.args[0], 0), place.args[1])
    return sp.Max(place, 0)
