"""The hopper family's cost model: its formulas, and its picks against kernels timed on an H100."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
from hopper_sites import SITES
from specs import CAUSAL, attention
from test_choose import BF16, plan_for

from attngen import formulas, formulas_hopper
from attngen.choose import HOPPER_TILES
from attngen.cost import costs, formula
from attngen.device import DEVICES
from attngen.spec import HOPPER, Problem, Tile
from attngen.work import evaluate

H100 = DEVICES["h100"]
SLACK = 1.10  # of the best time that was measured
# Milliseconds by tile.
TIMED = json.loads((Path(__file__).parent / "data" / "hopper_fwd_h100.json").read_text())["sites"]


# -------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("row", formulas_hopper.FORMULAS, ids=lambda row: row.symbol.name)
def test_formula_evaluates_as_sympy_does(row: formulas.Formula) -> None:
    draw = random.Random(row.symbol.name)
    values = {symbol: draw.uniform(0.5, 40) for symbol in sorted(row.expression.free_symbols, key=str)}
    assert evaluate(row.expression, values) == pytest.approx(float(row.expression.subs(values)))


def test_every_symbol_is_given_or_defined_before_its_use() -> None:
    defined = {row.symbol for row in formulas_hopper.FORMULAS}
    seen: set[sp.Symbol] = set()
    for row in formulas_hopper.FORMULAS:
        assert not (row.expression.free_symbols & defined) - seen, row.symbol
        assert row.symbol not in seen
        seen.add(row.symbol)


def test_what_the_portable_family_defines_is_defined_here_or_not_used() -> None:
    """A formula that both families share means the same in both, so all that goes into it must be there."""
    ours = {row.symbol for row in formulas_hopper.FORMULAS}
    used = set().union(*(row.expression.free_symbols for row in formulas_hopper.FORMULAS))
    assert used & {row.symbol for row in formulas.FORMULAS} <= ours


def test_explanation_shows_every_formula_with_its_numbers() -> None:
    plan = plan_for(attention(dtype=BF16, head_dim=128, mask=CAUSAL), Problem((4, 16), 4096, 4096))
    assert plan.tile.family == HOPPER
    lines = formula(plan, DEVICES["h200"])
    assert [line.split(" = ")[0] for line in lines] == [row.symbol.name for row in formulas_hopper.FORMULAS]
    for line in lines:
        assert not sp.sympify(line.split(" = ")[2]).free_symbols, line
    assert f" = {plan.cost.seconds:.4g} s  (" in lines[-1]


# --------------------------------------------------------------------------------------- against kernels timed on an H100


def tile_of(text: str) -> Tile:
    """The inverse of ``str`` for a tile of this family: "128x128 w8 s2 hopper persistent"."""
    return next(tile for tile in HOPPER_TILES if str(tile) == text)


def timed(name: str) -> dict[Tile, float]:
    """The tiles of this family that were timed at a site."""
    return {tile_of(text): ms for text, ms in TIMED[name].items() if HOPPER in text}


def predicted(name: str) -> dict[Tile, float]:
    """The same in the model's eyes, without those that it refuses."""
    ranked = dict(plan_for(*SITES[name], "h100").ranked)
    return {tile: 1e3 * ranked[tile] for tile in timed(name) if tile in ranked}


def pick(name: str) -> Tile:
    model = predicted(name)
    return min(model, key=lambda tile: (model[tile], tile.stages))


def test_sites_are_those_of_the_data() -> None:
    assert set(TIMED) <= set(SITES) and len(TIMED) > 20


@pytest.mark.parametrize("name", TIMED)
def test_the_pick_is_among_the_fastest(name: str) -> None:
    measured = timed(name)
    assert measured[pick(name)] < SLACK * min(measured.values())


def test_predicted_times_of_the_picks_are_near_the_measured_ones() -> None:
    ratios = np.array([predicted(name)[pick(name)] / timed(name)[pick(name)] for name in TIMED])
    assert np.median(abs(ratios - 1)) < 0.15
    assert ratios.min() > 0.8 and ratios.max() < 1.5


@pytest.mark.parametrize("name", TIMED)
def test_the_fastest_is_not_refused(name: str) -> None:
    measured = timed(name)
    assert min(measured, key=measured.__getitem__) in predicted(name)


@pytest.mark.parametrize(
    ("name", "slow", "fast"),
    [
        ("d128 causal 16x16 1024x1024", "128x128 w8 s2 hopper", "128x128 w8 s2 hopper persistent"),  # starts are hidden
        ("d128 full 1x16 1024x16384", "128x128 w8 s2 hopper persistent", "128x128 w8 s2 hopper"),  # there is one tile each
        ("d128 full 1x16 16384x16384", "192x64 w12 s2 hopper", "128x128 w8 s2 hopper"),  # twice the steps
        ("d64 full 16x32 1024x1024", "128x128 w8 s2 hopper persistent", "128x128 w8 s3 hopper persistent"),  # loaded late
        ("d64 table 8x12 2048x2048", "128x64 w8 s2 hopper", "192x64 w12 s2 hopper"),
    ],
)
def test_what_sets_tiles_apart(name: str, slow: str, fast: str) -> None:
    slower, faster = costs(*SITES[name], H100, [tile_of(slow), tile_of(fast)])
    predicted_log, measured_log = np.log([slower.seconds / faster.seconds, TIMED[name][slow] / TIMED[name][fast]])
    assert 0.3 < predicted_log / measured_log < 3  # the right one of the two, and not by chance
