"""The backward kernel of the hopper family in the simulator, at ragged sizes, against float64; and that damage is noticed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from specs import ALIBI, BOTTOM_RIGHT, BY_NAME, CASES, CAUSAL, HALF, QK, SLOPES, Case, H, attention, loaded, softcap, window
from test_hopper import instead, lost, swapped

from attngen import hopper_bwd, simulator, verify_bwd
from attngen.algebra import op
from attngen.emit import BackwardKernel, emit_backward
from attngen.errors import Miss
from attngen.simulator import Promise, Stuck, simulated
from attngen.spec import KEY, ROW, AttentionSpec, Problem
from attngen.verify import Check
from attngen.verify_bwd import Sample

BF16 = torch.bfloat16
SUITED = tuple(case for case in CASES if hopper_bwd.unsuited(case.spec) is None)


def kernel_of(spec: AttentionSpec) -> BackwardKernel:
    spec = replace(spec, lse=True)
    kernel = emit_backward(spec, (hopper_bwd.tile_of(spec),))
    assert isinstance(kernel, BackwardKernel), kernel
    return kernel


def sample(spec: AttentionSpec, problem: Problem) -> Sample:
    return replace(verify_bwd.sample(replace(spec, lse=True), problem), extras=False)


def verdicts(source: str, at: Sample) -> dict[str, Check]:
    return verify_bwd.check(simulated(source).launch(*at.arguments), at)


def right(spec: AttentionSpec, problem: Problem) -> None:
    at = sample(spec, problem)
    found = verdicts(kernel_of(spec).source, at)
    assert {"q", "k", "v"} == found.keys()
    assert all(verdict.ok for verdict in found.values()), {of: str(verdict) for of, verdict in found.items()}


@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize("case", SUITED, ids=lambda case: case.name)
def test_gradients_are_within_budget(case: Case, rows: int) -> None:
    right(case.spec, case.problem(rows))
