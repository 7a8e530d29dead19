"""What the backward of the hopper family costs, as formulas with named symbols, in the manner of ``attngen.formulas_bwd``.

``rows`` are the keys that a program holds, ``keys`` the queries of one step: five products of that size, between which two
warpgroups compute the weights and their gradients. A kernel before and one after it go over the queries once; where it leaves
rows to portable kernels, these are launched behind it, and their programs mostly find that there are none.

The constants are fitted to one half of the backward problems of tests/data/sweep_h100.json (see ``attngen.formulas``),
together with an earlier run (16,384 tokens, heads of 64 and 128, full and causal, lengths of 1,024 to 16,384;
tests/data/hopper_bwd_h100.json: off by at most 8 %), both on an H100 (torch 2.11, Triton 3.6, bf16). Those of
what is loaded for pairs are from an H200, 4 x 16 heads of 128 and of 64, 4,096 tokens: 2.77 and 1.75 ms with a bias in bf16,
3.6 and 3.02 ms with a table of distances, where what loads neither took 0.91 of the prediction (1.24 ms causal, 1.35 ms with
a prefix of 1,024). Those of programs that stay are from an H100, too, beside programs of one tile in the same run
(tests/data/hopper_bwd_h100.json: off by at most 7 %). What sums take of the L2 cache is from heads of 256 on an H200, whose
steps wait for it (tests/data/hopper_bwd_h200.json: off by at most 7 %). That of programs that stand by is assumed.
"""

from __future__ import annotations

import sympy as sp

from attngen import formulas as f
from attngen.formulas import Formula
from attngen.formulas_bwd import FILL, members
from attngen.formulas_hopper import DROP_INSTRUCTIONS, drops, persistent, t_first

EXPOSED = 0.377  # of what the warpgroups compute, what does not overlap with products
SOFTMAX_INSTRUCTIONS = 15  # per pair: shift and scale, difference, product, conversions, both exchanged in shared memory
SCORE_SHARE = 0.234  # of the operations of a score program, for its value and its derivative each
MASK_INSTRUCTIONS = 0.35  # per pair of a masked block, besides the mask itself
ADDED = 1.22  # times the bytes of sums, what adding to them in the L2 cache takes of its bandwidth
STEP_CYCLES = 25.6  # of each step, besides: barriers
START_CYCLES = 9190  # of each program: its barriers, first loads, first product, results
TURN_CYCLES = 7500  # of each tile of a program that stays: its first product and weights, results
STAY_CYCLES = 102  # of each of its steps with heads of 128: it reads its place again while products saturate shared memory

LOOKUP_CYCLES = 0.36  # per pair, and load of it by two warpgroups: addresses, words one by one
PLANE = 1.6  # memory latencies of a step that TMA copies something per pair for: its one buffer is free when it has been read
STANDBY = 3  # memory latencies of a program that stands by: it finds a flag that is not set

row_bytes = sp.Symbol("row_bytes", positive=True)
behind, standby = sp.symbols("behind standby", nonnegative=True)  # portable kernels that stand by, and their programs
t_soft, t_l2, t_rows, t_behind = sp.symbols("t_soft t_l2 t_rows t_behind", nonnegative=True)
_pairs = f.rows * f.keys

FORMULAS = (
    Formula(f.tiles, "", "tiles of the keys of one head", sp.ceiling(f.queries / f.rows)),
    Formula(f.programs, "", "programs of the grid", f.heads * f.tiles),
    Formula(f.t_mma, "s", "the five products of one step", 2 * _pairs * (3 * f.d_pad + 2 * f.e_pad) * f.sms / f.flops),
    Formula(f.t_exp, "s", "special functions of one step", _pairs * (1 + f.pair_specials) / (f.exp_rate * f.clock)),
    Formula(
        f.t_alu,
        "s",
        "other arithmetic of one step",
        _pairs
        * (
            SOFTMAX_INSTRUCTIONS
            + 2 * SCORE_SHARE * f.pair_ops
            + DROP_INSTRUCTIONS * drops
            + (MASK_INSTRUCTIONS + f.mask_ops) * f.masked
        )
        / (f.lanes * f.clock),
    ),
    Formula(
        f.t_wait,
        "s",
        "what is looked up for each pair of one step",
        _pairs * LOOKUP_CYCLES * f.lookups / f.clock,
    ),
    Formula(t_soft, "s", "what the warpgroups compute between products", f.t_exp + f.t_alu + f.t_wait),
    Formula(
        t_l2,
        "s",
        "queries, gradients and sums of one step, from the L2 cache and to it",
        f.keys * ((f.d + f.e) * f.kv_width + 4 * ADDED * f.d_pad) * f.sms / f.l2_bandwidth,
    ),
    Formula(
        f.t_step,
        "s",
        "one step",
        sp.Max(sp.Max(f.t_mma, t_soft) + EXPOSED * sp.Min(f.t_mma, t_soft), t_l2)
        + (STEP_CYCLES + STAY_CYCLES * persistent * (f.d_pad / 64 - 1)) / f.clock
        + PLANE * f.latency * sp.Min(1, f.plane_width),
    ),
    FILL,
    Formula(t_first, "s", "start and end of a program", START_CYCLES / f.clock + f.t_fill),
    Formula(
        f.t_start,
        "s",
        "start and end of a tile; one that stays has loaded the next ahead",
        (1 - persistent) * t_first + persistent * TURN_CYCLES / f.clock,
    ),
    Formula(f.t_program, "s", "an average program", members * f.live * f.t_step + f.t_start),
    Formula(f.t_last, "s", "the program that starts last", members * f.last * f.t_step + f.t_start),
    f.grid_of(members * f.most * f.t_step + f.t_start),
    Formula(
        t_rows,
        "s",
        "what is done row by row, before and after the products, and what must leave the L2 cache first",
        (row_bytes + sp.Min(f.once + f.kv_once, f.WRITTEN_BACK * f.l2)) / f.bandwidth,
    ),
    Formula(
        t_behind,
        "s",
        "portable kernels behind these, which have nothing to do",
        behind * f.launch + STANDBY * f.latency * standby / f.sms,
    ),
    Formula(
        f.seconds,
        "s",
        "all kernels, and the start of programs that stay",
        3 * f.launch + t_rows + f.t_grid + t_first - f.t_start + t_behind,
    ),
)
