"""Products of 8-bit numbers on a GPU: what the simulator cannot tell is which register holds which weight, and how exactly
tensor cores add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from specs import CASES, CAUSAL, Case, attention
from test_fp8 import MODES, PROGRAMS, eighths, outliers, rms, suited
from test_hopper import kernel_of

from attngen import fp8
from attngen.aot import import_file
from attngen.choose import choose
from attngen.device import probe
from attngen.spec import AttentionSpec, Problem, Tile
from attngen.verify import check, eager, reference, sample_inputs, samples_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="not sm_90"),
]
BF16 = torch.bfloat16
NAMED = [Case(name, spec, batch=(1, 4)) for name, spec in PROGRAMS.items()]
OTHERS = [case for case in CASES if suited(case.spec)]
LENGTH = 900  # with the keys that some cases have beyond it, few enough for every tile
REPEATS = 3


def tiles_of(spec: AttentionSpec, problem: Problem) -> list[Tile]:
    """The best tile that stays on its multiprocessor and the best that does not."""
    ranked = [tile for tile, _ in choose(spec, problem, probe()).ranked]  # type: ignore[union-attr]
    return [next(tile for tile in ranked if tile.persistent is stays) for stays in (True, False)]


def launched(spec: AttentionSpec, tile: Tile, folder: Path, *inputs: torch.Tensor) -> torch.Tensor:
    kernel = kernel_of(spec, tile)
    path = folder / f"{kernel.name}.py"
    path.write_text(kernel.source)
    module = import_file(path)
    assert module.suits(*inputs)
    first, *others = [module.launch(*inputs) for _ in range(REPEATS)]
    assert all(torch.equal(first.nan_to_num(), other.nan_to_num()) for other in others)
    return first  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", [*NAMED, *OTHERS], ids=lambda case: case.name)
def test_right_and_the_same_each_time(case: Case, tmp_path: Path) -> None:
    spec = eighths(case.spec, MODES[len(case.name) % 2])
    for tile in tiles_of(spec, case.problem(LENGTH)):
        for rows in (152, LENGTH):
            inputs = samples_for(kernel_of(spec, tile), case.problem(rows), device="cuda")
            verdict = check(launched(spec, tile, tmp_path, *inputs), spec, inputs)
            assert verdict.ok, f"{tile} at {rows}: {verdict}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_each_key_meets_its_own_value(head_dim: int, mode: str, tmp_path: Path) -> None:
    """Row i looks for one key, whose value says which key it is: any other order would show as another number."""
    length = 256
    spec = eighths(attention(dtype=BF16, head_dim=head_dim), mode)
    keys = torch.randn(1, 1, length, head_dim, generator=torch.Generator().manual_seed(0)).sign()
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    query = keys[:, :, order] * head_dim**-0.5 * 16
    values = torch.zeros(1, 1, length, head_dim)
    for bit in range(8):
        values[..., bit] = torch.arange(length) >> bit & 1
    inputs = [x.to("cuda", BF16) for x in (query, keys, values)]
    for tile in tiles_of(spec, Problem((1, 1), length, length)):
        out = launched(spec, tile, tmp_path, *inputs)[0, 0, :, :8].float().round().to(torch.int64).cpu()
        assert torch.equal((out << torch.arange(8)).sum(-1), order)


def test_errors_on_outliers(tmp_path: Path) -> None:
    """As FlashAttention-3 reports them; ``pytest -s`` shows the numbers."""
    spec = attention(dtype=BF16, head_dim=128)
    inputs = [outliers((1, 8, 2048, 128), seed).cuda() for seed in range(3)]
    exact = reference(spec, inputs)[0]
    plain = {"bf16": spec, "tensor": eighths(spec)}
    errors = {name: rms(eager(each, inputs)[0].double() - exact) for name, each in plain.items()}
    for mode in MODES:
        made = eighths(spec, mode)
        errors[mode] = rms(launched(made, tiles_of(made, Problem((1, 8), 2048, 2048))[0], tmp_path, *inputs).double() - exact)
    print("RMSE on outliers:", {name: f"{error:.2e}" for name, error in errors.items()})
    assert errors["bf16"] < errors["rotate"] < errors["block"] < 1.2 * errors["tensor"]


@pytest.mark.parametrize(("head_dim", "length"), [(128, 16384), (256, fp8.MOST_ADDED)])
def test_long_sums_lose_no_more_than_is_said(head_dim: int, length: int, tmp_path: Path) -> None:
    """Values of one sign: of the longest sums that are taken, tensor cores cut off about 1 %."""
    spec = eighths(attention(dtype=BF16, head_dim=head_dim, mask=CAUSAL))
    query, keys, values = sample_inputs(spec, Problem((1, 2), length, length), device="cuda")
    values = 1 + 0.1 * values
    out = launched(spec, tiles_of(spec, Problem((1, 2), length, length))[0], tmp_path, query * 0, keys, values)
    lost = 1 - out[:, :, -64:].double().mean() / values.double().mean()
    print(f"lost of a sum over {length} keys, {head_dim} features: {lost.item():.3%}")
    assert abs(lost) < 2**-6
