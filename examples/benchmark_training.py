"""Training steps of whole models on a GPU, bf16: attngen beside eager, Inductor and FlexAttention, in one run.

    python examples/benchmark_training.py --out training.json [--models llama,gpt2] [--rounds 8]

Forward and backward, with a loss that weighs the results at random. The gradients of each variant are checked against float32
first: their error may be at most three times that of eager bf16, and those that are zero but for rounding must stay so. With
dropout every variant draws other masks, and there is nothing to compare element by element: there the mean norms of the
gradients of all parameters over a few steps are held against those of eager, and may be off by three times what eager's own
are in other steps. ``deterministic`` is a run under ``torch.use_deterministic_algorithms``. Times are medians of interleaved
runs, memory is what a step allocates at most beside parameters and inputs. Without a GPU everything is made small, to try the
command.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import benchmark_models as models
import torch
from benchmark import Row, budget, output, record, shared, still_works, told
from benchmark_models import DEVICE, Case, Size
from torch import Tensor, nn

import attngen
from attngen.measure import Clock, peak_bytes, samples, summary, synchronize

SLACK = 3.0  # our error may be that much of a peer's
DRAWS = 4  # steps with dropout whose gradients are compared
FLOOR = 1e-3  # of the usual size of a gradient's elements: below it is zero but for rounding, as that of a key's bias
DETERMINISTIC = "deterministic"
SPELLINGS = {"flex": "flex_attention"}
VARIANTS = (
    "eager", "inductor eager", "inductor sdpa", "inductor flex", "attngen eager", "attngen sdpa",
    f"inductor eager {DETERMINISTIC}", f"attngen eager {DETERMINISTIC}",
)  # fmt: skip
GPT2_MEDIUM, BERT_LARGE = Size(16, 1024, 6, 1024, 16), Size(32, 512, 6, 1024, 16)
CASES = (
    Case("gpt2", models.gpt2, GPT2_MEDIUM),
    Case("gpt2-dropout", models.gpt2, GPT2_MEDIUM, dropout=0.1),
    Case("bert", models.bert, BERT_LARGE, padded=True),
    Case("bert-dropout", models.bert, BERT_LARGE, padded=True, dropout=0.1),
    Case("llama", models.llama, Size(2, 8192, 4, 2048, 32, 8)),
    Case("gemma2", models.gemma2, Size(4, 4096, 4, 2304, 8, 4), exact="eager"),
    Case("bloom", models.bloom, Size(8, 2048, 4, 2048, 16), exact="eager"),
    Case("mpt", models.mpt, Size(4, 4096, 4, 2048, 16), exact="eager"),
    Case("t5", models.t5, Size(8, 2048, 4, 768, 12)),
    Case("deberta", models.deberta, Size(16, 512, 6, 768, 12), exact="eager"),
)


# ------------------------------------------------------------------------------------------------------------- variants


def spelt(model: nn.Module, variant: str) -> bool:
    """Whether the library has this spelling of the model's attention."""
    supported = {"sdpa": "_supports_sdpa", "flex": "_supports_flex_attn"}
    return all(getattr(model, name, False) for word, name in supported.items() if word in variant.split())


def step_of(model: nn.Module, variant: str, inputs: dict[str, Tensor], weights: Tensor) -> Callable[[], None]:
    """A training step of ``model``: compiled, and under deterministic algorithms, as ``variant`` says."""
    words = variant.split()
    compiler, spelling = ("", words[0]) if len(words) == 1 else words[:2]
    twin = shared(model, SPELLINGS.get(spelling, spelling))
    run = torch.compile(twin, backend=compiler, dynamic=False) if compiler else twin
    call = partial(step, run, model, inputs, weights)
    return partial(_deterministic, call) if DETERMINISTIC in words else call


def _deterministic(call: Callable[[], None]) -> None:
    with deterministic():
        call()


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def step(run: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor], weights: Tensor) -> None:
    """Forward and backward; the gradients of an earlier step are dropped."""
    model.zero_grad()
    result = output(run, inputs)
    result.backward(weights.to(result.dtype))


# --------------------------------------------------------------------------------------------------------------- errors


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.float().cpu() for p in model.parameters() if p.grad is not None]


def difference(found: list[Tensor], exact: list[Tensor]) -> float:
    """Root of the mean square over all parameters, each relative to its own gradient.

    A gradient that is zero but for rounding has no relative error, and must stay as small: infinite if it does not. Where
    the row sums of a softmax's gradient come from results in 16 bits, as in every fused attention, a key's bias has such a
    one: of 6e-4 of the usual size in BERT, from FlashAttention, FlexAttention and attngen alike.
    """
    usual = torch.stack([b.square().mean().sqrt() for b in exact]).median()
    parts = [_distance(a, b, FLOOR * float(usual) * b.numel() ** 0.5) for a, b in zip(found, exact, strict=True)]
    return float(torch.tensor([x for x in parts if x is not None]).square().mean().sqrt())


def _distance(found: Tensor, exact: Tensor, least: float) -> float | None:
    if exact.norm() >= least:
        return float((found - exact).norm() / exact.norm())
    return None if found.norm() < least else math.inf


def norms(model: nn.Module, run: Callable[[], None]) -> list[Tensor]:
    """Of the gradient of each parameter, the mean over some steps, as one vector."""
    drawn = []
    for _ in range(DRAWS):
        run()
        drawn.append(torch.stack([p.grad.float().norm().cpu() for p in model.parameters() if p.grad is not None]))
    return [torch.stack(drawn).mean(0)]


def found_by(case: Case, model: nn.Module, run: Callable[[], None]) -> list[Tensor]:
    """What variants are compared by."""
    if case.dropout:
        return norms(model, run)
    run()
    return gradients(model)


def reference(case: Case, model: nn.Module, inputs: dict[str, Tensor], weights: Tensor) -> list[Tensor]:
    """The gradients in float32; with dropout what eager gives.

    In float32 all pairs of a model may not fit: one sequence is computed at a time, and layers again in the backward.
    """
    if case.dropout:
        return norms(model, step_of(model, "eager", inputs, weights))
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation(case.exact)
    exact.gradient_checkpointing_enable({"use_reentrant": False})
    for row in range(len(weights)):
        result = output(exact, {name: x[row : row + 1] for name, x in inputs.items()})
        result.backward(weights[row : row + 1].to(result.dtype))
    return gradients(exact)


# -------------------------------------------------------------------------------------------------------------- measure


def prepared(
    case: Case, model: nn.Module, inputs: dict[str, Tensor], weights: Tensor, names: list[str]
) -> dict[str, tuple[Row, Any]]:
    """Every variant, compiled and checked: its row and the step."""
    ready: dict[str, tuple[Row, Any]] = {}
    exact = reference(case, model, inputs, weights)
    for name in names:
        row, run = Row(name), step_of(model, name, inputs, weights)
        ready[name] = (row, run)
        model.zero_grad()
        if DEVICE == "cuda":
            gc.collect()  # what a failed step left is in the frames of its error
            torch.cuda.empty_cache()
        started = time.perf_counter()
        try:
            with attngen.record() as reports:
                run()
            synchronize(DEVICE)
            row.first_s = time.perf_counter() - started
            row.error = difference(found_by(case, model, run), exact)
            row.replaced = sum(len(report.replaced) for report in reports)
            row.missed = [f"{site.where}: {site.reason}" for report in reports for site in report.missed]
            row.missed += sorted({s.backward for r in reports for s in r.replaced if s.backward.startswith("block")})
            row.peak_gib = peak_bytes(run) / 2**30 if DEVICE == "cuda" else 0.0
        except Exception as problem:
            row.problem = told(problem)
            still_works(row)
        print(f"  {name}: {row}", flush=True)
    return ready


def measure(case: Case, rounds: int, names: list[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = case.model().train(), case.inputs()
    with torch.no_grad():
        weights = torch.randn_like(output(shared(model, "eager" if case.dropout else case.exact), inputs))
    ready = prepared(case, model, inputs, weights, [name for name in names if spelt(model, name)])
    able = {name: run for name, (row, run) in ready.items() if not row.problem}

    def failed(name: str, problem: Exception) -> None:
        ready[name][0].problem = told(problem)

    for name, taken in samples(able, rounds, Clock(DEVICE, flush=False), warm_up=2, failed=failed).items():
        ready[name][0].ms = summary(taken).median
    rows = [asdict(row) for row, _ in ready.values()]
    return {"model": case.name, "budget": budget(rows, SLACK), "rows": rows}


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it under deterministic algorithms
    record(__doc__, measure, cases=CASES, variants=VARIANTS, rounds=8)
