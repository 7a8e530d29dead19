"""Kernels of the hopper family in the simulator, at ragged sizes, against float64; and that the simulator notices damage.

Programs are few, so that each computes several tiles.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from side_by_side import side_by_side
from specs import BOTTOM_RIGHT, BY_NAME, CASES, CAUSAL, HALF, ZERO, B, Case, H, attention, loaded, plus
from test_blockwise import emptied
from torch import Tensor

from attngen import barriers, boxes, hopper, simulator
from attngen.algebra import Const
from attngen.emit import Kernel, emit
from attngen.errors import VerificationFailed
from attngen.index import Axis
from attngen.lost import floor
from attngen.proxies import Broken
from attngen.simulator import Promise, simulated
from attngen.spec import HOPPER, KEY, ROW, AttentionSpec, Input, Problem, Tile
from attngen.verify import Check, check, eager, reference, sample_inputs, samples_for, verify_all_interpreted

PERSISTENT = Tile(128, 128, 8, 2, HOPPER, True)
GRID = Tile(128, 128, 8, 2, HOPPER)
THREE_GROUPS = Tile(192, 128, 12, 2, HOPPER, True)
NARROW = Tile(128, 64, 8, 2, HOPPER, True)
SUITED = tuple(case for case in CASES if hopper.unsuited(case.spec) is None)


def widest(spec: AttentionSpec) -> int:
    return max(boxes.held(boxes.pieces(spec)), boxes.held(boxes.results(spec)))


def tiles_for(spec: AttentionSpec) -> list[tuple[Tile, tuple[int, ...]]]:
    """Tiles that have room for the heads of ``spec``, with the lengths that each is tried at."""
    if widest(spec) > 128:
        return [(NARROW, (1, 300)), (replace(NARROW, persistent=False), (150,))]
    three = [(THREE_GROUPS, (17, 300))] if widest(spec) <= 64 else []
    return [(PERSISTENT, (1, 300)), (GRID, (150,)), (replace(NARROW, stages=3), (150,)), *three]


def kernel_of(spec: AttentionSpec, tile: Tile) -> Kernel:
    kernel = emit(spec, tile)
    assert isinstance(kernel, Kernel), kernel
    return kernel


def written(spec: AttentionSpec, tile: Tile) -> str:
    return kernel_of(spec, tile).source


def samples(case: Case, tile: Tile, rows: int) -> list[Tensor]:
    return samples_for(kernel_of(case.spec, tile), case.problem(rows))


def run(source: str, inputs: list[Tensor], programs: int = 3, **others: Callable[..., None]) -> tuple[Tensor, ...]:
    result = simulated(source, programs).launch(*inputs, **others)
    return (result,) if isinstance(result, Tensor) else result


def others_of(spec: AttentionSpec) -> dict[str, Callable[..., None]]:
    """In place of the kernel to which rows are left, if any are: it fills in those that are flagged."""

    def again(*inputs: Tensor, only: Tensor, into: Sequence[Tensor]) -> None:
        for made, exact in zip(into, reference(spec, inputs), strict=False):
            made[only == 1] = exact[only == 1].to(made.dtype)

    return {"again": again} if floor(spec) is not None else {}


def right(spec: AttentionSpec, tile: Tile, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """What the kernel returns, held against float64."""
    result = run(written(spec, tile), inputs, **others_of(spec))
    verdict = check(result, spec, inputs)
    assert verdict.ok, verdict
    return result


def runs() -> list[tuple[Case, Tile, int]]:
    """Every case where programs stay, over several tiles; other tiles and lengths take turns, a case each."""
    chosen = []
    for turn, case in enumerate(SUITED):
        (first, lengths), *others = tiles_for(case.spec)
        rest = [(first, lengths[0]), *((tile, rows) for tile, several in others for rows in several)]
        chosen += [(case, first, lengths[-1]), (case, *rest[turn % len(rest)])]
    return chosen


RUNS = runs()


@pytest.mark.parametrize(("case", "tile", "rows"), RUNS, ids=[f"{case.name}-{tile}-{rows}" for case, tile, rows in RUNS])
def test_kernel_is_within_budget(case: Case, tile: Tile, rows: int) -> None:
    right(case.spec, tile, samples(case, tile, rows))


def test_every_suited_case_is_among_them() -> None:
    """The cases that the template refuses are few and known: those of float32, data, fills, gains and large heads."""
    assert len(SUITED) >= 44 and {"causal_bf16", "sinks", "table_cross", "sigmoid", "head_192_value_128"} <= {
        case.name for case in SUITED
    }


# ----------------------------------------------------------------------------------------------------- heads in pieces


def pieced(name: str, head_dim: int, value_dim: int | None = None, **changes: object) -> Case:
    spec = attention(head_dim=head_dim, value_dim=value_dim, **changes)  # type: ignore[arg-type]
    return Case(name, spec, batch=(1, 4))


PIECED = (
    pieced("64_values_96", 64, 96, mask=CAUSAL),
    pieced("72", 72, mask=CAUSAL, lse=True),
    pieced("80_in_groups", 80, groups=2, mask=CAUSAL),
    pieced("96", 96, lse=True),
    pieced("96_values_64", 96, 64),
    pieced("96_without_softmax", 96, softmax=False),
    pieced("112_bottom_right", 112, mask=BOTTOM_RIGHT, lse=True),
    pieced("160", 160, mask=CAUSAL),
    pieced("192_values_128", 192, 128, mask=CAUSAL, lse=True),
    pieced("224", 224, mask=CAUSAL),
    pieced("240_is_held_as_256", 240, mask=CAUSAL),
)


@pytest.mark.parametrize(
    ("features", "keys", "values"),
    [
        (8, [64], [64]),
        (64, [64], [64]),
        (72, [64, 16], [64, 16]),
        (96, [64, 32], [64, 32]),
        (112, [64, 32, 16], [128]),
        (128, [128], [128]),
        (136, [128, 16], [128, 16]),
        (208, [128, 64, 16], [256]),
        (240, [256], [256]),
    ],
)
def test_pieces_are_binary_digits(features: int, keys: list[int], values: list[int]) -> None:
    spec = attention(head_dim=features)
    for found, expected in ((boxes.pieces(spec), keys), (boxes.results(spec), values)):
        assert [piece.width for piece in found] == expected and boxes.held(found) == sum(expected)
        assert [piece.start for piece in found] == [sum(expected[:k]) for k in range(len(expected))]
        assert all(piece.part in (0, piece.width, piece.width // 2) for piece in found)


@pytest.mark.parametrize("case", PIECED, ids=lambda case: case.name)
@pytest.mark.parametrize("stays", [True, False])
def test_heads_in_pieces_are_within_budget(case: Case, stays: bool) -> None:
    wide = case.spec.head_dim == 192 or widest(case.spec) <= 128
    tile = replace(PERSISTENT if wide else NARROW, persistent=stays)
    for problem in (Problem(case.batch, 130, 300), Problem(case.batch, 260, 260)):
        right(case.spec, tile, samples_for(kernel_of(case.spec, tile), problem))


# ------------------------------------------------------------------------------------------------------------- layouts


def fused(rows: int, heads: int, head_dim: int, dtype: torch.dtype = HALF) -> list[Tensor]:
    """Queries, keys and values as a model has them: ``[B, N, 3, H, D]`` in memory."""
    whole = torch.randn(2, rows, 3, heads, head_dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    return [whole[:, :, n].transpose(1, 2) for n in range(3)]


@pytest.mark.parametrize("tile", [PERSISTENT, GRID, THREE_GROUPS], ids=str)
def test_views_of_one_projection_are_read_where_they_are(tile: Tile) -> None:
    right(BY_NAME["causal_lse"].spec, tile, fused(200, 2, 64))


def test_what_lies_behind_the_last_key_is_never_read() -> None:
    inputs = [torch.full((2, 2, 300, 64), torch.nan).half()[:, :, :141] for _ in range(3)]
    for seed, x in enumerate(inputs):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
    right(BY_NAME["dense_lse"].spec, PERSISTENT, inputs)


@pytest.mark.parametrize("tile", [PERSISTENT, GRID], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(5, 400), (260, 3), (130, 129)])
def test_grouped_heads_and_other_lengths_of_keys(tile: Tile, rows: int, keys: int) -> None:
    spec = attention(groups=3, lse=True)
    right(spec, tile, sample_inputs(spec, Problem((1, 6), rows, keys)))


def test_one_key_head_for_all_queries() -> None:
    spec = attention(keys=Input("k", (*attention().keys.index[:1], KEY, attention().keys.index[-1]), HALF))
    right(spec, PERSISTENT, sample_inputs(spec, Problem((2, 3), 140, 140)))


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [PERSISTENT, GRID, THREE_GROUPS], ids=str)
def test_biases_of_any_float_are_copied_block_by_block(tile: Tile, dtype: torch.dtype) -> None:
    """Two of them, of which one is the same for all of a batch; heads that read the same one take turns."""
    score = plus(BY_NAME["bias"].spec.score, loaded("t1", B, H, ROW, KEY))
    extras = {"t0": (dtype, (ZERO, H, ROW, KEY)), "t1": (dtype, (B, H, ROW, KEY))}
    spec = attention(score=score, extras=extras, mask=CAUSAL, lse=True)
    right(spec, tile, samples(Case("biases", spec, batch=(2, 3)), tile, 200))


# -------------------------------------------------------------------------------------------------------- nothing to see


@pytest.mark.parametrize("tile", [PERSISTENT, GRID, THREE_GROUPS], ids=str)
@pytest.mark.parametrize("empty", ["nan", "zero", "never_nan"])
def test_rows_and_tiles_without_any_key(tile: Tile, empty: str) -> None:
    """Aligned at the end, the first queries see nothing: whole tiles of them, and a part of one."""
    spec = attention(mask=BOTTOM_RIGHT, empty=empty, lse=True)
    out, lse = right(spec, tile, sample_inputs(spec, Problem((1, 2), 330, 70)))
    assert (out[:, :, :260].isnan() if empty == "nan" else out[:, :, :260] == 0).all()
    assert (lse[:, :, :260] == -torch.inf).all() and lse[:, :, 260:].isfinite().all()


@pytest.mark.parametrize("tile", [PERSISTENT, GRID, THREE_GROUPS], ids=str)
def test_a_row_of_nan_is_zero_where_weights_are_never_nan(tile: Tile) -> None:
    spec = BY_NAME["rows_never_nan"].spec
    q, k, v = sample_inputs(spec, Problem((1, 2), 150, 150))
    q[:, :, 130] = torch.nan
    out, _ = right(spec, tile, [q, k, v])
    assert not out[:, :, [0, 130]].any() and out[:, :, 131:].any(-1).all()


EMPTY = {name: BY_NAME[name].spec for name in ("dense", "causal", "sinks", "softmax_plus_one", "sigmoid", "bias", "grouped")}
EMPTY["bias_and_sink"] = replace(BY_NAME["bias"].spec, sinks=(Const(0.5),))
NOTHING = [(name, axis, lse) for name in EMPTY for axis in (ROW, KEY) for lse in (False, True)]


@pytest.mark.parametrize(("name", "axis", "lse"), NOTHING, ids=str)
def test_nothing_gives_what_eager_gives(name: str, axis: Axis, lse: bool) -> None:
    """No keys: zeros, and only sinks in the log-sum-exp. No queries: nothing."""
    spec = replace(EMPTY[name], lse=lse)
    inputs = emptied(spec, sample_inputs(spec, Problem((1, 8), 40, 40)), axis)
    result = run(written(spec, PERSISTENT), inputs, **others_of(spec))
    for mine, theirs in zip(result, eager(spec, inputs), strict=False):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-5, atol=1e-6)
    assert bool(result[0].numel()) == (axis is KEY) and not result[0].any() and len(result) == 1 + lse


# ---------------------------------------------------------------------------------------------------------- verification

BF16 = torch.bfloat16
BIASED = attention(dtype=BF16, score=BY_NAME["bias"].spec.score, extras={"t0": (BF16, (ZERO, H, ROW, KEY))})


def test_verification_runs_it_in_the_simulator_in_its_own_type() -> None:
    """Biases of uneven length among them, whose rows TMA can address all the same."""
    kernel = replace(kernel_of(BIASED, PERSISTENT), otherwise=kernel_of(BIASED, Tile(64, 32, 4, 2)))
    broken = replace(kernel, source=kernel.source.replace("row_max = gl.full(", "row_max = gl.fulll("))
    off = replace(kernel, source=kernel.source.replace("sums = sums * ", "sums = 1.1 * sums * "))
    problem = Problem((1, 2), 145, 301)
    short = Problem((1, 2), 20, 21)  # so that nobody waits for the part that fails
    good, bad, wrong = verify_all_interpreted([(kernel, problem), (broken, short), (off, problem)])
    assert isinstance(good, Check) and good.ok and good.budget > 1e-3
    assert isinstance(bad, VerificationFailed) and "does not run in the simulator: AttributeError" in str(bad)
    assert isinstance(wrong, VerificationFailed) and "result is off" in str(wrong)


def test_samples_for_it_can_be_addressed() -> None:
    kernel = kernel_of(BIASED, PERSISTENT)
    problem = Problem((1, 2), 145, 301)
    plain, padded = sample_inputs(BIASED, problem), samples_for(kernel, problem)
    assert all(torch.equal(one, other) for one, other in zip(plain, padded, strict=True))
    suits = simulated(kernel.source).suits
    assert suits(*padded) and not suits(*plain)


# -------------------------------------------------------------------------------------------------------------- damage


def lost(line: str) -> Callable[[str], str]:
    return lambda text: text.replace(line, "pass")


def instead(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


def swapped(first: str, second: str) -> Callable[[str], str]:
    """Two lines that follow each other, the other way round."""

    def damage(text: str) -> str:
        lines = text.splitlines()
        for k, (one, two) in enumerate(pairwise(lines)):
            if first in one and second in two:
                lines[k : k + 2] = [two, one]
        return "\n".join(lines)

    return damage


def hasty(text: str) -> str:
    """Keys are handed back before their product."""
    back = "mbarrier.arrive(k_empty.index(next_stage), count=1)\n"
    early = re.sub(r"( +)(qk = warpgroup_mma_wait\(1)", rf"\1{back}\1\2", lost(back.strip())(text))
    assert early.count(back) > 1
    return early


DAMAGE = {
    "keys are handed back before their product": (hasty, "wrong"),
    "keys are not handed back": (lost("mbarrier.arrive(k_empty.index(next_stage), count=1)"), "stuck"),
    "values are not handed back": (lost("mbarrier.arrive(v_empty.index(stage), count=1)"), "stuck"),
    "queries are not handed back": (
        lost("mbarrier.arrive(q_empty.index(turn + GROUP), count=1, pred=left == 0)"),
        "stuck",
    ),
    "records are not handed back": (lost("mbarrier.arrive(record_empty.index((count & 1)), count=1)"), "stuck"),
    "scores are read before their product": (
        instead("warpgroup_mma_wait(1, deps=[product])", "warpgroup_mma_wait(2, deps=[product])"),
        "stuck",
    ),
    "too few bytes are expected": (instead("BLOCK_J * BLOCK_E * 2", "BLOCK_J * BLOCK_E"), "stuck"),
    "a load waits for a phase that is not": (instead("phase = 1  #", "phase = 0  #"), "stuck"),
    "the end waits for one block more": (instead("more = (left > 0)", "more = (left >= 0)"), "stuck"),
    "one warpgroup is enough": (instead("k_empty.index(stage), count=GROUPS", "k_empty.index(stage), count=1"), "stuck"),
    "values are handed back before their product": (swapped("acc = warpgroup_mma_wait(0", "arrive(v_empty"), "wrong"),
    "queries are handed back after the first block": (instead(", pred=left == 0)", ", pred=left > 0)"), "stuck"),
    "values are waited for in another phase": (
        instead("wait(v_full.index(stage), phase", "wait(v_full.index(stage), 1 ^ phase"),
        "stuck",
    ),
    "results are overwritten before they are stored": (instead("tma.store_wait(0)  #", "pass  #"), "wrong"),
}


def outcome(source: str, spec: AttentionSpec, inputs: list[Tensor]) -> str:
    try:
        result = run(source, inputs, **others_of(spec))
    except Broken:
        return "stuck"
    return "right" if check(result, spec, inputs).ok else "wrong"


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products take long, which leaves time to overwrite what they read; nobody waits long for a barrier."""
    wait = simulator._mma_wait

    def slow(pending: int, deps: list[Promise]) -> Any:
        time.sleep(0.004)
        return wait(pending, deps)

    monkeypatch.setattr(barriers, "SECONDS", 1.0)
    monkeypatch.setattr(simulator, "_mma_wait", slow)


TURNS = {
    "a turn is not handed over": (instead("arrive {TURNS + (GROUP + 1)", "arrive {TURNS - 1 - (GROUP + 1)"), "stuck"),
    "nobody has the first turn": (instead("if GROUP == GROUPS - 1:", "if GROUP == GROUPS:"), "stuck"),
}
EXPONENTIALS, PRODUCTS = 64, 128  # sizes of heads: what warpgroups take turns with
Damaged = tuple[str | None, int]  # by what; head size


def damaged_outcome(damaged: Damaged) -> str:
    name, head_dim = damaged
    spec = attention(mask=CAUSAL, head_dim=head_dim)
    source = written(spec, PERSISTENT)
    made = {**DAMAGE, **TURNS}[name][0](source) if name else source
    assert (made != source) == bool(name)
    return outcome(made, spec, sample_inputs(spec, Problem((1, 3), 390, 390)))


@pytest.fixture(scope="module")
def outcomes() -> dict[Damaged, str]:
    every = [(name, EXPONENTIALS) for name in (None, *DAMAGE, *TURNS)] + [(name, PRODUCTS) for name in TURNS]
    with pytest.MonkeyPatch.context() as patch:
        impatient(patch)
        return side_by_side(damaged_outcome, every)


@pytest.mark.parametrize("name", [None, *DAMAGE], ids=str)
def test_damage_is_noticed(name: str | None, outcomes: dict[Damaged, str]) -> None:
    assert outcomes[name, EXPONENTIALS] == (DAMAGE[name][1] if name else "right")


@pytest.mark.parametrize("head_dim", [EXPONENTIALS, PRODUCTS], ids=["exponentials", "products"])
@pytest.mark.parametrize("name", TURNS)
def test_turns_are_handed_over(name: str, head_dim: int, outcomes: dict[Damaged, str]) -> None:
    assert outcomes[name, head_dim] == TURNS[name][1]


def test_biases_handed_back_without_a_fence_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, copies that came too soon were seen with blocks of 64 keys alone, in one row of a few thousand."""
    impatient(monkeypatch)
    source, problem = written(BIASED, PERSISTENT), Problem((1, 2), 152, 304)
    damaged = instead("fence_async_shared()  # or else", "pass  # or else")(source)
    inputs = sample_inputs(BIASED, problem)
    assert damaged != source and outcome(damaged, BIASED, inputs) == "stuck"
    assert outcome(source, BIASED, inputs) == "right"


def test_a_partition_that_fails_is_heard() -> None:
    spec = attention()
    source = written(spec, PERSISTENT).replace("row_max = gl.full(", "row_max = gl.fulll(")
    with pytest.raises(AttributeError, match="fulll"):
        run(source, sample_inputs(spec, Problem((1, 1), 20, 20)))
