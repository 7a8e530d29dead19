"""The blockwise path against the naive spelling: values, gradients of all inputs, memory, and torch's attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from specs import BY_NAME, CASES, QK, SLOPE, SLOPES, Case, attention, loaded, plus, softcap
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attngen import blockwise, runtime
from attngen.algebra import Const
from attngen.index import Axis
from attngen.spec import KEY, ROW, AttentionSpec, Problem, batch_axes
from attngen.verify import check, eager, sample_inputs


def doubled(case: Case, rows: int, *, seed: int = 0) -> tuple[AttentionSpec, list[Tensor]]:
    """The case in float64 throughout."""
    inputs = sample_inputs(case.spec, case.problem(rows), seed=seed)
    spec = replace(case.spec, out_dtype=torch.float64)
    return spec, [x.double() if x.is_floating_point() else x for x in inputs]


@pytest.fixture
def blocks_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that even small problems take several."""
    monkeypatch.setattr(blockwise, "BLOCK_ELEMENTS", 700)


@pytest.mark.usefixtures("blocks_of")
@pytest.mark.parametrize("rows", [1, 23])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_is_the_naive_spelling(case: Case, rows: int) -> None:
    spec, inputs = doubled(case, rows)
    (out, lse), (expected, expected_lse) = blockwise.forward(spec, inputs), eager(spec, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_is_within_budget(case: Case) -> None:
    inputs = sample_inputs(case.spec, case.problem(70))
    out, lse = blockwise.forward(case.spec, inputs)
    assert out.dtype == case.spec.out_dtype and out.is_contiguous()
    verdict = check((out, lse), case.spec, inputs)
    assert verdict.ok, verdict


# ---------------------------------------------------------------------------------------------------------- gradients

DIFFERENTIABLE = [case for case in CASES if "nan" not in case.name]


@pytest.mark.usefixtures("blocks_of")
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_backward_is_that_of_the_naive_spelling(case: Case) -> None:
    spec, inputs = doubled(case, 19)
    known = spec.total.name if spec.total else ""  # it has no gradient of its own
    pairs = zip(spec.inputs, inputs, strict=True)
    leaves = [x.clone().requires_grad_(x.is_floating_point() and source.name != known) for source, x in pairs]
    out, _ = eager(spec, leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = iter(torch.autograd.grad(out, wanted, grad))
    found = blockwise.backward(spec, inputs, grad, [leaf.requires_grad for leaf in leaves])
    for source, actual, leaf in zip(spec.inputs, found, leaves, strict=True):
        if not leaf.requires_grad:
            assert actual is None
            continue
        assert actual is not None and actual.abs().max() > 0, f"{source.name} has no gradient"
        torch.testing.assert_close(actual, next(expected), rtol=1e-9, atol=1e-11)


TINY = {
    "bias": attention(
        head_dim=3, value_dim=2, score=plus(QK, loaded("t0", ROW, KEY)), extras={"t0": (torch.float64, (ROW, KEY))}
    ),
    "table": replace(BY_NAME["table_cross"].spec, head_dim=3, value_dim=2),
    "sinks": replace(BY_NAME["sinks"].spec, head_dim=3, value_dim=2),
    "grouped": replace(BY_NAME["grouped"].spec, head_dim=3, value_dim=2),
    "softcap": attention(head_dim=3, value_dim=2, score=softcap(2.0, QK)),
    "temperature": attention(head_dim=3, value_dim=2, score=plus(QK, SLOPE, Const(0.5)), extras=SLOPES),
}


def gradcheck(spec: AttentionSpec, inputs: list[Tensor], *, fast: bool) -> bool:
    """Whether the gradients of the operator are its finite differences: nothing here relies on another spelling."""
    operator = runtime.operator(replace(spec, out_dtype=torch.float64, lse=True), None)
    leaves = [x.double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    return torch.autograd.gradcheck(lambda *x: operator(*x)[0], leaves, fast_mode=fast, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_every_element_has_the_gradient_of_finite_differences(name: str) -> None:
    assert gradcheck(TINY[name], sample_inputs(TINY[name], Problem((1, 4), 5, 6)), fast=False)


NO_FUNCTIONS = {"mask_added_in_half", "fill_added_in_half"}  # sums as fp16 has them are not smooth
NO_FUNCTIONS |= {"own_sum"}  # of what it is given alone


@pytest.mark.usefixtures("blocks_of")
@pytest.mark.parametrize("case", [c for c in DIFFERENTIABLE if c.name not in NO_FUNCTIONS], ids=lambda case: case.name)
def test_gradients_are_finite_differences(case: Case) -> None:
    """Along random directions, at sizes where windows and the like have an effect."""
    small = replace(case.spec, head_dim=min(case.spec.head_dim, 6), value_dim=min(case.spec.value_dim, 5))
    assert gradcheck(small, sample_inputs(small, case.problem(50)), fast=True)


@pytest.mark.usefixtures("blocks_of")
def test_the_gradient_of_a_total_is_that_of_its_weights() -> None:
    spec = replace(BY_NAME["own_sum"].spec, out_dtype=torch.float64)
    weights = replace(spec, score=spec.total.weight, total=None, extras=())  # type: ignore[union-attr]
    operator = runtime.operator(spec, None)

    def average(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            total, _ = blockwise.forward(weights, [q, k, torch.ones_like(v)])
        return operator(q, k, v, total[..., :1])[0]  # type: ignore[no-any-return]

    inputs = [x.double().requires_grad_() for x in sample_inputs(weights, Problem((1, 2), 30, 30))]
    assert torch.autograd.gradcheck(average, inputs, fast_mode=True, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["bias", "sinks", "table_cross"])
def test_gradients_under_a_dispatch_mode(name: str) -> None:
    """A mode calls operators below autograd, which this one uses inside."""
    case = BY_NAME[name]
    operator = runtime.operator(replace(case.spec, lse=True), None)
    leaves = [x.requires_grad_() for x in sample_inputs(case.spec, case.problem(20))]
    out, _ = operator(*leaves)
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    with FlopCounterMode(display=False):
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(map(torch.equal, found, expected))


def test_only_what_is_needed_gets_a_gradient() -> None:
    spec, inputs = doubled(BY_NAME["bias"], 9)
    grad = torch.ones_like(blockwise.forward(spec, inputs)[0])
    found = blockwise.backward(spec, inputs, grad, [False, True, False, True])
    assert [g is not None for g in found] == [False, True, False, True]


def test_gradients_come_in_the_dtype_and_shape_of_their_inputs() -> None:
    case = BY_NAME["grouped"]
    inputs = sample_inputs(case.spec, case.problem(20))
    grad = torch.randn(blockwise.forward(case.spec, inputs)[0].shape).half()
    for x, g in zip(inputs, blockwise.backward(case.spec, inputs, grad, [True] * 3), strict=True):
        assert g is not None and (g.dtype, g.shape) == (x.dtype, x.shape)


# ------------------------------------------------------------------------------------------------------------- memory


def test_no_tensor_ever_holds_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of 600 x 600 pairs: the largest tensor made is one block of scores."""
    monkeypatch.setattr(blockwise, "BLOCK_ELEMENTS", 40 * 600)
    spec, inputs = doubled(Case("causal", attention(mask=BY_NAME["causal"].spec.mask, head_dim=8), batch=(1, 1)), 600)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return result

    with Watch():
        out, _ = blockwise.forward(spec, inputs)
        blockwise.backward(spec, inputs, torch.ones_like(out), [True] * 3)
    assert 0 < largest <= 40 * 600


# ------------------------------------------------------------------------------------------------------ library route

PLAIN = [
    "dense",
    "dense_fp32",
    "unscaled",
    "negative_scale",
    "heads_last",
    "no_batch",
    "causal",
    "grouped",
    "cross",
    "value_24",
    "multi_query",
]


@pytest.mark.parametrize("name", PLAIN)
def test_library_computes_the_same(name: str) -> None:
    spec, inputs = doubled(BY_NAME[name], 21)
    how = blockwise.plain(spec)
    assert how is not None
    expected = blockwise.forward(spec, inputs)[0]
    torch.testing.assert_close(blockwise.library(spec, how, inputs), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["window", "alibi", "softcap_window", "sinks", "padding", "fill_shows", "causal_bottom_right"]
)
def test_library_is_not_asked_for_more(name: str) -> None:
    assert blockwise.plain(BY_NAME[name].spec) is None


# ------------------------------------------------------------------------------------------------------------- nothing


def emptied(spec: AttentionSpec, inputs: list[Tensor], axis: Axis) -> list[Tensor]:
    """The inputs with nothing left along ``axis``, where it is a dimension."""
    dims = [source.dim_of(axis) for source in spec.inputs]
    return [x if dim is None else x.narrow(dim, 0, 0) for x, dim in zip(inputs, dims, strict=True)]


def empty_cases() -> list[Any]:
    """Each case without queries, keys or batch, where calls may lack them."""
    pairs = [(case, axis) for case in CASES for axis in (ROW, KEY, *case.spec.batch[:1])]
    operands = [(case, axis, [s.dim_of(axis) is not None for s in case.spec.inputs[:3]]) for case, axis in pairs]
    has = [(case, axis) for case, axis, found in operands if found[0] or axis is KEY]
    return [pytest.param(case, axis, id=f"{case.name}-{axis.name}") for case, axis in has]


@pytest.mark.parametrize(("case", "axis"), empty_cases())
def test_nothing_gives_what_eager_gives(case: Case, axis: Axis) -> None:
    spec, inputs = doubled(case, 9)
    inputs = emptied(spec, inputs, axis)
    (out, lse), (expected, expected_lse) = blockwise.forward(spec, inputs), eager(spec, inputs)
    assert torch.equal(out, expected) and out.shape == expected.shape
    assert axis is not KEY or (out.numel() and not out.any())
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=0)
    if (how := blockwise.plain(spec)) is not None:
        assert torch.equal(blockwise.library(spec, how, inputs), expected)


@pytest.mark.parametrize("name", ["causal", "bias", "sinks", "grouped", "fill_added"])
@pytest.mark.parametrize("axis", [ROW, KEY, batch_axes(1)[0]], ids=str)
def test_nothing_has_gradients_of_zero(name: str, axis: Axis) -> None:
    spec, inputs = doubled(BY_NAME[name], 9)
    inputs = emptied(spec, inputs, axis)
    grad = torch.ones_like(blockwise.forward(spec, inputs)[0])
    for x, found in zip(inputs, blockwise.backward(spec, inputs, grad, [True] * len(inputs)), strict=True):
        assert found is not None and found.shape == x.shape and not found.any()
