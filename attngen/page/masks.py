"""Which blocks of pairs a mask leaves, as a picture: empty, partial, full, or for the data to decide.

Positions alone are looked at. What is loaded may hold anything, so a mask is read twice: as if all that depends on data
were true, and as if it were false. Blocks that are full in the first reading and not in the second depend on data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import sympy as sp
from markupsafe import Markup

from attngen.algebra import FALSE, TRUE, Const, Expr, Int, Op, negate, op
from attngen.mask import FIRST, LAST, Interval, derive
from attngen.page import svg
from attngen.spec import AttentionSpec, Problem, Tile
from attngen.work import bindings, evaluate

EMPTY, PARTIAL, FULL, DATA = range(4)
KINDS = ("empty", "partial", "full", "data")
MOST = 64  # cells along each side of a picture
SIDE = 240.0  # of the picture, in pixels
MARGIN = 18.0  # for what is written beside it
LONG = 80.0  # how long that is

Kinds = np.ndarray  # [cells of rows, cells of keys], each one of ``KINDS``


@dataclass(frozen=True)
class Blocks:
    """The kinds of blocks of a problem; a cell is ``rows`` x ``keys`` pairs: a block, or several where there are many."""

    kinds: Kinds
    rows: int
    keys: int
    problem: Problem

    @property
    def counts(self) -> dict[str, int]:
        return {name: int((self.kinds == kind).sum()) for kind, name in enumerate(KINDS)}


def blocks_of(spec: AttentionSpec, problem: Problem, tile: Tile) -> Blocks:
    """The blocks of ``tile``, in cells of several where there were more than ``MOST`` along a side."""
    rows, keys = (_cell(n, size) for n, size in ((problem.rows, tile.rows), (problem.keys, tile.keys)))
    return Blocks(kinds(spec.mask, bindings(spec, problem), problem, rows, keys), rows, keys, problem)


def _cell(length: int, block: int) -> int:
    count = -(-length // block)
    return block * -(-count // MOST)


def kinds(mask: Expr, at: Mapping[sp.Symbol, int], problem: Problem, rows: int, keys: int) -> Kinds:
    """The kind of each cell of ``rows`` x ``keys`` pairs, with sizes ``at``."""
    try:
        at_most, at_least = (_by_position(_assumed(mask, truth), at, problem, rows, keys) for truth in (TRUE, FALSE))
    except KeyError:  # a size that only the run knows
        return np.full((-(-problem.rows // rows), -(-problem.keys // keys)), DATA)
    return np.where((at_most == FULL) & (at_least != FULL), DATA, at_most)


def _assumed(mask: Expr, truth: Const) -> Expr:
    """The mask where whatever depends on data has that truth."""
    if all(isinstance(node, (Int, Const, Op)) for node in mask.walk()):
        return mask
    if isinstance(mask, Op) and mask.name == "not":
        return negate(_assumed(mask.args[0], Const(not truth.value)))
    if isinstance(mask, Op) and mask.name in ("and", "or"):
        return op(mask.name, *(_assumed(part, truth) for part in mask.args))
    return truth


def _by_position(mask: Expr, at: Mapping[sp.Symbol, int], problem: Problem, rows: int, keys: int) -> Kinds:
    cover = derive(mask)
    first = np.arange(0, problem.rows, rows)[:, None]
    here = {**at, FIRST: first, LAST: np.minimum(first + rows, problem.rows) - 1}
    begin = np.arange(0, problem.keys, keys)[None, :]
    end = np.minimum(begin + keys, problem.keys)
    nothing = np.zeros(np.broadcast_shapes(first.shape, begin.shape), dtype=bool)
    visit, partial = (
        reduce(np.logical_or, (_touched(each, here, begin, end) for each in intervals), nothing)
        for intervals in (cover.visit, cover.partial)
    )
    return np.where(visit, np.where(partial, PARTIAL, FULL), EMPTY)


def _touched(interval: Interval, at: Mapping[sp.Symbol, object], begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Whether each block has a key of the interval."""
    low, high = (evaluate(bound, at) for bound in (interval.low, interval.high))
    meets = (np.maximum(low, begin) < np.minimum(high, end)) & (low < high)
    return reduce(np.logical_and, (evaluate(e, at) >= 0 for e in interval.when), meets)


# -------------------------------------------------------------------------------------------------------------- drawing


def drawn(blocks: Blocks) -> Markup:
    """Keys from left to right, queries from top to bottom. The longer of the two sides has full length."""
    problem = blocks.problem
    longest = max(problem.rows, problem.keys)
    width, height = (max(SIDE * n / longest, SIDE / 8) for n in (problem.keys, problem.rows))
    across, down = width / problem.keys, height / problem.rows
    shapes = [svg.rectangles([(MARGIN, MARGIN, width, height)], class_="cells")]
    for kind in (FULL, PARTIAL, DATA):
        runs = _runs(blocks.kinds == kind)
        boxes = [_box(row, cells, blocks, across, down) for row, cells in runs]
        shapes += [svg.rectangles(boxes, class_=KINDS[kind])] if boxes else []
    shapes += [
        svg.text(MARGIN, MARGIN - 6, f"{problem.keys} keys"),
        svg.text(-MARGIN, MARGIN - 6, f"{problem.rows} queries", transform="rotate(-90)", text_anchor="end"),
    ]
    label = f"Blocks of {problem.rows} queries and {problem.keys} keys"
    return svg.picture(max(width, LONG) + MARGIN + 2, max(height, LONG) + MARGIN + 2, label, shapes, "map")


def _runs(marked: np.ndarray) -> list[tuple[int, tuple[int, int]]]:
    """Neighbours along each row, together: row, first cell and end."""
    edges = np.diff(np.pad(marked.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(edges == 1).tolist(), np.argwhere(edges == -1).tolist()
    return [(row, (first, end)) for (row, first), (_, end) in zip(starts, ends, strict=True)]


def _box(row: int, cells: tuple[int, int], blocks: Blocks, across: float, down: float) -> tuple[float, float, float, float]:
    top, left = row * blocks.rows, cells[0] * blocks.keys
    bottom = min(top + blocks.rows, blocks.problem.rows)
    right = min(cells[1] * blocks.keys, blocks.problem.keys)
    return MARGIN + left * across, MARGIN + top * down, (right - left) * across, (bottom - top) * down
