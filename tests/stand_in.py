"""Launches without a GPU, down to the driver: Triton compiles for sm_90, and its launcher in C calls ``stand_in.c``.

    python tests/stand_in.py FOLDER

For every kernel ``NAME.py`` of the folder, with its inputs in ``NAME.pt``, writes to ``NAME.json`` what the tests look at. A
process of its own: once a library is loaded as ``libcuda.so.1``, there is no other one.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import os
import subprocess
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

SIZES = {"i1": 4, "i32": 4, "i64": 8}
STREAM = 7


def build(folder: Path) -> Path:
    """The stand-in as a library. Raises ``OSError`` or ``CalledProcessError`` where there is no C compiler."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_suffix(".c")
    command = [os.environ.get("CC", "gcc"), "-O1", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True, capture_output=True)
    return library


class Driver:
    """The library, and Triton on top of it."""

    def __init__(self, library: Path) -> None:
        os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # before anybody else asks for libcuda.so.1
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver

        driver = CudaDriver()
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda device: STREAM
        driver.get_device_capability = lambda device: (9, 0)
        driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        triton.runtime.driver.set_active(driver)

    def value(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, name).value

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, name).value = value

    def expect(self, kernels: Sequence[Any]) -> None:
        """Note the parameters of these, too, at each launch."""
        table = (Known * 64).in_dll(self.library, "kernels")
        for place, compiled in enumerate(kernels):
            sizes = parameters(compiled)
            table[place].function, table[place].count = compiled.function, len(sizes)
            table[place].sizes[: len(sizes)] = sizes
        self.set("known", len(kernels))

    def told(self) -> str:
        """Of each launch since the last question: grid, block, shared memory, stream, function and parameters."""
        noted = (ctypes.c_char * (1 << 18)).in_dll(self.library, "bytes").raw[: self.value("used")].hex()
        self.set("used", 0)
        return noted


class Known(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("count", ctypes.c_int), ("sizes", ctypes.c_int * 512))


def parameters(compiled: Any) -> list[int]:
    """The sizes of all parameters of a kernel, with the two that Triton adds."""
    found = []
    for kind in compiled.src.signature.values():
        if kind.startswith("tensordesc"):
            rank = kind.split("[")[1].split("]")[0].count(",") + 1
            found += [128, *[4] * rank, *[8] * rank]
        elif kind != "constexpr":
            found.append(SIZES.get(kind, 8))
    return [*found, 8, 8]


class Trial:
    """A kernel whose launches end in the stand-in, on CPU tensors; what a call allocates lies where that of the last did."""

    def __init__(self, path: Path, driver: Driver) -> None:
        import torch

        from attngen.interpret import import_file

        self.module: ModuleType = import_file(path)
        self.driver = driver
        self.anew = 0  # calls that went through Triton
        self.slabs = torch.zeros(32, 1 << 17, dtype=torch.int32)
        self.taken = 0
        self.device = -1
        takes = inspect.signature(self.module.launch).parameters
        self.others: dict[str, Any] = {"again": lambda *_, **__: None} if "again" in takes else {}
        self.before = ["grad", "out", "lse"] if "grad" in takes else []  # what comes before queries, keys and values
        self.needs = [name for name in takes if name.startswith("need_")]
        behind = path.with_suffix(".behind.pt")
        if behind.exists():  # it is launched behind another kernel: flags of rows, and results
            self.others = torch.load(behind, weights_only=True)
        through = self.module.launch_anew
        vars(self.module).update(
            current_device=lambda: self.device,
            current_stream=lambda device: STREAM,
            empty=self.empty,
            launch_anew=self.counting(through),
        )
        if hasattr(self.module, "counter"):
            zero = torch.zeros(1, dtype=torch.int32)
            vars(self.module)["counter"] = lambda q, stream: zero

    def empty(self, size: Sequence[int], strides: Sequence[int], dtype: Any) -> Any:
        self.taken += 1
        return self.slabs[self.taken - 1].view(dtype).as_strided(tuple(size), tuple(strides))

    def counting(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            import torch

            self.anew += 1
            plain = torch.empty, torch.zeros

            def make(size: Sequence[int], dtype: Any, device: Any) -> Any:
                return self.empty(size, plain[0](size, device="meta").stride(), dtype)

            torch.empty, torch.zeros = make, lambda *args, **options: make(*args, **options).zero_()
            try:
                return launch(*inputs)
            finally:
                torch.empty, torch.zeros = plain

        return counted

    def launch(self, inputs: Sequence[Any], **others: Any) -> dict[str, Any]:
        """What one call came to."""
        before, launches = self.anew, self.driver.value("launches")
        self.taken = 0
        self.slabs.fill_(7)
        self.driver.told()
        result = self.module.launch(*inputs, **self.others, **others)
        return {
            "anew": self.anew - before,
            "launches": self.driver.value("launches") - launches,
            "call": self.driver.told(),
            "memory": zlib.crc32(self.slabs.numpy()),  # no kernel runs: what was copied, and zeros
            "none": result is None,
            "known": len(self.module.READY),
        }

    def kernels(self) -> list[Any]:
        """What was launched by calls that are known."""
        known = [ready for ready in self.module.READY.values() if ready is not None]
        if hasattr(self.module, "Notes"):
            return [start.__defaults__[0] for *_, launches, _ in known for start, *_ in launches]
        return [start.__defaults__[0] for _, start, *_ in known]


@contextmanager
def hooks() -> Iterator[list[str]]:
    """What is heard of launches."""
    from triton import knobs

    heard: list[str] = []

    def enter(metadata: Any) -> None:
        heard.append(f"enter {metadata.get()['name']}")

    def leave(metadata: Any) -> None:
        heard.append(f"leave {metadata.get()['name']}")

    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        yield heard
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)


def story(trial: Trial, inputs: list[Any]) -> dict[str, Any]:
    """One call after another: of the same tensors, of others laid out alike, with hooks, of other layouts."""
    told: dict[str, Any] = {"first": trial.launch(inputs)}
    trial.driver.expect(trial.kernels())
    told["second"] = trial.launch(inputs)
    others = [x.clone().as_strided(x.shape, x.stride()) for x in inputs]
    told["elsewhere"] = trial.launch(others)
    with hooks() as heard:
        told["hooked"] = trial.launch(others)
    told["heard"] = heard
    told["again"] = trial.launch(others)
    trial.device = 0
    told["other device"] = trial.launch(others)
    trial.device = -1
    for name, changed in variants(trial, inputs).items():
        told[name] = [trial.launch(changed) for _ in range(2)]
        trial.module.latest = None  # as if something else came between
        told[name].append(trial.launch(changed))
    told["back"] = trial.launch(inputs)
    told["one tensor"] = trial.launch(twice(trial, inputs))
    if trial.needs:
        told["less"] = [trial.launch(inputs, **dict.fromkeys(trial.needs, False)) for _ in range(2)]
    told["kept"] = kept(trial, inputs)
    return told


def twice(trial: Trial, inputs: list[Any]) -> list[Any]:
    """One tensor in place of several."""
    if trial.before:
        return [*inputs[:5], inputs[4], *inputs[6:]]
    return [inputs[0]] * 3 + inputs[3:]


def kept(trial: Trial, inputs: list[Any]) -> int:
    """How many tensors are alive because they were launched on."""
    copies = [x.clone().as_strided(x.shape, x.stride()) for x in inputs]
    trial.module.READY.clear()
    trial.module.latest = None
    for _ in range(2):
        trial.launch(copies)
    alive = [weakref.ref(x) for x in copies]
    del copies
    gc.collect()
    return sum(reference() is not None for reference in alive)


def variants(trial: Trial, inputs: list[Any]) -> dict[str, list[Any]]:
    """The same problem with other strides, beginning elsewhere and, unless kernels are of one type, in another one."""
    import torch

    before, (q, k, v, *extras) = inputs[: len(trial.before)], inputs[len(trial.before) :]
    other = torch.bfloat16 if q.dtype == torch.float16 else torch.float16
    apart = [x.new_empty(*x.shape[:-1], x.shape[-1] + 8)[..., : x.shape[-1]] for x in (q, k, v)]
    typed = hasattr(trial.module, "suits") or before
    return {
        **({} if typed else {"dtype": [*(x.to(other) for x in (q, k, v)), *extras]}),
        "strides": [*before, *apart, *extras],
        "address": [*before, q.new_empty(q.numel() + 8).as_strided(q.shape, q.stride(), 1).copy_(q), k, v, *extras],
    }


def main(folder: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing real, wherever this runs
    driver = Driver(build(folder))
    import torch

    for source in sorted(folder.glob("*.py")):
        driver.set("known", 0)
        told = story(Trial(source, driver), torch.load(source.with_suffix(".pt"), weights_only=True))
        source.with_suffix(".json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
