"""Is a replaced graph as good as eager? The judge is float64: results may be off by twice what eager is.

Rows that eager computes well are held to that. Rows that it loses to rounding (huge scores, fills that drown scores) must
be what either of the two says, as far as that is stable when the inputs are one rounding off; or what eager says without
some of its roundings to 16 bits (``fuzz_roundings``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from fuzz_graphs import Case
from fuzz_roundings import Exact, with_fewer
from torch import Tensor

from attngen.verify import within_budget

# A row's error may be this many times what one rounding of the inputs does to it.
UNSTABLE = {torch.float32: 64, torch.float16: 4, torch.bfloat16: 4}
SLIGHT = 1e-2  # of the largest value: what eager is off by less than that is rounding, and no other meaning
GRADIENT = 32  # roundings of the largest value, in the coarsest type of all, that a gradient may be off


Run = Callable[..., Any]


def results_of(run: Run, case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results, then inputs as the graph leaves them, then gradients if asked for."""
    leaves = [x.clone().requires_grad_(case.training and x.is_floating_point()) for x in inputs]
    with torch.set_grad_enabled(case.training):
        given = [x.clone() for x in leaves]
        results = list(run(*given))
        seen = [x.detach().clone() for x in (*results, *given)]
        parts = [(r * _slope(r.detach())).sum() for r in results if r.requires_grad]
    if not parts:
        return seen
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(parts, wanted, allow_unused=True)
    return [*seen, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=True))]


def _slope(result: Tensor) -> Tensor:
    """Of a loss: any number, but for a NaN it is NaN, as in every loss that is not linear.

    Else spellings differ in what a row of NaN leaves to its keys: exp(s) over its sum is zero for all but infinite ones.
    """
    return torch.arange(result.numel()).cos().view(result.shape).to(result.dtype).masked_fill(result.isnan(), torch.nan)


def judged(case: Case, ours: Sequence[Tensor], eager: Sequence[Tensor]) -> str:
    """What is wrong with ``ours``, if anything; both are ``results_of`` the case."""
    exact, near = references(case)
    seen = [exact, eager, *near]
    if not all(x.isfinite().all() for x in case.inputs):
        seen = _without_hidden(case, ours, seen)
    results, values = _counts(case)
    lost = not all(x.isfinite().all() for x in seen[1][:results] if x.dtype.is_floating_point)
    wrong = difference(ours, seen[0], seen[2:], seen[1], values, lost)
    return wrong and difference(ours, seen[0], seen[2:], seen[1], values, lost, _less_rounded(case))


def _without_hidden(case: Case, ours: Sequence[Tensor], seen: list[list[Tensor]]) -> list[list[Tensor]]:
    """``seen`` as if infinite scores that are masked were not there, where we do not see them.

    -inf is added to them: that is NaN if they are +inf or NaN, and nothing to a kernel, which skips what is masked. What is
    right instead is what comes of ordinary numbers in their place: the same only if they do not matter.
    """
    tame = replace(case, inputs=tuple(x.nan_to_num(1.0, 1.0, 1.0) for x in case.inputs))
    exact, near = references(tame)
    others = [exact, results_of(tame.gm.forward, tame, tame.inputs), *near]
    unseen = [x.isfinite() & truth.isnan() & eager.isnan() for x, truth, eager in zip(ours, seen[0], seen[1], strict=True)]
    return [
        [torch.where(hidden, there, here) for hidden, here, there in zip(unseen, mine, other, strict=True)]
        for mine, other in zip(seen, others, strict=True)
    ]


def _counts(case: Case) -> tuple[int, int]:
    """How many of ``results_of`` are results, and how many are values, not gradients."""
    results = len(case.gm.graph.output_node().args[0])  # type: ignore[arg-type]
    return results, results + len(case.inputs)


def references(case: Case) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Results in float64, and eager's for inputs that are one rounding off, in three ways: one may happen to move nothing."""
    exact = results_of(Exact(case.gm).run, case, _doubled(case))
    return exact, [results_of(case.gm.forward, case, [_nudged(x, phase) for x in case.inputs]) for phase in range(3)]


def _less_rounded(case: Case) -> list[list[Tensor]]:
    return [results_of(each.run, case, _doubled(case)) for each in with_fewer(case.gm, case.inputs)]


def _doubled(case: Case) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in case.inputs]


def _nudged(x: Tensor, phase: int) -> Tensor:
    if not x.is_floating_point():
        return x
    return x * (1 + 2 * torch.finfo(x.dtype).eps * (torch.arange(x.numel()) + phase).cos().view(x.shape)).to(x.dtype)


def difference(
    ours: Sequence[Tensor], exact: Sequence[Tensor], nudged: Sequence[Sequence[Tensor]], eager: Sequence[Tensor],
    values: int, lost: bool, others: Sequence[Sequence[Tensor]] = (),
) -> str:  # fmt: skip
    """Empty if ``ours`` is as good as ``eager``; else what is off. The first ``values`` are no gradients; ``lost``: the loss
    is not finite; ``others`` are as right as eager."""
    coarsest = max((torch.finfo(x.dtype).eps for x in ours if x.dtype.is_floating_point), default=0.0)
    largest = max((float(x.double().nan_to_num(0, 0, 0).abs().max()) for x in exact if x.numel()), default=0.0)
    for place, (mine, truth, theirs, *near) in enumerate(zip(ours, exact, eager, *nudged, strict=True)):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"result {place} is {mine.dtype} {tuple(mine.shape)}, not {theirs.dtype} {tuple(theirs.shape)}"
        if not mine.dtype.is_floating_point:
            if not torch.equal(mine, theirs):
                return f"result {place} differs"
            continue
        info = torch.finfo(mine.dtype)
        # The gradient of a saturated row is a difference of equal numbers, which only eager's order makes exactly zero.
        floor = info.tiny if place < values else GRADIENT * coarsest * largest
        if place >= values:  # eager's gradients of rows without any pair are NaN for all of a head; nobody can use them
            defined = truth.isfinite() & theirs.isfinite()
            if lost:  # such a loss has no gradient: that eager's is a number here and there is chance
                defined &= ~mine.isnan()
            mine, truth, theirs = (torch.where(defined, x, 0.0) for x in (mine, truth, theirs))
        if wrong := _off(mine, truth, near, theirs, floor, [other[place] for other in others]):
            return f"result {place}: {wrong}"
    return ""


def _off(mine: Tensor, truth: Tensor, near: Sequence[Tensor], theirs: Tensor, floor: float, others: Sequence[Tensor]) -> str:
    """What is off with ``mine``; below ``floor`` nothing counts. ``near``: eager's for inputs one rounding off."""
    kinds = [_kind(x) for x in (mine, truth.to(mine.dtype), theirs)]
    # Sums that float32 holds just so, and bfloat16 with it, overflow on the way or do not, by the order of adding. What is
    # left of such summands, where they cancel, is no smaller than their last digit.
    single = torch.finfo(torch.float32)
    on_the_way = torch.finfo(mine.dtype).max > 1e38
    vast = on_the_way & (truth.abs() > single.eps * torch.finfo(mine.dtype).max)
    overflowed = (kinds[2] != 0) & ~truth.isnan()  # to an infinity or, where two meet, to NaN
    alike = (kinds[0] == kinds[1]) | (kinds[0] == kinds[2]) | ((kinds[0] != 0) & (vast | overflowed))
    if not alike.all():
        place = tuple((~alike).nonzero()[0].tolist())
        return f"{mine[place]} at {place} instead of {truth[place]} (eager {theirs[place]})"
    finite = torch.stack([*(kind == 0 for kind in kinds), *(x.isfinite() for x in near)]).all(0)
    ours, exact, eager, *nudged = (
        torch.where(finite, x.double(), 0.0).reshape(-1, x.shape[-1] if x.dim() else 1) for x in (mine, truth, theirs, *near)
    )
    rows = (eager - exact).abs().amax(-1)
    good = rows <= 8 * rows[rows > 0].median().nan_to_num()
    check = within_budget(ours[good].to(mine.dtype), exact[good], eager[good].to(mine.dtype))
    right = [exact, eager, *(torch.where(finite, x.double(), 0.0).view_as(exact) for x in others)]
    distance = torch.stack([(ours - x).abs() for x in right]).amin(0).amax(-1)
    unstable = torch.stack([(eager - x).abs().amax(-1) for x in nudged]).amax(0)
    slight = torch.where(rows <= SLIGHT * exact.abs().max(), rows, 0.0).amax()
    allowed = check.budget + UNSTABLE[mine.dtype] * unstable + 2 * slight + floor
    if (check.ok and good.all()) or bool((distance <= allowed).all()):
        return ""
    worst = int((distance - allowed).argmax())
    return f"error {distance[worst]:.2e} in row {worst}, allowed {allowed[worst]:.2e}"


def _kind(x: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 inf, 3 -inf, elementwise."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()
