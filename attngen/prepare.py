"""Between replacing and running, on a GPU: distinct kernels compile side by side while Inductor works on the rest.

Child processes compile into Triton's disk cache, where the first launch finds the result. A marker remembers what has been
compiled for which GPU and Triton, so that a warm process starts no compiler at all. Verification, where asked for, runs
each kernel once on random inputs of the problem's own size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from attngen import aot, compat, verify
from attngen.aot import Compilation, Job, Layout
from attngen.device import Device
from attngen.emit import BackwardKernel, Kernel
from attngen.errors import AttngenError, VerificationFailed
from attngen.paths import folder, kept
from attngen.runtime import kernel_path, launch_of
from attngen.spec import ROW, AttentionSpec, Problem, digest
from attngen.verify import Check

log = logging.getLogger("attngen")
VERIFY_ELEMENTS = 1 << 28  # scores of one verification; larger problems are verified on fewer heads, and shorter
SHORTEST = 1024  # that a length is cut down to


@dataclass(frozen=True)
class Use:
    """A kernel, and the problem and tensor layouts of the first site that needs it."""

    kernel: Kernel
    problem: Problem
    inputs: tuple[Layout, ...]
    backward: BackwardKernel | None = None

    @property
    def jobs(self) -> list[Job]:
        """What there is to compile."""
        jobs = [job_of(self.kernel, self.inputs)]
        if self.backward is not None:
            jobs.append(job_of(self.backward, (*results_of(self.kernel.spec, self.problem), *self.inputs)))
        return jobs


def job_of(kernel: Kernel | BackwardKernel, inputs: tuple[Layout, ...]) -> Job:
    """What compiling it takes, with the kernel that it leaves rows to."""
    other = kernel.otherwise if kernel.leaves_rows else None
    return Job(kernel_path(kernel), inputs, kernel_path(other) if other else None)


@dataclass(frozen=True)
class Pending:
    """Kernels that are being compiled; ``finish`` waits for them."""

    compilation: Compilation | None
    markers: tuple[str, ...]

    def finish(self) -> None:
        """Wait. A kernel that does not compile is only logged here: launching it reports the compiler's error."""
        if self.compilation is None:
            return
        for result, marker in zip(self.compilation.results(), self.markers, strict=True):
            if isinstance(result, VerificationFailed):
                log.warning("%s", result)
            else:
                kept(marker, json.dumps(asdict(result)))


def begin(uses: Sequence[Use], device: Device) -> Pending:
    """Start compiling what has not been compiled before for ``device``."""
    if device.backend != "cuda" or not compat.has_triton():
        return Pending(None, ())
    pairs = [(job, _marker(job, device)) for use in uses for job in use.jobs]
    missing = [(job, marker) for job, marker in pairs if not (folder() / marker).exists()]
    if not missing:
        return Pending(None, ())
    assert isinstance(device.arch, int)
    return Pending(aot.begin([job for job, _ in missing], device.arch), tuple(marker for _, marker in missing))


def results_of(spec: AttentionSpec, problem: Problem) -> tuple[Layout, ...]:
    """The layouts of what a backward gets beside the inputs: the gradient of the output, the output, the log-sum-exp."""
    sizes = verify.extents(spec, problem)
    out = aot.layout_of(torch.empty([sizes[axis] for axis in spec.output], dtype=spec.out_dtype, device="meta"))
    lse = aot.layout_of(torch.empty([sizes[axis] for axis in (*spec.batch, ROW)], device="meta"))
    return out, out, lse


def _marker(job: Job, device: Device) -> str:
    files = f"{job.source.stem} {job.again.stem}" if job.again else job.source.stem
    key = digest(f"{files}\n{job.inputs}\n{device.arch}\n{compat.triton_build()}")
    return f"compiled/{key}.json"


def verified(use: Use, device: torch.device | str) -> Check | AttngenError:
    """The kernel run on ``device`` on random inputs of the problem's sizes (of smaller ones if that is very many pairs)."""
    spec, problem = use.kernel.spec, reduced(use.problem)
    inputs = verify.samples_for(use.kernel, problem, device=device)
    try:
        check = verify.check(launch_of(use.kernel)(*inputs), spec, inputs)
    except AttngenError as failed:
        return failed
    return check if check.ok else VerificationFailed(f"the kernel's result is off: {check}")


def reduced(problem: Problem, most: int = VERIFY_ELEMENTS) -> Problem:
    """``problem``, or one of fewer heads and then of shorter lengths that has at most so many scores.

    Multiples of 16 stay such: of strides that are none Triton would compile a kernel anew.
    """

    def half(length: int) -> int:
        return -(-length // 2) if length % 16 else -(-length // 32) * 16

    if problem.heads * problem.rows * problem.keys > most and problem.batch:
        problem = replace(problem, batch=(1, *problem.batch[1:]))
    while problem.heads * problem.rows * problem.keys > most and max(problem.rows, problem.keys) > SHORTEST:
        problem = replace(problem, rows=half(problem.rows), keys=half(problem.keys))
    return problem


def require(uses: Sequence[Use], device: torch.device | str) -> None:
    """Verify each kernel. Raises ``VerificationFailed`` for the first that is off."""
    for use in uses:
        result = verified(use, device)
        if isinstance(result, AttngenError):
            raise result
        log.info("%s: %s", use.kernel.name, result)
