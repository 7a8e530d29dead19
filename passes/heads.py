"""Tell a mixing of heads (talking heads): a product or convolution that sums scores or weights over a batch dimension.

A kernel computes each head by itself, so this is only ever a reason for a ``Miss``, and worth being called by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy as sp
from torch import fx

from attngen.algebra import Access, Dot, Expr, Load, Op
from attngen.compat import FloorDiv
from attngen.errors import Miss
from attngen.index import Axis, numbered
from attngen.passes.candidates import is_pointwise_convolution, is_product
from attngen.passes.semantics import Index, Reader, bind, shape_of

_SCORES, _WEIGHTS = "the scores of different heads are mixed", "the weights of different heads are mixed"


def may_mix(node: fx.Node) -> bool:
    """It sums over some dimension, with weights."""
    return is_product(node) or is_pointwise_convolution(node)


def mixed(reader: Reader, end: fx.Node) -> Miss | None:
    """The last node that mixes heads between scores and ``end``, a product with weights; it may be ``end`` itself."""
    first = _nearest(reader, end)
    found = first and _nearest(reader, end, first)  # what mixes again, after this one
    if found is None:
        return None
    normalised = any(isinstance(part, Op) and part.name == "exp" for part in found.read)
    return Miss(_WEIGHTS if normalised else _SCORES, found.node.name, depth=7)


@dataclass(frozen=True)
class _Mixing:
    """``node`` sums ``source`` over heads; ``read`` is what that is made of."""

    node: fx.Node
    source: fx.Node
    read: list[Expr]

    def gives(self, part: Expr, axis: Axis) -> bool:
        """``part`` is its result, and ``axis`` counts the heads there."""
        if isinstance(part, Load):
            return part.source is self.node and axis in part.index[1].axes
        if not (isinstance(part, Dot) and part.node is self.node):
            return False
        return any(axis in side.axes for side in (part.lhs, part.rhs) if side.source is not self.source)


def _nearest(reader: Reader, end: fx.Node, before: _Mixing | None = None) -> _Mixing | None:
    """The first node above ``end`` that sums over heads: those of a product, or those that ``before`` gives."""
    stack, seen = [end], {end}
    while stack:
        node = stack.pop()
        for source, index, axis in _sums(reader, node):
            read = reader.at(source, index).walk()
            if any(_is_per_head(part, axis) or (before is not None and before.gives(part, axis)) for part in read):
                return _Mixing(node, source, read)
        if node is end or not is_product(node):
            above = [n for n in node.all_input_nodes if n not in seen]
            seen.update(above)
            stack.extend(above)
    return None


def _sums(reader: Reader, node: fx.Node) -> Iterator[tuple[fx.Node, Index, Axis]]:
    """The tensors that ``node`` sums over, where they are read, and the axis that they are summed along."""
    if not may_mix(node):
        return
    place = tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(node)))
    if is_pointwise_convolution(node):
        source: fx.Node = bind(node)["input"]
        channel = numbered("c", shape_of(source)[1])
        yield source, (place[0], channel, *place[2:]), channel
        return
    for dot in (part for part in reader.at(node, place).walk() if isinstance(part, Dot) and part.node is node):
        for side in (dot.lhs, dot.rhs):
            index = tuple(p.value for p in side.index)  # type: ignore[attr-defined]
            yield side.source, index, dot.axis  # type: ignore[misc]


def _is_per_head(part: Expr, axis: Axis) -> bool:
    """A product whose sides both move with ``axis``, along dimensions that count heads (and not features as well)."""

    def moves(side: Access) -> bool:
        places = [p.value for p in side.index if axis in p.axes]  # type: ignore[attr-defined]
        return bool(places) and not any(place.has(FloorDiv, sp.Mod) for place in places)

    return isinstance(part, Dot) and moves(part.lhs) and moves(part.rhs)
