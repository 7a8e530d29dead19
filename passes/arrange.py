"""Write operators into a lowered graph by the axes of what they read: operands arranged, joined and multiplied."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attngen.algebra import Access
from attngen.index import Axis
from attngen.passes.dropout import draws
from attngen.passes.memory import MEMORY
from attngen.passes.semantics import Index, Reader, dtype_of, is_tensor, op_name, shape_of
from attngen.passes.views import VIEWS

COPY = "attngen_copy"  # the key of ``node.meta`` that holds the node which a copy is of
_MOST = 16  # nodes that are moved to one place
END = 2**63 - 1  # of a slice that has none
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class NotYet(Exception):
    """What is to be read is not there at that place."""


@dataclass(frozen=True)
class Piece:
    """``node[index]``: a dimension is read along an axis of its own, as far as that goes, or at one place."""

    node: fx.Node
    index: Index

    @property
    def axes(self) -> list[Axis]:
        return [place for place in self.index if isinstance(place, Axis)]

    def renamed(self, names: Mapping[Axis, Axis]) -> Piece:
        return replace(self, index=tuple(names.get(place, place) for place in self.index))  # type: ignore[call-overload]


def layers(reader: Reader, access: Access) -> Iterator[tuple[fx.Node, Index]]:
    """The tensors of the graph that ``access`` may be read from: itself, and those that it is a view or a copy of."""
    node: fx.Node = access.source  # type: ignore[assignment]
    index: Index = tuple(place.value for place in access.index)  # type: ignore[attr-defined]
    while True:
        node = reader.resolve(node)
        if node.graph is reader.graph:
            yield node, index
        below = reader.view(node, index)
        if below is None or dtype_of(below[0]) != dtype_of(node):
            return
        node, index = below


def is_plain(index: Index, shape: Index) -> bool:
    """Fit for a ``Piece``."""
    axes = [place for place in index if isinstance(place, Axis)]
    if len(set(axes)) < len(axes) or not all(place.is_Integer or place in axes for place in index):
        return False
    return all(place.is_Integer or place.extent == size for place, size in zip(index, shape, strict=True))


def pieces(reader: Reader, access: Access) -> list[Piece]:
    return [Piece(node, index) for node, index in layers(reader, access) if is_plain(index, shape_of(node))]


class Scribe:
    """Writes before ``point``, whose source line its nodes are given.

    ``order``: the position of each node; ``fixed``: whether nobody writes to a node's memory. ``made``: what it wrote.
    """

    def __init__(self, point: fx.Node, order: Mapping[fx.Node, int], fixed: Collection[fx.Node]) -> None:
        self._point, self._order, self._fixed = point, order, fixed
        self._moved: dict[fx.Node, fx.Node] = {}
        self.made: list[fx.Node] = []

    def call(self, target: Any, *args: Any, **options: Any) -> fx.Node:
        with self._point.graph.inserting_before(self._point):
            node = self._point.graph.call_function(target, args, options)
        self.made.append(node)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])  # type: ignore[return-value]
        with self._point.meta["val"].fake_mode:
            value = target(*values, **options)
        node.meta = {**self._point.meta, "val": value}
        node.meta.pop(MEMORY, None)
        if op_name(node) in VIEWS and MEMORY in args[0].meta:
            node.meta[MEMORY] = args[0].meta[MEMORY]
        return node

    def arranged(self, piece: Piece, axes: Sequence[Axis], dtype: torch.dtype) -> fx.Node:
        """``piece`` with the dimensions ``axes``, in order; those that it does not have are repeated."""
        node = self.here(piece.node)
        for dim, place in reversed(list(enumerate(piece.index))):
            if place.is_Integer:
                node = self.call(torch.ops.aten.select.int, node, dim, int(place))
        node = self.spread(node, piece.axes, axes)
        sizes = [int(axis.extent) if axis in axes and axis not in piece.axes else -1 for axis in axes]
        if any(size > 1 for size in sizes):
            node = self.call(torch.ops.aten.expand.default, node, sizes)
        return node if dtype_of(node) == dtype else self.call(torch.ops.aten.to.dtype, node, dtype)

    def joined(self, each: Sequence[Piece], axes: Sequence[Axis], along: Axis, dtype: torch.dtype) -> fx.Node:
        """The pieces, one after another along one of their ``axes``."""
        parts = [self.arranged(piece, axes, dtype) for piece in each]
        return parts[0] if len(parts) == 1 else self.call(torch.ops.aten.cat.default, parts, list(axes).index(along))

    def product(
        self, left: fx.Node, there: Sequence[Axis], right: fx.Node, here: Sequence[Axis], out: Sequence[Axis]
    ) -> fx.Node:
        """The sum of products of two tensors, with dimensions ``there`` and ``here``, over all that is not in ``out``."""
        letters = dict(zip(dict.fromkeys([*there, *here]), _LETTERS, strict=False))
        left_out, right_out, result = ("".join(letters[axis] for axis in axes) for axes in (there, here, out))
        return self.call(torch.ops.aten.einsum.default, f"{left_out},{right_out}->{result}", [left, right])

    def spread(self, node: fx.Node, axes: Sequence[Axis], wanted: Sequence[Axis]) -> fx.Node:
        """``node``, whose dimensions are ``axes``, with the dimensions ``wanted``; those it does not have are of size one."""
        order = [list(axes).index(axis) for axis in wanted if axis in axes]
        if order != sorted(order):
            node = self.call(torch.ops.aten.permute.default, node, order)
        for dim, axis in enumerate(wanted):
            if axis not in axes:
                node = self.call(torch.ops.aten.unsqueeze.default, node, dim)
        return node

    def is_before(self, node: fx.Node) -> bool:
        """``node`` comes before what is written here."""
        return self._order[node] < self._order[self._point]

    def here(self, node: fx.Node) -> fx.Node:
        """``node``, or if it comes later and could have come before, a copy of it: where the graph runs, that is ``node``."""
        if node in self.made:
            return node
        if node not in self._order or node not in self._fixed:
            raise NotYet
        if self.is_before(node):
            return node
        if node not in self._moved:
            if not _may_come_before(node) or len(self._moved) == _MOST:
                raise NotYet
            args, options = fx.node.map_arg((node.args, node.kwargs), self.here)  # type: ignore[misc]
            self._moved[node] = self.call(node.target, *args, **options)
            self._moved[node].meta[COPY] = node
        return self._moved[node]


def _may_come_before(node: fx.Node) -> bool:
    """It only computes a tensor of what it is given."""
    target = node.target
    return is_tensor(node) and isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable and not draws(node)
