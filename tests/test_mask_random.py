"""A thousand random mask expressions against brute force: what a kernel's loops visit, and what they leave unmasked.

``python tests/test_mask_random.py`` looks at four times as many, and prints how much is visited beyond what matters and how
long deriving takes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import sympy as sp
import torch
from specs import BOTTOM_RIGHT, CAUSAL, STRICTLY_CAUSAL, window

from attngen.algebra import Expr, Int, integer, negate, op
from attngen.compat import FloorDiv
from attngen.evaluate import Evaluator
from attngen.mask import Cover, derive
from attngen.spec import KEY, ROW
from attngen.work import loops_of

PROBLEMS = (((240, 240), (32, 16)), ((90, 200), (32, 32)), ((200, 150), (64, 32)))  # lengths; rows and keys of a tile
COUNTS = {1: 100, 2: 550, 3: 300, 4: 100}  # of random expressions, by their number of leaves
ALLOWED = 1.1  # blocks visited over blocks that matter
Draw = Callable[[random.Random], Expr]


# ---------------------------------------------------------------------------------------------------------- the masks


def chunks(size: int) -> Expr:
    return op("eq", Int(FloorDiv(ROW, size)), Int(FloorDiv(KEY, size)))


def band(before: int, after: int) -> Expr:
    return op("and", op("le", Int(KEY - ROW), integer(after)), op("le", Int(ROW - KEY), integer(before)))


def every(step: int) -> Expr:
    return op("eq", Int(sp.Mod(ROW - KEY, step)), integer(0))


def first_keys(count: int) -> Expr:
    return op("lt", Int(KEY), integer(count))


def first_rows(count: int) -> Expr:
    return op("lt", Int(ROW), integer(count))


FAMILIES: dict[str, Draw] = {
    "causal": lambda r: r.choice([CAUSAL, BOTTOM_RIGHT]),
    "strictly causal": lambda r: STRICTLY_CAUSAL,
    "window": lambda r: window(r.choice([8, 40, 100])),
    "two-sided": lambda r: band(r.choice([12, 50]), r.choice([5, 30])),
    "symmetric": lambda r: op("le", op("abs", Int(ROW - KEY)), integer(r.choice([5, 24, 70]))),
    "prefix": lambda r: op("or", CAUSAL, first_keys(r.choice([10, 40, 90]))),
    "chunks": lambda r: chunks(r.choice([16, 48, 100])),
    "causal chunks": lambda r: op("and", CAUSAL, chunks(r.choice([16, 48, 100]))),
    "block causal": lambda r: op("le", *(Int(FloorDiv(axis, 48)) for axis in (KEY, ROW))),
    "dilated": lambda r: op("and", CAUSAL, every(r.choice([2, 3, 4]))),
    "dilated window": lambda r: op("and", band(r.choice([24, 70]), 24), every(r.choice([2, 3]))),
    "sinks": lambda r: op("or", window(r.choice([8, 40])), op("and", CAUSAL, first_keys(r.choice([4, 20])))),
    "global": lambda r: op("or", first_keys(g := r.choice([4, 20])), first_rows(g), band(r.choice([12, 50]), 12)),
    "cache": lambda r: op("le", Int(KEY), Int(ROW + r.choice([7, 33, 80]))),
    "padding": lambda r: first_keys(r.choice([30, 70, 130])),
}


def compound(leaves: int) -> Draw:
    """``and``, ``or`` and ``not`` of so many families."""

    def draw(r: random.Random) -> Expr:
        mask = r.choice(list(FAMILIES.values()))(r)
        for _ in range(leaves - 1):
            mask = op(r.choice(["and", "or"]), mask, r.choice(list(FAMILIES.values()))(r))
            mask = negate(mask) if r.random() < 0.25 else mask
        return negate(mask) if leaves == 1 and r.random() < 0.5 else mask

    return draw


def dense(mask: Expr, rows: int, keys: int) -> np.ndarray:
    positions = {ROW: torch.arange(rows).unsqueeze(-1), KEY: torch.arange(keys), ROW.extent: rows, KEY.extent: keys}
    return torch.broadcast_to(Evaluator(positions, {}.__getitem__)(mask), (rows, keys)).numpy()


# ------------------------------------------------------------------------------------------------------- brute force


@dataclass
class Tally:
    """Blocks summed up over masks: visited, that matter, skipped though they matter, wrongly without a mask."""

    visited: int = 0
    matter: int = 0
    skipped: int = 0
    unmasked: int = 0
    full: int = 0
    known_full: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.visited / max(self.matter, 1)

    def add(self, mask: Expr) -> None:
        begin = time.process_time()
        cover = derive(mask)
        self.seconds.append(time.process_time() - begin)
        for lengths, tile in PROBLEMS:
            self.compare(cover, dense(mask, *lengths), *tile)

    def compare(self, cover: Cover, kept: np.ndarray, rows: int, keys: int) -> None:
        visited, unmasked = blocks_of(cover, *kept.shape, rows, keys)
        matter, full = any_of(kept, rows, keys), ~any_of(~kept, rows, keys)
        full &= np.arange(full.shape[1]) < kept.shape[1] // keys  # the end of the last block is no key
        self.visited += int(visited.sum())
        self.matter += int(matter.sum())
        self.full += int(full.sum())
        self.known_full += int(unmasked.sum())
        self.skipped += int((matter & ~visited).sum())
        self.unmasked += int((unmasked & ~full).sum()) + int((unmasked & ~visited).sum())


def any_of(pairs: np.ndarray, rows: int, keys: int) -> np.ndarray:
    """Per tile of rows and block of keys, whether any pair is true."""
    high, wide = (-(-n // size) for n, size in zip(pairs.shape, (rows, keys), strict=True))
    padded = np.zeros((high * rows, wide * keys), bool)
    padded[: pairs.shape[0], : pairs.shape[1]] = pairs
    return padded.reshape(high, rows, wide, keys).any((1, 3))


def blocks_of(cover: Cover, queries: int, size: int, rows: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Per tile and block: visited, and visited without a mask."""
    loops = loops_of(cover, {ROW.extent: queries, KEY.extent: size}, queries, rows, keys)
    block = np.arange(0, size, keys)

    def within(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return (block >= start[:, None]) & (block < stop[:, None])

    visited = within(loops.start, loops.stop) & ~within(loops.gap_start, loops.gap_stop)
    return visited, within(loops.full_start, loops.full_stop)


@cache
def tallied(name: str, times: int = 1) -> Tally:
    tally, source = Tally(), random.Random(name)
    leaves = COMPOUNDS.get(name)
    draw, count = (FAMILIES[name], 6) if leaves is None else (compound(leaves), times * COUNTS[leaves])
    for mask in dict.fromkeys(draw(source) for _ in range(count)):
        tally.add(mask)
    return tally


COMPOUNDS = {f"{leaves} leaves": leaves for leaves in COUNTS}


@pytest.mark.parametrize("name", [*FAMILIES, *COMPOUNDS])
def test_loops_visit_what_matters_and_little_else(name: str) -> None:
    tally = tallied(name)
    assert tally.skipped == 0, "blocks that matter are skipped"
    assert tally.unmasked == 0, "blocks that need a mask have none"
    assert tally.ratio <= ALLOWED


def report() -> None:
    """Times are of this process alone."""
    for name in (*FAMILIES, *COMPOUNDS):
        tally = tallied(name, 4)
        print(
            f"{name:16} visited {tally.ratio:.3f} of what matters, {tally.known_full / max(tally.full, 1):.3f} of full "
            f"blocks without a mask, unsound {tally.skipped + tally.unmasked}; {_times(tally.seconds)}"
        )
    print(_times([each for name in (*FAMILIES, *COMPOUNDS) for each in tallied(name, 4).seconds]))


def _times(seconds: list[float]) -> str:
    most, median = 1e3 * max(seconds), 1e3 * statistics.median(seconds)
    return f"{len(seconds)} masks derived in {median:.1f} ms (median), {most:.0f} ms (most)"


if __name__ == "__main__":
    report()
