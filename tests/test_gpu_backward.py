"""Gradients by both families of kernels on a GPU, against float64. Run with ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import BOTTOM_RIGHT, BY_NAME, CASES, CAUSAL, Case, attention, scaled, softcap, window
from test_hopper_backward import SUITED, kernel_of

from attngen import hopper_bwd, runtime, verify_bwd
from attngen.blockwise import forward
from attngen.choose_bwd import BackwardPlan, choose_backward
from attngen.device import probe
from attngen.emit import BackwardKernel, emit_backward
from attngen.interpret import import_file
from attngen.spec import HOPPER, PORTABLE, AttentionSpec, Problem, Tile
from attngen.verify_bwd import Sample

pytestmark = pytest.mark.gpu

PORTABLE_TILES = (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
SIZES = {"even": (1024, 1024), "ragged": (1000, 777), "short": (77, 130), "long": (300, 3000)}


def programs(head_dim: int, dtype: torch.dtype) -> dict[str, AttentionSpec]:
    qk = scaled(head_dim**-0.5)
    made = {
        "dense": attention(dtype=dtype, head_dim=head_dim),
        "causal": attention(dtype=dtype, head_dim=head_dim, mask=CAUSAL),
        "aligned at the end": attention(dtype=dtype, head_dim=head_dim, mask=BOTTOM_RIGHT),
        "window": attention(dtype=dtype, head_dim=head_dim, mask=window(200)),
        "grouped": attention(dtype=dtype, head_dim=head_dim, groups=4),
        "grouped, causal": attention(dtype=dtype, head_dim=head_dim, groups=4, mask=CAUSAL),
        "softcap": attention(dtype=dtype, head_dim=head_dim, score=softcap(20.0, qk), mask=CAUSAL),
    }
    return {name: replace(spec, lse=True) for name, spec in made.items()}


PROGRAMS = {
    f"{name}, d={head_dim}, {dtype}": spec
    for head_dim in (64, 128, 256)
    for dtype in (torch.bfloat16, torch.float16)
    for name, spec in programs(head_dim, dtype).items()
}


def portable(spec: AttentionSpec) -> BackwardKernel:
    kernel = emit_backward(spec, PORTABLE_TILES)
    assert isinstance(kernel, BackwardKernel), kernel
    return kernel


def written(kernel: BackwardKernel, folder: Path) -> Callable[..., Any]:
    path = folder / f"{kernel.name}.py"
    path.write_text(kernel.source)
    return import_file(path).launch


def checked(kernel: BackwardKernel, at: Sample, folder: Path) -> None:
    """The gradients are within budget, and a second run, on memory that was used before, gives them again."""
    launch = written(kernel, folder)
    again = {"again": written(portable(kernel.spec), folder)} if kernel.leaves_rows else {}
    for _ in range(2):
        found = verify_bwd.check(launch(*at.arguments, **again), at)
        assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


def sampled(spec: AttentionSpec, problem: Problem) -> Sample:
    return replace(verify_bwd.sample(replace(spec, lse=True), problem, device="cuda"), extras=False)


@pytest.fixture
def wgmma() -> None:
    if not probe().wgmma:
        pytest.skip("no warpgroups that multiply")


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.usefixtures("wgmma")
def test_hopper_gradients(name: str, sizes: str, tmp_path: Path) -> None:
    spec = PROGRAMS[name]
    checked(kernel_of(spec), sampled(spec, Problem((2, 8), *SIZES[sizes])), tmp_path)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if "bfloat16" in name])
def test_portable_gradients(name: str, tmp_path: Path) -> None:
    spec = PROGRAMS[name]
    checked(portable(spec), sampled(spec, Problem((2, 8), *SIZES["ragged"])), tmp_path)


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("case", SUITED, ids=lambda case: case.name)
@pytest.mark.usefixtures("wgmma")
def test_every_suited_case(case: Case, stays: bool, tmp_path: Path) -> None:
    checked(kernel_of(case.spec, stays=stays), sampled(case.spec, case.problem(504)), tmp_path)


@pytest.mark.parametrize("rows", [504, 2000])
@pytest.mark.parametrize("name", ["bias", "mask_added_in_half", "table_cross"])
@pytest.mark.usefixtures("wgmma")
def test_gradients_of_what_is_added_to_scores(name: str, rows: int, tmp_path: Path) -> None:
    case = BY_NAME[name]
    at = replace(sampled(case.spec, case.problem(rows)), extras=True)
    checked(kernel_of(case.spec), at, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_by_portable_kernels(case: Case, tmp_path: Path) -> None:
    """With gradients of all that is loaded."""
    at = verify_bwd.sample(replace(case.spec, lse=True), case.problem(200), device="cuda")
    plan = choose_backward(at.spec, case.problem(200), probe())
    if not isinstance(plan, BackwardPlan):
        pytest.skip(plan.reason)
    kernel = emit_backward(at.spec, plan.otherwise or plan.tiles)
    assert isinstance(kernel, BackwardKernel) and kernel.family == PORTABLE
    checked(kernel, at, tmp_path)


@pytest.mark.usefixtures("wgmma")
def test_gradients_of_a_view_and_of_an_expanded_gradient(tmp_path: Path) -> None:
    """What TMA cannot address is copied: rows that begin anywhere, and one number for all of the result."""
    spec = PROGRAMS["causal, d=64, torch.bfloat16"]
    at = sampled(spec, Problem((2, 4), 300, 300))
    wide = torch.zeros(2, 4, 300, 65, dtype=torch.bfloat16, device="cuda")
    wide[..., 1:] = at.inputs[0]
    ones = torch.ones_like(at.grad[:1, :1, :1, :1]).expand_as(at.grad)
    moved = replace(at, inputs=(wide[..., 1:], *at.inputs[1:]), grad=ones)
    out, lse = forward(spec, moved.inputs)
    checked(kernel_of(spec), replace(moved, out=out, lse=lse.float().contiguous()), tmp_path)


@pytest.mark.parametrize("name", ["causal_lse", "bias", "window"])
@pytest.mark.parametrize("kernel_for", [kernel_of, portable], ids=["hopper", "portable"])
@pytest.mark.usefixtures("wgmma")
def test_a_cuda_graph_holds_gradients(kernel_for: Callable[..., BackwardKernel], name: str, tmp_path: Path) -> None:
    """Captured after launches that were recorded, and replayed for other operands than those."""
    case = BY_NAME[name]
    kernel, at = kernel_for(replace(case.spec, lse=True)), sampled(case.spec, case.problem(504))
    launch = written(kernel, tmp_path)
    again = {"again": written(portable(kernel.spec), tmp_path)} if kernel.leaves_rows else {}
    for _ in range(3):
        launch(*at.arguments, **again)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = launch(*at.arguments, **again)
    other = verify_bwd.sample(at.spec, case.problem(504), seed=7, device="cuda")
    for held, given in zip(at.inputs, other.inputs, strict=True):
        held.copy_(given)
    at.out.copy_(other.out), at.lse.copy_(other.lse), at.grad.copy_(other.grad)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    found = verify_bwd.check(results, at)
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


def test_the_operator_takes_the_plan_that_was_chosen() -> None:
    spec, problem = PROGRAMS["grouped, causal, d=128, torch.bfloat16"], Problem((4, 16), 2048, 2048)
    device = probe()
    plan = choose_backward(spec, problem, device)
    assert isinstance(plan, BackwardPlan)
    kernel = emit_backward(spec, plan.tiles)
    assert isinstance(kernel, BackwardKernel) and kernel.family == (HOPPER if device.wgmma else PORTABLE)
    at = sampled(spec, problem)
    leaves = [x.detach().requires_grad_() for x in at.inputs]
    out, _ = runtime.operator(spec, None, kernel)(*leaves)
    grads = torch.autograd.grad(out, leaves, at.grad)
    for ours, exact in zip(grads, verify_bwd.reference(at), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0.05, atol=0.05)


def test_there_is_a_tile_for_both_widths() -> None:
    assert {hopper_bwd.padded(spec) for spec in PROGRAMS.values()} == set(hopper_bwd.STEPS)


@pytest.mark.usefixtures("wgmma")
def test_gradients_that_must_be_the_same_are_from_run_to_run() -> None:
    spec, problem = PROGRAMS["causal, d=64, torch.bfloat16"], Problem((4, 16), 2048, 2048)
    plan = choose_backward(spec, problem, probe())
    assert isinstance(plan, BackwardPlan) and plan.otherwise
    kernel, other = emit_backward(spec, plan.tiles), emit_backward(spec, plan.otherwise)
    assert isinstance(kernel, BackwardKernel) and isinstance(other, BackwardKernel)
    at = sampled(spec, problem)
    run = runtime._gradient_by_kernel(spec, replace(kernel, otherwise=other))
    torch.use_deterministic_algorithms(True)
    try:
        first, *more = [run(at.grad, at.out, at.lse, at.inputs, [True] * 3) for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for grads in more for x, y in zip(first, grads, strict=True))
