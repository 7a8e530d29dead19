"""Between replacing and running, on a GPU: distinct kernels compile side by side while Inductor works on the rest.

Child processes compile into Triton's disk cache, where the first launch finds the result. A marker remembers what has been
compiled for which GPU and Triton, so that a warm process starts no compiler at all. Verification, where asked for, runs
each kernel once on random inputs of the problem's own size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from attngen import aot, compat, verify
from attngen.aot import Compilation, Job, Layout
from attngen.device import Device
from attngen.emit import Kernel
from attngen.errors import AttngenError, VerificationFailed
from attngen.paths import cache_dir, write_atomically
from attngen.runtime import import_kernel, kernel_path
from attngen.spec import Problem, digest
from attngen.verify import Check

log = logging.getLogger("attngen")
VERIFY_ELEMENTS = 1 << 28  # scores of one verification; larger problems are verified on fewer heads


@dataclass(frozen=True)
class Use:
    """A kernel, and the problem and tensor layouts of the first site that needs it."""

    kernel: Kernel
    problem: Problem
    inputs: tuple[Layout, ...]


@dataclass(frozen=True)
class Pending:
    """Kernels that are being compiled; ``finish`` waits for them."""

    compilation: Compilation | None
    markers: tuple[Path, ...]

    def finish(self) -> None:
        """Wait. A kernel that does not compile is only logged here: launching it reports the compiler's error."""
        if self.compilation is None:
            return
        for result, marker in zip(self.compilation.results(), self.markers, strict=True):
            if isinstance(result, VerificationFailed):
                log.warning("%s", result)
            else:
                write_atomically(marker, json.dumps(asdict(result)))


def begin(uses: Sequence[Use], device: Device) -> Pending:
    """Start compiling what has not been compiled before for ``device``."""
    if device.backend != "cuda" or not compat.has_triton():
        return Pending(None, ())
    pairs = [(use, _marker(use, device)) for use in uses]
    missing = [(use, marker) for use, marker in pairs if not marker.exists()]
    if not missing:
        return Pending(None, ())
    jobs = [Job(kernel_path(use.kernel), use.inputs) for use, _ in missing]
    assert isinstance(device.arch, int)
    return Pending(aot.begin(jobs, device.arch), tuple(marker for _, marker in missing))


def _marker(use: Use, device: Device) -> Path:
    key = digest(f"{use.kernel.name}\n{use.inputs}\n{device.arch}\n{compat.triton_build()}")
    return cache_dir() / "compiled" / f"{key}.json"


def verified(use: Use, device: torch.device | str) -> Check | AttngenError:
    """The kernel run on ``device`` on random inputs of the problem's sizes (fewer heads if that is very many pairs)."""
    spec, problem = use.kernel.spec, use.problem
    if problem.heads * problem.rows * problem.keys > VERIFY_ELEMENTS and problem.batch:
        problem = Problem((1, *problem.batch[1:]), problem.rows, problem.keys, problem.dynamic)
    inputs = verify.samples_for(use.kernel, problem, device=device)
    try:
        check = verify.check(import_kernel(kernel_path(use.kernel)).launch(*inputs), spec, inputs)
    except AttngenError as failed:
        return failed
    return check if check.ok else VerificationFailed(f"the kernel's result is off: {check}")


def require(uses: Sequence[Use], device: torch.device | str) -> None:
    """Verify each kernel. Raises ``VerificationFailed`` for the first that is off."""
    for use in uses:
        result = verified(use, device)
        if isinstance(result, AttngenError):
            raise result
        log.info("%s: %s", use.kernel.name, result)
