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
from attngen.index import Axis, remembered
from attngen.inequalities import Datum
from attngen.mask import EVERYTHING, FIRST, LAST, MAX_RUNS, Cover, Interval, by_position, grouped, may_be_full
from attngen.printer import apart
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
    "rounded": (3, 2),
    "random": (14, 0),  # a quarter of seven rounds, but for what rows and columns have in common
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
    nodes = expr.walk()
    summed = {node.args[0] for node in nodes if isinstance(node, Op) and node.name == "float" and apart(node.args[0])}
    return sum((_node(spec, node) for node in nodes if _per_pair(node) and node not in summed), Operations())


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
    if node.name == "float" and apart(node.args[0]) is not None:
        return Operations(1)
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


# Of the keys that positions leave, those that are looked at where a row sees only keys whose data agrees with its own, as in
# packed documents: assumed, nobody can know beforehand. Eight documents of random length in a sequence leave 0.3.
AGREEING = 0.5


@dataclass(frozen=True)
class Blocks:
    """Key blocks that a query tile visits: on average, at most, in the tile that is started last; and masked ones. It goes
    over ``stretches`` of blocks of one kind: masked, full, masked.
    """

    mean: float
    most: float
    last: float
    masked: float
    stretches: float


def count_blocks(cover: Cover, at: Mapping[sp.Symbol, int], problem: Problem, rows: int, keys: int) -> Blocks:
    """The blocks of ``keys`` keys that tiles of ``rows`` queries visit, by the loop bounds of the template."""
    try:
        loops = loops_of(cover, at, problem.rows, rows, keys)
    except KeyError:  # a bound over a size that only the run knows: count the whole rectangle, all of it masked
        loops = loops_of(_DENSE, at, problem.rows, rows, keys)
    visited = np.ceil(np.maximum(loops.stop - loops.start, 0) / keys) - (loops.gap_stop - loops.gap_start) / keys
    full = (loops.full_stop - loops.full_start) / keys
    seen = np.maximum(np.minimum(visited, 1), visited * (AGREEING if _agree(cover) else 1))
    stretches = (loops.full_start > loops.start, full > 0, loops.stop > np.maximum(loops.full_stop, loops.start))
    return Blocks(
        mean=float(seen.mean()),
        most=float(seen.max()),
        last=float(seen[0]),
        masked=float(np.minimum(visited - full, seen).mean()),
        stretches=float(np.sum(stretches, 0).mean()),
    )


def _agree(cover: Cover) -> bool:
    """Wherever a row sees a key, what is loaded for the key was compared with what is loaded for the rows."""
    return bool(cover.visit) and all(
        any(each.role in ("least", "most") for expr in interval.among for each in expr.atoms(Datum))
        for interval in cover.visit
    )


@dataclass(frozen=True)
class Loops:
    """The loop bounds of every query tile; see ``attngen.bounds``."""

    start: Value
    stop: Value
    full_start: Value
    full_stop: Value
    gap_start: Value
    gap_stop: Value


_DENSE = Cover((EVERYTHING,), (EVERYTHING,), False)
Runs = list[tuple[Value, Value]]


def loops_of(cover: Cover, at: Mapping[sp.Symbol, int], queries: int, rows: int, keys: int) -> Loops:
    """The loop bounds of the tiles of ``rows`` queries. Of data it is assumed that it masks nothing, and that of the keys
    it could have masked the last one shows it."""
    first = np.arange(0, queries, rows)
    here = {**at, FIRST: first, LAST: np.minimum(first + rows, queries) - 1}
    visit = _runs(tuple(by_position(i) for i in cover.visit), here)
    partial = _runs(tuple(_barely_masked(i) for i in cover.partial), here) if may_be_full(cover) else []
    size = at[KEY.extent] + 0 * first
    low = reduce(np.minimum, [low for low, _ in visit], size)
    stop = reduce(np.maximum, [high for _, high in visit], 0 * first)
    start = np.minimum(low, stop) // keys * keys
    gap, full = (start, start), (start, start)
    if 1 < len(visit) <= MAX_RUNS:
        gap = _longest(start, [high for _, high in visit], visit, low, stop, keys)
    if may_be_full(cover):
        full = _longest(start, [low, *(high for _, high in partial)], partial, low, stop, keys)
    return Loops(start, stop, *full, *gap)


def _longest(start: Value, places: list[Value], runs: Runs, low: Value, stop: Value, keys: int) -> tuple[Value, Value]:
    """Of the stretches that begin at one of ``places`` and end where one of ``runs`` begins, the one of most blocks."""
    best = (start, start)
    for place in places:
        after = np.maximum(place, low)
        before = reduce(np.minimum, [np.where(high > after, begin, stop) for begin, high in runs], stop)
        begin, end = -(-after // keys) * keys, before // keys * keys
        better = end - begin > best[1] - best[0]
        best = (np.where(better, begin, best[0]), np.where(better, end, best[1]))
    return best


def _runs(intervals: tuple[Interval, ...], at: Mapping[sp.Symbol, Value]) -> Runs:
    """The stretches of keys that a kernel compares, one that is empty beyond all keys."""
    return [_run(group, at) for group in grouped(intervals)]


def _run(group: tuple[Interval, ...], at: Mapping[sp.Symbol, Value]) -> tuple[Value, Value]:
    size, none = at[KEY.extent], 0 * at[FIRST]
    low, high = size + none, none
    for interval in group:
        begin, end = (evaluate(e, at) + none for e in (interval.low, interval.high))
        counts = reduce(np.logical_and, [evaluate(e, at) + none >= 0 for e in interval.when], begin < end)
        low, high = np.where(counts, np.minimum(low, begin), low), np.where(counts, np.maximum(high, end), high)
    return low, high


@remembered
def _barely_masked(interval: Interval) -> Interval:
    if not interval.data:
        return interval
    known = by_position(interval)
    return Interval(sp.Max(0, known.high - 1), known.high, known.when)
