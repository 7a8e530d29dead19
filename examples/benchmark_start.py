"""What attngen costs around the kernel, on a GPU: launching one from compiled code, and cold and warm start.

    python examples/benchmark_start.py --out results.json [--model gpt2]

Launch: host time per call of a compiled function with one tiny attention, less that of the same function without it; and of
what such a call comes to, for each family of kernels: the kernel's own ``launch``, and the operator that compiled code calls,
without and with a gradient to come. Beside them PyTorch's own attention, and an addition: the least that a launch takes.
Start: seconds to the first result in a new process, with empty caches and again with the caches that left; ``--only-launch``
leaves it out. The record is written after each; the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import benchmark
import growing
import torch
from torch import Tensor
from torch.nn import functional as F

from attngen import capture, runtime
from attngen.choose import choose
from attngen.device import probe
from attngen.emit import Kernel, emit
from attngen.spec import HOPPER, PORTABLE, Problem

CALLS = 300
BATCHES = 40
CACHES = ("ATTNGEN_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
VARIANTS = ("inductor sdpa", "inductor eager", "attngen sdpa", "attngen eager")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) + 1


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + 1


def host_us(run: Callable[..., Any], *args: Tensor) -> float:
    """Microseconds of host time per call, in one batch that is short enough not to fill the queue."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(CALLS):
        run(*args)
    return (time.perf_counter() - started) / CALLS * 1e6


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def pieces(args: list[Tensor]) -> dict[str, Callable[..., Any]]:
    """What a compiled call comes to, by family: the launch of a kernel and the operator around it."""
    result = torch.empty_like(args[0])
    runs: dict[str, Callable[..., Any]] = {"sdpa": F.scaled_dot_product_attention}
    runs["add"] = lambda q, k, v: torch.add(q, k, out=result)
    _, (use,) = capture.generate(Attention(), tuple(args), {}, {})
    for suffix, lse in (("", False), ("_lse", True)):
        spec = replace(use.kernel.spec, lse=lse)
        plan = choose(spec, Problem((1, 2), 1024, 1024), probe())
        beside = None
        for family in (PORTABLE, HOPPER):
            tile = next((tile for tile, _ in getattr(plan, "ranked", ()) if tile.family == family), None)
            kernel = None if tile is None else emit(spec, tile)
            if isinstance(kernel, Kernel):
                runs[f"{family}_launch{suffix}"] = runtime.import_kernel(runtime.kernel_path(kernel)).launch
                runs[f"{family}_operator{suffix}"] = runtime.operator(spec, replace(kernel, otherwise=beside))
                beside = kernel
    return runs


def launch() -> dict[str, float]:
    """What one attention adds to a call, by backend, and what its pieces take: medians of interleaved batches."""
    args = [torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    runs = {name: torch.compile(attention, backend=name, dynamic=False) for name in ("inductor", "attngen")}
    runs |= {"base": torch.compile(nothing, dynamic=False), **pieces(args)}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(BATCHES):
            for name, run in runs.items():
                samples[name].append(host_us(run, *args))
    medians = {name: statistics.median(batches[1:]) for name, batches in samples.items()}  # the first compiles
    base = medians.pop("base")
    return {f"{name}_us": took - (base if name in ("inductor", "attngen") else 0) for name, took in medians.items()}


def first_call(name: str, variant: str) -> float:
    """Seconds from the model on the GPU to its first compiled result, in this process."""
    case = next(case for case in benchmark.CASES if case.name == name)
    model = case.model().eval()
    inputs = case.inputs()
    torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.no_grad():
        benchmark.output(benchmark.compiled(model, variant), inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def start(name: str, variant: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **{cache: os.path.join(folder, cache.lower()) for cache in CACHES}}
        command = [sys.executable, __file__, "--child", name, "--variant", variant]
        cold, warm = (_child(command, environment) for _ in range(2))
    return {"cold_s": cold, "warm_s": warm}


def _child(command: list[str], environment: dict[str, str]) -> float:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--only-launch", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(first_call(args.child, args.variant))
        return
    head = {"device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}}
    record = growing.Record.opened(args.out, head)
    record.measure(launch, of="launch")
    for variant in () if args.only_launch else VARIANTS:
        record.measure(partial(start, args.model, variant), of="start", model=args.model, variant=variant)
    for row in record.results:
        print(*(f"{name} {value:.1f}" if isinstance(value, float) else value for name, value in row.items()))


if __name__ == "__main__":
    main()
