"""Weights over their own sum: their gradient and that of the sum are made together.

    d w[i, j] = d out[i] . v[j] / sum[i] + d sum[i]

The two parts may nearly cancel, in a row of one key to nothing. Made by two kernels, each would be multiplied and rounded on
its own, added up over all rows of a key, and what is left would be rounding of large numbers. So the kernel that loads
the sum (see ``passes.totals``) is told of which weights it is, and takes no gradient for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from attngen.algebra import TRUE, Const, Expr, Load, transform, where
from attngen.passes.candidates import is_total
from attngen.passes.detect import Site
from attngen.passes.replace import Placed
from attngen.passes.semantics import shape_of
from attngen.passes.specialise import Specialised
from attngen.spec import KEY, ROW, Input, Total, batch_axes


def run(site: Site, specialised: Specialised, earlier: Iterable[Placed]) -> Specialised:
    """``specialised`` with its total, if it loads the sum of its rows' weights, and that passes all gradients on to them."""
    if site.softmax:
        return specialised
    for placed in earlier:
        if is_total(placed.site.end) and not placed.detached and placed.site.output in specialised.bindings:
            total = _total(site, specialised, placed)
            if total is not None:
                return replace(specialised, spec=replace(specialised.spec, total=total))
    return specialised


def _total(site: Site, specialised: Specialised, made: Placed) -> Total | None:
    spec, theirs = specialised.spec, made.specialised.spec
    operands = ((site.query.node, spec.query), (site.keys.node, spec.keys))
    others = ((made.site.query.node, theirs.query), (made.site.keys.node, theirs.keys))
    names = _names(specialised, made.specialised)
    source = _of_row(specialised, made.site)
    if operands != others or names is None or source is None or spec.mask not in (TRUE, theirs.mask):
        return None
    weight = _renamed(theirs.score, names)
    if spec.mask != theirs.mask:
        weight = where(_renamed(theirs.mask, names), weight, Const(0.0))
    return Total(source.name, weight)


def _of_row(specialised: Specialised, made: Site) -> Input | None:
    """What is loaded, if it is the other's result of the same row, of any of its features, which are all alike."""
    if specialised.bindings.count(made.output) != 1:
        return None
    source = specialised.spec.extras[specialised.bindings.index(made.output)]
    names = {made.row: ROW, **dict(zip(made.batch, batch_axes(len(made.batch)), strict=True))}
    places = zip(source.index, made.axes, shape_of(made.output), strict=True)
    same = (place == names.get(axis, place) or (place == 0 and size == 1) for place, axis, size in places)
    return source if all(same) and not any(place.has(KEY) for place in source.index) else None


def _names(ours: Specialised, theirs: Specialised) -> dict[str, str] | None:
    """What we call each of their extras; None if one is none of ours."""
    mine = {(binding, x.index, x.dtype): x.name for x, binding in zip(ours.spec.extras, ours.bindings, strict=True)}
    pairs = zip(theirs.spec.extras, theirs.bindings, strict=True)
    found = {x.name: mine.get((binding, x.index, x.dtype)) for x, binding in pairs}
    return None if None in found.values() else found  # type: ignore[return-value]


def _renamed(expr: Expr, names: dict[str, str]) -> Expr:
    def rule(node: Expr) -> Expr | None:
        known = isinstance(node, Load) and node.source in names
        return replace(node, source=names[node.source]) if known else None  # type: ignore[attr-defined, type-var]

    return transform(expr, rule)
