"""Gradients by kernels in Triton's interpreter against float64, and what they are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from specs import BIAS, BY_NAME, CASES, CAUSAL, DIAGONAL, QK, TABLE, B, Case, H, attention, loaded, plus
from test_emit import without_digest
from test_kernels import along
from torch import Tensor

from attngen import aot, blockwise, gradient, verify_bwd
from attngen.adjoint import SCORE_GRAD, gradients
from attngen.algebra import Const, Expr, Int, Load, op
from attngen.aot import Job, import_file
from attngen.emit import BackwardKernel, emit_backward
from attngen.errors import VerificationFailed
from attngen.evaluate import Evaluator
from attngen.printer import Unprintable
from attngen.spec import KEY, ROW, SCORE, Problem, Tile
from attngen.verify import Check, run_interpreted, sample_inputs
from attngen.verify_bwd import Sample

pytest.importorskip("triton")

# So small that every loop runs: several tiles, and blocks narrower than the windows; one is held by more, one by fewer.
TILES = (Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
REVIEWED = ("causal", "grouped", "table_cross", "fill_shows", "temperature", "own_sum")


def backward(case: Case, tiles: tuple[Tile, Tile] = TILES) -> BackwardKernel:
    kernel = emit_backward(replace(case.spec, lse=True), tiles)
    assert isinstance(kernel, BackwardKernel), kernel.reason
    return kernel


def problem_of(case: Case) -> Problem:
    """With a whole batch where programs of several heads may add to the same gradient, else along one of its axes."""
    problem = case.problem(45)
    shared = case.spec.extras or case.spec.keys.index[:-2] != case.spec.query.index[:-2]
    return problem if shared else along(CASES.index(case) % max(1, len(problem.batch)), problem)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, dict[str, Check] | VerificationFailed]:
    results = verify_bwd.verify_all_interpreted([(backward(case), problem_of(case)) for case in CASES])
    return dict(zip(BY_NAME, results, strict=True))


@pytest.mark.parametrize("name", BY_NAME)
def test_gradients_are_within_budget(name: str, verdicts: dict[str, dict[str, Check] | VerificationFailed]) -> None:
    found = verdicts[name]
    assert isinstance(found, dict), str(found)
    assert {"q", "k", "v"} <= found.keys()
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


@pytest.mark.parametrize("name", REVIEWED)
def test_backward_kernel(name: str, golden: Callable[[str], None]) -> None:
    golden(without_digest(backward(BY_NAME[name], (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2))).source))


def _given(at: Sample, inputs: tuple[Tensor, ...]) -> Sample:
    """The same on other inputs."""
    out, lse = blockwise.forward(at.spec, inputs)
    return replace(at, inputs=inputs, out=out, lse=lse.float().contiguous())


def test_rows_too_low_for_their_log_sum_exp_are_computed_again() -> None:
    """What is added is so low that a sum of weights beside it leaves no trace; what is loaded is read again for that."""
    case = BY_NAME["table_cross"]
    kernel = backward(case)
    at = verify_bwd.sample(kernel.spec, case.problem(40))
    table = at.inputs[3].clone()
    table[0] -= 3e5
    at = _given(at, (*at.inputs[:3], table))
    (made,) = run_interpreted([(kernel, at.arguments)])
    assert isinstance(made, list), str(made)
    found = verify_bwd.check(made, at)
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


def test_nothing_is_allocated_for_a_gradient_that_nobody_needs() -> None:
    """A bias is as large as all pairs: often it is a mask."""
    case = BY_NAME["bias"]
    kernel = backward(case)
    at = replace(verify_bwd.sample(kernel.spec, case.problem(40)), extras=False)
    watched = kernel.source.replace("    results = dq", "    assert dt0 is t0 and not need_t0\n    results = dq")
    assert watched != kernel.source and "if need_t0 else None, delta" in watched
    given = replace(kernel, source=watched.replace("if need_t0 else None, delta", "if need_t0 else q[:0], delta"))
    (made,) = run_interpreted([(given, at.arguments)])
    assert isinstance(made, list), str(made)
    found = verify_bwd.check(made, at)
    assert found.keys() == {"q", "k", "v"} and all(verdict.ok for verdict in found.values())


def test_sums_over_whole_heads_keep_their_digits() -> None:
    """Scores of a few hundred have a log-sum-exp with few digits behind the point: the weights of a row are all off by one
    factor, which adds up over the distances that a slope is multiplied by."""
    kernel = backward(BY_NAME["alibi"])
    at = verify_bwd.sample(kernel.spec, Problem((1, 2), 256, 256))
    at = _given(at, (*at.inputs[:3], torch.tensor([0.9, 2.0])))
    (made,) = run_interpreted([(kernel, at.arguments)])
    assert isinstance(made, list), str(made)
    *buffers, delta = made
    ours = gradient.finish(gradient.backward_of(at.spec), at.inputs, at.needed, buffers, at.lse, delta)
    exact, eager = verify_bwd.reference(at), verify_bwd.eager(at)
    off, eager_off = ((grads[3] - exact[3]).abs() for grads in (ours, eager))  # type: ignore[operator]
    assert (off < 0.5 * eager_off).all()


def test_a_wrong_gradient_is_noticed() -> None:
    """The budget tells apart what a slip in the kernel would give: deltas left out."""
    case = BY_NAME["causal"]
    kernel = backward(case)
    broken = replace(kernel, source=re.sub(r"dp - delta\[.*?\]", "dp", kernel.source))
    assert broken.source != kernel.source
    (found,) = verify_bwd.verify_all_interpreted([(broken, case.problem(40))])
    assert isinstance(found, dict)
    assert not found["q"].ok and not found["k"].ok and found["v"].ok


# ----------------------------------------------------------------------------------------------------------- derivatives

X, Y = loaded("x", KEY), loaded("y", KEY)
PROGRAMS: dict[str, Expr] = {
    "add": op("add", X, Y),
    "sub": op("sub", X, Y),
    "mul": op("mul", X, op("mul", X, Y)),
    "div": op("div", X, Y),
    "neg": op("neg", X),
    "abs": op("abs", X),
    "max": op("max", X, Y),
    "min": op("min", X, Y),
    "relu": op("relu", X),
    "at least": op("max", X, Const(0.0)),
    "at most": op("min", X, Const(0.0)),
    "exp": op("exp", X),
    "exp2": op("exp2", X),
    "log": op("log", op("abs", X)),
    "log2": op("log2", op("abs", X)),
    "sqrt": op("sqrt", op("abs", X)),
    "rsqrt": op("rsqrt", op("abs", X)),
    "sin": op("sin", X),
    "cos": op("cos", X),
    "tanh": op("mul", op("tanh", op("div", X, Const(3.0))), Const(3.0)),
    "sigmoid": op("sigmoid", op("sub", X, Y)),
    "erf": op("erf", X),
    "pow": op("pow", op("abs", X), Const(2.5)),
    "where": op("where", op("lt", X, Y), op("mul", X, X), op("neg", Y)),
    "floor": op("add", op("floor", X), Y),
    "shared": op("mul", op("tanh", X), op("add", op("tanh", X), op("exp", Y))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_derivatives_are_those_of_torch(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = {of: torch.randn(64, generator=generator, dtype=torch.float64).requires_grad_() for of in ("x", "y")}
    grad = torch.randn(64, generator=generator, dtype=torch.float64)
    leaves["x"].data[:4] = leaves["y"].data[:4]  # ties
    if name in ("relu", "at least", "at most"):
        leaves["x"].data[4:6] = 0.0

    def evaluated(expr: Expr) -> torch.Tensor:
        positions = {KEY: torch.arange(64), ROW: torch.zeros((), dtype=torch.int64)}
        return Evaluator(positions, leaves.__getitem__, known={SCORE_GRAD: grad})(expr)

    both = list(leaves.values())
    expected = torch.autograd.grad(evaluated(PROGRAMS[name]), both, grad, materialize_grads=True, allow_unused=True)
    found = gradients(PROGRAMS[name], SCORE_GRAD)
    for load, exact in zip((X, Y), expected, strict=True):
        ours = evaluated(found[load]).broadcast_to(64) if load in found else torch.zeros(64, dtype=torch.float64)
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_an_operation_without_a_known_derivative_is_refused() -> None:
    with pytest.raises(Unprintable, match="no gradient of mod"):
        gradients(op("mod", X, Y), SCORE_GRAD)
    with pytest.raises(Unprintable, match="exponent"):
        gradients(op("pow", X, Y), SCORE_GRAD)


# ------------------------------------------------------------------------------------------------------ where gradients go


def _kinds(spec_of: dict[str, Load]) -> dict[str, tuple[str, bool]]:
    score = plus(QK, *spec_of.values())
    extras = {name: (torch.float32, tuple(place.value for place in load.index)) for name, load in spec_of.items()}  # type: ignore[attr-defined]
    plan = gradient.backward_of(attention(score=score, extras=extras, mask=CAUSAL, lse=True))
    return {target.source.name: (target.kind, target.shared) for target in plan.extras}


def test_each_gradient_is_reduced_where_it_is_made() -> None:
    kinds = _kinds({
        "t0": BIAS,
        "t1": loaded("t1", B, H, ROW, KEY),
        "t2": loaded("t2", H, KEY - ROW + ROW.extent - 1),
        "t3": loaded("t3", H, ROW - KEY + KEY.extent - 1),
        "t4": loaded("t4", B, KEY),
        "t5": loaded("t5", H, ROW),
        "t6": loaded("t6", H),
    })  # fmt: skip
    assert kinds == {
        "t0": ("pair", True),  # one for all of a batch
        "t1": ("pair", False),
        "t2": ("diagonal", True),
        "t3": ("scattered", True),
        "t4": ("keys", False),
        "t5": ("rows", False),
        "t6": ("head", False),
    }


def test_a_group_of_heads_is_summed_by_one_program() -> None:
    plan = gradient.backward_of(replace(BY_NAME["grouped"].spec, lse=True))
    assert plan.members == ((H, 4),) and plan.keys.direct
    uneven = [torch.zeros(1, heads, 4, 64) for heads in (6, 2, 2)]
    assert not gradient.suits(plan, uneven) and gradient.suits(plan, [uneven[0][:, :4], *uneven[1:]])


def shared_of(case: Case) -> list[gradient.Target]:
    return [target for target in gradient.backward_of(replace(case.spec, lse=True)).extras if target.shared]


SHARED = [case for case in CASES if shared_of(case)]


def in_integers(case: Case) -> BackwardKernel:
    """The portable kernel of ``case`` as it is under ``torch.use_deterministic_algorithms``."""
    kernel = emit_backward(replace(case.spec, lse=True), TILES)
    assert isinstance(kernel, BackwardKernel)
    assert "deterministic()" in kernel.source
    return replace(kernel, source=kernel.source.replace("deterministic()", "True"))


def test_what_several_programs_add_to_may_be_added_up_in_integers() -> None:
    """Of every kind: along diagonals, scattered, and pairs that heads share."""
    assert {"diagonal", "scattered", "pair"} == {target.kind for case in SHARED for target in shared_of(case)}
    jobs = [(in_integers(case), case.problem(40)) for case in SHARED]
    for case, found in zip(SHARED, verify_bwd.verify_all_interpreted(jobs), strict=True):
        assert isinstance(found, dict) and all(verdict.ok for verdict in found.values()), (case.name, found)


def test_kernels_that_add_up_in_integers_compile(tmp_path: Path) -> None:
    """Both runs of them, and what comes after."""
    by_kind = {target.kind: case for case in SHARED for target in shared_of(case)}
    for case in by_kind.values():
        kernel, at = in_integers(case), verify_bwd.sample(replace(case.spec, lse=True), case.problem(40))
        (tmp_path / f"{kernel.name}.py").write_text(kernel.source)
        job = Job.of(tmp_path / f"{kernel.name}.py", [at.grad, at.out, at.lse, *at.inputs])
        built = aot._built(module := import_file(job.source), aot.backward_launches_of(module, job.inputs), 90)
        assert {name: len(each) for name, each in built.items()} == {
            "backward_queries": 2, "backward_keys": 1, "backward_sums": len(shared_of(case))
        }  # fmt: skip


def test_each_sum_in_integers_has_its_own_unit(tmp_path: Path) -> None:
    """And takes no second run where nobody asks for it."""
    score = plus(QK, plus(loaded("t0", H, DIAGONAL), op("mul", loaded("t1", H, ROW, KEY), Const(1e-6))))
    extras = {**TABLE, "t1": (torch.float32, (H, ROW, KEY))}
    case = Case("two", attention(dtype=torch.float32, score=score, extras=extras, mask=CAUSAL))
    kernel = in_integers(case)
    assert {target.source.name: target.kind for target in shared_of(case)} == {"t0": "diagonal", "t1": "pair"}
    at = verify_bwd.sample(case.spec, case.problem(40))
    ((*_, diagonals, pairs, _),) = run_interpreted([(kernel, at.arguments)])
    for found, exact in zip((diagonals, pairs), verify_bwd.reference(at)[3:], strict=True):
        assert exact is not None
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    (tmp_path / "two.py").write_text(kernel.source)
    module, tensors = import_file(tmp_path / "two.py"), [at.grad, at.out, at.lse, *at.inputs]
    for needed, runs in (((True, True), 2), ((False, True), 2), ((False, False), 1)):
        calls = aot._recorded(module, lambda launch, needed=needed: launch(*tensors, *needed))
        sums = calls["backward_sums"].all if any(needed) else []
        assert len(calls["backward_queries"].all) == runs and len(sums) == sum(needed)


@pytest.mark.parametrize("size", [1e-30, 1e25, float("nan"), float("inf")])
def test_sums_in_integers_are_of_any_size(size: float) -> None:
    """And where something is not finite, the entries that it belongs to are not, and the others are right."""
    case = Case("table", attention(dtype=torch.float32, score=plus(QK, loaded("t0", H, DIAGONAL)), extras=TABLE, mask=CAUSAL))
    at = verify_bwd.sample(replace(case.spec, lse=True), case.problem(40))
    if 0 < size < float("inf"):
        at = replace(at, grad=at.grad * size)
    else:
        at.grad[0, 0, 30, 2] = size
        size = 1.0
    ((*_, found, _),) = run_interpreted([(in_integers(case), at.arguments)])
    exact = verify_bwd.reference(at)[3]
    assert exact is not None and torch.equal(found.isfinite(), exact.isfinite()) and found.isfinite().any()
    kept = exact.isfinite()
    assert torch.allclose(found[kept].double(), exact[kept], rtol=1e-4, atol=1e-4 * size)


def with_a_row_of_nan(rows: int) -> tuple[Sample, tuple[Tensor, ...]]:
    """Weights that are never NaN, where a query is; and the gradients of eager."""
    spec = replace(BY_NAME["rows_never_nan"].spec, lse=True)
    inputs = [x.float().half() for x in sample_inputs(spec, Problem((1, 2), rows, rows))]
    inputs[0][:, :, 5] = torch.nan
    out, lse = blockwise.forward(spec, inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    leaves = [x.double().requires_grad_() for x in inputs]
    scores = (leaves[0] @ leaves[1].mT * 0.125).masked_fill(~torch.ones(rows, rows).tril(-1).bool(), -torch.inf)
    (torch.softmax(scores, -1).nan_to_num() @ leaves[2]).backward(grad.double())
    return Sample(spec, tuple(inputs), out, lse.float(), grad), tuple(x.grad for x in leaves if x.grad is not None)


def right_where_a_row_is_nan(found: Sequence[Tensor], exact: tuple[Tensor, ...]) -> None:
    dq, dk, dv = (x.double() for x in found)
    torch.testing.assert_close(dv, exact[2], rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(dq[:, :, 6:], exact[0][:, :, 6:], rtol=1e-2, atol=2e-2)
    assert dq[:, :, 5].isnan().all() and dk[:, :, :5].isnan().all() and exact[1].isnan().all()


def test_a_row_of_nan_adds_nothing_to_the_gradient_of_the_values() -> None:
    """Where it gives zero; those of its query and of the keys are NaN."""
    at, exact = with_a_row_of_nan(40)
    (results,) = run_interpreted([(backward(BY_NAME["rows_never_nan"]), at.arguments)])
    assert isinstance(results, list | tuple)
    right_where_a_row_is_nan(results[:3], exact)
    by_block = blockwise.backward(at.spec, at.inputs, at.grad, at.needed)
    right_where_a_row_is_nan([x for x in by_block if x is not None], exact)


def test_keys_and_values_of_different_heads_are_summed_afterwards() -> None:
    spec = attention(groups=2, values=replace(attention().values, index=attention().values.index), lse=True)
    plan = gradient.backward_of(spec)
    assert plan.members == () and not plan.keys.direct and not plan.values.direct
    kernel = emit_backward(spec, TILES)
    assert isinstance(kernel, BackwardKernel)
    (found,) = verify_bwd.verify_all_interpreted([(kernel, Problem((2, 4), 40, 40))])
    assert isinstance(found, dict) and all(verdict.ok for verdict in found.values()), found


def test_mirrored_programs_are_mirrored_back() -> None:
    score = plus(SCORE, loaded("t0", ROW, KEY), op("float", Int(ROW - 2 * KEY + KEY.extent)))
    there = gradient.mirrored(score)
    assert there != score and gradient.mirrored(there) == score
    assert SCORE in there.walk() and loaded("t0", KEY, ROW) in there.walk()
