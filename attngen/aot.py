"""Compile emitted kernels ahead of time, for any named GPU, with or without one in the machine.

``launch`` of the kernel file is called on meta tensors with the kernel replaced by a recorder, so that what is compiled
is specialised exactly as Triton would specialise it for such tensors (16-byte alignment, strides of one). What is built
goes to Triton's disk cache, where a later launch on the same kind of GPU finds it.

Triton holds the interpreter lock while it compiles: several kernels are compiled by child processes
(``python -m attngen.aot``, jobs and results as JSON), which also leaves the parent free to do something else meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from attngen import compat, processes
from attngen.errors import Unavailable, VerificationFailed
from attngen.interpret import import_file

SECONDS = 120.0  # one kernel may take to compile
KERNEL = "attention_forward"
BACKWARD = "backward_"  # names of kernels for gradients begin so
KNOWN = ("COMPILED", "READY", "FOUND", "WRITERS")  # what modules remember of earlier launches
BEFORE = ("find_bounds", "quantise")  # kernels that run before them, where there are such


@dataclass(frozen=True)
class Layout:
    """What a kernel can know of a tensor: shape, strides and offset in elements, dtype by name."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: str

    def meta(self) -> Tensor:
        dtype = getattr(torch, self.dtype)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        storage = torch.empty(last + 1, dtype=dtype, device="meta")
        return storage.as_strided(self.shape, self.strides, self.offset)


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a real, fake or meta tensor; symbolic sizes count as what they were when traced."""
    shape, strides = (tuple(map(compat.hint, sizes)) for sizes in (tensor.shape, tensor.stride()))
    return Layout(shape, strides, compat.hint(tensor.storage_offset()), str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Job:
    """A kernel file and the layouts of the tensors it will be launched on; ``again`` is that of kernels it leaves rows to."""

    source: Path
    inputs: tuple[Layout, ...]
    again: Path | None = None

    @classmethod
    def of(cls, source: Path, inputs: Sequence[Tensor]) -> Job:
        return cls(source, tuple(map(layout_of, inputs)))


@dataclass(frozen=True)
class Binary:
    """What came out for one kernel and GPU.

    ``spills`` are bytes of stack per thread; ``hgmma`` says that Hopper's own tensor-core instructions are used.
    """

    arch: int
    registers: int
    spills: int
    shared: int
    warps: int
    stages: int
    hgmma: bool
    ptx_bytes: int
    cubin_bytes: int
    seconds: float


# ------------------------------------------------------------------------------------------------------ one compilation


class _Recorder:
    """Stands in for a kernel: remembers its last launch, and ``all`` of them, instead of running any."""

    def __init__(self) -> None:
        self.all: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        self.grid = grid
        return self._record

    def _record(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options
        self.all.append((args, options))


Again = Callable[..., None]


def _nothing(*args: Any, **options: Any) -> None:
    """The launch of kernels that rows are left to, where those do not matter."""


def launch_of(module: ModuleType, inputs: Sequence[Layout]) -> _Recorder:
    """The kernel call that ``module.launch`` makes for such inputs; nothing runs, and the module is not changed."""
    return calls_of(module, inputs)[KERNEL]


def calls_of(module: ModuleType, inputs: Sequence[Layout], again: Again = _nothing) -> dict[str, _Recorder]:
    """The same for each of its kernels; it may call ``again`` last."""
    tensors = [layout.meta() for layout in inputs]
    return _recorded(module, lambda launch: launch(*tensors, **_others(launch, again)))


def backward_launches_of(module: ModuleType, inputs: Sequence[Layout], again: Again = _nothing) -> dict[str, _Recorder]:
    """The kernel calls that ``launch`` of a backward module makes for such inputs, by kernel; it may call ``again`` last."""
    tensors = [layout.meta() for layout in inputs]

    def call(launch: FunctionType) -> None:
        others = _others(launch, again)
        if launch(*tensors, **others) is None:  # it makes no gradients but those of the operands
            launch(*tensors, **others, **{name: False for name in _parameters(launch) if name.startswith("need_")})

    return _recorded(module, call)


def standby_launches_of(module: ModuleType, other: ModuleType, inputs: Sequence[Layout]) -> dict[str, _Recorder]:
    """The kernel calls of ``other``, as it is launched behind those of ``module``, which leave rows to it."""
    found: list[tuple[Any, dict[str, Any]]] = []
    launches_of = calls_of if hasattr(module, KERNEL) else backward_launches_of
    launches_of(module, inputs, lambda *args, **options: found.append((args, options)))
    args, options = found[-1]
    return _recorded(other, lambda launch: launch(*args, **options))


def _others(launch: FunctionType, again: Again) -> dict[str, Again]:
    return {"again": again} if "again" in _parameters(launch) else {}


def _parameters(launch: FunctionType) -> tuple[str, ...]:
    return launch.__code__.co_varnames[: launch.__code__.co_argcount]


def _recorded(module: ModuleType, call: Callable[[FunctionType], object]) -> dict[str, _Recorder]:
    """What ``call`` of the launch that asks Triton has it launch, where nothing is known of earlier launches."""
    launch = module.launch_anew
    recorders = {name: _Recorder() for name in vars(module) if name in (*BEFORE, KERNEL) or name.startswith(BACKWARD)}
    known = {**vars(module), **recorders, **{name: {} for name in KNOWN}, "deterministic": lambda: False}
    call(FunctionType(launch.__code__, known, argdefs=launch.__defaults__))
    return {name: recorder for name, recorder in recorders.items() if hasattr(recorder, "args")}


def compile_for(job: Job, arch: int) -> Binary:
    """Compile a kernel file in this process for a CUDA compute capability (90 for sm_90): all kernels that it launches.

    Raises ``VerificationFailed`` with the compiler's complaint, ``Unavailable`` without Triton.
    """
    if not compat.has_triton():
        raise Unavailable("kernels cannot be compiled here: triton is not installed (pip install triton, Linux only)")
    started = time.perf_counter()
    try:
        module = import_file(job.source)
        alone = hasattr(module, KERNEL)
        built = _built(module, calls_of(module, job.inputs) if alone else backward_launches_of(module, job.inputs), arch)
        if job.again is not None:
            other = import_file(job.again)
            _built(other, standby_launches_of(module, other, job.inputs), arch)
    except Exception as error:  # the compiler raises errors of many kinds, from several libraries
        raise VerificationFailed(f"{job.source.name} does not compile for sm_{arch}: {_last_line(error)}") from error
    several = [built[KERNEL]] if alone else built.values()  # what runs before it is small
    counted = [each for made in several for each in made]
    return _merged([_binary(compiled, arch) for compiled in counted], time.perf_counter() - started)


def _built(module: ModuleType, calls: dict[str, _Recorder], arch: int) -> dict[str, list[Any]]:
    return {
        name: [compat.compile_kernel(getattr(module, name), *each, arch) for each in call.all] for name, call in calls.items()
    }


def _binary(compiled: Any, arch: int) -> Binary:
    registers, spills = _resources(compiled.asm["cubin"])
    metadata = compiled.metadata
    return Binary(
        arch=arch,
        registers=registers,
        spills=spills,
        shared=metadata.shared,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        hgmma="wgmma.mma_async" in compiled.asm["ptx"],
        ptx_bytes=len(compiled.asm["ptx"]),
        cubin_bytes=len(compiled.asm["cubin"]),
        seconds=0.0,
    )


def _merged(binaries: Sequence[Binary], seconds: float) -> Binary:
    """Of several kernels of one file, the most of each."""
    names = ("registers", "spills", "shared", "warps", "stages", "ptx_bytes", "cubin_bytes")
    most = {name: max(getattr(binary, name) for binary in binaries) for name in names}
    return Binary(arch=binaries[0].arch, hgmma=any(b.hgmma for b in binaries), seconds=seconds, **most)


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[-1]}"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of each thread, by the tool that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [compat.cuobjdump(), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if found is None:
        raise Unavailable(f"cuobjdump says nothing of registers: {text.strip()}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


# ------------------------------------------------------------------------------------------------- many, in parallel


@dataclass
class Compilation:
    """Jobs that child processes are compiling; ``results`` waits for them."""

    _children: list[tuple[list[int], subprocess.Popen[str]]]
    _count: int
    _timeout: float

    def results(self, within: float | None = None) -> list[Binary | VerificationFailed]:
        """One result per job, in order. Never raises for a kernel: what failed is in its place."""
        done: list[Binary | VerificationFailed | None] = [None] * self._count
        deadline = time.monotonic() + (self._timeout if within is None else within)
        for numbers, child in self._children:
            for number, result in zip(numbers, _collect(child, deadline, len(numbers)), strict=True):
                done[number] = result
        return [result for result in done if result is not None]


def begin(jobs: Sequence[Job], arch: int, *, workers: int | None = None) -> Compilation:
    """Start compiling ``jobs`` for sm_``arch`` in child processes, and return at once."""
    if not compat.has_triton():
        raise Unavailable("kernels cannot be compiled here: triton is not installed (pip install triton, Linux only)")
    workers = min(len(jobs), workers or os.cpu_count() or 1)
    children = []
    for worker in range(workers):
        numbers = list(range(worker, len(jobs), workers))
        children.append((numbers, _child([jobs[n] for n in numbers], arch)))
    return Compilation(children, len(jobs), SECONDS * max((len(numbers) for numbers, _ in children), default=0))


def compile_all(jobs: Sequence[Job], arch: int, *, workers: int | None = None) -> list[Binary | VerificationFailed]:
    """Compile ``jobs`` for sm_``arch`` in parallel and wait for all of them."""
    return begin(jobs, arch, workers=workers).results()


def _child(jobs: list[Job], arch: int) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    pipe = subprocess.PIPE
    command = processes.command("attngen.aot")
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    request = [{**asdict(job), "source": str(job.source), "again": job.again and str(job.again)} for job in jobs]
    assert child.stdin is not None
    child.stdin.write(json.dumps({"arch": arch, "jobs": request}))
    child.stdin.close()
    child.stdin = None  # so that communicate() does not write to it again
    return child


def _collect(child: subprocess.Popen[str], deadline: float, count: int) -> list[Binary | VerificationFailed]:
    try:
        output, complaint = child.communicate(timeout=max(0.0, deadline - time.monotonic()))
        *_, last = complaint.strip().splitlines() or ["no message"]
        ending = f"the compiler's process ended with code {child.returncode}: {last}"
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        ending = "compiling took too long and was stopped"
    results: list[Binary | VerificationFailed] = []
    for line in output.splitlines():
        answer = json.loads(line)
        failure = answer.get("error")
        results.append(Binary(**answer) if failure is None else VerificationFailed(failure))
    return results + [VerificationFailed(ending)] * (count - len(results))


def main() -> None:
    """Compile the jobs on standard input one by one, and answer each with a line of JSON."""
    request = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr  # what compilers print is no answer
    for job in request["jobs"]:
        inputs = tuple(Layout(tuple(i["shape"]), tuple(i["strides"]), i["offset"], i["dtype"]) for i in job["inputs"])
        try:
            again = Path(job["again"]) if job["again"] else None
            answer = asdict(compile_for(Job(Path(job["source"]), inputs, again), request["arch"]))
        except (VerificationFailed, Unavailable) as failed:
            answer = {"error": str(failed)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
