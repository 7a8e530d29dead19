"""Rows for operators that make values of their own: positions, constants, gathers, joins, reductions and contractions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy as sp
import torch
from torch import fx

from attngen.algebra import Const, Expr, Int, Load, integer, op, to_float, where
from attngen.index import ZERO, never_negative
from attngen.passes import dropout
from attngen.passes.reductions import REDUCTIONS
from attngen.passes.semantics import (
    NARROW,
    Bound,
    Index,
    Reader,
    Row,
    Unknown,
    broadcast,
    dtype_of,
    is_tensor,
    kind_of,
    op_name,
    shape_of,
    size_arg,
)

# ---------------------------------------------------------------------------------------------------------- sources


def _arange(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    if dtype_of(node) in NARROW or any(isinstance(args.get(name), float) for name in ("start", "end", "step")):
        raise Unknown("arange over floats, or over numbers that may wrap round")
    start, step = (size_arg(args.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    place: Expr = Int(sp.expand(start + step * index[0]))
    return to_float(place) if kind_of(dtype_of(node)) == "float" else place


def _filled(value: float) -> Row:
    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        return _typed(node, value)

    return row


def _full(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    value = args.get("fill_value", args.get("s"))
    if isinstance(value, fx.Node) and dtype_of(node) not in NARROW:
        return reader.at(value, ())
    return _typed(node, value)


def _typed(node: fx.Node, value: Any) -> Expr:
    if not isinstance(value, (bool, int, float)):
        raise Unknown("a fill value that is not a number")
    kind = kind_of(dtype_of(node))
    if dtype_of(node) in NARROW and int(value) not in range(torch.iinfo(dtype_of(node)).max + 1):
        raise Unknown("a number that wraps round")
    return Const(bool(value)) if kind == "bool" else integer(int(value)) if kind == "int" else Const(float(value))


def _triangle(name: str) -> Row:
    """tril keeps ``column <= row + diagonal``, triu ``column >= row + diagonal``; the rest is zero."""

    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        value = reader.at(args["self"], index)
        limit = Int(index[-2] + size_arg(args["diagonal"]))
        keep = op("le" if name == "tril" else "ge", Int(index[-1]), limit)
        return op("and", keep, value) if value.kind == "bool" else where(keep, value, _typed(node, 0))

    return row


def _eye(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    return where(op("eq", Int(index[0]), Int(index[1])), _typed(node, 1), _typed(node, 0))


def _cumsum(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """The running sum of something constant along the summed dimension: ``(k + 1) * value``."""
    if not index or dtype_of(node) in NARROW:
        raise Unknown("cumsum of a scalar, or one that may wrap round")
    dim = args["dim"] % len(index)
    place = reader.bound(node, shape_of(node)[dim], "k")
    value = reader.at(args["self"], (*index[:dim], place, *index[dim + 1 :]))
    if place in value.axes:
        raise Unknown("cumsum of something that changes")
    return op("mul", value, Int(index[dim] + 1))


# ------------------------------------------------------------------------------------------------- joins and gathers


def _cat(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """The first part that the position falls into; parts that it cannot fall into drop out."""
    parts = [t for t in args["tensors"] if shape_of(t) != (ZERO,)]
    dim = args["dim"] % len(index)
    offset, place = ZERO, index[dim]
    pieces: list[tuple[Expr, Expr]] = []
    for part in parts:
        size = shape_of(part)[dim]
        if not never_negative(offset - place - 1) and not never_negative(place - offset - size):
            value = reader.at(part, (*index[:dim], sp.expand(place - offset), *index[dim + 1 :]))
            pieces.append((op("lt", Int(place), Int(offset + size)), value))
        offset = offset + size
    if not pieces:
        raise Unknown("an empty cat")
    result = pieces[-1][1]
    for condition, value in reversed(pieces[:-1]):
        result = where(condition, value, result)
    return result


def _stack(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    dim = args["dim"] % len(index)
    if not index[dim].is_Integer:
        raise Unknown("a stack read at a variable position")
    return reader.at(args["tensors"][int(index[dim])], (*index[:dim], *index[dim + 1 :]))


def _pad(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """Zero or constant padding: inside, the shifted source; outside, the fill value."""
    source, pad = args["self"], args["pad"]
    shape = shape_of(source)
    inside: Expr = Const(True)
    place = list(index)
    for k in range(len(pad) // 2):
        dim = len(shape) - 1 - k
        place[dim] = index[dim] - size_arg(pad[2 * k])
        low, high = op("ge", Int(place[dim]), integer(0)), op("lt", Int(place[dim]), Int(shape[dim]))
        inside = op("and", inside, low, high)
    return where(inside, reader.at(source, tuple(place)), _typed(node, args.get("value") or 0))


def _gathered(reader: Reader, source: fx.Node, places: Sequence[Expr]) -> Expr:
    """``source`` at computed positions: read through where they are plain arithmetic, else loaded.

    The graph itself only ever reads within the tensor, so what is said of positions outside does not matter.
    """
    known = [p.value for p in places if isinstance(p, Int)]
    if len(known) == len(places):
        return reader.at(source, tuple(known))
    return Load(reader.resolve(source), tuple(places), kind_of(dtype_of(source)))


def _embedding(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    return _gathered(reader, args["weight"], [reader.at(args["indices"], index[:-1]), Int(index[-1])])


def _index_select(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    dim = args["dim"] % len(index)
    places: list[Expr] = [Int(i) for i in index]
    places[dim] = reader.at(args["index"], (index[dim],))
    return _gathered(reader, args["self"], places)


def _gather(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    dim = args["dim"] % len(index)
    places: list[Expr] = [Int(i) for i in index]
    places[dim] = reader.at(args["index"], index)
    return _gathered(reader, args["self"], places)


def _index(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """Advanced indexing: the index tensors broadcast together and stand where the first of them stood."""
    picks = list(args["indices"])
    tensors = [p for p in picks if p is not None]
    if any(not is_tensor(p) or kind_of(dtype_of(p)) != "int" for p in tensors):
        raise Unknown("indexing by truth values")
    used = [d for d, p in enumerate(picks) if p is not None]
    rank = max(len(shape_of(p)) for p in tensors)
    first = used[0] if used == list(range(used[0], used[0] + len(used))) else 0
    picked, rest = index[first : first + rank], iter((*index[:first], *index[first + rank :]))
    places: list[Expr] = []
    for dim in range(len(shape_of(args["self"]))):
        if dim in used:
            pick = picks[dim]
            places.append(_wrapped(reader.at(pick, broadcast(picked, shape_of(pick))), shape_of(args["self"])[dim]))
        else:
            places.append(Int(next(rest)))
    return _gathered(reader, args["self"], places)


def _wrapped(place: Expr, size: sp.Expr) -> Expr:
    """A negative position counts from the end."""
    return where(op("lt", place, integer(0)), op("add", place, Int(size)), place)


# ----------------------------------------------------------------------------------------------------- contractions


def _dropout(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """Dropout that drops: looked into only if it drops attention weights. Others are there, as tensors."""
    p = args["p"] if dropout.draws(node) else 0.0
    if not reader.weighs(node) or not isinstance(p, (int, float)):
        raise Unknown("random numbers")
    source = args["input" if "input" in args else "self"]
    value = reader.at(source, index)
    if p == 0:
        return value
    seed = dropout.Seed(node, reader.whole(node))
    return op("mul", value, dropout.factor(seed, float(p), index, shape_of(source)))


def _matmul(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """``lhs[..., i, r] * rhs[..., r, j]`` summed over r; batch dimensions broadcast, vectors lack a dimension."""
    left = args["self"]
    right = next(args[name] for name in ("other", "mat2", "vec", "tensor") if name in args)
    left_shape, right_shape = shape_of(left), shape_of(right)
    axis = reader.bound(node, left_shape[-1])
    batch = len(index) - (len(left_shape) > 1) - (len(right_shape) > 1)
    lead = index[:batch]
    left_index = broadcast((*lead, index[batch], axis) if len(left_shape) > 1 else (axis,), left_shape)
    right_index = broadcast((*lead, axis, index[-1]) if len(right_shape) > 1 else (axis,), right_shape)
    return reader.dot(node, (left, left_index), (right, right_index), axis)


def _matmul_plus(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """``beta * self + alpha * (batch1 @ batch2)``."""
    left, right = (args[names[0] if names[0] in args else names[1]] for names in (("batch1", "mat1"), ("batch2", "mat2")))
    axis = reader.bound(node, shape_of(left)[-1])
    product = reader.dot(node, (left, (*index[:-1], axis)), (right, (*index[:-2], axis, index[-1])), axis)
    scaled = op("mul", product, to_float(reader.operand(args["alpha"], ())))
    if args["beta"] == 0:
        return scaled
    added = op("mul", reader.operand(args["self"], index), to_float(reader.operand(args["beta"], ())))
    return op("add", added, scaled)


def _linear(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    axis = reader.bound(node, shape_of(args["weight"])[-1])
    product = reader.dot(node, (args["input"], (*index[:-1], axis)), (args["weight"], (index[-1], axis)), axis)
    return product if args["bias"] is None else op("add", product, reader.operand(args["bias"], (index[-1],)))


def _vecdot(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """Of real numbers, which alone are scores: ``(x * y).sum(dim)``."""
    left, right = args["x"], args["y"]
    rank = len(index) + 1
    dim = args["dim"] % rank
    axis = reader.bound(node, shape_of(left)[dim - rank])
    whole = (*index[:dim], axis, *index[dim:])
    places = (broadcast(whole, shape_of(side)) for side in (left, right))
    return reader.dot(node, (left, next(places)), (right, next(places)), axis)


VALUES: dict[str, Row] = {
    **REDUCTIONS,
    "arange": _arange,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _filled(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor"), _full),
    "fill": lambda reader, node, args, index: _full(reader, node, Bound(fill_value=args["value"]), index),
    "tril": _triangle("tril"),
    "triu": _triangle("triu"),
    "eye": _eye,
    "cumsum": _cumsum,
    "cat": _cat,
    "concat": _cat,
    "stack": _stack,
    "constant_pad_nd": _pad,
    "embedding": _embedding,
    "index_select": _index_select,
    "gather": _gather,
    "index": _index,
    "dropout": _dropout,
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("baddbmm", "addmm"), _matmul_plus),
    "linear": _linear,
    "linalg_vecdot": _vecdot,
}

PART_VALUES: dict[tuple[str, int], Row] = {("max", 0): REDUCTIONS["amax"], ("native_dropout", 0): _dropout}

CONTRACTIONS = frozenset(["matmul", "bmm", "mm", "baddbmm", "addmm", "linear", "sum", "einsum", "tensordot"])
CONTRACTIONS |= frozenset(["linalg_vecdot", "scaled_dot_product_attention"])


def is_contraction(node: fx.Node) -> bool:
    """Might this node compute a sum of products of two tensors?"""
    return op_name(node) in CONTRACTIONS and isinstance(node.meta.get("val"), torch.Tensor)

