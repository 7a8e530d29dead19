"""What a report says of each site: where it is, what it computes and at what cost, or why it stays and what would help."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import fx

from attngen import advice, candidates, compat, cost, hopper, naming
from attngen.algebra import ONE, TRUE, Expr, Int, Op, negate, number, transform
from attngen.cache.lookup import MODEL, Choice
from attngen.choose import Plan
from attngen.choose_bwd import BackwardPlan
from attngen.device import Device
from attngen.errors import Miss
from attngen.passes import provenance
from attngen.passes.bands import SHARED
from attngen.passes.detect import Site
from attngen.report import SiteReport
from attngen.spec import KEY, ROW, AttentionSpec, Problem
from attngen.text import readable

if TYPE_CHECKING:
    from attngen.pipeline import Found, Missed

BEHIND = "a portable kernel, for rows that masks leave nothing of: what the model fills in shows there"


def missed(each: Missed) -> SiteReport:
    report = SiteReport(each.where, "missed", each.reason, node=each.node, advice=advice.on(each.reason))
    if each.blamed is not None:
        at = provenance.exact_place(each.blamed)
        report = replace(report, blamed={"file": at.file, "line": at.line, "code": at.code})
    return _placed(report, each.anchor)


def found(each: Found, device: Device, status: str) -> SiteReport:
    known = planned(each.plan, device, each.backward, _scores(each.placed.site))
    report = replace(known, where=each.where, status=status)
    if each.in_16_bits:
        report = replace(report, computes=f"{report.computes}, not fp8: {each.in_16_bits}")
    report = _chosen(report, *each.given)
    if len(each.terms) > 1:
        number = 1 + next(place for place, term in enumerate(each.terms) if term is each.placed)
        report = replace(report, computes=f"{report.computes}, term {number} of {len(each.terms)}")
    return _placed(replace(report, node=each.placed.site.output.name, loads=dict(each.loads)), each.anchor)


def _placed(report: SiteReport, anchor: fx.Node | None) -> SiteReport:
    if anchor is None:
        return report
    place = provenance.place(anchor)
    return replace(report, module=place.module, file=place.file, line=place.line)


def _scores(site: Site) -> int | None:
    """How many the model has, where each query has a window of keys; else one for each pair."""
    value = site.dot.node.meta["val"]  # type: ignore[attr-defined]
    return math.prod(compat.hint(size) for size in value.shape) if site.key.name == SHARED else None


@lru_cache(maxsize=4096)
def planned(plan: Plan, device: Device, gradients: BackwardPlan | Miss | None, scores: int | None = None) -> SiteReport:
    """What a report says of every site that has this plan, and in the model as many ``scores``."""
    before = int(cost.eager_hbm_bytes(plan.spec, plan.problem, scores))
    report = SiteReport(
        "",
        "found",
        computes=computes(plan.spec, plan.problem),
        family=plan.tile.family,
        tile=str(plan.tile),
        behind=BEHIND if hopper.leaves_rows(plan.spec, plan.tile) else "",
        predicted_ms=plan.cost.seconds * 1e3,
        hbm_bytes={"before": before, "after": int(plan.cost.hbm_bytes)},
        sizes={"batch": list(plan.problem.batch), "rows": plan.problem.rows, "keys": plan.problem.keys},
        formula=tuple(cost.formula(plan, device)),
        refused=tuple(f"{r.tile}: {r.reason}" for r in plan.refused),
        candidates=candidates.of(plan, device),
    )
    if isinstance(gradients, BackwardPlan):
        tiles = tuple(map(asdict, gradients.tiles))
        return replace(report, backward=str(gradients), backward_ms=gradients.seconds * 1e3, backward_tiles=tiles)
    return report if gradients is None else replace(report, backward=f"block by block: {gradients.reason}")


def _chosen(report: SiteReport, given: Choice | None, given_backward: Choice | None) -> SiteReport:
    """With where its choices come from, and what they took where that was measured."""
    report = replace(report, source=given.source if given else MODEL, measured_ms=_measured(given))
    if not report.backward_tiles:
        return report
    source = given_backward.source if given_backward else MODEL
    return replace(report, backward_source=source, backward_measured_ms=_measured(given_backward))


def _measured(given: Choice | None) -> float | None:
    return None if given is None or given.microseconds is None else given.microseconds / 1e3


def computes(spec: AttentionSpec, problem: Problem) -> str:
    """One line for people: ``softmax(0.125*qk; causal & window(4096)), 32 heads on 8, d=128, bfloat16``.

    It is "weights" where nothing normalises.
    """
    score = readable(_by_distance(spec.score))
    named = naming.describe(spec.mask)
    shown = f"; {named}" if named else (f"; where {readable(spec.mask)}" if spec.mask != TRUE else "")
    times = f"; {_gain(spec.gain)}" if spec.gain != ONE else ""
    sinks = f"; sinks {', '.join(map(readable, spec.sinks))}" if spec.sinks else ""
    sizes = f"d={spec.head_dim}" + (f"/{spec.value_dim}" if spec.value_dim != spec.head_dim else "")
    lengths = f"{'x'.join(map(str, problem.batch)) or '1'} heads, {problem.rows} x {problem.keys}"
    kind = str(spec.query.dtype).removeprefix("torch.") + (f" in fp8 ({spec.fp8})" if spec.fp8 else "")
    return f"{'softmax' if spec.softmax else 'weights'}({score}{shown}{times}{sinks}), {lengths}, {sizes}, {kind}"


def _by_distance(score: Expr) -> Expr:
    """A table over diagonals as a function of ``j - i``: which of its elements is the first matters to nobody."""

    def rule(node: Expr) -> Expr | None:
        return Int(KEY - ROW) if isinstance(node, Int) and node.value == KEY - ROW + ROW.extent - 1 else None

    return transform(score, rule)


def _gain(gain: Expr) -> str:
    """``times ...``, or where a weight is zero if it is one elsewhere."""
    if isinstance(gain, Op) and gain.name == "where" and [number(arg) for arg in gain.args[1:]] in ([0.0, 1.0], [1.0, 0.0]):
        condition = gain.args[0] if number(gain.args[1]) == 0 else negate(gain.args[0])
        return f"zero where {readable(condition)}"
    return f"times {readable(gain)}"
