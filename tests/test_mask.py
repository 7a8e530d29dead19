"""The covers of a mask against the mask itself: no key that counts is skipped, none that needs masking goes without."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import BOTTOM_RIGHT, CASES, CAUSAL, CHUNKS, PREFIX, SAME_DOCUMENT, STREAMING, STRICTLY_CAUSAL, B, Case, window

from attngen.algebra import FALSE, TRUE, Expr, Int, Load, integer, negate, op, substitute
from attngen.compat import FloorDiv
from attngen.evaluate import Evaluator
from attngen.index import Axis
from attngen.mask import FIRST, LAST, Cover, Interval, derive, no_row_is_empty
from attngen.naming import describe
from attngen.spec import KEY, ROW
from attngen.text import index_text

SIZES = ((9, 9), (12, 7), (5, 13), (1, 6))
TILES = (1, 3, 4)
LOADED = Load("m", (Int(ROW), Int(KEY)), "bool")
MANY = settings(max_examples=150, deadline=None)  # others in each run


def dense(mask: Expr, rows: int, keys: int) -> np.ndarray:
    positions = {ROW: torch.arange(rows).unsqueeze(-1), KEY: torch.arange(keys), ROW.extent: rows, KEY.extent: keys}
    table = torch.rand(rows, keys, generator=torch.Generator().manual_seed(rows)) < 0.5
    evaluate = Evaluator(positions, lambda _: table)
    return torch.broadcast_to(evaluate(mask), (rows, keys)).numpy()


Read = Callable[[int, int, int, int], np.ndarray]


def reader(intervals: tuple[Interval, ...]) -> Read:
    """Which keys the intervals contain, given a tile (first and last row) and a problem (rows and keys)."""
    names = (FIRST, LAST, ROW.extent, KEY.extent)
    python = [{"FloorDiv": lambda a, b: a // b, "Min": min, "Max": max, "Abs": abs}]
    ends = [sp.lambdify(names, (i.low, i.high, *i.when), modules=python) for i in intervals]

    def inside(first: int, last: int, rows: int, keys: int) -> np.ndarray:
        found = np.zeros(keys, dtype=bool)
        for end in ends:
            low, high, *when = end(first, last, rows, keys)
            if all(w >= 0 for w in when):
                found[max(low, 0) : max(min(high, keys), 0)] = True
        return found

    return inside


def tiles(rows: int) -> list[tuple[int, int]]:
    return [(first, min(first + size, rows) - 1) for size in TILES for first in range(0, rows, size)]


def check(mask: Expr, cover: Cover, *, exact: bool = False) -> None:
    visited, masked = reader(cover.visit), reader(cover.partial)
    for rows, keys in SIZES:
        kept = dense(mask, rows, keys)
        for first, last in tiles(rows):
            block = kept[first : last + 1]
            visit, partial = (read(first, last, rows, keys) for read in (visited, masked))
            where = f"rows {first}..{last} of {rows}x{keys}"
            assert not (block.any(0) & ~visit).any(), f"a key that counts is skipped in {where}"
            assert not (~block.all(0) & ~partial).any(), f"a key that needs masking has none in {where}"
            if exact:
                np.testing.assert_array_equal(visit, block.any(0))
                np.testing.assert_array_equal(partial, ~block.all(0))


# ------------------------------------------------------------------------------------------------------- random masks

OFFSET = st.integers(-4, 8)
GAP = KEY.extent - ROW.extent
PLACES = st.one_of(
    st.builds(lambda a, b, c: a * ROW + b * KEY + c, st.integers(-1, 2), st.integers(-2, 1), OFFSET),
    st.builds(lambda c, d: FloorDiv(ROW + c, d), st.integers(0, 3), st.integers(2, 4)),
    st.builds(lambda c, d: FloorDiv(KEY + c, d), st.integers(0, 3), st.integers(2, 4)),
    st.builds(lambda c: sp.Abs(ROW - KEY + c), OFFSET),
    st.builds(lambda d: sp.Mod(KEY, d), st.integers(2, 4)),
    st.builds(lambda c: ROW - KEY + GAP + c, OFFSET),
    st.builds(lambda c: sp.Max(ROW, c) - KEY, st.integers(0, 6)),
    OFFSET.map(sp.Integer),
)
RELATION = st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"])
ATOMS = st.one_of(
    st.builds(lambda name, a, b: op(name, Int(a), Int(b)), RELATION, PLACES, PLACES),
    st.just(LOADED),
    st.sampled_from([CAUSAL, BOTTOM_RIGHT, TRUE, FALSE]),
)
MASKS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(lambda a, b: op("and", a, b), inner, inner),
        st.builds(lambda a, b: op("or", a, b), inner, inner),
        st.builds(negate, inner),
    ),
    max_leaves=5,
)


@MANY
@given(MASKS)
def test_covers_are_sound(mask: Expr) -> None:
    check(mask, derive(mask))


@MANY
@given(MASKS)
def test_a_row_that_cannot_be_empty_is_not(mask: Expr) -> None:
    for rows, keys in SIZES:
        row, key = Axis("r", rows), Axis("k", keys)
        sized = substitute(mask, {ROW.extent: sp.Integer(rows), KEY.extent: sp.Integer(keys)})
        if no_row_is_empty(substitute(sized, {ROW: row, KEY: key}), row, key):
            assert dense(mask, rows, keys).any(1).all(), f"{rows}x{keys}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_covers_of_every_spec_are_sound(case: Case) -> None:
    if not any(isinstance(n, Load) for n in case.spec.mask.walk()):
        check(case.spec.mask, derive(case.spec.mask))


# --------------------------------------------------------------------------------------------------- the usual masks


@pytest.mark.parametrize(
    ("mask", "exact"),
    [
        (TRUE, True),
        (FALSE, True),
        (CAUSAL, True),
        (BOTTOM_RIGHT, True),
        (STRICTLY_CAUSAL, True),
        (window(4), True),
        (PREFIX, True),
        (STREAMING, True),
        (CHUNKS, True),
        (op("le", op("abs", Int(ROW - KEY)), integer(3)), True),
        (LOADED, False),
        (op("and", CAUSAL, SAME_DOCUMENT), False),
    ],
    ids=["all", "none", "causal", "right", "strict", "window", "prefix", "sink", "chunk", "band", "loaded", "document"],
)
def test_usual_masks_are_solved(mask: Expr, exact: bool) -> None:
    cover = derive(mask)
    assert cover.exact == exact
    if not any(isinstance(n, Load) for n in mask.walk()):
        check(mask, cover, exact=exact)


def test_causal_bounds_are_the_textbook_ones() -> None:
    cover = derive(CAUSAL)
    (visit,), (partial,) = cover.visit, cover.partial
    assert visit.low == 0 and sp.simplify(visit.high - sp.Min(KEY.extent, LAST + 1)) == 0
    assert sp.simplify(partial.low - (FIRST + 1)) == 0 and partial.high == KEY.extent


def test_what_is_loaded_is_visited_only_where_the_rest_allows() -> None:
    cover = derive(op("and", CAUSAL, LOADED))
    assert reader(cover.visit)(0, 3, 9, 9).tolist() == [True] * 4 + [False] * 5
    assert reader(cover.partial)(0, 3, 9, 9).all()


LENGTH = Load("n", (), "int")
PLACE = Load("p", (Int(ROW),), "int")
FLAG = Load("f", (Int(KEY),), "bool")


def texts(interval: Interval) -> tuple[str, ...]:
    """Its ends as they are written, with the arguments of maxima and minima in order; then its conditions."""

    def text(end: sp.Expr) -> str:
        parts = sorted(index_text(a) for a in end.args)
        return f"{end.func.__name__}({', '.join(parts)})" if isinstance(end, (sp.Max, sp.Min)) else index_text(end)

    return (text(interval.low), text(interval.high), *map(index_text, (*interval.when, *interval.among)))


@pytest.mark.parametrize(
    ("mask", "visit"),
    [
        (op("lt", Int(KEY), LENGTH), [("0", "Min(one n[]:int, size_j)")]),
        (op("le", Int(KEY), PLACE), [("0", "Min(1 + most p[i]:int, size_j)")]),
        (op("gt", Int(KEY), PLACE), [("Max(0, 1 + least p[i]:int)", "size_j")]),
        (op("lt", Int(ROW), LENGTH), [("0", "size_j", "Min(last, one n[]:int - 1) - first")]),
        (FLAG, [("0", "size_j", "key f[j]:bool - 1")]),
        (negate(FLAG), [("0", "size_j", "-key f[j]:bool")]),
        (SAME_DOCUMENT, [("0", "size_j", "key t1[b, j]:int - least t0[b, i]:int", "most t0[b, i]:int - key t1[b, j]:int")]),
        (op("or", CAUSAL, op("and", CAUSAL, FLAG)), [("0", "Min(1 + last, size_j)")]),
        (LOADED, [("0", "size_j")]),
        (op("lt", op("mul", PLACE, PLACE), Int(KEY)), [("Max(0, 1 + least mul(p[i]:int, p[i]:int))", "size_j")]),
    ],
)
def test_data_bounds_what_is_visited(mask: Expr, visit: list[tuple[str, ...]]) -> None:
    """By its extremes over the rows of a tile, or as a condition on keys one by one; not if it differs per pair."""
    assert [texts(interval) for interval in derive(mask).visit] == visit


def test_a_conjunction_that_no_row_meets_is_no_interval() -> None:
    far = op("and", op("le", Int(KEY), Int(ROW - 9)), op("ge", Int(KEY), Int(ROW - 5)))
    assert derive(far).visit == ()
    assert derive(op("or", CAUSAL, far)).visit == derive(CAUSAL).visit


@pytest.mark.parametrize(
    ("mask", "proved"),
    [
        (CAUSAL, True),
        (STRICTLY_CAUSAL, False),
        (window(4), True),
        (op("lt", Int(KEY), integer(1)), True),
        (LOADED, False),
        (op("or", CAUSAL, LOADED), True),
        (op("gt", Int(KEY), Int(ROW)), False),
        (op("ge", Int(KEY), Int(ROW)), True),
        (op("ge", Int(KEY), Int(KEY.extent - 1)), True),
    ],
)
def test_no_row_is_empty(mask: Expr, proved: bool) -> None:
    """For queries and keys of one unknown length, as in self attention."""
    row, key = Axis("i", KEY.extent), Axis("j", KEY.extent)
    assert no_row_is_empty(substitute(mask, {ROW: row, KEY: key}), row, key) == proved


def test_a_diagonal_may_lie_beyond_the_keys() -> None:
    """With fewer keys than queries a window leaves the last rows empty."""
    assert not no_row_is_empty(window(4), ROW, KEY)
    assert no_row_is_empty(CAUSAL, ROW, KEY)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (TRUE, ""),
        (CAUSAL, "causal"),
        (window(40), "causal & window(40)"),
        (op("le", op("abs", Int(ROW - KEY)), integer(24)), "window(±24)"),
        (op("and", CAUSAL, op("lt", Int(ROW - KEY), integer(9)), op("lt", Int(KEY - ROW), integer(9))), "causal & window(9)"),
        (op("and", CAUSAL, Load("t0", (Int(KEY),), "bool")), "causal & padding"),
        (op("lt", Int(KEY), Load("t0", (Int(B),), "int")), "lengths"),
        (op("ge", Load("t0", (Int(B),), "int"), Int(KEY)), "lengths"),
        (op("ge", Int(KEY), Load("t0", (Int(B),), "int")), "padding"),
        (op("le", Int(KEY), Load("t0", (Int(ROW),), "int")), "causal(loaded positions)"),
        (op("le", Int(KEY), Load("t0", (), "int")), "causal(loaded positions)"),
        (CHUNKS, "causal & chunks(48)"),
        (LOADED, None),
    ],
)
def test_description(mask: Expr, text: str | None) -> None:
    assert describe(mask) == text
