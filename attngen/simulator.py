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

MOST_PRODUCTS = 8  # that may be on their way
NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float8e4nv": torch.float8_e4m3fn}
LARGEST = 448.0  # of 8-bit numbers, as which larger ones are rounded to on a GPU
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


class Block(np.ndarray):
    """Values in registers."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Block:
        return block(_reinterpreted(self, dtype) if bitcast else _rounded(self, dtype))

    def permute(self, order: Sequence[int]) -> Block:
        return block(self.transpose(order))

    def split(self) -> tuple[Block, Block]:
        return block(self[..., 0]), block(self[..., 1])


class Scalar(int):
    """A whole number that is the same for all threads."""

    def to(self, dtype: Any) -> Any:
        return float(self) if dtype == "float32" else self


def _closed(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def apply(*args: Any) -> Any:
        result = plain(*args)
        return Scalar(result) if type(result) is int else result

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "neg"):
    setattr(Scalar, f"__{_name}__", _closed(f"__{_name}__"))


def block(values: Any) -> Block:
    return np.asarray(values).view(Block)


def _reinterpreted(values: np.ndarray, dtype: str) -> np.ndarray:
    """The same bits: as floats, which are in 32 bits here, or as whole numbers, which may be in more."""
    if dtype == "bfloat16":
        return (np.asarray(values, np.int32) << 16).view(np.float32)
    bits = np.asarray(values, np.int32) if dtype == "float32" else np.ascontiguousarray(values)
    found = bits.view(dtype)
    return found if found.dtype.kind == "i" else found.astype(np.float32)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in NARROW:  # products of such numbers are exact in 32 bits
        return torch.from_numpy(np.array(values, np.float32)).to(NARROW[dtype]).float().numpy()
    return np.asarray(values).astype(dtype)


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


def _numeric(call: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        result = call(*values)
        if np.ndim(result):
            return block(result)
        return Scalar(result) if np.asarray(result).dtype.kind in "iu" else float(result)

    return apply


def _exp2(values: Any) -> Any:
    return np.exp2(np.asarray(values, np.float32))


def _reduced(call: Callable[..., Any]) -> Callable[..., Any]:
    def apply(values: Block, axis: int | None = None) -> Any:
        found = call(np.asarray(values), axis=axis)
        if found.ndim:
            return block(found)
        return Scalar(found) if found.dtype.kind in "iu" else found[()]

    return apply


def _asm(text: str, constraints: str, args: Sequence[Any], dtype: Any, **_: Any) -> Any:
    if text.startswith("cvt.rn."):
        high, low = (_bits(each, "bfloat16" if "bf16" in text else "float16") for each in reversed(args))
        return block(low | high << 16)
    if "e4m3x2" in text:
        return block(sum(_bytes(each) << 8 * place for place, each in enumerate(args)))
    (value,) = args
    if dtype == "float8e4nv":  # four numbers of one word, which it was joined with itself for
        return _of_bytes(np.asarray(value) >> 8 * (np.arange(value.shape[-1]) % 4))
    if text.startswith("bar."):
        for action, name, threads in re.findall(r"bar\.(\w+) (\d+), (\d+);", text):
            _here.named.setdefault(name, Turn()).meet(int(threads), action == "sync")
    if text.startswith("mov.b32 {"):
        return tuple(_of_bits(np.asarray(value) >> 16 * part, each) for part, each in enumerate(dtype))
    return block(np.tanh(value)) if text.startswith("tanh") else value


def _bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Those of 16-bit floats, from below in 32."""
    kind = getattr(torch, dtype)
    found = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(kind).view(torch.int16)
    return found.numpy().astype(np.int32) & 0xFFFF


def _of_bits(words: np.ndarray, dtype: str) -> Block:
    found = torch.from_numpy(words.astype(np.int16)).view(getattr(torch, dtype))
    return block(found.float().numpy())


def _bytes(values: np.ndarray) -> np.ndarray:
    """The bits of 8-bit floats."""
    found = torch.from_numpy(np.array(values, np.float32)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return found.numpy().astype(np.int64)


def _of_bytes(words: np.ndarray) -> Block:
    found = torch.from_numpy((words & 0xFF).astype(np.uint8)).view(torch.float8_e4m3fn)
    return block(found.float().numpy())


def _where(condition: Any, yes: Any, no: Any) -> Any:
    found = np.where(condition, yes, no)
    if not found.ndim:
        return Scalar(found) if found.dtype.kind in "iu" else found[()]
    return block(found.astype(np.float32) if found.dtype.kind == "f" else found)


_FUNCTIONS = ("log2", "log", "exp", "abs", "sqrt", "floor", "sin", "cos", "maximum", "minimum")


class _SharedLayout:
    def __init__(self, **_: Any) -> None:
        pass

    @staticmethod
    def get_default_for(box: Sequence[int], dtype: str) -> None:
        return None


def _language() -> types.SimpleNamespace:
    shapeless = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout", "SwizzledSharedLayout")
    names: dict[str, Any] = {name: lambda *_, **__: types.SimpleNamespace(value=None) for name in shapeless}
    names |= {name: name for name in ("float16", "bfloat16", "float8e4nv", "float32", "int16", "int32", "int64")}
    names |= {name: _numeric(getattr(np, name)) for name in _FUNCTIONS}
    return types.SimpleNamespace(
        **names,
        constexpr=lambda value: value,
        exp2=_numeric(_exp2),
        arange=lambda start, stop, layout=None: block(np.arange(start, stop)),
        full=lambda shape, value, dtype, layout: block(np.full(shape, value, np.float32 if dtype == "float32" else np.int64)),
        where=_where,
        dot=lambda a, b: block(np.asarray(a, np.float32) @ np.asarray(b, np.float32)),
        max=_reduced(np.max),
        min=_reduced(np.min),
        sum=_reduced(np.sum),
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
