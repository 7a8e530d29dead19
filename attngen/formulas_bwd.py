"""What one of the two backward kernels costs, as formulas with named symbols, in the manner of ``attngen.formulas``.

``rows`` are what a program holds (queries in the one kernel, keys in the other), ``keys`` what it goes over in one step;
``members`` heads of queries are gone over by one program that holds keys. A step makes the scores again and then three or
four products of the same size. What the units of a multiprocessor need is counted as in the forward; shared memory and
registers are what Triton's compiler allocates, fitted to kernels compiled for sm_90 with heads of 64, 128 and 256. The
constants below are fitted to 134 times of both kernels on an H100 80GB HBM3 (torch 2.11, Triton 3.6, bf16; dense and causal,
heads of 64 to 256, tests/data/portable_bwd_h100.json), of those tiles that are not refused: off by 24 % (root of the mean
square).
"""

from __future__ import annotations

import sympy as sp

from attngen import formulas as f
from attngen.formulas import Formula

SOFTMAX_INSTRUCTIONS = 4.6  # per pair: shift and scale, difference, product, two conversions
CHAIN_SHARE = 0.175  # of products and arithmetic of a step of 64, what does not overlap within its program
STEP_CYCLES = 240  # of latency: barriers, first results of four or five products, each after another
STAGES, STAGE = 3, 1.57  # with fewer, each one less shows so many memory latencies per step
START = 8.5  # memory latencies of each loop of a program
EASY_REGISTERS = 126  # beyond, the compiler reorders, recomputes and spills
SPILL_CYCLES = 1.17  # per warp, step and register beyond

members = sp.Symbol("members", positive=True)
second = sp.Symbol("second", nonnegative=True)  # 1 for the kernel that makes two sums, of keys and of values

_work = 2 * f.rows * f.keys * (2 * f.d_pad + (1 + second) * f.e_pad)  # of all products of one step
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

FORMULAS = (
    *f.GRID,
    Formula(
        f.smem,
        "B",
        "shared memory: what is held, and the stages of what is gone over",
        f.rows * (f.d_pad + f.e_pad) * f.q_width
        + sp.Max(1, f.stages) * f.keys * ((f.d_pad + f.e_pad) * f.kv_width + 8)
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
        "the products of one step: two over the features of keys and one or two over those of values, or one",
        2
        * f.rows
        * f.keys
        * (2 * f.d_pad + (1 + second) * f.e_pad)
        * sp.Max(1, f.narrowest * f.ways / f.keys)
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
        * (SOFTMAX_INSTRUCTIONS + 2 * f.pair_ops + (f.MASK_INSTRUCTIONS + f.mask_ops) * f.masked)
        / (f.lanes * f.clock),
    ),
    Formula(
        f.t_load,
        "s",
        "what is gone over and what is loaded per pair in one step, through the L2 cache",
        (f.keys * (f.d + f.e) * f.kv_width + f.rows * f.keys * f.pair_width) * f.sms / f.l2_bandwidth,
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
        + STEP_CYCLES / f.clock,
    ),
    Formula(
        f.t_step,
        "s",
        "one step",
        sp.sqrt(f.t_busy**2 + (f.LOAD_SHARE * f.t_load) ** 2 + (f.t_chain / f.resident) ** 2),
    ),
    Formula(f.t_start, "s", "start, end and filling the pipeline of each loop", START * f.latency * f.loops / f.resident),
    Formula(f.t_program, "s", "an average program", members * (f.live * f.t_step + f.t_start)),
    Formula(
        f.t_grid,
        "s",
        "the grid: even shares, the unfilled last wave, and no less than the longest program",
        sp.Max(
            sp.ceiling(f.programs / f.sms) * members * (f.last * f.t_step + f.t_start)
            + f.programs / f.sms * (f.t_program - members * (f.last * f.t_step + f.t_start)),
            members * (f.most * f.t_step + f.t_start),
        ),
    ),
    Formula(f.seconds, "s", "the kernel", f.launch + f.t_grid),
)
