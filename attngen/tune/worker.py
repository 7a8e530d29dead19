"""The process that measures one choice, ``python -m attngen.tune.worker``: a task on standard input, messages on the output.

Each candidate is emitted, launched and held against float64 before its time counts; those that are right are timed in
interleaved calls, each with a flushed L2 cache, on tensors that lie in memory as those of the model do.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attngen import aot, compat, measure, parcel, prepare, runtime, verify, verify_bwd
from attngen.aot import Job, Layout
from attngen.cache.key import FORWARD
from attngen.device import probe
from attngen.emit import BackwardKernel, Kernel
from attngen.errors import AttngenError, Miss, Unavailable, VerificationFailed
from attngen.measure import Clock
from attngen.spec import HOPPER, Problem, Tile
from attngen.tune.kernels import job_of, kernel_of
from attngen.tune.messages import LONGEST_REASON, Message, Task

CHECKED = 1 << 26  # scores that a candidate is checked on; see prepare.reduced
AHEAD = 60.0  # seconds that compiling side by side may take
CHUNK = 5  # rounds between two words on how it stands

Launch = Callable[..., Any]
Say = Callable[[Message], None]


@dataclass(frozen=True)
class Machine:
    """Where kernels run, and how calls are timed; ``ahead`` may compile all of them side by side before the first runs."""

    device: str
    launch: Callable[[Kernel | BackwardKernel], Launch]
    clock: Clock
    ahead: Callable[[Sequence[Job]], object] = len


def on_gpu(task: Task) -> Machine:
    """The card here. Raises ``Unavailable`` if it is not the one that the choice is for."""
    if (here := probe()) != task.wanted.device:
        raise Unavailable(f"this is the {here.label}, not the {task.wanted.device.label}")

    def ahead(jobs: Sequence[Job]) -> None:
        if isinstance(here.arch, int) and compat.has_triton():
            aot.begin(jobs, here.arch).results(AHEAD)  # one that does not compile will say so itself

    return Machine("cuda", runtime.launch_of, Clock("cuda"), ahead)


def serve(machine: Callable[[Task], Machine], works: Callable[[Any, Machine, Say], None] | None = None) -> None:
    """Answer the one task that comes in, and end when nobody listens any more. ``works`` does it in place of ``work``."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def say(message: Message) -> None:
        answers.write(message.model_dump_json() + "\n")

    length = int.from_bytes(sys.stdin.buffer.read(8), "little")
    task: Task = parcel.unpacked(sys.stdin.buffer.read(length))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_grad_enabled(False)
    try:
        (works or work)(task, machine(task), say)
    except Unavailable as problem:
        say(Message(event="broke", reason=reason_of(problem)))


def _end_with_parent() -> None:
    """The input ends when the parent has what it wants, or is no more; then even a call that hangs is given up."""
    os.read(0, 1)
    os._exit(1)


def work(task: Task, machine: Machine, say: Say) -> None:
    """Check and time every candidate that is not lost. A failure is the candidate's alone, unless it cost the device."""
    try:
        trial = Forward(task, machine) if task.wanted.phase == FORWARD else Backward(task, machine)
    except Exception as problem:  # there is no memory for what they are held against, say
        say(Message(event="broke", reason=reason_of(problem)))
        return
    runs: dict[str, measure.Run] = {}

    def began(name: str) -> None:
        say(Message(event="began", candidate=int(name)))

    def failed(name: str, problem: Exception) -> None:
        runs.pop(name, None)
        problem.__traceback__ = None  # it holds the tensors of every frame
        say(Message(event="failed", candidate=int(name), reason=reason_of(problem)))
        measure.synchronize(machine.device)  # raises if the device is lost: the next process goes on without this one

    if not task.compiled and not task.lost:
        machine.ahead([job for tiles in task.candidates if (job := job_of(task, tiles)) is not None])
    for number, tiles in enumerate(task.candidates):
        if number in task.lost:
            continue
        began(str(number))
        try:
            runs[str(number)] = trial.checked(tiles)
        except Exception as problem:  # whatever a compiler or a driver raises
            failed(str(number), problem)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for begin in range(0, task.rounds, CHUNK):
        warm_up = 0 if begin else measure.WARM_UP
        count = min(CHUNK, task.rounds - begin)
        for name, times in measure.samples(
            dict(runs), count, machine.clock, warm_up=warm_up, failed=failed, begins=began
        ).items():
            taken[name] += times
            median = 1e3 * measure.summary(taken[name]).median
            say(Message(event="timed", candidate=int(name), microseconds=median))
    say(Message(event="done"))


def reason_of(problem: Exception) -> str:
    if isinstance(problem, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or ["no message"]
    kind = "" if isinstance(problem, AttngenError) else f"{type(problem).__name__}: "
    return f"{kind}{lines[0]}"[:LONGEST_REASON]


# ---------------------------------------------------------------------------------------------------------------- trials


class Forward:
    """What a forward kernel is checked on and timed on."""

    def __init__(self, task: Task, machine: Machine) -> None:
        self._task, self._machine = task, machine
        spec, problem = task.wanted.spec, task.wanted.problem
        self._samples = _samples(task, prepare.reduced(problem, CHECKED), machine)
        self._known = verify.reference(spec, self._samples), verify.eager(spec, self._samples)
        self._inputs = _samples(task, problem, machine)

    def checked(self, tiles: tuple[Tile, ...]) -> measure.Run:
        """A call of its kernel. Raises what is wrong with it."""
        launch = self._machine.launch(_expressed(kernel_of(self._task, tiles)))
        _require(verify.judged(_made(launch(*self._samples)), *self._known).ok, "the kernel's result is off")
        return lambda: _made(launch(*self._inputs))


class Backward:
    """The same for the kernels of gradients; of what is loaded beside operands, only if no candidate leaves those out."""

    def __init__(self, task: Task, machine: Machine) -> None:
        self._task, self._machine = task, machine
        self._small = self._sample(prepare.reduced(task.wanted.problem, CHECKED))
        self._known = verify_bwd.reference(self._small), verify_bwd.eager(self._small)
        self._full = self._sample(task.wanted.problem)

    def _sample(self, problem: Problem) -> verify_bwd.Sample:
        wanted = self._task.wanted
        made = verify_bwd.sample(wanted.spec, problem, device=self._machine.device)
        layouts = (*prepare.results_of(wanted.spec, wanted.problem), *wanted.inputs)
        grad, out, lse, *inputs = arranged((made.grad, made.out, made.lse, *made.inputs), layouts)
        extras = not any(tiles[0].family == HOPPER for tiles in self._task.candidates)
        return verify_bwd.Sample(wanted.spec, tuple(inputs), out, lse, grad, extras)

    def checked(self, tiles: tuple[Tile, ...]) -> measure.Run:
        launch = self._machine.launch(_expressed(kernel_of(self._task, tiles)))
        verdicts = verify_bwd.judged(_made(launch(*self._small.arguments)), self._small, *self._known)
        _require(all(verdict.ok for verdict in verdicts.values()), "the kernel's gradients are off")
        return lambda: _made(launch(*self._full.arguments))


def _samples(task: Task, problem: Problem, machine: Machine) -> list[Tensor]:
    """Tensors with the strides of the model's, whatever their sizes: of anything else Triton would compile a kernel anew."""
    return arranged(verify.sample_inputs(task.wanted.spec, problem, device=machine.device), task.wanted.inputs)


def _expressed(kernel: Any) -> Any:
    if isinstance(kernel, Miss):
        raise VerificationFailed(f"no kernel: {kernel}")
    return kernel


def _made(result: Any) -> Any:
    return _require(result, "the kernel does not take such tensors")


def _require(value: Any, otherwise: str) -> Any:
    if value is None or value is False:
        raise VerificationFailed(otherwise)
    return value


def arranged(values: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """The same values, with the strides and offsets of the layouts."""
    return [_arranged(value, layout) for value, layout in zip(values, layouts, strict=True)]


def _arranged(value: Tensor, layout: Layout) -> Tensor:
    last = layout.offset + sum((size - 1) * stride for size, stride in zip(value.shape, layout.strides, strict=True))
    storage = torch.empty(last + 1, dtype=value.dtype, device=value.device)
    distinct = value
    for dim, stride in enumerate(layout.strides):
        if stride == 0 and value.shape[dim] > 1:
            distinct = distinct.narrow(dim, 0, 1)
    return storage.as_strided(distinct.shape, layout.strides, layout.offset).copy_(distinct).expand(value.shape)


if __name__ == "__main__":
    serve(on_gpu)
