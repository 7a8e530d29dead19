"""The tiles of a backward: of the two portable kernels each on its own, or the one of the hopper family, if it is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np

from attngen import formulas as f
from attngen import formulas_bwd, formulas_hopper_bwd, hopper_bwd
from attngen.cost import Values, of_device, of_spec, of_tiles
from attngen.device import Device
from attngen.errors import Miss
from attngen.gradient import Backward, backward_of, mirrored_spec
from attngen.printer import Unprintable
from attngen.spec import AttentionSpec, Problem, Tile
from attngen.work import evaluate

# Estimated; beyond, a kernel spills too much: the one that holds queries, and the one that makes two sums.
REGISTER_LIMITS = (420, 330)
MAX_HEAD = 256

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
    spec: AttentionSpec, problem: Problem, device: Device, *, deterministic: bool = False
) -> BackwardPlan | Miss:
    """The plan for the gradients of ``spec``, or why no kernel computes them.

    ``deterministic`` leaves out the family whose programs add to each other's results.
    """
    if (widest := max(spec.head_dim, spec.value_dim)) > MAX_HEAD:
        return Miss(f"the head size {widest} is over the limit of {MAX_HEAD} for gradients by a kernel")
    try:
        plan = backward_of(spec)
    except Unprintable as reason:
        return Miss(str(reason))
    sides = zip(sides_of(plan, problem), REGISTER_LIMITS, strict=True)
    queries, keys = (_best(times_of(*side, device), device, limit) for side, limit in sides)
    portable = None
    if queries is not None and keys is not None:
        portable = BackwardPlan((queries[0], keys[0]), queries[1] + keys[1])
    if device.wgmma and not deterministic and hopper_bwd.unsuited(spec) is None:
        one = BackwardPlan((hopper_bwd.tile_of(spec),), hopper_seconds(plan, problem, device))
        if portable is None or one.seconds < portable.seconds:
            return replace(one, otherwise=portable.tiles if portable else ())
    return portable or Miss(f"no tile of a backward kernel fits {device.label}")


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


def hopper_seconds(plan: Backward, problem: Problem, device: Device) -> float:
    """What the kernels of the hopper family are predicted to take."""
    _, (spec, turned, members, _) = sides_of(plan, problem)
    width = hopper_bwd.padded(plan.spec)
    at = _values(spec, turned, members, device, [hopper_bwd.tile_of(plan.spec)])
    values = 2 * plan.spec.value_dim * plan.spec.out_dtype.itemsize  # of the result and its gradient
    row = values + 8 * width + plan.spec.head_dim * plan.spec.query.dtype.itemsize  # and of the sums, twice
    at |= {f.d_pad: width, f.e_pad: width, formulas_hopper_bwd.row_bytes: problem.heads * problem.rows * row}
    if hopper_bwd.reads_mask(plan.spec):
        at[f.masked] = 1.0
    for formula in formulas_hopper_bwd.FORMULAS:
        at[formula.symbol] = evaluate(formula.expression, at)
    return float(np.ravel(at[f.seconds])[0])


def _best(times: Times, device: Device, limit: int) -> tuple[Tile, float] | None:
    able = [(t, s) for t, (s, smem, registers) in times.items() if smem <= device.smem_block and registers <= limit]
    return min(able, key=lambda pair: pair[1], default=None)
