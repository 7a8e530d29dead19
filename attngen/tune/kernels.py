"""The kernel of a candidate, and what there is to compile of it."""

from __future__ import annotations

from dataclasses import replace

from attngen import prepare, runtime
from attngen.aot import Job
from attngen.cache.key import FORWARD
from attngen.emit import BackwardKernel, Kernel, emit, emit_backward
from attngen.errors import Miss
from attngen.spec import PORTABLE, Tile
from attngen.tune.messages import Task


def kernel_of(task: Task, tiles: tuple[Tile, ...]) -> Kernel | BackwardKernel | Miss:
    """One that leaves rows to others leaves them to the first portable candidate."""
    spec, device = task.wanted.spec, task.wanted.device
    if task.wanted.phase == FORWARD:
        return emit(spec, tiles[0], l2_bytes=device.l2_bytes, sms=device.sms)
    kernel = emit_backward(spec, tiles, l2_bytes=device.l2_bytes)
    portable = next((each for each in task.candidates if each[0].family == PORTABLE), None)
    if isinstance(kernel, Miss) or not kernel.leaves_rows or portable is None:
        return kernel
    other = kernel_of(task, portable)
    return replace(kernel, otherwise=other if isinstance(other, BackwardKernel) else None)


def job_of(task: Task, tiles: tuple[Tile, ...]) -> Job | None:
    """None where there is no kernel."""
    kernel = kernel_of(task, tiles)
    if isinstance(kernel, Miss):
        return None
    inputs = task.wanted.inputs
    if isinstance(kernel, Kernel):
        return Job(runtime.kernel_path(kernel), inputs)
    results = prepare.results_of(task.wanted.spec, task.wanted.problem)
    again = runtime.kernel_path(kernel.otherwise) if kernel.otherwise else None
    return Job(runtime.kernel_path(kernel), (*results, *inputs), again)
