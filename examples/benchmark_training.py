"""Training steps of whole models on a GPU, bf16, without dropout: attngen beside eager and Inductor, in one run.

    python examples/benchmark_training.py --out training.json [--models llama,gpt2] [--rounds 8]

The models of ``benchmark.py``, forward and backward, with a loss that weighs the results at random. The gradients of each
compiled variant are checked against float32 first: their error may be at most three times that of eager bf16. Times are
medians of interleaved runs, memory is what a step allocates at most beside parameters and inputs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from benchmark import Case, Row, budget, compiled, output, record, shared
from torch import Tensor, nn

import attngen
from attngen.measure import Clock, peak_bytes, samples, summary

SLACK = 3.0  # our error may be that much of a peer's


def step(run: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor], weights: Tensor) -> None:
    """Forward and backward; the gradients of an earlier step are dropped."""
    for parameter in model.parameters():
        parameter.grad = None
    result = output(run, inputs)
    result.backward(weights.to(result.dtype))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.float().cpu() for p in model.parameters() if p.grad is not None]


def difference(found: list[Tensor], exact: list[Tensor]) -> float:
    """Root of the mean square over all parameters, each relative to its own gradient."""
    parts = [((a - b).norm() / b.norm().clamp(min=1e-20)).item() for a, b in zip(found, exact, strict=True)]
    return float(torch.tensor(parts).square().mean().sqrt())


def reference(case: Case, model: nn.Module, inputs: dict[str, Tensor], weights: Tensor) -> list[Tensor]:
    """The gradients in float32."""
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation(case.exact)
    step(exact, exact, inputs, weights)
    return gradients(exact)


def prepared(
    case: Case, model: nn.Module, inputs: dict[str, Tensor], weights: Tensor, exact: list[Tensor], names: list[str]
) -> dict[str, tuple[Row, Any]]:
    """Every variant, compiled and checked: its row and the step."""
    ready = {}
    for name in names:
        row, run = Row(name), None
        torch.cuda.empty_cache()
        started = time.perf_counter()
        try:
            call = compiled(model, name)
            run = partial(step, call, model, inputs, weights)
            with attngen.record() as reports:
                run()
            torch.cuda.synchronize()
            row.first_s = time.perf_counter() - started
            row.error = difference(gradients(model), exact)
            row.replaced = sum(len(report.replaced) for report in reports)
            row.missed = [f"{site.where}: {site.reason}" for report in reports for site in report.missed]
            row.missed += sorted({s.backward for r in reports for s in r.replaced if s.backward.startswith("block")})
            row.peak_gib = peak_bytes(run) / 2**30
        except Exception as problem:
            row.problem = f"{type(problem).__name__}: {str(problem)[:500]}"
        ready[name] = (row, run)
        print(f"  {name}: {row}", flush=True)
    return ready


def measure(case: Case, rounds: int, names: list[str]) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.build().eval().to("cuda", torch.bfloat16)
    inputs = case.inputs()
    with torch.no_grad():
        weights = torch.randn_like(output(shared(model, case.exact), inputs))
    ready = prepared(case, model, inputs, weights, reference(case, model, inputs, weights), names)
    able = {name: run for name, (row, run) in ready.items() if not row.problem}
    for name, taken in samples(able, rounds, Clock("cuda", flush=False), warm_up=2).items():
        ready[name][0].ms = summary(taken).median
    rows = [asdict(row) for row, _ in ready.values()]
    return {"model": case.name, "budget": budget(rows, SLACK), "rows": rows}


if __name__ == "__main__":
    record(__doc__, measure, rounds=8)
