"""Kernel source -> importable module -> registered torch operator with fake, CPU, GPU and gradient implementations.

One operator per distinct kernel, named by content: ``attngen::fwd_<sha12>``. AOTAutograd's cache keys on operator *names*, so
a name must never outlive a change of what it does, its gradient included (pytorch#144344); ``REVISION`` is part of the name
for that reason. The operator takes tensors as they are, whatever their strides, and returns a fresh contiguous output.

On the CPU, and wherever Triton cannot be used, the operator computes the same thing block by block in ATen.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attngen import blockwise, compat, gradient
from attngen.emit import BackwardKernel, Kernel
from attngen.errors import Unavailable, say_once
from attngen.layout import memory_order
from attngen.paths import kept
from attngen.spec import ROW, AttentionSpec, digest

NAMESPACE = "attngen"
REVISION = 2  # raise when the meaning or the gradient of existing operators changes

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_KERNELS: dict[str, tuple[AttentionSpec, Kernel | None]] = {}


# ------------------------------------------------------------------------------------------------------ kernel modules


def kernel_path(kernel: Kernel | BackwardKernel) -> Path:
    """The file that holds ``kernel``, written if it is not there yet. Content never changes under a name."""
    return kept(f"kernels/{kernel.name}.py", kernel.source)


def import_kernel(path: Path) -> ModuleType:
    """The kernel file as a module. Raises ``Unavailable`` where Triton cannot be imported."""
    name = f"attngen_kernels.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as missing:
        raise Unavailable(f"{path} needs Triton, which cannot be imported here ({missing}).") from missing
    sys.modules[name] = module
    return module


def triton_problem() -> str | None:
    """Why kernels cannot run here, or None if they can."""
    if compat.has_triton():
        return None
    return "Triton cannot be imported: kernels are planned and emitted, but attention runs block by block in ATen."


# ----------------------------------------------------------------------------------------------------------- operators


def operator(
    spec: AttentionSpec, kernel: Kernel | None, backward: BackwardKernel | None = None, *, deterministic: bool = False
) -> Any:
    """The overload that computes ``spec``: by ``kernel`` on a GPU, block by block elsewhere or if there is no kernel.

    With ``spec.lse`` it returns (output, log-sum-exp) and has a gradient, by ``backward`` on a GPU if there is such a
    kernel; without, the output alone. ``deterministic`` has its gradient be the same bits in every run.
    """
    parts = [each.name if each else "no kernel" for each in (kernel, backward)] + ["deterministic"] * deterministic
    name = "fwd_" + digest("\n".join([str(REVISION), spec.text, *parts]))
    if name not in _KERNELS:
        _KERNELS[name] = (spec, kernel)
        _register(name, spec, kernel, backward, deterministic)
    return getattr(torch.ops.attngen, name).default


def registered(name: str) -> tuple[AttentionSpec, Kernel | None] | None:
    """What the operator called ``name`` computes and by which kernel, if it is one of ours."""
    return _KERNELS.get(name.split("::")[-1])


def _register(
    name: str, spec: AttentionSpec, kernel: Kernel | None, backward: BackwardKernel | None, deterministic: bool
) -> None:
    qualified = f"{NAMESPACE}::{name}"
    tensors = ", ".join(f"Tensor {x.name}" for x in spec.inputs)
    result = "(Tensor, Tensor)" if spec.lse else "Tensor"
    _LIBRARY.define(f"{name}({tensors}) -> {result}", tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
    _LIBRARY.impl(name, _by_block(spec), "CPU")
    on_gpu = _by_block(spec) if kernel is None else _by_kernel(spec, kernel)
    _LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(qualified, _fake(spec), lib=_LIBRARY)
    if spec.lse:
        by_block = _gradient_by_block(spec)
        gradient_on_gpu = by_block if backward is None else _gradient_by_kernel(spec, backward)
        gradients = by_block, _same_bits(gradient_on_gpu) if deterministic else gradient_on_gpu
        _register_gradient(name, spec, on_gpu, *gradients)


def _by_kernel(spec: AttentionSpec, kernel: Kernel) -> Callable[..., Any]:
    chosen: Callable[..., Any] | None = None

    def run(*inputs: Tensor) -> Any:
        nonlocal chosen
        if chosen is None:
            chosen = _launcher(spec, kernel)
        return chosen(*inputs)

    return run


def _launcher(spec: AttentionSpec, kernel: Kernel) -> Callable[..., Any]:
    """The kernel's own ``launch``, on the GPU of its inputs. Without Triton this says so, and is the blockwise path."""
    if (problem := triton_problem()) is not None:
        say_once(problem)
        return _by_block(spec)
    launch = launch_of(kernel)
    return launch if kernel.otherwise is None else _either(launch, kernel.otherwise)


def _either(launch: Callable[..., Any], otherwise: Kernel) -> Callable[..., Any]:
    """What ``launch`` gives, or the other kernel for tensors that it cannot take: then it gives None."""

    def run(*inputs: Tensor) -> Any:
        result = launch(*inputs)
        return import_kernel(kernel_path(otherwise)).launch(*inputs) if result is None else result

    return run


def _by_block(spec: AttentionSpec) -> Callable[..., Any]:
    how = None if spec.lse else blockwise.plain(spec)

    def run(*inputs: Tensor) -> Any:
        if how is not None and all(bool(x.isfinite().all()) for x in inputs[:2]):  # of NaN the library makes zeros, on a CPU
            return blockwise.library(spec, how, inputs)
        out, lse = blockwise.forward(spec, inputs)
        return (out, lse.float().contiguous()) if spec.lse else out

    return run


def _fake(spec: AttentionSpec) -> Callable[..., Any]:
    def fake(*inputs: Tensor) -> Any:
        sizes = blockwise.sizes_of(spec, inputs)
        out = inputs[0].new_empty([sizes[a] for a in spec.output], dtype=spec.out_dtype)
        if not spec.lse:
            return out
        return out, inputs[0].new_empty([sizes[a] for a in (*spec.batch, ROW)], dtype=torch.float32)

    return fake


def _register_gradient(
    name: str, spec: AttentionSpec, on_gpu: Callable[..., Any], by_block: Gradient, gradient_on_gpu: Gradient
) -> None:
    """``bwd_<sha12>``: the gradients of the needed inputs. An operator of its own, so that compilers need not look inside."""
    backward = name.replace("fwd_", "bwd_")
    schema = "(Tensor grad, Tensor out, Tensor lse, Tensor[] inputs, bool[] needed) -> Tensor[]"
    _LIBRARY.define(backward + schema, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
    _LIBRARY.impl(backward, by_block, "CPU")
    _LIBRARY.impl(backward, gradient_on_gpu, "CUDA")

    orders = [memory_order(spec, source) for source in spec.inputs]

    def fake(grad: Tensor, out: Tensor, lse: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        return [_dense(order, x) for order, x, n in zip(orders, inputs, needed, strict=True) if n]

    torch.library.register_fake(f"{NAMESPACE}::{backward}", fake, lib=_LIBRARY)

    def setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        needed = [n and x.is_floating_point() for n, x in zip(ctx.needs_input_grad, inputs, strict=True)]
        grads = iter(getattr(torch.ops.attngen, backward)(grad, out, lse, inputs, needed))
        return tuple(next(grads) if n else None for n in needed)

    compat.register_gradient(_LIBRARY, getattr(torch.ops.attngen, name).default, differentiate, setup, on_gpu)


Gradient = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[bool]], list[Tensor]]


def _gradient_by_block(spec: AttentionSpec) -> Gradient:
    orders = [memory_order(spec, source) for source in spec.inputs]

    def run(grad: Tensor, out: Tensor, lse: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        return _laid_out(orders, inputs, blockwise.backward(spec, inputs, grad, needed))

    return run


def _gradient_by_kernel(spec: AttentionSpec, kernel: BackwardKernel) -> Gradient:
    plan = gradient.backward_of(spec)
    by_block, by_kernel = _gradient_by_block(spec), _launcher_of(kernel)
    orders = [memory_order(spec, source) for source in spec.inputs]
    extras = [spec.inputs.index(target.source) for target in plan.extras]

    def run(grad: Tensor, out: Tensor, lse: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        if triton_problem() is not None or not gradient.suits(plan, inputs):
            return by_block(grad, out, lse, inputs, needed)
        here = grad.device.index == torch.cuda.current_device()
        with nullcontext() if here else torch.cuda.device(grad.device):
            made = by_kernel(grad, out, lse, *inputs, *(needed[k] for k in extras))
            if made is None:
                return by_block(grad, out, lse, inputs, needed)
            *buffers, delta = made
            return _laid_out(orders, inputs, gradient.finish(plan, inputs, needed, buffers, lse, delta))

    return run


def _same_bits(run: Gradient) -> Gradient:
    """As under ``torch.use_deterministic_algorithms``, whatever the user has set."""

    def same(grad: Tensor, out: Tensor, lse: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        with compat.deterministic():
            return run(grad, out, lse, inputs, needed)

    return same


def launch_of(kernel: Kernel | BackwardKernel) -> Callable[..., Any]:
    """``launch`` of a kernel's file; if it leaves rows to another, it knows that one's."""
    launch: Callable[..., Any] = import_kernel(kernel_path(kernel)).launch
    if kernel.leaves_rows and kernel.otherwise is not None:
        return partial(launch, again=import_kernel(kernel_path(kernel.otherwise)).launch)
    return launch


def _launcher_of(kernel: BackwardKernel) -> Callable[..., Sequence[Tensor] | None]:
    """For ``launch`` of a backward, or that of its other kernel where this gives None. Their files are written and imported
    when they are needed first."""
    launch: Callable[..., Sequence[Tensor] | None] | None = None
    otherwise = _launcher_of(kernel.otherwise) if kernel.otherwise else None

    def run(*args: Any) -> Sequence[Tensor] | None:
        nonlocal launch
        launch = launch or launch_of(kernel)
        made = launch(*args)
        return otherwise(*args) if made is None and otherwise else made

    return run


def _dense(order: list[int], x: Tensor) -> Tensor:
    """Memory for the gradient of ``x``: dense, in an order that the spec decides, whatever the strides of ``x`` are."""
    stored = x.new_empty([x.shape[d] for d in order])
    return stored.permute([order.index(d) for d in range(x.dim())])


def _laid_out(orders: Sequence[list[int]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients that there are, each as ``_dense`` says."""
    found = []
    for order, x, grad in zip(orders, inputs, grads, strict=True):
        if grad is not None:
            right = grad.permute(order).is_contiguous()
            found.append(grad if right else _dense(order, x).copy_(grad))
    return found


# What the backward keeps of a result must survive whatever is done to the result: then this copy of it is passed on. An
# operator of its own, because compilers drop a plain copy of a value that is saved and returned.
_LIBRARY.define("copied(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("copied", torch.clone, _device)
torch.library.register_fake(f"{NAMESPACE}::copied", torch.clone, lib=_LIBRARY)
torch.library.register_autograd(f"{NAMESPACE}::copied", lambda _, grad: grad, lib=_LIBRARY)
