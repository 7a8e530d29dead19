"""The cost of a spec on a device for each tile: numbers for the symbols of ``attngen.formulas``, and the result.

Also the cost before: the memory traffic of the model's own spelling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy as sp

from attngen import bounds, boxes, formulas_hopper, hopper, lost
from attngen import formulas as f
from attngen.algebra import ONE, Expr, Load
from attngen.device import Device
from attngen.finder import data_of
from attngen.index import Axis
from attngen.layout import UNIT
from attngen.mask import derive, heavy_first
from attngen.portable import MIN_DOT
from attngen.spec import HOPPER, KEY, PORTABLE, ROW, AttentionSpec, Input, Problem, Tile
from attngen.work import bindings, bytes_of, count_blocks, evaluate, operations, score_passes

if TYPE_CHECKING:
    from attngen.choose import Plan

# Estimated, without tensor cores: operands that spill cost less than those that many small tiles read, up to where the
# compiler gives up and keeps them all in memory. Of 44 tiles compiled for sm_90, it did so from 952 on, and not up to 673; by
# the sweep (tests/data/sweep_h100.json) one tile at 673 is 1.6 times as fast as any that spills nothing.
EXACT_LIMIT = 850
REGISTER_LIMIT = 320  # estimated; up to there spills cost time but were measured among the fastest tiles


# ------------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Parts:
    """Seconds each resource is busy (they overlap), and what uneven shares, starts and the launch add."""

    mma: float
    exp: float
    alu: float
    load: float
    waves: float
    launch: float


@dataclass(frozen=True)
class Cost:
    """One candidate. ``registers`` is an estimate; above ``limit`` the kernel would spill too much."""

    seconds: float
    hbm_bytes: int
    smem_bytes: int
    registers: int
    parts: Parts
    limit: int = REGISTER_LIMIT


Values = dict[sp.Symbol, Any]  # numbers, or arrays with one number per tile
FORMULAS = {PORTABLE: f.FORMULAS, HOPPER: formulas_hopper.FORMULAS}


def costs(spec: AttentionSpec, problem: Problem, device: Device, tiles: Sequence[Tile]) -> list[Cost]:
    """The cost of each tile, in order."""
    found: dict[Tile, Cost] = {}
    for family in FORMULAS:
        members = [tile for tile in tiles if tile.family == family]
        if members:
            table = evaluated(spec, problem, device, members)
            columns = {symbol: np.broadcast_to(value, len(members)).tolist() for symbol, value in table.items()}
            for k, tile in enumerate(members):
                found[tile] = _cost({symbol: column[k] for symbol, column in columns.items()})
    return [found[tile] for tile in tiles]


def _cost(at: dict[sp.Symbol, float]) -> Cost:
    steps = at[f.programs] * at[f.live] / at[f.sms]
    parts = Parts(
        mma=steps * at[f.t_mma],
        exp=steps * at[f.t_exp],
        alu=steps * at[f.t_alu],
        load=max(steps * at[f.t_load], at[f.t_hbm]),
        waves=at[f.t_grid] - steps * at[f.t_step],
        launch=at[f.seconds] - max(at[f.t_grid], at[f.t_hbm]),
    )
    limit = EXACT_LIMIT if at[f.fma] else REGISTER_LIMIT
    return Cost(at[f.seconds], round(at[f.hbm]), round(at[f.smem]), round(at[f.registers]), parts, limit)


def evaluated(spec: AttentionSpec, problem: Problem, device: Device, tiles: Sequence[Tile]) -> Values:
    """Every symbol of the model, for tiles of one family at once."""
    known = lost.without(spec) if tiles[0].family == HOPPER else spec
    at = {**of_device(device), **of_spec(known, problem), **of_tiles(known, problem, device, tiles)}
    if tiles[0].family == HOPPER:
        at[f.redo] = 1.0 * (lost.floor(spec) is not None)
        at |= _of_hopper(spec, tiles, at[f.masked])
    for formula in FORMULAS[tiles[0].family]:
        at[formula.symbol] = evaluate(formula.expression, at)
    return at


# -------------------------------------------------------------------------------------------------- values of symbols


def of_device(device: Device) -> Values:
    return {
        f.sms: device.sms,
        f.smem_sm: device.smem_sm,
        f.registers_sm: device.registers_sm,
        f.warps_sm: device.warps_sm,
        f.warp: device.warp_size,
        f.l2: device.l2_bytes,
        f.bandwidth: device.hbm_bandwidth,
        f.l2_bandwidth: device.l2_bandwidth,
        f.clock: device.clock,
        f.exp_rate: device.exp_per_clock,
        f.lanes: device.lanes_per_clock,
        f.latency: device.latency,
        f.launch: device.launch,
    }


def padded(count: int) -> int:
    """The size at which the template holds ``count`` features."""
    return max(MIN_DOT, 1 << (count - 1).bit_length())


def of_spec(spec: AttentionSpec, problem: Problem) -> Values:
    in_score, in_mask = operations(spec, spec.score) + operations(spec, spec.gain), operations(spec, spec.mask)
    width = 1 if spec.fp8 else 0  # of an operand that is written in 8 bits and read again; else it is read as it is
    q_once, k_once, v_once = (bytes_of(spec, problem, x) * (1.0 + width) for x in (spec.query, spec.keys, spec.values))
    pairs = [x for x in spec.extras if _varies(x, ROW) and _varies(x, KEY)]
    vectors = [x for x in spec.extras if _varies(x, KEY) and x not in pairs]
    others = sum(bytes_of(spec, problem, x) for x in spec.extras if x not in pairs)
    lines = problem.heads * problem.rows
    k_width, v_width = (width or x.dtype.itemsize for x in (spec.keys, spec.values))
    kv_each = problem.keys * (spec.head_dim * k_width + spec.value_dim * v_width)
    return {
        f.queries: problem.rows,
        f.heads: problem.heads,
        f.d: spec.head_dim,
        f.e: spec.value_dim,
        f.d_pad: padded(spec.head_dim),
        f.e_pad: padded(spec.value_dim),
        f.q_width: width or spec.query.dtype.itemsize,
        f.kv_width: k_width,
        f.pair_width: in_score.loaded + in_mask.loaded,
        f.plane_width: sum(x.dtype.itemsize for x in pairs if x.dim_of(KEY) is not None),
        f.vector_width: sum(x.dtype.itemsize for x in vectors),
        f.pair_loads: len(pairs),
        f.lookups: sum(x.dim_of(KEY) is None for x in pairs),
        f.loose: sum(padded(n) for n in (spec.head_dim, spec.value_dim) if n % UNIT),
        f.pair_ops: in_score.arithmetic,
        f.mask_ops: in_mask.arithmetic,
        f.pair_specials: in_score.special - (not spec.softmax),  # beside the exponential
        f.key_masks: 1.0 * _reads_keys(spec.mask),
        f.redo: 1.0 * (spec.whole is not None),
        f.once: q_once + others + lines * (spec.value_dim * spec.out_dtype.itemsize + 4 * spec.lse),
        f.kv_once: k_once + v_once,
        f.kv_each: float(max(1, kv_each)),
        f.sharers: max(1.0, problem.heads * kv_each / max(1.0, k_once + v_once)),
        f.pairs_once: float(sum(bytes_of(spec, problem, x) for x in pairs)),
    }


def _varies(source: Input, axis: Axis) -> bool:
    return any(place.has(axis) for place in source.index)


def of_tiles(spec: AttentionSpec, problem: Problem, device: Device, tiles: Sequence[Tile]) -> Values:
    cover, sizes = derive(spec.mask), bindings(spec, problem)
    shapes = dict.fromkeys((t.rows, t.keys) for t in tiles)
    blocks = {shape: count_blocks(cover, sizes, problem, *shape) for shape in shapes}
    visited = [blocks[t.rows, t.keys] for t in tiles]
    high, wide, warp_count, depth = (np.array([getattr(t, f) for t in tiles], float) for f in _TILE_FIELDS)
    exact = spec.query.dtype.itemsize >= 4 and not spec.tf32
    grouped = (high >= 64) & (warp_count % 4 == 0) & (device.wgmma and not exact)
    rate = device.fp32 if exact else (device.tensor32 if spec.tf32 else device.tensor16 * (2 if spec.fp8 else 1))
    by_warp = ~grouped & (device.wgmma and not exact)
    scans = any(i.among for i in (*cover.visit, *cover.partial))
    return {
        f.rows: high,
        f.keys: wide,
        f.warps: warp_count,
        f.stages: depth,
        f.live: np.array([b.mean for b in visited]),
        f.most: np.array([b.most for b in visited]),
        f.last: np.array([b.last for b in visited]),
        f.masked: np.array([b.masked / max(b.mean, 1e-9) for b in visited]),
        f.loops: np.minimum([b.stretches for b in visited], 3.0 if bounds.is_plain(cover) else 2.0),  # else masked ones share
        f.scanned: 1.0 * scans * np.ceil(problem.keys / (bounds.SCANNED * warp_count)),
        f.heavy: 1.0 * heavy_first(cover),
        f.wgmma: 1.0 * grouped,
        f.alone: 1.0 * by_warp,
        f.fma: 1.0 * exact,
        f.copies: np.where(depth == 1, 0, depth - 1 + grouped),
        f.unstaged: 1.0 * (depth == 1),
        f.ways: np.where(exact, 1, np.maximum(1, 16 * warp_count / high)),
        f.flops: rate,
        f.narrowest: np.where(grouped, 64.0, 8.0),
    }


def _of_hopper(spec: AttentionSpec, tiles: Sequence[Tile], masked: Any) -> Values:
    inner, features = boxes.pieces(spec), boxes.results(spec)
    return {
        f.d_pad: boxes.held(inner),
        f.e_pad: boxes.held(features),
        formulas_hopper.row_vectors: sum(_varies(x, ROW) and not _varies(x, KEY) for x in spec.extras),
        formulas_hopper.reading: np.maximum(1.0 * _reads_keys(spec.score), masked * _reads_keys(spec.mask)),
        formulas_hopper.finds: 1.0 * bool(data_of(derive(spec.mask))),
        formulas_hopper.splits: len(inner) - 1,
        formulas_hopper.e_splits: len(features) - 1,
        formulas_hopper.waiting: sum(piece.part for piece in features) * (2 if spec.fp8 else 1),  # in widths of a query
        formulas_hopper.held: np.array([hopper.queries_held(spec, t) for t in tiles]),
        formulas_hopper.softmax: 1.0 * spec.softmax,
        formulas_hopper.sinks: len(spec.sinks),
        **of_gain(spec),
        formulas_hopper.persistent: np.array([1.0 * t.persistent for t in tiles]),
    }


def of_gain(spec: AttentionSpec) -> Values:
    """Of a family that takes no gain but that of dropout, whose operations it has a number for."""
    return {f.pair_ops: operations(spec, spec.score).arithmetic, formulas_hopper.drops: 1.0 * (spec.gain != ONE)}


def _reads_keys(expr: Expr) -> bool:
    """Something of ``expr`` is loaded once per key."""
    return any(isinstance(node, Load) and KEY in node.axes and ROW not in node.axes for node in expr.walk())


_TILE_FIELDS = ("rows", "keys", "warps", "stages")


# --------------------------------------------------------------------------------------------------------- explanation


def formula(plan: Plan, device: Device) -> list[str]:
    """The model with the numbers of a plan put in, one line per quantity."""
    at = evaluated(plan.spec, plan.problem, device, [plan.tile])
    values = {symbol.name: float(np.ravel(value)[0]) for symbol, value in at.items()}
    return [_line(row, values) for row in FORMULAS[plan.tile.family]]


def _line(row: f.Formula, values: dict[str, float]) -> str:
    text = sp.sstr(row.expression, order="none", full_prec=False)
    numbers = re.sub(r"[a-z]\w*", lambda m: f"{values[m[0]]:.4g}" if m[0] in values else m[0], text)
    result = f"{values[row.symbol.name]:.4g}{' ' + row.unit if row.unit else ''}"
    return f"{row.symbol.name} = {text} = {numbers} = {result}  ({row.meaning})"


# ------------------------------------------------------------------------------------------------------------- before


def eager_hbm_bytes(spec: AttentionSpec, problem: Problem, scores: int | None = None) -> int:
    """HBM traffic of the unfused spelling: the first product writes all ``scores``, each pointwise operator and the softmax
    read and write them, the second product reads them."""
    pairs = problem.heads * problem.rows * problem.keys if scores is None else scores
    passes = 1 + 2 * score_passes(spec) + 2 + 1
    results = problem.heads * problem.rows * spec.value_dim * spec.out_dtype.itemsize
    read = sum(bytes_of(spec, problem, x) for x in spec.inputs)
    return pairs * passes * spec.query.dtype.itemsize + read + results
