"""Where the result of a product may be taken from: the product, or a view or copy of it that only it feeds.

So a kernel writes the layout that the model wants next, and the copies in between disappear.
"""

from __future__ import annotations

import sympy as sp
from torch import fx

from attngen.compat import FloorDiv
from attngen.index import Axis, numbered
from attngen.passes import effects
from attngen.passes.lower import Lowered
from attngen.passes.semantics import Reader, dtype_of, op_name, shape_of
from attngen.passes.views import VIEWS


def run(node: fx.Node, lowered: Lowered, reader: Reader, facts: effects.Effects) -> list[tuple[fx.Node, tuple[Axis, ...]]]:
    """The result, and what rearranges it while its dimensions stay whole; last first. Then what joins some of them, too."""
    whole, joined = [(node, _fresh(node))], list[tuple[fx.Node, tuple[Axis, ...]]]()
    output = node
    while len(output.users) == 1:
        (user,) = output.users
        if op_name(user) not in VIEWS or not _same_size(user, node) or not lowered.origins.get(user):
            break
        if (user in facts.cut) != (node in facts.cut):
            break
        axes = _fresh(user)
        place = _trace_back(reader, user, axes, node)
        if place is None or not isinstance(place[-1], Axis):  # features, in most
            break
        output = user
        (joined if joined or not _whole(place, axes) else whole).append((output, axes))
    return [*whole[::-1], *joined[::-1]]


def _fresh(node: fx.Node) -> tuple[Axis, ...]:
    return tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(node)))


def _same_size(user: fx.Node, node: fx.Node) -> bool:
    sizes = [sp.Mul(*shape_of(n)) for n in (user, node)]
    return sp.expand(sizes[0] - sizes[1]) == 0 and dtype_of(user) == dtype_of(node)


def _trace_back(
    reader: Reader, user: fx.Node, index: tuple[sp.Expr, ...], node: fx.Node
) -> tuple[sp.Expr, ...] | None:
    while user is not node:
        step = reader.view(user, index)
        if step is None:
            return None
        user, index = step
    return index


def _whole(place: tuple[sp.Expr, ...], axes: tuple[Axis, ...]) -> bool:
    """No dimension of the source is cut apart, and none is read with a step or an offset."""
    if any(p.has(FloorDiv, sp.Mod) for p in place):
        return False
    used = [s for p in place for s in p.free_symbols if isinstance(s, Axis)]
    return len(used) == len(set(used)) and all(p.subs(dict.fromkeys(axes, 0)) == 0 for p in place)
