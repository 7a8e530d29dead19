"""Every private or moving name of torch and triton that attngen uses, in one place.

Tested on the oldest and the newest supported release of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy as sp
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.predispatch import _vmap_decrement_nesting, _vmap_increment_nesting
from torch._guards import tracing
from torch._library.autograd import Info, make_autograd_impl
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    _ProxyTensor,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    set_proxy_slot,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.functions import Max as _TorchMax
from torch.utils._sympy.functions import Min as _TorchMin

__all__ = [
    "CHECKPOINT",
    "INLINED_BODIES",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "GuardOnDataDependentSymNode",
    "ShapeEnv",
    "compile_kernel",
    "cuobjdump",
    "deterministic",
    "differentiable",
    "enable_python_dispatcher",
    "enter_autocast",
    "enter_vmap",
    "exit_autocast",
    "exit_vmap",
    "get_proxy_mode",
    "has_triton",
    "hint",
    "interpreter_problem",
    "is_literal",
    "looking_at",
    "make_fx",
    "process_group",
    "register_gradient",
    "set_traced_node",
    "size_expr",
    "specialised",
    "storage_of",
    "traced_below_transforms",
    "traced_node",
    "tracing",
    "triton_build",
    "untraced",
]

enter_autocast, exit_autocast = _enter_autocast, _exit_autocast
enter_vmap, exit_vmap = _vmap_increment_nesting, _vmap_decrement_nesting

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint  # what a checkpoint is in a captured graph

# Higher-order operators that run their first argument, a graph, on the rest of their arguments and change nothing else.
INLINED_BODIES = tuple(
    getattr(torch.ops.higher_order, name)
    for name in ("tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap")
    if hasattr(torch.ops.higher_order, name)
)


def size_expr(size: Any) -> sp.Expr:
    """A size as a sympy expression: a number for an int, the symbol for a SymInt. Adds no guard."""
    if not isinstance(size, torch.SymInt):
        return sp.Integer(size)
    return size.node.expr.replace(_TorchMax, sp.Max).replace(_TorchMin, sp.Min)


def hint(size: Any) -> int:
    """The size seen while tracing. Adds no guard."""
    value: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(value)


@contextmanager
def traced_below_transforms() -> Iterator[None]:
    """A context in which tracing goes on below ``vmap`` and autograd: on what batched tensors are made of.

    Before torch 2.13, tracing for export would also record the steps of ``vmap`` itself, by a function mode.
    """
    mode = get_proxy_mode()
    assert mode is not None
    with torch._C.DisableTorchFunction(), ProxyTorchDispatchMode(mode.tracer, "real"):
        yield


def traced_node(value: Any) -> fx.Node | None:
    """The node that ``value`` is the result of in the graph being traced, if it is traced."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(value, (torch.Tensor, torch.SymInt)):
        return None
    proxy = get_proxy_slot(value, mode.tracer, None)
    proxy = getattr(proxy, "proxy", proxy)  # tensors keep a record around the proxy
    if callable(proxy) and not hasattr(proxy, "node"):  # SymInts keep a thunk
        proxy = proxy()
    return getattr(proxy, "node", None)


def is_literal(tensor: torch.Tensor) -> bool:
    """``tensor`` is traced as one whose elements are known, such as ``torch.tensor(0.0)``."""
    mode = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return getattr(slot, "constant", None) is not None


def set_traced_node(tensor: torch.Tensor, node: fx.Node) -> None:
    """``tensor`` stands for ``node`` in the graph being traced, whatever it stood for before."""
    mode = get_proxy_mode()
    assert mode is not None
    set_proxy_slot(tensor, mode.tracer, _ProxyTensor(mode.tracer.proxy(node), None))


@contextmanager
def untraced() -> Iterator[None]:
    """A context in which tensors are made on the side: nothing is recorded."""
    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
        yield


@contextmanager
def looking_at(model: Callable[..., Any], backend: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """``model`` compiled by ``backend`` however often it or its class was compiled before, for exactly the sizes it is given.

    Where torch can keep them apart (2.13), what is compiled here does not count against the user's own recompilations.
    """
    compiling: Any = torch.compile
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(compiling).parameters else {}
    unlimited = 1 << 30
    with torch._dynamo.config.patch(recompile_limit=unlimited, accumulated_recompile_limit=unlimited):
        yield compiling(model, backend=backend, dynamic=False, **apart)


@contextmanager
def deterministic() -> Iterator[None]:
    """A context in which torch's operators give the same bits each time, those that cannot with a warning.

    Not by ``torch.use_deterministic_algorithms``, which changes how Inductor compiles. Memory is left as it is.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(True, warn_only=not before[0] or before[1])
    memory.fill_uninitialized_memory = filled and before[0]
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@contextmanager
def differentiable() -> Iterator[None]:
    """A context in which gradients are recorded, also in an operator that a dispatch mode called: below autograd."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def storage_of(value: torch.Tensor) -> int:
    """A number equal for tensors that share memory (fake tensors share storages as real ones do)."""
    return value.untyped_storage()._cdata


def register_gradient(
    library: torch.library.Library, op: Any, gradient: Callable[..., Any], setup: Callable[..., None],
    implementation: Callable[..., Any], key: str = "CUDA",
) -> None:  # fmt: skip
    """``torch.library.register_autograd``, which goes through the dispatcher twice even where no gradient is asked for.

    There, ``implementation`` is called at once if it is what the dispatcher would come to: it is registered for ``key``.
    """
    in_full = make_autograd_impl(op, Info(gradient, setup))
    last, below = getattr(torch._C.DispatchKey, key), torch._C._after_autograd_keyset

    def run(keyset: Any, *inputs: Any) -> Any:
        if (keyset & below).highestPriorityTypeId() != last or (
            torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        ):
            return in_full(keyset, *inputs)
        return implementation(*inputs)

    library.impl(op._opname, run, "Autograd", with_keyset=True)


def has_triton() -> bool:
    """Triton is installed, and well enough to be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def process_group() -> tuple[int, Any] | None:
    """This process's rank and the store of its group, if it is in a group with others."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        return None
    return distributed.get_rank(), distributed.distributed_c10d._get_default_store()


def triton_build() -> str:
    """Which Triton compiles, and where it keeps what it compiled."""
    import triton
    from triton import knobs

    return f"{triton.__version__} {knobs.cache.dir}"


def specialised(kernel: Any, args: Sequence[Any], options: Mapping[str, Any], arch: int) -> tuple[Any, Any, Any]:
    """What ``kernel[grid](*args, **options)`` would compile for sm_``arch``: Triton's source, target, parsed options.

    Every option that a launch adds is added here too: they are part of the key of Triton's disk cache.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    given = {"debug": kernel.debug or knobs.runtime.debug, **options}
    for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):  # the second is new in 3.9
        if hasattr(knobs.compilation, name):
            given[name] = getattr(knobs.compilation, name)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*args, **given)
    parsed, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialisation, given)
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    return kind(kernel, signature, constants, attributes), target, parsed


def compile_kernel(kernel: Any, args: Sequence[Any], options: Mapping[str, Any], arch: int) -> Any:
    """The compiled form of ``kernel[grid](*args, **options)`` for sm_``arch``, as the launch itself would make it."""
    import triton

    source, target, parsed = specialised(kernel, args, options, arch)
    return triton.compile(source, target=target, options=parsed.__dict__)


def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run here, or None if it can."""
    if not has_triton():
        return "triton is not installed (pip install triton, Linux only)"
    import numpy
    import triton

    if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        return "the interpreter of Triton 3.6 needs an older numpy (pip install 'numpy<2.4', or a newer triton)"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def cuobjdump() -> str:
    """The path of the binary inspector that Triton ships."""
    from triton import knobs

    return str(knobs.nvidia.cuobjdump.path)
