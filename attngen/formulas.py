"""What one forward kernel costs, as formulas with named symbols: ``FORMULAS`` is the model, in order of evaluation.

A kernel is a grid of programs, each holding ``rows`` queries and stepping over blocks of ``keys`` keys. Per step a
multiprocessor (SM) loads keys and values, does two products on its tensor cores and a softmax on its other units. How
far these overlap depends on how many programs share the SM and, within one, on how much room its scores leave.

``smem`` and ``registers`` describe what Triton's compiler allocates for the portable template; tests hold them against
compiled kernels. ``overlap`` and the arithmetic per pair are set by plain Triton kernels of the same loop on one H200
(bf16, 128x64 w8 s3 and 128x128 w8 s2, head sizes 64 and 128): four numbers, not a calibration. The rest is what the
hardware's documents say.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

SOFTMAX_INSTRUCTIONS = 5  # per pair: maximum, scale and shift, sum, conversion, and moving them
EXCHANGE_CYCLES = 150  # a row's maximum and sum cross warps through shared memory
MASK_INSTRUCTIONS = 3  # per pair of a masked block, besides the mask itself: bounds test, and, select
STEP_CYCLES = 40  # barriers and addresses of one step
JITTER = 0.05  # of the latency that stages hide on average, what still shows
START_LATENCIES = 3  # of a program: its queries, its first keys, its results


# ---------------------------------------------------------------------------------------------------------- the symbols

# The problem and the spec: lengths, head sizes (d of queries and keys, e of values; padded); bytes per element, per
# pair (of all loads, and of inputs with a row and a key dimension) and per key; work per pair; distinct bytes; key
# blocks per query tile (on average, at most, in the program that starts last; share masked).
queries, heads, d, e, d_pad, e_pad = sp.symbols("queries heads d e d_pad e_pad", positive=True)
q_width, kv_width, pair_width = sp.symbols("q_width kv_width pair_width", nonnegative=True)
plane_width, vector_width, pair_loads = sp.symbols("plane_width vector_width pair_loads", nonnegative=True)
pair_ops, mask_ops, pair_specials = sp.symbols("pair_ops mask_ops pair_specials", nonnegative=True)
once, kv_once, pairs_once = sp.symbols("once kv_once pairs_once", nonnegative=True)
live, most, last, masked = sp.symbols("live most last masked", nonnegative=True)
# The tile, and flags (0 or 1) that follow from tile, dtype and device.
rows, keys, warps, stages = sp.symbols("rows keys warps stages", positive=True)
wgmma, fma, copies, unstaged, split = sp.symbols("wgmma fma copies unstaged split", nonnegative=True)
flops, narrowest = sp.symbols("flops narrowest", positive=True)
# The device.
sms, smem_sm, registers_sm, warps_sm, warp = sp.symbols("sms smem_sm registers_sm warps_sm warp", positive=True)
l2, bandwidth, l2_bandwidth, clock = sp.symbols("l2 bandwidth l2_bandwidth clock", positive=True)
exp_rate, lanes, latency, launch = sp.symbols("exp_rate lanes latency launch", positive=True)
# What the formulas define.
tiles, programs, threads, smem, registers, resident, overlap = sp.symbols(
    "tiles programs threads smem registers resident overlap", positive=True
)
t_mma, t_exp, t_alu, t_load, t_wait, t_step, t_program, t_last, t_grid = sp.symbols(
    "t_mma t_exp t_alu t_load t_wait t_step t_program t_last t_grid", nonnegative=True
)
streamed, in_flight, kv_read, pairs_streamed, pairs_read, hbm, t_hbm, seconds = sp.symbols(
    "streamed in_flight kv_read pairs_streamed pairs_read hbm t_hbm seconds", nonnegative=True
)


@dataclass(frozen=True)
class Formula:
    """``symbol = expression``; ``meaning`` is for the reader."""

    symbol: sp.Symbol
    unit: str
    meaning: str
    expression: sp.Expr


_softmax = t_exp + t_alu
_compute = sp.Max(t_mma, _softmax) + (1 - overlap) * sp.Min(t_mma, _softmax)
_fragments = (  # fitted to 285 kernels compiled for sm_90 and sm_80
    15
    + 12 * (1 - wgmma)
    + 34 * split
    + rows * ((0.9 + 0.25 * kv_width) * e_pad + 0.475 * (1 - wgmma) * q_width * d_pad) / threads
    + rows * keys * (0.8 + 0.4 * kv_width + (2.2 - wgmma) * pair_loads + 0.15 * sp.Max(0, mask_ops - 1)) / threads
    + keys * (0.16 * (d_pad + e_pad) + 0.09 * unstaged * d_pad) * kv_width / threads
)
_work = rows * keys * sp.Max(d_pad, e_pad) / threads  # multiplications of one product without tensor cores
_start = (START_LATENCIES * latency + (stages - 1) * t_load) / resident

FORMULAS = (
    Formula(tiles, "", "query tiles of one head", sp.ceiling(queries / rows)),
    Formula(programs, "", "programs of the grid", heads * tiles),
    Formula(threads, "", "of one program", warp * warps),
    Formula(
        smem,
        "B",
        "shared memory: queries, weights between layouts, keys and values, inputs per pair and per key",
        rows * d_pad * q_width
        + (1 - wgmma) * (rows * keys * sp.Max(kv_width, 4 * split) + 1024)
        + sp.Max(copies * keys * (d_pad + e_pad), keys * sp.Max(d_pad, e_pad)) * kv_width
        + rows * keys * (pair_width - plane_width)
        + sp.Max(1, stages - 1) * keys * (rows * plane_width + vector_width),
    ),
    Formula(
        registers,
        "",
        "per thread: result, scores and weights, pointers, queries",
        (1 - fma) * _fragments + fma * (40 + (0.4 + 0.1 * unstaged) * _work + 0.5 * d_pad),
    ),
    Formula(
        resident,
        "",
        "programs that share an SM",
        sp.Max(
            1,
            sp.Min(
                sp.floor(smem_sm / (smem + 1024)),
                sp.floor(registers_sm / (threads * sp.Min(255, registers))),
                sp.floor(warps_sm / warps),
                sp.ceiling(programs / sms),
            ),
        ),
    ),
    Formula(
        overlap,
        "",
        "share of the shorter of products and softmax that hides behind the longer",
        1 - (1 - sp.Min(sp.Rational(45, 100), (40 / keys) ** 2)) / resident,
    ),
    Formula(
        t_mma,
        "s",
        "both products of one step",
        2 * rows * keys * (d_pad * sp.Max(1, narrowest / keys) + e_pad * sp.Max(1, narrowest / e_pad)) * sms / flops,
    ),
    Formula(t_exp, "s", "special functions of one step", rows * keys * (1 + pair_specials) / (exp_rate * clock)),
    Formula(
        t_alu,
        "s",
        "other arithmetic of one step: softmax, score, mask, rescaling the result",
        (rows * keys * (SOFTMAX_INSTRUCTIONS + pair_ops + (MASK_INSTRUCTIONS + mask_ops) * masked) + rows * e_pad)
        / (lanes * clock),
    ),
    Formula(
        t_load,
        "s",
        "keys, values and loaded pairs of one step, through the L2 cache",
        (keys * (d + e) * kv_width + rows * keys * pair_width) * sms / l2_bandwidth,
    ),
    Formula(t_wait, "s", "memory latency that stages do not hide", latency / (sp.Max(1, stages - 1) * resident)),
    Formula(
        t_step,
        "s",
        "one step",
        sp.Max(t_load, (1 - unstaged) * t_wait, _compute)
        + unstaged * (t_load + t_wait)
        + JITTER * t_wait
        + (STEP_CYCLES + EXCHANGE_CYCLES * split) / (clock * resident),
    ),
    Formula(t_program, "s", "an average program", live * t_step + _start),
    Formula(t_last, "s", "the program that starts last", last * t_step + _start),
    Formula(
        t_grid,
        "s",
        "the grid: even shares, the unfilled last wave, and no less than the longest program",
        sp.Max(
            programs / sms * t_program + (sp.ceiling(programs / sms) - programs / sms) * t_last, most * t_step + _start
        ),
    ),
    Formula(streamed, "B", "keys and values that all programs ask for", programs * live * keys * (d + e) * kv_width),
    Formula(
        in_flight,
        "B",
        "keys and values of the heads that run at one time",
        kv_once * sp.Min(1, sp.Max(1, sms * resident / tiles) / heads),
    ),
    Formula(
        kv_read,
        "B",
        "of these, read from HBM: once, and again as far as half of the L2 cache does not hold them",
        sp.Min(kv_once, streamed) + sp.Max(0, streamed - kv_once) * sp.Max(0, 1 - l2 / (2 * in_flight)),
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
