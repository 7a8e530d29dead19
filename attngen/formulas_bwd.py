"""What one of the two backward kernels costs, as formulas with named symbols, in the manner of ``attngen.formulas``.

``rows`` are what a program holds (queries in the one kernel, keys in the other), ``keys`` what it goes over in one step;
``members`` heads of queries are gone over by one program that holds keys. A step makes the scores again and then three or
four products of the same size. What the units of a multiprocessor need is counted as in the forward; shared memory and
registers are what Triton's compiler allocates, fitted to kernels compiled for sm_90 with heads of 64, 128 and 256. The
constants below are fitted to one half of the backward problems of tests/data/sweep_h100.json (see ``attngen.formulas``),
where both kernels were timed together, and to 128 times of either kernel (tests/data/portable_bwd_h100.json; dense and
causal, heads of 64 and 128), all on an H100 80GB HBM3 (torch 2.11, Triton 3.6, bf16).
"""

from __future__ import annotations

import sympy as sp

from attngen import formulas as f
from attngen.formulas import Formula

SOFTMAX_INSTRUCTIONS = 6.7  # per pair: shift and scale, difference, product, two conversions
TURN_INSTRUCTIONS = 8  # per pair: weights and their gradients, turned over for the sums of keys and of values
MASK_INSTRUCTIONS = 50  # per pair of a masked block, besides the mask itself
COMPARE_INSTRUCTIONS = 100  # per pair of a masked block, where the mask reads what is loaded per key
PAIR_INSTRUCTIONS = 74  # per pair and input of it: moved to the layout of the scores, and its gradient from there
CHAIN_SHARE = 0.043  # of products and arithmetic of a step of 64, what does not overlap within its program
STEP_CYCLES = 720  # of latency: barriers, first results of four or five products, each after another
EXCHANGE_CYCLES = 1000  # of latency, where warps divide a row
STAGES, STAGE = 3, 0.9  # with fewer, each one less shows so many memory latencies per step
START = 14.5  # memory latencies of a program, for each head that it goes over
EASY_REGISTERS = 176  # beyond, the compiler reorders, recomputes and spills
SPILL_CYCLES = 1.25  # per warp, step and register beyond
LOAD_SHARE = 0.47  # of the time that loads keep the L2 cache busy, what adds to a step
SYNC_SHARE = 0.5  # of the rate of warp groups, for products that each warp does by itself
NARROWEST = 31  # columns of a product below which a warp group gains nothing from doing fewer
ONCE = 1.5  # of what is read once, the HBM traffic of either kernel, with what it writes

members = sp.Symbol("members", positive=True)
second = sp.Symbol("second", nonnegative=True)  # 1 for the kernel that makes two sums, of keys and of values

_split = sp.Min(1, f.ways - 1)
# Fitted to the registers (and a quarter of the bytes spilled) of 287 kernels compiled for sm_90 by Triton 3.6: causal,
# heads of 64 to 256, tiles of 32 to 128; off by 11 to 15 % (root of the mean square). The first serves warp groups.
_grouped = (
    1.41 * f.rows * (f.d_pad + second * f.e_pad) / f.threads
    + (2.13 + 0.33 * second) * f.rows * f.keys / f.threads
    + (0.79 + 0.71 * second) * f.keys * f.d_pad / f.threads
    + (0.23 - 0.19 * second) * f.d_pad
    + (45 + 20 * second) * _split
    + (23 + 25 * second) * f.unstaged
)
_ungrouped = (
    25
    + (1.12 * f.d_pad + 0.44 * second * f.e_pad) * f.rows / f.threads
    + (3.3 + 0.3 * second) * f.rows * f.keys / f.threads
    + (0.51 + 0.13 * second) * f.keys * f.d_pad / f.threads
    + (0.12 + 0.14 * second) * f.d_pad
    + 25 * _split
)

_narrowest = f.wgmma * NARROWEST + (1 - f.wgmma) * f.narrowest


def _slower(columns: sp.Expr) -> sp.Expr:
    """How much longer a product takes for having few columns, which warps divide."""
    return sp.Max(1, _narrowest * f.ways / columns)


_read = f.once + f.kv_once + f.pairs_once
FILL = Formula(
    f.t_fill,
    "s",
    "what a program waits for while all others do too: what it holds, and what it goes over first",
    (f.once + f.kv_once / sp.Max(1, f.live)) / f.programs * f.sms / f.bandwidth,
)

FORMULAS = (
    *f.GRID,
    Formula(
        f.smem,
        "B",
        "shared memory: what is held, and the stages of what is gone over; without warp groups, one is in registers",
        f.rows * (f.d_pad + f.e_pad) * f.q_width
        + sp.Max(1, f.stages - 1 + f.wgmma) * f.keys * ((f.d_pad + f.e_pad) * f.kv_width + 8 * second)
        + (1 - f.wgmma) * f.rows * f.keys * f.kv_width,
    ),
    Formula(
        f.registers,
        "",
        "per thread, if there were enough: sums, scores and their gradients, pointers",
        f.wgmma * _grouped + (1 - f.wgmma) * _ungrouped,
    ),
    f.RESIDENT,
    Formula(
        f.t_mma,
        "s",
        "the products of one step: two for the scores and their gradients, and the sums over what is gone over",
        2
        * f.rows
        * f.keys
        * ((f.d_pad + f.e_pad) * _slower(f.keys) + f.d_pad * _slower(f.d_pad) + second * f.e_pad * _slower(f.e_pad))
        * (1 + (1 / SYNC_SHARE - 1) * f.alone)
        * f.sms
        / f.flops,
    ),
    Formula(f.t_exp, "s", "special functions of one step", f.rows * f.keys * (1 + f.pair_specials) / (f.exp_rate * f.clock)),
    Formula(
        f.t_alu,
        "s",
        "other arithmetic of one step",
        f.rows
        * f.keys
        * (
            SOFTMAX_INSTRUCTIONS
            + TURN_INSTRUCTIONS * second
            + 2 * f.pair_ops
            + PAIR_INSTRUCTIONS * f.pair_loads
            + (MASK_INSTRUCTIONS + COMPARE_INSTRUCTIONS * sp.Min(1, f.vector_width) + f.mask_ops) * f.masked
        )
        / (f.lanes * f.clock),
    ),
    Formula(
        f.t_load,
        "s",
        "what is gone over, what is loaded per pair and its gradient, in one step, through the L2 cache",
        (f.keys * (f.d + f.e) * f.kv_width + 2 * f.rows * f.keys * f.pair_width) * f.sms / f.l2_bandwidth,
    ),
    Formula(
        f.t_spill,
        "s",
        "what too few registers cost one step",
        SPILL_CYCLES * f.warps * sp.Max(0, f.registers - EASY_REGISTERS) / f.clock,
    ),
    Formula(f.t_busy, "s", "the busiest unit in one step", sp.Max(f.t_mma, f.t_exp + f.t_alu + f.t_spill)),
    Formula(
        f.t_chain,
        "s",
        "what one step of a program waits for, one after another",
        CHAIN_SHARE * sp.sqrt(f.keys / 64) * (f.t_mma + f.t_exp + f.t_alu)
        + f.t_spill
        + STAGE * f.latency * sp.Max(0, STAGES - f.stages)
        + (STEP_CYCLES + EXCHANGE_CYCLES * _split) / f.clock,
    ),
    Formula(
        f.t_step,
        "s",
        "one step",
        sp.sqrt(f.t_busy**2 + (LOAD_SHARE * f.t_load) ** 2 + (f.t_chain / f.resident) ** 2),
    ),
    Formula(
        f.t_solo,
        "s",
        "one step of a program that is left alone on its SM",
        sp.sqrt(f.t_busy**2 + (LOAD_SHARE * f.t_load) ** 2 + f.t_chain**2),
    ),
    FILL,
    Formula(f.t_start, "s", "start, end and filling the pipeline", (START + f.SCAN * f.scanned) * f.latency),
    Formula(
        f.t_program,
        "s",
        "an average program",
        members * (f.live * f.t_step + f.t_start / f.resident) + f.t_fill / f.resident,
    ),
    Formula(
        f.t_last,
        "s",
        "the program that starts last",
        members * (f.last * f.t_step + f.t_start / f.resident) + f.t_fill / f.resident,
    ),
    f.fewer(LOAD_SHARE),
    f.grid_of(members * (f.most * f.t_solo + f.t_start) + f.t_fill, members * f.t_fewer),
    Formula(
        f.t_hbm,
        "s",
        "HBM traffic at the copy rate; the first kernel finds the L2 cache full of what must leave it",
        (ONCE * _read + (1 - second) * sp.Min(_read, f.WRITTEN_BACK * f.l2)) / f.bandwidth,
    ),
    Formula(f.seconds, "s", "the kernel", f.launch + f.JOINED),
)
