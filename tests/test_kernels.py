"""Emitted kernels in Triton's interpreter, at ragged sizes, against float64: one child process for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from pytest import MonkeyPatch
from specs import BY_NAME, CASES, CAUSAL, FOR_OLDEST, LOWEST, QK, B, Case, attention, loaded, plus
from test_blockwise import emptied
from test_emit import emitted

from attngen import compat, verify
from attngen.emit import Kernel, emit
from attngen.errors import AttngenError, Unavailable, VerificationFailed
from attngen.index import Axis
from attngen.spec import KEY, ROW, AttentionSpec, Problem, Tile
from attngen.verify import (
    Check,
    check,
    eager,
    in_half,
    reference,
    run_interpreted,
    sample_inputs,
    verify_all_interpreted,
    verify_interpreted,
    within_budget,
)

pytest.importorskip("triton")

ROWS = (1, 17, 130)
# So small that every loop runs: several tiles of rows, and blocks narrower than the windows.
SMALL_TILE = Tile(32, 16, 4, 1)


def jobs_of(case: Case) -> list[tuple[str, Kernel, Problem]]:
    """At every size, and with a small tile; where there are several tiles, along one axis of the batch each."""
    small = emit(case.spec, SMALL_TILE)
    assert isinstance(small, Kernel)
    problems = [case.problem(rows) for rows in ROWS]
    problems[-1] = along(0, problems[-1])
    sizes = [(f"{case.name}-{rows}", emitted(case), problem) for rows, problem in zip(ROWS, problems, strict=True)]
    return [*sizes, (f"{case.name}-small_tile", small, along(-1, case.problem(70)))]


def along(axis: int, problem: Problem) -> Problem:
    """The same of one batch axis, and one of the others: what is told apart in one tile is so in several."""
    kept = range(len(problem.batch))[axis : axis + 1 or None]
    return replace(problem, batch=tuple(n if place in kept else 1 for place, n in enumerate(problem.batch)))


JOBS = {name: job for case in CASES for name, *job in jobs_of(case)}


@pytest.fixture(scope="session")
def interpreted(asked: Callable[[str, str], list[dict[str, Any]]]) -> dict[str, Check | VerificationFailed]:
    names = [params["name"] for params in asked(__name__, "test_kernel_is_within_budget") if "name" in params]
    results = verify_all_interpreted([(kernel, problem) for kernel, problem in map(JOBS.__getitem__, names)])
    return dict(zip(names, results, strict=True))


def named(name: str) -> Any:
    """With the oldest Triton only some cases are run, with a small tile."""
    return pytest.param(name, marks=() if name.removesuffix("-small_tile") in FOR_OLDEST else pytest.mark.newest)


@pytest.mark.parametrize("name", [named(name) for name in JOBS])
def test_kernel_is_within_budget(name: str, interpreted: dict[str, Check | VerificationFailed]) -> None:
    result = interpreted[name]
    assert isinstance(result, Check), str(result)
    assert result.ok


def run(spec: AttentionSpec, inputs: list[torch.Tensor], tile: Tile = SMALL_TILE) -> list[torch.Tensor]:
    kernel = emit(spec, tile)
    assert isinstance(kernel, Kernel)
    (result,) = run_interpreted([(kernel, inputs)])
    assert isinstance(result, list), str(result)
    return result


def test_a_row_of_nan_is_zero_where_weights_are_never_nan() -> None:
    spec = replace(BY_NAME["rows_never_nan"].spec, lse=False)
    q, k, v = sample_inputs(spec, Problem((1, 2), 40, 40))
    q[:, :, 5] = torch.nan
    (out,) = run(spec, [q, k, v])
    assert check(out, spec, [q, k, v]).ok and not out[:, :, [0, 5]].any() and out[:, :, 6:].any(-1).all()


def test_rows_that_a_loaded_bias_masks_entirely_come_out_as_in_eager() -> None:
    """Rows of the lowest number give the mean of the values, rows of minus infinity NaN; others are untouched."""
    spec = attention(
        score=plus(QK, loaded("t0", ROW, KEY)), extras={"t0": (torch.float32, (ROW, KEY))}, mask=CAUSAL, lse=False
    )
    spec = replace(spec, mask=attention().mask)
    q, k, v, bias = sample_inputs(spec, Problem((1, 2), 40, 40))
    bias[3], bias[5], bias[7, :20] = LOWEST, -torch.inf, LOWEST
    (out,) = run(spec, [q, k, v, bias])
    verdict = check(out, spec, [q, k, v, bias])
    assert verdict.ok, verdict
    assert out[:, :, 5].isnan().all() and not out[:, :, [4, 6]].isnan().any()
    torch.testing.assert_close(out[:, :, 3].float(), v.float().mean(-2), atol=1e-3, rtol=1e-3)


def test_strides_are_taken_as_they_are() -> None:
    """Slices of one fused projection, an expanded key and a table with a step: no copy, no assumption."""
    case = BY_NAME["causal"]
    fused = torch.randn(2, 50, 3, 4, 64, generator=torch.Generator().manual_seed(1)).half()
    q, k, v = (fused[:, :, n].transpose(1, 2) for n in range(3))
    k = k[:, :1].expand(2, 4, 50, 64)
    v = v.flip(-1)[..., ::1]
    (out,) = run(case.spec, [q, k, v])
    verdict = check(out, case.spec, [q, k, v])
    assert verdict.ok, verdict


def test_a_key_beyond_the_end_is_never_read() -> None:
    """Memory behind the last key and query holds NaN; reading it, even under a mask, would show."""
    case = BY_NAME["causal_lse"]
    padded = [torch.full((2, 4, 96, 64), torch.nan).half() for _ in range(3)]
    inputs = [x[:, :, :41] for x in padded]
    for seed, x in enumerate(inputs):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
    verdict = check(run(case.spec, inputs), case.spec, inputs)
    assert verdict.ok, verdict


Damage = Callable[[str], str]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "mask": (lambda text: text.replace("cols[None, :] <= rows", "cols[None, :] < rows"), "off"),
    "rescale": (lambda text: text.replace("row_sum * rescale", "row_sum"), "off"),
    "syntax": (lambda text: text.replace("tl.dot(q", "tl.dott(q"), "does not run"),
    "shape": (lambda text: text.replace("return out", "return out[:, :, :1]"), "shape"),
}


def damaged(damage: Damage) -> Kernel:
    kernel = emitted(BY_NAME["causal"])
    broken = replace(kernel, source=damage(kernel.source))
    assert broken.source != kernel.source
    return broken


@pytest.fixture(scope="module")
def refused() -> dict[str, Check | VerificationFailed]:
    problem = Problem((1, 1), 70, 70)
    return dict(zip(DAMAGES, verify_all_interpreted([(damaged(d), problem) for d, _ in DAMAGES.values()]), strict=True))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_kernel_is_refused(name: str, refused: dict[str, Check | VerificationFailed]) -> None:
    result = refused[name]
    assert isinstance(result, VerificationFailed) and DAMAGES[name][1] in str(result)


@pytest.mark.parametrize(
    ("added", "complaint", "timeout"),
    [("import os\nos._exit(3)\n", "code 3", 60.0), ("import time\ntime.sleep(600)\n", "stopped after", 2.0)],
    ids=["crash", "hang"],
)
@pytest.mark.parametrize("start", [forked.in_a_process, forked.interpret], ids=["process", "fork"])
def test_a_kernel_that_ends_its_process_is_refused(
    start: Callable[[Path, float], str], added: str, complaint: str, timeout: float, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_interpret", start)
    broken = damaged(lambda text: f"{text}\n{added}")
    with pytest.raises(VerificationFailed, match=complaint):
        verify_interpreted(broken, Problem((1, 1), 70, 70), timeout=timeout)


def test_one_bad_kernel_does_not_hide_the_others() -> None:
    kernel = emitted(BY_NAME["dense"])
    broken = replace(kernel, source=kernel.source.replace("tl.exp2", "tl.exp3"))
    problem = Problem((1, 1), 17, 17)
    good, bad, again = verify_all_interpreted([(kernel, problem), (broken, problem), (kernel, problem)])
    assert isinstance(bad, VerificationFailed) and good == again and isinstance(good, Check)


def test_without_triton_it_says_so(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr("attngen.compat.has_triton", lambda: False)
    with pytest.raises(Unavailable, match="triton is not installed"):
        verify_interpreted(emitted(BY_NAME["dense"]), Problem((1, 1), 8, 8))


@pytest.mark.parametrize(
    ("triton", "numpy", "usable"), [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.1", False), ("3.9.0", "2.4.1", True)]
)
def test_old_interpreter_needs_an_old_numpy(triton: str, numpy: str, usable: bool, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    problem = compat.interpreter_problem()
    assert (problem is None) == usable
    assert usable or "numpy<2.4" in str(problem)


# ------------------------------------------------------------------------------------------------------------- nothing

EMPTY = [("dense_lse", ROW), ("dense_lse", B), ("causal_lse", ROW), ("causal_lse", KEY), ("grouped", B), ("grouped", KEY)]
EMPTY += [("heads_last", B), ("sinks", ROW), ("fill_shows", B)]
WITHOUT_KEYS = "dense_lse causal_bottom_right window bias table_cross padding_causal documents sinks softmax_plus_one"
EMPTY += [(name, KEY) for name in f"{WITHOUT_KEYS} empty_rows_zero fill_shows fill_added one_query".split()]


def empty_inputs(name: str, axis: Axis) -> list[torch.Tensor]:
    spec = BY_NAME[name].spec
    return emptied(spec, sample_inputs(spec, BY_NAME[name].problem(40)), axis)


@pytest.fixture(scope="module")
def nothing() -> dict[tuple[str, Axis], list[torch.Tensor] | VerificationFailed]:
    results = run_interpreted([(emitted(BY_NAME[name]), empty_inputs(name, axis)) for name, axis in EMPTY])
    return dict(zip(EMPTY, results, strict=True))


@pytest.mark.newest
@pytest.mark.parametrize(("name", "axis"), EMPTY, ids=lambda x: str(x))
def test_nothing_gives_what_eager_gives(
    name: str, axis: Axis, nothing: dict[tuple[str, Axis], list[torch.Tensor] | VerificationFailed]
) -> None:
    """No queries or no batch: an empty result. No keys: zeros, and only sinks in the log-sum-exp."""
    result = nothing[name, axis]
    assert isinstance(result, list), str(result)
    expected = eager(BY_NAME[name].spec, empty_inputs(name, axis))
    assert torch.equal(result[0], expected[0]) and result[0].dtype == expected[0].dtype
    assert bool(result[0].numel()) == (axis is KEY) and not result[0].any()
    for mine, theirs in zip(result[1:], expected[1:], strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- budget


def test_budget_is_what_eager_makes_and_one_rounding() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = torch.tensor([1.0, 2.25])
    half = torch.finfo(torch.float16).eps
    verdict = within_budget(torch.tensor([1.5, 2.0]).half(), exact, eager)
    assert verdict.error == 0.5 and verdict.budget == 0.5 + half * 2
    assert verdict.ok
    assert not within_budget(torch.tensor([1.0, 2.6]).half(), exact, eager).ok


@pytest.mark.parametrize(
    ("actual", "exact"),
    [([1.0, torch.nan], [1.0, 2.0]), ([1.0, 2.0], [1.0, torch.nan]), ([1.0, torch.inf], [1.0, -torch.inf])],
)
def test_values_that_are_not_finite_must_agree(actual: list[float], exact: list[float]) -> None:
    exact64 = torch.tensor(exact, dtype=torch.float64)
    assert not within_budget(torch.tensor(actual), exact64, exact64.float()).ok
    assert within_budget(exact64.float(), exact64, exact64.float()).ok


def test_result_of_another_shape_is_an_error() -> None:
    exact = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AttngenError, match="shape"):
        within_budget(torch.zeros(3, 2), exact, exact)


# ------------------------------------------------------------------------------------------------------ sample inputs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_samples_fit_their_spec(case: Case) -> None:
    problem = case.problem(20)
    samples = sample_inputs(case.spec, problem)
    assert [x.dtype for x in samples] == [source.dtype for source in case.spec.inputs]
    again = sample_inputs(case.spec, problem)
    assert all(torch.equal(a, b) for a, b in zip(samples, again, strict=True))
    layouts = [(x.shape, x.stride(), x.dtype) for x in sample_inputs(case.spec, problem, device="meta")]
    assert layouts == [(x.shape, x.stride(), x.dtype) for x in samples]
    out, lse = reference(case.spec, samples)
    extents = dict(zip((a.name for a in case.spec.batch), problem.batch, strict=True))
    extents |= {"i": problem.rows, "e": case.spec.value_dim}
    assert out.shape == tuple(extents[axis.name] for axis in case.spec.output)
    assert lse.shape == (*problem.batch, problem.rows)


def test_samples_lie_in_memory_as_the_output_does() -> None:
    q, k, v = sample_inputs(BY_NAME["heads_last"].spec, Problem((2, 4), 10, 12))
    assert q.shape == (2, 4, 10, 64) and q.stride() == (10 * 4 * 64, 64, 4 * 64, 1)
    assert k.stride() == (12 * 4 * 64, 64, 4 * 64, 1)
    assert v.transpose(1, 2).is_contiguous()


def test_bfloat16_is_checked_in_float16() -> None:
    spec = in_half(BY_NAME["dense_bf16"].spec)
    assert {source.dtype for source in spec.inputs} == {torch.float16} and spec.out_dtype == torch.float16
