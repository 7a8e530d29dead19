"""What one site gets: a tile, one for its gradients, and the kernels of both.

Choices that were made before come first; the cost model makes the others. Identical sites share all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from attngen import fp8, hopper
from attngen.aot import Layout
from attngen.cache import lookup
from attngen.cache.key import Wanted
from attngen.cache.lookup import Choice, Choices
from attngen.choose import Plan, choose
from attngen.choose_bwd import BackwardPlan, choose_backward
from attngen.device import Device
from attngen.emit import BackwardKernel, Kernel, emit, emit_backward
from attngen.errors import CacheMissed, Miss
from attngen.spec import HOPPER, PORTABLE, AttentionSpec, Problem, Tile

log = logging.getLogger("attngen")


# -------------------------------------------------------------------------------------------------------------- choices


def forward(wanted: Wanted, choices: Choices) -> tuple[Plan | Miss, Choice | None]:
    """The plan, and the choice that it follows, if one had been made before and can run."""
    about = (wanted.spec, wanted.problem, wanted.device)
    given = choices.find(wanted)
    plan = chosen(*about, given.tiles[0] if given else None, misaligned(wanted.spec, wanted.inputs))
    if isinstance(plan, Miss):
        return plan, None
    return plan, _followed(given, (plan.tile,), wanted, choices)


def gradients(wanted: Wanted, choices: Choices) -> tuple[BackwardPlan | Miss | None, Choice | None]:
    """The same for the gradients; None where nobody asks for any."""
    if not wanted.spec.lse:
        return None, None
    about = (wanted.spec, wanted.problem, wanted.device)
    plan = choose_backward(*about, deterministic=wanted.deterministic)
    if isinstance(plan, Miss):
        return plan, None
    given = choices.find(wanted)
    plan = choose_backward(*about, given.tiles if given else None, deterministic=wanted.deterministic)
    assert isinstance(plan, BackwardPlan)
    return plan, _followed(given, plan.tiles, wanted, choices)


def _followed(given: Choice | None, tiles: tuple[Tile, ...], wanted: Wanted, choices: Choices) -> Choice | None:
    """``given`` if that is what is used. Raises ``CacheMissed`` where there must be a choice that can be used."""
    if given is not None and given.tiles != tiles:
        log.warning(
            "%s: the %s's tile %s cannot run on %s; %s is used",
            wanted.where, given.source, _listed(given.tiles), wanted.device.label, _listed(tiles),
        )  # fmt: skip
        given = None
    if given is None and choices.mode == lookup.ASSERT:
        raise CacheMissed(
            f"{wanted.where}: no tile of its {wanted.phase} has been tuned on {wanted.device.label}, and the cache must have "
            "one (cache=assert). Measure it there: attngen tune model.py"
        )
    return given


def _listed(tiles: tuple[Tile, ...]) -> str:
    return ", ".join(map(str, tiles))


@lru_cache(maxsize=4096)
def chosen(
    spec: AttentionSpec, problem: Problem, device: Device, tile: Any = None, misaligned: str | None = None
) -> Plan | Miss:
    """The plan for a spec: the tile that is given, or the model's pick. Identical sites share it."""
    return choose(spec, problem, device, tile, misaligned)


def in_eighths(spec: AttentionSpec, problem: Problem, device: Device, asked: str) -> tuple[AttentionSpec, str]:
    """``spec`` with products of 8-bit numbers, if that is ``asked`` for and can be; else itself, and why it cannot."""
    if asked == fp8.OFF:
        return spec, ""
    eighths = replace(spec, fp8=asked)
    plan = chosen(eighths, problem, device)
    return (spec, plan.reason) if isinstance(plan, Miss) else (eighths, "")


def misaligned(spec: AttentionSpec, traced: Sequence[Layout]) -> str | None:
    """Why TMA cannot address the operands as they were traced, if so; ``suits`` looks again at each call."""
    if hopper.unsuited(spec) is not None:
        return None
    return hopper.misaligned(spec, [(layout.shape, layout.strides, layout.offset) for layout in traced])


# -------------------------------------------------------------------------------------------------------------- kernels


_EMITTED: dict[tuple[str, Any, int, int], Kernel | Miss] = {}


def emitted(plan: Plan, device: Device, where: str) -> Kernel | Miss:
    """The kernel of a plan; the first site that needs it is named in its header."""
    key = (plan.spec.text, plan.tile, device.l2_bytes, device.sms)
    if key not in _EMITTED:
        lines = (
            f"Predicted for {plan.device}: {plan.cost.seconds * 1e3:.3f} ms, {plan.cost.hbm_bytes / 1e6:.1f} MB of HBM"
            f" traffic at {_sizes(plan.problem)}.",
            f"First needed by {where}.",
        )
        kernel = emit(plan.spec, plan.tile, notes=lines, l2_bytes=device.l2_bytes, sms=device.sms)
        if isinstance(kernel, Kernel) and plan.tile.family == HOPPER:
            kernel = replace(kernel, otherwise=_otherwise(plan, device))
        _EMITTED[key] = kernel
    return _EMITTED[key]


def _otherwise(plan: Plan, device: Device) -> Kernel | None:
    """The portable kernel, for calls whose operands turn out to be nothing that TMA can address."""
    spec, ranked = replace(plan.spec, fp8=""), plan.ranked
    if plan.spec.fp8:
        usual = chosen(spec, plan.problem, device)
        ranked = () if isinstance(usual, Miss) else usual.ranked
    tile = next((tile for tile, _ in ranked if tile.family == PORTABLE), None)
    kernel = tile and emit(spec, tile, l2_bytes=device.l2_bytes, sms=device.sms)
    return kernel if isinstance(kernel, Kernel) else None


def _sizes(problem: Problem) -> str:
    return f"batch {'x'.join(map(str, problem.batch)) or '1'}, {problem.rows} queries, {problem.keys} keys"


def emitted_backward(
    spec: AttentionSpec, problem: Problem, plan: BackwardPlan, device: Device, where: str
) -> BackwardKernel | None:  # fmt: skip
    """The kernels of a plan for gradients, if there can be such kernels."""
    key = (spec.text, plan.tiles, device.l2_bytes, device.sms)
    if key not in _BACKWARDS:
        lines = (
            f"Predicted for {device.name}: {plan.seconds * 1e3:.3f} ms at {_sizes(problem)}.",
            f"First needed by {where}.",
        )
        kernel = emit_backward(spec, plan.tiles, notes=lines, l2_bytes=device.l2_bytes, sms=device.sms)
        if isinstance(kernel, BackwardKernel) and plan.otherwise:
            other = emit_backward(spec, plan.otherwise, l2_bytes=device.l2_bytes)
            kernel = replace(kernel, otherwise=other if isinstance(other, BackwardKernel) else None)
        _BACKWARDS[key] = kernel
    kernel = _BACKWARDS[key]
    return None if isinstance(kernel, Miss) else kernel


_BACKWARDS: dict[tuple[str, Any, int, int], BackwardKernel | Miss] = {}
