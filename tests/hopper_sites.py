"""Attention that the hopper family was measured on: ``SITES`` has a spec and a problem for each name of the data file.

``python tests/hopper_sites.py FILE [NAME...]`` measures all tiles of all sites, or of those named, on the GPU of this machine
(ms, medians of replayed CUDA graphs), beside the portable tiles that the model ranks first. What
``tests/data/hopper_fwd_h100.json`` holds was measured so; most tiles that had been over a fifth slower than the best in an
earlier run were left out there, since all of them take too long to compile.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import sympy as sp
import torch
from specs import CAUSAL, DIAGONAL, SEED, B, H, attention, dropped, loaded, plus, scaled, softcap, window

from attngen import compat, hopper, verify
from attngen import measure as clocks
from attngen.algebra import Int, integer, op, to_float
from attngen.aot import Layout, launch_of, layout_of
from attngen.choose import HOPPER_TILES, TILES, refusal
from attngen.cost import costs
from attngen.device import Device, probe
from attngen.emit import Kernel, emit
from attngen.interpret import import_file
from attngen.spec import KEY, ROW, AttentionSpec, Problem, Tile

BF16 = torch.bfloat16
CALLS, ROUNDS, PORTABLE_TILES = 4, 7, 2
ZERO = sp.Integer(0)


def _spec(head_dim: int, **changes: object) -> AttentionSpec:
    return attention(dtype=BF16, head_dim=head_dim, **changes)  # type: ignore[arg-type]


def _programs(head_dim: int) -> dict[str, AttentionSpec]:
    qk = scaled(head_dim**-0.5)
    slope, table, bias = loaded("t0", H), loaded("t0", H, DIAGONAL), loaded("t0", ZERO, H, ROW, KEY)
    single = (torch.float32, (H,))
    return {
        "full": _spec(head_dim),
        "causal": _spec(head_dim, mask=CAUSAL),
        "alibi": _spec(
            head_dim, mask=CAUSAL, score=plus(qk, op("mul", slope, to_float(Int(KEY)))), extras={"t0": single}
        ),
        "softcap": _spec(head_dim, mask=CAUSAL, score=softcap(50.0, qk)),
        "window": _spec(head_dim, mask=window(512)),
        "sinks": _spec(head_dim, mask=window(128), sinks=(slope,), extras={"t0": single}),
        "table": _spec(head_dim, score=plus(qk, table), extras={"t0": (torch.float32, (H, DIAGONAL))}),
        "bias": _spec(head_dim, score=plus(qk, bias), extras={"t0": (BF16, (ZERO, H, ROW, KEY))}),
        "prefix": _spec(head_dim, mask=op("or", CAUSAL, op("lt", Int(KEY), integer(1024)))),
        "sigmoid": _spec(head_dim, softmax=False, score=op("sigmoid", plus(qk, scaled(0.0)))),
        "grouped": _spec(head_dim, mask=CAUSAL, groups=4),
        "dropped": _spec(head_dim, mask=CAUSAL, gain=dropped(0.1, B, H), extras=SEED),
    }


BY_HEAD = {head_dim: _programs(head_dim) for head_dim in (64, 96, 128, 256)}
_SIZES = {  # head size, then which program, batch x heads, query and key length
    64: [
        ("full", (32, 16), 512, 512), ("causal", (16, 16), 1024, 1024), ("full", (16, 32), 1024, 1024),
        ("causal", (4, 32), 4096, 4096), ("full", (64, 12), 197, 197), ("table", (8, 12), 2048, 2048),
        ("window", (4, 32), 4096, 4096), ("alibi", (4, 32), 4096, 4096), ("full", (1, 32), 16384, 16384),
        ("causal", (1, 8), 2048, 2048), ("softcap", (4, 32), 4096, 4096),
    ],
    96: [("causal", (8, 16), 2048, 2048)],
    128: [
        ("full", (16, 16), 1024, 1024), ("causal", (16, 16), 1024, 1024), ("causal", (4, 16), 4096, 4096),
        ("causal", (2, 32), 8192, 8192), ("full", (1, 16), 16384, 16384), ("alibi", (8, 16), 2048, 2048),
        ("softcap", (4, 16), 4096, 4096), ("window", (4, 16), 4096, 4096), ("sinks", (4, 16), 4096, 4096),
        ("table", (4, 16), 4096, 4096), ("bias", (4, 16), 4096, 4096), ("prefix", (4, 16), 4096, 4096),
        ("sigmoid", (4, 16), 4096, 4096), ("grouped", (4, 32), 4096, 4096), ("full", (1, 16), 1024, 16384),
        ("causal", (1, 8), 1000, 1000), ("full", (8, 16), 256, 256),
    ],
    256: [
        ("causal", (16, 8), 1024, 1024), ("softcap", (4, 8), 4096, 4096), ("full", (1, 8), 16384, 16384),
        ("window", (4, 8), 4096, 4096), ("full", (2, 8), 1024, 1024),
    ],
}  # fmt: skip
SITES: dict[str, tuple[AttentionSpec, Problem]] = {
    f"d{head_dim} {program} {batch[0]}x{batch[1]} {rows}x{keys}": (BY_HEAD[head_dim][program], Problem(batch, rows, keys))
    for head_dim, sizes in _SIZES.items()
    for program, batch, rows, keys in sizes
}


def candidates(spec: AttentionSpec, problem: Problem, device: Device) -> list[Tile]:
    """What can run of the hopper family, and the portable tiles that look best."""
    able = []
    for tiles in (HOPPER_TILES, TILES):
        predicted = zip(tiles, costs(spec, problem, device, tiles), strict=True)
        fit = [(cost.seconds, tile) for tile, cost in predicted if refusal(tile, cost, problem, device) is None]
        able.append([tile for _, tile in sorted(fit, key=lambda pair: pair[0])])
    return [*able[0], *able[1][:PORTABLE_TILES]]


# ---------------------------------------------------------------------------------------------------------- measurement


def _written(folder: Path, spec: AttentionSpec, tile: Tile) -> Path:
    kernel = emit(spec, tile)
    assert isinstance(kernel, Kernel), kernel
    path = folder / f"{kernel.name}.py"
    path.write_text(kernel.source)
    return path


def _compiled(job: tuple[Path, tuple[Layout, ...]]) -> None:
    path, layouts = job
    module = import_file(path)
    call = launch_of(module, layouts)
    compat.compile_kernel(module.attention_forward, call.args, call.options, 90)


def replayed(call: Callable[[], object]) -> Callable[[], None]:
    """``CALLS`` calls as a CUDA graph, so that the host's time does not count."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each call."""
    graphs = {name: replayed(call) for name, call in calls.items()}
    taken = clocks.samples(graphs, ROUNDS, clocks.Clock("cuda"), warm_up=1)
    return {name: round(clocks.summary(each).median / CALLS, 4) for name, each in taken.items()}


def measure(path: Path, names: list[str]) -> None:
    device = probe()
    folder = Path(tempfile.mkdtemp())
    plan = {name: candidates(*site, device) for name, site in SITES.items() if name in names}
    files = {(name, tile): _written(folder, SITES[name][0], tile) for name, tiles in plan.items() for tile in tiles}
    jobs = {}
    for (name, _), file in files.items():
        spec, problem = SITES[name]
        jobs.setdefault(file, tuple(map(layout_of, verify.sample_inputs(spec, problem, device="cuda"))))
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compiled, jobs.items()))
    print(f"{len(jobs)} kernels compiled", flush=True)
    sites = {}
    for name, tiles in plan.items():
        inputs = verify.sample_inputs(*SITES[name], device="cuda")
        launches = {str(tile): import_file(files[name, tile]).launch for tile in tiles}
        sites[name] = medians({tile: partial(launch, *inputs) for tile, launch in launches.items()})
        best = sorted(sites[name].items(), key=lambda pair: pair[1])
        print(f"{name:32s}", "  ".join(f"{tile} {ms:.3f}" for tile, ms in best[:4]), flush=True)
        data = {"device": device.label, "versions": {"torch": torch.__version__.split("+")[0]}, "unit": "ms", "sites": sites}
        path.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    suited = [name for name, (spec, _) in SITES.items() if hopper.unsuited(spec) is None]
    measure(Path(sys.argv[1]), sys.argv[2:] or suited)
