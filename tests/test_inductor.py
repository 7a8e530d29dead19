"""What Inductor makes of graphs with our operators: nothing copied, nothing compiled twice or more often than without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import zoo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, config, metrics
from torch.nn.functional import scaled_dot_product_attention

import attngen
from attngen import aot, pipeline, prepare
from attngen.backend import attngen as attngen_backend
from attngen.device import DEVICES
from attngen.emit import Kernel
from attngen.options import parse
from attngen.runtime import kernel_path

EAGER: dict[str, Any] = {"inner": "eager", "strict": True}
STRICT: dict[str, Any] = {"strict": True}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- static inputs


@dataclass(frozen=True)
class Handed:
    """A graph as Inductor is handed it: input shapes, which inputs stay where they are, settings that modes change."""

    backward: bool
    inputs: tuple[Any, ...]
    static: frozenset[int]
    settings: tuple[Any, ...]

    @property
    def moving(self) -> list[Any]:
        return [shape for number, shape in enumerate(self.inputs) if number not in self.static]


@contextmanager
def handed() -> Iterator[list[Handed]]:
    """Collects what Inductor is handed. The graphs then run as they are, so that nothing need be generated."""
    graphs: list[Handed] = []

    def note(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        shapes = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in values)
        settings = (config.triton.cudagraphs, config.max_autotune, config.coordinate_descent_tuning)
        graphs.append(Handed(bool(kwargs.get("is_backward")), shapes, frozenset(kwargs["static_input_idxs"]), settings))
        return make_boxed_func(gm.forward)

    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with pytest.MonkeyPatch.context() as patch, config.patch(fx_graph_cache=False), uncached:
        patch.setattr(compile_fx, "_compile_fx_inner", note)
        yield graphs


def given(
    model: Callable[..., Any], inputs: dict[str, Any], backend: str, train: bool, sites: int = 2, **how: Any
) -> list[Handed]:
    torch._dynamo.reset()
    with handed() as graphs, torch.set_grad_enabled(train), attngen.record() as reports:
        out = torch.compile(model, backend=backend, **how)(**inputs)
        if train:
            (out if isinstance(out, Tensor) else out[0]).square().sum().backward()
    assert sum(len(report.replaced) for report in reports) == (sites if backend == "attngen" else 0)
    return graphs


@pytest.mark.parametrize("build", [partial(zoo.gpt2, "eager"), partial(zoo.llama, "sdpa")], ids=["gpt2", "llama"])
def test_static_inputs_in_inference(build: zoo.Build) -> None:
    """Under CUDA graphs every input that is not static is copied before each replay: only the data may be."""
    model, inputs = build()
    (ours,), (theirs,) = (given(model, inputs, backend, train=False) for backend in ("attngen", "inductor"))
    assert ours == theirs
    assert ours.moving == [tuple(inputs["input_ids"].shape)]
    assert len(ours.static) >= len(list(model.parameters()))


@pytest.mark.parametrize("build", [partial(zoo.gpt2, "eager"), partial(zoo.llama, "sdpa")], ids=["gpt2", "llama"])
def test_static_inputs_in_training(build: zoo.Build) -> None:
    """The backward has other inputs than plain Inductor's, but of ours too only the incoming gradient moves."""
    model, inputs = build()
    (ours, our_back), (theirs, their_back) = (
        given(model, inputs, backend, train=True) for backend in ("attngen", "inductor")
    )
    assert ours == theirs and ours.moving == [tuple(inputs["input_ids"].shape)]
    assert our_back.backward and their_back.backward
    assert our_back.moving == their_back.moving == [(2, zoo.LENGTH, 64)]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_reach_inductor(mode: str) -> None:
    handed_over = partial(given, *zoo.nanogpt(), train=False, sites=1)
    (plain,) = handed_over("inductor", mode=mode)
    assert handed_over("attngen", mode=mode) == [plain]
    assert handed_over("attngen", options={"mode": mode}) == [plain]
    (default,) = handed_over("attngen")
    assert default.static == plain.static and default.settings != plain.settings


# -------------------------------------------------------------------------------------------------------- warm process

STEP = """
import json, sys, torch
from torch._dynamo.utils import counters

class Block(torch.nn.Module):
    # Products and views, forward and backward, so that no C++ has to be compiled.

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.q, self.k, self.v, self.out = (torch.nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (of(x).view(2, 12, 4, 8).transpose(1, 2) for of in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-1, -2) * self.scale, -1) @ v
        return self.out(y.transpose(1, 2).reshape(2, 12, 32))

def step(scale, train):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    block, x, known = Block(scale), torch.randn(2, 12, 32), names()
    run = torch.compile(block, backend="attngen", options={"strict": True})
    with torch.no_grad():
        torch.testing.assert_close(run(x), block(x))
    if train:
        run(x).square().sum().backward()
        theirs = torch.autograd.grad(block(x).square().sum(), block.parameters())
        torch.testing.assert_close([p.grad for p in block.parameters()], list(theirs), rtol=1e-4, atol=1e-4)
    return dict(counters["inductor"]), dict(counters["aot_autograd"]), sorted(names() - known)

def names():
    return {n for n in dir(torch.ops.attngen) if n.startswith(("fwd_", "bwd_"))}

print(json.dumps([step(float(scale), does == "train") for scale, does in (each.split(":") for each in sys.argv[1:])]))
"""

Counted = tuple[dict[str, int], dict[str, int], list[str]]


def test_a_second_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of Inductor's caches hit, forward and backward; another scale is another operator, and compiled anew."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "ATTNGEN_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    script = tmp_path / "step.py"
    script.write_text(STEP)

    def process(*steps: str) -> list[Counted]:
        done = subprocess.run([sys.executable, str(script), *steps], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        counted: list[Counted] = json.loads(done.stdout.splitlines()[-1])
        return counted

    (cold,) = process("0.25:train")
    warm, other = process("0.25:train", "0.5:infer")
    assert cold[0]["fxgraph_cache_miss"] == 3 and "fxgraph_cache_hit" not in cold[0]
    assert warm[0]["fxgraph_cache_hit"] == 3 and "fxgraph_cache_miss" not in warm[0]
    assert cold[1]["autograd_cache_miss"] == cold[1]["autograd_cache_saved"] == 2
    assert warm[1]["autograd_cache_hit"] == 2
    assert not {"autograd_cache_miss", "autograd_cache_bypass"} & warm[1].keys()
    assert warm[2] == cold[2] and len(warm[2]) == 3
    assert other[1]["autograd_cache_miss"] == 1 and len(other[2]) == 1 and not set(other[2]) & set(cold[2])


def attention_use(scale: float = 0.25) -> prepare.Use:
    """A kernel for an H200, as a graph with inputs on one would need it."""
    q, k, v = (torch.randn(2, 4, 256, 64, dtype=torch.float16) for _ in range(3))
    traced = torch.fx.symbolic_trace(lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v)
    _, (use,) = pipeline.optimize(traced, [q, k, v], parse(STRICT), device=DEVICES["h200"])
    return use


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("triton")
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "attngen"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path


def test_kernels_are_compiled_once(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time in a child process, into Triton's cache; then a marker is found, unless something is different."""
    use, h200 = attention_use(), DEVICES["h200"]
    first = prepare.begin([use], h200)
    assert first.compilation is not None
    first.finish()
    (marker,) = (caches / "attngen" / "compiled").iterdir()
    compiled = json.loads(marker.read_text())
    assert compiled["arch"] == 90 and compiled["cubin_bytes"] > 0
    assert list((caches / "triton").rglob("*.cubin"))
    assert (caches / "attngen" / "kernels" / f"{use.kernel.name}.py").read_text() == use.kernel.source

    begun: list[aot.Job] = []
    monkeypatch.setattr(aot, "begin", lambda jobs, arch: begun.extend(jobs))
    assert prepare.begin([use], h200).compilation is None and begun == []
    q, k, v = use.inputs
    unaligned = replace(use, inputs=(replace(q, offset=1), k, v))
    transposed = replace(use, inputs=(replace(q, strides=(65536, 64, 256, 1)), k, v))
    for changed in (unaligned, transposed, attention_use(0.5)):
        begun.clear()
        prepare.begin([use, changed], h200)
        assert begun == [aot.Job(kernel_path(changed.kernel), changed.inputs)]
    begun.clear()
    prepare.begin([use], DEVICES["a100"])
    assert len(begun) == 1
    monkeypatch.setattr("triton.__version__", "9.9.9")
    prepare.begin([use], h200)
    assert len(begun) == 2


def test_a_kernel_that_does_not_compile_is_tried_again(caches: Path, caplog: pytest.LogCaptureFixture) -> None:
    use = attention_use()
    broken = Kernel(use.kernel.spec, use.kernel.tile, use.kernel.source.replace(".exp2(", ".exp3("), "fwd_broken")
    failing = replace(use, kernel=broken)
    for _ in range(2):
        pending = prepare.begin([failing], DEVICES["h200"])
        assert pending.compilation is not None
        caplog.clear()
        pending.finish()
        assert "fwd_broken.py does not compile for sm_90" in caplog.text
    assert not (caches / "attngen" / "compiled").exists()


# ------------------------------------------------------------------------------------------------------------- copies


class Split(nn.Module):
    """One projection cut into queries, keys and values, which stay where they are in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 4, 16).transpose(1, 2) for t in self.qkv(x).split(64, -1))
        y = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Rotated(Split):
    """Queries and keys are turned before use, so that a generated kernel writes them."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 4, 16).transpose(1, 2) for t in self.qkv(x).split(64, -1))
        angle = torch.arange(length)[:, None] * torch.arange(16) * 0.1
        q, k = (t * angle.cos() + t.roll(8, -1) * angle.sin() for t in (q, k))
        y = scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def generated(model: Callable[..., Any], *args: Tensor, backend: str = "attngen") -> int:
    """How many kernels Inductor writes beside the library calls and our operator."""
    torch._dynamo.reset()
    metrics.reset()
    with torch.no_grad(), config.patch(force_disable_caches=True, cpp_cache_precompile_headers=False):
        torch.testing.assert_close(torch.compile(model, backend=backend)(*args), model(*args), rtol=1e-4, atol=1e-4)
    count: int = metrics.generated_kernel_count
    return count


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v).transpose(1, 2)


def test_strided_inputs_go_in_as_they_are() -> None:
    """Views of a projection, and [B, N, H, D] seen as [B, H, N, D]; the result is in the layout that is wanted next."""
    assert generated(Split(), torch.randn(2, 12, 64)) == 0
    assert generated(heads_last, *(torch.randn(2, 12, 4, 16) for _ in range(3))) == 0


def test_no_more_kernels_than_with_the_library() -> None:
    model, x = Rotated(), torch.randn(2, 12, 64)
    ours, library = (generated(model, x, backend=backend) for backend in ("attngen", "inductor"))
    assert 0 < ours <= library


# ---------------------------------------------------------------------------------------------------- recompilations


def test_inductor_compiles_once_for_all_lengths() -> None:
    """With ``dynamic=True``, in inference and in training: a graph each, and none for other lengths and batches."""
    model, graphs = Split(), []

    def counted(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return attngen_backend(gm, example_inputs, options=STRICT)

    run = torch.compile(model, backend=counted, dynamic=True, fullgraph=True)
    for train in (False, True):
        for batch, length in ((2, 12), (3, 7), (2, 30)):
            x = torch.randn(batch, length, 64)
            with torch.set_grad_enabled(train):
                ours, theirs = run(x), model(x)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            if train:
                grads = [torch.autograd.grad(y.square().sum(), [*model.parameters()]) for y in (ours, theirs)]
                torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert len(graphs) == 2


SHAPES: dict[str, tuple[zoo.Build, bool | None]] = {
    "nanogpt": (zoo.nanogpt, None),
    "t5_encoder": (partial(zoo.t5_encoder, "eager"), None),
    "llama_dynamic": (partial(zoo.llama, "sdpa"), True),
}


@pytest.mark.parametrize(("build", "dynamic"), SHAPES.values(), ids=SHAPES)
def test_other_shapes_recompile_as_often_as_without_us(build: zoo.Build, dynamic: bool | None) -> None:
    model, inputs = build()
    assert passes(model, inputs, attngen_backend, dynamic) == passes(model, inputs, None, dynamic)


def passes(
    model: nn.Module, inputs: dict[str, Tensor], backend: Callable[..., Any] | None, dynamic: bool | None
) -> tuple[int, int]:
    """Compiled graphs and graph breaks over several lengths and batch sizes. Without a backend graphs run as they are."""
    torch._dynamo.reset()
    counters.clear()
    counted = CompileCounterWithBackend("eager")

    def compile_it(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        counted(gm, example_inputs)
        return gm if backend is None else backend(gm, example_inputs, options=EAGER)

    run = torch.compile(model, backend=compile_it, dynamic=dynamic)
    with torch.no_grad():
        for batch, length in ((2, 12), (2, 9), (3, 7), (1, 12)):
            some = {name: _cut(x, batch, length) for name, x in inputs.items()}
            ours, plain = run(**some), model(**some)
            torch.testing.assert_close(_first(ours), _first(plain), rtol=1e-4, atol=1e-4)
    return counted.frame_count, sum(counters["graph_break"].values())


def _cut(x: Tensor, batch: int, length: int) -> Tensor:
    return x[:, :length].repeat(2, *[1] * (x.dim() - 1))[:batch]


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
