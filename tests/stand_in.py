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

    def expect(self, sizes: Sequence[int]) -> None:
        """Note parameters of such sizes at each launch."""
        for place, size in enumerate(sizes):
            (ctypes.c_int * 512).in_dll(self.library, "sizes")[place] = size
        ctypes.c_int.in_dll(self.library, "count").value = len(sizes)

    def last(self) -> str:
        """Grid, block, shared memory, stream, function and parameters of the last launch."""
        config = (ctypes.c_char * 48).in_dll(self.library, "config").raw
        return (config + (ctypes.c_char * (1 << 16)).in_dll(self.library, "bytes").raw[: self.value("used")]).hex()


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
    """A kernel whose launches end in the stand-in, on CPU tensors; results always lie at the same place."""

    def __init__(self, path: Path, driver: Driver) -> None:
        import torch

        from attngen.interpret import import_file

        self.module: ModuleType = import_file(path)
        self.driver = driver
        self.anew = 0  # launches that went through Triton
        self.results: dict[tuple[Any, ...], Any] = {}
        self.device = -1
        takes = inspect.signature(self.module.launch).parameters
        behind = path.with_suffix(".behind.pt")
        self.others: dict[str, Any] = {"again": lambda *_, **__: None} if "again" in takes else {}
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

    def empty(self, size: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Any:
        import torch

        key = (size, strides, dtype)
        if key not in self.results:
            self.results[key] = torch.zeros(1, dtype=dtype).new_empty(size)
        return self.results[key]

    def counting(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            import torch

            self.anew += 1
            plain = torch.empty
            torch.empty = lambda size, dtype, device: self.empty(tuple(size), plain(size, device="meta").stride(), dtype)
            try:
                return launch(*inputs)
            finally:
                torch.empty = plain

        return counted

    def launch(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """What one launch came to."""
        before, launches = self.anew, self.driver.value("launches")
        result = self.module.launch(*inputs, **self.others)
        return {
            "anew": self.anew - before,
            "launches": self.driver.value("launches") - launches,
            "call": self.driver.last(),
            "none": result is None,
            "known": len(self.module.READY),
            "compiled": len(self.module.COMPILED),
        }


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
    """One launch after another: of the same tensors, of others laid out alike, with hooks, of other layouts."""
    told: dict[str, Any] = {"first": trial.launch(inputs)}
    trial.driver.expect(parameters(next(iter(trial.module.COMPILED.values()))))
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
    for name, changed in variants(inputs, hasattr(trial.module, "suits")).items():
        told[name] = [trial.launch(changed) for _ in range(2)]
        trial.module.latest = None  # as if something else came between
        told[name].append(trial.launch(changed))
    told["back"] = trial.launch(inputs)
    told["one tensor"] = trial.launch([inputs[0]] * 3 + inputs[3:])
    told["kept"] = kept(trial, inputs)
    return told


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


def variants(inputs: list[Any], typed: bool) -> dict[str, list[Any]]:
    """The same problem with other strides, beginning elsewhere and, unless kernels are of one type, in another one."""
    import torch

    q, k, v, *extras = inputs
    other = torch.bfloat16 if q.dtype == torch.float16 else torch.float16
    apart = [x.new_empty(*x.shape[:-1], x.shape[-1] + 8)[..., : x.shape[-1]] for x in (q, k, v)]
    return {
        **({} if typed else {"dtype": [*(x.to(other) for x in (q, k, v)), *extras]}),
        "strides": [*apart, *extras],
        "address": [q.new_empty(q.numel() + 8).as_strided(q.shape, q.stride(), 1), k, v, *extras],
    }


def main(folder: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing real, wherever this runs
    driver = Driver(build(folder))
    import torch

    for source in sorted(folder.glob("*.py")):
        driver.expect([])
        told = story(Trial(source, driver), torch.load(source.with_suffix(".pt"), weights_only=True))
        source.with_suffix(".json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
