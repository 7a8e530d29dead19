"""Scores that add up several products, as one product over all features: rotated and plain parts, positions.

    q1 @ k1.mT + q2 @ k2.mT  -->  cat([q1, q2], -1) @ cat([k1, k2], -1).mT

Else one of the products is computed where the weights are, and the others are loaded pair by pair. Like ``passes.joins``,
this changes the graph that is analysed, never the one that runs; there, queries and keys are joined where the attention is
replaced. It is done where they are smaller than the products that then need not be kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attngen.algebra import Const, Dot, Op, number, terms
from attngen.index import Axis, numbered
from attngen.passes import effects
from attngen.passes.arrange import NotYet, Piece, Scribe, pieces
from attngen.passes.candidates import Marks, is_product
from attngen.passes.memory import storage
from attngen.passes.semantics import Reader, TooMuch, bind, dtype_of, is_tensor, op_name, shape_of

_INNER = Axis("features", 2)  # along which they are joined, however many they are
_MOST = 4  # products


@dataclass(frozen=True)
class _Product:
    """``rows * keys`` summed over ``_INNER``."""

    rows: Piece
    keys: Piece


def run(graph: fx.Graph) -> None:
    marks = Marks()
    for node in graph.nodes:
        marks.add(node)
    ends = [node for node in graph.nodes if _adds_scores(node, marks) and not any(_adds_scores(u, marks) for u in node.users)]
    if not ends:
        return
    facts = effects.run(graph)
    reader = Reader(graph, facts.stale)
    fixed = frozenset(n for n in graph.nodes if is_tensor(n) and storage(n) not in facts.writes) - facts.cut
    for end in ends:
        if end in fixed and (whole := _whole(end, reader, Scribe(end, facts.order, fixed))) is not None:
            whole.meta = dict(end.meta)
            end.replace_all_uses_with(whole)


def _adds_scores(node: fx.Node, marks: Marks) -> bool:
    if op_name(node) != "add" or len(node.all_input_nodes) != 2 or bind(node)["alpha"] != 1:
        return False
    return all(n in marks.pairs and marks.level_of(n) == 1 for n in node.all_input_nodes)


def _whole(end: fx.Node, reader: Reader, scribe: Scribe) -> fx.Node | None:
    axes = tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(end)))
    try:
        dots, scale = _dots(end, axes, reader)
        for products in _read(dots, axes, reader):
            rows, keys = (_axes(axes, pieces) for pieces in ([p.rows for p in products], [p.keys for p in products]))
            inner = sum(int(dot.axis.extent) for dot in dots)
            if 2 * inner * (_count(rows) + _count(keys)) <= _count(axes):
                left = scribe.joined([p.rows for p in products], [*rows, _INNER], _INNER, dtype_of(end))
                right = scribe.joined([p.keys for p in products], [*keys, _INNER], _INNER, dtype_of(end))
                whole = scribe.product(left, [*rows, _INNER], right, [*keys, _INNER], axes)
                return whole if scale == 1 else scribe.call(torch.ops.aten.mul.Tensor, whole, scale)
    except (NotYet, TooMuch, RecursionError):
        pass
    return None


def _dots(end: fx.Node, axes: Sequence[Axis], reader: Reader) -> tuple[list[Dot], float]:
    """The products that ``end`` adds up, and the number that all of them are multiplied with."""
    found: list[tuple[Dot, float]] = []
    for term in terms(reader.at(end, tuple(axes))):
        scaled = isinstance(term, Op) and term.name == "mul" and isinstance(term.args[1], Const)
        dot, scale = term.args if isinstance(term, Op) and scaled else (term, Const(1.0))
        if not isinstance(dot, Dot) or not is_product(dot.node) or dtype_of(dot.node) != dtype_of(end):  # type: ignore[arg-type]
            raise NotYet
        found.append((dot, number(scale) or 0.0))
    scales, sizes = {scale for _, scale in found}, [*axes, *(dot.axis for dot, _ in found)]
    if not 1 < len(found) <= _MOST or len(scales) > 1 or not all(axis.extent.is_Integer for axis in sizes):
        raise NotYet
    return [dot for dot, _ in found], scales.pop()


def _read(dots: Sequence[Dot], axes: Sequence[Axis], reader: Reader) -> Iterator[list[_Product]]:
    """Each product as one of rows and keys, for each two dimensions that may count these."""
    read = [_sides(dot, reader) for dot in dots]
    for row in axes:
        for key in axes:
            chosen = [[p for p in each if row in p.rows.axes and key in p.keys.axes] for each in read]
            apart = [[p for p in each if row not in p.keys.axes and key not in p.rows.axes] for each in chosen]
            if row is not key and all(apart):
                yield [each[0] for each in apart]


def _sides(dot: Dot, reader: Reader) -> list[_Product]:
    found = []
    for rows, keys in ((dot.lhs, dot.rhs), (dot.rhs, dot.lhs)):
        one = next((piece for piece in pieces(reader, rows) if dot.axis in piece.axes), None)
        other = next((piece for piece in pieces(reader, keys) if dot.axis in piece.axes), None)
        if one is not None and other is not None:
            found.append(_Product(one.renamed({dot.axis: _INNER}), other.renamed({dot.axis: _INNER})))
    return found


def _axes(axes: Sequence[Axis], pieces: Sequence[Piece]) -> list[Axis]:
    return [axis for axis in axes if any(axis in piece.axes for piece in pieces)]


def _count(axes: Sequence[Axis]) -> int:
    return math.prod(int(axis.extent) for axis in axes)
