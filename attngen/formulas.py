"""What one forward kernel costs, as formulas with named symbols: ``FORMULAS`` is the model, in order of evaluation.

A kernel is a grid of programs, each holding ``rows`` queries and stepping over blocks of ``keys`` keys. Per step a
multiprocessor (SM) loads keys and values, does two products on its tensor cores and a softmax on its other units. These
depend on each other, so a program by itself leaves each unit idle while it waits; programs that share the SM fill the
gaps. A step therefore costs what its busiest unit needs (``t_busy``), its share of the latency of the chain through one
step (``t_chain / resident``) and of the loads, joined as a root of squares: near the largest where one dominates.

``smem`` and ``registers`` describe what Triton's compiler allocates for the portable template; tests hold them against
compiled kernels. The constants below, in cycles, instructions and shares, and a device's ``latency`` are fitted to one
run on an H100 80GB HBM3 (torch 2.11, Triton 3.6, bf16): 144 kernels of six sites, head sizes 64 to 256, tiles of 64
and 128 rows (tests/data/portable_fwd_h100.json), together with 24 times of plain Triton kernels of the same loop on an
H200 (tests/test_cost.py); what a lookup costs, to kernels with a table that were timed beside the hopper family's. Smaller
tiles, fp32 and other devices are the same formulas, extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

SOFTMAX_INSTRUCTIONS = 3  # per pair: shift and scale, sum, conversion
MASK_INSTRUCTIONS = 14  # per pair of a masked block, besides the mask itself: bounds of scores and loads, and, select
CHAIN_SHARE = 0.32  # of products and softmax of a block of 64 keys, what does not overlap within its program
STEP_CYCLES = 820  # of latency: barriers, first results of both products, reductions over a row
EXCHANGE_CYCLES = 530  # of latency: a row's maximum, sum and weights cross warps through shared memory
LOOKUP = 0.6  # of a memory latency: reading score or mask inputs and moving them to the layout of the scores
LOOKUP_INSTRUCTIONS = 22  # per pair: neither vectors nor one wide load serve what lies anywhere, and it changes its layout
STAGES = 3  # with fewer, each one less shows one memory latency per step
START = 6  # memory latencies of each loop of a program: queries, first keys and values, results
EASY_REGISTERS = 200  # beyond, the compiler reorders, recomputes and spills
SPILL_CYCLES = 0.9  # per warp, step and register beyond, of work and of latency alike
LOAD_SHARE = 0.53  # of the time that loads keep the L2 cache busy, what adds to a step


# ---------------------------------------------------------------------------------------------------------- the symbols

# The problem and the spec: lengths, head sizes (d of queries and keys, e of values; padded); bytes per element, per
# pair (of all loads, and of inputs with a row and a key dimension) and per key; inputs per pair, and those among them that
# are looked up; work per pair; distinct bytes; key blocks per query tile (on average, at most, in the program that starts
# last; share masked); loops over them; whether rows may be computed again; features of keys and values (padded) that are
# read one by one, neither in vectors nor by asynchronous copies, for their rows begin anywhere.
queries, heads, d, e, d_pad, e_pad = sp.symbols("queries heads d e d_pad e_pad", positive=True)
q_width, kv_width, pair_width, loose = sp.symbols("q_width kv_width pair_width loose", nonnegative=True)
plane_width, vector_width, pair_loads, lookups = sp.symbols("plane_width vector_width pair_loads lookups", nonnegative=True)
pair_ops, mask_ops, pair_specials = sp.symbols("pair_ops mask_ops pair_specials", nonnegative=True)
once, kv_once, pairs_once = sp.symbols("once kv_once pairs_once", nonnegative=True)
live, most, last, masked, loops, redo = sp.symbols("live most last masked loops redo", nonnegative=True)
# The tile, flags (0 or 1) that follow from tile, dtype and device, and in how many ways warps divide the keys of a row.
rows, keys, warps, stages = sp.symbols("rows keys warps stages", positive=True)
wgmma, fma, copies, unstaged = sp.symbols("wgmma fma copies unstaged", nonnegative=True)
flops, narrowest, ways = sp.symbols("flops narrowest ways", positive=True)
# The device.
sms, smem_sm, registers_sm, warps_sm, warp = sp.symbols("sms smem_sm registers_sm warps_sm warp", positive=True)
l2, bandwidth, l2_bandwidth, clock = sp.symbols("l2 bandwidth l2_bandwidth clock", positive=True)
exp_rate, lanes, latency, launch = sp.symbols("exp_rate lanes latency launch", positive=True)
# What the formulas define.
tiles, programs, threads, smem, registers, resident = sp.symbols(
    "tiles programs threads smem registers resident", positive=True
)
t_mma, t_exp, t_alu, t_spill, t_load, t_wait = sp.symbols("t_mma t_exp t_alu t_spill t_load t_wait", nonnegative=True)
t_busy, t_chain, t_step, t_start, t_program, t_last, t_grid = sp.symbols(
    "t_busy t_chain t_step t_start t_program t_last t_grid", nonnegative=True
)
streamed, in_flight, together, kv_read, pairs_streamed, pairs_read, hbm, t_hbm, seconds = sp.symbols(
    "streamed in_flight together kv_read pairs_streamed pairs_read hbm t_hbm seconds", nonnegative=True
)


@dataclass(frozen=True)
class Formula:
    """``symbol = expression``; ``meaning`` is for the reader."""

    symbol: sp.Symbol
    unit: str
    meaning: str
    expression: sp.Expr


_split = sp.Min(1, ways - 1)
_narrow = pair_loads * sp.Max(0, 64 - keys)  # such blocks are looked up by one pointer per pair
_AGAIN = 45  # of a second loop over the keys, for rows that are computed again
_loose = 20 * sp.Min(1, loose) + 2 * keys * loose / threads  # an element takes a register, and its pointer more
_fragments = (  # fitted to 285 kernels compiled for sm_90 and sm_80, then to the 172 of the measured run; its terms for
    # loose features and unstaged keys to 1,700 compiled for sm_80, sm_89 and sm_90 (Triton 3.6), rows computed again to 438
    5
    + 22 * (1 - wgmma)
    + (34 + 14 * wgmma) * _split
    + _AGAIN * redo
    + rows * ((0.9 + (0.25 + 0.1 * wgmma) * kv_width) * e_pad + 0.475 * (1 - wgmma) * q_width * d_pad) / threads
    + rows * keys * (0.8 + 0.4 * kv_width + (1.9 - wgmma) * pair_loads + 0.15 * sp.Min(4, sp.Max(0, mask_ops - 1))) / threads
    + keys * (0.16 * (d_pad + e_pad) + (0.09 + 0.11 * wgmma) * unstaged * d_pad) * kv_width / threads
    + _loose
    + 2 * _narrow * (1 - sp.Min(1, plane_width))
)
# Without tensor cores: of 64 tiles compiled for sm_90 (heads of 64 to 512), none that spills lies below the limit, which
# was raised for 16-bit tiles alone. No more than an upper limit.
_FMA_REGISTERS = 90
_work = rows * keys * sp.Max(d_pad, e_pad) / threads  # multiplications of one product without tensor cores
_scalar = _FMA_REGISTERS * (1 + redo) + (0.4 + 0.1 * unstaged) * _work + 10 * rows * keys / threads
_scalar_loads = 0.8 * sp.Max(0, rows * keys / threads - 8) * pair_loads

GRID = (
    Formula(tiles, "", "query tiles of one head", sp.ceiling(queries / rows)),
    Formula(programs, "", "programs of the grid", heads * tiles),
    Formula(threads, "", "of one program", warp * warps),
)
RESIDENT = Formula(
    resident,
    "",
    "programs that share an SM; registers are given out in groups of eight",
    sp.Max(
        1,
        sp.Min(
            sp.floor(smem_sm / (smem + 1024)),
            sp.floor(registers_sm / (8 * threads * sp.ceiling(sp.Min(255, registers) / 8))),
            sp.floor(warps_sm / warps),
            sp.ceiling(programs / sms),
        ),
    ),
)

FORMULAS = (
    *GRID,
    Formula(
        smem,
        "B",
        "shared memory: queries, weights between layouts, keys and values, inputs per pair and per key",
        rows * d_pad * q_width
        + (1 - wgmma) * (rows * keys * sp.Max(kv_width, 4 * _split) + 1024)
        + sp.Max(copies * keys * (d_pad + e_pad), keys * sp.Max(d_pad, e_pad)) * kv_width
        + rows * keys * (pair_width - plane_width)
        + sp.Max(1, stages - 1) * keys * (rows * plane_width + vector_width),
    ),
    Formula(
        registers,
        "",
        "per thread, if there were enough: result, scores and weights, pointers, queries",
        (1 - fma) * _fragments + fma * (_scalar + _scalar_loads + _loose),
    ),
    RESIDENT,
    Formula(
        t_mma,
        "s",
        "both products of one step; warps that divide keys and features do narrower ones",
        2
        * rows
        * keys
        * (d_pad * sp.Max(1, narrowest * ways / keys) + e_pad * sp.Max(1, narrowest * ways / e_pad))
        * sms
        / flops,
    ),
    Formula(t_exp, "s", "special functions of one step", rows * keys * (1 + pair_specials) / (exp_rate * clock)),
    Formula(
        t_alu,
        "s",
        "other arithmetic of one step: softmax, score, mask, rescaling the result",
        (
            rows
            * keys
            * (SOFTMAX_INSTRUCTIONS + pair_ops + LOOKUP_INSTRUCTIONS * lookups + (MASK_INSTRUCTIONS + mask_ops) * masked)
            + rows * e_pad
        )
        / (lanes * clock),
    ),
    Formula(
        t_load,
        "s",
        "keys, values and loaded pairs of one step, through the L2 cache",
        (keys * (d + e) * kv_width + rows * keys * pair_width) * sms / l2_bandwidth,
    ),
    Formula(
        t_spill,
        "s",
        "what too few registers cost one step: recomputing, moving, spilling",
        (1 - fma) * SPILL_CYCLES * warps * sp.Max(0, registers - EASY_REGISTERS) / clock,
    ),
    Formula(t_busy, "s", "the busiest unit in one step", sp.Max(t_mma, t_exp + t_alu + t_spill)),
    Formula(
        t_wait,
        "s",
        "memory latency that one step of a program shows",
        latency * (sp.Max(0, STAGES - stages) + LOOKUP * sp.Min(1, pair_loads + vector_width)),
    ),
    Formula(
        t_chain,
        "s",
        "what one step of a program waits for, one after another; in wide blocks less overlaps",
        CHAIN_SHARE * sp.sqrt(keys / 64) * (t_mma + t_exp + t_alu)
        + t_spill
        + t_wait
        + (STEP_CYCLES + EXCHANGE_CYCLES * _split) / clock,
    ),
    Formula(
        t_step,
        "s",
        "one step",
        sp.sqrt(t_busy**2 + (LOAD_SHARE * t_load) ** 2 + (t_chain / resident) ** 2),
    ),
    Formula(t_start, "s", "start, end and filling the pipeline of each loop", START * latency * loops / resident),
    Formula(t_program, "s", "an average program", live * t_step + t_start),
    Formula(t_last, "s", "the program that starts last", last * t_step + t_start),
    Formula(
        t_grid,
        "s",
        "the grid: even shares, the unfilled last wave, and no less than the longest program",
        sp.Max(programs / sms * t_program + (sp.ceiling(programs / sms) - programs / sms) * t_last, most * t_step + t_start),
    ),
    Formula(streamed, "B", "keys and values that all programs ask for", programs * live * keys * (d + e) * kv_width),
    Formula(
        in_flight,
        "B",
        "keys and values of the heads that run at one time",
        kv_once * sp.Min(1, sp.Max(1, sms * resident / tiles) / heads),
    ),
    Formula(
        together,
        "",
        "programs of one head that go through its keys side by side, if half of the L2 cache holds a block for each",
        sp.Max(1, sp.Min(tiles, sms * resident, l2 / (2 * keys * (d + e) * kv_width))),
    ),
    Formula(
        kv_read,
        "B",
        "of these, read from HBM: once, and again for all that go together as far as half of the L2 cache lacks room",
        sp.Min(kv_once, streamed) + sp.Max(0, streamed / together - kv_once) * sp.Max(0, 1 - l2 / (2 * in_flight)),
    ),
    Formula(pairs_streamed, "B", "loaded pairs of all programs", heads * queries * live * keys * pair_width),
    Formula(
        pairs_read,
        "B",
        "of these, read from HBM",
        sp.Min(pairs_once, pairs_streamed)
        + sp.Max(0, pairs_streamed - pairs_once) * sp.Max(0, 1 - l2 / (2 * sp.Max(1, pairs_once))),
    ),
    Formula(hbm, "B", "HBM traffic; queries, results and vectors move once", once + kv_read + pairs_read),
    Formula(t_hbm, "s", "HBM traffic at the copy rate", hbm / bandwidth),
    Formula(seconds, "s", "the call", launch + sp.Max(t_grid, t_hbm)),
)
