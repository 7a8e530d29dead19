"""Whole models on a GPU, forward only, bf16: attngen beside eager and Inductor, in one run.

    python examples/benchmark.py --out results.json [--models llama,gpt2] [--rounds 15]

Each model is built from a config with random weights, once, and shared by all variants. Every compiled variant is checked
against float32 first: its error may be at most twice that of eager bf16. Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import attngen
from attngen.measure import Clock, peak_bytes, samples, summary

VARIANTS = ("eager", "inductor eager", "inductor sdpa", "attngen eager", "attngen sdpa")
SLACK = 2.0  # our error may be that much of eager's own


@dataclass(frozen=True)
class Case:
    """A model, what to call it with, and whether it has an sdpa spelling."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    sdpa: bool = True
    exact: str = "sdpa"  # the spelling of the float32 reference: one that computes the same and needs little memory


def _ids(batch: int, length: int, vocabulary: int = 1000) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, vocabulary, (batch, length), device="cuda")}


def _llama() -> nn.Module:
    return transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=1000, max_position_embeddings=8192, use_cache=False,
        )
    )  # fmt: skip


def _gemma2() -> nn.Module:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            hidden_size=2304, intermediate_size=9216, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, vocab_size=1000, sliding_window=1024, use_cache=False,
        )
    )  # fmt: skip


def _bloom() -> nn.Module:
    return transformers.BloomModel(
        transformers.BloomConfig(hidden_size=2048, n_layer=4, n_head=16, vocab_size=1000, use_cache=False)
    )


def _t5() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=1000, use_cache=False
        )
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(n_embd=1024, n_layer=6, n_head=16, n_positions=1024, vocab_size=1000, use_cache=False)
    )


def _bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            hidden_size=1024, num_hidden_layers=6, num_attention_heads=16, intermediate_size=4096, vocab_size=1000
        ),
        add_pooling_layer=False,
    )


def _padded(batch: int, length: int) -> dict[str, Tensor]:
    """Sequences of between half and the whole length."""
    lengths = torch.linspace(length // 2, length, batch, device="cuda").long()
    mask = (torch.arange(length, device="cuda") < lengths[:, None]).long()
    return {**_ids(batch, length), "attention_mask": mask}


CASES = (
    Case("llama", _llama, lambda: _ids(2, 8192)),
    Case("gemma2", _gemma2, lambda: _ids(4, 4096), exact="eager"),
    Case("bloom", _bloom, lambda: _ids(8, 2048), sdpa=False, exact="eager"),
    Case("t5", _t5, lambda: _ids(8, 2048)),
    Case("gpt2", _gpt2, lambda: _ids(16, 1024)),
    Case("bert", _bert, lambda: _padded(32, 512)),
)


@dataclass
class Row:
    """One variant of one model. ``first_s`` is the first call, compilation included; ``error`` is against float32."""

    variant: str
    ms: float = 0.0
    peak_gib: float = 0.0
    first_s: float = 0.0
    error: float = 0.0
    replaced: int = 0
    missed: list[str] = field(default_factory=list)
    problem: str = ""


def shared(model: nn.Module, spelling: str) -> nn.Module:
    """The same weights under another attention spelling."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    twin.set_attn_implementation(spelling)
    return twin


def compiled(model: nn.Module, variant: str) -> Callable[..., Any]:
    compiler, _, spelling = variant.rpartition(" ")
    twin = shared(model, spelling)
    return torch.compile(twin, backend=compiler, dynamic=False) if compiler else twin


def output(run: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = run(**inputs)[0]
    return result


def reference(case: Case, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model in float32."""
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation(case.exact)
    return output(exact, inputs)


def prepared(
    case: Case, model: nn.Module, inputs: dict[str, Tensor], exact: Tensor, names: list[str]
) -> dict[str, Any]:
    """Every variant, compiled and checked: its row and the callable."""
    ready: dict[str, Any] = {}
    for name in names:
        row = Row(name)
        torch.cuda.empty_cache()
        started = time.perf_counter()
        try:
            run = compiled(model, name)
            with attngen.record() as reports:
                first = output(run, inputs)
            torch.cuda.synchronize()
            row.first_s = time.perf_counter() - started
            row.error = (first.float() - exact).square().mean().sqrt().item()
            row.replaced = sum(len(report.replaced) for report in reports)
            row.missed = [f"{site.where}: {site.reason}" for report in reports for site in report.missed]
            row.peak_gib = peak_bytes(partial(output, run, inputs)) / 2**30
        except Exception as problem:
            row.problem = f"{type(problem).__name__}: {str(problem)[:500]}"
        ready[name] = (row, run)
        print(
            f"  {name}: first {row.first_s:.1f} s, error {row.error:.2e}, peak {row.peak_gib:.2f} GiB",
            row.replaced,
            row.missed,
            row.problem,
            flush=True,
        )
    return ready


def time_all(ready: dict[str, Any], inputs: dict[str, Tensor], rounds: int) -> None:
    """Median of interleaved runs, by device events. A whole model leaves nothing of its inputs in the cache."""
    able = {row.variant: (row, run) for row, run in ready.values() if not row.problem}
    calls = {name: partial(output, run, inputs) for name, (_, run) in able.items()}
    for name, taken in samples(calls, rounds, Clock("cuda", flush=False), warm_up=rounds).items():
        able[name][0].ms = summary(taken).median


def measure(case: Case, rounds: int, names: list[str]) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.build().eval().to("cuda", torch.bfloat16)
    inputs = case.inputs()
    with torch.no_grad():
        exact = reference(case, model, inputs).float()
        ready = prepared(case, model, inputs, exact, names)
        time_all(ready, inputs, rounds)
    rows = [asdict(row) for row, _ in ready.values()]
    return {"model": case.name, "budget": budget(rows, SLACK), "rows": rows}


def budget(rows: list[dict[str, Any]], slack: float) -> float:
    """What our error may be: eager's own, or where that is out of memory the largest of a compiler's, times ``slack``."""
    right = {row["variant"]: row["error"] for row in rows if not row["problem"] and not row["variant"].startswith("attngen")}
    return slack * right.get("eager", max(right.values(), default=0.0))


def show(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        verdict = row["problem"][:80] or ("" if row["error"] <= result["budget"] else "OVER BUDGET")
        cost = f"{row['ms']:8.2f} ms {row['peak_gib']:7.2f} GiB  first call {row['first_s']:5.1f} s"
        print(f"{result['model']:8} {row['variant']:16} {cost}  error {row['error']:.2e}  {verdict}", flush=True)


def record(describes: str | None, measured: Callable[[Case, int, list[str]], dict[str, Any]], rounds: int) -> None:
    """What a benchmark of all models is as a program: ``measured`` gives the result of one model, written as it comes."""
    parser = argparse.ArgumentParser(description=describes, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(case.name for case in CASES))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=rounds)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    versions = {"torch": torch.__version__, "attngen": attngen.__version__, "transformers": transformers.__version__}
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions, "results": []}
    for case in CASES:
        if case.name in args.models.split(","):
            names = [v for v in args.variants.split(",") if case.sdpa or not v.endswith("sdpa")]
            found["results"].append(measured(case, args.rounds, names))
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            torch.cuda.empty_cache()
    for result in found["results"]:
        show(result)


if __name__ == "__main__":
    record(__doc__, measure, rounds=15)
