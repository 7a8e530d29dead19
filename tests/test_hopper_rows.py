"""Rows that a forward kernel of the hopper family leaves to a portable one: in the simulator, and with both kernels.

Where every key of a row is masked, the model's own fill value shows. The kernel flags such rows; the portable one, launched
behind it, computes them and leaves all others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from specs import (
    BY_NAME,
    CASES,
    HALF,
    LOWEST,
    QK,
    SLOPE,
    SLOPES,
    STRICTLY_CAUSAL,
    ZERO,
    Case,
    H,
    attention,
    filled,
    loaded,
    plus,
)
from test_hopper import GRID, PERSISTENT, SUITED, THREE_GROUPS, kernel_of, others_of, run, samples
from torch import Tensor

from attngen import blockwise, describe, hopper_bwd
from attngen.algebra import Const, op
from attngen.choose import Plan, choose
from attngen.device import DEVICES
from attngen.emit import BackwardKernel, Kernel, emit, emit_backward
from attngen.gradient import backward_of
from attngen.lost import floor, without
from attngen.simulator import simulated
from attngen.spec import HOPPER, KEY, ROW, AttentionSpec, Problem, Tile
from attngen.verify import check, reference, run_interpreted, sample_inputs, verify_all_interpreted

PORTABLE_TILES = (Tile(16, 32, 4, 1), Tile(64, 32, 4, 2), Tile(128, 32, 4, 1))
BF16 = torch.bfloat16
FILLED = [case for case in SUITED if case.spec.whole is not None]


def low(spec: AttentionSpec, inputs: Sequence[Tensor]) -> Tensor:
    """Which rows have no score that is worth more than the fill."""
    best = blockwise.forward(replace(spec, whole=None, redo_below=None, sinks=(), lse=True), inputs)[1]
    return best == -torch.inf


def test_such_specs_are_taken() -> None:
    names = {case.name for case in FILLED}
    some = {"fill_shows", "fill_lowest", "fill_added", "fill_added_in_half", "fill_shows_padding"}
    assert names == some | {"dropped_fill_shows"}


@pytest.mark.parametrize("rows", [1, 17, 150, 300])
@pytest.mark.parametrize("tile", [PERSISTENT, GRID, THREE_GROUPS], ids=str)
@pytest.mark.parametrize("case", FILLED, ids=lambda case: case.name)
def test_a_flag_for_each_row_that_needs_the_fill(case: Case, tile: Tile, rows: int) -> None:
    inputs = samples(case, tile, rows)
    if inputs[-1].dtype == torch.bool:
        inputs[3][1] = False  # nothing of the second batch counts
    seen: list[Tensor] = []

    def again(*tensors: Tensor, only: Tensor, into: Sequence[Tensor]) -> None:
        assert all(ours is theirs for ours, theirs in zip(tensors, inputs, strict=True))
        seen.append(only)

    simulated(kernel_of(case.spec, tile).source).launch(*inputs, again=again)
    (flags,) = seen
    assert torch.equal(flags != 0, low(case.spec, inputs)) and flags.any()


def test_what_is_flagged_is_filled_in_and_all_else_is_left() -> None:
    """The portable kernel, whatever its tile, with flags that are not those of rows that need it."""
    spec = replace(BY_NAME["fill_shows"].spec, lse=True)
    inputs = sample_inputs(spec, Problem((1, 2), 150, 150))
    exact = reference(spec, inputs)
    flags = torch.zeros(1, 2, 150, dtype=torch.int32)
    flags[0, 0, [0, 70]] = flags[0, 1, [40, 149]] = 1
    made = torch.full_like(inputs[0], 7.0), torch.full((1, 2, 150), 7.0)
    found = run_interpreted([(portable(spec, tile), (*inputs, flags, made)) for tile in PORTABLE_TILES])
    for results in found:
        assert isinstance(results, list)
        for result, right in zip(results, exact, strict=True):
            assert (result[flags == 0] == 7.0).all()
            torch.testing.assert_close(result[flags == 1].double(), right[flags == 1], atol=2e-3, rtol=2e-3)


def portable(spec: AttentionSpec, tile: Tile) -> Kernel:
    kernel = emit(spec, tile)
    assert isinstance(kernel, Kernel) and not kernel.leaves_rows
    return kernel


TOGETHER = {
    "fill_shows": BY_NAME["fill_shows"].spec,
    "fill_added_in_half": BY_NAME["fill_added_in_half"].spec,
    "fill_shows_padding": BY_NAME["fill_shows_padding"].spec,
    "sinks": attention(**filled(QK, STRICTLY_CAUSAL, -1e9), sinks=(SLOPE,), extras=SLOPES),
    "dropped": BY_NAME["dropped_fill_shows"].spec,
    "bfloat16": attention(dtype=BF16, **filled(QK, STRICTLY_CAUSAL, LOWEST), lse=True),
}


def test_both_kernels_together_are_right() -> None:
    """One runs in the simulator, the other, which it calls, in Triton's interpreter."""
    jobs = []
    for spec in TOGETHER.values():
        kernel = kernel_of(spec, PERSISTENT)
        assert kernel.leaves_rows
        jobs += [(replace(kernel, otherwise=portable(spec, tile)), Problem((1, 2), 150, 150)) for tile in PORTABLE_TILES[:2]]
    verdicts = verify_all_interpreted(jobs)
    assert all(not isinstance(verdict, Exception) and verdict.ok for verdict in verdicts), verdicts


def test_without_the_other_kernel_nothing_is_launched() -> None:
    case = BY_NAME["fill_shows"]
    inputs = samples(case, GRID, 40)
    module = simulated(kernel_of(case.spec, GRID).source)
    assert module.launch(*inputs) is None and module.launch(*inputs, **others_of(case.spec)) is not None


def test_without_keys_there_is_no_fill() -> None:
    case = BY_NAME["fill_shows"]
    inputs = sample_inputs(case.spec, Problem((1, 2), 20, 0))
    out, lse = run(kernel_of(case.spec, GRID).source, inputs, **others_of(case.spec))
    assert not out.any() and (lse == -torch.inf).all()


def test_gradients_get_the_log_sum_exp_of_what_was_filled_in() -> None:
    case = BY_NAME["fill_shows"]
    inputs = samples(case, PERSISTENT, 70)
    result = run(kernel_of(case.spec, PERSISTENT).source, inputs, **others_of(case.spec))
    verdict = check(result, case.spec, inputs)
    assert verdict.ok and verdict.lse is not None and result[1].isfinite().all()


# ----------------------------------------------------------------------------------------------------- what is said of it


def test_the_second_kernel_is_counted_and_said() -> None:
    device, problem = DEVICES["h200"], Problem((4, 16), 1024, 1024)
    spec = replace(BY_NAME["fill_shows"].spec, lse=False)
    usual = choose(replace(spec, whole=None, redo_below=None), problem, device)
    assert isinstance(usual, Plan) and usual.tile.family == HOPPER
    plan = choose(spec, problem, device, usual.tile)
    assert isinstance(plan, Plan) and plan.tile == usual.tile
    assert device.launch < plan.cost.seconds - usual.cost.seconds < 3 * device.launch
    described = describe.planned(plan, device, None)
    assert "masks leave nothing of" in described.behind and "the one behind it" in described.formula[-1]
    assert not describe.planned(usual, device, None).behind
    assert "a portable one behind it" in kernel_of(spec, plan.tile).source.splitlines()[0]


# ------------------------------------------------------------------------------------------------------- what is loaded


def masked(dtype: torch.dtype) -> tuple[AttentionSpec, list[Tensor], list[int]]:
    """Biases that are masks in some rows; which of these are left to the other kernel."""
    added = op("drown", loaded("t0", ZERO, H, ROW, KEY), Const(-32768.0 if dtype == HALF else -4096.0))
    operands = HALF if dtype == torch.float32 else dtype
    spec = attention(dtype=operands, score=plus(QK, added), extras={"t0": (dtype, (ZERO, H, ROW, KEY))}, lse=True)
    inputs = sample_inputs(spec, Problem((2, 2), 40, 160))
    lowest = torch.finfo(dtype).min
    inputs[3][:, :, 3] = lowest
    inputs[3][:, :, 5, :131] = lowest
    inputs[3][:, :, 7] = -torch.inf
    inputs[3][:, :, 9, 2:] = -torch.inf
    inputs[3][:, :, 11, ::2], inputs[3][:, :, 11, 1::2] = lowest, lowest / 2
    left = [3, 7, 11]
    if dtype != HALF:
        inputs[3][:, :, 13, 70] = torch.finfo(dtype).max / 2
        left.append(13)
    return spec, inputs, left


@pytest.mark.parametrize("tile", [PERSISTENT, GRID, THREE_GROUPS], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BF16, torch.float32], ids=str)
def test_rows_that_masks_leave_nothing_of_are_flagged(dtype: torch.dtype, tile: Tile) -> None:
    """What they are loaded as is not looked at for each pair: rows with anything else come out right without that."""
    spec, inputs, left = masked(dtype)
    seen: list[Tensor] = []

    def again(*tensors: Tensor, only: Tensor, into: Sequence[Tensor]) -> None:
        seen.append(only)
        others_of(spec)["again"](*tensors, only=only, into=into)

    source = kernel_of(spec, tile).source
    assert "drowned" not in source
    result = simulated(source).launch(*inputs, again=again)
    assert sorted(set(seen[0].nonzero()[:, 2].tolist())) == left
    assert check(result, spec, inputs).ok


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_such_rows_are_filled_in_by_the_portable_kernel(dtype: torch.dtype) -> None:
    spec, inputs, left = masked(dtype)
    exact = reference(spec, inputs)
    flags = torch.zeros(2, 2, 40, dtype=torch.int32)
    flags[:, :, left] = 1
    made = torch.full(exact[0].shape, 7.0, dtype=spec.out_dtype), torch.full(exact[1].shape, 7.0)
    (results,) = run_interpreted([(portable(spec, PORTABLE_TILES[1]), (*inputs, flags, made))])
    assert isinstance(results, list)
    rest = [row for row in range(40) if row not in left]
    assert all((result[:, :, rest] == 7.0).all() for result in results)
    out = torch.where(flags[..., None] == 1, results[0].double(), exact[0])
    lse = torch.where(flags == 1, results[1].double(), exact[1])
    assert check([out.to(spec.out_dtype), lse.float()], spec, inputs).ok


def test_a_floor_is_as_high_as_what_may_be_lost() -> None:
    assert floor(attention(mask=STRICTLY_CAUSAL)) is None and floor(attention(softmax=False)) is None
    assert floor(BY_NAME["bias"].spec) == -1e5 and floor(BY_NAME["fill_lowest"].spec) == -1e36
    assert floor(masked(HALF)[0]) == -16384.0 and floor(masked(BF16)[0]) == -2048.0
    assert floor(replace(BY_NAME["bias"].spec, fp8="block")) is None


def test_both_directions_leave_the_same_rows_to_others() -> None:
    """Whatever else a spec is: what the forward computes twice the backward must not take from the log-sum-exp."""
    for case in CASES:
        spec = replace(case.spec, lse=True)
        assert (floor(spec) is not None) == (backward_of(spec).redo is not None), case.name


def test_gradients_where_only_16_bits_make_a_mask_of_numbers() -> None:
    """Without that they are ordinary numbers, which tell nothing of rows that have no others."""
    spec = BY_NAME["padding_in_half"].spec
    assert floor(spec) == -16384.0 and backward_of(without(spec)).redo is None
    inputs = sample_inputs(spec, Problem((2, 2), 40, 72))
    inputs[3][1] = 1  # all keys of the second batch are hidden
    kernel = emit_backward(spec, hopper_bwd.tiles_of(spec)[1:])
    assert isinstance(kernel, BackwardKernel) and kernel.leaves_rows and "drowned" not in kernel.source
    out, lse = blockwise.forward(spec, inputs)
    seen: list[int] = []
    others = {"again": lambda *_, only, **__: seen.append(int(only))}
    grad = torch.ones_like(out)
    assert simulated(kernel.source).launch(grad, out, lse.float().contiguous(), *inputs, **others) is not None
    assert seen == [1]
