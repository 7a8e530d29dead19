"""What a forward kernel of the hopper family costs, in the symbols of ``attngen.formulas``: ``FORMULAS`` is the model.

A program fills its multiprocessor. One warp loads; warpgroups of 64 rows compute, and while one waits for its products
another one, or the same one's next block, does softmax. A step costs what its busier unit needs, and what does not
overlap of the other. Programs that stay (``persistent``) hide the start of a tile behind the end of the last one, and pay
for it in each step.

The constants are fitted to one half of the problems of tests/data/sweep_h100.json (see ``attngen.formulas``) together with an
earlier run: tests/data/hopper_fwd_h100.json; both on an H100 80GB HBM3 (torch 2.11, Triton 3.6).
"""

from __future__ import annotations

import sympy as sp

from attngen import formulas as f
from attngen.formulas import Formula

SOFTMAX_INSTRUCTIONS = 4.61  # per pair: maximum, shift and scale, sum, conversion
DROP_INSTRUCTIONS = 11  # per pair, where weights are dropped: counted in what is compiled for sm_90, a quarter of a Philox
MASK_INSTRUCTIONS = 10.3  # per pair of a masked block, besides the mask itself
STEP_CYCLES = 301  # of each step: barriers
STAY_CYCLES = 92  # of each step of a program that stays: whether the tile ends, and where the next one begins
START_CYCLES = 3055  # of each program: its barriers, the first word from memory
FIRST_SHARE = 0.394  # of the first block's products and softmax, what nothing overlaps with
LOOKUP_CYCLES = 0.054  # per pair, in blocks of 64 keys, and load of it by two warpgroups: addresses, words one by one
PLANE_CYCLES = 0.039  # per byte that TMA copies for each pair: to shared memory, and from there to the threads of the scores
VECTOR_CYCLES = 627  # of a step that reads something per key
AHEAD_CYCLES = 14  # of each further tile, for each feature and stage below three: the next tile is loaded late
FIND = 30  # memory latencies of the kernel that finds bounds in data
IDLE = 1  # memory latencies of a program of the kernel behind it that finds no flag; not measured
ENOUGH = 4  # tiles for each multiprocessor in a group of heads that take turns, or its longest would be waited for
SCORE_SHARE = 0.36  # of the operations of a score program; the others are folded into fused multiply-adds
OTHER_REGISTERS = 32  # of a thread, besides results, scores and weights
LOOKUP_REGISTERS = 0.6  # of a thread, for each key of a block and table: no kernel that was compiled spills where these fit
PIECE_REGISTERS = 4  # of a thread, for each further piece of queries and keys
RESULT_SHARE = 0.5  # of the registers of results in pieces, what more they take: no kernel that was compiled spills then
ROW_REGISTERS = 4  # of a thread, for each input per row: two rows' numbers, in 64 bits
DROP_REGISTERS = 20  # of a thread, where weights are dropped: the seed, counters and what is made of them
SINK_REGISTERS = 4  # of a thread, for each sink: what the maximum and the sum of a row become, and the factor between

# Flags, tiles of queries in shared memory, features of a row that wait there to be written, pieces of heads beyond the
# first (of queries and keys, of values), and what is defined here.
persistent, held, waiting, softmax, sinks = sp.symbols("persistent held waiting softmax sinks", nonnegative=True)
splits, e_splits = sp.symbols("splits e_splits", nonnegative=True)
# Inputs per row; the share of steps that read something per key; whether a kernel that finds bounds in data runs before.
row_vectors, reading, finds = sp.symbols("row_vectors reading finds", nonnegative=True)
drops = sp.Symbol("drops", nonnegative=True)  # 1 where weights are dropped
t_soft, t_first = sp.symbols("t_soft t_first", nonnegative=True)
_SHARED = {formula.symbol: formula for formula in f.FORMULAS}
_pairs = f.rows * f.keys
_gathers = f.pair_loads * (1 - sp.Min(1, f.plane_width))  # loads of a table: one address for each pair

_OWN = (
    Formula(f.threads, "", "of one program, with the warp that loads", f.warp * (f.warps + 1)),
    Formula(
        f.smem,
        "B",
        "shared memory: queries, keys and values, inputs per pair, results",
        f.q_width * f.rows * (held * f.d_pad + waiting)
        + f.kv_width * f.stages * f.keys * (f.d_pad + f.e_pad)
        + f.rows * f.keys * f.plane_width
        + 1024,
    ),
    Formula(
        f.registers,
        "",
        "per thread that computes: results, scores and weights, inputs per pair, sinks, dropout, the rest",
        f.e_pad / 2 * (1 + RESULT_SHARE * e_splits)
        + PIECE_REGISTERS * splits
        + f.keys / 2
        + f.keys * f.q_width / 8
        + f.keys * f.plane_width / 8
        + LOOKUP_REGISTERS * f.keys * _gathers
        + ROW_REGISTERS * row_vectors
        + SINK_REGISTERS * sinks
        + DROP_REGISTERS * drops
        + OTHER_REGISTERS,
    ),
    Formula(
        f.resident,
        "",
        "programs that share an SM",
        sp.Max(
            1,
            sp.Min(
                sp.ceiling(f.programs / f.sms),
                sp.floor(f.smem_sm / (f.smem + 1024)),
                sp.floor(f.registers_sm / (f.threads * 8 * sp.floor(f.registers_sm / (f.warp * (f.warps + 4)) / 8))),
            ),
        ),
    ),
    Formula(
        f.turns,
        "",
        "heads whose programs run at one time: groups as ``sharing.jinja`` makes them where the heaviest tiles come first",
        f.heavy * sp.ceiling(f.heads / sp.ceiling(f.heads / sp.Max(f.FITS, sp.ceiling(ENOUGH * f.sms / f.tiles))))
        + (1 - f.heavy) * sp.Max(1, f.sms * f.resident / f.tiles),
    ),
    Formula(
        f.pairs_read,
        "B",
        "loaded pairs read from HBM: heads that read the same take turns",
        sp.Min(f.pairs_once, f.pairs_streamed),
    ),
    Formula(f.t_mma, "s", "both products of one step", 2 * _pairs * (f.d_pad + f.e_pad) * f.sms / f.flops),
    Formula(
        f.t_alu,
        "s",
        "other arithmetic of one step: softmax, score, dropout, mask, rescaling the result",
        (
            _pairs
            * (
                SOFTMAX_INSTRUCTIONS * softmax
                + SCORE_SHARE * f.pair_ops
                + DROP_INSTRUCTIONS * drops
                + (MASK_INSTRUCTIONS + f.mask_ops) * f.masked
            )
            + f.rows * f.e_pad
        )
        / (f.lanes * f.clock),
    ),
    Formula(
        f.t_wait,
        "s",
        "what loads beside keys and values cost one step",
        (
            _pairs * (LOOKUP_CYCLES * f.keys / 64 * 8 / f.warps * _gathers + PLANE_CYCLES * f.plane_width)
            + VECTOR_CYCLES * reading
        )
        / f.clock,
    ),
    Formula(t_soft, "s", "what the warpgroups compute between products", f.t_exp + f.t_alu + f.t_wait),
    Formula(f.t_busy, "s", "the busiest unit in one step", sp.Max(f.t_mma, t_soft)),
    Formula(
        f.t_step,
        "s",
        "one step",
        sp.Max(
            f.t_busy + (STEP_CYCLES + STAY_CYCLES * persistent) / f.clock,
            f.t_load,
        ),
    ),
    Formula(
        t_first,
        "s",
        "what a program's first tile waits for: queries and first keys, a block that nothing overlaps with",
        START_CYCLES / f.clock + f.t_fill + FIRST_SHARE * (f.t_mma + t_soft),
    ),
    Formula(
        f.t_start,
        "s",
        "start and end of a tile; one that stays has loaded the next ahead",
        (t_first * (1 - persistent) + AHEAD_CYCLES * f.d_pad * sp.Max(0, 3 - f.stages) / f.clock * persistent) / f.resident,
    ),
    Formula(f.t_program, "s", "an average program", f.live * f.t_step + f.t_start),
    Formula(f.t_last, "s", "the program that starts last", f.last * f.t_step + f.t_start),
    f.grid_of(f.most * f.t_step + f.t_start),
    Formula(
        f.seconds,
        "s",
        "the call, with the one before it that finds bounds, the one behind it for rows that it leaves, and the start of"
        " programs that stay",
        f.launch * (1 + finds + f.redo)
        + FIND * f.latency * finds
        + IDLE * f.latency * f.redo * f.programs / f.sms
        + persistent * t_first
        + f.JOINED,
    ),
)
_BY_SYMBOL = {formula.symbol: formula for formula in _OWN}
_ORDER = (
    f.tiles, f.programs, f.threads, f.smem, f.registers, f.resident, *(formula.symbol for formula in f.TRAFFIC), f.t_mma,
    f.t_exp, f.t_alu, f.t_load, f.t_wait, t_soft, f.t_busy, f.t_step, t_first, f.t_start, f.t_program, f.t_last, f.t_grid,
    f.seconds,
)  # fmt: skip
FORMULAS = tuple(_BY_SYMBOL.get(symbol) or _SHARED[symbol] for symbol in _ORDER)
