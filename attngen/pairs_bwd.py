"""Kernels for gradients of what is loaded into scores for each pair, beside a backward of the operands alone.

Several heads, or batches, read the same bias, and every pair of a diagonal the same entry of a table. Added up by atomics
from each pair on its own that takes longer than all products together (on an H200 3 to 6 ms beside 3, for 64 heads of
4,096 x 4,096). So a program makes a block of pairs again, two products of five, for all heads that share it, and adds up in
registers.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from attngen.algebra import Const
from attngen.bounds import Bounds, is_plain, loop_bounds
from attngen.gradient import DIAGONAL, PAIR, SCATTERED, Backward, Target, adjoints, sharing
from attngen.layout import base_of, used_dims
from attngen.mask import EVERYTHING, Cover, by_position, derive
from attngen.portable import helpers_of, products_of
from attngen.portable_bwd import NAMES, address_of, body_of, target_of
from attngen.printer import Printer
from attngen.scores import in_units, score_lines
from attngen.sides import Side, called_with, heads_of, leading
from attngen.spec import KEY, ROW, SCORE, Input, Tile

PREFIX = "pair_"  # of functions that the file has in Gluon too
TILES = {64: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2)}  # by the width of a head: the best of six that were measured


def kernels(plan: Backward) -> list[dict[str, Any]]:
    """What fills ``pairs_bwd.jinja``, for each gradient that such a kernel makes."""
    able = [target for target in plan.extras if target.kind in (PAIR, DIAGONAL, SCATTERED)]
    return [_kernel(plan, target, members) for target in able if (members := _members(plan, target)) is not None]


def helpers(made: list[dict[str, Any]]) -> dict[str, Any]:
    """Which functions of ``portable_helpers.jinja`` the kernels call."""
    names = made[0]["helpers"] if made else ()
    return {name: next(filter(None, (kernel["helpers"][name] for kernel in made)), "") for name in names}


def _members(plan: Backward, target: Target) -> tuple[Any, ...] | None:
    """The batch axes along which heads read the same; None if a kernel cannot go over them."""
    members = sharing(plan.spec, target.source)
    known = [(axis, by) for axis, by in plan.members if by]
    return members if members is not None and all(not by or (axis, by) in known for axis, by in members) else None


def _kernel(plan: Backward, target: Target, members: tuple[Any, ...]) -> dict[str, Any]:
    spec = plan.spec
    grad = Input("grad", spec.output, spec.out_dtype)
    side = Side("queries", spec, (spec.query, grad), (spec.keys, spec.values), plan, TILES[64], True)
    printer = Printer(spec, known=dict(NAMES), prefix=PREFIX)
    scale, shaped, natural = in_units(spec)
    score = score_lines(printer, spec, scale, shaped, natural)
    factor, _ = leading(dict(adjoints(spec, spec.score)).get(SCORE, Const(0.0)))
    body = body_of(printer, side, spec.score, factor, masked=True)
    bounds = _bounds(printer, plan)
    operands = (spec.query, grad, spec.keys, spec.values)
    laid_out = [*operands, *spec.extras, target.place]
    tensors = [*(x.name for x in laid_out), "lse", "delta", *(["rare"] if plan.redo else [])]
    strides = [f"{x.name}_stride_{d}" for x in laid_out for d in used_dims(x)]
    sizes = [f"size_{a.name}" for a in (*spec.batch, ROW, KEY)]
    sizes += [f"sources_{a.name}" for a, by in members if by]
    return {
        "source": target.source.name,
        "at": {x.name: address_of(side, printer, x) for x in operands},
        "bases": [base_of(x, printer) for x in spec.extras],
        "prologue": [f"scale = {scale!r}  # scores times this are in base 2"] * bool(score["times"]) + printer.prologue,
        "reads": list(dict.fromkeys([*score["masked_reads"], *body["reads"]])),
        "score": score,
        "value": body["extras"][target.source.name],
        "target": target_of(side, printer, target),
        "bounds": bounds,
        "heads": heads_of(replace(side, queries=False, plan=replace(plan, members=members))),
        "helpers": helpers_of(printer, bounds),
        "tensors": [f"{name}_ptr" for name in tensors],
        "call_tensors": tensors,
        "stride_names": strides,
        "call_strides": [called_with(name) for name in strides],
        "sizes": sizes,
        "call_sizes": sizes,
        "unspecialised": json.dumps(sizes),
        **products_of(spec),
    }


def _bounds(printer: Printer, plan: Backward) -> Bounds:
    """Which keys matter to a tile of queries, as far as that is one stretch that positions alone bound."""
    visit = tuple(map(by_position, derive(plan.spec.mask).visit))
    names = {axis.name for axis in plan.spec.batch}
    for cover in (Cover(visit, (), False), Cover((EVERYTHING,), (), False)):
        bounds = loop_bounds(printer, cover, warps=4)
        if is_plain(cover) and not bounds.compares and names.isdisjoint(re.findall(r"\w+", " ".join(bounds.lines))):
            break
    return bounds
