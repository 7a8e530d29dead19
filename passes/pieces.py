"""The row for ``updated``: a tensor after a write to a part of it is what was written there, and what it was elsewhere."""

from __future__ import annotations

import sympy as sp
from torch import fx

from attngen.algebra import TRUE, Dot, Expr, Int, integer, op, substitute, transform, where
from attngen.index import ZERO, Axis, floordiv, modulo, numbered, reshape
from attngen.passes.effects import updated, written
from attngen.passes.semantics import Index, Reader, Unknown, bind, dtype_of, op_name, shape_of
from attngen.passes.views import RESHAPES


def after_write(reader: Reader, node: fx.Node, index: Index) -> Expr:
    whole, write = node.all_input_nodes
    (target,) = written(write)
    root = _root(whole)
    inside, place = _into(reader, target, root, index)
    before = reader.at(whole, index)
    back = _out_of(reader, target, root, place)
    return where(inside, _unpinned(reader.at(write, place), before, dict(zip(index, back, strict=True))), before)


def _unpinned(value: Expr, before: Expr, back: dict[sp.Expr, sp.Expr]) -> Expr:
    """``value``, which counts where every place is the one ``back``, with the products of ``before`` as they stand there.

    So the scores of head 2 in ``where(h == 2, scores[2] + 1, scores[h])`` are ``scores[h]`` as well.
    """
    pinned = {axis: place for axis, place in back.items() if isinstance(axis, Axis) and place != axis}
    known = {substitute(dot, pinned): dot for dot in before.walk() if isinstance(dot, Dot)} if pinned else {}
    return transform(value, known.get) if known else value


def _root(name: fx.Node) -> fx.Node:
    """The tensor that was made first in this memory, all of which ``name`` shows."""
    while (same := _same_memory(name)) is not None:
        name = same
    return name


def _same_memory(name: fx.Node) -> fx.Node | None:
    """The node before a write that shows what ``name`` shows after it, if ``name`` is such a node."""
    if name.target is updated:
        return name.all_input_nodes[0]
    return next(iter(written(name)), None)


def _into(reader: Reader, view: fx.Node, root: fx.Node, index: Index) -> tuple[Expr, Index]:
    """Whether ``view`` shows the element of ``root`` at ``index``, and where; the place means nothing if it does not."""
    if view is root:
        return TRUE, index
    if (same := _same_memory(view)) is not None:
        return _into(reader, same, root, index)
    source = bind(view)["self"]
    inside, index = _into(reader, source, root, index)
    if dtype_of(view) != dtype_of(source):
        raise Unknown("memory that is seen as another type")
    if op_name(view) in RESHAPES:
        return inside, reshape(index, shape_of(source), shape_of(view))
    shown, place = _into_part(reader, view, index)
    return op("and", inside, shown), place


def _out_of(reader: Reader, view: fx.Node, root: fx.Node, place: Index) -> Index:
    """Where ``root`` holds what ``view`` shows at ``place``."""
    while view is not root:
        if (same := _same_memory(view)) is not None:
            view = same
            continue
        found = reader.view(view, place)
        if found is None:
            raise Unknown("a view that is not known")
        view, place = found
    return place


def _into_part(reader: Reader, view: fx.Node, index: Index) -> tuple[Expr, Index]:
    """Of a view whose dimensions each run along one of its source, from some start and with some step."""
    axes = tuple(numbered(f"w{d}", size) for d, size in enumerate(shape_of(view)))
    found = reader.view(view, tuple(ZERO if axis.extent == 1 else axis for axis in axes))
    if found is None:
        raise Unknown("a view that is not known")
    source, shown = found
    inside: Expr = TRUE
    places = {axis: ZERO for axis in axes if axis.extent == 1}
    for place, start, size in zip(index, shown, shape_of(source), strict=True):
        if size == 1:
            continue
        moving = [axis for axis in axes if axis in start.free_symbols]
        if not moving:
            inside = op("and", inside, op("eq", Int(place), Int(start)))
            continue
        if len(moving) > 1:
            raise Unknown("a view with dimensions across those of its source")
        if moving[0] in places:  # a diagonal
            inside = op("and", inside, op("eq", Int(place), Int(sp.expand(start.xreplace(places)))))
            continue
        among, places[moving[0]] = _along(moving[0], start, place)
        inside = op("and", inside, among)
    if len(places) < len(axes):
        raise Unknown("a view that shows elements several times")
    return inside, tuple(places[axis] for axis in axes)


def _along(axis: Axis, shown: sp.Expr, place: sp.Expr) -> tuple[Expr, sp.Expr]:
    """Whether ``place`` is what ``shown`` says for some value of ``axis``, and for which."""
    step = sp.expand(shown).coeff(axis)
    start = sp.expand(shown - step * axis)
    if not step.is_positive or start.has(axis):
        raise Unknown("a view that does not run along its source evenly")
    offset = sp.expand(place - start)
    inside = [op("ge", Int(offset), integer(0)), op("lt", Int(offset), Int(sp.expand(step * axis.extent)))]
    return op("and", *inside, op("eq", Int(modulo(offset, step)), integer(0))), floordiv(offset, step)
