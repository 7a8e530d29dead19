"""The backward kernel of the hopper family in the simulator, at ragged sizes, against float64; and that damage is noticed."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from hopper_sites import BY_HEAD
from side_by_side import side_by_side
from specs import (
    ALIBI,
    BOTTOM_RIGHT,
    BY_NAME,
    CASES,
    CAUSAL,
    QK,
    SLOPES,
    B,
    Case,
    H,
    attention,
    loaded,
    plus,
    softcap,
    window,
)
from test_backward import right_where_a_row_is_nan, with_a_row_of_nan
from test_hopper import instead, lost, swapped

from attngen import barriers, blockwise, hopper_bwd, simulator, verify, verify_bwd
from attngen.algebra import TRUE, Expr, Int, integer, op
from attngen.compat import FloorDiv
from attngen.emit import BackwardKernel, emit_backward
from attngen.errors import Miss
from attngen.gradient import backward_of
from attngen.proxies import Broken
from attngen.simulator import Promise, simulated
from attngen.spec import FEATURE, KEY, ROW, AttentionSpec, Problem, Tile
from attngen.verify import Check
from attngen.verify_bwd import Sample

BF16 = torch.bfloat16
SUITED = tuple(case for case in CASES if hopper_bwd.unsuited(case.spec) is None)


def kernel_of(spec: AttentionSpec, *, stays: bool = True) -> BackwardKernel:
    """Programs that stay, where there are such, are few: each has several tiles of even a small problem."""
    spec = replace(spec, lse=True)
    kernel = emit_backward(spec, hopper_bwd.tiles_of(spec)[: 1 + stays][-1:], sms=3)
    assert isinstance(kernel, BackwardKernel), kernel
    return kernel


def sample(spec: AttentionSpec, problem: Problem) -> Sample:
    return replace(verify_bwd.sample(replace(spec, lse=True), problem), extras=False)


def verdicts(source: str, at: Sample, programs: int = 3) -> dict[str, Check]:
    """Programs that stay are ``programs``: as one runs after the other here, the first gets most tiles."""
    again = {"again": exactly(at)} if backward_of(at.spec).redo else {}
    return verify_bwd.check(simulated(source, programs).launch(*at.arguments, **again), at)


def test_a_row_of_nan_adds_nothing_to_the_gradient_of_the_values() -> None:
    at, exact = with_a_row_of_nan(150)
    kernel = kernel_of(at.spec)
    again = {"again": exactly(at)} if backward_of(at.spec).redo else {}
    right_where_a_row_is_nan(simulated(kernel.source).launch(*at.arguments, **again)[:3], exact)


def exactly(at: Sample) -> Callable[..., None]:
    """In place of the kernels to which rows are left: they fill in gradients only if they find that there are such rows."""

    def again(*tensors: Any, only: torch.Tensor, into: Sequence[torch.Tensor], **needs: bool) -> None:
        if only.item():
            for made, exact in zip(into[:3], verify_bwd.reference(at), strict=False):
                made.copy_(exact)
            for made, needed in zip(into[3:-1], needs.values(), strict=True):
                assert not (needed and made.any()), "what adds up is not left alone"
            into[-1].copy_((at.out.double() * at.grad.double()).sum(at.spec.output.index(FEATURE)))

    return again


def right(spec: AttentionSpec, problem: Problem, *, stays: bool = True) -> None:
    at = sample(spec, problem)
    found = verdicts(kernel_of(spec, stays=stays).source, at)
    assert {"q", "k", "v"} == found.keys()
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


@pytest.mark.parametrize("rows", [40, 304])  # multiples of 8, for TMA to address what is added to each pair
@pytest.mark.parametrize("case", SUITED, ids=lambda case: case.name)
def test_gradients_are_within_budget(case: Case, rows: int) -> None:
    right(case.spec, case.problem(rows))


@pytest.mark.parametrize("rows", [40, 304])
@pytest.mark.parametrize("name", ["bias", "mask_added_in_half", "table_cross"])
def test_gradients_of_what_is_added_to_scores(name: str, rows: int) -> None:
    case = BY_NAME[name]
    at = replace(sample(case.spec, case.problem(rows)), extras=True)
    found = verdicts(kernel_of(case.spec).source, at)
    assert {"q", "k", "v", "t0"} == found.keys()
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


WIDE = {
    "full": attention(head_dim=256, dtype=BF16),
    "grouped, causal": attention(head_dim=256, groups=2, mask=CAUSAL),
    "capped, in a window": replace(BY_HEAD[256]["softcap"], mask=window(70)),
    "slopes": BY_HEAD[256]["alibi"],
    "a table": BY_HEAD[256]["table"],
    "rows without a key": attention(head_dim=256, mask=BOTTOM_RIGHT, empty="zero"),
    "narrower": attention(head_dim=160, value_dim=192, mask=CAUSAL),
}


@pytest.mark.parametrize("sizes", [(40, 40), (136, 328)], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_heads_that_one_warpgroup_has_no_room_for(name: str, sizes: tuple[int, int]) -> None:
    right(WIDE[name], Problem((1, 4), *sizes))


PER_PAIR = {
    "one for each head of each batch": (B, H, ROW, KEY),
    "one for all": (ROW, KEY),
    "one for the heads that share keys": (B, FloorDiv(H, 2), ROW, KEY),
    "a table for the heads that share keys": (FloorDiv(H, 2), KEY - ROW + ROW.extent - 1),
}


@pytest.mark.parametrize("mask", [TRUE, window(70)], ids=["full", "window"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", PER_PAIR)
def test_whoever_shares_what_is_added(name: str, groups: int, mask: Expr) -> None:
    added = loaded("t0", *PER_PAIR[name])
    spec = attention(dtype=BF16, score=plus(QK, added), extras={"t0": (BF16, PER_PAIR[name])}, groups=groups, mask=mask)
    at = replace(sample(spec, Problem((2, 4), 136, 144)), extras=True)
    source = kernel_of(spec).source
    if groups == 1 and "share keys" in name:  # nothing tells such heads from others
        assert simulated(source).launch(*at.arguments, again=exactly(at)) is None
        return
    found = verdicts(source, at)
    assert found.keys() == {"q", "k", "v", "t0"}
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


def test_a_bias_within_a_program_of_scores_and_beside_documents() -> None:
    """Everything that a step reads at once: a bias by TMA, words of queries, and a derivative that needs the scores."""
    documents = BY_NAME["documents"].spec
    ids = {x.name: (torch.int32, x.index) for x in documents.extras}
    bias = loaded("t2", H, ROW, KEY)
    for score in (plus(QK, bias), softcap(20.0, plus(QK, bias))):
        extras = {**ids, "t2": (BF16, (H, ROW, KEY))}
        right(attention(dtype=BF16, head_dim=128, score=score, mask=documents.mask, extras=extras), Problem((1, 2), 200, 200))


def test_gradients_of_a_bias_within_a_program_of_scores() -> None:
    """Both kernels, in Gluon and in Triton, have a function of their own for the hyperbolic tangent."""
    bias = {"t0": (BF16, (H, ROW, KEY))}
    spec = attention(dtype=BF16, score=softcap(2.0, plus(QK, loaded("t0", H, ROW, KEY))), extras=bias, mask=CAUSAL)
    at = replace(sample(spec, Problem((2, 2), 72, 72)), extras=True)
    found = verdicts(kernel_of(spec).source, at)
    assert found.keys() == {"q", "k", "v", "t0"}
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


@pytest.mark.parametrize(("value", "odd"), [(0.0, False), (-3000.0, False), (-1e6, True), (1e30, False), (1e37, True)])
def test_rows_whose_weights_do_not_follow_are_left_to_others(value: float, odd: bool) -> None:
    """One row of a bias, all of whose scores lie there; and other kernels have a look at their flag."""
    bias = {"t0": (BF16, (H, ROW, KEY))}
    spec = attention(dtype=BF16, score=plus(QK, loaded("t0", H, ROW, KEY)), extras=bias)
    at = sample(spec, Problem((1, 2), 40, 40))
    at.inputs[3][1, 7] = value
    out, lse = blockwise.forward(at.spec, at.inputs)
    flags: list[int] = []

    def again(*tensors: Any, only: torch.Tensor, into: Sequence[torch.Tensor], **needs: bool) -> None:
        flags.append(int(only))

    changed = replace(at, out=out, lse=lse.float().contiguous())
    simulated(kernel_of(spec).source).launch(*changed.arguments, again=again)
    assert flags == [int(odd)]


def test_no_batch_adds_nothing_to_a_shared_bias() -> None:
    at = replace(sample(BY_NAME["bias"].spec, Problem((1, 2), 40, 40)), extras=True)
    empty = (x[:0] for x in (at.grad, at.out, at.lse, *at.inputs[:3]))
    bias = torch.full(at.inputs[3].shape, 7.0)
    del bias  # what is allocated next may lie there
    *_, made, _ = simulated(kernel_of(at.spec).source).launch(*empty, at.inputs[3], True, again=exactly(at))
    assert made.shape == at.inputs[3].shape and not made.any()


def test_every_suited_case_is_among_them() -> None:
    """The cases that the template refuses are few and known."""
    some = {
        "causal_bf16",
        "grouped",
        "window",
        "sinks",
        "alibi",
        "softcap_window",
        "documents",
        "prefix",
        "bias",
        "fill_shows",
    }
    assert len(SUITED) >= 48 and some <= {case.name for case in SUITED}


# ------------------------------------------------------------------------------------------------------ lengths and heads


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("rows", "keys"), [(5, 300), (260, 3), (129, 130)])
def test_lengths_that_fill_no_block(head_dim: int, rows: int, keys: int, stays: bool) -> None:
    right(attention(dtype=BF16, head_dim=head_dim), Problem((1, 2), rows, keys), stays=stays)


@pytest.mark.parametrize("name", ["causal_bf16", "grouped", "documents", "bias", "softcap_window"])
def test_a_program_for_each_tile(name: str) -> None:
    case = BY_NAME[name]
    assert "PROGRAMS" not in kernel_of(case.spec, stays=False).source
    right(case.spec, case.problem(304), stays=False)


@pytest.mark.parametrize("groups", [1, 3])
def test_blocks_of_queries_that_see_no_key_are_passed_over(groups: int) -> None:
    """The first queries see all keys, later ones those near them: late keys leave out a gap between."""
    mask = op("or", window(70), op("lt", Int(ROW), integer(40)))
    spec = attention(dtype=BF16, head_dim=128, groups=groups, mask=mask)
    assert "gap" in kernel_of(spec).source
    right(spec, Problem((1, 3), 500, 500))


@pytest.mark.parametrize("mask", [CAUSAL, BOTTOM_RIGHT, window(70)], ids=["causal", "aligned at the end", "window"])
@pytest.mark.parametrize("groups", [1, 3])
def test_masks_and_groups_of_heads(groups: int, mask: Expr) -> None:
    """Where keys outnumber queries and the other way round: tiles that see nothing, rows that see nothing."""
    spec = attention(dtype=BF16, head_dim=128, groups=groups, mask=mask)
    right(spec, Problem((1, 3), 150, 400))
    right(spec, Problem((1, 3), 280, 70))


def test_one_head_of_keys_for_all_queries() -> None:
    spec = attention(dtype=BF16, mask=CAUSAL)
    (batch, _, *place), (_, _, *values) = spec.keys.index, spec.values.index
    spec = replace(spec, keys=replace(spec.keys, index=(batch, *place)), values=replace(spec.values, index=(batch, *values)))
    right(spec, Problem((2, 3), 140, 140))


def test_verification_runs_it_in_the_simulator_in_its_own_type() -> None:
    kernel = kernel_of(BY_NAME["causal_bf16"].spec)
    broken = replace(kernel, source=re.sub(r"dp - gl.expand_dims\(delta, 0\)", "dp", kernel.source))
    good, wrong = verify_bwd.verify_all_interpreted([(each, Problem((1, 2), 100, 100)) for each in (kernel, broken)])
    assert isinstance(good, dict) and all(verdict.ok for verdict in good.values())
    assert isinstance(wrong, dict) and not wrong["q"].ok and not wrong["k"].ok and wrong["v"].ok


def test_programs_of_scores_in_bfloat16() -> None:
    spec = attention(dtype=BF16, score=softcap(20.0, QK), mask=CAUSAL, groups=2)
    right(spec, Problem((1, 4), 200, 200))
    right(attention(dtype=BF16, score=ALIBI, extras=SLOPES, mask=CAUSAL, groups=2), Problem((1, 4), 200, 200))


def test_what_lies_behind_the_last_row_is_never_read() -> None:
    spec = attention(dtype=BF16, mask=CAUSAL, lse=True)
    at = sample(spec, Problem((2, 2), 140, 140))

    def followed(x: torch.Tensor) -> torch.Tensor:
        whole = torch.full((2, 2, 200, 64), torch.nan, dtype=x.dtype)
        whole[:, :, : x.shape[2]] = x
        return whole[:, :, : x.shape[2]]

    at = replace(at, inputs=tuple(map(followed, at.inputs)), grad=followed(at.grad), out=followed(at.out))
    assert all(verdict.ok for verdict in verdicts(kernel_of(spec).source, at).values())


def test_what_tma_cannot_address_is_copied() -> None:
    spec = attention(dtype=BF16, lse=True)
    at = sample(spec, Problem((1, 2), 100, 100))
    apart = torch.zeros(1, 2, 100, 65, dtype=BF16)
    apart[..., 1:] = at.inputs[1]
    ones = torch.ones(1, 1, 1, 1, dtype=BF16).expand(1, 2, 100, 64)
    at = replace(at, inputs=(at.inputs[0], apart[..., 1:], at.inputs[2]), grad=ones)
    assert all(verdict.ok for verdict in verdicts(kernel_of(spec).source, at).values())


def test_keys_that_lie_feature_by_feature_are_copied() -> None:
    spec = attention(dtype=BF16, mask=CAUSAL)
    *lead, rows, inner = spec.keys.index
    right(replace(spec, keys=replace(spec.keys, index=(*lead, inner, rows))), Problem((1, 2), 100, 104))


@pytest.mark.parametrize(("rows", "keys"), [(0, 40), (40, 0)])
def test_nothing_has_no_gradient(rows: int, keys: int) -> None:
    spec = attention(dtype=BF16, lse=True)
    q, k = torch.ones(1, 2, rows, 64, dtype=BF16), torch.ones(1, 2, keys, 64, dtype=BF16)
    *grads, delta = simulated(kernel_of(spec).source).launch(q, q, torch.zeros(1, 2, rows), q, k, k)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape] and not any(x.any() for x in grads)
    assert delta.shape == (1, 2, rows)


# ------------------------------------------------------------------------------------------------------- masks from data


def documents(dtype: torch.dtype, ids: torch.Tensor, groups: int = 1) -> tuple[AttentionSpec, Sample]:
    """Four heads, queries and keys in documents numbered by ``ids``."""
    case = BY_NAME["documents"].spec
    extras = {x.name: (dtype, x.index) for x in case.extras}
    spec = attention(dtype=BF16, mask=case.mask, extras=extras, groups=groups)
    at = sample(spec, Problem((1, 4), ids.numel(), ids.numel()))
    inputs = (*at.inputs[:3], *[ids.to(dtype)[None].contiguous()] * len(spec.extras))
    out, lse = blockwise.forward(at.spec, inputs)
    return spec, replace(at, inputs=inputs, out=out, lse=lse.float().contiguous())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_documents_in_any_order(dtype: torch.dtype, groups: int) -> None:
    ids = torch.tensor([3, 1, 1, 3, 2, 7]).repeat_interleave(57)
    spec, at = documents(dtype, ids, groups)
    assert all(verdict.ok for verdict in verdicts(kernel_of(spec).source, at).values())


@pytest.mark.parametrize("apart", [1 << 25, 1 << 32, (1 << 32) + 1])
def test_both_words_of_what_is_loaded_count(apart: int) -> None:
    """Numbers that differ in the lower half of their bits only, in the upper half only, and beyond what floats tell apart."""
    spec, at = documents(torch.int64, (torch.arange(300) // 100) * apart - (1 << 40))
    assert all(verdict.ok for verdict in verdicts(kernel_of(spec).source, at).values())


def test_data_of_its_own_for_each_head_that_shares_keys_bounds_nothing() -> None:
    mask = op("lt", loaded("t0", B, H, ROW, kind="int"), Int(KEY))
    extras = {"t0": (torch.int32, (B, H, ROW))}
    shared = attention(dtype=BF16, mask=mask, extras=extras, groups=2, empty="zero")
    assert hopper_bwd.masks_everything(shared) and "find_bounds" not in kernel_of(shared).source
    alone = attention(dtype=BF16, mask=mask, extras=extras, empty="zero")
    assert not hopper_bwd.masks_everything(alone) and "find_bounds" in kernel_of(alone).source
    for spec in (shared, alone):
        right(spec, Problem((1, 4), 150, 150))


def test_what_is_loaded_by_the_distance_from_the_end() -> None:
    """A place that depends on the number of keys: the kernel that goes over queries is told it."""
    place = ROW + KEY.extent - ROW.extent
    extras = {"t0": (torch.int32, (B, place))}
    spec = attention(dtype=BF16, mask=op("le", Int(KEY), loaded("t0", B, place, kind="int")), extras=extras, empty="zero")
    right(spec, Problem((1, 2), 100, 140))


def test_lines_that_depend_on_a_name_if_only_through_others() -> None:
    lines = ["a = x + 1", "c = a * h", "d = c + a", "e = a // 2"]
    assert hopper_bwd.parted(lines, ["h"]) == (["a = x + 1", "e = a // 2"], ["c = a * h", "d = c + a"])


# ------------------------------------------------------------------------------------------------- rows left to other kernels


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_rows_that_are_left_to_others_are_verified_with_them(dtype: torch.dtype) -> None:
    """One kernel runs in the simulator, the other, which it calls, in Triton's interpreter."""
    shown = BY_NAME["fill_shows"].spec
    half = {name: replace(getattr(shown, name), dtype=dtype) for name in ("query", "keys", "values")}
    kernel = kernel_of(replace(shown, out_dtype=dtype, **half))
    other = emit_backward(kernel.spec, (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)))
    assert kernel.leaves_rows and isinstance(other, BackwardKernel) and not other.leaves_rows
    both, alone = verify_bwd.verify_all_interpreted(
        [(each, Problem((1, 2), 48, 48)) for each in (replace(kernel, otherwise=other), other)]
    )
    for found in (both, alone):
        assert isinstance(found, dict) and all(verdict.ok for verdict in found.values()), found


@pytest.mark.parametrize("flag", [0, 1])
def test_other_kernels_write_only_if_there_are_such_rows(flag: int) -> None:
    at = sample(BY_NAME["bias"].spec, Problem((1, 2), 40, 40))
    other = emit_backward(at.spec, (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)))
    assert isinstance(other, BackwardKernel)
    made = *map(torch.full_like, at.inputs, [7.0] * 4), torch.full_like(at.lse, 7.0)
    (found,) = verify.run_interpreted([(other, (*at.arguments, torch.tensor([flag], dtype=torch.int32), made))])
    assert isinstance(found, list) and all(bool((x == 7.0).all()) == (flag == 0) for x in (*found[:3], found[-1]))


def test_without_other_kernels_nothing_is_launched_that_may_need_them() -> None:
    at = sample(BY_NAME["bias"].spec, Problem((1, 2), 40, 40))
    module = simulated(kernel_of(at.spec).source)
    assert module.launch(*at.arguments) is None
    assert module.launch(*at.arguments, again=exactly(at)) is not None


def test_what_tma_cannot_address_of_a_bias_is_left_to_others() -> None:
    at = sample(BY_NAME["bias"].spec, Problem((1, 2), 40, 44))
    assert simulated(kernel_of(at.spec).source).launch(*at.arguments, again=exactly(at)) is None


# --------------------------------------------------------------------------------------------------------------- refusals


def test_what_is_refused_says_why() -> None:
    assert "softmax" not in str(hopper_bwd.unsuited(BY_NAME["causal"].spec))
    for name, reason in {
        "head_192_value_128": "no pair of one width",
        "no_softmax": "nothing normalises",
        "multi_query": "shared in different ways",
        "head_gain": "after softmax",
    }.items():
        spec = BY_NAME[name].spec
        assert reason in str(hopper_bwd.unsuited(spec)), name
        refused = emit_backward(replace(spec, lse=True), hopper_bwd.tiles_of(BY_NAME["causal"].spec)[:1])
        assert isinstance(refused, Miss) and reason in refused.reason


def test_gradients_of_what_is_loaded_are_left_to_others() -> None:
    spec = BY_NAME["alibi"].spec
    module = simulated(kernel_of(spec).source)
    at = sample(spec, Problem((1, 2), 40, 40))
    assert module.launch(*at.arguments) is not None
    assert module.launch(*replace(at, extras=True).arguments) is None


def test_gradients_that_must_be_the_same_are_left_to_others() -> None:
    at = sample(BY_NAME["dense"].spec, Problem((1, 2), 40, 40))
    module = simulated(kernel_of(at.spec).source)
    torch.use_deterministic_algorithms(True)
    try:
        assert module.launch(*at.arguments) is None
    finally:
        torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------------------------------------------- damage


def with_one_tile_of_keys(text: str) -> str:
    return text.replace("KEYS = gl.constexpr(2)", "KEYS = gl.constexpr(1)")


def keys_unguarded(text: str) -> str:
    return lost("mbarrier.wait(k_empty.index(held), ((turn // KEYS) & 1) ^ 1)")(with_one_tile_of_keys(text))


# Gradients that are handed back before their product would go unnoticed: the next ones are loaded after queries that wait.
DAMAGE = {
    "one tile of keys in memory": (with_one_tile_of_keys, "right"),
    "queries are not handed back": (lost("mbarrier.arrive(q_empty.index(stage), count=1)"), "stuck"),
    "gradients are not handed back": (lost("mbarrier.arrive(grad_empty.index(stage), count=1)"), "stuck"),
    "keys are not handed back": (lost("mbarrier.arrive(k_empty.index(turn % KEYS), count=1)"), "stuck"),
    "values are not handed back": (lost("mbarrier.arrive(v_empty, count=1, pred=turn > 0)"), "stuck"),
    "tiles are not handed back": (lost("mbarrier.arrive(record_empty.index(turn & 1), count=1)"), "stuck"),
    "sums are not handed on": (lost("mbarrier.arrive(dq_full, count=1)"), "stuck"),
    "sums are not handed back": (lost("mbarrier.arrive(dq_empty, count=1)"), "stuck"),
    "one warpgroup is enough": (
        instead("mbarrier.init(ds_full, count=2)", "mbarrier.init(ds_full, count=1)"),
        "wrong or stuck",
    ),
    "too few bytes are expected": (instead("BLOCK_J * BLOCK_D * 2 + BLOCK_J * 8", "BLOCK_J * BLOCK_D * 2"), "stuck"),
    "the other's gradients are not waited for": (lost("mbarrier.wait(ds_full, beat & 1)"), "wrong or stuck"),
    "one buffer for the exchange": (instead("slot = (beat & 1) * 2", "slot = 0"), "wrong or stuck"),
    "the exchange is not fenced": (
        instead("store(ds)\n            fence_async_shared()", "store(ds)"),
        "stuck",
    ),
    "sums are overwritten before they are added": (lost("mbarrier.wait(dq_empty, (beat & 1) ^ 1)"), "wrong or stuck"),
    "queries are handed back before their product": (swapped("dk, dq = warpgroup_mma_wait(0", "arrive(q_empty"), "wrong"),
    "keys are overwritten while they are read": (keys_unguarded, "wrong or stuck"),
    "values are overwritten before results have left": (
        lost("tma.store_wait(0)  # until the results of the last tile have left"),
        "wrong or stuck",
    ),
    "results are overwritten before they have left": (instead("tma.store_wait(0)\n        leave_dk", "leave_dk"), "wrong"),
    "sums are written before they are complete": (
        instead("tma.store_wait(0)\n            mbarrier", "mbarrier"),
        "stuck",
    ),
}

DAMAGE_OF_ONE = {  # of the programs that have one tile each
    **{name: DAMAGE[name] for name in DAMAGE if name.startswith(("sums are not", "queries are not", "the exchange"))},
    "keys are overwritten while the other reads them": (lost("mbarrier.wait(k_empty.index(0), 0)"), "wrong"),
}


Damaged = tuple[str | None, bool]  # by what; to programs that stay, or to those of one tile each
OF_DENSE = attention(dtype=BF16, head_dim=128, lse=True)


def undamaged(stays: bool) -> tuple[str, Sample]:
    return kernel_of(OF_DENSE, stays=stays).source, sample(OF_DENSE, Problem((1, 1), *((200, 300) if stays else (400, 200))))


def results(damaged: Damaged) -> list[torch.Tensor] | None:
    """Of the damaged kernel, or None if it is stuck."""
    name, stays = damaged
    source, at = undamaged(stays)
    made = (DAMAGE if stays else DAMAGE_OF_ONE)[name][0](source) if name else source
    assert (made != source) == bool(name)
    try:
        return list(simulated(made, 1).launch(*at.arguments))
    except (Broken, AssertionError):
        return None


@pytest.fixture(scope="module")
def outcomes() -> dict[Damaged, str]:
    names = [(name, stays) for stays, damage in ((True, DAMAGE), (False, DAMAGE_OF_ONE)) for name in (None, *damage)]
    with pytest.MonkeyPatch.context() as patch:
        impatient(patch)
        made = side_by_side(results, names)

    def outcome(stays: bool, found: list[torch.Tensor] | None) -> str:
        if found is None:
            return "stuck"
        return "right" if all(verdict.ok for verdict in verify_bwd.check(found, undamaged(stays)[1]).values()) else "wrong"

    return {damaged: outcome(damaged[1], found) for damaged, found in made.items()}


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products take long, one warpgroup's longer than the other's, and sums too; nobody waits long for a barrier."""
    paces, own = cycle([0.012, 0.001]), threading.local()
    wait = simulator._tma.store_wait

    def slow(pending: int, deps: list[Promise]) -> Any:
        own.pace = getattr(own, "pace", None) or next(paces)
        time.sleep(own.pace)
        found = tuple(dep.get() for dep in deps)
        return found if len(found) > 1 else found[0]

    def slow_store(pending: int) -> None:
        time.sleep(0.12)  # longer than a step
        wait(pending)

    monkeypatch.setattr(barriers, "SECONDS", 1.5)
    monkeypatch.setattr(simulator, "_mma_wait", slow)
    monkeypatch.setattr(simulator._tma, "store_wait", slow_store)


@pytest.mark.parametrize("name", [None, *DAMAGE], ids=str)
def test_damage_is_noticed(name: str | None, outcomes: dict[Damaged, str]) -> None:
    assert outcomes[name, True] in (DAMAGE[name][1] if name else "right")


@pytest.mark.parametrize("name", [None, *DAMAGE_OF_ONE], ids=str)
def test_damage_to_a_program_for_each_tile_is_noticed(name: str | None, outcomes: dict[Damaged, str]) -> None:
    assert outcomes[name, False] in (DAMAGE_OF_ONE[name][1] if name else "right")
