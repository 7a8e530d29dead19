"""What random graphs do between the two products: arithmetic on scores, biases, masks, and normalisers right and wrong."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from fuzz_writer import Node, Writer
from torch.nn import functional as F

Shape = tuple[int, ...]
Step = Callable[[Writer, Node], Node]


def score_step(g: Writer, s: Node, *, tame: bool, mild: bool) -> Node:
    """One thing that a program does to its scores; ``tame``: no huge fills, ``mild``: no scales that saturate it."""
    kinds = [_scaled, _biased, _masked, _masked, _masked, _by_distance, _pointwise, _viewed, _cast, _odd]
    kind = g.draw.one(kinds)
    if kind in (_scaled, _masked):
        return kind(g, s, mild if kind is _scaled else tame)
    return kind(g, s)


def varying(g: Writer, shape: Shape) -> Shape:
    """A random shape that broadcasts to ``shape``."""
    sizes = [size if g.draw.chance(60) else 1 for size in shape]
    while sizes and sizes[0] == 1 and g.draw.chance(60):
        del sizes[0]
    return tuple(sizes)


# ------------------------------------------------------------------------------------------------------- arithmetic


def _scaled(g: Writer, s: Node, mild: bool) -> Node:
    way = g.draw.below(7)
    number = g.draw.one([0.25, 0.125, 1 / 3, 1.0, -1.0, 0.0] + ([] if mild else [1e-4, 30.0, 1e3]))
    if way == 0:
        return g(operator.mul, s, number)
    if way == 1:
        return g(operator.truediv, s, number or 2.0)
    if way == 2:
        return g("mul_", s, number) if g.dtype(s).is_floating_point else s
    if way == 3:
        return g(operator.mul, s, g.normal(dtype=g.dtype(s)))
    if way == 4:
        return g(operator.truediv, s, g(operator.add, g("abs", g.normal(*varying(g, g.shape(s)), dtype=g.dtype(s))), 0.5))
    if way == 5:
        return g(operator.mul, number, s)
    return g(operator.mul, s, g.normal(*varying(g, g.shape(s)), dtype=g.dtype(s)))


def _biased(g: Writer, s: Node) -> Node:
    if len(g.shape(s)) > 2 and g.shape(s)[0] % 2 == 0 and g.draw.chance(12):
        return _per_window(g, s)
    dtype = torch.float32 if g.draw.chance(10) else g.dtype(s)
    bias = g.normal(*varying(g, g.shape(s)), dtype=dtype)
    way = g.draw.below(5)
    if way == 3 and g.dtype(s) == dtype:
        return g("add_", s, bias)
    if way == 4:
        return g(operator.sub, bias, s)
    return g(operator.add, s, bias) if way != 1 else g(operator.sub, s, bias)


def _per_window(g: Writer, s: Node) -> Node:
    """Swin's: windows are counted in the batch, and have masks of their own."""
    batch, *rest = g.shape(s)
    ones = [1] * (len(rest) - 2)
    apart = g("view", s, batch // 2, 2, *rest)
    own = g.normal(2, *ones, *rest[-2:], dtype=g.dtype(s))
    return g("view", g(operator.add, apart, g("unsqueeze", own, 0)), batch, *rest)


def _by_distance(g: Writer, s: Node) -> Node:
    """ALiBi and its kin, and tables looked up by distance."""
    shape = g.shape(s)
    i, j = positions(g, shape)
    distance = g(operator.sub, j, i)
    way = g.draw.below(4)
    if way >= 2:
        reach = g.draw.one([2, 5])
        place = g(operator.add, g("clamp", distance, -reach, reach), reach)
        if way == 2 or len(shape) < 3:
            return g(operator.add, s, g.part(g.normal(2 * reach + 1, dtype=g.dtype(s)), place))
        table = g(F.embedding, place, g.normal(2 * reach + 1, shape[-3], dtype=g.dtype(s)))
        return g(operator.add, s, g("permute", table, 2, 0, 1))
    distance = distance if way == 0 else g("neg", g("abs", distance))
    slope = 0.5 if len(shape) < 3 else g.normal(shape[-3], 1, 1, dtype=g.dtype(s))
    return g(operator.add, s, g(operator.mul, slope, distance))


def _pointwise(g: Writer, s: Node) -> Node:
    steps: list[Step] = [
        lambda g, s: g(operator.mul, g("tanh", g(operator.truediv, s, 5.0)), 5.0),
        lambda g, s: g(torch.tanh, s),
        lambda g, s: g("clamp", s, -2, 2),
        lambda g, s: g("clamp", s, min=-1.5),
        lambda g, s: g("abs", s),
        lambda g, s: g(F.relu, s),
        lambda g, s: g("sigmoid", s),
        lambda g, s: g("neg", s),
        lambda g, s: g(operator.add, s, 1.5),
        lambda g, s: g("add_", s, -2.5),
        lambda g, s: g("floor", s),
        lambda g, s: g(F.gelu, s),
        lambda g, s: g(torch.square, g("clamp", s, -3, 3)),
        lambda g, s: g(F.dropout, s, 0.1, False),
        lambda g, s: g(operator.add, s, s),
        lambda g, s: g("masked_fill", s, g(operator.gt, s, 1.0), 0.5),
        lambda g, s: g(torch.where, g(operator.gt, s, 0), s, g(operator.mul, s, 0.1)),
    ]
    changed: Node = g.draw.one(steps)(g, s)
    return changed


def _viewed(g: Writer, s: Node) -> Node:
    shape = g.shape(s)
    back: Step = lambda g, s: g("view", s, *shape)  # noqa: E731
    steps: list[Step] = [
        lambda g, s: back(g, g("reshape", s, -1, *shape[-2:])),
        lambda g, s: g("squeeze", g("unsqueeze", s, 0), 0),
        lambda g, s: g("contiguous", s),
        lambda g, s: g("clone", s),
        lambda g, s: g("transpose", g("contiguous", g("transpose", s, -1, -2)), -1, -2),
        lambda g, s: g("reshape", g("flatten", s), *shape),
        lambda g, s: g(torch.cat, [g.part(s, ..., slice(0, 1)), g.part(s, ..., slice(1, None))], -1),
        lambda g, s: g("expand", s, *shape),
    ]
    seen: Node = g.draw.one(steps)(g, s)
    return seen


def _cast(g: Writer, s: Node) -> Node:
    way = g.draw.below(4)
    if way == 3:
        return g("to", s, g.draw.one(g.half))
    return g("float", s) if way == 0 else g("to", s, torch.float32) if way == 1 else g("type", s, torch.float32)


def _odd(g: Writer, s: Node) -> Node:
    """No kernel computes these, or they mean something else than they seem to."""
    steps: list[Step] = [
        lambda g, s: g(operator.add, s, g("mean", s)),
        lambda g, s: g(operator.sub, s, g("amax", s, -1, keepdim=True)),
        lambda g, s: g(operator.sub, s, g("amax", s, -2, keepdim=True)),
        lambda g, s: g("flip", s, -1),
        lambda g, s: g("roll", s, 1, -2),
        lambda g, s: g("cumsum", s, -1),
        lambda g, s: g("softmax", s, -1),
        lambda g, s: g(F.layer_norm, s, g.shape(s)[-1:]),
        lambda g, s: g("tril", s),
        lambda g, s: g("reshape", g("transpose", s, -1, -2), *g.shape(s)),
        lambda g, s: g("reshape", g("transpose", s, 0, -2), *g.shape(s)),
        lambda g, s: g.part(g(F.pad, s, (1, 0)), ..., slice(0, -1)),
        lambda g, s: g("sub", s, g("detach", s)),
        lambda g, s: g("detach", s),
    ]
    changed: Node = g.draw.one(steps)(g, s)
    return changed


# ------------------------------------------------------------------------------------------------------------- masks


def positions(g: Writer, shape: Shape) -> tuple[Node, Node]:
    """Rows [N, 1] and keys [M] or [1, M]; rows may be counted from the end of the keys."""
    rows, keys = shape[-2:]
    first = keys - rows if g.draw.chance(30) else 0
    i = g("unsqueeze", g(torch.arange, first, first + rows), -1)
    j = g(torch.arange, keys)
    return i, g.part(j, None, slice(None)) if g.draw.chance(50) else j


def truth(g: Writer, shape: Shape, depth: int = 2) -> Node:
    """A Boolean that broadcasts to ``shape``, from positions, data and connectives."""
    if depth and g.draw.chance(40):
        left, right = (truth(g, shape, depth - 1) for _ in "lr")
        return g(g.draw.one([operator.and_, operator.or_, operator.xor]), left, right)
    if depth and g.draw.chance(15):
        return g(operator.invert, truth(g, shape, depth - 1))
    return _data(g, shape) if g.draw.chance(35) else _positional(g, shape)


def _positional(g: Writer, shape: Shape) -> Node:
    rows, keys = shape[-2:]
    way = g.draw.below(10)
    if way in (8, 9):
        ones = g(torch.ones, rows, keys, dtype=torch.bool)
        return g(g.draw.one(["tril", "triu"]), ones, g.draw.one([0, 1, -1, 3]))
    i, j = positions(g, shape)
    size = g.draw.one([2, 3, 1, 5])
    atoms: list[Callable[[], Node]] = [
        lambda: g(operator.le, j, i),
        lambda: g(operator.lt, g(operator.sub, i, j), size),
        lambda: g(operator.ge, j, size),
        lambda: g(operator.eq, g(operator.floordiv, i, size), g(operator.floordiv, j, size)),
        lambda: g(operator.eq, g(operator.mod, g(operator.sub, i, j), size), 0),
        lambda: g(operator.gt, g("abs", g(operator.sub, j, i)), size),
        lambda: g(operator.ne, i, j),
        lambda: g(operator.ge, g(operator.add, i, 0), g.draw.one([0, 2])),
    ]
    atom: Node = atoms[way]()
    return atom


def _data(g: Writer, shape: Shape) -> Node:
    rows, keys = shape[-2:]
    own = shape[0] if len(shape) > 2 else 1
    ones = [1] * (len(shape) - 3)
    way = g.draw.below(5)
    if way == 0:
        return g.truth(*varying(g, shape), share=g.draw.one([0.7, 0.3, 0.0, 1.0]))
    if way == 1:  # lengths
        lengths = g("view", g.whole(own, below=keys + 1), own, *ones, 1, 1) if len(shape) > 2 else g.whole(1, below=keys)
        return g(operator.lt, g(torch.arange, keys), lengths)
    if way == 2 and rows == keys:  # documents
        ids = g.whole(own, keys, below=3)
        same = g(operator.eq, g("unsqueeze", ids, -1), g("unsqueeze", ids, -2))
        return g("view", same, own, *ones, rows, keys) if len(shape) > 2 else g.part(same, 0)
    if way == 3:  # padding, as ones and zeros
        marks = g.whole(*([own, *ones, 1] if len(shape) > 2 else []), keys, below=2)
        return g(operator.ne, marks, 0) if g.draw.chance(50) else g("bool", marks)
    return g(operator.gt, g.normal(*varying(g, shape), dtype=torch.float32), 0.3)


def _fill(g: Writer, dtype: torch.dtype, tame: bool) -> float:
    fills = [-math.inf, -5.0, 0.0, 3.0]
    if not tame:
        fills += [torch.finfo(dtype).min] * 2 + [-1e4] + ([] if dtype == torch.float16 else [-1e9, -1e9, -1e30])
    fill: float = g.draw.one(fills)
    return fill


def _masked(g: Writer, s: Node, tame: bool) -> Node:
    kept, dtype = truth(g, g.shape(s)), g.dtype(s)
    fill = _fill(g, dtype, tame)
    removed = g(g.draw.one([operator.invert, torch.logical_not]), kept)
    zeros: Callable[[], Node] = lambda: g(torch.zeros, *g.shape(s)[-2:], dtype=dtype)  # noqa: E731
    finite = fill if math.isfinite(fill) else -5.0
    ways: list[Callable[[], Node]] = [
        lambda: g("masked_fill", s, removed, fill),
        lambda: g(torch.where, kept, s, fill),
        lambda: g(operator.add, s, g("masked_fill", g(torch.zeros, g.shape(removed), dtype=dtype), removed, fill)),
        lambda: g(operator.add, s, g(torch.where, kept, 0.0, g(torch.full, (), fill, dtype=dtype))),
        lambda: g(operator.add, s, g(operator.mul, g("to", removed, dtype), finite)),
        lambda: g(operator.add, s, g(operator.mul, g(operator.sub, 1.0, g("to", kept, dtype)), finite)),
        lambda: g("masked_fill_", s, removed, fill),
        lambda: g("masked_fill", s, kept, fill),
        lambda: g(torch.where, removed, g(torch.full, (), fill, dtype=dtype), s),
        lambda: g(operator.mul, s, g("to", kept, dtype)),
        lambda: g(operator.add, s, g(torch.triu, g(torch.full_like, zeros(), fill), 1)),
        lambda: g("masked_fill", s, g(operator.eq, g("to", kept, dtype), 0), fill),
        lambda: g(operator.add, s, kept),
        lambda: g("maximum", s, g(torch.where, kept, torch.finfo(dtype).min, fill if math.isfinite(fill) else -5.0)),
    ]
    masked: Node = g.draw.one(ways)()
    return masked


# -------------------------------------------------------------------------------------------------------- normalisers


def normalised(g: Writer, s: Node, *, unshifted: bool) -> Node:
    """Weights of ``s``; ``unshifted``: by exponentials of the scores as they are."""
    weights: Node = (_unshifted if unshifted else g.draw.one([_library] * 5 + [_by_hand] * 3 + [_sinks, _no_softmax]))(g, s)
    if g.draw.chance(8):
        weights = g(F.dropout, weights, *g.draw.one([(0.3, False), (0.0, True)]))
    if g.draw.chance(4):
        weights = g.draw.one([
            lambda: g(operator.mul, weights, 2),
            lambda: g("masked_fill", weights, truth(g, g.shape(weights)), 0.0),
            lambda: g("nan_to_num", weights),
            lambda: g("contiguous", weights),
            lambda: g("mul_", weights, 0.5),
        ])()  # fmt: skip
    return weights


def _dim(g: Writer, s: Node) -> int:
    """The last, unless it is wrong on purpose."""
    rank = len(g.shape(s))
    dim: int = g.draw.one([-1] * 18 + [-2, 0])
    return rank + dim if g.draw.chance(30) and dim < 0 else dim


def _library(g: Writer, s: Node) -> Node:
    dim, dtype = _dim(g, s), g.dtype(s)
    way = g.draw.below(6)
    if way == 1:
        return g("softmax", s, dim)
    if way == 2:
        return g("to", g(F.softmax, s, dim=dim, dtype=torch.float32), dtype)
    if way == 3:
        return g("to", g("softmax", g("float", s), dim=dim), dtype)
    if way == 4:
        return g("exp", g(g.draw.one([F.log_softmax, torch.log_softmax]), s, dim))
    if way == 5:
        return g(F.softmax, s, dim=dim, dtype=torch.float32)
    return g(torch.softmax, s, dim)


def _by_hand(g: Writer, s: Node) -> Node:
    dim = _dim(g, s)
    way = g.draw.below(3)
    largest = g("amax", s, dim, keepdim=True) if way else g.part(g("max", s, dim, keepdim=True), 0)
    largest = g("detach", largest) if way == 2 else largest
    powers = g(torch.exp, g(operator.sub, s, largest))
    return _over_sum(g, powers, _dim(g, s) if g.draw.chance(5) else dim)


def _over_sum(g: Writer, powers: Node, dim: int) -> Node:
    below = g("sum", powers, dim, keepdim=True)
    extra = g.draw.one([None] * 8 + [1e-6, 1.0])
    below = below if extra is None else g(operator.add, below, extra)
    return g(operator.truediv, powers, below)


def _unshifted(g: Writer, s: Node) -> Node:
    """Where all scores of a row are hugely negative, these are no softmax: 0 / 0, or exp(0) for each."""
    dim = _dim(g, s)
    way = g.draw.below(4)
    if way == 1:
        return g("exp", g(operator.sub, s, g(torch.logsumexp, s, dim, keepdim=True)))
    powers = g("exp2", g(operator.mul, s, 1.4426950408889634)) if way == 2 else g("exp", s)
    return _over_sum(g, powers, dim)


def _sinks(g: Writer, s: Node) -> Node:
    """Columns joined to the scores, and cut off again."""
    shape = g.shape(s)
    wide = g.draw.one([1, 2])
    column = g("expand", g.normal(*varying(g, shape[:-2]), 1, wide, dtype=g.dtype(s)), *shape[:-1], wide)
    if g.draw.chance(30):
        joined = g(torch.cat, [column, s], -1)
        return g.part(g(torch.softmax, joined, -1), ..., slice(wide, None))
    weights = g("softmax", g(torch.cat, [s, column], dim=-1), dim=-1)
    return g.part(weights, ..., slice(0, g.draw.one([shape[-1]])))


def _no_softmax(g: Writer, s: Node) -> Node:
    steps: list[Step] = [
        lambda g, s: g(torch.sigmoid, s),
        lambda g, s: g(torch.square, g(F.relu, s)),
        lambda g, s: s,
        lambda g, s: g(F.normalize, g("exp", g("clamp", s, -9, 9)), 1.0, -1),
        lambda g, s: g(F.log_softmax, s, -1),
        lambda g, s: g("softmax", g("softmax", s, -1), -1),
    ]
    weights: Node = g.draw.one(steps)(g, s)
    return weights
