"""Products of 8-bit numbers: right by their own budget in the simulator, asked for by an option, refused with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from specs import CASES, CAUSAL, KEY, QK, STRICTLY_CAUSAL, H, attention, filled, loaded, plus, scaled, softcap, window
from test_cost import H200, cost, square
from test_hopper import kernel_of, run, samples_for
from torch import Tensor

from attngen import decide, fp8, hopper
from attngen.algebra import Int, op, to_float
from attngen.choose import Plan
from attngen.device import resolve
from attngen.emit import Kernel
from attngen.errors import Miss
from attngen.spec import HOPPER, AttentionSpec, Problem, Tile
from attngen.verify import check, eager, reference

BF16 = torch.bfloat16
WIDE = Tile(128, 128, 8, 2, HOPPER, True)
GRID = Tile(128, 64, 8, 3, HOPPER)
THREE = Tile(192, 64, 12, 2, HOPPER, True)
MODES = (fp8.BLOCK, fp8.ROTATE)


def eighths(spec: AttentionSpec, mode: str = fp8.BLOCK) -> AttentionSpec:
    return replace(spec, fp8=mode)


def suited(spec: AttentionSpec) -> bool:
    return hopper.unsuited(eighths(spec)) is None


def outliers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = BF16) -> Tensor:
    """As FlashAttention-3 has them: normal numbers, of which one in a thousand has one ten times as large added."""
    made = torch.Generator().manual_seed(seed)
    rare = torch.rand(shape, generator=made) < 0.001
    return (torch.randn(shape, generator=made) + 10 * torch.randn(shape, generator=made) * rare).to(dtype)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# ------------------------------------------------------------------------------------------------------------- numbers

SLOPE = plus(scaled(0.125), op("mul", loaded("t0", H), to_float(Int(KEY))))
PROGRAMS = {
    "full": attention(dtype=BF16, head_dim=64),
    "causal_128": attention(dtype=BF16, head_dim=128, mask=CAUSAL),
    "causal_half": attention(head_dim=64, mask=CAUSAL),
    "grouped_256": attention(dtype=BF16, head_dim=256, mask=CAUSAL, groups=2),
    "padded_heads": attention(dtype=BF16, head_dim=80, value_dim=72),
    "values_narrower": attention(dtype=BF16, head_dim=192, value_dim=128, mask=CAUSAL),
    "softcap_window": attention(dtype=BF16, head_dim=64, mask=window(70), score=softcap(5.0, scaled(0.125))),
    "alibi": attention(dtype=BF16, head_dim=64, mask=CAUSAL, score=SLOPE, extras={"t0": (torch.float32, (H,))}),
    "sinks": attention(dtype=BF16, head_dim=64, mask=CAUSAL, sinks=(loaded("t0", H),), extras={"t0": (torch.float32, (H,))}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_is_within_the_budget_of_8_bits(name: str, mode: str) -> None:
    spec = eighths(PROGRAMS[name], mode)
    kernel = kernel_of(spec, GRID if spec.head_dim > 128 or mode == fp8.ROTATE else WIDE)
    inputs = samples_for(kernel, Problem((1, 4), 200, 200))
    (result,) = run(kernel.source, inputs)
    verdict = check(result, spec, inputs)
    assert verdict.ok, verdict


OTHERS = [case for case in CASES if suited(case.spec) and case.name not in PROGRAMS]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_whatever_else_the_family_takes_is_right(case: object) -> None:
    spec = eighths(case.spec)  # type: ignore[attr-defined]
    kernel = kernel_of(spec, replace(GRID, persistent=True) if spec.head_dim > 128 else WIDE)
    inputs = samples_for(kernel, case.problem(150))  # type: ignore[attr-defined]
    (result,) = run(kernel.source, inputs)
    verdict = check(result, spec, inputs)
    assert verdict.ok, verdict


def test_three_warpgroups_have_scales_of_their_own() -> None:
    """Rows of one group are a thousand times as large as those of the next: one scale for all would lose these."""
    spec = eighths(attention(dtype=BF16, head_dim=64))
    kernel = kernel_of(spec, THREE)
    query, keys, values = samples_for(kernel, Problem((1, 2), 250, 190))
    query[:, :, 64:128] *= 2.0**10
    keys[:, :, :64] *= 2.0**-10
    values[:, :, 64:] *= 2.0**-10
    (result,) = run(kernel.source, [query, keys, values])
    exact = reference(spec, [query, keys, values])[0]
    for first in (0, 128, 192):
        rows = slice(first, first + 58)
        assert rms(result[:, :, rows].double() - exact[:, :, rows]) < 0.1 * rms(exact[:, :, rows])


@pytest.mark.parametrize("zero", range(3))
def test_blocks_of_zeros_are_exact(zero: int) -> None:
    spec = eighths(attention(dtype=BF16, head_dim=64))
    kernel = kernel_of(spec, WIDE)
    inputs = samples_for(kernel, Problem((1, 2), 130, 300))
    inputs[zero][:, :, :128] = 0
    (result,) = run(kernel.source, inputs)
    assert result.isfinite().all() and check(result, spec, inputs).ok


def test_what_is_not_finite_does_not_spoil_its_neighbours() -> None:
    """A key with infinities leaves rows that do not see it as they are, and finite those whose blocks it is in."""
    spec = eighths(attention(dtype=BF16, head_dim=64, mask=CAUSAL))
    kernel = kernel_of(spec, WIDE)
    inputs = samples_for(kernel, Problem((1, 2), 130, 130))
    (clean,) = run(kernel.source, inputs)
    inputs[1][:, :, 129] = torch.inf
    (result,) = run(kernel.source, inputs)
    assert torch.equal(result[:, :, :128], clean[:, :, :128]) and result[:, :, 129].isnan().all()
    assert rms(result[:, :, 128] - clean[:, :, 128]) < 0.1 * rms(clean[:, :, 128])


def test_the_model_of_a_plain_model_in_8_bits_is_no_free_pass() -> None:
    """The budget is a few percent of the result: half a bit more than 8-bit numbers lose is over it."""
    spec = eighths(attention(dtype=BF16, head_dim=64))
    kernel = kernel_of(spec, WIDE)
    inputs = samples_for(kernel, Problem((1, 2), 200, 200))
    (result,) = run(kernel.source, inputs)
    exact = reference(spec, inputs)[0]
    verdict = check(result, spec, inputs)
    assert verdict.rms_budget < 0.12 * rms(exact)
    assert not check(result * 1.15, spec, inputs).ok
    assert not check(result.roll(1, -2), spec, inputs).ok
    assert verdict.rms_budget > 5 * check(result, replace(spec, fp8=""), inputs).rms_budget


def test_errors_on_outliers_fall_with_rotation() -> None:
    """FlashAttention-3's distribution: per tensor, with a scale for each block, and rotated, beside 16 bits."""
    spec = attention(dtype=BF16, head_dim=128)
    inputs = [outliers((1, 4, 512, 128), seed) for seed in range(3)]
    exact = reference(spec, inputs)[0]
    plain = {"bf16": spec, "tensor": eighths(spec)}
    errors = {name: rms(eager(each, inputs)[0].double() - exact) for name, each in plain.items()}
    for mode in MODES:
        (result,) = run(kernel_of(eighths(spec, mode), WIDE).source, inputs)
        errors[mode] = rms(result.double() - exact)
    assert errors["bf16"] < errors["rotate"] < 0.75 * errors["block"] and errors["block"] < 1.1 * errors["tensor"]


# ------------------------------------------------------------------------------------------------------------ protocol


@pytest.mark.parametrize(
    "change",
    [
        ("row = code_row // 16 * 16 + code_row // 2 % 2 * 8 + code_row // 4 % 4 * 2 + code_row % 2", "row = code_row"),
        ("moved = rescale * (last_value_scale / value_scale)", "moved = rescale * (value_scale / last_value_scale)"),
        ("factor = q_scale * gl.load(k_scales + scaled)", "factor = q_scale * gl.load(k_scales)"),
        ("first // 64)", "0)"),
    ],
    ids=["order of keys", "units of results", "scale of keys", "scale of queries"],
)
def test_damage_is_noticed(change: tuple[str, str]) -> None:
    spec = eighths(attention(dtype=BF16, head_dim=64))
    kernel = kernel_of(spec, WIDE)
    query, keys, values = samples_for(kernel, Problem((1, 2), 300, 300))
    query[:, :, :64] *= 4
    keys[:, :, 128:] *= 4
    values[:, :, :128] *= 4
    inputs = [query, keys, values]
    assert check(run(kernel.source, inputs)[0], spec, inputs).ok
    assert change[0] in kernel.source
    assert not check(run(kernel.source.replace(*change), inputs)[0], spec, inputs).ok


# ---------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("spec", "device", "words"),
    [
        (attention(dtype=BF16, head_dim=64), "a100", "warpgroups"),
        (attention(dtype=torch.float32, head_dim=64), "h200", "16-bit"),
        (attention(dtype=BF16, head_dim=32), "h200", "fewer than 64"),
        (attention(dtype=BF16, head_dim=64, softmax=False), "h200", "not normalised"),
        (attention(dtype=BF16, head_dim=64, lse=True), "h200", "gradients"),
        (attention(dtype=BF16, head_dim=64, **filled(QK, STRICTLY_CAUSAL, -1e4)), "h200", "fill value"),
    ],
    ids=["device", "float32", "narrow", "no softmax", "training", "fill"],
)
def test_what_cannot_be_in_8_bits_stays_in_16(spec: AttentionSpec, device: str, words: str) -> None:
    found, reason = decide.in_eighths(spec, square(1024), resolve(device), fp8.BLOCK)
    assert found == spec and words in reason


def test_long_sums_are_only_taken_where_they_add_up_in_float32() -> None:
    """Tensor cores cut off 18 % of a sum over 16,384 keys (see ``attngen.fp8``)."""
    wide, narrow = (eighths(attention(dtype=BF16, head_dim=d)) for d in (256, 128))
    refused = decide.chosen(wide, square(16384), H200)
    assert isinstance(refused, Miss) and "lose too much" in refused.reason
    assert isinstance(decide.chosen(wide, square(fp8.MOST_ADDED), H200), Plan)
    plan = decide.chosen(narrow, square(16384), H200)
    assert isinstance(plan, Plan) and all(tile.rows == 128 for tile, _ in plan.ranked)
    assert any(each.tile.rows == 192 and "lose too much" in each.reason for each in plan.refused)


def test_what_nobody_asks_for_stays_as_it_is() -> None:
    spec = attention(dtype=BF16, head_dim=64)
    assert decide.in_eighths(spec, square(1024), H200, fp8.OFF) == (spec, "")
    assert "fp8" not in spec.text and eighths(spec).text != spec.text


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_has_the_usual_kernel_for_what_cannot_be_addressed(mode: str) -> None:
    spec, _ = decide.in_eighths(attention(dtype=BF16, head_dim=64), square(1024), H200, mode)
    plan = decide.chosen(spec, square(1024), H200)
    kernel = decide.emitted(plan, H200, "here")  # type: ignore[arg-type]
    assert isinstance(kernel, Kernel) and kernel.spec.fp8 == mode and kernel.family == HOPPER
    assert kernel.otherwise is not None and not kernel.otherwise.spec.fp8


def test_large_heads_cost_less_than_in_16_bits() -> None:
    spec = attention(dtype=BF16, head_dim=256)
    tile = Tile(128, 64, 8, 2, HOPPER, True)
    ours, usual = (cost(each, square(16384), tile) for each in (eighths(spec), spec))
    assert ours.seconds < 0.75 * usual.seconds and ours.smem_bytes < usual.smem_bytes
