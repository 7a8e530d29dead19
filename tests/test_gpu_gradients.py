"""Gradients on a GPU: the portable kernels of every spec, and whole modules compiled. Run with ``pytest -m gpu``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from specs import CASES, CAUSAL, Case, attention, window
from test_gpu_kernels import in_bfloat16
from torch import Tensor

import attngen
from attngen import gradient, runtime, verify_bwd
from attngen.choose_bwd import BackwardPlan, choose_backward
from attngen.device import probe
from attngen.emit import BackwardKernel, emit_backward
from attngen.errors import Miss
from attngen.interpret import import_file
from attngen.spec import AttentionSpec, Problem
from attngen.verify import Check, within_budget
from attngen.verify_bwd import Sample

pytestmark = pytest.mark.gpu

RUNS = 100
MANY = 32  # elements of which the largest error says something
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses products that must be deterministic

LARGE = (
    Case("causal_d128", attention(dtype=torch.bfloat16, head_dim=128, mask=CAUSAL), batch=(2, 4)),
    Case("window_d64", attention(dtype=torch.bfloat16, mask=window(512)), batch=(2, 4)),
    Case("grouped_d128", attention(dtype=torch.bfloat16, head_dim=128, groups=4, mask=CAUSAL), batch=(1, 8)),
    Case("dense_d256", attention(head_dim=256), batch=(1, 4)),
)


def _checked(case: Case, rows: int, folder: Path) -> None:
    spec, problem = replace(case.spec, lse=True), case.problem(rows)
    plan = choose_backward(spec, problem, probe())
    if not isinstance(plan, BackwardPlan):
        pytest.skip(plan.reason)
    kernel = emit_backward(spec, plan.otherwise or plan.tiles)
    assert isinstance(kernel, BackwardKernel)
    path = folder / "kernel.py"
    path.write_text(kernel.source)
    launch = import_file(path).launch
    first, *others = _samples(spec, problem)
    found = verify_bwd.check(launch(*first.arguments), first)
    assert {"q", "k", "v"} <= found.keys()
    if others:
        found |= _of_few(launch, [first, *others])
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


def _samples(spec: AttentionSpec, problem: Problem) -> list[Sample]:
    """One, or as many as have ``MANY`` elements of the smallest gradient: two are a matter of luck."""
    first = verify_bwd.sample(spec, problem, device="cuda")
    smallest = min(x.numel() for x, needed in zip(first.inputs, first.needed, strict=True) if needed)
    more = range(1, -(-MANY // smallest))
    return [first, *(verify_bwd.sample(spec, problem, seed=seed, device="cuda") for seed in more)]


def _of_few(launch: Callable[..., list[Tensor]], samples: list[Sample]) -> dict[str, Check]:
    """The verdicts on gradients of few elements, over those of all samples."""
    verdicts = {}
    ours, exact, eager = (
        [of(at) for at in samples] for of in (partial(_finished, launch), verify_bwd.reference, verify_bwd.eager)
    )
    for place, source in enumerate(samples[0].spec.inputs):
        if samples[0].needed[place] and samples[0].inputs[place].numel() < MANY:
            each = (torch.stack([grads[place] for grads in runs]) for runs in (ours, exact, eager))
            verdicts[source.name] = within_budget(*each, slack=verify_bwd.SLACK)
    return verdicts


def _finished(launch: Callable[..., list[Tensor]], at: Sample) -> list[Tensor | None]:
    *made, delta = launch(*at.arguments)
    return gradient.finish(gradient.backward_of(at.spec), at.inputs, at.needed, made, at.lse, delta)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case: Case, tmp_path: Path) -> None:
    _checked(case, 300, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_in_bfloat16(case: Case, tmp_path: Path) -> None:
    _checked(replace(case, spec=in_bfloat16(case.spec)), 77, tmp_path)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_long_gradients(case: Case, tmp_path: Path) -> None:
    _checked(case, 1500, tmp_path)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("case", (*LARGE, *CASES), ids=lambda case: case.name)
def test_gradients_are_the_same_bits_in_a_hundred_runs(case: Case) -> None:
    """Whatever family and path a site gets: that of the inputs, and of all that is loaded."""
    spec, problem = replace(case.spec, lse=True), case.problem(300)
    at = verify_bwd.sample(spec, problem, device="cuda")
    gradient = getattr(torch.ops.attngen, _operator(spec, problem).replace("fwd_", "bwd_"))
    first, *others = (gradient(at.grad, at.out, at.lse, at.inputs, at.needed) for _ in range(RUNS))
    assert len(first) == sum(at.needed)
    for grads in others:
        assert all(torch.equal(_bits(x), _bits(y)) for x, y in zip(first, grads, strict=True))


def _operator(spec: AttentionSpec, problem: Problem) -> str:
    """The name of the operator that a site is replaced by, with the gradients that are chosen for it."""
    kernel, plan = None, choose_backward(spec, problem, probe())
    if isinstance(plan, BackwardPlan):
        kernel, other = (emit_backward(spec, tiles) if tiles else None for tiles in (plan.tiles, plan.otherwise))
        assert isinstance(kernel, BackwardKernel) and not isinstance(other, Miss)
        kernel = replace(kernel, otherwise=other)
    return runtime.operator(spec, None, kernel).name().split("::")[1].split(".")[0]  # type: ignore[no-any-return]


def _bits(x: Tensor) -> Tensor:
    """NaN is not equal to itself."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def test_portable_gradients_are_so_without_being_asked_to(tmp_path: Path) -> None:
    """No program adds to what another has written."""
    spec, problem = replace(LARGE[2].spec, lse=True), Problem((1, 8), 700, 700)
    plan = choose_backward(spec, problem, probe())
    assert isinstance(plan, BackwardPlan)
    kernel = emit_backward(spec, plan.otherwise or plan.tiles)
    assert isinstance(kernel, BackwardKernel)
    path = tmp_path / "kernel.py"
    path.write_text(kernel.source)
    at = verify_bwd.sample(spec, problem, device="cuda")
    launch = import_file(path).launch
    first = launch(*at.arguments)
    for _ in range(RUNS):
        assert all(torch.equal(a, b) for a, b in zip(first, launch(*at.arguments), strict=True))


# -------------------------------------------------------------------------------------------------------- whole modules


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2], device=q.device)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    return scores.masked_fill(i > i[:, None], -torch.inf).float().softmax(-1).to(v.dtype) @ v


def _transposed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Operands that lie in memory with heads beside features, and a result that is read so."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return _plain(q, k, v, bias).transpose(1, 2).flatten(2)


def _library(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) * bias.mean()


@pytest.mark.parametrize("attend", [_plain, _transposed, _library])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_compiled_module_has_the_gradients_of_eager(attend: Callable[..., Tensor], inner: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    shapes = [(2, 4, 200, 64)] * 3 + [(4, 200, 200)]
    leaves = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    grad = torch.randn_like(attend(*leaves).detach())
    compiled = torch.compile(attend, backend="attngen", options={"inner": inner})
    with attngen.record() as reports:
        found = torch.autograd.grad(compiled(*leaves), leaves, grad)
    (site,) = [site for report in reports for site in report.sites]
    assert site.status == "replaced" and "x" in site.backward, site
    eager = torch.autograd.grad(attend(*leaves), leaves, grad)
    doubled = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(attend(*doubled), doubled, grad.double())
    for ours, true, naive in zip(found, exact, eager, strict=True):
        verdict = within_budget(ours, true, naive, slack=verify_bwd.SLACK)
        assert verdict.ok, str(verdict)
