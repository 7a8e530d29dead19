"""Rows for operators that only rearrange: where the element at an index of the result is read in the source."""

from __future__ import annotations

from collections.abc import Callable

import sympy as sp
from torch import fx

from attngen import compat
from attngen.index import ONE, ZERO, floordiv, modulo, recombine, reshape
from attngen.passes.semantics import (
    Bound,
    Index,
    Reader,
    Unknown,
    ViewRow,
    broadcast,
    coarsens,
    dtype_of,
    is_tensor,
    kind_of,
    shape_of,
    size_arg,
)

Part = Callable[[Reader, fx.Node, Bound, Index, int], "tuple[fx.Node, Index]"]


def _regrouped(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    """Reshape in any spelling: same elements in the same order."""
    source = args["self"]
    return source, reshape(index, shape_of(node), shape_of(source))


def _same_place(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    """A copy, or a cast that keeps numbers numbers and truth values truth values."""
    source = args["self"]
    if kind_of(dtype_of(source)) != kind_of(dtype_of(node)) or coarsens(source, node):
        raise Unknown("a cast that changes values")
    return source, index


def _inert_dropout(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    if args["train"] and args["p"] != 0:
        raise Unknown("dropout in training")
    return args["input" if "input" in args else "self"], index  # it may be told to work in place


def _expand(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    return args["self"], broadcast(index, shape_of(args["self"]))


def _permuted(order: Callable[[Bound, int], list[int]]) -> ViewRow:
    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
        dims = order(args, len(index))
        return args["self"], tuple(index[dims.index(d)] for d in range(len(index)))

    return row


def _swap(first: int, second: int, rank: int) -> list[int]:
    dims = list(range(rank))
    if rank:
        dims[first], dims[second] = dims[second], dims[first]
    return dims


def _select(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    source = args["self"]
    shape = shape_of(source)
    dim = args["dim"] % len(shape)
    place = size_arg(args["index"])
    if place.is_negative:
        place = place + shape[dim]
    elif not place.is_nonnegative:
        raise Unknown("a position of unknown sign")
    return source, (*index[:dim], place, *index[dim:])


def _diagonal(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    """Its places are counted in a last dimension, from the first on that is inside."""
    source, offset = args["self"], size_arg(args["offset"])
    if not offset.is_Integer:
        raise Unknown("a diagonal somewhere")
    rank = len(shape_of(source))
    along = {args["dim1"] % rank: index[-1] - sp.Min(offset, 0), args["dim2"] % rank: index[-1] + sp.Max(offset, 0)}
    rest = iter(index[:-1])
    return source, tuple(along[dim] if dim in along else next(rest) for dim in range(rank))


def _slice(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    source = args["self"]
    shape = shape_of(source)
    dim = args["dim"] % len(shape)
    start = ZERO if args["start"] is None else _clamped_start(size_arg(args["start"]), shape[dim])
    place = start + size_arg(args["step"]) * index[dim]
    return source, (*index[:dim], place, *index[dim + 1 :])


def _clamped_start(start: sp.Expr, size: sp.Expr) -> sp.Expr:
    if start.is_negative:
        start = sp.Max(size + start, 0) if not (size + start).is_nonnegative else size + start
    elif not start.is_nonnegative:
        raise Unknown("a slice start of unknown sign")
    return start if (size - start).is_nonnegative else sp.Min(start, size)


def _narrow(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    return _slice(reader, node, Bound(args, step=1), index)


def _unfold(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    """Windows of some size along a dimension, one every few steps; places within one are counted in a last dimension."""
    dim = args["dimension"] % len(shape_of(args["self"]))
    place = index[dim] * size_arg(args["step"]) + index[-1]
    return args["self"], (*index[:dim], place, *index[dim + 1 : -1])


def _as_strided(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    """Memory seen with other strides: where its source, without gaps or overlaps of its own, holds what lies there."""
    source = args["self"]
    held, shown = source.meta["val"], node.meta["val"]
    offset = args["storage_offset"]
    start = ZERO if offset is None else size_arg(offset) - compat.size_expr(held.storage_offset())
    strides = [compat.size_expr(stride) for stride in shown.stride()]
    last = start + sum((stride * (size - 1) for stride, size in zip(strides, shape_of(node), strict=True)), ZERO)
    if not start.is_nonnegative or not sp.expand(sp.Mul(*shape_of(source)) - 1 - last).is_nonnegative:
        raise Unknown("memory beyond that of the tensor")
    flat = recombine(start + sum((stride * place for stride, place in zip(strides, index, strict=True)), ZERO))
    places, below, dimensions = [ZERO] * len(shape_of(source)), ONE, sorted(_dimensions(source))
    for stride, size, dim in dimensions:
        if stride != below:
            raise Unknown("a tensor with gaps")
        places[dim] = flat if dim == dimensions[-1][2] else modulo(flat, size)
        flat, below = floordiv(flat, size), stride * size
    return source, tuple(places)


def _dimensions(node: fx.Node) -> list[tuple[int, sp.Expr, int]]:
    """Stride, size and number of each dimension that is not of size one."""
    strides = [compat.size_expr(stride) for stride in node.meta["val"].stride()]
    if not all(stride.is_Integer for stride in strides):
        raise Unknown("strides that change from call to call")
    return [(int(t), n, dim) for dim, (t, n) in enumerate(zip(strides, shape_of(node), strict=True)) if n != 1]


def _repeat(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    shape, repeated = shape_of(args["self"]), shape_of(node)
    skip = len(index) - len(shape)
    places = zip(index[skip:], shape, repeated[skip:], strict=True)
    return args["self"], tuple(ZERO if s == 1 else i if s == whole else modulo(i, s) for i, s, whole in places)


def _repeat_interleave(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    if is_tensor(args["repeats"]) or args["dim"] is None:
        raise Unknown("uneven repeats")
    dim = args["dim"] % len(index)
    return args["self"], (*index[:dim], floordiv(index[dim], size_arg(args["repeats"])), *index[dim + 1 :])


def _flip(reader: Reader, node: fx.Node, args: Bound, index: Index) -> tuple[fx.Node, Index]:
    shape = shape_of(node)
    dims = {d % len(shape) for d in args["dims"]}
    return args["self"], tuple(s - 1 - i if d in dims else i for d, (i, s) in enumerate(zip(index, shape, strict=True)))


def _split(reader: Reader, node: fx.Node, args: Bound, index: Index, part: int) -> tuple[fx.Node, Index]:
    """The parts of a split lie one after another; their sizes are in the metadata."""
    parts = node.meta["val"]
    dim = args["dim"] % len(index)
    start = sum((compat.size_expr(p.shape[dim]) for p in parts[:part]), ZERO)
    return args["self"], (*index[:dim], start + index[dim], *index[dim + 1 :])


def _unbind(reader: Reader, node: fx.Node, args: Bound, index: Index, part: int) -> tuple[fx.Node, Index]:
    dim = args["dim"] % (len(index) + 1)
    return args["self"], (*index[:dim], sp.Integer(part), *index[dim:])


RESHAPES = ("view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze")
_COPIES = ("clone", "contiguous", "alias", "detach", "to", "_to_copy", "type_as", "lift_fresh", "lift_fresh_copy")

VIEWS: dict[str, ViewRow] = {
    **dict.fromkeys(RESHAPES, _regrouped),
    **dict.fromkeys(_COPIES, _same_place),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _permuted(lambda a, n: _swap(*_pair(a), n))),
    **dict.fromkeys(("t", "mT", "adjoint"), _permuted(lambda a, n: _swap(-2, -1, n) if n > 1 else [0])),
    "numpy_T": _permuted(lambda a, n: list(range(n))[::-1]),
    "permute": _permuted(lambda a, n: [d % n for d in a["dims"]]),
    "dropout": _inert_dropout,
    "select": _select,
    "diagonal": _diagonal,
    "slice": _slice,
    "narrow": _narrow,
    "unfold": _unfold,
    "as_strided": _as_strided,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "flip": _flip,
}


def _pair(args: Bound) -> tuple[int, int]:
    return args.get("dim0", args.get("axis0")), args.get("dim1", args.get("axis1"))  # type: ignore[return-value]


PARTS: dict[str, Part] = {
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "tensor_split": _split,
    "unbind": _unbind,
}

# Views that never move data: what they read from can be passed on as a strided tensor.
FREE = frozenset([*RESHAPES[:2], "as_strided", "squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "t", "mT"])
FREE |= frozenset(["permute", "alias", "detach", "select", "diagonal", "slice", "narrow", "unfold", "unflatten", "view_as"])
