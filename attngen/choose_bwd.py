"""The tiles of a backward: of the two portable kernels each on its own, or the one of the hopper family, if it is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, product

import numpy as np

from attngen import boxes, formulas_bwd, formulas_hopper, formulas_hopper_bwd, hopper_bwd, lost
from attngen import formulas as f
from attngen.cost import Values, of_device, of_gain, of_spec, of_tiles
from attngen.device import Device
from attngen.errors import Miss
from attngen.gradient import Backward, backward_of, mirrored_spec
from attngen.printer import Unprintable
from attngen.spec import AttentionSpec, Problem, Tile
from attngen.work import evaluate

# Estimated; beyond, a kernel spills too much: the one that holds queries, and the one that makes two sums.
REGISTER_LIMITS = (420, 330)
MAX_HEAD = 256
SUMMED_FIRST = 5 / 3  # of the time of the kernel that holds queries: two of its three products are made twice

TILES = tuple(
    Tile(rows, keys, warps, stages)
    for rows, keys, warps, stages in product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))
)


@dataclass(frozen=True)
class BackwardPlan:
    """The tiles of the kernel that holds queries and of the one that holds keys, or the tile of the one kernel of the
    hopper family; and what all is predicted to take. ``otherwise``: the portable tiles, for gradients that it does not make.
    """

    tiles: tuple[Tile, ...]
    seconds: float
    otherwise: tuple[Tile, ...] = ()

    def __str__(self) -> str:
        return "queries {}, keys {}".format(*self.tiles) if len(self.tiles) == 2 else str(self.tiles[0])


@lru_cache(maxsize=4096)
def choose_backward(
    spec: AttentionSpec,
    problem: Problem,
    device: Device,
    given: tuple[Tile, ...] | None = None,
    *,
    deterministic: bool = False,
) -> BackwardPlan | Miss:
    """The plan for the gradients of ``spec``, or why no kernel computes them. Given tiles are taken if they can run.

    ``deterministic`` leaves out the family whose programs add to each other's results.
    """
    able = _ranked(spec, problem, device, deterministic)
    if isinstance(able, Miss):
        return able
    return able.of(given) or min(able.best(1), key=lambda plan: plan.seconds)


def candidates(
    spec: AttentionSpec, problem: Problem, device: Device, count: int, *, deterministic: bool = False
) -> list[BackwardPlan]:
    """The fastest ``count`` of each family, as predicted, of what can run."""
    able = _ranked(spec, problem, device, deterministic)
    return [] if isinstance(able, Miss) else able.best(count)


Seconds = dict[Tile, float]


@dataclass(frozen=True)
class _Able:
    """Tiles that can run, the fastest first: of both portable kernels, and of the one of the hopper family, if it can."""

    queries: Seconds
    keys: Seconds
    ones: tuple[BackwardPlan, ...] = ()

    def best(self, count: int) -> list[BackwardPlan]:
        """Of each family; the hopper family goes last where both are as fast."""
        few = product(islice(self.queries, count), islice(self.keys, count))
        pairs = sorted((self._pair(*tiles) for tiles in few), key=lambda plan: plan.seconds)
        return [*pairs[:count], *self.ones[:count]]

    def of(self, tiles: tuple[Tile, ...] | None) -> BackwardPlan | None:
        for one in self.ones:
            if tiles == one.tiles:
                return one
        able = tiles is not None and len(tiles) == 2 and tiles[0] in self.queries and tiles[1] in self.keys
        return self._pair(*tiles) if able and tiles is not None else None

    def _pair(self, queries: Tile, keys: Tile) -> BackwardPlan:
        return BackwardPlan((queries, keys), self.queries[queries] + self.keys[keys])


@lru_cache(maxsize=4096)
def _ranked(spec: AttentionSpec, problem: Problem, device: Device, deterministic: bool) -> _Able | Miss:
    if (widest := max(spec.head_dim, spec.value_dim)) > MAX_HEAD:
        return Miss(f"the head size {widest} is over the limit of {MAX_HEAD} for gradients by a kernel")
    try:
        plan = backward_of(spec)
    except Unprintable as reason:
        return Miss(str(reason))
    sides = zip(sides_of(plan, problem), REGISTER_LIMITS, strict=True)
    queries, keys = (_fitting(times_of(*side, device), device, limit) for side, limit in sides)
    if deterministic and any(target.shared for target in plan.extras):
        queries = {tile: 2 * seconds for tile, seconds in queries.items()}  # what is added to in no order takes two runs
    if spec.total is not None:
        queries = {tile: SUMMED_FIRST * seconds for tile, seconds in queries.items()}
    able = _Able(queries, keys)
    if device.hopper and not deterministic and hopper_bwd.unsuited(spec) is None:
        otherwise = able.best(1)[0].tiles if able.queries and able.keys else ()
        left = lost.floor(spec) is not None
        if otherwise or not left:
            tiles = hopper_bwd.tiles_of(spec)
            times = hopper_seconds(backward_of(lost.without(spec)), problem, device, tiles, otherwise if left else ())
            ones = [BackwardPlan((tile,), seconds, otherwise) for tile, seconds in zip(tiles, times, strict=True)]
            able = replace(able, ones=tuple(sorted(ones, key=lambda plan: plan.seconds)))
    return able if able.best(1) else Miss(f"no tile of a backward kernel fits {device.label}")


def sides_of(plan: Backward, problem: Problem) -> list[tuple[AttentionSpec, Problem, int, float]]:
    """Both kernels: the spec and the sizes in its own words, heads that share its programs, and whether it makes two sums."""
    spec = plan.spec
    members = 1
    for axis, by in plan.members:
        members *= by or problem.batch[spec.batch.index(axis)]
    turned = replace(problem, rows=problem.keys, keys=problem.rows)
    return [(spec, problem, 1, 0.0), (mirrored_spec(spec), turned, members, 1.0)]


Times = dict[Tile, tuple[float, float, float]]


def times_of(spec: AttentionSpec, problem: Problem, members: int, second: float, device: Device) -> Times:
    """Seconds, shared memory and registers of each tile."""
    at = _values(spec, problem, members, device, TILES)
    at[formulas_bwd.second] = second
    for formula in formulas_bwd.FORMULAS:
        at[formula.symbol] = evaluate(formula.expression, at)
    columns = [np.broadcast_to(at[s], len(TILES)).tolist() for s in (f.seconds, f.smem, f.registers)]
    return dict(zip(TILES, zip(*columns, strict=True), strict=True))


def _values(spec: AttentionSpec, problem: Problem, members: int, device: Device, tiles: Sequence[Tile]) -> Values:
    at: Values = {**of_device(device), **of_spec(spec, problem), **of_tiles(spec, problem, device, tiles)}
    return {**at, formulas_bwd.members: members, f.heads: problem.heads / members}


def hopper_seconds(
    plan: Backward, problem: Problem, device: Device, tiles: Sequence[Tile], behind: tuple[Tile, ...] = ()
) -> list[float]:
    """What the kernels of the hopper family are predicted to take with each of ``tiles``, and portable ones behind them."""
    sides = sides_of(plan, problem)
    _, (spec, turned, members, _) = sides
    width = hopper_bwd.padded(plan.spec)
    at = _values(spec, turned, members, device, tiles)
    values = 2 * plan.spec.value_dim * plan.spec.out_dtype.itemsize  # of the result and its gradient
    row = values + 8 * width + plan.spec.head_dim * plan.spec.query.dtype.itemsize  # and of the sums, twice
    at |= {f.d_pad: width, f.e_pad: width, formulas_hopper_bwd.row_bytes: problem.heads * problem.rows * row, **of_gain(spec)}
    by_tma = boxes.planes(plan.spec)
    at |= {f.plane_width: sum(x.dtype.itemsize for x in by_tma), f.lookups: at[f.pair_loads] - len(by_tma)}
    standby = sum(s.heads / n * -(-s.rows // each.rows) for each, (_, s, n, _) in zip(behind, sides, strict=False))
    at[formulas_hopper.persistent] = np.array([1.0 * tile.persistent for tile in tiles])
    at |= {formulas_hopper_bwd.behind: len(behind), formulas_hopper_bwd.standby: standby}
    if hopper_bwd.masks_everything(plan.spec):
        at[f.masked] = 1.0
    for formula in formulas_hopper_bwd.FORMULAS:
        at[formula.symbol] = evaluate(formula.expression, at)
    seconds: list[float] = np.broadcast_to(at[f.seconds], len(tiles)).tolist()
    return seconds


def _fitting(times: Times, device: Device, limit: int) -> Seconds:
    able = [(t, s) for t, (s, smem, registers) in times.items() if smem <= device.smem_block and registers <= limit]
    return dict(sorted(able, key=lambda pair: pair[1]))
