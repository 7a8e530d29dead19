"""The kernel of a candidate, and what there is to compile of it."""

from __future__ import annotations

from dataclasses import replace

from attngen import prepare
from attngen.aot import Job
from attngen.cache.key import FORWARD
from attngen.emit import BackwardKernel, Kernel, emit, emit_backward
from attngen.errors import Miss
from attngen.spec import PORTABLE, Tile
from attngen.tune.messages import Task


def kernel_of(task: Task, tiles: tuple[Tile, ...]) -> Kernel | BackwardKernel | Miss:
    """One that leaves rows to others leaves them to the first portable candidate."""
    spec, device = task.wanted.spec, task.wanted.device
    kernel: Kernel | BackwardKernel | Miss
    if task.wanted.phase == FORWARD:
        kernel = emit(spec, tiles[0], l2_bytes=device.l2_bytes, sms=device.sms)
    else:
        kernel = emit_backward(spec, tiles, l2_bytes=device.l2_bytes, sms=device.sms)
    portable = next((each for each in task.candidates if each[0].family == PORTABLE), None)
    if isinstance(kernel, Miss) or not kernel.leaves_rows or portable is None:
        return kernel
    other = kernel_of(task, portable)
    return kernel if isinstance(other, Miss) else replace(kernel, otherwise=other)  # type: ignore[arg-type]


def job_of(task: Task, tiles: tuple[Tile, ...]) -> Job | None:
    """None where there is no kernel."""
    kernel = kernel_of(task, tiles)
    if isinstance(kernel, Miss):
        return None
    results = () if isinstance(kernel, Kernel) else prepare.results_of(task.wanted.spec, task.wanted.problem)
    return prepare.job_of(kernel, (*results, *task.wanted.inputs))
