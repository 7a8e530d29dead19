"""The backend as users meet it: every way of compiling gives the model's own numbers, and facts hold or recompile."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx, nn
from torch.nn import functional as F

import attngen
from attngen import runtime, verify
from attngen.backend import attngen as attngen_backend
from attngen.errors import BadOption, CannotTrace
from attngen.options import Options, parse
from attngen.passes.graphs import Writer
from attngen.passes.specialise import Number
from attngen.report import Report
from attngen.spec import HOPPER, PORTABLE, Problem

EAGER = {"inner": "eager", "strict": True}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(
    model: Callable[..., Any], *args: Any, options: dict[str, Any] = EAGER, **kwargs: Any
) -> tuple[Any, list[Report]]:
    """What the compiled model returns, and the reports of its graphs."""
    with attngen.record() as reports:
        result = torch.compile(model, backend="attngen", options=options)(*args, **kwargs)
    return result, reports


def replaced(reports: list[Report]) -> int:
    return sum(len(report.replaced) for report in reports)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------- options


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(BadOption, match="no option 'tile'") as wrong:
        parse({"tile": 64})
    assert all(name in str(wrong.value) for name in Options.model_fields)


@pytest.mark.parametrize(("options", "message"), [({"inner": "tvm"}, "inner"), ({"verify": 1}, "verify")])
def test_wrong_value_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        parse(options)


def test_bad_option_reaches_the_user_through_compile() -> None:
    model, inputs = zoo.nanogpt()
    with pytest.raises(Exception, match="Known options"):
        run(model, options={"tile": 64}, **inputs)


def test_mode_and_its_option_mean_the_same() -> None:
    assert parse(None, "reduce-overhead") == parse({"mode": "reduce-overhead"})


def test_only_and_skip_select_by_path() -> None:
    model, inputs = zoo.llama("eager")
    _, reports = run(model, options={**EAGER, "only": ["layers.0"]}, **inputs)
    assert [s.status for s in reports[0].sites] == ["replaced", "missed"]
    assert "only" in reports[0].sites[1].reason
    torch._dynamo.reset()
    _, reports = run(model, options={**EAGER, "skip": "*.0.self_attn"}, **inputs)
    assert [s.status for s in reports[0].sites] == ["missed", "replaced"]


def test_only_portable_kernels_where_they_are_asked_for() -> None:
    q, k, v = (torch.randn(4, 16, 1024, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    families = {}
    for asked in ("all", "portable"):
        torch._dynamo.reset()
        options = {**EAGER, "families": asked, "target": "h100"}
        _, (report,) = run(F.scaled_dot_product_attention, q, k, v, options=options)
        families[asked] = {report.sites[0].family, *(tile["family"] for tile in report.sites[0].backward_tiles)}
    assert families == {"all": {HOPPER}, "portable": {PORTABLE}}


def test_products_of_8_bits_need_more_than_portable_kernels() -> None:
    q, k, v = (torch.randn(1, 2, 1024, 64, dtype=torch.bfloat16) for _ in range(3))
    options = {**EAGER, "families": "portable", "target": "h100", "fp8": "block"}
    _, (report,) = run(F.scaled_dot_product_attention, q, k, v, options=options)
    assert report.sites[0].family == PORTABLE and "only portable kernels" in report.sites[0].computes


# ------------------------------------------------------------------------------------------------- ways of compiling


BY_NAME = {row.name: row for row in zoo.ROWS}
PLAIN = [name for name in BY_NAME if not name.endswith(("_eager", "_sdpa"))]
# Families are run in one spelling and trained in the other, in turn. Plain modules are trained, where results are compared
# too, and run in ``test_models_half``.
IN_TURN = [case.values for case in zoo.spread(zoo.MASKS, "run", "trained")]
RUN, TRAINED = ([f"{name}_{how}" for name, how, does in IN_TURN if does == which] for which in ("run", "trained"))


@pytest.mark.parametrize("name", RUN)
def test_every_model_of_the_zoo(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.build()
    with torch.no_grad():
        expected = _first(model(**inputs))
        actual, reports = run(model, **inputs)
    assert replaced(reports) == len(row.sites)
    torch.testing.assert_close(_first(actual), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", TRAINED + PLAIN)
def test_results_and_gradients_of_every_parameter(name: str) -> None:
    """At most three times the error that eager makes against float64; close to eager where float64 cannot be had."""
    row = BY_NAME[name]
    model, inputs = row.build()
    eager = _trained(model, inputs)
    exact = _trained_exactly(model, inputs)
    with attngen.record() as reports:
        mine = _trained(torch.compile(model, backend="attngen", options=EAGER), inputs)
    assert replaced(reports) == len(row.sites)
    for ours, theirs, reference in zip(mine, eager, exact or eager, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None and theirs is not None and reference is not None:
            slack = 1e-6 if exact else 2e-4
            assert (ours - reference).norm() <= 3 * (theirs - reference).norm() + slack * reference.norm()


def _trained_exactly(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor | None] | None:
    """In float64; None for models that cannot compute in it (grouped products), or whose fill values overflow there."""
    try:
        exact = _trained(copy.deepcopy(model).double(), {name: _double(x) for name, x in inputs.items()})
    except RuntimeError:
        return None
    return exact if all(grad is None or grad.isfinite().all() for grad in exact) else None


def _trained(model: Any, inputs: dict[str, Any]) -> list[Tensor | None]:
    """The result, and the gradients of inputs and parameters."""
    inputs = {name: _leaf(x) for name, x in inputs.items()}
    out = _first(model(**inputs)).nan_to_num()
    (out * torch.arange(out.numel()).cos().view_as(out)).sum().backward()  # a sum of squares is constant after a norm
    leaves = [*(x for x in inputs.values() if x.requires_grad), *model.parameters()]
    return [out.detach(), *map(_taken, leaves)]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _taken(leaf: Tensor) -> Tensor | None:
    grad, leaf.grad = leaf.grad, None
    return grad


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("spelling", ["eager", "sdpa"])
def test_inductor_inference_and_training(spelling: str) -> None:
    model, inputs = zoo.llama(spelling)
    with torch.no_grad():
        actual, reports = run(model, options={"strict": True}, **inputs)
        close(actual[0], model(**inputs)[0])
    assert replaced(reports) == 2
    model(**inputs)[0].square().sum().backward()
    expected = [_taken(p) for p in model.parameters()]
    run(model, options={"strict": True}, **inputs)[0][0].square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3)


def test_optimize_gives_the_model_compiled_for_such_inputs() -> None:
    model, inputs = zoo.llama("eager")
    with torch.no_grad(), attngen.record() as reports:
        fast = attngen.optimize(model, options=EAGER, **inputs)
        assert replaced(reports) == 2
        close(fast(**inputs)[0], model(**inputs)[0])
    assert len(reports) == 1  # such a call compiles nothing more
    assert isinstance(fast, nn.Module) and [*fast.parameters()] == [*model.parameters()]


def test_optimize_says_what_is_wrong() -> None:
    def unequal(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x, lambda x: (x, x), (x,))

    def refused(x: Tensor) -> Tensor:
        raise AssertionError("this ran")

    with pytest.raises(CannotTrace, match="cond"):
        attngen.optimize(unequal, torch.ones(2))
    with pytest.raises(BadOption, match="no option 'tile'"):
        attngen.optimize(refused, torch.ones(2), options={"tile": 64})


def test_fullgraph_and_dynamic_compile_once_for_several_lengths() -> None:
    model, _ = zoo.llama("eager")
    graphs = []

    def counted(gm: Any, example_inputs: Any) -> Any:
        graphs.append(gm)
        return attngen_backend(gm, example_inputs, options=EAGER)

    compiled = torch.compile(model, backend=counted, fullgraph=True, dynamic=True)
    with torch.no_grad(), attngen.record() as reports:
        for length in (12, 9, 30):
            ids = zoo.token_ids(length)
            close(compiled(input_ids=ids)[0], model(input_ids=ids)[0])
    assert len(graphs) == 1
    assert replaced(reports) == 2


@pytest.mark.parametrize("spelling", ["eager", "sdpa"])
def test_outer_autocast(spelling: str) -> None:
    model, inputs = zoo.llama(spelling)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**inputs)[0]
        actual, reports = run(model, **inputs)
    exact = model(**inputs)[0]
    assert replaced(reports) == 2 and actual[0].dtype == expected.dtype
    assert (actual[0] - exact).abs().max() <= 2 * (expected - exact).abs().max()
    assert "bfloat16" in reports[0].sites[0].computes


def test_autocast_inside_the_model() -> None:
    class Inner(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
            return y.float() + 1

    q, k, v = (torch.randn(2, 3, 8, 16) for _ in range(3))
    actual, reports = run(Inner(), q, k, v)
    expected = Inner()(q, k, v)
    exact = torch.softmax(q @ k.transpose(-1, -2), -1) @ v + 1
    assert replaced(reports) == 1 and actual.dtype == torch.float32
    assert (actual - exact).abs().max() <= 2 * (expected - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_eagers_own_error(dtype: torch.dtype) -> None:
    model, inputs = zoo.gemma2("eager")
    with torch.no_grad():
        exact = model(**inputs)[0]
        half = model.to(dtype)
        expected = half(**inputs)[0]
        actual, reports = run(half, **inputs)
    assert replaced(reports) == 2
    assert (actual[0].float() - exact).abs().max() <= 2 * (expected.float() - exact).abs().max()


def test_activation_checkpointing_keeps_numbers_and_gradients() -> None:
    model, inputs = zoo.gpt2("eager")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.h[0].attn.attn_dropout.p = 0.0  # type: ignore[union-attr]

    def step(ids: Tensor) -> Tensor:
        hidden = model.wte(ids)  # type: ignore[operator]
        for block in model.h:  # type: ignore[union-attr]
            hidden = torch.utils.checkpoint.checkpoint(lambda x, b=block: b(x), hidden, use_reentrant=False)
            hidden = hidden if isinstance(hidden, Tensor) else hidden[0]
        return hidden.square().sum()

    step(inputs["input_ids"]).backward()
    expected = [_taken(p) for p in model.parameters()]
    value, reports = run(step, inputs["input_ids"], options={"strict": True})
    value.backward()
    assert replaced(reports) == 2
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-2)


# --------------------------------------------------------------------------------- facts that may change after compiling


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 0.25, window: int | Tensor = 4
) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    rows = torch.arange(q.shape[-2]).unsqueeze(1)
    columns = torch.arange(k.shape[-2])
    scores = scores.masked_fill((columns > rows) | (columns <= rows - window), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1) @ v


def qkv(rows: int = 8, keys: int = 8, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, heads, rows, 16), torch.randn(2, heads, keys, 16), torch.randn(2, heads, keys, 16)


READ = "causal(loaded positions)"  # a window that may change
FIXED = ("qk*0.25; causal & window(4)", "qk*0.5; causal & window(4)", f"qk*0.25; causal & {READ}")
MASKED = f"qk*0.25; causal & padding & {READ}"


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        (None, (*FIXED, MASKED)),
        (True, (f"qk*0.25; causal & {READ}", f"qk*0.5; causal & {READ}", MASKED)),
        (False, (*FIXED, *(f"qk*0.25; causal & window({x}" for x in ("2)", "3)", "5)", "4) & padding")))),
    ],
)
def test_changed_facts_are_noticed(dynamic: bool | None, expected: tuple[str, ...]) -> None:
    """Lengths, equal lengths, head counts, scale, window and mask contents: each changed after compiling.

    A window that need not stay is read, whether the model has it as a number or as a tensor.
    """
    compiled = torch.compile(attend, backend="attngen", options=EAGER, dynamic=dynamic)
    mask = torch.rand(2, 1, 1, 8) > 0.3
    mask[..., 0] = True
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        (qkv(), {}),
        (qkv(9, 9), {}),
        (qkv(9, 11), {}),
        (qkv(heads=3), {}),
        (qkv(), {"scale": 0.5}),
        (qkv(), {"window": torch.tensor(3)}),
        (qkv(), {"window": torch.tensor(5)}),
        (qkv(9, 11), {"window": torch.tensor(2)}),
        (qkv(), {"window": 2}),
        (qkv(), {"window": 5}),
        (qkv(9, 11), {"window": 3}),
        (qkv(), {"mask": mask}),
        (qkv(), {"mask": mask.roll(2, -1)}),
        (qkv(), {"mask": torch.zeros_like(mask)}),
    ]
    with attngen.record() as reports, torch._dynamo.config.patch(recompile_limit=32):
        for args, kwargs in calls:
            torch.testing.assert_close(compiled(*args, **kwargs), attend(*args, **kwargs), equal_nan=True)
    sites = [site for report in reports for site in report.sites]
    assert len(sites) == len(reports) and all(site.status == "replaced" for site in sites)
    assert {site.computes.split(", ")[0] for site in sites} == {f"softmax({x})" for x in expected}


def test_a_number_that_may_change_is_read() -> None:
    """Once for all sites, whatever kernels compute of it: no remainders."""

    def two(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        rows, columns = past + torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2])
        scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(columns > rows, float("-inf"))
        again = (torch.softmax(scores, -1) @ v) @ k.transpose(-1, -2) + 3 * past
        return torch.softmax(again.masked_fill(columns > rows - 2 * past + 7, float("-inf")), -1) @ v

    def steep(q: Tensor, k: Tensor, v: Tensor, step: int) -> Tensor:
        rows, columns = torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2])
        scores = q @ k.transpose(-1, -2) - (rows + step - columns).abs() * 0.1
        return torch.softmax(scores.masked_fill(columns > step * rows, float("-inf")), -1) @ v

    def dilated(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        rows, columns = torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2])
        scores = (q @ k.transpose(-1, -2)).masked_fill((rows - columns + start) % 3 != 0, float("-inf"))
        return torch.softmax(scores, -1) @ v

    def by_diagonal(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """In a table."""
        rows, columns = past + torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2])
        bias = q[0, 0, 0, (columns - rows).clamp(-7, 0) + 7] - ((rows - columns).abs() / past).sin()
        return torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v

    for model, count in ((two, 2), (steep, 1), (by_diagonal, 1), (dilated, 0)):
        compiled = torch.compile(model, backend="attngen", options=EAGER, dynamic=True)
        with attngen.record() as reports:
            for number in (4, 3, 2, 5):
                args = [x.requires_grad_() for x in qkv(3, 9)]
                torch.testing.assert_close(compiled(*args, number), expected := model(*args, number), rtol=1e-4, atol=1e-5)
                found = torch.autograd.grad(compiled(*args, number).sum(), args)
                exact = torch.autograd.grad(expected.sum(), args)
                torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
        (report,) = reports
        assert len(report.replaced) == count
        assert all(site.reason.startswith("it takes a number that may change") for site in report.missed)


def test_a_number_is_read_on_the_device_of_each_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor of it for the sites of a device."""

    def late(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        rows, columns = (torch.arange(x.shape[-2], device=q.device) for x in (q, k))
        scores = (q @ k.transpose(-1, -2)).masked_fill(columns > rows.unsqueeze(1) + past, float("-inf"))
        return torch.softmax(scores, -1) @ v

    def on_both(here: list[Tensor], there: list[Tensor], past: int) -> list[Tensor]:
        return [late(*here, past), late(*there, past), late(*here, past)]

    devices, write = {}, Writer.number

    def watched(self: Writer, number: Number, like: fx.Node) -> fx.Node:
        node = write(self, number, like)
        devices[node] = node.kwargs["device"]
        return node

    monkeypatch.setattr(Writer, "number", watched)
    here = list(qkv())
    there = [x.to("meta") for x in here]
    results = torch.compile(on_both, backend="attngen", options=EAGER, dynamic=True)(here, there, 3)
    assert [x.device.type for x in results] == ["cpu", "meta", "cpu"]
    assert sorted(map(str, devices.values())) == ["cpu", "meta"]
    torch.testing.assert_close(results[0], late(*here, 3))


def test_an_input_written_between_is_left_alone() -> None:
    def overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        q.mul_(2)
        return torch.softmax(scores, -1) @ v

    args = qkv()
    expected = overwritten(*(x.clone() for x in args))
    actual, reports = run(overwritten, *(x.clone() for x in args))
    close(actual, expected)
    assert replaced(reports) == 0 and "written in place" in reports[0].missed[0].reason


def test_results_keep_the_strides_that_views_rely_on() -> None:
    """``view`` of a transposed result works only on the layout in memory that the library gives."""

    def two_readers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return y.transpose(1, 2).view(24, 64) * 2, y

    args = [torch.randn(2, 12, 4, 16) for _ in range(3)]
    expected = two_readers(*args)
    actual, reports = run(two_readers, *args)
    assert replaced(reports) == 1
    for mine, theirs in zip(actual, expected, strict=True):
        close(mine, theirs)
        assert mine.stride() == theirs.stride()


def test_a_cache_written_in_place_is_read_after_the_write() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, at: Tensor) -> Tensor:
        cache_k.index_copy_(2, at, k)
        cache_v.index_copy_(2, at, v)
        scores = q @ cache_k.transpose(-1, -2)
        keep = torch.arange(cache_k.shape[2]) <= at.unsqueeze(-1)
        return torch.softmax(scores.masked_fill(~keep, float("-inf")), -1) @ cache_v

    q, k, v = qkv(3, 3)
    caches = torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    compiled = torch.compile(step, backend="attngen", options=EAGER)
    with attngen.record() as reports:
        for at in (torch.tensor([2, 3, 4]), torch.tensor([0, 1, 2])):
            mine, theirs = ([c.clone() for c in caches] for _ in range(2))
            close(compiled(q, k, v, *mine, at), step(q, k, v, *theirs, at))
            close(mine[0], theirs[0])
    assert replaced(reports) == 1


# --------------------------------------------------------------------------------------------- when things go wrong


def test_a_failure_of_ours_leaves_the_model_running(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("planned for this test")

    model, inputs = zoo.nanogpt()
    for name in ("attngen.passes.lower.run", "attngen.decide.emitted"):
        torch._dynamo.reset()
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "attngen"):
            patched.setattr(name, broken)
            actual, reports = run(model, options={"inner": "eager"}, **inputs)
        close(actual, model(**inputs))
        assert replaced(reports) == 0
        assert "planned for this test" in caplog.text
        caplog.clear()


def test_strict_raises_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("planned for this test")

    model, inputs = zoo.nanogpt()
    monkeypatch.setattr("attngen.passes.lower.run", broken)
    monkeypatch.setenv("ATTNGEN_STRICT", "1")
    with pytest.raises(Exception, match="planned for this test"):
        run(model, options={"inner": "eager"}, **inputs)


def test_a_graph_break_between_two_sites_gives_two_reports() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attend(q, k, v)
        torch._dynamo.graph_break()
        return attend(y, k, v)

    args = qkv()
    actual, reports = run(broken, *args)
    close(actual, broken(*args))
    assert [len(report.replaced) for report in reports] == [1, 1]
    assert len(attngen.explain(broken, *args).replaced) == 2


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("trains", [False, True])
def test_opcheck(trains: bool) -> None:
    _, reports = run(attend, *(x.requires_grad_(trains) for x in qkv()))
    name = reports[0].sites[0].operator.split("::")[1]
    known = runtime.registered(name)
    assert known is not None and known[0].lse == trains
    args = verify.sample_inputs(known[0], Problem((2, 2), 8, 8))
    torch.library.opcheck(getattr(torch.ops.attngen, name).default, [x.requires_grad_(trains) for x in args])


BACKENDS, PRODUCTS = torch.backends, torch.backends.cuda.matmul
PRECISIONS: dict[str, tuple[list[tuple[Any, str, Any]], bool]] = {
    "default": ([], False),
    "allowed": ([(PRODUCTS, "allow_tf32", True)], True),
    "tf32": ([(PRODUCTS, "fp32_precision", "tf32")], True),
    "everywhere": ([(BACKENDS, "fp32_precision", "tf32")], True),
    "but_not_here": ([(BACKENDS, "fp32_precision", "tf32"), (PRODUCTS, "fp32_precision", "ieee")], False),
}


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What products of float32 numbers may be made in, said to torch by its older or newer names; whether in 10 bits."""
    settings, expected = PRECISIONS[request.param]
    before = [(place, place.fp32_precision) for place in (BACKENDS, PRODUCTS)]
    for place, name, value in settings:
        setattr(place, name, value)
    yield expected
    torch.set_float32_matmul_precision("highest")
    for place, known in before:
        place.fp32_precision = known


@pytest.mark.parametrize("precision", PRECISIONS, indirect=True)
def test_float32_is_multiplied_in_tensorfloat_only_where_the_user_allows_it(precision: bool) -> None:
    for dtype, expected in ((torch.float32, precision), (torch.float16, False)):
        _, reports = run(attend, *(x.to(dtype) for x in qkv()))
        known = runtime.registered(reports[0].sites[0].operator.split("::")[1])
        assert known is not None and known[0].tf32 == expected


def test_identical_sites_share_one_operator() -> None:
    model, inputs = zoo.llama("eager")
    with torch.no_grad():
        _, reports = run(model, **inputs)
    first, second = reports[0].sites
    assert first.operator == second.operator != ""


def test_entry_point_needs_no_import() -> None:
    code = (
        "import sys, torch; x = torch.randn(2, 2, 8, 16)\n"
        "f = lambda q: torch.softmax(q @ q.transpose(-1, -2), -1) @ q\n"
        "y = torch.compile(f, backend='attngen', options={'inner': 'eager', 'strict': True})(x)\n"
        "torch.testing.assert_close(y, f(x)); assert any('fwd_' in n for n in dir(torch.ops.attngen)); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
