"""What one forward kernel costs, as formulas with named symbols: ``FORMULAS`` is the model, in order of evaluation.

A kernel is a grid of programs, each holding ``rows`` queries and stepping over blocks of ``keys`` keys. Per step a
multiprocessor (SM) loads keys and values, does two products on its tensor cores and a softmax on its other units. These
depend on each other, so a program by itself leaves each unit idle while it waits; programs that share the SM fill the
gaps. A step therefore costs what its busiest unit needs (``t_busy``), its share of the latency of the chain through one
step (``t_chain / resident``) and of the loads, joined as a root of squares: near the largest where one dominates. The last
programs of an SM may be fewer than could share it, and fill fewer gaps.

What is read from HBM follows from what runs side by side: programs that go through the same keys at one time read them
once, and a wave that comes later reads them again as far as the L2 cache has lost them. A program by itself shows the time
that its first loads take.

``smem`` and ``registers`` describe what Triton's compiler allocates for the portable template; tests hold them against
compiled kernels. The constants below, in cycles, instructions, latencies and shares, are fitted to one half of the problems
of tests/data/sweep_h100.json (an H100 80GB HBM3, torch 2.11, Triton 3.6, caches that hold nothing of the operands), which
``half`` of a site says, together with 172 kernels that were timed before (tests/data/portable_fwd_h100.json) and 24 times of
plain Triton kernels of the same loop on an H200 (tests/test_cost.py). The other half is held out: tests hold the model
against it. Other devices are the same formulas, extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

SOFTMAX_INSTRUCTIONS = 3.86  # per pair: shift and scale, sum, conversion
MASK_INSTRUCTIONS = 16  # per pair of a masked block, besides the mask itself: bounds of scores and loads, and, select
COMPARE_INSTRUCTIONS = 50  # per pair of a masked block, where the mask reads what is loaded per key: moved to its columns
CHAIN_SHARE = 0.228  # of products and softmax of a block of 64 keys, what does not overlap within its program
STEP_CYCLES = 560  # of latency: barriers, first results of both products, reductions over a row
EXCHANGE_CYCLES = 720  # of latency: a row's maximum, sum and weights cross warps through shared memory
LOOKUP = 0.5  # of a memory latency: reading score or mask inputs and moving them to the layout of the scores
LOOKUP_INSTRUCTIONS = 30  # per pair, in blocks of 64 keys: neither vectors nor one wide load serve what lies anywhere
STAGES, STAGE = 3, 1.2  # with fewer, each one less shows so many memory latencies per step
FAR = 0.83  # of such a latency, what more it takes to read from HBM than from the L2 cache
START = 3.3  # memory latencies of each program: queries, first keys and values, results
LOOP = 1.67  # memory latencies of each of its loops, whose pipeline fills and drains
DRAIN = 0.17  # of products and softmax of a block, what each of its loops adds: nothing overlaps with its last one
SCAN = 0.3  # memory latencies of looking at data for the first and last keys, for each step that looks at some
EASY_REGISTERS = 180  # beyond, the compiler reorders, recomputes and spills
SPILL_CYCLES = 0.645  # per warp, step and register beyond, of work and of latency alike
LOAD_SHARE = 0.67  # of the time that loads keep the L2 cache busy, what adds to a step
SYNC_SHARE = 0.346  # of the rate of warp groups, for products that each warp does by itself
ISSUE, OPERAND = 3.75, 8.1  # cycles of a multiplication without tensor cores, and of each operand that it reads
WRITTEN_BACK = 0.32  # of the L2 cache: what others wrote there before is written to HBM, to make room
TOGETHER = 3  # the power by which the times of the grid and of HBM are joined: the longer one hides most of the other


# ---------------------------------------------------------------------------------------------------------- the symbols

# The problem and the spec: lengths, head sizes (d of queries and keys, e of values; padded); bytes per element, per
# pair (of all loads, and of inputs with a row and a key dimension) and per key; inputs per pair, and those among them that
# are looked up; work per pair; distinct bytes; key blocks per query tile (on average, at most, in the program that starts
# last; share masked); loops over them; steps that look at data of keys before; whether the mask reads data of each key;
# whether rows may be computed again; whether tiles with most keys come first; bytes of the keys and values of one head, and
# heads that read the same; features of keys and values (padded) that are read one by one, neither in vectors nor by
# asynchronous copies, for their rows begin anywhere.
queries, heads, d, e, d_pad, e_pad = sp.symbols("queries heads d e d_pad e_pad", positive=True)
q_width, kv_width, pair_width, loose = sp.symbols("q_width kv_width pair_width loose", nonnegative=True)
plane_width, vector_width, pair_loads, lookups = sp.symbols("plane_width vector_width pair_loads lookups", nonnegative=True)
pair_ops, mask_ops, pair_specials = sp.symbols("pair_ops mask_ops pair_specials", nonnegative=True)
once, kv_once, pairs_once = sp.symbols("once kv_once pairs_once", nonnegative=True)
live, most, last, masked, loops, redo = sp.symbols("live most last masked loops redo", nonnegative=True)
scanned, key_masks, heavy = sp.symbols("scanned key_masks heavy", nonnegative=True)
kv_each, sharers = sp.symbols("kv_each sharers", positive=True)
# The tile, flags (0 or 1) that follow from tile, dtype and device, and in how many ways warps divide the keys of a row.
rows, keys, warps, stages = sp.symbols("rows keys warps stages", positive=True)
wgmma, alone, fma, copies, unstaged = sp.symbols("wgmma alone fma copies unstaged", nonnegative=True)
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
t_busy, t_chain, t_step, t_solo, t_fill, t_start, t_program, t_last, t_fewer, t_grid = sp.symbols(
    "t_busy t_chain t_step t_solo t_fill t_start t_program t_last t_fewer t_grid", nonnegative=True
)
turns, streamed, between, together, again, lost, kv_read = sp.symbols(
    "turns streamed between together again lost kv_read", nonnegative=True
)
pairs_streamed, pairs_read, hbm, t_hbm, seconds = sp.symbols("pairs_streamed pairs_read hbm t_hbm seconds", nonnegative=True)


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
# What a mask reads of each key is moved to the layout of the scores, where a thread of a warpgroup has a quarter of the keys.
_moved = wgmma * key_masks * (20 + 0.2 * keys)
_loose = 20 * sp.Min(1, loose) + 2 * keys * loose / threads  # an element takes a register, and its pointer more
_fragments = (  # fitted to 285 kernels compiled for sm_90 and sm_80, then to the 172 of the measured run; its terms for
    # loose features and unstaged keys to 1,700 compiled for sm_80, sm_89 and sm_90 (Triton 3.6), rows computed again to 438,
    # masks that read data of keys to 249 for sm_90 (Triton 3.6, 3.8 and 3.9)
    5
    + 22 * (1 - wgmma)
    + (34 + 14 * wgmma) * _split
    + sp.Max(_AGAIN * redo, _moved)
    + rows * ((0.9 + (0.25 + 0.1 * wgmma) * kv_width) * e_pad + 0.475 * (1 - wgmma) * q_width * d_pad) / threads
    + rows * keys * (0.8 + 0.4 * kv_width + (1.9 - wgmma) * pair_loads + 0.15 * sp.Min(4, sp.Max(0, mask_ops - 1))) / threads
    + keys * (0.16 * (d_pad + e_pad) + (0.09 + 0.11 * wgmma) * unstaged * d_pad) * kv_width / threads
    + _loose
    + 2 * _narrow * (1 - sp.Min(1, plane_width))
)
# Without tensor cores a thread holds a square of the products, and operands of whole rows and columns. Of 44 tiles compiled
# for sm_90 (heads of 64 and 128) none needs more, spilled words counted.
_side = sp.sqrt(rows * keys / threads)  # of that square
_scalar = 1.86 * sp.Max(d_pad, e_pad) * _side + 60 * redo
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

# ---------------------------------------------------------------------------------------------------- products and traffic

_grouped = d_pad * sp.Max(1, narrowest * ways / keys) + e_pad * sp.Max(1, narrowest * ways / e_pad)
_exact = d_pad * (ISSUE + 2 * OPERAND / _side) + e_pad * (ISSUE + 2 * OPERAND / sp.sqrt(rows * e_pad / threads))
_room = l2 / 2  # each half of the L2 cache serves half of the multiprocessors, and holds its own copy of what both read
FITS = sp.floor(_room / kv_each)  # heads


def _lost(bytes_between: sp.Expr) -> sp.Expr:
    """Of what was read before so many other bytes, the share that is no longer in the cache: nothing up to half of what
    it holds, for queries and results pass through it too; all of what is more than it holds, which is read in order."""
    return sp.Min(1, sp.Max(0, 2 * bytes_between - _room) / sp.Max(1, _room))


TRAFFIC = (
    Formula(
        turns,
        "",
        "heads whose programs run at one time: those that fit in half of the L2 cache take turns, heaviest tiles first; else "
        "as many as there is room for, one after another",
        heavy * sp.Min(heads, sp.Max(1, FITS)) + (1 - heavy) * sp.Max(1, sms * resident / tiles),
    ),
    Formula(streamed, "B", "keys and values that all programs ask for", programs * live * keys * (d + e) * kv_width),
    Formula(
        between,
        "B",
        "keys and values that are read before those of one wave of programs are asked for by the next: of the heads that run "
        "at one time, the share that a program goes through",
        kv_once * sp.Min(1, sp.Max(sharers, turns) / heads) * streamed / (programs * kv_each),
    ),
    Formula(
        together,
        "",
        "programs that go through the same keys side by side, if half of the L2 cache holds a block for each",
        sp.Max(
            1,
            sp.Min(
                sms * resident * (1 - heavy)
                + sp.Min(tiles * sharers, sms * resident * sharers / sp.Max(sharers, turns)) * heavy,
                _room / (keys * (d + e) * kv_width),
            ),
        ),
    ),
    Formula(
        again,
        "B",
        "keys and values that later waves ask for again: a head that begins within a wave takes part in one more, "
        "where tiles are equal",
        sp.Max(0, sp.Min(streamed - kv_once, streamed / together - heavy * streamed / (tiles * sharers))),
    ),
    Formula(lost, "", "of these, the share that the cache no longer holds", _lost(between)),
    Formula(kv_read, "B", "keys and values read from HBM: once, and what was lost", sp.Min(kv_once, streamed) + lost * again),
    Formula(pairs_streamed, "B", "loaded pairs of all programs", heads * queries * live * keys * pair_width),
    Formula(
        pairs_read,
        "B",
        "of these, read from HBM: heads that read the same lie as far apart as all that are distinct",
        sp.Min(pairs_once, pairs_streamed) + sp.Max(0, pairs_streamed - pairs_once) * _lost(pairs_once),
    ),
    Formula(hbm, "B", "HBM traffic; queries, results and vectors move once", once + kv_read + pairs_read),
    Formula(
        t_hbm,
        "s",
        "HBM traffic at the copy rate, and what must leave the L2 cache first",
        (hbm + sp.Min(hbm, WRITTEN_BACK * l2)) / bandwidth,
    ),
    Formula(
        t_fill,
        "s",
        "what a program waits for while all others do too: its queries, first keys, values and pairs, its results",
        (once + (kv_read + pairs_read) / sp.Max(1, live)) / programs * sms / bandwidth,
    ),
)


_turns = sp.ceiling(programs / sms)  # programs of one SM, one after another or side by side
_left = _turns - resident * sp.floor(_turns / resident)


def fewer(load_share: float) -> Formula:
    """What it costs that the last programs of an SM are fewer than could share it."""
    alone = sp.sqrt(t_busy**2 + (load_share * t_load) ** 2 + (t_chain / sp.Max(1, _left)) ** 2)
    return Formula(
        t_fewer,
        "s",
        "what the last programs of an SM take longer for being fewer than could share it: steps show more of their latency",
        _left * last * (alone - t_step),
    )


def grid_of(longest: sp.Expr, more: sp.Expr = sp.S.Zero) -> Formula:
    """What the programs of a grid take together, of which the one with most to do takes ``longest`` by itself, and what it
    takes ``more`` where programs do not come out even.
    """
    share = programs / sms
    return Formula(
        t_grid,
        "s",
        "the grid: even shares, the unfilled last wave, and no less than the longest program, by itself",
        sp.Max(share * t_program + (sp.ceiling(share) - share) * t_last + more, longest),
    )


JOINED = (t_grid**TOGETHER + t_hbm**TOGETHER) ** sp.Rational(1, TOGETHER)

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
    *TRAFFIC,
    Formula(
        t_mma,
        "s",
        "both products of one step; warps that divide keys and features do narrower ones; without tensor cores, operands "
        "come from shared memory, for each side of a thread's square",
        2 * rows * keys * ((1 - fma) * (1 + (1 / SYNC_SHARE - 1) * alone) * _grouped + fma * _exact) * sms / flops,
    ),
    Formula(t_exp, "s", "special functions of one step", rows * keys * (1 + pair_specials) / (exp_rate * clock)),
    Formula(
        t_alu,
        "s",
        "other arithmetic of one step: softmax, score, mask, rescaling the result",
        (
            rows
            * keys
            * (
                SOFTMAX_INSTRUCTIONS
                + pair_ops
                + LOOKUP_INSTRUCTIONS * lookups * keys / 64
                + (MASK_INSTRUCTIONS + COMPARE_INSTRUCTIONS * sp.Min(1, vector_width) + mask_ops) * masked
            )
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
        "memory latency that one step of a program shows, longer for the share of keys and values that HBM has: heads that "
        "read the same side by side all wait for it",
        latency
        * (
            STAGE * (1 + FAR * sp.Min(1, sharers * kv_read / sp.Max(1, streamed))) * sp.Max(0, STAGES - stages)
            + LOOKUP * sp.Min(1, pair_loads + vector_width)
        ),
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
    Formula(
        t_solo,
        "s",
        "one step of a program that is left alone on its SM",
        sp.sqrt(t_busy**2 + (LOAD_SHARE * t_load) ** 2 + t_chain**2),
    ),
    Formula(
        t_start,
        "s",
        "start, end and filling the pipeline of each loop",
        (START + LOOP * loops + SCAN * scanned) * latency + DRAIN * loops * (t_mma + t_exp + t_alu) + t_fill,
    ),
    Formula(t_program, "s", "an average program", live * t_step + t_start / resident),
    Formula(t_last, "s", "the program that starts last", last * t_step + t_start / resident),
    fewer(LOAD_SHARE),
    grid_of(most * t_solo + t_start, t_fewer),
    Formula(seconds, "s", "the call", launch + JOINED),
)
