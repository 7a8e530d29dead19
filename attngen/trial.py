"""Emitted kernels put to the test: compiled ahead of time for the device, and checked against float64.

On the GPU that was planned for, a kernel is checked at the sizes of its site. Anywhere else it is checked in Triton's
interpreter or in the simulator, at sizes small enough for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch

from attngen import advice, aot, prepare, verify
from attngen.aot import Binary, Compilation, Job
from attngen.compat import FloorDiv
from attngen.device import Device
from attngen.errors import AttngenError, Unavailable
from attngen.index import Axis
from attngen.prepare import Use
from attngen.report import Report, SiteReport
from attngen.runtime import kernel_path
from attngen.spec import AttentionSpec, Problem, Tile
from attngen.verify import Check

SMALL_BATCH = 2  # of each batch axis in the interpreter: enough to tell neighbours apart
EXTRA_ROWS = 17  # beyond one tile: a second, partial one
FAILED = "its kernel failed"  # how the reason of a site begins whose kernel does not compile or is off

Results = Mapping[str, Check | AttngenError]
Binaries = Mapping[str, Binary | AttngenError]


def begin(uses: Sequence[Use], device: Device) -> Compilation:
    """Start compiling every kernel for ``device``. Raises ``Unavailable``, saying why, where that cannot be done."""
    if not isinstance(device.arch, int):
        raise Unavailable(f"that is done for NVIDIA devices, not for {device.label}")
    return aot.begin([Job(kernel_path(use.kernel), use.inputs) for use in uses], device.arch)


def check(uses: Sequence[Use], card: str | None) -> Results:
    """Each kernel held against float64: on ``card`` if it is given, else in a child process. Raises ``Unavailable``."""
    if card is not None:
        return {use.kernel.name: prepare.verified(use, card) for use in uses}
    jobs = [(use.kernel, small(use.kernel.spec, use.problem, use.kernel.tile)) for use in uses]
    return dict(zip((use.kernel.name for use in uses), verify.verify_all_interpreted(jobs), strict=True))


def substitution(uses: Sequence[Use]) -> str:
    """What the interpreter computes in another type than the model, to be said aside."""
    interpreted = (use for use in uses if verify.in_interpreter(use.kernel))
    return " (bfloat16 as float16)" if any(torch.bfloat16 in _dtypes(use) for use in interpreted) else ""


def places(uses: Sequence[Use]) -> str:
    """Where kernels are checked without a GPU, in words."""
    return " and ".join(sorted({verify.place(use.kernel) for use in uses}))


def _dtypes(use: Use) -> set[torch.dtype]:
    return {source.dtype for source in use.kernel.spec.inputs}


def small(spec: AttentionSpec, problem: Problem, tile: Tile) -> Problem:
    """A problem for the interpreter: the same, but few of each batch axis and a little more than one tile.

    Heads that share keys stay together: of such an axis there are two whole groups.
    """
    length = max(tile.rows, tile.keys) + EXTRA_ROWS
    few = [SMALL_BATCH * _group(spec, axis) for axis in spec.batch]
    batch = tuple(min(pair) for pair in zip(few, problem.batch, strict=True))
    return Problem(batch, min(problem.rows, length), min(problem.keys, length))


def _group(spec: AttentionSpec, axis: Axis) -> int:
    """How many neighbours on ``axis`` read the same element of some input."""
    divisions = [division for source in spec.inputs for place in source.index for division in place.atoms(FloorDiv)]
    sizes = [int(by) for what, by in (division.args for division in divisions) if what.has(axis) and by.is_Integer]
    return math.lcm(*sizes)


def applied(report: Report, results: Results, binaries: Binaries) -> Report:
    """The report with what came out. A site whose kernel failed counts as missed: nobody should use that kernel."""
    sites = (_applied(site, results.get(site.kernel), binaries.get(site.kernel)) for site in report.sites)
    return replace(report, sites=tuple(sites))


def _applied(site: SiteReport, result: Check | AttngenError | None, binary: Binary | AttngenError | None) -> SiteReport:
    for failed in (binary, result):
        if isinstance(failed, AttngenError):
            return replace(site, status="missed", reason=f"{FAILED}: {failed}", advice=advice.on(FAILED))
    if isinstance(result, Check):
        site = replace(site, error=result.error, budget=result.budget)
    return replace(site, compiled=asdict(binary)) if isinstance(binary, Binary) else site
