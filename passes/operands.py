"""Choose which tensor to pass for one side of a contraction: look below copies, broadcasts and scales.

``repeat_kv`` materialises each key head several times, ``q * scale`` writes the queries again, ``contiguous`` copies. The
kernel needs none of it: it indexes the tensor below (head ``h // 4``, say) and scales in registers. Plain views on top
are kept, because a strided tensor costs nothing and its gradient has its own shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import sympy as sp
import torch
from torch import fx

from attngen.algebra import Access, Const, Expr, op, to_float
from attngen.compat import FloorDiv
from attngen.errors import Miss
from attngen.index import Axis
from attngen.passes.effects import written
from attngen.passes.semantics import Index, Reader, bind, broadcast, dtype_of, is_tensor, op_name, shape_of
from attngen.passes.views import FREE

NOT_WHOLE = "an operand is not indexed by whole dimensions"


@dataclass(frozen=True)
class Operand:
    """``factor * node[index]``, to be used as ``dtype``. ``index`` is over the axes of the site."""

    node: fx.Node
    index: Index
    factor: Expr
    dtype: torch.dtype

    ONE: ClassVar[Expr] = Const(1.0)


def peel(
    reader: Reader,
    access: Access,
    whole: tuple[Axis, Axis],
    dtype: torch.dtype,
    *,
    scaled: bool = True,
    direct: bool = False,
) -> Operand | Miss:
    """The tensor to pass for ``access``, whose two ``whole`` axes must each be one full dimension of it.

    ``direct``: every dimension of it is one axis, read in equal steps, or read at one place. A tensor that is read in no
    steps is taken before one that is: from its dimensions a kernel knows how far the axes go.
    """
    layers = list(_layers(reader, access, whole[1], scaled=scaled))
    fitting = [layer for layer in layers if layer.node.graph is reader.graph and indexable(layer.node, layer.index, whole)]
    if direct:
        plain = [layer for layer in fitting if all(place.is_Integer or isinstance(place, Axis) for place in layer.index)]
        fitting = plain or [layer for layer in fitting if _direct(layer.index)]
    chosen = _lowest(layers, fitting)
    if chosen is None:
        return Miss(NOT_WHOLE, str(access.source), depth=5)
    return Operand(chosen.node, broadcast(chosen.index, shape_of(chosen.node)), chosen.factor, dtype)


@dataclass(frozen=True)
class _Layer:
    """``factor * node[index]``; ``free``: the layer above only shows this one, by a strided view."""

    node: fx.Node
    index: Index
    factor: Expr
    free: bool


def _layers(reader: Reader, access: Access, inner: Axis, *, scaled: bool) -> Iterator[_Layer]:
    """One side of a contraction, and what it is a view, a copy or a multiple of, layer by layer."""
    node: fx.Node = access.source  # type: ignore[assignment]
    index: Index = tuple(place.value for place in access.index)  # type: ignore[attr-defined]
    factor, free = Operand.ONE, True
    while True:
        yield _Layer(node, index, factor, free)
        if written(node):
            return  # what is below is overwritten
        if (view := reader.view(node, index)) is not None:
            free = op_name(node) in FREE
            if dtype_of(view[0]) != dtype_of(node):
                return
            node, index = view
        elif scaled and (product := _scaled(reader, node, index, inner)) is not None:
            free = False
            node, index, factor = product[0], product[1], op("mul", factor, product[2])
        else:
            return
        node = reader.resolve(node)


def _lowest(layers: list[_Layer], fitting: list[_Layer]) -> _Layer | None:
    """The first that fits, or one below it that is more than another view of the same memory."""
    chosen: _Layer | None = None
    below = False
    for layer in layers:
        below = below or not layer.free
        if (below or chosen is None) and layer in fitting:
            chosen, below = layer, False
    return chosen


def _scaled(reader: Reader, node: fx.Node, index: Index, inner: Axis) -> tuple[fx.Node, Index, Expr] | None:
    """``x * s`` or ``x / s`` where ``s`` does not change along the contracted axis: the tensor, its index, the scale."""
    if op_name(node) not in ("mul", "div") or any(map(reader.is_stale, [node, *node.all_input_nodes])):
        return None
    args = bind(node)
    if args.get("rounding_mode") is not None:
        return None
    for name, other in (("self", "other"), ("other", "self")):
        tensor = args[name]
        if not is_tensor(tensor) or (op_name(node) == "div" and name == "other") or dtype_of(tensor) != dtype_of(node):
            continue
        place = broadcast(index, shape_of(tensor))
        scale = to_float(reader.operand(args[other], index))
        if inner in scale.axes or not _keeps(index, place, inner):
            continue
        return tensor, place, scale if op_name(node) == "mul" else op("div", Const(1.0), scale)
    return None


def _keeps(index: Index, place: Index, inner: Axis) -> bool:
    """The tensor side carries every axis of the product, so that the scale is the broadcast side."""
    lost = {s for i in index for s in i.free_symbols} - {s for i in place for s in i.free_symbols}
    return inner not in lost and not any(isinstance(s, Axis) and s.extent != 1 for s in lost)


def _direct(index: Index) -> bool:
    return all(not place.has(FloorDiv, sp.Mod) and place.free_symbols == place.atoms(Axis) for place in index)


def indexable(node: fx.Node, index: Index, whole: tuple[Axis, Axis]) -> bool:
    """Each ``whole`` axis is exactly one full dimension, and every other one moves with one batch axis of its own.

    Kernels know from a dimension that is exactly an axis how far that goes: it must not be longer.
    """
    shape = shape_of(node)
    moving = [axis for place in index for axis in place.atoms(Axis)]
    if len(moving) > len(set(moving)) or any(len(place.atoms(Axis)) > 1 for place in index):
        return False
    if any(isinstance(place, Axis) and sp.expand(size - place.extent) != 0 for place, size in zip(index, shape, strict=True)):
        return False
    for axis in whole:
        dims = [d for d, place in enumerate(index) if axis in place.free_symbols]
        if not dims and axis.extent == 1:
            continue
        if len(dims) != 1 or index[dims[0]] != axis or sp.expand(shape[dims[0]] - axis.extent) != 0:
            return False
    return True

