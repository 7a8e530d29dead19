"""What a spec asks of any kernel, counted: operations per pair, elements of each input, key blocks per query tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import sympy as sp

from attngen.algebra import TRUE, Expr, Int, Load, Op, number
from attngen.compat import FloorDiv
from attngen.index import Axis
from attngen.mask import FIRST, LAST, Cover, Interval
from attngen.spec import FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input, Problem

Value = Any  # a number, or an array with one per candidate or query tile


def evaluate(expr: sp.Expr, at: Mapping[sp.Symbol, Value]) -> Value:
    """The value of arithmetic over the symbols of ``at``; KeyError if one is missing."""
    if expr.is_Symbol:
        return at[expr]
    if expr.is_Integer:
        return int(expr)
    if expr.is_number:
        return float(expr)
    args = [evaluate(a, at) for a in expr.args]
    return reduce(_ARITHMETIC[expr.func], args) if len(args) > 1 else _ARITHMETIC[expr.func](args[0])


_ARITHMETIC: dict[Any, Any] = {
    sp.Add: lambda a, b: a + b,
    sp.Mul: lambda a, b: a * b,
    sp.Pow: lambda a, b: np.asarray(a, float) ** b,
    sp.Max: np.maximum,
    sp.Min: np.minimum,
    sp.Mod: lambda a, b: a % b,
    sp.Abs: abs,
    sp.ceiling: np.ceil,
    sp.floor: np.floor,
    FloorDiv: lambda a, b: a // b,
}


# ---------------------------------------------------------------------------------------------------------- operations

# Instructions (arithmetic, special function) for one value. What is not listed is one arithmetic instruction.
_INSTRUCTIONS: dict[str, tuple[int, int]] = {
    "exp": (1, 1),
    "exp2": (0, 1),
    "log": (1, 1),
    "log2": (0, 1),
    "sqrt": (2, 1),
    "rsqrt": (0, 1),
    "tanh": (0, 1),
    "sigmoid": (3, 2),
    "div": (6, 1),
    "sin": (12, 0),
    "cos": (12, 0),
    "erf": (14, 1),
    "pow": (4, 2),
    "drown": (3, 0),
    "float": (0, 1),  # conversions run at the rate of special functions
}
_EXACT_TANH = (4, 2)  # of 32-bit inputs, through sigmoid
_LOAD_INSTRUCTIONS = 10  # address, bounds, the load itself, moving and converting what it gives
_DIVISION_INSTRUCTIONS = 8


@dataclass(frozen=True)
class Operations:
    """Instructions per pair, and bytes read per pair."""

    arithmetic: int = 0
    special: int = 0
    loaded: int = 0

    def __add__(self, other: Operations) -> Operations:
        pairs = zip(self._counts(), other._counts(), strict=True)
        return Operations(*(a + b for a, b in pairs))

    def _counts(self) -> tuple[int, int, int]:
        return self.arithmetic, self.special, self.loaded


def operations(spec: AttentionSpec, expr: Expr) -> Operations:
    """What ``expr`` adds per pair. Values that do not differ from pair to pair are computed outside and count nothing,
    nor does a constant factor of the raw score, which becomes part of the exponent."""
    return sum((_node(spec, node) for node in expr.walk() if _per_pair(node)), Operations())


def _per_pair(node: Expr) -> bool:
    return node != SCORE and {ROW, KEY} <= node.axes


def _node(spec: AttentionSpec, node: Expr) -> Operations:
    if isinstance(node, Int):
        divisions = len(node.value.atoms(FloorDiv, sp.Mod))
        return Operations(len(sp.Add.make_args(node.value)) - 1 + divisions * _DIVISION_INSTRUCTIONS)
    if isinstance(node, Load):
        width = next((x.dtype.itemsize for x in spec.extras if x.name == node.source), 4)
        return Operations(_LOAD_INSTRUCTIONS, 0, width)
    if not isinstance(node, Op) or _scales_score(node):
        return Operations()
    if node.name == "tanh" and spec.query.dtype.itemsize >= 4:
        return Operations(*_EXACT_TANH)
    arithmetic, special = _INSTRUCTIONS.get(node.name, (len(node.args) - 1 or 1, 0))
    return Operations(arithmetic, special)


def _scales_score(node: Op) -> bool:
    return node.name == "mul" and SCORE in node.args and any(number(a) is not None for a in node.args)


def score_passes(spec: AttentionSpec) -> int:
    """Pointwise operators that a model needs between the products to spell the score and mask one at a time."""
    count = sum(isinstance(node, Op) and _per_pair(node) for node in spec.score.walk())
    return count + (spec.mask != TRUE)


# ------------------------------------------------------------------------------------------------------------- extents


def bindings(spec: AttentionSpec, problem: Problem) -> dict[sp.Symbol, int]:
    """Every size, and every batch axis at its middle."""
    sizes = {ROW: problem.rows, KEY: problem.keys, INNER: spec.head_dim, FEATURE: spec.value_dim}
    sizes.update(zip(spec.batch, problem.batch, strict=True))
    return {**{axis.extent: n for axis, n in sizes.items()}, **{axis: sizes[axis] // 2 for axis in spec.batch}}


def elements(spec: AttentionSpec, problem: Problem, source: Input) -> int:
    """Distinct elements of ``source`` that the site reads: a head shared by several query heads counts once."""
    at = bindings(spec, problem)
    sizes = {INNER: spec.head_dim, FEATURE: spec.value_dim, **{a: at[a.extent] for a in (ROW, KEY, *spec.batch)}}
    count = 1
    for place in source.index:
        count *= _positions(place, {**at, **sizes})
    return count


def bytes_of(spec: AttentionSpec, problem: Problem, source: Input) -> int:
    return elements(spec, problem, source) * source.dtype.itemsize


def _positions(place: sp.Expr, at: Mapping[sp.Symbol, int]) -> int:
    """Distinct values of ``place``, where ``at`` holds the extent of each axis: exact for sums of scaled axes that do
    not overlap, an upper limit otherwise."""
    axes = place.atoms(Axis)
    if not axes:
        return 1
    grid = np.meshgrid(*(np.array([0, at[a] - 1]) for a in axes))
    try:
        corners = np.asarray(evaluate(place, {**at, **dict(zip(axes, grid, strict=True))}))
    except (KeyError, TypeError):
        return int(np.prod([at[a] for a in axes]))
    return min(int(corners.max() - corners.min()) + 1, int(np.prod([float(at[a]) for a in axes])))


# -------------------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Blocks:
    """Key blocks that a query tile visits: on average, at most, in the tile that is started last; and masked ones."""

    mean: float
    most: float
    last: float
    masked: float


def count_blocks(cover: Cover, at: Mapping[sp.Symbol, int], problem: Problem, rows: int, keys: int) -> Blocks:
    """The blocks of ``keys`` keys that tiles of ``rows`` queries visit, by the loop bounds of the template."""
    first = np.arange(0, problem.rows, rows)
    here = {**at, FIRST: first, LAST: np.minimum(first + rows, problem.rows) - 1}
    try:
        start, stop = _visited(cover, here, first, keys)
        full = _full(cover, here, start, stop, keys)
    except KeyError:  # a bound over a size that only the run knows: count the whole rectangle, all of it masked
        start, stop, full = 0 * first, 0 * first + problem.keys, 0 * first
    visited = np.ceil(np.maximum(stop - start, 0) / keys)
    return Blocks(
        mean=float(visited.mean()),
        most=float(visited.max()),
        last=float(visited[0]),
        masked=float(np.maximum(visited - full, 0).mean()),
    )


def _visited(cover: Cover, at: Mapping[sp.Symbol, Value], first: Value, keys: int) -> tuple[Value, Value]:
    """Start, a multiple of the block, and stop of the smallest interval around all that is visited."""
    size = at[KEY.extent]
    low, high = size + 0 * first, 0 * first
    for interval in cover.visit:
        begin, end = (evaluate(e, at) + 0 * first for e in (interval.low, interval.high))
        counts = (begin < end) & _holds(interval, at, first)
        low = np.where(counts, np.minimum(low, begin), low)
        high = np.where(counts, np.maximum(high, end), high)
    return np.minimum(low, high) // keys * keys, high


def _full(cover: Cover, at: Mapping[sp.Symbol, Value], start: Value, stop: Value, keys: int) -> Value:
    """Blocks between the masked ones at the beginning and those at the end."""
    begin, end = start, stop
    for interval in cover.partial:
        low, high = (evaluate(e, at) + 0 * start for e in (interval.low, interval.high))
        counts = (low < high) & _holds(interval, at, start)
        if interval.low == 0 and interval.high != KEY.extent:
            begin = np.where(counts, np.maximum(begin, high), begin)
        else:
            end = np.where(counts, np.minimum(end, low), end)
    return np.maximum(end // keys - -(-begin // keys), 0)


def _holds(interval: Interval, at: Mapping[sp.Symbol, Value], like: Value) -> Value:
    return reduce(np.logical_and, [evaluate(e, at) + 0 * like >= 0 for e in interval.when], np.full(like.shape, True))
