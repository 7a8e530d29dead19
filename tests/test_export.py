"""Graphs from elsewhere: symbolic traces, exported programs and AOTInductor packages, with our operators in them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx, nn

import attngen
from attngen import pipeline
from attngen.options import parse
from attngen.report import Report

EAGER: dict[str, Any] = {"inner": "eager", "strict": True}
# For one package: no headers compiled for further ones, nothing optimised in C++.
QUICK = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}


class Block(nn.Module):
    """Projections, causal attention of two query heads per key head, and a projection back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).split([32, 16, 16], dim=-1)
        q, k, v = (t.view(batch, length, -1, 8).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        scores = torch.matmul(q, k.transpose(-1, -2)) * 8**-0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        y = torch.matmul(torch.softmax(scores, dim=-1), v)
        return self.out(y.transpose(1, 2).reshape(batch, length, 32))


@dataclass(frozen=True)
class Example:
    model: Block
    x: Tensor
    expected: Tensor


@pytest.fixture(scope="module")
def example() -> Example:
    torch.manual_seed(0)
    model, x = Block().eval().requires_grad_(False), torch.randn(2, 12, 32)
    return Example(model, x, model(x))


@pytest.fixture(scope="module")
def program(example: Example) -> torch.export.ExportedProgram:
    """The model exported after its attention was replaced."""
    traced = fx.symbolic_trace(example.model)
    report, _ = pipeline.optimize(traced, [example.x], parse({"strict": True}))
    assert len(report.replaced) == 1
    return torch.export.export(traced, (example.x,))


def operators(graph: fx.Graph) -> list[str]:
    """Ours, by name."""
    targets = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [target.name() for target in targets if target.namespace == "attngen"]


def scores_left(graph: fx.Graph) -> list[str]:
    """Nodes of the attention that was replaced; rotary embeddings have a product of their own."""
    parts = ("matmul", "softmax", "masked_fill", "scaled_dot_product")
    calls = [n for n in graph.nodes if n.op == "call_function" and "rotary" not in str(n.meta.get("nn_module_stack"))]
    return [n.name for n in calls if any(part in n.name for part in parts)]


def other_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# ------------------------------------------------------------------------------------------------------ traced graphs


def test_symbolic_trace(example: Example) -> None:
    """The trace has no metadata; what only the old attention needed is gone from it all the same."""
    traced = fx.symbolic_trace(example.model)
    report, _ = pipeline.optimize(traced, [example.x], parse({"strict": True}))
    (site,) = report.sites
    assert "causal" in site.computes and "2x4 heads, 12 x 12" in site.computes
    assert operators(traced.graph) == [site.operator]
    assert scores_left(traced.graph) == []
    torch.testing.assert_close(traced(example.x), example.expected, rtol=2e-5, atol=2e-5)
    other = torch.randn(2, 12, 32)
    torch.testing.assert_close(traced(other), example.model(other), rtol=2e-5, atol=2e-5)


def test_module_of_an_exported_program(example: Example) -> None:
    """Through ``torch.compile``, and handed to the pipeline as it is."""
    exported = torch.export.export(example.model, (example.x,))
    result, reports = compiled(exported.module(), example.x)
    assert [len(report.replaced) for report in reports] == [1]
    torch.testing.assert_close(result, example.expected, rtol=2e-5, atol=2e-5)
    module = exported.module()
    assert isinstance(module, fx.GraphModule)
    report, _ = pipeline.optimize(module, [example.x], parse({"strict": True}))
    assert operators(module.graph) == [report.sites[0].operator]
    assert scores_left(module.graph) == []
    torch.testing.assert_close(module(example.x), example.expected, rtol=2e-5, atol=2e-5)


def test_module_exported_for_any_length(example: Example) -> None:
    lengths = {"x": {1: torch.export.Dim.AUTO}}
    exported = torch.export.export(example.model, (example.x,), dynamic_shapes=lengths)
    module = exported.module()
    run = torch.compile(module, backend="attngen", options=EAGER, dynamic=True)
    with attngen.record() as reports:
        for size in (12, 5, 40):
            x = torch.randn(2, size, 32)
            torch.testing.assert_close(run(x), example.model(x), rtol=2e-5, atol=2e-5)
    assert [len(report.replaced) for report in reports] == [1]


@pytest.mark.parametrize("build", [partial(zoo.gpt2, "sdpa"), partial(zoo.llama, "eager"), zoo.nanogpt])
def test_exported_model_of_the_zoo(build: zoo.Build) -> None:
    """Nothing of the old attention is computed any more, though export asserts the types of its scores."""
    model, inputs = build()
    expected = first(model(**inputs))
    exported = torch.export.export(model, (), inputs)
    sites = 1 if isinstance(model, zoo.NanoGPT) else 2
    result, reports = compiled(exported.module(), **inputs)
    assert sum(len(report.replaced) for report in reports) == sites
    torch.testing.assert_close(first(result), expected, rtol=1e-4, atol=1e-4)
    module = exported.module()
    assert isinstance(module, fx.GraphModule)
    pipeline.optimize(module, list(inputs.values()), parse({"strict": True}))
    assert len(operators(module.graph)) == sites and scores_left(module.graph) == []
    torch.testing.assert_close(first(module(**inputs)), expected, rtol=1e-4, atol=1e-4)


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def compiled(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Report]]:
    torch._dynamo.reset()
    with torch.no_grad(), attngen.record() as reports:
        result = torch.compile(model, backend="attngen", options=EAGER)(*args, **kwargs)
    return result, reports


# -------------------------------------------------------------------------------------------------- exported programs


def test_program_with_our_operator_runs(example: Example, program: torch.export.ExportedProgram) -> None:
    assert len(operators(program.graph)) == 1 and scores_left(program.graph) == []
    torch.testing.assert_close(program.module()(example.x), example.expected, rtol=2e-5, atol=2e-5)


def test_program_is_read_where_the_operator_is_known_and_refused_elsewhere(
    example: Example, program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    path, (name,) = tmp_path / "program.pt2", operators(program.graph)
    torch.export.save(program, path)
    again = torch.export.load(path)
    torch.testing.assert_close(again.module()(example.x), example.expected, rtol=2e-5, atol=2e-5)
    refused = other_process(f"import torch; torch.export.load({str(path)!r})")
    assert refused.returncode != 0
    assert f"torch.ops.{name.replace('::', '.')}" in refused.stderr and "custom op is not registered" in refused.stderr


def test_exporting_a_compiled_model_exports_the_model_itself(example: Example) -> None:
    """torch looks through its own wrapper: the program has plain operators and needs attngen nowhere."""
    wrapped = torch.compile(example.model, backend="attngen", options=EAGER)
    torch.testing.assert_close(wrapped(example.x), example.expected, rtol=2e-5, atol=2e-5)
    program = torch.export.export(wrapped, (example.x,))
    assert operators(program.graph) == []
    torch.testing.assert_close(program.module()(example.x), example.expected, rtol=2e-5, atol=2e-5)


def test_package_runs_where_the_operator_is_known_and_is_refused_elsewhere(
    example: Example, program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    """AOTInductor calls our operator through its proxy executor."""
    path, (name,) = str(tmp_path / "model.pt2"), operators(program.graph)
    assert torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=QUICK) == path
    loaded = torch._inductor.aoti_load_package(path)
    for x in (example.x, torch.randn(2, 12, 32)):
        torch.testing.assert_close(loaded(x), example.model(x), rtol=2e-5, atol=2e-5)
    refused = other_process(f"import torch; torch._inductor.aoti_load_package({path!r})")
    assert refused.returncode != 0 and f"Could not find schema for {name}" in refused.stderr
