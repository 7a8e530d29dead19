"""Whole models on a GPU, at every precision, and what only a GPU has: graphs, streams, huge tensors. ``pytest -m gpu``.

Most models are compiled first and held before they run, so that their kernels can be compiled side by side.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from test_models_half import BY_NAME, EAGER, exact, first, in_dtype, short
from torch import Tensor, nn

import attngen
from attngen import prepare, runtime
from attngen.backend import attngen as attngen_backend
from attngen.device import probe
from attngen.prepare import Pending, Use
from attngen.report import Report
from attngen.verify import within_budget

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The largest error of a model is one draw from a few thousand: equally good kernels differ in it more than in the mean.
LARGEST_SLACK, RMS_SLACK, GRADIENT_SLACK = 3.0, 2.0, 3.0
SINGLE_ERROR = 2e-5  # of a reference that could only be computed in float32
GIB = 2**30


def assert_within_budget(actual: Tensor, reference: Tensor, eager: Tensor) -> None:
    largest = within_budget(actual, reference.double(), eager, slack=LARGEST_SLACK)
    typical = within_budget(actual, reference.double(), eager, slack=RMS_SLACK)
    own = SINGLE_ERROR if reference.dtype == torch.float32 else 0.0
    assert largest.error <= largest.budget + own and typical.rms <= typical.rms_budget + own, f"{largest}; {typical}"


def replaced(reports: list[Report]) -> int:
    return sum(len(report.replaced) for report in reports)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def in_process(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single kernel compiles faster at its first launch than in a child process."""
    monkeypatch.setattr(prepare, "begin", lambda uses, device: Pending(None, ()))


# ----------------------------------------------------------------------------------------------------- models, held


@dataclass(frozen=True)
class Case:
    """One model in one dtype; with a ``length``, on so many tokens; ``trains`` for gradients."""

    name: str
    dtype: torch.dtype
    length: int | None = None
    trains: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{short(self.dtype)}" + (f"-{self.length}" if self.length else "")

    @property
    def sites(self) -> int:
        return len(BY_NAME[self.name].sites)

    def build(self) -> zoo.Example:
        model, inputs = in_dtype(BY_NAME[self.name].build(), self.dtype, DEVICE)
        if self.length is not None:
            inputs["input_ids"] = zoo.token_ids(self.length).to(DEVICE)
        if self.length is not None and "attention_mask" in inputs:
            inputs["attention_mask"] = torch.ones(2, self.length, dtype=torch.long, device=DEVICE)
            inputs["attention_mask"][1, -self.length // 5 :] = 0
        return model, inputs


TRAINED = (
    "gpt2_eager", "bert_sdpa", "llama_padded_sdpa", "gemma2_eager", "bloom_eager", "t5_eager", "gpt_oss_eager",
    "mha_bias", "mha_mask", "sdpa_gqa",
)  # fmt: skip
LONGER = (
    "llama_eager", "llama_padded_sdpa", "mistral_eager", "gemma2_eager", "bloom_padded_eager", "t5_encoder_eager",
    "gpt_oss_eager",
)  # fmt: skip
SHORT_CASES = [Case(name, dtype) for name in BY_NAME for dtype in DTYPES]
LONG_CASES = [Case(name, torch.bfloat16, length) for name in LONGER for length in (130, 1000)]
TRAINED_CASES = [Case(name, dtype, trains=True) for name in TRAINED for dtype in (torch.float32, torch.bfloat16)]


class _Held(Exception):
    """Raised in place of running a compiled graph."""


@dataclass
class Held:
    """A model, what it computes itself, and the model compiled; its graphs raise ``_Held`` until they are released."""

    case: Case
    model: nn.Module
    inputs: dict[str, Any]
    eager: Tensor | RuntimeError
    holds: bool = True
    calls: int = 0
    reports: list[Report] = field(default_factory=list)
    failed: Exception | None = None

    @classmethod
    def of(cls, case: Case) -> Held:
        model, inputs = case.build()
        try:
            with torch.no_grad():
                return cls(case, model, inputs, first(model(**inputs)))
        except RuntimeError as problem:
            return cls(case, model, inputs, problem)

    def compile(self) -> None:
        self.run = torch.compile(self.model, backend=self._backend, dynamic=False)
        inputs = leaves(self.inputs) if self.case.trains else self.inputs
        with attngen.record() as self.reports, torch.set_grad_enabled(self.case.trains):
            try:
                self.run(**inputs)
            except _Held:
                pass
            except Exception as problem:  # for the test to raise, if the model itself runs here
                self.failed = problem

    def _backend(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        compiled = attngen_backend(gm, example_inputs, options=EAGER)

        def run(*args: Any) -> Any:
            if self.holds:
                raise _Held
            self.calls += 1
            return compiled(*args)

        return run

    def release(self) -> Tensor:
        """Let graphs run; what the model itself computes. Skips if it does not run on this device in this dtype."""
        self.holds = False
        if isinstance(self.eager, RuntimeError):
            pytest.skip(f"the model itself does not run here: {self.eager}")
        if self.failed is not None:
            raise self.failed
        assert replaced(self.reports) == self.case.sites
        return self.eager


@pytest.fixture(scope="session")
def held(request: pytest.FixtureRequest) -> Iterator[dict[Case, Held]]:
    """Every model that a selected test asks for, with all of their kernels compiled in parallel.

    Each runs before any is compiled: Hugging Face registers what it has run, and Dynamo guards on that.
    """
    selected = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    found = {case: Held.of(case) for case in dict.fromkeys(selected) if isinstance(case, Case)}
    uses: dict[Any, Use] = {}

    def begin(new: list[Use], device: Any) -> Pending:
        uses.update({(use.kernel.name, use.inputs): use for use in new})
        return Pending(None, ())

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=10_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "begin", begin)
            for each in found.values():
                each.compile()
        if uses:
            prepare.begin(list(uses.values()), probe()).finish()
        yield found


def cases() -> list[Any]:
    return [pytest.param(case, id=str(case)) for case in SHORT_CASES + LONG_CASES]


@pytest.mark.parametrize("case", cases())
def test_error_is_within_budget(case: Case, held: dict[Case, Held]) -> None:
    found = held[case]
    eager = found.release()
    with torch.no_grad():
        ours = first(found.run(**found.inputs))
    assert found.calls == 1
    assert ours.dtype == eager.dtype and ours.device == eager.device
    assert_within_budget(ours, exact(*on_cpu(found.model, found.inputs)), eager)


@pytest.mark.parametrize("case", TRAINED_CASES, ids=str)
def test_gradients_of_every_parameter(case: Case, held: dict[Case, Held]) -> None:
    found = held[case]
    found.release()
    assert_gradients_within_budget(found.model, found.inputs, found.run)
    assert found.calls == 1


def assert_gradients_within_budget(model: nn.Module, inputs: dict[str, Any], run: Callable[..., Any]) -> None:
    eager, mine = gradients(model, inputs, model), gradients(model, inputs, run)
    precise, inputs = in_dtype(on_cpu(model, inputs), torch.float64)
    slack = max(torch.finfo(grad.dtype).eps for grad in mine if grad is not None)
    try:
        reference = gradients(precise, inputs, precise)
    except RuntimeError:  # grouped products know no float64: float32 has errors of its own
        precise, inputs = in_dtype((precise, inputs), torch.float32)
        reference, slack = gradients(precise, inputs, precise), max(slack, 2e-4)
    for grad, theirs, right in zip(mine, eager, reference, strict=True):
        assert (grad is None) == (right is None)
        if grad is not None and theirs is not None and right is not None:
            error, allowed = ((g.double().cpu() - right.double()).norm() for g in (grad, theirs))
            assert error <= GRADIENT_SLACK * allowed + slack * right.double().norm()


def gradients(model: nn.Module, inputs: dict[str, Any], run: Callable[..., Any]) -> list[Tensor | None]:
    """Of each input and parameter of ``model``, after one step of ``run``."""
    inputs = leaves(inputs)
    out = first(run(**inputs)).nan_to_num()
    weights = torch.arange(out.numel()).cos().view_as(out)  # a sum of squares is constant after a norm
    (out * weights.to(out)).sum().backward()
    wanted = [*(x for x in inputs.values() if x.requires_grad), *model.parameters()]
    found = [None if leaf.grad is None else leaf.grad.clone() for leaf in wanted]
    model.zero_grad(set_to_none=True)
    return found


def leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}


def on_cpu(model: nn.Module, inputs: dict[str, Any]) -> zoo.Example:
    return copy.deepcopy(model).cpu(), {name: x.cpu() for name, x in inputs.items()}


# ------------------------------------------------------------------------------------------------ ways of compiling

INDUCTOR = (
    Case("llama_eager", torch.bfloat16),
    Case("bert_sdpa", torch.float16),
    Case("t5_encoder_eager", torch.bfloat16),
    Case("nanogpt", torch.float32),
)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("inference", INDUCTOR, ids=str)
def test_inductor(inference: Case) -> None:
    model, inputs = inference.build()
    with torch.no_grad(), attngen.record() as reports:
        ours = first(torch.compile(model, backend="attngen", options={"strict": True})(**inputs))
        eager = first(model(**inputs))
    assert replaced(reports) == inference.sites
    assert_within_budget(ours, exact(*on_cpu(model, inputs)), eager)


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_trains() -> None:
    training = Case("gpt2_eager", torch.bfloat16)
    model, inputs = training.build()
    with attngen.record() as reports:
        run = torch.compile(model, backend="attngen", options={"strict": True})
        assert_gradients_within_budget(model, inputs, run)
    assert replaced(reports) == training.sites


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["llama_eager", "bert_eager"])
def test_graphs_replay_with_changing_inputs(name: str) -> None:
    case = Case(name, torch.float16)
    model, inputs = case.build()
    skips = torch._dynamo.utils.counters["inductor"]
    before = skips["cudagraph_skips"]
    run = torch.compile(model, backend="attngen", mode="reduce-overhead")
    with torch.no_grad(), attngen.record() as reports:
        for step in range(5):
            inputs["input_ids"] = (inputs["input_ids"] + 7 * step) % 96
            if "attention_mask" in inputs:
                inputs["attention_mask"] = (torch.arange(zoo.LENGTH, device=DEVICE) < zoo.LENGTH - step).long().repeat(2, 1)
            torch.compiler.cudagraph_mark_step_begin()
            ours = first(run(**inputs)).clone()
            assert_within_budget(ours, exact(*on_cpu(model, inputs)), first(model(**inputs)))
    assert replaced(reports) == case.sites
    assert skips["cudagraph_skips"] == before


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", ["llama_eager", "bert_eager", "gemma2_eager", "nanogpt"])
def test_precision_of_float32_products(name: str, matmul_precision: str) -> None:
    """The kernel multiplies as torch does under the same setting: in float32, or in TensorFloat-32."""
    case = Case(name, torch.float32)
    model, inputs = case.build()
    with torch.no_grad(), attngen.record() as reports:
        ours = first(torch.compile(model, backend="attngen", options=EAGER)(**inputs))
        eager = first(model(**inputs))
    assert replaced(reports) == case.sites
    for site in reports[0].replaced:
        known = runtime.registered(site.operator)
        assert known is not None and known[0].tf32 == (matmul_precision == "high")
    assert_within_budget(ours, exact(*on_cpu(model, inputs)), eager)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["llama_padded_sdpa", "t5_eager", "gemma2_eager"])
def test_verify_runs_every_kernel_first(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(name, torch.bfloat16)
    model, inputs = case.build()
    with torch.no_grad(), attngen.record() as reports, caplog.at_level(logging.INFO, "attngen"):
        torch.compile(model, backend="attngen", options={**EAGER, "verify": True})(**inputs)
    assert replaced(reports) == case.sites
    for kernel in {site.kernel for site in reports[0].replaced}:
        assert f"{kernel}: error" in caplog.text


@pytest.mark.usefixtures("in_process")
def test_verify_refuses_a_kernel_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    right = runtime.import_kernel

    def off(path: Path) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda *inputs: 1.05 * right(path).launch(*inputs))

    monkeypatch.setattr("attngen.runtime.import_kernel", off)
    model, inputs = Case("nanogpt", torch.float16).build()
    with torch.no_grad(), pytest.raises(Exception, match="the kernel's result is off"):
        torch.compile(model, backend="attngen", options={**EAGER, "verify": True})(**inputs)


# --------------------------------------------------------------------------------------- memory, streams, devices


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    rows, columns = (torch.arange(x.shape[-2], device=q.device) for x in (q, k))
    return torch.softmax(scores.masked_fill(columns > rows.unsqueeze(-1), float("-inf")), -1) @ v


def attend_compiled(*inputs: Tensor) -> Tensor:
    with torch.no_grad(), attngen.record() as reports:
        out: Tensor = torch.compile(attend, backend="attngen", options=EAGER, dynamic=False)(*inputs)
    assert replaced(reports) == 1
    return out


def assert_attends(out: Tensor, *inputs: Tensor) -> None:
    assert_within_budget(out, attend(*(x.double() for x in inputs)), attend(*inputs))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(DEVICE, torch.float16)


def queries_keys_values(*shape: int) -> list[Tensor]:
    return [random(*shape) for _ in range(3)]


GENERATOR = torch.Generator()
VIEWS: dict[str, Callable[[], Sequence[Tensor]]] = {
    "heads_last": lambda: [x.transpose(1, 2) for x in queries_keys_values(2, 70, 4, 32)],
    "one_projection": lambda: random(2, 70, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind(0),
    "sequence_first": lambda: [x.transpose(0, 1) for x in queries_keys_values(70, 8, 32)],
    "every_second_feature": lambda: [x[..., 1::2] for x in queries_keys_values(2, 4, 70, 64)],
    "odd_offsets_and_strides": lambda: [x[:, :, 1:, 1:] for x in queries_keys_values(2, 4, 71, 33)],
    "transposed_keys": lambda: [random(2, 4, 70, 32), random(2, 4, 32, 70).transpose(-1, -2), random(2, 4, 70, 32)],
    "one_batch_of_keys": lambda: [random(3, 4, 70, 32), *random(2, 1, 4, 70, 32).expand(2, 3, 4, 70, 32)],
    "one_head_of_keys": lambda: [random(3, 4, 70, 32), *random(2, 3, 1, 70, 32).expand(2, 3, 4, 70, 32)],
    "one_query_for_all": lambda: [random(1, 1, 70, 32).expand(2, 4, 70, 32), *random(2, 2, 4, 70, 32)],
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    GENERATOR.manual_seed(0)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_where_they_lie(view: str) -> None:
    inputs = VIEWS[view]()
    assert_attends(attend_compiled(*inputs), *inputs)


@pytest.mark.usefixtures("in_process")
def test_alignment_may_change_between_calls() -> None:
    """The same sizes and strides, first on 16-byte boundaries and then on none."""
    run = torch.compile(attend, backend="attngen", options=EAGER, dynamic=False)
    whole = queries_keys_values(2 * 4 * 70 * 32 + 1)
    for first_element in (0, 1, 0):
        inputs = [x[first_element:][: 2 * 4 * 70 * 32].view(2, 4, 70, 32) for x in whole]
        with torch.no_grad():
            assert_attends(run(*inputs), *inputs)


@pytest.mark.usefixtures("in_process")
def test_another_stream() -> None:
    """On a stream that is still busy with writing the queries, the kernel must wait for them."""
    run = torch.compile(attend, backend="attngen", options=EAGER)
    inputs, new = queries_keys_values(2, 4, 70, 32), random(2, 4, 70, 32)
    with torch.no_grad():
        run(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)
        inputs[0].copy_(new)
        out = run(*inputs)
    stream.synchronize()
    assert_attends(out, new, *inputs[1:])


@pytest.mark.usefixtures("in_process")
def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = [x.to("cuda:1") for x in queries_keys_values(2, 4, 70, 32)]
    with torch.cuda.device(0):
        out = attend_compiled(*inputs)
    assert out.device == torch.device("cuda:1")
    assert_attends(out, *inputs)


@pytest.mark.usefixtures("in_process")
def test_more_heads_than_a_grid_dimension_holds() -> None:
    inputs = queries_keys_values(2, 35000, 16, 16)
    assert_attends(attend_compiled(*inputs), *inputs)


@pytest.mark.usefixtures("in_process")
def test_tensors_beyond_two_billion_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of GPU memory")
    batch, heads, length, width, rows = 33, 64, 16384, 64, 300
    inputs = [torch.randn(batch, heads, length, width, dtype=torch.half, device=DEVICE) for _ in range(3)]
    assert inputs[0].numel() > 2**31
    out = attend_compiled(*inputs)
    for place in ((0, 0), (16, 5), (batch - 1, heads - 1)):
        q, k, v = (x[place] for x in inputs)
        assert_within_budget(
            out[place][-rows:],
            last_rows(rows, q.double(), k.double(), v.double()),
            last_rows(rows, q, k, v),
        )


def last_rows(count: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last rows of ``attend(q, k, v)``."""
    scores = q[-count:] @ k.transpose(-1, -2) * 0.25
    keep = torch.ones(scores.shape, dtype=torch.bool, device=q.device).tril(k.shape[0] - count)
    return torch.softmax(scores.masked_fill(~keep, float("-inf")), -1) @ v


@pytest.mark.usefixtures("in_process")
def test_forward_is_the_same_to_the_bit() -> None:
    model, inputs = Case("llama_sdpa", torch.float16, 130).build()
    run = torch.compile(model, backend="attngen", options=EAGER)
    with torch.no_grad():
        results = [first(run(**inputs)).clone() for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)
