"""Gluon kernels of the hopper family as plain Python: a thread for each partition, numpy arrays for blocks.

What it is for is the protocol of the barriers, which no interpreter runs. Loads land at once, as early as they may
overwrite what is still needed; products read their operands only when they are waited for, and stores read shared memory
only then, as late as somebody else may overwrite it. So a buffer that is handed back too early gives wrong numbers, and
a barrier that is counted wrongly gives a thread that waits for ever: that raises ``Stuck``.
"""

from __future__ import annotations

import random
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from attngen import barriers
from attngen.barriers import Barrier, Stuck, Turn
from attngen.proxies import Ground, Witness
from attngen.registers import (
    Block,
    Scalar,
    bits_of,
    block,
    bytes_of,
    exp2,
    largest_pairs,
    numeric,
    of_bits,
    of_bytes,
    reduced,
    where,
)

MOST_PRODUCTS = 8  # that may be on their way
_here = threading.local()


# ------------------------------------------------------------------------------------------------------------ barriers


def _jitter() -> None:
    if random.random() < 0.1:
        time.sleep(random.random() * 1e-4)


def _wait(barrier: Barrier, parity: Any, pred: Any = True, deps: Any = ()) -> None:
    _jitter()
    if pred:
        barrier.wait(int(parity), _here.witness)


def _arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
    _jitter()
    if pred:
        barrier.step(count, 0, _here.witness)


def _expect(barrier: Barrier, size: int, pred: Any = True) -> None:
    barrier.step(1, size, _here.witness)


def _fence() -> None:
    """What this thread did to shared memory comes before what TMA does to it from here on."""
    _here.witness.fence()


_mbarrier = types.SimpleNamespace(
    init=lambda barrier, count: barrier.init(count),
    wait=_wait,
    arrive=_arrive,
    expect=_expect,
    MBarrierLayout=lambda: None,
)


# -------------------------------------------------------------------------------------------------------------- memory


class Shared:
    """A view of shared memory."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def index(self, place: Any) -> Shared:
        return Shared(self.data[int(place)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.reshape(shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        place = [slice(None)] * dim + [slice(int(start), int(start) + length)]
        return Shared(self.data[tuple(place)])

    def store(self, values: np.ndarray) -> None:
        _here.witness.touch(self.data)
        self.data[...] = values

    def load(self, layout: Any) -> Block:
        _here.witness.touch(self.data)
        return block(self.data.copy())


class Barriers:
    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, place: Any) -> Barrier:
        return self.each[int(place)]


def _allocated(dtype: str, shape: Sequence[int], layout: Any = None) -> Any:
    if dtype == "int64":
        return Barriers(shape[0]) if len(shape) > 1 else Barrier()
    return Shared(np.full(shape, 0 if dtype == "int32" else np.nan, np.int64 if dtype == "int32" else np.float32))


class Pointer:
    """A place in a tensor: offsets in elements."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=str(self.tensor.dtype).removeprefix("torch."))

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + steps)

    def elements(self) -> torch.Tensor:
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        return self.tensor.as_strided((size,), (1,), 0)

    def places(self) -> np.ndarray:
        return np.asarray(self.offset) + self.tensor.storage_offset()


def _loaded(pointer: Pointer, mask: Any = None, other: float = 0) -> Any:
    places = pointer.places()
    places, keep = np.broadcast_arrays(places, True if mask is None else mask)
    elements = pointer.elements()
    kind = (np.float32, torch.float32) if elements.is_floating_point() else (np.int64, torch.int64)
    found = np.full(keep.shape, other, kind[0])
    found[keep] = elements[_index(places[keep])].to(kind[1]).numpy()
    return block(found)


def _index(places: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(places))


def _stored(pointer: Pointer, values: Any, mask: Any = True) -> None:
    places, keep, values = np.broadcast_arrays(pointer.places(), mask, np.asarray(values))
    elements = pointer.elements()
    elements[_index(places[keep])] = torch.from_numpy(values[keep]).to(elements.dtype)


class Descriptor:
    """A tensor that is copied in boxes."""

    layout = None
    dtype = "box"

    base: torch.Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]

    def window(self, place: Sequence[Any]) -> torch.Tensor:
        """What of the box at ``place`` lies within the tensor."""
        assert 1 <= len(self.shape) == len(self.strides) == len(self.block_shape) == len(place) <= 5
        assert self.strides[-1] == 1 and all(stride * self.base.element_size() % 16 == 0 for stride in self.strides[:-1])
        cut = self.base.as_strided(self.shape, self.strides, self.base.storage_offset())
        for dim, (start, size) in enumerate(zip(map(int, place), self.block_shape, strict=True)):
            cut = cut.narrow(dim, min(start, cut.shape[dim]), max(0, min(size, cut.shape[dim] - start)))
        return cut


def _load_tile(descriptor: Descriptor, place: Sequence[Any], barrier: Barrier, shared: Shared) -> None:
    _jitter()
    cut = descriptor.window(place)
    assert shared.data.shape == tuple(descriptor.block_shape)
    _here.witness.use(shared.data)
    shared.data[...] = 0
    values = cut.float() if cut.is_floating_point() else cut
    shared.data[tuple(slice(0, size) for size in cut.shape)] = values.numpy()
    barrier.step(0, -descriptor.base.element_size() * shared.data.size, _here.witness)


def _store_tile(descriptor: Descriptor, place: Sequence[Any], shared: Shared) -> None:
    _here.witness.use(shared.data)
    _here.stores.append((torch.Tensor.copy_, descriptor, [int(p) for p in place], shared))


def _add_tile(descriptor: Descriptor, place: Sequence[Any], shared: Shared) -> None:
    _here.witness.use(shared.data)
    _here.stores.append((torch.Tensor.add_, descriptor, [int(p) for p in place], shared))


def _store_wait(pending: int) -> None:
    for write, descriptor, place, shared in _here.stores:
        cut = descriptor.window(place)
        write(cut, torch.from_numpy(shared.data[tuple(slice(0, size) for size in cut.shape)].copy()))
    _here.stores = []


_tma = types.SimpleNamespace(
    async_load=_load_tile, async_store=_store_tile, async_atomic_add=_add_tile, store_wait=_store_wait
)


# ------------------------------------------------------------------------------------------------------------ products


class Promise:
    """A product that is on its way: computed when somebody waits for it."""

    def __init__(self, compute: Callable[[], Block]) -> None:
        self.compute = compute
        self.value: Block | None = None

    def get(self) -> Block:
        if self.value is None:
            self.value = self.compute()
        return self.value


def _mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Promise:
    def compute() -> Block:
        left = a.data if isinstance(a, Shared) else np.asarray(a)
        product = left.astype(np.float32) @ b.data
        return block(product + (acc.get() if isinstance(acc, Promise) else acc) if use_acc else product)

    for operand in (a, b):
        if isinstance(operand, Shared):
            _here.witness.use(operand.data)
    promise = Promise(compute)
    _here.products = [*_here.products[-MOST_PRODUCTS:], promise]
    return promise


def _mma_wait(pending: int, deps: Sequence[Promise]) -> Any:
    """Until all products but the last ``pending`` are there: what is asked for must be among them."""
    _jitter()
    if any(promise in _here.products[len(_here.products) - pending :] for promise in deps):
        raise Stuck("a product is read that was not waited for")
    found = tuple(promise.get() for promise in deps)
    return found if len(found) > 1 else found[0]


# ------------------------------------------------------------------------------------------------------------ language


def _specialised(partitions: Sequence[tuple[Any, Any]], warps: Any, registers: Any) -> None:
    failures: list[BaseException] = []
    program = _here.program
    named: dict[str, Turn] = {}
    ground = Ground()

    def run(function: Any, arguments: Any) -> None:
        _here.program, _here.stores, _here.products, _here.witness = program, [], [], Witness(ground)
        _here.named = named
        try:
            with np.errstate(all="ignore"):  # registers hold infinities and NaN without ado
                function(*arguments)
            assert not _here.stores, "a store is not waited for"
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * barriers.SECONDS)
    if failures:
        raise failures[0]
    if any(thread.is_alive() for thread in threads):
        raise Stuck("a partition does not end")


def _asm(text: str, constraints: str, args: Sequence[Any], dtype: Any, **_: Any) -> Any:
    if text.startswith("max.NaN."):
        return largest_pairs(args[0], args[1], "bfloat16" if "bf16" in text else "float16")
    if text.startswith("cvt.rn."):
        high, low = (bits_of(each, "bfloat16" if "bf16" in text else "float16") for each in reversed(args))
        return block(low | high << 16)
    if "e4m3x2" in text:
        return block(sum(bytes_of(each) << 8 * place for place, each in enumerate(args)))
    value = args[0]
    if dtype == "float8e4nv":  # four numbers of one word, which it was joined with itself for
        return of_bytes(np.asarray(value) >> 8 * (np.arange(value.shape[-1]) % 4))
    if found := re.search(r"bar\.(\w+) (\d+), (\d+);", text):
        action, name, threads = found.groups()
        _here.named.setdefault(name, Turn()).meet(int(threads), action == "sync")
    if text.startswith("mov.b32 {"):
        return tuple(of_bits(np.asarray(value) >> 16 * part, each) for part, each in enumerate(dtype))
    return block(np.tanh(value)) if text.startswith("tanh") else value


class _SharedLayout:
    def __init__(self, **_: Any) -> None:
        pass

    @staticmethod
    def get_default_for(box: Sequence[int], dtype: str) -> None:
        return None


_INTEGERS = ("int16", "int32", "int64", "uint32", "uint64")
_FUNCTIONS = ("log2", "log", "exp", "abs", "sqrt", "floor", "sin", "cos", "maximum", "minimum")


def _language() -> types.SimpleNamespace:
    shapeless = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout")
    names: dict[str, Any] = {name: lambda *_, **__: types.SimpleNamespace(value=None) for name in shapeless}
    names |= {name: name for name in ("float16", "bfloat16", "float8e4nv", "float32", *_INTEGERS)}
    names |= {name: numeric(getattr(np, name)) for name in _FUNCTIONS}
    return types.SimpleNamespace(
        **names,
        constexpr=lambda value: value,
        exp2=numeric(exp2),
        arange=lambda start, stop, layout=None: block(np.arange(start, stop)),
        full=lambda shape, value, dtype, layout: block(np.full(shape, value, np.float32 if dtype == "float32" else np.int64)),
        where=where,
        dot=lambda a, b: block(np.asarray(a, np.float32) @ np.asarray(b, np.float32)),
        max=reduced(np.max),
        min=reduced(np.min),
        sum=reduced(np.sum),
        cdiv=lambda a, b: -(-a // b),
        expand_dims=lambda values, axis: block(np.expand_dims(values, axis)),
        convert_layout=lambda values, layout, assert_trivial=False: values,
        join=lambda a, b: block(np.stack([a, b], -1)),
        static_range=range,
        program_id=lambda axis: _here.program[0],
        num_programs=lambda axis: _here.program[1],
        inline_asm_elementwise=_asm,
        allocate_shared_memory=_allocated,
        load=_loaded,
        store=_stored,
        atomic_add=_added,
        trans=lambda values: block(values.T),
        zeros=lambda shape, dtype: block(np.zeros(shape, np.float32)),
        gather=lambda values, places, axis: block(np.take_along_axis(values, np.broadcast_to(places, values.shape), axis)),
        atomic_xchg=_exchanged,
        NVMMASharedLayout=_SharedLayout,
        warp_specialize=_specialised,
    )


_adding = threading.Lock()


def _exchanged(pointer: Pointer, value: int, sem: str) -> None:
    pointer.tensor[0] = value


def _added(pointer: Pointer, values: Any, mask: Any = True, sem: str = "") -> int | None:
    """Returns what a single number was before."""
    places, keep, values = np.broadcast_arrays(pointer.places(), mask, np.asarray(values))
    elements = pointer.elements()
    with _adding:
        before = int(elements[int(places)]) if places.ndim == 0 else None
        step = torch.from_numpy(values[keep]).to(elements.dtype)
        elements.index_put_((_index(places[keep]),), step, accumulate=True)
    return before


# ------------------------------------------------------------------------------------------------------------- kernels


class _Kernel:
    """What ``attention_forward`` becomes: its launch runs one program after another."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            given = [Pointer(a) if isinstance(a, torch.Tensor) else Scalar(a) if isinstance(a, int) else a for a in args]
            for program in range(grid[0]):
                _here.program, _here.stores, _here.witness = (Scalar(program), Scalar(grid[0])), [], Witness(Ground())
                self.function(*given)

        return launch


def _jit(function: Any = None, **_: Any) -> Any:
    return _Kernel if function is None else _Kernel(function)


def simulated(source: str, programs: int = 3) -> types.ModuleType:
    """The module of a kernel's ``source``, whose ``launch`` runs here; persistent kernels on so many multiprocessors."""
    modules = {
        "triton": types.SimpleNamespace(cdiv=lambda a, b: -(-a // b), jit=_jit, language=_language()),
        "triton.experimental": types.SimpleNamespace(gluon=types.SimpleNamespace(jit=_jit)),
        "triton.experimental.gluon": types.SimpleNamespace(language=_language(), jit=_jit),
        "triton.experimental.gluon.language.nvidia.hopper": types.SimpleNamespace(
            fence_async_shared=_fence,
            mbarrier=_mbarrier,
            tma=_tma,
            warpgroup_mma=_mma,
            warpgroup_mma_wait=_mma_wait,
        ),
        "triton.experimental.gluon.nvidia.hopper": types.SimpleNamespace(TensorDescriptor=Descriptor),
    }
    modules["triton.language"] = modules["triton"].language
    modules["triton.experimental.gluon.language"] = modules["triton.experimental.gluon"].language
    module = types.ModuleType("simulated")
    vars(module)["range"] = lambda *ends: map(Scalar, range(*ends))
    saved = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        exec(compile(source, "simulated", "exec"), vars(module))
    finally:
        for name, old in saved.items():
            sys.modules.pop(name) if old is None else sys.modules.__setitem__(name, old)
    if hasattr(module, "PROGRAMS"):
        vars(module)["PROGRAMS"] = programs
    return module
