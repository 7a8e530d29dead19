"""What the families of backward templates share: the two sides of a backward, and how ``launch`` prepares its results.

One side holds queries and goes over keys, the other holds keys and goes over queries; for that the whole score program is
mirrored: there ``i`` counts keys and ``j`` queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy as sp

from attngen.algebra import Expr, Op, number
from attngen.gradient import HEAD, Backward, Target, mirrored_spec
from attngen.gradient import mirrored_input as turned
from attngen.index import Axis
from attngen.layout import extent_of, memory_order, tuple_of, unpacked
from attngen.mask import Cover, heavy_first
from attngen.spec import FEATURE, INNER, KEY, ROW, AttentionSpec, Input, Tile


@dataclass(frozen=True)
class Side:
    """One of the two kernels: ``rows`` are what its programs hold, ``keys`` what they go over, in the words of ``spec``."""

    name: str
    spec: AttentionSpec  # its score program, mirrored where rows are keys
    held: tuple[Input, Input]  # what makes the scores, and what makes the gradients of the weights
    stepped: tuple[Input, Input]
    plan: Backward
    tile: Tile
    queries: bool


def mirrored_side(spec: AttentionSpec, side: Side) -> Side:
    """``side`` in its own words: rows are keys there."""
    (a, b), (c, d) = side.held, side.stepped
    return replace(side, spec=mirrored_spec(spec), held=(turned(a), turned(b)), stepped=(turned(c), turned(d)))


def leading(grad: Expr) -> tuple[float, Expr]:
    """A constant factor of the gradient, which is applied once, to the sum; and what is left."""
    if isinstance(grad, Op) and grad.name == "mul":
        left, right = grad.args
        value = number(right)
        if value is not None and value != 0:
            factor, rest = leading(left)
            return factor * value, rest
    return 1.0, grad


def order_of(cover: Cover) -> str:
    """Which tiles go first: those that have most to do."""
    return "tiles - 1 - within // peers" if heavy_first(cover) else "within // peers"


# --------------------------------------------------------------------------------------------------------------- heads


def heads_of(side: Side) -> dict[str, Any]:
    """How the number of a program becomes positions along the batch axes; programs that hold keys go over the queries
    of all heads that read them."""
    batch, shared = side.spec.batch, {} if side.queries else dict(side.plan.members)
    if not shared:
        return {"unpack": unpacked(batch), "each": [], "count": product([f"size_{a.name}" for a in batch]), "members": ""}
    outer = [a for a in batch if shared.get(a, 1)]
    extents = {a: f"sources_{a.name}" if a in shared else f"size_{a.name}" for a in outer}
    lines, rest = [], "source"
    for axis in reversed(outer):
        first = axis is outer[0]
        lines.append(f"{_source(axis, shared)} = {rest if first else f'{rest} % {extents[axis]}'}")
        rest = f"{rest} // {extents[axis]}"
    each, rest = [], "member"
    counts = {axis: str(by) if by else f"size_{axis.name}" for axis, by in shared.items()}
    for axis in reversed(list(shared)):
        step = rest if axis is next(iter(shared)) else f"{rest} % {counts[axis]}"
        base = f"{_source(axis, shared)} * {counts[axis]} + " if shared[axis] else ""
        each.append(f"{axis.name} = {base}{step}")
        rest = f"{rest} // {counts[axis]}"
    number = ""
    for axis in batch:
        number = f"({number}) * size_{axis.name} + {axis.name}" if number else axis.name
    lines += [f"{a.name} = {_source(a, shared)} * {by}" for a, by in shared.items() if by]
    return {
        "unpack": lines,
        "each": [*each, f"head = {number}"],
        "count": product(list(extents.values())),
        "members": product(list(counts.values())),
    }


def _source(axis: Axis, shared: dict[Axis, int]) -> str:
    return f"{axis.name}_source" if axis in shared else axis.name


def product(names: list[str]) -> str:
    return " * ".join(names) if names else "1"


# -------------------------------------------------------------------------------------------------------------- launch


def launch_of(spec: AttentionSpec, plan: Backward) -> dict[str, Any]:
    axes = [*spec.batch, ROW, KEY]
    shape = {**{a: f"size_{a.name}" for a in axes}, INNER: str(spec.head_dim), FEATURE: str(spec.value_dim)}
    return {
        "arguments": [x.name for x in spec.inputs],
        "size_lines": [f"size_{a.name} = {extent_of(spec, a)}" for a in axes],
        "source_lines": [f"sources_{a.name} = size_{a.name} // {by}" for a, by in plan.members if by],
        "rows_shape": tuple_of([f"size_{a.name}" for a in (*spec.batch, ROW)]),
        "heads": product([f"size_{a.name}" for a in spec.batch]),
        "buffers": [
            *(_buffer(spec, t, shape) for t in plan.targets[:3]),
            *(_asked(_buffer(spec, t, shape), t) for t in plan.extras),
        ],
        "needs": [target.source.name for target in plan.extras],
    }


def read_of(spec: AttentionSpec, target: Target) -> str:
    """How much is read of each dimension of what ``target`` is the gradient of."""
    axes = [*spec.batch, ROW, KEY]
    shape = {**{a: f"size_{a.name}" for a in axes}, INNER: str(spec.head_dim), FEATURE: str(spec.value_dim)}
    return tuple_of([_extent(place, f"{target.source.name}.shape[{d}]", shape) for d, place in enumerate(target.place.index)])


def _buffer(spec: AttentionSpec, target: Target, shape: dict[Axis, str]) -> dict[str, str]:
    """How ``launch`` allocates a gradient, and what it gives back of it."""
    name, source = target.place.name, target.source.name
    if target.shared:
        return {"name": name, "make": f"notes.zeros({source}.shape)", "give": name}
    if not target.direct:
        sizes = [shape[place] for place in target.place.index]  # type: ignore[index]
        parts, give = ([*sizes, "tiles"], f"{name}.sum(-1)") if target.kind == HEAD else (sizes, name)
        return {"name": name, "make": f"notes.empty({tuple_of(parts)})", "give": give}
    order = tuple(memory_order(spec, target.source))
    whole = f"{source}.shape == {read_of(spec, target)}" if target.dense else "False"
    return {"name": name, "make": f"notes.gradient_of({source}, {order}, {whole})", "give": name}


def _asked(buffer: dict[str, str], target: Target) -> dict[str, str]:
    """``buffer``, made only if its gradient is needed: it may be as large as all pairs. The kernel gets the input instead."""
    source = target.source.name
    give = f"{buffer['give']} if need_{source} else None"
    return {**buffer, "make": f"{buffer['make']} if need_{source} else {source}", "give": give}


def _extent(place: sp.Expr, whole: str, shape: dict[Axis, str]) -> str:
    """How much of a dimension is read."""
    if isinstance(place, Axis):
        return shape[place]
    return "1" if place.is_Integer else whole


def called_with(stride: str) -> str:
    name, dim = stride.rsplit("_stride_", 1)
    return f"{name}.stride({dim})"
