"""Rows for operators that sum over a dimension, or take the largest: softmax and its relatives among them.

Over a few tensors that were stacked for it, sums and maxima are written out: ``sum(stack([x, y]), 0) --> x + y``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import sympy as sp
from torch import fx

from attngen.algebra import Expr, Reduce, op, to_float
from attngen.index import Axis
from attngen.passes.pointwise import POINTWISE
from attngen.passes.semantics import (
    Bound,
    Index,
    Reader,
    Row,
    Unknown,
    bind,
    broadcast,
    dtype_of,
    is_tensor,
    kind_of,
    op_name,
    shape_of,
)


def _over(reader: Reader, node: fx.Node, args: Bound, index: Index, source: fx.Node) -> tuple[Axis, Index]:
    """A fresh axis in place of the reduced dimension, and the source index that contains it."""
    dims = args["dim"]
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    shape = shape_of(source)
    if len(dims) != 1 or dims[0] is None:
        raise Unknown("a reduction over several dimensions")
    dim = dims[0] % len(shape)
    axis = reader.bound(node, shape[dim])
    kept = index[dim + 1 :] if len(index) == len(shape) else index[dim:]
    return axis, (*index[:dim], axis, *kept)


def _softmax(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """``exp(x) / sum(exp(x))``; the library's shift by the maximum cancels."""
    return op("div", *_exp_and_sum(reader, node, args, index))


def _safe_softmax(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """softmax, but zero instead of NaN in a row that is -inf throughout."""
    return op("div_or_zero", *_exp_and_sum(reader, node, args, index))


def _exp_and_sum(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[Expr, Expr]:
    source = args["self"]
    axis, inner = _over(reader, node, Bound(dim=args["dim"]), index, source)
    return _power(reader.at(source, index)), _reduced(reader, "sum", axis, source, inner, _power)


def _log_softmax(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    axis, inner = _over(reader, node, Bound(dim=args["dim"]), index, args["self"])
    denominator = _reduced(reader, "sum", axis, args["self"], inner, _power)
    return op("sub", to_float(reader.at(args["self"], index)), op("log", denominator))


def _logsumexp(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    axis, inner = _over(reader, node, args, index, args["self"])
    return op("log", _reduced(reader, "sum", axis, args["self"], inner, _power))


def _power(value: Expr) -> Expr:
    return op("exp", to_float(value))


def _sum(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """A sum; the sum of a product of two tensors is a contraction."""
    source = args["self"]
    axis, inner = _over(reader, node, args, index, source)
    kept: Callable[[Expr], Expr] = to_float if kind_of(dtype_of(node)) == "float" else lambda value: value
    if _is_stack(reader, source, inner.index(axis)):
        return _reduced(reader, "sum", axis, source, inner, kept)
    if (product := _product(reader, source, inner)) is not None:
        (left, left_index), (right, right_index) = product
        here, there = _symbols(left_index), _symbols(right_index)
        masked = (reader.level(left) >= 2 and there <= here) or (reader.level(right) >= 2 and here <= there)  # no features
        if axis in here and axis in there and not masked:
            return reader.dot(node, (left, left_index), (right, right_index), axis)
    return Reduce("sum", axis, kept(reader.at(source, inner)))


def _product(reader: Reader, node: fx.Node, index: Index) -> tuple[tuple[fx.Node, Index], tuple[fx.Node, Index]] | None:
    if op_name(node) != "mul":
        return None
    args = bind(node)
    left, right = args["self"], args["other"]
    if not (is_tensor(left) and is_tensor(right)):
        return None
    return _unrepeated(left, index), _unrepeated(right, index)


def _unrepeated(node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    """Where ``node`` has its element before it is repeated: along what is repeated, the place does not move."""
    index = broadcast(index, shape_of(node))
    while op_name(node) == "expand":
        node = bind(node)["self"]  # sizes may be nodes, too
        index = broadcast(index, shape_of(node))
    return node, index


def _symbols(index: Index) -> set[sp.Basic]:
    return set().union(*(place.free_symbols for place in index))


def _max(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    axis, inner = _over(reader, node, args, index, args["self"])
    return _reduced(reader, "max", axis, args["self"], inner, to_float)


REDUCTIONS: dict[str, Row] = {
    **dict.fromkeys(("softmax", "_softmax", "special_softmax"), _softmax),
    "_safe_softmax": _safe_softmax,
    **dict.fromkeys(("log_softmax", "_log_softmax"), _log_softmax),
    "logsumexp": _logsumexp,
    "sum": _sum,
    "amax": _max,
}


# -------------------------------------------------------------------------------------------------------------- stacks

_MOST = 16  # tensors
_STEPS = 8  # from the reduction up to the stack


def _reduced(reader: Reader, name: str, axis: Axis, source: fx.Node, inner: Index, of: Callable[[Expr], Expr]) -> Expr:
    """The sum or maximum of ``of`` the elements of ``source`` at ``inner``, over ``axis``."""
    dim = inner.index(axis)
    if not _is_stack(reader, source, dim):
        return Reduce(name, axis, of(reader.at(source, inner)))
    places = ((*inner[:dim], sp.Integer(n), *inner[dim + 1 :]) for n in range(int(axis.extent)))
    return reduce(partial(op, {"sum": "add"}.get(name, name)), (of(reader.at(source, place)) for place in places))


def _is_stack(reader: Reader, node: fx.Node, dim: int, steps: int = _STEPS) -> bool:
    """Along ``dim`` there are a few tensors made of products, or what was computed of them element by element."""
    node = reader.resolve(node)
    if steps == 0 or node.op != "call_function" or reader.is_stale(node):
        return False
    size, rank, name = shape_of(node)[dim], len(shape_of(node)), op_name(node)
    if not (size.is_Integer and 1 < size <= _MOST and reader.level(node)):
        return False
    if name == "stack":
        return bool(bind(node)["dim"] % rank == dim)
    if name in ("cat", "concat"):
        along = bind(node)["dim"] % rank == dim
        return bool(along and all(shape_of(part)[dim] == 1 for part in bind(node)["tensors"]))
    if name == "unsqueeze":
        new = bind(node)["dim"] % rank
        return new != dim and _is_stack(reader, bind(node)["self"], dim - (new < dim), steps - 1)
    below = [n for n in node.all_input_nodes if is_tensor(n) and len(shape_of(n)) == rank and shape_of(n)[dim] == size]
    return name in POINTWISE and any(_is_stack(reader, n, dim, steps - 1) for n in below)
