"""Whole models on a GPU, forward only, bf16: attngen beside eager and Inductor, in one run.

    python examples/benchmark.py --out results.json [--models llama,gpt2] [--rounds 15]

Each model is built from a config with random weights, once, and shared by all variants. Every compiled variant is checked
against float32 first: its error may be at most twice that of eager bf16. Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import benchmark_models as models
import growing
import torch
import transformers
from benchmark_models import DEVICE, Case, Size
from torch import Tensor, nn

import attngen
from attngen.measure import Clock, peak_bytes, samples, summary, synchronize

VARIANTS = ("eager", "inductor eager", "inductor sdpa", "attngen eager", "attngen sdpa")
SLACK = 2.0  # our error may be that much of eager's own
BROKEN = "broken"


CASES = (
    Case("llama", models.llama, Size(2, 8192, 4, 2048, 32, 8)),
    Case("gemma2", models.gemma2, Size(4, 4096, 4, 2304, 8, 4), exact="eager"),
    Case("bloom", models.bloom, Size(8, 2048, 4, 2048, 16), sdpa=False, exact="eager"),
    Case("t5", models.t5, Size(8, 2048, 12, 768, 12)),
    Case("gpt2", models.gpt2, Size(16, 1024, 6, 1024, 16)),
    Case("bert", models.bert, Size(32, 512, 6, 1024, 16), padded=True),
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


class BrokenDevice(Exception):
    """After the variant of ``row`` nothing can run on the device in this process: it read or wrote where it may not."""

    def __init__(self, row: Row) -> None:
        super().__init__(row.problem)
        self.row = row


def still_works(row: Row) -> None:
    """Raise if the device does not run anything after what failed with the problem in ``row``."""
    try:
        synchronize(DEVICE)
    except Exception as problem:
        raise BrokenDevice(row) from problem


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
            row.problem = told(problem)
            still_works(row)
        ready[name] = (row, run)
        print(
            f"  {name}: first {row.first_s:.1f} s, error {row.error:.2e}, peak {row.peak_gib:.2f} GiB",
            row.replaced,
            row.missed,
            row.problem,
            flush=True,
        )
    return ready


def told(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem)[:500]}"


def time_all(ready: dict[str, Any], inputs: dict[str, Tensor], rounds: int) -> None:
    """Median of interleaved runs, by device events. A whole model leaves nothing of its inputs in the cache."""
    able = {row.variant: (row, run) for row, run in ready.values() if not row.problem}
    calls = {name: partial(output, run, inputs) for name, (_, run) in able.items()}
    for name, taken in samples(calls, rounds, Clock("cuda", flush=False), warm_up=rounds).items():
        able[name][0].ms = summary(taken).median


def measure(case: Case, rounds: int, names: list[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    names = [name for name in names if case.sdpa or not name.endswith("sdpa")]
    model = case.model().eval()
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


def record(
    describes: str | None,
    measured: Callable[[Case, int, list[str]], dict[str, Any]],
    *,
    cases: Sequence[Case] = CASES,
    variants: Sequence[str] = VARIANTS,
    rounds: int,
) -> None:
    """What a benchmark of all models is as a program: ``measured`` gives the result of one model.

    Each model has a process of its own, which leaves nothing on the device. Results are written as they come, and models
    that have one are left out: the same command goes on where it was cut off.
    """
    parser = argparse.ArgumentParser(description=describes, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(case.name for case in cases))
    parser.add_argument("--variants", default=",".join(variants))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--here", action="store_true", help="in this process; otherwise each model has one of its own")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    versions = {"torch": torch.__version__, "attngen": attngen.__version__, "transformers": transformers.__version__}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    head = {"device": device, "versions": versions, "rounds": args.rounds, "variants": args.variants.split(",")}
    found = growing.Record.opened(args.out, head)
    chosen = [case for case in cases if case.name in args.models.split(",") and not found.has(model=case.name)]
    for case in chosen:
        if args.here:
            small = case if DEVICE == "cuda" else replace(case, size=case.size.small)
            found.add(_unless_broken(partial(measured, small, args.rounds, args.variants.split(","))))
        else:
            found.add(*_in_process(case, args, args.variants.split(",")))
    for result in [] if args.here else found.results:
        show(result)


def _unless_broken(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measured()
    except BrokenDevice as broken:
        return {BROKEN: asdict(broken.row)}


def _in_process(case: Case, args: argparse.Namespace, variants: list[str]) -> list[dict[str, Any]]:
    """The result of one model, none if its process failed. Segments that grow keep what other variants freed in use.

    A variant after which nothing runs any more is left out of another try: its row says what it did.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        options = ["--models", case.name, "--out", str(out), "--variants", ",".join(variants), "--rounds", str(args.rounds)]
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        subprocess.run([sys.executable, sys.argv[0], *options, "--here"], env=environment, check=False)
        results = list(json.loads(out.read_text())["results"]) if out.exists() else []
    for row in (result[BROKEN] for result in results if BROKEN in result):
        others = _in_process(case, args, [name for name in variants if name != row["variant"]])
        return [{**result, "rows": [*result["rows"], row]} for result in others]
    return results


if __name__ == "__main__":
    record(__doc__, measure, rounds=15)
